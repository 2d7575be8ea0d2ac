//! A UNet whose cross-attention keys and values are inputs.
//!
//! Keys and values depend on the prompt and the weights, not on the timestep. So they are cut out of the graph, computed
//! once for a prompt and a composition by [`crate::concept`], and bound for all steps; composing concepts rebuilds
//! nothing and never writes a weight. Those of self-attention depend on the state: where they are to be composed too, it is
//! their weights that are inputs. This file knows shapes and bindings; it knows no schedules, prompts or guidance.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use half::{bf16, f16};
use rayon::ThreadPool;
use serde_json::Value;

use super::folder::Folder;
use super::precision;
use super::profiles::ExpectedStates;
use crate::concept::{Composition, Fingerprint, Held, KeysValues, Output, Projections};
use crate::error::{Error, Result, Status};
use crate::memory::threads;
use crate::onnx::attention::{self, KeyValueInput, WeightInput};
use crate::onnx::proto::{ValueInfoProto, tensor_shape_proto, type_proto};
use crate::onnx::{Limits, Model};
use crate::progress::CancelToken;
use crate::runtime::{
    Binding, Device, Dimension, ElementType, Port, Provider, Runtime, Session, SessionOptions, Tensor,
};

/// How a UNet is opened.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct UnetOptions {
    /// How ONNX Runtime runs it.
    pub session: SessionOptions,
    /// What the model file may ask for.
    pub limits: Limits,
    /// Threads that compute keys and values; 0 for one per core. The result does not depend on it.
    pub threads: usize,
    /// The states that predictions will be asked for. TensorRT builds for them ahead, unless it was given profiles.
    pub expected: Option<ExpectedStates>,
    /// Whether neurons of self-attention can be composed; an error if that can't be done. Its key and value weights are inputs
    /// then, held twice, which ONNX Runtime cannot pack ahead: a step takes a little longer.
    pub self_attention: bool,
}

/// What a prediction is conditioned on, for a batch of `batch` states.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conditioning {
    /// Entries of the batch.
    pub batch: usize,
    /// Tokens of each entry's text.
    pub tokens: usize,
    /// Text encodings `[batch, tokens, features]`; empty for a UNet without text.
    pub context: Vec<f32>,
    /// Pooled text encodings `[batch, features]` (SDXL's `text_embeds`).
    pub text_embeds: Option<Vec<f32>>,
    /// Sizes `[batch, 6]`: original height and width, crop top and left, target height and width (SDXL's `time_ids`).
    pub time_ids: Option<Vec<f32>>,
    /// Classes `[batch]`.
    pub class_labels: Option<Vec<i64>>,
    /// Embedded guidance scales `[batch, features]` (`timestep_cond` of distilled models, arXiv 2310.04378).
    pub timestep_cond: Option<Vec<f32>>,
}

/// Shapes that a UNet takes. `None` stands for any size that its graph can compute with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnetShape {
    /// States at once.
    pub batch: Option<usize>,
    /// Channels of a state.
    pub channels: Option<usize>,
    /// Rows of a state.
    pub height: Option<usize>,
    /// Columns of a state.
    pub width: Option<usize>,
    /// Open sides are multiples of this: each halving inside the UNet must come out even. From the `config.json` beside
    /// the model, 1 if it does not say.
    pub multiple: usize,
    /// Tokens of a prompt.
    pub tokens: Option<usize>,
    /// Width of the text encoding; `None` also for a UNet without text.
    pub features: Option<usize>,
}

pub(super) const SAMPLE: &str = "sample";
const TIMESTEP: &str = "timestep";
const CONTEXT: &str = attention::TEXT_INPUT;
const TEXT_EMBEDS: &str = "text_embeds";
const TIME_IDS: &str = "time_ids";
const CLASS_LABELS: &str = "class_labels";
const TIMESTEP_COND: &str = "timestep_cond";

/// A UNet, ready to predict. One prediction at a time; for predictions side by side, open more.
pub struct Unet {
    session: Session,
    binding: Binding,
    output: String,
    pool: Arc<ThreadPool>,
    steering: Steering,
    /// The text input's port in the file, which the session may not have any more.
    text: Option<Port>,
    shape: UnetShape,
    composition: Composition,
    prompt: Option<Prompt>,
    /// Shapes of states for which a prediction has succeeded.
    proven: BTreeSet<[usize; 4]>,
}

