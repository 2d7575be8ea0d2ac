//! `cargo xtask install`: the library as a distributor ships it, in one tree that may be moved afterwards.
//!
//! ```text
//! include/             macula.h, macula.hpp
//! lib/                 libmacula.so -> .so.0 -> .so.0.x.y, libmacula.a
//! lib/pkgconfig/       macula.pc, macula-static.pc
//! lib/cmake/Macula/    find_package(Macula CONFIG): Macula::macula, Macula::macula_static
//! lib/onnxruntime/     the ONNX Runtime that was chosen, where the library looks for it
//! share/licenses/macula/
//! ```

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::licences;
use crate::place::{cargo, root, step, target};
use crate::python;

/// The number in the SONAME, as build.rs gives it to the library.
const SOVERSION: &str = "0";

/// Files whose `@VERSION@` and `@SOVERSION@` are filled in: what they are made from, and where they go.
const TEMPLATES: [(&str, &str); 4] = [
    (include_str!("../../packaging/macula.pc"), "lib/pkgconfig/macula.pc"),
    (include_str!("../../packaging/macula-static.pc"), "lib/pkgconfig/macula-static.pc"),
    (include_str!("../../packaging/MaculaConfig.cmake"), "lib/cmake/Macula/MaculaConfig.cmake"),
    (include_str!("../../packaging/MaculaConfigVersion.cmake"), "lib/cmake/Macula/MaculaConfigVersion.cmake"),
];

/// Installs under `prefix`. `built` is a folder that holds `libmacula.so` and `libmacula.a`; without it they are built.
pub fn run(prefix: &Path, built: Option<&Path>) -> Result<()> {
    let built = match built {
        Some(folder) => folder.to_owned(),
        None => {
            step("build the library", cargo()?.args(["build", "--release", "--lib"]))?;
            target()?.join("release")
        }
    };
    let tree = Tree { prefix };
    let metadata = licences::metadata()?;
    let version = licences::version(&metadata)?;
    tree.copy(&root().join("include/macula.h"), "include/macula.h")?;
    tree.copy(&root().join("bindings/cpp/macula.hpp"), "include/macula.hpp")?;
    tree.copy(&built.join("libmacula.a"), "lib/libmacula.a")?;
    let (file, soname) = (format!("libmacula.so.{version}"), format!("libmacula.so.{SOVERSION}"));
    tree.copy(&built.join("libmacula.so"), &format!("lib/{file}"))?;
    tree.link(&file, &format!("lib/{soname}"))?;
    tree.link(&soname, "lib/libmacula.so")?;
    for (text, to) in TEMPLATES {
        tree.write(&text.replace("@VERSION@", version).replace("@SOVERSION@", SOVERSION), to)?;
    }
    install_runtime(&tree, &python::onnxruntime()?)?;
    for name in ["LICENSE-MIT", "LICENSE-APACHE"] {
        tree.copy(&root().join(name), &format!("share/licenses/macula/{name}"))?;
    }
    tree.write(&licences::of_dependencies(&metadata)?, "share/licenses/macula/THIRD-PARTY.txt")
}

/// Copies ONNX Runtime with the provider libraries beside it, and the licences that its package has one folder above.
fn install_runtime(tree: &Tree, library: &Path) -> Result<()> {
    let library = library.canonicalize().with_context(|| format!("find {}", library.display()))?;
    let folder = library.parent().context("ONNX Runtime's library has no folder")?;
    for path in files(folder)? {
        let name = name(&path)?;
        if name.starts_with("libonnxruntime") && name.contains(".so") {
            tree.copy(&path, &format!("lib/onnxruntime/{name}"))?;
        }
    }
    for path in files(folder.parent().unwrap_or(folder))? {
        let name = name(&path)?;
        if ["LICENSE", "ThirdPartyNotices"].iter().any(|wanted| name.starts_with(wanted)) {
            tree.copy(&path, &format!("share/licenses/macula/onnxruntime/{name}"))?;
        }
    }
    Ok(())
}

fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))?;
    let paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    Ok(paths.into_iter().filter(|path| path.is_file()).collect())
}

fn name(path: &Path) -> Result<&str> {
    path.file_name().and_then(|name| name.to_str()).with_context(|| format!("{} has no name", path.display()))
}

/// The installed tree. A file that is there is unlinked first, so that a program that runs with it keeps the old one.
struct Tree<'a> {
    prefix: &'a Path,
}

impl Tree<'_> {
    fn copy(&self, from: &Path, to: &str) -> Result<()> {
        let to = self.place(to)?;
        fs::copy(from, &to).with_context(|| format!("copy {} to {}", from.display(), to.display()))?;
        Ok(())
    }

    fn write(&self, text: &str, to: &str) -> Result<()> {
        let to = self.place(to)?;
        fs::write(&to, text).with_context(|| format!("write {}", to.display()))
    }

    fn link(&self, to: &str, at: &str) -> Result<()> {
        let at = self.place(at)?;
        symlink(to, &at).with_context(|| format!("link {}", at.display()))
    }

    /// An empty place for a file, with its folder made.
    fn place(&self, at: &str) -> Result<PathBuf> {
        let path = self.prefix.join(at);
        let folder = path.parent().context("a file needs a folder")?;
        fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("replace {}", path.display()))
            }
            _ => Ok(path),
        }
    }
}
