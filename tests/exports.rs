//! Keys and values are found in what real exporters write, and are what torch has.

mod unets;

use std::collections::BTreeSet;
use std::path::Path;

use macula::Status;
use macula::onnx::attention::{self, Projection, Role, Rows, TEXT_INPUT};
use macula::onnx::{DataType, Limits, Model, graph};
use macula::progress::CancelToken;
use macula::runtime::{Runtime, RuntimeOptions, Session, SessionOptions, Tensor};

/// The exporters that every topology goes through.
const EXPORTERS: [&str; 11] = [
    "torchscript14",
    "torchscript17",
    "torchscript20",
    "torchscript14-static",
    "torchscript17-static",
    "torchscript20-static",
    "dynamo17",
    "dynamo18",
    "dynamo20",
    "dynamo23",
    "optimum",
];

fn open(folder: &Path) -> Model {
    Model::open(folder.join("model.onnx"), &Limits::default()).unwrap()
}

fn find(folder: &Path) -> (Model, Vec<Projection>) {
    let model = open(folder);
    let found = attention::find(&model, TEXT_INPUT).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    (model, found)
}

fn f32s(data: &[u8]) -> Vec<f32> {
    data.as_chunks::<4>().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()
}

/// A fixture's tensor as the model takes it: some exporters take the timestep as a float.
fn as_input(stored: &unets::Stored, expected: DataType) -> Tensor {
    match (stored.dtype, expected) {
        (safetensors::Dtype::F32, DataType::Float) => Tensor::from_vec(&stored.shape, f32s(&stored.data)),
        (safetensors::Dtype::F16, DataType::Float16) => {
            let halves = stored.data.as_chunks::<2>().0.iter().map(|&bytes| half::f16::from_le_bytes(bytes));
            Tensor::from_vec(&stored.shape, halves.collect::<Vec<_>>())
        }
        (safetensors::Dtype::I64, expected) => {
            let values = stored.data.as_chunks::<8>().0.iter().map(|&bytes| i64::from_le_bytes(bytes));
            match expected {
                DataType::Float => {
                    Tensor::from_vec(&stored.shape, values.map(|value| value as f32).collect::<Vec<_>>())
                }
                _ => Tensor::from_vec(&stored.shape, values.collect::<Vec<_>>()),
            }
        }
        (stored, expected) => panic!("{stored:?} for {expected:?}"),
    }
    .unwrap()
}

fn session(runtime: &Runtime, model: &Model) -> Session {
    let mut options = SessionOptions::default();
    options.intra_threads = 1;
    runtime.session(model, &options).unwrap()
}

fn run(session: &Session, inputs: &[(String, Tensor)]) -> Vec<f32> {
    let inputs: Vec<(&str, &Tensor)> = inputs.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    let outputs = session.run(&inputs, &["out_sample"], &CancelToken::new()).unwrap();
    outputs[0].as_slice::<f32>().unwrap().to_vec()
}

/// The largest difference over the largest entry.
fn relative(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    found.iter().zip(expected).fold(0f32, |error, (a, b)| error.max((a - b).abs())) / largest
}

/// The text times the weight plus the bias, summed in f64.
fn project(text: &[f32], weight: &[f32], bias: Option<&[f32]>, features: usize) -> Vec<f32> {
    let entry = |row: &[f32], (column, weights): (usize, &[f32])| {
        let sum: f64 = row.iter().zip(weights).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
        (sum + bias.map_or(0.0, |bias| f64::from(bias[column]))) as f32
    };
    let rows = text.chunks_exact(features);
    rows.flat_map(|row| weight.chunks_exact(features).enumerate().map(move |one| entry(row, one))).collect()
}

