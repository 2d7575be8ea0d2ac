//! Status and last error
//!
//! Every function that can fail returns a `macula_status`; its value tells a program what it can do about it. The text
//! of `macula_last_error` tells a person what was wrong, what was expected and where. The values are frozen: a later
//! version may add some, so treat a value that you do not know as a failure.

use std::ffi::c_char;

use super::guard::{guard_value, last_error};
pub use crate::error::Status as macula_status;

/// The name of a status, as in this header: `"MACULA_STATUS_NOT_FOUND"`.
///
/// - `status`: any number; `"MACULA_STATUS_UNKNOWN"` for one that this version does not know.
///
/// The text is static: never free it. Never fails. Any thread, also in a forked child.
#[unsafe(no_mangle)]
pub extern "C" fn macula_status_name(status: i32) -> *const c_char {
    guard_value("macula_status_name", c"MACULA_STATUS_UNKNOWN".as_ptr(), || describe(status).0.as_ptr())
}

/// One English sentence on what a status means, for when there is no `macula_last_error` at hand.
///
/// - `status`: any number.
///
/// The text is static: never free it. Never fails. Any thread, also in a forked child.
#[unsafe(no_mangle)]
pub extern "C" fn macula_status_message(status: i32) -> *const c_char {
    guard_value("macula_status_message", c"".as_ptr(), || describe(status).1.as_ptr())
}

/// What went wrong in the last call of this thread that failed: the function, the parameter, file or layer, what was
/// found and what was expected, as UTF-8 text for a person. Do not parse it: its words change between versions.
///
/// The text belongs to the library and stays until the next call that fails *on the same thread*; a call that succeeds
/// leaves it. It is `""` (never NULL) on a thread where nothing has failed. Never fails. Any thread, also in a forked
/// child.
#[unsafe(no_mangle)]
pub extern "C" fn macula_last_error() -> *const c_char {
    guard_value("macula_last_error", c"".as_ptr(), last_error)
}

fn describe(status: i32) -> (&'static std::ffi::CStr, &'static std::ffi::CStr) {
    use macula_status::*;
    // The list is complete: the `match` on the enum below refuses to compile when a status is missing here.
    let known = [
        Ok,
        InvalidArgument,
        NotFound,
        Io,
        InvalidFile,
        Unsupported,
        LimitExceeded,
        WrongBase,
        RuntimeUnavailable,
        ProviderUnavailable,
        RuntimeFailed,
        Cancelled,
        OutOfMemory,
        NotFinite,
        Busy,
        Forked,
        Panic,
    ];
    let Some(known) = known.into_iter().find(|&known| known as i32 == status) else {
        return (c"MACULA_STATUS_UNKNOWN", c"This version of the library does not know this status.");
    };
    match known {
        Ok => (c"MACULA_STATUS_OK", c"Success."),
        InvalidArgument => (
            c"MACULA_STATUS_INVALID_ARGUMENT",
            c"An argument is NULL, out of range, of the wrong shape, not UTF-8, or no live handle.",
        ),
        NotFound => (c"MACULA_STATUS_NOT_FOUND", c"A file, folder, tensor, token or name does not exist."),
        Io => (c"MACULA_STATUS_IO", c"The operating system refused to read or write."),
        InvalidFile => (c"MACULA_STATUS_INVALID_FILE", c"A model or concept file is damaged or contradicts itself."),
        Unsupported => {
            (c"MACULA_STATUS_UNSUPPORTED", c"The request or model is well-formed, but this library does not handle it.")
        }
        LimitExceeded => (c"MACULA_STATUS_LIMIT_EXCEEDED", c"A size, depth or count is above the documented limit."),
        WrongBase => (c"MACULA_STATUS_WRONG_BASE", c"The concept was found on another base model."),
        RuntimeUnavailable => {
            (c"MACULA_STATUS_RUNTIME_UNAVAILABLE", c"ONNX Runtime could not be found, is not one, or is too old.")
        }
        ProviderUnavailable => (c"MACULA_STATUS_PROVIDER_UNAVAILABLE", c"A provider was asked for and cannot run."),
        RuntimeFailed => (c"MACULA_STATUS_RUNTIME_FAILED", c"ONNX Runtime failed to build or run a session."),
        Cancelled => (c"MACULA_STATUS_CANCELLED", c"The job was cancelled by the host."),
        OutOfMemory => (c"MACULA_STATUS_OUT_OF_MEMORY", c"Memory could not be had."),
        NotFinite => (c"MACULA_STATUS_NOT_FINITE", c"A NaN or an infinity appeared while computing."),
        Busy => (c"MACULA_STATUS_BUSY", c"The handle is at work on another job."),
        Forked => (c"MACULA_STATUS_FORKED", c"The library was used before a fork and is called in the child."),
        Panic => (
            c"MACULA_STATUS_PANIC",
            c"A defect of the library was caught; the handles of that call are no longer usable.",
        ),
    }
}
