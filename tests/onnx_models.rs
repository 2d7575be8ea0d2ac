//! Models read, edited and saved here mean the same to `onnx` and onnxruntime in Python.

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use macula::onnx::build::{Dim, node, tensor_f32, value};
use macula::onnx::proto::GraphProto;
use macula::onnx::{DataType, Limits, Model, SaveOptions, Weights, edit};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Array {
    shape: Vec<usize>,
    values: Vec<f32>,
}

#[derive(Serialize)]
struct Run {
    model: PathBuf,
    check: bool,
    inputs: BTreeMap<String, Array>,
}

/// The outputs of each model, by onnxruntime in Python.
fn run(jobs: &[Run]) -> Vec<BTreeMap<String, Array>> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("jobs.json");
    std::fs::write(&path, serde_json::to_vec(jobs).unwrap()).unwrap();
    let answer = support::python("run_models.py", &[path.to_str().unwrap()]);
    serde_json::from_str(&answer).unwrap()
}

fn input() -> Array {
    let values = (0..3 * 48).map(|index| ((index * 37 % 101) as f32 - 50.0) / 50.0).collect();
    Array { shape: vec![3, 48], values }
}

fn job(model: PathBuf, check: bool) -> Run {
    Run { model, check, inputs: BTreeMap::from([("x".to_owned(), input())]) }
}

fn models() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> =
        std::fs::read_dir(support::fixture("onnx_models.py", &[])).unwrap().map(|e| e.unwrap().path()).collect();
    folders.sort();
    assert_eq!(folders.len(), 18);
    folders.iter().map(|folder| folder.join("model.onnx")).collect()
}

fn assert_same(found: &Array, expected: &Array, what: &str) {
    assert_eq!(found.shape, expected.shape, "{what}");
    let error = support::relative_error(&found.values, &expected.values);
    assert!(error <= 1e-6, "{what}: relative error {error}");
}

#[test]
fn weights_stored_in_any_way_survive_reading_and_saving() {
    let folder = tempfile::tempdir().unwrap();
    let mut jobs = Vec::new();
    let mut what = Vec::new();
    let ways = [
        Weights::Inline,
        Weights::OneFile(None),
        Weights::OneFile(Some("weights.pb".into())),
        Weights::FileEach("weights".into()),
        Weights::Auto,
    ];
    for path in models() {
        let stem = path.parent().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
        let model = Model::open(&path, &Limits::default()).unwrap();
        jobs.push(job(path.clone(), true));
        what.push((stem.clone(), None));
        for (index, weights) in ways.iter().enumerate() {
            let target = folder.path().join(format!("{stem}-{index}"));
            std::fs::create_dir(&target).unwrap();
            let mut options = SaveOptions::default();
            options.weights = weights.clone();
            options.inline_below = 256;
            let saved = target.join("model.onnx");
            model.save(&saved, &options).unwrap();
            // Read back here, every tensor is bit for bit what it was.
            let again = Model::open(&saved, &Limits::default()).unwrap();
            for tensor in &model.graph().initializer {
                let (a, b) = (model.tensor(tensor).unwrap(), again.initializer(tensor.name()).unwrap());
                assert_eq!((a.data_type(), a.dims()), (b.data_type(), b.dims()));
                assert_eq!(a.read().unwrap(), b.read().unwrap(), "{stem} {weights:?} {}", tensor.name());
            }
            let files = again.external_files().count();
            let expected = match weights {
                Weights::Inline | Weights::Auto => 0,
                Weights::OneFile(_) => 1,
                // Of the f16 weights, the vectors are below the threshold.
                _ if stem.ends_with("f32") => 3,
                _ => 2,
            };
            assert_eq!(files, expected, "{stem} {weights:?}");
            for file in again.external_files() {
                assert!(
                    !std::fs::read_dir(file.path().parent().unwrap())
                        .unwrap()
                        .any(|entry| { entry.unwrap().file_name().to_string_lossy().ends_with(".tmp") })
                );
            }
            jobs.push(job(saved, true));
            what.push((stem.clone(), Some(weights.clone())));
        }
    }
    let answers = run(&jobs);
    let reference: BTreeMap<&str, &Array> =
        what.iter().zip(&answers).filter(|((_, w), _)| w.is_none()).map(|((s, _), a)| (s.as_str(), &a["y"])).collect();
    for ((stem, weights), answer) in what.iter().zip(&answers) {
        assert_eq!(answer["y"].values, reference[stem.as_str()].values, "{stem} {weights:?}");
    }
}

