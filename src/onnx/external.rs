//! External data: which files a model's tensors may name, how those files are opened, and how they are read.
//!
//! A location is resolved once, when the model is opened. Its canonical target must be a regular file inside one of the
//! allowed folders; links on the way are followed only if they end there. From then on the file is opened below the
//! folder's own descriptor with no link followed, and must still be the same file with the same size and time, so
//! nothing that is swapped in later can be read. Must not know graphs.

use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::limits::Limits;
use super::proto::TensorProto;
use crate::error::{Error, Result, Status};
use crate::os::{self, Directory, FileIdentity};

/// A regular file inside an allowed folder, as it was when the model was opened.
#[derive(Debug)]
pub struct ExternalFile {
    location: String,
    relative: PathBuf,
    root: Arc<Directory>,
    identity: FileIdentity,
}

impl ExternalFile {
    /// The location as the model writes it: a path relative to the model's folder.
    pub fn location(&self) -> &str {
        &self.location
    }

    /// The canonical path of the file.
    pub fn path(&self) -> PathBuf {
        self.root.path().join(&self.relative)
    }

    /// Bytes of the file.
    pub fn size(&self) -> u64 {
        self.identity.size
    }

    /// Inode, device and time of the last change in nanoseconds: with [`ExternalFile::size`] and
    /// [`ExternalFile::path`] what a cache needs to know the contents by.
    pub fn identity(&self) -> (u64, u64, i128) {
        (self.identity.inode, self.identity.device, self.identity.modified)
    }

    /// [`Status::InvalidFile`] unless the path still leads to the file that was checked, unchanged, with no link on
    /// the way.
    pub fn verify(&self) -> Result<()> {
        self.open().map(drop)
    }

    pub(super) fn open(&self) -> Result<File> {
        let unchanged = |metadata: &Metadata| match FileIdentity::of(metadata) == self.identity {
            true => Ok(()),
            false => Err(io::ErrorKind::InvalidData.into()),
        };
        self.root.open_file(&self.relative, unchanged).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => self.changed(),
            _ => self.unreadable(error),
        })
    }

    pub(super) fn check_unchanged(&self, file: &File) -> Result<()> {
        let metadata = file.metadata().map_err(|error| self.unreadable(error))?;
        if FileIdentity::of(&metadata) == self.identity { Ok(()) } else { Err(self.changed()) }
    }

    fn changed(&self) -> Error {
        Error::invalid_file(format!(
            "external data {:?} ({}) has changed since the model was opened: open the model again",
            self.location,
            self.path().display()
        ))
    }

    pub(super) fn is(&self, identity: &FileIdentity) -> bool {
        self.identity.is_same_file(identity)
    }

    fn unreadable(&self, error: io::Error) -> Error {
        Error::io(format_args!("reading external data {:?} ({})", self.location, self.path().display()), error)
    }

    fn read_exact_at(&self, target: &mut [u8], offset: u64) -> Result<()> {
        let file = self.open()?;
        match os::read_exact_at(&file, target, offset) {
            Ok(()) => self.check_unchanged(&file),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                self.check_unchanged(&file)?;
                Err(self.unreadable(error))
            }
            Err(error) => Err(self.unreadable(error)),
        }
    }
}

/// The part of an external file that is one tensor's data.
#[derive(Clone, Debug)]
pub struct ExternalData {
    /// The file.
    pub file: Arc<ExternalFile>,
    /// Where the data begins, in bytes.
    pub offset: u64,
    /// How long it is, in bytes; `offset + length` is at most the file's size.
    pub length: u64,
}

impl ExternalData {
    /// Reads the data into memory of exactly its length.
    pub(super) fn read_into(&self, target: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(target, self.offset)
    }
}

/// The external files of a model, by the location that its tensors name.
#[derive(Clone, Debug, Default)]
pub(super) struct ExternalFiles {
    files: BTreeMap<String, Arc<ExternalFile>>,
}

impl ExternalFiles {
    pub(super) fn iter(&self) -> impl Iterator<Item = &Arc<ExternalFile>> {
        self.files.values()
    }

    pub(super) fn get(&self, location: &str) -> Option<&Arc<ExternalFile>> {
        self.files.get(location)
    }

    /// Adds a file under a location that no other file has, and answers that location.
    pub(super) fn adopt(&mut self, file: &Arc<ExternalFile>) -> String {
        let mut location = file.location.clone();
        for attempt in 1u32.. {
            match self.files.get(&location) {
                Some(known) if known.path() == file.path() => return location,
                Some(_) => location = format!("{attempt}/{}", file.location),
                None => break,
            }
        }
        let adopted = ExternalFile {
            location: location.clone(),
            relative: file.relative.clone(),
            root: file.root.clone(),
            identity: file.identity,
        };
        self.files.insert(location.clone(), Arc::new(adopted));
        location
    }

