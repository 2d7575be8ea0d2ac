//! `cargo xtask wheel`: the Python package with the native library and ONNX Runtime in it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::place::{self, root, step, target};
use crate::{install, python};

/// Builds the wheel into `out`; `built` as for `cargo xtask install`.
pub fn run(built: Option<&Path>, out: Option<PathBuf>) -> Result<()> {
    let out = out.map_or_else(place::out, Ok)?;
    let prefix = target()?.join("wheel");
    install::run(&prefix, built)?;
    let build = &mut Command::new(python::environment()?);
    build.args(["-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"]);
    build.arg("--wheel-dir").arg(&out).arg(root().join("bindings/python")).env("MACULA_PREFIX", &prefix);
    step("build the wheel", build)?;
    println!("The wheel is in {}", out.display());
    Ok(())
}
