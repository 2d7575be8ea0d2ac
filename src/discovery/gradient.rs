//! The loss of a batch and its gradient with respect to a scale on every key and value weight.
//!
//! The graph is given keys and values of texts, and weights of self-attention, and gives the gradient with respect to them;
//! what lies between these and the scales is in [`super::scaled`].

use std::path::Path;
use std::sync::Arc;

use super::draw::Batch;
use super::scaled::{ScaledWeights, Steered, widened};
use super::search::Slope;
use crate::concept::{ProjectionWeights, Projections};
use crate::diffusion::pipeline::UnetSource;
use crate::diffusion::precision;
use crate::diffusion::unet::{Conditioning, UnetOptions};
use crate::error::{Error, Result, Status};
use crate::memory::{GRAPH, collected, room, threads, zeroed};
use crate::onnx::attention::{self, KeyValueInput, Role, WeightInput};
use crate::onnx::build::{self, Dim};
use crate::onnx::grad::{self, Effort, Facts, Spending};
use crate::onnx::graph::element_type;
use crate::onnx::{Limits, Model, winograd};
use crate::progress::CancelToken;
use crate::runtime::{ElementType, Optimization, Provider, Runtime, Session, SessionOptions, Tensor, observe};

/// Which attention's projections are searched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Attentions {
    /// Those of the text, as Cones does.
    #[default]
    Cross,
    /// Those of the picture with itself, which know no words.
    SelfAttention,
    /// All.
    Both,
}

/// Which projections of an attention are searched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Searched {
    /// Keys and values, as Cones does.
    #[default]
    KeysAndValues,
    /// Keys only: where a word draws the queries to.
    Keys,
    /// Values only: what it puts there.
    Values,
}

impl Searched {
    fn takes(self, role: Role) -> bool {
        match self {
            Self::KeysAndValues => true,
            Self::Keys => role == Role::Key,
            Self::Values => role == Role::Value,
        }
    }
}

/// How a gradient is made and run.
#[derive(Clone, Debug, Default)]
pub struct GradientOptions {
    /// How ONNX Runtime runs it. Memory patterns are left off: they would double the peak. With [`Effort::Memory`],
    /// prepacking, the arena and layouts of the CPU are off too.
    pub session: SessionOptions,
    /// What the model file may ask for.
    pub limits: Limits,
    /// Speed or memory, and how much of the forward pass is kept.
    pub spending: Spending,
    /// Of which attention the weights have a scale.
    pub attentions: Attentions,
    /// Which of them.
    pub searched: Searched,
    /// States of one run; a larger batch is run in several. 0 for as many as the batch has.
    pub lot: usize,
    /// Threads of the products with the weights; 0 for one a core. The result does not depend on it.
    pub threads: usize,
    /// Whether [`KeyValueGradient::text_slope`] will be asked.
    pub texts: bool,
}

impl GradientOptions {
    /// For the UNet of a pipeline: run, limited and threaded as it was opened.
    pub(super) fn of(source: &UnetSource) -> Self {
        let UnetOptions { session, limits, threads, .. } = source.options.clone();
        Self { session, limits, threads, ..Self::default() }
    }
}

/// What a batch says of the texts that it is conditioned on, at untouched weights.
pub struct TextSlope {
    /// The loss.
    pub loss: f64,
    /// `dL/dC` of each text, `[count, tokens, features]`.
    pub context: Vec<f32>,
    /// The same of its pooled encoding, `[count, width]`, for a UNet that takes one.
    pub pooled: Option<Vec<f32>>,
}

/// An input of the graph, as far as it matters for what is given.
struct Input {
    name: String,
    dtype: ElementType,
    /// Whether it has no axes.
    scalar: bool,
}

/// A UNet with the gradient of a loss on its prediction, for states of one shape.
pub struct KeyValueGradient {
    session: Session,
    scaled: ScaledWeights,
    /// What the session takes.
    inputs: Vec<Input>,
    names: Names,
    /// Of each searched projection.
    gradients: Vec<String>,
    /// Of every projection, and of the pooled encodings where the UNet takes them; if texts were asked for.
    of_texts: Option<(Vec<String>, Option<String>)>,
    lot: usize,
    activations: u64,
}

