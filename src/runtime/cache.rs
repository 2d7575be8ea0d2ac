//! Optimised graphs kept from session to session, since rewriting a large graph costs most of a session's start.
//!
//! An entry is a folder named by a SHA-256 over everything that decides the optimised graph. It holds the graph, its
//! weights in one file, and a manifest that is written last. An entry appears by renaming a finished folder, so that
//! any number of processes may share a cache; one that does not agree with its manifest is thrown away and made anew.
//! Nothing here knows ONNX Runtime beyond the names of its settings.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::library::Loaded;
use super::provider::Provider;
use super::session::{RawOptions, SessionOptions};
use crate::error::{Error, Result};
use crate::onnx::Model;
use crate::os::{self, FileIdentity};

const GRAPH: &str = "model.onnx";
const WEIGHTS: &str = "weights.bin";
const MANIFEST: &str = "manifest.json";
/// Unfinished and thrown-away folders begin with this.
const PARTIAL: &str = ".partial-";
/// Unfinished folders older than this belong to nobody.
const ABANDONED: Duration = Duration::from_secs(24 * 3600);
/// Changes when entries are written in another way.
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Manifest {
    version: u32,
    graph_sha256: String,
    files: Vec<Entry>,
}

/// What a file was when the entry was finished. Its change time can't be set by programs, so that equal figures mean
/// that nobody wrote the file since, and gigabytes need not be read to know it.
#[derive(Serialize, Deserialize, PartialEq, Eq)]
struct Entry {
    name: String,
    size: u64,
    inode: u64,
    modified: String,
    changed: String,
}

impl Entry {
    fn of(folder: &Path, name: &str) -> std::io::Result<Self> {
        let metadata = fs::symlink_metadata(folder.join(name))?;
        let identity = FileIdentity::of(&metadata);
        Ok(Self {
            name: name.into(),
            size: identity.size,
            inode: identity.inode,
            modified: identity.modified.to_string(),
            changed: os::change_time(&metadata).to_string(),
        })
    }
}

/// Where the optimised graph of one model, provider and set of options is kept.
pub(super) struct Slot {
    cache: PathBuf,
    folder: PathBuf,
}

impl Slot {
    /// `bytes` is the serialized model as the session gets it.
    pub(super) fn new(
        cache: &Path,
        loaded: &Loaded,
        model: &Model,
        bytes: &[u8],
        provider: &Provider,
        options: &SessionOptions,
    ) -> Result<Self> {
        fs::create_dir_all(cache).map_err(|error| Error::io(format!("create {}", cache.display()), error))?;
        let cache = fs::canonicalize(cache).map_err(|error| Error::io(format!("open {}", cache.display()), error))?;
        let mut hash = Sha256::new();
        let mut part = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        part(&VERSION.to_le_bytes());
        part(bytes);
        for file in model.external_files() {
            part(file.path().as_os_str().as_encoded_bytes());
            part(format!("{} {:?}", file.size(), file.identity()).as_bytes());
        }
        part(loaded.version.as_bytes());
        part(loaded.build().as_bytes());
        part(format!("{provider:?} {:?} {}", options.optimization, options.deterministic).as_bytes());
        part(os::cpu_description().as_bytes());
        let name: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { folder: cache.join(name), cache })
    }

    /// The optimised graph, checked against its manifest, with the folder of its weights. A damaged one is removed.
    pub(super) fn read(&self) -> Option<(Bytes, PathBuf)> {
        if !self.folder.exists() {
            return None;
        }
        match self.checked() {
            Ok(bytes) => {
                // The time of last use; not worth failing for.
                let _ = File::options()
                    .write(true)
                    .open(self.folder.join(MANIFEST))
                    .and_then(|manifest| manifest.set_modified(SystemTime::now()));
                Some((bytes, self.folder.clone()))
            }
            Err(reason) => {
                self.discard(&reason);
                None
            }
        }
    }

    fn checked(&self) -> Result<Bytes, String> {
        let text = |error: std::io::Error| error.to_string();
        let manifest = fs::read(self.folder.join(MANIFEST)).map_err(text)?;
        let manifest: Manifest = serde_json::from_slice(&manifest).map_err(|error| error.to_string())?;
        if manifest.version != VERSION || manifest.files.iter().all(|entry| entry.name != GRAPH) {
            return Err("its manifest is of another kind".into());
        }
        for entry in &manifest.files {
            if ![GRAPH, WEIGHTS].contains(&entry.name.as_str()) {
                return Err(format!("its manifest names {:?}", entry.name));
            }
            if Entry::of(&self.folder, &entry.name).map_err(text)? != *entry {
                return Err(format!("{} was changed", entry.name));
            }
        }
        let graph = fs::read(self.folder.join(GRAPH)).map_err(text)?;
        if hex(&graph) != manifest.graph_sha256 {
            return Err(format!("{GRAPH} does not have its checksum"));
        }
        Ok(graph.into())
    }

    /// Removes the entry, because of `reason`.
    pub(super) fn discard(&self, reason: &str) {
        log::warn!(target: "macula::runtime", "cached graph {} is made anew: {reason}", self.folder.display());
        let aside = self.cache.join(partial_name());
        if fs::rename(&self.folder, &aside).is_ok() {
            let _ = fs::remove_dir_all(aside);
        }
    }

    /// Begins a new entry.
    pub(super) fn write(&self) -> Result<Writing<'_>> {
        let folder = self.cache.join(partial_name());
        os::create_private_folder(&folder).map_err(|error| Error::io(format!("create {}", folder.display()), error))?;
        Ok(Writing { slot: self, folder })
    }
}

