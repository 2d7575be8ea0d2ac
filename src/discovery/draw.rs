//! Noisy states and what a UNet should say of them.

use rand_chacha::ChaCha12Rng;
use rand_core::{RngCore, SeedableRng};

use crate::diffusion::noise::standard_normal;
use crate::diffusion::schedule::{Prediction, SchedulerConfig};
use crate::diffusion::unet::Conditioning;
use crate::error::{Error, Result};

/// Pictures with their texts.
#[derive(Clone, Debug, Default)]
pub struct Examples {
    /// Clean states `[count, C, H, W]`: pictures in `[-1, 1]`, or scaled latents.
    pub states: Vec<f32>,
    /// `[C, H, W]`.
    pub shape: [usize; 3],
    /// The conditioning of each picture; its batch is the number of pictures.
    pub conditioning: Conditioning,
    /// Rows of each picture's text on which a set acts; `None` for all rows of all texts (the paper's global scope).
    pub rows: Option<Vec<Vec<usize>>>,
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
    /// Rows `entry * tokens + token` on which a set acts.
    pub rows: Vec<usize>,
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

    /// Fails unless sizes agree.
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
            && (rows.len() != self.len() || rows.iter().flatten().any(|&row| row >= tokens))
        {
            return Err(Error::invalid_argument(format!("{what}: rows lie outside the {tokens} tokens of a text")));
        }
        Ok(())
    }

    /// Draws `batch` noisy states with a total weight of `weight`: pictures in random order, each as often as the others,
    /// timesteps spread evenly over the schedule. Depends on nothing but seed, stream and number.
    pub(super) fn draw(
        &self,
        schedule: &SchedulerConfig,
        batch: usize,
        weight: f32,
        seed: u64,
        stream: u32,
        number: u32,
    ) -> Batch {
        let (entries, mut random) = self.order(batch, seed, stream, number);
        let mut places: Vec<usize> = (0..batch).collect();
        shuffle(&mut places, &mut random);
        let steps = schedule.training.len();
        let unit = |random: &mut ChaCha12Rng| (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let timesteps: Vec<usize> = places
            .iter()
            .map(|&place| (((place as f64 + unit(&mut random)) / batch as f64 * steps as f64) as usize).min(steps - 1))
            .collect();
        let elements: usize = self.shape.iter().product();
        let mut drawn = Batch {
            weights: vec![weight / batch as f32; batch],
            timesteps: timesteps.iter().map(|&t| t as i64).collect(),
            conditioning: pick(&self.conditioning, &entries),
            ..Batch::default()
        };
        let mut noise = vec![0f32; elements];
        for (at, (&entry, &t)) in entries.iter().zip(&timesteps).enumerate() {
            standard_normal(seed ^ 0x6d61_6375_6c61, stream << 16 | at as u32, number, &mut noise);
            let alpha_bar = schedule.training.alpha_bar(t);
            let (signal, spread) = (alpha_bar.sqrt() as f32, (1.0 - alpha_bar).sqrt() as f32);
            let clean = &self.states[entry * elements..][..elements];
            drawn.states.extend(clean.iter().zip(&noise).map(|(x, e)| signal * x + spread * e));
            drawn.targets.extend(clean.iter().zip(&noise).map(|(x, e)| match schedule.prediction {
                Prediction::Epsilon => *e,
                Prediction::Velocity => signal * e - spread * x,
                Prediction::Sample => *x,
            }));
            let tokens = self.conditioning.tokens;
            match &self.rows {
                None => drawn.rows.extend((0..tokens).map(|token| at * tokens + token)),
                Some(rows) => drawn.rows.extend(rows[entry].iter().map(|row| at * tokens + row)),
            }
        }
        drawn
    }

    /// Which pictures a draw takes, and the generator for what follows.
    fn order(&self, batch: usize, seed: u64, stream: u32, number: u32) -> (Vec<usize>, ChaCha12Rng) {
        let mut random = ChaCha12Rng::seed_from_u64(seed);
        random.set_stream(u64::from(stream) << 32 | u64::from(number));
        let mut entries: Vec<usize> = Vec::with_capacity(batch);
        while entries.len() < batch {
            let mut round: Vec<usize> = (0..self.len()).collect();
            shuffle(&mut round, &mut random);
            entries.extend(round);
        }
        entries.truncate(batch);
        (entries, random)
    }

    /// The conditioning that the entries of a draw have in other examples: their anchors.
    pub(super) fn drawn_from(
        &self,
        anchors: &Conditioning,
        batch: usize,
        seed: u64,
        stream: u32,
        number: u32,
    ) -> Conditioning {
        pick(anchors, &self.order(batch, seed, stream, number).0)
    }
}

