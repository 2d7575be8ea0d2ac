//! Where ONNX Runtime comes from: found, looked at before it is mapped, its version checked before its first session.
//!
//! Nothing here panics or aborts: each failure is [`Status::RuntimeUnavailable`] and says what was tried, what was found
//! and what is needed. One process uses one ONNX Runtime, from the first successful load until it ends.

use std::ffi::{c_char, c_void};
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::Arc;

use ort::sys;
use parking_lot::Mutex;

use super::api::{API_VERSION, Api, call, text};
use crate::error::{Error, Result, Status};
use crate::os::{self, SharedLibrary};

/// The environment variable that names the library, or a folder that holds it.
pub const LIBRARY_VARIABLE: &str = "MACULA_ONNXRUNTIME";

/// Where to take ONNX Runtime from.
///
/// In this order: [`RuntimeOptions::api_base`]; [`RuntimeOptions::library`]; the environment variable
/// [`LIBRARY_VARIABLE`]; the folder of this library; `onnxruntime` beside or above that folder (`cargo xtask` unpacks
/// the wheel to `target/onnxruntime`), and `macula/onnxruntime` in the user's data folder (`$XDG_DATA_HOME`, else
/// `~/.local/share`). The first three are commands: when one is given, no other place is tried. A folder stands for the
/// `libonnxruntime.so*` with the highest version in it, in its `lib`, or where an unpacked wheel has it.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct RuntimeOptions {
    /// The host's own ONNX Runtime: what its `OrtGetApiBase()` returned.
    pub api_base: Option<ApiBase>,
    /// The library, or a folder that holds it.
    pub library: Option<PathBuf>,
    /// Where messages about the sessions of this [`super::Runtime`] go; `None` sends them to the `log` crate, where
    /// those about the library as a whole always go.
    pub log: Option<LogSink>,
}

type TakeMessage = dyn Fn(log::Level, &str) + Send + Sync;

/// Takes messages of ONNX Runtime, from any thread.
#[derive(Clone)]
pub struct LogSink(Arc<TakeMessage>);

impl LogSink {
    /// Calls `sink` for each message of level [`log::Level::Warn`] and above.
    pub fn new(sink: impl Fn(log::Level, &str) + Send + Sync + 'static) -> Self {
        Self(Arc::new(sink))
    }

    /// The function and the parameter for ONNX Runtime; the parameter is valid while `self` stays where it is.
    pub(super) fn raw(&self) -> (sys::OrtLoggingFunction, *mut c_void) {
        (logging_function(), std::ptr::from_ref(self).cast_mut().cast())
    }
}

impl std::fmt::Debug for LogSink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("LogSink")
    }
}

/// The `const OrtApiBase *` of an ONNX Runtime that the host has loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApiBase(NonNull<sys::OrtApiBase>);

// SAFETY: an `OrtApiBase` is a constant table of two thread-safe functions.
unsafe impl Send for ApiBase {}
// SAFETY: as above.
unsafe impl Sync for ApiBase {}

impl ApiBase {
    /// Wraps the pointer; `None` for NULL.
    ///
    /// # Safety
    /// `base` is NULL or was returned by `OrtGetApiBase` of a library that stays loaded until the process ends.
    pub unsafe fn from_raw(base: *const c_void) -> Option<Self> {
        NonNull::new(base.cast_mut().cast()).map(Self)
    }
}

/// The one ONNX Runtime of this process.
pub(super) struct Loaded {
    pub(super) api: Api,
    pub(super) environment: NonNull<sys::OrtEnv>,
    base: ApiBase,
    /// Absolute; `None` if the host gave the base and the loader doesn't say whose it is.
    pub(super) path: Option<PathBuf>,
    pub(super) version: String,
    pub(super) minor: u32,
}

// SAFETY: `OrtApi` and `OrtEnv` may be used from any thread.
unsafe impl Send for Loaded {}
// SAFETY: as above.
unsafe impl Sync for Loaded {}

impl Loaded {
    /// What the library says about how it was built.
    pub(super) fn build(&self) -> String {
        // SAFETY: a constant text of the library.
        unsafe { text(((*self.api.0).GetBuildInfoString)()) }
    }
}

static LOADED: Mutex<Option<&'static Loaded>> = Mutex::new(None);

