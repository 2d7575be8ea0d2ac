//! What a request's loss is made of: pictures, given or drawn by the model itself, with texts and goals.

use super::draw::{ActingRow, Examples, Objective};
use super::job::Term;
use super::request::{Encoded, EncodedSubject, Erasure, Goal, Request, Subject};
use crate::concept::Scope;
use crate::diffusion::pipeline::{DrawOptions, Embedding, Pipeline};
use crate::diffusion::unet::Conditioning;
use crate::error::{Error, Result};
use crate::memory::extend;
use crate::progress::Job;

/// A part of the loss, and the prompt of each of its pictures; none where the host encoded them.
pub(super) type Prompted = (Term, Vec<String>);

impl Request<'_> {
    /// The parts of the loss, the concept's own first.
    pub(super) fn terms(&self, pipeline: &mut Pipeline, job: &mut Job<'_>) -> Result<Vec<Prompted>> {
        let (own, words) = match &self.goal {
            Goal::Implant(subject) => (self.subject(subject, pipeline, job)?, subject.words()),
            Goal::ImplantEncoded(subject) => {
                let terms = self.encoded_subject(subject, pipeline)?;
                return Ok(terms.into_iter().map(|term| (term, Vec::new())).collect());
            }
            Goal::Erase(erasure) => (self.erasure(erasure, pipeline, job)?, vec![erasure.word.clone()]),
        };
        let mut terms = vec![own];
        // In local scope no text without the concept's words can change.
        if let Goal::Implant(subject) = &self.goal
            && self.scope == Scope::Global
            && (self.drawn_pictures > 0 || subject.class_pictures.is_some())
        {
            terms.push(self.prior(subject, pipeline, job)?);
        }
        if !self.preserve.is_empty() {
            terms.extend(self.preserved(&words, pipeline, job)?);
        }
        Ok(terms)
    }

    /// Pictures of the subject, and what the training target is.
    fn subject(&self, subject: &Subject<'_>, pipeline: &mut Pipeline, job: &Job<'_>) -> Result<Prompted> {
        let (states, shape) = pipeline.encode_images(subject.pictures, &job.cancel)?;
        let prompts = subject.prompts();
        let shape = [shape[1], shape[2], shape[3]];
        let (examples, rows) = self.examples(states, shape, &prompts, &subject.words(), pipeline, job)?;
        check_words(&rows, &prompts, &subject.trigger)?;
        Ok((Term { examples, objective: Objective::Training, anchors: None, weight: 1.0 }, prompts))
    }

    /// What the host encoded: the subject, and in global scope its class.
    fn encoded_subject(&self, subject: &EncodedSubject<'_>, pipeline: &Pipeline) -> Result<Vec<Term>> {
        let term = |encoded: &Encoded<'_>, rows: Option<Vec<usize>>| {
            let [count, channels, height, width] = encoded.shape;
            let [texts, tokens, _] = encoded.context_shape;
            let conditioning = Conditioning {
                batch: count,
                tokens,
                context: encoded.context.repeat(count / texts),
                class_labels: pipeline.unet().takes_class_labels().then(|| vec![self.class_label; count]),
                ..Conditioning::default()
            };
            let (states, shape) = (encoded.latents.to_vec(), [channels, height, width]);
            let rows = rows.map(|rows| vec![acting(&rows, 0); count]);
            let examples = Examples { states, shape, conditioning, rows, timestep_power: 1.0 };
            Term { examples, objective: Objective::Training, anchors: None, weight: 1.0 }
        };
        match (self.scope, subject.prompt) {
            (Scope::Local, Some(prompt)) => {
                let rows = rows_of(prompt, &words(&subject.trigger, &subject.class_noun));
                check_words(std::slice::from_ref(&rows), &[prompt.prompt.text().to_owned()], &subject.trigger)?;
                Ok(vec![term(&subject.examples, Some(rows))])
            }
            _ => Ok([Some(&subject.examples), subject.class.as_ref()]
                .into_iter()
                .flatten()
                .map(|one| term(one, None))
                .collect()),
        }
    }

    /// Pictures of the class, given or as the untouched model draws them (prior preservation).
    fn prior(&self, subject: &Subject<'_>, pipeline: &mut Pipeline, job: &mut Job<'_>) -> Result<Prompted> {
        let count = subject.class_pictures.map_or(self.drawn_pictures, |pictures| pictures.count);
        let prompts = vec![format!("a {}", subject.class_noun); count];
        let (states, shape) = match subject.class_pictures {
            Some(pictures) => {
                let (states, shape) = pipeline.encode_images(pictures, &job.cancel)?;
                (states, [shape[1], shape[2], shape[3]])
            }
            None => self.drawn(&prompts, pipeline, job)?,
        };
        let (examples, _) = self.examples(states, shape, &prompts, &subject.words(), pipeline, job)?;
        Ok((Term { examples, objective: Objective::Training, anchors: None, weight: 1.0 }, prompts))
    }

    /// Pictures of what is to be forgotten, and the untouched prediction for their anchors.
    fn erasure(&self, erasure: &Erasure, pipeline: &mut Pipeline, job: &mut Job<'_>) -> Result<Prompted> {
        let (prompts, anchors) = (self.cycled(&erasure.prompts), self.cycled(&erasure.anchors));
        let (states, shape) = self.drawn(&prompts, pipeline, job)?;
        let words = [erasure.word.clone()];
        let (examples, rows) = self.examples(states, shape, &prompts, &words, pipeline, job)?;
        check_words(&rows, &prompts, &erasure.word)?;
        let size = self.size(pipeline);
        let (anchors, _) = pipeline.condition(&anchors, self.class_label, size, &job.cancel)?;
        if anchors.tokens != examples.conditioning.tokens {
            return Err(Error::invalid_argument(
                "the anchors are not as long as the prompts, in chunks of the tokenizer",
            ));
        }
        Ok((Term { examples, objective: Objective::Untouched, anchors: Some(anchors), weight: 1.0 }, prompts))
    }

    /// Pictures of the preserved texts, and the untouched prediction for themselves; nothing if the set can't act on them.
    fn preserved(&self, words: &[String], pipeline: &mut Pipeline, job: &mut Job<'_>) -> Result<Option<Prompted>> {
        let prompts = self.cycled(&self.preserve);
        let size = self.size(pipeline);
        let (_, texts) = pipeline.condition(&prompts, self.class_label, size, &job.cancel)?;
        let touched = texts.iter().any(|text| words.iter().any(|words| !text.prompt.rows_of(words).is_empty()));
        if self.scope == Scope::Local && !touched {
            return Ok(None);
        }
        let (states, shape) = self.drawn(&prompts, pipeline, job)?;
        let (examples, _) = self.examples(states, shape, &prompts, words, pipeline, job)?;
        let weight = self.preserve_weight;
        Ok(Some((Term { examples, objective: Objective::Untouched, anchors: None, weight }, prompts)))
    }

    /// Texts in turn, one a drawn picture.
    fn cycled(&self, texts: &[String]) -> Vec<String> {
        texts.iter().cycle().take(self.drawn_pictures.max(texts.len())).cloned().collect()
    }

    /// States with their texts, and the rows of the concept's words in each.
    fn examples(
        &self,
        states: Vec<f32>,
        shape: [usize; 3],
        prompts: &[String],
        words: &[String],
        pipeline: &mut Pipeline,
        job: &Job<'_>,
    ) -> Result<(Examples, Vec<Vec<usize>>)> {
        let size = self.size(pipeline);
        let (conditioning, texts) = pipeline.condition(prompts, self.class_label, size, &job.cancel)?;
        let rows: Vec<Vec<usize>> = texts.iter().map(|text| rows_of(text, words)).collect();
        let local = self.scope == Scope::Local;
        let own = local.then(|| rows.iter().map(|rows| acting(rows, 0)).collect());
        Ok((Examples { states, shape, conditioning, rows: own, timestep_power: 1.0 }, rows))
    }

    /// One state for each prompt as the model draws it, `[C, H, W]` each.
    fn drawn(&self, prompts: &[String], pipeline: &mut Pipeline, job: &mut Job<'_>) -> Result<(Vec<f32>, [usize; 3])> {
        let (height, width) = self.size(pipeline);
        let total = prompts.len() as u64;
        let mut states = Vec::new();
        let mut shape = [0; 4];
        for (picture, prompt) in prompts.iter().enumerate() {
            job.step("draw", picture as u64, total)?;
            let mut options = DrawOptions::new(prompt.clone());
            options.seed = self.seed;
            options.first_image = picture as u32;
            options.class_label = self.class_label;
            (options.height, options.width) = (Some(height), Some(width));
            let mut quiet = Job { cancel: job.cancel.clone(), report: None };
            let (state, of_state) = pipeline.draw_latents(&options, None, &mut quiet)?;
            extend(&mut states, state)?;
            shape = of_state;
        }
        job.step("draw", total, total)?;
        Ok((states, [shape[1], shape[2], shape[3]]))
    }
}

