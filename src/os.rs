//! Everything that asks the operating system directly, in one place, so that another system is one file.
//!
//! Linux x86-64 is what is tested. Nothing here knows ONNX, models or ONNX Runtime.
