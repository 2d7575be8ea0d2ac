//! Classifier-free guidance, and the walk from noise to a clean state under it.
//!
//! It drives a [`Trajectory`] with the predictions of a [`Unet`]; it knows neither prompts nor images.

use std::ops::ControlFlow;

use super::noise::standard_normal;
use super::precision;
use super::schedule::{Plan, Trajectory};
use super::unet::{Conditioning, Unet};
use crate::error::{Error, Result, Status};
use crate::progress::Job;

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

/// Fills in the noise `[B, C, H, W]` that the step of this index adds.
pub type GivenNoise<'a> = &'a mut (dyn FnMut(usize, &mut [f32]) + 'a);

/// Where noise comes from. Values are standard normal.
#[derive(Default)]
pub struct Noise<'a> {
    /// The seed of [`standard_normal`].
    pub seed: u64,
    /// The image number of the batch's first state; the others follow.
    pub first_image: u32,
    /// The start noise `[B, C, H, W]`, if the host gives it.
    pub start: Option<&'a [f32]>,
    /// The noise that steps add, if the host gives it.
    pub step: Option<GivenNoise<'a>>,
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
    /// `[B, C, H, W]`.
    pub shape: [usize; 4],
    /// The next state.
    pub state: &'a [f32],
    /// The clean state as it is predicted now.
    pub clean: &'a [f32],
}

/// Told of every step; [`ControlFlow::Break`] cancels.
pub type OnStep<'a> = &'a mut (dyn FnMut(&StepReport<'_>) -> ControlFlow<()> + 'a);

/// What is drawn.
pub struct Walk<'a, 'c> {
    /// `[B, C, H, W]` of the states.
    pub shape: [usize; 4],
    /// The steps.
    pub plan: Plan,
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
    /// Runs all steps and gives the last state `[B, C, H, W]`. The UNet keeps its composition.
    ///
    /// # Errors
    /// [`Status::InvalidArgument`] for sizes that do not fit together and those of [`Unet::denoise`];
    /// [`Status::NotFinite`], naming the step, as soon as a prediction holds a NaN or infinity; [`Status::Cancelled`].
    pub fn run(self, unet: &mut Unet, job: &mut Job<'_>) -> Result<Vec<f32>> {
        let Self { shape, plan, guidance, conditioning, noise, clean, mut on_step } = self;
        let Noise { seed, first_image, start, step: mut given_noise } = noise;
        guidance.check()?;
        let batch = shape[0];
        let state_len = shape[1..].iter().try_fold(1_usize, |product, size| product.checked_mul(*size));
        let (Some(state_len), Some(len)) =
            (state_len, state_len.and_then(|state| state.checked_mul(batch)).filter(|len| *len > 0))
        else {
            return Err(Error::invalid_argument(format!("a state of shape {shape:?} is empty or too large")));
        };
        let passes = if guidance.needs_unconditional() { 2 } else { 1 };
        if conditioning.batch != batch * passes {
            return Err(Error::invalid_argument(format!(
                "the conditioning has a batch of {}, {batch} states with guidance scale {} need {}",
                conditioning.batch,
                guidance.scale,
                batch * passes
            )));
        }
        if clean.is_none() && plan.start > 0 {
            return Err(Error::invalid_argument(format!(
                "a walk that starts at step {} needs a clean state to start from",
                plan.start
            )));
        }
        let from_seed = |step: u32, out: &mut [f32]| {
            for (image, out) in out.chunks_exact_mut(state_len).enumerate() {
                standard_normal(seed, first_image.wrapping_add(image as u32), step, out);
            }
        };
        let mut fresh = Vec::new();
        fresh.try_reserve_exact(len)?;
        fresh.resize(len, 0.0_f32);
        match start {
            Some(start) if start.len() == len => fresh.copy_from_slice(start),
            Some(start) => {
                return Err(Error::invalid_argument(format!(
                    "the start noise has {} values, {shape:?} needs {len}",
                    start.len()
                )));
            }
            None => from_seed(0, &mut fresh),
        }
        unet.set_conditioning(conditioning)?;
        let mut state = plan.begin(&fresh, clean)?;
        let (first, steps) = (plan.start, plan.steps.len());
        let total = plan.len() as u64;
        let mut trajectory = Trajectory::new(plan);
        while let Some((index, step)) = trajectory.current() {
            let (timestep, needs_noise) = (step.timestep, step.needs_noise());
            job.step("denoise", (index - first) as u64, total)?;
            let mut input = trajectory.model_input(&state)?;
            if passes == 2 {
                input.try_reserve_exact(len)?;
                input.extend_from_within(..);
            }
            let model_shape = [batch * passes, shape[1], shape[2], shape[3]];
            let prediction = unet.denoise(&input, model_shape, timestep, &job.cancel)?;
            let finite = |values: &[f32], what: &str| match values.iter().position(|value| !value.is_finite()) {
                None => Ok(()),
                Some(at) => Err(Error::new(
                    Status::NotFinite,
                    format!(
                        "{what} of image {} is not finite at step {} of {steps} (timestep {timestep})",
                        at / state_len % batch,
                        index + 1
                    ),
                )),
            };
            finite(&prediction, "the prediction")?;
            let prediction = match passes {
                2 => guidance.combine(&prediction[..len], &prediction[len..], batch)?,
                _ => prediction,
            };
            let added = if needs_noise {
                match &mut given_noise {
                    Some(given) => given(index, &mut fresh),
                    None => from_seed(index as u32 + 1, &mut fresh),
                }
                Some(fresh.as_slice())
            } else {
                None
            };
            let clean = trajectory.step(&mut state, &prediction, added)?;
            finite(&state, "the state")?;
            if let Some(on_step) = &mut on_step {
                let report = StepReport { step: index, steps, timestep, shape, state: &state, clean: &clean };
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
