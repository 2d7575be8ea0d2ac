//! DPM-Solver++ of order 1 and 2, multistep, data prediction: "DPM++ 2M" (arXiv 2211.01095).

use super::Step;
use super::config::{SchedulerConfig, SolverType, Spacing};
use super::level::{Leg, Level};
use super::spacing::{final_noise_ratio, karras, linspace, trailing};

/// Below this many steps the last one is of first order (`lower_order_final`), which is steadier.
const FEW_STEPS: usize = 15;

/// Each timestep and the next one visited, as noise ratios.
pub(super) fn legs(config: &SchedulerConfig, steps: usize) -> Vec<Leg> {
    let (timesteps, mut ratios) = visited(config, steps);
    ratios.push(final_noise_ratio(config));
    let levels: Vec<Level> = ratios.into_iter().map(Level::of_noise_ratio).collect();
    let leg = |(timestep, pair): (f64, &[Level])| Leg { timestep, here: pair[0], there: pair[1] };
    timesteps.into_iter().zip(levels.windows(2)).map(leg).collect()
}

/// In variance-preserving coordinates, `x = alpha x_0 + s noise` with noise ratio `sigma = s / alpha`,
/// `lambda = -ln sigma`, `h = lambda' - lambda`, `h_0` that of the step before, `r = h_0 / h`:
///
/// ```text
/// order 1:            x' = s' / s x - alpha' (e^-h - 1) c                                  (eq. 6, k = 1)
/// order 2, midpoint:  x' = s' / s x - alpha' (e^-h - 1) (c + (c - c') / (2 r))             (algorithm 2)
/// order 2, heun:      x' = s' / s x - alpha' (e^-h - 1) c + alpha' ((e^-h - 1) / h + 1) (c - c') / r
/// ```
///
/// where `c` is the clean prediction and `c'` that of the step before. Steps without a step before them are of order 1:
/// those for which `fresh` holds.
pub(super) fn steps(config: &SchedulerConfig, legs: &[Leg], fresh: impl Fn(usize) -> bool) -> Vec<Step> {
    let lambda = |level: Level| -libm::log(level.noise_ratio());
    let solver = &config.solver;
    let ends_clean = legs.last().is_some_and(|leg| leg.there.sigma() == 0.0);
    let last_is_first_order =
        solver.euler_at_final || (solver.lower_order_final && legs.len() < FEW_STEPS) || ends_clean;
    let mut steps = Vec::with_capacity(legs.len());
    for (index, &Leg { timestep, here, there }) in legs.iter().enumerate() {
        let mut step = Step::at(timestep, here.signal(), here.sigma());
        config.prediction.fill(&mut step, here);
        // e^-h = sigma' / sigma, which stays exact when the walk ends at sigma' = 0 and h is infinite.
        let decay = there.noise_ratio() / here.noise_ratio() - 1.0;
        step.next_sample = there.sigma() / here.sigma();
        step.next_clean = -there.signal() * decay;
        let first_order = solver.order == 1 || fresh(index) || (index + 1 == legs.len() && last_is_first_order);
        if !first_order && let Some(before) = index.checked_sub(1).and_then(|before| legs.get(before)) {
            let h = lambda(there) - lambda(here);
            let r = (lambda(before.there) - lambda(before.here)) / h;
            let slope = match solver.kind {
                SolverType::Midpoint => -0.5 * there.signal() * decay / r,
                SolverType::Heun => there.signal() * (decay / h + 1.0) / r,
            };
            step.next_clean += slope;
            step.next_previous = -slope;
        }
        steps.push(step);
    }
    steps
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
