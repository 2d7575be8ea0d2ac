//! The gradients of whole models beside UNets are those that PyTorch computes: a decoder of latents, a text encoder,
//! generators and classifiers, with respect to their inputs, weights and a text's token embeddings.

mod support;
mod unets;

use std::collections::BTreeMap;
use std::path::Path;

use macula::onnx::grad::{self, Effort, Facts, Gradient};
use macula::onnx::graph::element_type;
use macula::onnx::{DataType, Limits, Model};
use macula::progress::CancelToken;
use macula::runtime::{Runtime, RuntimeOptions, SessionOptions, Tensor, observe};
use unets::Stored;

/// Of each tensor's largest entry.
const TOLERANCE: f64 = 1e-4;

/// An export with what PyTorch computed.
struct Export {
    name: String,
    model: Model,
    stored: BTreeMap<String, Stored>,
    inputs: Vec<(String, Tensor)>,
}

/// The exports of some models.
fn exports(models: &[&str]) -> Vec<Export> {
    support::onnxruntime();
    let which = if std::env::var_os("MACULA_FULL_TESTS").is_some_and(|value| value == "1") { "all" } else { "some" };
    let folder = support::fixture("gradients_models.py", &[which]);
    let mut found = Vec::new();
    for model in models {
        let before = found.len();
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            if path.extension().is_some_and(|end| end == "onnx") && name.split('-').next() == Some(model) {
                found.push(Export::open(&path, name));
            }
        }
        assert!(found.len() > before + 1, "{model} comes from two exporters or more");
    }
    found
}

impl Export {
    fn open(path: &Path, name: String) -> Self {
        let model = Model::open(path, &Limits::default()).unwrap();
        let stored = unets::tensors(&path.with_extension("safetensors"));
        let mut inputs = Vec::new();
        for info in &model.graph().input {
            let tensor = &stored[&format!("input.{}", info.name())];
            inputs.push((info.name().to_owned(), as_input(tensor, element_type(info).unwrap())));
        }
        Self { name, model, stored, inputs }
    }

    fn output(&self) -> &str {
        self.model.graph().output[0].name()
    }

    /// The values that have a gradient in the reference.
    fn wanted(&self) -> Vec<&str> {
        self.stored.keys().filter_map(|key| key.strip_prefix("gradient.")).collect()
    }
}

fn as_input(stored: &Stored, expected: DataType) -> Tensor {
    match (stored.dtype, expected) {
        (safetensors::Dtype::I64, DataType::Int64) => {
            Tensor::from_vec(&stored.shape, bytemuck::pod_collect_to_vec::<u8, i64>(&stored.data))
        }
        (safetensors::Dtype::F32, DataType::Float) => Tensor::from_vec(&stored.shape, singles(stored)),
        other => panic!("{other:?}"),
    }
    .unwrap()
}

fn singles(stored: &Stored) -> Vec<f32> {
    numbers(stored).into_iter().map(|value| value as f32).collect()
}

fn numbers(stored: &Stored) -> Vec<f64> {
    match stored.dtype {
        safetensors::Dtype::F64 => bytemuck::pod_collect_to_vec(&stored.data),
        safetensors::Dtype::F32 => {
            bytemuck::pod_collect_to_vec::<u8, f32>(&stored.data).into_iter().map(f64::from).collect()
        }
        other => panic!("{other:?}"),
    }
}

/// The largest difference over the largest entry, or over `scale` where all is zero but for rounding: a key's bias, behind
/// a softmax, has no effect.
fn error(found: &Tensor, expected: &Stored, scale: f64) -> f64 {
    assert_eq!(found.shape(), expected.shape);
    let expected = numbers(expected);
    let largest = largest(&expected);
    let largest = if largest < 1e-9 * scale { scale } else { largest };
    let pairs = found.as_slice::<f32>().unwrap().iter().zip(&expected);
    pairs.fold(0f64, |error, (a, b)| error.max((f64::from(*a) - b).abs())) / largest
}

fn largest(numbers: &[f64]) -> f64 {
    numbers.iter().fold(0f64, |largest, value| largest.max(value.abs()))
}

struct Bench {
    runtime: Runtime,
    options: SessionOptions,
}

impl Bench {
    fn new() -> Self {
        let mut options = SessionOptions::default();
        options.intra_threads = 1;
        Self { runtime: Runtime::load(&RuntimeOptions::default()).unwrap(), options }
    }

    fn facts(&self, model: &Model, wrt: &[&str], output: &str, inputs: &[(String, Tensor)]) -> Facts {
        let questions = grad::questions(model, wrt, output).unwrap();
        let cancel = CancelToken::new();
        Facts::new(&[observe(&self.runtime, model, &questions, &borrowed(inputs), &self.options, &cancel).unwrap()])
            .unwrap()
    }

