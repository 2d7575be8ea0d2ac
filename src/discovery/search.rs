//! Searches for concept neurons: which scales to set to zero so that a loss falls.
//!
//! A loss is any function of scales `s [N]`; `s = 1` is the untouched network. The derivative `dL/ds_i` at `s = 1` is
//! `theta_i dL/dtheta_i`, the first-order saliency (Cones, arXiv 2303.05125): where it is positive, shrinking weight `i`
//! lowers the loss. [`Method::Algorithm1`] is the paper's; the budgets, the gradual search and the learnt mask are ours.
//! This file knows no network.

use crate::error::{Error, Result, Status};

/// What one batch says at some scales.
pub struct Slope {
    /// The loss.
    pub loss: f64,
    /// `dL/ds`, `[N]`.
    pub scales: Vec<f32>,
}

/// The loss of batch number `.1` at scales `.0 [N]`.
pub type Loss<'a> = &'a mut dyn FnMut(&[f32], usize) -> Result<Slope>;

/// How neurons are searched for.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Method {
    /// Algorithm 1 of Cones: the mean of `a_k = theta_k g_k` along `theta_{k+1} = theta_k (1 - rho a_k)`. With `rho = 0`
    /// it is the mean saliency.
    Algorithm1 {
        /// Step size; 2e-5 in the literature.
        rho: f32,
    },
    /// Shuts in stages of geometrically growing size and scores the open weights anew between them.
    Gradual {
        /// Stages, at least 1; the batches are shared out among them.
        stages: usize,
    },
    /// A scale in `[0, 1]` per weight, learnt by Adam; a weight is shut while its scale is below one half. The loss sees
    /// the binary mask, its gradient is passed straight through.
    LearntMask {
        /// Step size of Adam, about 0.04.
        rate: f32,
        /// The price of a shut weight, added to the loss as `penalty * sum(1 - s)`.
        penalty: f32,
    },
}

impl Default for Method {
    fn default() -> Self {
        Self::LearntMask { rate: 0.04, penalty: 0.0 }
    }
}

impl Method {
    /// As a concept file names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Algorithm1 { rho: 0.0 } => "saliency",
            Self::Algorithm1 { .. } => "algorithm-1",
            Self::Gradual { .. } => "gradual",
            Self::LearntMask { .. } => "learnt-mask",
        }
    }
}

/// What decides how many weights are shut.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bound {
    /// At most so many, those that the method ranks highest; fewer where fewer would lower the loss.
    Count(usize),
    /// Those whose mean score reaches tau; [`Method::Algorithm1`] only.
    Threshold(f64),
}

/// What a search found.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// Whether each weight is shut, `[N]`.
    pub shut: Vec<bool>,
    /// The loss of each batch.
    pub losses: Vec<f64>,
    /// The correlation of the scores of even and odd batches: near 1 when more batches would change little. NaN where a
    /// method has no such scores.
    pub agreement: f64,
}

/// Runs `batches` batches of a search over `count` weights. The same losses give the same set.
///
/// Errors: those of the loss; `InvalidArgument` for no batch, no weight, a threshold with a method that has none, or a
/// learnt mask with too few batches for its rate;
/// `NotFinite` for a loss or slope that is not finite, naming the batch.
pub fn search(loss: Loss<'_>, count: usize, batches: usize, method: Method, bound: Bound) -> Result<Found> {
    if count == 0 || batches == 0 {
        return Err(Error::invalid_argument(format!("a search over {count} weights in {batches} batches")));
    }
    let mut finite = |scales: &[f32], batch: usize| {
        let slope = loss(scales, batch)?;
        match slope.loss.is_finite() && slope.scales.iter().all(|value| value.is_finite()) {
            true => Ok(slope),
            false => Err(Error::new(
                Status::NotFinite,
                format!("batch {batch} of the search: the loss is {} or its gradient is not finite", slope.loss),
            )),
        }
    };
    match (method, bound) {
        (Method::Algorithm1 { rho }, bound) => algorithm_1(&mut finite, count, batches, f64::from(rho), bound),
        (Method::Gradual { stages }, Bound::Count(budget)) => {
            gradual(&mut finite, count, batches, stages.clamp(1, batches), budget)
        }
        (Method::LearntMask { rate, .. }, _) if f64::from(rate) * batches as f64 <= 0.5 => {
            Err(Error::invalid_argument(format!(
                "{batches} batches can't bring a scale from 1 to one half in steps of {rate}: a learnt mask needs more \
                 than {} batches",
                (0.5 / rate) as usize
            )))
        }
        (Method::LearntMask { rate, penalty }, Bound::Count(budget)) => {
            learnt_mask(&mut finite, count, batches, rate, penalty, budget)
        }
        (method, Bound::Threshold(_)) => {
            Err(Error::invalid_argument(format!("{method:?} takes a number of weights, not a threshold")))
        }
    }
}

