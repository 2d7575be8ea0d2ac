//! `cargo xtask demo`: the main job, done by a C host, with a picture at the end.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::place::{cargo, out, root, step, target};
use crate::python;

/// Builds the library, compiles the C example against the header, and draws `out/demo.png`.
pub fn run() -> Result<()> {
    let runtime = python::onnxruntime()?;
    step("build the library", cargo()?.args(["build", "--release", "--lib"]))?;
    let program = compile_example("compose")?;
    let picture = out()?.join("demo.png");
    let models = root().join("models");
    let draw = &mut Command::new(program);
    draw.env("MACULA_ONNXRUNTIME", runtime).arg(models.join("emoji/onnx"));
    for concept in ["green-apple", "octopus", "erase-tiger"] {
        draw.arg(models.join("concepts").join(concept).with_extension("safetensors"));
    }
    draw.arg(&picture);
    step("draw", draw)?;
    println!("The picture is {}", picture.display());
    Ok(())
}

/// Compiles `examples/c/<name>.c` against the header and the release library, which stands beside the program under its
/// SONAME, as in an installed tree.
fn compile_example(name: &str) -> Result<PathBuf> {
    let folder = target()?.join("examples-c");
    std::fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    let library = folder.join("libmacula.so.0");
    std::fs::copy(target()?.join("release/libmacula.so"), &library).context("copy the library")?;
    let program = folder.join(name);
    let compile = &mut Command::new(std::env::var("CC").unwrap_or_else(|_| "cc".into()));
    compile.args(["-std=c11", "-O2", "-Wall", "-Wextra", "-I"]).arg(root().join("include"));
    compile.arg(root().join(format!("examples/c/{name}.c"))).arg("-o").arg(&program);
    compile.arg(&library).args(["-Wl,-rpath,$ORIGIN", "-lm"]);
    step(&format!("compile examples/c/{name}.c"), compile)?;
    Ok(program)
}
