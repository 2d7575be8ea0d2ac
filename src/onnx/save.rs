//! Writes models: weights inside the model file, beside it, or left where they are.
//!
//! Every file is written under a temporary name, made durable, and then renamed into place, data before model. A file
//! that the model reads from is never overwritten, and on any error no file of the caller's is touched.

use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::path::{Component, Path, PathBuf};

use prost::Message;

use super::external::{ExternalData, ExternalFile};
use super::model::{self, Model};
use super::proto::tensor_proto::DataLocation;
use super::proto::{StringStringEntryProto, TensorProto};
use super::tensor;
use super::walk;
use crate::error::{Error, Result};
use crate::os::{self, FileIdentity};

/// Where the weights of a saved model go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Weights {
    /// Into the model file, which must stay below 2 GiB.
    Inline,
    /// Into one file beside the model, of this name; `None` for the model's file name with `_data` behind.
    OneFile(Option<String>),
    /// Each into a file of its own, named after the tensor, in a folder of this name beside the model.
    FileEach(String),
    /// Weights that are external stay in their files, which must lie below the folder that is saved to; all others go
    /// into the model file.
    Reference,
    /// [`Weights::Inline`] if the result is below 2 GiB, else [`Weights::OneFile`].
    Auto,
}

/// How [`Model::save`] writes.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SaveOptions {
    /// Where the weights go. Default [`Weights::Auto`].
    pub weights: Weights,
    /// Tensors of fewer bytes stay in the model file, whatever `weights` says. Default 1,024: ONNX Runtime needs the
    /// values of small tensors to infer shapes.
    pub inline_below: usize,
    /// External data begins at a multiple of this many bytes. Default 4,096, a page.
    pub alignment: u64,
}

impl Default for SaveOptions {
    fn default() -> Self {
        Self { weights: Weights::Auto, inline_below: 1_024, alignment: 4_096 }
    }
}

/// The largest message that Protocol Buffers allow.
const MAXIMUM_FILE: u64 = (1 << 31) - 1;

impl Model {
    /// Writes the model to a file, and its weights as the options say. The model in memory does not change: weights
    /// that were external still are, in the files that they came from.
    ///
    /// Errors: [`crate::Status::InvalidArgument`] for options that contradict each other or a file that the model reads
    /// from; [`crate::Status::LimitExceeded`] if the model file would reach 2 GiB; [`crate::Status::Io`].
    pub fn save(&self, path: impl AsRef<Path>, options: &SaveOptions) -> Result<()> {
        let path = path.as_ref();
        self.save_to(path, options).map_err(|error| error.at(format_args!("saving {}", path.display())))
    }

    fn save_to(&self, path: &Path, options: &SaveOptions) -> Result<()> {
        let Some(file_name) = path.file_name().and_then(|name| name.to_str()) else {
            return Err(Error::invalid_argument("expected a path that ends in a UTF-8 file name"));
        };
        if options.alignment == 0 {
            return Err(Error::invalid_argument("alignment is 0, expected at least 1"));
        }
        let folder = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let mut saved = self.clone();
        let mut written = Vec::new();
        match &options.weights {
            Weights::Inline => self.make_inline(&mut saved)?,
            Weights::Auto if self.inline_length()? <= MAXIMUM_FILE => self.make_inline(&mut saved)?,
            Weights::Auto => self.one_file(&mut saved, folder, &format!("{file_name}_data"), options, &mut written)?,
            Weights::OneFile(name) => {
                let name = name.clone().unwrap_or_else(|| format!("{file_name}_data"));
                if name == file_name {
                    return Err(Error::invalid_argument("weights and model can't have the same file name"));
                }
                self.one_file(&mut saved, folder, &name, options, &mut written)?;
            }
            Weights::FileEach(name) => self.file_each(&mut saved, folder, name, options, &mut written)?,
            Weights::Reference => saved.refer_from(folder)?,
        }
        let bytes = model::encode(&saved.header, &saved.graph)?;
        let mut file = self.create(path)?;
        file.write_all(&bytes)?;
        written.push(file.finish()?);
        // The model comes last: what names the data appears when the data is there.
        written.into_iter().try_for_each(Finished::rename)
    }

    /// The bytes that the model file has if all weights are in it.
    fn inline_length(&self) -> Result<u64> {
        let mut length = (self.header.encoded_len() + self.graph.encoded_len()) as u64;
        walk::each_tensor(&self.header, &self.graph, &mut |tensor, _| {
            if tensor::is_external(tensor) {
                length = length.saturating_add(tensor::stored_bytes(tensor)?);
            }
            Ok(())
        })?;
        // Room for the lengths of the messages around the data.
        const SLACK: u64 = 1 << 20;
        Ok(length + SLACK)
    }

