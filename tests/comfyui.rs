//! The ComfyUI nodes in the real ComfyUI: called in its process, driven through its server, and, in the full tests, looked at
//! in a browser. Where ComfyUI can't be had, that is said and nothing is tested.
#![allow(clippy::unwrap_used)]

#[path = "support/c.rs"]
mod c;
mod support;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

/// `comfyui_home.py` ends with it where ComfyUI can't be had.
const UNAVAILABLE: i32 = 69;

/// The folder with ComfyUI and its packages.
static HOME: LazyLock<Option<PathBuf>> = LazyLock::new(|| {
    let made = Command::new(support::interpreter()).args(["-B", "tests/python/comfyui_home.py"]).output().unwrap();
    let (said, reason) = (String::from_utf8_lossy(&made.stdout), String::from_utf8_lossy(&made.stderr));
    match made.status.code() {
        Some(0) => Some(PathBuf::from(said.trim())),
        Some(UNAVAILABLE) => {
            loudly(&format!("SKIPPED: the nodes are not tested, because there is no ComfyUI: {}", reason.trim()));
            None
        }
        _ => panic!("comfyui_home.py: {reason}"),
    }
});

/// Says something past the test harness, which keeps to itself what a test that succeeds prints.
fn loudly(what: &str) {
    let mut terminal = std::io::stderr();
    writeln!(terminal, "{what}").unwrap();
}

/// A script of `tests/python` with ComfyUI's packages; its arguments are the repository and ComfyUI's folder.
fn script(name: &str) -> Option<Command> {
    let home = HOME.as_ref()?;
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut command = Command::new(support::interpreter());
    command.arg("-B").arg(root.join("tests/python").join(name)).arg(root).arg(home.join("ComfyUI"));
    let path = std::env::join_paths([home.join("packages"), root.join("bindings/python")]).unwrap();
    command.env("PYTHONPATH", path).env("MACULA_LIBRARY", c::library());
    command.env("MACULA_ONNXRUNTIME", support::onnxruntime());
    Some(command)
}

#[test]
fn the_nodes_do_what_their_graph_says() {
    let Some(mut command) = script("comfyui_nodes.py") else { return };
    let folder = tempfile::tempdir().unwrap();
    c::succeed(command.arg(folder.path()).arg(support::fixture("pipelines.py", &["sd1"])));
}

#[test]
fn the_server_draws_what_the_library_draws() {
    let Some(mut command) = script("comfyui_server.py") else { return };
    let folder = tempfile::tempdir().unwrap();
    c::succeed(command.arg(folder.path()));
}

#[test]
fn the_example_workflows_run_in_a_browser() {
    if std::env::var_os("MACULA_FULL_TESTS").is_none_or(|value| value != "1") {
        return;
    }
    let Some(mut command) = script("comfyui_page.py") else { return };
    let folder = tempfile::tempdir().unwrap();
    let output = command.arg(folder.path()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    match output.status.code() {
        Some(0) => {}
        Some(UNAVAILABLE) => loudly(&format!("SKIPPED: the example workflows are not looked at: {}", said.trim())),
        _ => panic!("comfyui_page.py: {said}"),
    }
}
