//! Trajectories
//!
//! A trajectory is a walk from noise to clean states by a schedule, for hosts with a sampler loop of their own: it says what
//! each step needs and does the arithmetic, whoever computes the predictions (`macula_pipeline_denoise`, for one). States
//! are `[batch, channels, h, w]`, 32-bit floating point, and their sides double at each lift.

use parking_lot::{Mutex, MutexGuard};

use super::argument::{self, Versioned, out, reference};
use super::guard::{guard, guard_free};
use super::handle::{Object, object};
use super::schedule::{MACULA_SAMPLER_DEFAULT, macula_sampler, macula_schedule, sampler};
use super::status::macula_status;
use super::tensor::macula_tensor;
use crate::diffusion::decomposed::{Plan, Schedule, Trajectory};
use crate::diffusion::schedule::PlanOptions;
use crate::error::{Error, Result, Status};

/// A walk under way, from noise to clean states. One call at a time.
pub struct macula_trajectory {
    schedule: Schedule,
    walk: Mutex<Trajectory>,
}
object!(macula_trajectory, 8, idle: |trajectory| !trajectory.walk.is_locked());

impl macula_trajectory {
    fn begin(&self) -> Result<MutexGuard<'_, Trajectory>> {
        self.walk.try_lock().ok_or_else(|| Error::new(Status::Busy, "the trajectory is at work on another call"))
    }
}

/// How a schedule is walked.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct macula_trajectory_options {
    /// `sizeof` this struct.
    pub struct_size: usize,
    /// DDIM: share of DDPM's noise, 0 to 1. Default: `0.0`.
    pub eta: f64,
    /// States at once, at least 1. Default: `1`.
    pub batch: u32,
    /// Channels of a state. Default: `3`.
    pub channels: u32,
    /// Rows of the clean states at the end. Default: `64`.
    pub height: u32,
    /// Columns of the clean states at the end. Default: `64`.
    pub width: u32,
    /// Steps, 1 to `train_timesteps`; turning points are added where they are not among them. Default: `25`.
    pub steps: u32,
    /// First step that is run; above 0 to start from clean states. Default: `0`.
    pub start_step: u32,
    /// How noise is taken away; the schedule's `_class_name` by default. With turning points DDPM, DDIM or DPM multistep.
    /// Default: `MACULA_SAMPLER_DEFAULT`.
    pub sampler: macula_sampler,
    /// 0. Default: `0`.
    pub reserved: i32,
}

impl Default for macula_trajectory_options {
    fn default() -> Self {
        Self {
            struct_size: size_of::<Self>(),
            eta: 0.0,
            batch: 1,
            channels: 3,
            height: 64,
            width: 64,
            steps: 25,
            start_step: 0,
            sampler: MACULA_SAMPLER_DEFAULT,
            reserved: 0,
        }
    }
}

// SAFETY: repr(C), begins with its size; numbers take any bytes.
unsafe impl Versioned for macula_trajectory_options {
    const FIRST_SIZE: usize = 48;
}

/// Begins to walk a schedule, for hosts with a loop of their own.
///
/// - `schedule`: a live schedule; not NULL. It may be freed before the trajectory.
/// - `options`: how it is walked; may be NULL for the values of `MACULA_TRAJECTORY_OPTIONS_INIT`.
/// - `out_trajectory`: receives the trajectory; not NULL. Free it with `macula_trajectory_free`.
///
/// Errors: `INVALID_ARGUMENT` with the range that was left, or if the sides cannot be halved for every stage;
/// `UNSUPPORTED` for a sampler that has no form for it. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_schedule_begin(
    schedule: *const macula_schedule,
    options: *const macula_trajectory_options,
    out_trajectory: *mut *mut macula_trajectory,
) -> macula_status {
    guard("macula_schedule_begin", |call| {
        let entry = call.object(schedule, "schedule")?;
        // SAFETY: valid as the header asks.
        let (options, out_trajectory) =
            unsafe { (argument::options(options, "options")?, out(out_trajectory, "out_trajectory")?) };
        if options.reserved != 0 {
            return Err(Error::invalid_argument(format!("options.reserved is {}, must be 0", options.reserved)));
        }
        let schedule = match sampler(options.sampler, "options.sampler")? {
            Some(sampler) => entry.schedule.with_sampler(sampler)?,
            None => entry.schedule.clone(),
        };
        let steps = PlanOptions { steps: options.steps as usize, start: options.start_step as usize, eta: options.eta };
        let shape = [options.batch, options.channels, options.height, options.width].map(|size| size as usize);
        let walk = Mutex::new(Trajectory::new(Plan::new(&schedule, steps)?, shape)?);
        out_trajectory.set(macula_trajectory::table().insert(macula_trajectory { schedule, walk }));
        Ok(())
    })
}