fn algorithm_1(loss: Loss<'_>, count: usize, batches: usize, rho: f64, bound: Bound) -> Result<Found> {
    let mut scales = vec![1f64; count];
    let mut halves = [vec![0f64; count], vec![0f64; count]];
    let mut found = Found::default();
    for batch in 0..batches {
        let narrow: Vec<f32> = scales.iter().map(|&scale| scale as f32).collect();
        let slope = loss(&narrow, batch)?;
        found.losses.push(slope.loss);
        let half = &mut halves[batch % 2];
        for ((sum, scale), slope) in half.iter_mut().zip(&mut scales).zip(&slope.scales) {
            let score = *scale * f64::from(*slope);
            *sum += score;
            *scale *= 1.0 - rho * score;
        }
    }
    found.agreement = if batches > 1 { correlation(&halves[0], &halves[1]) } else { f64::NAN };
    let scores: Vec<f64> = halves[0].iter().zip(&halves[1]).map(|(a, b)| (a + b) / batches as f64).collect();
    found.shut = match bound {
        Bound::Threshold(tau) => scores.iter().map(|&score| score >= tau).collect(),
        Bound::Count(budget) => largest(&scores, budget),
    };
    Ok(found)
}

fn gradual(loss: Loss<'_>, count: usize, batches: usize, stages: usize, budget: usize) -> Result<Found> {
    let mut found = Found { shut: vec![false; count], agreement: f64::NAN, ..Found::default() };
    let mut batch = 0;
    for stage in 1..=stages {
        let goal = (budget as f64).powf(stage as f64 / stages as f64).round() as usize;
        let mut scores = vec![0f64; count];
        let scales: Vec<f32> = found.shut.iter().map(|&shut| f32::from(u8::from(!shut))).collect();
        while batch < batches * stage / stages {
            let slope = loss(&scales, batch)?;
            found.losses.push(slope.loss);
            scores.iter_mut().zip(&slope.scales).for_each(|(sum, &slope)| *sum += f64::from(slope));
            batch += 1;
        }
        let already = found.shut.iter().filter(|&&shut| shut).count();
        scores.iter_mut().zip(&found.shut).filter(|(_, shut)| **shut).for_each(|(score, _)| *score = 0.0);
        let more = largest(&scores, goal.saturating_sub(already));
        found.shut.iter_mut().zip(more).for_each(|(shut, more)| *shut |= more);
    }
    Ok(found)
}

/// With a budget, the shut weights are those of the largest `1 - s + 0.4 q`, where `q` is the sum of all slopes so far
/// over its largest entry: Adam brings weights of small and of large effect down alike, `q` puts the large ones first.
/// The budget grows geometrically over the first half of the batches.
fn learnt_mask(loss: Loss<'_>, count: usize, batches: usize, rate: f32, penalty: f32, budget: usize) -> Result<Found> {
    const BETAS: (f32, f32) = (0.9, 0.99);
    let (mut scales, mut mean, mut square) = (vec![1f32; count], vec![0f32; count], vec![0f32; count]);
    let mut total = vec![0f64; count];
    let mut found = Found { shut: vec![false; count], agreement: f64::NAN, ..Found::default() };
    for batch in 0..batches {
        let binary: Vec<f32> = found.shut.iter().map(|&shut| f32::from(u8::from(!shut))).collect();
        let slope = loss(&binary, batch)?;
        found.losses.push(slope.loss);
        let step = batch as i32 + 1;
        let corrections = (1.0 - BETAS.0.powi(step), 1.0 - BETAS.1.powi(step));
        for (index, &slope) in slope.scales.iter().enumerate() {
            total[index] += f64::from(slope);
            let slope = slope - penalty;
            mean[index] += (1.0 - BETAS.0) * (slope - mean[index]);
            square[index] += (1.0 - BETAS.1) * (slope * slope - square[index]);
            let root = (square[index] / corrections.1).sqrt() + 1e-12;
            scales[index] = (scales[index] - rate * (mean[index] / corrections.0) / root).clamp(0.0, 1.0);
        }
        found.shut = scales.iter().map(|&scale| scale < 0.5).collect();
        let grown = ((batch + 1) as f64 / (0.5 * batches as f64).max(1.0)).min(1.0);
        let allowed = (budget as f64).powf(grown).round() as usize;
        if found.shut.iter().filter(|&&shut| shut).count() > allowed {
            let top = total.iter().fold(1e-30, |top: f64, value| top.max(value.abs()));
            let rank = |index: usize| match found.shut[index] {
                true => 1.0 - f64::from(scales[index]) + 0.4 * total[index] / top,
                false => 0.0,
            };
            let ranks: Vec<f64> = (0..count).map(rank).collect();
            found.shut = largest(&ranks, allowed);
        }
    }
    Ok(found)
}

