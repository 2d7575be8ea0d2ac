//! Text to image over a folder in the diffusers layout, exported to ONNX.
//!
//! ```text
//! model_index.json
//! scheduler/scheduler_config.json     decomposed.json, if the model was trained for a decomposed process too
//! unet/model.onnx               config.json: sample_size, down_block_types
//! unet_1/model.onnx, unet_2/    where the stages of a decomposed process have UNets of their own, numbered without a gap;
//!                               the last one serves all later stages too
//! text_encoder/model.onnx       tokenizer/   tokenizer.json, or vocab.json and merges.txt; tokenizer_config.json
//! text_encoder_2/model.onnx     tokenizer_2/                           (SDXL)
//! vae_decoder/model.onnx        config.json: scaling_factor, shift_factor, block_out_channels
//! vae_encoder/model.onnx                                               (image-to-image only)
//! ```
//!
//! Without a `vae_decoder/` the states are the images themselves, in `[-1, 1]`. Other files are left alone: names come
//! from this list, never from a file.

mod text;
mod tokenizer;
mod vae;

use std::collections::BTreeMap;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::decomposed::operators::Size;
use super::decomposed::{
    Budget, Choice, Decomposition, MAX_TURNING_POINTS, Plan, Schedule, Statistics, Trajectory, choose_turning_points,
};
use super::folder::Folder;
use super::guidance::{self, Guidance, Noise, OnStep, Walk};
use super::precision;
use super::profiles::ExpectedStates;
use super::schedule::{self, PlanOptions, Sampler, SchedulerConfig};
use super::unet::{Conditioning, Unet, UnetOptions};
use crate::concept::{Composition, GatheredConcept, LearntToken, Rows};
use crate::error::{Error, Result, Status};
use crate::memory::extend;
use crate::progress::{CancelToken, Job};
use crate::runtime::{ProviderKind, Runtime, Session, SessionMemory};

pub use text::{Embedding, TextEncoder};
pub(crate) use tokenizer::occurrences;
pub use tokenizer::{MAX_PROMPT_BYTES, MAX_PROMPT_CHUNKS, PromptTokenizer, TokenizedPrompt, open_tokenizer};
pub use vae::Images;

use vae::Vae;

/// The most images of one draw.
pub const MAX_BATCH: usize = 256;
/// The longest side of an image in pixels.
pub const MAX_SIDE: usize = 16_384;

/// How many prompt encodings are kept for the next draw.
const KEPT_EMBEDDINGS: usize = 16;
const UNGUIDED: Guidance = Guidance { scale: 1.0, rescale: 0.0 };
const MAX_SCHEDULER_BYTES: u64 = 4 << 20;

/// Prompts of up to as many chunks are expected.
const EXPECTED_CHUNKS: usize = 4;

/// What will be drawn at the model's own size, for providers that build for sizes ahead: TensorRT.
#[derive(Clone, Copy, Debug, Default)]
pub struct Expected {
    /// The most pictures of a draw; 0 for one.
    pub pictures: usize,
    /// Stages of the schedule that will be walked; 0 for those of the folder's own, or one without it.
    pub stages: usize,
}

/// What a draw starts from.
#[derive(Clone, Copy, Debug, Default)]
pub enum Start<'a> {
    /// Pure noise.
    #[default]
    Noise,
    /// Clean latents `[B, C, h, w]`, or one `[1, C, h, w]` for all, noised to the given step.
    Latents {
        /// The values, scaled as the UNet sees them.
        values: &'a [f32],
        /// The first step that is run.
        step: usize,
    },
    /// One image for all, or one for each, of the drawn size, noised to the given step.
    Images {
        /// The pictures.
        images: &'a Images,
        /// The first step that is run.
        step: usize,
    },
}

/// What to draw. [`DrawOptions::new`] has the defaults.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct DrawOptions<'a> {
    /// One or more prompts. Images come prompt by prompt.
    pub prompts: Vec<String>,
    /// What to steer away from, for all prompts. `None` is the empty prompt, or the zero encoding for a pipeline that was
    /// trained with it (SDXL).
    pub negative_prompt: Option<String>,
    /// Images of each prompt.
    pub images_per_prompt: usize,
    /// Columns of an image in pixels; `None` for what the model was trained on.
    pub width: Option<usize>,
    /// Rows of an image in pixels; `None` for what the model was trained on.
    pub height: Option<usize>,
    /// Steps of the whole walk.
    pub steps: usize,
    /// Guidance. With a UNet that embeds its scale, there is no unconditional pass.
    pub guidance: Guidance,
    /// The decomposed process that is walked, in place of the folder's plain one: early steps see smaller states. The
    /// model must have been trained for it.
    pub schedule: Option<&'a Schedule>,
    /// The sampler; `None` for the folder's, or the schedule's.
    pub sampler: Option<Sampler>,
    /// Whether Euler and DPM++ 2M use Karras sigmas; `None` for what the folder says.
    pub karras: Option<bool>,
    /// DDIM's noise, in `[0, 1]`.
    pub eta: f64,
    /// The seed of all noise; image `i` of the draw has the noise of image `first_image + i` of this seed.
    pub seed: u64,
    /// See [`DrawOptions::seed`].
    pub first_image: u32,
    /// Start noise `[B, C, h, w]` in place of the seed's, of the size that the first step sees.
    pub noise: Option<&'a [f32]>,
    /// What the walk starts from.
    pub start: Start<'a>,
    /// The class, for a UNet that takes one.
    pub class_label: i64,
    /// SDXL's original size (height, width); `None` for the drawn one.
    pub original_size: Option<(usize, usize)>,
    /// SDXL's crop (top, left).
    pub crop: (usize, usize),
    /// SDXL's target size (height, width); `None` for the drawn one.
    pub target_size: Option<(usize, usize)>,
}

impl DrawOptions<'_> {
    /// One image of a prompt: 25 steps, guidance 7.5, seed 0.
    pub fn new(prompt: impl Into<String>) -> Self {
        Self {
            prompts: vec![prompt.into()],
            negative_prompt: None,
            images_per_prompt: 1,
            width: None,
            height: None,
            steps: 25,
            guidance: Guidance::default(),
            schedule: None,
            sampler: None,
            karras: None,
            eta: 0.0,
            seed: 0,
            first_image: 0,
            noise: None,
            start: Start::Noise,
            class_label: 0,
            original_size: None,
            crop: (0, 0),
            target_size: None,
        }
    }
}