/// The model computes what torch does, and still does when keys and values come as inputs, at every size of the
/// fixture.
fn draws_the_same_with_keys_and_values_as_inputs(runtime: &Runtime, folder: &Path) {
    let at = folder.display();
    let (model, found) = find(folder);
    let mut edited = model.clone();
    let inputs = attention::externalise(&mut edited, &found).unwrap_or_else(|error| panic!("{at}: {error}"));
    assert_eq!(inputs.len(), found.len());
    let of_self = attention::find_self(&model, &found).unwrap_or_default();
    let mut weighted = edited.clone();
    let weights = attention::weights_as_inputs(&mut weighted, &of_self).unwrap_or_else(|error| panic!("{at}: {error}"));
    assert_eq!(weights.len(), of_self.len());
    attention::fuse(&mut weighted).unwrap();
    for projection in &found {
        let gone = edited.initializer(&projection.weight.name).is_err();
        assert!(gone, "{at}: the weight of {} is still there", projection.path);
    }
    let mut fused = edited.clone();
    let count = attention::fuse(&mut fused).unwrap_or_else(|error| panic!("{at}: {error}"));
    let left = fused.graph().node.iter().filter(|node| node.is("Softmax")).count();
    println!("{at}: {count} attentions fused");
    assert_eq!(left, 0, "{at}: attentions that are still written out");
    let reference = unets::tensors(&folder.join("reference.safetensors"));
    assert!(reference.contains_key("0.out_sample"), "{at}: there is nothing to compare with");
    let (mut plain, mut steered, mut with_weights, mut expected) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for case in (0..).take_while(|case| reference.contains_key(&format!("{case}.out_sample"))) {
        let stored = |name: &str| &reference[&format!("{case}.{name}")];
        let given = model.graph().input.iter();
        let given = given
            .map(|info| (info.name().to_owned(), as_input(stored(info.name()), graph::element_type(info).unwrap())));
        let mut given: Vec<(String, Tensor)> = given.collect();
        plain.push(given.clone());
        expected.push(f32s(&stored("out_sample").data));
        let text = stored(TEXT_INPUT);
        let rows = f32s(&text.data);
        for (input, projection) in inputs.iter().zip(&found) {
            assert_eq!((&input.path, input.role), (&projection.path, projection.role));
            let weight = f32s(&projection.read_weight(&model).unwrap());
            let bias = projection.read_bias(&model).unwrap();
            let values = project(&rows, &weight, bias.as_deref(), projection.in_features);
            let tensor = Tensor::from_vec(&[text.shape[0], text.shape[1], input.out_features], values).unwrap();
            given.push((input.name.clone(), tensor));
        }
        steered.push(given.clone());
        for (input, projection) in weights.iter().zip(&of_self) {
            assert_eq!(input.path, projection.path);
            let values = f32s(&projection.read_weight(&model).unwrap());
            given.push((input.name.clone(), Tensor::from_vec(&input.shape, values).unwrap()));
        }
        with_weights.push(given);
    }

    // One session at a time: a model may be of full size.
    let exported = session(runtime, &model);
    let untouched: Vec<Vec<f32>> = plain.iter().map(|given| run(&exported, given)).collect();
    drop(exported);
    for (case, (untouched, expected)) in untouched.iter().zip(&expected).enumerate() {
        let error = relative(untouched, expected);
        assert!(error <= 1e-4, "{at}: case {case}: the export is {error:.1e} from torch");
    }
    for (what, model, given) in [
        ("keys and values as inputs", &edited, &steered),
        ("fused attention", &fused, &steered),
        ("the weights of self-attention as inputs", &weighted, &with_weights),
    ] {
        let session = session(runtime, model);
        for (case, (given, untouched)) in given.iter().zip(&untouched).enumerate() {
            let error = relative(&run(&session, given), untouched);
            println!("{at}: case {case}: {error:.1e} with {what}");
            assert!(error <= 1e-5, "{at}: case {case}: {error:.1e} with {what}");
            // The inputs are used: others give another picture.
            let mut others = given.clone();
            let (name, last) = others.last_mut().unwrap();
            *last = Tensor::zeros(last.dtype(), last.shape()).unwrap();
            let name = name.clone();
            assert!(relative(&run(&session, &others), untouched) > 1e-4, "{at}: {name} is not used with {what}");
        }
    }
}

