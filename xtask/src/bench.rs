//! `cargo xtask bench`: runs every benchmark, collects the figures that they print, and holds them against their bounds.
//!
//! A benchmark is an executable in `benches/` that prints figures. Whatever it compares with runs in turn with it in the
//! same process tree.

use anyhow::Result;

use crate::place::cargo;
use crate::{figures, python};

const BENCHMARKS: [&str; 3] = ["swap", "unet", "gradients"];

/// Runs the benchmarks and writes `out/bench.json`; `small` leaves out models of Stable Diffusion's size. What the others
/// measured is kept if one fails.
pub fn run(small: bool) -> Result<()> {
    let runtime = python::onnxruntime()?;
    let interpreter = python::environment()?;
    let benchmark = |name| -> Result<_> {
        let mut command = cargo()?;
        command.args(["bench", "--quiet", "--bench", name]);
        command.env("MACULA_ONNXRUNTIME", &runtime).env("MACULA_PYTHON", &interpreter);
        if small {
            command.env("MACULA_BENCH_SMALL", "1");
        }
        Ok((format!("benchmark {name}"), command))
    };
    figures::measure(BENCHMARKS.into_iter().map(benchmark).collect::<Result<_>>()?, "bench.json")
}
