//! The C surface: one file per section of `macula.h`. It checks arguments, stops panics and calls the rooms below.
//!
//! This room holds no maths and decides nothing: each function turns C arguments into a call of the public Rust API and
//! its result back into C. The doc comments of the exported items *are* the text of `macula.h` (`cargo xtask header`
//! generates it), so they speak to a C programmer.
//!
//! Four private files carry what every export shares: [`guard`] (panics, forks, the last error), [`handle`] (the table
//! that opaque pointers are looked up in), [`argument`] (checked pointers, strings, arrays and structs), and with the
//! feature `inject`, `inject` (panics on request).
//!
//! # Safety
//! Every function here is `unsafe` to call from Rust: a non-NULL pointer must be valid for what the parameter's text says.
#![allow(non_camel_case_types, clippy::missing_safety_doc)]
#![allow(
    clippy::field_reassign_with_default,
    reason = "each C field is read, checked and taken over on a line of its own"
)]

mod argument;
mod guard;
mod handle;
#[cfg(feature = "inject")]
mod inject;

pub mod cancel;
pub mod composition;
pub mod concept;
pub mod denoise;
pub mod discovery;
pub mod draw;
pub mod image;
pub mod log;
pub mod memory;
pub mod pipeline;
pub mod runtime;
pub mod schedule;
pub mod session;
pub mod status;
pub mod tensor;
pub mod together;
pub mod trajectory;
pub mod version;
