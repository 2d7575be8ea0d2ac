//! Schedules
//!
//! A schedule is a decomposed process as data (DVDP, arXiv 2211.16032): a scheduler of the diffusers layout, and *turning
//! points*, times from which on the state has half the sides. Fine detail vanishes first as noise grows, so early denoising
//! runs on a small state and a *lift* brings the detail back as noise once it is needed.
//!
//! Give a schedule to `macula_pipeline_draw`, or walk it with a sampler loop of your own by a `macula_trajectory`. A
//! schedule without turning points is the plain process.
//!
//! In stage k the sides are halved k times, and a state holds orthonormal coordinates: 2^k times the mean of each block of
//! 2^k x 2^k pixels. Times run from 0 (clean) to `train_timesteps`; time t is the model's timestep t - 1. A model may be
//! trained for the process; with `ordinary_models` those of several resolutions serve as they are, without fading.

use std::ffi::{CString, c_char};
use std::path::Path;

use super::argument::{self, Versioned, c_text, optional_path, out, reference, slice, text};
use super::cancel::macula_cancel_token;
use super::guard::{guard, guard_free};
use super::handle::{Object, object};
use super::image::macula_image;
use super::pipeline::macula_pipeline;
use super::status::macula_status;
use crate::diffusion::decomposed::{Attenuation, Budget, Schedule};
use crate::diffusion::pipeline::Images;
use crate::diffusion::schedule::Sampler;
use crate::error::{Error, Result};
use crate::progress::CancelToken;

/// How noise is taken away: one of `MACULA_SAMPLER_*`.
pub type macula_sampler = i32;

/// The one of the model's `scheduler/`.
pub const MACULA_SAMPLER_DEFAULT: macula_sampler = 0;

/// DDPM (arXiv 2006.11239).
pub const MACULA_SAMPLER_DDPM: macula_sampler = 1;

/// DDIM (arXiv 2010.02502); `eta` adds noise.
pub const MACULA_SAMPLER_DDIM: macula_sampler = 2;

/// Euler (arXiv 2206.00364).
pub const MACULA_SAMPLER_EULER: macula_sampler = 3;

/// Euler with noise added at each step.
pub const MACULA_SAMPLER_EULER_ANCESTRAL: macula_sampler = 4;

/// DPM-Solver++ of second order, multistep (arXiv 2211.01095).
pub const MACULA_SAMPLER_DPM_MULTISTEP: macula_sampler = 5;

/// For latent consistency models (arXiv 2310.04378).
pub const MACULA_SAMPLER_LCM: macula_sampler = 6;

/// The sampler of a `MACULA_SAMPLER_*`; `None` for the default.
pub(super) fn sampler(value: macula_sampler, name: &str) -> Result<Option<Sampler>> {
    Ok(Some(match value {
        MACULA_SAMPLER_DEFAULT => return Ok(None),
        MACULA_SAMPLER_DDPM => Sampler::Ddpm,
        MACULA_SAMPLER_DDIM => Sampler::Ddim,
        MACULA_SAMPLER_EULER => Sampler::Euler,
        MACULA_SAMPLER_EULER_ANCESTRAL => Sampler::EulerAncestral,
        MACULA_SAMPLER_DPM_MULTISTEP => Sampler::DpmMultistep,
        MACULA_SAMPLER_LCM => Sampler::Lcm,
        other => return Err(Error::invalid_argument(format!("{name} is {other}, not a MACULA_SAMPLER_*"))),
    }))
}

/// A decomposed process. It never changes, so any number of threads may read it.
pub struct macula_schedule {
    pub(super) schedule: Schedule,
    json: CString,
}
object!(macula_schedule, 7);

impl macula_schedule {
    fn new(schedule: Schedule) -> Self {
        Self { json: c_text(&schedule.to_json()), schedule }
    }
}

