//! Discovery
//!
//! Finds the concept neurons of a subject from a few pictures of it: the weights whose shutting makes the model draw it
//! (Cones, arXiv 2303.05125), or those whose shutting makes it forget a word. Tuning gives them values instead, and the
//! embedding of the subject's word may be learnt before. All of it differentiates the graphs of the UNet and the text encoders
//! and runs the gradients as further models; the model's own weights are never written.

use std::ffi::{CString, c_char, c_void};
use std::ops::ControlFlow;
use std::path::PathBuf;

use super::argument::{self, Versioned, optional_text, out, reference, slice, text};
use super::cancel::macula_cancel_token;
use super::concept::{
    MACULA_ROLE_ERASE, MACULA_ROLE_IMPLANT, MACULA_VALUES_FLOAT16, macula_concept, macula_role, macula_scope,
    macula_values, precision, scope,
};
use super::denoise::macula_embedding;
use super::draw::{Teller, macula_progress_fn};
use super::guard::guard;
use super::handle::Object;
use super::image::macula_image;
use super::pipeline::{Work, macula_pipeline};
use super::status::macula_status;
use super::tensor::macula_tensor;
use crate::concept::Scope;
use crate::diffusion::pipeline::{Embedding, Images, Pipeline};
use crate::discovery::search::Method;
use crate::discovery::{
    Attentions, Encoded, EncodedSubject, Erasure, Goal, InvertOptions, Request, Searched, Subject, TuneOptions,
};
use crate::error::{Error, Result};
use crate::onnx::grad::Effort;
use crate::progress::{CancelToken, Job, Progress};

/// How neurons are searched for: one of `MACULA_METHOD_*`.
pub type macula_method = i32;

/// The one that lowers the held-out loss most for its bytes: at present the learnt mask.
pub const MACULA_METHOD_DEFAULT: macula_method = 0;

/// The mean first-order saliency, one cut (Algorithm 1 of Cones with rho = 0). Good at densities of 0.2 % and below.
pub const MACULA_METHOD_SALIENCY: macula_method = 1;

/// Stages of growing size, scored anew between them.
pub const MACULA_METHOD_GRADUAL: macula_method = 2;

/// A mask learnt by gradient descent, of at most the given density.
pub const MACULA_METHOD_LEARNT_MASK: macula_method = 3;

/// Which weights are searched: one of `MACULA_SEARCHED_*`.
pub type macula_searched = i32;

/// Those that make the keys and those that make the values.
pub const MACULA_SEARCHED_KEYS_AND_VALUES: macula_searched = 0;

/// Those of the keys alone: where a word draws the picture's queries to.
pub const MACULA_SEARCHED_KEYS: macula_searched = 1;

/// Those of the values alone: what a word puts there.
pub const MACULA_SEARCHED_VALUES: macula_searched = 2;

/// Of which attention weights are searched: one of `MACULA_ATTENTION_*`.
pub type macula_attention = i32;

/// Cross-attention, which reads the prompt, as in Cones.
pub const MACULA_ATTENTION_CROSS: macula_attention = 0;

/// Self-attention, in which the picture reads itself.
pub const MACULA_ATTENTION_SELF: macula_attention = 1;

/// Both.
pub const MACULA_ATTENTION_BOTH: macula_attention = 2;