/// Loads the library that the options name, or gives the one that is loaded if it is the same.
pub(super) fn load(options: &RuntimeOptions) -> Result<&'static Loaded> {
    let mut loaded = LOADED.lock();
    if let Some(loaded) = *loaded {
        return same(loaded, options).map(|()| loaded);
    }
    let found = if let Some(base) = options.api_base {
        let path = os::file_of_address(base.0.as_ptr().cast());
        connect(base, path).map_err(|reason| unavailable(&[("the host's OrtApiBase".into(), reason)]))?
    } else {
        search(&candidates(options))?
    };
    log::debug!(target: "macula::runtime", "ONNX Runtime {} from {:?}", found.version, found.path);
    // The environment and the table must outlive every session, value and static destructor: never freed.
    let found: &'static Loaded = Box::leak(Box::new(found));
    *loaded = Some(found);
    Ok(found)
}

fn same(loaded: &Loaded, options: &RuntimeOptions) -> Result<()> {
    let found = || match &loaded.path {
        Some(path) => format!("ONNX Runtime {} from {}", loaded.version, path.display()),
        None => format!("the host's ONNX Runtime {}", loaded.version),
    };
    let refuse = |wanted: String| {
        Err(Error::new(
            Status::RuntimeUnavailable,
            format!("this process already uses {}; {wanted} was asked for. One process uses one library.", found()),
        ))
    };
    if let Some(base) = options.api_base {
        return if base == loaded.base { Ok(()) } else { refuse("another OrtApiBase".into()) };
    }
    let Some(wanted) = &options.library else { return Ok(()) };
    let resolved = resolve(wanted).map_err(|reason| unavailable(&[(wanted.display().to_string(), reason)]))?;
    if Some(&resolved) == loaded.path.as_ref() { Ok(()) } else { refuse(resolved.display().to_string()) }
}

fn unavailable(tried: &[(String, String)]) -> Error {
    let mut message = String::from("ONNX Runtime can't be used. Tried:");
    for (place, reason) in tried {
        message.push_str(&format!(" {place} ({reason});"));
    }
    message.push_str(&format!(
        " needed: libonnxruntime.so of version 1.{API_VERSION} or later. Give its path in the options or in \
         {LIBRARY_VARIABLE}, or put it beside this library."
    ));
    Error::new(Status::RuntimeUnavailable, message)
}

fn candidates(options: &RuntimeOptions) -> Vec<PathBuf> {
    if let Some(path) = &options.library {
        return vec![path.clone()];
    }
    if let Some(path) = std::env::var_os(LIBRARY_VARIABLE).filter(|value| !value.is_empty()) {
        return vec![path.into()];
    }
    let mut places = Vec::new();
    if let Some(file) = os::file_of_address(load as *const c_void) {
        let above = file.ancestors().skip(1);
        places.extend(above.clone().take(1).map(Path::to_path_buf));
        places.extend(above.take(3).map(|folder| folder.join("onnxruntime")));
    }
    places.extend(os::user_data_folder().map(|folder| folder.join("macula/onnxruntime")));
    places
}

fn search(places: &[PathBuf]) -> Result<Loaded> {
    let mut tried = Vec::new();
    for place in places {
        let outcome = resolve(place).and_then(|path| open(&path));
        match outcome {
            Ok(loaded) => return Ok(loaded),
            Err(reason) => tried.push((place.display().to_string(), reason)),
        }
    }
    Err(unavailable(&tried))
}

/// The absolute path of the library that `place`, a file or folder, stands for.
fn resolve(place: &Path) -> Result<PathBuf, String> {
    let place = std::fs::canonicalize(place).map_err(|error| error.to_string())?;
    if !place.is_dir() {
        return Ok(place);
    }
    let mut folders = vec![place.clone(), place.join("lib"), place.join("onnxruntime/capi")];
    let entries = std::fs::read_dir(&place).map_err(|error| error.to_string())?;
    folders.extend(
        entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("onnxruntime-")))
            .map(|path| path.join("onnxruntime/capi")),
    );
    let newest = folders
        .iter()
        .filter_map(|folder| std::fs::read_dir(folder).ok())
        .flatten()
        .filter_map(|entry| {
            let path = entry.ok()?.path();
            let name = path.file_name()?.to_str()?.strip_prefix("libonnxruntime.so")?.to_owned();
            let version: Vec<u32> = name.split('.').filter_map(|part| part.parse().ok()).collect();
            Some((version, path))
        })
        .max();
    let (_, path) = newest.ok_or_else(|| "the folder holds no libonnxruntime.so".to_string())?;
    std::fs::canonicalize(path).map_err(|error| error.to_string())
}