/// Frees a trajectory.
///
/// - `trajectory`: a live trajectory; may be NULL, then nothing happens.
///
/// Errors: `BUSY` during a call. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_trajectory_free(trajectory: *mut macula_trajectory) -> macula_status {
    guard_free("macula_trajectory_free", trajectory)
}

/// Where a trajectory is, and what its coming step needs.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct macula_trajectory_info {
    /// `sizeof` this struct.
    pub struct_size: usize,
    /// The model's timestep at the coming step.
    pub timestep: f64,
    /// The model wants the state times this.
    pub input_scale: f64,
    /// Class label that the model is told at the coming step, if `has_class_label`.
    pub class_label: i64,
    /// The coming step; `step_count` at the end.
    pub step: usize,
    /// All steps.
    pub step_count: usize,
    /// Stage of the state as it is now.
    pub stage: usize,
    /// Rows of the state as it is now.
    pub height: usize,
    /// Columns of the state as it is now.
    pub width: usize,
    /// Rows of the state after the coming step.
    pub next_height: usize,
    /// Columns of the state after the coming step.
    pub next_width: usize,
    /// 1 if the schedule has class labels.
    pub has_class_label: i32,
    /// 1 if the coming step adds noise of the state's size.
    pub needs_noise: i32,
    /// 1 if the coming step ends with a lift, which adds noise of the size after it.
    pub lifts: i32,
    /// 1 at the end, when the state is clean.
    pub done: i32,
}

impl Default for macula_trajectory_info {
    fn default() -> Self {
        Self {
            struct_size: size_of::<Self>(),
            timestep: 0.0,
            input_scale: 0.0,
            class_label: 0,
            step: 0,
            step_count: 0,
            stage: 0,
            height: 0,
            width: 0,
            next_height: 0,
            next_width: 0,
            has_class_label: 0,
            needs_noise: 0,
            lifts: 0,
            done: 0,
        }
    }
}

// SAFETY: repr(C), begins with its size; numbers take any bytes.
unsafe impl Versioned for macula_trajectory_info {
    const FIRST_SIZE: usize = 104;
}

/// Where a trajectory is.
///
/// - `trajectory`: a live trajectory; not NULL.
/// - `out_info`: an initialised struct (`MACULA_TRAJECTORY_INFO_INIT`) to be filled in; not NULL.
///
/// Errors: `BUSY` during another call. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_trajectory_get_info(
    trajectory: *const macula_trajectory,
    out_info: *mut macula_trajectory_info,
) -> macula_status {
    guard("macula_trajectory_get_info", |call| {
        let trajectory = call.object(trajectory, "trajectory")?;
        // SAFETY: valid as the header asks.
        let info = unsafe { argument::out_info(out_info, "out_info") }?;
        let walk = trajectory.begin()?;
        let steps = walk.plan().steps().len();
        let current = walk.current();
        let step = current.map(|(_, step)| step);
        let lifts = step.is_some_and(|step| step.lift.is_some());
        let [_, _, height, width] = walk.shape();
        let [_, _, next_height, next_width] = walk.shape_at(walk.stage() - usize::from(lifts));
        let label = trajectory.schedule.class_label(walk.stage());
        info.set(macula_trajectory_info {
            struct_size: 0,
            timestep: step.map_or(0.0, |step| step.timestep()),
            input_scale: step.map_or(1.0, |step| step.last().input_scale),
            class_label: label.unwrap_or(0),
            step: current.map_or(steps, |(index, _)| index),
            step_count: steps,
            stage: walk.stage(),
            height,
            width,
            next_height,
            next_width,
            has_class_label: label.is_some().into(),
            needs_noise: step.is_some_and(|step| step.needs_noise()).into(),
            lifts: lifts.into(),
            done: current.is_none().into(),
        });
        Ok(())
    })
}

/// The state before the first step.
///
/// - `trajectory`: a live trajectory before its first step; not NULL.
/// - `noise`: standard normal noise of the present size; not NULL.
/// - `clean`: clean states of full size to start from, if `start_step` is above 0; may be NULL otherwise.
/// - `out_state`: a tensor of the present size whose memory receives the state; not NULL. It may be the memory of `noise`.
///
/// Errors: `INVALID_ARGUMENT` for other shapes; `BUSY` during another call. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_trajectory_start(
    trajectory: *const macula_trajectory,
    noise: *const macula_tensor,
    clean: *const macula_tensor,
    out_state: *const macula_tensor,
) -> macula_status {
    guard("macula_trajectory_start", |call| {
        let trajectory = call.object(trajectory, "trajectory")?;
        // SAFETY: valid as the header asks.
        let (noise, out_state) = unsafe { (reference(noise, "noise")?, reference(out_state, "out_state")?) };
        let walk = trajectory.begin()?;
        let start = walk.plan().start();
        if walk.current().is_none_or(|(index, _)| index != start) {
            return Err(Error::invalid_argument("the trajectory has left its first step"));
        }
        // SAFETY: as above.
        let noise = unsafe { state(noise, walk.shape(), "noise") }?;
        let clean = match clean.is_null() {
            true if start == 0 => None,
            // SAFETY: as above.
            _ => Some(unsafe { state(clean, walk.shape_at(0), "clean") }?),
        };
        let begun = walk.begin(&noise, clean.as_deref())?;
        // SAFETY: as above; the inputs were copied, so that the memory may be theirs.
        unsafe { out_state.f32_mut(&walk.shape(), "out_state") }?.copy_from_slice(&begun);
        Ok(())
    })
}

