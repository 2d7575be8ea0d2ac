//! Searches for concept neurons: which scales to set to zero so that a loss falls.
//!
//! A loss is any function of scales `s [N]`; `s = 1` is the untouched network. The derivative `dL/ds_i` at `s = 1` is
//! `theta_i dL/dtheta_i`, the first-order saliency (Cones, arXiv 2303.05125): where it is positive, shrinking weight `i`
//! lowers the loss. [`Method::Algorithm1`] is the paper's; the budgets, the gradual search and the learnt mask are ours.
//! This file knows no network.

use crate::error::{Error, Result, Status};
use crate::memory::{collected, copied, filled};

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
    /// Searched like `Count`; then so many of the highest ranked as have the lowest loss on batches that the search did
    /// not see ([`super::held_out`]). Not for [`Method::Gradual`], which ranks no set as a whole.
    HeldOut(usize),
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
/// Errors: those of [`Search::new`] and [`Search::step`].
pub fn search(loss: Loss<'_>, count: usize, batches: usize, method: Method, bound: Bound) -> Result<Found> {
    let mut search = Search::new(count, batches, method, bound)?;
    while !search.is_done() {
        search.step(loss)?;
    }
    search.found()
}

/// A search between two batches: all that the coming ones depend on.
pub struct Search {
    batches: usize,
    bound: Bound,
    memory: Memory,
    losses: Vec<f64>,
}

/// What a method remembers from batch to batch, `[N]` each.
enum Memory {
    Algorithm1 {
        rho: f64,
        scales: Vec<f64>,
        /// Sums of the scores of even and of odd batches.
        even: Vec<f64>,
        odd: Vec<f64>,
    },
    Gradual {
        stages: usize,
        /// 0 where shut, else 1.
        open: Vec<f32>,
        /// Of this stage.
        scores: Vec<f64>,
    },
    LearntMask {
        rate: f32,
        penalty: f32,
        scales: Vec<f32>,
        /// Adam's moving means of the slope and of its square.
        mean: Vec<f32>,
        square: Vec<f32>,
        /// The sum of all slopes.
        total: Vec<f64>,
    },
}

impl Search {
    /// A search that has seen no batch.
    ///
    /// Errors: [`Status::InvalidArgument`] for no batch, no weight, a threshold with a method that has none, or a learnt
    /// mask with too few batches for its rate.
    pub fn new(count: usize, batches: usize, method: Method, bound: Bound) -> Result<Self> {
        if count == 0 || batches == 0 {
            return Err(Error::invalid_argument(format!("a search over {count} weights in {batches} batches")));
        }
        let memory = match (method, bound) {
            (Method::Algorithm1 { rho }, _) => Memory::Algorithm1 {
                rho: f64::from(rho),
                scales: filled(count, 1.0)?,
                even: filled(count, 0.0)?,
                odd: filled(count, 0.0)?,
            },
            (method, Bound::Threshold(_)) => {
                return Err(Error::invalid_argument(format!("{method:?} takes a number of weights, not a threshold")));
            }
            (Method::Gradual { .. }, Bound::HeldOut(_)) => {
                return Err(Error::invalid_argument(
                    "a gradual search ranks no set as a whole, so a held-out loss can't choose its size: name a density",
                ));
            }
            (Method::Gradual { stages }, _) => Memory::Gradual {
                stages: stages.clamp(1, batches),
                open: filled(count, 1.0)?,
                scores: filled(count, 0.0)?,
            },
            (Method::LearntMask { rate, .. }, _) if f64::from(rate) * batches as f64 <= 0.5 => {
                return Err(Error::invalid_argument(format!(
                    "{batches} batches can't bring a scale from 1 to one half in steps of {rate}: a learnt mask needs \
                     more than {} batches",
                    (0.5 / rate) as usize
                )));
            }
            (Method::LearntMask { rate, penalty }, _) => Memory::LearntMask {
                rate,
                penalty,
                scales: filled(count, 1.0)?,
                mean: filled(count, 0.0)?,
                square: filled(count, 0.0)?,
                total: filled(count, 0.0)?,
            },
        };
        Ok(Self { batches, bound, memory, losses: Vec::new() })
    }

    /// The loss of each batch so far.
    pub fn losses(&self) -> &[f64] {
        &self.losses
    }

    /// Whether it has seen all batches.
    pub fn is_done(&self) -> bool {
        self.losses.len() >= self.batches
    }