/// What can be composed.
enum Steering {
    /// Keys and values are inputs, in the order of the projections; and the weights of self-attention's, if they were asked for.
    Inputs { projections: Arc<Projections>, inputs: Vec<KeyValueInput>, weights: WeightInputs },
    /// They are computed in the graph; why.
    Fixed(String),
}

/// The inputs that take self-attention's weights, in the order of [`Projections::self_attention`].
#[derive(Default)]
struct WeightInputs {
    inputs: Vec<WeightInput>,
    /// By which concepts the bound ones were written; `None` for unknown content.
    written: Option<Composition>,
}

/// What is bound.
struct Prompt {
    batch: usize,
    keys_values: Option<KeysValues>,
    held: Held,
    /// Whether the bound keys and values are those of the present composition.
    current: bool,
    /// The shape of the bound state.
    shape: Option<[usize; 4]>,
}

impl Unet {
    /// Opens a UNet: finds its key and value projections, makes their results inputs, and builds a session.
    ///
    /// A UNet without text, or with projections that can't be separated (quantised weights), still predicts;
    /// [`Unet::set_composition`] then says why nothing can be composed.
    ///
    /// # Errors
    /// Those of [`Model::open`] and [`Runtime::session`]; [`Status::Unsupported`] for inputs that are not those of a
    /// diffusion UNet, by name.
    pub fn open(runtime: &Runtime, path: impl AsRef<Path>, options: &UnetOptions) -> Result<Self> {
        let path = path.as_ref();
        Self::build(runtime, path, options).map_err(|error| error.at(path.display()))
    }

    fn build(runtime: &Runtime, path: &Path, options: &UnetOptions) -> Result<Self> {
        let pool = threads(options.threads, "macula")?;
        let mut model = Model::open(path, &options.limits)?;
        let text = text_port(&model);
        let steering = externalise(&mut model, options.self_attention)?;
        if options.session.provider == Provider::Cpu {
            attention::fuse(&mut model)?;
        }
        let session = runtime.session(&model, &with_profiles(&model, options)?)?;
        drop(model);
        let mut shape = check_inputs(&session, text.as_ref(), &steering)?;
        if let Some(parent) = path.parent().filter(|parent| parent.is_dir()) {
            shape.multiple = side_multiple(&Folder::open(parent)?.json("config.json")?.unwrap_or(Value::Null))?;
        }
        let output = session.outputs().next().map(|port| port.name.clone());
        let output = output.ok_or_else(|| Error::unsupported("the UNet has no output"))?;
        let mut binding = session.bind()?;
        binding.allocate_output(&output, Device::Host)?;
        Ok(Self {
            session,
            binding,
            output,
            pool: Arc::new(pool),
            steering,
            text,
            shape,
            composition: Composition::new(),
            prompt: None,
            proven: BTreeSet::new(),
        })
    }

    /// The shapes that it takes.
    pub fn shape(&self) -> &UnetShape {
        &self.shape
    }

    /// The session that runs it.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// Its pristine key and value weights; what is not there is said by [`Unet::set_composition`].
    pub fn projections(&self) -> Option<&Arc<Projections>> {
        match &self.steering {
            Steering::Inputs { projections, .. } => Some(projections),
            Steering::Fixed(_) => None,
        }
    }

    /// The fingerprint that concepts of this base carry.
    pub fn fingerprint(&self) -> Option<Fingerprint> {
        self.projections().map(|projections| projections.fingerprint())
    }

    /// Takes another UNet's key and value weights in place of its own where they are the same: they are held once then, and
    /// concepts that were gathered from the other act here.
    pub(super) fn share_projections(&mut self, other: &Self) {
        let (Steering::Inputs { projections, .. }, Some(theirs)) = (&mut self.steering, other.projections()) else {
            return;
        };
        let (ours, others) = (projections.as_slice(), theirs.as_slice());
        let alike = ours.len() == others.len()
            && ours.iter().zip(others).all(|(a, b)| {
                (&a.path, a.out_features, a.in_features, &a.bias) == (&b.path, b.out_features, b.in_features, &b.bias)
            });
        let alike = alike && projections.self_attention() == theirs.self_attention();
        if alike && projections.fingerprint() == theirs.fingerprint() {
            *projections = theirs.clone();
        }
    }

