//! An ONNX model in memory: its graph as data, its weights where they are. Opening checks everything that a model can
//! do to its reader; what comes out of here is safe to edit and to hand to ONNX Runtime.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use prost::Message;

use super::check;
use super::external::{self, ExternalFile, ExternalFiles, Roots};
use super::graph::Topology;
use super::limits::Limits;
use super::proto::{GraphProto, ModelProto, OperatorSetIdProto, TensorProto};
use super::tensor::{self, TensorView};
use super::walk;
use super::wire;
use crate::error::{Error, Result};

/// An ONNX model. Cloning shares raw weights.
#[derive(Clone, Debug)]
pub struct Model {
    /// Everything but the graph, which is `None` here.
    pub(super) header: ModelProto,
    pub(super) graph: GraphProto,
    pub(super) files: ExternalFiles,
    pub(super) limits: Arc<Limits>,
}

/// A model as a session can be made of it: see [`Model::for_session`].
#[derive(Clone, Debug)]
pub struct SessionModel {
    /// The serialised model.
    pub bytes: Bytes,
    /// The folder that its external locations are relative to; `None` if it has none.
    pub folder: Option<PathBuf>,
}

impl Model {
    /// Opens a model file and checks it, and the external files that it names, against the limits. Weights in external
    /// files stay there.
    ///
    /// Errors: [`crate::Status::NotFound`], [`crate::Status::Io`], [`crate::Status::InvalidFile`] for what is damaged,
    /// contradicts itself or leads outside the allowed folders, [`crate::Status::LimitExceeded`],
    /// [`crate::Status::Unsupported`].
    pub fn open(path: impl AsRef<Path>, limits: &Limits) -> Result<Self> {
        let path = path.as_ref();
        let data = external::read_file(path, limits)?;
        let folder = path.parent().unwrap_or(Path::new("."));
        Self::decode(data.into(), Some((folder, Some(path))), limits).map_err(|error| error.at(path.display()))
    }

    /// As [`Model::open`] for a model that is in memory; `folder` is where its external data lies, if it has any.
    pub fn from_bytes(data: Bytes, folder: Option<&Path>, limits: &Limits) -> Result<Self> {
        if data.len() as u64 > limits.file_bytes {
            return Err(Error::limit_exceeded(format!(
                "the model has {} bytes, at most {} are allowed",
                data.len(),
                limits.file_bytes
            )));
        }
        Self::decode(data, folder.map(|folder| (folder, None)), limits)
    }

    fn decode(data: Bytes, place: Option<(&Path, Option<&Path>)>, limits: &Limits) -> Result<Self> {
        wire::check(&data, limits)?;
        let mut header = ModelProto::decode(data)
            .map_err(|error| Error::invalid_file(format!("not an ONNX model: {error}")).caused_by(error))?;
        let graph = header.graph.take().ok_or_else(|| Error::invalid_file("the model has no graph"))?;
        let mut files = ExternalFiles::default();
        let mut roots = None;
        check::model(&header, &graph, limits, &mut |tensor, bytes| {
            let (folder, path) = place.ok_or_else(|| {
                Error::invalid_argument("external data, but the model came without a folder to find it in")
            })?;
            let roots = match &mut roots {
                Some(roots) => roots,
                none => none.insert(Roots::new(folder, path, limits)?),
            };
            roots.check(tensor, bytes, &mut files).map(drop)
        })?;
        // One form of data for all that follows, and one that is shared when the graph is copied.
        let (mut header, mut graph) = (header, graph);
        walk::each_tensor_mut(&mut header, &mut graph, &mut tensor::gather_raw)?;
        Ok(Self { header, graph, files, limits: Arc::new(limits.clone()) })
    }

    /// A model of one graph, with the operator sets that it uses; `""` is the standard one.
    pub fn new(graph: GraphProto, opsets: &[(&str, i64)], limits: &Limits) -> Result<Self> {
        let opset = |&(domain, version): &(&str, i64)| OperatorSetIdProto {
            domain: Some(domain.into()),
            version: Some(version),
        };
        // The first format versions that allow the operator sets in use: 10 up to set 22, 11 from 23 on.
        let newest = opsets.iter().filter(|(domain, _)| domain.is_empty()).any(|&(_, version)| version >= 23);
        let header = ModelProto {
            ir_version: Some(if newest { 11 } else { 10 }),
            producer_name: Some("macula".into()),
            opset_import: opsets.iter().map(opset).collect(),
            ..ModelProto::default()
        };
        let model = Self { header, graph, files: ExternalFiles::default(), limits: Arc::new(limits.clone()) };
        model.check()?;
        Ok(model)
    }

    /// Whether the model keeps the rules and its limits: see the errors of [`Model::open`]. Reads no weights.
    pub fn check(&self) -> Result<()> {
        check::model(&self.header, &self.graph, &self.limits, &mut |tensor, bytes| {
            self.files.of(tensor, bytes).map(drop)
        })
    }

    /// The graph.
    pub fn graph(&self) -> &GraphProto {
        &self.graph
    }

    /// The graph, to change it by hand; [`Model::check`] tells whether the result is sound.
    pub fn graph_mut(&mut self) -> &mut GraphProto {
        &mut self.graph
    }

    /// The model without its graph: operator sets, functions, metadata.
    pub fn header(&self) -> &ModelProto {
        &self.header
    }