fn open(path: &Path) -> Result<Loaded, String> {
    os::check_shared_library(path)?;
    let library = SharedLibrary::open(path).map_err(|reason| format!("the loader refused it: {reason}"))?;
    let Some(symbol) = library.symbol(c"OrtGetApiBase") else {
        library.close();
        return Err("it has no OrtGetApiBase: it is not ONNX Runtime".into());
    };
    type GetApiBase = unsafe extern "system" fn() -> *const sys::OrtApiBase;
    // SAFETY: this is the documented signature of the symbol of that name.
    let get_api_base = unsafe { std::mem::transmute::<*mut c_void, GetApiBase>(symbol.as_ptr()) };
    // SAFETY: it takes nothing and returns a constant.
    let Some(base) = NonNull::new(unsafe { get_api_base() }.cast_mut()) else {
        library.close();
        return Err("its OrtGetApiBase returned NULL".into());
    };
    match connect(ApiBase(base), Some(path.to_path_buf())) {
        Ok(loaded) => Ok(loaded),
        Err(reason) => {
            library.close();
            Err(reason)
        }
    }
}

/// Checks the version, then takes the table and makes the environment.
fn connect(base: ApiBase, path: Option<PathBuf>) -> Result<Loaded, String> {
    // SAFETY: the base is valid by the contract of `ApiBase`; the version is a constant text.
    let version = unsafe { text((base.0.as_ref().GetVersionString)()) };
    let mut numbers = version.split('.').map(str::parse::<u32>);
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
        return Err(format!("its version {version:?} is no version of ONNX Runtime"));
    };
    if major != 1 || minor < API_VERSION {
        return Err(format!("found version {version}; needed: 1.{API_VERSION} or a later 1.x"));
    }
    // SAFETY: as above.
    let table = unsafe { (base.0.as_ref().GetApi)(API_VERSION) };
    if table.is_null() {
        return Err(format!("version {version} does not give API {API_VERSION}"));
    }
    let api = Api(table);
    // ONNX Runtime from 1.32 on starts a telemetry thread with its environment, before it can be told not to. The thread
    // would idle for ever, and a forked child would wait for it when it exits.
    let environment = os::with_variable(c"ORT_DISABLE_TELEMETRY=1", || environment(api));
    let environment = environment.map_err(|error| error.to_string())?;
    Ok(Loaded { api, environment, base, path, version, minor })
}

/// The process-wide environment: silent but for the `log` crate, telemetry off.
fn environment(api: Api) -> Result<NonNull<sys::OrtEnv>> {
    let logger = logging_function();
    let level = sys::OrtLoggingLevel::ORT_LOGGING_LEVEL_WARNING;
    let mut environment = std::ptr::null_mut();
    // SAFETY: the logger lives for ever and needs no parameter; the name is constant; the out pointer valid.
    unsafe {
        call!(
            api,
            CreateEnvWithCustomLogger(logger, std::ptr::null_mut(), level, c"macula".as_ptr(), &mut environment)
        )?;
        call!(api, DisableTelemetryEvents(environment))?;
    }
    NonNull::new(environment).ok_or_else(|| Error::new(Status::RuntimeFailed, "ONNX Runtime made no environment"))
}

fn logging_function() -> sys::OrtLoggingFunction {
    type Texts = *const c_char;
    // SAFETY: same ABI; the level is read as a number because a later library may know more levels.
    unsafe {
        std::mem::transmute::<
            unsafe extern "system" fn(*mut c_void, i32, Texts, Texts, Texts, Texts),
            sys::OrtLoggingFunction,
        >(log_message)
    }
}

/// Gives a message to the [`LogSink`] that `sink` points to, or to the `log` crate if it is NULL.
unsafe extern "system" fn log_message(
    sink: *mut c_void,
    severity: i32,
    category: *const c_char,
    _: *const c_char,
    location: *const c_char,
    message: *const c_char,
) {
    let level = match severity {
        0 => log::Level::Trace,
        1 => log::Level::Debug,
        2 => log::Level::Warn,
        _ => log::Level::Error,
    };
    // SAFETY: a session's sink lives as long as the session.
    let sink = unsafe { sink.cast::<LogSink>().as_ref() };
    if sink.is_none() && level > log::max_level() {
        return;
    }
    // A host's logger may panic; ONNX Runtime's frames must not be unwound.
    let _ = std::panic::catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: ONNX Runtime gives NUL-terminated texts that live during the call.
        let (category, location, message) = unsafe { (text(category), text(location), text(message)) };
        let message = format!("{category} {location}: {message}");
        match sink {
            Some(sink) => (sink.0)(level, &message),
            None => log::log!(target: "macula::onnxruntime", level, "{message}"),
        }
    }));
}
