//! Macula looks inside ONNX diffusion models and steers them.
//!
//! An ONNX model is data that can be read, edited and differentiated. Macula finds the cross-attention weights of a
//! UNet, shuts the few that stand for a subject (*concept neurons*, Cones, arXiv 2303.05125), and draws with the result
//! through ONNX Runtime, inside a native host and without PyTorch.
//!
//! The rooms, from the ground up (a room uses only rooms below it; `tests/architecture.rs` checks this):
//! [`error`], [`progress`], `memory` and `os`; [`onnx`]; [`runtime`]; [`concept`]; [`diffusion`]; [`discovery`]; [`capi`].
#![deny(missing_docs, unsafe_op_in_unsafe_fn)]
#![warn(clippy::unwrap_used, clippy::expect_used, clippy::undocumented_unsafe_blocks)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

pub mod capi;
pub mod concept;
pub mod diffusion;
pub mod discovery;
pub mod error;
mod memory;
pub mod onnx;
mod os;
pub mod progress;
pub mod runtime;

pub use error::{Error, Result, Status};
