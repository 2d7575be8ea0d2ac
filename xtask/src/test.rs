//! `cargo xtask test`: formatting, lints, and every test, with the runtime and the oracles at hand.

use std::fs::File;
use std::process::Command;
use std::time::SystemTime;

use anyhow::{Context, Result};

use crate::place::{cargo, root, step};
use crate::python;

/// Runs the tests; `full` adds the long ones, `filter` keeps only tests whose name contains it.
pub fn run(full: bool, filter: Option<&str>) -> Result<()> {
    let runtime = python::onnxruntime()?;
    let interpreter = python::environment()?;
    let test = |what: &str, arguments: &[&str]| -> Result<()> {
        let mut command = cargo()?;
        // One test that fails hides no other.
        command.args(["test", "--no-fail-fast"]).args(arguments);
        command.env("MACULA_ONNXRUNTIME", &runtime).env("MACULA_PYTHON", &interpreter);
        if full {
            command.env("MACULA_FULL_TESTS", "1");
        }
        if let Some(filter) = filter {
            command.args(["--", filter]);
        }
        step(what, &mut command)
    };
    if filter.is_none() {
        step("formatting", cargo()?.args(["fmt", "--all", "--check"]))?;
        step("lints", cargo()?.args(["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"]))?;
    }
    test("tests", &["--workspace"])?;
    if filter.is_none() {
        let reference = &mut Command::new(&interpreter);
        reference.current_dir(root().join("models/reference")).args(["-m", "unittest", "--quiet"]);
        step("tests of the PyTorch reference", reference)?;
    }
    // A shared library's file name does not depend on features: each build must see that the other one's is not its own.
    touch_library()?;
    let outcome = test("tests with injected panics", &["--features", "inject", "--test", "capi"]);
    touch_library()?;
    outcome
}

/// Makes Cargo build the library anew.
fn touch_library() -> Result<()> {
    let path = root().join("src/lib.rs");
    let file = File::options().append(true).open(&path).with_context(|| format!("open {}", path.display()))?;
    file.set_modified(SystemTime::now()).with_context(|| format!("touch {}", path.display()))
}
