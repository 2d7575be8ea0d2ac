//! Noise schedules and samplers: pure arithmetic on states, with no knowledge of models, prompts or images.
//!
//! A diffusion model sees a state `x_t = signal * x_0 + sigma * noise` at a timestep `t` and predicts the noise, the
//! clean state or a mixture (*velocity*). A sampler walks from pure noise to a clean state. Each sampler that is read
//! here is, for one step, *linear* in the state, the prediction, the previous clean prediction and fresh noise (apart
//! from an optional clipping of the clean prediction). So a sampler is a short function, in a file of its own, that
//! writes the coefficients of every step once, in `f64`, from a [`SchedulerConfig`]; [`Trajectory`] applies them to
//! `f32` states.
//!
//! | file | class in `scheduler_config.json` | source |
//! |---|---|---|
//! | `ddpm.rs` | `DDPMScheduler` | Ho et al. 2020, arXiv 2006.11239, eq. 7 |
//! | `ddim.rs` | `DDIMScheduler` | Song et al. 2020, arXiv 2010.02502, eq. 12 and 16 |
//! | `euler.rs` | `EulerDiscreteScheduler` | Karras et al. 2022, arXiv 2206.00364, algorithm 2 without churn |
//! | `euler_ancestral.rs` | `EulerAncestralDiscreteScheduler` | as before, with the noise of DDPM's posterior |
//! | `dpm_multistep.rs` | `DPMSolverMultistepScheduler` | Lu et al. 2022, arXiv 2211.01095, algorithm 2 (DPM++ 2M) |
//! | `lcm.rs` | `LCMScheduler` | Luo et al. 2023, arXiv 2310.04378, section 4 |
//!
//! Spacing of timesteps and the zero-terminal-SNR rescale: Lin et al. 2023, arXiv 2305.08891, table 2 and algorithm 1.
//! Karras sigmas: arXiv 2206.00364, eq. 5.

mod config;
mod ddim;
mod ddpm;
mod dpm_multistep;
mod euler;
mod euler_ancestral;
mod lcm;
mod spacing;
mod training;

use super::precision;
use crate::error::{Error, Result};

pub use config::{Prediction, Sampler, SchedulerConfig};
pub use training::TrainingSchedule;

/// The greatest number of steps that a plan may have.
pub const MAX_STEPS: usize = 10_000;

/// What a caller chooses about the walk.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PlanOptions {
    /// Steps of the whole walk, `1..=num_train_timesteps`.
    pub steps: usize,
    /// The first step that is run, in `0..steps`; above 0 for image-to-image. Multistep samplers have no history there.
    pub start: usize,
    /// Share of the DDPM posterior's noise that DDIM adds, in `[0, 1]` (arXiv 2010.02502, eq. 16); 0 for the other
    /// samplers, whose noise is their own.
    pub eta: f64,
}

impl PlanOptions {
    /// `steps` steps from pure noise, without DDIM noise.
    pub fn new(steps: usize) -> Self {
        Self { steps, start: 0, eta: 0.0 }
    }
}

/// One step as coefficients. With `p` the model's prediction for `input_scale * x`:
///
/// ```text
/// c     = clean_sample * x + clean_prediction * p           the clean state that the prediction stands for
/// c     = clamp(c, -clip, clip)                             where the scheduler clips
/// d     = denoised_sample * x + denoised_clean * c          what a preview shows
/// x'    = next_sample * x + next_clean * c + next_prediction * p + next_previous * c' + next_noise * z
/// ```
///
/// where `c'` is the `c` of the step before and `z` fresh standard normal noise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// The timestep that the model is told, in units of training steps; whole for all but interpolated schedules.
    pub timestep: f64,
    /// The state is multiplied by this before the model sees it.
    pub input_scale: f64,
    /// `x = signal * x_0 + sigma * noise` at this step.
    pub signal: f64,
    /// See [`Step::signal`].
    pub sigma: f64,
    /// Share of the state in the clean prediction.
    pub clean_sample: f64,
    /// Share of the model's prediction in the clean prediction.
    pub clean_prediction: f64,
    /// The clean prediction is clamped to `[-clip, clip]`.
    pub clip: Option<f64>,
    /// Share of the state in the denoised state.
    pub denoised_sample: f64,
    /// Share of the clean prediction in the denoised state.
    pub denoised_clean: f64,
    /// Share of the state in the next state.
    pub next_sample: f64,
    /// Share of the clean prediction in the next state.
    pub next_clean: f64,
    /// Share of the model's prediction in the next state.
    pub next_prediction: f64,
    /// Share of the clean prediction of the step before in the next state.
    pub next_previous: f64,
    /// Standard deviation of the fresh noise in the next state.
    pub next_noise: f64,
}