fn runtime() -> Runtime {
    Runtime::load(&RuntimeOptions::default()).expect("set MACULA_ONNXRUNTIME to the path of libonnxruntime.so")
}

fn bits(dtype: safetensors::Dtype) -> DataType {
    match dtype {
        safetensors::Dtype::F32 => DataType::Float,
        safetensors::Dtype::F16 => DataType::Float16,
        safetensors::Dtype::BF16 => DataType::Bfloat16,
        other => panic!("{other:?}"),
    }
}

/// The projections found in a fixture are exactly torch's cross-attention `to_k` and `to_v`, bit for bit.
fn agrees_with_torch(folder: &Path, layers: usize) -> Vec<Projection> {
    let at = folder.display();
    let (model, found) = find(folder);
    let torch = unets::tensors(&folder.join("weights.safetensors"));
    let expected: BTreeSet<&str> =
        torch.keys().filter(|name| name.contains(".attn2.")).filter_map(|name| name.strip_suffix(".weight")).collect();
    assert_eq!(found.iter().map(|p| p.path.as_str()).collect::<BTreeSet<_>>(), expected, "{at}");
    assert_eq!((found.len(), expected.len()), (2 * layers, 2 * layers), "{at}");
    assert!(found.is_sorted_by(|a, b| a.path < b.path), "{at}");
    let of_self = match attention::find_self(&model, &found) {
        // ONNX Runtime's optimizer puts the products of self-attention into one operator.
        Err(error) if folder.file_name().is_some_and(|name| name.to_string_lossy().starts_with("fused")) => {
            assert!(error.message().contains("Attention (node"), "{at}: {error}");
            Vec::new()
        }
        of_self => {
            let of_self = of_self.unwrap_or_else(|error| panic!("{at}: {error}"));
            let names = torch.keys().filter(|name| name.contains(".attn1."));
            let expected: BTreeSet<&str> = names.filter_map(|name| name.strip_suffix(".weight")).collect();
            assert_eq!(of_self.iter().map(|p| p.path.as_str()).collect::<BTreeSet<_>>(), expected, "{at}");
            of_self
        }
    };
    for projection in found.iter().chain(&of_self) {
        let at = format!("{at}: {}", projection.path);
        assert_eq!(projection.path.ends_with(".to_k"), projection.role == Role::Key, "{at}");
        let weight = &torch[&format!("{}.weight", projection.path)];
        assert_eq!(projection.weight.data_type, bits(weight.dtype), "{at}");
        assert_eq!([projection.out_features, projection.in_features], weight.shape[..], "{at}");
        assert!(projection.read_weight(&model).unwrap() == weight.data, "{at}: another weight");
        let bias = projection.read_bias(&model).unwrap();
        let expected = torch.get(&format!("{}.bias", projection.path)).map(|bias| f32s(&bias.data));
        assert_eq!(bias, expected, "{at}");
        assert!(projection.rows != Rows::Other || projection.text_input.is_empty(), "{at}");
        assert!(projection.data_type.is_some_and(DataType::is_float), "{at}");
    }
    found
}

fn every_exporter(family: &str, layers: usize) {
    let keys: Vec<String> = EXPORTERS.iter().map(|exporter| format!("{family}-{exporter}")).collect();
    let runtime = runtime();
    for folder in unets::folders(&keys.iter().map(String::as_str).collect::<Vec<_>>()) {
        agrees_with_torch(&folder, layers);
        // At opset 17 this exporter leaves attributes of opset 18: no runtime takes its models.
        if !folder.ends_with(format!("{family}-dynamo17")) {
            draws_the_same_with_keys_and_values_as_inputs(&runtime, &folder);
        }
    }
}

#[test]
fn stable_diffusion_1_from_every_exporter() {
    every_exporter("sd1", 16);
}

#[test]
fn stable_diffusion_2_from_every_exporter() {
    every_exporter("sd2", 16);
}

