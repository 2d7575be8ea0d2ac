//! `cargo xtask demo`: the main job, done by C hosts, with a picture at the end.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::place::{cargo, out, root, step, target};
use crate::python;

/// The subjects that are found: folder of pictures, trigger, class noun.
const SUBJECTS: [(&str, &str, &str); 2] = [("green-apple", "<s1>", "apple"), ("cherries", "<s2>", "fruit")];

/// The word that is erased, and what is to be drawn in its place.
const ERASED: (&str, &str) = ("tiger", "an animal");

/// Builds the library, compiles the C examples against the header, finds two subjects in pictures of them and the neurons
/// of a word to forget, and draws `out/demo.png` with what was found; then `out/decomposed.png`, the plain and the
/// decomposed process side by side.
pub fn run() -> Result<()> {
    let runtime = python::onnxruntime()?;
    step("build the library", cargo()?.args(["build", "--release", "--lib"]))?;
    let [discover, erase, compose, decomposed] = ["discover", "erase", "compose", "decomposed"].map(compile_example);
    let (discover, erase, compose, decomposed) = (discover?, erase?, compose?, decomposed?);
    let models = root().join("models");
    let model = models.join("emoji/onnx");
    let mut concepts = Vec::new();
    for (name, trigger, noun) in SUBJECTS {
        let pictures = lay_out(&models.join("emoji/subjects").join(name), &out()?.join("pictures").join(name))?;
        let concept = out()?.join(name).with_extension("safetensors");
        let find = &mut Command::new(&discover);
        find.env("MACULA_ONNXRUNTIME", &runtime).arg(&model).arg(pictures).args([trigger, noun]).arg(&concept);
        // At half the size the search is four times faster, and what it finds holds at the full one.
        find.args(["--side", "32", "--class", "4"]);
        // Shutting gives a subject's colours; its word, learnt before, and values, learnt after, give more of its form.
        find.args(["--embed", "100", "--tune", "150"]);
        step(&format!("find the neurons of {trigger} {noun}, the {name}"), find)?;
        concepts.push(concept);
    }
    let (word, anchor) = ERASED;
    let erased = out()?.join(format!("erase-{word}.safetensors"));
    let find = &mut Command::new(&erase);
    find.env("MACULA_ONNXRUNTIME", &runtime).arg(&model).arg(&erased).arg(word);
    for colour in ["blue", "white", "green"] {
        find.args([format!("a {word}"), anchor.to_owned()].map(|what| format!("{what} on a {colour} background")));
    }
    find.args(["--side", "32", "--class", "4"]);
    step(&format!("find the neurons of the word {word}"), find)?;
    concepts.push(erased);
    let picture = out()?.join("demo.png");
    let draw = &mut Command::new(compose);
    draw.env("MACULA_ONNXRUNTIME", &runtime).arg(&model).args(concepts).arg(&picture);
    // More carries tuned weights too far.
    draw.args(["--guidance", "2"]);
    step("draw", draw)?;
    let sheet = out()?.join("decomposed.png");
    let draw = &mut Command::new(decomposed);
    draw.env("MACULA_ONNXRUNTIME", runtime).arg(model).arg(&sheet);
    step("draw with early steps on small states", draw)?;
    println!("The pictures are {} and {}", picture.display(), sheet.display());
    Ok(())
}

/// Copies the pictures to learn from into a folder of their own: a subject's folder also holds those to test on.
fn lay_out(subject: &Path, folder: &Path) -> Result<PathBuf> {
    fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    for number in 1..=4 {
        let name = format!("{number}.png");
        fs::copy(subject.join(&name), folder.join(&name))
            .with_context(|| format!("copy {name} of {}", subject.display()))?;
    }
    Ok(folder.to_owned())
}

/// Compiles `examples/c/<name>.c` against the header and the release library, which stands beside the program under its
/// SONAME, as in an installed tree.
pub fn compile_example(name: &str) -> Result<PathBuf> {
    let folder = target()?.join("examples-c");
    fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    let library = folder.join("libmacula.so.0");
    fs::copy(target()?.join("release/libmacula.so"), &library).context("copy the library")?;
    let program = folder.join(name);
    let compile = &mut Command::new(std::env::var("CC").unwrap_or_else(|_| "cc".into()));
    compile.args(["-std=c11", "-O2", "-Wall", "-Wextra", "-I"]).arg(root().join("include"));
    compile.arg(root().join(format!("examples/c/{name}.c"))).arg("-o").arg(&program);
    compile.arg(&library).args(["-Wl,-rpath,$ORIGIN", "-lm"]);
    step(&format!("compile examples/c/{name}.c"), compile)?;
    Ok(program)
}
