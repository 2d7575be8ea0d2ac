//! The project's command runner: `cargo xtask <command>`.
fn main() {}