/// How the graph's inputs are called.
struct Names {
    /// Of the keys or values of each projection of cross-attention.
    keys_values: Vec<KeyValueInput>,
    /// Of the weights of each projection of self-attention.
    weight_inputs: Vec<WeightInput>,
    loss: grad::MeanSquaredError,
    cotangent: String,
}

const CONTEXT: &str = attention::TEXT_INPUT;
const POOLED: &str = "text_embeds";

/// What of a graph is differentiated.
pub(super) struct Asked<'a> {
    /// With respect to these values.
    pub wrt: &'a [&'a str],
    /// A number.
    pub loss: &'a str,
    /// Outputs beside the gradients.
    pub kept: &'a [&'a str],
    pub spending: Spending,
}

/// A graph with its gradient, for inputs of just these shapes: with known sizes ONNX Runtime folds what computes with them.
pub(super) fn differentiate(
    runtime: &Runtime,
    model: &Model,
    given: &[(&str, &Tensor)],
    asked: &Asked<'_>,
    options: &SessionOptions,
    cancel: &CancelToken,
) -> Result<grad::Gradient> {
    let questions = grad::questions(model, asked.wrt, asked.loss)?;
    let seen = observe(runtime, model, &questions, given, options, cancel)?;
    room(GRAPH)?;
    let mut gradient = grad::vjp(model, &Facts::new(&[seen])?, asked.wrt, asked.loss, asked.spending)?;
    let gradients = &gradient.gradients;
    gradient.model.edit(|edit| {
        let kept = |name: &str| gradients.iter().any(|one| one == name) || asked.kept.contains(&name);
        edit.graph_mut().output.retain(|info| kept(info.name()));
        for (name, tensor) in given {
            edit.fix_input(name, tensor.shape());
        }
        edit.drop_unused();
        Ok(())
    })?;
    Ok(gradient)
}

impl KeyValueGradient {
    /// Differentiates a UNet for batches like `example`.
    ///
    /// Errors: those of [`Model::open`], [`attention::find`], [`grad::vjp`] and [`Runtime::session`].
    pub fn open(
        runtime: &Runtime,
        path: impl AsRef<Path>,
        example: &Batch,
        shape: [usize; 3],
        options: &GradientOptions,
        cancel: &CancelToken,
    ) -> Result<Self> {
        let path = path.as_ref();
        Self::build(runtime, path, example, shape, options, cancel).map_err(|error| error.at(path.display()))
    }

