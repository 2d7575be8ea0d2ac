//! DDPM: ancestral sampling from the posterior `q(x_{t-1} | x_t, x_0)` (arXiv 2006.11239, eq. 6 and 7).

use super::config::{SchedulerConfig, Variance};
use super::spacing::timesteps;
use super::{Plan, PlanOptions, Step};
use crate::error::Result;

/// With `a = alpha_bar_t`, `a' = alpha_bar` of the next timestep visited (1 after the last), `alpha = a / a'` and
/// `beta = 1 - alpha`:
///
/// ```text
/// x' = sqrt(a') beta / (1 - a) x_0 + sqrt(alpha) (1 - a') / (1 - a) x + s z
/// s^2 = (1 - a') / (1 - a) beta   ("fixed_small"),   or beta   ("fixed_large");   no noise at timestep 0
/// ```
pub(super) fn plan(config: &SchedulerConfig, options: PlanOptions) -> Result<Plan> {
    let timesteps: Vec<f64> = timesteps(config, options.steps).into_iter().map(f64::round_ties_even).collect();
    let alpha_bar = |t: f64| config.training.alpha_bar(t as usize);
    let mut steps = Vec::with_capacity(timesteps.len());
    for (index, &t) in timesteps.iter().enumerate() {
        let here = alpha_bar(t);
        let there = timesteps.get(index + 1).map_or(1.0, |next| alpha_bar(*next));
        let alpha = here / there;
        let beta = 1.0 - alpha;
        let variance = match config.variance {
            Variance::FixedSmall => ((1.0 - there) / (1.0 - here) * beta).max(1e-20),
            Variance::FixedLarge => beta,
        };
        let mut step = Step::at(t, here.sqrt(), (1.0 - here).sqrt());
        config.prediction.fill(&mut step);
        step.clip = config.clip;
        step.next_sample = alpha.sqrt() * (1.0 - there) / (1.0 - here);
        step.next_clean = there.sqrt() * beta / (1.0 - here);
        step.next_noise = if t > 0.0 { variance.sqrt() } else { 0.0 };
        steps.push(step);
    }
    Ok(Plan { steps, start: options.start, initial_sigma: 1.0 })
}
