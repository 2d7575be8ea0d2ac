//! Composing and ablating
//!
//! A composition shuts weights of K and V, or gives them tuned values: each is multiplied by the product of `1 - strength`
//! over the concepts that shut it, or goes by `strength` from its own value to the mean of the tuned ones. Where the embedding
//! of a concept's trigger was learnt, it goes by `strength` from the text encoder's own to the learnt one, in every prompt that
//! is encoded while the concept is composed. A composition stays until it is changed and acts on every draw and denoising step
//! from then on. The base weights are never written and no model is built again, so a change costs milliseconds, and after
//! `macula_composition_clear` the next picture is the base model's, bit for bit.

use std::ffi::c_char;

use super::argument::{optional_text, slice};
use super::concept::{MACULA_ROLE_ERASE, MACULA_ROLE_IMPLANT, macula_concept, macula_role, macula_scope, scope};
use super::guard::{Call, guard};
use super::pipeline::{Work, macula_pipeline};
use super::status::macula_status;
use crate::concept::{Concept, GatheredConcept, Role, Scope};
use crate::diffusion::pipeline::{AppliedConcept, ConceptScope};
use crate::error::{Error, Result};

/// How many gathered concepts a pipeline keeps beside those at work.
const KEPT_CONCEPTS: usize = 16;

/// One concept in a composition.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct macula_term {
    /// A live concept of the pipeline's base model; not NULL. It may be freed after the call. Default: `NULL`.
    pub subject: *const macula_concept,
    /// Local scope: the words of the prompt that the concept acts on, several separated by commas; the prompt of a draw
    /// must hold one of them. May be NULL: the concept's trigger word with its class noun. Default: `NULL`.
    pub words: *const c_char,
    /// Local scope, in place of `words`: the rows of the prompt's encoding that the concept acts on, `token_count` of
    /// them. May be NULL. Default: `NULL`.
    pub tokens: *const u32,
    /// Number of `tokens`. Default: `0`.
    pub token_count: usize,
    /// Share of the change of each weight, 0 (none) to 1 (it is shut, or has its tuned value). Default: `1.0f`.
    pub strength: f32,
    /// Where it acts. Default: `MACULA_SCOPE_DEFAULT`.
    pub scope: macula_scope,
}

/// Draws concepts together: shuts the weights of all of them, or gives them their tuned values. Replaces what was composed before; what is ablated stays.
///
/// - `pipeline`: a live pipeline; not NULL.
/// - `terms`: the concepts, `term_count` of them, in any order; may be NULL if there are none.
/// - `term_count`: how many; 0 ends composing.
///
/// Errors: `WRONG_BASE` with both fingerprints; `INVALID_ARGUMENT` for a strength outside 0 to 1, a concept that was found to
/// erase, two concepts that learnt the embedding of one token, or a learnt embedding that is not of this model's text encoders,
/// with both widths; `UNSUPPORTED` if this UNet's K and V cannot be composed, or rows of a text encoder cannot be given;
/// `RUNTIME_FAILED`; `BUSY` during a job. On failure the composition stays as it was. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_compose(
    pipeline: *mut macula_pipeline,
    terms: *const macula_term,
    term_count: usize,
) -> macula_status {
    guard("macula_compose", |call| {
        // SAFETY: valid as the header asks.
        unsafe { apply(call, pipeline, terms, term_count, MACULA_ROLE_IMPLANT) }
    })
}

/// Draws without concepts: shuts the weights of sets that were found to erase. Replaces what was ablated before; what is
/// composed stays.
///
/// - `pipeline`: a live pipeline; not NULL.
/// - `terms`: the concepts, `term_count` of them, in any order; may be NULL if there are none.
/// - `term_count`: how many; 0 ends ablating.
///
/// Errors: as `macula_compose`; `INVALID_ARGUMENT` for a concept that was found to draw its subject. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_ablate(
    pipeline: *mut macula_pipeline,
    terms: *const macula_term,
    term_count: usize,
) -> macula_status {
    guard("macula_ablate", |call| {
        // SAFETY: valid as the header asks.
        unsafe { apply(call, pipeline, terms, term_count, MACULA_ROLE_ERASE) }
    })
}

/// Ends composing and ablating: the next picture is the base model's, bit for bit.
///
/// - `pipeline`: a live pipeline; not NULL.
///
/// Errors: `BUSY` during a job. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_composition_clear(pipeline: *mut macula_pipeline) -> macula_status {
    guard("macula_composition_clear", |call| {
        let pipeline = call.object(pipeline, "pipeline")?;
        let work = &mut *pipeline.begin()?;
        work.pipeline.set_concepts(Vec::new())?;
        work.composed.clear();
        work.ablated.clear();
        Ok(())
    })
}

