//! The gradients of whole UNets, from every exporter, are those that PyTorch computes.

mod unets;

use std::path::Path;

use macula::onnx::attention::{self, TEXT_INPUT};
use macula::onnx::grad::{self, Effort, Facts, Spending};
use macula::onnx::{DataType, Limits, Model, graph};
use macula::progress::CancelToken;
use macula::runtime::{Runtime, RuntimeOptions, SessionOptions, Tensor, observe};

fn f32s(data: &[u8]) -> Vec<f32> {
    data.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
}

/// A fixture's tensor in the type that the model takes.
fn as_input(stored: &unets::Stored, expected: DataType) -> Tensor {
    let numbers: Vec<f64> = match stored.dtype {
        safetensors::Dtype::F32 => f32s(&stored.data).into_iter().map(f64::from).collect(),
        safetensors::Dtype::F16 => {
            stored.data.as_chunks::<2>().0.iter().map(|&b| half::f16::from_le_bytes(b).to_f64()).collect()
        }
        safetensors::Dtype::I64 => {
            stored.data.as_chunks::<8>().0.iter().map(|&b| i64::from_le_bytes(b) as f64).collect()
        }
        other => panic!("{other:?}"),
    };
    let numbers = numbers.into_iter();
    match expected {
        DataType::Float => Tensor::from_vec(&stored.shape, numbers.map(|n| n as f32).collect::<Vec<_>>()),
        DataType::Float16 => Tensor::from_vec(&stored.shape, numbers.map(half::f16::from_f64).collect::<Vec<_>>()),
        DataType::Int64 => Tensor::from_vec(&stored.shape, numbers.map(|n| n as i64).collect::<Vec<_>>()),
        other => panic!("{other:?}"),
    }
    .unwrap()
}

fn runtime() -> Runtime {
    Runtime::load(&RuntimeOptions::default()).expect("set MACULA_ONNXRUNTIME to the path of libonnxruntime.so")
}

/// The largest difference over the largest entry.
fn relative(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    found.iter().zip(expected).fold(0f32, |error, (a, b)| error.max((a - b).abs())) / largest
}

/// `Σ_rows cotangentᵀ text`, `[out, in]`: the gradient of a projection's weight from that of what it gives.
fn weight_gradient(cotangent: &[f32], text: &[f32], out_features: usize, in_features: usize) -> Vec<f32> {
    let mut sum = vec![0f64; out_features * in_features];
    for (row, features) in cotangent.chunks_exact(out_features).zip(text.chunks_exact(in_features)) {
        for (target, &scale) in sum.chunks_exact_mut(in_features).zip(row) {
            target.iter_mut().zip(features).for_each(|(sum, &x)| *sum += f64::from(scale) * f64::from(x));
        }
    }
    sum.into_iter().map(|sum| sum as f32).collect()
}

