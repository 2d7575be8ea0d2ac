//! A model made ready to run. Knows nothing of what models mean.

use std::any::Any;
use std::ffi::{CStr, CString};
use std::fmt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use ort::sys;
use parking_lot::{Mutex, MutexGuard};
use prost::Message;

use super::api::{Api, c_path, c_string, call, text};
use super::binding::Binding;
use super::library::{Loaded, LogSink};
use super::provider::{Provider, ProviderKind};
use super::tensor::{Device, ElementType, MemoryInfo, Tensor, Value, tensor_info};
use crate::error::{Error, Result, Status};
use crate::memory::{GRAPH, room};
use crate::onnx::proto;
use crate::progress::CancelToken;

/// How much a graph is rewritten before it runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Optimization {
    /// Not at all.
    Off,
    /// Rewrites that keep the meaning on every provider: constants folded, dead nodes removed.
    Basic,
    /// And fusions of nodes.
    Extended,
    /// And memory layouts of this CPU.
    #[default]
    All,
}

/// How long a thread without work looks for the next operator of a run before it sleeps. Waking a thread takes longer than most
/// operators of a gradient (which has thousands): on two free cores that of the small model is a fifth to a quarter faster so,
/// and hardly slower where others want one of them.
const BRIEF_SPIN: Duration = Duration::from_micros(50);

/// The minor version of ONNX Runtime that lets it be set.
const BRIEF_SPIN_SINCE: u32 = 26;

/// How a session is built and runs.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SessionOptions {
    /// What runs it.
    pub provider: Provider,
    /// Whether a provider that can't run is replaced by the next simpler one (TensorRT, CUDA, CPU) instead of failing.
    /// [`Session::provider`] and [`Session::fallback_reason`] tell what happened.
    pub fallback: bool,
    /// Threads that share the work of one operator; 0 for one per physical core.
    pub intra_threads: usize,
    /// Threads that run operators side by side; 1 runs them in order; 0 for one per physical core.
    pub inter_threads: usize,
    /// Whether threads that wait for work during a run go on looking for it as long as ONNX Runtime lets them (milliseconds),
    /// which costs others that want the cores; otherwise they look for 50 µs, most often enough for the next operator, and
    /// sleep (at once, before ONNX Runtime 1.26). When no run is at work, they always sleep.
    pub spinning: bool,
    /// Cores for the threads, as ONNX Runtime writes it (`"1,2;3,4"`: one entry for each thread but the first).
    pub affinity: Option<String>,
    /// How much the graph is rewritten.
    pub optimization: Optimization,
    /// Whether only kernels may be used that give the same bits every time.
    pub deterministic: bool,
    /// Whether the memory of a run is planned as one block from earlier runs of the same shapes. Faster, but it can
    /// raise the peak.
    pub memory_pattern: bool,
    /// Whether kernels keep weights a second time, packed for themselves. Faster, but what they need is not shared with
    /// the files that external weights lie in.
    pub prepacking: bool,
    /// Whether the CPU's memory comes from an arena, which keeps what it once had.
    pub arena: bool,
    /// Whether the arena gives unused memory back after each run.
    pub shrink: bool,
    /// The folder for optimised graphs, which make the next session of the same model start faster; `None` keeps none.
    ///
    /// Entries are keyed by the graph, the external files' path, size, time and inode, ONNX Runtime's build, provider,
    /// options and the CPU, and hold a copy of the weights. TensorRT's engines are cached by
    /// [`super::TensorRtOptions::engine_cache`] instead.
    pub cache: Option<PathBuf>,
    /// Bytes that the cache folder may hold; those not used for longest are removed when a new one is written.
    pub cache_limit: u64,
}

impl Default for SessionOptions {
    fn default() -> Self {
        Self {
            provider: Provider::default(),
            fallback: false,
            intra_threads: 0,
            inter_threads: 1,
            spinning: false,
            affinity: None,
            optimization: Optimization::default(),
            deterministic: false,
            memory_pattern: true,
            prepacking: true,
            arena: true,
            shrink: false,
            cache: None,
            cache_limit: 64 << 30,
        }
    }
}

/// One dimension of an input or output.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Dimension {
    /// Always this size.
    Fixed(usize),
    /// Any size that the graph can compute with, under the exporter's name (which may be empty).
    Open(String),
}

