//! What several tests need: folders of files that a Python script made, and the ONNX Runtime library.
#![allow(dead_code, reason = "each test program uses its own part")]

use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};

/// The folder that `tests/python/<script>` made with `arguments` (the folder comes last on its command line).
///
/// Made once and kept under `target/fixtures`, named by a hash of the script and the arguments. Tests that need the same
/// folder wait for the one that makes it, in this process or another.
pub fn fixture(script: &str, arguments: &[&str]) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let scripts = root.join("tests/python");
    let mut hash = Sha256::new();
    hash.update(std::fs::read(scripts.join(script)).unwrap_or_else(|e| panic!("tests/python/{script}: {e}")));
    arguments.iter().for_each(|argument| hash.update(format!("\0{argument}")));
    let key: String = hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    let stem = script.trim_end_matches(".py");
    let folder = root.join("target/fixtures").join(format!("{stem}-{key}"));
    if folder.exists() {
        return folder;
    }
    std::fs::create_dir_all(root.join("target/fixtures")).unwrap();
    let lock = std::fs::File::create(folder.with_extension("lock")).unwrap();
    lock.lock().unwrap();
    if folder.exists() {
        return folder;
    }
    let building = tempfile::Builder::new().prefix(stem).tempdir_in(root.join("target/fixtures")).unwrap();
    let output = Command::new(interpreter())
        .arg(scripts.join(script))
        .args(arguments)
        .arg(building.path())
        .env("OMP_NUM_THREADS", "2")
        .output()
        .unwrap_or_else(|e| panic!("{script} did not start: {e}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script} {arguments:?} failed:\n{errors}");
    std::fs::rename(building.keep(), &folder).unwrap();
    folder
}

/// What `tests/python/<script>` writes to standard output.
pub fn python(script: &str, arguments: &[&str]) -> String {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let output = Command::new(interpreter())
        .arg(root.join("tests/python").join(script))
        .args(arguments)
        .env("OMP_NUM_THREADS", "2")
        .output()
        .unwrap_or_else(|e| panic!("{script} did not start: {e}"));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{script} {arguments:?} failed:\n{errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// The Python that has the packages of `tests/python/requirements.txt` and `tools.txt`.
pub fn interpreter() -> PathBuf {
    required("MACULA_PYTHON", "a Python interpreter with tests/python/requirements.txt")
}

/// The ONNX Runtime library that tests run with.
pub fn onnxruntime() -> PathBuf {
    required("MACULA_ONNXRUNTIME", "the path of libonnxruntime.so")
}

fn required(variable: &str, what: &str) -> PathBuf {
    match std::env::var_os(variable) {
        Some(value) => PathBuf::from(value),
        None => panic!("set {variable} to {what}, or run `cargo xtask test`, which does"),
    }
}

/// Little-endian `f32` values of a file.
pub fn read_f32(path: impl AsRef<Path>) -> Vec<f32> {
    let bytes = std::fs::read(path.as_ref()).unwrap_or_else(|e| panic!("{}: {e}", path.as_ref().display()));
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

/// `|a - b| / |b|` in the Euclidean norm.
pub fn relative_error(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let difference: f64 = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum();
    let size: f64 = b.iter().map(|b| f64::from(*b).powi(2)).sum();
    (difference / size).sqrt()
}