impl Step {
    /// A step at `timestep` from `x = signal * x_0 + sigma * noise` whose next state is yet to be filled in.
    fn at(timestep: f64, signal: f64, sigma: f64) -> Self {
        Self {
            timestep,
            input_scale: 1.0,
            signal,
            sigma,
            clean_sample: 0.0,
            clean_prediction: 1.0,
            clip: None,
            denoised_sample: 0.0,
            denoised_clean: 1.0,
            next_sample: 0.0,
            next_clean: 0.0,
            next_prediction: 0.0,
            next_previous: 0.0,
            next_noise: 0.0,
        }
    }

    /// Whether the step adds fresh noise.
    pub fn needs_noise(&self) -> bool {
        self.next_noise != 0.0
    }

    fn is_finite(&self) -> bool {
        [
            self.timestep,
            self.input_scale,
            self.signal,
            self.sigma,
            self.clean_sample,
            self.clean_prediction,
            self.denoised_sample,
            self.denoised_clean,
            self.next_sample,
            self.next_clean,
            self.next_prediction,
            self.next_previous,
            self.next_noise,
        ]
        .iter()
        .all(|value| value.is_finite())
    }
}

/// A whole walk: every step's coefficients, and how large the start noise is.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// All steps; those before [`Plan::start`] are not run.
    pub steps: Vec<Step>,
    /// The first step that is run.
    pub start: usize,
    /// A walk from step 0 begins at standard normal noise times this.
    pub initial_sigma: f64,
}

impl Plan {
    /// The coefficients of a walk.
    ///
    /// # Errors
    /// [`crate::Status::InvalidArgument`] for step counts, a start or an eta outside the ranges above, and
    /// [`crate::Status::Unsupported`] where the schedule has no signal at a step and the prediction type needs some
    /// (noise prediction at zero terminal SNR).
    pub fn new(config: &SchedulerConfig, options: PlanOptions) -> Result<Self> {
        let trained = config.training.len();
        let most = trained.min(MAX_STEPS);
        if options.steps == 0 || options.steps > most {
            return Err(Error::invalid_argument(format!("steps is {}, must be in 1..={most}", options.steps)));
        }
        if options.start >= options.steps {
            return Err(Error::invalid_argument(format!(
                "start step is {}, must be in 0..{} (the number of steps)",
                options.start, options.steps
            )));
        }
        if !(0.0..=1.0).contains(&options.eta) {
            return Err(Error::invalid_argument(format!("eta is {}, must be in [0, 1]", options.eta)));
        }
        if options.eta != 0.0 && config.sampler != Sampler::Ddim {
            return Err(Error::invalid_argument(format!(
                "eta is {}, but only DDIMScheduler takes one; it must be 0 for {}",
                options.eta,
                config.sampler.class_name()
            )));
        }
        let plan = match config.sampler {
            Sampler::Ddpm => ddpm::plan(config, options),
            Sampler::Ddim => ddim::plan(config, options),
            Sampler::Euler => euler::plan(config, options),
            Sampler::EulerAncestral => euler_ancestral::plan(config, options),
            Sampler::DpmMultistep => dpm_multistep::plan(config, options),
            Sampler::Lcm => lcm::plan(config, options),
        }?;
        if let Some(step) = plan.steps.iter().position(|step| !step.is_finite()) {
            return Err(Error::unsupported(format!(
                "{} with {} prediction: step {step} at timestep {} has no signal to divide by (zero terminal SNR); \
                 use another timestep_spacing or a v_prediction or sample model",
                config.sampler.class_name(),
                config.prediction.name(),
                plan.steps[step].timestep
            )));
        }
        if let Some(step) = plan.steps.iter().find(|step| !(0.0..trained as f64).contains(&step.timestep)) {
            return Err(Error::invalid_argument(format!(
                "{} steps with this spacing and steps_offset visit timestep {}, but the model was trained on 0..{trained}",
                options.steps, step.timestep
            )));
        }
        if options.start >= plan.steps.len() {
            return Err(Error::invalid_argument(format!(
                "start step is {}, but {} takes only {} steps here",
                options.start,
                config.sampler.class_name(),
                plan.steps.len()
            )));
        }
        Ok(plan)
    }

