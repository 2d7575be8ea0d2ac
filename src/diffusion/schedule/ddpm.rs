//! DDPM: ancestral sampling from the posterior `q(x_{t-1} | x_t, x_0)` (arXiv 2006.11239, eq. 6 and 7).

use super::Step;
use super::config::{SchedulerConfig, Variance};
use super::level::{Leg, Level};
use super::spacing::timesteps;

/// Each timestep and the next one visited; there is no noise after the last.
pub(super) fn legs(config: &SchedulerConfig, steps: usize) -> Vec<Leg> {
    let timesteps: Vec<f64> = timesteps(config, steps).into_iter().map(f64::round_ties_even).collect();
    let level = |t: f64| Level::of_timestep(&config.training, t);
    let there = |index: usize| timesteps.get(index + 1).map_or(Level::CLEAN, |next| level(*next));
    let leg =
        |(index, timestep): (usize, &f64)| Leg { timestep: *timestep, here: level(*timestep), there: there(index) };
    timesteps.iter().enumerate().map(leg).collect()
}

/// The posterior's mean and, as noise, its variance ("fixed_small") or the kernel's ("fixed_large"); no noise at timestep
/// 0. Without fading, with `a = alpha_bar_t`, `a'` that of the next timestep, `alpha = a / a'` and `beta = 1 - alpha`:
///
/// ```text
/// x' = sqrt(a') beta / (1 - a) x_0 + sqrt(alpha) (1 - a') / (1 - a) x + s z
/// s^2 = (1 - a') / (1 - a) beta   ("fixed_small"),   or beta   ("fixed_large")
/// ```
pub(super) fn step(config: &SchedulerConfig, leg: Leg) -> Step {
    let Leg { timestep, here, there } = leg;
    let posterior = here.posterior_at(there);
    let variance = match config.variance {
        Variance::FixedSmall => posterior.variance.max(1e-20),
        Variance::FixedLarge => there.kernel_to(here).variance,
    };
    let mut step = Step::at(timestep, here.signal(), here.sigma());
    config.prediction.fill(&mut step, here);
    step.clip = config.clip;
    step.next_sample = posterior.state;
    step.next_clean = posterior.clean;
    step.next_noise = if timestep > 0.0 { variance.sqrt() } else { 0.0 };
    step
}