    fn build(
        runtime: &Runtime,
        path: &Path,
        example: &Batch,
        shape: [usize; 3],
        options: &GradientOptions,
        cancel: &CancelToken,
    ) -> Result<Self> {
        let pool = threads(options.threads, "macula-gradient")?;
        room(GRAPH)?;
        let mut model = Model::open(path, &options.limits)?;
        let found = attention::find(&model, CONTEXT)?;
        let of_self = match options.attentions {
            Attentions::Cross => Vec::new(),
            Attentions::SelfAttention | Attentions::Both => attention::find_self(&model, &found)?,
        };
        if of_self.is_empty() && options.attentions != Attentions::Cross {
            return Err(Error::unsupported("this UNet has no self-attention whose keys and values were found"));
        }
        let projections = Arc::new(Projections::from_model(&model, &found, &of_self)?);
        let output = model.graph().output.first().map(|info| info.name().to_owned());
        let output = output.ok_or_else(|| Error::unsupported("the UNet has no output"))?;
        let mut keys_values = attention::externalise(&mut model, &found)?;
        keys_values.sort_by(|a, b| a.path.cmp(&b.path));
        let weight_inputs = attention::weights_as_inputs(&mut model, &of_self)?;
        let roles = keys_values.iter().map(|input| input.role).chain(of_self.iter().map(|projection| projection.role));
        let first = if options.attentions == Attentions::SelfAttention { keys_values.len() } else { 0 };
        let wanted = roles.enumerate().filter(|(at, role)| *at >= first && options.searched.takes(*role));
        let searched: Vec<usize> = wanted.map(|(at, _)| at).collect();
        let weights = projections.all().enumerate().filter(|(at, _)| searched.binary_search(at).is_ok());
        let weights = weights.map(|(_, projection)| widened(&projection.weights)).collect::<Result<Vec<_>>>()?;
        let loss = grad::mean_squared_error(&mut model, &output, 4)?;
        let mut session_options = options.session.clone();
        session_options.memory_pattern = false;
        if options.spending.effort == Effort::Memory {
            // Packed or in the layout of the CPU, every weight would be there once more.
            session_options.prepacking = false;
            // An arena keeps what no value needs any more.
            session_options.arena = false;
            session_options.optimization = session_options.optimization.min(Optimization::Extended);
        }
        let lot = match options.lot {
            _ if one_timestep(&model) => 1,
            0 => example.timesteps.len(),
            lot => lot.min(example.timesteps.len()),
        };
        let scaled = ScaledWeights { projections, searched, weights, pool };
        let mut names = Names { keys_values, weight_inputs, loss, cotangent: String::new() };

        let first = example.part(0, lot)?;
        let steered = scaled.untouched(&first.conditioning)?;
        let inputs = inputs_of(&model)?;
        let given = names.tensors(&inputs, &first, shape, &steered)?;
        let given: Vec<(&str, &Tensor)> = given.iter().map(|(name, tensor)| (*name, tensor)).collect();
        let of_searched: Vec<&str> = scaled.searched.iter().map(|&at| names.input_of(at)).collect();
        let all: Vec<&str> = names.keys_values.iter().map(|input| input.name.as_str()).collect();
        let pooled = inputs.iter().any(|input| input.name == POOLED).then_some(POOLED);
        let mut wrt = of_searched.clone();
        if options.texts {
            wrt.extend(all.iter().filter(|name| !of_searched.contains(name)));
            wrt.extend(pooled);
        }
        let asked =
            Asked { wrt: &wrt, loss: &names.loss.loss, kept: &[&names.loss.of_samples], spending: options.spending };
        let mut gradient = differentiate(runtime, &model, &given, &asked, &session_options, cancel)?;
        if let Some(wanted) = options.spending.activations.filter(|&wanted| wanted < gradient.activations) {
            let kept = gradient.activations;
            log::warn!(target: "macula::discovery", "the gradient keeps {kept} bytes of the forward pass at least, {wanted} were to be the most");
        }
        let mut transformed = 0;
        if session_options.provider == Provider::Cpu {
            // What no gradient passes, and what the gradient computes again.
            attention::fuse(&mut gradient.model)?;
            if options.spending.effort == Effort::Speed {
                transformed = winograd::minimal_filtering(&mut gradient.model, &gradient.sizes)?;
            }
        }
        let gradient_of = |value: &str| {
            let at = wrt.iter().position(|known| *known == value)?;
            gradient.gradients.get(at).cloned()
        };
        let gradients = of_searched.iter().filter_map(|value| gradient_of(value)).collect();
        let of_texts = options
            .texts
            .then(|| (all.iter().filter_map(|value| gradient_of(value)).collect(), pooled.and_then(gradient_of)));
        names.cotangent = gradient.cotangent;
        if options.spending.effort == Effort::Speed {
            // Half precision is widened and every kernel packed, those of the backward sweep as well as the forward one's.
            let packed = gradient.model.weight_bytes()?.saturating_mul(4).saturating_add(transformed);
            room(usize::try_from(packed).unwrap_or(usize::MAX))?;
        }
        let session = runtime.session(&gradient.model, &session_options)?;
        let taken = |input: &Input| session.input(&input.name).is_ok();
        let inputs = inputs_of(&gradient.model)?.into_iter().filter(taken).collect();
        let activations = gradient.activations;
        Ok(Self { session, scaled, inputs, names, gradients, of_texts, lot, activations })
    }

    /// The base's projections.
    pub fn projections(&self) -> &Arc<Projections> {
        &self.scaled.projections
    }

    /// Those whose weights the scales act on, in the order of the scales.
    pub fn searched(&self) -> impl Iterator<Item = &ProjectionWeights> {
        self.scaled.searched()
    }

    /// The untouched weights of each searched projection, `[out, in]`, in the order of the scales.
    pub(super) fn weights(&self) -> impl Iterator<Item = &[f32]> {
        self.scaled.weights.iter().map(Vec::as_slice)
    }

    /// The number of scales: of all searched projections in their order, `[out, in]` each.
    pub fn len(&self) -> usize {
        self.scaled.len()
    }

    /// Never: a base has at least one weight.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// States of one run.
    pub fn lot(&self) -> usize {
        self.lot
    }

    /// Most bytes of the forward pass's values of a lot that the backward pass finds at a time.
    pub fn activations(&self) -> u64 {
        self.activations
    }