/// What is to be found, and how.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct macula_discover_options {
    /// `sizeof` this struct.
    pub struct_size: usize,
    /// Implanting: pictures of the subject, all of one size that the model draws, `picture_count` of them; not NULL. A
    /// file is read by `macula_images_read`. Erasing: NULL, the model draws its own. NULL beside `latents`. Default: `NULL`.
    pub pictures: *const macula_image,
    /// How many pictures, at least 1 to implant; 3 to 6 are usual. Default: `0`.
    pub picture_count: usize,
    /// Implanting in global scope: pictures of the class, of the same size, which must go on being drawn alike (prior
    /// preservation); `class_picture_count` of them. May be NULL: the model draws `drawn_pictures`. Default: `NULL`.
    pub class_pictures: *const macula_image,
    /// How many pictures of the class. Default: `0`.
    pub class_picture_count: usize,
    /// Implanting: the subject's word in prompts, a single token of the model's tokenizer that stands for nothing yet.
    /// Erasing: the word to forget, or words in a row. Not NULL. Default: `NULL`.
    pub trigger: *const c_char,
    /// Implanting: what the subject is, in words that the model knows, e.g. `"dog"`; not NULL. Erasing: NULL.
    /// Default: `NULL`.
    pub class_noun: *const c_char,
    /// `prompt_count` texts, each with the trigger. Implanting: what each picture shows; may be NULL: `"a TRIGGER NOUN"`
    /// for all. Erasing: what the model draws to learn from, e.g. `"a tiger on the grass"`; not NULL. Default: `NULL`.
    pub prompts: *const *const c_char,
    /// Erasing: what each prompt is to mean afterwards, e.g. `"an animal on the grass"`; `prompt_count` texts, not NULL.
    /// Implanting: NULL. Default: `NULL`.
    pub anchors: *const *const c_char,
    /// How many prompts; to implant, `picture_count`, or 0 with NULL. Default: `0`.
    pub prompt_count: usize,
    /// Texts for which predictions are to stay as they are, `preserve_count` of them, on pictures that the model draws of
    /// them. May be NULL. In local scope only texts with the trigger can change; others are left out. Default: `NULL`.
    pub preserve: *const *const c_char,
    /// How many texts to preserve. Default: `0`.
    pub preserve_count: usize,
    /// A file that keeps the search every ten batches, when it is broken off and at its end. If it is there, the same
    /// search goes on where it was, and finds the same neurons as in one go. Written in one piece; never removed. A
    /// safetensors file: its tensors `losses`, with a learnt embedding `inverted.losses` and with tuning `tuned.losses` are the
    /// loss of each batch, 64-bit floating point. May be NULL. Default: `NULL`.
    pub checkpoint: *const c_char,
    /// Stops the search from another thread. May be NULL. Default: `NULL`.
    pub cancel: *const macula_cancel_token,
    /// Is told of each batch. May be NULL. Default: `NULL`.
    pub progress: macula_progress_fn,
    /// Given to `progress` as it is. May be NULL. Default: `NULL`.
    pub progress_userdata: *mut c_void,
    /// Share of the searched weights that may be shut, above 0, up to 1; 0 for the one from 0.005 to 5 % whose loss on
    /// held-out noises is the lowest (not with `MACULA_METHOD_GRADUAL`). Default: `0.01`.
    pub density: f64,
    /// Share of the preserved texts in the loss, above 0. Default: `1.0`.
    pub preserve_weight: f64,
    /// Step size of tuning in standard deviations of a projection's weights, above 0. Default: `0.1`.
    pub tune_rate: f64,
    /// The same seed gives the same neurons on any number of threads. Default: `0`.
    pub seed: u64,
    /// Batches of the search, at least 1; at least 13 for a learnt mask. Default: `60`.
    pub batches: u32,
    /// Noisy pictures in a batch, at least 1. Default: `8`.
    pub batch: u32,
    /// Noisy pictures that are run at a time: memory grows with it. Must divide `batch`; 0 for the whole batch.
    /// Default: `0`.
    pub lot: u32,
    /// Pictures that the model draws itself for each part of the loss that needs them: what is erased, what is preserved,
    /// and to implant in global scope the class, which must go on being drawn alike (0 for none). Default: `12`.
    pub drawn_pictures: u32,
    /// Erasing: columns of the drawn pictures, 0 for the model's own. Implanting: not read. Default: `0`.
    pub width: u32,
    /// Erasing: rows, likewise. Default: `0`.
    pub height: u32,
    /// What shutting the neurons is to do, `MACULA_ROLE_*`. Default: `MACULA_ROLE_IMPLANT`.
    pub role: macula_role,
    /// Which weights are searched. Default: `MACULA_SEARCHED_KEYS_AND_VALUES`.
    pub searched: macula_searched,
    /// Where the neurons are to act; `MACULA_SCOPE_DEFAULT` is local. Default: `MACULA_SCOPE_DEFAULT`.
    pub scope: macula_scope,
    /// How they are searched for. Default: `MACULA_METHOD_DEFAULT`.
    pub method: macula_method,
    /// 1: the gradient keeps no second copy of a weight that is large beside what it acts on; slower. 0: weights are kept
    /// as it is fastest, on a CPU for Stable Diffusion 1's UNet and one state of 64 x 64 in 16.5 GB instead of 6.2.
    /// Default: `0`.
    pub save_memory: i32,
    /// Class for a UNet that takes one. Default: `0`.
    pub class_label: i32,
    /// Steps of tuning after the search, a batch each: instead of being shut, the found weights get values that lower the
    /// loss further. 200 draw a subject much more like itself, for about thrice the time and twice the bytes. 0: they are
    /// shut, as in Cones. Default: `0`.
    pub tune_steps: u32,
    /// How tuned values are kept; not read without tuning. Those kept with 1 or 2 bits are learnt so, in the second half of
    /// the steps. Default: `MACULA_VALUES_FLOAT16`.
    pub values: macula_values,
    /// Implanting, for a host that encodes for itself: clean latents `[count, channels, h, w]` of the subject in place of
    /// `pictures`, 32-bit floating point, scaled as the UNet sees them, at least 1. May be NULL. Default: `NULL`.
    pub latents: *const macula_tensor,
    /// With `latents`, in place of `prompts`: encodings `[count, rows, features]` of texts with the trigger, one for each,
    /// or `[1, rows, features]` for all; NULL without. Default: `NULL`.
    pub context: *const macula_tensor,
    /// With `latents`: the encoding that `context` is, if this library made it; tells where the subject's words stand. May
    /// be NULL: then `scope` must be global, and the trigger may be any word. Default: `NULL`.
    pub embedding: *const macula_embedding,
    /// With `latents`, in global scope: latents of the class, which must go on being drawn alike. May be NULL: nothing is
    /// asked of the class, and none are drawn. Default: `NULL`.
    pub class_latents: *const macula_tensor,
    /// Encodings of texts of the class, as `context`; NULL without `class_latents`. Default: `NULL`.
    pub class_context: *const macula_tensor,
    /// Step size of learning the trigger's embedding, in standard deviations of the class noun's row, above 0; not read
    /// without `embedding_steps`. Default: `0.1`.
    pub embedding_rate: f64,
    /// Implanting from `pictures`: steps, a batch each, in which the trigger's embedding is learnt before the neurons are
    /// searched (textual inversion, arXiv 2208.01618): a row for each text encoder, which begins at that of the class noun's
    /// first token and lowers the same loss. The neurons are then searched with it, and it comes and goes with the concept.
    /// 0: the embedding stays the model's. Default: `0`.
    pub embedding_steps: u32,
    /// Of which attention weights are searched. Self-attention knows no words: with it `scope` must be `MACULA_SCOPE_GLOBAL`,
    /// and the concept is composed by pipelines that were opened with `self_attention`. Default: `MACULA_ATTENTION_CROSS`.
    pub attention: macula_attention,
    /// Most bytes of values of the UNet's forward pass, of the pictures that are run at a time, that the gradient keeps for
    /// its backward pass; the rest is computed again (gradient checkpointing, arXiv 1604.06174), at most one more forward
    /// pass. It keeps as little as it can if that is more, with a warning in the log. 0 for no limit. Default: `0`.
    pub activation_bytes: u64,
}

