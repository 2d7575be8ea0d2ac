//! Execution providers: what runs a session, and why one can't. Knows no models.

use std::ffi::{CString, c_char};
use std::path::PathBuf;

use ort::sys;

use super::api::{Api, c_string, call};
use super::library::Loaded;
use super::tensor::Device;
use crate::error::{Error, Result, Status};
use crate::os::SharedLibrary;

/// What runs a session.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Provider {
    /// The CPU. It is always there.
    #[default]
    Cpu,
    /// NVIDIA's CUDA. Operators that it lacks run on the CPU.
    Cuda(CudaOptions),
    /// NVIDIA's TensorRT. Operators that it lacks run by CUDA, then on the CPU. A session's first run of a new shape
    /// builds engines, which takes minutes unless a cache folder is given.
    TensorRt(TensorRtOptions),
}

/// The name of a [`Provider`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ProviderKind {
    /// [`Provider::Cpu`].
    Cpu,
    /// [`Provider::Cuda`].
    Cuda,
    /// [`Provider::TensorRt`].
    TensorRt,
}

impl ProviderKind {
    /// ONNX Runtime's name of it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "CPUExecutionProvider",
            Self::Cuda => "CUDAExecutionProvider",
            Self::TensorRt => "TensorrtExecutionProvider",
        }
    }
}

impl std::fmt::Display for ProviderKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Cpu => "CPU",
            Self::Cuda => "CUDA",
            Self::TensorRt => "TensorRT",
        })
    }
}

/// How an arena grows when it is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ArenaGrowth {
    /// By powers of two: fewest allocations.
    #[default]
    PowersOfTwo,
    /// By what was asked for: least memory.
    AsRequested,
}

/// How cuDNN chooses a convolution algorithm for a shape that is new to the session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ConvolutionSearch {
    /// By rules, in milliseconds.
    #[default]
    Heuristic,
    /// By trying all: hundreds of milliseconds for each new shape.
    Exhaustive,
    /// Always the same one.
    Default,
}

/// Options of [`Provider::Cuda`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CudaOptions {
    /// Which device, from 0.
    pub device: i32,
    /// The most device memory that the arena takes, in bytes; 0 for no limit.
    pub memory_limit: usize,
    /// How the arena grows.
    pub arena_growth: ArenaGrowth,
    /// How convolution algorithms are chosen.
    pub convolution_search: ConvolutionSearch,
    /// Whether convolutions may take as much workspace as their fastest algorithm wants.
    pub convolution_max_workspace: bool,
    /// Whether fp32 matrix products may round their inputs to TF32 (10 bits of mantissa).
    pub tf32: bool,
}

impl Default for CudaOptions {
    fn default() -> Self {
        Self {
            device: 0,
            memory_limit: 0,
            arena_growth: ArenaGrowth::default(),
            convolution_search: ConvolutionSearch::default(),
            convolution_max_workspace: true,
            tf32: false,
        }
    }
}

/// The sizes of one input that TensorRT builds engines for. All three have the input's rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShapeProfile {
    /// The input's name.
    pub input: String,
    /// The smallest sizes.
    pub min: Vec<usize>,
    /// The sizes that the engine is tuned for.
    pub opt: Vec<usize>,
    /// The largest sizes.
    pub max: Vec<usize>,
}

/// Options of [`Provider::TensorRt`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TensorRtOptions {
    /// The options for what TensorRT leaves to CUDA; also says which device both run on.
    pub cuda: CudaOptions,
    /// Whether layers may compute in fp16.
    pub fp16: bool,
    /// The most workspace an engine may use, in bytes; 0 for TensorRT's own choice.
    pub max_workspace: usize,
    /// Where built engines are kept; `None` builds them for every session.
    pub engine_cache: Option<PathBuf>,
    /// Where the timings of tactics are kept, which makes later builds faster.
    pub timing_cache: Option<PathBuf>,
    /// The shapes to build for. Inputs with open sizes that are not named get the shapes of the first run.
    pub profiles: Vec<ShapeProfile>,
    /// How hard the builder searches, from 0 to 5; `None` for TensorRT's own choice (3).
    pub builder_level: Option<u8>,
}

impl Provider {
    /// Which one it is.
    pub fn kind(&self) -> ProviderKind {
        match self {
            Self::Cpu => ProviderKind::Cpu,
            Self::Cuda(_) => ProviderKind::Cuda,
            Self::TensorRt(_) => ProviderKind::TensorRt,
        }
    }

    /// The device whose memory its results lie in when they are left there.
    pub fn device(&self) -> Device {
        match self {
            Self::Cpu => Device::Host,
            Self::Cuda(options) => Device::Cuda(options.device),
            Self::TensorRt(options) => Device::Cuda(options.cuda.device),
        }
    }

    /// What to try when this one can't run.
    pub(super) fn next(&self) -> Option<Self> {
        match self {
            Self::Cpu => None,
            Self::Cuda(_) => Some(Self::Cpu),
            Self::TensorRt(options) => Some(Self::Cuda(options.cuda.clone())),
        }
    }

