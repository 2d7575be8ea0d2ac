//! Drawing
//!
//! From a prompt to pictures, in one call that reports each step and can be stopped at any of them. The result depends
//! on the options and the composition alone: not on the number of threads, the machine's load or earlier draws.

use std::ffi::{c_char, c_void};
use std::ops::ControlFlow;

use super::argument::{self, Versioned, optional_text, out, reference, text};
use super::cancel::macula_cancel_token;
use super::guard::guard;
use super::handle::Object;
use super::image::{macula_image, macula_images};
use super::pipeline::macula_pipeline;
use super::schedule::{self, MACULA_SAMPLER_DEFAULT, macula_sampler, macula_schedule};
use super::status::macula_status;
use super::tensor::{MACULA_DTYPE_F32, macula_tensor};
use crate::diffusion::decomposed::Schedule;
use crate::diffusion::guidance::{Guidance, StepReport};
use crate::diffusion::pipeline::{DrawOptions, Images, Start};
use crate::diffusion::schedule::Sampler;
use crate::error::{Error, Result};
use crate::progress::{CancelToken, Job};

/// How far a job is. All memory that it leads to stays for the call of the callback only.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct macula_progress {
    /// What is being done; never NULL. A draw: `"denoise"`, then `"decode"` for a latent model. A search: `"draw"`,
    /// once for each part of the loss that needs drawn pictures, `"differentiate"`, `"invert"` where an embedding is learnt,
    /// `"search"`, `"choose"` where the density is chosen, `"tune"`.
    pub stage: *const c_char,
    /// Steps done of this stage, 0 to `total`.
    pub done: u64,
    /// Steps in all of this stage.
    pub total: u64,
    /// Stage `"denoise"`: the clean latent of all pictures as it is predicted now, `[batch, channels, h, w]`, 32-bit
    /// floating point in host memory, smaller in the early steps of a decomposed process; NULL otherwise.
    pub latent: *const macula_tensor,
    /// The first picture as it is predicted now, if `preview` was asked for and the model draws in pixel space; NULL
    /// otherwise.
    pub preview: *const macula_image,
    /// Stages `"invert"`, `"search"` and `"tune"`, from the first batch on: the mean loss of the last ten batches; NaN
    /// otherwise.
    pub loss: f64,
}

/// Is told how far a job is, once before the first step and after each one.
///
/// - `userdata`: what was given beside the callback.
/// - `progress`: how far it is; never NULL.
///
/// Returns 0 to go on; anything else ends the job with `MACULA_STATUS_CANCELLED`. Called on the thread that made the
/// call. It may call any function of this header; those that need the same pipeline are `BUSY`.
pub type macula_progress_fn =
    Option<unsafe extern "C" fn(userdata: *mut c_void, progress: *const macula_progress) -> i32>;