    /// Whether concepts that were gathered from another UNet act here: see [`Unet::share_projections`].
    pub(super) fn shares_projections(&self, other: &Self) -> bool {
        self.projections().zip(other.projections()).is_some_and(|(ours, theirs)| Arc::ptr_eq(ours, theirs))
    }

    /// The threads that compute keys and values.
    pub fn pool(&self) -> &Arc<ThreadPool> {
        &self.pool
    }

    /// Whether the graph takes an encoded text.
    pub fn takes_text(&self) -> bool {
        self.text.is_some()
    }

    /// Whether the graph takes class labels.
    pub fn takes_class_labels(&self) -> bool {
        self.session.input(CLASS_LABELS).is_ok()
    }

    /// Whether the graph takes SDXL's `text_embeds` and `time_ids`.
    pub fn takes_sizes(&self) -> bool {
        self.session.input(TIME_IDS).is_ok()
    }

    /// Width of the embedded guidance scale that a distilled UNet takes.
    pub fn guidance_features(&self) -> Option<usize> {
        match self.session.input(TIMESTEP_COND).ok()?.dims.last()? {
            Dimension::Fixed(size) => Some(*size),
            Dimension::Open(_) => None,
        }
    }

    /// Bytes of the key and value weights and of what is bound for them, beside the session's own.
    pub fn memory_bytes(&self) -> usize {
        let prompt = self.prompt.as_ref().and_then(|prompt| prompt.keys_values.as_ref());
        let weights = match &self.steering {
            Steering::Inputs { weights, .. } => weights.inputs.as_slice(),
            Steering::Fixed(_) => &[],
        };
        let size = |name: &str| self.session.input(name).map_or(0, |port| port.dtype.size());
        let weights = weights.iter().map(|input| input.shape.iter().product::<usize>() * size(&input.name));
        self.projections().map_or(0, |projections| projections.memory_bytes())
            + weights.sum::<usize>()
            + prompt.map_or(0, |keys_values| 2 * keys_values.memory_bytes())
    }

    /// Sets the concepts that shape the keys and values from the next prediction on. An empty composition is the base.
    ///
    /// # Errors
    /// [`Status::Unsupported`], with the reason, if this UNet's keys and values can't be composed.
    pub fn set_composition(&mut self, composition: Composition) -> Result<()> {
        if let Steering::Fixed(reason) = &self.steering
            && !composition.is_base()
        {
            return Err(Error::unsupported(format!("this UNet's keys and values can't be composed: {reason}")));
        }
        self.composition = composition;
        if let Some(prompt) = &mut self.prompt {
            prompt.current = false;
        }
        Ok(())
    }