impl Default for macula_discover_options {
    fn default() -> Self {
        Self {
            struct_size: size_of::<Self>(),
            pictures: std::ptr::null(),
            picture_count: 0,
            class_pictures: std::ptr::null(),
            class_picture_count: 0,
            trigger: std::ptr::null(),
            class_noun: std::ptr::null(),
            prompts: std::ptr::null(),
            anchors: std::ptr::null(),
            prompt_count: 0,
            preserve: std::ptr::null(),
            preserve_count: 0,
            checkpoint: std::ptr::null(),
            cancel: std::ptr::null(),
            progress: None,
            progress_userdata: std::ptr::null_mut(),
            density: 0.01,
            preserve_weight: 1.0,
            tune_rate: 0.1,
            seed: 0,
            batches: 60,
            batch: 8,
            lot: 0,
            drawn_pictures: 12,
            width: 0,
            height: 0,
            role: MACULA_ROLE_IMPLANT,
            searched: MACULA_SEARCHED_KEYS_AND_VALUES,
            scope: 0,
            method: MACULA_METHOD_DEFAULT,
            save_memory: 0,
            class_label: 0,
            tune_steps: 0,
            values: MACULA_VALUES_FLOAT16,
            latents: std::ptr::null(),
            context: std::ptr::null(),
            embedding: std::ptr::null(),
            class_latents: std::ptr::null(),
            class_context: std::ptr::null(),
            embedding_rate: 0.1,
            embedding_steps: 0,
            attention: MACULA_ATTENTION_CROSS,
            activation_bytes: 0,
        }
    }
}

