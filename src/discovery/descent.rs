//! AdamW (Loshchilov and Hutter, arXiv 1711.05101) with the step sizes that tuning and textual inversion share: they rise
//! over the first steps and fall to 0 by a half cosine. It knows no network.

use super::search::Numbers;
use crate::error::{Error, Result};
use crate::memory::zeroed;

/// Steps over which the step size rises.
pub const WARM_UP: usize = 10;

/// Adam's shares of the past.
const BETAS: (f32, f32) = (0.9, 0.99);

/// How far and how fast.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Pace {
    pub steps: usize,
    /// The largest step size.
    pub rate: f32,
    /// The share of a value that each step takes away, times the step size.
    pub decay: f32,
}

impl Pace {
    /// Errors: `InvalidArgument` for no step, or a rate or decay outside its range.
    pub(super) fn check(self, of: &str) -> Result<()> {
        let Self { steps, rate, decay } = self;
        if steps == 0 || !(rate > 0.0 && rate.is_finite()) || !(decay >= 0.0 && decay.is_finite()) {
            return Err(Error::invalid_argument(format!(
                "{steps} steps of {of} at rate {rate} with decay {decay}: there must be a step, the rate above 0 and \
                 the decay not below"
            )));
        }
        Ok(())
    }
}

/// Values on their way down a loss, between two steps: all that the coming ones depend on.
pub(super) struct Descent {
    /// What a checkpoint puts before the names of its numbers.
    name: &'static str,
    pace: Pace,
    values: Vec<f32>,
    mean: Vec<f32>,
    square: Vec<f32>,
    losses: Vec<f64>,
}

impl Descent {
    /// Begins at these values.
    pub(super) fn new(name: &'static str, values: Vec<f32>, pace: Pace) -> Result<Self> {
        let (mean, square) = (zeroed(values.len())?, zeroed(values.len())?);
        Ok(Self { name, pace, values, mean, square, losses: Vec::new() })
    }

    pub(super) fn values(&self) -> &[f32] {
        &self.values
    }

    /// The loss of each step so far.
    pub(super) fn losses(&self) -> &[f64] {
        &self.losses
    }

    pub(super) fn is_done(&self) -> bool {
        self.losses.len() >= self.pace.steps
    }

    /// Makes the next step, by the loss at the present values and its slope with respect to each; a value without a slope
    /// stays.
    pub(super) fn step(&mut self, loss: f64, slope: impl Fn(usize) -> Option<f32>) {
        let number = self.losses.len();
        self.losses.push(loss);
        let (rate, step) = (self.rate(number), number as i32 + 1);
        let corrections = (1.0 - BETAS.0.powi(step), 1.0 - BETAS.1.powi(step));
        for at in 0..self.values.len() {
            let Some(slope) = slope(at) else { continue };
            self.mean[at] += (1.0 - BETAS.0) * (slope - self.mean[at]);
            self.square[at] += (1.0 - BETAS.1) * (slope * slope - self.square[at]);
            let root = (self.square[at] / corrections.1).sqrt() + 1e-12;
            let value = self.values[at];
            self.values[at] = value - rate * (self.mean[at] / corrections.0 / root + self.pace.decay * value);
        }
    }

    fn rate(&self, step: usize) -> f32 {
        let risen = ((step + 1) as f64 / WARM_UP as f64).min(1.0);
        let fallen = (std::f64::consts::PI * (step + 1) as f64 / self.pace.steps as f64).cos();
        (f64::from(self.pace.rate) * risen * 0.5 * (1.0 + fallen)) as f32
    }

    /// The name of its losses in a checkpoint.
    pub(super) fn losses_name(&self) -> String {
        format!("{}.losses", self.name)
    }

    /// All that it remembers beside the losses: what a checkpoint holds.
    pub(super) fn memory(&mut self) -> Vec<(String, Numbers<'_>)> {
        let named = |part: &str| format!("{}.{part}", self.name);
        vec![
            (named("values"), Numbers::F32(&mut self.values)),
            (named("mean"), Numbers::F32(&mut self.mean)),
            (named("square"), Numbers::F32(&mut self.square)),
        ]
    }

    /// Goes on behind these losses; [`Descent::memory`] must have been set to what it was there.
    ///
    /// Errors: [`crate::Status::InvalidFile`] for more losses than steps.
    pub(super) fn resume(&mut self, losses: Vec<f64>) -> Result<()> {
        if losses.len() > self.pace.steps {
            return Err(Error::invalid_file(format!("{} losses of {} steps", losses.len(), self.pace.steps)));
        }
        self.losses = losses;
        Ok(())
    }
}
