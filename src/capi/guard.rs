//! What every export passes: no panic leaves, no call works in a forked child, and a failure leaves its text behind.
//!
//! The guard knows no function's meaning; it is given a name for messages and a body that may fail.

use std::cell::{Cell, RefCell};
use std::ffi::{CString, c_char};
use std::fmt::Write;
use std::panic::{AssertUnwindSafe, PanicHookInfo, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Once};

use super::handle::{Entry, Object};
use crate::error::{Error, Result, Status};

/// The process that made the first handle; 0 before that. ONNX Runtime's threads and our own do not follow a fork, so
/// what was begun before it can never finish in the child.
static OWNER: AtomicU32 = AtomicU32::new(0);

thread_local! {
    static LAST_ERROR: RefCell<Option<CString>> = const { RefCell::new(None) };
    /// Exports that this thread is inside of; callbacks nest them.
    static DEPTH: Cell<u32> = const { Cell::new(0) };
    /// Where the panic that is being caught came from.
    static PLACE: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// The handles that one call works with, so that a panic can make them unusable.
pub(super) struct Call {
    #[cfg_attr(not(feature = "inject"), allow(dead_code))]
    name: &'static str,
    used: Vec<Arc<AtomicBool>>,
}

impl Call {
    /// The object behind a handle.
    pub(super) fn object<T: Object>(&mut self, pointer: *const T, parameter: &str) -> Result<Arc<Entry<T>>> {
        let entry = T::table().get(pointer, parameter)?;
        if entry.poisoned.load(Ordering::SeqCst) {
            return Err(Error::new(
                Status::Panic,
                format!("{parameter}: an earlier call on this {} met a defect of the library; free it", T::NAME),
            ));
        }
        self.used.push(entry.poisoned.clone());
        #[cfg(feature = "inject")]
        super::inject::panic_if_asked(self.name, true);
        Ok(entry)
    }
}

/// Runs the body of an export that can fail.
pub(super) fn guard(name: &'static str, body: impl FnOnce(&mut Call) -> Result<()>) -> Status {
    guard_with(name, Fork::Refused, body)
}

/// Runs a `*_free`. In a forked child it leaks the object: its threads are not there to end.
pub(super) fn guard_free<T: Object>(name: &'static str, pointer: *mut T) -> Status {
    guard_with(name, Fork::Refused, |_| if pointer.is_null() { Ok(()) } else { T::table().remove(pointer) })
}

/// Runs the body of an export that returns a plain value; `fallback` is returned if it panics.
pub(super) fn guard_value<T>(name: &'static str, fallback: T, body: impl FnOnce() -> T) -> T {
    let mut value = None;
    guard_with(name, Fork::Allowed, |_| {
        value = Some(body());
        Ok(())
    });
    value.unwrap_or(fallback)
}

/// Remembers the process that handles belong to.
pub(super) fn claim_process() {
    // An exchange that finds another value has lost to an earlier call of this same process: the guard has seen to it.
    let _ = OWNER.compare_exchange(0, std::process::id(), Ordering::SeqCst, Ordering::SeqCst);
}

/// The text of the last failure on this thread; empty if there was none.
pub(super) fn last_error() -> *const c_char {
    LAST_ERROR.with_borrow(|text| text.as_ref().map_or(c"".as_ptr(), |text| text.as_ptr()))
}

#[derive(PartialEq)]
enum Fork {
    Allowed,
    Refused,
}

fn guard_with(name: &'static str, fork: Fork, body: impl FnOnce(&mut Call) -> Result<()>) -> Status {
    let owner = OWNER.load(Ordering::SeqCst);
    if fork == Fork::Refused && owner != 0 && owner != std::process::id() {
        remember(name, &Error::new(Status::Forked, "this process was forked from one that had used the library"));
        return Status::Forked;
    }
    silence_panics();
    let mut call = Call { name, used: Vec::new() };
    DEPTH.set(DEPTH.get() + 1);
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        #[cfg(feature = "inject")]
        super::inject::panic_if_asked(name, false);
        body(&mut call)
    }));
    DEPTH.set(DEPTH.get() - 1);
    match outcome {
        Ok(Ok(())) => Status::Ok,
        Ok(Err(error)) => {
            remember(name, &error);
            error.status()
        }
        Err(payload) => {
            call.used.iter().for_each(|poisoned| poisoned.store(true, Ordering::SeqCst));
            let what = payload.downcast_ref::<String>().map(String::as_str);
            let what = what.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no message").to_owned();
            // A payload may panic when it is dropped, and there is nobody left to tell.
            let _ = catch_unwind(AssertUnwindSafe(|| drop(payload)));
            let place = PLACE.take().unwrap_or_else(|| "an unknown place".to_owned());
            remember(name, &Error::new(Status::Panic, format!("a defect of the library, at {place}: {what}")));
            Status::Panic
        }
    }
}

fn remember(name: &str, error: &Error) {
    let mut text = format!("{name}: {error}");
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            let _ = write!(text, ": {cause_text}");
        }
        source = cause.source();
    }
    text.retain(|character| character != '\0');
    LAST_ERROR.set(CString::new(text).ok());
}

/// A panic prints to the standard error stream unless a hook stands before that. Ours keeps the place for the message
/// when the panic will be caught here, and leaves every other panic to the hook that was there.
fn silence_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info: &PanicHookInfo<'_>| {
            if DEPTH.get() > 0 {
                PLACE.set(info.location().map(|place| place.to_string()));
            } else if rayon::current_thread_index().is_none() {
                // A panic on a thread of rayon's travels to the thread that waits for it and is caught there.
                previous(info);
            }
        }));
    });
}
