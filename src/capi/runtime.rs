//! Runtime
//!
//! ONNX Runtime runs the models. The library does not contain it: it loads one, once for the process, by absolute path
//! and after looking at it, so a missing, damaged or old one is a status and never a crash. It is looked for in this
//! order: the host's own `OrtApiBase`; `library` of the options; the environment variable `MACULA_ONNXRUNTIME` (a file
//! or a folder); the folder of this library; `onnxruntime` beside or above that folder; `macula/onnxruntime` in the
//! user's data folder. The first three are commands: when one is given, nothing else is tried.

use std::ffi::{CString, c_char, c_void};

use super::argument::{self, Versioned, c_text, optional_path, out};
use super::guard::{guard, guard_free};
use super::handle::{Object, object};
use super::log::{self, Subscription, macula_log_fn, macula_log_level};
use super::status::macula_status;
use crate::runtime::{ApiBase, Runtime, RuntimeOptions};

/// ONNX Runtime, loaded and checked.
pub struct macula_runtime {
    pub(super) runtime: Runtime,
    version: CString,
    library: Option<CString>,
    providers: Vec<CString>,
    provider_pointers: Vec<Text>,
    /// Ends with the handle.
    _log: Option<Subscription>,
}
object!(macula_runtime, 2, idle: |_| !log::is_logging());

/// A pointer into a text that the same object owns.
#[repr(transparent)]
struct Text(*const c_char);
// SAFETY: the text is never written and lives as long as the object that holds both.
unsafe impl Send for Text {}
// SAFETY: as above.
unsafe impl Sync for Text {}

/// Where ONNX Runtime comes from and who hears the log.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct macula_runtime_options {
    /// `sizeof` this struct.
    pub struct_size: usize,
    /// The host's own ONNX Runtime: the `const OrtApiBase *` that its `OrtGetApiBase()` returned; the library it comes
    /// from must stay loaded until the process ends. May be NULL. Default: `NULL`.
    pub ort_api_base: *const c_void,
    /// Path of the shared library, or of a folder that holds it. May be NULL. Default: `NULL`.
    pub library: *const c_char,
    /// Receives log messages while the handle lives. May be NULL. Default: `NULL`.
    pub log: macula_log_fn,
    /// Given to `log` as it is. May be NULL. Default: `NULL`.
    pub log_userdata: *mut c_void,
    /// The least grave level that `log` hears. Default: `MACULA_LOG_WARNING`.
    pub log_level: macula_log_level,
    /// Not used; 0. Default: `0`.
    pub reserved: i32,
}

impl Default for macula_runtime_options {
    fn default() -> Self {
        Self {
            struct_size: size_of::<Self>(),
            ort_api_base: std::ptr::null(),
            library: std::ptr::null(),
            log: None,
            log_userdata: std::ptr::null_mut(),
            log_level: log::MACULA_LOG_WARNING,
            reserved: 0,
        }
    }
}

// SAFETY: repr(C), begins with its size; pointers, an optional function pointer and integers take any bytes.
unsafe impl Versioned for macula_runtime_options {
    const FIRST_SIZE: usize = 48;
}

/// What was loaded. The texts belong to the runtime handle.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct macula_runtime_info {
    /// `sizeof` this struct.
    pub struct_size: usize,
    /// ONNX Runtime's version, e.g. `"1.32.0"`; never NULL.
    pub version: *const c_char,
    /// Absolute path of its library; NULL if the host gave the `OrtApiBase` and its library cannot be told.
    pub library: *const c_char,
    /// Names of the providers that it was compiled with, e.g. `"CUDAExecutionProvider"`. That says nothing about the
    /// drivers of this machine.
    pub providers: *const *const c_char,
    /// Number of `providers`.
    pub provider_count: usize,
}

impl Default for macula_runtime_info {
    fn default() -> Self {
        Self {
            struct_size: size_of::<Self>(),
            version: std::ptr::null(),
            library: std::ptr::null(),
            providers: std::ptr::null(),
            provider_count: 0,
        }
    }
}

// SAFETY: repr(C), begins with its size; pointers and integers take any bytes.
unsafe impl Versioned for macula_runtime_info {
    const FIRST_SIZE: usize = 40;
}

/// Loads ONNX Runtime, or gives another handle on the one that this process already uses.
///
/// - `options`: where it comes from; may be NULL for the search order above and no log.
/// - `out_runtime`: receives the runtime; not NULL. Free it with `macula_runtime_free`; ONNX Runtime itself stays
///   loaded until the process ends.
///
/// Errors: `RUNTIME_UNAVAILABLE`, within a second, with what was tried, found and needed; also when another library is
/// asked for than the one that the process already uses. `UNSUPPORTED`. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_runtime_create(
    options: *const macula_runtime_options,
    out_runtime: *mut *mut macula_runtime,
) -> macula_status {
    guard("macula_runtime_create", |_| {
        // SAFETY: valid as the header asks.
        let out_runtime = unsafe { out(out_runtime, "out_runtime") }?;
        // SAFETY: as above.
        let options = unsafe { argument::options(options, "options") }?;
        let mut wanted = RuntimeOptions::default();
        // SAFETY: as the header asks.
        wanted.api_base = unsafe { ApiBase::from_raw(options.ort_api_base) };
        // SAFETY: as above.
        wanted.library = unsafe { optional_path(options.library, "options.library") }?.map(Into::into);
        let subscription = log::subscribe(options.log, options.log_userdata, options.log_level)?;
        wanted.log = subscription.as_ref().map(Subscription::log_sink);
        let runtime = Runtime::load(&wanted)?;
        let providers: Vec<CString> = runtime.compiled_providers()?.iter().map(|name| c_text(name)).collect();
        out_runtime.set(macula_runtime::table().insert(macula_runtime {
            version: c_text(runtime.version()),
            library: runtime.path().map(|path| c_text(&path.to_string_lossy())),
            provider_pointers: providers.iter().map(|name| Text(name.as_ptr())).collect(),
            providers,
            runtime,
            _log: subscription,
        }));
        Ok(())
    })
}

/// What was loaded.
///
/// - `runtime`: a live runtime; not NULL.
/// - `out_info`: an initialised struct (`MACULA_RUNTIME_INFO_INIT`) to be filled in; not NULL.
///
/// Any thread; never waits.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_runtime_get_info(
    runtime: *const macula_runtime,
    out_info: *mut macula_runtime_info,
) -> macula_status {
    guard("macula_runtime_get_info", |call| {
        let runtime = call.object(runtime, "runtime")?;
        // SAFETY: valid as the header asks.
        let info = unsafe { argument::out_info(out_info, "out_info") }?;
        info.set(macula_runtime_info {
            version: runtime.version.as_ptr(),
            library: runtime.library.as_ref().map_or(std::ptr::null(), |library| library.as_ptr()),
            providers: runtime.provider_pointers.as_ptr().cast(),
            provider_count: runtime.providers.len(),
            ..Default::default()
        });
        Ok(())
    })
}

/// Frees a runtime handle and ends its log callback; waits for one that is running on another thread. Pipelines that
/// were opened with it go on.
///
/// - `runtime`: a live runtime; may be NULL, then nothing happens.
///
/// Errors: `BUSY` from inside a log callback. Any thread.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_runtime_free(runtime: *mut macula_runtime) -> macula_status {
    guard_free("macula_runtime_free", runtime)
}
