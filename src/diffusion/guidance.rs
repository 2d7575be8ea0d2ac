//! Classifier-free guidance, and the walk from noise to a clean state under it.
//!
//! It drives a [`Trajectory`] with the predictions of a [`Unet`], or of one a stage; it knows neither prompts nor images.

use std::ops::ControlFlow;

use super::decomposed::{Plan, Trajectory};
use super::noise::standard_normal;
use super::precision;
use super::unet::{Conditioning, Unet};
use crate::error::{Error, Result, Status};
use crate::progress::{CancelToken, Job};

/// How strongly predictions follow the text.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Guidance {
    /// `w` in `p = p_uncond + w (p_cond - p_uncond)` (arXiv 2207.12598, eq. 6, with `w` counted from 0); 1 is the
    /// conditional prediction alone, with no unconditional pass. In `[0, 1000]`.
    pub scale: f64,
    /// Share of the rescale that keeps the prediction's deviation at that of the conditional one, in `[0, 1]`
    /// (arXiv 2305.08891, eq. 15 and 16); 0 for none.
    pub rescale: f64,
}

impl Default for Guidance {
    fn default() -> Self {
        Self { scale: 7.5, rescale: 0.0 }
    }
}

impl Guidance {
    /// Whether an unconditional pass is needed.
    pub fn needs_unconditional(&self) -> bool {
        self.scale != 1.0
    }

    /// [`Status::InvalidArgument`] outside the ranges.
    pub fn check(&self) -> Result<()> {
        for (name, value, most) in [("guidance scale", self.scale, 1000.0), ("guidance rescale", self.rescale, 1.0)] {
            if !(0.0..=most).contains(&value) {
                return Err(Error::invalid_argument(format!("{name} is {value}, must be in [0, {most}]")));
            }
        }
        Ok(())
    }

    /// The guided prediction of a batch of `batch` states, from predictions of as many values each.
    ///
    /// # Errors
    /// [`Status::OutOfMemory`].
    pub fn combine(&self, unconditional: &[f32], conditional: &[f32], batch: usize) -> Result<Vec<f32>> {
        let guide = |(u, c): (&f32, &f32)| (f64::from(*u) + self.scale * (f64::from(*c) - f64::from(*u))) as f32;
        let mut guided = precision::collect(unconditional.len(), unconditional.iter().zip(conditional).map(guide))?;
        let state = guided.len() / batch.max(1);
        if self.rescale > 0.0 && state > 0 {
            for (guided, conditional) in guided.chunks_exact_mut(state).zip(conditional.chunks_exact(state)) {
                let (wanted, given) = (deviation(conditional), deviation(guided));
                if given > 0.0 {
                    let factor = self.rescale * wanted / given + (1.0 - self.rescale);
                    guided.iter_mut().for_each(|value| *value = (f64::from(*value) * factor) as f32);
                }
            }
        }
        Ok(guided)
    }
}

fn deviation(values: &[f32]) -> f64 {
    let count = values.len() as f64;
    let mean = values.iter().map(|value| f64::from(*value)).sum::<f64>() / count;
    (values.iter().map(|value| (f64::from(*value) - mean).powi(2)).sum::<f64>() / count).sqrt()
}

/// Fills in the noise `[B, C, H, W]` that the step of this index adds, or the lift after it.
pub type GivenNoise<'a> = &'a mut (dyn FnMut(usize, &mut [f32]) + 'a);

/// Where noise comes from. Values are standard normal.
///
/// From a seed, a decomposed walk has the start noise of the plain one: it begins with the coordinates of the first stage,
/// and each lift adds those of the component that comes back. They are orthogonal, so independent, and one seed gives much
/// the same picture by both processes.
#[derive(Default)]
pub struct Noise<'a> {
    /// The seed of [`standard_normal`].
    pub seed: u64,
    /// The image number of the batch's first state; the others follow.
    pub first_image: u32,
    /// The start noise `[B, C, H, W]`, of the size that the first step sees, if the host gives it.
    pub start: Option<&'a [f32]>,
    /// The noise that steps add, if the host gives it.
    pub step: Option<GivenNoise<'a>>,
    /// The noise that lifts add, of the size that they lead to, if the host gives it.
    pub lift: Option<GivenNoise<'a>>,
}

