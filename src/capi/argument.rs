//! C arguments, checked: a pointer becomes a reference, a string or a slice only here.
//!
//! Every function names the parameter in its message. `unsafe` stands for the one thing that cannot be checked: that a
//! non-NULL, aligned pointer leads to as much memory as the header asks for.

use std::ffi::{CStr, CString, c_char};
use std::path::Path;

use crate::error::{Error, Result};

/// Structs beyond this size are not read: no later version of an option struct grows so far.
const MAX_STRUCT_SIZE: usize = 4096;

/// A struct that begins with `struct_size`, so that it can grow in later versions.
///
/// # Safety
/// The type is `repr(C)`, begins with a `usize` that holds its size, and any bytes are a valid value of it.
pub(super) unsafe trait Versioned: Default + Copy {
    /// The size of the struct in the first version that had it.
    const FIRST_SIZE: usize;
}

fn null(parameter: &str) -> Error {
    Error::invalid_argument(format!("{parameter} is NULL"))
}

fn check<T>(pointer: *const T, parameter: &str) -> Result<()> {
    if pointer.is_null() {
        return Err(null(parameter));
    }
    if !pointer.is_aligned() {
        return Err(Error::invalid_argument(format!("{parameter} is not aligned to {} bytes", align_of::<T>())));
    }
    Ok(())
}

/// What a pointer leads to.
///
/// # Safety
/// A non-NULL pointer leads to a valid `T` that nobody writes during the call.
pub(super) unsafe fn reference<'a, T>(pointer: *const T, parameter: &str) -> Result<&'a T> {
    check(pointer, parameter)?;
    // SAFETY: not NULL, aligned, valid by the caller's word.
    Ok(unsafe { &*pointer })
}

/// A NUL-terminated UTF-8 string.
///
/// # Safety
/// A non-NULL pointer leads to a NUL-terminated string that nobody writes during the call.
pub(super) unsafe fn text<'a>(pointer: *const c_char, parameter: &str) -> Result<&'a str> {
    if pointer.is_null() {
        return Err(null(parameter));
    }
    // SAFETY: not NULL, terminated by the caller's word.
    let bytes = unsafe { CStr::from_ptr(pointer) };
    bytes.to_str().map_err(|error| Error::invalid_argument(format!("{parameter} is not UTF-8")).caused_by(error))
}

/// A string that may be NULL.
///
/// # Safety
/// As for [`text`].
pub(super) unsafe fn optional_text<'a>(pointer: *const c_char, parameter: &str) -> Result<Option<&'a str>> {
    // SAFETY: as promised by the caller.
    if pointer.is_null() { Ok(None) } else { unsafe { text(pointer, parameter) }.map(Some) }
}

/// A path that may be NULL; an empty one is refused, because it is always a mistake of the caller.
///
/// # Safety
/// As for [`text`].
pub(super) unsafe fn optional_path<'a>(pointer: *const c_char, parameter: &str) -> Result<Option<&'a Path>> {
    // SAFETY: as promised by the caller.
    match unsafe { optional_text(pointer, parameter) }? {
        Some("") => Err(Error::invalid_argument(format!("{parameter} is an empty path"))),
        path => Ok(path.map(Path::new)),
    }
}

/// A path.
///
/// # Safety
/// As for [`text`].
pub(super) unsafe fn path<'a>(pointer: *const c_char, parameter: &str) -> Result<&'a Path> {
    // SAFETY: as promised by the caller.
    unsafe { optional_path(pointer, parameter) }?.ok_or_else(|| null(parameter))
}

/// `count` elements; NULL is allowed where there are none.
///
/// # Safety
/// A non-NULL pointer leads to `count` valid elements that nobody writes during the call.
pub(super) unsafe fn slice<'a, T>(pointer: *const T, count: usize, parameter: &str) -> Result<&'a [T]> {
    if count == 0 {
        return Ok(&[]);
    }
    check(pointer, parameter)?;
    if count.checked_mul(size_of::<T>()).is_none_or(|bytes| bytes > isize::MAX as usize) {
        return Err(Error::invalid_argument(format!("{parameter}: {count} elements do not fit into memory")));
    }
    // SAFETY: not NULL, aligned, no longer than an object can be, valid by the caller's word.
    Ok(unsafe { std::slice::from_raw_parts(pointer, count) })
}

/// Where a result goes.
pub(super) struct Out<T>(*mut T);

impl<T> Out<T> {
    /// Writes the result. Called last, so that a failed call leaves the caller's variable as it was.
    pub(super) fn set(self, value: T) {
        // SAFETY: checked and promised when this was made.
        unsafe { self.0.write(value) }
    }
}

/// A pointer to the caller's variable.
///
/// # Safety
/// A non-NULL pointer leads to memory for a `T` that nobody else uses during the call.
pub(super) unsafe fn out<T>(pointer: *mut T, parameter: &str) -> Result<Out<T>> {
    check(pointer, parameter)?;
    Ok(Out(pointer))
}

