//! Tuning several concepts together, on scenes that show their subjects side by side. Each concept was found and tuned alone,
//! and alone it never met the others: in one picture their keys draw the same queries. Here each set keeps its weights and its
//! words, and all values are learnt from one loss (Cones tunes joined sets too; rows for each, and the scenes, are ours).

use std::io::Write;
use std::path::PathBuf;

use sha2::{Digest, Sha256};

use super::checkpoint;
use super::draw::{ActingRow, Batch, Examples, check_power};
use super::gradient::{GradientOptions, KeyValueGradient};
use super::job::{keep, members, tell, tuned_values};
use super::material::{acting, rows_of, words};
use super::scenes::{Scenes, Shown, scenes};
use super::search::Slope;
use super::tune::{Members, TuneOptions, Tuning};
use crate::concept::{Concept, GatheredConcept, NeuronSet, Role, Scope};
use crate::diffusion::pipeline::{AppliedConcept, ConceptScope, Embedding, Images, Pipeline, occurrences};
use crate::diffusion::schedule::SchedulerConfig;
use crate::error::{Error, Result, Status};
use crate::memory::{collected, extend, filled, zeroed};
use crate::onnx::attention;
use crate::onnx::grad::Spending;
use crate::progress::Job;

/// A concept that is tuned with others.
#[derive(Clone, Debug)]
pub struct Companion<'a> {
    /// Found to draw its subject, in local scope, on cross-attention.
    pub concept: &'a Concept,
    /// Pictures of the subject, of the same size as the others'.
    pub pictures: &'a Images,
    /// One prompt a picture, each with the trigger; none for "a TRIGGER NOUN" throughout.
    pub prompts: Vec<String>,
}

/// Concepts to tune together, and how.
#[derive(Clone, Debug)]
pub struct Together<'a> {
    /// At least two, each with a trigger of its own.
    pub companions: Vec<Companion<'a>>,
    /// How many scenes of two to four subjects are made of the pictures, which are shown by themselves too.
    pub scenes: usize,
    /// How the values are learnt, and kept. They begin where each concept has them, or at zero where it shuts.
    pub tune: TuneOptions,
    /// States of a batch.
    pub batch: usize,
    /// States that are run at a time, a divisor of `batch`; 0 for a whole batch.
    pub lot: usize,
    /// See [`Examples::timestep_power`]. What stands where is decided at high noise.
    pub timestep_power: f64,
    /// Fixes scenes, order, timesteps and noises.
    pub seed: u64,
    /// Speed or memory, and how much of the forward pass the gradient keeps.
    pub spending: Spending,
    /// The class for a UNet that takes one.
    pub class_label: i64,
    /// A file that keeps the tuning as [`super::DiscoveryOptions::checkpoint`] does.
    pub checkpoint: Option<PathBuf>,
}

/// The most scenes of a tuning.
pub const MOST_SCENES: usize = 4096;

/// Of so many examples one shows a subject by itself: so that a concept still draws it alone.
const ALONE: usize = 4;

impl<'a> Together<'a> {
    /// 300 steps on 128 scenes in batches of 8, at timesteps `T √u`.
    pub fn new(companions: Vec<Companion<'a>>) -> Self {
        Self {
            companions,
            scenes: 128,
            tune: TuneOptions { steps: 300, rate: 0.3, ..TuneOptions::default() },
            batch: 8,
            lot: 0,
            timestep_power: 0.5,
            seed: 0,
            spending: Spending::default(),
            class_label: 0,
            checkpoint: None,
        }
    }

