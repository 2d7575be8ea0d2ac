//! Tuning together
//!
//! Concepts that were found alone never met: drawn in one picture, each reaches for the other's place. Tuned together, on
//! scenes that the library makes of their pictures, they keep to their own. Each stays a concept of its own with the weights
//! that were found for it, and any of them may then be composed.

use std::ffi::{c_char, c_void};
use std::path::PathBuf;

use super::argument::{self, Versioned, optional_text, out, reference, slice};
use super::cancel::macula_cancel_token;
use super::concept::{MACULA_VALUES_FLOAT16, macula_concept, macula_values, precision};
use super::discovery::{aside, effort, joined, texts};
use super::draw::{Teller, macula_progress_fn};
use super::guard::{Call, guard};
use super::handle::Object;
use super::image::macula_image;
use super::pipeline::macula_pipeline;
use super::status::macula_status;
use crate::concept::Concept;
use crate::diffusion::pipeline::Images;
use crate::discovery::{Companion, Together, TuneOptions};
use crate::error::{Error, Result};
use crate::progress::CancelToken;

/// A concept that is tuned with others.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct macula_companion {
    /// A live concept of the pipeline's base model that draws its subject, with a trigger, in local scope; not NULL. It stays
    /// as it is, and may be freed after the call. Default: `NULL`.
    pub subject: *const macula_concept,
    /// Pictures of the subject, `picture_count` of them, of one size that the model draws and all companions share; not NULL.
    /// A subject on a plain ground is cut out of it, another picture is put into scenes whole. Default: `NULL`.
    pub pictures: *const macula_image,
    /// How many pictures, at least 1. Default: `0`.
    pub picture_count: usize,
    /// What each picture shows, with the trigger, `picture_count` texts; what follows the subject in it is taken to say where
    /// it is. May be NULL: `"a TRIGGER NOUN"` for all. Default: `NULL`.
    pub prompts: *const *const c_char,
}

/// Concepts to tune together, and how.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct macula_together_options {
    /// `sizeof` this struct.
    pub struct_size: usize,
    /// The concepts, `companion_count` of them, each with a trigger of its own; not NULL. Default: `NULL`.
    pub companions: *const macula_companion,
    /// How many, at least 2. Default: `0`.
    pub companion_count: usize,
    /// A file that keeps the tuning every ten steps, when it is broken off and at its end. If it is there, the same tuning goes
    /// on where it was, and ends as in one go. May be NULL. Default: `NULL`.
    pub checkpoint: *const c_char,
    /// Stops the tuning from another thread. May be NULL. Default: `NULL`.
    pub cancel: *const macula_cancel_token,
    /// Is told of each step. May be NULL. Default: `NULL`.
    pub progress: macula_progress_fn,
    /// Given to `progress` as it is. May be NULL. Default: `NULL`.
    pub progress_userdata: *mut c_void,
    /// Step size in standard deviations of a projection's weights, above 0. Default: `0.3`.
    pub rate: f64,
    /// Fixes scenes, order, timesteps and noises. Default: `0`.
    pub seed: u64,
    /// As in `macula_discover_options`. Default: `0`.
    pub activation_bytes: u64,
    /// Steps, a batch each, at least 1; some 75 for each concept. Default: `300`.
    pub steps: u32,
    /// Scenes of two to four subjects that are made of the pictures, 1 to 4,096; the pictures are shown by themselves too.
    /// Default: `128`.
    pub scenes: u32,
    /// Noisy pictures in a batch, at least 1. Default: `8`.
    pub batch: u32,
    /// Noisy pictures that are run at a time: memory grows with it. Must divide `batch`; 0 for the whole batch.
    /// Default: `0`.
    pub lot: u32,
    /// 1: the gradient keeps no second copy of a weight that is large beside what it acts on; slower. 0: weights are kept
    /// as it is fastest, on a CPU for Stable Diffusion 1's UNet and one state of 64 x 64 in 16.5 GB instead of 6.2.
    /// Default: `0`.
    pub save_memory: i32,
    /// Class for a UNet that takes one. Default: `0`.
    pub class_label: i32,
    /// How values are kept; those kept with 1 or 2 bits are learnt so, in the second half of the steps.
    /// Default: `MACULA_VALUES_FLOAT16`.
    pub values: macula_values,
    /// Must be 0. Default: `0`.
    pub reserved: u32,
    /// Timesteps of the schedule's T are drawn as T u^p with this p and u even in [0, 1): 1 spreads them evenly, less leans to
    /// high noise, where it is decided what stands where. Above 0, at most 1. Default: `0.5`.
    pub timestep_power: f64,
}

impl Default for macula_together_options {
    fn default() -> Self {
        Self {
            struct_size: size_of::<Self>(),
            companions: std::ptr::null(),
            companion_count: 0,
            checkpoint: std::ptr::null(),
            cancel: std::ptr::null(),
            progress: None,
            progress_userdata: std::ptr::null_mut(),
            rate: 0.3,
            seed: 0,
            activation_bytes: 0,
            steps: 300,
            scenes: 128,
            batch: 8,
            lot: 0,
            save_memory: 0,
            class_label: 0,
            values: MACULA_VALUES_FLOAT16,
            reserved: 0,
            timestep_power: 0.5,
        }
    }
}

