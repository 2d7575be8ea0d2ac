//! Everything that asks the operating system directly, in one place, so that another system is one file.
//!
//! Linux x86-64 is what is tested. Nothing here knows ONNX, models or ONNX Runtime.

use std::ffi::{CStr, CString, OsStr, OsString, c_char, c_void};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Component, Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

/// What tells one state of a file from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct FileIdentity {
    pub device: u64,
    pub inode: u64,
    pub size: u64,
    /// Nanoseconds since 1970 of the last change to the contents.
    pub modified: i128,
}

impl FileIdentity {
    pub(crate) fn of(metadata: &std::fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec()),
        }
    }

    /// The same file, whatever its present contents.
    pub(crate) fn is_same_file(&self, other: &Self) -> bool {
        (self.device, self.inode) == (other.device, other.inode)
    }
}

/// Fills `target` with the bytes of a file from `offset` on, wherever the file stands.
pub(crate) fn read_exact_at(file: &File, target: &mut [u8], offset: u64) -> io::Result<()> {
    file.read_exact_at(target, offset)
}

/// Writes a file in one piece: to a temporary file beside it, synchronised, then renamed. On failure what was at `path`
/// stays as it was.
pub(crate) fn replace_file(path: &Path, bytes: &[u8]) -> io::Result<()> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let Some(name) = path.file_name() else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the path names no file"));
    };
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut temporary = OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{}-{}.tmp", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
    let temporary = folder.join(temporary);
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    })();
    if written.is_err() {
        _ = fs::remove_file(&temporary);
    }
    written?;
    // The rename itself is on the disk once the folder is; some file systems cannot synchronise folders.
    _ = File::open(folder).and_then(|folder| folder.sync_all());
    Ok(())
}

/// Nanoseconds since 1970 of the last change to a file's contents, names or rights. Programs can't set it.
pub(crate) fn change_time(metadata: &std::fs::Metadata) -> i128 {
    i128::from(metadata.ctime()) * 1_000_000_000 + i128::from(metadata.ctime_nsec())
}

/// How many directory entries lead to a file.
pub(crate) fn hard_links(metadata: &std::fs::Metadata) -> u64 {
    metadata.nlink()
}

/// A directory that was opened once: what it names stays the same when its path is renamed or replaced.
#[derive(Debug)]
pub(crate) struct Directory {
    fd: OwnedFd,
    path: PathBuf,
}

impl Directory {
    /// Opens a directory by its canonical path.
    pub(crate) fn open(canonical: &Path) -> io::Result<Self> {
        let fd = open_at(libc::AT_FDCWD, canonical.as_os_str(), libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW)?;
        Ok(Self { fd, path: canonical.to_owned() })
    }

    /// The canonical path that it was opened by.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Opens a regular file below this directory for reading, following no symbolic link on the way, so that nothing
    /// that is swapped in meanwhile leads elsewhere. Anything but a regular file that `accept` allows is refused without
    /// opening it, and opening never blocks.
    pub(crate) fn open_file(
        &self,
        relative: &Path,
        accept: impl Fn(&std::fs::Metadata) -> io::Result<()>,
    ) -> io::Result<File> {
        let mut names = Vec::new();
        for component in relative.components() {
            match component {
                Component::Normal(name) => names.push(name),
                _ => return Err(invalid_input("not a plain relative path")),
            }
        }
        let Some((file_name, folders)) = names.split_last() else {
            return Err(invalid_input("an empty path"));
        };
        let mut folder: Option<OwnedFd> = None;
        for name in folders {
            let at = folder.as_ref().unwrap_or(&self.fd).as_raw_fd();
            folder = Some(open_at(at, name, libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW)?);
        }
        let at = folder.as_ref().unwrap_or(&self.fd).as_raw_fd();
        // Looked at before it is opened: opening a device may already do something.
        let seen = File::from(open_at(at, file_name, libc::O_PATH | libc::O_NOFOLLOW)?).metadata()?;
        refuse_unless_regular(&seen).and_then(|()| accept(&seen))?;
        let flags = libc::O_RDONLY | libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
        let file = File::from(open_at(at, file_name, flags)?);
        let opened = file.metadata()?;
        refuse_unless_regular(&opened).and_then(|()| accept(&opened))?;
        Ok(file)
    }
}

