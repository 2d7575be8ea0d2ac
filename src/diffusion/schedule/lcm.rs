//! Latent consistency models: jump to the clean state, then back to a smaller noise (arXiv 2310.04378).

use super::config::SchedulerConfig;
use super::level::Level;
use super::spacing::linspace;
use super::{Plan, PlanOptions, Step};
use crate::error::{Error, Result};

/// Deviation of the data in the boundary condition (arXiv 2310.04378, section 4.1; from arXiv 2303.01469).
const SIGMA_DATA: f64 = 0.5;

/// With `u = timestep_scaling * t` and the boundary condition `f(x, 0) = x`:
///
/// ```text
/// d  = 0.25 / (u^2 + 0.25) x + u / sqrt(u^2 + 0.25) x_0
/// x' = sqrt(a') d + sqrt(1 - a') z,   and x' = d at the last step
/// ```
pub(super) fn plan(config: &SchedulerConfig, options: PlanOptions) -> Result<Plan> {
    let original = config.consistency.original_steps;
    if options.steps > original {
        return Err(Error::invalid_argument(format!(
            "steps is {}, must be in 1..={original} (original_inference_steps of LCMScheduler)",
            options.steps
        )));
    }
    let stride = config.training.len() / original;
    // A subset of the timesteps that the model was distilled on, counted from the noisy end.
    let mut indices = linspace(0.0, original as f64, options.steps + 1);
    indices.truncate(options.steps);
    let timesteps: Vec<usize> =
        indices.into_iter().map(|index| (original - index.floor() as usize) * stride - 1).collect();
    let mut steps = Vec::with_capacity(timesteps.len());
    for (index, &t) in timesteps.iter().enumerate() {
        let here = Level::of_timestep(&config.training, t as f64);
        let mut step = Step::at(t as f64, here.signal(), here.sigma());
        config.prediction.fill(&mut step, here);
        step.clip = config.clip;
        let scaled = t as f64 * config.consistency.timestep_scaling;
        let power = scaled * scaled + SIGMA_DATA * SIGMA_DATA;
        step.denoised_sample = SIGMA_DATA * SIGMA_DATA / power;
        step.denoised_clean = scaled / power.sqrt();
        let (signal, sigma) = match timesteps.get(index + 1) {
            Some(&next) => {
                let there = config.training.alpha_bar(next);
                (there.sqrt(), (1.0 - there).sqrt())
            }
            None => (1.0, 0.0),
        };
        step.next_sample = signal * step.denoised_sample;
        step.next_clean = signal * step.denoised_clean;
        step.next_noise = sigma;
        steps.push(step);
    }
    Ok(Plan { steps, start: options.start, initial_sigma: 1.0 })
}