/// The `budget` largest scores above zero; of equal ones those of lower index.
fn largest(scores: &[f64], budget: usize) -> Vec<bool> {
    let mut order: Vec<u32> = (0..scores.len() as u32).filter(|&index| scores[index as usize] > 0.0).collect();
    let falling = |a: &u32, b: &u32| scores[*b as usize].total_cmp(&scores[*a as usize]).then(a.cmp(b));
    if budget < order.len() {
        if budget > 0 {
            order.select_nth_unstable_by(budget - 1, falling);
        }
        order.truncate(budget);
    }
    let mut chosen = vec![false; scores.len()];
    order.into_iter().for_each(|index| chosen[index as usize] = true);
    chosen
}

fn correlation(a: &[f64], b: &[f64]) -> f64 {
    let count = a.len() as f64;
    let (mean_a, mean_b) = (a.iter().sum::<f64>() / count, b.iter().sum::<f64>() / count);
    let moments = a.iter().zip(b).fold((0.0, 0.0, 0.0), |(ab, aa, bb), (a, b)| {
        let (a, b) = (a - mean_a, b - mean_b);
        (ab + a * b, aa + a * a, bb + b * b)
    });
    moments.0 / (moments.1 * moments.2).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// L = 1/2 |theta - goal|² with theta = s theta_0: dL/ds = theta_0 (s theta_0 - goal).
    fn quadratic(start: &'static [f32], goal: &'static [f32]) -> impl FnMut(&[f32], usize) -> Result<Slope> {
        move |scales, _| {
            let parts = scales.iter().zip(start).zip(goal);
            let scales = parts.clone().map(|((s, t), g)| t * (s * t - g)).collect();
            let loss = parts.map(|((s, t), g)| f64::from(s * t - g).powi(2) / 2.0).sum();
            Ok(Slope { loss, scales })
        }
    }

    const START: &[f32] = &[1.0, 2.0, -1.0];
    const GOAL: &[f32] = &[0.0, 2.0, -1.5];

    #[test]
    fn algorithm_1_gives_the_closed_form() {
        let mut loss = quadratic(START, GOAL);
        let method = Method::Algorithm1 { rho: 0.1 };
        // The sums of both steps are 1.81, 0 and -0.9725: the means reach a threshold of half the sum's.
        for (tau, expected) in [(0.05, [true, false, false]), (0.9049, [true, false, false]), (0.9051, [false; 3])] {
            let found = search(&mut loss, 3, 2, method, Bound::Threshold(tau)).unwrap();
            assert_eq!(found.shut, expected, "tau {tau}");
            assert!((found.losses[0] - 0.625).abs() < 1e-6);
            assert!((found.losses[1] - (0.405 + 0.10125)).abs() < 1e-6, "{:?}", found.losses);
        }
    }

    #[test]
    fn every_method_finds_what_lowers_the_loss_within_its_budget() {
        for method in [
            Method::Algorithm1 { rho: 0.0 },
            Method::Gradual { stages: 2 },
            Method::LearntMask { rate: 0.04, penalty: 0.0 },
        ] {
            let mut loss = quadratic(START, GOAL);
            let found = search(&mut loss, 3, 40, method, Bound::Count(1)).unwrap();
            assert_eq!(found.shut, [true, false, false], "{method:?}");
            assert_eq!(found.losses.len(), 40);
        }
    }

    #[test]
    fn what_is_not_finite_is_named_by_its_batch() {
        let mut loss =
            |_: &[f32], batch: usize| Ok(Slope { loss: if batch == 2 { f64::NAN } else { 0.0 }, scales: vec![1.0] });
        let error = search(&mut loss, 1, 20, Method::default(), Bound::Count(1)).unwrap_err();
        assert!(error.message().contains("batch 2"), "{error}");
        for (batches, bound) in [(20, Bound::Threshold(0.1)), (12, Bound::Count(1)), (0, Bound::Count(1))] {
            let error = search(&mut loss, 1, batches, Method::default(), bound).unwrap_err();
            assert_eq!(error.status(), Status::InvalidArgument, "{batches} batches, {bound:?}");
        }
    }
}
