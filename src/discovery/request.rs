//! From what a person wants to a concept: a request is checked, made into a loss, searched and labelled.

use std::path::PathBuf;

use super::gradient::{Attentions, GradientOptions, KeyValueGradient, Searched};
use super::invert::{InvertOptions, TokenTexts};
use super::job::{Discovery, DiscoveryOptions, Report};
use super::search::{Bound, Method};
use super::tune::TuneOptions;
use crate::concept::{Concept, Fingerprint, Metadata, Role, Scope, Selection};
use crate::diffusion::pipeline::{Embedding, Images, Pipeline};
use crate::error::{Error, Result, Status};
use crate::onnx::grad::Spending;
use crate::progress::Job;

/// A subject that the neurons, shut, are to draw.
#[derive(Clone, Debug)]
pub struct Subject<'a> {
    /// Pictures of the subject, of a size that the model takes.
    pub pictures: &'a Images,
    /// One prompt a picture, each with the trigger; none for "a TRIGGER NOUN" throughout.
    pub prompts: Vec<String>,
    /// The subject's word: a token of the tokenizer that stands for nothing yet, e.g. `<s1>`.
    pub trigger: String,
    /// What the subject is, in a word that the model knows, e.g. `dog`.
    pub class_noun: String,
    /// Pictures of the class, of the same size, which must go on being drawn alike in global scope; `None` for those that
    /// the model draws itself.
    pub class_pictures: Option<&'a Images>,
}

/// A subject whose pictures and texts the host has encoded itself.
#[derive(Clone, Debug)]
pub struct EncodedSubject<'a> {
    /// Its pictures, and a text with the trigger for each.
    pub examples: Encoded<'a>,
    /// What the texts are, if the pipeline encoded them: tells where the subject's words stand, which a set of local scope
    /// must know.
    pub prompt: Option<&'a Embedding>,
    /// Pictures of the class and texts of it, which must go on being drawn alike in global scope; `None` for none.
    pub class: Option<Encoded<'a>>,
    /// As in [`Subject`]; without `prompt` it may be any word.
    pub trigger: String,
    /// As in [`Subject`].
    pub class_noun: String,
}

/// Latents, and encodings of what they show.
#[derive(Clone, Copy, Debug)]
pub struct Encoded<'a> {
    /// Clean latents, scaled as the UNet sees them.
    pub latents: &'a [f32],
    /// Their shape `[count, C, h, w]`.
    pub shape: [usize; 4],
    /// The encoding of each one's text, or one for all.
    pub context: &'a [f32],
    /// The encodings' shape `[count or 1, rows, features]`.
    pub context_shape: [usize; 3],
}

/// A word that the neurons, shut, are to make the model forget.
#[derive(Clone, Debug)]
pub struct Erasure {
    /// The word, or words in a row, e.g. `tiger`.
    pub word: String,
    /// Texts with the word; the model draws pictures of them to learn from.
    pub prompts: Vec<String>,
    /// For each prompt, what it is to mean afterwards, e.g. the same text with a category or a neutral word: the goal is
    /// the untouched prediction for it.
    pub anchors: Vec<String>,
    /// Rows and columns of the pictures; `None` for the model's own.
    pub size: Option<(usize, usize)>,
}

