//! `cargo xtask eval`: measurements of quality, on the shipped model.

use std::process::Command;

use anyhow::Result;
use clap::ValueEnum;

use crate::place::{out, root, step};
use crate::python;

/// What can be measured.
#[derive(Clone, Copy, ValueEnum)]
pub enum What {
    /// How often the shipped model draws what the prompt says: out/model.json and out/model.png
    Model,
}

/// Runs one measurement; `full` takes larger samples.
pub fn run(what: What, full: bool) -> Result<()> {
    let script = match what {
        What::Model => "models/emoji/evaluate.py",
    };
    let evaluate = &mut Command::new(python::environment()?);
    evaluate.current_dir(root()).arg(script).arg("--out").arg(out()?);
    if full {
        evaluate.arg("--full");
    }
    step(script, evaluate)
}