impl fmt::Display for Dimension {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(size) => write!(f, "{size}"),
            Self::Open(name) if name.is_empty() => f.write_str("any"),
            Self::Open(name) => write!(f, "any ({name})"),
        }
    }
}

/// An input or output of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Its name in the model.
    pub name: String,
    /// The type of its elements.
    pub dtype: ElementType,
    /// Its dimensions, outermost first.
    pub dims: Vec<Dimension>,
}

impl Port {
    /// Whether a tensor of this type and shape fits; the error names the port, what it expects and what was given.
    pub fn check(&self, dtype: ElementType, shape: &[usize]) -> Result<()> {
        let fits = |(dim, size): (&Dimension, &usize)| match dim {
            Dimension::Fixed(fixed) => fixed == size,
            Dimension::Open(_) => true,
        };
        if dtype == self.dtype && shape.len() == self.dims.len() && self.dims.iter().zip(shape).all(fits) {
            return Ok(());
        }
        let dims: Vec<String> = self.dims.iter().map(Dimension::to_string).collect();
        Err(Error::invalid_argument(format!(
            "{:?} expects {} [{}]; given was {dtype} {shape:?}",
            self.name,
            self.dtype,
            dims.join(", "),
        )))
    }
}

/// A model that is ready to run. Clones share it.
///
/// It may be used from any thread. One run is at work at a time; others wait for it (and stop waiting when they are
/// cancelled). For runs side by side, make more sessions.
#[derive(Clone)]
pub struct Session {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub(super) loaded: &'static Loaded,
    pub(super) pointer: NonNull<sys::OrtSession>,
    pub(super) inputs: Vec<(Port, CString)>,
    pub(super) outputs: Vec<(Port, CString)>,
    pub(super) provider: Provider,
    fallback_reason: Option<String>,
    shrink: bool,
    /// Bytes of the model's initializers.
    pub(super) weights: u64,
    gate: Mutex<()>,
    /// The sessions of [`Session::copy`], by type.
    copiers: Mutex<Vec<(ElementType, Session)>>,
    _log: Option<Box<LogSink>>,
}

// SAFETY: an `OrtSession` may be used from any thread.
unsafe impl Send for Inner {}
// SAFETY: as above; runs are one at a time by `gate`.
unsafe impl Sync for Inner {}

impl Drop for Inner {
    fn drop(&mut self) {
        // SAFETY: ours, released once; bindings and device tensors keep this struct.
        unsafe { ((*self.loaded.api.0).ReleaseSession)(self.pointer.as_ptr()) }
    }
}

/// What a session takes, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SessionMemory {
    /// The model's weights, as they are stored. Kernels may keep some of them a second time, packed for themselves.
    pub weights: u64,
    /// What the arena of the session's provider has handed out now: intermediate values and packed weights. `None`
    /// without an arena, and with an ONNX Runtime before 1.23, which does not tell.
    pub arena: Option<u64>,
    /// The most that it ever had handed out.
    pub arena_peak: Option<u64>,
}

/// A serialized model and where its external data is.
pub(super) struct Serialized<'a> {
    pub(super) model: &'a [u8],
    /// The folder that external locations are relative to.
    pub(super) folder: Option<&'a Path>,
    /// Bytes of its initializers.
    pub(super) weights: u64,
}

/// Session options of ONNX Runtime that are ours to release.
pub(super) struct RawOptions {
    pub(super) api: Api,
    pub(super) pointer: *mut sys::OrtSessionOptions,
    /// Must stay until the session is gone.
    log: Option<Box<LogSink>>,
}

impl Drop for RawOptions {
    fn drop(&mut self) {
        // SAFETY: ours, released once; sessions copy what they need.
        unsafe { ((*self.api.0).ReleaseSessionOptions)(self.pointer) }
    }
}

