//! What benchmarks share: figures, a peer in another process that takes turns, the full-size model.

#![allow(dead_code)]

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use rand_core::RngCore;
use serde_json::Value;

pub type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// Threads of either side.
pub const THREADS: usize = 2;

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Prints a figure for `cargo xtask bench`.
pub fn figure(name: &str, value: f64, bound: &str, note: &str) {
    println!(r#"{{"name": "{name}", "value": {value}, "bound": "{bound}", "note": "{note}"}}"#);
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Whether the models of Stable Diffusion's size are left out.
pub fn small_only() -> bool {
    std::env::var_os("MACULA_BENCH_SMALL").is_some()
}

fn python() -> Outcome<PathBuf> {
    let python =
        std::env::var_os("MACULA_PYTHON").ok_or("set MACULA_PYTHON, or run `cargo xtask bench`, which does")?;
    Ok(python.into())
}

/// The other side, in a process of its own: a script of `tests/python` that answers each line with a JSON object.
pub struct Peer {
    process: Child,
    answers: BufReader<ChildStdout>,
}

impl Peer {
    pub fn start(script: &str) -> Outcome<Self> {
        let script = root().join("tests/python").join(script);
        let mut process = Command::new(python()?).arg(script).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let answers = BufReader::new(process.stdout.take().ok_or("the peer has no output")?);
        Ok(Self { process, answers })
    }

    pub fn ask(&mut self, command: &str) -> Outcome<Value> {
        let input = self.process.stdin.as_mut().ok_or("the peer has no input")?;
        writeln!(input, "{command}")?;
        let mut answer = String::new();
        self.answers.read_line(&mut answer)?;
        Ok(serde_json::from_str(&answer)
            .map_err(|error| format!("the peer answered {command:?} with {answer:?}: {error}"))?)
    }

    /// The seconds of one step.
    pub fn step(&mut self) -> Outcome<f64> {
        Ok(self.ask("step")?["seconds"].as_f64().ok_or("no time")?)
    }

    /// The peak of its resident memory in bytes.
    pub fn peak(&mut self) -> Outcome<f64> {
        Ok(self.ask("peak")?["bytes"].as_f64().ok_or("no memory")?)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        // The peer ends when its input does; there is nobody to tell if it doesn't.
        let _ = self.process.wait();
    }
}

/// Runs this benchmark again as `role`, in a fresh process, and answers the number that it prints.
pub fn fresh_process(role: &[&str]) -> Outcome<f64> {
    let output = Command::new(std::env::current_exe()?).args(role).output()?;
    let answer = String::from_utf8_lossy(&output.stdout).trim().parse();
    answer.map_err(|_| {
        format!("{role:?} ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr)).into()
    })
}

/// Prints the peak of this process's resident memory, as the answer of a [`fresh_process`].
pub fn print_peak() -> Outcome {
    let (_, peak) = macula::runtime::process_memory().ok_or("the system doesn't tell the peak memory")?;
    println!("{peak}");
    Ok(())
}

/// A UNet and the batch that it is measured with.
pub struct Case {
    pub model: PathBuf,
    pub batch: usize,
    pub channels: usize,
    pub side: usize,
    pub tokens: usize,
    pub features: usize,
    pub class_labels: bool,
}

impl Case {
    /// The shipped UNet.
    pub fn small(batch: usize) -> Self {
        let model = root().join("models/emoji/onnx/unet/model.onnx");
        Self { model, batch, channels: 3, side: 64, tokens: 24, features: 1024, class_labels: true }
    }

    /// One of Stable Diffusion 1.5's size.
    pub fn full_size(batch: usize) -> Outcome<Self> {
        let model = full_size_model()?;
        Ok(Self { model, batch, channels: 4, side: 64, tokens: 77, features: 768, class_labels: false })
    }
}

/// In [-1, 1).
pub fn uniform(random: &mut impl RngCore) -> f32 {
    random.next_u32() as f32 / 2f32.powi(31) - 1.0
}

/// Stable Diffusion 1.5's UNet with random weights, exported once.
fn full_size_model() -> Outcome<PathBuf> {
    let folder = root().join("target/fixtures/sd15-full-size");
    if !folder.exists() {
        eprintln!("exporting a UNet of Stable Diffusion 1.5's size (3.4 GB, some minutes)");
        let mut export = Command::new(python()?);
        export.arg(root().join("tests/python/export_unets.py"));
        export.args(["sd15", "--exporter", "torchscript17", "--out"]);
        let status = export.arg(&folder).status()?;
        if !status.success() {
            return Err(format!("export_unets.py ended with {status}").into());
        }
    }
    Ok(folder.join("model.onnx"))
}
