//! Noisy states and what a UNet should say of them.

use rand_chacha::ChaCha12Rng;
use rand_core::{RngCore, SeedableRng};

use crate::diffusion::noise::standard_normal;
use crate::diffusion::schedule::{Prediction, SchedulerConfig};
use crate::diffusion::unet::Conditioning;
use crate::error::{Error, Result};
use crate::memory::{collected, copied, extend, filled, zeroed};

/// Pictures with their texts.
#[derive(Clone, Debug)]
pub struct Examples {
    /// Clean states `[count, C, H, W]`: pictures in `[-1, 1]`, or scaled latents.
    pub states: Vec<f32>,
    /// `[C, H, W]`.
    pub shape: [usize; 3],
    /// The conditioning of each picture; its batch is the number of pictures.
    pub conditioning: Conditioning,
    /// Rows of each picture's text on which a set acts; `None` for all rows of all texts (the paper's global scope).
    pub rows: Option<Vec<Vec<ActingRow>>>,
    /// Timesteps are drawn as `T u^p` with this `p`, above 0 and at most 1, and a uniform `u`: 1 spreads them evenly, as Cones
    /// does; below, they lean to high noise.
    pub timestep_power: f64,
}

/// Fails unless timesteps can be drawn by this power.
pub(super) fn check_power(power: f64) -> Result<()> {
    match power > 0.0 && power <= 1.0 {
        true => Ok(()),
        false => Err(Error::invalid_argument(format!("timesteps to the power {power}, must be above 0 and at most 1"))),
    }
}

/// A row on which a set acts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ActingRow {
    /// Of a text, or of all texts of a batch, `entry * tokens + token`.
    pub row: usize,
    /// Which of several sets that are tuned together; 0 where there is one.
    pub set: usize,
}

impl ActingRow {
    fn moved(self, by: usize) -> Self {
        Self { row: self.row + by, ..self }
    }
}

impl From<usize> for ActingRow {
    fn from(row: usize) -> Self {
        Self { row, set: 0 }
    }
}

/// What the prediction for a state should equal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Objective {
    /// What the training target is: the noise, the velocity or the picture (the concept-implanting loss and its prior).
    Training,
    /// What the untouched model predicts, for the texts of other examples in their order: the same ones (a preserve
    /// term) or neutral ones (the anchor of an erasure).
    Untouched,
}

/// A batch of noisy states.
#[derive(Clone, Debug, Default)]
pub struct Batch {
    /// Noisy states `[B, C, H, W]`.
    pub states: Vec<f32>,
    /// Training timesteps `[B]`.
    pub timesteps: Vec<i64>,
    /// What the prediction should be, `[B, C, H, W]`.
    pub targets: Vec<f32>,
    /// The weight of each state's mean squared error.
    pub weights: Vec<f32>,
    /// What each state is conditioned on.
    pub conditioning: Conditioning,
    /// Rows on which a set acts.
    pub rows: Vec<ActingRow>,
}

