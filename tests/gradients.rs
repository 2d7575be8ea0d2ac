//! Derivative rules, each by itself: models of one operator from `tests/python/gradients.py` against PyTorch's autograd
//! in float64, which the script has checked against central differences. First and second derivatives, both efforts,
//! sizes that vary, half precision, and what is refused.

mod support;
mod unets;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use macula::Status;
use macula::onnx::build::{self, Dim, node};
use macula::onnx::grad::{self, Effort, Facts, Gradient, Observation, Questions, Spending};
use macula::onnx::inline::inlined;
use macula::onnx::proto::{
    AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, ValueInfoProto,
};
use macula::onnx::{DataType, Limits, Model};
use macula::progress::CancelToken;
use macula::runtime::{ElementType, Runtime, RuntimeOptions, SessionOptions, Tensor};
use prost::Message;
use serde_json::Value;
use unets::{Stored, tensors};

/// Of each tensor's largest entry, in f32.
const TOLERANCE: f64 = 1e-5;

fn runtime() -> Runtime {
    support::onnxruntime();
    Runtime::load(&RuntimeOptions::default()).unwrap()
}

fn options() -> SessionOptions {
    let mut options = SessionOptions::default();
    options.intra_threads = 1;
    options
}

fn observe(
    runtime: &Runtime,
    model: &Model,
    questions: &Questions,
    inputs: &[(&str, &Tensor)],
    options: &SessionOptions,
) -> macula::Result<Observation> {
    macula::runtime::observe(runtime, model, questions, inputs, options, &CancelToken::new())
}

/// A tensor of the fixture in a type that it is fed or compared in.
fn tensor(stored: &Stored, floats: ElementType) -> Tensor {
    let (shape, data) = (&stored.shape, &stored.data);
    match stored.dtype {
        safetensors::Dtype::I64 => Tensor::from_slice(shape, bytemuck::pod_collect_to_vec::<u8, i64>(data).as_slice()),
        safetensors::Dtype::F32 => {
            let values: Vec<f32> = bytemuck::pod_collect_to_vec(data);
            match floats {
                ElementType::F16 => {
                    Tensor::from_vec(shape, values.iter().map(|&value| half::f16::from_f32(value)).collect())
                }
                ElementType::BF16 => {
                    Tensor::from_vec(shape, values.iter().map(|&value| half::bf16::from_f32(value)).collect())
                }
                ElementType::F64 => Tensor::from_vec(shape, values.iter().map(|&value| f64::from(value)).collect()),
                _ => Tensor::from_vec(shape, values),
            }
        }
        other => panic!("{other:?}"),
    }
    .unwrap()
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    match tensor.dtype() {
        ElementType::F64 => tensor.as_slice::<f64>().unwrap().to_vec(),
        _ => tensor.as_slice::<f32>().unwrap().iter().map(|&value| f64::from(value)).collect(),
    }
}

/// One case of a row: tensors by name.
type Case = BTreeMap<String, Stored>;

struct Row {
    what: String,
    op: String,
    opset: i64,
    model: Model,
    cases: Vec<Case>,
    wanted: Vec<String>,
    inputs: Vec<String>,
    outputs: usize,
}

struct Rows {
    folder: PathBuf,
    index: Vec<Value>,
}

impl Rows {
    fn new() -> Self {
        let folder = support::fixture("gradients.py", &[]);
        let index = serde_json::from_slice(&std::fs::read(folder.join("index.json")).unwrap()).unwrap();
        Self { folder, index }
    }

    fn open(&self, row: &Value, floats: &str) -> Row {
        let texts = |key: &str| row[key].as_array().unwrap().iter().map(|x| x.as_str().unwrap().to_owned()).collect();
        let number = row["number"].as_u64().unwrap();
        let case = |case| tensors(&self.folder.join(format!("{number}-{case}.safetensors")));
        Row {
            what: row["what"].as_str().unwrap().to_owned(),
            op: row["op"].as_str().unwrap().to_owned(),
            opset: row["opset"].as_i64().unwrap(),
            model: Model::open(self.folder.join(format!("{number}-{floats}.onnx")), &Limits::default()).unwrap(),
            cases: (0..row["cases"].as_u64().unwrap()).map(case).collect(),
            wanted: texts("wanted"),
            inputs: texts("inputs"),
            outputs: row["outputs"].as_u64().unwrap() as usize,
        }
    }

    fn all(&self) -> impl Iterator<Item = Row> {
        let only = std::env::var("MACULA_ROWS").ok();
        let wanted = move |row: &&Value| only.as_ref().is_none_or(|only| row["what"].as_str().unwrap().contains(only));
        self.index.iter().filter(wanted).map(|row| self.open(row, "f32"))
    }
}

/// What one model answers, against what was expected of it.
#[derive(Default)]
struct Report {
    wrong: Vec<String>,
    worst: BTreeMap<&'static str, (f64, String)>,
}

impl Report {
    fn compare(&mut self, kind: &'static str, what: &str, found: &Tensor, expected: &Stored, tolerance: f64) {
        let expected_values: Vec<f64> = bytemuck::pod_collect_to_vec(&expected.data);
        if found.shape() != expected.shape {
            self.wrong.push(format!("{kind} {what}: {:?}, expected {:?}", found.shape(), expected.shape));
            return;
        }
        // Where all is zero but for rounding there is no scale to compare with.
        let largest = expected_values.iter().fold(1e-2f64, |largest, value| largest.max(value.abs()));
        let found = numbers(found);
        let off =
            |(found, expected): (&f64, &f64)| if found == expected { 0.0 } else { (found - expected).abs() / largest };
        let error =
            found.iter().zip(&expected_values).map(off).fold(0.0f64, |a, b| if b.is_nan() { b } else { a.max(b) });
        if error.is_nan() || error > tolerance {
            self.wrong.push(format!("{kind} {what}: {error:.1e}\n    {found:.4?}\n    {expected_values:.4?}"));
        }
        let worst = self.worst.entry(kind).or_default();
        if error > worst.0 {
            *worst = (error, what.to_owned());
        }
    }

