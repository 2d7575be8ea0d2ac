//! One search from examples to a set of neurons.

use std::io::Write;
use std::ops::Range;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use super::checkpoint;
use super::descent::Descent;
use super::draw::{Batch, Examples, Objective, pick};
use super::gradient::{KeyValueGradient, TextSlope};
use super::held_out;
use super::invert::{Inversion, InvertOptions, Inverted, TokenTexts};
use super::search::{Bound, Found, Method, Search, Slope};
use super::tune::{Members, TuneOptions, Tuning};
use crate::concept::{Indices, Layer, NeuronSet, Precision, Values};
use crate::diffusion::schedule::SchedulerConfig;
use crate::diffusion::unet::{Conditioning, Unet};
use crate::error::{Error, Result};
use crate::memory::{collected, extend, zeroed};
use crate::progress::{Job, Progress};

/// A part of the loss: the mean squared error of predictions for some examples.
#[derive(Clone, Debug)]
pub struct Term {
    /// What is shown.
    pub examples: Examples,
    /// What the prediction should be.
    pub objective: Objective,
    /// For [`Objective::Untouched`]: the texts whose untouched prediction is the goal, one a picture, e.g. with a neutral
    /// word in place of the concept; `None` for the examples' own (what must stay as it is).
    pub anchors: Option<Conditioning>,
    /// Its share of the loss, above 0: w of the prior preservation, for one.
    pub weight: f32,
}

/// How a search runs.
#[derive(Clone, Debug, PartialEq)]
pub struct DiscoveryOptions {
    /// The search method.
    pub method: Method,
    /// How many weights are shut at most, or from which score on.
    pub bound: Bound,
    /// Batches of the search, at least 1; about 100 for a first set.
    pub batches: usize,
    /// States of each term in a batch, at least 1.
    pub batch: usize,
    /// Fixes pictures, timesteps and noises.
    pub seed: u64,
    /// What comes before the search: the embedding of the word of [`Discovery::learning`] is learnt, and the search sees texts
    /// with what was learnt. `None` leaves it.
    pub invert: Option<InvertOptions>,
    /// What follows the search: new values for the found weights; `None` to shut them.
    pub tune: Option<TuneOptions>,
    /// A file in which search and tuning are kept, after each [`CHECKPOINT_BATCHES`] batches, when they are broken off and
    /// at the end. If it is there, the same search goes on where it was, and finds what it would have found in one go.
    pub checkpoint: Option<PathBuf>,
}

/// Batches between two writes of a checkpoint.
pub const CHECKPOINT_BATCHES: usize = 10;

/// The smallest set that a held-out loss is asked about, as a part of all weights: 0.005 %.
const LEAST_PART: usize = 20_000;

/// Held-out batches: numbers that no search or tuning reaches.
const HELD_OUT: Range<usize> = 1 << 31..(1 << 31) + 4;

/// The first batch of an inversion.
const INVERTING: usize = 1 << 30;

/// Batches whose mean is the running loss.
const RUNNING: usize = 10;

/// What a search is asked to lower.
pub struct Discovery {
    terms: Vec<Term>,
    shape: [usize; 3],
    schedule: SchedulerConfig,
    learning: Option<Learning>,
}

/// Texts with a word whose embedding is learnt.
struct Learning {
    texts: TokenTexts,
    /// Which of them each picture of each term has, if any.
    of: Vec<Vec<Option<usize>>>,
}

/// The conditioning of each term's pictures with a learnt word; none where it stands in no text of theirs.
type Learnt = Vec<Option<Conditioning>>;

/// What a search found.
#[derive(Clone, Debug)]
pub struct Report {
    /// The neurons to shut, or to give new values.
    pub neurons: NeuronSet,
    /// Their values, if they were tuned.
    pub values: Option<Values>,
    /// The learnt embedding, if one was.
    pub inverted: Option<Inverted>,
    /// The loss of each batch, along the search and then the tuning.
    pub losses: Vec<f64>,
    /// With [`Bound::HeldOut`] the sizes that were tried, in weights, each with its held-out loss; else empty.
    pub sizes: Vec<(usize, f64)>,
    /// See [`Found::agreement`].
    pub agreement: f64,
    /// Time from the first batch to the last.
    pub elapsed: Duration,
}

