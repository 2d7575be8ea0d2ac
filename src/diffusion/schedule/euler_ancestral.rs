//! Euler's method to a smaller noise ratio, then fresh noise up to the wanted one.

use super::config::SchedulerConfig;
use super::euler::{initial_sigma, step_at, visited};
use super::{Plan, PlanOptions, Step};
use crate::error::Result;

/// In coordinates `x = x_0 + sigma * noise`, with the variance of DDPM's posterior as fresh noise:
///
/// ```text
/// up^2   = sigma'^2 (sigma^2 - sigma'^2) / sigma^2
/// down^2 = sigma'^2 - up^2
/// x'     = x + (x - x_0) / sigma (down - sigma) + up z
/// ```
pub(super) fn plan(config: &SchedulerConfig, options: PlanOptions) -> Result<Plan> {
    let (timesteps, mut sigmas) = visited(config, options.steps);
    sigmas.push(0.0);
    let mut steps: Vec<Step> = Vec::with_capacity(timesteps.len());
    for (index, &t) in timesteps.iter().enumerate() {
        let (sigma, next) = (sigmas[index], sigmas[index + 1]);
        let up = (next * next * (sigma * sigma - next * next) / (sigma * sigma)).max(0.0).sqrt();
        let down = (next * next - up * up).max(0.0).sqrt();
        let mut step = step_at(config, t, sigma);
        step.next_sample = down / sigma;
        step.next_clean = 1.0 - down / sigma;
        step.next_noise = up;
        steps.push(step);
    }
    Ok(Plan { steps, start: options.start, initial_sigma: initial_sigma(config, &sigmas) })
}