#[test]
fn stable_diffusion_xl_from_every_exporter() {
    // Two blocks of two and three layers at depths 1 and 2, and the middle: 2 + 3 and (2 + 3 + 1) * 2.
    every_exporter("sdxl-shallow", 17);
    agrees_with_torch(&unets::folders(&["sdxl-torchscript17"])[0], 70);
}

/// Stable Diffusion 1.5 at its full size, with random weights.
#[test]
fn a_full_size_model_draws_the_same_with_keys_and_values_as_inputs() {
    if std::env::var_os("MACULA_FULL_TESTS").is_none_or(|value| value != "1") {
        return;
    }
    let folder = &unets::folders(&["sd15-torchscript17"])[0];
    let found = agrees_with_torch(folder, 16);
    assert_eq!(found.iter().map(|p| p.out_features * p.in_features).sum::<usize>(), 19_169_280);
    draws_the_same_with_keys_and_values_as_inputs(&runtime(), folder);
}

#[test]
fn biases_halves_and_packed_projections() {
    let keys = [
        "biased-torchscript17",
        "biased-dynamo18",
        "float16-torchscript17",
        "float16-dynamo18",
        "bfloat16-torchscript17",
        "bfloat16-dynamo18",
        "to_kv-torchscript17",
        "to_kv-dynamo18",
        "stripped",
        "fused",
        "fused-packed",
    ];
    let runtime = runtime();
    for folder in unets::folders(&keys) {
        let found = agrees_with_torch(&folder, 16);
        // ONNX Runtime has no CPU kernels for packed keys and values, and only some for halves.
        if found.iter().all(|p| p.data_type == Some(DataType::Float)) && !folder.ends_with("fused-packed") {
            draws_the_same_with_keys_and_values_as_inputs(&runtime, &folder);
        }
        let key = folder.file_name().unwrap().to_str().unwrap();
        assert_eq!(found.iter().all(|p| p.bias.is_some()), key.starts_with("biased"), "{key}");
        let packed = key.starts_with("to_kv") || key == "fused-packed";
        assert!(found.iter().all(|p| p.product_columns == p.out_features * if packed { 2 } else { 1 }), "{key}");
    }
}

#[test]
fn a_weight_of_two_modules_is_told() {
    // Both modules multiply the same text with it: this exporter leaves one product, under the first one's name.
    let (model, found) = find(&unets::folders(&["tied-torchscript17"])[0]);
    let shared: Vec<&str> = found.iter().filter(|p| p.weight.users > 1).map(|p| p.path.as_str()).collect();
    assert_eq!(shared, ["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"]);
    assert_eq!(found.len(), 31);
    let mut edited = model.clone();
    assert_eq!(attention::externalise(&mut edited, &found).unwrap().len(), 31);
}

#[test]
fn what_can_not_be_steered_is_refused_by_operator_and_node() {
    for (key, words) in [
        ("quantized-dynamic", ["DynamicQuantizeLinear", "encoder_hidden_states"]),
        ("quantized-qdq", ["Linear", "quantised"]),
        ("quantized-qoperator", ["QuantizeLinear", "quantised"]),
        ("projected-torchscript17", ["encoder_hid_proj", "passes through"]),
    ] {
        let error = attention::find(&open(&unets::folders(&[key])[0]), TEXT_INPUT).unwrap_err();
        assert_eq!(error.status(), Status::Unsupported, "{key}: {error}");
        assert!(words.iter().all(|word| error.message().contains(word)), "{key}: {error}");
    }
}

#[test]
fn a_wrong_text_input_is_told_with_the_inputs_that_there_are() {
    let model = open(&unets::folders(&["sdxl-shallow-torchscript17"])[0]);
    let error = attention::find(&model, "text").unwrap_err();
    assert_eq!(error.status(), Status::NotFound);
    assert!(error.message().contains("sample, timestep, encoder_hidden_states, text_embeds, time_ids"), "{error}");
    for other in ["sample", "timestep", "text_embeds", "time_ids"] {
        let error = attention::find(&model, other).unwrap_err();
        assert_eq!(error.status(), Status::Unsupported, "{other}: {error}");
    }
}