// SAFETY: repr(C), begins with its size; pointers, an optional function pointer and numbers take any bytes.
unsafe impl Versioned for macula_discover_options {
    const FIRST_SIZE: usize = 216;
}

/// Finds the neurons of a subject, or of a word to forget.
///
/// - `pipeline`: a live pipeline; not NULL. The UNet's file is read again. What is composed and ablated does not act
///   during the search, and is as before after it.
/// - `options`: what is to be found; not NULL, because pictures and words have no default.
/// - `out_concept`: receives the concept; not NULL. Free it with `macula_concept_free`.
///
/// Errors: `INVALID_ARGUMENT` for a size that the model does not draw, a word that the tokenizer has not, a prompt without
/// the trigger, a missing anchor, a number outside its range, `embedding_steps` where nothing is implanted from `pictures`, a
/// checkpoint of another search; `INVALID_FILE` for a damaged checkpoint; `NOT_FOUND` if the UNet's file or the VAE's encoder
/// is not there, or no weight is found and no embedding was learnt; `WRONG_BASE` if the file changed since the pipeline was
/// opened; `UNSUPPORTED` for an operator without a derivative rule, named with its node, or where an embedding is to be learnt and a text encoder's table is not found;
/// `NOT_FINITE` naming the batch; `CANCELLED`; `BUSY` during another job; `IO` if the checkpoint can't be written, which
/// leaves the last one.
/// After any of them the pipeline draws as before. Any thread; blocks until it is done.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_discover(
    pipeline: *mut macula_pipeline,
    options: *const macula_discover_options,
    out_concept: *mut *mut macula_concept,
) -> macula_status {
    guard("macula_discover", |call| {
        let pipeline = call.object(pipeline, "pipeline")?;
        // SAFETY: valid as the header asks.
        let (options, out_concept) = unsafe {
            reference(options, "options")?;
            (argument::options(options, "options")?, out(out_concept, "out_concept")?)
        };
        let cancel = match options.cancel.is_null() {
            true => CancelToken::new(),
            false => call.object(options.cancel, "options.cancel")?.token.clone(),
        };
        let embedding = match options.embedding.is_null() {
            true => None,
            false => Some(call.object(options.embedding, "options.embedding")?),
        };
        // SAFETY: valid as the header asks.
        let inputs = unsafe { Inputs::read(&options) }?;
        let work = &mut *pipeline.begin()?;
        let request = inputs.request(&options, embedding.as_ref().map(|entry| &*entry.embedding))?;
        let teller = Teller { callback: options.progress, userdata: options.progress_userdata };
        let (found, _) = aside(work, cancel, &teller, |pipeline, job| request.find(pipeline, job))?;
        out_concept.set(macula_concept::table().insert(macula_concept::new(found)));
        Ok(())
    })
}

