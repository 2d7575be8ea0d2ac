//! Diffusion: noise schedules and samplers, a UNet whose keys and values are fed from outside, guidance, and the
//! text-to-image pipeline over a folder in the diffusers layout.
//!
//! This room knows nothing of ONNX Runtime's types; it speaks to [`crate::runtime`]. What a concept is, is decided below,
//! in [`crate::concept`].

pub mod decomposed;
mod fields;
mod folder;
pub mod guidance;
pub mod noise;
pub mod pipeline;
pub(crate) mod precision;
pub mod profiles;
pub mod schedule;
pub mod unet;
