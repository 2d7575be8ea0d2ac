//! Sessions of a real ONNX Runtime: answers equal to Python's, bindings, shapes, cancelling, threads, providers.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use macula::Status;
use macula::onnx::{Limits, Model};
use macula::progress::CancelToken;
use macula::runtime::{
    CudaOptions, Device, Element, ElementType, LogSink, Provider, ProviderKind, Runtime, RuntimeOptions,
    SessionOptions, ShapeProfile, Tensor, TensorRtOptions,
};
use serde_json::Value;

mod small_models;
mod support;
use small_models::{chain, model, product_model};

fn runtime() -> Runtime {
    Runtime::load(&RuntimeOptions::default()).expect("set MACULA_ONNXRUNTIME to ONNX Runtime's library")
}

fn one_thread() -> SessionOptions {
    let mut options = SessionOptions::default();
    options.intra_threads = 1;
    options
}

fn identity(factor: f32) -> Tensor {
    let mut data = vec![0_f32; 16];
    (0..4).for_each(|i| data[i * 5] = factor);
    Tensor::from_vec(&[4, 4], data).unwrap()
}

fn tensor(record: &Value) -> Tensor {
    fn build<T: Element>(shape: &[usize], bytes: &[u8], read: impl Fn(&[u8]) -> T) -> Tensor {
        Tensor::from_vec(shape, bytes.chunks_exact(T::TYPE.size()).map(read).collect()).unwrap()
    }
    let shape: Vec<usize> =
        record["shape"].as_array().unwrap().iter().map(|size| size.as_u64().unwrap() as usize).collect();
    let digits = record["bytes"].as_str().unwrap().as_bytes();
    let digit = |d: u8| (d as char).to_digit(16).unwrap() as u8;
    let bytes: Vec<u8> = digits.chunks_exact(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect();
    match ElementType::from_onnx(record["dtype"].as_i64().unwrap() as i32).unwrap() {
        ElementType::F32 => build(&shape, &bytes, |b| f32::from_le_bytes(b.try_into().unwrap())),
        ElementType::F64 => build(&shape, &bytes, |b| f64::from_le_bytes(b.try_into().unwrap())),
        ElementType::F16 => build(&shape, &bytes, |b| half::f16::from_le_bytes(b.try_into().unwrap())),
        ElementType::BF16 => build(&shape, &bytes, |b| half::bf16::from_le_bytes(b.try_into().unwrap())),
        ElementType::I64 => build(&shape, &bytes, |b| i64::from_le_bytes(b.try_into().unwrap())),
        ElementType::I32 => build(&shape, &bytes, |b| i32::from_le_bytes(b.try_into().unwrap())),
        ElementType::I8 => build(&shape, &bytes, |b| b[0] as i8),
        ElementType::U8 => build(&shape, &bytes, |b| b[0]),
        ElementType::Bool => build(&shape, &bytes, |b| b[0] != 0),
    }
}

#[test]
fn answers_are_those_of_pythons_onnx_runtime() {
    let folder = support::fixture("runtime_goldens.py", &[]);
    for name in ["attention", "block", "types", "halves", "empty"] {
        let model = Model::open(folder.join(format!("{name}.onnx")), &Limits::default()).unwrap();
        let case: Value = serde_json::from_slice(&std::fs::read(folder.join(format!("{name}.json"))).unwrap()).unwrap();
        let session = runtime().session(&model, &one_thread()).unwrap();
        let inputs: Vec<(String, Tensor)> =
            case["inputs"].as_object().unwrap().iter().map(|(name, record)| (name.clone(), tensor(record))).collect();
        let given: Vec<(&str, &Tensor)> = inputs.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let mut binding = session.bind().unwrap();
        for (name, tensor) in &inputs {
            binding.bind_input(name, tensor.clone()).unwrap();
        }
        let expected = case["outputs"].as_object().unwrap();
        expected.keys().for_each(|name| binding.allocate_output(name, Device::Host).unwrap());
        binding.run(&CancelToken::new()).unwrap();
        for (output, record) in expected {
            let wanted = tensor(record);
            let run = session.run(&given, &[output], &CancelToken::new()).unwrap().remove(0);
            for answer in [&run, binding.output(output).unwrap()] {
                assert_eq!((answer.dtype(), answer.shape()), (wanted.dtype(), wanted.shape()), "{name} {output}");
                assert_eq!(answer.as_bytes().unwrap(), wanted.as_bytes().unwrap(), "{name} {output}");
            }
        }
    }
}

#[test]
fn a_binding_reads_and_writes_memory_in_place() {
    let session = runtime().session(&product_model(), &one_thread()).unwrap();
    let cancel = CancelToken::new();
    let x = Tensor::from_vec(&[2, 4], (0..8).map(|i| i as f32 - 3.0).collect()).unwrap();
    let output = Tensor::zeros(ElementType::F32, &[2, 4]).unwrap();
    let address = output.as_slice::<f32>().unwrap().as_ptr();
    let mut binding = session.bind().unwrap();
    binding.bind_input("x", x).unwrap();
    binding.bind_input("w", identity(2.0)).unwrap();
    binding.bind_output("y", output).unwrap();
    binding.allocate_output("z", Device::Host).unwrap();
    binding.run(&cancel).unwrap();
    let y = binding.output("y").unwrap().as_slice::<f32>().unwrap();
    assert_eq!((y, y.as_ptr()), (&[-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0, 8.0][..], address));
    let kept = binding.output("z").unwrap().clone();
    binding.input_mut::<f32>("x").unwrap().fill(1.0);
    binding.bind_input("w", identity(3.0)).unwrap();
    binding.run(&cancel).unwrap();
    assert_eq!(binding.output("z").unwrap().as_slice::<f32>().unwrap(), [3.0; 8]);
    assert_eq!(kept.as_slice::<f32>().unwrap(), [0.0, 0.0, 0.0, 0.0, 2.0, 4.0, 6.0, 8.0], "a result was overwritten");

    let shared = binding.output("y").unwrap().clone();
    let error = binding.run(&cancel).unwrap_err();
    assert!(error.message().contains("\"y\"") && error.message().contains("clone"), "{error}");
    drop(shared);
    binding.bind_input("x", Tensor::zeros(ElementType::F32, &[3, 4]).unwrap()).unwrap();
    assert_eq!(binding.run(&cancel).unwrap_err().status(), Status::RuntimeFailed, "y has another shape now");
    binding.allocate_output("y", Device::Host).unwrap();
    binding.run(&cancel).unwrap();
    assert_eq!(binding.output("y").unwrap().shape(), [3, 4]);
    assert!(binding.allocate_output("y", Device::Cuda(0)).unwrap_err().message().contains("cuda:0"));
}

#[test]
fn a_copy_has_memory_of_its_own() {
    let session = runtime().session(&product_model(), &one_thread()).unwrap();
    let x = Tensor::from_vec(&[2, 3], vec![1_i64, -2, 3, i64::MAX, 5, 6]).unwrap();
    for to_provider in [true, false, true] {
        let mut copy = session.copy(&x, to_provider).unwrap();
        assert_eq!((copy.device(), copy.shape()), (Device::Host, x.shape()));
        assert_eq!(copy.as_slice::<i64>().unwrap(), x.as_slice::<i64>().unwrap());
        copy.as_mut_slice::<i64>().unwrap()[0] = 0;
        assert_eq!(x.as_slice::<i64>().unwrap()[0], 1);
    }
    let flags = Tensor::from_vec(&[], vec![true]).unwrap();
    assert_eq!(session.copy(&flags, true).unwrap().into_vec::<bool>().unwrap(), [true]);
}

#[test]
fn wrong_inputs_are_named_with_what_was_expected_and_given() {
    let session = runtime().session(&product_model(), &one_thread()).unwrap();
    let cancel = CancelToken::new();
    let failed = |name: &str, x: Tensor| session.run(&[(name, &x)], &[], &cancel).unwrap_err();
    let zeros = |kind, shape: &[usize]| Tensor::zeros(kind, shape).unwrap();
    let error = failed("x", zeros(ElementType::F32, &[2, 5]));
    assert_eq!(error.status(), Status::InvalidArgument);
    assert_eq!(error.message(), "input: \"x\" expects float32 [any (batch), 4]; given was float32 [2, 5]");
    assert!(failed("x", zeros(ElementType::F64, &[2, 4])).message().contains("float64"));
    assert!(failed("x", zeros(ElementType::F32, &[4])).message().contains("[4]"));
    assert!(failed("x", zeros(ElementType::F32, &[2, 4])).message().ends_with("missing: w"));
    let error = failed("q", zeros(ElementType::F32, &[2, 4]));
    assert_eq!(error.status(), Status::NotFound);
    assert!(error.message().contains("it has x, w"), "{error}");
    let (x, w) = (zeros(ElementType::F32, &[2, 4]), identity(1.0));
    assert!(session.run(&[("x", &x), ("x", &x), ("w", &w)], &[], &cancel).is_err());
    assert_eq!(session.run(&[("x", &x), ("w", &w)], &["v"], &cancel).unwrap_err().status(), Status::NotFound);
    assert!(session.bind().unwrap().run(&cancel).unwrap_err().message().contains("missing: x, w"));
}

#[test]
fn a_cancelled_run_leaves_the_session_as_it_was() {
    let session = runtime().session(&model(chain(192, 60)), &one_thread()).unwrap();
    let x = Tensor::from_vec(&[192, 192], (0..192 * 192).map(|i| (i as f32).sin()).collect()).unwrap();
    let never = CancelToken::new();
    let run = |cancel: &CancelToken| session.run(&[("x", &x)], &[], cancel).map(|mut out| out.remove(0));
    let golden = run(&never).unwrap();
    let timed = || {
        let before = Instant::now();
        let out = run(&never).unwrap();
        assert_eq!(out.as_bytes().unwrap(), golden.as_bytes().unwrap());
        before.elapsed()
    };
    // Measured anew by every round: other work on the machine comes and goes.
    let mut length = timed();
    let mut cancelled = 0;
    // A golden-ratio sequence spreads the moments evenly over the run and a little beyond.
    for round in 0..200 {
        let moment = length.mul_f64((f64::from(round) * 0.618_033_988_749_895).fract() * 1.2);
        let cancel = CancelToken::new();
        let (other, start) = (cancel.clone(), Instant::now());
        let canceller = std::thread::spawn(move || {
            std::thread::sleep(moment.saturating_sub(start.elapsed()));
            other.cancel();
        });
        match run(&cancel) {
            Ok(out) => assert_eq!(out.as_bytes().unwrap(), golden.as_bytes().unwrap()),
            Err(error) => {
                assert_eq!(error.status(), Status::Cancelled, "{error}");
                cancelled += 1;
            }
        }
        canceller.join().unwrap();
        length = timed();
    }
    assert!(cancelled > 50, "only {cancelled} of 200 runs were cancelled");
    let cancel = CancelToken::new();
    cancel.cancel();
    assert_eq!(run(&cancel).unwrap_err().status(), Status::Cancelled);
}

#[test]
fn a_run_that_waits_for_another_can_be_cancelled() {
    let session = runtime().session(&model(chain(384, 200)), &one_thread()).unwrap();
    let x = Tensor::zeros(ElementType::F32, &[384, 384]).unwrap();
    let long = CancelToken::new();
    std::thread::scope(|scope| {
        let first = scope.spawn(|| session.run(&[("x", &x)], &[], &long).map(drop));
        std::thread::sleep(Duration::from_millis(30));
        let cancel = CancelToken::new();
        let other = cancel.clone();
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(30));
            other.cancel();
        });
        let outcome = session.run(&[("x", &x)], &[], &cancel);
        assert_eq!(outcome.unwrap_err().status(), Status::Cancelled);
        assert!(!first.is_finished(), "the first run was over before the second could wait for it");
        long.cancel();
        assert_eq!(first.join().unwrap().unwrap_err().status(), Status::Cancelled);
    });
}