    /// Computes and binds everything that stays the same for all steps of a prompt. Keys and values of the text that was
    /// bound before are kept.
    ///
    /// # Errors
    /// [`Status::InvalidArgument`] for a shape that the graph does not take (naming the input, what it takes and what
    /// was given), for a part that is missing, and for a part that the UNet has no input for.
    pub fn set_conditioning(&mut self, conditioning: &Conditioning) -> Result<()> {
        let before = self.prompt.take();
        let Conditioning { batch, tokens, context, .. } = conditioning;
        let (batch, tokens) = (*batch, *tokens);
        if batch == 0 || self.shape.batch.is_some_and(|fixed| fixed != batch) {
            return Err(out_of_range("the batch", self.shape.batch, batch));
        }
        let (keys_values, held) = match &self.text {
            None if context.is_empty() => Default::default(),
            None => return Err(Error::invalid_argument(format!("{CONTEXT:?} was given, but this UNet takes no text"))),
            Some(port) => {
                let features = (context.len() / batch).checked_div(tokens).unwrap_or(0);
                if tokens == 0 || context.len() != batch.saturating_mul(tokens).saturating_mul(features) {
                    return Err(Error::invalid_argument(format!(
                        "{CONTEXT:?} has {} values, which is not [{batch}, {tokens}, features]",
                        context.len()
                    )));
                }
                port.check(port.dtype, &[batch, tokens, features])?;
                match &self.steering {
                    Steering::Fixed(_) => {
                        let tensor = precision::from_f32(port.dtype, &[batch, tokens, features], context)?;
                        self.binding.bind_input(CONTEXT, tensor)?;
                        Default::default()
                    }
                    Steering::Inputs { projections, inputs, .. } => match before {
                        Some(Prompt { keys_values: Some(known), held, .. })
                            if known.are_of(projections, context, batch, tokens) =>
                        {
                            (Some(known), held)
                        }
                        stale => {
                            drop(stale);
                            let keys_values = projections.keys_values(context, batch, tokens, &self.pool)?;
                            bind_buffers(&mut self.binding, &self.session, inputs, batch, tokens)?;
                            if self.session.input(CONTEXT).is_ok() {
                                let tensor = precision::from_f32(port.dtype, &[batch, tokens, features], context)?;
                                self.binding.bind_input(CONTEXT, tensor)?;
                            }
                            (Some(keys_values), Held::default())
                        }
                    },
                }
            }
        };
        for (name, values) in [
            (TEXT_EMBEDS, &conditioning.text_embeds),
            (TIME_IDS, &conditioning.time_ids),
            (TIMESTEP_COND, &conditioning.timestep_cond),
        ] {
            if let Some((port, values)) = self.part(name, values.as_ref())? {
                let features = values.len() / batch;
                let (dtype, shape) = (port.dtype, [batch, features]);
                if features * batch != values.len() {
                    return Err(Error::invalid_argument(format!(
                        "{name:?} has {} values, which is not [{batch}, features]",
                        values.len()
                    )));
                }
                port.check(dtype, &shape)?;
                self.binding.bind_input(name, precision::from_f32(dtype, &shape, values)?)?;
            }
        }
        if let Some((_, labels)) = self.part(CLASS_LABELS, conditioning.class_labels.as_ref())? {
            self.bind_class_labels(labels, batch)?;
        }
        self.prompt = Some(Prompt { batch, keys_values, held, current: false, shape: None });
        Ok(())
    }

    /// Sets other class labels `[batch]` for the conditioning that was set: they have no part in keys and values.
    ///
    /// # Errors
    /// [`Status::InvalidArgument`] without a conditioning, for a UNet that takes no class labels, and for another number.
    pub fn set_class_labels(&mut self, labels: &[i64]) -> Result<()> {
        let batch = self.prompt.as_ref().ok_or_else(no_conditioning)?.batch;
        if !self.takes_class_labels() {
            return Err(Error::invalid_argument(format!(
                "{CLASS_LABELS:?} was given, but this UNet has no such input"
            )));
        }
        self.bind_class_labels(labels, batch)
    }

    fn bind_class_labels(&mut self, labels: &[i64], batch: usize) -> Result<()> {
        if labels.len() != batch {
            return Err(Error::invalid_argument(format!(
                "{CLASS_LABELS:?} has {} values, the batch has {batch}",
                labels.len()
            )));
        }
        let tensor = match self.session.input(CLASS_LABELS)?.dtype {
            ElementType::I64 => Tensor::from_slice(&[batch], labels)?,
            ElementType::I32 => {
                let labels: Option<Vec<i32>> = labels.iter().map(|label| i32::try_from(*label).ok()).collect();
                Tensor::from_vec(&[batch], labels.ok_or_else(|| Error::invalid_argument("a class above 2^31"))?)?
            }
            dtype => {
                let labels: Vec<f32> = labels.iter().map(|label| *label as f32).collect();
                precision::from_f32(dtype, &[batch], &labels)?
            }
        };
        self.binding.bind_input(CLASS_LABELS, tensor)?;
        Ok(())
    }

    /// One prediction for zeros of this shape, unless one has succeeded at it before: shows whether the graph can compute
    /// at a size, and lets a provider build what it needs for it.
    ///
    /// # Errors
    /// As [`Unet::denoise`].
    pub fn rehearse(&mut self, shape: [usize; 4], cancel: &CancelToken) -> Result<()> {
        if self.proven.contains(&shape) {
            return Ok(());
        }
        let len = shape.iter().try_fold(1_usize, |product, size| product.checked_mul(*size)).unwrap_or(usize::MAX);
        let mut zeros = Vec::new();
        zeros.try_reserve_exact(len)?;
        zeros.resize(len, 0.0);
        self.denoise(&zeros, shape, 0.0, cancel).map(|_| ())
    }