/// Reads a schedule and checks it.
///
/// - `json`: an object with the fields of a diffusers `scheduler_config.json` (`_class_name` `"DDIMScheduler"` and
///   `timestep_spacing` `"trailing"` if they are left out; `alphas_cumprod`, a list, may stand in place of betas), and all
///   optional: `turning_points`, rising times in 2 to `train_timesteps - 1`; `attenuation` `{"r", "q"}`, the signal of what
///   is dropped at time T being `r^((t / T)^q)` of a plain process's, r in (0, 1], q in [1, 1000]; `lift_std`, a number for
///   each turning point: the root mean square of the clean coordinates that are dropped there; `stage_class_labels` and
///   `stage_sizes`, a whole number for each stage; `ordinary_models`, true if the models are ordinary ones of pictures of
///   each stage's size, which were not trained for the process: they are told the timestep of the noise that the means of
///   blocks have, and nothing may fade (r = 1). Not NULL.
/// - `out_schedule`: receives the schedule; not NULL. Free it with `macula_schedule_free`.
///
/// Errors: `INVALID_FILE` and `UNSUPPORTED` naming the field, its value and its range. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_schedule_from_json(
    json: *const c_char,
    out_schedule: *mut *mut macula_schedule,
) -> macula_status {
    guard("macula_schedule_from_json", |_| {
        // SAFETY: valid as the header asks.
        let (json, out_schedule) = unsafe { (text(json, "json")?, out(out_schedule, "out_schedule")?) };
        let schedule = Schedule::from_json(json.as_bytes())?;
        out_schedule.set(macula_schedule::table().insert(macula_schedule::new(schedule)));
        Ok(())
    })
}

/// The schedule that a pipeline's model was trained for: `scheduler/decomposed.json` of its folder.
///
/// - `pipeline`: a live pipeline; not NULL.
/// - `out_schedule`: receives the schedule; not NULL. Free it with `macula_schedule_free`.
///
/// Errors: `NOT_FOUND` if the folder has none; `BUSY` during a job. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_pipeline_get_schedule(
    pipeline: *const macula_pipeline,
    out_schedule: *mut *mut macula_schedule,
) -> macula_status {
    guard("macula_pipeline_get_schedule", |call| {
        let pipeline = call.object(pipeline, "pipeline")?;
        // SAFETY: valid as the header asks.
        let out_schedule = unsafe { out(out_schedule, "out_schedule") }?;
        let schedule = pipeline.begin()?.pipeline.schedule().cloned();
        let schedule = schedule.ok_or_else(|| Error::not_found("the model has no scheduler/decomposed.json"))?;
        out_schedule.set(macula_schedule::table().insert(macula_schedule::new(schedule)));
        Ok(())
    })
}

/// Frees a schedule; its text ends. Trajectories that were begun with it go on.
///
/// - `schedule`: a live schedule; may be NULL, then nothing happens.
///
/// Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_schedule_free(schedule: *mut macula_schedule) -> macula_status {
    guard_free("macula_schedule_free", schedule)
}

/// What a schedule is. The text belongs to the schedule's handle.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct macula_schedule_info {
    /// `sizeof` this struct.
    pub struct_size: usize,
    /// The object that `macula_schedule_from_json` reads as this schedule.
    pub json: *const c_char,
    /// Stages: one more than turning points.
    pub stage_count: usize,
    /// The last time: the training steps of the model.
    pub train_timesteps: usize,
    /// r of the attenuation.
    pub attenuation_r: f64,
    /// q of the attenuation.
    pub attenuation_q: f64,
}

impl Default for macula_schedule_info {
    fn default() -> Self {
        Self {
            struct_size: size_of::<Self>(),
            json: std::ptr::null(),
            stage_count: 0,
            train_timesteps: 0,
            attenuation_r: 0.0,
            attenuation_q: 0.0,
        }
    }
}

// SAFETY: repr(C), begins with its size; pointers and numbers take any bytes.
unsafe impl Versioned for macula_schedule_info {
    const FIRST_SIZE: usize = 48;
}

/// What a schedule is.
///
/// - `schedule`: a live schedule; not NULL.
/// - `out_info`: an initialised struct (`MACULA_SCHEDULE_INFO_INIT`) to be filled in; not NULL.
///
/// Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_schedule_get_info(
    schedule: *const macula_schedule,
    out_info: *mut macula_schedule_info,
) -> macula_status {
    guard("macula_schedule_get_info", |call| {
        let entry = call.object(schedule, "schedule")?;
        // SAFETY: valid as the header asks.
        let info = unsafe { argument::out_info(out_info, "out_info") }?;
        let decomposition = entry.schedule.decomposition();
        info.set(macula_schedule_info {
            struct_size: 0,
            json: entry.json.as_ptr(),
            stage_count: decomposition.turning_points.len() + 1,
            train_timesteps: entry.schedule.config().training.len(),
            attenuation_r: decomposition.attenuation.r,
            attenuation_q: decomposition.attenuation.q,
        });
        Ok(())
    })
}