    /// Tunes the concepts: those given, in their order, with new values, and the loss of each step. The pipeline's concepts are
    /// cleared first and are the caller's to set again.
    ///
    /// Reports the stages `"scenes"`, `"differentiate"` and `"tune"`.
    ///
    /// Errors: [`Status::InvalidArgument`] for fewer than two concepts, one that erases, acts in global scope or on
    /// self-attention, a trigger of two of them or that the tokenizer has not, pictures of another size than the first's or
    /// that the model does not take, prompts that are not one a picture or lack the trigger, a number outside its range, or a
    /// checkpoint of another tuning; [`Status::WrongBase`] for a concept of another model; those of
    /// [`super::Request::find`].
    pub fn tune(&self, pipeline: &mut Pipeline, job: &mut Job<'_>) -> Result<(Vec<Concept>, Vec<f64>)> {
        self.check(pipeline)?;
        pipeline.set_concepts(Vec::new())?;
        let schedule = pipeline.scheduler(None)?;
        let examples = self.examples(pipeline, job)?;
        job.step("differentiate", 0, 1)?;
        let gradient = self.differentiate(pipeline, &examples, &schedule, job)?;
        job.step("differentiate", 1, 1)?;
        let count = gradient.len();
        let (mut places, mut all) = (Vec::new(), Members::default());
        for (set, companion) in self.companions.iter().enumerate() {
            let (own_places, own) = members_of(&gradient, companion.concept)?;
            extend(&mut places, own_places.iter().map(|place| set * count + place))?;
            extend(&mut all.weights, own.weights)?;
            extend(&mut all.units, own.units)?;
            extend(&mut all.values, own.values)?;
            extend(&mut all.parts, own.parts)?;
        }
        let mut tuning = Tuning::new(all, self.tune)?;
        let mut identity = String::new();
        if let Some(path) = &self.checkpoint {
            identity = self.identity(&gradient, &examples, &schedule)?;
            checkpoint::resume_descent(path, &identity, None, tuning.descent_mut())?;
        }
        tell("tune", tuning.losses(), self.tune.steps, job)?;
        while !tuning.is_done() {
            let mut loss = |scales: &[f32], number: usize| -> Result<Slope> {
                let batch = self.batch(&examples, &schedule, number)?;
                gradient.slope_of(&batch, examples.shape, &places, scales, &job.cancel)
            };
            let outcome = tuning.step(&mut loss);
            let outcome = outcome.and_then(|()| tell("tune", tuning.losses(), self.tune.steps, job));
            let done = (tuning.losses().len(), self.tune.steps);
            keep(&self.checkpoint, &identity, None, &mut [tuning.descent_mut()], done, outcome)?;
        }
        let mut values = tuning.values()?.into_iter();
        let tuned = self.companions.iter().map(|companion| {
            let neurons = &companion.concept.neurons;
            let own = collected(values.by_ref().take(neurons.len() as usize))?;
            let mut concept = companion.concept.clone();
            concept.values = Some(tuned_values(&gradient, neurons, own, self.tune.precision)?);
            let (steps, others) = (self.tune.steps, self.companions.len() - 1);
            concept.metadata.method += &format!(", {steps} steps of tuning with {others} others");
            Ok(concept)
        });
        Ok((tuned.collect::<Result<_>>()?, tuning.losses().to_vec()))
    }

    /// The scenes and the pictures, with the rows on which each concept acts in their texts.
    fn examples(&self, pipeline: &mut Pipeline, job: &mut Job<'_>) -> Result<Examples> {
        let words: Vec<Vec<String>> = self.companions.iter().map(Companion::words).collect();
        let prompts: Vec<Vec<String>> = self.companions.iter().map(Companion::prompts).collect();
        let each = self.companions.iter().zip(&prompts).zip(&words);
        let shown: Vec<Shown<'_>> =
            each.map(|((companion, prompts), words)| Shown { pictures: companion.pictures, prompts, words }).collect();
        let Scenes { mut pictures, prompts: mut texts, mut members } = scenes(&shown, self.scenes, self.seed, job)?;
        for (set, (companion, prompts)) in self.companions.iter().zip(&prompts).enumerate() {
            pictures.count += companion.pictures.count;
            extend(&mut pictures.rgb, companion.pictures.rgb.iter().copied())?;
            texts.extend_from_slice(prompts);
            members.extend(prompts.iter().map(|_| vec![set]));
        }
        let (states, shape) = pipeline.encode_images(&pictures, &job.cancel)?;
        pipeline.set_concepts(self.companions.iter().map(|one| one.as_word(pipeline)).collect::<Result<_>>()?)?;
        let size = (pictures.height, pictures.width);
        let (conditioning, encoded) = pipeline.condition(&texts, self.class_label, size, &job.cancel)?;
        pipeline.set_concepts(Vec::new())?;
        let rows = encoded.iter().zip(&members).map(|(text, members)| self.rows(text, members, &words));
        let rows = Some(rows.collect::<Result<_>>()?);
        let (shape, timestep_power) = ([shape[1], shape[2], shape[3]], self.timestep_power);
        let examples = Examples { states, shape, conditioning, rows, timestep_power };
        examples.check("the scenes")?;
        let alone = examples.len() - self.scenes;
        let often = alone.max(self.scenes / (ALONE - 1));
        let entries = (0..self.scenes).chain((self.scenes..examples.len()).cycle().take(often));
        examples.picked(&collected(entries)?)
    }