#[test]
fn all_ways_of_storing_read_as_the_same_numbers() {
    for data_type in ["f32", "f16", "bf16"] {
        let of_type = |path: &PathBuf| path.parent().unwrap().to_str().unwrap().ends_with(&format!("-{data_type}"));
        let mut first: Option<Vec<Vec<f32>>> = None;
        for path in models().into_iter().filter(of_type) {
            let model = Model::open(&path, &Limits::default()).unwrap();
            let names = ["w1", "b1", "w2", "gain"];
            let read: Vec<Vec<f32>> = names.iter().map(|n| model.initializer(n).unwrap().to_f32().unwrap()).collect();
            assert_eq!(model.initializer("axes").unwrap().to_i64().unwrap(), [0]);
            let first = first.get_or_insert_with(|| read.clone());
            assert_eq!(&read, first, "{}", path.display());
        }
    }
}

#[test]
fn saving_refers_to_files_below_and_never_overwrites_what_it_reads() {
    let folder = tempfile::tempdir().unwrap();
    let source = support::fixture("onnx_models.py", &[]).join("onnx_data-f32");
    let inner = folder.path().join("unet");
    std::fs::create_dir(&inner).unwrap();
    for name in ["model.onnx", "model.onnx_data"] {
        std::fs::copy(source.join(name), inner.join(name)).unwrap();
    }
    let model = Model::open(inner.join("model.onnx"), &Limits::default()).unwrap();
    let before = std::fs::read(inner.join("model.onnx_data")).unwrap();
    let mut options = SaveOptions::default();
    options.weights = Weights::OneFile(Some("model.onnx_data".into()));
    let error = model.save(inner.join("model.onnx"), &options).unwrap_err();
    assert_eq!(error.status(), macula::Status::InvalidArgument, "{error}");
    assert_eq!(std::fs::read(inner.join("model.onnx_data")).unwrap(), before);
    let error = model.save(inner.join("model.onnx_data"), &SaveOptions::default()).unwrap_err();
    assert_eq!(error.status(), macula::Status::InvalidArgument, "{error}");
    for name in ["../outside", "a/b", "", "..", "/tmp/x"] {
        options.weights = Weights::OneFile(Some(name.into()));
        assert!(model.save(folder.path().join("other.onnx"), &options).is_err(), "{name:?}");
    }
    options.weights = Weights::Reference;
    let above = folder.path().join("above.onnx");
    model.save(&above, &options).unwrap();
    let again = Model::open(&above, &Limits::default()).unwrap();
    assert_eq!(again.external_files().next().unwrap().location(), "unet/model.onnx_data");
    let elsewhere = tempfile::tempdir().unwrap();
    let error = model.save(elsewhere.path().join("model.onnx"), &options).unwrap_err();
    assert!(error.message().contains("does not lie below"), "{error}");
    assert_eq!(std::fs::read_dir(elsewhere.path()).unwrap().count(), 0);
    let answers = run(&[job(inner.join("model.onnx"), true), job(above, true)]);
    assert_eq!(answers[0]["y"].values, answers[1]["y"].values);
}

fn save(model: &Model, folder: &Path, name: &str) -> PathBuf {
    let path = folder.join(name).with_extension("onnx");
    model.save(&path, &SaveOptions::default()).unwrap();
    path
}