impl Batch {
    /// Puts another batch behind this one. Both have as many tokens and features.
    pub(super) fn append(&mut self, other: Batch) {
        if self.states.is_empty() {
            *self = other;
            return;
        }
        let before = self.conditioning.batch * self.conditioning.tokens;
        self.rows.extend(other.rows.iter().map(|row| row + before));
        self.states.extend(other.states);
        self.timesteps.extend(other.timesteps);
        self.targets.extend(other.targets);
        self.weights.extend(other.weights);
        let (ours, theirs) = (&mut self.conditioning, other.conditioning);
        ours.batch += theirs.batch;
        ours.context.extend(theirs.context);
        append(&mut ours.text_embeds, theirs.text_embeds);
        append(&mut ours.time_ids, theirs.time_ids);
        append(&mut ours.class_labels, theirs.class_labels);
        append(&mut ours.timestep_cond, theirs.timestep_cond);
    }

    /// The states `from..to` as a batch of their own.
    pub(super) fn part(&self, from: usize, to: usize) -> Batch {
        let elements = self.states.len() / self.timesteps.len().max(1);
        let tokens = self.conditioning.tokens;
        let entries: Vec<usize> = (from..to).collect();
        Batch {
            states: self.states[from * elements..to * elements].to_vec(),
            timesteps: self.timesteps[from..to].to_vec(),
            targets: self.targets[from * elements..to * elements].to_vec(),
            weights: self.weights[from..to].to_vec(),
            conditioning: pick(&self.conditioning, &entries),
            rows: self
                .rows
                .iter()
                .filter(|row| (from * tokens..to * tokens).contains(*row))
                .map(|row| row - from * tokens)
                .collect(),
        }
    }
}

fn append<T>(ours: &mut Option<Vec<T>>, theirs: Option<Vec<T>>) {
    if let (Some(ours), Some(theirs)) = (ours.as_mut(), theirs) {
        ours.extend(theirs);
    }
}

/// The conditioning of some entries.
pub(super) fn pick(all: &Conditioning, entries: &[usize]) -> Conditioning {
    fn rows<T: Clone>(values: &[T], batch: usize, entries: &[usize]) -> Vec<T> {
        let width = values.len() / batch.max(1);
        entries.iter().flat_map(|&entry| values[entry * width..(entry + 1) * width].to_vec()).collect()
    }
    let batch = all.batch;
    Conditioning {
        batch: entries.len(),
        tokens: all.tokens,
        context: rows(&all.context, batch, entries),
        text_embeds: all.text_embeds.as_ref().map(|values| rows(values, batch, entries)),
        time_ids: all.time_ids.as_ref().map(|values| rows(values, batch, entries)),
        class_labels: all.class_labels.as_ref().map(|values| rows(values, batch, entries)),
        timestep_cond: all.timestep_cond.as_ref().map(|values| rows(values, batch, entries)),
    }
}

/// Fisher and Yates, with a bounded number drawn by multiplication (Lemire 2019, without rejection: the bias is below
/// 2^-50 for lists of this size).
fn shuffle(list: &mut [usize], random: &mut ChaCha12Rng) {
    for last in (1..list.len()).rev() {
        let chosen = ((u128::from(random.next_u64()) * (last as u128 + 1)) >> 64) as usize;
        list.swap(last, chosen);
    }
}
