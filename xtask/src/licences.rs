//! The licences of the crates that are compiled into the library, as one text to ship with it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::place::cargo;

/// What Cargo knows about the workspace and its dependencies on this platform.
pub fn metadata() -> Result<Value> {
    let mut command = cargo()?;
    command.args(["metadata", "--format-version", "1", "--locked", "--filter-platform"]);
    let output = command.arg(format!("{}-unknown-linux-gnu", std::env::consts::ARCH)).output()?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).context("read cargo metadata")
}

/// The library's version.
pub fn version(metadata: &Value) -> Result<&str> {
    text(library(metadata)?, "version")
}

/// The texts of all licences, each once, under the crates that carry it.
pub fn of_dependencies(metadata: &Value) -> Result<String> {
    let mut carriers: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for package in dependencies(metadata)? {
        let title = format!("{} {}", text(package, "name")?, text(package, "version")?);
        let texts = texts(Path::new(text(package, "manifest_path")?))?;
        if texts.is_empty() {
            let licence = package["license"].as_str().with_context(|| format!("{title} names no licence"))?;
            carriers.entry(format!("{licence} (the crate holds no text)")).or_default().push(title.clone());
        }
        for text in texts {
            carriers.entry(text).or_default().push(title.clone());
        }
    }
    let mut joined = String::from("Macula contains these crates. Each line of names is followed by their licence.\n");
    for (text, titles) in carriers {
        write!(joined, "\n{}\n{}\n\n{text}\n", "=".repeat(100), titles.join(", "))?;
    }
    Ok(joined)
}

/// The packages that the library is linked from, without itself, sorted.
fn dependencies(metadata: &Value) -> Result<Vec<&Value>> {
    let nodes = array(&metadata["resolve"], "nodes")?;
    let nodes: BTreeMap<&str, &Value> =
        nodes.iter().map(|node| Ok((text(node, "id")?, node))).collect::<Result<_>>()?;
    let library = text(library(metadata)?, "id")?;
    let mut reached = BTreeSet::from([library]);
    let mut ahead = vec![library];
    while let Some(id) = ahead.pop() {
        for edge in array(nodes.get(id).with_context(|| format!("{id} is not resolved"))?, "deps")? {
            let linked = array(edge, "dep_kinds")?.iter().any(|kind| kind["kind"].is_null());
            let package = text(edge, "pkg")?;
            if linked && reached.insert(package) {
                ahead.push(package);
            }
        }
    }
    reached.remove(library);
    reached.into_iter().map(|id| package(metadata, "id", id)).collect()
}

/// What the files of a crate say that look like a licence.
fn texts(manifest: &Path) -> Result<BTreeSet<String>> {
    let folder = manifest.parent().context("a manifest lies in a folder")?;
    let mut found = BTreeSet::new();
    for entry in fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_uppercase();
        if path.is_file() && ["LICEN", "COPYING", "NOTICE", "UNLICEN"].iter().any(|start| name.starts_with(start)) {
            let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
            found.insert(text.trim().to_owned());
        }
    }
    Ok(found)
}

fn library(metadata: &Value) -> Result<&Value> {
    package(metadata, "name", "macula")
}

fn package<'a>(metadata: &'a Value, key: &str, wanted: &str) -> Result<&'a Value> {
    let found = array(metadata, "packages")?.iter().find(|package| package[key] == wanted);
    found.with_context(|| format!("cargo metadata has no package whose {key} is {wanted}"))
}

fn array<'a>(value: &'a Value, key: &str) -> Result<&'a Vec<Value>> {
    value[key].as_array().with_context(|| format!("cargo metadata has no list `{key}`"))
}

fn text<'a>(value: &'a Value, key: &str) -> Result<&'a str> {
    value[key].as_str().with_context(|| format!("cargo metadata has no text `{key}`"))
}