#[test]
fn edited_models_compute_what_the_original_does() {
    let folder = tempfile::tempdir().unwrap();
    let path = support::fixture("onnx_models.py", &[]).join("onnx_data-f32/model.onnx");
    let model = Model::open(&path, &Limits::default()).unwrap();
    let batch = |features: i64| -> Vec<Dim> { vec!["batch".into(), features.into()] };

    let mut exposed = model.clone();
    exposed
        .edit(|edit| {
            edit.expose_output("h")?;
            edit.expose_output("p")
        })
        .unwrap();
    let exposed = save(&exposed, folder.path(), "exposed");
    let all = run(&[job(path.clone(), true), job(exposed, false)]);
    assert_same(&all[1]["y"], &all[0]["y"], "an exposed model");
    let (h, p, y) = (&all[1]["h"], &all[1]["p"], &all[0]["y"]);
    assert_eq!((h.shape.as_slice(), p.shape.as_slice()), (&[3, 64][..], &[3, 32][..]));
    // By hand: h = x w1.
    let w1 = model.initializer("w1").unwrap().to_f32().unwrap();
    let x = input().values;
    let by_hand: Vec<f32> = (0..3 * 64)
        .map(|i| (0..48).map(|k| f64::from(x[i / 64 * 48 + k]) * f64::from(w1[k * 64 + i % 64])).sum::<f64>() as f32)
        .collect();
    assert_same(h, &Array { shape: vec![3, 64], values: by_hand }, "an inner value");

    let mut jobs = Vec::new();
    let mut replaced = model.clone();
    edit::replace_by_input(&mut replaced, "h", Some(&batch(64))).unwrap();
    replaced.edit(|edit| Ok(edit.drop_unused_inputs())).unwrap();
    assert!(replaced.initializer("w1").is_err(), "weights that nothing uses stay");
    let inputs = BTreeMap::from([("h".to_owned(), h.clone())]);
    jobs.push(Run { model: save(&replaced, folder.path(), "replaced"), check: true, inputs });

    // `p` is used inside both branches of an If, too.
    let mut captured = model.clone();
    edit::replace_by_input(&mut captured, "p", Some(&batch(32))).unwrap();
    captured.edit(|edit| Ok(edit.drop_unused_inputs())).unwrap();
    let inputs = BTreeMap::from([("p".to_owned(), p.clone())]);
    jobs.push(Run { model: save(&captured, folder.path(), "captured"), check: true, inputs });

    let first = edit::cut(&model, &["x"], &["r"]).unwrap();
    let second = edit::cut(&model, &["r"], &["y"]).unwrap();
    assert_eq!((first.graph().initializer.len(), second.graph().initializer.len()), (2, 4));
    let mut joined = first.clone();
    let outputs = edit::splice(&mut joined, &second, "after/", &[("r", "r")]).unwrap();
    joined.edit(|edit| edit.expose_output(&outputs["y"])).unwrap();
    jobs.push(job(save(&joined, folder.path(), "joined"), false));

    // A layer in between: r becomes 2 r.
    let double = GraphProto {
        name: Some("double".into()),
        input: vec![value("a", DataType::Float, Some(&batch(64)))],
        output: vec![value("b", DataType::Float, Some(&batch(64)))],
        initializer: vec![tensor_f32("two", &[], &[2.0])],
        node: vec![node("Mul", ["a", "two"], ["b"])],
        ..GraphProto::default()
    };
    let double = Model::new(double, &[("", 17)], &Limits::default()).unwrap();
    let mut between = model.clone();
    between
        .edit(|edit| {
            // Users first, so that the new layer itself still takes the old value.
            edit.redirect("r", "double/b");
            edit.splice(&double, "double/", &[("a", "r")])?;
            Ok(())
        })
        .unwrap();
    jobs.push(job(save(&between, folder.path(), "between"), true));

    let mut overridable = model.clone();
    edit::override_initializer(&mut overridable, "w1").unwrap();
    let overridable = save(&overridable, folder.path(), "overridable");
    jobs.push(job(overridable.clone(), true));
    let mut with_other = job(overridable, false);
    let halved = w1.iter().map(|w| w / 2.0).collect();
    with_other.inputs.insert("w1".into(), Array { shape: vec![48, 64], values: halved });
    jobs.push(with_other);
    let mut exposed_h = model.clone();
    exposed_h
        .edit(|edit| {
            edit.override_initializer("w1")?;
            edit.expose_output("h")
        })
        .unwrap();
    let mut other = job(save(&exposed_h, folder.path(), "overridable_h"), false);
    other.inputs.insert("w1".into(), Array { shape: vec![48, 64], values: w1.iter().map(|w| w / 2.0).collect() });
    jobs.push(other);

    let answers = run(&jobs);
    assert_same(&answers[0]["y"], y, "a value replaced by an input");
    assert_same(&answers[1]["y"], y, "a captured value replaced by an input");
    assert_same(&answers[2]["after/y"], y, "a model cut in two and joined");
    // y is linear in r: (2 r) w2 gain.
    let doubled = Array { values: y.values.iter().map(|v| 2.0 * v).collect(), ..y.clone() };
    assert_same(&answers[3]["y"], &doubled, "a layer spliced in between");
    assert_same(&answers[4]["y"], y, "an initializer that keeps its default");
    assert!(support::relative_error(&answers[5]["y"].values, &y.values) > 1e-2, "overriding had no effect");
    let half = Array { values: h.values.iter().map(|v| v / 2.0).collect(), ..h.clone() };
    assert_same(&answers[6]["h"], &half, "an overridden initializer");
}