/// One stage of a schedule.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct macula_stage_info {
    /// `sizeof` this struct.
    pub struct_size: usize,
    /// The first time of the stage: its turning point; 0 for stage 0.
    pub first_time: usize,
    /// The last time of the stage.
    pub last_time: usize,
    /// Side of the states that the model was trained with here; 0 if the schedule does not say.
    pub side: usize,
    /// Root mean square of the clean coordinates that are dropped where the stage ends; 0 if they count as noise alone, and
    /// for the last stage, which drops none.
    pub lift_std: f64,
    /// Class label that the model is told here, if `has_class_label`.
    pub class_label: i64,
    /// 1 if the schedule has class labels.
    pub has_class_label: i32,
    /// 0.
    pub reserved: i32,
}

impl Default for macula_stage_info {
    fn default() -> Self {
        Self {
            struct_size: size_of::<Self>(),
            first_time: 0,
            last_time: 0,
            side: 0,
            lift_std: 0.0,
            class_label: 0,
            has_class_label: 0,
            reserved: 0,
        }
    }
}

// SAFETY: repr(C), begins with its size; numbers take any bytes.
unsafe impl Versioned for macula_stage_info {
    const FIRST_SIZE: usize = 56;
}

/// One stage of a schedule.
///
/// - `schedule`: a live schedule; not NULL.
/// - `stage`: below `stage_count` of `macula_schedule_info`.
/// - `out_info`: an initialised struct (`MACULA_STAGE_INFO_INIT`) to be filled in; not NULL.
///
/// Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_schedule_get_stage(
    schedule: *const macula_schedule,
    stage: usize,
    out_info: *mut macula_stage_info,
) -> macula_status {
    guard("macula_schedule_get_stage", |call| {
        let schedule = &call.object(schedule, "schedule")?.schedule;
        // SAFETY: valid as the header asks.
        let info = unsafe { argument::out_info(out_info, "out_info") }?;
        let turning = schedule.turning_points();
        if stage > turning.len() {
            let text = format!("stage is {stage}, but the schedule has {}", turning.len() + 1);
            return Err(Error::invalid_argument(text));
        }
        let decomposition = schedule.decomposition();
        let label = schedule.class_label(stage);
        info.set(macula_stage_info {
            struct_size: 0,
            first_time: stage.checked_sub(1).map_or(0, |before| turning[before]),
            last_time: turning.get(stage).map_or(schedule.config().training.len(), |next| next - 1),
            side: decomposition.stage_sizes.get(stage).copied().unwrap_or(0),
            lift_std: decomposition.lift_std.get(stage).copied().unwrap_or(0.0),
            class_label: label.unwrap_or(0),
            has_class_label: label.is_some().into(),
            reserved: 0,
        });
        Ok(())
    })
}

/// One component of a schedule at a time: `y = signal v + sigma noise` for its clean coordinates v.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct macula_component_info {
    /// `sizeof` this struct.
    pub struct_size: usize,
    /// Share of the clean coordinates.
    pub signal: f64,
    /// Deviation of the noise.
    pub sigma: f64,
    /// The kernel from the time before: share of the state there.
    pub kernel_scale: f64,
    /// The kernel from the time before: variance of the noise that is added.
    pub kernel_variance: f64,
    /// Divergence (Kullback-Leibler, nats) per dimension from taking the component for noise here, if its clean coordinates
    /// have a mean square of 1; proportional to that.
    pub drop_error: f64,
}

impl Default for macula_component_info {
    fn default() -> Self {
        Self {
            struct_size: size_of::<Self>(),
            signal: 0.0,
            sigma: 0.0,
            kernel_scale: 0.0,
            kernel_variance: 0.0,
            drop_error: 0.0,
        }
    }
}

// SAFETY: repr(C), begins with its size; numbers take any bytes.
unsafe impl Versioned for macula_component_info {
    const FIRST_SIZE: usize = 48;
}