    /// The session of the gradient.
    pub fn session(&self) -> &Session {
        &self.session
    }

    /// The weighted loss of a batch at untouched weights, and its slope with respect to `count` texts: `texts` says for each
    /// state which of them it is conditioned on, if any. The batch is a multiple of [`KeyValueGradient::lot`].
    ///
    /// Errors: as [`KeyValueGradient::slope`]; [`Status::InvalidArgument`] unless [`GradientOptions::texts`] was set.
    pub fn text_slope(
        &self,
        batch: &Batch,
        shape: [usize; 3],
        texts: &[Option<usize>],
        count: usize,
        cancel: &CancelToken,
    ) -> Result<TextSlope> {
        let states = batch.timesteps.len();
        let Some((of_keys_values, of_pooled)) = &self.of_texts else {
            return Err(Error::invalid_argument("this gradient was not made for texts"));
        };
        if texts.len() != states || states == 0 || !states.is_multiple_of(self.lot) {
            return Err(Error::invalid_argument(format!(
                "{states} states of {} texts, expected a multiple of {} states and a text for each",
                texts.len(),
                self.lot
            )));
        }
        let tokens = batch.conditioning.tokens;
        let projections = self.scaled.projections.as_slice();
        // Equal texts share a product: what their states say is added up before it.
        let widths = projections.iter().map(|projection| projection.out_features);
        let mut sums = widths.map(|width| zeroed::<f32>(count * tokens * width)).collect::<Result<Vec<_>>>()?;
        let pooled_width = batch.conditioning.text_embeds.as_ref().map_or(0, |pooled| pooled.len() / states);
        let mut pooled = of_pooled.as_ref().map(|_| zeroed::<f32>(count * pooled_width)).transpose()?;
        let mut loss = 0.0;
        for from in (0..states).step_by(self.lot) {
            cancel.check()?;
            let part = batch.part(from, from + self.lot)?;
            let steered = self.scaled.untouched(&part.conditioning)?;
            let given = self.names.tensors(&self.inputs, &part, shape, &steered)?;
            let given: Vec<(&str, &Tensor)> = given.iter().map(|(name, tensor)| (*name, tensor)).collect();
            let losses = &self.names.loss.of_samples;
            let outputs: Vec<&str> =
                of_keys_values.iter().chain(of_pooled).chain([losses]).map(String::as_str).collect();
            let answers = self.session.run(&given, &outputs, cancel)?;
            let losses = answers[outputs.len() - 1].as_slice::<f32>()?;
            loss += losses.iter().zip(&part.weights).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
            let of_part = &texts[from..from + self.lot];
            for ((sum, answer), projection) in sums.iter_mut().zip(&answers).zip(projections) {
                add_by_text(sum, answer, of_part, &projection.path)?;
            }
            if let Some(pooled) = &mut pooled {
                add_by_text(pooled, &answers[projections.len()], of_part, POOLED)?;
            }
        }
        Ok(TextSlope { loss, context: self.scaled.through_weights(&sums, count * tokens)?, pooled })
    }

    /// The weighted loss of a batch at `scales [N]` and its slope. All rows of the batch are of one set; it is a multiple of
    /// [`KeyValueGradient::lot`].
    ///
    /// Errors: [`Status::InvalidArgument`] for sizes that do not fit or a row that is named twice; [`Status::NotFinite`] for a
    /// gradient that is not finite, naming the projection; [`Status::Cancelled`]; what the session gives.
    pub fn slope(&self, batch: &Batch, shape: [usize; 3], scales: &[f32], cancel: &CancelToken) -> Result<Slope> {
        if scales.len() != self.len() || batch.rows.iter().any(|row| row.set != 0) {
            return Err(Error::invalid_argument(format!(
                "{} scales for the rows of one set, expected {}",
                scales.len(),
                self.len()
            )));
        }
        let changed: usize = scales.iter().map(|&scale| usize::from(scale != 1.0)).sum();
        let add = |part: &Batch, answers: &[Tensor], slopes: &mut [f32]| self.scaled.add_slopes(part, answers, slopes);
        // One by one, or with all weights: what takes fewer steps.
        if changed.saturating_mul(batch.rows.len().max(1)) >= scales.len() {
            let steered = |part: &Batch| self.scaled.steered(part, scales);
            return self.sum_of_lots(batch, shape, scales.len(), cancel, steered, add);
        }
        let places = collected((0..scales.len()).filter(|&at| scales[at] != 1.0))?;
        let scales_of = collected(places.iter().map(|&at| scales[at]))?;
        let members = self.scaled.by_projection(&places, &scales_of)?;
        let steered = |part: &Batch| self.scaled.steered_at(part, &members);
        self.sum_of_lots(batch, shape, scales.len(), cancel, steered, add)
    }