    /// Adds it to a session's options, or says with [`Status::ProviderUnavailable`] why it can't run here.
    pub(super) fn register(&self, loaded: &Loaded, options: *mut sys::OrtSessionOptions) -> Result<()> {
        let api = loaded.api;
        match self {
            Self::Cpu => Ok(()),
            Self::Cuda(cuda) => {
                precheck(loaded, ProviderKind::Cuda, "libonnxruntime_providers_cuda.so")?;
                append_cuda(api, cuda, options)
            }
            Self::TensorRt(tensorrt) => {
                let settings = tensorrt_settings(tensorrt)?;
                precheck(loaded, ProviderKind::TensorRt, "libonnxruntime_providers_tensorrt.so")?;
                append_tensorrt(api, &settings, options)?;
                precheck(loaded, ProviderKind::Cuda, "libonnxruntime_providers_cuda.so")?;
                append_cuda(api, &tensorrt.cuda, options)
            }
        }
    }
}

fn unavailable(kind: ProviderKind, reason: impl std::fmt::Display) -> Error {
    Error::new(Status::ProviderUnavailable, format!("the {kind} provider can't run: {reason}"))
}

/// The reasons that can be known without asking ONNX Runtime, which words them poorly.
fn precheck(loaded: &Loaded, kind: ProviderKind, file: &str) -> Result<()> {
    let library = || match &loaded.path {
        Some(path) => format!("ONNX Runtime {} ({})", loaded.version, path.display()),
        None => format!("the host's ONNX Runtime {}", loaded.version),
    };
    let compiled = loaded.api.compiled_providers()?;
    if !compiled.iter().any(|name| name == kind.name()) {
        return Err(unavailable(
            kind,
            format!("{} was compiled without it; it has {}", library(), compiled.join(", ")),
        ));
    }
    if let Some(folder) = loaded.path.as_ref().and_then(|path| path.parent()) {
        for needed in ["libonnxruntime_providers_shared.so", file] {
            if !folder.join(needed).is_file() {
                return Err(unavailable(kind, format!("{needed} is missing in {}", folder.display())));
            }
        }
    }
    match SharedLibrary::open_by_name(c"libcuda.so.1") {
        Ok(_) => Ok(()),
        Err(reason) => Err(unavailable(kind, format!("there is no NVIDIA driver on this machine: {reason}"))),
    }
}

/// Keys and values in C's form.
struct Settings {
    texts: Vec<(CString, CString)>,
}

impl Settings {
    fn new<const N: usize>(pairs: [(&str, String); N]) -> Result<Self> {
        let mut settings = Self { texts: Vec::new() };
        for (key, value) in pairs {
            settings.set(key, value)?;
        }
        Ok(settings)
    }

    fn set(&mut self, key: &str, value: String) -> Result<()> {
        self.texts.push((c_string(key)?, c_string(value)?));
        Ok(())
    }

    fn pointers(&self) -> (Vec<*const c_char>, Vec<*const c_char>) {
        self.texts.iter().map(|(key, value)| (key.as_ptr(), value.as_ptr())).unzip()
    }
}

fn flag(on: bool) -> String {
    if on { "1".into() } else { "0".into() }
}

fn cuda_settings(options: &CudaOptions) -> Result<Settings> {
    let mut settings = Settings::new([
        ("device_id", options.device.to_string()),
        (
            "arena_extend_strategy",
            match options.arena_growth {
                ArenaGrowth::PowersOfTwo => "kNextPowerOfTwo".into(),
                ArenaGrowth::AsRequested => "kSameAsRequested".into(),
            },
        ),
        (
            "cudnn_conv_algo_search",
            match options.convolution_search {
                ConvolutionSearch::Heuristic => "HEURISTIC".into(),
                ConvolutionSearch::Exhaustive => "EXHAUSTIVE".into(),
                ConvolutionSearch::Default => "DEFAULT".into(),
            },
        ),
        ("cudnn_conv_use_max_workspace", flag(options.convolution_max_workspace)),
        ("use_tf32", flag(options.tf32)),
    ])?;
    if options.memory_limit != 0 {
        settings.set("gpu_mem_limit", options.memory_limit.to_string())?;
    }
    Ok(settings)
}