impl Discovery {
    /// Joins the terms of a loss: the subject's pictures first, then what must stay.
    ///
    /// Errors: [`crate::Status::InvalidArgument`] for no term, sizes that do not fit, pictures that are not finite, states
    /// or texts of different shapes, a weight that is not above 0, or anchors that are not one a picture.
    pub fn new(terms: Vec<Term>, schedule: SchedulerConfig) -> Result<Self> {
        let Some(first) = terms.first() else {
            return Err(Error::invalid_argument("a search needs pictures to learn from"));
        };
        let shape = first.examples.shape;
        let text =
            |conditioning: &Conditioning| (conditioning.tokens, conditioning.context.len() / conditioning.batch.max(1));
        let expected = text(&first.examples.conditioning);
        for (at, term) in terms.iter().enumerate() {
            let what = format!("term {at}");
            term.examples.check(&what)?;
            if term.examples.shape != shape || text(&term.examples.conditioning) != expected {
                return Err(Error::invalid_argument(format!(
                    "{what} has states or texts of another shape than term 0"
                )));
            }
            if !(term.weight.is_finite() && term.weight > 0.0) {
                return Err(Error::invalid_argument(format!("{what} has weight {}, must be above 0", term.weight)));
            }
            if let Some(anchors) = &term.anchors
                && (anchors.batch != term.examples.len() || text(anchors) != expected)
            {
                return Err(Error::invalid_argument(format!("{what} needs one anchor a picture, of the same length")));
            }
        }
        Ok(Self { shape, terms, schedule, learning: None })
    }

    /// Makes ready for [`DiscoveryOptions::invert`]: `of` says of each picture of each term which of `texts` it has, if any.
    ///
    /// Errors: [`crate::Status::InvalidArgument`] if they do not fit.
    pub fn learning(mut self, texts: TokenTexts, of: Vec<Vec<Option<usize>>>) -> Result<Self> {
        let fits = |(term, of): (&Term, &Vec<Option<usize>>)| {
            of.len() == term.examples.len() && of.iter().flatten().all(|&text| text < texts.len())
        };
        if of.len() != self.terms.len() || !self.terms.iter().zip(&of).all(fits) {
            return Err(Error::invalid_argument("there must be a text, or none, for each picture of each term"));
        }
        self.learning = Some(Learning { texts, of });
        Ok(self)
    }

    /// `[C, H, W]` of the states.
    pub fn shape(&self) -> [usize; 3] {
        self.shape
    }

    /// Batch `number` of the search without the targets of [`Objective::Untouched`]: for [`KeyValueGradient::open`].
    ///
    /// Errors: [`crate::Status::OutOfMemory`].
    pub fn example(&self, options: &DiscoveryOptions) -> Result<Batch> {
        let mut batch = Batch::default();
        for (at, term) in self.terms.iter().enumerate() {
            batch.append(term.examples.draw(
                &self.schedule,
                options.batch,
                term.weight,
                options.seed,
                at as u32,
                0,
            )?)?;
        }
        Ok(batch)
    }

    /// Batch `number` with its targets, which know nothing of what was learnt.
    fn batch(
        &self,
        unet: &mut Unet,
        options: &DiscoveryOptions,
        number: usize,
        learnt: &Learnt,
        job: &Job<'_>,
    ) -> Result<Batch> {
        let mut batch = Batch::default();
        for (at, term) in self.terms.iter().enumerate() {
            let (seed, stream, number) = (options.seed, at as u32, number as u32);
            let mut drawn = term.examples.draw(&self.schedule, options.batch, term.weight, seed, stream, number)?;
            if term.objective == Objective::Untouched {
                let conditioning = match &term.anchors {
                    Some(anchors) => term.examples.drawn_from(anchors, options.batch, seed, stream, number)?,
                    None => pick(&drawn.conditioning, &collected(0..drawn.conditioning.batch)?)?,
                };
                drawn.targets = self.predict(unet, &drawn, &conditioning, job)?;
            }
            if let Some(Some(conditioning)) = learnt.get(at) {
                drawn.conditioning = term.examples.drawn_from(conditioning, options.batch, seed, stream, number)?;
            }
            batch.append(drawn)?;
        }
        Ok(batch)
    }

    /// What the UNet says of a batch's states under a conditioning: all at once, or one by one if it takes one timestep.
    fn predict(&self, unet: &mut Unet, batch: &Batch, conditioning: &Conditioning, job: &Job<'_>) -> Result<Vec<f32>> {
        let [channels, height, width] = self.shape;
        let count = batch.timesteps.len();
        let lot = if unet.takes_timesteps() { count } else { 1 };
        let mut said = Vec::new();
        for from in (0..count).step_by(lot) {
            let part = batch.part(from, from + lot)?;
            let entries: Vec<usize> = (from..from + lot).collect();
            unet.set_conditioning(&pick(conditioning, &entries)?)?;
            let timesteps: Vec<f64> = part.timesteps.iter().map(|&t| t as f64).collect();
            let states = [lot, channels, height, width];
            extend(&mut said, unet.denoise_each(&part.states, states, &timesteps, &job.cancel)?)?;
        }
        Ok(said)
    }