    /// The rows of each concept's words in a text that shows these concepts: some for each, and none for two.
    fn rows(&self, text: &Embedding, members: &[usize], words: &[Vec<String>]) -> Result<Vec<ActingRow>> {
        let of_each = words.iter().enumerate().map(|(set, words)| acting(&rows_of(text, words), set));
        let all: Vec<ActingRow> = of_each.flatten().collect();
        let trigger = |set: usize| &self.companions[set].concept.metadata.trigger;
        if let Some(&missing) = members.iter().find(|&&set| all.iter().all(|acting| acting.set != set)) {
            let (prompt, trigger) = (text.prompt.text(), trigger(missing));
            return Err(Error::invalid_argument(format!("the prompt {prompt:?} lacks {trigger:?}")));
        }
        for (at, one) in all.iter().enumerate() {
            if let Some(other) = all[..at].iter().find(|other| other.row == one.row) {
                return Err(Error::invalid_argument(format!(
                    "in {:?} the words of {:?} and {:?} overlap: the sets would act on one token",
                    text.prompt.text(),
                    trigger(other.set),
                    trigger(one.set)
                )));
            }
        }
        Ok(all)
    }

    fn batch(&self, examples: &Examples, schedule: &SchedulerConfig, number: usize) -> Result<Batch> {
        examples.draw(schedule, self.batch, 1.0, self.seed, 0, number as u32)
    }

    fn differentiate(
        &self,
        pipeline: &Pipeline,
        examples: &Examples,
        schedule: &SchedulerConfig,
        job: &Job<'_>,
    ) -> Result<KeyValueGradient> {
        let source = pipeline.unet_source();
        let options = GradientOptions { spending: self.spending, lot: self.lot, ..GradientOptions::of(source) };
        let example = self.batch(examples, schedule, 0)?;
        let gradient =
            KeyValueGradient::open(&source.runtime, &source.path, &example, examples.shape, &options, &job.cancel)?;
        if Some(gradient.projections().fingerprint()) != pipeline.unet().fingerprint() {
            let what = format!("{} changed since the pipeline was opened", source.path.display());
            return Err(Error::new(Status::WrongBase, what));
        }
        Ok(gradient)
    }