/// What a step did.
#[derive(Clone, Copy, Debug)]
pub struct StepReport<'a> {
    /// The step's index in the plan.
    pub step: usize,
    /// Steps of the plan.
    pub steps: usize,
    /// The timestep that the model was told.
    pub timestep: f64,
    /// The next state: coordinates of its stage.
    pub state: &'a [f32],
    /// `[B, C, H, W]` of the next state.
    pub shape: [usize; 4],
    /// The clean state as it is predicted now, in units of the full-sized one.
    pub clean: &'a [f32],
    /// `[B, C, H, W]` of the clean state: the size that the model saw.
    pub clean_shape: [usize; 4],
}

/// Told of every step; [`ControlFlow::Break`] cancels.
pub type OnStep<'a> = &'a mut (dyn FnMut(&StepReport<'_>) -> ControlFlow<()> + 'a);

/// What is drawn.
pub struct Walk<'a, 'c> {
    /// `[B, C, H, W]` of the clean states at the end.
    pub shape: [usize; 4],
    /// The steps.
    pub plan: Plan,
    /// The class label of each stage; empty where the conditioning's own hold for all.
    pub stage_class_labels: &'a [i64],
    /// Guidance; if it needs an unconditional pass, the conditioning's first half is unconditional.
    pub guidance: Guidance,
    /// For `B` states, or `2 B`: unconditional, then conditional.
    pub conditioning: &'a Conditioning,
    /// Where noise comes from.
    pub noise: Noise<'a>,
    /// The clean states to begin from, for a plan that starts after step 0.
    pub clean: Option<&'a [f32]>,
    /// Told of every step.
    pub on_step: Option<OnStep<'c>>,
}

impl Walk<'_, '_> {
    /// Runs all steps and gives the last state `[B, C, H, W]`. Stage `k` is served by `unets[k]`, and stages beyond the last
    /// one by it; one UNet may serve all. UNets keep their compositions: keys and values do not depend on the size.
    ///
    /// # Errors
    /// [`Status::InvalidArgument`] for sizes that do not fit together and those of [`Unet::denoise`];
    /// before the first step, those of [`Unet::rehearse`] for a stage whose size the UNet refuses, naming it;
    /// [`Status::NotFinite`], naming the step, as soon as a prediction holds a NaN or infinity; [`Status::Cancelled`].
    pub fn run(self, unets: &mut [Unet], job: &mut Job<'_>) -> Result<Vec<f32>> {
        let Self { shape, plan, stage_class_labels, guidance, conditioning, mut noise, clean, mut on_step } = self;
        guidance.check()?;
        let batch = shape[0];
        let passes = if guidance.needs_unconditional() { 2 } else { 1 };
        let (first, steps, total) = (plan.start(), plan.steps().len(), plan.len() as u64);
        let mut trajectory = Trajectory::new(plan, shape)?;
        if conditioning.batch != batch * passes {
            return Err(Error::invalid_argument(format!(
                "the conditioning has a batch of {}, {batch} states with guidance scale {} need {}",
                conditioning.batch,
                guidance.scale,
                batch * passes
            )));
        }
        if clean.is_none() && first > 0 {
            return Err(Error::invalid_argument(format!(
                "a walk that starts at step {first} needs a clean state to start from"
            )));
        }
        let start = noise.start_of(&trajectory)?;
        let unets = used(unets, trajectory.stage())?;
        condition(unets, conditioning)?;
        if trajectory.stage() > 0 {
            rehearse(unets, &trajectory, passes, &job.cancel)?;
        }
        let mut state = trajectory.begin(&start, clean)?;
        drop(start);
        let mut labelled = None;
        while let Some((index, step)) = trajectory.current() {
            let (timestep, needs_noise, lifts) = (step.timestep(), step.needs_noise(), step.lift.is_some());
            let (stage, here) = (step.stage, trajectory.shape());
            job.step("denoise", (index - first) as u64, total)?;
            let unet = serving(unets, stage);
            if let Some(label) = stage_class_labels.get(stage).filter(|_| labelled != Some(stage)) {
                unet.set_class_labels(&vec![*label; batch * passes])?;
                labelled = Some(stage);
            }
            let mut input = trajectory.model_input(&state)?;
            let len = input.len();
            if passes == 2 {
                input.try_reserve_exact(len)?;
                input.extend_from_within(..);
            }
            let prediction = unet.denoise(&input, times_batch(here, passes), timestep, &job.cancel)?;
            let finite = |values: &[f32], states: usize, what: &str| {
                let Some(at) = values.iter().position(|value| !value.is_finite()) else { return Ok(()) };
                let image = at / (values.len() / states) % batch;
                let step = index + 1;
                let text =
                    format!("{what} of image {image} is not finite at step {step} of {steps} (timestep {timestep})");
                Err(Error::new(Status::NotFinite, text))
            };
            finite(&prediction, batch * passes, "the prediction")?;
            let prediction = match passes {
                2 => guidance.combine(&prediction[..len], &prediction[len..], batch)?,
                _ => prediction,
            };
            let added = if needs_noise { Some(noise.of_step(index, here)?) } else { None };
            let lifted = if lifts { Some(noise.of_lift(index, &trajectory)?) } else { None };
            let clean = trajectory.step(&mut state, &prediction, added.as_deref(), lifted.as_deref())?;
            finite(&state, batch, "the state")?;
            if let Some(on_step) = &mut on_step {
                let report = StepReport {
                    step: index,
                    steps,
                    timestep,
                    state: &state,
                    shape: trajectory.shape(),
                    clean: &clean,
                    clean_shape: here,
                };
                if on_step(&report).is_break() {
                    return Err(Error::new(
                        Status::Cancelled,
                        format!("the job was cancelled after step {} of {steps}", index + 1),
                    ));
                }
            }
        }
        job.step("denoise", total, total)?;
        Ok(state)
    }
}

/// The UNets that serve the stages up to `last`: one each, as far as there are.
pub(super) fn used(unets: &mut [Unet], last: usize) -> Result<&mut [Unet]> {
    match unets.len() {
        0 => Err(Error::invalid_argument("there is no UNet")),
        count => Ok(&mut unets[..count.min(last + 1)]),
    }
}

/// The one of these that serves a stage; there must be some.
pub(super) fn serving(unets: &mut [Unet], stage: usize) -> &mut Unet {
    let last = unets.len() - 1;
    &mut unets[stage.min(last)]
}

/// Sets what predictions are conditioned on for each of these UNets.
pub(super) fn condition(unets: &mut [Unet], conditioning: &Conditioning) -> Result<()> {
    unets.iter_mut().enumerate().try_for_each(|(stage, unet)| {
        let at = |error: Error| if stage > 0 { error.at(format_args!("the UNet of stage {stage}")) } else { error };
        unet.set_conditioning(conditioning).map_err(at)
    })
}

/// Meets a stage whose size its UNet refuses before the first step rather than in the middle of the walk. The conditioning
/// is for `passes` times the batch.
pub(super) fn rehearse(unets: &mut [Unet], trajectory: &Trajectory, passes: usize, cancel: &CancelToken) -> Result<()> {
    for stage in (0..=trajectory.stage()).rev() {
        let shape = trajectory.shape_at(stage);
        serving(unets, stage).rehearse(times_batch(shape, passes), cancel).map_err(|error| {
            error.at(format_args!("the UNet refuses stage {stage} of the schedule, {} x {}", shape[3], shape[2]))
        })?;
    }
    Ok(())
}

fn times_batch([batch, channels, height, width]: [usize; 4], passes: usize) -> [usize; 4] {
    [batch * passes, channels, height, width]
}

impl Noise<'_> {
    fn start_of(&self, trajectory: &Trajectory) -> Result<Vec<f32>> {
        let shape = trajectory.shape();
        match self.start {
            None => trajectory.seen_at(trajectory.stage(), self.of_seed(0, trajectory.shape_at(0))?),
            Some(start) if start.len() == shape.iter().product::<usize>() => {
                precision::collect(start.len(), start.iter().copied())
            }
            Some(start) => Err(Error::invalid_argument(format!(
                "the start noise has {} values, {shape:?} needs {}",
                start.len(),
                shape.iter().product::<usize>()
            ))),
        }
    }

    fn of_step(&mut self, index: usize, shape: [usize; 4]) -> Result<Vec<f32>> {
        match &mut self.step {
            Some(given) => fill(shape, |out| given(index, out)),
            None => self.of_seed(index as u32 + 1, shape),
        }
    }

    fn of_lift(&mut self, index: usize, trajectory: &Trajectory) -> Result<Vec<f32>> {
        let stage = trajectory.stage() - 1;
        match &mut self.lift {
            Some(given) => fill(trajectory.shape_at(stage), |out| given(index, out)),
            None => trajectory.seen_at(stage, self.of_seed(0, trajectory.shape_at(0))?),
        }
    }

    fn of_seed(&self, step: u32, shape: [usize; 4]) -> Result<Vec<f32>> {
        let one = shape[1..].iter().product();
        fill(shape, |out| {
            for (image, out) in out.chunks_exact_mut(one).enumerate() {
                standard_normal(self.seed, self.first_image.wrapping_add(image as u32), step, out);
            }
        })
    }
}