/// A concept that shapes what a pipeline draws.
#[derive(Clone)]
pub struct AppliedConcept {
    /// The concept, gathered from [`Unet::projections`].
    pub concept: GatheredConcept,
    /// Share of each weight that is taken away, in `[0, 1]`.
    pub strength: f32,
    /// Where it acts.
    pub scope: ConceptScope,
    /// The word whose embedding was learnt with it, if any. In every prompt with the word, negative ones too, the row of
    /// each text encoder's table goes by `strength` from its own to the learnt one.
    pub token: Option<LearntToken>,
}

/// Where a concept acts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConceptScope {
    /// On every token of every prompt, the unconditional one too (Cones).
    Global,
    /// On the tokens of these words in the conditional prompts: the subject's word and its class noun.
    Words(Vec<String>),
    /// On these rows of the conditional prompts' encodings.
    Tokens(Vec<usize>),
}

/// What a pipeline is, in copies that answer while a draw runs.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct PipelineInfo {
    /// Default columns of an image.
    pub width: usize,
    /// Default rows of an image.
    pub height: usize,
    /// Sides are multiples of this.
    pub side_multiple: usize,
    /// Channels of a latent.
    pub latent_channels: usize,
    /// Pixels of a latent's side; 1 for a model in pixel space.
    pub latent_factor: usize,
    /// Tokens of a prompt's chunk; 0 for a model without text.
    pub chunk_tokens: usize,
    /// UNets: more than 1 if stages of a decomposed process have their own.
    pub unets: usize,
    /// What runs the UNet.
    pub provider: ProviderKind,
    /// Whether images can be encoded, for image-to-image.
    pub encodes_images: bool,
}

/// A text-to-image model. One draw at a time.
pub struct Pipeline {
    /// By stage; at least one.
    unets: Vec<Unet>,
    encoders: Vec<TextEncoder>,
    decoder: Option<Vae>,
    encoder: Option<Vae>,
    scheduler: Vec<u8>,
    schedule: Option<Schedule>,
    /// Whether the missing negative prompt is encoded as zeros.
    zero_negative: bool,
    info: PipelineInfo,
    concepts: Vec<AppliedConcept>,
    embeddings: Vec<(String, usize, Arc<Embedding>)>,
    /// What [`Pipeline::denoise`] set up last in each UNet, so that the steps after the first compute no keys and values.
    stepped: Vec<Option<Stepped>>,
    source: UnetSource,
}

/// Conditioning, first conditional entry and prompt of a single step.
type Stepped = (Conditioning, usize, Option<String>);

/// Where the UNet came from: whoever differentiates it opens its file again.
#[derive(Clone)]
pub struct UnetSource {
    /// What runs it.
    pub runtime: Runtime,
    /// Its file.
    pub path: PathBuf,
    /// How it was opened.
    pub options: UnetOptions,
}

impl Pipeline {
    /// Opens a folder in the layout above.
    ///
    /// # Errors
    /// [`crate::Status::NotFound`] for a part that is missing, [`crate::Status::InvalidFile`] for one that is damaged,
    /// [`crate::Status::Unsupported`] for one that is not handled; each names the file.
    pub fn open(runtime: &Runtime, folder: impl AsRef<Path>, options: &UnetOptions) -> Result<Self> {
        Self::open_expecting(runtime, folder, options, Expected::default())
    }

    /// As [`Pipeline::open`], for draws that are known ahead: unless TensorRT was given profiles, its engines are built for
    /// every stage of the schedule, for up to as many pictures with guidance, and for prompts of up to 4 chunks.
    ///
    /// # Errors
    /// As there.
    pub fn open_expecting(
        runtime: &Runtime,
        folder: impl AsRef<Path>,
        options: &UnetOptions,
        expected: Expected,
    ) -> Result<Self> {
        let folder = Folder::open(folder.as_ref())?;
        let index = folder
            .json("model_index.json")?
            .ok_or_else(|| Error::not_found(format!("{} is missing", folder.name("model_index.json"))))?;
        let scheduler_folder = required(&folder, "scheduler")?;
        let scheduler = scheduler_folder.read("scheduler_config.json", MAX_SCHEDULER_BYTES)?.ok_or_else(|| {
            Error::not_found(format!("{} is missing", scheduler_folder.name("scheduler_config.json")))
        })?;
        // What it says is read by each draw, which may ask for another sampler.
        scheduler_folder.object("scheduler_config.json", &scheduler)?;
        let schedule = scheduler_folder.read("decomposed.json", MAX_SCHEDULER_BYTES)?;
        let schedule = schedule.map(|text| Schedule::from_json(&text)).transpose();
        let schedule = schedule.map_err(|error| error.at(scheduler_folder.name("decomposed.json")))?;
        let encoders = open_encoders(runtime, &folder, options)?;
        let vae = |name: &str| {
            folder
                .inner(name)?
                .map(|part| Vae::open(runtime, &folder, &part, &options.session, &options.limits))
                .transpose()
        };
        let (decoder, encoder) = (vae("vae_decoder")?, vae("vae_encoder")?);
        let unet_folder = required(&folder, "unet")?;
        let source =
            UnetSource { runtime: runtime.clone(), path: unet_folder.path("model.onnx"), options: options.clone() };
        let config = unet_folder.json("config.json")?.unwrap_or(Value::Null);
        let mut paths = vec![source.path.clone()];
        for stage in 1..=MAX_TURNING_POINTS {
            let Some(folder) = folder.inner(&format!("unet_{stage}"))? else { break };
            paths.push(folder.path("model.onnx"));
        }
        let last_stage = match expected.stages {
            0 => schedule.as_ref().map_or(0, |schedule| schedule.turning_points().len()),
            stages => stages.min(MAX_TURNING_POINTS + 1) - 1,
        };
        let mut unets: Vec<Unet> = Vec::new();
        for (stage, path) in paths.iter().enumerate() {
            let last = if stage + 1 < paths.len() { stage } else { last_stage.max(stage) };
            let states = expected_states(&config, &encoders, decoder.as_ref(), expected.pictures, stage..=last)
                .map_err(|error| error.at(unet_folder.name("config.json")))?;
            let options = UnetOptions { expected: Some(states), ..options.clone() };
            let mut unet = Unet::open(runtime, path, &options)?;
            if let Some(first) = unets.first() {
                unet.share_projections(first);
            }
            unets.push(unet);
        }
        let info = describe(&unets, &config, &encoders, decoder.as_ref(), encoder.as_ref())
            .map_err(|error| error.at(unet_folder.name("config.json")))?;
        Ok(Self {
            stepped: vec![None; unets.len()],
            unets,
            encoders,
            decoder,
            encoder,
            scheduler,
            schedule,
            zero_negative: index.get("force_zeros_for_empty_prompt").and_then(Value::as_bool).unwrap_or(false),
            info,
            concepts: Vec::new(),
            embeddings: Vec::new(),
            source,
        })
    }