/// Compares all gradients of an export; answers how many bytes of the forward pass they keep.
fn agrees_with_torch(folder: &Path, spending: impl Into<Spending>, bound: f32) -> u64 {
    let spending = spending.into();
    let at = folder.display();
    let mut model = Model::open(folder.join("model.onnx"), &Limits::default()).unwrap();
    let found = attention::find(&model, TEXT_INPUT).unwrap();
    let given: Vec<(String, DataType)> =
        model.graph().input.iter().map(|info| (info.name().to_owned(), graph::element_type(info).unwrap())).collect();
    let of_self = attention::find_self(&model, &found).unwrap();
    let keys_and_values = attention::externalise(&mut model, &found).unwrap();
    let reference = unets::tensors(&folder.join("reference.safetensors"));
    let expected = unets::tensors(&folder.join("gradients.safetensors"));
    let text = &reference[&format!("0.{TEXT_INPUT}")];
    let rows = match text.dtype {
        safetensors::Dtype::F16 => {
            text.data.as_chunks::<2>().0.iter().map(|&b| half::f16::from_le_bytes(b).to_f32()).collect()
        }
        _ => f32s(&text.data),
    };
    let mut inputs: Vec<(String, Tensor)> = given
        .iter()
        .map(|(name, data_type)| (name.clone(), as_input(&reference[&format!("0.{name}")], *data_type)))
        .collect();
    let types: Vec<DataType> =
        model.graph().input.iter().rev().take(found.len()).map(|i| graph::element_type(i).unwrap()).collect();
    let weights = attention::weights_as_inputs(&mut model, &of_self).unwrap();
    let tensors = unets::tensors(&folder.join("weights.safetensors"));
    for (input, projection) in keys_and_values.iter().zip(&found) {
        let stored = &tensors[&format!("{}.weight", projection.path)];
        let weight: Vec<f32> = match stored.dtype {
            safetensors::Dtype::F16 => {
                stored.data.as_chunks::<2>().0.iter().map(|&b| half::f16::from_le_bytes(b).to_f32()).collect()
            }
            _ => f32s(&stored.data),
        };
        let bias = projection.read_bias(&model).unwrap();
        let values: Vec<f64> = rows
            .chunks_exact(projection.in_features)
            .flat_map(|row| {
                let bias = bias.clone();
                weight
                    .chunks_exact(projection.in_features)
                    .enumerate()
                    .map(move |(column, w)| {
                        let sum: f64 = row.iter().zip(w).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                        sum + bias.as_ref().map_or(0.0, |bias| f64::from(bias[column]))
                    })
                    .collect::<Vec<_>>()
            })
            .collect();
        let shape = [text.shape[0], text.shape[1], input.out_features];
        let tensor = match types[0] {
            DataType::Float16 => {
                Tensor::from_vec(&shape, values.iter().map(|&v| half::f16::from_f64(v)).collect::<Vec<_>>())
            }
            _ => Tensor::from_vec(&shape, values.iter().map(|&v| v as f32).collect::<Vec<_>>()),
        };
        inputs.push((input.name.clone(), tensor.unwrap()));
    }

    for input in &weights {
        let stored = &tensors[&format!("{}.weight", input.path)];
        assert_eq!(stored.shape, input.shape);
        inputs.push((input.name.clone(), as_input(stored, types[0])));
    }

    let loss = grad::mean_squared_error(&mut model, "out_sample", 4).unwrap();
    for (name, stored) in [(&loss.target, "target"), (&loss.weight, "weight")] {
        inputs.push((name.clone(), as_input(&expected[stored], DataType::Float)));
    }
    let names = keys_and_values.iter().map(|input| &input.name).chain(weights.iter().map(|input| &input.name));
    let wrt: Vec<&str> = names.map(String::as_str).collect();
    let mut options = SessionOptions::default();
    options.intra_threads = 1;
    options.memory_pattern = false;
    let runtime = runtime();
    let cancel = CancelToken::new();
    let borrowed: Vec<(&str, &Tensor)> = inputs.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let questions = grad::questions(&model, &wrt, &loss.loss).unwrap();
    let seen = observe(&runtime, &model, &questions, &borrowed, &options, &cancel).unwrap();
    let facts = Facts::new(&[seen]).unwrap();
    let gradient =
        grad::vjp(&model, &facts, &wrt, &loss.loss, spending).unwrap_or_else(|error| panic!("{at}: {error}"));
    inputs.push((gradient.cotangent.clone(), Tensor::from_vec(&[], vec![1f32]).unwrap()));
    let borrowed: Vec<(&str, &Tensor)> = inputs.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let mut outputs: Vec<&str> = gradient.gradients.iter().map(String::as_str).collect();
    outputs.push(&loss.loss);
    let session = runtime.session(&gradient.model, &options).unwrap_or_else(|error| panic!("{at}: {error}"));
    let answers = session.run(&borrowed, &outputs, &cancel).unwrap();
    let error = relative(answers[wrt.len()].as_slice::<f32>().unwrap(), &f32s(&expected["loss"].data));
    assert!(error <= bound, "{at}: the loss is {error:.1e} from torch");
    let mut worst = [0f32; 2];
    for (projection, answer) in found.iter().chain(&of_self).zip(&answers) {
        let answer = answer.as_slice::<f32>().unwrap();
        let cross = projection.text_input == TEXT_INPUT;
        let ours = match cross {
            true => weight_gradient(answer, &rows, projection.out_features, projection.in_features),
            false => answer.to_vec(),
        };
        let error = relative(&ours, &f32s(&expected[&format!("{}.weight", projection.path)].data));
        assert!(error <= bound, "{at}: the gradient of {} is {error:.1e} from torch", projection.path);
        worst[usize::from(!cross)] = worst[usize::from(!cross)].max(error);
    }
    // Beside them are the target, the weights of the samples and the loss.
    assert_eq!(found.len() + of_self.len() + 3, expected.len(), "{at}");
    println!("{at}: {spending:?}: {:.1e} for cross-attention, {:.1e} for self-attention", worst[0], worst[1]);
    gradient.activations
}

fn all_agree(keys: &[&str], bound: f32) {
    for folder in unets::folders(keys) {
        agrees_with_torch(&folder, Effort::Speed, bound);
    }
}

#[test]
fn stable_diffusion_1() {
    let exporters = ["torchscript14", "torchscript20", "dynamo18", "dynamo20", "dynamo23", "optimum"];
    let keys = exporters.map(|exporter| format!("sd1-{exporter}"));
    all_agree(&keys.each_ref().map(String::as_str), 1e-4);
}

#[test]
fn stable_diffusion_2() {
    all_agree(&["sd2-torchscript17", "sd2-dynamo18", "sd2-dynamo23", "sd2-optimum"], 1e-4);
}

#[test]
fn stable_diffusion_xl() {
    all_agree(&["sdxl-shallow-torchscript17", "sdxl-shallow-dynamo18", "sdxl-shallow-dynamo20"], 1e-4);
}

#[test]
fn without_a_second_copy_of_weights() {
    for folder in unets::folders(&["sd1-torchscript17"]) {
        agrees_with_torch(&folder, Effort::Memory, 1e-4);
    }
}

#[test]
fn with_a_part_of_the_forward_pass_computed_again() {
    for folder in unets::folders(&["sd1-torchscript17", "sdxl-shallow-dynamo20"]) {
        for effort in [Effort::Speed, Effort::Memory] {
            let whole = agrees_with_torch(&folder, effort, 1e-4);
            let budget = whole * 2 / 3;
            let kept = agrees_with_torch(&folder, Spending { effort, activations: Some(budget) }, 1e-4);
            assert!(kept <= budget, "{} keeps {kept} of {whole} bytes", folder.display());
            let least = agrees_with_torch(&folder, Spending { effort, activations: Some(0) }, 1e-4);
            assert!(least < kept, "{} keeps {least} bytes at least", folder.display());
        }
    }
}

/// The forward pass rounds to half precision, the gradient is computed in single precision: what differs from torch's
/// single precision is the rounding of the activations.
#[test]
fn half_precision() {
    all_agree(&["float16-torchscript17"], 2e-2);
}
