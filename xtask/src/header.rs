//! Writes `include/macula.h` from the doc comments and signatures of `src/capi`.
//!
//! cbindgen turns one file at a time into one section; this puts the manual's opening page in front, each file's own
//! opening paragraph above its section, and a `*_INIT` macro after each struct that begins with `struct_size`. It is no
//! part of the crate's build: a host that embeds the crate never runs it, and the source tree is written on demand only.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use crate::python_abi;

/// The sections in the order of the header: a type is declared above its first use.
const SECTIONS: &[&str] = &[
    "version",
    "status",
    "tensor",
    "image",
    "cancel",
    "log",
    "runtime",
    "session",
    "concept",
    "pipeline",
    "composition",
    "schedule",
    "trajectory",
    "draw",
    "denoise",
    "discovery",
    "together",
    "memory",
];

/// The text of `include/macula.h`.
pub fn generate(root: &Path) -> Result<String> {
    let config = cbindgen::Config::from_root_or_default(root);
    let opening = root.join("src/capi/macula.md");
    let opening = std::fs::read_to_string(&opening).with_context(|| format!("reading {}", opening.display()))?;
    let mut header = comment(&opening);
    header.push_str(
        "\n#ifndef MACULA_H\n#define MACULA_H\n\n#include <stddef.h>\n#include <stdint.h>\n\n\
         #ifdef __cplusplus\nextern \"C\" {\n#endif\n",
    );
    for name in SECTIONS {
        section(root, name, &config, &mut header).with_context(|| format!("section {name}"))?;
    }
    header.push_str("\n#ifdef __cplusplus\n} /* extern \"C\" */\n#endif\n\n#endif /* MACULA_H */\n");
    Ok(header)
}

/// Writes the header into the source tree, and what is made from it.
pub fn write(root: &Path) -> Result<()> {
    let path = root.join("include/macula.h");
    let text = generate(root)?;
    python_abi::write(root, &text)?;
    if std::fs::read_to_string(&path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
}

fn section(root: &Path, name: &str, config: &cbindgen::Config, header: &mut String) -> Result<()> {
    let path = root.join(format!("src/capi/{name}.rs"));
    let source = std::fs::read_to_string(&path)?;
    let mut builder = cbindgen::Builder::new().with_src(&path);
    let mut config = config.clone();
    // Types that only another section's functions use are wanted too.
    let types = source.lines().filter_map(|line| line.strip_prefix("pub struct ").or(line.strip_prefix("pub type ")));
    let names = types.map(|rest| rest.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default());
    config.export.include = names.map(str::to_owned).collect();
    if name == "status" {
        // The one type that C shares with every room.
        builder = builder.with_src(root.join("src/error.rs"));
        config.export.include.push("Status".to_owned());
    }
    let bindings = builder.with_config(config).generate()?;
    let mut text = Vec::new();
    bindings.write(&mut text);
    let text = String::from_utf8(text)?
        .replace("#ifdef __cplusplus\nextern \"C\" {\n#endif // __cplusplus\n", "")
        .replace("#ifdef __cplusplus\n}  // extern \"C\"\n#endif  // __cplusplus\n", "");
    ensure!(!text.contains("extern \"C\""), "cbindgen writes `extern \"C\"` in another way than expected");

    let words =
        source.lines().map_while(|line| line.strip_prefix("//!")).map(|line| line.strip_prefix(' ').unwrap_or(line));
    let words: Vec<&str> = words.collect();
    let (title, rest) = words.split_first().context("the file has no opening paragraph")?;
    let bar = "=".repeat(110);
    write!(header, "\n/* {bar}\n * {title}\n")?;
    rest.iter().try_for_each(|line| writeln!(header, " *{}{line}", if line.is_empty() { "" } else { " " }))?;
    writeln!(header, " * {bar} */\n")?;
    header.push_str(&with_initialisers(text.trim())?);
    header.push('\n');
    Ok(())
}

/// A C block comment around lines of text.
fn comment(text: &str) -> String {
    let body: String =
        text.trim_end().lines().map(|line| format!(" *{}{line}\n", if line.is_empty() { "" } else { " " })).collect();
    format!("/*\n{body} */\n")
}

/// Comes before a member's default in its comment.
const DEFAULT: &str = "Default: `";

/// Adds the `_INIT` macro after each struct that begins with `struct_size` or has defaults.
fn with_initialisers(text: &str) -> Result<String> {
    let mut out = String::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        writeln!(out, "{line}")?;
        if line != "typedef struct {" {
            continue;
        }
        let mut members: Vec<(String, String)> = Vec::new();
        let mut documentation = String::new();
        for line in lines.by_ref() {
            writeln!(out, "{line}")?;
            let code = line.trim();
            if let Some(name) = code.strip_prefix("} ").and_then(|rest| rest.strip_suffix(';')) {
                if members
                    .first()
                    .is_some_and(|(first, words)| first == "size_t struct_size" || words.contains(DEFAULT))
                {
                    out.push_str(&initialiser(name, &members)?);
                }
                break;
            } else if code.starts_with("/*") || code.starts_with('*') {
                documentation.push_str(code);
                documentation.push(' ');
            } else {
                members.push((code.trim_end_matches(';').to_owned(), std::mem::take(&mut documentation)));
            }
        }
    }
    Ok(out)
}

fn initialiser(name: &str, members: &[(String, String)]) -> Result<String> {
    let mut values = Vec::new();
    let receives = name.ends_with("_info");
    for (declaration, documentation) in members {
        let value = documentation.split(DEFAULT).nth(1).and_then(|rest| rest.split('`').next());
        values.push(match value {
            _ if declaration == "size_t struct_size" => format!("sizeof({name})"),
            Some(value) => value.to_owned(),
            None if receives && declaration.starts_with("macula_tensor ") => "{ 0, 0, { 0 }, 0, 0, 0, 0 }".to_owned(),
            None if receives && declaration.contains('[') => "{ 0 }".to_owned(),
            None if receives => "0".to_owned(),
            None => bail!("`{declaration}` of {name} does not say \"Default: `...`\""),
        });
    }
    let purpose = if receives { "An empty struct to be filled in" } else { "The defaults" };
    let name_in_capitals = name.to_uppercase();
    Ok(format!(
        "\n/**\n * {purpose}: `{name} x = {name_in_capitals}_INIT;`\n */\n#define {name_in_capitals}_INIT {{ {} }}\n",
        values.join(", ")
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_committed_header_is_the_generated_one() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the project's root");
        let committed = std::fs::read_to_string(root.join("include/macula.h")).expect("include/macula.h");
        assert!(committed == generate(root).expect("the header"), "include/macula.h is old: run `cargo xtask header`");
    }

    #[test]
    fn every_file_of_the_surface_is_a_section() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the project's root");
        for entry in std::fs::read_dir(root.join("src/capi")).expect("src/capi") {
            let path = entry.expect("an entry").path();
            let source = std::fs::read_to_string(&path).expect("a source file");
            let stem = path.file_stem().and_then(|stem| stem.to_str()).expect("a name");
            if source.contains("no_mangle") && stem != "inject" {
                assert!(SECTIONS.contains(&stem), "src/capi/{stem}.rs exports functions but is no section");
            }
        }
    }
}
