//! Tuning: new values for the weights of a found set and for no other (the fine-tuning of Cones, arXiv 2303.05125).
//!
//! The values start at zero, where a set shuts its weights, or where an earlier tuning left them, and are learnt by AdamW in
//! the unit of each weight: the standard deviation of its projection. Where a few levels will keep them, the second half of
//! the steps sees them so, with slopes passed straight through to the values behind (Bengio et al., arXiv 1308.3432): they
//! settle among their levels, instead of being rounded once it is too late to mend. This file knows no network.

use super::descent::{Descent, Pace};
use super::search::{Loss, finite_slope};
use crate::concept::Precision;
use crate::error::{Error, Result, Status};
use crate::memory::collected;

/// How a set's values are learnt.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TuneOptions {
    /// Steps, a batch each, at least 1.
    pub steps: usize,
    /// The largest step size, in standard deviations of a projection's weights; above 0. It rises over the first
    /// [`super::WARM_UP`] steps and falls to 0 by a half cosine.
    pub rate: f32,
    /// The share of a value that each step takes away, times the step size; 0 or above.
    pub decay: f32,
    /// How the values are kept, and seen by the second half of the steps if those are few levels.
    pub precision: Precision,
}

impl Default for TuneOptions {
    fn default() -> Self {
        Self { steps: 200, rate: 0.1, decay: 0.01, precision: Precision::F16 }
    }
}

impl TuneOptions {
    fn pace(&self) -> Pace {
        Pace { steps: self.steps, rate: self.rate, decay: self.decay }
    }

    /// Errors: [`crate::Status::InvalidArgument`] for no step, or a rate or decay outside its range.
    pub fn check(&self) -> Result<()> {
        self.pace().check("tuning")
    }
}

/// Weights that are tuned.
#[derive(Clone, Debug, Default)]
pub struct Members {
    /// Their untouched weights.
    pub weights: Vec<f32>,
    /// What a step of 1 means for each.
    pub units: Vec<f32>,
    /// The values that they begin at, in the unit of the weights.
    pub values: Vec<f32>,
    /// How many of them each projection has, in their order: those share their levels.
    pub parts: Vec<usize>,
}

/// A tuning between two steps: all that the coming ones depend on.
pub struct Tuning {
    weights: Vec<f32>,
    units: Vec<f32>,
    parts: Vec<usize>,
    /// The values in units.
    descent: Descent,
    options: TuneOptions,
}

impl Tuning {
    /// Tunes these weights.
    ///
    /// Errors: [`crate::Status::InvalidArgument`] for no member; those of [`TuneOptions::check`].
    pub fn new(members: Members, options: TuneOptions) -> Result<Self> {
        options.check()?;
        let Members { weights, units, values, parts } = members;
        if weights.is_empty() {
            return Err(Error::invalid_argument("the search found no weight whose shutting lowers the loss, to tune"));
        }
        if [units.len(), values.len(), parts.iter().sum()].iter().any(|&count| count != weights.len()) {
            let counts = (weights.len(), units.len(), values.len());
            let what = format!("{counts:?} weights, units and values of members, in parts of {parts:?}");
            return Err(Error::invalid_argument(what));
        }
        // A projection of equal weights has no unit: its values are zero.
        let in_units = |(value, unit): (&f32, &f32)| if *unit == 0.0 { 0.0 } else { value / unit };
        let start = collected(values.iter().zip(&units).map(in_units))?;
        let descent = Descent::new("tuned", start, options.pace())?;
        Ok(Self { weights, units, parts, descent, options })
    }

    /// The loss of each step so far.
    pub fn losses(&self) -> &[f64] {
        self.descent.losses()
    }

    /// Whether it has made all steps.
    pub fn is_done(&self) -> bool {
        self.descent.is_done()
    }

    /// Makes the next step, by the loss at scales of the members. It is told the step's number, from 0.
    ///
    /// Errors: those of the loss; [`crate::Status::NotFinite`] for a loss or slope that is not finite, naming the step. The
    /// tuning is then as before.
    pub fn step(&mut self, loss: Loss<'_>) -> Result<()> {
        let number = self.losses().len();
        let slope = finite_slope(loss, &self.scales()?, number, || format!("step {number} of the tuning"))?;
        let Self { weights, units, descent, .. } = self;
        // dL/dv = dL/ds / W, as v = s W; in units of the projection times the unit.
        descent.step(slope.loss, |at| match weights[at] {
            0.0 => None,
            weight => Some(slope.scales[at] / weight * units[at]),
        });
        Ok(())
    }

    /// The values so far, in the unit of the weights.
    ///
    /// Errors: [`crate::Status::OutOfMemory`].
    pub fn values(&self) -> Result<Vec<f32>> {
        collected(self.descent.values().iter().zip(&self.units).map(|(value, unit)| value * unit))
    }

    /// Where the loss of the next step is wanted.
    fn scales(&self) -> Result<Vec<f32>> {
        let mut values = self.seen()?;
        let each = values.iter_mut().zip(&self.weights);
        each.for_each(|(value, weight)| *value = if *weight == 0.0 { 0.0 } else { *value / weight });
        Ok(values)
    }