    /// Shows it the next batch.
    ///
    /// Errors: those of the loss; [`Status::NotFinite`] for a loss or slope that is not finite, naming the batch;
    /// [`Status::OutOfMemory`]. The search is then as before.
    pub fn step(&mut self, loss: Loss<'_>) -> Result<()> {
        let batch = self.losses.len();
        let slope = finite_slope(loss, &self.scales()?, batch, || format!("batch {batch} of the search"))?;
        let budget = self.budget();
        match &mut self.memory {
            Memory::Algorithm1 { rho, scales, even, odd } => {
                let half = if batch.is_multiple_of(2) { even } else { odd };
                for ((sum, scale), slope) in half.iter_mut().zip(scales).zip(&slope.scales) {
                    let score = *scale * f64::from(*slope);
                    *sum += score;
                    *scale *= 1.0 - *rho * score;
                }
            }
            Memory::Gradual { stages, open, scores } => {
                let sums = scores.iter().zip(&slope.scales).map(|(sum, &slope)| sum + f64::from(slope));
                let sums = collected(sums)?;
                *scores = match (1..=*stages).find(|stage| self.batches * stage / *stages == batch + 1) {
                    Some(stage) => {
                        let goal = (budget as f64).powf(stage as f64 / *stages as f64).round() as usize;
                        close_stage(open, sums, goal)?
                    }
                    None => sums,
                };
            }
            Memory::LearntMask { rate, penalty, scales, mean, square, total } => {
                let step = batch as i32 + 1;
                let corrections = (1.0 - BETAS.0.powi(step), 1.0 - BETAS.1.powi(step));
                total.iter_mut().zip(&slope.scales).for_each(|(total, slope)| *total += f64::from(*slope));
                let each = scales.iter_mut().zip(mean).zip(square).zip(&slope.scales);
                for (((scale, mean), square), &slope) in each {
                    let slope = slope - *penalty;
                    *mean += (1.0 - BETAS.0) * (slope - *mean);
                    *square += (1.0 - BETAS.1) * (slope * slope - *square);
                    let root = (*square / corrections.1).sqrt() + 1e-12;
                    *scale = (*scale - *rate * (*mean / corrections.0) / root).clamp(0.0, 1.0);
                }
            }
        }
        self.losses.push(slope.loss);
        Ok(())
    }

    /// What the batches so far lead to.
    ///
    /// Errors: [`Status::OutOfMemory`].
    pub fn found(&self) -> Result<Found> {
        self.found_within(self.budget())
    }

    /// The highest ranked `budget` weights of what was found.
    ///
    /// Errors: [`Status::OutOfMemory`].
    pub(super) fn found_within(&self, budget: usize) -> Result<Found> {
        let mut found = Found { losses: self.losses.clone(), agreement: f64::NAN, ..Found::default() };
        match &self.memory {
            Memory::Algorithm1 { even, odd, .. } => {
                if self.losses.len() > 1 {
                    found.agreement = correlation(even, odd);
                }
                let batches = self.losses.len().max(1) as f64;
                let scores = collected(even.iter().zip(odd).map(|(a, b)| (a + b) / batches))?;
                found.shut = match self.bound {
                    Bound::Threshold(tau) => collected(scores.iter().map(|&score| score >= tau))?,
                    Bound::Count(_) | Bound::HeldOut(_) => largest(&scores, budget)?,
                };
            }
            Memory::Gradual { open, .. } => found.shut = collected(open.iter().map(|&open| open == 0.0))?,
            Memory::LearntMask { scales, total, .. } => found.shut = self.masked(scales, total, budget)?,
        }
        Ok(found)
    }

    /// Where the loss of the next batch is wanted.
    fn scales(&self) -> Result<Vec<f32>> {
        match &self.memory {
            Memory::Algorithm1 { scales, .. } => collected(scales.iter().map(|&scale| scale as f32)),
            Memory::Gradual { open, .. } => copied(open),
            Memory::LearntMask { scales, total, .. } => {
                let shut = self.masked(scales, total, self.budget())?;
                collected(shut.into_iter().map(|shut| f32::from(u8::from(!shut))))
            }
        }
    }

    pub(super) fn budget(&self) -> usize {
        match self.bound {
            Bound::Count(budget) | Bound::HeldOut(budget) => budget,
            Bound::Threshold(_) => usize::MAX,
        }
    }

    /// The shut weights of a learnt mask: those below one half. If these are more than allowed, those of the largest
    /// `1 - s + 0.4 q`, where `q` is the sum of all slopes so far over its largest entry: Adam brings weights of small and
    /// of large effect down alike, `q` puts the large ones first. What is allowed grows geometrically to the budget over
    /// the first half of the batches.
    fn masked(&self, scales: &[f32], total: &[f64], budget: usize) -> Result<Vec<bool>> {
        let mut shut = collected(scales.iter().map(|&scale| scale < 0.5))?;
        let grown = (self.losses.len() as f64 / (0.5 * self.batches as f64).max(1.0)).min(1.0);
        let allowed = (budget as f64).powf(grown).round() as usize;
        let count: usize = shut.iter().map(|&shut| usize::from(shut)).sum();
        if count <= allowed {
            return Ok(shut);
        }
        let top = top(total).max(1e-30);
        let each = shut.iter().zip(scales).zip(total).filter(|((shut, _), _)| **shut);
        // A shut weight ranks above 1/2 - 0.4.
        let ranks = collected(each.map(|((_, scale), total)| 1.0 - f64::from(*scale) + 0.4 * total / top))?;
        let kept = largest(&ranks, allowed)?;
        shut.iter_mut().filter(|shut| **shut).zip(kept).for_each(|(shut, kept)| *shut = kept);
        Ok(shut)
    }