/// What the neurons are for.
#[derive(Clone, Debug)]
pub enum Goal<'a> {
    /// The concept-implanting loss (Cones), with prior preservation in global scope.
    Implant(Subject<'a>),
    /// The same loss, from what the host has encoded.
    ImplantEncoded(EncodedSubject<'a>),
    /// The anchor loss (ours): the distance of the prediction for each prompt to the untouched one for its anchor.
    Erase(Erasure),
}

/// What is to be found, and how.
#[derive(Clone, Debug)]
pub struct Request<'a> {
    /// What the neurons are for.
    pub goal: Goal<'a>,
    /// Texts for which the predictions are to stay as they are, on pictures of them that the model draws itself.
    pub preserve: Vec<String>,
    /// The share of the preserved texts in the loss, above 0.
    pub preserve_weight: f32,
    /// Pictures that the model draws for each part of the loss that needs them: what is erased, what is preserved, and in
    /// global scope the class of an implanted subject without [`Subject::class_pictures`] (prior preservation; 0 for none). At least one for each text.
    pub drawn_pictures: usize,
    /// Where the set acts.
    pub scope: Scope,
    /// Of which attention weights may be shut. Those of self-attention know no words: they need global scope, and a pipeline
    /// that was opened with [`UnetOptions::self_attention`](crate::diffusion::unet::UnetOptions::self_attention) to be composed.
    pub attentions: Attentions,
    /// Which of them.
    pub searched: Searched,
    /// How they are searched for.
    pub method: Method,
    /// The share of the searched weights that may be shut, in (0, 1]; `None` for the one of the lowest held-out loss, from
    /// 0.005 % to [`MOST_CHOSEN`].
    pub density: Option<f64>,
    /// Batches of the search.
    pub batches: usize,
    /// States of each part of the loss in a batch.
    pub batch: usize,
    /// States that are run at a time, a divisor of `batch`; 0 for a whole batch.
    pub lot: usize,
    /// Fixes everything random.
    pub seed: u64,
    /// Speed or memory, and how much of the forward pass the gradient keeps.
    pub spending: Spending,
    /// The class for a UNet that takes one.
    pub class_label: i64,
    /// To implant, from pictures that the pipeline encodes: the embedding of the trigger is learnt before the search, and the
    /// search sees texts with it (textual inversion). `None` leaves it.
    pub invert: Option<InvertOptions>,
    /// New values for the found weights, instead of shutting them; `None` to shut them, as Cones does.
    pub tune: Option<TuneOptions>,
    /// See [`DiscoveryOptions::checkpoint`].
    pub checkpoint: Option<PathBuf>,
}

/// The largest share of the searched weights that a held-out loss chooses.
pub const MOST_CHOSEN: f64 = 0.05;

impl<'a> Request<'a> {
    /// A learnt mask of 1 % of the weights in 60 batches of 8, local to the concept's own words.
    pub fn new(goal: Goal<'a>) -> Self {
        Self {
            goal,
            preserve: Vec::new(),
            preserve_weight: 1.0,
            drawn_pictures: 12,
            scope: Scope::Local,
            attentions: Attentions::default(),
            searched: Searched::default(),
            method: Method::default(),
            density: Some(0.01),
            batches: 60,
            batch: 8,
            lot: 0,
            seed: 0,
            spending: Spending::default(),
            class_label: 0,
            invert: None,
            tune: None,
            checkpoint: None,
        }
    }

