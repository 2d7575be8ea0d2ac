//! Noise schedules and samplers: pure arithmetic on states, with no knowledge of models, prompts or images.
//!
//! A diffusion model sees a state `x_t = signal * x_0 + sigma * noise` at a timestep `t` and predicts the noise, the
//! clean state or a mixture (*velocity*). A sampler walks from pure noise to a clean state. Each sampler that is read
//! here is, for one step, *linear* in the state, the prediction, the previous clean prediction and fresh noise (apart
//! from an optional clipping of the clean prediction). So a sampler is a short function, in a file of its own, that
//! writes the coefficients of every step once, in `f64`, from a [`SchedulerConfig`];
//! [`Trajectory`](super::decomposed::Trajectory) applies them to `f32` states.
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
mod level;
mod spacing;
mod training;

use crate::error::{Error, Result};

pub use config::{Prediction, Sampler, SchedulerConfig};
pub(super) use level::Leg;
pub use level::{Kernel, Level, Posterior};
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

    /// [`crate::Status::InvalidArgument`] for a step count or an eta outside the ranges.
    pub(super) fn check(&self, config: &SchedulerConfig) -> Result<()> {
        let trained = config.training.len();
        let most = trained.min(MAX_STEPS);
        if self.steps == 0 || self.steps > most {
            return Err(Error::invalid_argument(format!("steps is {}, must be in 1..={most}", self.steps)));
        }
        if !(0.0..=1.0).contains(&self.eta) {
            return Err(Error::invalid_argument(format!("eta is {}, must be in [0, 1]", self.eta)));
        }
        if self.eta != 0.0 && config.sampler != Sampler::Ddim {
            return Err(Error::invalid_argument(format!(
                "eta is {}, but only DDIMScheduler takes one; it must be 0 for {}",
                self.eta,
                config.sampler.class_name()
            )));
        }
        Ok(())
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

    /// The clean state that the prediction `p` for the state `x` stands for, not yet clipped.
    pub fn clean(&self, x: f64, p: f64) -> f64 {
        self.clean_sample * x + self.clean_prediction * p
    }

    /// What a preview shows of the state `x` whose clean prediction is `c`.
    pub fn denoised(&self, x: f64, c: f64) -> f64 {
        self.denoised_sample * x + self.denoised_clean * c
    }

    /// The next state, but for what is added of the step before and of fresh noise.
    pub fn next(&self, x: f64, c: f64, p: f64) -> f64 {
        self.next_sample * x + self.next_clean * c + self.next_prediction * p
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
        options.check(config)?;
        if options.start >= options.steps {
            return Err(Error::invalid_argument(format!(
                "start step is {}, must be in 0..{} (the number of steps)",
                options.start, options.steps
            )));
        }
        let plan = match config.sampler {
            Sampler::Euler => euler::plan(config, options),
            Sampler::EulerAncestral => euler_ancestral::plan(config, options),
            Sampler::Lcm => lcm::plan(config, options),
            Sampler::Ddpm | Sampler::Ddim | Sampler::DpmMultistep => {
                let legs = legs(config, options.steps);
                steps_of(config, options, &legs, |index| index <= options.start).map(|steps| Self {
                    steps,
                    start: options.start,
                    initial_sigma: 1.0,
                })
            }
        }?;
        check_steps(config, &plan.steps)?;
        check_start(config, options.start, plan.steps.len())?;
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
}

/// Whether the sampler has a form for components that fade, and stops where it is told to.
pub(super) fn check_fading(config: &SchedulerConfig) -> Result<()> {
    match config.sampler {
        Sampler::Ddpm | Sampler::Ddim | Sampler::DpmMultistep if !config.karras => Ok(()),
        Sampler::Ddpm | Sampler::Ddim | Sampler::DpmMultistep => {
            Err(Error::unsupported("Karras sigmas do not visit turning points; set use_karras_sigmas to false"))
        }
        other => Err(Error::unsupported(format!(
            "{} has no form for components that fade; those that have: DDPMScheduler, DDIMScheduler, \
             DPMSolverMultistepScheduler",
            other.class_name()
        ))),
    }
}

/// The legs of a walk, for the samplers that are a function of each leg's noise levels.
pub(super) fn legs(config: &SchedulerConfig, steps: usize) -> Vec<Leg> {
    match config.sampler {
        Sampler::Ddpm => ddpm::legs(config, steps),
        Sampler::Ddim => ddim::legs(config, steps),
        _ => dpm_multistep::legs(config, steps),
    }
}

/// The noise level of a training timestep, as the sampler of `config` computes it.
pub(super) fn level_of_timestep(config: &SchedulerConfig, t: f64) -> Level {
    match config.sampler {
        Sampler::DpmMultistep => Level::of_noise_ratio(config.training.noise_ratio_at(t)),
        _ => Level::of_timestep(&config.training, t),
    }
}

/// The steps over these legs, for one component; `fresh` says which have no step before them.
pub(super) fn steps_of(
    config: &SchedulerConfig,
    options: PlanOptions,
    legs: &[Leg],
    fresh: impl Fn(usize) -> bool,
) -> Result<Vec<Step>> {
    let steps: Vec<Step> = match config.sampler {
        Sampler::Ddpm => legs.iter().map(|leg| ddpm::step(config, *leg)).collect(),
        Sampler::Ddim => legs.iter().map(|leg| ddim::step(config, options, *leg)).collect(),
        _ => dpm_multistep::steps(config, legs, fresh),
    };
    check_steps(config, &steps)?;
    Ok(steps)
}

fn check_steps(config: &SchedulerConfig, steps: &[Step]) -> Result<()> {
    let trained = config.training.len();
    if let Some((index, step)) = steps.iter().enumerate().find(|(_, step)| !step.is_finite()) {
        return Err(Error::unsupported(format!(
            "{} with {} prediction: step {index} at timestep {} has no signal to divide by (zero terminal SNR); \
             use another timestep_spacing or a v_prediction or sample model",
            config.sampler.class_name(),
            config.prediction.name(),
            step.timestep
        )));
    }
    if let Some(step) = steps.iter().find(|step| !(0.0..trained as f64).contains(&step.timestep)) {
        return Err(Error::invalid_argument(format!(
            "{} steps with this spacing and steps_offset visit timestep {}, but the model was trained on 0..{trained}",
            steps.len(),
            step.timestep
        )));
    }
    Ok(())
}

/// [`crate::Status::InvalidArgument`] for a walk that would start behind its last step.
pub(super) fn check_start(config: &SchedulerConfig, start: usize, steps: usize) -> Result<()> {
    if start < steps {
        return Ok(());
    }
    let sampler = config.sampler.class_name();
    Err(Error::invalid_argument(format!("start step is {start}, but {sampler} takes only {steps} steps here")))
}
