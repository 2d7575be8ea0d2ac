//! Sessions of a real ONNX Runtime: runs, bindings, shape checks, and what must not be printed.

use macula::Status;
use macula::progress::CancelToken;
use macula::runtime::{Device, ElementType, Runtime, RuntimeOptions, SessionOptions, Tensor};
mod small_models;
use small_models::product_model;

fn runtime() -> Runtime {
    Runtime::load(&RuntimeOptions::default()).expect("set MACULA_ONNXRUNTIME to ONNX Runtime's library")
}

fn one_thread() -> SessionOptions {
    let mut options = SessionOptions::default();
    options.intra_threads = 1;
    options
}

#[test]
fn a_run_gives_what_the_closed_form_gives() {
    let session = runtime().session(&product_model(), &one_thread()).unwrap();
    let x = Tensor::from_vec(&[2, 4], (0..8).map(|i| i as f32 - 3.0).collect()).unwrap();
    let mut identity = vec![0_f32; 16];
    (0..4).for_each(|i| identity[i * 5] = 2.0);
    let w = Tensor::from_vec(&[4, 4], identity).unwrap();
    let cancel = CancelToken::new();
    let out = session.run(&[("x", &x), ("w", &w)], &["z", "y"], &cancel).unwrap();
    assert_eq!(out[1].as_slice::<f32>().unwrap(), [-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0, 8.0]);
    assert_eq!(out[0].as_slice::<f32>().unwrap(), [0.0, 0.0, 0.0, 0.0, 2.0, 4.0, 6.0, 8.0]);
    assert_eq!((out[0].shape(), out[0].dtype()), (&[2, 4][..], ElementType::F32));

    let mut binding = session.bind().unwrap();
    binding.bind_input("x", x).unwrap();
    binding.bind_input("w", w).unwrap();
    binding.bind_output("y", Tensor::zeros(ElementType::F32, &[2, 4]).unwrap()).unwrap();
    binding.allocate_output("z", Device::Host).unwrap();
    binding.run(&cancel).unwrap();
    assert_eq!(binding.output("y").unwrap().as_slice::<f32>().unwrap(), out[1].as_slice::<f32>().unwrap());
    let kept = binding.output("z").unwrap().clone();
    binding.input_mut::<f32>("x").unwrap().fill(1.0);
    binding.run(&cancel).unwrap();
    assert_eq!(binding.output("z").unwrap().as_slice::<f32>().unwrap(), [2.0; 8]);
    assert_eq!(kept.as_slice::<f32>().unwrap(), out[0].as_slice::<f32>().unwrap(), "a later run overwrote a result");
}

#[test]
fn wrong_inputs_are_named_with_what_was_expected_and_given() {
    let session = runtime().session(&product_model(), &one_thread()).unwrap();
    let x = Tensor::zeros(ElementType::F32, &[2, 5]).unwrap();
    let cancel = CancelToken::new();
    let error = session.run(&[("x", &x)], &[], &cancel).unwrap_err();
    assert_eq!(error.status(), Status::InvalidArgument);
    assert_eq!(error.message(), "input: \"x\" expects float32 [any (batch), 4]; given was float32 [2, 5]");
    let x = Tensor::zeros(ElementType::F64, &[2, 4]).unwrap();
    assert!(session.run(&[("x", &x)], &[], &cancel).unwrap_err().message().contains("float64"));
    let x = Tensor::zeros(ElementType::F32, &[2, 4]).unwrap();
    let error = session.run(&[("x", &x)], &[], &cancel).unwrap_err();
    assert!(error.message().ends_with("missing: w"), "{error}");
    let error = session.run(&[("q", &x)], &[], &cancel).unwrap_err();
    assert_eq!(error.status(), Status::NotFound);
    assert!(error.message().contains("it has x, w"), "{error}");
}