    fn run(&self, model: &Model, outputs: &[String], inputs: &[(String, Tensor)]) -> Vec<Tensor> {
        let outputs: Vec<&str> = outputs.iter().map(String::as_str).collect();
        let session = self.runtime.session(model, &self.options).unwrap();
        session.run(&borrowed(inputs), &outputs, &CancelToken::new()).unwrap()
    }

    fn gradient(&self, export: &Export, wrt: &[&str], effort: Effort) -> Gradient {
        let facts = self.facts(&export.model, wrt, export.output(), &export.inputs);
        grad::vjp(&export.model, &facts, wrt, export.output(), effort)
            .unwrap_or_else(|error| panic!("{}: {error}", export.name))
    }

    fn agrees(&self, export: &Export, effort: Effort) {
        let wrt = export.wanted();
        let bound = if export.name.ends_with("half") { 2e-2 } else { TOLERANCE };
        let gradient = self.gradient(export, &wrt, effort);
        let mut inputs = export.inputs.clone();
        inputs.push((gradient.cotangent.clone(), as_input(&export.stored["u"], DataType::Float)));
        let found = self.run(&gradient.model, &gradient.gradients, &inputs);
        let expected: Vec<&Stored> = wrt.iter().map(|value| &export.stored[&format!("gradient.{value}")]).collect();
        let scale = expected.iter().map(|stored| largest(&numbers(stored))).fold(0.0, f64::max);
        let errors: Vec<f64> =
            found.iter().zip(expected).map(|(found, expected)| error(found, expected, scale)).collect();
        let (worst, value) = errors
            .iter()
            .zip(&wrt)
            .fold((0.0, ""), |worst, (error, value)| if *error > worst.0 { (*error, *value) } else { worst });
        println!("{}: {effort:?}: {} gradients within {worst:.1e}, {value}", export.name, wrt.len());
        for (value, error) in wrt.iter().zip(&errors) {
            assert!(*error <= bound, "{}: the gradient of {value:?} is {error:.1e} from PyTorch's", export.name);
        }
    }

    /// The derivatives along the direction `v` of the first input: of the output, and of that input's gradient.
    fn curves(&self, export: &Export) {
        let wrt = [export.inputs[0].0.as_str()];
        let first = self.gradient(export, &wrt, Effort::Speed);
        let mut inputs = export.inputs.clone();
        inputs.push((first.cotangent.clone(), as_input(&export.stored["u"], DataType::Float)));
        let facts = self.facts(&first.model, &[&first.cotangent], &first.gradients[0], &inputs);
        let pushed = grad::jvp(&first, &facts, Effort::Speed).unwrap();
        let direction = as_input(&export.stored["v"], DataType::Float);
        let mut of_jvp = export.inputs.clone();
        of_jvp.push((pushed.cotangent.clone(), direction.clone()));
        let jvp = error(&self.run(&pushed.model, &pushed.gradients, &of_jvp)[0], &export.stored["jvp"], 0.0);

        let facts = self.facts(&first.model, &wrt, &first.gradients[0], &inputs);
        let second = grad::vjp(&first.model, &facts, &wrt, &first.gradients[0], Effort::Speed).unwrap();
        inputs.push((second.cotangent.clone(), direction));
        let hvp = error(&self.run(&second.model, &second.gradients, &inputs)[0], &export.stored["hvp"], 0.0);
        println!("{}: Jacobian-vector product within {jvp:.1e}, Hessian-vector product within {hvp:.1e}", export.name);
        assert!(jvp <= TOLERANCE && hvp <= TOLERANCE, "{}: {jvp:.1e}, {hvp:.1e}", export.name);
    }
}

fn borrowed(inputs: &[(String, Tensor)]) -> Vec<(&str, &Tensor)> {
    inputs.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect()
}

fn agree(models: &[&str]) {
    let bench = Bench::new();
    for export in exports(models) {
        bench.agrees(&export, Effort::Speed);
        if export.name.ends_with("torchscript") {
            bench.agrees(&export, Effort::Memory);
            if export.stored.contains_key("v") {
                bench.curves(&export);
            }
        }
    }
}

#[test]
fn a_decoder_of_latents() {
    agree(&["decoder"]);
}

#[test]
fn a_text_encoder() {
    agree(&["text"]);
}

#[test]
fn generators() {
    agree(&["dcgan", "stylegan2"]);
}

#[test]
fn classifiers() {
    agree(&["resnet", "efficientnet", "vit"]);
}