    /// All that it remembers, by name and `[N]` each: with [`Search::losses`] what a checkpoint holds.
    pub(super) fn memory(&mut self) -> Vec<(&'static str, Numbers<'_>)> {
        use Numbers::{F32, F64};
        match &mut self.memory {
            Memory::Algorithm1 { scales, even, odd, .. } => {
                vec![("scales", F64(scales)), ("even", F64(even)), ("odd", F64(odd))]
            }
            Memory::Gradual { open, scores, .. } => vec![("open", F32(open)), ("scores", F64(scores))],
            Memory::LearntMask { scales, mean, square, total, .. } => {
                vec![("scales", F32(scales)), ("mean", F32(mean)), ("square", F32(square)), ("total", F64(total))]
            }
        }
    }

    /// Goes on behind these losses; [`Search::memory`] must have been set to what it was there.
    ///
    /// Errors: [`Status::InvalidFile`] for more losses than batches.
    pub(super) fn resume(&mut self, losses: Vec<f64>) -> Result<()> {
        if losses.len() > self.batches {
            return Err(Error::invalid_file(format!("{} losses of {} batches", losses.len(), self.batches)));
        }
        self.losses = losses;
        Ok(())
    }
}

/// Numbers that a search remembers.
pub(super) enum Numbers<'a> {
    F32(&'a mut [f32]),
    F64(&'a mut [f64]),
}

/// Adam's shares of the past.
const BETAS: (f32, f32) = (0.9, 0.99);

/// What a batch says, if that is finite; else an error at `place`.
pub(super) fn finite_slope(loss: Loss<'_>, scales: &[f32], batch: usize, place: impl Fn() -> String) -> Result<Slope> {
    let slope = loss(scales, batch).map_err(|error| match error.status() {
        Status::NotFinite => error.at(place()),
        _ => error,
    })?;
    // Without a way out of the loop it takes many at a time.
    let wrong = slope.scales.iter().fold(!slope.loss.is_finite(), |wrong, value| wrong | !value.is_finite());
    if wrong {
        let what = format!("the loss is {} or its gradient is not finite", slope.loss);
        return Err(Error::new(Status::NotFinite, what).at(place()));
    }
    Ok(slope)
}

/// Shuts the open weights of the largest scores until `goal` are shut. Answers the scores from which the next stage begins.
fn close_stage(open: &mut [f32], mut scores: Vec<f64>, goal: usize) -> Result<Vec<f64>> {
    let already = open.iter().filter(|&&open| open == 0.0).count();
    scores.iter_mut().zip(&*open).filter(|(_, open)| **open == 0.0).for_each(|(score, _)| *score = 0.0);
    let more = largest(&scores, goal.saturating_sub(already))?;
    open.iter_mut().zip(more).filter(|(_, more)| *more).for_each(|(open, _)| *open = 0.0);
    scores.fill(0.0);
    Ok(scores)
}

/// The `budget` largest scores above zero; of equal ones those of lower index.
fn largest(scores: &[f64], budget: usize) -> Result<Vec<bool>> {
    let count = |least: f64| scores.iter().map(|&score| usize::from(score > least)).sum::<usize>();
    if budget == 0 || count(0.0) <= budget {
        return collected(scores.iter().map(|&score| budget > 0 && score > 0.0));
    }
    let mut falling = copied(scores)?;
    let (_, &mut least, _) = falling.select_nth_unstable_by(budget - 1, |a, b| b.total_cmp(a));
    let mut ties = budget - count(least);
    collected(scores.iter().map(|&score| {
        let tie = score == least && ties > 0;
        ties -= usize::from(tie);
        tie || score > least
    }))
}

/// The largest magnitude, eight numbers at a time.
fn top(values: &[f64]) -> f64 {
    let (groups, rest) = values.as_chunks::<8>();
    let larger = |a: f64, b: f64| if b.abs() > a { b.abs() } else { a };
    let mut tops = [0f64; 8];
    groups.iter().for_each(|group| tops.iter_mut().zip(group).for_each(|(top, &value)| *top = larger(*top, value)));
    tops.iter().chain(rest).fold(0.0, |top, &value| larger(top, value))
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

    #[test]
    fn the_largest_scores_are_chosen_and_of_equal_ones_the_first() {
        let scores = [0.5, -9.0, 2.0, 0.5, 0.0, 3.0, 0.5];
        for (budget, expected) in [(0, ""), (1, "5"), (2, "25"), (3, "025"), (4, "0235"), (5, "02356"), (9, "02356")] {
            let chosen = largest(&scores, budget).unwrap();
            let places: String = (0..7).filter(|&at| chosen[at]).map(|at| at.to_string()).collect();
            assert_eq!(places, expected, "{budget}");
        }
        let many: Vec<f64> = (0..21).map(|at| f64::from(at) - 19.5).collect();
        assert_eq!((top(&many), top(&many[17..]), top(&[])), (19.5, 2.5, 0.0));
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
