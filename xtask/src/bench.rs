//! `cargo xtask bench`: runs every benchmark, collects the figures that they print, and holds them against their bounds.
//!
//! A benchmark is an executable in `benches/` that prints one JSON object a line: `{"name", "value", "bound"?, "note"?}`.
//! `bound` reads `"<= 1.02"` or `">= 50"`. Whatever it compares with runs in turn with it in the same process tree.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};

use crate::place::{cargo, out};
use crate::python;

const BENCHMARKS: [&str; 3] = ["swap", "unet", "gradients"];

/// Runs the benchmarks and writes `out/bench.json`; `small` leaves out models of Stable Diffusion's size. What the others
/// measured is kept if one fails.
pub fn run(small: bool) -> Result<()> {
    let runtime = python::onnxruntime()?;
    let interpreter = python::environment()?;
    let (mut figures, mut failed) = (Vec::new(), Vec::new());
    for name in BENCHMARKS {
        eprintln!("==> benchmark {name}");
        let mut command = cargo()?;
        command.args(["bench", "--quiet", "--bench", name]).stdout(Stdio::piped());
        command.env("MACULA_ONNXRUNTIME", &runtime).env("MACULA_PYTHON", &interpreter);
        if small {
            command.env("MACULA_BENCH_SMALL", "1");
        }
        let mut child = command.spawn().context("start cargo bench")?;
        let output = child.stdout.take().context("read cargo bench")?;
        for line in BufReader::new(output).lines() {
            let line = line.context("read cargo bench")?;
            match serde_json::from_str(&line) {
                Ok(Value::Object(figure)) => figures.push(figure),
                _ => eprintln!("{line}"),
            }
        }
        let status = child.wait().context("wait for cargo bench")?;
        if !status.success() {
            failed.push(format!("benchmark {name} ended with {status}"));
        }
    }
    report(&figures)?;
    match failed.is_empty() {
        true => Ok(()),
        false => bail!("{}", failed.join("; ")),
    }
}

fn report(figures: &[Map<String, Value>]) -> Result<()> {
    let mut file = Map::new();
    println!("{:<32} {:>12}  {:<10} ", "figure", "value", "bound");
    for figure in figures {
        let name = figure.get("name").and_then(Value::as_str).context("a figure without a name")?;
        let value = figure.get("value").and_then(Value::as_f64).with_context(|| format!("{name} has no value"))?;
        let bound = figure.get("bound").and_then(Value::as_str).unwrap_or("");
        let verdict = match holds(value, bound)? {
            Some(true) => "holds",
            Some(false) => "DOES NOT HOLD",
            None => "",
        };
        let note = figure.get("note").and_then(Value::as_str).unwrap_or("");
        println!("{name:<32} {value:>12.4}  {bound:<10} {verdict} {note}");
        file.insert(name.to_owned(), value.into());
    }
    let path = out()?.join("bench.json");
    std::fs::write(&path, serde_json::to_string_pretty(&Value::Object(file))? + "\n")
        .with_context(|| format!("write {}", path.display()))?;
    println!("The figures are in {}", path.display());
    Ok(())
}

/// Whether a value keeps its bound; `None` if it has none.
fn holds(value: f64, bound: &str) -> Result<Option<bool>> {
    let Some((relation, limit)) = bound.split_once(' ') else {
        return Ok(None);
    };
    let limit: f64 = limit.parse().with_context(|| format!("the bound {bound:?}"))?;
    match relation {
        "<=" => Ok(Some(value <= limit)),
        ">=" => Ok(Some(value >= limit)),
        _ => bail!("the bound {bound:?} is neither <= nor >="),
    }
}

#[cfg(test)]
mod tests {
    use super::holds;

    #[test]
    fn bounds_are_read_both_ways() {
        assert_eq!(holds(1.0, "<= 1.02").unwrap(), Some(true));
        assert_eq!(holds(1.1, "<= 1.02").unwrap(), Some(false));
        assert_eq!(holds(49.0, ">= 50").unwrap(), Some(false));
        assert_eq!(holds(1.0, "").unwrap(), None);
        assert!(holds(1.0, "< 2").is_err());
    }
}