    /// Where the UNet came from.
    pub fn unet_source(&self) -> &UnetSource {
        &self.source
    }

    /// Sizes and the like.
    pub fn info(&self) -> &PipelineInfo {
        &self.info
    }

    /// The UNet of full-sized states, for its projections and for hosts with a sampler of their own.
    pub fn unet(&self) -> &Unet {
        &self.unets[0]
    }

    /// See [`Pipeline::unet`]. The next draw sets conditioning and composition anew.
    pub fn unet_mut(&mut self) -> &mut Unet {
        self.forget_steps();
        &mut self.unets[0]
    }

    fn forget_steps(&mut self) {
        self.stepped.fill(None);
    }

    /// The first tokenizer, which counts the rows of encodings.
    pub fn tokenizer(&self) -> Option<&PromptTokenizer> {
        self.encoders.first().map(|encoder| &encoder.tokenizer)
    }

    /// The text encoders, whose encodings are joined in this order; none for a model without text.
    pub fn text_encoders(&self) -> &[TextEncoder] {
        &self.encoders
    }

    /// The scheduler of the folder, or with another sampler.
    ///
    /// # Errors
    /// Those of [`SchedulerConfig::from_json`].
    pub fn scheduler(&self, sampler: Option<Sampler>) -> Result<SchedulerConfig> {
        SchedulerConfig::from_json(&self.scheduler, sampler)
            .map_err(|error| error.at("scheduler/scheduler_config.json"))
    }

    /// The decomposed process that the model was trained for, if its folder has one.
    pub fn schedule(&self) -> Option<&Schedule> {
        self.schedule.as_ref()
    }

    /// Whether this model can be walked by a schedule to pictures of a size in pixels: that it is no other model's, and that
    /// the UNets take every stage's size. One prediction for `batch` states is made for each size that was not drawn before, so
    /// a provider that builds something for a size has built it when this returns.
    ///
    /// # Errors
    /// Those of [`Pipeline::draw`] for a schedule that does not fit, naming the stage.
    pub fn check_schedule(
        &mut self,
        schedule: &Schedule,
        width: Option<usize>,
        height: Option<usize>,
        batch: usize,
        cancel: &CancelToken,
    ) -> Result<()> {
        if !(1..=2 * MAX_BATCH).contains(&batch) {
            return Err(Error::invalid_argument(format!("the batch is {batch}, must be in 1..={}", 2 * MAX_BATCH)));
        }
        let options = DrawOptions {
            width,
            height,
            images_per_prompt: batch,
            guidance: UNGUIDED,
            schedule: Some(schedule),
            ..DrawOptions::new("")
        };
        let (height, width) = self.size(&options)?;
        let shape = self.state_shape(batch, height, width);
        self.fits(schedule, shape)?;
        let every_time = PlanOptions::new(schedule.config().training.len().min(schedule::MAX_STEPS));
        let trajectory = Trajectory::new(Plan::new(&schedule.with_sampler(Sampler::Ddim)?, every_time)?, shape)?;
        let texts = self.texts(&options, false, cancel)?;
        let conditioning = self.conditioning(&options, &texts, (height, width), self.unet().guidance_features())?;
        self.forget_steps();
        self.compose_stages(&Composition::new(), trajectory.stage())?;
        let unets = guidance::used(&mut self.unets, trajectory.stage())?;
        guidance::condition(unets, &conditioning)?;
        guidance::rehearse(unets, &trajectory, 1, cancel)
    }

    /// Turning points for this model's noise levels, from pictures like those that it draws: see
    /// [`choose_turning_points`]. The model must be trained for what comes out, or have been.
    ///
    /// # Errors
    /// Those of [`Pipeline::encode_images`], [`Statistics::add`] and [`choose_turning_points`].
    pub fn choose_turning_points(
        &self,
        pictures: &[Images],
        turning_points: usize,
        budget: &Budget,
        cancel: &CancelToken,
    ) -> Result<Choice> {
        let like = match &self.schedule {
            Some(schedule) => schedule.clone(),
            None => {
                let mut scheduler: serde_json::Map<String, Value> = serde_json::from_slice(&self.scheduler)
                    .map_err(|e| Error::invalid_file(format!("scheduler/scheduler_config.json: {e}")).caused_by(e))?;
                scheduler.insert("_class_name".to_owned(), Sampler::Ddim.class_name().into());
                Schedule::new(scheduler, Decomposition::default())?
            }
        };
        let mut statistics = Statistics::new(turning_points)?;
        for (index, picture) in pictures.iter().enumerate() {
            let (states, [count, channels, height, width]) = self.encode_images(picture, cancel)?;
            let size = Size { planes: count * channels, height, width };
            statistics.add(&states, size).map_err(|error| error.at(format_args!("picture {index}")))?;
        }
        choose_turning_points(&like, &statistics, budget)
    }

    /// The concepts of the coming draws, until they are set again. None is the base model, bit for bit.
    ///
    /// # Errors
    /// [`crate::Status::InvalidArgument`] for a strength outside `[0, 1]`, two concepts that learnt the embedding of one
    /// token, a learnt word that is no single token of this model, or learnt rows that are not one of the right width for
    /// each text encoder; [`crate::Status::Unsupported`] if this UNet's keys and values can't be composed, or no token
    /// embedding was found in a text encoder's graph; those of the encoder. What was set before then stays. A draw by a
    /// schedule whose stages have UNets of other weights refuses concepts.
    pub fn set_concepts(&mut self, concepts: Vec<AppliedConcept>) -> Result<()> {
        // Checks strengths and the UNet now rather than in the next draw.
        let mut composition = Composition::new();
        for applied in &concepts {
            composition.push(applied.concept.clone(), applied.strength, Rows::All)?;
        }
        let rows = self.learnt_rows(&concepts)?;
        self.forget_steps();
        self.unet_mut().set_composition(composition)?;
        self.concepts = concepts;
        self.replace_rows(rows);
        Ok(())
    }

