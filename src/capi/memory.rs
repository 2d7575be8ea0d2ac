//! Memory
//!
//! What is taken, so that a host can plan: figures of one pipeline, and of the whole process.

use super::argument::{self, Versioned};
use super::guard::guard;
use super::pipeline::macula_pipeline;
use super::status::macula_status;
use crate::runtime::process_memory;

/// What a pipeline takes, in bytes. A figure that ONNX Runtime does not tell is `UINT64_MAX`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct macula_memory_info {
    /// `sizeof` this struct.
    pub struct_size: usize,
    /// Weights of all models, as they are stored. Kernels may keep some a second time, packed for themselves.
    pub weights: u64,
    /// Intermediate values and packed weights that the models' arenas have handed out now.
    pub arena: u64,
    /// The sum of the most that each model's arena ever had handed out.
    pub arena_peak: u64,
    /// Pristine K and V weights, the keys and values that are bound, and gathered concepts.
    pub composition: u64,
    /// RAM of the whole process now, all of its parts together.
    pub process: u64,
    /// The most RAM that the process ever took.
    pub process_peak: u64,
}

impl Default for macula_memory_info {
    fn default() -> Self {
        Self {
            struct_size: size_of::<Self>(),
            weights: 0,
            arena: 0,
            arena_peak: 0,
            composition: 0,
            process: 0,
            process_peak: 0,
        }
    }
}

// SAFETY: repr(C), begins with its size; integers take any bytes.
unsafe impl Versioned for macula_memory_info {
    const FIRST_SIZE: usize = 56;
}

/// What a pipeline and the process take.
///
/// - `pipeline`: a live pipeline; not NULL.
/// - `out_info`: an initialised struct (`MACULA_MEMORY_INFO_INIT`) to be filled in; not NULL.
///
/// Errors: `BUSY` during a job. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_pipeline_get_memory(
    pipeline: *const macula_pipeline,
    out_info: *mut macula_memory_info,
) -> macula_status {
    guard("macula_pipeline_get_memory", |call| {
        let pipeline = call.object(pipeline, "pipeline")?;
        // SAFETY: valid as the header asks.
        let info = unsafe { argument::out_info(out_info, "out_info") }?;
        let work = pipeline.begin()?;
        let memory = work.pipeline.memory();
        let concepts: usize = work.gathered.iter().map(|(_, concept)| concept.memory_bytes()).sum();
        let (process, process_peak) = process_memory().unwrap_or((u64::MAX, u64::MAX));
        info.set(macula_memory_info {
            struct_size: 0,
            weights: memory.weights,
            arena: memory.arena.unwrap_or(u64::MAX),
            arena_peak: memory.arena_peak.unwrap_or(u64::MAX),
            composition: (work.pipeline.composing_bytes() + concepts) as u64,
            process,
            process_peak,
        });
        Ok(())
    })
}