    /// The port of an optional input together with what was given for it; both or neither must be there.
    fn part<'a, T>(&self, name: &str, given: Option<&'a T>) -> Result<Option<(Port, &'a T)>> {
        match (self.session.input(name).ok(), given) {
            (Some(port), Some(given)) => Ok(Some((port.clone(), given))),
            (None, None) => Ok(None),
            (Some(_), None) => Err(Error::invalid_argument(format!("this UNet needs {name:?}, which was not given"))),
            (None, Some(_)) => {
                Err(Error::invalid_argument(format!("{name:?} was given, but this UNet has no such input")))
            }
        }
    }

    /// Writes the keys and values of the present conditioning and composition, and the weights of self-attention, into the
    /// bound buffers, where they are not yet. [`Unet::denoise`] does so by itself; a host that wants the cost at a time of its own choice calls this.
    ///
    /// # Errors
    /// [`Status::InvalidArgument`] without a conditioning; [`Status::OutOfMemory`].
    pub fn write_keys_values(&mut self) -> Result<()> {
        let Some(prompt) = &mut self.prompt else { return Err(no_conditioning()) };
        if let Steering::Inputs { projections, weights, .. } = &mut self.steering
            && !weights.inputs.is_empty()
        {
            let wanted = self.composition.of_self_attention(projections);
            if weights.written.as_ref().is_none_or(|written| !written.takes_like(&wanted)) {
                weights.written = None;
                let places = weights.inputs.iter().map(|input| (input.name.as_str(), input.shape.to_vec()));
                write_bound(&mut self.binding, &self.session, places, |outputs| {
                    wanted.write_self_attention(projections, outputs, &self.pool)
                })?;
                weights.written = Some(wanted);
            }
        }
        if prompt.current {
            return Ok(());
        }
        if let (Some(keys_values), Steering::Inputs { inputs, .. }) = (&prompt.keys_values, &self.steering) {
            let (batch, tokens) = (keys_values.batch(), keys_values.tokens());
            let places = inputs.iter().map(|input| (input.name.as_str(), vec![batch, tokens, input.out_features]));
            let written = write_bound(&mut self.binding, &self.session, places, |outputs| {
                self.composition.write(keys_values, outputs, &mut prompt.held, &self.pool)
            });
            if let Err(error) = written {
                prompt.held = Held::default();
                return Err(error);
            }
        }
        prompt.current = true;
        Ok(())
    }

    /// One prediction: for `sample` `[B, C, H, W]` (scaled as the sampler wants it) at a timestep in training steps, under
    /// the conditioning and the composition that were set. The single step for hosts with a sampler of their own.
    ///
    /// A timestep input of whole numbers gets the nearest one.
    ///
    /// # Errors
    /// [`Status::InvalidArgument`] without a conditioning and for shapes that the graph does not take (naming the input,
    /// what it takes and what was given); [`Status::Cancelled`]; [`Status::RuntimeFailed`].
    pub fn denoise(
        &mut self,
        sample: &[f32],
        shape: [usize; 4],
        timestep: f64,
        cancel: &CancelToken,
    ) -> Result<Vec<f32>> {
        self.predict(sample, shape, &[timestep], cancel)
    }

    /// Whether each state of a batch may be at a timestep of its own: see [`Unet::denoise_each`].
    pub fn takes_timesteps(&self) -> bool {
        let dims = self.session.input(TIMESTEP).map(|port| port.dims.clone()).unwrap_or_default();
        dims.first().is_some_and(|dim| *dim != Dimension::Fixed(1))
    }

    /// As [`Unet::denoise`] with a timestep for each state of the batch.
    ///
    /// # Errors
    /// As [`Unet::denoise`]; [`Status::InvalidArgument`] unless there is one timestep a state;
    /// [`Status::Unsupported`] for several states if [`Unet::takes_timesteps`] is false.
    pub fn denoise_each(
        &mut self,
        sample: &[f32],
        shape: [usize; 4],
        timesteps: &[f64],
        cancel: &CancelToken,
    ) -> Result<Vec<f32>> {
        if timesteps.len() != shape[0] {
            return Err(Error::invalid_argument(format!("{} timesteps for {} states", timesteps.len(), shape[0])));
        }
        if shape[0] > 1 && !self.takes_timesteps() {
            return Err(Error::unsupported("this UNet takes one timestep for all states of a batch"));
        }
        self.predict(sample, shape, timesteps, cancel)
    }

    /// One prediction at one timestep, or at one for each state.
    fn predict(
        &mut self,
        sample: &[f32],
        shape: [usize; 4],
        timesteps: &[f64],
        cancel: &CancelToken,
    ) -> Result<Vec<f32>> {
        self.write_keys_values()?;
        let Some(prompt) = &mut self.prompt else { return Err(no_conditioning()) };
        let elements = shape.iter().try_fold(1_usize, |product, size| product.checked_mul(*size));
        if elements != Some(sample.len()) || sample.is_empty() {
            return Err(Error::invalid_argument(format!(
                "{SAMPLE:?} has {} values, which is not {shape:?}",
                sample.len()
            )));
        }
        if shape[0] != prompt.batch {
            return Err(Error::invalid_argument(format!(
                "{SAMPLE:?} has a batch of {}, the conditioning has {}",
                shape[0], prompt.batch
            )));
        }
        if let Some(timestep) = timesteps.iter().find(|timestep| !timestep.is_finite()) {
            return Err(Error::invalid_argument(format!("{TIMESTEP:?} is {timestep}")));
        }
        let (sample_type, timestep_port) = {
            let port = self.session.input(SAMPLE)?;
            port.check(port.dtype, &shape)?;
            (port.dtype, self.session.input(TIMESTEP)?)
        };
        let multiple = self.shape.multiple;
        for (side, fixed, size) in [("height", self.shape.height, shape[2]), ("width", self.shape.width, shape[3])] {
            if fixed.is_none() && !size.is_multiple_of(multiple) {
                return Err(Error::invalid_argument(format!(
                    "the {side} of {SAMPLE:?} must be a multiple of {multiple}; given was {size}"
                )));
            }
        }
        let mut tensor = match prompt.shape {
            Some(bound) if bound == shape => self.binding.take_input(SAMPLE)?,
            _ => Tensor::zeros(sample_type, &shape)?,
        };
        prompt.shape = None;
        precision::write_f32(sample, &mut tensor)?;
        let time = timestep_tensor(timestep_port, shape[0], timesteps)?;
        self.binding.bind_input(SAMPLE, tensor)?;
        prompt.shape = Some(shape);
        self.binding.bind_input(TIMESTEP, time)?;
        self.binding.run(cancel).map_err(|error| error.at(format_args!("UNet at sample {shape:?}")))?;
        let output = self.binding.output(&self.output)?;
        let wanted = [shape[0], shape[2], shape[3]];
        let given: Vec<usize> = output.shape().to_vec();
        if given.len() != 4 || [given[0], given[2], given[3]] != wanted || given[1] != shape[1] {
            return Err(Error::unsupported(format!(
                "the UNet predicts {given:?} for {shape:?}; predictions of a state's own shape are handled"
            )));
        }
        self.proven.insert(shape);
        precision::to_f32(output)
    }
}