    fn end(self) {
        for (kind, (error, what)) in &self.worst {
            println!("{kind}: at most {error:.1e} of the largest entry, {what}");
        }
        assert!(self.wrong.is_empty(), "{} wrong:\n{}", self.wrong.len(), self.wrong.join("\n"));
    }
}

/// The sum of all outputs with their cotangents, as one output: a node with several outputs has one gradient.
fn contract(model: &mut Model, values: &[(String, String)], total: &str) {
    model
        .edit(|edit| {
            let mut terms = Vec::new();
            for (value, factor) in values {
                let name = edit.fresh_name(&format!("{value}/term"));
                let sum = edit.fresh_name(&format!("{value}/sum"));
                let graph = edit.graph_mut();
                graph.node.push(node("Mul", [value.as_str(), factor], [name.as_str()]));
                graph.node.push(node("ReduceSum", [name.as_str()], [sum.as_str()]).with("keepdims", 0));
                terms.push(sum);
            }
            edit.graph_mut().node.push(node("Sum", terms.iter().map(String::as_str), [total]));
            edit.graph_mut().output.push(build::value(total, DataType::Float, Some(&[])));
            Ok(())
        })
        .unwrap();
}

/// The row's model with an input for each output's cotangent and the scalar ⟨u, y⟩ as output `total`, in f32.
fn with_total(row: &Row) -> Model {
    let mut model = row.model.clone();
    let mut pairs = Vec::new();
    let mut casts = Vec::new();
    for index in 0..row.outputs {
        let (value, float) = (format!("y{index}"), format!("y{index}/f32"));
        casts.push(node("Cast", [value.as_str()], [float.as_str()]).with("to", DataType::Float as i64));
        pairs.push((float, format!("u{index}")));
    }
    model
        .edit(|edit| {
            edit.graph_mut().node.extend(casts);
            for (_, cotangent) in &pairs {
                edit.graph_mut().input.push(declared(cotangent, &row.cases[0][cotangent]));
            }
            Ok(())
        })
        .unwrap();
    contract(&mut model, &pairs, "total");
    model
}

/// An input of the rank that a stored tensor has.
fn declared(name: &str, stored: &Stored) -> ValueInfoProto {
    build::value(name, DataType::Float, Some(&vec![Dim::Any; stored.shape.len()]))
}

struct Bench {
    runtime: Runtime,
}

impl Bench {
    fn facts(
        &self,
        model: &Model,
        wrt: &[&str],
        output: &str,
        cases: &[Vec<(String, Tensor)>],
    ) -> macula::Result<Facts> {
        let questions = grad::questions(model, wrt, output)?;
        let observations: Vec<Observation> = cases
            .iter()
            .map(|inputs| {
                let inputs: Vec<_> = inputs.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
                observe(&self.runtime, model, &questions, &used(model, &inputs), &options())
            })
            .collect::<macula::Result<_>>()?;
        Facts::new(&observations)
    }

    fn run(&self, model: &Model, outputs: &[String], inputs: &[(String, Tensor)]) -> macula::Result<Vec<Tensor>> {
        let inputs: Vec<_> = inputs.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let outputs: Vec<&str> = outputs.iter().map(String::as_str).collect();
        self.runtime.session(model, &options())?.run(&used(model, &inputs), &outputs, &CancelToken::new())
    }
}

fn used<'a>(model: &Model, inputs: &[(&'a str, &'a Tensor)]) -> Vec<(&'a str, &'a Tensor)> {
    let has = |name: &str| model.graph().input.iter().any(|input| input.name() == name);
    inputs.iter().copied().filter(|(name, _)| has(name)).collect()
}

/// The inputs of a case for the models of [`with_total`] and those made of them.
fn feeds(row: &Row, case: &Case, floats: ElementType) -> Vec<(String, Tensor)> {
    let mut feeds: Vec<(String, Tensor)> =
        row.inputs.iter().map(|name| (name.clone(), tensor(&case[name], floats))).collect();
    feeds.extend((0..row.outputs).map(|i| format!("u{i}")).map(|u| (u.clone(), tensor(&case[&u], ElementType::F32))));
    feeds
}

fn one() -> Tensor {
    Tensor::from_vec(&[], vec![1.0f32]).unwrap()
}

/// Which of the values a model's output depends on in a way that has a derivative.
fn differentiable<'a>(model: &Model, values: &[&'a str], output: &str) -> Vec<&'a str> {
    values.iter().copied().filter(|value| grad::questions(model, &[value], output).is_ok()).collect()
}

/// Tests one row with facts of its first `runs` cases, on each of these cases.
fn check(bench: &Bench, row: &Row, runs: usize, effort: Effort, report: &mut Report) -> macula::Result<()> {
    let what = |case: usize, value: &str| format!("{} [{value}, {effort:?}, {runs} runs, case {case}]", row.what);
    let model = with_total(row);
    let cases = &row.cases[..runs];
    let mut inputs: Vec<_> = cases.iter().map(|case| feeds(row, case, ElementType::F32)).collect();
    let wrt: Vec<&str> = row.wanted.iter().map(String::as_str).collect();
    let first = grad::vjp(&model, &bench.facts(&model, &wrt, "total", &inputs)?, &wrt, "total", effort)?;
    inputs.iter_mut().for_each(|inputs| inputs.push((first.cotangent.clone(), one())));
    for (number, (case, inputs)) in cases.iter().zip(&inputs).enumerate() {
        let found = bench.run(&first.model, &first.gradients, inputs)?;
        for (value, found) in wrt.iter().zip(&found) {
            report.compare("gradient", &what(number, value), found, &case[&value.replace('x', "g")], TOLERANCE);
        }
    }
    second(bench, row, first, inputs, runs, effort, report)
}

