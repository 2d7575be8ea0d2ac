//! Where things are, and how a command is run so that its failure says which one it was.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};

/// The root of the repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("..")
        .components()
        .collect::<PathBuf>()
        .canonicalize()
        .unwrap_or_else(|_| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(".."))
}

/// Cargo's target folder: the one that this very program was built into.
pub fn target() -> Result<PathBuf> {
    let program = std::env::current_exe().context("where this program is")?;
    let folder = program.parent().and_then(Path::parent).context("this program is not in a target folder")?;
    Ok(folder.to_owned())
}

/// The folder for results, made if needed.
pub fn out() -> Result<PathBuf> {
    let folder = root().join("out");
    std::fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    Ok(folder)
}

/// A cargo command in the repository, with the same toolchain and target folder as this program.
pub fn cargo() -> Result<Command> {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root()).env("CARGO_TARGET_DIR", target()?);
    Ok(command)
}

/// Runs a command to its end; says what it is, how long it took, and fails if it fails.
pub fn step(what: &str, command: &mut Command) -> Result<()> {
    eprintln!("==> {what}");
    let start = Instant::now();
    let status = command.status().with_context(|| format!("{what}: start {:?}", command.get_program()))?;
    if !status.success() {
        bail!("{what}: {command:?} ended with {status}");
    }
    eprintln!("    {what}: {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}
