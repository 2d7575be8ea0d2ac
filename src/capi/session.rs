//! Providers, threads and caches
//!
//! How the models of a pipeline are run. A provider that was asked for and cannot run is an error that says why; the
//! library falls back to a simpler one only if `allow_fallback` says so, and tells in the pipeline's information.

use std::ffi::c_char;

use super::argument::{Versioned, optional_path, optional_text, slice, text};
use super::tensor::dimensions;
use crate::error::{Error, Result};
use crate::runtime::{
    ArenaGrowth, ConvolutionSearch, CudaOptions, Optimization, Provider, SessionOptions, ShapeProfile, TensorRtOptions,
};

/// What runs the models: one of `MACULA_PROVIDER_*`.
pub type macula_provider = i32;

/// The CPU.
pub const MACULA_PROVIDER_CPU: macula_provider = 0;

/// NVIDIA CUDA; operators that it lacks run on the CPU.
pub const MACULA_PROVIDER_CUDA: macula_provider = 1;

/// NVIDIA TensorRT; what it lacks runs by CUDA, then on the CPU. The first run of a new shape builds engines, which
/// takes minutes: give `engine_cache`, and `profiles` for the shapes that will be used.
pub const MACULA_PROVIDER_TENSORRT: macula_provider = 2;

/// How cuDNN chooses a convolution's algorithm for a new shape: one of `MACULA_CONVOLUTION_SEARCH_*`.
pub type macula_convolution_search = i32;

/// By rules, in milliseconds.
pub const MACULA_CONVOLUTION_SEARCH_HEURISTIC: macula_convolution_search = 0;

/// By trying all: hundreds of milliseconds for each new shape.
pub const MACULA_CONVOLUTION_SEARCH_EXHAUSTIVE: macula_convolution_search = 1;

/// Always the same one.
pub const MACULA_CONVOLUTION_SEARCH_DEFAULT: macula_convolution_search = 2;

/// How far graphs are rewritten before they run: one of `MACULA_OPTIMIZATION_*`.
pub type macula_optimization = i32;

/// Not at all.
pub const MACULA_OPTIMIZATION_OFF: macula_optimization = 0;

/// Rewrites that keep the meaning on every provider.
pub const MACULA_OPTIMIZATION_BASIC: macula_optimization = 1;

/// And fusions of nodes.
pub const MACULA_OPTIMIZATION_EXTENDED: macula_optimization = 2;

/// And memory layouts of this CPU.
pub const MACULA_OPTIMIZATION_ALL: macula_optimization = 3;

/// The sizes of one model input that TensorRT builds engines for.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct macula_shape_profile {
    /// Name of the input, e.g. `"sample"`; not NULL.
    pub input: *const c_char,
    /// Smallest sizes, each >= 0; those from `rank` on are ignored. The same for the next two.
    pub min: [i64; 8],
    /// Sizes that the engine is tuned for.
    pub opt: [i64; 8],
    /// Largest sizes.
    pub max: [i64; 8],
    /// Number of dimensions, 0 to `MACULA_MAX_RANK`.
    pub rank: u32,
    /// Not used; 0.
    pub reserved: u32,
}