#[test]
fn a_model_above_two_gigabytes_is_saved_with_external_data() {
    let folder = tempfile::tempdir().unwrap();
    // Sparse files: no disk is used for what is read as zeros.
    let data = folder.path().join("big.data");
    let elements = 300i64 << 20;
    std::fs::File::create(&data).unwrap().set_len(2 * 4 * elements as u64).unwrap();
    let mut tensors = Vec::new();
    for index in 0..2 {
        let mut tensor = tensor_f32(&format!("w{index}"), &[], &[]);
        tensor.raw_data = None;
        tensor.dims = vec![elements];
        tensor.data_location = Some(1);
        let entry = |key: &str, value: String| macula::onnx::proto::StringStringEntryProto {
            key: Some(key.into()),
            value: Some(value),
        };
        tensor.external_data = vec![
            entry("location", "big.data".into()),
            entry("offset", (index * 4 * elements).to_string()),
            entry("length", (4 * elements).to_string()),
        ];
        tensors.push(tensor);
    }
    let graph = GraphProto {
        name: Some("big".into()),
        output: vec![value("w0", DataType::Float, None), value("w1", DataType::Float, None)],
        initializer: tensors,
        ..GraphProto::default()
    };
    let plain = Model::new(GraphProto::default(), &[("", 17)], &Limits::default()).unwrap();
    let mut proto = plain.header().clone();
    proto.graph = Some(graph);
    let bytes = prost::Message::encode_to_vec(&proto);
    let model = Model::from_bytes(bytes.into(), Some(folder.path()), &Limits::default()).unwrap();
    let mut options = SaveOptions::default();
    options.weights = Weights::Inline;
    let error = model.save(folder.path().join("inline.onnx"), &options).unwrap_err();
    assert_eq!(error.status(), macula::Status::LimitExceeded, "{error}");
    options.weights = Weights::Reference;
    model.save(folder.path().join("big.onnx"), &options).unwrap();
    assert!(std::fs::metadata(folder.path().join("big.onnx")).unwrap().len() < 10_000);
    if std::env::var_os("MACULA_FULL_TESTS").is_some_and(|value| value == "1") {
        model.save(folder.path().join("auto.onnx"), &SaveOptions::default()).unwrap();
        let saved = Model::open(folder.path().join("auto.onnx"), &Limits::default()).unwrap();
        assert_eq!(saved.external_files().next().unwrap().size(), 8 * elements as u64);
    }
}