#[test]
fn eight_threads_get_what_one_thread_gets() {
    let model = model(chain(24, 6));
    let shared = runtime().session(&model, &one_thread()).unwrap();
    let x: Vec<Tensor> = (0..8)
        .map(|t| Tensor::from_vec(&[24, 24], (0..576).map(|i| ((i * (t + 1)) as f32).cos()).collect()).unwrap())
        .collect();
    let run = |session: &macula::runtime::Session, x: &Tensor| {
        session.run(&[("x", x)], &[], &CancelToken::new()).unwrap().remove(0).into_vec::<f32>().unwrap()
    };
    let golden: Vec<_> = x.iter().map(|x| run(&shared, x)).collect();
    std::thread::scope(|scope| {
        for t in 0..8 {
            let (shared, model, x, golden) = (&shared, &model, &x[t], &golden[t]);
            scope.spawn(move || {
                let own = runtime().session(model, &one_thread()).unwrap();
                for _ in 0..1000 {
                    assert_eq!(&run(shared, x), golden);
                    assert_eq!(&run(&own, x), golden);
                }
            });
        }
    });
}

#[test]
fn a_missing_provider_is_an_error_with_the_reason_and_falling_back_is_reported() {
    let cuda = Provider::Cuda(CudaOptions::default());
    let mut profiled = TensorRtOptions::default();
    profiled.fp16 = true;
    let profile = |max: usize| ShapeProfile { input: "x".into(), min: vec![1, 4], opt: vec![2, 4], max: vec![max, 4] };
    profiled.profiles = vec![profile(8)];
    for (provider, kind) in [(cuda, "CUDA"), (Provider::TensorRt(profiled.clone()), "TensorRT")] {
        let mut options = one_thread();
        options.provider = provider;
        let error = runtime().session(&product_model(), &options).unwrap_err();
        assert_eq!(error.status(), Status::ProviderUnavailable);
        let message = error.message();
        assert!(message.starts_with(&format!("the {kind} provider can't run: ")), "{message}");
        let without = message.contains("was compiled without it; it has") && message.contains("CPUExecutionProvider");
        // What a library with GPU providers says on a machine that can't use them.
        let incomplete = message.contains("is missing in") || message.contains("no NVIDIA driver");
        assert!(without || incomplete, "{message}");
        options.fallback = true;
        let session = runtime().session(&product_model(), &options).unwrap();
        assert_eq!(session.provider(), ProviderKind::Cpu);
        assert!(session.fallback_reason().unwrap().contains(message), "{:?}", session.fallback_reason());
    }
    profiled.profiles = vec![profile(1)];
    let mut options = one_thread();
    options.fallback = true;
    options.provider = Provider::TensorRt(profiled);
    let error = runtime().session(&product_model(), &options).unwrap_err();
    assert_eq!(error.status(), Status::InvalidArgument, "a wrong option is no missing provider");
    let session = runtime().session(&product_model(), &one_thread()).unwrap();
    assert_eq!((session.provider(), session.fallback_reason()), (ProviderKind::Cpu, None));
}