/// # Safety
/// Pointers are valid for what the header says.
unsafe fn apply(
    call: &mut Call,
    pipeline: *mut macula_pipeline,
    terms: *const macula_term,
    term_count: usize,
    role: macula_role,
) -> Result<()> {
    let pipeline = call.object(pipeline, "pipeline")?;
    // SAFETY: as promised by the caller.
    let terms = unsafe { slice(terms, term_count, "terms") }?;
    let work = &mut *pipeline.begin()?;
    let mut applied = Vec::new();
    for (at, term) in terms.iter().enumerate() {
        // SAFETY: as promised by the caller.
        let read = unsafe { term.read(call, &pipeline, work, role) };
        applied.push(read.map_err(|error| error.at(format_args!("terms[{at}]")))?);
    }
    let other = if role == MACULA_ROLE_ERASE { &work.composed } else { &work.ablated };
    work.pipeline.set_concepts(applied.iter().chain(other).cloned().collect())?;
    *(if role == MACULA_ROLE_ERASE { &mut work.ablated } else { &mut work.composed }) = applied;
    Ok(())
}

impl macula_term {
    /// # Safety
    /// Pointers are valid for what the fields' texts say.
    unsafe fn read(
        &self,
        call: &mut Call,
        pipeline: &macula_pipeline,
        work: &mut Work,
        role: macula_role,
    ) -> Result<AppliedConcept> {
        let subject = call.object(self.subject, "subject")?;
        let concept = &subject.concept;
        match (concept.metadata.role, role) {
            (Role::Implant, MACULA_ROLE_ERASE) => {
                return Err(Error::invalid_argument(format!(
                    "{:?} was found to draw its subject, not to erase it: compose it",
                    concept.metadata.title
                )));
            }
            (Role::Erase, MACULA_ROLE_IMPLANT) => {
                return Err(Error::invalid_argument(format!(
                    "{:?} was found to erase its subject, not to draw it: ablate it",
                    concept.metadata.title
                )));
            }
            _ => {}
        }
        let scope = match scope(self.scope, "scope")?.unwrap_or(concept.metadata.scope) {
            Scope::Global => ConceptScope::Global,
            // SAFETY: as promised by the caller.
            Scope::Local => unsafe { self.local(concept) }?,
        };
        Ok(AppliedConcept {
            concept: gather(self.subject.addr(), concept, pipeline, work)?,
            strength: self.strength,
            scope,
            token: concept.token.clone(),
        })
    }

    /// # Safety
    /// As for [`macula_term::read`].
    unsafe fn local(&self, concept: &Concept) -> Result<ConceptScope> {
        // SAFETY: as promised by the caller.
        let (words, tokens) =
            unsafe { (optional_text(self.words, "words")?, slice(self.tokens, self.token_count, "tokens")?) };
        if !tokens.is_empty() {
            return Ok(ConceptScope::Tokens(tokens.iter().map(|&token| token as usize).collect()));
        }
        let words: Vec<String> = match words {
            Some(words) => words.split(',').map(|word| word.trim().to_owned()).collect(),
            None => {
                let (trigger, noun) = (&concept.metadata.trigger, &concept.metadata.class_noun);
                let phrase = format!("{trigger} {noun}").trim().to_owned();
                // A prompt may name the subject by its trigger alone; the noun alone may mean another one.
                if trigger.is_empty() || *trigger == phrase { vec![phrase] } else { vec![phrase, trigger.clone()] }
            }
        };
        if words.iter().all(|word| word.is_empty()) {
            return Err(Error::invalid_argument("a local concept without a trigger word needs words or tokens"));
        }
        Ok(ConceptScope::Words(words))
    }
}

/// A concept with the base's weights, kept for the next time.
fn gather(key: usize, concept: &Concept, pipeline: &macula_pipeline, work: &mut Work) -> Result<GatheredConcept> {
    let kept = work.gathered.iter().position(|(kept, _)| *kept == key);
    let entry = match kept {
        Some(at) => work.gathered.remove(at),
        None => {
            let base = pipeline.projections.as_ref();
            let base = base.ok_or_else(|| Error::unsupported("this UNet's keys and values cannot be composed"))?;
            (key, GatheredConcept::new(concept, base, &pipeline.pool)?)
        }
    };
    let gathered = entry.1.clone();
    work.gathered.push(entry);
    if work.gathered.len() > KEPT_CONCEPTS {
        work.gathered.remove(0);
    }
    Ok(gathered)
}