/// A state of this shape, which [`Trajectory::new`] has checked.
fn fill(shape: [usize; 4], with: impl FnOnce(&mut [f32])) -> Result<Vec<f32>> {
    let len = shape.iter().product();
    let mut values = Vec::new();
    values.try_reserve_exact(len)?;
    values.resize(len, 0.0);
    with(&mut values);
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guidance_is_the_linear_extrapolation() {
        let guidance = Guidance { scale: 3.0, rescale: 0.0 };
        assert_eq!(guidance.combine(&[1.0, -1.0], &[2.0, 0.5], 1).unwrap(), [4.0, 3.5]);
    }

    #[test]
    fn a_full_rescale_keeps_the_deviation_of_the_conditional_prediction() {
        let unconditional = [0.3, -0.2, 0.9, 0.1, 5.0, 1.0, -3.0, 2.0];
        let conditional = [0.5, -0.7, 1.1, 0.0, 4.0, 3.0, -2.0, 7.0];
        let full = Guidance { scale: 7.5, rescale: 1.0 }.combine(&unconditional, &conditional, 2).unwrap();
        for (guided, conditional) in full.chunks(4).zip(conditional.chunks(4)) {
            assert!((deviation(guided) - deviation(conditional)).abs() < 1e-6);
        }
        let plain = Guidance { scale: 7.5, rescale: 0.0 }.combine(&unconditional, &conditional, 2).unwrap();
        let half = Guidance { scale: 7.5, rescale: 0.5 }.combine(&unconditional, &conditional, 2).unwrap();
        for ((plain, full), half) in plain.iter().zip(&full).zip(&half) {
            assert!((0.5 * (plain + full) - half).abs() < 1e-5);
        }
    }

    #[test]
    fn ranges_are_checked() {
        for (scale, rescale) in [(-1.0, 0.0), (f64::NAN, 0.0), (1e9, 0.0), (1.0, 1.1), (1.0, f64::NAN)] {
            assert!(Guidance { scale, rescale }.check().is_err());
        }
    }
}
