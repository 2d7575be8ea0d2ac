//! Concepts: which weights stand for a subject, how that is kept in a file, and what it does to keys and values.
//!
//! *Cones* (arXiv 2303.05125) found that a few scalar weights of a UNet's cross-attention key and value projections
//! stand for a subject: shutting them (multiplying by zero) draws it, and the union of the sets of several subjects
//! draws them together. This room holds such sets ([`NeuronSet`]), reads and writes them ([`Concept`]), keeps a base
//! model's pristine weights ([`Projections`], [`Fingerprint`]) and computes the keys and values of a prompt under any
//! number of concepts ([`Composition`]). It knows models as data only: no ONNX Runtime, no diffusion.

mod codec;
mod compose;
pub mod file;
mod fingerprint;
mod kernel;
mod projections;
mod set;
mod token;
mod values;

pub use compose::{Composition, GatheredConcept, Held, Output, Rows};
pub use file::{
    Concept, FORMAT_VERSION, MAX_FILE_BYTES, MAX_FILE_WEIGHTS, MAX_HEADER_BYTES, Metadata, Role, Scope, Selection,
};
pub use fingerprint::Fingerprint;
pub use projections::{KeysValues, ProjectionWeights, Projections, Weights};
pub use set::{Indices, Layer, MAX_IN_FEATURES, MAX_PROJECTION_WEIGHTS, NeuronSet, Overlap, Shared};
pub use token::{LearntToken, MAX_ROW, MAX_TEXT_ENCODERS};
pub use values::{Precision, Values};
