//! ONNX models as data: read, write, inspect and edit them. This room knows no ONNX Runtime.

#[allow(missing_docs, clippy::all)]
pub mod proto;
