//! DDIM: the non-Markovian walk whose noise can be turned down to none (arXiv 2010.02502).

use super::config::SchedulerConfig;
use super::level::{Leg, Level};
use super::spacing::timesteps;
use super::{PlanOptions, Step};

/// Each timestep, and the one `num_train_timesteps / steps` timesteps earlier; past the first there is no noise, or that
/// of the first timestep without `set_alpha_to_one`.
pub(super) fn legs(config: &SchedulerConfig, steps: usize) -> Vec<Leg> {
    let stride = (config.training.len() / steps) as f64;
    let after_last = if config.set_alpha_to_one { Level::CLEAN } else { Level::of_timestep(&config.training, 0.0) };
    let leg = |timestep: f64| {
        let there = match timestep - stride {
            previous if previous >= 0.0 => Level::of_timestep(&config.training, previous),
            _ => after_last,
        };
        Leg { timestep, here: Level::of_timestep(&config.training, timestep), there }
    };
    timesteps(config, steps).into_iter().map(f64::round_ties_even).map(leg).collect()
}

/// With `e` the noise that the prediction stands for, and `v` the variance of DDPM's posterior (arXiv 2010.02502, eq. 12
/// and 16):
///
/// ```text
/// s^2 = eta^2 v
/// x'  = signal' x_0 + sqrt(sigma'^2 - s^2) e + s z
/// ```
///
/// Clipping changes `x_0` and leaves `e` as predicted, unless the config says `use_clipped_model_output`: then `e` is the
/// noise between the state and the clipped `x_0`.
pub(super) fn step(config: &SchedulerConfig, options: PlanOptions, leg: Leg) -> Step {
    let Leg { timestep, here, there } = leg;
    let mut step = Step::at(timestep, here.signal(), here.sigma());
    config.prediction.fill(&mut step, here);
    step.clip = config.clip;
    let deviation = options.eta * here.posterior_at(there).variance.sqrt();
    let direction = (there.sigma() * there.sigma() - deviation * deviation).max(0.0).sqrt();
    step.next_clean = there.signal();
    step.next_noise = deviation;
    if config.noise_of_clipped {
        step.next_sample = direction / here.sigma();
        step.next_clean -= direction * here.signal() / here.sigma();
    } else {
        let (noise_sample, noise_prediction) = config.prediction.noise(here);
        step.next_sample = direction * noise_sample;
        step.next_prediction = direction * noise_prediction;
    }
    step
}
