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
use std::sync::OnceLock;

use c::Bench;
use header::{Function, Parameter};

/// A C program that can call every export of the header with stand-ins of the right types; `tests/c/walk.h` drives it.
fn walk_source() -> String {
    let macros: Vec<String> = header::items()
        .into_iter()
        .filter_map(|item| {
            item.code.strip_prefix("#define ")?.split(' ').next()?.strip_suffix("_INIT").map(str::to_lowercase)
        })
        .collect();
    let mut source = String::from("#include \"world.h\"\n\n#define ALL (-2)\n");
    source += "enum place { NUMBER, NULLABLE, REQUIRED };\n\n";
    source += "struct walked {\n  const char *name;\n  macula_status (*call)(int);\n  int count, can_fail;\n";
    source += "  enum place places[8];\n  const char *names[8];\n};\n";
    if cfg!(feature = "inject") {
        source += "#define INJECT\n";
    }
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

/// A folder with a small model of random weights that draws in pixel space.
fn model() -> PathBuf {
    static MODEL: OnceLock<PathBuf> = OnceLock::new();
    support::onnxruntime();
    MODEL.get_or_init(|| support::fixture("pipelines.py", &["pixel"]).join("model")).clone()
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

#[test]
fn the_boundary_holds_without_a_model() {
    let bench = Bench::new();
    bench.run(&bench.compile("boundary"), &[bench.folder()]);
}

#[test]
fn a_cancel_at_any_moment_leaves_the_next_picture_as_it_was() {
    let bench = Bench::new();
    bench.run(&bench.compile("cancel"), &[&model()]);
}

#[test]
fn the_host_is_left_as_it_was() {
    let bench = Bench::new();
    bench.run(&bench.compile("host_state"), &[&model()]);
}

#[test]
fn the_library_can_be_loaded_and_unloaded_a_hundred_times() {
    let bench = Bench::new();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/c/load.c");
    let program = bench.compile_file(&source, &[]);
    bench.run(&program, &[&bench.folder().join("libmacula.so.0"), &model()]);
}

#[test]
fn a_program_may_exit_at_any_point() {
    let bench = Bench::new();
    let program = bench.compile("exit");
    for at in ["loaded", "runtime", "pipeline", "drawn", "drawing", "thread", "quick"] {
        for _ in 0..3 {
            bench.run(&program, &[Path::new(at), &model()]);
        }
    }
}

#[test]
fn drawing_composing_and_denoising_work_from_c() {
    let bench = Bench::new();
    // A well-formed model whose shapes do not fit each other when it runs.
    let broken = bench.folder().join("broken");
    copy(&model(), &broken);
    let graph = broken.join("unet/model.onnx");
    let mut bytes = std::fs::read(&graph).unwrap();
    let places: Vec<usize> = (0..bytes.len() - 7).filter(|&at| &bytes[at..at + 7] == b"Softmax").collect();
    assert!(!places.is_empty());
    places.iter().for_each(|&at| bytes[at..at + 7].copy_from_slice(b"Flatten"));
    std::fs::write(&graph, bytes).unwrap();
    bench.run(&bench.compile("draw"), &[&model(), bench.folder(), &broken]);
}

#[test]
fn schedules_are_read_walked_and_drawn_with_from_c() {
    let bench = Bench::new();
    let emoji = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/emoji");
    let arguments = [&emoji.join("onnx"), &emoji.join("subjects/octopus"), bench.folder()];
    bench.run(&bench.compile("schedule"), &arguments.map(AsRef::as_ref));
}

#[test]
fn neurons_are_found_from_c() {
    let bench = Bench::new();
    let emoji = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/emoji");
    let arguments = [&emoji.join("onnx"), &emoji.join("subjects/octopus"), bench.folder()];
    bench.run(&bench.compile("discover"), &arguments.map(AsRef::as_ref));
}

#[test]
fn concepts_are_tuned_together_from_c() {
    let bench = Bench::new();
    let emoji = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/emoji");
    let arguments = [&emoji.join("onnx"), &emoji.join("subjects"), bench.folder()];
    bench.run(&bench.compile("together"), &arguments.map(AsRef::as_ref));
}

/// The bytes of a value without padding.
fn bytes_of<T>(value: &T) -> Vec<u8> {
    // SAFETY: the option structs are repr(C) and laid out without padding, so that every byte is set.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }.to_vec()
}

/// NULL options stand for the library's defaults, which must be those of the macros.
#[test]
fn the_init_macros_are_the_defaults_of_the_library() {
    use macula::capi::{concept, denoise, discovery, draw, pipeline, runtime, schedule, session, together, trajectory};
    let defaults = [
        ("macula_runtime_options", bytes_of(&runtime::macula_runtime_options::default())),
        ("macula_session_options", bytes_of(&session::macula_session_options::default())),
        ("macula_concept_options", bytes_of(&concept::macula_concept_options::default())),
        ("macula_pipeline_options", bytes_of(&pipeline::macula_pipeline_options::default())),
        ("macula_choose_options", bytes_of(&schedule::macula_choose_options::default())),
        ("macula_trajectory_options", bytes_of(&trajectory::macula_trajectory_options::default())),
        ("macula_draw_options", bytes_of(&draw::macula_draw_options::default())),
        ("macula_discover_options", bytes_of(&discovery::macula_discover_options::default())),
        ("macula_together_options", bytes_of(&together::macula_together_options::default())),
        ("macula_denoise_inputs", bytes_of(&denoise::macula_denoise_inputs::default())),
    ];
    let structs = header::items().into_iter().filter(|item| item.code.contains("_INIT {"));
    let options = structs.filter(|item| !item.code.contains("_INFO_INIT") && item.code.contains("sizeof"));
    assert_eq!(options.count(), defaults.len(), "an option struct is not compared here");
    let bench = Bench::new();
    let mut source = String::from("#include <macula.h>\n#include <stdio.h>\nint main(int argc, char **argv) {\n");
    source += "  FILE *file = argc == 2 ? fopen(argv[1], \"wb\") : NULL;\n  if (!file) return 1;\n";
    for (name, _) in &defaults {
        writeln!(source, "  {{ {name} x = {}_INIT; fwrite(&x, sizeof x, 1, file); }}", name.to_uppercase()).unwrap();
    }
    source += "  return fclose(file);\n}\n";
    let path = bench.folder().join("defaults.c");
    std::fs::write(&path, source).unwrap();
    let written = bench.folder().join("defaults.bin");
    bench.run(&bench.compile_file(&path, &[]), &[&written]);
    let written = std::fs::read(written).unwrap();
    let mut rest = written.as_slice();
    for (name, bytes) in &defaults {
        assert!(rest.len() >= bytes.len(), "{name} is shorter in C");
        assert_eq!(&rest[..bytes.len()], bytes.as_slice(), "{name}_INIT is not the library's default");
        rest = &rest[bytes.len()..];
    }
    assert!(rest.is_empty());
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() { copy(&path, &target) } else { _ = std::fs::copy(&path, &target).unwrap() }
    }
}

#[test]
fn every_status_is_reached_by_a_c_test() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/c");
    let sources: String = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| std::fs::read_to_string(entry.unwrap().path()).unwrap())
        .collect();
    let text = header::text();
    let values = text.lines().filter_map(|line| line.trim().strip_prefix("MACULA_STATUS_")?.split(' ').next());
    for name in values {
        let name = format!("MACULA_STATUS_{name}");
        let reached = sources.contains(&format!("EXPECT({name},")) || sources.contains(&format!("status != {name})"));
        assert!(reached || name == "MACULA_STATUS_OK", "no C test expects {name}");
    }
}

