//! C programs that are compiled against the committed header and the shared library that Cargo built for the tests.
#![allow(dead_code, reason = "each test program uses its own part")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

/// A folder with the library under its SONAME, where programs are built.
pub struct Bench {
    folder: TempDir,
}

/// The shared library of this very build: Cargo puts it beside the test program.
pub fn library() -> PathBuf {
    let program = std::env::current_exe().expect("the test program's path");
    let beside = program.parent().expect("a folder");
    let found = [beside, beside.parent().expect("a folder above")].map(|folder| folder.join("libmacula.so"));
    let library = found.iter().find(|path| path.is_file());
    let library = library.unwrap_or_else(|| panic!("no libmacula.so in {} or above", beside.display())).clone();
    // A shared library's file name does not depend on features, so Cargo may have left another build's.
    let injects = exports(&library).iter().any(|name| name == "macula_inject_panic");
    assert_eq!(
        injects,
        cfg!(feature = "inject"),
        "{} was built with other features than this test: touch src/lib.rs and run again",
        library.display()
    );
    library
}

/// The dynamic symbols that a shared library defines, sorted.
pub fn exports(library: &Path) -> Vec<String> {
    let output = Command::new("nm").args(["-D", "--defined-only"]).arg(library).output().expect("nm");
    assert!(output.status.success(), "nm: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("names");
    let mut names: Vec<String> = text.lines().filter_map(|line| line.split(' ').nth(2).map(str::to_owned)).collect();
    names.sort();
    names
}

impl Bench {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        for name in ["libmacula.so", "libmacula.so.0"] {
            std::os::unix::fs::symlink(library(), folder.path().join(name)).expect("a link");
        }
        Self { folder }
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Compiles `tests/c/<name>.c`, with every warning an error, and links it to the library.
    pub fn compile(&self, name: &str) -> PathBuf {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/c").join(name).with_extension("c");
        self.compile_file(&source, &["-lmacula"])
    }

    /// Compiles a C file.
    pub fn compile_file(&self, source: &Path, libraries: &[&str]) -> PathBuf {
        let program = self.folder().join(source.file_stem().expect("a name"));
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut command = Command::new(compiler());
        command.args([
            "-std=c11",
            "-D_GNU_SOURCE",
            "-g",
            "-O1",
            "-Wall",
            "-Wextra",
            "-Wpedantic",
            "-Werror",
            "-pthread",
        ]);
        command.arg("-I").arg(root.join("include")).arg("-I").arg(root.join("tests/c"));
        command.arg(source).arg("-o").arg(&program).arg("-L").arg(self.folder());
        command.arg(format!("-Wl,-rpath,{}", self.folder().display())).args(libraries).args(["-lm", "-ldl"]);
        succeed(&mut command);
        program
    }

    /// Runs a program, which must exit with 0 and write nothing.
    pub fn run(&self, program: &Path, arguments: &[&Path]) {
        let output = succeed(Command::new(program).args(arguments));
        assert!(output.stdout.is_empty(), "stdout: {}", String::from_utf8_lossy(&output.stdout));
        assert!(output.stderr.is_empty(), "stderr: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// The C compiler.
pub fn compiler() -> String {
    std::env::var("CC").unwrap_or_else(|_| "cc".to_owned())
}

/// Runs a command that must succeed.
pub fn succeed(command: &mut Command) -> Output {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}
