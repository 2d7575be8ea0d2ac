//! Euler's method on the probability-flow equation in noise-ratio coordinates (arXiv 2206.00364, algorithm 2, no churn).

use super::config::{Prediction, SchedulerConfig, Spacing};
use super::spacing::{final_noise_ratio, karras, timesteps};
use super::{Plan, PlanOptions, Step};
use crate::error::Result;

/// In coordinates `x = x_0 + sigma * noise`:
///
/// ```text
/// x' = x + (x - x_0) / sigma (sigma' - sigma)
/// ```
pub(super) fn plan(config: &SchedulerConfig, options: PlanOptions) -> Result<Plan> {
    let (timesteps, mut sigmas) = visited(config, options.steps);
    sigmas.push(final_noise_ratio(config));
    let mut steps = Vec::with_capacity(timesteps.len());
    for (index, &t) in timesteps.iter().enumerate() {
        let (sigma, next) = (sigmas[index], sigmas[index + 1]);
        let mut step = step_at(config, t, sigma);
        step.next_sample = next / sigma;
        step.next_clean = 1.0 - next / sigma;
        steps.push(step);
    }
    Ok(Plan { steps, start: options.start, initial_sigma: initial_sigma(config, &sigmas) })
}

/// Timesteps and their noise ratios, with Karras ratios between the greatest and the least visited if asked for.
pub(super) fn visited(config: &SchedulerConfig, steps: usize) -> (Vec<f64>, Vec<f64>) {
    // The model is told timesteps in single precision, and the ratios are those at the rounded ones.
    let timesteps: Vec<f64> = timesteps(config, steps).into_iter().map(|t| f64::from(t as f32)).collect();
    let sigmas: Vec<f64> = timesteps.iter().map(|t| config.training.noise_ratio_at(*t)).collect();
    match (config.karras, sigmas.first(), sigmas.last()) {
        (true, Some(&greatest), Some(&least)) => {
            let sigmas = karras(least, greatest, steps);
            (sigmas.iter().map(|sigma| config.training.timestep_of_noise_ratio(*sigma)).collect(), sigmas)
        }
        _ => (timesteps, sigmas),
    }
}

/// Everything but the next state: the model sees `x / sqrt(sigma^2 + 1)`, a variance-preserving state.
pub(super) fn step_at(config: &SchedulerConfig, timestep: f64, sigma: f64) -> Step {
    let power = sigma * sigma + 1.0;
    let mut step = Step::at(timestep, 1.0, sigma);
    step.input_scale = 1.0 / power.sqrt();
    (step.clean_sample, step.clean_prediction) = match config.prediction {
        Prediction::Epsilon => (1.0, -sigma),
        Prediction::Velocity => (1.0 / power, -sigma / power.sqrt()),
        Prediction::Sample => (0.0, 1.0),
    };
    step
}

/// Leading spacing does not begin at pure noise, so its start holds the signal's unit variance too.
pub(super) fn initial_sigma(config: &SchedulerConfig, sigmas: &[f64]) -> f64 {
    let greatest = sigmas.iter().copied().fold(0.0, f64::max);
    match config.spacing {
        Spacing::Linspace | Spacing::Trailing => greatest,
        Spacing::Leading => (greatest * greatest + 1.0).sqrt(),
    }
}