impl RawOptions {
    fn new(loaded: &Loaded, log: Option<&LogSink>, options: &SessionOptions, provider: &Provider) -> Result<Self> {
        let api = loaded.api;
        let mut pointer = std::ptr::null_mut();
        // SAFETY: the out pointer is valid.
        unsafe { call!(api, CreateSessionOptions(&mut pointer)) }?;
        let raw = Self { api, pointer, log: log.cloned().map(Box::new) };
        let count = |threads: usize, what: &str| {
            i32::try_from(threads)
                .map_err(|_| Error::invalid_argument(format!("{threads} {what} threads: at most {}", i32::MAX)))
        };
        let level = match options.optimization {
            Optimization::Off => sys::GraphOptimizationLevel::ORT_DISABLE_ALL,
            Optimization::Basic => sys::GraphOptimizationLevel::ORT_ENABLE_BASIC,
            Optimization::Extended => sys::GraphOptimizationLevel::ORT_ENABLE_EXTENDED,
            Optimization::All => sys::GraphOptimizationLevel::ORT_ENABLE_ALL,
        };
        let mode = match options.inter_threads {
            1 => sys::ExecutionMode::ORT_SEQUENTIAL,
            _ => sys::ExecutionMode::ORT_PARALLEL,
        };
        // SAFETY: `pointer` is live until `raw` is dropped; the other arguments are plain values.
        unsafe {
            call!(api, SetSessionLogId(pointer, c"macula".as_ptr()))?;
            call!(api, SetIntraOpNumThreads(pointer, count(options.intra_threads, "intra")?))?;
            call!(api, SetInterOpNumThreads(pointer, count(options.inter_threads, "inter")?))?;
            call!(api, SetSessionExecutionMode(pointer, mode))?;
            call!(api, SetSessionGraphOptimizationLevel(pointer, level))?;
            call!(api, SetDeterministicCompute(pointer, options.deterministic))?;
            if options.memory_pattern {
                call!(api, EnableMemPattern(pointer))?;
            } else {
                call!(api, DisableMemPattern(pointer))?;
            }
            if options.arena {
                call!(api, EnableCpuMemArena(pointer))?;
            } else {
                call!(api, DisableCpuMemArena(pointer))?;
            }
        }
        let brief = loaded.minor >= BRIEF_SPIN_SINCE;
        for pool in ["intra", "inter"] {
            let allowed = if options.spinning || brief { "1" } else { "0" };
            raw.set(&format!("session.{pool}_op.allow_spinning"), allowed)?;
            if !options.spinning && brief {
                let microseconds = BRIEF_SPIN.as_micros().to_string();
                raw.set(&format!("session.{pool}_op.spin_duration_us"), &microseconds)?;
            }
        }
        raw.set("session.force_spinning_stop", "1")?;
        raw.set("session.disable_prepacking", if options.prepacking { "0" } else { "1" })?;
        if let Some(affinity) = &options.affinity {
            raw.set("session.intra_op_thread_affinities", affinity)?;
        }
        if let Some(sink) = &raw.log {
            let (function, sink) = sink.raw();
            // SAFETY: the sink is in a box, which the session takes over.
            unsafe { call!(api, SetUserLoggingFunction(pointer, function, sink)) }?;
        }
        provider.register(loaded, pointer)?;
        Ok(raw)
    }

    pub(super) fn set(&self, key: &str, value: &str) -> Result<()> {
        let (key, value) = (c_string(key)?, c_string(value)?);
        // SAFETY: texts are NUL-terminated and copied.
        unsafe { call!(self.api, AddSessionConfigEntry(self.pointer, key.as_ptr(), value.as_ptr())) }
    }

    pub(super) fn set_optimized_model_path(&self, path: &Path) -> Result<()> {
        let path = c_path(path)?;
        // SAFETY: as above.
        unsafe { call!(self.api, SetOptimizedModelFilePath(self.pointer, path.as_ptr())) }
    }

    pub(super) fn set_path(&self, key: &str, value: &Path) -> Result<()> {
        let (key, value) = (c_string(key)?, c_path(value)?);
        // SAFETY: as above.
        unsafe { call!(self.api, AddSessionConfigEntry(self.pointer, key.as_ptr(), value.as_ptr())) }
    }
}

/// Options of a session with a provider that can run it.
pub(super) struct Chosen {
    pub(super) provider: Provider,
    fallback_reason: Option<String>,
    pub(super) raw: RawOptions,
}

/// The first provider of the chain that can run, and what was wrong with those before it.
pub(super) fn choose_provider(loaded: &Loaded, log: Option<&LogSink>, options: &SessionOptions) -> Result<Chosen> {
    let mut provider = options.provider.clone();
    let mut reasons: Vec<String> = Vec::new();
    loop {
        match RawOptions::new(loaded, log, options, &provider) {
            Ok(raw) => {
                let fallback_reason = (!reasons.is_empty()).then(|| reasons.join("; "));
                return Ok(Chosen { provider, fallback_reason, raw });
            }
            Err(error) if options.fallback && error.status() == Status::ProviderUnavailable => {
                let Some(next) = provider.next() else { return Err(error) };
                log::warn!(target: "macula::runtime", "{error}; falling back to {}", next.kind());
                reasons.push(error.message().to_owned());
                provider = next;
            }
            Err(error) => return Err(error),
        }
    }
}