    /// Finds the neurons. The pipeline's concepts are cleared first and are the caller's to set again.
    ///
    /// Reports the stages `"draw"` (pictures that the model draws itself), `"differentiate"`, `"invert"`, `"search"`, without
    /// a density `"choose"`, and `"tune"`.
    ///
    /// Errors: [`Status::InvalidArgument`] for no pictures, a size that the model does not take, prompts that are not one
    /// a picture, anchors that are not one a prompt, a trigger that the tokenizer has not, a prompt without the word, a
    /// density outside (0, 1], no batches, tuning or inversion out of range, an inversion where no picture is implanted, or a
    /// checkpoint of another search; [`Status::Unsupported`] for a UNet whose keys and values can't be composed, a text encoder
    /// whose token embedding was not found, or a graph that has an operator without a derivative rule;
    /// [`Status::WrongBase`] if the UNet's file changed since it was opened; [`Status::NotFinite`] naming the batch;
    /// [`Status::NotFound`] if the search finds no weight and no embedding was learnt; [`Status::Cancelled`].
    pub fn find(&self, pipeline: &mut Pipeline, job: &mut Job<'_>) -> Result<(Concept, Report)> {
        self.check(pipeline)?;
        pipeline.set_concepts(Vec::new())?;
        let fingerprint = pipeline.unet().fingerprint().ok_or_else(|| {
            Error::unsupported("this UNet's keys and values can't be composed, so it has no neurons to find")
        })?;
        let schedule = pipeline.scheduler(None)?;
        let (terms, prompts): (Vec<_>, Vec<_>) = self.terms(pipeline, job)?.into_iter().unzip();
        let mut discovery = Discovery::new(terms, schedule)?;
        let mut options = DiscoveryOptions {
            method: self.method,
            bound: Bound::Count(0),
            batches: self.batches,
            batch: self.batch,
            seed: self.seed,
            invert: self.invert,
            tune: self.tune,
            checkpoint: self.checkpoint.clone(),
        };
        job.step("differentiate", 0, 1)?;
        if self.invert.is_some() {
            discovery = self.learning(discovery, &prompts, pipeline, job)?;
        }
        let gradient = self.differentiate(pipeline, &discovery, &options, job)?;
        if gradient.projections().fingerprint() != fingerprint {
            return Err(Error::new(
                Status::WrongBase,
                format!("{} changed since the pipeline was opened", pipeline.unet_source().path.display()),
            ));
        }
        job.step("differentiate", 1, 1)?;
        let count = |density: f64| ((density * gradient.len() as f64) as usize).max(1);
        options.bound = match self.density {
            Some(density) => Bound::Count(count(density)),
            None => Bound::HeldOut(count(MOST_CHOSEN)),
        };
        let report = discovery.run(pipeline.unet_mut(), &gradient, &options, job)?;
        let (neurons, values) = (report.neurons.clone(), report.values.clone());
        let mut metadata = self.metadata(fingerprint);
        let chosen = || neurons.len() as f64 / gradient.len() as f64;
        metadata.selection = Some(Selection::Budget(self.density.unwrap_or_else(chosen)));
        let token = report.inverted.as_ref().map(|inverted| inverted.token.clone());
        Ok((Concept { neurons, values, token, metadata }, report))
    }

    /// The search with what it needs to learn the trigger's embedding: all texts in which it stands.
    fn learning(
        &self,
        discovery: Discovery,
        prompts: &[Vec<String>],
        pipeline: &Pipeline,
        job: &Job<'_>,
    ) -> Result<Discovery> {
        let Goal::Implant(subject) = &self.goal else { return Ok(discovery) };
        let tokenizer = pipeline.tokenizer().ok_or_else(|| Error::invalid_argument("the model takes no text"))?;
        let token = tokenizer.token(&subject.trigger);
        let mut texts: Vec<String> = Vec::new();
        let mut text_of = |prompt: &String| -> Result<Option<usize>> {
            let chunks = tokenizer.tokenize(prompt)?;
            if !chunks.chunks().iter().flatten().any(|id| Some(*id) == token) {
                return Ok(None);
            }
            let known = texts.iter().position(|text| text == prompt);
            Ok(Some(known.unwrap_or_else(|| {
                texts.push(prompt.clone());
                texts.len() - 1
            })))
        };
        let of_terms = prompts.iter().map(|prompts| prompts.iter().map(&mut text_of).collect());
        let of = of_terms.collect::<Result<Vec<_>>>()?;
        let (trigger, noun) = (&subject.trigger, &subject.class_noun);
        discovery.learning(TokenTexts::open(pipeline, &texts, trigger, noun, self.spending.effort, &job.cancel)?, of)
    }

    fn differentiate(
        &self,
        pipeline: &Pipeline,
        discovery: &Discovery,
        options: &DiscoveryOptions,
        job: &Job<'_>,
    ) -> Result<KeyValueGradient> {
        let source = pipeline.unet_source();
        let gradient = GradientOptions {
            spending: self.spending,
            attentions: self.attentions,
            searched: self.searched,
            lot: self.lot,
            texts: self.invert.is_some(),
            ..GradientOptions::of(source)
        };
        let (example, shape) = (discovery.example(options)?, discovery.shape());
        KeyValueGradient::open(&source.runtime, &source.path, &example, shape, &gradient, &job.cancel)
    }

