//! A subject's concept from a few pictures of it, found in an opened pipeline.

use super::draw::{Examples, Objective};
use super::gradient::{GradientOptions, KeyValueGradient};
use super::job::{Discovery, DiscoveryOptions, Report, Term};
use super::search::{Bound, Method};
use crate::concept::{Concept, Metadata, Role, Scope, Selection};
use crate::diffusion::pipeline::{DrawOptions, Images, Pipeline};
use crate::error::{Error, Result, Status};
use crate::onnx::grad::Effort;
use crate::progress::Job;

/// What is to be found, and how.
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
    /// Where the set acts.
    pub scope: Scope,
    /// How it is searched.
    pub method: Method,
    /// The share of the weights that may be shut, in (0, 1].
    pub density: f64,
    /// Batches of the search.
    pub batches: usize,
    /// States of each term in a batch.
    pub batch: usize,
    /// States that are run at a time, a divisor of `batch`; 0 for a whole batch.
    pub lot: usize,
    /// Global scope: pictures of the class that the model draws itself and must go on drawing; 0 for none.
    pub prior_pictures: usize,
    /// Fixes everything random.
    pub seed: u64,
    /// Speed or memory.
    pub effort: Effort,
    /// The class for a UNet that takes one.
    pub class_label: i64,
}

impl<'a> Subject<'a> {
    /// A learnt mask of 1 % of the weights in 60 batches of 8, local to the subject's own words.
    pub fn new(pictures: &'a Images, trigger: impl Into<String>, class_noun: impl Into<String>) -> Self {
        Self {
            pictures,
            prompts: Vec::new(),
            trigger: trigger.into(),
            class_noun: class_noun.into(),
            scope: Scope::Local,
            method: Method::default(),
            density: 0.01,
            batches: 60,
            batch: 8,
            lot: 0,
            prior_pictures: 12,
            seed: 0,
            effort: Effort::default(),
            class_label: 0,
        }
    }

    /// Finds the subject's neurons. The pipeline's concepts are cleared first and are the caller's to set again.
    ///
    /// Reports the stages `"prior"` (drawing pictures of the class), `"differentiate"` and `"search"`.
    ///
    /// Errors: [`Status::InvalidArgument`] for no pictures, a size that the model does not take, prompts that are not one
    /// a picture, a word that the tokenizer has not or a prompt without the trigger, a density outside (0, 1], no
    /// batches; [`Status::Unsupported`] for a UNet whose keys and values can't be composed or whose graph has an operator
    /// without a derivative rule; [`Status::WrongBase`] if the UNet's file changed since it was opened;
    /// [`Status::NotFinite`] naming the batch; [`Status::Cancelled`].
    pub fn find(&self, pipeline: &mut Pipeline, job: &mut Job<'_>) -> Result<(Concept, Report)> {
        self.check(pipeline)?;
        pipeline.set_concepts(Vec::new())?;
        let source = pipeline.unet_source().clone();
        let fingerprint = pipeline.unet().fingerprint();
        let fingerprint = fingerprint.ok_or_else(|| {
            Error::unsupported("this UNet's keys and values can't be composed, so it has no neurons to find")
        })?;
        let schedule = pipeline.scheduler(None)?;
        let prompts = match self.prompts.is_empty() {
            true => vec![format!("a {} {}", self.trigger, self.class_noun); self.pictures.count],
            false => self.prompts.clone(),
        };
        let mut terms = vec![Term {
            examples: self.examples(pipeline, self.pictures, &prompts, job)?,
            objective: Objective::Training,
            anchors: None,
            weight: 1.0,
        }];
        // In local scope no prompt without the trigger can change.
        if self.scope == Scope::Global && self.prior_pictures > 0 {
            terms.push(self.prior(pipeline, job)?);
        }
        let discovery = Discovery::new(terms, schedule)?;
        let count: usize = pipeline
            .unet()
            .projections()
            .map_or(0, |all| all.as_slice().iter().map(|one| one.out_features * one.in_features).sum());
        let options = DiscoveryOptions {
            method: self.method,
            bound: Bound::Count(((self.density * count as f64) as usize).max(1)),
            batches: self.batches,
            batch: self.batch,
            seed: self.seed,
        };
        job.step("differentiate", 0, 1)?;
        let gradient_options = GradientOptions {
            session: source.options.session.clone(),
            limits: source.options.limits.clone(),
            effort: self.effort,
            lot: self.lot,
            threads: source.options.threads,
        };
        let example = discovery.example(&options);
        let shape = discovery.shape();
        let gradient =
            KeyValueGradient::open(&source.runtime, &source.path, &example, shape, &gradient_options, &job.cancel)?;
        if gradient.projections().fingerprint() != fingerprint {
            return Err(Error::new(
                Status::WrongBase,
                format!("{} changed since the pipeline was opened", source.path.display()),
            ));
        }
        job.step("differentiate", 1, 1)?;
        let report = discovery.run(pipeline.unet_mut(), &gradient, &options, job)?;
        let title = format!("{} {}", self.trigger, self.class_noun);
        let mut metadata = Metadata::new(fingerprint, title, "diffusion-unet/concept-neurons");
        metadata.role = Role::Implant;
        metadata.scope = self.scope;
        metadata.method = self.method.name().to_owned();
        metadata.trigger.clone_from(&self.trigger);
        metadata.class_noun.clone_from(&self.class_noun);
        metadata.prompts = prompts;
        metadata.selection = Some(Selection::Budget(self.density));
        metadata.steps = Some(self.batches as u64);
        metadata.seed = Some(self.seed);
        Ok((Concept { neurons: report.neurons.clone(), metadata }, report))
    }

