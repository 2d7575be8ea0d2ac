//! `include/macula.h`, read as a list of functions, types and macros with their comments.
#![allow(dead_code, reason = "each test program uses its own part")]

use std::path::Path;

/// A documented item of the header.
#[derive(Debug)]
pub struct Item {
    /// Its comment, without the decoration.
    pub documentation: String,
    /// Its code, on one line.
    pub code: String,
}

/// An exported function.
#[derive(Debug)]
pub struct Function {
    pub name: String,
    pub result: String,
    pub parameters: Vec<Parameter>,
    pub documentation: String,
}

/// A parameter of a [`Function`].
#[derive(Debug)]
pub struct Parameter {
    /// The C type, e.g. `const macula_tensor *`.
    pub c_type: String,
    pub name: String,
    /// What the function's comment says about it.
    pub documentation: String,
}

impl Parameter {
    pub fn is_pointer(&self) -> bool {
        self.c_type.ends_with('*')
    }

    pub fn may_be_null(&self) -> bool {
        self.documentation.contains("may be NULL")
    }
}

/// The text of the header.
pub fn text() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("include/macula.h");
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Everything that is declared between the `extern "C"` lines, each with the comment right above it.
pub fn items() -> Vec<Item> {
    let text = text();
    let mut items = Vec::new();
    let mut documentation = String::new();
    let mut code = String::new();
    let mut depth = 0;
    let mut in_comment = false;
    for line in text.lines().skip_while(|line| !line.contains("extern \"C\" {")).skip(2) {
        let line = line.trim();
        if in_comment || line.starts_with("/*") {
            if depth == 0 {
                if !in_comment {
                    documentation.clear();
                }
                let words = line.trim_start_matches("/**").trim_end_matches("*/").trim_start_matches('*').trim();
                documentation.push_str(words);
                documentation.push('\n');
            }
            in_comment = !line.ends_with("*/");
            continue;
        }
        if line.is_empty() || line.starts_with("#if") || line.starts_with("#e") || line.starts_with("typedef enum") {
            continue;
        }
        if line.starts_with(": int32_t") || (line.starts_with("typedef int32_t macula_status;")) {
            continue;
        }
        code.push_str(line);
        code.push(' ');
        depth += line.matches('{').count() as i32 - line.matches('}').count() as i32;
        if depth == 0 && (line.ends_with(';') || line.starts_with("#define")) {
            let item = Item {
                documentation: std::mem::take(&mut documentation),
                code: std::mem::take(&mut code).trim().to_owned(),
            };
            items.push(item);
        }
    }
    items.retain(|item| !item.code.starts_with('}'));
    items
}

/// Every exported function.
pub fn functions() -> Vec<Function> {
    items().into_iter().filter_map(function).collect()
}

fn function(item: Item) -> Option<Function> {
    let code = item.code.strip_suffix(");")?;
    if code.starts_with("typedef") {
        return None;
    }
    let (head, parameters) = code.split_once('(')?;
    let (result, name) = split_name(head);
    let parameters = parameters.split(',').map(str::trim).filter(|parameter| *parameter != "void");
    let parameters = parameters
        .map(|parameter| {
            let (c_type, name) = split_name(parameter);
            let documentation = parameter_documentation(&item.documentation, &name);
            Parameter { c_type, name, documentation }
        })
        .collect();
    Some(Function { name, result, parameters, documentation: item.documentation })
}

fn split_name(declaration: &str) -> (String, String) {
    let at = declaration.rfind(|c: char| !c.is_ascii_alphanumeric() && c != '_').map_or(0, |at| at + 1);
    (declaration[..at].trim().to_owned(), declaration[at..].to_owned())
}

/// The lines from "- `name`:" to the next dash or empty line.
fn parameter_documentation(documentation: &str, name: &str) -> String {
    let start = format!("- `{name}`");
    let mut lines = documentation.lines().skip_while(|line| !line.starts_with(&start));
    let first = lines.next().unwrap_or_default().to_owned();
    lines.take_while(|line| !line.is_empty() && !line.starts_with("- `")).fold(first, |text, line| text + " " + line)
}
