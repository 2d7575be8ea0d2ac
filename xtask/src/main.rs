//! The project's command runner: everything that a fresh clone needs beyond Rust, compilers for C and C++, and Python 3
//! is set up by the command that needs it, under the target folder.

mod bench;
mod demo;
mod eval;
mod figures;
mod header;
mod install;
mod licences;
mod place;
mod python;
mod python_abi;
mod test;
mod wheel;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Macula's command runner")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Draw with concepts from a C host; the picture is out/demo.png
    Demo,
    /// Run every test, in Rust, C and Python
    Test {
        /// Add the long ones: full-size models, long races
        #[arg(long)]
        full: bool,
        /// Run only the Rust tests whose name contains this
        filter: Option<String>,
    },
    /// Measure speed and memory against Python onnxruntime; figures go to out/bench.json
    Bench {
        /// Leave out the models of Stable Diffusion's size (4 GB of disk, 10 GB of memory)
        #[arg(long)]
        small: bool,
    },
    /// Measure quality, and what hosts pay; figures and pictures go to out/
    Eval {
        /// What to measure
        what: eval::What,
        /// Larger samples
        #[arg(long)]
        full: bool,
    },
    /// Write include/macula.h, and from it the Python package's signatures, anew from the exported functions
    Header,
    /// Install the library, its header, packages for pkg-config and CMake, and ONNX Runtime
    Install {
        /// The folder to install under; the tree in it may be moved afterwards
        #[arg(long)]
        prefix: PathBuf,
        /// A folder with libmacula.so and libmacula.a, to install those instead of a release build
        #[arg(long)]
        built: Option<PathBuf>,
    },
    /// Build the Python package as a wheel with the native library in it, into out/
    Wheel {
        /// A folder with libmacula.so and libmacula.a, to take those instead of a release build
        #[arg(long)]
        built: Option<PathBuf>,
        /// The folder to write to
        #[arg(long)]
        out: Option<PathBuf>,
    },
    /// Get ONNX Runtime and the Python environment, and print how to use them by hand
    Setup,
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        Command::Demo => demo::run(),
        Command::Test { full, filter } => test::run(full, filter.as_deref()),
        Command::Bench { small } => bench::run(small),
        Command::Eval { what, full } => eval::run(what, full),
        Command::Header => header::write(&place::root()),
        Command::Install { prefix, built } => install::run(&prefix, built.as_deref()),
        Command::Wheel { built, out } => wheel::run(built.as_deref(), out),
        Command::Setup => setup(),
    }
}

fn setup() -> Result<()> {
    println!("export MACULA_ONNXRUNTIME={}", python::onnxruntime()?.display());
    println!("export MACULA_PYTHON={}", python::environment()?.display());
    Ok(())
}