    /// The conditioning of each term with rows for the word that is learnt.
    fn learnt(&self, Learning { texts, of }: &Learning, rows: &[Vec<f32>], job: &Job<'_>) -> Result<Learnt> {
        let of_term = |(term, of): (&Term, &Vec<Option<usize>>)| match of.iter().any(Option::is_some) {
            true => texts.encode(rows, &term.examples.conditioning, of, &job.cancel).map(Some),
            false => Ok(None),
        };
        self.terms.iter().zip(of).map(of_term).collect()
    }

    /// The loss of batch `number` with these rows for the word, and what it says of the texts.
    fn text_slope(
        &self,
        (unet, gradient): (&mut Unet, &KeyValueGradient),
        options: &DiscoveryOptions,
        learning: &Learning,
        rows: &[Vec<f32>],
        number: usize,
        job: &Job<'_>,
    ) -> Result<TextSlope> {
        let batch = self.batch(unet, options, number, &self.learnt(learning, rows, job)?, job)?;
        let mut texts = Vec::new();
        for (at, (term, of)) in self.terms.iter().zip(&learning.of).enumerate() {
            let drawn = term.examples.drawn(options.batch, options.seed, at as u32, number as u32)?;
            extend(&mut texts, drawn.into_iter().map(|picture| of[picture]))?;
        }
        gradient.text_slope(&batch, self.shape, &texts, learning.texts.len(), &job.cancel)
    }

    /// Learns the word's rows. Errors as [`Discovery::run`].
    fn invert(
        &self,
        (unet, gradient): (&mut Unet, &KeyValueGradient),
        options: &DiscoveryOptions,
        wanted: InvertOptions,
        (identity, search): (&str, &mut Search),
        job: &mut Job<'_>,
    ) -> Result<(Inversion, Inverted, Learnt)> {
        let learning = self.learning.as_ref();
        let learning = learning.ok_or_else(|| Error::invalid_argument("there is no word whose embedding to learn"))?;
        let mut inversion = Inversion::new(learning.texts.word(), learning.texts.start(), wanted)?;
        if let Some(path) = &options.checkpoint {
            checkpoint::resume_descent(path, identity, Some(search), inversion.descent_mut())?;
        }
        tell("invert", inversion.losses(), wanted.steps, job)?;
        while !inversion.is_done() {
            let outcome = inversion.step(&mut |rows, number| {
                let slope = self.text_slope((unet, gradient), options, learning, rows, INVERTING + number, job)?;
                Ok((slope.loss, learning.texts.slope(rows, &slope, &job.cancel)?))
            });
            let outcome = outcome.and_then(|()| tell("invert", inversion.losses(), wanted.steps, job));
            let done = inversion.losses().len();
            keep(
                &options.checkpoint,
                identity,
                Some(search),
                &mut [inversion.descent_mut()],
                (done, wanted.steps),
                outcome,
            )?;
        }
        let mut held_out = |rows: &[Vec<f32>]| -> Result<f64> {
            let count = HELD_OUT.len() as f64;
            let losses = HELD_OUT
                .map(|number| Ok(self.text_slope((unet, gradient), options, learning, rows, number, job)?.loss));
            Ok(losses.sum::<Result<f64>>()? / count)
        };
        let rows = inversion.rows()?;
        let inverted = inversion.end((held_out(&learning.texts.start())?, held_out(&rows)?))?;
        Ok((inversion, inverted, self.learnt(learning, &rows, job)?))
    }