/// A job for which what is composed and ablated is set aside; it acts again afterwards, whatever came of the job.
pub(super) fn aside<T>(
    work: &mut Work,
    cancel: CancelToken,
    teller: &Teller,
    run: impl FnOnce(&mut Pipeline, &mut Job<'_>) -> Result<T>,
) -> Result<T> {
    let mut report = |progress: Progress<'_>| match CString::new(progress.stage) {
        Ok(stage) => teller.tell_loss(&stage, progress.done, progress.total, progress.loss),
        Err(_) => ControlFlow::Continue(()),
    };
    let made = run(&mut work.pipeline, &mut Job { cancel, report: Some(&mut report) });
    let restored = work.pipeline.set_concepts(work.composed.iter().chain(&work.ablated).cloned().collect());
    let made = made?;
    restored?;
    Ok(made)
}

/// What the options lead to, copied.
struct Inputs {
    /// To implant, unless there are latents.
    pictures: Option<Images>,
    class_pictures: Option<Images>,
    encoded: Option<EncodedInputs>,
    encoded_class: Option<EncodedInputs>,
    trigger: String,
    class_noun: String,
    prompts: Vec<String>,
    anchors: Vec<String>,
    preserve: Vec<String>,
    checkpoint: Option<PathBuf>,
}

impl Inputs {
    /// # Safety
    /// Pointers are valid for what the fields' texts say.
    unsafe fn read(options: &macula_discover_options) -> Result<Self> {
        // SAFETY: as promised by the caller.
        let texts = |pointer, count, name| unsafe { texts(pointer, count, name) };
        let implants = options.role == MACULA_ROLE_IMPLANT;
        // SAFETY: as promised by the caller.
        let encoded = unsafe { EncodedInputs::read(options.latents, options.context, "options.") }?;
        // SAFETY: as promised by the caller.
        let encoded_class =
            unsafe { EncodedInputs::read(options.class_latents, options.class_context, "options.class_") }?;
        if encoded.is_none() && (encoded_class.is_some() || !options.embedding.is_null()) {
            return Err(Error::invalid_argument(
                "options.class_latents and options.embedding must be NULL without options.latents",
            ));
        }
        if encoded.is_some() {
            let others = [
                (!options.pictures.is_null(), "pictures"),
                (!options.class_pictures.is_null(), "class_pictures"),
                (!options.prompts.is_null(), "prompts"),
                (!implants, "role to erase"),
            ];
            if let Some((_, other)) = others.iter().find(|(given, _)| *given) {
                return Err(Error::invalid_argument(format!("options.latents can't be given beside {other}")));
            }
        }
        let pictures = match implants {
            true if encoded.is_some() => None,
            // SAFETY: as promised by the caller.
            true => Some(unsafe { joined(options.pictures, options.picture_count, "options.picture") }?),
            false if options.pictures.is_null() && options.picture_count == 0 => None,
            false => {
                return Err(Error::invalid_argument(
                    "options.pictures must be NULL: to erase, the model draws its own",
                ));
            }
        };
        let class_pictures = match options.class_pictures.is_null() && options.class_picture_count == 0 {
            true => None,
            false if implants => {
                // SAFETY: as promised by the caller.
                Some(unsafe { joined(options.class_pictures, options.class_picture_count, "options.class_picture") }?)
            }
            false => return Err(Error::invalid_argument("options.class_pictures must be NULL to erase")),
        };
        if !implants && (options.prompts.is_null() || options.anchors.is_null()) {
            return Err(Error::invalid_argument("options.prompts and options.anchors must not be NULL to erase"));
        }
        // SAFETY: as promised by the caller.
        let word = |pointer, name| unsafe { text(pointer, name) }.map(|word| word.trim().to_owned());
        // SAFETY: as promised by the caller.
        let checkpoint = unsafe { optional_text(options.checkpoint, "options.checkpoint") }?;
        Ok(Self {
            pictures,
            class_pictures,
            encoded,
            encoded_class,
            trigger: word(options.trigger, "options.trigger")?,
            class_noun: if implants { word(options.class_noun, "options.class_noun")? } else { String::new() },
            prompts: texts(options.prompts, options.prompt_count, "options.prompts")?,
            anchors: texts(options.anchors, options.prompt_count, "options.anchors")?,
            preserve: texts(options.preserve, options.preserve_count, "options.preserve")?,
            checkpoint: checkpoint.map(PathBuf::from),
        })
    }