/// Derivatives of ⟨∇⟨u, y⟩, v⟩: with respect to the inputs, Hessian-vector products; with respect to u, J v.
fn second(
    bench: &Bench,
    row: &Row,
    first: Gradient,
    mut inputs: Vec<Vec<(String, Tensor)>>,
    runs: usize,
    effort: Effort,
    report: &mut Report,
) -> macula::Result<()> {
    let what = |case: usize, value: &str| format!("{} [{value}, {effort:?}, {runs} runs, case {case}]", row.what);
    let cases = &row.cases[..runs];
    let mut along = first.model;
    let mut pairs = Vec::new();
    along
        .edit(|edit| {
            for (value, gradient) in row.wanted.iter().zip(&first.gradients) {
                let direction = value.replace('x', "v");
                edit.graph_mut().input.push(declared(&direction, &row.cases[0][&direction]));
                pairs.push((gradient.clone(), direction));
            }
            Ok(())
        })
        .unwrap();
    contract(&mut along, &pairs, "along");
    for (case, inputs) in cases.iter().zip(&mut inputs) {
        inputs.extend(pairs.iter().map(|(_, v)| (v.clone(), tensor(&case[v], ElementType::F32))));
    }
    let cotangents: Vec<String> = (0..row.outputs).map(|index| format!("u{index}")).collect();
    let wanted: Vec<&str> = row.wanted.iter().chain(&cotangents).map(String::as_str).collect();
    let wrt = differentiable(&along, &wanted, "along");
    let facts = bench.facts(&along, &wrt, "along", &inputs)?;
    let second = grad::vjp(&along, &facts, &wrt, "along", effort)?;
    for (number, (case, mut inputs)) in cases.iter().zip(inputs).enumerate() {
        inputs.push((second.cotangent.clone(), one()));
        let found = bench.run(&second.model, &second.gradients, &inputs)?;
        for &value in &wanted {
            let (kind, name) = match value.starts_with('x') {
                true => ("Hessian-vector product", value.replace('x', "h")),
                false => ("Jacobian-vector product", value.replace('u', "p")),
            };
            let expected = &case[&name];
            match wrt.iter().position(|other| *other == value) {
                // A second derivative differences what the first has already rounded.
                Some(place) => report.compare(kind, &what(number, value), &found[place], expected, 2.0 * TOLERANCE),
                None => {
                    let values: Vec<f64> = bytemuck::pod_collect_to_vec(&expected.data);
                    if values.iter().any(|&value| value.abs() > 1e-12) {
                        report.wrong.push(format!("{kind} {}: none, expected {values:.4?}", what(number, value)));
                    }
                }
            }
        }
    }
    Ok(())
}

fn check_all(runs: usize, effort: Effort) {
    let bench = Bench { runtime: runtime() };
    let mut report = Report::default();
    for row in Rows::new().all().filter(|row| row.cases.len() >= runs) {
        if let Err(error) = check(&bench, &row, runs, effort, &mut report) {
            report.wrong.push(format!("{} in set {} [{effort:?}, {runs} runs]: {error}", row.what, row.opset));
        }
    }
    report.end();
}

#[test]
fn derivatives_are_those_of_pytorch() {
    check_all(1, Effort::Speed);
}

#[test]
fn derivatives_that_spare_memory_are_those_of_pytorch() {
    check_all(1, Effort::Memory);
}

#[test]
fn one_gradient_serves_sizes_that_vary() {
    check_all(2, Effort::Speed);
}

/// The operators that rules add are rows themselves, so that gradients can be differentiated: or no gradient passes them.
#[test]
fn operators_that_rules_emit_have_rules() {
    let flat = ["Shape", "ConstantOfShape", "Less", "Equal", "Sign", "OneHot", "Range"];
    let (bench, rows) = (Bench { runtime: runtime() }, Rows::new());
    let tested: BTreeSet<String> = rows.all().map(|row| row.op).collect();
    let mut emitted = BTreeMap::new();
    for row in rows.all() {
        let model = with_total(&row);
        let wrt: Vec<&str> = row.wanted.iter().map(String::as_str).collect();
        let inputs = [feeds(&row, &row.cases[0], ElementType::F32)];
        let Ok(facts) = bench.facts(&model, &wrt, "total", &inputs) else { continue };
        for effort in [Effort::Speed, Effort::Memory] {
            let Ok(gradient) = grad::vjp(&model, &facts, &wrt, "total", effort) else { continue };
            for node in &gradient.model.graph().node[model.graph().node.len()..] {
                assert_eq!(node.domain(), "", "{}", row.what);
                emitted.insert(node.op_type().to_owned(), row.what.clone());
            }
        }
    }
    assert!(emitted.len() > 30, "{emitted:?}");
    emitted.retain(|op_type, _| !tested.contains(op_type) && !flat.contains(&op_type.as_str()));
    assert!(emitted.is_empty(), "without a row of their own, and a row that emits them: {emitted:?}");
}

/// Types of floating point besides f32, with the error that a gradient may have because forward values are rounded; in
/// fp64, because the cotangent comes in f32.
const KINDS: [(&str, ElementType, f64); 3] =
    [("fp16", ElementType::F16, 1e-3), ("bf16", ElementType::BF16, 8e-3), ("fp64", ElementType::F64, 1e-7)];