    /// As [`KeyValueGradient::slope`], at scales of a few `members`, with one for all others, and for several sets, each with rows
    /// of its own in the batch: set `s` has the places from `s N`. The slope is that of the members' scales.
    ///
    /// Errors: as there; [`Status::InvalidArgument`] for members that do not ascend, or several sets with weights of
    /// self-attention.
    pub fn slope_of(
        &self,
        batch: &Batch,
        shape: [usize; 3],
        members: &[usize],
        scales: &[f32],
        cancel: &CancelToken,
    ) -> Result<Slope> {
        let refuse = |why: &str| Err(Error::invalid_argument(why));
        if members.len() != scales.len() || !members.is_sorted_by(|a, b| a < b) || self.is_empty() {
            return refuse("there must be a scale for each member, and the members must ascend");
        }
        let several =
            members.last().is_some_and(|&last| last >= self.len()) || batch.rows.iter().any(|row| row.set > 0);
        if several && self.scaled.searches_self_attention() {
            return refuse("weights of self-attention act everywhere: there can be one set only");
        }
        let members = self.scaled.by_projection(members, scales)?;
        let steered = |part: &Batch| self.scaled.steered_at(part, &members);
        let add = |part: &Batch, answers: &[Tensor], slopes: &mut [f32]| {
            self.scaled.add_slopes_of(&members, part, answers, slopes)
        };
        self.sum_of_lots(batch, shape, scales.len(), cancel, steered, add)
    }

    /// Runs a batch lot by lot: with what `steered` makes of each, adding to `count` slopes what `add` makes of the answers.
    fn sum_of_lots(
        &self,
        batch: &Batch,
        shape: [usize; 3],
        count: usize,
        cancel: &CancelToken,
        steered: impl Fn(&Batch) -> Result<Steered>,
        add: impl Fn(&Batch, &[Tensor], &mut [f32]) -> Result<()>,
    ) -> Result<Slope> {
        let states = batch.timesteps.len();
        if states == 0 || !states.is_multiple_of(self.lot) {
            return Err(Error::invalid_argument(format!("{states} states, expected a multiple of {}", self.lot)));
        }
        let mut rows = collected(batch.rows.iter().map(|acting| acting.row))?;
        rows.sort_unstable();
        if rows.windows(2).any(|pair| pair[0] == pair[1]) {
            let what = "a row of a text is named twice: each set must have rows of its own, each once";
            return Err(Error::invalid_argument(what));
        }
        let mut slope = Slope { loss: 0.0, scales: zeroed(count)? };
        for from in (0..states).step_by(self.lot) {
            cancel.check()?;
            let part = batch.part(from, from + self.lot)?;
            let given = self.names.tensors(&self.inputs, &part, shape, &steered(&part)?)?;
            let given: Vec<(&str, &Tensor)> = given.iter().map(|(name, tensor)| (*name, tensor)).collect();
            let losses = &self.names.loss.of_samples;
            let outputs: Vec<&str> = self.gradients.iter().chain([losses]).map(String::as_str).collect();
            let answers = self.session.run(&given, &outputs, cancel)?;
            let losses = answers[self.gradients.len()].as_slice::<f32>()?;
            slope.loss += losses.iter().zip(&part.weights).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
            add(&part, &answers, &mut slope.scales)?;
        }
        Ok(slope)
    }
}

impl Names {
    /// The input that one of [`Projections::all`] gives to.
    fn input_of(&self, at: usize) -> &str {
        let cross = self.keys_values.len();
        self.keys_values.get(at).map_or_else(|| &self.weight_inputs[at - cross].name, |input| &input.name)
    }

