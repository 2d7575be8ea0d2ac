//! ONNX Runtime: found, checked, loaded and run. The only room that names `ort`.
