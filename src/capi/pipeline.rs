//! Pipelines
//!
//! A pipeline is an opened text-to-image model: a folder in the diffusers layout, exported to ONNX (`model_index.json`,
//! `unet/`, `text_encoder/`, `tokenizer/`, `scheduler/`, and, for a latent model, `vae_decoder/`; `vae_encoder/` to start
//! from images; `text_encoder_2/` and `tokenizer_2/` for SDXL). It does one job at a time: a draw, an encoding, a
//! denoising step or a change of its composition. For jobs side by side, open it more than once.
//!
//! Where the stages of a decomposed process have models of their own, `unet_1/`, `unet_2/` and so on (links will do) are
//! those of stage 1, stage 2; the last one serves all later stages. Concepts act on those with the weights of `unet/`.

use std::ffi::{CString, c_char};
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use rayon::ThreadPool;

use super::argument::{self, Versioned, c_text, out, path};
use super::concept::macula_layer_info;
use super::guard::{guard, guard_free};
use super::handle::{Object, object};
use super::runtime::macula_runtime;
use super::session::macula_session_options;
use super::status::macula_status;
use crate::concept::{GatheredConcept, Projections};
use crate::diffusion::pipeline::{AppliedConcept, Expected, Pipeline, PipelineInfo};
use crate::diffusion::unet::UnetOptions;
use crate::error::{Error, Result, Status};

/// An opened text-to-image model.
pub struct macula_pipeline {
    pub(super) info: PipelineInfo,
    fingerprint: CString,
    provider: CString,
    fallback_reason: Option<CString>,
    features: usize,
    pub(super) projections: Option<Arc<Projections>>,
    pub(super) pool: Arc<ThreadPool>,
    paths: Vec<CString>,
    pub(super) work: Mutex<Work>,
}
object!(macula_pipeline, 4, idle: |pipeline| !pipeline.work.is_locked());

/// What one job at a time works with.
pub(super) struct Work {
    pub(super) pipeline: Pipeline,
    pub(super) composed: Vec<AppliedConcept>,
    pub(super) ablated: Vec<AppliedConcept>,
    /// Concepts whose weights were gathered, by their handles' keys, the latest last.
    pub(super) gathered: Vec<(usize, GatheredConcept)>,
}

impl macula_pipeline {
    /// Takes the pipeline for a job.
    pub(super) fn begin(&self) -> Result<MutexGuard<'_, Work>> {
        self.work.try_lock().ok_or_else(|| Error::new(Status::Busy, "the pipeline is at work on another job"))
    }
}

/// How a pipeline is opened.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct macula_pipeline_options {
    /// `sizeof` this struct.
    pub struct_size: usize,
    /// How its models are run. May be NULL: the values of `MACULA_SESSION_OPTIONS_INIT`. Default: `NULL`.
    pub session: *const macula_session_options,
    /// TensorRT without `profiles`: the most pictures of a draw, 0 for 1. The UNet is built for up to twice as many states, as
    /// with guidance, at the model's own size, and for prompts of up to 4 times `prompt_tokens`. Default: `0`.
    pub pictures: u32,
    /// TensorRT without `profiles`: the stages of the schedule that will be walked, which the UNet is built for; 0 for those of
    /// the folder's `scheduler/decomposed.json`, or 1 without it. Default: `0`.
    pub stages: u32,
    /// 1: concepts with neurons of self-attention can be composed; `UNSUPPORTED` if this UNet's can't. The weights that make
    /// its keys and values are then held once more, as inputs of the session, which costs a little time in each step, and a
    /// swap of such a concept writes them. Default: `0`.
    pub self_attention: i32,
    /// Zero. Default: `0`.
    pub reserved: i32,
}

impl Default for macula_pipeline_options {
    fn default() -> Self {
        Self {
            struct_size: size_of::<Self>(),
            session: std::ptr::null(),
            pictures: 0,
            stages: 0,
            self_attention: 0,
            reserved: 0,
        }
    }
}

// SAFETY: repr(C), begins with its size; pointers and integers take any bytes.
unsafe impl Versioned for macula_pipeline_options {
    const FIRST_SIZE: usize = 24;
}

