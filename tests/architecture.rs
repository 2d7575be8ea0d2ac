//! Who may use whom: the floors of ARCHITECTURE.md, checked on the source text.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

/// The rooms from the ground up. A room uses only those before it.
const FLOORS: &[&str] =
    &["error", "progress", "memory", "os", "onnx", "runtime", "concept", "diffusion", "discovery", "capi"];

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    found.sort();
    found
}

/// Path below `src`, its room, and its code without comments and without its test module.
fn sources() -> Vec<(String, String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    files(&root)
        .into_iter()
        .map(|path| {
            let name = path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
            let room = name.split(['/', '.']).next().unwrap().to_owned();
            let text = std::fs::read_to_string(&path).unwrap();
            let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
            let code = code.lines().map(|line| line.split("//").next().unwrap_or_default());
            (name, room, code.collect::<Vec<_>>().join("\n"))
        })
        .collect()
}

/// Whether `code` names the crate or module `name` as the head of a path.
fn names(code: &str, name: &str) -> bool {
    code.match_indices(&format!("{name}::"))
        .any(|(at, _)| !code[..at].ends_with(|c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':'))
        || code.contains(&format!("use {name};"))
}

/// Rooms that `code` reaches by `crate::room`, also in a grouped `use crate::{...}`.
fn rooms_used(code: &str) -> Vec<String> {
    let mut used = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        if let Some(group) = rest.strip_prefix('{') {
            let mut depth = 0;
            let mut item = String::new();
            for c in group.chars() {
                match c {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => used.push(std::mem::take(&mut item)),
                    _ if depth == 0 => item.push(c),
                    _ => {}
                }
            }
            used.push(item);
        } else {
            used.push(rest.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect());
        }
    }
    used.iter().map(|item| item.trim().split("::").next().unwrap().to_owned()).collect()
}

#[test]
fn a_room_uses_only_rooms_below_it() {
    for (name, room, code) in sources() {
        let Some(floor) = FLOORS.iter().position(|known| *known == room) else {
            assert_eq!(name, "lib.rs", "src/{name} belongs to no room: give it a floor here and in ARCHITECTURE.md");
            continue;
        };
        for used in rooms_used(&code) {
            if let Some(other) = FLOORS.iter().position(|known| *known == used) {
                assert!(other <= floor, "src/{name} ({room}) uses {used}, which lies above it");
            }
        }
    }
}

#[test]
fn only_runtime_names_ort() {
    for (name, room, code) in sources() {
        assert!(room == "runtime" || !names(&code, "ort"), "src/{name} names ort");
        if room == "onnx" {
            assert!(!code.contains("OrtApi") && !code.contains("runtime::"), "src/{name} knows ONNX Runtime");
        }
    }
}

#[test]
fn only_os_asks_the_operating_system_directly() {
    for (name, room, code) in sources() {
        let outside =
            ["libc", "std::os::unix", "std::arch::asm"].into_iter().find(|crate_name| names(&code, crate_name));
        assert!(room == "os" || outside.is_none(), "src/{name} names {}", outside.unwrap_or_default());
    }
}

#[test]
fn only_capi_exports_and_only_capi_speaks_c() {
    for (name, room, code) in sources() {
        assert!(room == "capi" || !code.contains("no_mangle"), "src/{name} exports a function");
        assert!(
            room == "capi" || !code.contains("LAST_ERROR"),
            "src/{name} keeps the last error, which is the C surface's"
        );
    }
}

#[test]
fn capi_holds_no_maths() {
    for (name, room, code) in sources() {
        if room == "capi" {
            for maths in ["ndarray", "libm", "rand_core", "rand_chacha", "safetensors", "tokenizers", "prost"] {
                assert!(!names(&code, maths), "src/{name} names {maths}");
            }
            for call in [".sqrt()", ".exp()", ".ln()", ".powi(", ".powf(", ".sin()", ".cos()", "par_iter"] {
                assert!(!code.contains(call), "src/{name} computes: {call}");
            }
        }
    }
}

#[test]
fn every_export_passes_the_guard() {
    for (name, room, code) in sources() {
        if room != "capi" || name.ends_with("inject.rs") {
            continue;
        }
        for export in code.split("#[unsafe(no_mangle)]").skip(1) {
            let function = export.split("fn ").nth(1).unwrap().split('(').next().unwrap();
            let body = export.split_once('{').unwrap().1;
            let first = body.trim_start();
            let passes = ["guard(", "guard_free(", "guard_value("].iter().any(|guard| first.starts_with(guard));
            assert!(
                passes || first.starts_with("combine(\""),
                "{function} in src/{name} does not begin with its guard"
            );
            assert!(
                first.contains(&format!("\"{function}\"")),
                "{function} in src/{name} tells its guard another name"
            );
        }
    }
}

#[test]
fn every_file_opens_with_what_it_is_for() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for path in files(&root) {
        let text = std::fs::read_to_string(&path).unwrap();
        let generated = path.ends_with("onnx/proto.rs");
        assert!(generated || text.starts_with("//! "), "{} opens without saying what it is for", path.display());
        for name in ["utils", "helpers", "common", "misc"] {
            assert!(path.file_stem().unwrap() != name, "{}: a name that says nothing", path.display());
        }
    }
}

#[test]
fn the_checks_see_what_they_look_for() {
    assert!(names("use ort::sys;", "ort") && names("let x = ort::init();", "ort"));
    assert!(!names("use super::export::sys;", "ort") && !names("a::ort::b", "ort"));
    assert_eq!(rooms_used("use crate::{error::{Error, Result}, runtime::Runtime};"), ["error", "runtime"]);
    assert_eq!(rooms_used("crate::onnx::proto::X"), ["onnx"]);
}