impl Session {
    pub(super) fn create(
        loaded: &'static Loaded,
        source: &Serialized<'_>,
        options: &SessionOptions,
        Chosen { provider, fallback_reason, mut raw }: Chosen,
    ) -> Result<Self> {
        let api = loaded.api;
        // Asked for beforehand: where its own memory runs out, ONNX Runtime may end the process.
        room(usize::try_from(source.weights).unwrap_or(usize::MAX).saturating_add(GRAPH))?;
        if let Some(folder) = source.folder {
            raw.set_path("session.model_external_initializers_file_folder_path", folder)?;
        }
        let mut pointer = std::ptr::null_mut();
        // SAFETY: environment, model bytes and options live during the call; the bytes are copied.
        unsafe {
            call!(
                api,
                CreateSessionFromArray(
                    loaded.environment.as_ptr(),
                    source.model.as_ptr().cast(),
                    source.model.len(),
                    raw.pointer,
                    &mut pointer,
                )
            )
        }?;
        let pointer =
            NonNull::new(pointer).ok_or_else(|| Error::new(Status::RuntimeFailed, "ONNX Runtime made no session"))?;
        let mut inner = Inner {
            loaded,
            pointer,
            inputs: Vec::new(),
            outputs: Vec::new(),
            provider,
            fallback_reason,
            shrink: options.shrink,
            weights: source.weights,
            gate: Mutex::new(()),
            copiers: Mutex::new(Vec::new()),
            _log: raw.log.take(),
        };
        inner.inputs = ports(api, pointer, Side::Input)?;
        inner.outputs = ports(api, pointer, Side::Output)?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The inputs, in the model's order.
    pub fn inputs(&self) -> impl ExactSizeIterator<Item = &Port> {
        self.inner.inputs.iter().map(|(port, _)| port)
    }

    /// The outputs, in the model's order.
    pub fn outputs(&self) -> impl ExactSizeIterator<Item = &Port> {
        self.inner.outputs.iter().map(|(port, _)| port)
    }

    /// The input of that name; [`Status::NotFound`] lists those there are.
    pub fn input(&self, name: &str) -> Result<&Port> {
        find(&self.inner.inputs, name, "input").map(|(port, _)| port)
    }

    /// The output of that name; [`Status::NotFound`] lists those there are.
    pub fn output(&self, name: &str) -> Result<&Port> {
        find(&self.inner.outputs, name, "output").map(|(port, _)| port)
    }

    /// What runs it.
    pub fn provider(&self) -> ProviderKind {
        self.inner.provider.kind()
    }

    /// Why it is not run by the provider that was asked for, if it is not.
    pub fn fallback_reason(&self) -> Option<&str> {
        self.inner.fallback_reason.as_deref()
    }

    /// What it takes in memory.
    pub fn memory(&self) -> SessionMemory {
        let arena = self.inner.arena().unwrap_or_else(|error| {
            log::debug!(target: "macula::runtime", "no figures of the arena: {error}");
            None
        });
        SessionMemory {
            weights: self.inner.weights,
            arena: arena.map(|(current, _)| current),
            arena_peak: arena.map(|(_, peak)| peak),
        }
    }

    /// Runs the model once: `inputs` by name, each exactly once; the outputs named come back in that order (all of
    /// them, in the model's order, if none is named), on the host.
    ///
    /// Input memory is used in place. Cancelling ends the run between two operators with [`Status::Cancelled`]: a running
    /// operator is finished first, and a run that was at its last one succeeds. CUDA and TensorRT queue operators, so
    /// that what is queued on the device is finished too, and a whole TensorRT engine is one operator.
    pub fn run(&self, inputs: &[(&str, &Tensor)], outputs: &[&str], cancel: &CancelToken) -> Result<Vec<Tensor>> {
        let inner = &*self.inner;
        let api = inner.loaded.api;
        let mut input_names = Vec::with_capacity(inputs.len());
        let mut values = Vec::with_capacity(inputs.len());
        for (name, tensor) in inputs {
            let (port, c_name) = find(&inner.inputs, name, "input")?;
            port.check(tensor.dtype(), tensor.shape()).map_err(|error| error.at("input"))?;
            if input_names.contains(&c_name.as_ptr()) {
                return Err(Error::invalid_argument(format!("input {name:?} is given twice")));
            }
            input_names.push(c_name.as_ptr());
            values.push(tensor.to_value(api)?);
        }
        let given = |name: &CString| input_names.contains(&name.as_ptr());
        inner.complete(given)?;
        let output_names = if outputs.is_empty() {
            inner.outputs.iter().map(|(_, name)| name.as_ptr()).collect()
        } else {
            let found = outputs.iter().map(|name| Ok(find(&inner.outputs, name, "output")?.1.as_ptr()));
            found.collect::<Result<Vec<_>>>()?
        };
        let pointers: Vec<*const sys::OrtValue> =
            values.iter().map(|value| value.pointer.as_ptr().cast_const()).collect();
        let mut results = vec![std::ptr::null_mut(); output_names.len()];
        inner.run(cancel, |session, options| {
            // SAFETY: names, values and results are arrays of the given lengths, and live during the call; the tensors
            // behind the values are borrowed by `inputs`.
            unsafe {
                call!(
                    api,
                    Run(
                        session,
                        options,
                        input_names.as_ptr(),
                        pointers.as_ptr(),
                        pointers.len(),
                        output_names.as_ptr(),
                        output_names.len(),
                        results.as_mut_ptr(),
                    )
                )
            }
        })?;
        // All are taken into ownership before any can fail.
        let results: Vec<_> = results.into_iter().map(|pointer| Value::new(api, pointer)).collect();
        results.into_iter().map(|value| Tensor::from_value(value?, None)).collect()
    }

    /// A copy of a tensor in the memory where the session runs (`to_provider`), or on the host.
    ///
    /// ONNX Runtime has no copy of its own for memory of its providers: the copy is a run of a graph of one operator,
    /// whose session is kept for the next copy of that type.
    pub fn copy(&self, tensor: &Tensor, to_provider: bool) -> Result<Tensor> {
        let device = if to_provider { self.inner.provider.device() } else { Device::Host };
        let copier = self.inner.copier(tensor.dtype())?;
        let mut binding = copier.bind()?;
        // A graph's shapes are of fixed rank; a copy does not care for the shape.
        let flat = tensor.clone().reshaped(&[tensor.len()])?;
        binding.bind_input("x", flat)?;
        binding.allocate_output("y", device)?;
        binding.run(&CancelToken::new())?;
        binding.output("y")?.clone().reshaped(tensor.shape())
    }

    /// Inputs and outputs that stay bound from run to run.
    pub fn bind(&self) -> Result<Binding> {
        Binding::new(self)
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session")
            .field("provider", &self.provider())
            .field("inputs", &self.inputs().collect::<Vec<_>>())
            .field("outputs", &self.outputs().collect::<Vec<_>>())
            .finish()
    }
}

impl Inner {
    /// Fails with the names of the inputs that are not given.
    pub(super) fn complete(&self, given: impl Fn(&CString) -> bool) -> Result<()> {
        let missing: Vec<_> =
            self.inputs.iter().filter(|(_, name)| !given(name)).map(|(port, _)| port.name.as_str()).collect();
        if missing.is_empty() {
            return Ok(());
        }
        Err(Error::invalid_argument(format!("not all inputs are given; missing: {}", missing.join(", "))))
    }