/// What a pipeline is. The texts belong to the pipeline handle.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct macula_pipeline_info {
    /// `sizeof` this struct.
    pub struct_size: usize,
    /// Fingerprint of the K and V weights of the UNet's cross-attention, 64 hexadecimal digits: concepts of this base carry
    /// it. `""` if its K and V cannot be composed.
    pub fingerprint: *const c_char,
    /// What runs the UNet: `"CPUExecutionProvider"`, `"CUDAExecutionProvider"` or `"TensorrtExecutionProvider"`.
    pub provider: *const c_char,
    /// Why another provider was asked for and replaced; NULL if none was.
    pub fallback_reason: *const c_char,
    /// Default width of a picture in pixels.
    pub width: usize,
    /// Default height of a picture in pixels.
    pub height: usize,
    /// Widths and heights are multiples of this.
    pub side_multiple: usize,
    /// Channels of a latent.
    pub latent_channels: usize,
    /// Pixels of a picture per number of a latent, along a side; 1 for a model in pixel space.
    pub latent_factor: usize,
    /// Tokens of a prompt's chunk: encodings have a multiple of this many rows. 0 for a model without text.
    pub prompt_tokens: usize,
    /// Numbers in a row of a prompt's encoding; 0 if the model leaves it open or takes no text.
    pub prompt_features: usize,
    /// UNets: more than 1 if stages of a decomposed process have their own.
    pub unet_count: usize,
    /// Number of cross-attention's K and V projections, for `macula_pipeline_get_projection`; 0 if they cannot be composed.
    pub projection_count: usize,
    /// 1 if pictures can be encoded, to start from them.
    pub encodes_images: i32,
    /// 1 if K and V can be composed.
    pub composes: i32,
}

impl Default for macula_pipeline_info {
    fn default() -> Self {
        Self {
            struct_size: size_of::<Self>(),
            fingerprint: std::ptr::null(),
            provider: std::ptr::null(),
            fallback_reason: std::ptr::null(),
            width: 0,
            height: 0,
            side_multiple: 0,
            latent_channels: 0,
            latent_factor: 0,
            prompt_tokens: 0,
            prompt_features: 0,
            unet_count: 0,
            projection_count: 0,
            encodes_images: 0,
            composes: 0,
        }
    }
}

// SAFETY: repr(C), begins with its size; pointers and integers take any bytes.
unsafe impl Versioned for macula_pipeline_info {
    const FIRST_SIZE: usize = 112;
}

/// Opens a model folder. The folder may change or go away afterwards.
///
/// - `runtime`: a live runtime; not NULL. It may be freed before the pipeline.
/// - `folder`: path of the folder that holds `model_index.json`; not NULL.
/// - `options`: how it is run; may be NULL for the CPU, one thread per physical core and no cache.
/// - `out_pipeline`: receives the pipeline; not NULL. Free it with `macula_pipeline_free`.
///
/// Errors: `NOT_FOUND`, `IO`, `INVALID_FILE`, `UNSUPPORTED`, `LIMIT_EXCEEDED`, each naming the file and, in a model, the
/// node; `PROVIDER_UNAVAILABLE` with the reason; `RUNTIME_FAILED`. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_pipeline_open(
    runtime: *const macula_runtime,
    folder: *const c_char,
    options: *const macula_pipeline_options,
    out_pipeline: *mut *mut macula_pipeline,
) -> macula_status {
    guard("macula_pipeline_open", |call| {
        let runtime = call.object(runtime, "runtime")?;
        // SAFETY: valid as the header asks.
        let (folder, out_pipeline) = unsafe { (path(folder, "folder")?, out(out_pipeline, "out_pipeline")?) };
        // SAFETY: as above.
        let options = unsafe { argument::options(options, "options") }?;
        // SAFETY: as above.
        let session = unsafe { argument::options(options.session, "options.session") }?;
        let mut unet = UnetOptions::default();
        // SAFETY: as above.
        unet.session = unsafe { session.read() }.map_err(|error| error.at("options.session"))?;
        unet.threads = session.threads as usize;
        unet.self_attention = match options.self_attention {
            0 => false,
            1 => true,
            other => return Err(Error::invalid_argument(format!("options.self_attention is {other}, must be 0 or 1"))),
        };
        let expected = Expected { pictures: options.pictures as usize, stages: options.stages as usize };
        let pipeline = Pipeline::open_expecting(&runtime.runtime, folder, &unet, expected)?;
        out_pipeline.set(macula_pipeline::table().insert(macula_pipeline::new(pipeline)));
        Ok(())
    })
}

