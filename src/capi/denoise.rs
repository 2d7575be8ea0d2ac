//! Encoding prompts and single denoising steps
//!
//! For hosts with a sampler of their own: encode prompts once, then ask for one prediction at a time. The pipeline's
//! composition acts here as it does in a draw.

use std::ffi::c_char;

use super::argument::{self, Versioned, out, reference, text};
use super::cancel::macula_cancel_token;
use super::guard::{guard, guard_free};
use super::handle::{Object, object};
use super::pipeline::macula_pipeline;
use super::status::macula_status;
use super::tensor::{MACULA_DTYPE_F32, macula_tensor};
use crate::diffusion::pipeline::Embedding;
use crate::diffusion::unet::Conditioning;
use crate::error::{Error, Result};
use crate::progress::CancelToken;
use std::sync::Arc;

/// A prompt's encoding. It never changes, so any number of threads may read it.
pub struct macula_embedding {
    pub(super) embedding: Arc<Embedding>,
}
object!(macula_embedding, 6);

/// What an encoding is. The tensors' memory belongs to the encoding's handle and must not be written.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct macula_embedding_info {
    /// `sizeof` this struct.
    pub struct_size: usize,
    /// The encoding `[1, rows, features]`, 32-bit floating point. `data` must not be written.
    pub context: macula_tensor,
    /// The pooled encoding `[1, features]` of SDXL's second encoder; `rank` 0 and `data` NULL if there is none.
    pub pooled: macula_tensor,
    /// Rows that stand for the prompt's own tokens, without begin, end and padding.
    pub own_tokens: usize,
}

impl Default for macula_embedding_info {
    fn default() -> Self {
        Self {
            struct_size: size_of::<Self>(),
            context: macula_tensor::none(),
            pooled: macula_tensor::none(),
            own_tokens: 0,
        }
    }
}

// SAFETY: repr(C), begins with its size; pointers and integers take any bytes.
unsafe impl Versioned for macula_embedding_info {
    const FIRST_SIZE: usize = 208;
}

/// Encodes a prompt of any length: longer ones than the text encoder's are cut into chunks and joined. Learnt embeddings of
/// the concepts that are composed at the time are in it; K and V of concepts are not, these act where it is used.
///
/// - `pipeline`: a live pipeline; not NULL.
/// - `prompt`: the text, possibly empty; not NULL.
/// - `cancel`: stops the encoding from another thread; may be NULL.
/// - `out_embedding`: receives the encoding; not NULL. Free it with `macula_embedding_free`.
///
/// Errors: `INVALID_ARGUMENT` for a prompt that is too long, with the range; `CANCELLED`; `RUNTIME_FAILED`; `BUSY` during
/// another job. Any thread; blocks until it is done.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_pipeline_encode_prompt(
    pipeline: *mut macula_pipeline,
    prompt: *const c_char,
    cancel: *const macula_cancel_token,
    out_embedding: *mut *mut macula_embedding,
) -> macula_status {
    guard("macula_pipeline_encode_prompt", |call| {
        let pipeline = call.object(pipeline, "pipeline")?;
        // SAFETY: valid as the header asks.
        let (prompt, out_embedding) = unsafe { (text(prompt, "prompt")?, out(out_embedding, "out_embedding")?) };
        let cancel = match cancel.is_null() {
            true => CancelToken::new(),
            false => call.object(cancel, "cancel")?.token.clone(),
        };
        let embedding = pipeline.begin()?.pipeline.encode_prompt(prompt, &cancel)?;
        out_embedding.set(macula_embedding::table().insert(macula_embedding { embedding }));
        Ok(())
    })
}

