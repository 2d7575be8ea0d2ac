//! Everything that asks the operating system directly, in one place, so that another system is one file.
//!
//! Linux x86-64 is what is tested. Nothing here knows ONNX, models or ONNX Runtime.

use std::ffi::{CStr, CString, OsStr, c_void};
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;

/// Says why a file can't be a shared library for this process, before the loader maps (and may crash on) it.
///
/// Checks that it is a regular file, the ELF magic, class, byte order, type and machine, and that every loadable
/// segment and the section table lie inside the file.
pub(crate) fn check_shared_library(path: &Path) -> Result<(), String> {
    const HEADER: usize = 64;
    const PROGRAM_HEADER: usize = 56;
    const CLASS_64: u8 = 2;
    const LITTLE_ENDIAN: u8 = 1;
    const TYPE_SHARED: u16 = 3;
    const SEGMENT_LOAD: u32 = 1;
    #[cfg(target_arch = "x86_64")]
    const MACHINE: (u16, &str) = (62, "x86-64");
    #[cfg(target_arch = "aarch64")]
    const MACHINE: (u16, &str) = (183, "AArch64");

    let metadata = std::fs::metadata(path).map_err(|error| error.to_string())?;
    if !metadata.is_file() {
        return Err("it is not a regular file".into());
    }
    let length = metadata.len();
    if length == 0 {
        return Err("it is empty".into());
    }
    let mut file = File::open(path).map_err(|error| error.to_string())?;
    let mut header = [0; HEADER];
    file.read_exact(&mut header[..4.min(length as usize)]).map_err(|error| error.to_string())?;
    if header[..4] != *b"\x7fELF" {
        return Err("it is not an ELF shared library".into());
    }
    if file.read_exact(&mut header[4..]).is_err() {
        return Err(format!("it is truncated: {length} bytes do not hold an ELF header"));
    }
    let u16_at = |bytes: &[u8], at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
    let u64_at = |bytes: &[u8], at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
    if header[4] != CLASS_64 || header[5] != LITTLE_ENDIAN {
        return Err(format!(
            "it is built for another architecture (ELF class {}, byte order {}; needed: 64-bit little-endian)",
            header[4], header[5]
        ));
    }
    let machine = u16_at(&header, 18);
    if machine != MACHINE.0 {
        return Err(format!(
            "it is built for another architecture (ELF machine {machine}; needed: {}, {})",
            MACHINE.0, MACHINE.1
        ));
    }
    if u16_at(&header, 16) != TYPE_SHARED {
        return Err("it is an ELF file but not a shared library".into());
    }
    let segments = u64_at(&header, 32);
    let segment_count = usize::from(u16_at(&header, 56));
    if segment_count == 0 || usize::from(u16_at(&header, 54)) != PROGRAM_HEADER {
        return Err("it has no valid program headers".into());
    }
    let mut table = vec![0; segment_count * PROGRAM_HEADER];
    let truncated = |what: &str, needed: u64| format!("it is truncated: {what} ends at byte {needed} of {length}");
    if file.read_exact_at(&mut table, segments).is_err() {
        return Err(truncated("its program header table", segments.saturating_add(table.len() as u64)));
    }
    for segment in table.chunks_exact(PROGRAM_HEADER) {
        let end = u64_at(segment, 8).saturating_add(u64_at(segment, 32));
        if u32::from_le_bytes(std::array::from_fn(|i| segment[i])) == SEGMENT_LOAD && end > length {
            return Err(truncated("a segment", end));
        }
    }
    let sections_end =
        u64_at(&header, 40).saturating_add(u64::from(u16_at(&header, 58)) * u64::from(u16_at(&header, 60)));
    if sections_end > length {
        return Err(truncated("its section table", sections_end));
    }
    Ok(())
}

/// A shared library that this process opened. Dropping it does *not* close it: code of it may still run.
#[derive(Debug)]
pub(crate) struct SharedLibrary(NonNull<c_void>);

// SAFETY: a handle of `dlopen` may be used from any thread.
unsafe impl Send for SharedLibrary {}
// SAFETY: as above; `dlsym` is thread-safe.
unsafe impl Sync for SharedLibrary {}

impl SharedLibrary {
    /// Opens a library by absolute path; its symbols stay invisible to others, and all of its own are resolved now.
    pub(crate) fn open(path: &Path) -> Result<Self, String> {
        if !path.is_absolute() {
            return Err(format!("{} is not an absolute path", path.display()));
        }
        let name = CString::new(path.as_os_str().as_bytes()).map_err(|_| "the path holds a NUL byte".to_string())?;
        Self::open_named(&name)
    }

    /// Opens a library that the loader finds by its name, e.g. a driver's.
    pub(crate) fn open_by_name(name: &CStr) -> Result<Self, String> {
        Self::open_named(name)
    }

    fn open_named(name: &CStr) -> Result<Self, String> {
        // SAFETY: `name` is NUL-terminated. Constructors of the library run: that is what loading it means.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        NonNull::new(handle).map(Self).ok_or_else(|| {
            // SAFETY: after a failed `dlopen`, `dlerror` gives a NUL-terminated text of this thread, or NULL.
            let text = unsafe { libc::dlerror() };
            if text.is_null() {
                return "the loader gives no reason".to_string();
            }
            // SAFETY: not NULL; valid until the next `dl*` call of this thread.
            unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
        })
    }

    /// The address of a symbol, if the library has it.
    pub(crate) fn symbol(&self, name: &CStr) -> Option<NonNull<c_void>> {
        // SAFETY: the handle is open, the name NUL-terminated.
        NonNull::new(unsafe { libc::dlsym(self.0.as_ptr(), name.as_ptr()) })
    }

    /// Gives the library back to the loader. Nothing obtained from it may be used afterwards.
    pub(crate) fn close(self) {
        // SAFETY: the handle is open and is given up here.
        unsafe { libc::dlclose(self.0.as_ptr()) };
    }
}

/// The file that the code or data at an address was loaded from.
pub(crate) fn file_of_address(address: *const c_void) -> Option<PathBuf> {
    // SAFETY: an all-zero `Dl_info` is valid.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: `dladdr` only compares the address; `info` is writable.
    let found = unsafe { libc::dladdr(address, &mut info) } != 0;
    if !found || info.dli_fname.is_null() {
        return None;
    }
    // SAFETY: `dladdr` gave a NUL-terminated path that lives while the object is loaded.
    let name = unsafe { CStr::from_ptr(info.dli_fname) };
    std::fs::canonicalize(OsStr::from_bytes(name.to_bytes())).ok()
}

/// Memory of this process in RAM, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ResidentMemory {
    pub(crate) current: u64,
    pub(crate) peak: u64,
}

/// How much RAM this process uses now and used at most, or `None` where the system doesn't say.
pub(crate) fn resident_memory() -> Option<ResidentMemory> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let field = |name: &str| -> Option<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    };
    Some(ResidentMemory { current: field("VmRSS:")?, peak: field("VmHWM:")? })
}

/// A folder for data that programs of this user share.
pub(crate) fn user_data_folder() -> Option<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_DATA_HOME").or_else(|| Some(absolute("HOME")?.join(".local/share")))
}
