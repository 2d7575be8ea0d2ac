//! Panics on request, for the boundary tests: exists only with the feature `inject` and is no part of `macula.h`.

use std::ffi::{CStr, c_char};

use parking_lot::Mutex;

/// The export that is to panic, and whether only once it has looked up a handle.
static ASKED: Mutex<Option<(String, bool)>> = Mutex::new(None);

/// Makes every later call of the named export panic, until another name or NULL is given: at its beginning, or, with
/// `late`, once it has looked up its first handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn macula_inject_panic(name: *const c_char, late: i32) {
    let asked = if name.is_null() {
        None
    } else {
        // SAFETY: the tests give a terminated string.
        Some((unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned(), late != 0))
    };
    *ASKED.lock() = asked;
}

/// Panics if the tests asked for it.
pub(super) fn panic_if_asked(name: &str, late: bool) {
    let asked = ASKED.lock().as_ref().is_some_and(|(asked, when)| asked == name && *when == late);
    assert!(!asked, "injected into {name}");
}
