//! Reads `scheduler_config.json` in the form that diffusers writes, and refuses by name what is not handled.

use serde_json::{Map, Value};

use super::level::Level;
use super::training::TrainingSchedule;
use super::{MAX_STEPS, Step};
use crate::diffusion::fields::{Fields, unhandled};
use crate::error::{Error, Result};

/// The longest training schedule that is read.
const MAX_TRAIN_TIMESTEPS: u64 = 100_000;

/// A sampler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Sampler {
    /// `DDPMScheduler`.
    Ddpm,
    /// `DDIMScheduler`.
    Ddim,
    /// `EulerDiscreteScheduler`.
    Euler,
    /// `EulerAncestralDiscreteScheduler`.
    EulerAncestral,
    /// `DPMSolverMultistepScheduler`: DPM++ 2M.
    DpmMultistep,
    /// `LCMScheduler`.
    Lcm,
}

impl Sampler {
    /// All samplers.
    pub const ALL: [Self; 6] =
        [Self::Ddpm, Self::Ddim, Self::Euler, Self::EulerAncestral, Self::DpmMultistep, Self::Lcm];

    /// The name of its class in `scheduler_config.json`.
    pub fn class_name(self) -> &'static str {
        match self {
            Self::Ddpm => "DDPMScheduler",
            Self::Ddim => "DDIMScheduler",
            Self::Euler => "EulerDiscreteScheduler",
            Self::EulerAncestral => "EulerAncestralDiscreteScheduler",
            Self::DpmMultistep => "DPMSolverMultistepScheduler",
            Self::Lcm => "LCMScheduler",
        }
    }

    /// The sampler with this class name.
    ///
    /// # Errors
    /// [`crate::Status::Unsupported`] with the name and those that are handled.
    pub fn from_class_name(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|sampler| sampler.class_name() == name).ok_or_else(|| {
            let known = Self::ALL.map(Self::class_name).join(", ");
            Error::unsupported(format!("scheduler class {name:?} is not handled; those that are: {known}"))
        })
    }
}

/// What the model predicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Prediction {
    /// The noise: `x_0 = (x - sigma p) / signal`.
    Epsilon,
    /// The velocity `signal * noise - sigma * x_0` (arXiv 2202.00512, appendix D): `x_0 = signal x - sigma p`. A component
    /// that fades has the velocity of one that does not: `signal` is `sqrt(alpha_bar)` in it.
    Velocity,
    /// The clean state: `x_0 = p`.
    Sample,
}

impl Prediction {
    /// The value of `prediction_type`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Epsilon => "epsilon",
            Self::Velocity => "v_prediction",
            Self::Sample => "sample",
        }
    }

    /// Writes how the clean prediction follows from state and prediction at a variance-preserving level.
    pub(super) fn fill(self, step: &mut Step, level: Level) {
        let (signal, sigma) = (level.signal(), level.sigma());
        (step.clean_sample, step.clean_prediction) = match self {
            Self::Epsilon => (1.0 / signal, -sigma / signal),
            Self::Velocity => (level.unfaded_signal() / turn(level), -sigma / turn(level)),
            Self::Sample => (0.0, 1.0),
        };
    }

    /// The noise as shares of state and prediction.
    pub(super) fn noise(self, level: Level) -> (f64, f64) {
        let (signal, sigma) = (level.signal(), level.sigma());
        match self {
            Self::Epsilon => (0.0, 1.0),
            Self::Velocity => (sigma / turn(level), signal / turn(level)),
            Self::Sample => (1.0 / sigma, -signal / sigma),
        }
    }
}

