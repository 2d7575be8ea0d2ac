//! A base model's attention K and V weights, pristine, held once; and what a prompt makes of those of cross-attention.
//!
//! It knows no ONNX Runtime and no concept; nothing here is ever changed after it is built.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use ndarray::linalg::general_mat_mul;
use ndarray::{ArrayView2, ArrayViewMut2, Axis};
use rayon::ThreadPool;
use rayon::prelude::*;

use super::fingerprint::{Fingerprint, Hasher};
use super::kernel::Panel;
use super::set::projection_weights;
use crate::error::{Error, Result};
use crate::memory::{PANELS, copied, room, zeroed};
use crate::onnx::{DataType, Model, attention};

/// Weights in the type in which a model stores them.
#[derive(Clone, Debug, PartialEq)]
pub enum Weights {
    /// IEEE single precision.
    F32(Vec<f32>),
    /// IEEE half precision.
    F16(Vec<f16>),
    /// bfloat16.
    Bf16(Vec<bf16>),
}

impl Weights {
    fn len(&self) -> usize {
        match self {
            Self::F32(weights) => weights.len(),
            Self::F16(weights) => weights.len(),
            Self::Bf16(weights) => weights.len(),
        }
    }

    fn memory_bytes(&self) -> usize {
        match self {
            Self::F32(weights) => size_of_val(weights.as_slice()),
            Self::F16(weights) => size_of_val(weights.as_slice()),
            Self::Bf16(weights) => size_of_val(weights.as_slice()),
        }
    }

    /// The weights of a range as f32, in `scratch` where they are stored otherwise.
    pub(super) fn widen<'a>(&'a self, range: Range<usize>, scratch: &'a mut Vec<f32>) -> Result<&'a [f32]> {
        if !matches!(self, Self::F32(_)) {
            scratch.try_reserve_exact(range.len().saturating_sub(scratch.len()))?;
            scratch.resize(range.len(), 0.0);
        }
        match self {
            Self::F32(weights) => return Ok(&weights[range]),
            Self::F16(weights) => weights[range].convert_to_f32_slice(scratch),
            Self::Bf16(weights) => weights[range].convert_to_f32_slice(scratch),
        }
        Ok(scratch)
    }

    /// Fills `to` with the weights from an index on, rounded to float16.
    fn round(&self, start: usize, to: &mut [f16]) {
        let range = start..start + to.len();
        match self {
            Self::F32(weights) => to.convert_from_f32_slice(&weights[range]),
            Self::F16(weights) => to.copy_from_slice(&weights[range]),
            Self::Bf16(weights) => {
                to.iter_mut().zip(&weights[range]).for_each(|(to, from)| *to = f16::from_f32(from.to_f32()));
            }
        }
    }

    /// The weights at some indices, as f32: exact for every stored type.
    pub(super) fn gather(&self, indices: &[u32], to: &mut [f32]) {
        let pairs = to.iter_mut().zip(indices);
        match self {
            Self::F32(weights) => pairs.for_each(|(to, &index)| *to = weights[index as usize]),
            Self::F16(weights) => pairs.for_each(|(to, &index)| *to = weights[index as usize].to_f32()),
            Self::Bf16(weights) => pairs.for_each(|(to, &index)| *to = weights[index as usize].to_f32()),
        }
    }
}

/// One K or V projection, `y = x W^T + b`.
#[derive(Clone, Debug, PartialEq)]
pub struct ProjectionWeights {
    /// The diffusers module path, e.g. `down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k`.
    pub path: String,
    /// Rows of the weight.
    pub out_features: usize,
    /// Columns of the weight: the width of the text encoding.
    pub in_features: usize,
    /// `W`, laid out `[out, in]`.
    pub weights: Weights,
    /// `b`, of `out` numbers.
    pub bias: Option<Vec<f32>>,
}

/// The K and V projections of a base model's cross-attention, in byte-wise order of their module paths; and beside them those
/// of its self-attention, where they were asked for.
#[derive(Debug)]
pub struct Projections {
    /// Differs between any two bases and prompts of this process.
    pub(super) id: u64,
    projections: Vec<ProjectionWeights>,
    self_attention: Vec<ProjectionWeights>,
    in_features: usize,
    fingerprint: OnceLock<Fingerprint>,
}

impl Projections {
    /// Holds these projections.
    ///
    /// Errors: `InvalidArgument` if there is none, if a path comes twice, or if a size does not fit; `Unsupported` if the
    /// projections do not all take the same text encoding.
    pub fn new(projections: Vec<ProjectionWeights>) -> Result<Self> {
        let projections = checked(projections)?;
        let Some(in_features) = projections.first().map(|first| first.in_features) else {
            return Err(Error::invalid_argument("a base model needs at least one K or V projection"));
        };
        if let Some(other) = projections.iter().find(|projection| projection.in_features != in_features) {
            return Err(Error::unsupported(format!(
                "{} takes {} features, other projections take {in_features}",
                other.path, other.in_features
            )));
        }
        Ok(Self { id: next_id(), projections, self_attention: Vec::new(), in_features, fingerprint: OnceLock::new() })
    }