    fn request<'a>(&'a self, options: &macula_discover_options, prompt: Option<&'a Embedding>) -> Result<Request<'a>> {
        let mut request = Request::new(self.goal(options, prompt)?);
        request.preserve.clone_from(&self.preserve);
        request.preserve_weight = options.preserve_weight as f32;
        request.checkpoint.clone_from(&self.checkpoint);
        request.scope = scope(options.scope, "options.scope")?.unwrap_or(Scope::Local);
        request.method = match options.method {
            MACULA_METHOD_DEFAULT | MACULA_METHOD_LEARNT_MASK => Method::default(),
            MACULA_METHOD_SALIENCY => Method::Algorithm1 { rho: 0.0 },
            MACULA_METHOD_GRADUAL => Method::Gradual { stages: 6 },
            other => {
                return Err(Error::invalid_argument(format!("options.method is {other}, not a MACULA_METHOD_*")));
            }
        };
        request.searched = match options.searched {
            MACULA_SEARCHED_KEYS_AND_VALUES => Searched::KeysAndValues,
            MACULA_SEARCHED_KEYS => Searched::Keys,
            MACULA_SEARCHED_VALUES => Searched::Values,
            other => {
                return Err(Error::invalid_argument(format!("options.searched is {other}, not a MACULA_SEARCHED_*")));
            }
        };
        request.attentions = match options.attention {
            MACULA_ATTENTION_CROSS => Attentions::Cross,
            MACULA_ATTENTION_SELF => Attentions::SelfAttention,
            MACULA_ATTENTION_BOTH => Attentions::Both,
            other => {
                return Err(Error::invalid_argument(format!("options.attention is {other}, not a MACULA_ATTENTION_*")));
            }
        };
        request.density = (options.density != 0.0).then_some(options.density);
        request.batches = options.batches as usize;
        request.batch = options.batch as usize;
        request.lot = options.lot as usize;
        request.drawn_pictures = options.drawn_pictures as usize;
        request.seed = options.seed;
        request.spending.activations = (options.activation_bytes != 0).then_some(options.activation_bytes);
        request.spending.effort = effort(options.save_memory)?;
        request.class_label = options.class_label.into();
        if options.embedding_steps > 0 {
            let (steps, rate) = (options.embedding_steps as usize, options.embedding_rate as f32);
            request.invert = Some(InvertOptions { steps, rate, ..InvertOptions::default() });
        }
        if options.tune_steps > 0 {
            let precision = precision(options.values, "options.values")?;
            let precision = precision.ok_or_else(|| {
                Error::invalid_argument("options.values is MACULA_VALUES_NONE, but tuning makes values to keep")
            })?;
            let (steps, rate) = (options.tune_steps as usize, options.tune_rate as f32);
            request.tune = Some(TuneOptions { steps, rate, precision, ..TuneOptions::default() });
        }
        Ok(request)
    }

    fn goal<'a>(&'a self, options: &macula_discover_options, prompt: Option<&'a Embedding>) -> Result<Goal<'a>> {
        let (word, prompts) = (self.trigger.clone(), self.prompts.clone());
        let size = (options.height as usize, options.width as usize);
        if let Some(encoded) = &self.encoded {
            return Ok(Goal::ImplantEncoded(EncodedSubject {
                examples: encoded.view(),
                prompt,
                class: self.encoded_class.as_ref().map(EncodedInputs::view),
                trigger: word,
                class_noun: self.class_noun.clone(),
            }));
        }
        match (options.role, &self.pictures) {
            (MACULA_ROLE_IMPLANT, Some(pictures)) => {
                let class_noun = self.class_noun.clone();
                let class_pictures = self.class_pictures.as_ref();
                Ok(Goal::Implant(Subject { pictures, prompts, trigger: word, class_noun, class_pictures }))
            }
            (MACULA_ROLE_ERASE, _) => Ok(Goal::Erase(Erasure {
                word,
                prompts,
                anchors: self.anchors.clone(),
                size: (size != (0, 0)).then_some(size),
            })),
            (other, _) => Err(Error::invalid_argument(format!("options.role is {other}, not a MACULA_ROLE_*"))),
        }
    }
}

