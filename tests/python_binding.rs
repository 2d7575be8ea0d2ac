//! The Python package: its wheel in an empty environment, its signatures held against the C compiler, its type hints, a
//! catalogue found with Ray, and its life beside the `onnxruntime` package, of the same version, an older and a newer one.
#![allow(clippy::unwrap_used)]

#[path = "support/c.rs"]
mod c;
#[path = "support/header.rs"]
mod header;
#[path = "support/install.rs"]
mod install;
mod support;

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use c::Bench;
use install::{text, tool, xtask};

/// An `onnxruntime` that is older than the one of the tests.
const OLDER: &str = "1.23.2";

/// A folder with the wheel, and an environment that has nothing but it, NumPy and tqdm, put there by pip.
static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = install::empty_folder("python");
    let library = c::library();
    xtask(&["wheel", "--built", text(library.parent().unwrap()), "--out", text(&folder)]);
    let environment = folder.join("environment");
    c::succeed(Command::new(support::interpreter()).args(["-m", "venv"]).arg(&environment));
    let mut pip = Command::new(environment.join("bin/python"));
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", &wheel(&folder, "progress")]);
    c::succeed(pip.args(PINS).current_dir(root().join("tests/python")));
    folder
});

/// The pinned versions of what is installed for a test, in `tests/python`.
const PINS: [&str; 4] = ["--constraint", "requirements.txt", "--constraint", "tools.txt"];

/// The wheel with one of its extras, as pip is told of it.
fn wheel(folder: &Path, extra: &str) -> String {
    let wheel = folder.join(format!("macula-{}-py3-none-linux_x86_64.whl", env!("CARGO_PKG_VERSION")));
    assert!(wheel.is_file(), "there is no {}", wheel.display());
    format!("{}[{extra}]", wheel.display())
}