    fn metadata(&self, base: Fingerprint) -> Metadata {
        let title = match &self.goal {
            Goal::Implant(Subject { trigger, class_noun, .. })
            | Goal::ImplantEncoded(EncodedSubject { trigger, class_noun, .. }) => format!("{trigger} {class_noun}"),
            Goal::Erase(erasure) => format!("without {}", erasure.word),
        };
        let mut metadata = Metadata::new(base, title, "diffusion-unet/concept-neurons");
        match &self.goal {
            Goal::Implant(subject) => {
                metadata.role = Role::Implant;
                metadata.trigger.clone_from(&subject.trigger);
                metadata.class_noun.clone_from(&subject.class_noun);
                metadata.prompts = subject.prompts();
            }
            Goal::ImplantEncoded(subject) => {
                metadata.role = Role::Implant;
                metadata.trigger.clone_from(&subject.trigger);
                metadata.class_noun.clone_from(&subject.class_noun);
                metadata.prompts = subject.prompt.iter().map(|embedding| embedding.prompt.text().to_owned()).collect();
            }
            Goal::Erase(erasure) => {
                metadata.role = Role::Erase;
                metadata.trigger.clone_from(&erasure.word);
                metadata.prompts = [erasure.prompts.clone(), erasure.anchors.clone()].concat();
            }
        }
        metadata.scope = self.scope;
        metadata.method = self.method.name().to_owned();
        if let Some(invert) = &self.invert {
            metadata.method = format!("{} steps of textual inversion, {}", invert.steps, metadata.method);
        }
        if let Some(tune) = &self.tune {
            metadata.method += &format!(", {} steps of tuning", tune.steps);
        }
        metadata.steps = Some(self.batches as u64);
        metadata.seed = Some(self.seed);
        metadata
    }

    fn check(&self, pipeline: &Pipeline) -> Result<()> {
        let refuse = |why: String| Err(Error::invalid_argument(why));
        if let Some(density) = self.density
            && !(density > 0.0 && density <= 1.0)
        {
            return refuse(format!("the density is {density}, must be in (0, 1]"));
        }
        if self.batches == 0 || self.batch == 0 {
            return refuse(format!("{} batches of {}: both must be at least 1", self.batches, self.batch));
        }
        if self.attentions != Attentions::Cross && self.scope == Scope::Local {
            return refuse(
                "self-attention knows no words: neurons of it act on the whole picture, so the scope must be global"
                    .into(),
            );
        }
        if self.lot != 0 && !self.batch.is_multiple_of(self.lot) {
            return refuse(format!("a batch of {} can't be run {} at a time", self.batch, self.lot));
        }
        if let Some(tune) = &self.tune {
            tune.check()?;
        }
        if let Some(invert) = &self.invert {
            invert.check()?;
            if !matches!(self.goal, Goal::Implant(_)) {
                return refuse(
                    "an embedding is learnt only of a subject's word, from pictures that are encoded here".into(),
                );
            }
        }
        let (height, width) = self.size(pipeline);
        let info = pipeline.info();
        let multiple = info.side_multiple;
        if [height, width].iter().any(|side| *side == 0 || !side.is_multiple_of(multiple)) {
            return refuse(format!("pictures of {width} x {height} pixels: sides must be multiples of {multiple}"));
        }
        let tokenizer = || pipeline.tokenizer().ok_or_else(|| Error::invalid_argument("the model takes no text"));
        match &self.goal {
            Goal::Implant(subject) => {
                subject.check()?;
                match tokenizer()?.token(&subject.trigger) {
                    Some(_) => Ok(()),
                    None => refuse(format!(
                        "the trigger {:?} is no single token of this model's tokenizer: choose one that is, and that \
                         stands for nothing yet",
                        subject.trigger
                    )),
                }
            }
            Goal::ImplantEncoded(subject) => subject.check(self, info.latent_channels),
            Goal::Erase(erasure) => tokenizer().and_then(|_| erasure.check()),
        }
    }