/// In half precision, the forward values are rounded, the gradients are not: they are f32 and don't vanish. Those of
/// double precision are f64.
#[test]
fn gradients_of_half_precision_are_f32_and_do_not_underflow() {
    let (bench, rows) = (Bench { runtime: runtime() }, Rows::new());
    let mut report = Report::default();
    for entry in rows.index.iter().filter(|row| row["half"].as_bool().unwrap()) {
        for (name, kind, tolerance) in KINDS {
            let row = rows.open(entry, name);
            let single = with_total(&rows.open(entry, "f32"));
            let model = with_total(&row);
            let wrt: Vec<&str> = row.wanted.iter().map(String::as_str).collect();
            let case = &row.cases[0];
            // The sizes are those of the same model in f32, which every provider runs.
            let facts = bench.facts(&single, &wrt, "total", &[feeds(&row, case, ElementType::F32)]).unwrap();
            let gradient = grad::vjp(&model, &facts, &wrt, "total", Effort::Speed).unwrap();
            let types = gradient.model.topology().element_types();
            for node in &gradient.model.graph().node[model.graph().node.len()..] {
                let half =
                    |value: &String| matches!(types.get(value.as_str()), Some(DataType::Float16 | DataType::Bfloat16));
                let inputs_may = ["Cast", "Shape"].contains(&node.op_type());
                assert!(!node.output.iter().any(half) && (inputs_may || !node.input.iter().any(half)), "{node:?}");
            }
            let mut inputs = feeds(&row, case, kind);
            let small = 1e-6f32;
            inputs.push((gradient.cotangent.clone(), Tensor::from_vec(&[], vec![small]).unwrap()));
            let found = match bench.run(&gradient.model, &gradient.gradients, &inputs) {
                Ok(found) => found,
                // ONNX Runtime's processor provider lacks many operators in these two.
                Err(error) if name != "fp16" && error.message().contains("find an implementation") => continue,
                Err(error) => panic!("{} {name}: {error}", row.what),
            };
            for (value, found) in wrt.iter().zip(&found) {
                let wanted = if kind == ElementType::F64 { ElementType::F64 } else { ElementType::F32 };
                assert_eq!(found.dtype(), wanted, "{}", row.what);
                let scaled: Vec<f64> = numbers(found).iter().map(|g| g / f64::from(small)).collect();
                let found = Tensor::from_vec(found.shape(), scaled).unwrap();
                let what = format!("{} [{value}]", row.what);
                report.compare(name, &what, &found, &case[&value.replace('x', "g")], tolerance);
            }
        }
    }
    report.end();
}

/// The Jacobian-vector product by its own function, which drops the first cotangent's input.
#[test]
fn jacobian_vector_products_need_no_first_cotangent() {
    let (bench, rows) = (Bench { runtime: runtime() }, Rows::new());
    let mut report = Report::default();
    for row in rows.all().filter(|row| row.outputs == 1 && row.wanted.len() == 1 && !row.op.starts_with("Cast")) {
        let case = &row.cases[0];
        let mut inputs = vec![feeds(&row, case, ElementType::F32)];
        let wrt = [row.wanted[0].as_str()];
        let facts = bench.facts(&row.model, &wrt, "y0", &inputs).unwrap();
        let first = grad::vjp(&row.model, &facts, &wrt, "y0", Effort::Speed).unwrap();
        inputs[0].push((first.cotangent.clone(), tensor(&case["u0"], ElementType::F32)));
        let facts = bench.facts(&first.model, &[&first.cotangent], &first.gradients[0], &inputs).unwrap();
        let second = grad::jvp(&first, &facts, Effort::Speed).unwrap();
        assert!(second.model.graph().input.iter().all(|input| input.name() != first.cotangent), "{}", row.what);
        let direction = tensor(&case[&row.wanted[0].replace('x', "v")], ElementType::F32);
        inputs[0].retain(|(name, _)| *name != first.cotangent);
        inputs[0].push((second.cotangent.clone(), direction));
        let found = bench.run(&second.model, &second.gradients, &inputs[0]).unwrap();
        report.compare("Jacobian-vector product", &row.what, &found[0], &case["p0"], 2.0 * TOLERANCE);
    }
    report.end();
}

/// A model of the given nodes that computes `y` from `x`, both `[2, 3]`.
fn model_of(nodes: Vec<NodeProto>, opsets: &[(&str, i64)], functions: Vec<FunctionProto>) -> Model {
    let dims = [2.into(), 3.into()];
    let opset =
        |&(domain, version): &(&str, i64)| OperatorSetIdProto { domain: Some(domain.into()), version: Some(version) };
    let proto = ModelProto {
        ir_version: Some(10),
        opset_import: opsets.iter().map(opset).collect(),
        functions,
        graph: Some(GraphProto {
            name: Some("g".into()),
            node: nodes,
            input: vec![build::value("x", DataType::Float, Some(&dims))],
            output: vec![build::value("y", DataType::Float, Some(&dims))],
            ..GraphProto::default()
        }),
        ..ModelProto::default()
    };
    Model::from_bytes(proto.encode_to_vec().into(), None, &Limits::default()).unwrap()
}