    /// Forgets the files for which `used` is false.
    pub(super) fn retain(&mut self, mut used: impl FnMut(&str) -> bool) {
        self.files.retain(|location, _| used(location));
    }

    /// The checked external data of a tensor whose file is known already.
    pub(super) fn of(&self, tensor: &TensorProto, bytes: u64) -> Result<ExternalData> {
        let reference = Reference::of(tensor)?;
        let Some(file) = self.get(reference.location) else {
            return Err(Error::invalid_argument(format!(
                "tensor {:?}: {:?} is not one of the model's checked external files",
                tensor.name(),
                reference.location
            )));
        };
        reference.within(tensor, file.clone(), bytes)
    }
}

/// The folders in which a model's external data may lie.
pub(super) struct Roots<'l> {
    folder: PathBuf,
    roots: Vec<Arc<Directory>>,
    limits: &'l Limits,
}

impl<'l> Roots<'l> {
    /// The folder of a model, the folder in which the model file really lies if its path is a link (a Hugging Face
    /// cache links both model and data into one folder), and the extra roots.
    pub(super) fn new(folder: &Path, model: Option<&Path>, limits: &'l Limits) -> Result<Self> {
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        let mut paths = vec![canonical(folder)?];
        if let Some(model) = model
            && let Some(real) = canonical(model)?.parent()
        {
            paths.push(real.to_owned());
        }
        for root in &limits.extra_roots {
            paths.push(canonical(root)?);
        }
        paths.dedup();
        let open = |path: &PathBuf| {
            Directory::open(path)
                .map(Arc::new)
                .map_err(|error| Error::io(format_args!("opening the folder {}", path.display()), error))
        };
        let roots = paths.iter().map(open).collect::<Result<_>>()?;
        Ok(Self { folder: paths.swap_remove(0), roots, limits })
    }

    /// Checks the external data of a tensor, looking its file up or adding it to `files`.
    pub(super) fn check(&self, tensor: &TensorProto, bytes: u64, files: &mut ExternalFiles) -> Result<ExternalData> {
        let reference = Reference::of(tensor)?;
        let file = match files.get(reference.location) {
            Some(file) => file.clone(),
            None => {
                if files.files.len() >= self.limits.external_files {
                    return Err(Error::limit_exceeded(format!(
                        "tensor {:?}: the model names more than {} external files",
                        tensor.name(),
                        self.limits.external_files
                    )));
                }
                let file = self
                    .resolve(reference.location)
                    .map_err(|error| error.at(format_args!("tensor {:?}: external data", tensor.name())))?;
                let file = Arc::new(file);
                files.files.insert(reference.location.to_owned(), file.clone());
                file
            }
        };
        reference.within(tensor, file, bytes)
    }

    fn resolve(&self, location: &str) -> Result<ExternalFile> {
        check_location(location, self.limits)?;
        let path = self.folder.join(location);
        let target = path.canonicalize().map_err(|error| Error::io(format_args!("{location:?}"), error))?;
        let inside = self.roots.iter().find_map(|root| Some((root, target.strip_prefix(root.path()).ok()?)));
        let Some((root, relative)) = inside else {
            return Err(Error::invalid_file(format!(
                "{location:?} leads to {}, outside the allowed folders ({})",
                target.display(),
                self.roots.iter().map(|root| root.path().display().to_string()).collect::<Vec<_>>().join(", ")
            )));
        };
        // A link of this kind is told by its count only, and before it is opened.
        let alone = |metadata: &Metadata| match os::hard_links(metadata) {
            links if links > 1 && !self.limits.hard_links => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("a file with {links} hard links, expected one: copy it, or allow hard links"),
            )),
            _ => Ok(()),
        };
        let file = root.open_file(relative, alone).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidInput => Error::invalid_file(format!("{location:?} is {error}")),
            _ => Error::io(format_args!("{location:?}"), error),
        })?;
        let metadata = file.metadata().map_err(|error| Error::io(format_args!("{location:?}"), error))?;
        Ok(ExternalFile {
            location: location.to_owned(),
            relative: relative.to_owned(),
            root: root.clone(),
            identity: FileIdentity::of(&metadata),
        })
    }
}

/// What the entries of a tensor's `external_data` say, as text checked but not yet compared with a file.
struct Reference<'a> {
    location: &'a str,
    offset: u64,
    length: Option<u64>,
}