fn tensorrt_settings(options: &TensorRtOptions) -> Result<Settings> {
    let mut settings = Settings::new([
        ("device_id", options.cuda.device.to_string()),
        ("trt_fp16_enable", flag(options.fp16)),
        ("trt_engine_cache_enable", flag(options.engine_cache.is_some())),
        ("trt_timing_cache_enable", flag(options.timing_cache.is_some())),
    ])?;
    if options.max_workspace != 0 {
        settings.set("trt_max_workspace_size", options.max_workspace.to_string())?;
    }
    for (key, folder) in
        [("trt_engine_cache_path", &options.engine_cache), ("trt_timing_cache_path", &options.timing_cache)]
    {
        if let Some(folder) = folder {
            std::fs::create_dir_all(folder)
                .map_err(|error| Error::io(format!("create {}", folder.display()), error))?;
            let path = folder.to_str().ok_or_else(|| {
                Error::invalid_argument(format!("TensorRT's cache folder {} is not UTF-8", folder.display()))
            })?;
            settings.set(key, path.to_owned())?;
        }
    }
    if let Some(level) = options.builder_level {
        if level > 5 {
            return Err(Error::invalid_argument(format!("TensorRT's builder level is 0 to 5; {level} was given")));
        }
        settings.set("trt_builder_optimization_level", level.to_string())?;
    }
    if !options.profiles.is_empty() {
        for profile in &options.profiles {
            let ordered = |low: &[usize], high: &[usize]| low.iter().zip(high).all(|(low, high)| low <= high);
            let (min, opt, max) = (&profile.min, &profile.opt, &profile.max);
            if min.len() != opt.len() || opt.len() != max.len() || !ordered(min, opt) || !ordered(opt, max) {
                return Err(Error::invalid_argument(format!(
                    "TensorRT's profile of {}: min {min:?} <= opt {opt:?} <= max {max:?} does not hold",
                    profile.input
                )));
            }
        }
        let list = |sizes: fn(&ShapeProfile) -> &Vec<usize>| -> String {
            let one = |profile: &ShapeProfile| {
                let sizes: Vec<String> = sizes(profile).iter().map(usize::to_string).collect();
                format!("{}:{}", profile.input, sizes.join("x"))
            };
            options.profiles.iter().map(one).collect::<Vec<_>>().join(",")
        };
        settings.set("trt_profile_min_shapes", list(|profile| &profile.min))?;
        settings.set("trt_profile_opt_shapes", list(|profile| &profile.opt))?;
        settings.set("trt_profile_max_shapes", list(|profile| &profile.max))?;
    }
    Ok(settings)
}

fn append_cuda(api: Api, options: &CudaOptions, session: *mut sys::OrtSessionOptions) -> Result<()> {
    let settings = cuda_settings(options)?;
    let (keys, values) = settings.pointers();
    let mut cuda = std::ptr::null_mut();
    // SAFETY: the out pointer is valid; keys and values are arrays of the same length of texts that live here; the
    // options are copied by the session's and released once.
    let outcome = unsafe {
        call!(api, CreateCUDAProviderOptions(&mut cuda)).and_then(|()| {
            let outcome = call!(api, UpdateCUDAProviderOptions(cuda, keys.as_ptr(), values.as_ptr(), keys.len()))
                .and_then(|()| call!(api, SessionOptionsAppendExecutionProvider_CUDA_V2(session, cuda)));
            ((*api.0).ReleaseCUDAProviderOptions)(cuda);
            outcome
        })
    };
    outcome.map_err(|error| unavailable(ProviderKind::Cuda, error))
}

fn append_tensorrt(api: Api, settings: &Settings, session: *mut sys::OrtSessionOptions) -> Result<()> {
    let (keys, values) = settings.pointers();
    let mut tensorrt = std::ptr::null_mut();
    // SAFETY: as for CUDA.
    let outcome = unsafe {
        call!(api, CreateTensorRTProviderOptions(&mut tensorrt)).and_then(|()| {
            let outcome =
                call!(api, UpdateTensorRTProviderOptions(tensorrt, keys.as_ptr(), values.as_ptr(), keys.len()))
                    .and_then(|()| call!(api, SessionOptionsAppendExecutionProvider_TensorRT_V2(session, tensorrt)));
            ((*api.0).ReleaseTensorRTProviderOptions)(tensorrt);
            outcome
        })
    };
    outcome.map_err(|error| unavailable(ProviderKind::TensorRt, error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensorrt_is_told_the_shapes_of_all_inputs_in_three_lists() {
        let profile = |input: &str, min: &[usize], opt: &[usize], max: &[usize]| ShapeProfile {
            input: input.to_owned(),
            min: min.to_vec(),
            opt: opt.to_vec(),
            max: max.to_vec(),
        };
        let options = TensorRtOptions {
            profiles: vec![
                profile("sample", &[1, 4, 16, 16], &[2, 4, 64, 64], &[8, 4, 64, 64]),
                profile("class_labels", &[1], &[2], &[8]),
            ],
            ..TensorRtOptions::default()
        };
        let settings = tensorrt_settings(&options).unwrap();
        let value_of = |wanted: &str| {
            let found = settings.texts.iter().find(|(key, _)| key.to_str() == Ok(wanted));
            found.map(|(_, value)| value.to_str().unwrap().to_owned())
        };
        for (key, value) in [
            ("trt_profile_min_shapes", "sample:1x4x16x16,class_labels:1"),
            ("trt_profile_opt_shapes", "sample:2x4x64x64,class_labels:2"),
            ("trt_profile_max_shapes", "sample:8x4x64x64,class_labels:8"),
        ] {
            assert_eq!(value_of(key).as_deref(), Some(value));
        }
        let without = tensorrt_settings(&TensorRtOptions::default()).unwrap();
        assert!(without.texts.iter().all(|(key, _)| !key.to_str().unwrap().contains("profile")));
    }
}