    fn check(&self, pipeline: &Pipeline) -> Result<()> {
        let refuse = |why: String| Err(Error::invalid_argument(why));
        if self.pictures.count == 0 {
            return refuse("there are no pictures to learn from".into());
        }
        if !self.prompts.is_empty() && self.prompts.len() != self.pictures.count {
            return refuse(format!("{} prompts for {} pictures", self.prompts.len(), self.pictures.count));
        }
        if !(self.density > 0.0 && self.density <= 1.0) {
            return refuse(format!("the density is {}, must be in (0, 1]", self.density));
        }
        if self.batches == 0 || self.batch == 0 {
            return refuse(format!("{} batches of {}: both must be at least 1", self.batches, self.batch));
        }
        if self.lot != 0 && !self.batch.is_multiple_of(self.lot) {
            return refuse(format!("a batch of {} can't be run {} at a time", self.batch, self.lot));
        }
        let multiple = pipeline.info().side_multiple;
        let sides = [self.pictures.height, self.pictures.width];
        if sides.iter().any(|side| *side == 0 || !side.is_multiple_of(multiple)) {
            return refuse(format!("pictures of {sides:?} pixels: sides must be multiples of {multiple}"));
        }
        let Some(tokenizer) = pipeline.tokenizer() else {
            return refuse("the model takes no text".into());
        };
        if tokenizer.token(&self.trigger).is_none() {
            return refuse(format!(
                "the trigger {:?} is no single token of this model's tokenizer: choose one that is, and that stands for \
                 nothing yet",
                self.trigger
            ));
        }
        Ok(())
    }

    fn examples(
        &self,
        pipeline: &mut Pipeline,
        pictures: &Images,
        prompts: &[String],
        job: &Job<'_>,
    ) -> Result<Examples> {
        let (states, shape) = pipeline.encode_images(pictures, &job.cancel)?;
        let size = (pictures.height, pictures.width);
        let (conditioning, texts) = pipeline.condition(prompts, self.class_label, size, &job.cancel)?;
        let mut rows = Vec::new();
        for (prompt, text) in prompts.iter().zip(&texts) {
            let mut own = text.prompt.rows_of(&self.trigger);
            if own.is_empty() {
                return Err(Error::invalid_argument(format!("the prompt {prompt:?} lacks {:?}", self.trigger)));
            }
            // The noun behind the trigger too; elsewhere it may mean another thing.
            own.extend(text.prompt.rows_of(&format!("{} {}", self.trigger, self.class_noun)));
            own.sort_unstable();
            own.dedup();
            rows.push(own);
        }
        let rows = (self.scope == Scope::Local).then_some(rows);
        Ok(Examples { states, shape: [shape[1], shape[2], shape[3]], conditioning, rows })
    }

    /// Pictures of the class as the untouched model draws them (prior preservation).
    fn prior(&self, pipeline: &mut Pipeline, job: &mut Job<'_>) -> Result<Term> {
        let prompt = format!("a {}", self.class_noun);
        let total = self.prior_pictures as u64;
        let mut states = Vec::new();
        for picture in 0..self.prior_pictures {
            job.step("prior", picture as u64, total)?;
            let mut options = DrawOptions::new(prompt.clone());
            options.seed = self.seed;
            options.first_image = picture as u32;
            options.class_label = self.class_label;
            (options.height, options.width) = (Some(self.pictures.height), Some(self.pictures.width));
            let mut quiet = Job { cancel: job.cancel.clone(), report: None };
            states.extend(pipeline.draw_latents(&options, None, &mut quiet)?.0);
        }
        job.step("prior", total, total)?;
        let size = (self.pictures.height, self.pictures.width);
        let prompts = vec![prompt; self.prior_pictures];
        let (conditioning, _) = pipeline.condition(&prompts, self.class_label, size, &job.cancel)?;
        let info = pipeline.info();
        let side = |pixels: usize| pixels / info.latent_factor;
        let shape = [info.latent_channels, side(size.0), side(size.1)];
        let examples = Examples { states, shape, conditioning, rows: None };
        Ok(Term { examples, objective: Objective::Training, anchors: None, weight: 1.0 })
    }
}