#[test]
fn attention_computed_again_in_blocks_has_the_same_gradient() {
    // More scores than one block holds, for one head already.
    let sizes = [("q", [2, 2100, 4]), ("k", [2, 4, 2048]), ("v", [2, 2048, 4])];
    let graph = GraphProto {
        name: Some("attention".into()),
        node: vec![
            node("MatMul", ["q", "k"], ["scores"]),
            node("Mul", ["scores", "scale"], ["scaled"]),
            node("Softmax", ["scaled"], ["weights"]).with("axis", -1),
            node("MatMul", ["weights", "v"], ["y"]),
            node("Neg", ["y"], ["z"]),
        ],
        initializer: vec![build::tensor("scale", DataType::Float, &[], 0.5f32.to_le_bytes().to_vec())],
        input: sizes.map(|(name, sizes)| build::value(name, DataType::Float, Some(&sizes.map(Dim::Fixed)))).to_vec(),
        output: vec![build::value("z", DataType::Float, Some(&[2, 2100, 4].map(Dim::Fixed)))],
        ..GraphProto::default()
    };
    let model = Model::new(graph, &[("", 17)], &Limits::default()).unwrap();
    let waves = |sizes: [i64; 3], pace: f32| wave(&sizes.map(|size| size as usize), pace);
    let mut inputs: Vec<(String, Tensor)> = sizes
        .iter()
        .zip([0.7, 0.9, 1.1])
        .map(|((name, sizes), pace)| (name.to_string(), waves(*sizes, pace)))
        .collect();
    let bench = Bench { runtime: runtime() };
    let facts = bench.facts(&model, &["q", "k", "v"], "z", std::slice::from_ref(&inputs)).unwrap();
    let [speed, memory] = [Effort::Speed, Effort::Memory].map(|effort| {
        let gradient = grad::vjp(&model, &facts, &["q", "k", "v"], "z", effort).unwrap();
        inputs.truncate(3);
        inputs.push((gradient.cotangent, waves([2, 2100, 4], 1.3)));
        assert_eq!(
            gradient.model.graph().node.iter().filter(|node| node.is("Softmax")).count() > 1,
            effort == Effort::Memory
        );
        bench.run(&gradient.model, &gradient.gradients, &inputs).unwrap()
    });
    for (speed, memory) in speed.iter().zip(&memory) {
        let [speed, memory] = [speed, memory].map(|tensor| tensor.as_slice::<f32>().unwrap());
        let largest = speed.iter().fold(0f32, |largest, value| largest.max(value.abs()));
        let error = speed.iter().zip(memory).fold(0f32, |error, (a, b)| error.max((a - b).abs()));
        assert!(error <= TOLERANCE as f32 * largest, "{error:e} of {largest:e}");
    }
}

/// `h = tanh(h w)`, twelve times, from `x` to `y`, both `[1, 8, 8]`.
fn links() -> Model {
    const LINKS: usize = 12;
    let name = |at: usize| if at == LINKS { "y".to_owned() } else { format!("h{at}") };
    let links = (0..LINKS).flat_map(|at| {
        let (from, product, to) = (if at == 0 { "x".to_owned() } else { name(at) }, format!("p{at}"), name(at + 1));
        [node("MatMul", [from.as_str(), "w"], [product.as_str()]), node("Tanh", [product.as_str()], [to.as_str()])]
    });
    let weight = |at: usize| 0.1 * (at as f32 * 0.37).sin() + if at.is_multiple_of(9) { 0.9 } else { 0.0 };
    let weights: Vec<u8> = (0..64).flat_map(|at| weight(at).to_le_bytes()).collect();
    let dims = [1, 8, 8].map(Dim::Fixed);
    let graph = GraphProto {
        name: Some("chain".into()),
        node: links.collect(),
        initializer: vec![build::tensor("w", DataType::Float, &[8, 8], weights)],
        input: vec![build::value("x", DataType::Float, Some(&dims))],
        output: vec![build::value("y", DataType::Float, Some(&dims))],
        ..GraphProto::default()
    };
    Model::new(graph, &[("", 17)], &Limits::default()).unwrap()
}

/// First and second derivatives are what they are when everything is kept, and the budget is kept.
#[test]
fn what_is_computed_again_has_the_same_derivatives() {
    let (model, bench) = (links(), Bench { runtime: runtime() });
    let wave_of = |pace: f32| wave(&[1, 8, 8], pace);
    let inputs = vec![("x".to_owned(), wave_of(0.7))];
    let facts = bench.facts(&model, &["x"], "y", std::slice::from_ref(&inputs)).unwrap();
    let derivatives = |activations: Option<u64>| {
        let spending = Spending { effort: Effort::Speed, activations };
        let first = grad::vjp(&model, &facts, &["x"], "y", spending).unwrap();
        let repeated = first.model.graph().node.iter().filter(|node| node.is("Tanh")).count() - 12;
        let mut given = inputs.clone();
        given.push((first.cotangent.clone(), wave_of(1.3)));
        let gradient = bench.run(&first.model, &first.gradients, &given).unwrap().swap_remove(0);
        let facts = bench.facts(&first.model, &["x"], &first.gradients[0], std::slice::from_ref(&given)).unwrap();
        let second = grad::vjp(&first.model, &facts, &["x"], &first.gradients[0], spending).unwrap();
        given.push((second.cotangent.clone(), wave_of(1.1)));
        let product = bench.run(&second.model, &second.gradients, &given).unwrap().swap_remove(0);
        let pushed = grad::jvp(&first, &facts, spending).map(|pushed| pushed.gradients.len());
        assert_eq!(pushed.is_ok(), activations.is_none(), "{pushed:?}");
        (first.activations, repeated, numbers(&gradient), numbers(&product))
    };
    let (whole, repeated, gradient, product) = derivatives(None);
    // A rule reads every result of Tanh, 64 numbers each.
    assert_eq!((whole, repeated), (12 * 64 * 4, 0));
    for links in [9, 7, 6, 1] {
        let budget = links * 64 * 4;
        let (kept, repeated, again, product_again) = derivatives(Some(budget));
        assert_eq!(again, gradient, "{links} of 12");
        // Here sums are added up in another order.
        let largest = product.iter().fold(0f64, |largest, value| largest.max(value.abs()));
        let error = product.iter().zip(&product_again).fold(0f64, |error, (a, b)| error.max((a - b).abs()));
        assert!(error <= 1e-6 * largest, "{links} of 12: {error:e} of {largest:e}");
        // Six is the least: every second border, and what lies between two.
        assert!(kept <= budget.max(6 * 64 * 4), "{kept} bytes for {links} of 12");
        assert!(repeated > 0, "{links} of 12");
    }
}