#[test]
fn eight_threads_draw_what_one_draws() {
    let bench = Bench::new();
    bench.run(&bench.compile("threads"), &[&model()]);
}

/// Statuses of ONNX Runtime that cannot be had or used; each must come within a second.
#[test]
fn a_runtime_that_is_not_there_is_a_status() {
    let bench = Bench::new();
    bench.run(&bench.compile("no_runtime"), &[bench.folder()]);
}

#[test]
fn a_host_may_bring_its_own_onnx_runtime() {
    let bench = Bench::new();
    let library = std::fs::canonicalize(support::onnxruntime()).unwrap();
    bench.run(&bench.compile("host_runtime"), &[&library, &model()]);
}

/// The C tests without a model under Valgrind: every read and write of the boundary, and no block lost.
#[test]
fn valgrind_finds_no_fault_at_the_boundary() {
    let bench = Bench::new();
    let program = bench.compile("boundary");
    let mut command = Command::new("valgrind");
    command.args(["--quiet", "--error-exitcode=9", "--leak-check=full", "--show-leak-kinds=definite,indirect"]);
    command.args(["--errors-for-leak-kinds=definite,indirect"]).arg(&program).arg(bench.folder());
    c::succeed(command.env("UNDER_VALGRIND", "1"));
}

#[cfg(feature = "inject")]
#[test]
fn a_panic_in_any_export_is_a_status() {
    walk("panic");
}
