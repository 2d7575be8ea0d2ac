//! Discovery
//!
//! Finds the concept neurons of a subject from a few pictures of it: the weights whose shutting makes the model draw it
//! (Cones, arXiv 2303.05125). The search differentiates the UNet's graph and runs the gradient as one more model; nothing
//! is trained and the model's weights are never written.

use std::ffi::{CString, c_char, c_void};
use std::ops::ControlFlow;

use super::argument::{self, Versioned, out, reference, slice, text};
use super::cancel::macula_cancel_token;
use super::concept::{macula_concept, macula_scope, scope};
use super::draw::{Teller, macula_progress_fn};
use super::guard::guard;
use super::handle::Object;
use super::image::macula_image;
use super::pipeline::macula_pipeline;
use super::status::macula_status;
use crate::concept::Scope;
use crate::diffusion::pipeline::Images;
use crate::discovery::Subject;
use crate::discovery::search::Method;
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

/// What is to be found, and how.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct macula_discover_options {
    /// `sizeof` this struct.
    pub struct_size: usize,
    /// Pictures of the subject, all of one size that the model draws; `picture_count` of them; not NULL. A file is read
    /// by `macula_images_read`. Default: `NULL`.
    pub pictures: *const macula_image,
    /// How many pictures, at least 1; 3 to 6 are usual. Default: `0`.
    pub picture_count: usize,
    /// The subject's word in prompts, a single token of the model's tokenizer that stands for nothing yet; not NULL.
    /// Default: `NULL`.
    pub trigger: *const c_char,
    /// What the subject is, in words that the model knows, e.g. `"dog"`; not NULL. Default: `NULL`.
    pub class_noun: *const c_char,
    /// What each picture shows, with the trigger in it, `picture_count` texts. May be NULL: `"a TRIGGER NOUN"` for all.
    /// Default: `NULL`.
    pub prompts: *const *const c_char,
    /// Stops the search from another thread. May be NULL. Default: `NULL`.
    pub cancel: *const macula_cancel_token,
    /// Is told of each batch. May be NULL. Default: `NULL`.
    pub progress: macula_progress_fn,
    /// Given to `progress` as it is. May be NULL. Default: `NULL`.
    pub progress_userdata: *mut c_void,
    /// Share of the K and V weights that may be shut, above 0, up to 1. Default: `0.01`.
    pub density: f64,
    /// The same seed gives the same neurons on any number of threads. Default: `0`.
    pub seed: u64,
    /// Batches of the search, at least 1; at least 13 for a learnt mask. Default: `60`.
    pub batches: u32,
    /// Noisy pictures in a batch, at least 1. Default: `8`.
    pub batch: u32,
    /// Noisy pictures that are run at a time: memory grows with it. Must divide `batch`; 0 for the whole batch.
    /// Default: `0`.
    pub lot: u32,
    /// Global scope: pictures of the class that the model draws first and must go on drawing alike; 0 for none.
    /// Default: `12`.
    pub prior_pictures: u32,
    /// Where the neurons are to act; `MACULA_SCOPE_DEFAULT` is local. Default: `MACULA_SCOPE_DEFAULT`.
    pub scope: macula_scope,
    /// How they are searched for. Default: `MACULA_METHOD_DEFAULT`.
    pub method: macula_method,
    /// 1: the gradient keeps no second copy of a weight; slower. Default: `0`.
    pub save_memory: i32,
    /// Class for a UNet that takes one. Default: `0`.
    pub class_label: i32,
}

impl Default for macula_discover_options {
    fn default() -> Self {
        Self {
            struct_size: size_of::<Self>(),
            pictures: std::ptr::null(),
            picture_count: 0,
            trigger: std::ptr::null(),
            class_noun: std::ptr::null(),
            prompts: std::ptr::null(),
            cancel: std::ptr::null(),
            progress: None,
            progress_userdata: std::ptr::null_mut(),
            density: 0.01,
            seed: 0,
            batches: 60,
            batch: 8,
            lot: 0,
            prior_pictures: 12,
            scope: 0,
            method: MACULA_METHOD_DEFAULT,
            save_memory: 0,
            class_label: 0,
        }
    }
}

// SAFETY: repr(C), begins with its size; pointers, an optional function pointer and numbers take any bytes.
unsafe impl Versioned for macula_discover_options {
    const FIRST_SIZE: usize = 120;
}

