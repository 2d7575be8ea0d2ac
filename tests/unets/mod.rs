//! Exported UNets for tests: made by `tests/python/export_unets.py` when first asked for, kept under `target/fixtures`.

#![allow(dead_code)]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};

/// A tensor of a fixture: element type, shape and little-endian data.
pub struct Stored {
    pub dtype: safetensors::Dtype,
    pub shape: Vec<usize>,
    pub data: Vec<u8>,
}

/// Every tensor of a safetensors file by name.
pub fn tensors(path: &Path) -> BTreeMap<String, Stored> {
    let data = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let file = safetensors::SafeTensors::deserialize(&data).unwrap();
    let stored = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
        (name, Stored { dtype: view.dtype(), shape: view.shape().to_vec(), data: view.data().to_vec() })
    };
    file.tensors().into_iter().map(stored).collect()
}

/// The Python that has the packages of `tests/python/requirements.txt`.
pub fn python() -> PathBuf {
    PathBuf::from(std::env::var_os("MACULA_PYTHON").expect(
        "MACULA_PYTHON is not set: run the tests with `cargo xtask test`, or take the value from `cargo xtask setup`",
    ))
}

/// The folders of the fixtures with these keys. One process at a time makes them, so that parallel tests do not make
/// the same one twice. Where several are missing it makes all that there are but the full-size one: some take ten times as
/// long as others, and the cores are busy to the end only with many of them.
pub fn folders(keys: &[&str]) -> Vec<PathBuf> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/export_unets.py");
    let mut hash = Sha256::new();
    hash.update(fs::read(&script).unwrap());
    hash.update(fs::read(script.with_file_name("requirements.txt")).unwrap());
    let version: String = hash.finalize().iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/fixtures").join(format!("unets-{version}"));
    fs::create_dir_all(&root).unwrap();

    let lock = File::create(root.join(".lock")).unwrap();
    lock.lock().unwrap();
    let missing: Vec<&str> = keys.iter().copied().filter(|key| !root.join(key).exists()).collect();
    if !missing.is_empty() {
        let all = (missing.len() > 1).then_some("all");
        let run =
            Command::new(python()).arg(&script).arg("--out").arg(&root).args(&missing).args(all).output().unwrap();
        // Another one that can't be made is for the tests that ask for it.
        let made = missing.iter().all(|key| root.join(key).exists());
        assert!(made, "{}: {}", script.display(), String::from_utf8_lossy(&run.stderr));
    }
    keys.iter().map(|key| root.join(key)).collect()
}
