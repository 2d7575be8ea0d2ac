//! Copies of one base model agree on its fingerprint, whatever framework, exporter, layout and precision they come in.

mod unets;

use std::process::Command;

use macula::concept::{Fingerprint, Projections, Weights};
use macula::onnx::{Limits, Model, attention};

fn projections(folder: &std::path::Path) -> Projections {
    let model = Model::open(folder.join("model.onnx"), &Limits::default()).unwrap();
    let found = attention::find(&model, "encoder_hidden_states").unwrap();
    Projections::from_model(&model, &found, &[]).unwrap()
}

/// The fingerprints of PyTorch's weights, by the NumPy implementation.
fn of_torch(folders: &[std::path::PathBuf]) -> Vec<Fingerprint> {
    let script = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python/concept_files.py");
    let files = folders.iter().map(|folder| folder.join("weights.safetensors"));
    let run = Command::new(unets::python()).arg(script).arg("fingerprint").args(files).output().unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    String::from_utf8(run.stdout).unwrap().lines().map(|line| line.parse().unwrap()).collect()
}

#[test]
fn torch_and_onnx_copies_of_one_base_have_one_fingerprint() {
    let keys =
        ["sd1-torchscript17", "sd1-dynamo18", "float16-torchscript17", "to_kv-torchscript17", "bfloat16-torchscript17"];
    let folders = unets::folders(&keys);
    let bases: Vec<Projections> = folders.iter().map(|folder| projections(folder)).collect();
    let fingerprints: Vec<Fingerprint> = bases.iter().map(Projections::fingerprint).collect();
    assert_eq!(fingerprints, of_torch(&folders));
    let [one, others @ .., bfloat16] = fingerprints.as_slice() else { panic!("five copies") };
    assert!(others.iter().all(|other| other == one), "{fingerprints:?}");
    assert_ne!(bfloat16, one, "bfloat16 keeps other bits");
    assert!(matches!(bases[2].as_slice()[0].weights, Weights::F16(_)), "the stored type is kept");
}

#[test]
fn the_weights_are_those_of_torch_and_so_are_keys_and_values() {
    let folder = unets::folders(&["biased-torchscript17"]).remove(0);
    let base = projections(&folder);
    let torch = unets::tensors(&folder.join("weights.safetensors"));
    let floats = |name: &str| -> Vec<f32> {
        torch[name].data.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
    };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    let tokens = 5;
    let context: Vec<f32> = (0..2 * tokens * base.in_features()).map(|at| (at as f32 * 0.7).sin()).collect();
    let prompt = base.keys_values(&context, 2, tokens, &pool).unwrap();
    assert_eq!(base.as_slice().len(), 32);
    for (projection, values) in base.as_slice().iter().zip(prompt.base()) {
        let weights = floats(&format!("{}.weight", projection.path));
        let bias = floats(&format!("{}.bias", projection.path));
        assert_eq!(projection.weights, Weights::F32(weights.clone()), "{}", projection.path);
        assert_eq!(projection.bias.as_ref(), Some(&bias), "{}", projection.path);
        let inputs = base.in_features();
        for (row, values) in values.chunks_exact(projection.out_features).enumerate() {
            for (feature, value) in values.iter().enumerate() {
                let product =
                    |at: usize| f64::from(context[row * inputs + at]) * f64::from(weights[feature * inputs + at]);
                let expected: f64 = f64::from(bias[feature]) + (0..inputs).map(product).sum::<f64>();
                assert!((f64::from(*value) - expected).abs() < 1e-5, "{}", projection.path);
            }
        }
    }
}
