//! Version
//!
//! The macros say which version a program was compiled against, the functions which one it runs with. Within one
//! SONAME (`libmacula.so.0`) functions, status values and struct fields are only ever added, so a program runs with
//! any library that is as new as its header or newer.

use std::ffi::c_char;

use super::guard::guard_value;

/// Major version of this header.
pub const MACULA_VERSION_MAJOR: u32 = 0;

/// Minor version of this header.
pub const MACULA_VERSION_MINOR: u32 = 1;

/// Patch version of this header.
pub const MACULA_VERSION_PATCH: u32 = 0;

/// The version of the library that is loaded, as one number that grows: `major * 1000000 + minor * 1000 + patch`.
///
/// Never fails. Any thread, also in a forked child.
#[unsafe(no_mangle)]
pub extern "C" fn macula_version_number() -> u32 {
    guard_value("macula_version_number", 0, || {
        MACULA_VERSION_MAJOR * 1_000_000 + MACULA_VERSION_MINOR * 1_000 + MACULA_VERSION_PATCH
    })
}

/// The version of the library that is loaded, as text: `"0.1.0"`.
///
/// The text is static: never free it. Never fails. Any thread, also in a forked child.
#[unsafe(no_mangle)]
pub extern "C" fn macula_version_string() -> *const c_char {
    guard_value("macula_version_string", c"".as_ptr(), || concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_macros_are_the_crates_version() {
        let macros = format!("{MACULA_VERSION_MAJOR}.{MACULA_VERSION_MINOR}.{MACULA_VERSION_PATCH}");
        assert_eq!(macros, env!("CARGO_PKG_VERSION"));
    }
}