/// An entry in the making. Dropping it removes what is there.
pub(super) struct Writing<'a> {
    slot: &'a Slot,
    folder: PathBuf,
}

impl Writing<'_> {
    /// Lets the session that is made with these options write its optimised graph.
    pub(super) fn configure(&self, options: &RawOptions) -> Result<()> {
        options.set_optimized_model_path(&self.folder.join(GRAPH))?;
        // Beside the graph, since one message can't hold 2 GiB, and since files are mapped instead of copied.
        options.set("session.optimized_model_external_initializers_file_name", WEIGHTS)?;
        options.set("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    }

    /// Makes the entry visible once the session has written it.
    pub(super) fn finish(self, limit: u64) -> Result<()> {
        let io = |what: &str, error| Error::io(format!("{what} {}", self.folder.display()), error);
        let graph = fs::read(self.folder.join(GRAPH)).map_err(|error| io("read the graph in", error))?;
        let mut files = Vec::new();
        for name in [GRAPH, WEIGHTS] {
            if self.folder.join(name).exists() {
                let file = File::open(self.folder.join(name)).map_err(|error| io("open files in", error))?;
                file.sync_all().map_err(|error| io("flush files in", error))?;
                files.push(Entry::of(&self.folder, name).map_err(|error| io("look at", error))?);
            }
        }
        let manifest = Manifest { version: VERSION, graph_sha256: hex(&graph), files };
        let text = serde_json::to_vec_pretty(&manifest)
            .map_err(|error| Error::invalid_argument(format!("the cache's manifest: {error}")))?;
        let write = |name: &Path| -> std::io::Result<()> {
            let mut file = File::create(name)?;
            file.write_all(&text)?;
            file.sync_all()
        };
        write(&self.folder.join(MANIFEST)).map_err(|error| io("write the manifest in", error))?;
        // Fails if another writer was faster: then its entry stands, and this one is removed on drop.
        if fs::rename(&self.folder, &self.slot.folder).is_ok() {
            let _ = File::open(&self.slot.cache).and_then(|folder| folder.sync_all());
            trim(&self.slot.cache, limit, &self.slot.folder);
        }
        Ok(())
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        // After a successful rename there is nothing by this name.
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Removes abandoned folders, and the entries that were not used for longest, until the others fit in `limit` bytes.
/// `keep` stays.
fn trim(cache: &Path, limit: u64, keep: &Path) {
    let Ok(folders) = fs::read_dir(cache) else { return };
    let mut entries = Vec::new();
    for folder in folders.filter_map(|folder| Some(folder.ok()?.path())) {
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let age = |path: &Path| path.metadata().and_then(|metadata| metadata.modified());
        if name.starts_with(PARTIAL) {
            let abandoned = age(&folder).is_ok_and(|time| time.elapsed().is_ok_and(|age| age > ABANDONED));
            if abandoned {
                let _ = fs::remove_dir_all(&folder);
            }
        } else if name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            let used = age(&folder.join(MANIFEST)).unwrap_or(SystemTime::UNIX_EPOCH);
            let size = |name| folder.join(name).metadata().map_or(0, |metadata| metadata.len());
            entries.push((folder == keep, used, size(GRAPH) + size(WEIGHTS), folder));
        }
    }
    let mut total: u64 = entries.iter().map(|(.., bytes, _)| bytes).sum();
    entries.sort();
    for (kept, _, bytes, folder) in entries {
        if total <= limit || kept {
            break;
        }
        if fs::remove_dir_all(&folder).is_ok() {
            total -= bytes;
        }
    }
}

fn partial_name() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    format!("{PARTIAL}{}-{}-{}", std::process::id(), now.as_nanos(), NEXT.fetch_add(1, Ordering::Relaxed))
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}
