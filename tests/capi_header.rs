//! `macula.h` is a manual and compiles alone: gates on the header and on the list of exports.
#![allow(clippy::unwrap_used)]

#[path = "support/c.rs"]
mod c;
#[path = "support/header.rs"]
mod header;

use std::path::Path;
use std::process::Command;

#[test]
fn the_header_compiles_alone_in_every_standard() {
    let folder = tempfile::tempdir().unwrap();
    for (standard, language) in
        [("c99", "c"), ("c11", "c"), ("c17", "c"), ("c2x", "c"), ("c++11", "c++"), ("c++17", "c++"), ("c++20", "c++")]
    {
        let source = folder.path().join(format!("alone.{}", if language == "c" { "c" } else { "cpp" }));
        let mut text = String::from("#include <macula.h>\n");
        // Every macro is used once, because the preprocessor alone would let any text pass.
        for item in header::items() {
            let Some(name) = item.code.strip_prefix("#define ").and_then(|code| code.split(' ').next()) else {
                continue;
            };
            if let Some(name) = name.strip_suffix("_INIT") {
                let lower = name.to_lowercase();
                text += &format!(
                    "{lower} use_{lower}(void);\n{lower} use_{lower}(void) {{ {lower} x = {name}_INIT; return x; }}\n"
                );
            } else {
                text += &format!("long use_{name}(void);\nlong use_{name}(void) {{ return {name}; }}\n");
            }
        }
        std::fs::write(&source, text).unwrap();
        let mut command = Command::new(c::compiler());
        command.args(["-x", language, &format!("-std={standard}"), "-Wall", "-Wextra", "-Werror", "-Wpedantic"]);
        command.arg("-I").arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("include"));
        command.arg("-c").arg(&source).arg("-o").arg(folder.path().join("alone.o"));
        c::succeed(&mut command);
    }
}

#[test]
fn the_program_on_the_opening_page_compiles() {
    let folder = tempfile::tempdir().unwrap();
    let program: String = header::text()
        .lines()
        .skip_while(|line| !line.contains("#include <macula.h>"))
        .take_while(|line| !line.contains("CONVENTIONS"))
        .map(|line| line.trim_start_matches(" *").to_owned() + "\n")
        .collect();
    let source = folder.path().join("opening.c");
    std::fs::write(&source, program).unwrap();
    let mut command = Command::new(c::compiler());
    command.args(["-std=c99", "-Wall", "-Wextra", "-Werror", "-Wpedantic"]);
    command.arg("-I").arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("include"));
    command.arg("-c").arg(&source).arg("-o").arg(folder.path().join("opening.o"));
    c::succeed(&mut command);
}

#[test]
fn more_than_half_of_the_header_is_comment() {
    let text = header::text();
    let (mut comment, mut all, mut inside) = (0, 0, false);
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let is_comment = inside || line.starts_with("/*") || line.starts_with("//");
        inside = (inside || line.starts_with("/*")) && !line.ends_with("*/");
        comment += usize::from(is_comment);
        all += 1;
    }
    assert!(comment * 100 >= all * 55, "{comment} of {all} lines");
}

#[test]
fn every_item_member_and_parameter_is_documented() {
    for item in header::items() {
        assert!(item.documentation.trim().len() > 3, "no comment at `{}`", item.code);
    }
    for function in header::functions() {
        for parameter in &function.parameters {
            let said = &parameter.documentation;
            assert!(!said.is_empty(), "{}: nothing is said about `{}`", function.name, parameter.name);
            if parameter.is_pointer() {
                assert!(
                    said.contains("NULL"),
                    "{}: `{}` does not say whether it may be NULL",
                    function.name,
                    parameter.name
                );
            }
        }
        let threads = ["Any thread", "One job"];
        let says = threads.iter().any(|rule| function.documentation.contains(rule));
        assert!(says, "{} does not say which threads may call it", function.name);
    }
    // Members of structs and values of enums.
    let mut previous = String::new();
    let mut depth = 0;
    for line in header::text().lines().map(str::trim).skip_while(|line| !line.starts_with("extern \"C\" {")).skip(2) {
        let member = depth > 0
            && line.contains(|c: char| c.is_ascii_alphabetic())
            && (line.ends_with(';') || line.ends_with(','));
        if member && !line.starts_with(['*', '/', '}', '#']) {
            assert!(previous.ends_with("*/"), "no comment at the member `{line}`");
        }
        if !line.starts_with(['*', '/']) {
            depth += line.matches('{').count() as i32 - line.matches('}').count() as i32;
        }
        previous = line.to_owned();
    }
}

#[test]
fn every_function_that_can_fail_returns_a_status() {
    let plain = [
        "macula_version_number",
        "macula_version_string",
        "macula_status_name",
        "macula_status_message",
        "macula_last_error",
    ];
    for function in header::functions() {
        let expected = !plain.contains(&function.name.as_str());
        assert_eq!(function.result == "macula_status", expected, "{} returns {}", function.name, function.result);
    }
}

#[test]
fn the_exports_are_the_committed_list_and_the_headers_functions() {
    let committed = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("include/exports.txt")).unwrap();
    let committed: Vec<&str> = committed.lines().collect();
    let mut exported = c::exports(&c::library());
    exported.retain(|name| name != "macula_inject_panic");
    assert_eq!(exported, committed, "include/exports.txt is not what the library exports");
    let mut declared: Vec<String> = header::functions().into_iter().map(|function| function.name).collect();
    declared.sort();
    assert_eq!(declared, committed, "the header does not declare what the library exports");
}

#[test]
fn the_library_has_its_soname_and_stays_loaded() {
    let output = c::succeed(Command::new("readelf").arg("-d").arg(c::library()));
    let dynamic = String::from_utf8(output.stdout).unwrap();
    assert!(dynamic.contains("Library soname: [libmacula.so.0]"), "{dynamic}");
    assert!(dynamic.contains("NODELETE"), "{dynamic}");
}
