//! Finding concept neurons (Cones, arXiv 2303.05125): which few cross-attention weights, shut, make a model draw a subject
//! or forget one.
//!
//! ```text
//! Examples ──draw──> Batch ──KeyValueGradient──> loss, dL/dK, dL/dV ──> dL/ds = W ∘ (dL/dK)ᵀ C ──> search ──> NeuronSet
//! ```
//!
//! The gradient is one more ONNX model, made by [`crate::onnx::grad`] with respect to the keys and values; the step from
//! there to the weights is a small product that needs no graph. A [`Tuning`] may follow: values for the found weights in place
//! of zero, by the same slopes. Before it all the embedding of the subject's word may be learnt ([`TokenTexts`]). [`Request`]
//! does it all for an opened pipeline.

mod checkpoint;
mod descent;
mod draw;
mod gradient;
mod held_out;
mod invert;
mod job;
mod material;
mod request;
mod scaled;
mod scenes;
pub mod search;
mod together;
mod tune;

pub use descent::WARM_UP;
pub use draw::{ActingRow, Batch, Examples, Objective};
pub use gradient::{Attentions, GradientOptions, KeyValueGradient, Searched, TextSlope};
pub use invert::{InvertOptions, Inverted, TokenTexts};
pub use job::{CHECKPOINT_BATCHES, Discovery, DiscoveryOptions, Report, Term};
pub use request::{Encoded, EncodedSubject, Erasure, Goal, MOST_CHOSEN, Request, Subject};
pub use together::{Companion, Together};
pub use tune::{Members, TuneOptions, Tuning};