#[test]
fn a_session_tells_its_memory() {
    let mut options = one_thread();
    let session = runtime().session(&model(chain(256, 4)), &options).unwrap();
    let x = Tensor::zeros(ElementType::F32, &[256, 256]).unwrap();
    session.run(&[("x", &x)], &[], &CancelToken::new()).unwrap();
    let memory = session.memory();
    assert_eq!(memory.weights, 256 * 256 * 4);
    let version: u32 = runtime().version().split('.').nth(1).unwrap().parse().unwrap();
    if version < 23 {
        assert_eq!((memory.arena, memory.arena_peak), (None, None));
    } else {
        let (now, peak) = (memory.arena.unwrap(), memory.arena_peak.unwrap());
        assert!(peak >= 2 * 256 * 256 * 4 && now <= peak && peak < 64 << 20, "{memory:?}");
    }
    options.arena = false;
    runtime().session(&model(chain(256, 4)), &options).unwrap().run(&[("x", &x)], &[], &CancelToken::new()).unwrap();
    let (now, peak) = macula::runtime::process_memory().unwrap();
    assert!(now > 10 << 20 && peak >= now);
}

#[test]
fn every_option_is_taken() {
    let mut options = SessionOptions::default();
    options.intra_threads = 2;
    options.inter_threads = 2;
    options.deterministic = true;
    options.memory_pattern = false;
    options.shrink = true;
    options.spinning = true;
    let x = Tensor::zeros(ElementType::F32, &[16, 16]).unwrap();
    let session = runtime().session(&model(chain(16, 4)), &options).unwrap();
    session.run(&[("x", &x)], &[], &CancelToken::new()).unwrap();
    options.affinity = Some("1".into());
    runtime().session(&model(chain(16, 4)), &options).unwrap();
    options.affinity = Some("nonsense".into());
    assert!(runtime().session(&model(chain(16, 4)), &options).is_err());
    options.affinity = None;
    options.intra_threads = usize::MAX;
    assert_eq!(runtime().session(&product_model(), &options).unwrap_err().status(), Status::InvalidArgument);
}