    /// The same with these projections of self-attention, each of a width of its own.
    ///
    /// Errors: `InvalidArgument` as [`Projections::new`].
    pub fn with_self_attention(self, projections: Vec<ProjectionWeights>) -> Result<Self> {
        let self_attention = checked(projections)?;
        match self_attention.iter().find(|one| self.position(&one.path).is_some()) {
            Some(twice) => Err(Error::invalid_argument(format!("projection {} comes twice", twice.path))),
            None => Ok(Self { id: next_id(), self_attention, ..self }),
        }
    }

    /// Reads the weights of a model's projections, of cross-attention and of self-attention, in whatever layout and packing
    /// they are stored.
    ///
    /// Errors: as [`Projections::new`]; `Unsupported` for weights that are not float32, float16 or bfloat16; what reading
    /// the model gives.
    pub fn from_model(
        model: &Model,
        cross: &[attention::Projection],
        self_attention: &[attention::Projection],
    ) -> Result<Self> {
        let read = |projection: &attention::Projection| {
            let bytes = projection.read_weight(model)?;
            let weights = match projection.weight.data_type {
                DataType::Float => Weights::F32(numbers(&bytes)?),
                DataType::Float16 => Weights::F16(numbers(&bytes)?),
                DataType::Bfloat16 => Weights::Bf16(numbers(&bytes)?),
                other => {
                    return Err(Error::unsupported(format!(
                        "its weights are of {other:?}; float32, float16 and bfloat16 are handled"
                    )));
                }
            };
            Ok(ProjectionWeights {
                path: projection.path.clone(),
                out_features: projection.out_features,
                in_features: projection.in_features,
                weights,
                bias: projection.read_bias(model)?,
            })
        };
        let read_all = |projections: &[attention::Projection]| {
            let mut all = Vec::new();
            all.try_reserve_exact(projections.len())?;
            for projection in projections {
                all.push(read(projection).map_err(|error| error.at(&projection.path))?);
            }
            Ok::<_, Error>(all)
        };
        Self::new(read_all(cross)?)?.with_self_attention(read_all(self_attention)?)
    }

    /// The projections of cross-attention, in byte-wise order of their module paths.
    pub fn as_slice(&self) -> &[ProjectionWeights] {
        &self.projections
    }

    /// Those of self-attention, in the same order; none where they were not asked for.
    pub fn self_attention(&self) -> &[ProjectionWeights] {
        &self.self_attention
    }

    /// All: those of cross-attention, then those of self-attention.
    pub fn all(&self) -> impl Iterator<Item = &ProjectionWeights> {
        self.projections.iter().chain(&self.self_attention)
    }

    /// The place of a module path in [`Projections::as_slice`].
    pub fn position(&self, path: &str) -> Option<usize> {
        self.projections.binary_search_by(|projection| projection.path.as_str().cmp(path)).ok()
    }

    /// The projection at a module path, of either attention.
    pub fn find(&self, path: &str) -> Option<&ProjectionWeights> {
        let own = &self.self_attention;
        let of_self = || own.binary_search_by(|projection| projection.path.as_str().cmp(path)).ok().map(|at| &own[at]);
        self.position(path).map(|at| &self.projections[at]).or_else(of_self)
    }

    /// The width of the text encoding.
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// Which base model this is, by its cross-attention; computed when it is first asked for.
    pub fn fingerprint(&self) -> Fingerprint {
        *self.fingerprint.get_or_init(|| {
            let mut hasher = Hasher::default();
            for projection in &self.projections {
                let weights = &projection.weights;
                hasher.update(weights.len(), |start, block| weights.round(start, block));
            }
            hasher.finish()
        })
    }

    /// Bytes held for the weights.
    pub fn memory_bytes(&self) -> usize {
        self.all().map(|projection| projection.weights.memory_bytes()).sum()
    }

