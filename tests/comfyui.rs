//! The ComfyUI nodes, with stand-ins for ComfyUI itself, or with the one whose folder `MACULA_COMFYUI` names.
#![allow(clippy::unwrap_used)]

#[path = "support/c.rs"]
mod c;
mod support;

use std::path::Path;
use std::process::Command;

#[test]
fn the_nodes_do_what_their_graph_says() {
    support::onnxruntime();
    if std::env::var_os("MACULA_COMFYUI").is_none() {
        eprintln!("MACULA_COMFYUI names no ComfyUI: its samplers and its own models are not tried");
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(support::interpreter());
    command.arg("-B").arg(root.join("tests/python/comfyui_nodes.py")).arg(root);
    command.arg(support::fixture("pipelines.py", &["sd1"])).arg(folder.path());
    command.env("PYTHONPATH", root.join("bindings/python")).env("MACULA_LIBRARY", c::library());
    c::succeed(&mut command);
}
