//! `cargo xtask eval`: measurements of quality, on the shipped model.

use std::process::Command;

use anyhow::Result;
use clap::ValueEnum;

use crate::place::{cargo, out, root, step, target};
use crate::{demo, python};

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
}

/// Runs one measurement; `full` takes larger samples.
pub fn run(what: What, full: bool) -> Result<()> {
    let script = match what {
        What::Model => "models/emoji/evaluate.py",
        What::Cones => "models/reference/evaluate_cones.py",
        What::Peers => "models/reference/evaluate_peers.py",
        What::Decomposed => "models/emoji/evaluate_decomposed.py",
    };
    let evaluate = &mut Command::new(python::environment()?);
    evaluate.current_dir(root()).arg(script).arg("--out").arg(out()?);
    if let What::Cones | What::Peers | What::Decomposed = what {
        step("build the library", cargo()?.args(["build", "--release", "--lib"]))?;
        evaluate.env("MACULA_ONNXRUNTIME", python::onnxruntime()?);
    }
    match what {
        What::Cones => {
            evaluate.arg("--discover").arg(demo::compile_example("discover")?);
        }
        What::Peers => {
            evaluate.arg("--discover").arg(demo::compile_example("discover")?);
            evaluate.arg("--erase").arg(demo::compile_example("erase")?);
        }
        What::Decomposed => {
            evaluate.env("MACULA_LIBRARY", target()?.join("release/libmacula.so"));
            evaluate.env("PYTHONPATH", root().join("bindings/python"));
        }
        What::Model => {}
    }
    if full {
        evaluate.arg("--full");
    }
    step(script, evaluate)
}