#[test]
fn messages_go_to_the_sink_of_their_runtime_even_if_it_panics() {
    let heard = Arc::new(Mutex::new(Vec::new()));
    let into = heard.clone();
    let mut options = RuntimeOptions::default();
    options.log = Some(LogSink::new(move |level, text| into.lock().unwrap().push((level, text.to_owned()))));
    let runtime = Runtime::load(&options).unwrap();
    // A Reshape that can't work fails in the kernel, which logs.
    let broken = model(small_models::broken_reshape());
    let run = |runtime: &Runtime| {
        let session = runtime.session(&broken, &one_thread()).unwrap();
        let x = Tensor::zeros(ElementType::F32, &[5]).unwrap();
        session.run(&[("x", &x)], &[], &CancelToken::new()).unwrap_err()
    };
    assert_eq!(run(&runtime).status(), Status::RuntimeFailed);
    let messages = heard.lock().unwrap();
    assert!(messages.iter().any(|(level, text)| *level == log::Level::Error && text.contains("Reshape")));
    let calls = Arc::new(AtomicUsize::new(0));
    let counter = calls.clone();
    options.log = Some(LogSink::new(move |_, _| {
        counter.fetch_add(1, Ordering::SeqCst);
        std::panic::resume_unwind(Box::new("a host's logger panics"));
    }));
    assert_eq!(run(&Runtime::load(&options).unwrap()).status(), Status::RuntimeFailed);
    assert!(calls.load(Ordering::SeqCst) > 0);
}
