//! The C boundary, tried by C programs: every export with NULL in every pointer place, in a forked child, from inside a
//! callback and (feature `inject`) with a panic; handles, host state, loading and unloading, cancelling, memory errors.
#![allow(clippy::unwrap_used)]

#[path = "support/c.rs"]
mod c;
#[path = "support/header.rs"]
mod header;
mod support;

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use c::Bench;
use header::{Function, Parameter};

/// A C program that can call every export of the header with stand-ins of the right types; `tests/c/walk.h` drives it.
fn walk_source() -> String {
    let macros: Vec<String> = header::items()
        .into_iter()
        .filter_map(|item| item.code.strip_prefix("#define ")?.split(' ').next()?.strip_suffix("_INIT").map(str::to_lowercase))
        .collect();
    let mut source = String::from("#include \"world.h\"\n\n#define ALL (-2)\n");
    let functions = header::functions();
    for function in &functions {
        source += &caller(function, &macros);
    }
    source += "\nstatic const struct walked walked[] = {\n";
    for function in &functions {
        let places = function.parameters.iter().map(|parameter| match parameter {
            parameter if !parameter.is_pointer() => "NUMBER".to_owned(),
            parameter if parameter.may_be_null() => "NULLABLE".to_owned(),
            _ => "REQUIRED".to_owned(),
        });
        let names = function.parameters.iter().map(|parameter| format!("\"{}\"", parameter.name));
        writeln!(
            source,
            "  {{\"{0}\", call_{0}, {1}, {2}, {{{3}}}, {{{4}}}}},",
            function.name,
            function.parameters.len(),
            i32::from(function.result == "macula_status"),
            places.chain(["NUMBER".to_owned()]).collect::<Vec<_>>().join(", "),
            names.chain(["\"\"".to_owned()]).collect::<Vec<_>>().join(", "),
        )
        .unwrap();
    }
    source += "};\n\n#include \"walk.h\"\n";
    source
}

fn caller(function: &Function, macros: &[String]) -> String {
    let mut text = format!("\nstatic macula_status call_{}(int null_at) {{\n  (void)null_at;\n", function.name);
    let mut after = String::new();
    for (at, parameter) in function.parameters.iter().enumerate() {
        let Parameter { c_type, name, .. } = parameter;
        if !parameter.is_pointer() {
            writeln!(text, "  {c_type} a{at} = 1;").unwrap();
            continue;
        }
        let bare = c_type.trim_start_matches("const ").trim_end_matches('*').trim();
        let stand_in = if c_type.ends_with("**") && bare.starts_with("macula_") {
            writeln!(text, "  {bare} *made{at} = NULL;").unwrap();
            writeln!(after, "  if (made{at}) {bare}_free(made{at});").unwrap();
            format!("&made{at}")
        } else if macros.iter().any(|known| known == bare) {
            writeln!(text, "  {bare} struct{at} = {}_INIT;", bare.to_uppercase()).unwrap();
            format!("world_fill_{bare}(&struct{at})")
        } else if bare.starts_with("macula_") && header::functions().iter().any(|f| f.name == format!("{bare}_free")) {
            format!("world_{bare}")
        } else if c_type == "const char *" {
            format!("world_text(\"{name}\")")
        } else {
            format!("({c_type})world_memory()")
        };
        writeln!(text, "  {c_type} a{at} = null_at == {at} || null_at == ALL ? NULL : {stand_in};").unwrap();
    }
    let arguments: Vec<String> = (0..function.parameters.len()).map(|at| format!("a{at}")).collect();
    let call = format!("{}({})", function.name, arguments.join(", "));
    if function.result == "macula_status" {
        writeln!(text, "  macula_status status = {call};\n{after}  return status;\n}}").unwrap();
    } else {
        writeln!(text, "  (void){call};\n  return MACULA_STATUS_OK;\n}}").unwrap();
    }
    text
}

fn walk(mode: &str) {
    let bench = Bench::new();
    let source = bench.folder().join("walk.c");
    std::fs::write(&source, walk_source()).unwrap();
    let program = bench.compile_file(&source, &["-lmacula"]);
    bench.run(&program, &[Path::new(mode), &model(), bench.folder()]);
}

#[test]
fn every_export_answers_null_in_every_pointer_place() {
    walk("null");
}

#[test]
fn every_export_refuses_to_work_in_a_forked_child() {
    walk("fork");
}

#[test]
fn every_export_can_be_called_from_inside_a_callback() {
    walk("callback");
}

#[cfg(feature = "inject")]
#[test]
fn a_panic_in_any_export_is_a_status() {
    walk("panic");
}
