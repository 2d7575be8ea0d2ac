//! Files of a model folder. Names come from this library, never from a file; sizes are bounded before reading.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Error, Result};

/// The largest JSON file that is read, apart from tokenizers.
const MAX_JSON_BYTES: u64 = 16 << 20;

/// A folder that exists.
#[derive(Clone, Debug)]
pub(super) struct Folder {
    path: PathBuf,
}

impl Folder {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let metadata = std::fs::metadata(path).map_err(|e| Error::io(path.display(), e))?;
        if metadata.is_dir() {
            Ok(Self { path: path.to_owned() })
        } else {
            Err(Error::invalid_argument(format!("{} is not a folder", path.display())))
        }
    }

    /// The folder inside this one; `None` if nothing is there by that name. A link that leads nowhere is an error: the
    /// part was meant to be there.
    pub(super) fn inner(&self, name: &str) -> Result<Option<Self>> {
        let path = self.path.join(name);
        match std::fs::symlink_metadata(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io(path.display(), e)),
            Ok(_) => {}
        }
        let metadata = std::fs::metadata(&path).map_err(|e| Error::io(path.display(), e))?;
        if !metadata.is_dir() {
            return Err(Error::invalid_file(format!("{} is not a folder", path.display())));
        }
        Ok(Some(Self { path }))
    }

    /// The path of a file in here, there or not.
    pub(super) fn path(&self, file: &str) -> PathBuf {
        self.path.join(file)
    }

    /// For messages.
    pub(super) fn name(&self, file: &str) -> String {
        self.path(file).display().to_string()
    }

    /// The content of a file; `None` if it does not exist.
    pub(super) fn read(&self, file: &str, most: u64) -> Result<Option<Vec<u8>>> {
        use std::io::Read;
        let path = self.path(file);
        let metadata = match std::fs::metadata(&path) {
            Ok(metadata) => metadata,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io(path.display(), e)),
        };
        // Opening a pipe would wait for its writer.
        if !metadata.is_file() {
            return Err(Error::invalid_file(format!("{} is not a regular file", path.display())));
        }
        let opened = std::fs::File::open(&path).map_err(|e| Error::io(path.display(), e))?;
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(metadata.len().min(most) as usize)?;
        opened.take(most + 1).read_to_end(&mut bytes).map_err(|e| Error::io(path.display(), e))?;
        if bytes.len() as u64 > most {
            return Err(Error::limit_exceeded(format!("{} has more than {most} bytes", path.display())));
        }
        Ok(Some(bytes))
    }

    /// The object in a JSON file; `None` if the file does not exist.
    pub(super) fn json(&self, file: &str) -> Result<Option<Value>> {
        self.read(file, MAX_JSON_BYTES)?.map(|bytes| self.object(file, &bytes)).transpose()
    }

    /// The object that these bytes of a JSON file hold.
    pub(super) fn object(&self, file: &str, bytes: &[u8]) -> Result<Value> {
        match serde_json::from_slice(bytes) {
            Ok(object @ Value::Object(_)) => Ok(object),
            Ok(_) => Err(Error::invalid_file(format!("{} is not a JSON object", self.name(file)))),
            Err(e) => Err(Error::invalid_file(format!("{} is not JSON: {e}", self.name(file))).caused_by(e)),
        }
    }
}