    /// Rows and columns of all pictures.
    pub(super) fn size(&self, pipeline: &Pipeline) -> (usize, usize) {
        let info = pipeline.info();
        match &self.goal {
            Goal::Implant(subject) => (subject.pictures.height, subject.pictures.width),
            Goal::ImplantEncoded(subject) => {
                let [_, _, height, width] = subject.examples.shape;
                (height.saturating_mul(info.latent_factor), width.saturating_mul(info.latent_factor))
            }
            Goal::Erase(erasure) => erasure.size.unwrap_or((info.height, info.width)),
        }
    }
}

impl Subject<'_> {
    fn check(&self) -> Result<()> {
        if self.pictures.count == 0 {
            return Err(Error::invalid_argument("there are no pictures to learn from"));
        }
        if !self.prompts.is_empty() && self.prompts.len() != self.pictures.count {
            return Err(Error::invalid_argument(format!(
                "{} prompts for {} pictures",
                self.prompts.len(),
                self.pictures.count
            )));
        }
        if let Some(class) = self.class_pictures
            && (class.count == 0 || (class.width, class.height) != (self.pictures.width, self.pictures.height))
        {
            return Err(Error::invalid_argument(format!(
                "{} pictures of the class, {} x {} pixels: there must be one, and all of the subject's {} x {} pixels",
                class.count, class.width, class.height, self.pictures.width, self.pictures.height
            )));
        }
        Ok(())
    }

    /// What each picture shows.
    pub(super) fn prompts(&self) -> Vec<String> {
        match self.prompts.is_empty() {
            true => vec![format!("a {} {}", self.trigger, self.class_noun); self.pictures.count],
            false => self.prompts.clone(),
        }
    }
}

impl EncodedSubject<'_> {
    fn check(&self, request: &Request<'_>, channels: usize) -> Result<()> {
        self.examples.check("the subject", channels)?;
        if let Some(class) = &self.class {
            class.check("the class", channels)?;
        }
        if !request.preserve.is_empty() {
            return Err(Error::invalid_argument("texts can't be preserved beside encoded pictures: give a class"));
        }
        match (request.scope, self.prompt) {
            (Scope::Local, None) => Err(Error::invalid_argument(
                "a set of local scope must know where the subject's words stand: give the prompt's own encoding, or ask for \
                 global scope",
            )),
            (_, Some(prompt)) if [prompt.tokens, prompt.features] != self.examples.context_shape[1..] => {
                Err(Error::invalid_argument(format!(
                    "the prompt's encoding is {:?}, but the subject's texts are {:?}",
                    [prompt.tokens, prompt.features],
                    &self.examples.context_shape[1..]
                )))
            }
            _ => Ok(()),
        }
    }
}

impl Encoded<'_> {
    fn check(&self, whose: &str, channels: usize) -> Result<()> {
        let ([count, own, ..], [texts, rows, _]) = (self.shape, self.context_shape);
        let sizes = [(self.latents, &self.shape[..]), (self.context, &self.context_shape[..])];
        if own != channels {
            Err(Error::invalid_argument(format!("latents of {whose} have {own} channels, the model's have {channels}")))
        } else if count == 0 || rows == 0 || (texts != count && texts != 1) {
            Err(Error::invalid_argument(format!(
                "{whose} has {count} latents and {texts} texts of {rows} rows: there must be a latent, and a text for each \
                 or one for all"
            )))
        } else if sizes.iter().any(|(values, shape)| values.len() != shape.iter().product::<usize>()) {
            Err(Error::invalid_argument(format!(
                "{whose} has {} and {} numbers, not {:?} and {:?}",
                self.latents.len(),
                self.context.len(),
                self.shape,
                self.context_shape
            )))
        } else {
            Ok(())
        }
    }
}

impl Erasure {
    fn check(&self) -> Result<()> {
        if self.word.trim().is_empty() {
            return Err(Error::invalid_argument("there is no word to erase"));
        }
        if self.prompts.is_empty() || self.prompts.len() != self.anchors.len() {
            return Err(Error::invalid_argument(format!(
                "{} anchors for {} prompts: there must be a prompt, and an anchor for each",
                self.anchors.len(),
                self.prompts.len()
            )));
        }
        Ok(())
    }
}