    fn copier(&self, dtype: ElementType) -> Result<Session> {
        let mut copiers = self.copiers.lock();
        if let Some((_, session)) = copiers.iter().find(|(kind, _)| *kind == dtype) {
            return Ok(session.clone());
        }
        let model = identity(dtype).encode_to_vec();
        let options = SessionOptions { provider: self.provider.clone(), intra_threads: 1, ..SessionOptions::default() };
        let source = Serialized { model: &model, folder: None, weights: 0 };
        let session = Session::create(self.loaded, &source, &options, choose_provider(self.loaded, None, &options)?)?;
        copiers.push((dtype, session.clone()));
        Ok(session)
    }

    /// Bytes handed out now and at most by the provider's arena.
    fn arena(&self) -> Result<Option<(u64, u64)>> {
        /// The first version whose allocators tell.
        const STATISTICS: u32 = 23;
        if self.loaded.minor < STATISTICS {
            return Ok(None);
        }
        let api = self.loaded.api;
        let info = MemoryInfo::new(api, self.provider.device())?;
        let (mut allocator, mut pairs) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the session is live; the version has these functions; texts are read before they are released.
        unsafe {
            call!(api, CreateAllocator(self.pointer.as_ptr(), info.pointer.as_ptr(), &mut allocator))?;
            let outcome = call!(api, AllocatorGetStats(allocator, &mut pairs));
            let figures = outcome.map(|()| {
                let figure = |key: &CStr| text(((*api.0).GetKeyValue)(pairs, key.as_ptr())).parse().ok();
                Some((figure(c"InUse")?, figure(c"MaxInUse")?))
            });
            if !pairs.is_null() {
                ((*api.0).ReleaseKeyValuePairs)(pairs);
            }
            ((*api.0).ReleaseAllocator)(allocator);
            figures
        }
    }

