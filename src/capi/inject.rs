//! Panics on request, for the boundary tests: exists only with the feature `inject` and is no part of `macula.h`.

use std::ffi::{CStr, c_char};

use parking_lot::Mutex;

static ASKED: Mutex<Option<String>> = Mutex::new(None);

/// Makes every later call of the named export panic inside its guard, until another name or NULL is given.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_inject_panic(name: *const c_char) {
    let asked = if name.is_null() {
        None
    } else {
        // SAFETY: the tests give a terminated string.
        Some(unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned())
    };
    *ASKED.lock() = asked;
}

/// Panics if the tests asked for it.
pub(super) fn panic_if_asked(name: &str) {
    let asked = ASKED.lock().as_deref() == Some(name);
    assert!(!asked, "injected into {name}");
}
