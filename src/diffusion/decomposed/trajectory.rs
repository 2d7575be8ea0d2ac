//! A walk under way: drives a [`Plan`] step by step, whoever computes the predictions.

use std::ops::Range;

use super::super::precision;
use super::super::schedule::Step;
use super::operators::{Size, assemble, decompose, down};
use super::plan::{Plan, StagedStep};
use crate::error::{Error, Result};

/// A walk of states `[B, C, H, W]`, whose sides are halved `stage` times in stage `stage`.
#[derive(Clone, Debug)]
pub struct Trajectory {
    plan: Plan,
    /// `[B, C, H, W]` of the clean state at the end.
    shape: [usize; 4],
    next: usize,
    /// The clean prediction of the step before, as components.
    previous: Vec<f32>,
}

impl Trajectory {
    /// A walk before its first step, to clean states of shape `[B, C, H, W]`.
    ///
    /// # Errors
    /// [`crate::Status::InvalidArgument`] for an empty shape, and unless the sides can be halved for every stage.
    pub fn new(plan: Plan, shape: [usize; 4]) -> Result<Self> {
        let walk = Self { next: plan.start(), plan, shape, previous: Vec::new() };
        walk.size(0)?.elements()?;
        walk.size(walk.plan.first_stage())?;
        Ok(walk)
    }

    /// The plan that is walked.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The coming step's index in [`Plan::steps`] and the step; `None` at the end.
    pub fn current(&self) -> Option<(usize, &StagedStep)> {
        self.plan.steps().get(self.next).map(|step| (self.next, step))
    }

    /// The stage of the state as it is now; 0 at the end.
    pub fn stage(&self) -> usize {
        self.current().map_or(0, |(_, step)| step.stage)
    }

    /// The shape `[B, C, H, W]` of states at a stage.
    pub fn shape_at(&self, stage: usize) -> [usize; 4] {
        let [batch, channels, height, width] = self.shape;
        [batch, channels, height >> stage, width >> stage]
    }

    /// The shape of the state as it is now.
    pub fn shape(&self) -> [usize; 4] {
        self.shape_at(self.stage())
    }

    /// Turns standard normal `noise` of the present shape, and for a walk that begins later the clean state of full size to
    /// begin from, into the state before the first step: `initial_sigma * noise`, or, for each component,
    /// `signal * clean + sigma * noise`.
    ///
    /// # Errors
    /// [`crate::Status::InvalidArgument`] for other lengths; [`crate::Status::OutOfMemory`].
    pub fn begin(&self, noise: &[f32], clean: Option<&[f32]>) -> Result<Vec<f32>> {
        let stage = self.stage();
        let size = self.size(stage)?;
        same_length("noise", noise, size.elements()?)?;
        let Some((clean, (_, step))) = clean.zip(self.current()) else {
            let sigma = self.plan.initial_sigma();
            return precision::collect(noise.len(), noise.iter().map(|z| (sigma * f64::from(*z)) as f32));
        };
        same_length("clean state", clean, self.size(0)?.elements()?)?;
        let low = self.seen_at(stage, precision::collect(clean.len(), clean.iter().copied())?)?;
        let levels = step.components.len() - 1;
        let (clean, noise) = (decompose(&low, size, levels)?, decompose(noise, size, levels)?);
        let mix = |step: &Step, at: usize| step.signal * f64::from(clean[at]) + step.sigma * f64::from(noise[at]);
        let parts = parts(step, size)?;
        let values = parts.iter().flat_map(|(step, part)| part.clone().map(|at| mix(step, at) as f32));
        assemble(precision::collect(clean.len(), values)?, size, levels)
    }

    /// The coordinates of a state of full size in a stage: what [`down`] leaves of it.
    ///
    /// # Errors
    /// [`crate::Status::InvalidArgument`] for another length; [`crate::Status::OutOfMemory`].
    pub fn seen_at(&self, stage: usize, full: Vec<f32>) -> Result<Vec<f32>> {
        (0..stage).try_fold(full, |finer, stage| down(&finer, self.size(stage)?))
    }

    /// The state as the model wants it: `input_scale * state`.
    ///
    /// # Errors
    /// [`crate::Status::OutOfMemory`].
    pub fn model_input(&self, state: &[f32]) -> Result<Vec<f32>> {
        let scale = self.current().map_or(1.0, |(_, step)| step.last().input_scale);
        precision::collect(state.len(), state.iter().map(|x| (scale * f64::from(*x)) as f32))
    }