/// Takes the coming step.
///
/// - `trajectory`: a live trajectory that is not at its end; not NULL.
/// - `sample`: the state as it is now; not NULL.
/// - `prediction`: what the model predicts for `input_scale` times the state, of its size; not NULL.
/// - `noise`: standard normal noise of the state's size; may be NULL unless `needs_noise`.
/// - `lift_noise`: standard normal noise of the next size; may be NULL unless `lifts`.
/// - `out_state`: a tensor of the next size whose memory receives the next state; not NULL. It may be the memory of an
///   input.
/// - `out_clean`: a tensor of the present size whose memory receives the clean state as it is predicted now, in units of
///   the full-sized one; may be NULL.
///
/// Errors: `INVALID_ARGUMENT` for other shapes, missing noise, results that overlap, and at the end; `BUSY` during another
/// call. After any of them the trajectory is where it was. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_trajectory_step(
    trajectory: *mut macula_trajectory,
    sample: *const macula_tensor,
    prediction: *const macula_tensor,
    noise: *const macula_tensor,
    lift_noise: *const macula_tensor,
    out_state: *const macula_tensor,
    out_clean: *const macula_tensor,
) -> macula_status {
    guard("macula_trajectory_step", |call| {
        let trajectory = call.object(trajectory, "trajectory")?;
        // SAFETY: valid as the header asks.
        let (sample, prediction) = unsafe { (reference(sample, "sample")?, reference(prediction, "prediction")?) };
        // SAFETY: as above.
        let out_state = unsafe { reference(out_state, "out_state") }?;
        let walk = &mut *trajectory.begin()?;
        let lifts = walk.current().is_some_and(|(_, step)| step.lift.is_some());
        let (here, there) = (walk.shape(), walk.shape_at(walk.stage() - usize::from(lifts)));
        let optional = |tensor: *const macula_tensor, shape, name: &str| match tensor.is_null() {
            true => Ok(None),
            // SAFETY: as above.
            false => unsafe { state(tensor, shape, name) }.map(Some),
        };
        // SAFETY: as above.
        let (mut next, prediction) =
            unsafe { (state(sample, here, "sample")?, state(prediction, here, "prediction")?) };
        let (noise, lift_noise) = (optional(noise, here, "noise")?, optional(lift_noise, there, "lift_noise")?);
        // Both results' places are looked at before the trajectory moves on; what was given is copied by now.
        // SAFETY: as above.
        let out_clean = match out_clean.is_null() {
            true => None,
            // SAFETY: as above.
            false => Some(unsafe { reference(out_clean, "out_clean") }?),
        };
        // SAFETY: as above, and each is looked at alone.
        let state_at = unsafe { out_state.f32_mut(&there, "out_state") }?.as_ptr_range();
        if let Some(out_clean) = out_clean {
            // SAFETY: as above.
            let clean_at = unsafe { out_clean.f32_mut(&here, "out_clean") }?.as_ptr_range();
            if state_at.start < clean_at.end && clean_at.start < state_at.end {
                return Err(Error::invalid_argument("out_state and out_clean overlap, each needs memory of its own"));
            }
        }
        let clean = walk.step(&mut next, &prediction, noise.as_deref(), lift_noise.as_deref())?;
        // SAFETY: as above; they don't overlap.
        unsafe { out_state.f32_mut(&there, "out_state") }?.copy_from_slice(&next);
        if let Some(out_clean) = out_clean {
            // SAFETY: as above.
            unsafe { out_clean.f32_mut(&here, "out_clean") }?.copy_from_slice(&clean);
        }
        Ok(())
    })
}

/// A copy of a state of this shape.
///
/// # Safety
/// As for [`macula_tensor::read`].
unsafe fn state(tensor: *const macula_tensor, shape: [usize; 4], name: &str) -> Result<Vec<f32>> {
    // SAFETY: as promised by the caller.
    let tensor = unsafe { reference(tensor, name)?.read(name) }?;
    if tensor.shape() != shape {
        return Err(Error::invalid_argument(format!("{name} has shape {:?}, must be {shape:?}", tensor.shape())));
    }
    tensor.into_vec().map_err(|error| error.at(name))
}