/// What an encoding is.
///
/// - `embedding`: a live encoding; not NULL.
/// - `out_info`: an initialised struct (`MACULA_EMBEDDING_INFO_INIT`) to be filled in; not NULL.
///
/// Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_embedding_get_info(
    embedding: *const macula_embedding,
    out_info: *mut macula_embedding_info,
) -> macula_status {
    guard("macula_embedding_get_info", |call| {
        let embedding = &call.object(embedding, "embedding")?.embedding;
        // SAFETY: valid as the header asks.
        let info = unsafe { argument::out_info(out_info, "out_info") }?;
        info.set(macula_embedding_info {
            struct_size: 0,
            context: macula_tensor::view(
                &embedding.context,
                &[1, embedding.tokens, embedding.features],
                MACULA_DTYPE_F32,
            ),
            pooled: embedding.pooled.as_ref().map_or(macula_tensor::none(), |pooled| {
                macula_tensor::view(pooled, &[1, pooled.len()], MACULA_DTYPE_F32)
            }),
            own_tokens: embedding.prompt.own_tokens(),
        });
        Ok(())
    })
}

/// Frees an encoding; views of it end.
///
/// - `embedding`: a live encoding; may be NULL, then nothing happens.
///
/// Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_embedding_free(embedding: *mut macula_embedding) -> macula_status {
    guard_free("macula_embedding_free", embedding)
}

/// What one prediction is made from. All tensors lie in host memory and are copied.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct macula_denoise_inputs {
    /// `sizeof` this struct.
    pub struct_size: usize,
    /// The states `[batch, channels, h, w]`, 32-bit floating point, scaled as the sampler wants it; not NULL.
    /// Default: `NULL`.
    pub sample: *const macula_tensor,
    /// The prompts' encodings `[batch, rows, features]`, 32-bit floating point, any number of rows that the model takes.
    /// NULL only for a model without text. Default: `NULL`.
    pub context: *const macula_tensor,
    /// SDXL: pooled encodings `[batch, features]`. May be NULL. Default: `NULL`.
    pub text_embeds: *const macula_tensor,
    /// SDXL: sizes `[batch, 6]`: original height and width, crop top and left, target height and width. May be NULL.
    /// Default: `NULL`.
    pub time_ids: *const macula_tensor,
    /// Classes `[batch]`, 64-bit integers. May be NULL. Default: `NULL`.
    pub class_labels: *const macula_tensor,
    /// Embedded guidance scales `[batch, features]` of a distilled model. May be NULL. Default: `NULL`.
    pub timestep_cond: *const macula_tensor,
    /// The encoding that the conditional entries' `context` is: tells a local concept where its words stand. May be NULL:
    /// then local concepts need `tokens`. Default: `NULL`.
    pub embedding: *const macula_embedding,
    /// Stops the prediction from another thread. May be NULL. Default: `NULL`.
    pub cancel: *const macula_cancel_token,
    /// Timestep in training steps, 0 to 1000 for usual models. Default: `0.0`.
    pub timestep: f64,
    /// Local concepts act on the entries of the batch from this one on: the number of unconditional entries, which come
    /// first. Default: `0`.
    pub first_conditional: usize,
    /// Stage of a decomposed process that the states are of, for a pipeline whose stages have UNets of their own.
    /// Default: `0`.
    pub stage: usize,
}

impl Default for macula_denoise_inputs {
    fn default() -> Self {
        Self {
            struct_size: size_of::<Self>(),
            sample: std::ptr::null(),
            context: std::ptr::null(),
            text_embeds: std::ptr::null(),
            time_ids: std::ptr::null(),
            class_labels: std::ptr::null(),
            timestep_cond: std::ptr::null(),
            embedding: std::ptr::null(),
            cancel: std::ptr::null(),
            timestep: 0.0,
            first_conditional: 0,
            stage: 0,
        }
    }
}

// SAFETY: repr(C), begins with its size; pointers and numbers take any bytes.
unsafe impl Versioned for macula_denoise_inputs {
    const FIRST_SIZE: usize = 96;
}