    /// The learnt rows of these concepts at their strengths: for each text encoder, by token.
    fn learnt_rows(&self, concepts: &[AppliedConcept]) -> Result<Vec<BTreeMap<u32, Vec<f32>>>> {
        let mut rows = vec![BTreeMap::new(); self.encoders.len()];
        let learnt = concepts.iter().filter_map(|applied| Some((applied.token.as_ref()?, applied.strength)));
        for (token, strength) in learnt {
            let word = token.word();
            if token.rows().len() != self.encoders.len() {
                return Err(Error::invalid_argument(format!(
                    "the embedding of {word:?} was learnt for {} text encoders, this model has {}",
                    token.rows().len(),
                    self.encoders.len()
                )));
            }
            for (number, (encoder, rows)) in self.encoders.iter().zip(&mut rows).enumerate() {
                let id = encoder.tokenizer.token(word).ok_or_else(|| {
                    Error::invalid_argument(format!(
                        "the embedding of {word:?} was learnt, and that is no single token of this model's tokenizer"
                    ))
                })?;
                let base = || encoder.row(id, &CancelToken::new());
                let row = token.at_strength(number, strength, encoder.row_width()?, base)?;
                if rows.insert(id, row).is_some() {
                    return Err(Error::invalid_argument(format!(
                        "two concepts learnt the embedding of one token, {word:?}: find one of them anew for another token"
                    )));
                }
            }
        }
        Ok(rows)
    }

    /// Puts rows in place of the tables'; encodings of before are forgotten if any changed.
    fn replace_rows(&mut self, rows: Vec<BTreeMap<u32, Vec<f32>>>) {
        for (encoder, rows) in self.encoders.iter_mut().zip(rows) {
            if *encoder.replaced_rows() != rows {
                encoder.replace_rows(rows);
                self.embeddings.clear();
            }
        }
    }

    /// Sets a composition, which is of the first UNet's weights, for one of the UNets.
    fn compose(&mut self, composition: Composition, unet: usize) -> Result<()> {
        if unet > 0 && !composition.is_base() && !self.unets[unet].shares_projections(self.unet()) {
            return Err(Error::invalid_argument(format!(
                "the concepts are of the weights of unet, and unet_{unet}, which serves stage {unet}, has others"
            )));
        }
        self.unets[unet].set_composition(composition)
    }

    /// As [`Pipeline::compose`] for the UNets of all stages up to `last`.
    fn compose_stages(&mut self, composition: &Composition, last: usize) -> Result<()> {
        let used = guidance::used(&mut self.unets, last)?.len();
        (0..used).try_for_each(|unet| self.compose(composition.clone(), unet))
    }

    /// The concepts of the coming draws.
    pub fn concepts(&self) -> &[AppliedConcept] {
        &self.concepts
    }

    /// Encodes a prompt of any length.
    ///
    /// # Errors
    /// [`crate::Status::InvalidArgument`] if the UNet's text input has a fixed length that the prompt exceeds (naming the
    /// range) or there is no text encoder; those of [`PromptTokenizer::tokenize`]; [`crate::Status::Cancelled`].
    pub fn encode_prompt(&mut self, prompt: &str, cancel: &CancelToken) -> Result<Arc<Embedding>> {
        self.embed(prompt, 1, cancel)
    }

    fn embed(&mut self, prompt: &str, chunks: usize, cancel: &CancelToken) -> Result<Arc<Embedding>> {
        let kept = self.embeddings.iter().position(|(text, least, _)| text == prompt && *least == chunks);
        if let Some(kept) = kept {
            let kept = self.embeddings.remove(kept);
            let embedding = kept.2.clone();
            self.embeddings.push(kept);
            return Ok(embedding);
        }
        if let (Some(fixed), Some(encoder)) = (self.unet().shape().tokens, self.encoders.first()) {
            let tokens = encoder.tokenizer.tokenize(prompt)?;
            let length = encoder.tokenizer.length();
            if tokens.chunks().len().max(chunks) * length != fixed {
                return Err(Error::invalid_argument(format!(
                    "the prompt has {} tokens in {} chunks of {length}; this UNet takes exactly {fixed} rows, which is \
                     {} such chunks",
                    tokens.own_tokens(),
                    tokens.chunks().len(),
                    fixed / length
                )));
            }
        }
        let embedding = Arc::new(text::encode(&self.encoders, prompt, chunks, cancel)?);
        if self.embeddings.len() >= KEPT_EMBEDDINGS {
            self.embeddings.remove(0);
        }
        self.embeddings.push((prompt.to_owned(), chunks, embedding.clone()));
        Ok(embedding)
    }

    /// One prediction under the pipeline's concepts by the UNet of a stage, for hosts with a sampler of their own; otherwise
    /// as [`Unet::denoise`].
    ///
    /// Concepts of local scope act on the entries of the batch from `first_conditional` on; where their words stand is
    /// told by `prompt`, the encoding of those entries.
    ///
    /// # Errors
    /// Those of [`Unet::set_conditioning`] and [`Unet::denoise`]; [`crate::Status::InvalidArgument`] if a concept's words
    /// are not in the prompt, or there is no prompt to find them in; [`crate::Status::NotFinite`].
    #[allow(clippy::too_many_arguments)]
    pub fn denoise(
        &mut self,
        sample: &[f32],
        shape: [usize; 4],
        timestep: f64,
        stage: usize,
        conditioning: &Conditioning,
        first_conditional: usize,
        prompt: Option<&Embedding>,
        cancel: &CancelToken,
    ) -> Result<Vec<f32>> {
        let stage = stage.min(self.unets.len() - 1);
        let asked = Some((conditioning, first_conditional, prompt.map(|prompt| prompt.prompt.text())));
        let bound = self.stepped[stage].as_ref().map(|(bound, first, text)| (bound, *first, text.as_deref()));
        if asked != bound {
            let composition = self.stepped_composition(conditioning.batch, first_conditional, prompt)?;
            self.stepped[stage] = None;
            self.compose(composition, stage)?;
            self.unets[stage].set_conditioning(conditioning)?;
            let text = prompt.map(|prompt| prompt.prompt.text().to_owned());
            self.stepped[stage] = Some((conditioning.clone(), first_conditional, text));
        }
        let prediction = self.unets[stage].denoise(sample, shape, timestep, cancel)?;
        if prediction.iter().any(|value| !value.is_finite()) {
            return Err(Error::new(
                Status::NotFinite,
                format!("the prediction at timestep {timestep} holds a NaN or infinity"),
            ));
        }
        Ok(prediction)
    }