impl Subject<'_> {
    fn words(&self) -> Vec<String> {
        words(&self.trigger, &self.class_noun)
    }
}

/// On which words a subject's set acts: the trigger, and the noun behind it. Elsewhere the noun may mean another thing.
pub(super) fn words(trigger: &str, class_noun: &str) -> Vec<String> {
    let phrase = (!class_noun.trim().is_empty()).then(|| format!("{trigger} {class_noun}"));
    std::iter::once(trigger.to_owned()).chain(phrase).collect()
}

pub(super) fn rows_of(text: &Embedding, words: &[String]) -> Vec<usize> {
    let mut rows: Vec<usize> = words.iter().flat_map(|words| text.prompt.rows_of(words)).collect();
    rows.sort_unstable();
    rows.dedup();
    rows
}

/// Rows of a text with the set that acts on them.
pub(super) fn acting(rows: &[usize], set: usize) -> Vec<ActingRow> {
    rows.iter().map(|&row| ActingRow { row, set }).collect()
}

/// Fails for a prompt in which the word has no row.
pub(super) fn check_words(rows: &[Vec<usize>], prompts: &[String], word: &str) -> Result<()> {
    match rows.iter().zip(prompts).find(|(rows, _)| rows.is_empty()) {
        Some((_, prompt)) => Err(Error::invalid_argument(format!("the prompt {prompt:?} lacks {word:?}"))),
        None => Ok(()),
    }
}