/// One component of a schedule at a time. Component i is what the states of stage i have and those of stage i + 1 have
/// not; the last one is never dropped.
///
/// - `schedule`: a live schedule; not NULL.
/// - `component`: below `stage_count` of `macula_schedule_info`.
/// - `time`: 1 to `train_timesteps`.
/// - `out_info`: an initialised struct (`MACULA_COMPONENT_INFO_INIT`) to be filled in; not NULL.
///
/// Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_schedule_get_component(
    schedule: *const macula_schedule,
    component: usize,
    time: usize,
    out_info: *mut macula_component_info,
) -> macula_status {
    guard("macula_schedule_get_component", |call| {
        let schedule = &call.object(schedule, "schedule")?.schedule;
        // SAFETY: valid as the header asks.
        let info = unsafe { argument::out_info(out_info, "out_info") }?;
        let (components, times) = (schedule.turning_points().len() + 1, schedule.config().training.len());
        if component >= components || !(1..=times).contains(&time) {
            return Err(Error::invalid_argument(format!(
                "component is {component} and time {time}, but the schedule has {components} components and times 1 to {times}"
            )));
        }
        let level = schedule.level(component, time);
        let kernel = schedule.kernel(component, time - 1, time);
        info.set(macula_component_info {
            struct_size: 0,
            signal: level.signal(),
            sigma: level.sigma(),
            kernel_scale: kernel.scale,
            kernel_variance: kernel.variance,
            drop_error: schedule.drop_error(component, time, 1.0),
        });
        Ok(())
    })
}

/// Whether a pipeline's model can be walked by a schedule: that it is no other model's, and that the UNet takes every
/// stage's size. One prediction is made for each size that was not drawn before, so that a provider that builds something
/// for a size has built it when this returns: a draw of as many states then begins at once.
///
/// - `schedule`: a live schedule; not NULL.
/// - `pipeline`: a live pipeline; not NULL.
/// - `width`: pixels in a row of the pictures that are to be drawn; 0 for the model's own.
/// - `height`: rows, likewise.
/// - `batch`: states that the model will see at once, 1 to 512: the pictures of a draw, twice as many with guidance; 0 for 1.
/// - `cancel`: stops the check from another thread; may be NULL.
///
/// Errors: `INVALID_ARGUMENT` with the difference or the stage whose size is refused; `RUNTIME_FAILED`, naming the stage;
/// `CANCELLED`; `BUSY` during another job. Any thread; blocks until it is done.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_schedule_check(
    schedule: *const macula_schedule,
    pipeline: *mut macula_pipeline,
    width: u32,
    height: u32,
    batch: u32,
    cancel: *const macula_cancel_token,
) -> macula_status {
    guard("macula_schedule_check", |call| {
        let entry = call.object(schedule, "schedule")?;
        let pipeline = call.object(pipeline, "pipeline")?;
        let cancel = match cancel.is_null() {
            true => CancelToken::new(),
            false => call.object(cancel, "cancel")?.token.clone(),
        };
        let side = |side: u32| (side != 0).then_some(side as usize);
        let batch = batch.max(1) as usize;
        pipeline.begin()?.pipeline.check_schedule(&entry.schedule, side(width), side(height), batch, &cancel)
    })
}

/// What turning points are chosen by.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct macula_choose_options {
    /// `sizeof` this struct.
    pub struct_size: usize,
    /// Pictures like those that the model draws, of sides that can be halved so often; not NULL. Default: `NULL`.
    pub pictures: *const macula_image,
    /// Number of pictures, at least 1; the more, the surer. Default: `0`.
    pub picture_count: usize,
    /// The cost of one model call at each stage, `turning_points + 1` numbers above 0 in any unit. May be NULL: a call costs
    /// as much as it has pixels. Default: `NULL`.
    pub stage_costs: *const f64,
    /// Path of an SVG file that shows each component's signal to noise, its drop error, and the predicted cost. May be NULL.
    /// Default: `NULL`.
    pub plot: *const c_char,
    /// The most turning points, 1 to 14. Default: `2`.
    pub turning_points: usize,
    /// The most that dropping a component may cost: Kullback-Leibler divergence in nats per dimension, above 0.
    /// Default: `1e-3`.
    pub drop_error: f64,
    /// r of the attenuation, in (0, 1]. Default: `0.1`.
    pub attenuation_r: f64,
    /// q of the attenuation, in [1, 1000]. Default: `2.0`.
    pub attenuation_q: f64,
}