    /// The concepts as they act on the entries of a batch from `first_conditional` on.
    fn stepped_composition(
        &self,
        batch: usize,
        first_conditional: usize,
        prompt: Option<&Embedding>,
    ) -> Result<Composition> {
        let rows_of = |words: &[String]| -> Result<Vec<usize>> {
            let Some(prompt) = prompt.map(|embedding| &embedding.prompt) else {
                let why = format!("where {} stand is not known without the prompt's encoding", quoted(words));
                return Err(Error::invalid_argument(why));
            };
            let rows: Vec<usize> = words.iter().flat_map(|word| prompt.rows_of(word)).collect();
            if rows.is_empty() {
                let why = format!(
                    "a concept acts on the words {} only, and none of them is in {:?}",
                    quoted(words),
                    prompt.text()
                );
                return Err(Error::invalid_argument(why));
            }
            Ok(rows)
        };
        let mut composition = Composition::new();
        for applied in &self.concepts {
            let tokens = match &applied.scope {
                ConceptScope::Global => None,
                ConceptScope::Words(words) => Some(rows_of(words)?),
                ConceptScope::Tokens(tokens) => Some(tokens.clone()),
            };
            let entries = first_conditional..batch;
            let rows = tokens.map_or(Rows::All, |tokens| {
                Rows::Only(entries.flat_map(|entry| tokens.iter().map(move |token| (entry, *token))).collect())
            });
            composition.push(applied.concept.clone(), applied.strength, rows)?;
        }
        Ok(composition)
    }

    /// What the models take: weights in all, and what their arenas hold and held.
    pub fn memory(&self) -> SessionMemory {
        let sessions = self.encoders.iter().map(|encoder| &encoder.session);
        let sessions = sessions.chain(self.decoder.iter().chain(&self.encoder).map(Vae::session));
        let sessions = sessions.chain(self.unets[1..].iter().map(Unet::session));
        let add = |a: Option<u64>, b: Option<u64>| a.zip(b).map(|(a, b)| a + b);
        sessions.map(Session::memory).fold(self.unet().session().memory(), |sum, one| SessionMemory {
            weights: sum.weights + one.weights,
            arena: add(sum.arena, one.arena),
            arena_peak: add(sum.arena_peak, one.arena_peak),
        })
    }

    /// Bytes of key and value weights and of bound keys and values, beside the models' own; what UNets share counts once.
    pub fn composing_bytes(&self) -> usize {
        let shared = |unet: &&Unet| unet.shares_projections(self.unet());
        let again: usize =
            self.unets[1..].iter().filter(shared).filter_map(Unet::projections).map(|all| all.memory_bytes()).sum();
        self.unets.iter().map(Unet::memory_bytes).sum::<usize>() - again
    }

    /// Draws images, prompt by prompt.
    ///
    /// The result depends on the options and the concepts alone, not on threads of this library or on earlier draws.
    ///
    /// # Errors
    /// [`crate::Status::InvalidArgument`] with the range that was left; those of [`Walk::run`]; of the encoders and the
    /// decoder.
    pub fn draw(
        &mut self,
        options: &DrawOptions<'_>,
        on_step: Option<OnStep<'_>>,
        job: &mut Job<'_>,
    ) -> Result<Images> {
        let (latents, shape) = self.draw_latents(options, on_step, job)?;
        self.decode(&latents, shape, job)
    }

    /// As [`Pipeline::draw`], but gives the clean latents and their shape `[B, C, h, w]`.
    ///
    /// # Errors
    /// As there.
    pub fn draw_latents(
        &mut self,
        options: &DrawOptions<'_>,
        on_step: Option<OnStep<'_>>,
        job: &mut Job<'_>,
    ) -> Result<(Vec<f32>, [usize; 4])> {
        options.guidance.check()?;
        let batch = options.prompts.len().saturating_mul(options.images_per_prompt);
        if batch == 0 || batch > MAX_BATCH {
            return Err(Error::invalid_argument(format!(
                "{} prompts with {} images each: the images of a draw must number 1..={MAX_BATCH}",
                options.prompts.len(),
                options.images_per_prompt
            )));
        }
        let (height, width) = self.size(options)?;
        let shape = self.state_shape(batch, height, width);
        let (plan, stage_class_labels) = self.plan(options, shape)?;
        let embedded_guidance = self.unet().guidance_features();
        let guidance = match embedded_guidance {
            Some(_) => UNGUIDED,
            None => options.guidance,
        };
        let texts = self.texts(options, guidance.needs_unconditional(), &job.cancel)?;
        let conditioning = self.conditioning(options, &texts, (height, width), embedded_guidance)?;
        self.forget_steps();
        let composition = self.composition(&texts, options)?;
        self.compose_stages(&composition, plan.first_stage())?;
        let clean = self.clean(options, shape, &job.cancel)?;
        let walk = Walk {
            shape,
            plan,
            stage_class_labels,
            guidance,
            conditioning: &conditioning,
            noise: Noise {
                seed: options.seed,
                first_image: options.first_image,
                start: options.noise,
                ..Noise::default()
            },
            clean: clean.as_deref(),
            on_step,
        };
        Ok((walk.run(&mut self.unets, job)?, shape))
    }