/// The Python of the environment.
fn interpreter() -> PathBuf {
    FOLDER.join("environment/bin/python")
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Puts packages where uv's arguments say: the same as pip's, several times faster.
fn install_packages(arguments: &[&str]) {
    let mut command = tool("uv");
    c::succeed(command.current_dir(root().join("tests/python")).args(["pip", "install", "--quiet"]).args(arguments));
}

/// Runs a script of `tests/python` in an environment, where nothing tells the package where ONNX Runtime is.
fn python(interpreter: &Path, script: &str) -> Command {
    let mut command = Command::new(interpreter);
    command.current_dir(&*FOLDER).arg(root().join("tests/python").join(script));
    for variable in ["MACULA_ONNXRUNTIME", "MACULA_LIBRARY", "PYTHONPATH"] {
        command.env_remove(variable);
    }
    command
}

#[test]
fn the_package_does_what_the_library_does() {
    let bench = Bench::new();
    let layout = bench.folder().join("layout");
    std::fs::write(&layout, structs(&bench) + &functions(&bench)).unwrap();
    c::succeed(python(&interpreter(), "binding.py").arg(root()).arg(bench.folder()).arg(&layout));
    let figures = std::fs::read_to_string(bench.folder().join("figures.json")).unwrap();
    assert!(figures.contains("python_overhead_us"), "{figures}");
}

/// Size and members of every struct, one JSON object a line, as the C compiler lays them out.
fn structs(bench: &Bench) -> String {
    let mut source = String::from("#include <macula.h>\n#include <stdio.h>\n\n");
    source += "static void hex(const void *from, size_t size) {\n  const unsigned char *bytes = from;\n";
    source += "  printf(\", \\\"initial\\\": \\\"\");\n  while (size--) printf(\"%02x\", *bytes++);\n  printf(\"\\\"\");\n}\n\n";
    source += "int main(void) {\n";
    let items = header::items();
    for item in &items {
        let Some((members, name)) = item.code.strip_prefix("typedef struct {").and_then(|code| code.rsplit_once('}'))
        else {
            continue;
        };
        let name = name.trim().trim_end_matches(';');
        writeln!(source, "  printf(\"{{\\\"kind\\\": \\\"struct\\\", \\\"name\\\": \\\"{name}\\\", \\\"size\\\": %zu, \\\"members\\\": [\", sizeof({name}));").unwrap();
        for (at, member) in members.split(';').map(str::trim).filter(|member| !member.is_empty()).enumerate() {
            let member = member.rsplit([' ', '*']).next().unwrap().split('[').next().unwrap();
            let comma = if at > 0 { ", " } else { "" };
            writeln!(source, "  printf(\"{comma}[\\\"{member}\\\", %zu, %zu]\", offsetof({name}, {member}), sizeof((({name} *)0)->{member}));").unwrap();
        }
        source += "  printf(\"]\");\n";
        let initialiser = format!("#define {}_INIT ", name.to_uppercase());
        if items.iter().any(|item| item.code.starts_with(&initialiser)) {
            writeln!(source, "  {{ static const {name} x = {}_INIT; hex(&x, sizeof x); }}", name.to_uppercase())
                .unwrap();
        }
        source += "  printf(\"}\\n\");\n";
    }
    source += "  return 0;\n}\n";
    let path = bench.folder().join("structs.c");
    std::fs::write(&path, source).unwrap();
    let program = bench.compile_file(&path, &[]);
    String::from_utf8(c::succeed(&mut Command::new(program)).stdout).unwrap()
}

/// Result and parameters of every function: what they point to, or their size as the C compiler says.
fn functions(bench: &Bench) -> String {
    let functions = header::functions();
    let mut source = String::from("#include <macula.h>\n#include <stdio.h>\n\nint main(void) {\n");
    for function in &functions {
        let types = std::iter::once(&function.result).chain(function.parameters.iter().map(|one| &one.c_type));
        let described: Vec<String> = types.clone().map(|c_type| described(c_type)).collect();
        writeln!(
            source,
            "  printf(\"{{\\\"kind\\\": \\\"function\\\", \\\"name\\\": \\\"{}\\\", \\\"result\\\": {}, \\\"parameters\\\": [{}]}}\\n\"{});",
            function.name,
            described[0],
            described[1..].join(", "),
            types.map(|c_type| measured(c_type)).collect::<String>(),
        )
        .unwrap();
    }
    source += "  return 0;\n}\n";
    let path = bench.folder().join("functions.c");
    std::fs::write(&path, source).unwrap();
    let program = bench.compile_file(&path, &[]);
    String::from_utf8(c::succeed(&mut Command::new(program)).stdout).unwrap()
}

/// What a pointer leads to; `None` for a number.
fn target(c_type: &str) -> Option<String> {
    let inner = c_type.strip_suffix('*')?.replace("const ", "").replace(" const", "");
    Some(inner.trim().to_owned())
}

/// Whether a type is that of a handle, which only its functions can look into.
fn is_handle(c_type: &str) -> bool {
    header::items().iter().any(|item| item.code == format!("typedef struct {c_type} {c_type};"))
}

fn described(c_type: &str) -> String {
    match target(c_type) {
        None => "[\\\"number\\\", %zu]".to_owned(),
        Some(inner) if inner == "void" || is_handle(&inner) => "[\\\"pointer\\\", \\\"\\\"]".to_owned(),
        Some(inner) if inner == "char" => "[\\\"pointer\\\", \\\"char\\\"]".to_owned(),
        Some(inner) if inner.starts_with("macula_") && !inner.ends_with('*') => {
            format!("[\\\"pointer\\\", \\\"{inner}\\\"]")
        }
        Some(_) => "[\\\"pointer\\\", \\\"%zu bytes\\\"]".to_owned(),
    }
}

/// The argument for the `%zu` of [`described`], if it has one.
fn measured(c_type: &str) -> String {
    let measured = if described(c_type).contains("%zu") {
        target(c_type).unwrap_or_else(|| c_type.to_owned())
    } else {
        return String::new();
    };
    format!(", sizeof({measured})")
}

#[test]
fn its_type_hints_hold() {
    let cache = tempfile::tempdir().unwrap();
    let mypy = |folder: &str, of: &[&str]| {
        let mut command = tool("mypy");
        command.current_dir(root().join(folder)).arg("--cache-dir").arg(cache.path());
        c::succeed(command.arg("--python-executable").arg(interpreter()).args(of));
    };
    mypy("bindings/python", &["macula"]);
    // From here it is the installed package that a host imports.
    mypy("tests/python", &["--strict", "typed_host.py"]);
}

#[test]
fn a_catalogue_is_found_by_ray() {
    let environment = FOLDER.join("ray");
    let interpreter = environment.join("bin/python");
    c::succeed(tool("uv").args(["venv", "--quiet", "--python"]).arg(support::interpreter()).arg(&environment));
    let wheel = wheel(&FOLDER, "progress,ray");
    install_packages(&[&["--python", text(&interpreter), &*wheel], &PINS[..]].concat());
    let folder = tempfile::tempdir().unwrap();
    c::succeed(python(&interpreter, "catalogue.py").arg(root()).arg(folder.path()));
}

#[test]
fn it_lives_beside_the_onnxruntime_package() {
    let folder = &*FOLDER;
    let ours = own_version();
    for version in [ours.as_str(), OLDER] {
        let package = format!("onnxruntime=={version}");
        install_packages(&["--python", text(&interpreter()), "--target", text(&folder.join(version)), &package]);
    }
    // Our version, and that of the package: the same, an older and a newer one.
    for (own, package) in [(&*ours, &*ours), (&*ours, OLDER), (OLDER, &*ours)] {
        for first in ["macula", "onnxruntime"] {
            let mut command = python(&interpreter(), "beside_onnxruntime.py");
            command.arg(root().join("models/emoji/onnx")).arg(first).env("PYTHONPATH", folder.join(package));
            if own != ours {
                command.env("MACULA_ONNXRUNTIME", folder.join(own).join("onnxruntime/capi"));
            }
            let said = String::from_utf8(c::succeed(&mut command).stdout).unwrap();
            let words: Vec<&str> = said.split_whitespace().collect();
            assert_eq!(words[..2], [own, package], "{first} first");
            let difference: f64 = words[2].parse().unwrap();
            assert!(difference < 1e-5, "{own} beside {package}, {first} first: the predictions differ by {difference}");
        }
    }
}

/// The version of ONNX Runtime in the wheel: that of the tests.
fn own_version() -> String {
    let library = std::fs::canonicalize(support::onnxruntime()).unwrap();
    let name = library.file_name().unwrap().to_str().unwrap();
    name.strip_prefix("libonnxruntime.so.").expect("the version in the library's name").to_owned()
}
