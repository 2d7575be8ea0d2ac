//! ONNX models as data: read, write, inspect and edit them. This room knows no ONNX Runtime.

pub mod attention;
pub mod build;
mod check;
pub mod edit;
pub mod external;
mod fold;
pub mod grad;
pub mod graph;
pub mod inline;
pub mod limits;
pub mod model;
pub mod plain;
#[allow(missing_docs, clippy::all)]
pub mod proto;
pub mod save;
pub mod tensor;
pub mod token_embedding;
mod walk;
pub mod winograd;
mod wire;

pub use limits::Limits;
pub use model::Model;
pub use save::{SaveOptions, Weights};
pub use tensor::DataType;