    /// Images of latents `[B, C, h, w]`.
    ///
    /// # Errors
    /// [`crate::Status::InvalidArgument`] for other shapes; those of the decoder.
    pub fn decode(&self, latents: &[f32], shape: [usize; 4], job: &mut Job<'_>) -> Result<Images> {
        let Some(decoder) = &self.decoder else {
            return Images::from_planes(latents, shape);
        };
        let [batch, channels, height, width] = shape;
        let size = shape.iter().try_fold(1_usize, |product, size| product.checked_mul(*size));
        if size != Some(latents.len()) || latents.is_empty() {
            return Err(Error::invalid_argument(format!("{} values are no latents of shape {shape:?}", latents.len())));
        }
        let mut images: Option<Images> = None;
        // One by one: a decoder takes far more memory for an image than a UNet does.
        for (index, latent) in latents.chunks_exact(latents.len() / batch).enumerate() {
            job.step("decode", index as u64, batch as u64)?;
            let (planes, shape) = decoder.decode(latent, [1, channels, height, width], &job.cancel)?;
            let image = Images::from_planes(&planes, shape).map_err(|error| error.at("VAE decoder"))?;
            match &mut images {
                None => images = Some(image),
                Some(images) => {
                    images.rgb.try_reserve_exact(image.rgb.len())?;
                    images.count += 1;
                    images.rgb.extend(image.rgb);
                }
            }
        }
        job.step("decode", batch as u64, batch as u64)?;
        images.ok_or_else(|| Error::invalid_argument("there are no latents to decode"))
    }

    /// Clean states of images: scaled latents, or the pixels themselves in `[-1, 1]` for a model in pixel space; and their
    /// shape `[count, C, h, w]`.
    ///
    /// # Errors
    /// [`crate::Status::NotFound`] if the folder has a VAE but no encoder; those of the encoder;
    /// [`crate::Status::Cancelled`].
    pub fn encode_images(&self, images: &Images, cancel: &CancelToken) -> Result<(Vec<f32>, [usize; 4])> {
        match (&self.encoder, &self.decoder) {
            (Some(encoder), _) => {
                // One at a time, as they are decoded: a batch of pictures would take that many times the memory.
                let (mut latents, mut shape) = (Vec::new(), [0; 4]);
                images.check()?;
                for at in 0..images.count {
                    cancel.check()?;
                    let (planes, one) = (images.picture(at)?.to_planes()?, [1, 3, images.height, images.width]);
                    let (latent, given) = encoder.encode(&planes, one, self.info.latent_channels, cancel)?;
                    extend(&mut latents, latent)?;
                    shape = [images.count, given[1], given[2], given[3]];
                }
                Ok((latents, shape))
            }
            (None, None) => Ok((images.to_planes()?, [images.count, 3, images.height, images.width])),
            (None, Some(_)) => Err(Error::not_found("images can't be encoded: the folder has no vae_encoder")),
        }
    }

    /// What the UNet is conditioned on for images of these prompts, one entry a prompt, all encoded to one length; and the
    /// encodings, which tell where a word stands.
    ///
    /// # Errors
    /// Those of [`Pipeline::encode_prompt`]; [`crate::Status::InvalidArgument`] for a model without text.
    pub fn condition(
        &mut self,
        prompts: &[String],
        class_label: i64,
        (height, width): (usize, usize),
        cancel: &CancelToken,
    ) -> Result<(Conditioning, Vec<Arc<Embedding>>)> {
        if self.encoders.is_empty() || prompts.is_empty() {
            return Err(Error::invalid_argument("there is no prompt, or the model takes no text"));
        }
        let mut options = DrawOptions::new("");
        options.prompts = prompts.to_vec();
        options.guidance = UNGUIDED;
        options.class_label = class_label;
        let texts = self.texts(&options, false, cancel)?;
        let conditioning = self.conditioning(&options, &texts, (height, width), self.unet().guidance_features())?;
        Ok((conditioning, texts.prompts))
    }

    /// Height and width in pixels.
    fn size(&self, options: &DrawOptions<'_>) -> Result<(usize, usize)> {
        let multiple = self.info.side_multiple;
        let fixed = self.unet().shape();
        let side = |name: &str, wanted: Option<usize>, default: usize, fixed: Option<usize>| {
            let side = wanted.unwrap_or(default);
            let fixed = fixed.map(|latent| latent * self.info.latent_factor);
            let range = match fixed {
                Some(fixed) => fixed.to_string(),
                None => format!("a multiple of {multiple} in {multiple}..={MAX_SIDE}"),
            };
            let fits = match fixed {
                Some(fixed) => side == fixed,
                None => side > 0 && side <= MAX_SIDE && side.is_multiple_of(multiple),
            };
            if fits { Ok(side) } else { Err(Error::invalid_argument(format!("{name} is {side}, must be {range}"))) }
        };
        Ok((
            side("height", options.height, self.info.height, fixed.height)?,
            side("width", options.width, self.info.width, fixed.width)?,
        ))
    }

    /// The shape `[B, C, h, w]` of the clean states of images of a size in pixels.
    fn state_shape(&self, batch: usize, height: usize, width: usize) -> [usize; 4] {
        let factor = self.info.latent_factor;
        [batch, self.info.latent_channels, height / factor, width / factor]
    }