/// Gradients of `y` with respect to some values of a model, under a cotangent that is a wave.
fn gradients_of(model: &Model, wrt: &[&str], inputs: &[(String, Tensor)], y_sizes: &[usize]) -> Vec<Vec<f64>> {
    let bench = Bench { runtime: runtime() };
    let facts = bench.facts(model, wrt, "y", &[inputs.to_vec()]).unwrap();
    let gradient = grad::vjp(model, &facts, wrt, "y", Effort::Speed).unwrap();
    let mut given = inputs.to_vec();
    given.push((gradient.cotangent, wave(y_sizes, 1.3)));
    bench.run(&gradient.model, &gradient.gradients, &given).unwrap().iter().map(numbers).collect()
}

fn wave(sizes: &[usize], pace: f32) -> Tensor {
    let values: Vec<f32> = (0..sizes.iter().product()).map(|at| (at as f32 * pace).sin()).collect();
    Tensor::from_slice(sizes, &values).unwrap()
}

fn same(found: &[f64], expected: &[f64], what: &str) {
    let largest = expected.iter().fold(0f64, |largest, value| largest.max(value.abs()));
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() <= TOLERANCE * largest, "{what}: {found} for {expected}");
    }
}

/// Formulas that pass over an inner value stand back when its own gradient is asked for.
#[test]
fn a_gate_has_a_gradient_of_its_own() {
    let nodes = || vec![node("Sigmoid", ["x"], ["gate"]), node("Mul", ["x", "gate"], ["y"])];
    let model = model_of(nodes(), &[("", 17)], Vec::new());
    let x = wave(&[2, 3], 0.7);
    let inputs = [("x".to_owned(), x.clone())];
    let (x, u) = (numbers(&x), numbers(&wave(&[2, 3], 1.3)));
    let gate: Vec<f64> = x.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect();
    let of_gate: Vec<f64> = x.iter().zip(&u).map(|(x, u)| x * u).collect();
    let of_x: Vec<f64> = (0..6).map(|at| u[at] * (gate[at] + x[at] * gate[at] * (1.0 - gate[at]))).collect();
    same(&gradients_of(&model, &["x"], &inputs, &[2, 3])[0], &of_x, "in one formula");
    let both = gradients_of(&model, &["x", "gate"], &inputs, &[2, 3]);
    same(&both[0], &of_x, "x");
    same(&both[1], &of_gate, "the gate");
    same(&gradients_of(&model, &["gate"], &inputs, &[2, 3])[0], &of_gate, "the gate alone");
}

/// The gradient of what is repeated and then convolved is the sum over each block of the one after repeating, whether it
/// is taken in one convolution or in two steps.
#[test]
fn an_upsampled_convolution_sums_over_blocks() {
    for (size, pads) in [(3, [1, 1]), (5, [2, 2]), (2, [0, 1]), (4, [2, 1])] {
        let [sides, large] = [[1, 2, 3, 2], [1, 2, 6, 6]];
        let kernel = wave(&[3, 2, size, size], 0.31);
        let graph = GraphProto {
            name: Some("upsampled".into()),
            node: vec![
                node("Resize", ["x", "", "scales"], ["large"])
                    .with("mode", "nearest")
                    .with("coordinate_transformation_mode", "asymmetric")
                    .with("nearest_mode", "floor"),
                node("Conv", ["large", "w"], ["y"]).with("pads", vec![pads[0], pads[0], pads[1], pads[1]]),
            ],
            initializer: vec![
                build::tensor_f32("scales", &[4], &[1.0, 1.0, 2.0, 3.0]),
                build::tensor_f32("w", kernel.shape(), kernel.as_slice::<f32>().unwrap()),
            ],
            input: vec![build::value("x", DataType::Float, Some(&sides.map(|side| Dim::Fixed(side as i64))))],
            output: vec![build::value("y", DataType::Float, None)],
            ..GraphProto::default()
        };
        let model = Model::new(graph, &[("", 17)], &Limits::default()).unwrap();
        let inputs = [("x".to_owned(), wave(&sides, 0.7))];
        let in_one = &gradients_of(&model, &["x"], &inputs, &[1, 3, 6, 6])[0];
        let [in_two, of_large] = &gradients_of(&model, &["x", "large"], &inputs, &[1, 3, 6, 6])[..] else { panic!() };
        let mut summed = vec![0.0; in_one.len()];
        for (at, value) in of_large.iter().enumerate() {
            let (channel, row, column) = (at / 36, at / 6 % 6, at % 6);
            summed[channel * 6 + row / 2 * 2 + column / 3] += value;
        }
        assert_eq!(of_large.len(), large.iter().product::<usize>());
        same(in_one, &summed, "in one convolution");
        same(in_two, &summed, "in two steps");
    }
}

/// Slices that make up a value, that leave a gap, and that overlap.
#[test]
fn slices_give_their_cotangents_back_where_they_were_taken() {
    for (bounds, what) in
        [([(0, 1), (1, 3)], "adjoining"), ([(0, 1), (2, 3)], "with a gap"), ([(0, 2), (1, 3)], "overlapping")]
    {
        let mut nodes = Vec::new();
        let mut initializer = vec![build::tensor_i64("axes", &[1], &[1])];
        for (at, (start, end)) in bounds.into_iter().enumerate() {
            for (name, bound) in [("start", start), ("end", end)] {
                initializer.push(build::tensor_i64(&format!("{name}{at}"), &[1], &[bound]));
            }
            let [start, end, part, square] = ["start", "end", "part", "square"].map(|name| format!("{name}{at}"));
            nodes.push(node("Slice", ["x", &start, &end, "axes"], [part.as_str()]));
            nodes.push(node("Mul", [&*part, &*part], [square.as_str()]));
        }
        nodes.push(node("Concat", ["square0", "square1"], ["y"]).with("axis", 1));
        let graph = GraphProto {
            name: Some("slices".into()),
            node: nodes,
            initializer,
            input: vec![build::value("x", DataType::Float, Some(&[2, 3].map(Dim::Fixed)))],
            output: vec![build::value("y", DataType::Float, None)],
            ..GraphProto::default()
        };
        let model = Model::new(graph, &[("", 17)], &Limits::default()).unwrap();
        let x = wave(&[2, 3], 0.7);
        let width = bounds.iter().map(|(start, end)| (end - start) as usize).sum::<usize>();
        let found = gradients_of(&model, &["x"], &[("x".to_owned(), x.clone())], &[2, width]);
        let (x, u) = (numbers(&x), numbers(&wave(&[2, width], 1.3)));
        let mut expected = vec![0.0; 6];
        for row in 0..2 {
            let columns = bounds.iter().flat_map(|(start, end)| *start as usize..*end as usize);
            for (place, column) in columns.enumerate() {
                expected[row * 3 + column] += 2.0 * x[row * 3 + column] * u[row * width + place];
            }
        }
        same(&found[0], &expected, what);
    }
}