    fn make_inline(&self, saved: &mut Model) -> Result<()> {
        let length = self.inline_length()?;
        if length > MAXIMUM_FILE {
            return Err(Error::limit_exceeded(format!(
                "with its weights inside the model would have about {length} bytes, ONNX allows {MAXIMUM_FILE}: save \
                 them in a file beside it"
            )));
        }
        walk::each_tensor_mut(&mut saved.header, &mut saved.graph, &mut |tensor| self.bring_inline(tensor))
    }

    fn one_file(
        &self,
        saved: &mut Model,
        folder: &Path,
        name: &str,
        options: &SaveOptions,
        written: &mut Vec<Finished>,
    ) -> Result<()> {
        check_plain_name(name)?;
        let mut file = self.create(&folder.join(name))?;
        let mut end = 0u64;
        walk::each_tensor_mut(&mut saved.header, &mut saved.graph, &mut |tensor| {
            let Some(length) = self.to_move(tensor, options)? else {
                return self.bring_inline(tensor);
            };
            let offset = end.next_multiple_of(options.alignment);
            file.write_zeros(offset - end)?;
            self.write_data(tensor, &mut file)?;
            end = offset + length;
            make_external(tensor, name, offset, length);
            Ok(())
        })?;
        written.push(file.finish()?);
        Ok(())
    }

    fn file_each(
        &self,
        saved: &mut Model,
        folder: &Path,
        name: &str,
        options: &SaveOptions,
        written: &mut Vec<Finished>,
    ) -> Result<()> {
        check_plain_name(name)?;
        let data_folder = folder.join(name);
        std::fs::create_dir_all(&data_folder)
            .map_err(|error| Error::io(format_args!("making the folder {}", data_folder.display()), error))?;
        let mut count = 0usize;
        walk::each_tensor_mut(&mut saved.header, &mut saved.graph, &mut |tensor| {
            let Some(length) = self.to_move(tensor, options)? else {
                return self.bring_inline(tensor);
            };
            // Tensor names may hold anything; a number keeps files apart whose names become the same.
            let plain = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_') { c } else { '_' };
            let readable: String = tensor.name().chars().map(plain).take(100).collect();
            let file_name = format!("{count:05}-{readable}");
            count += 1;
            let mut file = self.create(&data_folder.join(&file_name))?;
            self.write_data(tensor, &mut file)?;
            written.push(file.finish()?);
            make_external(tensor, &format!("{name}/{file_name}"), 0, length);
            Ok(())
        })
    }

    /// The bytes of a tensor if it is to go into an external file.
    fn to_move(&self, tensor: &TensorProto, options: &SaveOptions) -> Result<Option<u64>> {
        let length = tensor::stored_bytes(tensor)?;
        let numbers = tensor::data_type_of(tensor)?.bits().is_some();
        Ok((numbers && length > 0 && length >= options.inline_below as u64).then_some(length))
    }

    fn bring_inline(&self, tensor: &mut TensorProto) -> Result<()> {
        if tensor::is_external(tensor) {
            let data = self.tensor(tensor)?.read()?;
            tensor.external_data = Vec::new();
            tensor.data_location = None;
            tensor.raw_data = Some(data);
        }
        Ok(())
    }

    /// Copies a tensor's data to a file; external data in pieces, so that no tensor need fit in memory.
    fn write_data(&self, tensor: &TensorProto, file: &mut Unfinished) -> Result<()> {
        const PIECE: u64 = 4 << 20;
        let view = self.tensor(tensor)?;
        let Some(ExternalData { file: source, offset, length }) = view.external() else {
            return file.write_all(&view.read()?);
        };
        let reader = source.open()?;
        let mut piece = Vec::new();
        piece.try_reserve_exact(PIECE.min(*length) as usize)?;
        let mut done = 0;
        while done < *length {
            piece.resize(PIECE.min(length - done) as usize, 0);
            let failed = |error| Error::io(format_args!("reading external data {:?}", source.location()), error);
            os::read_exact_at(&reader, &mut piece, offset + done).map_err(failed)?;
            file.write_all(&piece)?;
            done += piece.len() as u64;
        }
        source.check_unchanged(&reader)
    }