    /// The steps of a draw and the class label of each stage, empty where the options' own holds.
    fn plan<'a>(&self, options: &DrawOptions<'a>, shape: [usize; 4]) -> Result<(Plan, &'a [i64])> {
        let start = match options.start {
            Start::Noise => 0,
            Start::Latents { step, .. } | Start::Images { step, .. } => step,
        };
        let steps = PlanOptions { steps: options.steps, start, eta: options.eta };
        let Some(schedule) = options.schedule else {
            return Ok((schedule::Plan::new(&self.plan_config(options)?, steps)?.into(), &[]));
        };
        if options.karras == Some(true) {
            return Err(Error::invalid_argument("Karras sigmas were asked for beside a schedule, which has its own"));
        }
        self.fits(schedule, shape)?;
        let plan = match options.sampler {
            Some(sampler) => Plan::new(&schedule.with_sampler(sampler)?, steps)?,
            None => Plan::new(schedule, steps)?,
        };
        Ok((plan, &schedule.decomposition().stage_class_labels))
    }

    /// Whether a schedule is this model's, and for states of this shape, as far as can be told without a prediction.
    fn fits(&self, schedule: &Schedule, shape: [usize; 4]) -> Result<()> {
        schedule.check_model(&self.scheduler(Some(schedule.config().sampler))?)?;
        let decomposition = schedule.decomposition();
        if !decomposition.stage_class_labels.is_empty() && !self.unet().takes_class_labels() {
            return Err(Error::invalid_argument(
                "the schedule is another model's: it has stage_class_labels, and this UNet takes no class",
            ));
        }
        match decomposition.stage_sizes.first() {
            Some(side) if shape[2..] != [*side, *side] => Err(Error::invalid_argument(format!(
                "the schedule is for states of {side} x {side}, those to be drawn have {} x {}",
                shape[3], shape[2]
            ))),
            _ => Ok(()),
        }
    }

    fn plan_config(&self, options: &DrawOptions<'_>) -> Result<SchedulerConfig> {
        let mut config = self.scheduler(options.sampler)?;
        if let Some(karras) = options.karras {
            if karras && !matches!(config.sampler, Sampler::Euler | Sampler::DpmMultistep) {
                return Err(Error::invalid_argument(format!(
                    "Karras sigmas are for Euler and DPM++ 2M, not for {}",
                    config.sampler.class_name()
                )));
            }
            config.karras = karras;
        }
        Ok(config)
    }

    /// Encodings of the prompts, then of the negative prompt if it is needed, all of one length.
    fn texts(&mut self, options: &DrawOptions<'_>, guided: bool, cancel: &CancelToken) -> Result<Texts> {
        if self.encoders.is_empty() {
            if self.unet().takes_text() {
                return Err(Error::not_found(
                    "the UNet takes text, and the folder has no text_encoder: encode prompts elsewhere and denoise",
                ));
            }
            return Ok(Texts { prompts: Vec::new(), negative: None });
        }
        let negative = guided.then(|| options.negative_prompt.as_deref().unwrap_or(""));
        let mut chunks = 1;
        for prompt in options.prompts.iter().map(String::as_str).chain(negative) {
            for encoder in &self.encoders {
                chunks = chunks.max(encoder.tokenizer.tokenize(prompt)?.chunks().len());
            }
        }
        let prompts: Vec<Arc<Embedding>> =
            options.prompts.iter().map(|prompt| self.embed(prompt, chunks, cancel)).collect::<Result<_>>()?;
        let mut negative = negative.map(|negative| self.embed(negative, chunks, cancel)).transpose()?;
        if let Some(negative) = &mut negative
            && self.zero_negative
            && options.negative_prompt.is_none()
        {
            let zero = Arc::make_mut(negative);
            zero.context.fill(0.0);
            zero.pooled.iter_mut().for_each(|pooled| pooled.fill(0.0));
        }
        Ok(Texts { prompts, negative })
    }

    fn conditioning(
        &self,
        options: &DrawOptions<'_>,
        texts: &Texts,
        (height, width): (usize, usize),
        embedded_guidance: Option<usize>,
    ) -> Result<Conditioning> {
        let images = options.images_per_prompt;
        let mut entries: Vec<&Embedding> = Vec::new();
        if let Some(negative) = &texts.negative {
            entries.resize(options.prompts.len() * images, negative);
        }
        texts.prompts.iter().for_each(|prompt| entries.extend(std::iter::repeat_n(&**prompt, images)));
        // A model without text is unconditional: its batch is doubled only by guidance, which it has no use for.
        let batch = if entries.is_empty() { options.prompts.len() * images } else { entries.len() };
        if entries.is_empty() && options.guidance.needs_unconditional() && embedded_guidance.is_none() {
            return Err(Error::invalid_argument("this model takes no text: the guidance scale must be 1"));
        }
        let mut conditioning = Conditioning {
            batch,
            tokens: entries.first().map_or(0, |entry| entry.tokens),
            context: precision::collect(
                entries.iter().map(|entry| entry.context.len()).sum(),
                entries.iter().flat_map(|entry| entry.context.iter().copied()),
            )?,
            ..Conditioning::default()
        };
        if self.unet().takes_sizes() {
            let pooled: Option<Vec<f32>> = entries
                .iter()
                .map(|entry| entry.pooled.as_ref())
                .collect::<Option<Vec<_>>>()
                .map(|pooled| pooled.into_iter().flatten().copied().collect());
            conditioning.text_embeds = Some(
                pooled.ok_or_else(|| Error::unsupported("the UNet needs text_embeds, which no text encoder makes"))?,
            );
            let (original, target) =
                (options.original_size.unwrap_or((height, width)), options.target_size.unwrap_or((height, width)));
            let sizes = [original.0, original.1, options.crop.0, options.crop.1, target.0, target.1];
            conditioning.time_ids = Some(sizes.map(|size| size as f32).repeat(batch));
        }
        if self.unet().takes_class_labels() {
            conditioning.class_labels = Some(vec![options.class_label; batch]);
        }
        if let Some(features) = embedded_guidance {
            conditioning.timestep_cond = Some(embed_guidance(options.guidance.scale - 1.0, features).repeat(batch));
        }
        Ok(conditioning)
    }

    fn composition(&self, texts: &Texts, options: &DrawOptions<'_>) -> Result<Composition> {
        let images = options.images_per_prompt;
        let first = if texts.negative.is_some() { texts.prompts.len() * images } else { 0 };
        let mut composition = Composition::new();
        for applied in &self.concepts {
            let rows = match &applied.scope {
                ConceptScope::Global => Rows::All,
                ConceptScope::Words(words) => {
                    let mut rows = Vec::new();
                    for (prompt, text) in texts.prompts.iter().enumerate() {
                        let tokens: Vec<usize> = words.iter().flat_map(|word| text.prompt.rows_of(word)).collect();
                        for image in 0..images {
                            rows.extend(tokens.iter().map(|token| (first + prompt * images + image, *token)));
                        }
                    }
                    if rows.is_empty() {
                        return Err(Error::invalid_argument(format!(
                            "a concept acts on the words {} only, and none of them is in {}",
                            quoted(words),
                            quoted(&options.prompts)
                        )));
                    }
                    Rows::Only(rows)
                }
                ConceptScope::Tokens(tokens) => Rows::Only(
                    (first..first + texts.prompts.len() * images)
                        .flat_map(|entry| tokens.iter().map(move |token| (entry, *token)))
                        .collect(),
                ),
            };
            composition.push(applied.concept.clone(), applied.strength, rows)?;
        }
        Ok(composition)
    }

    /// The clean states that the walk begins from.
    fn clean(&self, options: &DrawOptions<'_>, shape: [usize; 4], cancel: &CancelToken) -> Result<Option<Vec<f32>>> {
        let [batch, channels, height, width] = shape;
        let values = match options.start {
            Start::Noise => return Ok(None),
            Start::Latents { values, .. } => precision::collect(values.len(), values.iter().copied())?,
            Start::Images { images, .. } => {
                let factor = self.info.latent_factor;
                if (images.height, images.width) != (height * factor, width * factor) {
                    return Err(Error::invalid_argument(format!(
                        "the start image has {} x {} pixels, {} x {} are drawn",
                        images.width,
                        images.height,
                        width * factor,
                        height * factor
                    )));
                }
                let (latents, given) = self.encode_images(images, cancel)?;
                if given[2..] != shape[2..] {
                    return Err(Error::unsupported(format!(
                        "the VAE encoder gives {given:?}, the UNet takes {shape:?}"
                    )));
                }
                latents
            }
        };
        let one = channels * height * width;
        if values.len() == one {
            let all = std::iter::repeat_n(&values, batch).flatten().copied();
            Ok(Some(precision::collect(values.len().saturating_mul(batch), all)?))
        } else if values.len() == one * batch {
            Ok(Some(values))
        } else {
            Err(Error::invalid_argument(format!(
                "the start has {} values, {shape:?} needs {} or, for one that all share, {one}",
                values.len(),
                one * batch
            )))
        }
    }
}

