//! Which timesteps a walk visits, and the noise ratios there.

use super::config::{FinalSigma, SchedulerConfig, Spacing};

/// Timesteps from noisy to clean (arXiv 2305.08891, table 2). `Linspace` values may be fractional; callers round where
/// their sampler visits whole timesteps only.
pub(super) fn timesteps(config: &SchedulerConfig, steps: usize) -> Vec<f64> {
    let trained = config.training.len();
    match config.spacing {
        Spacing::Linspace => linspace(0.0, (trained - 1) as f64, steps).into_iter().rev().collect(),
        Spacing::Leading => {
            let ratio = trained / steps;
            (0..steps).rev().map(|step| (step * ratio) as f64 + config.steps_offset).collect()
        }
        Spacing::Trailing => trailing(trained as f64, trained as f64 / steps as f64, steps),
    }
}

/// `last, last - ratio, ...` rounded to even, less one: at most `steps` values above zero.
pub(super) fn trailing(last: f64, ratio: f64, steps: usize) -> Vec<f64> {
    let delta = (last - ratio) - last;
    let count = ((last / ratio).ceil() as usize).min(steps);
    (0..count).map(|step| (last + step as f64 * delta).round_ties_even() - 1.0).collect()
}

/// `count` evenly spaced values, both ends included.
pub(super) fn linspace(start: f64, end: f64, count: usize) -> Vec<f64> {
    let step = if count > 1 { (end - start) / (count - 1) as f64 } else { 0.0 };
    let value = |index: usize| if index > 0 && index == count - 1 { end } else { start + index as f64 * step };
    (0..count).map(value).collect()
}

/// Noise ratios from `greatest` down to `least`, evenly spaced in the seventh root (arXiv 2206.00364, eq. 5).
pub(super) fn karras(least: f64, greatest: f64, count: usize) -> Vec<f64> {
    const RHO: f64 = 7.0;
    let (from, to) = (libm::pow(greatest, 1.0 / RHO), libm::pow(least, 1.0 / RHO));
    linspace(0.0, 1.0, count).into_iter().map(|ramp| libm::pow(from + ramp * (to - from), RHO)).collect()
}

/// The noise ratio after the last step.
pub(super) fn final_noise_ratio(config: &SchedulerConfig) -> f64 {
    match config.final_sigma {
        FinalSigma::Zero => 0.0,
        FinalSigma::Least => config.training.noise_ratio(0),
    }
}