fn facts_of_sizes(model: &Model) -> Facts {
    let questions = grad::questions(model, &["x"], "y").unwrap();
    let sizes = questions.sizes.into_iter().map(|value| (value, vec![2, 3])).collect();
    Facts::new(&[Observation { sizes, ..Observation::default() }]).unwrap()
}

#[test]
fn operators_without_a_rule_are_named() {
    let refuse = |node: NodeProto, opsets: &[(&str, i64)]| {
        let model = model_of(vec![node.named("block/odd"), build::node("Neg", ["z"], ["y"])], opsets, vec![]);
        let error = grad::vjp(&model, &facts_of_sizes(&model), &["x"], "y", Effort::Speed).unwrap_err();
        assert_eq!(error.status(), Status::Unsupported);
        error.message().to_owned()
    };
    let message = refuse(node("Compress", ["x", "x"], ["z"]), &[("", 17)]);
    for part in ["Compress", "\"block/odd\"", "operator set 17"] {
        assert!(message.contains(part), "{message}");
    }
    let fused = node("FusedMatMul", ["x", "x"], ["z"]).in_domain("com.microsoft");
    let message = refuse(fused, &[("", 17), ("com.microsoft", 1)]);
    assert!(message.contains("com.microsoft.FusedMatMul"), "{message}");
    let message = refuse(node("Einsum", ["x"], ["z"]).with("equation", "ii->i"), &[("", 17)]);
    assert!(message.contains("diagonal") && message.contains("\"block/odd\""), "{message}");
    let message = refuse(node("Resize", ["x"], ["z"]).with("antialias", 1), &[("", 18)]);
    assert!(message.contains("antialias"), "{message}");
}

#[test]
fn values_without_a_gradient_are_named() {
    let nodes = vec![node("Identity", ["x"], ["y"]), node("Shape", ["x"], ["s"]), node("Neg", ["x"], ["aside"])];
    let model = model_of(nodes, &[("", 17)], vec![]);
    let ask = |wrt: &str, output: &str| grad::questions(&model, &[wrt], output).unwrap_err();
    assert_eq!(ask("none", "y").status(), Status::NotFound);
    assert_eq!(ask("x", "none").status(), Status::NotFound);
    assert!(ask("s", "y").message().contains("INT64"), "{}", ask("s", "y"));
    assert!(ask("aside", "y").message().contains("does not depend on \"aside\""), "{}", ask("aside", "y"));
    let old = model_of(vec![node("Neg", ["x"], ["y"])], &[("", 12)], vec![]);
    let error = grad::vjp(&old, &Facts::default(), &["x"], "y", Effort::Speed).unwrap_err();
    assert!(error.message().contains("operator set 13"), "{error}");
}

/// y = outer(x) = leaky(x, slope 0.5) + leaky(x, slope 2 by default), with names that clash and an input left out.
#[test]
fn calls_of_local_functions_are_differentiated() {
    let from = |name: &str, reference: &str| AttributeProto {
        name: Some(name.into()),
        ref_attr_name: Some(reference.into()),
        r#type: Some(1),
        ..AttributeProto::default()
    };
    let function = |name: &str, inputs: &[&str], outputs: &[&str], node: Vec<NodeProto>| FunctionProto {
        name: Some(name.into()),
        domain: Some("local".into()),
        input: inputs.iter().map(|&name| name.to_owned()).collect(),
        output: outputs.iter().map(|&name| name.to_owned()).collect(),
        opset_import: vec![
            OperatorSetIdProto { domain: None, version: Some(17) },
            OperatorSetIdProto { domain: Some("local".into()), version: Some(1) },
        ],
        node,
        ..FunctionProto::default()
    };
    let mut leaky = node("LeakyRelu", ["clipped"], ["y"]);
    leaky.attribute.push(from("alpha", "slope"));
    let mut inner = function("leaky", &["x", "low"], &["y"], vec![node("Clip", ["x", "low"], ["clipped"]), leaky]);
    let default = node("", [], []).with("slope", 2.0f32);
    inner.attribute_proto = default.attribute;
    let outer = function(
        "outer",
        &["a"],
        &["sum"],
        vec![
            node("leaky", ["a", ""], ["x"]).in_domain("local").with("slope", 0.5f32),
            node("leaky", ["a"], ["clipped"]).in_domain("local"),
            node("Add", ["x", "clipped"], ["sum"]),
        ],
    );
    let call = node("outer", ["x"], ["y"]).in_domain("local").named("call");
    let model = model_of(vec![call], &[("", 17), ("local", 1)], vec![outer, inner]);
    let flat = inlined(&model).unwrap();
    let operators: Vec<&str> = flat.graph().node.iter().map(|node| node.op_type()).collect();
    assert_eq!(operators, ["Clip", "LeakyRelu", "Clip", "LeakyRelu", "Add"]);
    assert!(flat.header().functions.is_empty());

    let values = vec![-2.0f32, -1.0, -0.5, 0.5, 1.0, 2.0];
    let x = Tensor::from_vec(&[2, 3], values.clone()).unwrap();
    let bench = Bench { runtime: runtime() };
    let whole = bench.run(&model, &["y".into()], &[("x".into(), x.clone())]).unwrap();
    let gradient = grad::vjp(&model, &facts_of_sizes(&model), &["x"], "y", Effort::Speed).unwrap();
    let ones = Tensor::from_vec(&[2, 3], vec![1.0f32; 6]).unwrap();
    let outputs = ["y".to_owned(), gradient.gradients[0].clone()];
    let found = bench.run(&gradient.model, &outputs, &[("x".into(), x), (gradient.cotangent.clone(), ones)]).unwrap();
    assert_eq!(found[0].as_slice::<f32>().unwrap(), whole[0].as_slice::<f32>().unwrap());
    let expected: Vec<f32> = values.iter().map(|&x| if x < 0.0 { 2.5 } else { 2.0 }).collect();
    assert_eq!(found[1].as_slice::<f32>().unwrap(), expected);
}