    /// Rewrites locations to be relative to a folder.
    fn refer_from(&mut self, folder: &Path) -> Result<()> {
        let folder =
            folder.canonicalize().map_err(|error| Error::io(format_args!("the folder {}", folder.display()), error))?;
        self.relocate(|file: &ExternalFile| {
            let path = file.path();
            let relative = path.strip_prefix(&folder).ok().and_then(Path::to_str);
            relative.map(str::to_owned).ok_or_else(|| {
                Error::invalid_argument(format!(
                    "external data {} does not lie below {}: save there with copied weights, or below a folder that \
                     holds both",
                    path.display(),
                    folder.display()
                ))
            })
        })
    }

    /// Begins a file unless it would replace one that this model reads from.
    fn create(&self, path: &Path) -> Result<Unfinished> {
        if let Ok(metadata) = std::fs::metadata(path) {
            let identity = FileIdentity::of(&metadata);
            if !metadata.is_file() {
                return Err(Error::invalid_argument(format!("{} is not a regular file", path.display())));
            }
            if let Some(file) = self.external_files().find(|file| file.is(&identity)) {
                return Err(Error::invalid_argument(format!(
                    "{} is the model's own external data {:?}: choose another name",
                    path.display(),
                    file.location()
                )));
            }
        }
        Unfinished::create(path)
    }
}

fn make_external(tensor: &mut TensorProto, location: &str, offset: u64, length: u64) {
    let entry = |key: &str, value: String| StringStringEntryProto { key: Some(key.into()), value: Some(value) };
    tensor.raw_data = None;
    tensor.float_data = Vec::new();
    tensor.int32_data = Vec::new();
    tensor.int64_data = Vec::new();
    tensor.double_data = Vec::new();
    tensor.uint64_data = Vec::new();
    tensor.external_data = vec![
        entry("location", location.to_owned()),
        entry("offset", offset.to_string()),
        entry("length", length.to_string()),
    ];
    tensor.data_location = Some(DataLocation::External as i32);
}

fn check_plain_name(name: &str) -> Result<()> {
    let mut components = Path::new(name).components();
    let plain = matches!((components.next(), components.next()), (Some(Component::Normal(_)), None));
    if !plain || name.ends_with('/') || name.contains('\\') || name.chars().any(char::is_control) {
        return Err(Error::invalid_argument(format!("{name:?} is not a plain file name")));
    }
    Ok(())
}

/// A file under a temporary name, which is removed unless it is finished and renamed.
struct Unfinished {
    writer: BufWriter<File>,
    temporary: Temporary,
}

struct Temporary {
    path: PathBuf,
    target: PathBuf,
    renamed: bool,
}

/// A durable file that waits to be renamed.
struct Finished(Temporary);

impl Unfinished {
    fn create(target: &Path) -> Result<Self> {
        let name = target.file_name().unwrap_or_default().to_string_lossy().into_owned();
        for attempt in 0u32.. {
            let path = target.with_file_name(format!(".{name}.{}.{attempt}.tmp", std::process::id()));
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => {
                    let temporary = Temporary { path, target: target.to_owned(), renamed: false };
                    return Ok(Self { writer: BufWriter::with_capacity(1 << 16, file), temporary });
                }
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(Error::io(format_args!("writing {}", path.display()), error)),
            }
        }
        Err(Error::invalid_argument("every temporary name is taken"))
    }

    fn write_all(&mut self, data: &[u8]) -> Result<()> {
        self.writer.write_all(data).map_err(|error| self.temporary.failed(error))
    }

    fn write_zeros(&mut self, count: u64) -> Result<()> {
        std::io::copy(&mut std::io::Read::take(std::io::repeat(0), count), &mut self.writer)
            .map(drop)
            .map_err(|error| self.temporary.failed(error))
    }

    fn finish(mut self) -> Result<Finished> {
        let flushed = self.writer.flush().and_then(|()| self.writer.get_ref().sync_all());
        match flushed {
            Ok(()) => Ok(Finished(self.temporary)),
            Err(error) => Err(self.temporary.failed(error)),
        }
    }
}

impl Temporary {
    fn failed(&self, error: std::io::Error) -> Error {
        Error::io(format_args!("writing {}", self.target.display()), error)
    }
}

impl Finished {
    fn rename(mut self) -> Result<()> {
        let Self(temporary) = &mut self;
        std::fs::rename(&temporary.path, &temporary.target).map_err(|error| temporary.failed(error))?;
        temporary.renamed = true;
        let folder = temporary.target.parent().filter(|folder| !folder.as_os_str().is_empty());
        os::sync_folder(folder.unwrap_or(Path::new("."))).map_err(|error| temporary.failed(error))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if !self.renamed {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