    /// The limits that the model was opened with.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The version of an operator set that the model imports; `""` is the standard one.
    pub fn opset(&self, domain: &str) -> Option<i64> {
        let standard = |domain: &str| matches!(domain, "" | "ai.onnx");
        let same = |other: &str| other == domain || standard(other) && standard(domain);
        self.header.opset_import.iter().find(|opset| same(opset.domain())).map(|opset| opset.version())
    }

    /// Who makes and uses each value of the graph.
    pub fn topology(&self) -> Topology<'_> {
        Topology::new(&self.graph)
    }

    /// The initializer of that name. Looks through all of them: for many lookups, take [`Model::topology`] and
    /// [`Model::tensor`].
    pub fn initializer(&self, name: &str) -> Result<TensorView<'_>> {
        let found = self.graph.initializer.iter().find(|tensor| tensor.name() == name);
        self.tensor(found.ok_or_else(|| Error::not_found(format!("the graph has no initializer {name:?}")))?)
    }

    /// A view of a tensor of this model with its data.
    pub fn tensor<'m>(&'m self, tensor: &'m TensorProto) -> Result<TensorView<'m>> {
        let external = match tensor::is_external(tensor) {
            true => Some(self.files.of(tensor, tensor::stored_bytes(tensor)?)?),
            false => None,
        };
        TensorView::new(tensor, external)
    }

    /// Bytes of all initializers, as they are stored.
    ///
    /// Errors: those of [`Model::tensor`].
    pub fn weight_bytes(&self) -> Result<u64> {
        let sizes = self.graph.initializer.iter().map(|tensor| Ok(self.tensor(tensor)?.byte_len() as u64));
        sizes.sum()
    }

    /// The external files that the model's tensors lie in.
    pub fn external_files(&self) -> impl Iterator<Item = &ExternalFile> {
        self.files.iter().map(AsRef::as_ref)
    }

    /// Fails unless every external file is still the one that was checked when the model was opened.
    pub fn verify_external_files(&self) -> Result<()> {
        self.external_files().try_for_each(ExternalFile::verify)
    }

    /// The model as bytes of the ONNX format; external data stays external, with its location as the model writes it.
    ///
    /// Errors: [`crate::Status::LimitExceeded`] above 2 GiB - 1, the format's bound: save with external data instead.
    pub fn to_bytes(&self) -> Result<Bytes> {
        encode(&self.header, &self.graph)
    }

    /// The model for ONNX Runtime: each external file is verified now, and locations are rewritten to the canonical
    /// paths below one folder, so that the runtime meets no link and no name that was not checked.
    pub fn for_session(&self) -> Result<SessionModel> {
        self.verify_external_files()?;
        let mut folder: Option<PathBuf> = None;
        for file in self.external_files() {
            let path = file.path();
            let parent = path.parent().unwrap_or(Path::new("/"));
            folder = Some(match folder {
                None => parent.to_owned(),
                Some(folder) => common_folder(&folder, parent),
            });
        }
        let Some(folder) = folder else {
            return Ok(SessionModel { bytes: self.to_bytes()?, folder: None });
        };
        let mut renamed = self.clone();
        renamed.relocate(|file| {
            let path = file.path();
            let relative = path.strip_prefix(&folder).unwrap_or(&path);
            relative
                .to_str()
                .map(str::to_owned)
                .ok_or_else(|| Error::unsupported(format!("external data {:?}: its path is not UTF-8", path.display())))
        })?;
        Ok(SessionModel { bytes: renamed.to_bytes()?, folder: Some(folder) })
    }

    /// Rewrites the location of every external tensor. The model's table of files is not changed.
    pub(super) fn relocate(&mut self, location: impl Fn(&ExternalFile) -> Result<String>) -> Result<()> {
        let files = &self.files;
        walk::each_tensor_mut(&mut self.header, &mut self.graph, &mut |tensor| {
            if !tensor::is_external(tensor) {
                return Ok(());
            }
            for entry in &mut tensor.external_data {
                if entry.key() == "location"
                    && let Some(file) = files.get(entry.value())
                {
                    entry.value = Some(location(file)?);
                }
            }
            Ok(())
        })
    }
}

fn common_folder(a: &Path, b: &Path) -> PathBuf {
    a.components().zip(b.components()).take_while(|(a, b)| a == b).map(|(a, _)| a).collect()
}

/// Writes header and graph as one `ModelProto`. Fields of a message may come in any order, so the graph is written
/// after the rest, with no copy of it made before.
pub(super) fn encode(header: &ModelProto, graph: &GraphProto) -> Result<Bytes> {
    const GRAPH_FIELD: u32 = 7;
    const MAXIMUM: usize = (1 << 31) - 1;
    let length = header.encoded_len() + prost::encoding::message::encoded_len(GRAPH_FIELD, graph);
    if length > MAXIMUM {
        return Err(Error::limit_exceeded(format!(
            "the model would have {length} bytes, ONNX allows {MAXIMUM} in one file: save it with external data"
        )));
    }
    let mut data = Vec::new();
    data.try_reserve_exact(length)?;
    header.encode_raw(&mut data);
    prost::encoding::message::encode(GRAPH_FIELD, graph, &mut data);
    Ok(data.into())
}
