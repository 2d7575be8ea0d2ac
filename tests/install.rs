//! An installed tree, moved to another folder: C programs find it by pkg-config and by CMake, shared and static, and run.
#![allow(clippy::unwrap_used)]

#[path = "support/c.rs"]
mod c;
#[path = "support/install.rs"]
mod install;
mod support;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use install::{text, tool};

/// The moved tree; the blank in its path is one that users have.
static MOVED: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = install::empty_folder("install");
    let (first, moved) = (folder.join("first"), folder.join("moved/in here"));
    install::install(&first);
    std::fs::create_dir(folder.join("moved")).unwrap();
    std::fs::rename(&first, &moved).unwrap();
    moved
});

fn prefix() -> &'static Path {
    &MOVED
}

fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/install")
}

/// Runs a consumer; it must draw, and say this version and the ONNX Runtime of the moved tree.
fn draws(program: &Path, with_runtime: bool) {
    let folder = tempfile::tempdir().unwrap();
    let picture = folder.path().join("picture.png");
    let mut command = Command::new(program);
    command.env_remove("MACULA_ONNXRUNTIME").env("XDG_DATA_HOME", folder.path());
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("models/emoji/onnx")).arg(&picture);
    let runtime = prefix().join("lib/onnxruntime");
    if with_runtime {
        command.arg(&runtime);
    }
    let said = String::from_utf8(c::succeed(&mut command).stdout).unwrap();
    let begin =
        format!("{} {}/libonnxruntime.so", env!("CARGO_PKG_VERSION"), runtime.canonicalize().unwrap().display());
    assert!(said.starts_with(&begin), "{said} does not begin with {begin}");
    assert!(std::fs::read(&picture).unwrap().starts_with(b"\x89PNG"));
}

/// What pkg-config says of a package, as arguments.
fn pkg_config(package: &str, questions: &[&str]) -> Vec<String> {
    let mut command = tool("pkg-config");
    command.env("PKG_CONFIG_PATH", prefix().join("lib/pkgconfig")).args(questions).arg(package);
    let said = String::from_utf8(c::succeed(&mut command).stdout).unwrap();
    // A shell splits the words; blanks in paths are escaped for it.
    let split = c::succeed(Command::new("sh").args(["-c", &format!("printf '%s\\n' {said}")]));
    String::from_utf8(split.stdout).unwrap().lines().map(str::to_owned).collect()
}

fn build_by_pkg_config(package: &str, folder: &Path) -> PathBuf {
    let program = folder.join(package);
    let mut command = Command::new(c::compiler());
    command.args(["-std=c11", "-Wall", "-Wextra", "-Werror"]).arg(sources().join("consumer.c")).arg("-o").arg(&program);
    command.args(pkg_config(package, &["--cflags", "--libs"]));
    c::succeed(command.arg(format!("-Wl,-rpath,{}", prefix().join("lib").display())));
    program
}

#[test]
fn a_program_is_built_by_pkg_config() {
    let folder = tempfile::tempdir().unwrap();
    assert_eq!(pkg_config("macula", &["--modversion"]), [env!("CARGO_PKG_VERSION")]);
    let shared = build_by_pkg_config("macula", folder.path());
    assert!(needs_the_library(&shared));
    draws(&shared, false);
    let runtime = &pkg_config("macula-static", &["--variable=onnxruntime"])[0];
    assert_eq!(Path::new(runtime).canonicalize().unwrap(), prefix().join("lib/onnxruntime").canonicalize().unwrap());
    let linked = build_by_pkg_config("macula-static", folder.path());
    assert!(!needs_the_library(&linked));
    draws(&linked, true);
}

#[test]
fn a_program_is_built_by_cmake() {
    let folder = tempfile::tempdir().unwrap();
    let build = folder.path().join("build");
    c::succeed(&mut configure(&build, env!("CARGO_PKG_VERSION")));
    c::succeed(tool("cmake").arg("--build").arg(&build));
    let (shared, linked) = (build.join("with_macula"), build.join("with_macula_static"));
    assert!(needs_the_library(&shared) && !needs_the_library(&linked));
    draws(&shared, false);
    draws(&linked, true);
}

#[test]
fn cmake_refuses_a_newer_version_and_another_soname() {
    for wanted in ["0.999.0", "1.0"] {
        let folder = tempfile::tempdir().unwrap();
        let output = configure(folder.path(), wanted).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains("requested version"), "{wanted}: {said}");
    }
}

fn configure(build: &Path, wanted: &str) -> Command {
    let mut command = tool("cmake");
    command.args(["-G", "Ninja", "-S", text(&sources()), "-B", text(build)]);
    command.arg(format!("-DCMAKE_PREFIX_PATH={}", prefix().display())).arg(format!("-DWANTED={wanted}"));
    command
}

fn needs_the_library(program: &Path) -> bool {
    let output = c::succeed(Command::new("readelf").arg("-d").arg(program));
    String::from_utf8(output.stdout).unwrap().contains("Shared library: [libmacula.so.0]")
}

#[test]
fn the_tree_holds_what_its_parts_need() {
    let lib = prefix().join("lib");
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(std::fs::read_link(lib.join("libmacula.so")).unwrap(), Path::new("libmacula.so.0"));
    let real = format!("libmacula.so.{version}");
    assert_eq!(std::fs::read_link(lib.join("libmacula.so.0")).unwrap(), Path::new(&real));
    for name in ["macula.h", "macula.hpp"] {
        assert!(prefix().join("include").join(name).is_file(), "{name}");
    }
    let licences = prefix().join("share/licenses/macula");
    for name in ["LICENSE-MIT", "LICENSE-APACHE", "onnxruntime/LICENSE", "onnxruntime/ThirdPartyNotices.txt"] {
        assert!(std::fs::metadata(licences.join(name)).unwrap().len() > 500, "{name}");
    }
    let crates = std::fs::read_to_string(licences.join("THIRD-PARTY.txt")).unwrap();
    for name in ["ort 2", "tokenizers 0", "image 0", "png 0", "libc 0"] {
        assert!(crates.contains(name), "the licence of {name} is not there");
    }
    for name in ["proptest", "clap"] {
        assert!(!crates.contains(&format!("{name} ")), "{name} is not linked into the library");
    }
}

/// A tree is installed over an older one, also while a program runs with that.
#[test]
fn installing_again_replaces_the_files() {
    let folder = tempfile::tempdir().unwrap();
    install::install(folder.path());
    let library = folder.path().join("lib/libmacula.so.0").canonicalize().unwrap();
    let held = std::fs::File::open(&library).unwrap();
    let before = std::os::unix::fs::MetadataExt::ino(&held.metadata().unwrap());
    install::install(folder.path());
    let after = std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(&library).unwrap());
    assert_ne!(before, after, "the library was written into while it was open");
}
