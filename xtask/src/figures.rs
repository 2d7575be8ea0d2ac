//! Figures that programs print, one JSON object a line, `{"name", "value", "bound"?, "note"?}`: collected, and held against
//! their bounds, which read `"<= 1.02"` or `">= 50"`.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value};

use crate::place::out;

/// One line of a program's output.
type Figure = Map<String, Value>;

/// Runs programs in turn, prints their figures as a table and writes them to a file in `out`. What the others found is kept
/// if one fails.
pub fn measure(programs: Vec<(String, Command)>, file: &str) -> Result<()> {
    let (mut figures, mut failed) = (Vec::new(), Vec::new());
    for (what, mut program) in programs {
        if let Err(error) = collect(&what, &mut program, &mut figures) {
            failed.push(error.to_string());
        }
    }
    report(&figures, file)?;
    match failed.is_empty() {
        true => Ok(()),
        false => bail!("{}", failed.join("; ")),
    }
}

/// Runs a program to its end and adds its figures; its other lines are passed on.
fn collect(what: &str, command: &mut Command, figures: &mut Vec<Figure>) -> Result<()> {
    eprintln!("==> {what}");
    let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| format!("{what}: start {command:?}"))?;
    let output = child.stdout.take().with_context(|| format!("read {what}"))?;
    for line in BufReader::new(output).lines() {
        let line = line.with_context(|| format!("read {what}"))?;
        match serde_json::from_str(&line) {
            Ok(Value::Object(figure)) => figures.push(figure),
            _ => eprintln!("{line}"),
        }
    }
    let status = child.wait().with_context(|| format!("wait for {what}"))?;
    if !status.success() {
        bail!("{what} ended with {status}");
    }
    Ok(())
}

/// Prints a table, and writes the values to a file in `out`.
fn report(figures: &[Figure], file: &str) -> Result<()> {
    let mut values = Map::new();
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
        values.insert(name.to_owned(), value.into());
    }
    let path = out()?.join(file);
    std::fs::write(&path, serde_json::to_string_pretty(&Value::Object(values))? + "\n")
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
