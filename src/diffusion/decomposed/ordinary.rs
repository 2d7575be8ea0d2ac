//! Ordinary models of smaller pictures at the later stages of a process that they were not trained for.
//!
//! With `m` the means of blocks of `2^k x 2^k` pixels, the coordinates of stage `k` are `y = signal 2^k m + sigma noise`.
//! Divided by `n = hypot(2^k signal, sigma)`, that is what a model of pictures of that size is trained on, at the *effective*
//! signal power
//!
//! ```text
//! alpha_bar' = (2^k signal)^2 / n^2
//! ```
//!
//! which is that of a cleaner timestep: block means keep the picture and lose noise. Nothing may fade, as no ordinary model
//! has seen faded detail; the process is that of subspace diffusion (arXiv 2205.01490).

use super::super::schedule::{Prediction, Step, TrainingSchedule};

/// Makes a step of stage `stage` one for the prediction of an ordinary model: it is told the effective timestep, sees the
/// state times `1 / n`, and its prediction `p` stands for `q = of_state y + of_prediction p`, which the step was made for.
pub(super) fn serve(step: &mut Step, stage: usize, training: &TrainingSchedule, prediction: Prediction) {
    let unit = (1_u64 << stage) as f64;
    let norm = libm::hypot(unit * step.signal, step.sigma);
    let (of_state, of_prediction) = match prediction {
        // The noise of the coordinates is that of the means.
        Prediction::Epsilon => (0.0, 1.0),
        Prediction::Sample => (0.0, unit),
        // signal noise - sigma 2^k m, of the noise and the means that p and y / n stand for.
        Prediction::Velocity => (step.signal * step.sigma * (1.0 - unit * unit) / (norm * norm), unit / norm),
    };
    step.timestep = training.timestep_of_noise_ratio(step.sigma / (unit * step.signal));
    step.input_scale = 1.0 / norm;
    step.clean_sample += of_state * step.clean_prediction;
    step.clean_prediction *= of_prediction;
    step.next_sample += of_state * step.next_prediction;
    step.next_prediction *= of_prediction;
}