impl Examples {
    /// The number of pictures.
    pub fn len(&self) -> usize {
        self.conditioning.batch
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Some of the pictures, one after the other, each as often as it is named.
    pub(super) fn picked(&self, entries: &[usize]) -> Result<Self> {
        let elements: usize = self.shape.iter().product();
        let mut states = Vec::new();
        for entry in entries {
            extend(&mut states, self.states[entry * elements..(entry + 1) * elements].iter().copied())?;
        }
        let rows = self.rows.as_ref().map(|rows| entries.iter().map(|&entry| rows[entry].clone()).collect());
        Ok(Self {
            states,
            shape: self.shape,
            conditioning: pick(&self.conditioning, entries)?,
            rows,
            timestep_power: self.timestep_power,
        })
    }

    /// Fails unless sizes agree and timesteps can be drawn.
    pub(super) fn check(&self, what: &str) -> Result<()> {
        let elements: usize = self.shape.iter().product();
        if self.is_empty() || elements == 0 || self.states.len() != self.len() * elements {
            return Err(Error::invalid_argument(format!(
                "{what}: {} values are not {} pictures of {:?}",
                self.states.len(),
                self.len(),
                self.shape
            )));
        }
        if let Some(value) = self.states.iter().find(|value| !value.is_finite()) {
            return Err(Error::invalid_argument(format!("{what}: a picture holds {value}")));
        }
        let tokens = self.conditioning.tokens;
        if tokens == 0 || !self.conditioning.context.len().is_multiple_of(self.len() * tokens) {
            return Err(Error::invalid_argument(format!(
                "{what}: the texts are not [{}, {tokens}, features]",
                self.len()
            )));
        }
        if let Some(rows) = &self.rows
            && (rows.len() != self.len() || rows.iter().flatten().any(|acting| acting.row >= tokens))
        {
            return Err(Error::invalid_argument(format!("{what}: rows lie outside the {tokens} tokens of a text")));
        }
        check_power(self.timestep_power).map_err(|error| error.at(what))
    }

    /// Draws `batch` noisy states with a total weight of `weight`: pictures in random order, each as often as the others,
    /// timesteps spread over the schedule as [`Examples::timestep_power`] says. Depends on nothing but seed, stream and number.
    pub(super) fn draw(
        &self,
        schedule: &SchedulerConfig,
        batch: usize,
        weight: f32,
        seed: u64,
        stream: u32,
        number: u32,
    ) -> Result<Batch> {
        let (entries, mut random) = self.order(batch, seed, stream, number)?;
        let mut places = collected(0..batch)?;
        shuffle(&mut places, &mut random);
        let steps = schedule.training.len();
        let timesteps = places
            .iter()
            .map(|&place| ((place as f64 + unit(&mut random)) / batch as f64).powf(self.timestep_power))
            .map(|share| ((share * steps as f64) as usize).min(steps - 1));
        let timesteps = collected(timesteps)?;
        let elements: usize = self.shape.iter().product();
        let mut drawn = Batch {
            weights: filled(batch, weight / batch as f32)?,
            timesteps: collected(timesteps.iter().map(|&t| t as i64))?,
            conditioning: pick(&self.conditioning, &entries)?,
            ..Batch::default()
        };
        let mut noise = zeroed::<f32>(elements)?;
        for (at, (&entry, &t)) in entries.iter().zip(&timesteps).enumerate() {
            standard_normal(seed ^ 0x6d61_6375_6c61, stream << 16 | at as u32, number, &mut noise);
            let alpha_bar = schedule.training.alpha_bar(t);
            let (signal, spread) = (alpha_bar.sqrt() as f32, (1.0 - alpha_bar).sqrt() as f32);
            let clean = &self.states[entry * elements..][..elements];
            extend(&mut drawn.states, clean.iter().zip(&noise).map(|(x, e)| signal * x + spread * e))?;
            let targets = clean.iter().zip(&noise).map(|(x, e)| match schedule.prediction {
                Prediction::Epsilon => *e,
                Prediction::Velocity => signal * e - spread * x,
                Prediction::Sample => *x,
            });
            extend(&mut drawn.targets, targets)?;
            let tokens = self.conditioning.tokens;
            match &self.rows {
                None => extend(&mut drawn.rows, (0..tokens).map(|token| ActingRow::from(at * tokens + token)))?,
                Some(rows) => extend(&mut drawn.rows, rows[entry].iter().map(|acting| acting.moved(at * tokens)))?,
            }
        }
        Ok(drawn)
    }

    /// Which pictures a draw takes.
    pub(super) fn drawn(&self, batch: usize, seed: u64, stream: u32, number: u32) -> Result<Vec<usize>> {
        Ok(self.order(batch, seed, stream, number)?.0)
    }

    /// Which pictures a draw takes, and the generator for what follows.
    fn order(&self, batch: usize, seed: u64, stream: u32, number: u32) -> Result<(Vec<usize>, ChaCha12Rng)> {
        let mut random = ChaCha12Rng::seed_from_u64(seed);
        random.set_stream(u64::from(stream) << 32 | u64::from(number));
        let mut entries: Vec<usize> = Vec::new();
        while entries.len() < batch {
            let mut round = collected(0..self.len())?;
            shuffle(&mut round, &mut random);
            extend(&mut entries, round)?;
        }
        entries.truncate(batch);
        Ok((entries, random))
    }

    /// The conditioning that the entries of a draw have in other examples: their anchors.
    pub(super) fn drawn_from(
        &self,
        anchors: &Conditioning,
        batch: usize,
        seed: u64,
        stream: u32,
        number: u32,
    ) -> Result<Conditioning> {
        pick(anchors, &self.order(batch, seed, stream, number)?.0)
    }
}

impl Batch {
    /// Puts another batch behind this one. Both have as many tokens and features.
    pub(super) fn append(&mut self, other: Batch) -> Result<()> {
        if self.states.is_empty() {
            *self = other;
            return Ok(());
        }
        let before = self.conditioning.batch * self.conditioning.tokens;
        extend(&mut self.rows, other.rows.iter().map(|acting| acting.moved(before)))?;
        extend(&mut self.states, other.states)?;
        extend(&mut self.timesteps, other.timesteps)?;
        extend(&mut self.targets, other.targets)?;
        extend(&mut self.weights, other.weights)?;
        let (ours, theirs) = (&mut self.conditioning, other.conditioning);
        ours.batch += theirs.batch;
        extend(&mut ours.context, theirs.context)?;
        append(&mut ours.text_embeds, theirs.text_embeds)?;
        append(&mut ours.time_ids, theirs.time_ids)?;
        append(&mut ours.class_labels, theirs.class_labels)?;
        append(&mut ours.timestep_cond, theirs.timestep_cond)
    }