impl Default for macula_choose_options {
    fn default() -> Self {
        Self {
            struct_size: size_of::<Self>(),
            pictures: std::ptr::null(),
            picture_count: 0,
            stage_costs: std::ptr::null(),
            plot: std::ptr::null(),
            turning_points: 2,
            drop_error: 1e-3,
            attenuation_r: 0.1,
            attenuation_q: 2.0,
        }
    }
}

// SAFETY: repr(C), begins with its size; pointers and numbers take any bytes.
unsafe impl Versioned for macula_choose_options {
    const FIRST_SIZE: usize = 72;
}

/// Chooses turning points from pictures: for each component, the finest first, the earliest within the budget; one that is
/// within it at no time is not dropped, nor are those coarser than it. Noise levels are those that the pipeline's model was
/// trained with; a model must be trained for the schedule before it can be walked well.
///
/// - `pipeline`: a live pipeline; not NULL.
/// - `options`: what they are chosen by; not NULL, because pictures have no default.
/// - `out_cost`: receives the predicted cost of a walk over all times, as a share of the plain one's; may be NULL.
/// - `out_schedule`: receives the schedule, with the dropped parts' spread as `lift_std`; not NULL. Free it with
///   `macula_schedule_free`.
///
/// Errors: `INVALID_ARGUMENT` with the range that was left; `INVALID_FILE` for the attenuation; `NOT_FOUND` for a latent
/// model without a VAE encoder; `IO` for the plot; `BUSY` during another job. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_schedule_choose(
    pipeline: *const macula_pipeline,
    options: *const macula_choose_options,
    out_cost: *mut f64,
    out_schedule: *mut *mut macula_schedule,
) -> macula_status {
    guard("macula_schedule_choose", |call| {
        let pipeline = call.object(pipeline, "pipeline")?;
        // SAFETY: valid as the header asks.
        let (options, out_schedule) = unsafe {
            reference(options, "options")?;
            (argument::options(options, "options")?, out(out_schedule, "out_schedule")?)
        };
        // SAFETY: as above.
        let (pictures, budget, plot) = unsafe { options.read() }?;
        let work = pipeline.begin()?;
        let choice =
            work.pipeline.choose_turning_points(&pictures, options.turning_points, &budget, &CancelToken::new())?;
        if let Some(plot) = plot {
            std::fs::write(plot, choice.to_svg()).map_err(|error| Error::io(plot.display(), error))?;
        }
        if !out_cost.is_null() {
            // SAFETY: as above.
            unsafe { out(out_cost, "out_cost") }?.set(choice.cost);
        }
        out_schedule.set(macula_schedule::table().insert(macula_schedule::new(choice.schedule)));
        Ok(())
    })
}

impl macula_choose_options {
    /// # Safety
    /// Pointers are valid for what the fields' texts say.
    unsafe fn read<'a>(&self) -> Result<(Vec<Images>, Budget, Option<&'a Path>)> {
        // SAFETY: as promised by the caller.
        let pictures = unsafe { slice(self.pictures, self.picture_count, "options.pictures") }?;
        let read = |(index, picture): (usize, &macula_image)| {
            // SAFETY: as promised by the caller.
            unsafe { picture.read(&format!("options.pictures[{index}]")) }
        };
        let pictures = pictures.iter().enumerate().map(read).collect::<Result<_>>()?;
        let stages = self.turning_points.saturating_add(1);
        let stage_costs = match self.stage_costs.is_null() {
            true => Vec::new(),
            // SAFETY: as promised by the caller.
            false => unsafe { slice(self.stage_costs, stages, "options.stage_costs") }?.to_vec(),
        };
        let attenuation = Attenuation { r: self.attenuation_r, q: self.attenuation_q };
        // SAFETY: as promised by the caller.
        let plot = unsafe { optional_path(self.plot, "options.plot") }?;
        Ok((pictures, Budget { drop_error: self.drop_error, attenuation, stage_costs }, plot))
    }
}