/// What to draw.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct macula_draw_options {
    /// `sizeof` this struct.
    pub struct_size: usize,
    /// What to draw, of any length; not NULL. Default: `NULL`.
    pub prompt: *const c_char,
    /// What to steer away from. May be NULL: the empty prompt. Default: `NULL`.
    pub negative_prompt: *const c_char,
    /// A decomposed process, in place of the model's plain one: early steps see smaller states and take less time. The model
    /// must have been trained for it (`macula_pipeline_get_schedule` gives the one that came with it), or the schedule be one
    /// of `ordinary_models`. May be NULL.
    /// Default: `NULL`.
    pub schedule: *const macula_schedule,
    /// Start noise `[batch, channels, h, w]` of the size that the first step sees, 32-bit floating point, standard normal.
    /// May be NULL: it comes from `seed`. Default: `NULL`.
    pub noise: *const macula_tensor,
    /// Clean latent to start from, `[batch, channels, h, w]` or `[1, channels, h, w]`, 32-bit floating point, scaled as
    /// the UNet sees it. May be NULL. At most one of this and `start_image`. Default: `NULL`.
    pub start_latent: *const macula_tensor,
    /// Picture to start from, of the drawn size. May be NULL. Default: `NULL`.
    pub start_image: *const macula_image,
    /// Stops the draw from another thread. May be NULL. Default: `NULL`.
    pub cancel: *const macula_cancel_token,
    /// Is told of each step. May be NULL. Default: `NULL`.
    pub progress: macula_progress_fn,
    /// Given to `progress` as it is. May be NULL. Default: `NULL`.
    pub progress_userdata: *mut c_void,
    /// Seed of all noise; the same seed gives the same picture on every machine with the same provider. Picture `i` has
    /// the noise of picture `first_picture + i` of the seed, so batches can be cut at will. A decomposed process sees the
    /// components of the plain one's noise, so that one seed gives much the same picture by both. Default: `0`.
    pub seed: u64,
    /// Guidance scale w, 0 to 1000: the prediction is `uncond + w * (cond - uncond)`. 1 does without the unconditional
    /// pass and is twice as fast. Default: `7.5`.
    pub guidance: f64,
    /// Share of the guided prediction that gets the conditional one's deviation (arXiv 2305.08891), 0 to 1.
    /// Default: `0.0`.
    pub guidance_rescale: f64,
    /// DDIM: share of DDPM's noise, 0 to 1. Default: `0.0`.
    pub eta: f64,
    /// Steps of the whole schedule, 1 to its training steps; a `schedule` adds its turning points where they are not among
    /// them. Default: `25`.
    pub steps: u32,
    /// First step that is run, with `start_latent` or `start_image`: 0 to `steps - 1`; the later, the more of the start
    /// is kept. Default: `0`.
    pub start_step: u32,
    /// Number of pictures, 1 to 256. Default: `1`.
    pub batch: u32,
    /// See `seed`. Default: `0`.
    pub first_picture: u32,
    /// Pixels in a row, a multiple of `side_multiple` of the pipeline; 0 for the model's own. Default: `0`.
    pub width: u32,
    /// Rows, likewise. Default: `0`.
    pub height: u32,
    /// How noise is taken away. Default: `MACULA_SAMPLER_DEFAULT`.
    pub sampler: macula_sampler,
    /// Euler and DPM multistep: 1 for Karras' spacing of the noise levels, 0 for none, -1 for the folder's choice.
    /// Default: `-1`.
    pub karras: i32,
    /// 1: `progress` gets `preview` where that is possible. Default: `0`.
    pub preview: i32,
    /// Class for a UNet that takes one. Default: `0`.
    pub class_label: i32,
}

impl Default for macula_draw_options {
    fn default() -> Self {
        Self {
            struct_size: size_of::<Self>(),
            prompt: std::ptr::null(),
            negative_prompt: std::ptr::null(),
            schedule: std::ptr::null(),
            noise: std::ptr::null(),
            start_latent: std::ptr::null(),
            start_image: std::ptr::null(),
            cancel: std::ptr::null(),
            progress: None,
            progress_userdata: std::ptr::null_mut(),
            seed: 0,
            guidance: 7.5,
            guidance_rescale: 0.0,
            eta: 0.0,
            steps: 25,
            start_step: 0,
            batch: 1,
            first_picture: 0,
            width: 0,
            height: 0,
            sampler: MACULA_SAMPLER_DEFAULT,
            karras: -1,
            preview: 0,
            class_label: 0,
        }
    }
}

// SAFETY: repr(C), begins with its size; pointers, an optional function pointer and numbers take any bytes.
unsafe impl Versioned for macula_draw_options {
    const FIRST_SIZE: usize = 152;
}