fn no_conditioning() -> Error {
    Error::invalid_argument("no conditioning was set")
}

/// The session's options, with TensorRT's profiles of what is expected where there are none.
fn with_profiles(model: &Model, options: &UnetOptions) -> Result<SessionOptions> {
    let mut session = options.session.clone();
    if let (Provider::TensorRt(tensorrt), Some(expected)) = (&mut session.provider, &options.expected)
        && tensorrt.profiles.is_empty()
    {
        tensorrt.profiles = expected.profiles(&ports(model))?;
    }
    Ok(session)
}

fn text_port(model: &Model) -> Option<Port> {
    ports(model).into_iter().find(|port| port.name == CONTEXT)
}

/// The inputs of a graph that are tensors of types that are handled.
fn ports(model: &Model) -> Vec<Port> {
    let graph = model.graph();
    let given = |input: &&ValueInfoProto| !graph.initializer.iter().any(|tensor| tensor.name() == input.name());
    graph.input.iter().filter(given).filter_map(port).collect()
}

fn port(input: &ValueInfoProto) -> Option<Port> {
    let Some(type_proto::Value::TensorType(tensor)) = &input.r#type.as_ref()?.value else { return None };
    let dims = tensor.shape.as_ref()?.dim.iter().map(|dim| match &dim.value {
        Some(tensor_shape_proto::dimension::Value::DimValue(size)) if *size >= 0 => Dimension::Fixed(*size as usize),
        Some(tensor_shape_proto::dimension::Value::DimParam(name)) => Dimension::Open(name.clone()),
        _ => Dimension::Open(String::new()),
    });
    let dtype = ElementType::from_onnx(tensor.elem_type())?;
    Some(Port { name: input.name().to_owned(), dtype, dims: dims.collect() })
}

