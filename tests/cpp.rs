//! `bindings/cpp/macula.hpp`: it compiles alone in every standard, and a C++ host draws with it, also under ASan.
#![allow(clippy::unwrap_used)]

#[path = "support/c.rs"]
mod c;
mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use c::Bench;

const WARNINGS: [&str; 6] = ["-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Werror"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn header() -> String {
    std::fs::read_to_string(root().join("bindings/cpp/macula.hpp")).unwrap()
}

/// The C++ compiler, told where both headers are.
fn compiler(standard: &str) -> Command {
    let mut command = Command::new(std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned()));
    command.arg(format!("-std={standard}")).args(WARNINGS);
    command.arg("-I").arg(root().join("include")).arg("-I").arg(root().join("bindings/cpp"));
    command
}

/// Builds `tests/cpp/host.cpp`, with a second file that includes the header too, so that nothing is defined twice.
fn build(bench: &Bench, standard: &str, flags: &[&str]) -> PathBuf {
    let (second, program) = (bench.folder().join("second.cpp"), bench.folder().join("host"));
    std::fs::write(&second, "#include <macula.hpp>\n").unwrap();
    let mut command = compiler(standard);
    command.args(["-g", "-O1", "-pthread"]).args(flags).arg(root().join("tests/cpp/host.cpp")).arg(second);
    command.arg("-o").arg(&program).arg("-L").arg(bench.folder()).arg("-lmacula");
    c::succeed(command.arg(format!("-Wl,-rpath,{}", bench.folder().display())));
    program
}

fn host(bench: &Bench, program: &Path) -> Command {
    support::onnxruntime();
    let mut command = Command::new(program);
    command.arg(root().join("models/emoji/onnx")).arg(root().join("models/emoji/subjects/octopus")).arg(bench.folder());
    command
}

#[test]
fn the_header_compiles_alone_in_every_standard() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("alone.cpp");
    std::fs::write(&source, "#include <macula.hpp>\n#include <macula.hpp>\n").unwrap();
    for standard in ["c++17", "c++20", "c++23"] {
        for exceptions in ["-fexceptions", "-fno-exceptions"] {
            c::succeed(compiler(standard).args([exceptions, "-fsyntax-only"]).arg(&source));
        }
    }
}

#[test]
fn the_program_on_the_opening_page_compiles() {
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("opening.cpp");
    let lines = header().lines().map(str::to_owned).collect::<Vec<_>>();
    let program = lines.iter().map(|line| line.trim_start_matches(" *")).skip_while(|line| !line.contains("#include"));
    let program: Vec<&str> = program.take_while(|line| !line.starts_with(" Errors")).collect();
    std::fs::write(&source, program.join("\n")).unwrap();
    c::succeed(compiler("c++17").arg("-fsyntax-only").arg(&source));
}

#[test]
fn a_cpp_host_draws() {
    let bench = Bench::new();
    let program = build(&bench, "c++17", &[]);
    let output = c::succeed(&mut host(&bench, &program));
    assert!(output.stdout.is_empty() && output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    the_header_reaches_every_export(&program);
}

/// The host calls nothing but the header, whose functions are compiled only where they are called: what it leaves to the
/// library is what the header covers, and what was tried.
fn the_header_reaches_every_export(program: &Path) {
    let source = std::fs::read_to_string(root().join("tests/cpp/host.cpp")).unwrap();
    let undefined = String::from_utf8(c::succeed(Command::new("nm").arg("-u").arg(program)).stdout).unwrap();
    let reached: Vec<&str> = undefined.split_whitespace().filter(|name| name.starts_with("macula_")).collect();
    let exports = std::fs::read_to_string(root().join("include/exports.txt")).unwrap();
    for name in exports.lines() {
        assert!(!source.contains(&format!("{name}(")), "tests/cpp/host.cpp calls {name} without the header");
        assert!(reached.contains(&name), "macula.hpp, or its host tests/cpp/host.cpp, does without {name}");
    }
}

/// Memory errors, leaks and undefined behaviour of the header. What the library itself keeps until the process ends is
/// not the header's.
#[test]
fn sanitizers_find_no_fault_in_a_cpp_host() {
    let bench = Bench::new();
    let flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"];
    let program = build(&bench, "c++20", &flags);
    let symbols = c::succeed(Command::new("nm").arg(&program)).stdout;
    assert!(String::from_utf8_lossy(&symbols).contains("__asan_init"), "the address sanitizer is not in the program");
    let suppressions = bench.folder().join("suppressions");
    std::fs::write(&suppressions, "leak:libmacula.so\n").unwrap();
    let options = format!("suppressions={}:print_suppressions=0", suppressions.display());
    c::succeed(host(&bench, &program).env("LSAN_OPTIONS", options));
}
