//! What comes from Python's package index: the ONNX Runtime library (its wheel is unpacked, never installed), and the
//! environment that the tests' oracles, the trainer and the benchmarks' other side run in, with the tools that installed
//! packages are tested with.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::place::{root, step, target};

const REQUIREMENTS: &str = "tests/python/requirements.txt";
const TOOLS: &str = "tests/python/tools.txt";

fn python() -> String {
    std::env::var("PYTHON").unwrap_or_else(|_| "python3".into())
}

/// The ONNX Runtime library: `MACULA_ONNXRUNTIME` if it is set, else the pinned wheel's, fetched once.
pub fn onnxruntime() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("MACULA_ONNXRUNTIME") {
        return Ok(path.into());
    }
    let package = pinned("onnxruntime")?;
    let folder = target()?.join("onnxruntime");
    let unpacked = folder.join(package.replace("==", "-"));
    if !unpacked.is_dir() {
        let wheels = folder.join("wheel");
        let partial = folder.join("partial");
        for old in [&wheels, &partial] {
            if old.exists() {
                fs::remove_dir_all(old).with_context(|| format!("remove {}", old.display()))?;
            }
        }
        step(
            &format!("get {package}"),
            Command::new(python())
                .args(["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"])
                .args(["--only-binary=:all:", "--dest"])
                .arg(&wheels)
                .arg(&package),
        )?;
        let wheel = first_file(&wheels, |name| name.ends_with(".whl"))?;
        let unpack = &mut Command::new(python());
        step("unpack it", unpack.args(["-m", "zipfile", "-e"]).arg(wheel).arg(&partial))?;
        fs::rename(&partial, &unpacked).with_context(|| format!("rename {}", partial.display()))?;
        fs::remove_dir_all(&wheels).with_context(|| format!("remove {}", wheels.display()))?;
    }
    first_file(&unpacked.join("onnxruntime/capi"), |name| name.starts_with("libonnxruntime.so"))
}

/// The Python of an environment with every pinned package: `MACULA_PYTHON` if it is set, else made once.
pub fn environment() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("MACULA_PYTHON") {
        return Ok(path.into());
    }
    let mut lists = Sha256::new();
    for list in [REQUIREMENTS, TOOLS] {
        lists.update(fs::read(root().join(list)).with_context(|| format!("read {list}"))?);
    }
    let digest: String = lists.finalize().iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    let folder = target()?.join(format!("python-{digest}"));
    let program = folder.join("bin/python");
    let complete = folder.join("complete");
    if !complete.exists() {
        step("make the Python environment", Command::new(python()).args(["-m", "venv", "--clear"]).arg(&folder))?;
        // uv installs the same packages as pip, several times faster.
        let install = &mut Command::new(&program);
        step("get uv", install.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv"]))?;
        let fill = &mut Command::new(folder.join("bin/uv"));
        fill.args(["pip", "install", "--quiet", "--python"]).arg(&program);
        fill.current_dir(root()).args(["--requirement", REQUIREMENTS, "--requirement", TOOLS]);
        step("fill it (PyTorch, diffusers and others; some 6 GB)", fill)?;
        fs::write(&complete, "").with_context(|| format!("write {}", complete.display()))?;
    }
    Ok(program)
}

/// The line `name==version` of the requirements.
fn pinned(name: &str) -> Result<String> {
    let requirements = root().join(REQUIREMENTS);
    let text = fs::read_to_string(&requirements).with_context(|| format!("read {}", requirements.display()))?;
    let line = text.lines().find(|line| line.split("==").next() == Some(name));
    Ok(line.with_context(|| format!("{REQUIREMENTS} does not pin {name}"))?.to_owned())
}

fn first_file(folder: &Path, wanted: impl Fn(&str) -> bool) -> Result<PathBuf> {
    for entry in fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
        let path = entry?.path();
        if path.file_name().and_then(|name| name.to_str()).is_some_and(&wanted) {
            return Ok(path);
        }
    }
    bail!("{}: the expected file is not there", folder.display())
}