/// How models are run.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct macula_session_options {
    /// `sizeof` this struct.
    pub struct_size: usize,
    /// Folder for optimised graphs, which make later opens of the same model several times faster; made if it is
    /// missing. A damaged entry is made anew. May be NULL: none is kept. Default: `NULL`.
    pub cache_folder: *const c_char,
    /// Cores for the threads, as ONNX Runtime writes it (`"1,2;3,4"`: one entry a thread but the first). May be NULL.
    /// Default: `NULL`.
    pub affinity: *const c_char,
    /// TensorRT: folder for built engines. May be NULL: they are built for each open. Default: `NULL`.
    pub engine_cache: *const c_char,
    /// TensorRT: folder for the timings of its tactics, which make later builds faster. May be NULL. Default: `NULL`.
    pub timing_cache: *const c_char,
    /// TensorRT: shapes to build for, `profile_count` of them. NULL if there are none. Default: `NULL`.
    pub profiles: *const macula_shape_profile,
    /// Number of `profiles`. Default: `0`.
    pub profile_count: usize,
    /// Bytes that `cache_folder` may hold; what was not used for longest goes first. Default: `(uint64_t)64 << 30`.
    pub cache_limit: u64,
    /// CUDA and TensorRT: most device memory of one model's arena in bytes; 0 for no limit. Default: `0`.
    pub memory_limit: u64,
    /// TensorRT: most workspace of an engine in bytes; 0 for its own choice. Default: `0`.
    pub max_workspace: u64,
    /// What runs the models. Default: `MACULA_PROVIDER_CPU`.
    pub provider: macula_provider,
    /// CUDA and TensorRT: number of the device, from 0. Default: `0`.
    pub device_id: i32,
    /// 1: a provider that cannot run is replaced by the next simpler one (TensorRT, CUDA, CPU). Default: `0`.
    pub allow_fallback: i32,
    /// Threads that share the work of one operator; 0 for one per physical core. Default: `0`.
    pub threads: u32,
    /// Threads that run operators side by side; 1 runs them in order. Default: `1`.
    pub inter_op_threads: u32,
    /// Threads that wait for work during a run look for it before they sleep. 0: for 50 microseconds, most often enough for
    /// the next operator (not at all before ONNX Runtime 1.26); 1: for milliseconds, at the cost of others that want the
    /// cores. Default: `0`.
    pub spinning: i32,
    /// How far graphs are rewritten. Default: `MACULA_OPTIMIZATION_ALL`.
    pub optimization: macula_optimization,
    /// 1: only kernels that give the same bits every time. Default: `0`.
    pub deterministic: i32,
    /// 1: a run's memory is planned as one block; faster, but a higher peak. Default: `1`.
    pub memory_pattern: i32,
    /// 1: memory comes from an arena, which keeps what it once had. Default: `1`.
    pub arena: i32,
    /// 1: the arena gives unused memory back after each run. Default: `0`.
    pub shrink_arena: i32,
    /// CUDA: 1: the arena grows by what is asked for (least memory), 0: by powers of two. Default: `0`.
    pub arena_as_requested: i32,
    /// CUDA: how convolutions are chosen. Default: `MACULA_CONVOLUTION_SEARCH_HEURISTIC`.
    pub convolution_search: macula_convolution_search,
    /// CUDA: 1: convolutions may take the workspace that their fastest algorithm wants. Default: `1`.
    pub convolution_max_workspace: i32,
    /// CUDA: 1: fp32 matrix products may round their inputs to TF32 (10 bits of mantissa). Default: `0`.
    pub tf32: i32,
    /// TensorRT: 1: layers may compute in fp16. Default: `0`.
    pub fp16: i32,
    /// TensorRT: how hard the builder searches, 0 to 5; -1 for its own choice. Default: `-1`.
    pub builder_level: i32,
    /// Not used; 0. Default: `0`.
    pub reserved: i32,
}

impl Default for macula_session_options {
    fn default() -> Self {
        Self {
            struct_size: size_of::<Self>(),
            cache_folder: std::ptr::null(),
            affinity: std::ptr::null(),
            engine_cache: std::ptr::null(),
            timing_cache: std::ptr::null(),
            profiles: std::ptr::null(),
            profile_count: 0,
            cache_limit: 64 << 30,
            memory_limit: 0,
            max_workspace: 0,
            provider: MACULA_PROVIDER_CPU,
            device_id: 0,
            allow_fallback: 0,
            threads: 0,
            inter_op_threads: 1,
            spinning: 0,
            optimization: MACULA_OPTIMIZATION_ALL,
            deterministic: 0,
            memory_pattern: 1,
            arena: 1,
            shrink_arena: 0,
            arena_as_requested: 0,
            convolution_search: MACULA_CONVOLUTION_SEARCH_HEURISTIC,
            convolution_max_workspace: 1,
            tf32: 0,
            fp16: 0,
            builder_level: -1,
            reserved: 0,
        }
    }
}

// SAFETY: repr(C), begins with its size; pointers and integers take any bytes.
unsafe impl Versioned for macula_session_options {
    const FIRST_SIZE: usize = 152;
}