/// Latents with encodings of texts, copied.
struct EncodedInputs {
    latents: Vec<f32>,
    shape: [usize; 4],
    context: Vec<f32>,
    context_shape: [usize; 3],
}

impl EncodedInputs {
    /// Both or none; `prefix` stands before the fields' names.
    ///
    /// # Safety
    /// As [`Inputs::read`].
    unsafe fn read(latents: *const macula_tensor, context: *const macula_tensor, prefix: &str) -> Result<Option<Self>> {
        if latents.is_null() && context.is_null() {
            return Ok(None);
        }
        // SAFETY: as promised by the caller.
        let (latents, shape) = unsafe { numbers(latents, &format!("{prefix}latents")) }?;
        // SAFETY: as promised by the caller.
        let (context, context_shape) = unsafe { numbers(context, &format!("{prefix}context")) }?;
        Ok(Some(Self { latents, shape, context, context_shape }))
    }

    fn view(&self) -> Encoded<'_> {
        Encoded { latents: &self.latents, shape: self.shape, context: &self.context, context_shape: self.context_shape }
    }
}

/// Numbers and dimensions of a tensor, which must have `RANK` of them.
///
/// # Safety
/// As [`Inputs::read`].
unsafe fn numbers<const RANK: usize>(tensor: *const macula_tensor, name: &str) -> Result<(Vec<f32>, [usize; RANK])> {
    // SAFETY: as promised by the caller.
    let read = unsafe { reference(tensor, name)?.read(name) }?;
    let shape: [usize; RANK] = read.shape().try_into().map_err(|_| {
        Error::invalid_argument(format!("{name} has shape {:?}, must have {RANK} dimensions", read.shape()))
    })?;
    Ok((read.into_vec().map_err(|error| error.at(name))?, shape))
}

/// What the field `save_memory` asks for.
pub(super) fn effort(save_memory: i32) -> Result<Effort> {
    match save_memory {
        0 => Ok(Effort::Speed),
        1 => Ok(Effort::Memory),
        other => Err(Error::invalid_argument(format!("options.save_memory is {other}, must be 0 or 1"))),
    }
}

/// A list of pictures, the fields `{name}s` and `{name}_count`, as one block.
///
/// # Safety
/// As [`Inputs::read`].
pub(super) unsafe fn joined(pictures: *const macula_image, count: usize, name: &str) -> Result<Images> {
    // SAFETY: as promised by the caller.
    let pictures = unsafe { slice(pictures, count, &format!("{name}s")) }?;
    let mut joined: Option<Images> = None;
    for (at, picture) in pictures.iter().enumerate() {
        // SAFETY: as promised by the caller.
        let one = unsafe { picture.read(&format!("{name}s[{at}]")) }?;
        match &mut joined {
            None => joined = Some(one),
            Some(all) if (all.width, all.height) == (one.width, one.height) => {
                all.count += 1;
                all.rgb.extend(one.rgb);
            }
            Some(all) => {
                return Err(Error::invalid_argument(format!(
                    "{name}s[{at}] has {} x {} pixels, the first one {} x {}: all must be of one size",
                    one.width, one.height, all.width, all.height
                )));
            }
        }
    }
    joined.ok_or_else(|| Error::invalid_argument(format!("{name}_count is 0, must be at least 1")))
}

/// A list of texts; empty for NULL.
///
/// # Safety
/// As [`Inputs::read`].
pub(super) unsafe fn texts(pointer: *const *const c_char, count: usize, name: &str) -> Result<Vec<String>> {
    if pointer.is_null() {
        return Ok(Vec::new());
    }
    // SAFETY: as promised by the caller.
    let pointers = unsafe { slice(pointer, count, name) }?;
    // SAFETY: as promised by the caller.
    let owned = |(at, &one)| unsafe { text(one, &format!("{name}[{at}]")) }.map(str::to_owned);
    pointers.iter().enumerate().map(owned).collect()
}