    /// Takes one step: `state` becomes the next state, of twice the sides after a lift. Returns the denoised state as it is
    /// predicted now, of the shape that `state` had, in units of the picture (coordinates over `2^stage`).
    ///
    /// `noise` is standard normal, of the shape that `state` has; `lift_noise` of the shape that it gets.
    ///
    /// # Errors
    /// [`crate::Status::InvalidArgument`] after the last step, for other lengths, and where [`StagedStep::needs_noise`] or
    /// [`StagedStep::lift`] say that noise is needed and none is given; [`crate::Status::OutOfMemory`].
    pub fn step(
        &mut self,
        state: &mut Vec<f32>,
        prediction: &[f32],
        noise: Option<&[f32]>,
        lift_noise: Option<&[f32]>,
    ) -> Result<Vec<f32>> {
        let Some(step) = self.plan.steps().get(self.next) else {
            return Err(Error::invalid_argument(format!("all {} steps are done", self.plan.steps().len())));
        };
        let size = self.size(step.stage)?;
        let len = size.elements()?;
        same_length("state", state, len)?;
        same_length("prediction", prediction, len)?;
        let given = |what: &str, noise: Option<&[f32]>, needed: bool, len: usize| match noise {
            Some(noise) => same_length(what, noise, len),
            None if needed => {
                Err(Error::invalid_argument(format!("step {} adds {what} and none was given", self.next)))
            }
            None => Ok(()),
        };
        given("noise", noise, step.needs_noise(), len)?;
        given("lift noise", lift_noise, step.lift.is_some(), if step.lift.is_some() { 4 * len } else { len })?;
        if step.components.iter().any(|component| component.next_previous != 0.0) {
            same_length("state of the step before", &self.previous, len)?;
        }
        let levels = step.components.len() - 1;
        let x = decompose(state, size, levels)?;
        let p = decompose(prediction, size, levels)?;
        let z = noise.map(|noise| decompose(noise, size, levels)).transpose()?;
        let parts = parts(step, size)?;
        let coupled = if levels > 0 { clipped(step, &x, &p, size)? } else { None };
        let (mut next, mut clean, mut denoised) = (reserve(len)?, reserve(len)?, reserve(len)?);
        let unit = scale_of(step.stage);
        for (component, part) in parts {
            for at in part {
                let (state, prediction) = (f64::from(x[at]), f64::from(p[at]));
                let mut c = component.clean(state, prediction);
                if let Some(coupled) = &coupled {
                    c = f64::from(coupled[at]);
                } else if let Some(clip) = component.clip {
                    c = c.clamp(-clip * unit, clip * unit);
                }
                let mut y = component.next(state, c, prediction);
                if component.next_previous != 0.0 {
                    y += component.next_previous * f64::from(self.previous[at]);
                }
                if let Some(z) = z.as_ref().filter(|_| component.needs_noise()) {
                    y += component.next_noise * f64::from(z[at]);
                }
                next.push(y as f32);
                clean.push(c as f32);
                denoised.push((component.denoised(state, c) / unit) as f32);
            }
        }
        let denoised = assemble(denoised, size, levels)?;
        let (stage, lift) = (step.stage, step.lift.zip(lift_noise));
        (*state, self.previous) = match lift {
            None => (assemble(next, size, levels)?, clean),
            Some((deviation, noise)) => (self.lift(next, levels, stage, deviation, noise)?, Vec::new()),
        };
        self.next += 1;
        Ok(denoised)
    }

    /// The state one stage lower: these components, and as a new, finest one the noise's own times `deviation`.
    fn lift(
        &self,
        components: Vec<f32>,
        levels: usize,
        stage: usize,
        deviation: f64,
        noise: &[f32],
    ) -> Result<Vec<f32>> {
        let size = self.size(stage - 1)?;
        let fresh = decompose(noise, size, 1)?;
        let high = fresh[..fresh.len() - components.len()].iter().map(|z| (deviation * f64::from(*z)) as f32);
        assemble(precision::collect(noise.len(), high.chain(components))?, size, levels + 1)
    }

    /// The size of the states of a stage, all of the batch together.
    fn size(&self, stage: usize) -> Result<Size> {
        let [batch, channels, height, width] = self.shape;
        let planes = batch
            .checked_mul(channels)
            .ok_or_else(|| Error::invalid_argument(format!("a state of shape {:?} is too large", self.shape)))?;
        Size { planes, height, width }.halved(stage)
    }
}

/// Coordinates of stage `k` are `2^k` times the block means that they stand for.
fn scale_of(stage: usize) -> f64 {
    (1_u64 << stage) as f64
}

/// Where the values of each component lie among those of [`decompose`].
fn parts(step: &StagedStep, size: Size) -> Result<Vec<(Step, Range<usize>)>> {
    let len = size.elements()?;
    let ends = (1..step.components.len()).map(|level| size.halved(level).and_then(|low| Ok(len - low.elements()?)));
    let ends: Vec<usize> = ends.chain([Ok(len)]).collect::<Result<_>>()?;
    let begins = [0].into_iter().chain(ends.iter().copied());
    Ok(step.components.iter().copied().zip(begins.zip(ends.iter()).map(|(begin, end)| begin..*end)).collect())
}

/// The components of the clean prediction clipped as a whole: a pixel has no value of its own before they are joined.
fn clipped(step: &StagedStep, x: &[f32], p: &[f32], size: Size) -> Result<Option<Vec<f32>>> {
    let Some(clip) = step.last().clip else { return Ok(None) };
    let levels = step.components.len() - 1;
    let mut clean = reserve(x.len())?;
    for (component, part) in parts(step, size)? {
        clean.extend(part.map(|at| component.clean(f64::from(x[at]), f64::from(p[at])) as f32));
    }
    let most = (clip * scale_of(step.stage)) as f32;
    let mut clean = assemble(clean, size, levels)?;
    clean.iter_mut().for_each(|value| *value = value.clamp(-most, most));
    decompose(&clean, size, levels).map(|components| Some(components.into_owned()))
}

fn reserve(length: usize) -> Result<Vec<f32>> {
    let mut values = Vec::new();
    values.try_reserve_exact(length)?;
    Ok(values)
}

fn same_length(what: &str, given: &[f32], wanted: usize) -> Result<()> {
    if given.len() == wanted {
        Ok(())
    } else {
        Err(Error::invalid_argument(format!("{what} has {} values, {wanted} are needed", given.len())))
    }
}