// SAFETY: repr(C), begins with its size; pointers, an optional function pointer and numbers take any bytes.
unsafe impl Versioned for macula_together_options {
    const FIRST_SIZE: usize = size_of::<Self>();
}

/// Gives the weights of several concepts new values, learnt from scenes in which their subjects stand side by side.
///
/// - `pipeline`: a live pipeline; not NULL. The UNet's file is read again. What is composed and ablated does not act meanwhile,
///   and is as before after it.
/// - `options`: the concepts and how they are tuned; not NULL.
/// - `out_concepts`: receives `companion_count` concepts in the order of the companions, with the weights and learnt embeddings
///   that these have; not NULL. Free each with `macula_concept_free`.
///
/// Errors: `INVALID_ARGUMENT` for fewer than two concepts, one that erases, acts in global scope, on self-attention or on no
/// weight, two with one trigger, pictures of several sizes or of one that the model does not draw, a prompt without its
/// trigger, two whose words overlap in a prompt, a number outside its range, or a checkpoint of another tuning; `INVALID_FILE`
/// for a damaged one, or the file of something else; `WRONG_BASE` for a
/// concept of another model; the others of `macula_discover`. After any of them nothing was made, and the pipeline draws as
/// before. Any thread; blocks until it is done.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_tune_together(
    pipeline: *mut macula_pipeline,
    options: *const macula_together_options,
    out_concepts: *mut *mut macula_concept,
) -> macula_status {
    guard("macula_tune_together", |call| {
        let pipeline = call.object(pipeline, "pipeline")?;
        // SAFETY: valid as the header asks.
        let options = unsafe {
            reference(options, "options")?;
            argument::options(options, "options")?
        };
        if options.reserved != 0 {
            return Err(Error::invalid_argument(format!("options.reserved is {}, must be 0", options.reserved)));
        }
        let cancel = match options.cancel.is_null() {
            true => CancelToken::new(),
            false => call.object(options.cancel, "options.cancel")?.token.clone(),
        };
        // SAFETY: valid as the header asks.
        let given = unsafe { slice(options.companions, options.companion_count, "options.companions") }?;
        let read = given.iter().enumerate().map(|(at, companion)| {
            // SAFETY: valid as the header asks.
            unsafe { Inputs::read(call, companion, &format!("options.companions[{at}]")) }
        });
        let inputs = read.collect::<Result<Vec<_>>>()?;
        // SAFETY: valid as the header asks.
        let mut outs = vec![unsafe { out(out_concepts, "out_concepts") }?];
        for at in 1..given.len() {
            // SAFETY: there is room for as many as companions, as the header asks.
            outs.push(unsafe { out(out_concepts.add(at), "out_concepts") }?);
        }
        // SAFETY: valid as the header asks.
        let checkpoint = unsafe { optional_text(options.checkpoint, "options.checkpoint") }?.map(PathBuf::from);
        let together = together(&options, &inputs, checkpoint)?;
        let work = &mut *pipeline.begin()?;
        let teller = Teller { callback: options.progress, userdata: options.progress_userdata };
        let (tuned, _) = aside(work, cancel, &teller, |pipeline, job| together.tune(pipeline, job))?;
        for (concept, out) in tuned.into_iter().zip(outs) {
            out.set(macula_concept::table().insert(macula_concept::new(concept)));
        }
        Ok(())
    })
}

/// What a companion leads to, copied.
struct Inputs {
    concept: Concept,
    pictures: Images,
    prompts: Vec<String>,
}

impl Inputs {
    /// # Safety
    /// Pointers are valid for what the fields' texts say.
    unsafe fn read(call: &mut Call, companion: &macula_companion, name: &str) -> Result<Self> {
        let concept = call.object(companion.subject, &format!("{name}.subject"))?.concept.clone();
        // SAFETY: as promised by the caller.
        let pictures = unsafe { joined(companion.pictures, companion.picture_count, &format!("{name}.picture")) }?;
        // SAFETY: as promised by the caller.
        let prompts = unsafe { texts(companion.prompts, companion.picture_count, &format!("{name}.prompts")) }?;
        Ok(Self { concept, pictures, prompts })
    }
}

fn together<'a>(
    options: &macula_together_options,
    inputs: &'a [Inputs],
    checkpoint: Option<PathBuf>,
) -> Result<Together<'a>> {
    let companions = inputs
        .iter()
        .map(|one| Companion { concept: &one.concept, pictures: &one.pictures, prompts: one.prompts.clone() })
        .collect();
    let mut together = Together::new(companions);
    let precision = precision(options.values, "options.values")?;
    let precision = precision.ok_or_else(|| {
        Error::invalid_argument("options.values is MACULA_VALUES_NONE, but tuning makes values to keep")
    })?;
    let (steps, rate) = (options.steps as usize, options.rate as f32);
    together.tune = TuneOptions { steps, rate, precision, ..together.tune };
    together.timestep_power = options.timestep_power;
    together.scenes = options.scenes as usize;
    together.batch = options.batch as usize;
    together.lot = options.lot as usize;
    together.seed = options.seed;
    together.class_label = options.class_label.into();
    together.spending.activations = (options.activation_bytes != 0).then_some(options.activation_bytes);
    together.spending.effort = effort(options.save_memory)?;
    together.checkpoint = checkpoint;
    Ok(together)
}
