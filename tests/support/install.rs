//! An installed tree of the library that this build made, and the tools that its packages are tried with.
#![allow(dead_code, reason = "each test program uses its own part")]

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{c, support};

/// A folder of a test program that stays until its next run, for what is made once and used by several tests.
pub fn empty_folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    if folder.exists() {
        std::fs::remove_dir_all(&folder).expect("the folder of an earlier run goes away");
    }
    std::fs::create_dir_all(&folder).expect("a folder");
    folder
}

/// Installs under `prefix` as `cargo xtask install` does, without building anything.
pub fn install(prefix: &Path) {
    let library = c::library();
    xtask(&["install", "--prefix", text(prefix), "--built", text(library.parent().expect("a folder"))]);
}

/// Runs a command of `cargo xtask`.
pub fn xtask(arguments: &[&str]) {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(env!("CARGO_MANIFEST_DIR")).args(["run", "--quiet", "--package", "xtask", "--"]);
    c::succeed(command.args(arguments).env("MACULA_ONNXRUNTIME", support::onnxruntime()));
}

/// A command of one of the tools in `tests/python/tools.txt`, with the others on its search path.
pub fn tool(name: &str) -> Command {
    let tools = tools();
    let program = tools.join(name);
    assert!(program.exists(), "{} is not there: it comes with tests/python/tools.txt", program.display());
    let mut command = Command::new(program);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::iter::once(tools).chain(std::env::split_paths(&path));
    command.env("PATH", std::env::join_paths(path).expect("a search path"));
    command
}

/// The folder of the tools: that of the tests' Python.
fn tools() -> PathBuf {
    support::interpreter().parent().expect("a folder").to_owned()
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}