impl macula_session_options {
    /// The options as the runtime's room knows them.
    ///
    /// # Safety
    /// Pointers are valid for what the fields' texts say.
    pub(super) unsafe fn read(&self) -> Result<SessionOptions> {
        let cuda = || -> Result<CudaOptions> {
            let mut cuda = CudaOptions::default();
            cuda.device = self.device_id;
            cuda.memory_limit = size(self.memory_limit, "memory_limit")?;
            cuda.arena_growth =
                if self.arena_as_requested != 0 { ArenaGrowth::AsRequested } else { ArenaGrowth::PowersOfTwo };
            cuda.convolution_search = match self.convolution_search {
                MACULA_CONVOLUTION_SEARCH_HEURISTIC => ConvolutionSearch::Heuristic,
                MACULA_CONVOLUTION_SEARCH_EXHAUSTIVE => ConvolutionSearch::Exhaustive,
                MACULA_CONVOLUTION_SEARCH_DEFAULT => ConvolutionSearch::Default,
                other => return Err(unknown("convolution_search", other)),
            };
            cuda.convolution_max_workspace = self.convolution_max_workspace != 0;
            cuda.tf32 = self.tf32 != 0;
            Ok(cuda)
        };
        let mut options = SessionOptions::default();
        options.provider = match self.provider {
            MACULA_PROVIDER_CPU => Provider::Cpu,
            MACULA_PROVIDER_CUDA => Provider::Cuda(cuda()?),
            MACULA_PROVIDER_TENSORRT => {
                let mut tensorrt = TensorRtOptions::default();
                tensorrt.cuda = cuda()?;
                tensorrt.fp16 = self.fp16 != 0;
                tensorrt.max_workspace = size(self.max_workspace, "max_workspace")?;
                // SAFETY: as promised by the caller.
                unsafe {
                    tensorrt.engine_cache = optional_path(self.engine_cache, "engine_cache")?.map(Into::into);
                    tensorrt.timing_cache = optional_path(self.timing_cache, "timing_cache")?.map(Into::into);
                    tensorrt.profiles = slice(self.profiles, self.profile_count, "profiles")?
                        .iter()
                        .map(|profile| profile.read())
                        .collect::<Result<_>>()?;
                }
                tensorrt.builder_level = match self.builder_level {
                    -1 => None,
                    level @ 0..=5 => Some(level as u8),
                    other => return Err(unknown("builder_level", other)),
                };
                Provider::TensorRt(tensorrt)
            }
            other => return Err(unknown("provider", other)),
        };
        options.fallback = self.allow_fallback != 0;
        options.intra_threads = self.threads as usize;
        options.inter_threads = self.inter_op_threads as usize;
        options.spinning = self.spinning != 0;
        // SAFETY: as promised by the caller.
        options.affinity = unsafe { optional_text(self.affinity, "affinity") }?.map(Into::into);
        options.optimization = match self.optimization {
            MACULA_OPTIMIZATION_OFF => Optimization::Off,
            MACULA_OPTIMIZATION_BASIC => Optimization::Basic,
            MACULA_OPTIMIZATION_EXTENDED => Optimization::Extended,
            MACULA_OPTIMIZATION_ALL => Optimization::All,
            other => return Err(unknown("optimization", other)),
        };
        options.deterministic = self.deterministic != 0;
        options.memory_pattern = self.memory_pattern != 0;
        options.arena = self.arena != 0;
        options.shrink = self.shrink_arena != 0;
        // SAFETY: as promised by the caller.
        options.cache = unsafe { optional_path(self.cache_folder, "cache_folder") }?.map(Into::into);
        options.cache_limit = self.cache_limit;
        Ok(options)
    }
}

impl macula_shape_profile {
    /// # Safety
    /// As for [`macula_session_options::read`].
    unsafe fn read(&self) -> Result<ShapeProfile> {
        Ok(ShapeProfile {
            // SAFETY: as promised by the caller.
            input: unsafe { text(self.input, "profiles.input") }?.to_owned(),
            min: dimensions(&self.min, self.rank, "profiles.min")?,
            opt: dimensions(&self.opt, self.rank, "profiles.opt")?,
            max: dimensions(&self.max, self.rank, "profiles.max")?,
        })
    }
}

fn size(value: u64, field: &str) -> Result<usize> {
    usize::try_from(value).map_err(|_| Error::invalid_argument(format!("{field} is {value}, more than memory")))
}

fn unknown(field: &str, value: i32) -> Error {
    Error::invalid_argument(format!("{field} is {value}, which is none of its values"))
}