    /// Does one run, alone, and stops it when the token is cancelled.
    pub(super) fn run(
        &self,
        cancel: &CancelToken,
        work: impl FnOnce(*mut sys::OrtSession, *const sys::OrtRunOptions) -> Result<()>,
    ) -> Result<()> {
        let _alone = self.wait(cancel)?;
        cancel.check()?;
        let options = Arc::new(RunOptions::new(self.loaded.api)?);
        if self.shrink {
            options.set(
                "memory.enable_memory_arena_shrinkage",
                &match self.provider.device() {
                    Device::Host => "cpu:0".to_string(),
                    Device::Cuda(id) => format!("cpu:0;gpu:{id}"),
                },
            )?;
        }
        let stopper = options.clone();
        let hook = cancel.on_cancel(move || stopper.terminate());
        let outcome = work(self.pointer.as_ptr(), options.pointer);
        drop(hook);
        match outcome {
            Err(error) if options.terminated.load(Ordering::SeqCst) => {
                Err(Error::new(Status::Cancelled, "the run was cancelled").caused_by(error))
            }
            outcome => outcome,
        }
    }

    fn wait(&self, cancel: &CancelToken) -> Result<MutexGuard<'_, ()>> {
        /// How often a waiting thread looks whether it was cancelled.
        const PATIENCE: Duration = Duration::from_millis(10);
        loop {
            if let Some(guard) = self.gate.try_lock_for(PATIENCE) {
                return Ok(guard);
            }
            cancel.check()?;
        }
    }
}

/// The options of one run: its switch to end it.
struct RunOptions {
    api: Api,
    pointer: *mut sys::OrtRunOptions,
    terminated: AtomicBool,
}

// SAFETY: the one thing done from other threads is setting the terminate flag, which ONNX Runtime allows.
unsafe impl Send for RunOptions {}
// SAFETY: as above.
unsafe impl Sync for RunOptions {}

impl RunOptions {
    fn new(api: Api) -> Result<Self> {
        let mut pointer = std::ptr::null_mut();
        // SAFETY: the out pointer is valid.
        unsafe { call!(api, CreateRunOptions(&mut pointer)) }?;
        Ok(Self { api, pointer, terminated: AtomicBool::new(false) })
    }

    fn set(&self, key: &str, value: &str) -> Result<()> {
        let (key, value) = (c_string(key)?, c_string(value)?);
        // SAFETY: texts are NUL-terminated and copied.
        unsafe { call!(self.api, AddRunConfigEntry(self.pointer, key.as_ptr(), value.as_ptr())) }
    }

    fn terminate(&self) {
        self.terminated.store(true, Ordering::SeqCst);
        // SAFETY: the options are live while `self` is; setting the flag during a run is what it is for.
        if let Err(error) = unsafe { call!(self.api, RunOptionsSetTerminate(self.pointer)) } {
            log::error!(target: "macula::runtime", "a run can't be stopped: {error}");
        }
    }
}

impl Drop for RunOptions {
    fn drop(&mut self) {
        // SAFETY: ours, released once, after the last hook that refers to it.
        unsafe { ((*self.api.0).ReleaseRunOptions)(self.pointer) }
    }
}