/// Encodings of a draw.
struct Texts {
    prompts: Vec<Arc<Embedding>>,
    negative: Option<Arc<Embedding>>,
}

fn quoted(words: &[String]) -> String {
    words.iter().map(|word| format!("{word:?}")).collect::<Vec<_>>().join(", ")
}

fn required(folder: &Folder, name: &str) -> Result<Folder> {
    folder.inner(name)?.ok_or_else(|| Error::not_found(format!("{} is missing", folder.name(name))))
}

fn open_encoders(runtime: &Runtime, folder: &Folder, options: &UnetOptions) -> Result<Vec<TextEncoder>> {
    let mut encoders = Vec::new();
    let two = folder.inner("text_encoder_2")?.is_some();
    for (encoder, tokenizer) in [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")] {
        let Some(encoder) = folder.inner(encoder)? else { continue };
        let tokenizer = required(folder, tokenizer)?;
        encoders.push(TextEncoder::open(runtime, &encoder, &tokenizer, two, &options.session, &options.limits)?);
    }
    let lengths: Vec<usize> = encoders.iter().map(|encoder| encoder.tokenizer.length()).collect();
    if lengths.windows(2).any(|pair| pair[0] != pair[1]) {
        return Err(Error::unsupported(format!("the tokenizers make chunks of {lengths:?} tokens")));
    }
    Ok(encoders)
}

fn describe(
    unets: &[Unet],
    config: &Value,
    encoders: &[TextEncoder],
    decoder: Option<&Vae>,
    encoder: Option<&Vae>,
) -> Result<PipelineInfo> {
    let factor = decoder.map_or(1, |decoder| decoder.factor);
    let (height, width) = sample_size(config, factor)?;
    let unet = &unets[0];
    let shape = unet.shape();
    let latent_channels = match (shape.channels, config.get("in_channels")) {
        (Some(channels), _) => channels,
        (None, Some(channels)) => whole("in_channels", channels, 1024)?,
        (None, None) => return Err(Error::invalid_file("neither the graph nor in_channels tells the channels")),
    };
    if decoder.is_none() && latent_channels != 3 {
        return Err(Error::not_found(format!(
            "a UNet of {latent_channels} channels draws latents, and the folder has no vae_decoder"
        )));
    }
    Ok(PipelineInfo {
        width: shape.width.unwrap_or(width) * factor,
        height: shape.height.unwrap_or(height) * factor,
        side_multiple: unet.shape().multiple * factor,
        latent_channels,
        latent_factor: factor,
        unets: unets.len(),
        chunk_tokens: encoders.first().map_or(0, |encoder| encoder.tokenizer.length()),
        provider: unet.session().provider(),
        encodes_images: encoder.is_some() || decoder.is_none(),
    })
}

fn whole(name: &str, value: &Value, most: u64) -> Result<usize> {
    match value.as_u64() {
        Some(number) if (1..=most).contains(&number) => Ok(number as usize),
        _ => Err(Error::invalid_file(format!("{name} is {value}, must be a whole number in 1..={most}"))),
    }
}

/// Height and width of a full-sized state, of which a number stands for `factor` pixels of a side.
fn sample_size(config: &Value, factor: usize) -> Result<(usize, usize)> {
    let side = |value: &Value| whole("sample_size", value, (MAX_SIDE / factor) as u64);
    match config.get("sample_size") {
        None | Some(Value::Null) => Ok((64, 64)),
        Some(Value::Array(sides)) if sides.len() == 2 => Ok((side(&sides[0])?, side(&sides[1])?)),
        Some(both) => Ok((side(both)?, side(both)?)),
    }
}

/// The states that the UNet of these stages will be asked about.
fn expected_states(
    config: &Value,
    encoders: &[TextEncoder],
    decoder: Option<&Vae>,
    pictures: usize,
    stages: RangeInclusive<usize>,
) -> Result<ExpectedStates> {
    let (height, width) = sample_size(config, decoder.map_or(1, |decoder| decoder.factor))?;
    // Counts only where the graph leaves the channels open.
    let channels = config.get("in_channels").and_then(Value::as_u64).map_or(3, |channels| channels.min(1024) as usize);
    let chunk = encoders.first().map_or(1, |encoder| encoder.tokenizer.length());
    let tokens = chunk..=chunk.saturating_mul(EXPECTED_CHUNKS);
    let batch = pictures.clamp(1, MAX_BATCH) * 2;
    Ok(ExpectedStates { batch, channels, height, width, stages, tokens })
}

/// The sinusoidal embedding of `1000 w` that distilled models take (arXiv 2310.04378, appendix; as for timesteps in
/// arXiv 1706.03762, section 3.5): sines, then cosines.
fn embed_guidance(w: f64, features: usize) -> Vec<f32> {
    let half = features / 2;
    let angle = |index: usize| 1000.0 * w * libm::exp(-libm::log(10_000.0) * index as f64 / (half.max(2) - 1) as f64);
    let mut embedding: Vec<f32> = (0..half).map(|index| libm::sin(angle(index)) as f32).collect();
    embedding.extend((0..half).map(|index| libm::cos(angle(index)) as f32));
    embedding.resize(features, 0.0);
    embedding
}