/// Finds the neurons of a subject.
///
/// - `pipeline`: a live pipeline; not NULL. The UNet's file is read again. What is composed and ablated does not act
///   during the search, and is as before after it.
/// - `options`: what is to be found; not NULL, because pictures and words have no default.
/// - `out_concept`: receives the concept; not NULL. Free it with `macula_concept_free`.
///
/// Errors: `INVALID_ARGUMENT` for a size that the model does not draw, a word that the tokenizer has not, a prompt without
/// the trigger, a number outside its range; `NOT_FOUND` if the UNet's file or the VAE's encoder is not there;
/// `WRONG_BASE` if the file changed since the pipeline was opened; `UNSUPPORTED` for an operator without a derivative
/// rule, named with its node; `NOT_FINITE` naming the batch; `CANCELLED`; `BUSY` during another job. After any of them
/// the pipeline draws as before. Any thread; blocks until it is done.
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
        // SAFETY: valid as the header asks.
        let inputs = unsafe { Inputs::read(&options) }?;
        let work = &mut *pipeline.begin()?;
        let teller = Teller { callback: options.progress, userdata: options.progress_userdata };
        let mut report = |progress: Progress<'_>| match CString::new(progress.stage) {
            Ok(stage) => teller.tell(&stage, progress.done, progress.total, None, None),
            Err(_) => ControlFlow::Continue(()),
        };
        let mut job = Job { cancel, report: Some(&mut report) };
        let found = inputs.subject(&options)?.find(&mut work.pipeline, &mut job);
        work.pipeline.set_concepts(work.composed.iter().chain(&work.ablated).cloned().collect())?;
        out_concept.set(macula_concept::table().insert(macula_concept::new(found?.0)));
        Ok(())
    })
}

/// What the options lead to, copied.
struct Inputs {
    pictures: Images,
    prompts: Vec<String>,
    trigger: String,
    class_noun: String,
}

impl Inputs {
    /// # Safety
    /// Pointers are valid for what the fields' texts say.
    unsafe fn read(options: &macula_discover_options) -> Result<Self> {
        // SAFETY: as promised by the caller.
        let pictures = unsafe { slice(options.pictures, options.picture_count, "options.pictures") }?;
        let mut joined: Option<Images> = None;
        for (at, picture) in pictures.iter().enumerate() {
            // SAFETY: as promised by the caller.
            let one = unsafe { picture.read(&format!("options.pictures[{at}]")) }?;
            match &mut joined {
                None => joined = Some(one),
                Some(all) if (all.width, all.height) == (one.width, one.height) => {
                    all.count += 1;
                    all.rgb.extend(one.rgb);
                }
                Some(all) => {
                    return Err(Error::invalid_argument(format!(
                        "options.pictures[{at}] has {} x {} pixels, the first one {} x {}: all must be of one size",
                        one.width, one.height, all.width, all.height
                    )));
                }
            }
        }
        let pictures =
            joined.ok_or_else(|| Error::invalid_argument("options.picture_count is 0, must be at least 1"))?;
        let mut prompts = Vec::new();
        if !options.prompts.is_null() {
            // SAFETY: as promised by the caller.
            let texts = unsafe { slice(options.prompts, pictures.count, "options.prompts") }?;
            for (at, &prompt) in texts.iter().enumerate() {
                // SAFETY: as promised by the caller.
                prompts.push(unsafe { text(prompt, &format!("options.prompts[{at}]")) }?.to_owned());
            }
        }
        // SAFETY: as promised by the caller.
        let word = |pointer, name| unsafe { text(pointer, name) }.map(|word| word.trim().to_owned());
        Ok(Self {
            pictures,
            prompts,
            trigger: word(options.trigger, "options.trigger")?,
            class_noun: word(options.class_noun, "options.class_noun")?,
        })
    }

    fn subject(&self, options: &macula_discover_options) -> Result<Subject<'_>> {
        let mut subject = Subject::new(&self.pictures, self.trigger.clone(), self.class_noun.clone());
        subject.prompts.clone_from(&self.prompts);
        subject.scope = scope(options.scope, "options.scope")?.unwrap_or(Scope::Local);
        subject.method = match options.method {
            MACULA_METHOD_DEFAULT | MACULA_METHOD_LEARNT_MASK => Method::default(),
            MACULA_METHOD_SALIENCY => Method::Algorithm1 { rho: 0.0 },
            MACULA_METHOD_GRADUAL => Method::Gradual { stages: 6 },
            other => {
                return Err(Error::invalid_argument(format!("options.method is {other}, not a MACULA_METHOD_*")));
            }
        };
        subject.density = options.density;
        subject.batches = options.batches as usize;
        subject.batch = options.batch as usize;
        subject.lot = options.lot as usize;
        subject.prior_pictures = options.prior_pictures as usize;
        subject.seed = options.seed;
        subject.effort = match options.save_memory {
            0 => Effort::Speed,
            1 => Effort::Memory,
            other => {
                return Err(Error::invalid_argument(format!("options.save_memory is {other}, must be 0 or 1")));
            }
        };
        subject.class_label = options.class_label.into();
        Ok(subject)
    }
}