/// `y = x` for vectors of any length.
fn identity(dtype: ElementType) -> proto::ModelProto {
    let port = |name: &str| {
        let dim = proto::tensor_shape_proto::Dimension {
            value: Some(proto::tensor_shape_proto::dimension::Value::DimParam("n".into())),
            ..Default::default()
        };
        let shape = proto::TensorShapeProto { dim: vec![dim] };
        let tensor = proto::type_proto::Tensor { elem_type: Some(dtype as i32), shape: Some(shape) };
        let kind = proto::TypeProto { value: Some(proto::type_proto::Value::TensorType(tensor)), ..Default::default() };
        proto::ValueInfoProto { name: Some(name.into()), r#type: Some(kind), ..Default::default() }
    };
    let node = proto::NodeProto {
        op_type: Some("Identity".into()),
        input: vec!["x".into()],
        output: vec!["y".into()],
        ..Default::default()
    };
    let graph = proto::GraphProto {
        name: Some("copy".into()),
        node: vec![node],
        input: vec![port("x")],
        output: vec![port("y")],
        ..Default::default()
    };
    let opset = proto::OperatorSetIdProto { version: Some(17), ..Default::default() };
    proto::ModelProto { ir_version: Some(8), opset_import: vec![opset], graph: Some(graph), ..Default::default() }
}

pub(super) fn find<'a>(ports: &'a [(Port, CString)], name: &str, side: &str) -> Result<&'a (Port, CString)> {
    ports.iter().find(|(port, _)| port.name == name).ok_or_else(|| {
        let names: Vec<&str> = ports.iter().map(|(port, _)| port.name.as_str()).collect();
        Error::not_found(format!("the model has no {side} {name:?}; it has {}", names.join(", ")))
    })
}

#[derive(Clone, Copy)]
enum Side {
    Input,
    Output,
}

fn ports(api: Api, session: NonNull<sys::OrtSession>, side: Side) -> Result<Vec<(Port, CString)>> {
    let session = session.as_ptr();
    let mut count = 0;
    // SAFETY: the session is live, the out pointer valid.
    unsafe {
        match side {
            Side::Input => call!(api, SessionGetInputCount(session, &mut count))?,
            Side::Output => call!(api, SessionGetOutputCount(session, &mut count))?,
        }
    }
    (0..count).map(|index| port(api, session, side, index)).collect()
}

fn port(api: Api, session: *mut sys::OrtSession, side: Side, index: usize) -> Result<(Port, CString)> {
    let allocator = api.default_allocator()?;
    let mut raw_name = std::ptr::null_mut();
    let mut info = std::ptr::null_mut();
    // SAFETY: `index` is below the session's count; the name is copied before it is given back.
    let name = unsafe {
        match side {
            Side::Input => call!(api, SessionGetInputName(session, index, allocator, &mut raw_name))?,
            Side::Output => call!(api, SessionGetOutputName(session, index, allocator, &mut raw_name))?,
        }
        let name = text(raw_name);
        call!(api, AllocatorFree(allocator, raw_name.cast()))?;
        match side {
            Side::Input => call!(api, SessionGetInputTypeInfo(session, index, &mut info))?,
            Side::Output => call!(api, SessionGetOutputTypeInfo(session, index, &mut info))?,
        }
        name
    };
    let mut tensor = std::ptr::null();
    // SAFETY: `info` was just made; the tensor info inside is read before it is released.
    let read = unsafe {
        let read = call!(api, CastTypeInfoToTensorInfo(info, &mut tensor))
            .and_then(|()| if tensor.is_null() { Ok(None) } else { tensor_info(api, tensor).map(Some) });
        ((*api.0).ReleaseTypeInfo)(info);
        read
    }?;
    let what = match side {
        Side::Input => "input",
        Side::Output => "output",
    };
    let Some((number, dims, symbols)) = read else {
        return Err(Error::unsupported(format!("{what} {name:?} of the model is no dense tensor")));
    };
    let dtype = ElementType::from_onnx(number).ok_or_else(|| {
        Error::unsupported(format!(
            "{what} {name:?} of the model has element type {number} of ONNX, which is not handled"
        ))
    })?;
    let dims = dims
        .into_iter()
        .zip(symbols)
        .map(|(size, symbol)| usize::try_from(size).map_or(Dimension::Open(symbol), Dimension::Fixed))
        .collect();
    let c_name = c_string(name.as_str())?;
    Ok((Port { name, dtype, dims }, c_name))
}

/// What a device tensor must keep alive.
pub(super) fn keep(inner: &Arc<Inner>) -> Arc<dyn Any + Send + Sync> {
    inner.clone()
}