/// One prediction of the UNet under the pipeline's composition: noise, velocity or clean states, as the model was trained.
/// The keys and values of a context are computed when it or the composition changes, not at each step.
///
/// - `pipeline`: a live pipeline; not NULL.
/// - `inputs`: what it is made from; not NULL.
/// - `out_prediction`: a tensor of the shape of `sample`, 32-bit floating point, whose memory receives the prediction on
///   success; not NULL. It may be the memory of `sample`.
///
/// Errors: `INVALID_ARGUMENT` for shapes that the model does not take, naming the input and the range; `CANCELLED`;
/// `NOT_FINITE`; `RUNTIME_FAILED`; `BUSY` during another job. Any thread; blocks until it is done.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_pipeline_denoise(
    pipeline: *mut macula_pipeline,
    inputs: *const macula_denoise_inputs,
    out_prediction: *const macula_tensor,
) -> macula_status {
    guard("macula_pipeline_denoise", |call| {
        let pipeline = call.object(pipeline, "pipeline")?;
        // SAFETY: valid as the header asks.
        let (inputs, prediction) = unsafe {
            reference(inputs, "inputs")?;
            (argument::options(inputs, "inputs")?, reference(out_prediction, "out_prediction")?)
        };
        let cancel = match inputs.cancel.is_null() {
            true => CancelToken::new(),
            false => call.object(inputs.cancel, "inputs.cancel")?.token.clone(),
        };
        let embedding = match inputs.embedding.is_null() {
            true => None,
            false => Some(call.object(inputs.embedding, "inputs.embedding")?),
        };
        // SAFETY: valid as the header asks.
        let (shape, sample, conditioning) = unsafe { inputs.read() }?;
        let work = &mut *pipeline.begin()?;
        let computed = work.pipeline.denoise(
            &sample,
            shape,
            inputs.timestep,
            inputs.stage,
            &conditioning,
            inputs.first_conditional,
            embedding.as_ref().map(|entry| &*entry.embedding),
            &cancel,
        )?;
        // SAFETY: as above; the inputs were copied, so that the memory may be that of `sample`.
        unsafe { prediction.f32_mut(&shape, "out_prediction") }?.copy_from_slice(&computed);
        Ok(())
    })
}

impl macula_denoise_inputs {
    /// # Safety
    /// Pointers are valid for what the fields' texts say.
    unsafe fn read(&self) -> Result<([usize; 4], Vec<f32>, Conditioning)> {
        // SAFETY: as promised by the caller.
        let sample = unsafe { reference(self.sample, "inputs.sample")?.read("inputs.sample") }?;
        let shape: [usize; 4] = sample.shape().try_into().map_err(|_| {
            Error::invalid_argument(format!(
                "inputs.sample has shape {:?}, must be [batch, channels, h, w]",
                sample.shape()
            ))
        })?;
        let mut conditioning = Conditioning { batch: shape[0], ..Conditioning::default() };
        if !self.context.is_null() {
            // SAFETY: as promised by the caller.
            let context = unsafe { reference(self.context, "inputs.context")?.read("inputs.context") }?;
            let &[batch, tokens, _] = context.shape() else {
                return Err(Error::invalid_argument(format!(
                    "inputs.context has shape {:?}, must be [batch, rows, features]",
                    context.shape()
                )));
            };
            if batch != shape[0] {
                return Err(Error::invalid_argument(format!(
                    "inputs.context has a batch of {batch}, inputs.sample of {}",
                    shape[0]
                )));
            }
            conditioning.tokens = tokens;
            conditioning.context = context.into_vec()?;
        }
        let numbers = |pointer: *const macula_tensor, name: &str| -> Result<Option<Vec<f32>>> {
            if pointer.is_null() {
                return Ok(None);
            }
            // SAFETY: as promised by the caller.
            unsafe { reference(pointer, name)?.read(name) }?.into_vec().map(Some).map_err(|error| error.at(name))
        };
        conditioning.text_embeds = numbers(self.text_embeds, "inputs.text_embeds")?;
        conditioning.time_ids = numbers(self.time_ids, "inputs.time_ids")?;
        conditioning.timestep_cond = numbers(self.timestep_cond, "inputs.timestep_cond")?;
        if !self.class_labels.is_null() {
            // SAFETY: as promised by the caller.
            let labels = unsafe { reference(self.class_labels, "inputs.class_labels")?.read("inputs.class_labels") }?;
            conditioning.class_labels = Some(labels.into_vec()?);
        }
        Ok((shape, sample.into_vec().map_err(|error| error.at("inputs.sample"))?, conditioning))
    }
}