impl macula_pipeline {
    fn new(pipeline: Pipeline) -> Self {
        let unet = pipeline.unet();
        let projections = unet.projections().cloned();
        let paths = projections.iter().flat_map(|all| all.as_slice()).map(|one| c_text(&one.path)).collect();
        Self {
            info: pipeline.info().clone(),
            fingerprint: c_text(&unet.fingerprint().map_or_else(String::new, |print| print.to_string())),
            provider: c_text(unet.session().provider().name()),
            fallback_reason: unet.session().fallback_reason().map(c_text),
            features: unet.shape().features.unwrap_or(0),
            pool: unet.pool().clone(),
            projections,
            paths,
            work: Mutex::new(Work { pipeline, composed: Vec::new(), ablated: Vec::new(), gathered: Vec::new() }),
        }
    }
}

/// Frees a pipeline with its models and its composition.
///
/// - `pipeline`: a live pipeline; may be NULL, then nothing happens.
///
/// Errors: `BUSY` during a job, also from inside its callback: then nothing was freed. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_pipeline_free(pipeline: *mut macula_pipeline) -> macula_status {
    guard_free("macula_pipeline_free", pipeline)
}

/// What a pipeline is.
///
/// - `pipeline`: a live pipeline; not NULL.
/// - `out_info`: an initialised struct (`MACULA_PIPELINE_INFO_INIT`) to be filled in; not NULL.
///
/// Any thread; never waits, also during a job.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_pipeline_get_info(
    pipeline: *const macula_pipeline,
    out_info: *mut macula_pipeline_info,
) -> macula_status {
    guard("macula_pipeline_get_info", |call| {
        let pipeline = call.object(pipeline, "pipeline")?;
        // SAFETY: valid as the header asks.
        let to = unsafe { argument::out_info(out_info, "out_info") }?;
        let info = &pipeline.info;
        to.set(macula_pipeline_info {
            struct_size: 0,
            fingerprint: pipeline.fingerprint.as_ptr(),
            provider: pipeline.provider.as_ptr(),
            fallback_reason: pipeline.fallback_reason.as_ref().map_or(std::ptr::null(), |reason| reason.as_ptr()),
            width: info.width,
            height: info.height,
            side_multiple: info.side_multiple,
            latent_channels: info.latent_channels,
            latent_factor: info.latent_factor,
            prompt_tokens: info.chunk_tokens,
            prompt_features: pipeline.features,
            unet_count: info.unets,
            projection_count: pipeline.paths.len(),
            encodes_images: info.encodes_images.into(),
            composes: pipeline.projections.is_some().into(),
        });
        Ok(())
    })
}

/// One K or V projection of a pipeline's UNet, in the order of the paths' bytes. `neurons` is 0.
///
/// - `pipeline`: a live pipeline; not NULL.
/// - `projection`: below `projection_count` of `macula_pipeline_info`.
/// - `out_info`: an initialised struct (`MACULA_LAYER_INFO_INIT`) to be filled in; not NULL. Its text belongs to the
///   pipeline.
///
/// Any thread; never waits, also during a job.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_pipeline_get_projection(
    pipeline: *const macula_pipeline,
    projection: usize,
    out_info: *mut macula_layer_info,
) -> macula_status {
    guard("macula_pipeline_get_projection", |call| {
        let pipeline = call.object(pipeline, "pipeline")?;
        // SAFETY: valid as the header asks.
        let info = unsafe { argument::out_info(out_info, "out_info") }?;
        let all = pipeline.projections.as_ref().map(|all| all.as_slice()).unwrap_or_default();
        let (one, path) = all.get(projection).zip(pipeline.paths.get(projection)).ok_or_else(|| {
            Error::invalid_argument(format!("projection is {projection}, but the UNet has {}", all.len()))
        })?;
        info.set(macula_layer_info {
            struct_size: 0,
            path: path.as_ptr(),
            out_features: one.out_features,
            in_features: one.in_features,
            neurons: 0,
        });
        Ok(())
    })
}