/// Draws pictures.
///
/// - `pipeline`: a live pipeline; not NULL.
/// - `options`: what to draw; not NULL, because `prompt` has no default.
/// - `out_images`: receives the pictures; not NULL. Free them with `macula_images_free`.
///
/// Errors: `INVALID_ARGUMENT` with the range that was left; `CANCELLED`; `NOT_FINITE` naming the step; `RUNTIME_FAILED`;
/// `BUSY` during another job. After any of them the pipeline draws as before. Any thread; blocks until it is done.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_pipeline_draw(
    pipeline: *mut macula_pipeline,
    options: *const macula_draw_options,
    out_images: *mut *mut macula_images,
) -> macula_status {
    guard("macula_pipeline_draw", |call| {
        let pipeline = call.object(pipeline, "pipeline")?;
        // SAFETY: valid as the header asks.
        let (options, out_images) = unsafe {
            reference(options, "options")?;
            (argument::options(options, "options")?, out(out_images, "out_images")?)
        };
        let cancel = match options.cancel.is_null() {
            true => CancelToken::new(),
            false => call.object(options.cancel, "options.cancel")?.token.clone(),
        };
        let schedule = match options.schedule.is_null() {
            true => None,
            false => Some(call.object(options.schedule, "options.schedule")?),
        };
        // SAFETY: valid as the header asks.
        let inputs = unsafe { Inputs::read(&options) }?;
        let work = &mut *pipeline.begin()?;
        let images = inputs.draw(&options, schedule.as_ref().map(|entry| &entry.schedule), work, cancel)?;
        out_images.set(macula_images::table().insert(macula_images { images }));
        Ok(())
    })
}

/// What the options lead to, copied.
struct Inputs {
    prompt: String,
    negative_prompt: Option<String>,
    noise: Option<Vec<f32>>,
    start_latent: Option<Vec<f32>>,
    start_image: Option<Images>,
    sampler: Option<Sampler>,
    karras: Option<bool>,
}

impl Inputs {
    /// # Safety
    /// Pointers are valid for what the fields' texts say.
    unsafe fn read(options: &macula_draw_options) -> Result<Self> {
        let tensor = |pointer: *const macula_tensor, name: &str| -> Result<Option<Vec<f32>>> {
            if pointer.is_null() {
                return Ok(None);
            }
            // SAFETY: as promised by the caller.
            let tensor = unsafe { reference(pointer, name)?.read(name) }?;
            tensor.into_vec::<f32>().map(Some).map_err(|error| error.at(name))
        };
        let image = |pointer: *const macula_image, name: &str| -> Result<Option<Images>> {
            if pointer.is_null() {
                return Ok(None);
            }
            // SAFETY: as promised by the caller.
            unsafe { reference(pointer, name)?.read(name) }.map(Some)
        };
        if !options.start_latent.is_null() && !options.start_image.is_null() {
            return Err(Error::invalid_argument("options has both start_latent and start_image"));
        }
        Ok(Self {
            // SAFETY: as promised by the caller.
            prompt: unsafe { text(options.prompt, "options.prompt") }?.to_owned(),
            // SAFETY: as promised by the caller.
            negative_prompt: unsafe { optional_text(options.negative_prompt, "options.negative_prompt") }?
                .map(str::to_owned),
            noise: tensor(options.noise, "options.noise")?,
            start_latent: tensor(options.start_latent, "options.start_latent")?,
            start_image: image(options.start_image, "options.start_image")?,
            sampler: schedule::sampler(options.sampler, "options.sampler")?,
            karras: match options.karras {
                -1 => None,
                0 => Some(false),
                1 => Some(true),
                other => return Err(Error::invalid_argument(format!("options.karras is {other}, must be -1, 0 or 1"))),
            },
        })
    }