impl<'a> Reference<'a> {
    fn of(tensor: &'a TensorProto) -> Result<Self> {
        let invalid = |what: String| Error::invalid_file(format!("tensor {:?}: external data {what}", tensor.name()));
        let mut location = None;
        let mut offset = None;
        let mut length = None;
        let number = |key: &str, value: &str| {
            let digits = !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit());
            match value.parse::<u64>() {
                Ok(number) if digits && i64::try_from(number).is_ok() => Ok(number),
                _ => Err(invalid(format!("{key} is {value:?}, expected a decimal number below 2^63"))),
            }
        };
        for entry in &tensor.external_data {
            let value = entry.value();
            let repeated = match entry.key() {
                "location" => location.replace(value).is_some(),
                key @ "offset" => offset.replace(number(key, value)?).is_some(),
                key @ "length" => length.replace(number(key, value)?).is_some(),
                // `checksum` and what tools add say nothing about where the data lies.
                _ => false,
            };
            if repeated {
                return Err(invalid(format!("names {:?} twice", entry.key())));
            }
        }
        let location = location.ok_or_else(|| invalid("has no location".into()))?;
        Ok(Self { location, offset: offset.unwrap_or(0), length })
    }

    fn within(&self, tensor: &TensorProto, file: Arc<ExternalFile>, bytes: u64) -> Result<ExternalData> {
        let length = self.length.unwrap_or(bytes);
        if length != bytes {
            return Err(Error::invalid_file(format!(
                "tensor {:?}: external data has length {length}, its type and shape need {bytes}",
                tensor.name()
            )));
        }
        if self.offset.checked_add(length).is_none_or(|end| end > file.size()) {
            return Err(Error::invalid_file(format!(
                "tensor {:?}: external data at offset {} of length {length} lies outside {:?}, which has {} bytes",
                tensor.name(),
                self.offset,
                self.location,
                file.size()
            )));
        }
        Ok(ExternalData { file, offset: self.offset, length })
    }
}

/// Refuses locations that could mean different files to different readers, before the file system is asked.
fn check_location(location: &str, limits: &Limits) -> Result<()> {
    let refuse = |what: &str| Err(Error::invalid_file(format!("location {location:?} {what}")));
    let bytes = location.as_bytes();
    if bytes.is_empty() {
        return refuse("is empty");
    }
    if bytes.len() > limits.location_bytes {
        return Err(Error::limit_exceeded(format!(
            "a location has {} bytes, at most {} are allowed",
            bytes.len(),
            limits.location_bytes
        )));
    }
    if bytes.contains(&0) {
        return refuse("holds a NUL byte");
    }
    if location.chars().any(char::is_control) {
        return refuse("holds a control character");
    }
    if bytes.contains(&b'\\') {
        return refuse("holds a backslash");
    }
    if bytes[0] == b'/' {
        return refuse("is absolute, expected a path relative to the model's folder");
    }
    if bytes.len() >= 2 && bytes[0].is_ascii_alphabetic() && bytes[1] == b':' {
        return refuse("begins with a drive letter");
    }
    // ONNX Runtime's own mark for "the offset is an address in memory".
    if location.contains("_ORT_MEM_ADDR_") {
        return refuse("names memory, not a file");
    }
    if location.split('/').any(|part| part == "..") {
        return refuse("holds \"..\"");
    }
    if location.ends_with('/') || location.split('/').next_back() == Some(".") {
        return refuse("names a folder");
    }
    Ok(())
}

fn canonical(path: &Path) -> Result<PathBuf> {
    path.canonicalize().map_err(|error| Error::io(format_args!("{}", path.display()), error))
}

/// The whole contents of a model file, in owned memory.
pub(super) fn read_file(path: &Path, limits: &Limits) -> Result<Vec<u8>> {
    use std::io::Read;
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::InvalidInput => Error::invalid_file(format!("{} is {error}", path.display())),
        _ => Error::io(format_args!("reading {}", path.display()), error),
    };
    let file = os::open_regular_file(path).map_err(failed)?;
    let before = FileIdentity::of(&file.metadata().map_err(failed)?);
    if before.size > limits.file_bytes {
        return Err(Error::limit_exceeded(format!(
            "{} has {} bytes, at most {} are allowed (larger models keep their weights in external data)",
            path.display(),
            before.size,
            limits.file_bytes
        )));
    }
    let mut data = Vec::new();
    // One byte more than expected, so that reading on shows whether the file has grown.
    data.try_reserve_exact(usize::try_from(before.size).unwrap_or(usize::MAX).saturating_add(1))?;
    (&file).take(before.size + 1).read_to_end(&mut data).map_err(failed)?;
    let after = FileIdentity::of(&file.metadata().map_err(failed)?);
    if after != before || data.len() as u64 != before.size {
        return Err(Error::new(Status::InvalidFile, format!("{} changed while it was read", path.display())));
    }
    Ok(data)
}