    /// The states `from..to` as a batch of their own.
    pub(super) fn part(&self, from: usize, to: usize) -> Result<Batch> {
        let elements = self.states.len() / self.timesteps.len().max(1);
        let tokens = self.conditioning.tokens;
        let own = |acting: &&ActingRow| (from * tokens..to * tokens).contains(&acting.row);
        let rows = self.rows.iter().filter(own);
        Ok(Batch {
            states: copied(&self.states[from * elements..to * elements])?,
            timesteps: copied(&self.timesteps[from..to])?,
            targets: copied(&self.targets[from * elements..to * elements])?,
            weights: copied(&self.weights[from..to])?,
            conditioning: pick(&self.conditioning, &collected(from..to)?)?,
            rows: collected(rows.map(|acting| ActingRow { row: acting.row - from * tokens, ..*acting }))?,
        })
    }
}

fn append<T>(ours: &mut Option<Vec<T>>, theirs: Option<Vec<T>>) -> Result<()> {
    match (ours.as_mut(), theirs) {
        (Some(ours), Some(theirs)) => extend(ours, theirs),
        _ => Ok(()),
    }
}

/// The conditioning of some entries.
pub(super) fn pick(all: &Conditioning, entries: &[usize]) -> Result<Conditioning> {
    fn rows<T: Copy>(values: &[T], batch: usize, entries: &[usize]) -> Result<Vec<T>> {
        let width = values.len() / batch.max(1);
        let mut rows = Vec::new();
        rows.try_reserve_exact(entries.len() * width)?;
        entries.iter().for_each(|&entry| rows.extend_from_slice(&values[entry * width..(entry + 1) * width]));
        Ok(rows)
    }
    fn some<T: Copy>(values: &Option<Vec<T>>, batch: usize, entries: &[usize]) -> Result<Option<Vec<T>>> {
        values.as_ref().map(|values| rows(values, batch, entries)).transpose()
    }
    let batch = all.batch;
    Ok(Conditioning {
        batch: entries.len(),
        tokens: all.tokens,
        context: rows(&all.context, batch, entries)?,
        text_embeds: some(&all.text_embeds, batch, entries)?,
        time_ids: some(&all.time_ids, batch, entries)?,
        class_labels: some(&all.class_labels, batch, entries)?,
        timestep_cond: some(&all.timestep_cond, batch, entries)?,
    })
}

/// A number in [0, 1).
pub(super) fn unit(random: &mut ChaCha12Rng) -> f64 {
    (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// Fisher and Yates, with a bounded number drawn by multiplication (Lemire 2019, without rejection: the bias is below
/// 2^-50 for lists of this size).
pub(super) fn shuffle(list: &mut [usize], random: &mut ChaCha12Rng) {
    for last in (1..list.len()).rev() {
        let chosen = ((u128::from(random.next_u64()) * (last as u128 + 1)) >> 64) as usize;
        list.swap(last, chosen);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timesteps_lean_to_high_noise_by_their_power() {
        let conditioning = Conditioning { batch: 1, tokens: 1, context: vec![0.0], ..Conditioning::default() };
        let schedule = SchedulerConfig::from_json(br#"{"_class_name": "DDIMScheduler"}"#, None).unwrap();
        let steps = schedule.training.len() as i64;
        for (timestep_power, below_half) in [(1.0, 0.5), (0.5, 0.25), (0.25, 0.0625)] {
            let conditioning = conditioning.clone();
            let examples = Examples { states: vec![0.5], shape: [1, 1, 1], conditioning, rows: None, timestep_power };
            let timesteps = examples.draw(&schedule, 800, 1.0, 7, 0, 0).unwrap().timesteps;
            assert!(timesteps.iter().all(|t| (0..steps).contains(t)));
            let share = timesteps.iter().filter(|&&t| t < steps / 2).count() as f64 / 800.0;
            // One in each of 800 equal parts: the share is as good as exact.
            assert!((share - below_half).abs() <= 2.0 / 800.0, "{timestep_power}: {share}");
        }
    }
}