/// Exporters that do not optimise split into sequences; each form of it is differentiated as parts of the tensor.
#[test]
fn sequences_that_a_tensor_is_split_into_are_differentiated() {
    let ints = |name: &str, dims: &[usize], values: &[i64]| {
        node("Constant", [], [name]).with("value", build::tensor_i64("", dims, values))
    };
    let split = |size: &str, name: &str| node("SplitToSequence", ["x", size], [name]).with("axis", 1);
    let each = |axis: i64, keepdims: i64, name: &str| {
        node("SplitToSequence", ["x"], [name]).with("axis", axis).with("keepdims", keepdims)
    };
    let at = |sequence: &str, position: &str, name: &str| node("SequenceAt", [sequence, position], [name]);
    let nodes = vec![
        ints("last", &[], &[-1]),
        ints("zero", &[], &[0]),
        ints("one", &[], &[1]),
        ints("two", &[], &[2]),
        ints("sizes", &[2], &[1, 2]),
        split("sizes", "by_sizes"),
        at("by_sizes", "last", "a"),
        at("by_sizes", "zero", "b"),
        split("two", "by_two"),
        at("by_two", "zero", "c"),
        at("by_two", "one", "d"),
        each(-1, 1, "columns"),
        at("columns", "two", "e"),
        each(0, 0, "rows"),
        at("rows", "one", "f"),
        node("Concat", ["a", "b"], ["ab"]).with("axis", 1),
        node("Concat", ["c", "d"], ["cd"]).with("axis", 1),
        node("Mul", ["e", "f"], ["ef"]),
        node("Sum", ["ab", "cd", "ef"], ["y"]),
    ];
    let model = model_of(nodes, &[("", 17)], vec![]);
    let bench = Bench { runtime: runtime() };
    let x = Tensor::from_vec(&[2, 3], vec![-2.0f32, -1.0, -0.5, 0.5, 1.0, 2.0]).unwrap();
    let inputs = vec![("x".to_owned(), x)];
    let whole = bench.run(&model, &["y".into()], &inputs).unwrap();
    let facts = bench.facts(&model, &["x"], "y", std::slice::from_ref(&inputs)).unwrap();
    let gradient = grad::vjp(&model, &facts, &["x"], "y", Effort::Speed).unwrap();
    let ones = Tensor::from_vec(&[2, 3], vec![1.0f32; 6]).unwrap();
    let outputs = ["y".to_owned(), gradient.gradients[0].clone()];
    let inputs = [inputs, vec![(gradient.cotangent.clone(), ones)]].concat();
    let found = bench.run(&gradient.model, &outputs, &inputs).unwrap();
    assert_eq!(found[0].as_slice::<f32>().unwrap(), whole[0].as_slice::<f32>().unwrap());
    // Two of each number, and the sums of row 1 (3.5) in column 2 and of column 2 (1.5) in row 1.
    assert_eq!(found[1].as_slice::<f32>().unwrap(), [2.0, 2.0, 5.5, 3.5, 3.5, 7.0]);
}

/// A residual chain of `layers` without node names, the form with most names to choose.
fn chain(layers: usize) -> Model {
    let mut nodes = Vec::new();
    let mut last = "x".to_owned();
    for layer in 0..layers {
        let next = if layer + 1 == layers { "y".to_owned() } else { format!("v{layer}") };
        let [a, b] = [format!("a{layer}"), format!("b{layer}")];
        nodes.push(node("Sigmoid", [last.as_str()], [a.as_str()]));
        nodes.push(node("Mul", [last.as_str(), &a], [b.as_str()]));
        nodes.push(node("Add", [last.as_str(), &b], [next.as_str()]));
        last = next;
    }
    model_of(nodes, &[("", 17)], vec![])
}

#[test]
fn building_takes_time_in_proportion_to_the_graph() {
    let time = |layers: usize| {
        let model = chain(layers);
        let facts = facts_of_sizes(&model);
        let run = || {
            let start = std::time::Instant::now();
            grad::vjp(&model, &facts, &["x"], "y", Effort::Speed).unwrap();
            start.elapsed().as_secs_f64()
        };
        (0..3).map(|_| run()).fold(f64::INFINITY, f64::min)
    };
    let (small, large) = (time(1_000), time(16_000));
    println!("{small:.3} s for 3,000 nodes, {large:.3} s for 48,000");
    // Sixteen times as many nodes, most of them outside of caches; a search through the graph for each node would take
    // 256 times as long.
    assert!(large < 100.0 * small, "{small:.3} s for 3,000 nodes, {large:.3} s for 48,000");
}