    /// Searches, and tunes what was found. `unet` is the model that `gradient` was made of; its composition must be empty,
    /// and its conditioning is replaced. The same seed gives the same set and values on any number of threads.
    ///
    /// Reports the stages `"invert"`, `"search"` and `"tune"`, one unit a batch, with the mean loss of the last ten, and before
    /// the last, with [`Bound::HeldOut`], `"choose"`, one unit a size, with its loss.
    ///
    /// Errors: [`crate::Status::NotFound`] if no weight is found, unless an embedding was learnt;
    /// [`crate::Status::InvalidArgument`], also for a checkpoint of another search;
    /// [`crate::Status::InvalidFile`] for a damaged one; [`crate::Status::NotFinite`] naming the batch;
    /// [`crate::Status::Cancelled`]; [`crate::Status::Io`] if a checkpoint can't be written, which leaves the last one;
    /// those of the session.
    pub fn run(
        &self,
        unet: &mut Unet,
        gradient: &KeyValueGradient,
        options: &DiscoveryOptions,
        job: &mut Job<'_>,
    ) -> Result<Report> {
        let began = Instant::now();
        let mut search = Search::new(gradient.len(), options.batches, options.method, options.bound)?;
        let identity = self.identity(gradient, options)?;
        if let Some(path) = &options.checkpoint {
            checkpoint::resume(path, &identity, &mut search)?;
        }
        let (mut inversion, mut inverted, mut learnt) = (None, None, Learnt::new());
        if let Some(wanted) = options.invert {
            let (state, found, texts) =
                self.invert((unet, gradient), options, wanted, (&identity, &mut search), job)?;
            (inversion, inverted, learnt) = (Some(state), Some(found), texts);
        }
        let mut loss = |scales: &[f32], number: usize, job: &Job<'_>| -> Result<Slope> {
            let batch = self.batch(unet, options, number, &learnt, job)?;
            gradient.slope(&batch, self.shape, scales, &job.cancel)
        };
        tell("search", search.losses(), options.batches, job)?;
        while !search.is_done() {
            let outcome = search.step(&mut |scales: &[f32], number: usize| loss(scales, number, job));
            let outcome = outcome.and_then(|()| tell("search", search.losses(), options.batches, job));
            let done = (search.losses().len(), options.batches);
            let mut beside: Vec<&mut Descent> = inversion.iter_mut().map(Inversion::descent_mut).collect();
            keep(&options.checkpoint, &identity, Some(&mut search), &mut beside, done, outcome)?;
        }
        let mut sizes = Vec::new();
        if let Bound::HeldOut(most) = options.bound {
            let asked = held_out::sizes(gradient.len() / LEAST_PART, most);
            for (done, &size) in asked.iter().enumerate() {
                let mut shut = |scales: &[f32], number: usize| loss(scales, number, job);
                sizes.push((size, held_out::loss_of(&search, size, HELD_OUT, &mut shut)?));
                let (done, total, loss) = (done as u64 + 1, asked.len() as u64, sizes.last().map(|tried| tried.1));
                job.tell(Progress { stage: "choose", done, total, loss })?;
            }
        }
        let size = held_out::best(&sizes).unwrap_or_else(|| search.budget());
        let Found { shut, mut losses, agreement } = search.found_within(size)?;
        let neurons = neurons(gradient, &shut)?;
        if neurons.is_empty() && inverted.is_none() {
            return Err(Error::not_found(format!(
                "the search found no weight to shut in {} batches of {}: more batches, or larger ones, may find some",
                options.batches, options.batch
            )));
        }
        let mut values = None;
        if let Some(wanted) = options.tune.filter(|_| !neurons.is_empty()) {
            let (places, members) = members(gradient, &shut)?;
            let mut tuning = Tuning::new(members, wanted)?;
            if let Some(path) = &options.checkpoint {
                checkpoint::resume_descent(path, &identity, Some(&mut search), tuning.descent_mut())?;
            }
            tell("tune", tuning.losses(), wanted.steps, job)?;
            while !tuning.is_done() {
                let mut step = |scales: &[f32], number: usize| -> Result<Slope> {
                    let batch = self.batch(unet, options, options.batches + number, &learnt, job)?;
                    gradient.slope_of(&batch, self.shape, &places, scales, &job.cancel)
                };
                let outcome = tuning.step(&mut step);
                let outcome = outcome.and_then(|()| tell("tune", tuning.losses(), wanted.steps, job));
                let done = (tuning.losses().len(), wanted.steps);
                let mut beside: Vec<&mut Descent> = inversion.iter_mut().map(Inversion::descent_mut).collect();
                beside.push(tuning.descent_mut());
                keep(&options.checkpoint, &identity, Some(&mut search), &mut beside, done, outcome)?;
            }
            losses.extend(tuning.losses());
            values = Some(tuned_values(gradient, &neurons, tuning.values()?, wanted.precision)?);
        }
        Ok(Report { neurons, values, inverted, losses, sizes, agreement, elapsed: began.elapsed() })
    }

    /// A hash of all that a search depends on: options, base, terms.
    fn identity(&self, gradient: &KeyValueGradient, options: &DiscoveryOptions) -> Result<String> {
        let DiscoveryOptions { method, bound, batches, batch, seed, invert, tune, checkpoint: _ } = options;
        let mut hash = Sha256::new();
        let paths: Vec<&str> = gradient.searched().map(|projection| projection.path.as_str()).collect();
        let base = gradient.projections().fingerprint();
        // Debug output gives every float in full.
        write!(hash, "{:?}", (method, bound, batches, batch, seed, tune, base, paths, &self.schedule, &self.terms))
            .map_err(|error| Error::io("hashing the search", error))?;
        // The fingerprint is that of cross-attention.
        let searched = gradient.searched().zip(gradient.weights());
        searched
            .filter(|(projection, _)| gradient.projections().position(&projection.path).is_none())
            .for_each(|(_, weights)| hash.update(bytemuck::cast_slice::<f32, u8>(weights)));
        if let (Some(invert), Some(Learning { texts, of })) = (invert, &self.learning) {
            write!(hash, "{:?}", (invert, texts.word(), texts.start(), of))
                .map_err(|error| Error::io("hashing the search", error))?;
        }
        Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

/// Passes on how a batch went, after writing the checkpoint where it is due; `done` of `total` batches of a stage are made.
pub(super) fn keep(
    checkpoint: &Option<PathBuf>,
    identity: &str,
    search: Option<&mut Search>,
    descents: &mut [&mut Descent],
    (done, total): (usize, usize),
    outcome: Result<()>,
) -> Result<()> {
    let due = done >= total || outcome.is_err() || done.is_multiple_of(CHECKPOINT_BATCHES);
    let saved = match checkpoint {
        Some(path) if due => checkpoint::save(path, identity, search, descents),
        _ => Ok(()),
    };
    outcome.and(saved)
}

/// Reports how far a stage is.
pub(super) fn tell(stage: &str, losses: &[f64], total: usize, job: &mut Job<'_>) -> Result<()> {
    let last = &losses[losses.len().saturating_sub(RUNNING)..];
    let loss = (!last.is_empty()).then(|| last.iter().sum::<f64>() / last.len() as f64);
    job.tell(Progress { stage, done: losses.len() as u64, total: total as u64, loss })
}

/// The shut weights' places, and they to be tuned from zero in units of the standard deviation of each projection.
pub(super) fn members(gradient: &KeyValueGradient, shut: &[bool]) -> Result<(Vec<usize>, Members)> {
    let chosen = || gradient.weights().flatten().zip(shut).enumerate().filter(|(_, (_, shut))| **shut);
    let places = collected(chosen().map(|(at, _)| at))?;
    let weights = collected(chosen().map(|(_, (weight, _))| *weight))?;
    let (mut units, mut parts) = (Vec::new(), Vec::new());
    let mut rest = shut;
    for own in gradient.weights() {
        let (shut, others) = rest.split_at(own.len());
        let unit = deviation(own);
        extend(&mut units, shut.iter().filter(|shut| **shut).map(|_| unit))?;
        parts.push(units.len() - parts.iter().sum::<usize>());
        rest = others;
    }
    let values = zeroed(places.len())?;
    Ok((places, Members { weights, units, values, parts }))
}

/// The standard deviation of some weights.
pub(super) fn deviation(weights: &[f32]) -> f32 {
    let count = weights.len() as f64;
    let mean = weights.iter().map(|weight| f64::from(*weight)).sum::<f64>() / count;
    (weights.iter().map(|weight| (f64::from(*weight) - mean).powi(2)).sum::<f64>() / count).sqrt() as f32
}

/// The values of all members, which are in the order of the scales, shared out to the layers, which are in that of their paths.
pub(super) fn tuned_values(
    gradient: &KeyValueGradient,
    neurons: &NeuronSet,
    values: Vec<f32>,
    precision: Precision,
) -> Result<Values> {
    let mut values = values.into_iter();
    let mut layers: Vec<Vec<f32>> = neurons.layers().iter().map(|_| Vec::new()).collect();
    for place in gradient.searched().filter_map(|projection| neurons.position(&projection.path)) {
        layers[place] = collected(values.by_ref().take(neurons.layers()[place].indices().len()))?;
    }
    Values::new(precision, neurons, layers)
}

/// The shut weights as a set.
fn neurons(gradient: &KeyValueGradient, shut: &[bool]) -> Result<NeuronSet> {
    let mut start = 0;
    let layer = |projection: &crate::concept::ProjectionWeights| {
        let count = projection.out_features * projection.in_features;
        let own = &shut[start..start + count];
        start += count;
        let indices = collected((0..count as u32).filter(|&index| own[index as usize]))?;
        let indices = Indices::from_sorted(count as u32, indices)?;
        Layer::new(projection.path.clone(), projection.out_features, projection.in_features, indices)
    };
    NeuronSet::new(gradient.searched().map(layer).collect::<Result<_>>()?)
}