/// Makes keys and values inputs where that can be done, and the weights of self-attention's if they are asked for.
fn externalise(model: &mut Model, self_attention: bool) -> Result<Steering> {
    let found = match attention::find(model, CONTEXT) {
        Ok(found) => found,
        Err(error) if !self_attention && matches!(error.status(), Status::NotFound | Status::Unsupported) => {
            return Ok(Steering::Fixed(error.message().to_owned()));
        }
        Err(error) => return Err(error),
    };
    let of_self = if self_attention { attention::find_self(model, &found)? } else { Vec::new() };
    if self_attention && of_self.is_empty() {
        return Err(Error::unsupported("no self-attention was found, and the UNet was to be opened for its neurons"));
    }
    let projections = Arc::new(Projections::from_model(model, &found, &of_self)?);
    let inputs = attention::externalise(model, &found)?;
    let weights = attention::weights_as_inputs(model, &of_self)?;
    Ok(Steering::Inputs { projections, inputs, weights: WeightInputs { inputs: weights, ..Default::default() } })
}

/// Checks that each input is one that is known, and collects the shapes.
fn check_inputs(session: &Session, text: Option<&Port>, steering: &Steering) -> Result<UnetShape> {
    let fixed = |dim: Option<&Dimension>| match dim {
        Some(Dimension::Fixed(size)) => Some(*size),
        _ => None,
    };
    let known = [SAMPLE, TIMESTEP, CONTEXT, TEXT_EMBEDS, TIME_IDS, CLASS_LABELS, TIMESTEP_COND];
    for port in session.inputs() {
        let is_ours = match steering {
            Steering::Inputs { inputs, weights, .. } => {
                let weights = weights.inputs.iter().map(|input| &input.name);
                inputs.iter().map(|input| &input.name).chain(weights).any(|name| *name == port.name)
            }
            Steering::Fixed(_) => false,
        };
        if !is_ours && !known.contains(&port.name.as_str()) {
            return Err(Error::unsupported(format!(
                "the UNet has an input {:?}; handled are {}",
                port.name,
                known.join(", ")
            )));
        }
    }
    let sample = session.input(SAMPLE)?;
    if sample.dims.len() != 4 {
        return Err(Error::unsupported(format!(
            "{SAMPLE:?} has {} dimensions, expected [B, C, H, W]",
            sample.dims.len()
        )));
    }
    let timestep = session.input(TIMESTEP)?;
    if timestep.dims.len() > 1 {
        return Err(Error::unsupported(format!(
            "{TIMESTEP:?} has {} dimensions, expected none or [B]",
            timestep.dims.len()
        )));
    }
    if let Some(text) = text
        && text.dims.len() != 3
    {
        return Err(Error::unsupported(format!(
            "{CONTEXT:?} has {} dimensions, expected [B, tokens, features]",
            text.dims.len()
        )));
    }
    if let Some(Dimension::Fixed(size)) = session.input(TIME_IDS).ok().and_then(|port| port.dims.last())
        && *size != 6
    {
        return Err(Error::unsupported(format!(
            "{TIME_IDS:?} has {size} values; the 6 of SDXL's base model are handled"
        )));
    }
    Ok(UnetShape {
        batch: fixed(sample.dims.first()),
        channels: fixed(sample.dims.get(1)),
        height: fixed(sample.dims.get(2)),
        width: fixed(sample.dims.get(3)),
        tokens: text.and_then(|text| fixed(text.dims.get(1))),
        features: text.and_then(|text| fixed(text.dims.get(2))),
        multiple: 1,
    })
}

