//! ONNX Runtime's table of functions, and its errors as ours. Knows nothing of models or sessions.

use std::ffi::{CStr, CString, c_char};
use std::path::Path;

use ort::sys;

use crate::error::{Error, Result, Status};
use crate::os;

/// The version of the table that is needed, and the least minor version of the library: earlier ones can't read the
/// external data of a model that is in memory. Entries of later versions are used only after a look at the library's.
pub(super) const API_VERSION: u32 = 21;

/// The table of the one ONNX Runtime of this process.
///
/// A pointer, not a reference: the table of an older library ends before the last field of this type.
#[derive(Clone, Copy)]
pub(super) struct Api(pub(super) *const sys::OrtApi);

// SAFETY: a constant table of functions that may be called from any thread.
unsafe impl Send for Api {}
// SAFETY: as above.
unsafe impl Sync for Api {}

/// Calls a function of the table that reports a status: `call!(api, CreateEnv(level, name, &mut env))`.
macro_rules! call {
    ($api:expr, $function:ident($($argument:expr),* $(,)?)) => {
        $api.check(((*$api.0).$function)($($argument),*))
    };
}
pub(super) use call;

impl Api {
    /// Takes a status and frees it.
    pub(super) fn check(self, status: sys::OrtStatusPtr) -> Result<()> {
        if status.0.is_null() {
            return Ok(());
        }
        // SAFETY: same ABI. The code is read as a number because a later library may know more codes.
        let code_of = unsafe {
            std::mem::transmute::<
                unsafe extern "system" fn(*const sys::OrtStatus) -> sys::OrtErrorCode,
                unsafe extern "system" fn(*const sys::OrtStatus) -> i32,
            >((*self.0).GetErrorCode)
        };
        // SAFETY: the status is ours, not NULL, and is released only after its text was copied.
        let (code, message) = unsafe {
            let code = code_of(status.0);
            let message = text(((*self.0).GetErrorMessage)(status.0));
            ((*self.0).ReleaseStatus)(status.0);
            (code, message)
        };
        Err(Error::new(kind(code, &message), format!("ONNX Runtime: {} (code {code})", message.trim_end())))
    }

    /// ONNX Runtime's allocator for small things that it hands out, such as names.
    pub(super) fn default_allocator(self) -> Result<*mut sys::OrtAllocator> {
        let mut allocator = std::ptr::null_mut();
        // SAFETY: the out pointer is valid; the allocator is owned by ONNX Runtime for ever.
        unsafe { call!(self, GetAllocatorWithDefaultOptions(&mut allocator)) }?;
        Ok(allocator)
    }

    /// The providers that the library was compiled with.
    pub(super) fn compiled_providers(self) -> Result<Vec<String>> {
        let mut names: *mut *mut c_char = std::ptr::null_mut();
        let mut count = 0;
        // SAFETY: out pointers are valid; the list is read before it is released.
        unsafe {
            call!(self, GetAvailableProviders(&mut names, &mut count))?;
            let list = (0..usize::try_from(count).unwrap_or(0)).map(|i| text(*names.add(i))).collect();
            call!(self, ReleaseAvailableProviders(names, count))?;
            Ok(list)
        }
    }
}

fn kind(code: i32, message: &str) -> Status {
    const INVALID_PROTOBUF: i32 = sys::OrtErrorCode::ORT_INVALID_PROTOBUF as i32;
    const INVALID_GRAPH: i32 = sys::OrtErrorCode::ORT_INVALID_GRAPH as i32;
    const NOT_IMPLEMENTED: i32 = sys::OrtErrorCode::ORT_NOT_IMPLEMENTED as i32;
    // The last two: a thread whose stack can't be had.
    let memory = [
        "bad_alloc",
        "Failed to allocate memory",
        "out of memory",
        "OUT_OF_MEMORY",
        "Available memory of",
        "Cannot allocate memory",
        "pthread_create failed",
    ];
    if memory.iter().any(|words| message.contains(words)) {
        return Status::OutOfMemory;
    }
    match code {
        INVALID_PROTOBUF | INVALID_GRAPH => Status::InvalidFile,
        NOT_IMPLEMENTED => Status::Unsupported,
        _ => Status::RuntimeFailed,
    }
}

/// Copies a C string; NULL is empty.
///
/// # Safety
/// `pointer` is NULL or NUL-terminated.
pub(super) unsafe fn text(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return String::new();
    }
    // SAFETY: by contract.
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned()
}

/// A name for C.
pub(super) fn c_string(text: impl Into<Vec<u8>>) -> Result<CString> {
    CString::new(text).map_err(|_| Error::invalid_argument("a name or path holds a NUL byte"))
}

/// A path for C.
pub(super) fn c_path(path: &Path) -> Result<CString> {
    c_string(os::path_bytes(path))
}