/// The determinant of `(clean, noise) -> (state, velocity)`: `signal' signal + sigma^2` with the unfaded `signal'`, written
/// so that it is exactly 1 for a component that does not fade.
fn turn(level: Level) -> f64 {
    1.0 + level.unfaded_signal() * (level.signal() - level.unfaded_signal())
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Spacing {
    Leading,
    Trailing,
    Linspace,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Variance {
    FixedSmall,
    FixedLarge,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum FinalSigma {
    Zero,
    Least,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum SolverType {
    Midpoint,
    Heun,
}

/// Options of DPM-Solver++.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Solver {
    pub(super) order: u64,
    pub(super) kind: SolverType,
    pub(super) lower_order_final: bool,
    pub(super) euler_at_final: bool,
    pub(super) lambda_min_clipped: f64,
}

/// Options of latent consistency models.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Consistency {
    pub(super) original_steps: usize,
    pub(super) timestep_scaling: f64,
}

/// A scheduler as its file describes it. Fields that the file leaves out have the class's defaults in diffusers.
#[derive(Clone, Debug, PartialEq)]
pub struct SchedulerConfig {
    /// The sampler.
    pub sampler: Sampler,
    /// What the model predicts.
    pub prediction: Prediction,
    /// Noise levels of the training timesteps.
    pub training: TrainingSchedule,
    /// Karras noise ratios; Euler and DPM++ 2M only.
    pub karras: bool,
    pub(super) spacing: Spacing,
    pub(super) steps_offset: f64,
    pub(super) cosine: bool,
    pub(super) clip: Option<f64>,
    /// DDIM takes the noise from the clipped clean state.
    pub(super) noise_of_clipped: bool,
    pub(super) set_alpha_to_one: bool,
    pub(super) variance: Variance,
    pub(super) final_sigma: FinalSigma,
    pub(super) solver: Solver,
    pub(super) consistency: Consistency,
}

impl SchedulerConfig {
    /// Reads the text of a `scheduler_config.json`; with `sampler`, that sampler takes the place of the file's class
    /// and reads the fields it knows.
    ///
    /// # Errors
    /// [`crate::Status::InvalidFile`] for text that is not a JSON object and fields of a wrong kind or out of range;
    /// [`crate::Status::Unsupported`] for classes and values that are not handled. Both name the field and its value.
    pub fn from_json(text: &[u8], sampler: Option<Sampler>) -> Result<Self> {
        let value: Value =
            serde_json::from_slice(text).map_err(|e| Error::invalid_file(format!("not JSON: {e}")).caused_by(e))?;
        let Value::Object(fields) = value else {
            return Err(Error::invalid_file("not a JSON object"));
        };
        Self::from_fields(&fields, sampler)
    }

    /// As [`SchedulerConfig::from_json`], from the fields of the object.
    ///
    /// # Errors
    /// As there.
    pub fn from_fields(fields: &Map<String, Value>, sampler: Option<Sampler>) -> Result<Self> {
        let fields = Fields(fields);
        let sampler = match sampler {
            Some(sampler) => sampler,
            None => match fields.text("_class_name", "")? {
                "" => return Err(Error::invalid_file("_class_name is missing")),
                name => Sampler::from_class_name(name)?,
            },
        };
        Self::read(sampler, &fields)
    }

    fn read(sampler: Sampler, fields: &Fields<'_>) -> Result<Self> {
        use Sampler::{Ddim, Ddpm, DpmMultistep, Euler, Lcm};
        refuse_unhandled(sampler, fields)?;
        let training = read_training(sampler, fields)?;
        let karras = matches!(sampler, Euler | DpmMultistep) && fields.flag("use_karras_sigmas", false)?;
        let prediction = match fields.text("prediction_type", "epsilon")? {
            "epsilon" => Prediction::Epsilon,
            "v_prediction" => Prediction::Velocity,
            "sample" => Prediction::Sample,
            other => return Err(unhandled("prediction_type", other, "epsilon, v_prediction, sample")),
        };
        let default_spacing = if matches!(sampler, Ddpm | Ddim | Lcm) { "leading" } else { "linspace" };
        let spacing = match fields.text("timestep_spacing", default_spacing)? {
            "leading" => Spacing::Leading,
            "trailing" => Spacing::Trailing,
            "linspace" => Spacing::Linspace,
            other => return Err(unhandled("timestep_spacing", other, "leading, trailing, linspace")),
        };
        let clips = matches!(sampler, Ddpm | Ddim | Lcm) && fields.flag("clip_sample", sampler != Lcm)?;
        let clip = if clips { Some(fields.number("clip_sample_range", 1.0, 0.0, 1e6)?) } else { None };
        let variance = match fields.text("variance_type", "fixed_small")? {
            "fixed_large" if sampler == Ddpm => Variance::FixedLarge,
            "fixed_small" | "fixed_small_log" => Variance::FixedSmall,
            _ if !matches!(sampler, Ddpm | DpmMultistep) => Variance::FixedSmall,
            other => return Err(unhandled("variance_type", other, "fixed_small, fixed_small_log, fixed_large")),
        };
        let final_sigma = match fields.text("final_sigmas_type", "zero")? {
            _ if !matches!(sampler, Euler | DpmMultistep) => FinalSigma::Zero,
            "zero" => FinalSigma::Zero,
            "sigma_min" => FinalSigma::Least,
            other => return Err(unhandled("final_sigmas_type", other, "zero, sigma_min")),
        };
        let trained = training.len();
        Ok(Self {
            sampler,
            prediction,
            karras,
            spacing,
            steps_offset: fields.whole("steps_offset", 0, 0, trained as u64 - 1)? as f64,
            cosine: fields.text("beta_schedule", "linear")? == "squaredcos_cap_v2",
            clip,
            noise_of_clipped: fields.flag("use_clipped_model_output", false)?,
            set_alpha_to_one: fields.flag("set_alpha_to_one", true)?,
            variance,
            final_sigma,
            solver: read_solver(sampler, fields)?,
            consistency: Consistency {
                original_steps: if sampler == Lcm {
                    let most = trained.min(MAX_STEPS) as u64;
                    fields.whole("original_inference_steps", 50.min(most), 1, most)? as usize
                } else {
                    1
                },
                timestep_scaling: fields.number("timestep_scaling", 10.0, 0.0, 1e6)?,
            },
            training,
        })
    }
}

fn read_training(sampler: Sampler, fields: &Fields<'_>) -> Result<TrainingSchedule> {
    let length = fields.whole("num_train_timesteps", 1000, 1, MAX_TRAIN_TIMESTEPS)? as usize;
    let (default_start, default_end, default_kind) =
        if sampler == Sampler::Lcm { (0.00085, 0.012, "scaled_linear") } else { (0.0001, 0.02, "linear") };
    let start = fields.number("beta_start", default_start, 0.0, 1.0)?;
    let end = fields.number("beta_end", default_end, 0.0, 1.0)?;
    let training = match fields.get("trained_betas") {
        None if fields.get("alphas_cumprod").is_some() => {
            let values = fields.numbers("alphas_cumprod")?.unwrap_or_default();
            if values.len() != length {
                return Err(Error::invalid_file(format!(
                    "alphas_cumprod has {} values, num_train_timesteps is {length}",
                    values.len()
                )));
            }
            TrainingSchedule::from_alphas_cumprod(values)
        }
        Some(Value::Array(betas)) => {
            if betas.len() != length {
                return Err(Error::invalid_file(format!(
                    "trained_betas has {} values, num_train_timesteps is {length}",
                    betas.len()
                )));
            }
            let betas: Option<Vec<f32>> = betas.iter().map(|beta| beta.as_f64().map(|beta| beta as f32)).collect();
            TrainingSchedule::from_betas(&betas.ok_or_else(|| Error::invalid_file("trained_betas holds a non-number"))?)
        }
        Some(other) => Err(Error::invalid_file(format!("trained_betas is {other}, must be a list of numbers"))),
        None => match fields.text("beta_schedule", default_kind)? {
            "linear" => TrainingSchedule::linear(start, end, length),
            "scaled_linear" => TrainingSchedule::scaled_linear(start, end, length),
            "squaredcos_cap_v2" => TrainingSchedule::squared_cosine(length),
            other => Err(unhandled("beta_schedule", other, "linear, scaled_linear, squaredcos_cap_v2")),
        },
    }?;
    if !fields.flag("rescale_betas_zero_snr", false)? {
        return Ok(training);
    }
    let training = training.with_zero_terminal_snr();
    let divides_by_signal = matches!(sampler, Sampler::Euler | Sampler::EulerAncestral | Sampler::DpmMultistep);
    Ok(if divides_by_signal { training.with_least_signal() } else { training })
}

fn read_solver(sampler: Sampler, fields: &Fields<'_>) -> Result<Solver> {
    let mut solver = Solver {
        order: 2,
        kind: SolverType::Midpoint,
        lower_order_final: true,
        euler_at_final: false,
        lambda_min_clipped: f64::NEG_INFINITY,
    };
    if sampler != Sampler::DpmMultistep {
        return Ok(solver);
    }
    match fields.text("algorithm_type", "dpmsolver++")? {
        "dpmsolver++" => {}
        other => return Err(unhandled("algorithm_type", other, "dpmsolver++")),
    }
    solver.kind = match fields.text("solver_type", "midpoint")? {
        "midpoint" => SolverType::Midpoint,
        "heun" => SolverType::Heun,
        other => return Err(unhandled("solver_type", other, "midpoint, heun")),
    };
    solver.order = match fields.whole("solver_order", 2, 1, 3)? {
        3 => return Err(unhandled("solver_order", "3", "1, 2")),
        order => order,
    };
    solver.lower_order_final = fields.flag("lower_order_final", true)?;
    solver.euler_at_final = fields.flag("euler_at_final", false)?;
    solver.lambda_min_clipped = match fields.get("lambda_min_clipped") {
        None => f64::NEG_INFINITY,
        // JSON has no infinity; Python writes the bare word, diffusers' default a quoted one.
        Some(Value::String(text)) if matches!(text.as_str(), "-Infinity" | "-inf") => f64::NEG_INFINITY,
        Some(_) => fields.number("lambda_min_clipped", 0.0, -1e6, 1e6)?,
    };
    Ok(solver)
}

fn refuse_unhandled(sampler: Sampler, fields: &Fields<'_>) -> Result<()> {
    let flags: &[&str] = match sampler {
        Sampler::Ddpm | Sampler::Ddim | Sampler::Lcm => &["thresholding"],
        Sampler::Euler => &["use_exponential_sigmas", "use_beta_sigmas"],
        Sampler::EulerAncestral => &[],
        Sampler::DpmMultistep => &[
            "thresholding",
            "use_exponential_sigmas",
            "use_beta_sigmas",
            "use_lu_lambdas",
            "use_flow_sigmas",
            "use_dynamic_shifting",
        ],
    };
    for name in flags {
        if fields.flag(name, false)? {
            return Err(unhandled(name, "true", "false"));
        }
    }
    if sampler == Sampler::Euler {
        for (name, only) in [("interpolation_type", "linear"), ("timestep_type", "discrete")] {
            match fields.text(name, only)? {
                value if value == only => {}
                other => return Err(unhandled(name, other, only)),
            }
        }
        for name in ["sigma_min", "sigma_max"] {
            if let Some(value) = fields.get(name) {
                return Err(unhandled(name, &value.to_string(), "null"));
            }
        }
    }
    Ok(())
}