    /// The values that the next step sees: among a few levels, in the second half of the steps.
    fn seen(&self) -> Result<Vec<f32>> {
        let mut values = self.values()?;
        if self.options.precision.is_coarse() && 2 * self.losses().len() >= self.options.steps {
            if values.iter().any(|value| !value.is_finite()) {
                // Levels are made of finite values, and would hide it.
                let what = format!("a value is not finite before step {} of the tuning", self.losses().len());
                return Err(Error::new(Status::NotFinite, what));
            }
            let mut rest = values.as_mut_slice();
            for &part in &self.parts {
                let (own, others) = rest.split_at_mut(part);
                self.options.precision.round(own)?;
                rest = others;
            }
        }
        Ok(values)
    }

    /// What a checkpoint holds of it.
    pub(super) fn descent_mut(&mut self) -> &mut Descent {
        &mut self.descent
    }
}

#[cfg(test)]
mod tests {
    use super::super::search::Slope;
    use super::*;

    const WEIGHTS: [f32; 3] = [2.0, -0.5, 0.25];
    const GOAL: [f32; 3] = [0.75, 0.5, -1.5];

    /// L = 1/2 |theta - goal|² with theta = s theta_0.
    fn quadratic(scales: &[f32], _: usize) -> Result<Slope> {
        let apart: Vec<f32> = (0..3).map(|at| scales[at] * WEIGHTS[at] - GOAL[at]).collect();
        let loss = apart.iter().map(|apart| f64::from(*apart).powi(2) / 2.0).sum();
        Ok(Slope { loss, scales: apart.iter().zip(WEIGHTS).map(|(apart, weight)| apart * weight).collect() })
    }

    fn tuning(count: usize, options: TuneOptions) -> Result<Tuning> {
        let (weights, units, values) = (WEIGHTS[..count].to_vec(), vec![0.5; count], vec![0.0; count]);
        Tuning::new(Members { weights, units, values, parts: vec![count] }, options)
    }

    #[test]
    fn values_find_the_minimum() {
        let mut tuned = tuning(3, TuneOptions { decay: 0.0, ..TuneOptions::default() }).unwrap();
        let mut seen = Vec::new();
        while !tuned.is_done() {
            tuned
                .step(&mut |scales: &[f32], number: usize| {
                    seen.push(number);
                    quadratic(scales, number)
                })
                .unwrap();
        }
        assert_eq!(seen, (0..200).collect::<Vec<_>>());
        assert!(tuned.values().unwrap().iter().zip(&GOAL).all(|(value, goal)| (value - goal).abs() < 1e-3));
        assert_eq!(tuned.losses()[0], 0.5 * (0.75f64.powi(2) + 0.25 + 2.25), "the first batch sees them shut");
    }

    #[test]
    fn the_second_half_sees_values_among_their_levels() {
        let options = TuneOptions { precision: Precision::Binary, decay: 0.0, ..TuneOptions::default() };
        let mut tuned = tuning(3, options).unwrap();
        let mut distinct = Vec::new();
        while !tuned.is_done() {
            tuned
                .step(&mut |scales: &[f32], number: usize| {
                    let mut values: Vec<f32> =
                        scales.iter().zip(WEIGHTS).map(|(scale, weight)| scale * weight).collect();
                    values.sort_by(f32::total_cmp);
                    values.dedup_by(|a, b| (*a - *b).abs() < 1e-6);
                    distinct.push(values.len());
                    quadratic(scales, number)
                })
                .unwrap();
        }
        assert_eq!(distinct[99..], [&[3][..], &[2; 100]].concat());
        // Levels of -1.5 and of the mean of 0.75 and 0.5: straight through, both of these values still go to their own goals.
        let last = quadratic(&tuned.scales().unwrap(), 0).unwrap().loss;
        assert!((last - 0.125f64.powi(2)).abs() < 1e-3, "{last}");
        // Levels are those of a projection: where each has at most two values, all are as they were.
        let options = TuneOptions { steps: 2, ..options };
        let (weights, units) = (WEIGHTS.to_vec(), vec![0.5; 3]);
        let members = Members { weights, units, values: vec![0.75, 0.5, -1.5], parts: vec![2, 0, 1] };
        let mut tuned = Tuning::new(members, options).unwrap();
        tuned.step(&mut quadratic).unwrap();
        assert_eq!(tuned.seen().unwrap(), tuned.values().unwrap());
    }

    #[test]
    fn what_is_out_of_range_or_not_finite_is_refused() {
        let good = TuneOptions::default();
        for (count, options) in [
            (0, good),
            (1, TuneOptions { steps: 0, ..good }),
            (1, TuneOptions { rate: 0.0, ..good }),
            (1, TuneOptions { rate: f32::NAN, ..good }),
            (1, TuneOptions { decay: -1.0, ..good }),
        ] {
            assert_eq!(tuning(count, options).err().unwrap().status(), Status::InvalidArgument);
        }
        let mut tuned = tuning(1, good).unwrap();
        let error = tuned.step(&mut |_: &[f32], _| Ok(Slope { loss: f64::NAN, scales: vec![0.0; 1] })).unwrap_err();
        assert!(error.status() == Status::NotFinite && error.to_string().contains("step 0 of the tuning"), "{error}");
        assert!(tuned.losses().is_empty());
    }
}