/// Opens a regular file for reading. Symbolic links are followed; anything but a regular file is refused without
/// reading from it, and opening never blocks.
pub(crate) fn open_regular_file(path: &Path) -> io::Result<File> {
    refuse_unless_regular(&std::fs::metadata(path)?)?;
    let flags = libc::O_RDONLY | libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = File::from(open_at(libc::AT_FDCWD, path.as_os_str(), flags)?);
    refuse_unless_regular(&file.metadata()?)?;
    Ok(file)
}

/// Makes the entries of a folder durable, so that a file renamed into it is still there after a power cut.
pub(crate) fn sync_folder(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

fn refuse_unless_regular(metadata: &std::fs::Metadata) -> io::Result<()> {
    if metadata.is_file() {
        return Ok(());
    }
    let kind = metadata.file_type();
    Err(invalid_input(if kind.is_dir() {
        "a directory, not a regular file"
    } else if kind.is_symlink() {
        "a symbolic link, not a regular file"
    } else {
        "a device, pipe or socket, not a regular file"
    }))
}

fn open_at(directory: libc::c_int, name: &OsStr, flags: libc::c_int) -> io::Result<OwnedFd> {
    let name = CString::new(name.as_bytes()).map_err(|_| invalid_input("a path that holds a NUL byte"))?;
    // SAFETY: `name` is a NUL-terminated string that outlives the call; `openat` reads nothing else of ours.
    let fd = unsafe { libc::openat(directory, name.as_ptr(), flags | libc::O_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so `fd` is open and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn invalid_input(message: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

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

/// A path in the form that C functions take, without the NUL at its end.
pub(crate) fn path_bytes(path: &Path) -> &[u8] {
    path.as_os_str().as_bytes()
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

/// The processor's name and what it can do, as text: equal texts run the same kernels.
pub(crate) fn cpu_description() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let first = text.split("\n\n").next().unwrap_or_default();
    let lines =
        first.lines().filter(|line| ["model name", "flags", "Features"].iter().any(|key| line.starts_with(key)));
    lines.collect::<Vec<_>>().join("\n") + std::env::consts::ARCH
}

/// Makes a folder that only this user can enter. Fails if there is something of that name.
pub(crate) fn create_private_folder(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().mode(0o700).create(path)
}

unsafe extern "C" {
    static environ: AtomicPtr<*const c_char>;
}

/// Runs `body` in an environment with one more variable, `NAME=value`, unless the host has set it itself.
///
/// `setenv` would free memory that another thread may be reading. Here `environ` points to a copy for the time being,
/// which is never freed, and then back to where it pointed; a thread that changes the environment meanwhile keeps its
/// change and, with it, the variable.
pub(crate) fn with_variable<T>(variable: &'static CStr, body: impl FnOnce() -> T) -> T {
    let name = variable.to_bytes().split(|byte| *byte == b'=').next().unwrap_or_default();
    if std::env::var_os(OsStr::from_bytes(name)).is_some() {
        return body();
    }
    // SAFETY: libc's variable, as large and as aligned as a pointer; others read and write it as one word.
    let place = unsafe { &environ };
    let before = place.load(Ordering::SeqCst);
    let mut entries = Vec::new();
    let mut at = before;
    // SAFETY: NULL, or an array of strings that a NULL ends.
    while let Some(entry) = NonNull::new(at).map(|at| unsafe { *at.as_ptr() }).filter(|entry| !entry.is_null()) {
        entries.push(entry);
        at = at.wrapping_add(1);
    }
    entries.extend([variable.as_ptr(), std::ptr::null()]);
    // Another thread may still read it long after: leaked, once in a process.
    let during = Box::leak(entries.into_boxed_slice()).as_mut_ptr();
    place.store(during, Ordering::SeqCst);
    let result = body();
    let _ = place.compare_exchange(during, before, Ordering::SeqCst, Ordering::SeqCst);
    result
}
