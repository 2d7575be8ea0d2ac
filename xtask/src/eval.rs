//! `cargo xtask eval`: measurements of quality on the shipped model, and of what hosts pay for the library.

use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;
use clap::ValueEnum;

use crate::place::{cargo, out, root, step, target};
use crate::{demo, figures, python};

/// What can be measured.
#[derive(Clone, Copy, ValueEnum)]
pub enum What {
    /// How often the shipped model draws what the prompt says: out/model.json and out/model.png
    Model,
    /// What concept neurons of kept-out subjects do, alone and composed: out/cones.json and out/cones-*.png
    Cones,
    /// What Custom Diffusion and ConceptPrune do at composing and ablating, beside concept neurons: out/peers.json and
    /// out/peers-*.png
    Peers,
    /// What the decomposed process costs and how well it draws, beside the plain one: out/decomposed.json and
    /// out/decomposed-curves.png
    Decomposed,
    /// What a call costs a host beside the work itself, and beside the host's own way: out/hosts.json
    Hosts,
}

/// Scripts that print figures, one for each kind of host. They are given the folder of a UNet of Stable Diffusion 1.5's size.
const HOSTS: [&str; 2] = ["bindings/python/evaluate.py", "tests/python/comfyui_evaluate.py"];

/// Runs one measurement; `full` takes larger samples.
pub fn run(what: What, full: bool) -> Result<()> {
    let script = match what {
        What::Hosts => return hosts(),
        What::Model => "models/emoji/evaluate.py",
        What::Cones => "models/reference/evaluate_cones.py",
        What::Peers => "models/reference/evaluate_peers.py",
        What::Decomposed => "models/emoji/evaluate_decomposed.py",
    };
    let evaluate = &mut Command::new(python::environment()?);
    evaluate.current_dir(root()).arg(script).arg("--out").arg(out()?);
    match what {
        What::Cones | What::Peers => {
            build()?;
            with_package(evaluate)?;
            evaluate.arg("--discover").arg(demo::compile_example("discover")?);
        }
        What::Decomposed => {
            build()?;
            with_package(evaluate)?;
        }
        What::Model | What::Hosts => {}
    }
    if let What::Peers = what {
        evaluate.arg("--erase").arg(demo::compile_example("erase")?);
    }
    if full {
        evaluate.arg("--full");
    }
    step(script, evaluate)
}

/// Runs the hosts' scripts, one after the other.
fn hosts() -> Result<()> {
    build()?;
    let model = full_size_model()?;
    let script = |script: &str| -> Result<_> {
        let mut evaluate = Command::new(python::environment()?);
        with_package(evaluate.current_dir(root()).arg(script).arg(&model))?;
        Ok((script.to_owned(), evaluate))
    };
    figures::measure(HOSTS.into_iter().map(script).collect::<Result<_>>()?, "hosts.json")
}

/// The folder of Stable Diffusion 1.5's UNet with random weights, exported once: the benchmarks use the same.
fn full_size_model() -> Result<PathBuf> {
    let folder = root().join("target/fixtures/sd15-full-size");
    if !folder.exists() {
        let export = &mut Command::new(python::environment()?);
        export.current_dir(root()).arg("tests/python/export_unets.py");
        export.args(["sd15", "--exporter", "torchscript17", "--out"]).arg(&folder);
        step("export a UNet of Stable Diffusion 1.5's size (3.4 GB)", export)?;
    }
    Ok(folder)
}

fn build() -> Result<()> {
    step("build the library", cargo()?.args(["build", "--release", "--lib"]))
}

/// Lets a Python program import the package of this tree, with the release library and the tests' ONNX Runtime.
fn with_package(command: &mut Command) -> Result<()> {
    command.env("MACULA_ONNXRUNTIME", python::onnxruntime()?);
    command.env("MACULA_LIBRARY", target()?.join("release/libmacula.so"));
    command.env("PYTHONPATH", root().join("bindings/python"));
    Ok(())
}
