//! Gives the shared library its SONAME and keeps it in memory once loaded.
//!
//! Nothing is generated here and nothing is written: a host that embeds the crate builds from what is committed.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if std::env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
        // The number in the SONAME changes with the ABI, not with the crate's version.
        println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libmacula.so.0");
        // Threads of ours and of ONNX Runtime and thread-local destructors may outlive `dlclose`: their code must stay.
        println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    }
}