    fn draw(
        &self,
        options: &macula_draw_options,
        schedule: Option<&Schedule>,
        work: &mut super::pipeline::Work,
        cancel: CancelToken,
    ) -> Result<Images> {
        let mut wanted = DrawOptions::new(self.prompt.clone());
        wanted.negative_prompt = self.negative_prompt.clone();
        wanted.images_per_prompt = options.batch as usize;
        wanted.width = (options.width != 0).then_some(options.width as usize);
        wanted.height = (options.height != 0).then_some(options.height as usize);
        wanted.steps = options.steps as usize;
        wanted.guidance = Guidance { scale: options.guidance, rescale: options.guidance_rescale };
        wanted.schedule = schedule;
        wanted.sampler = self.sampler;
        wanted.karras = self.karras;
        wanted.eta = options.eta;
        wanted.seed = options.seed;
        wanted.first_image = options.first_picture;
        wanted.noise = self.noise.as_deref();
        wanted.class_label = options.class_label.into();
        let step = options.start_step as usize;
        wanted.start = match (&self.start_latent, &self.start_image) {
            (Some(values), _) => Start::Latents { values, step },
            (None, Some(images)) => Start::Images { images, step },
            (None, None) if step == 0 => Start::Noise,
            (None, None) => {
                return Err(Error::invalid_argument(format!(
                    "options.start_step is {step}, but there is neither start_latent nor start_image"
                )));
            }
        };
        let pixels = work.pipeline.info().latent_factor == 1;
        let teller = Teller { callback: options.progress, userdata: options.progress_userdata };
        let mut on_step = |report: &StepReport<'_>| {
            let preview = (options.preview != 0 && pixels).then(|| preview(report)).flatten();
            let preview = preview.as_ref().and_then(|images| macula_image::of(images, 0).ok());
            let latent = macula_tensor::view(report.clean, &report.clean_shape, MACULA_DTYPE_F32);
            let done = (report.step + 1).saturating_sub(step) as u64;
            let steps = report.steps.saturating_sub(step) as u64;
            teller.tell(c"denoise", done, steps, Some(&latent), preview.as_ref())
        };
        let mut report = |progress: crate::progress::Progress<'_>| match progress.stage {
            "denoise" if progress.done == 0 => teller.tell(c"denoise", 0, progress.total, None, None),
            "decode" => teller.tell(c"decode", progress.done, progress.total, None, None),
            _ => ControlFlow::Continue(()),
        };
        let mut job = Job { cancel, report: Some(&mut report) };
        work.pipeline.draw(&wanted, Some(&mut on_step), &mut job)
    }
}

/// The first picture of a batch in pixel space.
fn preview(report: &StepReport<'_>) -> Option<Images> {
    let [batch, channels, height, width] = report.clean_shape;
    let first = report.clean.get(..report.clean.len() / batch.max(1))?;
    Images::from_planes(first, [1, channels, height, width]).ok()
}

/// The host's progress callback.
#[derive(Clone, Copy)]
pub(super) struct Teller {
    pub(super) callback: macula_progress_fn,
    pub(super) userdata: *mut c_void,
}

impl Teller {
    pub(super) fn tell(
        &self,
        stage: &std::ffi::CStr,
        done: u64,
        total: u64,
        latent: Option<&macula_tensor>,
        preview: Option<&macula_image>,
    ) -> ControlFlow<()> {
        self.tell_all(macula_progress {
            stage: stage.as_ptr(),
            done,
            total,
            latent: latent.map_or(std::ptr::null(), std::ptr::from_ref),
            preview: preview.map_or(std::ptr::null(), std::ptr::from_ref),
            loss: f64::NAN,
        })
    }

    /// Of work that lowers a loss.
    pub(super) fn tell_loss(
        &self,
        stage: &std::ffi::CStr,
        done: u64,
        total: u64,
        loss: Option<f64>,
    ) -> ControlFlow<()> {
        self.tell_all(macula_progress {
            stage: stage.as_ptr(),
            done,
            total,
            latent: std::ptr::null(),
            preview: std::ptr::null(),
            loss: loss.unwrap_or(f64::NAN),
        })
    }

    /// What `progress` leads to lives until the callback returns.
    fn tell_all(&self, progress: macula_progress) -> ControlFlow<()> {
        let Some(callback) = self.callback else { return ControlFlow::Continue(()) };
        // SAFETY: a callback of the host, valid for the call as the header asks; what it is given lives until it returns.
        if unsafe { callback(self.userdata, &raw const progress) } == 0 {
            ControlFlow::Continue(())
        } else {
            ControlFlow::Break(())
        }
    }
}
