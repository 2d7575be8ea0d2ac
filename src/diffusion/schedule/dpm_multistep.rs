//! DPM-Solver++ of order 1 and 2, multistep, data prediction: "DPM++ 2M" (arXiv 2211.01095).

use super::config::{SchedulerConfig, SolverType, Spacing};
use super::spacing::{final_noise_ratio, karras, linspace, trailing};
use super::{Plan, PlanOptions, Step};
use crate::error::Result;

/// Below this many steps the last one is of first order (`lower_order_final`), which is steadier.
const FEW_STEPS: usize = 15;

/// In variance-preserving coordinates, `x = alpha x_0 + s noise` with noise ratio `sigma = s / alpha`,
/// `lambda = -ln sigma`, `h = lambda' - lambda`, `h_0` that of the step before, `r = h_0 / h`:
///
/// ```text
/// order 1:            x' = s' / s x - alpha' (e^-h - 1) c                                  (eq. 6, k = 1)
/// order 2, midpoint:  x' = s' / s x - alpha' (e^-h - 1) (c + (c - c') / (2 r))             (algorithm 2)
/// order 2, heun:      x' = s' / s x - alpha' (e^-h - 1) c + alpha' ((e^-h - 1) / h + 1) (c - c') / r
/// ```
///
/// where `c` is the clean prediction and `c'` that of the step before. The first step that is run is of order 1.
pub(super) fn plan(config: &SchedulerConfig, options: PlanOptions) -> Result<Plan> {
    let (timesteps, mut sigmas) = visited(config, options.steps);
    sigmas.push(final_noise_ratio(config));
    let count = timesteps.len();
    let lambda = |index: usize| -libm::log(sigmas[index]);
    let mut steps = Vec::with_capacity(count);
    for (index, &t) in timesteps.iter().enumerate() {
        let (alpha, s) = variance_preserving(sigmas[index]);
        let (next_alpha, next_s) = variance_preserving(sigmas[index + 1]);
        let mut step = Step::at(t, alpha, s);
        config.prediction.fill(&mut step);
        // e^-h = sigma' / sigma, which stays exact when the walk ends at sigma' = 0 and h is infinite.
        let decay = sigmas[index + 1] / sigmas[index] - 1.0;
        step.next_sample = next_s / s;
        step.next_clean = -next_alpha * decay;
        let last_is_first_order = config.solver.euler_at_final
            || (config.solver.lower_order_final && count < FEW_STEPS)
            || sigmas[count] == 0.0;
        let first_order =
            config.solver.order == 1 || index <= options.start || (index + 1 == count && last_is_first_order);
        if !first_order {
            let h = lambda(index + 1) - lambda(index);
            let r = (lambda(index) - lambda(index - 1)) / h;
            let slope = match config.solver.kind {
                SolverType::Midpoint => -0.5 * next_alpha * decay / r,
                SolverType::Heun => next_alpha * (decay / h + 1.0) / r,
            };
            step.next_clean += slope;
            step.next_previous = -slope;
        }
        steps.push(step);
    }
    Ok(Plan { steps, start: options.start, initial_sigma: 1.0 })
}

fn variance_preserving(sigma: f64) -> (f64, f64) {
    let alpha = 1.0 / (sigma * sigma + 1.0).sqrt();
    (alpha, sigma * alpha)
}

fn visited(config: &SchedulerConfig, steps: usize) -> (Vec<f64>, Vec<f64>) {
    let training = &config.training;
    if config.karras {
        let sigmas = karras(training.noise_ratio(0), training.noise_ratio(training.len() - 1), steps);
        let whole = |t: f64| if config.cosine { t.trunc() } else { t.round_ties_even() };
        let timesteps = sigmas.iter().map(|sigma| whole(training.timestep_of_noise_ratio(*sigma))).collect();
        return (timesteps, sigmas);
    }
    // Timesteps noisier than the clipped log-SNR are not visited.
    let log_snr = |t: usize| -libm::log(training.noise_ratio(t));
    let clipped = (0..training.len()).filter(|t| log_snr(*t) < config.solver.lambda_min_clipped).count();
    let end = training.len() - clipped.min(training.len() - 1);
    let timesteps: Vec<f64> = match config.spacing {
        Spacing::Linspace => {
            let all = linspace(0.0, (end - 1) as f64, steps + 1);
            all.into_iter().rev().take(steps).map(f64::round_ties_even).collect()
        }
        Spacing::Leading => {
            let ratio = end / (steps + 1);
            (1..=steps).rev().map(|step| (step * ratio) as f64 + config.steps_offset).collect()
        }
        Spacing::Trailing => trailing(end as f64, training.len() as f64 / steps as f64, steps),
    };
    let sigmas = timesteps.iter().map(|t| training.noise_ratio_at(*t)).collect();
    (timesteps, sigmas)
}