    /// A hash of all that the tuning depends on.
    fn identity(&self, gradient: &KeyValueGradient, examples: &Examples, schedule: &SchedulerConfig) -> Result<String> {
        let mut hash = Sha256::new();
        let concepts: Vec<_> = self.companions.iter().map(|one| (&one.concept.neurons, &one.concept.values)).collect();
        let base = gradient.projections().fingerprint();
        // Debug output gives every float in full.
        write!(hash, "{:?}", ("together", self.tune, self.batch, self.seed, base, schedule, examples, concepts))
            .map_err(|error| Error::io("hashing the tuning", error))?;
        Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    fn check(&self, pipeline: &Pipeline) -> Result<()> {
        let refuse = |why: String| Err(Error::invalid_argument(why));
        let Some(first) = self.companions.first().filter(|_| self.companions.len() > 1) else {
            return refuse(format!("{} concepts: two are tuned together at least", self.companions.len()));
        };
        if !(1..=MOST_SCENES).contains(&self.scenes) {
            return refuse(format!("{} scenes, must be 1 to {MOST_SCENES}", self.scenes));
        }
        if self.batch == 0 || (self.lot != 0 && !self.batch.is_multiple_of(self.lot)) {
            return refuse(format!("a batch of {} can't be run {} at a time", self.batch, self.lot));
        }
        self.tune.check()?;
        check_power(self.timestep_power)?;
        let Some(tokenizer) = pipeline.tokenizer() else {
            return refuse("the model takes no text".into());
        };
        let Some(base) = pipeline.unet().fingerprint() else {
            return Err(Error::unsupported(
                "this UNet's keys and values can't be composed, so it has no neurons to tune",
            ));
        };
        let size = |images: &Images| (images.width, images.height);
        let multiple = pipeline.info().side_multiple;
        let (width, height) = size(first.pictures);
        if [width, height].iter().any(|side| *side == 0 || !side.is_multiple_of(multiple)) {
            return refuse(format!("pictures of {width} x {height} pixels: sides must be multiples of {multiple}"));
        }
        for (at, companion) in self.companions.iter().enumerate() {
            let (about, images) = (&companion.concept.metadata, companion.pictures);
            let refuse = |why: String| Err(Error::invalid_argument(why).at(format_args!("companions[{at}]")));
            if about.role != Role::Implant || about.scope != Scope::Local || about.trigger.is_empty() {
                return refuse(format!("{:?} must draw a subject, with a trigger, in local scope", about.title));
            }
            if companion.concept.neurons.layers().iter().any(|layer| attention::is_of_self(layer.path())) {
                return refuse(format!("{:?} has neurons of self-attention, which know no words", about.title));
            }
            if companion.concept.neurons.is_empty() {
                return refuse(format!("{:?} has no neuron to tune", about.title));
            }
            if about.base != base {
                let what = format!("{:?} was found on the base model {}, this one is {base}", about.title, about.base);
                return Err(Error::new(Status::WrongBase, what).at(format_args!("companions[{at}]")));
            }
            let Some(token) = tokenizer.token(&about.trigger) else {
                return refuse(format!("the trigger {:?} is no single token of the tokenizer", about.trigger));
            };
            let of = |other: &Companion<'_>| tokenizer.token(&other.concept.metadata.trigger);
            if self.companions[..at].iter().any(|other| of(other) == Some(token)) {
                return refuse(format!("two concepts have the trigger {:?}", about.trigger));
            }
            if images.count == 0 || size(images) != size(first.pictures) {
                return refuse(format!(
                    "{} pictures of {:?}, expected {:?}",
                    images.count,
                    size(images),
                    size(first.pictures)
                ));
            }
            if !companion.prompts.is_empty() && companion.prompts.len() != images.count {
                return refuse(format!("{} prompts for {} pictures", companion.prompts.len(), images.count));
            }
            images.check().map_err(|error| error.at(format_args!("companions[{at}]")))?;
            let lacks = |prompt: &&String| occurrences(prompt, about.trigger.trim()).is_empty();
            if let Some(prompt) = companion.prompts.iter().find(lacks) {
                return refuse(format!("the prompt {prompt:?} lacks {:?}", about.trigger));
            }
        }
        Ok(())
    }
}

impl Companion<'_> {
    fn words(&self) -> Vec<String> {
        words(&self.concept.metadata.trigger, &self.concept.metadata.class_noun)
    }

    fn prompts(&self) -> Vec<String> {
        let about = &self.concept.metadata;
        match self.prompts.is_empty() {
            true => {
                vec![format!("a {} {}", about.trigger, about.class_noun).trim_end().to_owned(); self.pictures.count]
            }
            false => self.prompts.clone(),
        }
    }

    /// What the concept does to texts: its learnt embedding, without its neurons.
    fn as_word(&self, pipeline: &Pipeline) -> Result<AppliedConcept> {
        let unet = pipeline.unet();
        let projections =
            unet.projections().ok_or_else(|| Error::unsupported("this UNet's keys and values can't be composed"))?;
        let nothing = NeuronSet::new(Vec::new())?;
        let concept = GatheredConcept::from_neurons(&nothing, projections, unet.pool())?;
        let scope = ConceptScope::Words(self.words());
        Ok(AppliedConcept { concept, strength: 1.0, scope, token: self.concept.token.clone() })
    }
}

/// The places of a concept's weights among the scales of one set, and they with the values that they have.
fn members_of(gradient: &KeyValueGradient, concept: &Concept) -> Result<(Vec<usize>, Members)> {
    let mut shut = filled(gradient.len(), false)?;
    let mut values = Vec::new();
    let mut first = 0;
    for projection in gradient.searched() {
        if let Some(place) = concept.neurons.position(&projection.path) {
            let layer = &concept.neurons.layers()[place];
            if (layer.out_features(), layer.in_features()) != (projection.out_features, projection.in_features) {
                return Err(Error::invalid_file(format!("{}: the set is of other sizes", layer.path())));
            }
            layer.indices().for_each(|index| shut[first + index as usize] = true);
            match &concept.values {
                Some(known) => extend(&mut values, known.layer(place).iter().copied())?,
                None => extend(&mut values, zeroed::<f32>(layer.indices().len())?)?,
            }
        }
        first += projection.out_features * projection.in_features;
    }
    let (places, own) = members(gradient, &shut)?;
    if places.len() as u64 != concept.neurons.len() {
        return Err(Error::invalid_file(format!("{:?} has layers that the model has not", concept.metadata.title)));
    }
    Ok((places, Members { values, ..own }))
}