/// Reads an option struct of this or another version: NULL stands for the defaults, a shorter struct is filled up with
/// them, and a longer one must hold zeros where this version knows no field.
///
/// # Safety
/// A non-NULL pointer leads to a `size_t` and as many bytes in all as it says.
pub(super) unsafe fn options<T: Versioned>(pointer: *const T, parameter: &str) -> Result<T> {
    let mut value = T::default();
    if pointer.is_null() {
        return Ok(value);
    }
    // SAFETY: as promised by the caller.
    let size = unsafe { struct_size::<T>(pointer, parameter) }?;
    let known = size.min(size_of::<T>());
    // SAFETY: `size` bytes are there by the caller's word, and any bytes are a valid `T`.
    unsafe { std::ptr::copy_nonoverlapping(pointer.cast::<u8>(), (&raw mut value).cast::<u8>(), known) };
    // SAFETY: as above; the part beyond this version's struct.
    let rest = unsafe { std::slice::from_raw_parts(pointer.cast::<u8>().add(known), size - known) };
    if let Some(at) = rest.iter().position(|&byte| byte != 0) {
        return Err(Error::unsupported(format!(
            "{parameter}: a field at byte {} is set, but this version of the library knows {} bytes",
            known + at,
            size_of::<T>()
        )));
    }
    Ok(value)
}

/// The checked `struct_size` of what a pointer leads to.
unsafe fn struct_size<T: Versioned>(pointer: *const T, parameter: &str) -> Result<usize> {
    check(pointer, parameter)?;
    // SAFETY: the struct begins with a `usize` (promised by the trait) and the pointer is aligned.
    let size = unsafe { pointer.cast::<usize>().read() };
    if !(T::FIRST_SIZE..=MAX_STRUCT_SIZE).contains(&size) {
        return Err(Error::invalid_argument(format!(
            "{parameter}: struct_size is {size}, which is not in {}..={MAX_STRUCT_SIZE}; fill it with the _INIT macro",
            T::FIRST_SIZE
        )));
    }
    Ok(size)
}

/// Where an information struct goes: as much of it as the caller's version has room for.
pub(super) struct OutInfo<T> {
    pointer: *mut T,
    size: usize,
}

impl<T: Versioned> OutInfo<T> {
    /// Writes the struct, keeping the caller's `struct_size` and zeroing what this version does not know.
    pub(super) fn set(self, value: T) {
        let known = self.size.min(size_of::<T>());
        let head = size_of::<usize>();
        // SAFETY: `size` bytes are there by the caller's word; the first field is the caller's.
        unsafe {
            let to = self.pointer.cast::<u8>();
            std::ptr::copy_nonoverlapping((&raw const value).cast::<u8>().add(head), to.add(head), known - head);
            std::ptr::write_bytes(to.add(known), 0, self.size - known);
        }
    }
}

/// A pointer to the caller's information struct, whose `struct_size` is filled in.
///
/// # Safety
/// A non-NULL pointer leads to a `size_t` and as many writable bytes in all as it says.
pub(super) unsafe fn out_info<T: Versioned>(pointer: *mut T, parameter: &str) -> Result<OutInfo<T>> {
    // SAFETY: as promised by the caller.
    let size = unsafe { struct_size::<T>(pointer, parameter) }?;
    Ok(OutInfo { pointer, size })
}

/// Text that an object keeps for C; a NUL inside would end it early and is left out.
pub(super) fn c_text(text: &str) -> CString {
    CString::new(text.replace('\0', "")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Status;

    #[repr(C)]
    #[derive(Clone, Copy, Debug, PartialEq)]
    struct Small {
        struct_size: usize,
        steps: u64,
    }

    impl Default for Small {
        fn default() -> Self {
            Self { struct_size: size_of::<Self>(), steps: 25 }
        }
    }

    // SAFETY: repr(C), begins with its size, holds only integers.
    unsafe impl Versioned for Small {
        const FIRST_SIZE: usize = 8;
    }

    #[repr(C)]
    struct Large {
        small: Small,
        extra: u64,
    }

    fn read(large: &Large) -> Result<Small> {
        // SAFETY: the struct is as long as it says in each test.
        unsafe { options((&raw const *large).cast::<Small>(), "options") }
    }

    #[test]
    fn structs_of_older_and_newer_versions_are_read() {
        let small = |struct_size, steps| Small { struct_size, steps };
        // SAFETY: NULL is allowed.
        assert_eq!(unsafe { options::<Small>(std::ptr::null(), "options") }.unwrap().steps, 25);
        assert_eq!(read(&Large { small: small(8, 7), extra: 0 }).unwrap().steps, 25);
        assert_eq!(read(&Large { small: small(16, 7), extra: 9 }).unwrap().steps, 7);
        assert_eq!(read(&Large { small: small(24, 7), extra: 0 }).unwrap().steps, 7);
        let newer = read(&Large { small: small(24, 7), extra: 9 }).unwrap_err();
        assert_eq!(newer.status(), Status::Unsupported);
        for size in [0, 7, MAX_STRUCT_SIZE + 1, usize::MAX] {
            assert_eq!(read(&Large { small: small(size, 7), extra: 0 }).unwrap_err().status(), Status::InvalidArgument);
        }
    }

    #[test]
    fn an_information_struct_keeps_the_callers_size() {
        let mut large = Large { small: Small { struct_size: 24, steps: 1 }, extra: 5 };
        // SAFETY: 24 bytes are there.
        unsafe { out_info((&raw mut large).cast::<Small>(), "info") }.unwrap().set(Small { struct_size: 16, steps: 3 });
        assert_eq!((large.small.struct_size, large.small.steps, large.extra), (24, 3, 0));
    }
}