/// What the sides of a state must be multiples of: two for each halving between the blocks, and the pixels that are
/// folded into channels before them.
fn side_multiple(config: &Value) -> Result<usize> {
    let blocks = config.get("down_block_types").and_then(Value::as_array).map_or(1, Vec::len);
    let unshuffle = config.get("pixel_unshuffle").and_then(Value::as_u64).unwrap_or(1);
    if !(1..=12).contains(&blocks) || !(1..=64).contains(&unshuffle) {
        return Err(Error::invalid_file(format!(
            "config.json has {blocks} down_block_types (1..=12 are handled) and pixel_unshuffle {unshuffle} (1..=64)"
        )));
    }
    Ok((1 << (blocks - 1)) * unshuffle as usize)
}

/// Binds a buffer for each key and value input.
fn bind_buffers(
    binding: &mut Binding,
    session: &Session,
    inputs: &[KeyValueInput],
    batch: usize,
    tokens: usize,
) -> Result<()> {
    for input in inputs {
        let dtype = session.input(&input.name)?.dtype;
        let shape = [batch, tokens, input.out_features];
        binding.bind_input(&input.name, Tensor::zeros(dtype, &shape)?)?;
    }
    Ok(())
}

/// Lets the bound buffers of some inputs, given with their shapes, be written; where none is bound, one of zeros is made.
fn write_bound<'n>(
    binding: &mut Binding,
    session: &Session,
    places: impl Iterator<Item = (&'n str, Vec<usize>)> + Clone,
    write: impl FnOnce(&mut [Output<'_>]) -> Result<()>,
) -> Result<()> {
    let mut tensors = Vec::new();
    for (name, shape) in places.clone() {
        let bound = binding.take_input(name);
        tensors.push(bound.or_else(|_| Tensor::zeros(session.input(name)?.dtype, &shape))?);
    }
    let written = tensors
        .iter_mut()
        .map(|tensor| {
            Ok(match tensor.dtype() {
                ElementType::F32 => Output::F32(tensor.as_mut_slice::<f32>()?),
                ElementType::F16 => Output::F16(tensor.as_mut_slice::<f16>()?),
                ElementType::BF16 => Output::Bf16(tensor.as_mut_slice::<bf16>()?),
                other => return Err(Error::unsupported(format!("keys and values of {other}"))),
            })
        })
        .collect::<Result<Vec<_>>>()
        .and_then(|mut outputs| write(&mut outputs));
    // Bound again even after a failure, so that they need not be made anew.
    let bound = places.zip(tensors).map(|((name, _), tensor)| binding.bind_input(name, tensor));
    bound.fold(written, |all, one| all.and(one))
}

/// The timestep input: one number for all states, or one for each (`timesteps` has one number, or one a state).
fn timestep_tensor(port: &Port, batch: usize, timesteps: &[f64]) -> Result<Tensor> {
    let shape: &[usize] = match port.dims.first() {
        None => &[],
        Some(Dimension::Fixed(1)) => &[1],
        Some(_) => &[batch],
    };
    port.check(port.dtype, shape)?;
    let count = shape.first().copied().unwrap_or(1);
    let each = timesteps.iter().copied().cycle().take(count);
    match port.dtype {
        ElementType::I64 => Tensor::from_vec(shape, each.map(|t| t.round_ties_even() as i64).collect()),
        ElementType::I32 => Tensor::from_vec(shape, each.map(|t| t.round_ties_even() as i32).collect()),
        ElementType::F64 => Tensor::from_vec(shape, each.collect()),
        dtype => precision::from_f32(dtype, shape, &each.map(|t| t as f32).collect::<Vec<_>>()),
    }
}

fn out_of_range(what: &str, fixed: Option<usize>, given: usize) -> Error {
    let range = fixed.map_or("at least 1".to_owned(), |fixed| fixed.to_string());
    Error::invalid_argument(format!("{what} of this UNet must be {range}; given was {given}"))
}
