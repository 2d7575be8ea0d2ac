//! DDIM: the non-Markovian walk whose noise can be turned down to none (arXiv 2010.02502).

use super::config::{Prediction, SchedulerConfig};
use super::spacing::timesteps;
use super::{Plan, PlanOptions, Step};
use crate::error::Result;

/// With `a = alpha_bar_t`, `a'` the one `num_train_timesteps / steps` timesteps earlier (past the first: 1, or
/// `alpha_bar_0` without `set_alpha_to_one`), `e` the noise that the prediction stands for (arXiv 2010.02502, eq. 12, 16):
///
/// ```text
/// s^2 = eta^2 (1 - a') / (1 - a) (1 - a / a')
/// x'  = sqrt(a') x_0 + sqrt(1 - a' - s^2) e + s z
/// ```
///
/// Clipping changes `x_0` and leaves `e` as predicted.
pub(super) fn plan(config: &SchedulerConfig, options: PlanOptions) -> Result<Plan> {
    let stride = config.training.len() / options.steps;
    let after_last = if config.set_alpha_to_one { 1.0 } else { config.training.alpha_bar(0) };
    let mut steps = Vec::with_capacity(options.steps);
    for t in timesteps(config, options.steps).into_iter().map(f64::round_ties_even) {
        let here = config.training.alpha_bar(t as usize);
        let previous = t - stride as f64;
        let there = if previous >= 0.0 { config.training.alpha_bar(previous as usize) } else { after_last };
        let deviation = options.eta * ((1.0 - there) / (1.0 - here) * (1.0 - here / there)).sqrt();
        let (signal, sigma) = (here.sqrt(), (1.0 - here).sqrt());
        let mut step = Step::at(t, signal, sigma);
        config.prediction.fill(&mut step);
        step.clip = config.clip;
        let (noise_from_sample, noise_from_prediction) = match config.prediction {
            Prediction::Epsilon => (0.0, 1.0),
            Prediction::Velocity => (sigma, signal),
            Prediction::Sample => (1.0 / sigma, -signal / sigma),
        };
        let direction = (1.0 - there - deviation * deviation).max(0.0).sqrt();
        step.next_clean = there.sqrt();
        step.next_sample = direction * noise_from_sample;
        step.next_prediction = direction * noise_from_prediction;
        step.next_noise = deviation;
        steps.push(step);
    }
    Ok(Plan { steps, start: options.start, initial_sigma: 1.0 })
}