    /// Computes the base keys and values of a text encoding `context`, laid out `[batch, tokens, in]`.
    ///
    /// The result does not depend on the number of threads. Errors: `InvalidArgument` if the sizes disagree;
    /// `OutOfMemory`.
    pub fn keys_values(&self, context: &[f32], batch: usize, tokens: usize, pool: &ThreadPool) -> Result<KeysValues> {
        // Divides the widths of Stable Diffusion; the context is packed anew for each block.
        const COLUMNS: usize = 160;
        let rows = batch.checked_mul(tokens).filter(|&rows| rows > 0 && u32::try_from(rows).is_ok());
        let Some(rows) = rows.filter(|rows| rows.checked_mul(self.in_features) == Some(context.len())) else {
            return Err(Error::invalid_argument(format!(
                "a text encoding of {} numbers is not [{batch}, {tokens}, {}]",
                context.len(),
                self.in_features
            )));
        };
        let mut base = Vec::new();
        base.try_reserve_exact(self.projections.len())?;
        for projection in &self.projections {
            let outputs = rows.checked_mul(projection.out_features);
            base.push(zeroed::<f32>(outputs.ok_or_else(|| Error::limit_exceeded("the prompt is too long"))?)?);
        }
        let inputs = ArrayView2::from_shape((rows, self.in_features), context).map_err(shape)?;
        let mut outputs = Vec::new();
        for (projection, base) in self.projections.iter().zip(&mut base) {
            outputs.push(ArrayViewMut2::from_shape((rows, projection.out_features), base).map_err(shape)?);
        }
        let mut tasks = Vec::new();
        for (projection, output) in self.projections.iter().zip(&mut outputs) {
            let blocks = output.axis_chunks_iter_mut(Axis(1), COLUMNS).enumerate();
            tasks.extend(blocks.map(|(block, output)| (projection, COLUMNS * block, output)));
        }
        pool.install(|| {
            tasks.into_par_iter().try_for_each_init(Vec::new, |scratch, (projection, first, mut output)| {
                let range = first * self.in_features..(first + output.ncols()) * self.in_features;
                let weights = projection.weights.widen(range, scratch)?;
                let weights = ArrayView2::from_shape((output.ncols(), self.in_features), weights).map_err(shape)?;
                room(PANELS)?;
                general_mat_mul(1.0, &inputs, &weights.t(), 0.0, &mut output);
                if let Some(bias) = &projection.bias {
                    for mut row in output.rows_mut() {
                        row.iter_mut().zip(&bias[first..]).for_each(|(value, bias)| *value += bias);
                    }
                }
                Ok::<(), Error>(())
            })
        })?;
        let all: Vec<u32> = (0..rows as u32).collect();
        let panels = Panel::split(context, self.in_features, &all)?;
        Ok(KeysValues {
            id: next_id(),
            base_id: self.id,
            batch,
            tokens,
            in_features: self.in_features,
            context: copied(context)?,
            panels,
            base,
        })
    }
}

/// Projections in the order of their paths, none twice, each with as many weights as its sizes say.
fn checked(mut projections: Vec<ProjectionWeights>) -> Result<Vec<ProjectionWeights>> {
    projections.sort_by(|a, b| a.path.cmp(&b.path));
    if let Some(pair) = projections.windows(2).find(|pair| pair[0].path == pair[1].path) {
        return Err(Error::invalid_argument(format!("projection {} comes twice", pair[0].path)));
    }
    for ProjectionWeights { path, out_features, in_features, weights, bias } in &projections {
        let expected = projection_weights(*out_features, *in_features).map_err(|error| error.at(path))?;
        if weights.len() != expected as usize || bias.as_ref().is_some_and(|bias| bias.len() != *out_features) {
            return Err(Error::invalid_argument(format!(
                "{path}: {} weights and {:?} biases are not those of {out_features} x {in_features} features",
                weights.len(),
                bias.as_ref().map(Vec::len)
            )));
        }
    }
    Ok(projections)
}

/// Little-endian elements as numbers of this machine.
fn numbers<T: Copy + Default + bytemuck::Pod>(bytes: &[u8]) -> Result<Vec<T>> {
    let mut numbers = zeroed::<T>(bytes.len() / size_of::<T>())?;
    for (number, bytes) in numbers.iter_mut().zip(bytes.chunks_exact(size_of::<T>())) {
        *number = bytemuck::pod_read_unaligned(bytes);
    }
    Ok(numbers)
}

fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

fn shape(error: ndarray::ShapeError) -> Error {
    Error::invalid_argument("a size does not fit its numbers").caused_by(error)
}

/// The base keys and values of one text encoding, and the encoding itself.
pub struct KeysValues {
    /// Differs between any two bases and prompts of this process.
    pub(super) id: u64,
    /// [`Projections::id`].
    pub(super) base_id: u64,
    batch: usize,
    tokens: usize,
    pub(super) in_features: usize,
    pub(super) context: Vec<f32>,
    /// All rows of the context.
    pub(super) panels: Vec<Panel>,
    base: Vec<Vec<f32>>,
}

impl KeysValues {
    /// Entries of the batch.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Tokens of each entry.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Whether these are the keys and values that a base makes of a text encoding.
    pub fn are_of(&self, base: &Projections, context: &[f32], batch: usize, tokens: usize) -> bool {
        let bits = bytemuck::cast_slice::<f32, u32>;
        (self.base_id, self.batch, self.tokens) == (base.id, batch, tokens) && bits(&self.context) == bits(context)
    }

    /// The base output of each projection, `[batch, tokens, out]`, in the order of [`Projections::as_slice`].
    pub fn base(&self) -> &[Vec<f32>] {
        &self.base
    }

    /// As [`KeysValues::base`], to be changed.
    pub fn into_base(self) -> Vec<Vec<f32>> {
        self.base
    }

    /// Bytes held.
    pub fn memory_bytes(&self) -> usize {
        let floats = |numbers: &Vec<f32>| size_of_val(numbers.as_slice());
        let panels = self.panels.iter().map(Panel::memory_bytes).sum::<usize>();
        floats(&self.context) + panels + self.base.iter().map(floats).sum::<usize>()
    }
}