    /// What a batch gives to each input of a graph.
    fn tensors<'i>(
        &self,
        inputs: &'i [Input],
        part: &Batch,
        shape: [usize; 3],
        steered: &Steered,
    ) -> Result<Vec<(&'i str, Tensor)>> {
        let batch = part.timesteps.len();
        let Conditioning { tokens, context, text_embeds, time_ids, class_labels, timestep_cond, .. } =
            &part.conditioning;
        let state = [batch, shape[0], shape[1], shape[2]];
        let tensor = |input: &Input| {
            let missing = || Error::invalid_argument(format!("this UNet needs {:?}, which was not given", input.name));
            let rows = |values: &Option<Vec<f32>>| {
                let values = values.as_ref().ok_or_else(missing)?;
                precision::from_f32(input.dtype, &[batch, values.len() / batch], values)
            };
            match input.name.as_str() {
                "sample" => precision::from_f32(input.dtype, &state, &part.states),
                "timestep" if input.scalar => integers(input.dtype, &[], &part.timesteps),
                "timestep" => integers(input.dtype, &[batch], &part.timesteps),
                CONTEXT => precision::from_f32(input.dtype, &[batch, *tokens, context.len() / batch / tokens], context),
                POOLED => rows(text_embeds),
                "time_ids" => rows(time_ids),
                "timestep_cond" => rows(timestep_cond),
                "class_labels" => integers(input.dtype, &[batch], class_labels.as_ref().ok_or_else(missing)?),
                name if name == self.loss.target => Tensor::from_slice(&state, &part.targets),
                name if name == self.loss.weight => Tensor::from_slice(&[batch], &part.weights),
                name if name == self.cotangent => Tensor::scalar(1f32),
                name => {
                    if let Some(at) = self.keys_values.iter().position(|known| known.name == name) {
                        let out = self.keys_values[at].out_features;
                        precision::from_f32(input.dtype, &[batch, *tokens, out], &steered.keys_values[at])
                    } else if let Some(at) = self.weight_inputs.iter().position(|known| known.name == name) {
                        precision::from_f32(input.dtype, &self.weight_inputs[at].shape, &steered.weights[at])
                    } else {
                        Err(Error::unsupported(format!("the UNet has an unknown input {name:?}")))
                    }
                }
            }
        };
        inputs.iter().map(|input| Ok((input.name.as_str(), tensor(input)?))).collect()
    }
}

/// The inputs of a graph that have no default.
fn inputs_of(model: &Model) -> Result<Vec<Input>> {
    let graph = model.graph();
    let open = graph.input.iter().filter(|info| !graph.initializer.iter().any(|known| known.name() == info.name()));
    open.map(|info| {
        let data_type = element_type(info);
        let dtype = data_type.and_then(|data_type| ElementType::from_onnx(data_type as i32));
        let dtype = dtype.ok_or_else(|| Error::unsupported(format!("input {:?} is {data_type:?}", info.name())))?;
        let scalar = build::declared_dims(info).is_some_and(|dims| dims.is_empty());
        Ok(Input { name: info.name().to_owned(), dtype, scalar })
    })
    .collect()
}

/// Whether all states of a run share one timestep.
fn one_timestep(model: &Model) -> bool {
    let input = model.graph().input.iter().find(|info| info.name() == "timestep");
    let dims = input.and_then(build::declared_dims).unwrap_or_default();
    dims.first().is_none_or(|dim| *dim == Dim::Fixed(1))
}

fn integers(dtype: ElementType, shape: &[usize], values: &[i64]) -> Result<Tensor> {
    match dtype {
        ElementType::I64 => Tensor::from_slice(shape, values),
        ElementType::I32 => Tensor::from_vec(shape, values.iter().map(|&value| value as i32).collect()),
        dtype => precision::from_f32(dtype, shape, &values.iter().map(|&value| value as f32).collect::<Vec<_>>()),
    }
}

/// Adds what a run says of each state to the text that the state is conditioned on.
fn add_by_text(sums: &mut [f32], answer: &Tensor, texts: &[Option<usize>], path: &str) -> Result<()> {
    let cotangents = answer.as_slice::<f32>()?;
    if cotangents.iter().any(|value| !value.is_finite()) {
        return Err(Error::new(Status::NotFinite, format!("the gradient of {path} is not finite")));
    }
    let size = cotangents.len() / texts.len().max(1);
    for (own, text) in cotangents.chunks_exact(size.max(1)).zip(texts) {
        if let Some(text) = text {
            let sum = &mut sums[text * size..(text + 1) * size];
            sum.iter_mut().zip(own).for_each(|(sum, value)| *sum += value);
        }
    }
    Ok(())
}