    /// How many steps are run.
    pub fn len(&self) -> usize {
        self.steps.len() - self.start
    }

    /// Never: a plan has at least one step.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Turns standard normal `noise`, and for a walk that begins later the clean state to begin from, into the state
    /// before the first step: `initial_sigma * noise`, or `signal * clean + sigma * noise`.
    ///
    /// # Errors
    /// [`crate::Status::InvalidArgument`] if the lengths differ; [`crate::Status::OutOfMemory`].
    pub fn begin(&self, noise: &[f32], clean: Option<&[f32]>) -> Result<Vec<f32>> {
        match clean {
            None => precision::collect(noise.len(), noise.iter().map(|z| (self.initial_sigma * f64::from(*z)) as f32)),
            Some(clean) => {
                same_length("clean state", clean, noise.len())?;
                let Step { signal, sigma, .. } = self.steps[self.start];
                let mix = |(x, z): (&f32, &f32)| (signal * f64::from(*x) + sigma * f64::from(*z)) as f32;
                precision::collect(noise.len(), clean.iter().zip(noise).map(mix))
            }
        }
    }
}

/// A walk under way: drives a [`Plan`] step by step, whoever computes the predictions.
#[derive(Clone, Debug)]
pub struct Trajectory {
    plan: Plan,
    next: usize,
    previous: Vec<f32>,
}

impl Trajectory {
    /// A walk before its first step.
    pub fn new(plan: Plan) -> Self {
        Self { next: plan.start, plan, previous: Vec::new() }
    }

    /// The plan that is walked.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The coming step's index in [`Plan::steps`] and its coefficients; `None` at the end.
    pub fn current(&self) -> Option<(usize, &Step)> {
        self.plan.steps.get(self.next).map(|step| (self.next, step))
    }

    /// The state as the model wants it: `input_scale * sample`.
    ///
    /// # Errors
    /// [`crate::Status::OutOfMemory`].
    pub fn model_input(&self, sample: &[f32]) -> Result<Vec<f32>> {
        let scale = self.current().map_or(1.0, |(_, step)| step.input_scale);
        precision::collect(sample.len(), sample.iter().map(|x| (scale * f64::from(*x)) as f32))
    }

    /// Takes one step: `sample` becomes the next state, and the denoised state (same length) is returned.
    ///
    /// # Errors
    /// [`crate::Status::InvalidArgument`] after the last step, for lengths that differ, and where
    /// [`Step::needs_noise`] and none is given.
    pub fn step(&mut self, sample: &mut [f32], prediction: &[f32], noise: Option<&[f32]>) -> Result<Vec<f32>> {
        let Some(step) = self.plan.steps.get(self.next).copied() else {
            return Err(Error::invalid_argument(format!("all {} steps are done", self.plan.steps.len())));
        };
        let length = sample.len();
        same_length("prediction", prediction, length)?;
        let noise = match noise {
            Some(noise) => {
                same_length("noise", noise, length)?;
                noise
            }
            None if step.needs_noise() => {
                return Err(Error::invalid_argument(format!("step {} adds noise and none was given", self.next)));
            }
            None => &[],
        };
        if step.next_previous != 0.0 {
            same_length("state of the step before", &self.previous, length)?;
        }
        let mut denoised = Vec::new();
        denoised.try_reserve_exact(length)?;
        let mut clean = Vec::new();
        clean.try_reserve_exact(length)?;
        for (index, x) in sample.iter_mut().enumerate() {
            let state = f64::from(*x);
            let p = f64::from(prediction[index]);
            let mut c = step.clean_sample * state + step.clean_prediction * p;
            if let Some(clip) = step.clip {
                c = c.clamp(-clip, clip);
            }
            let mut next = step.next_sample * state + step.next_clean * c + step.next_prediction * p;
            if step.next_previous != 0.0 {
                next += step.next_previous * f64::from(self.previous[index]);
            }
            if step.next_noise != 0.0 {
                next += step.next_noise * f64::from(noise[index]);
            }
            *x = next as f32;
            clean.push(c as f32);
            denoised.push((step.denoised_sample * state + step.denoised_clean * c) as f32);
        }
        self.previous = clean;
        self.next += 1;
        Ok(denoised)
    }
}

fn same_length(what: &str, given: &[f32], wanted: usize) -> Result<()> {
    if given.len() == wanted {
        Ok(())
    } else {
        Err(Error::invalid_argument(format!("{what} has {} values, the state has {wanted}", given.len())))
    }
}
