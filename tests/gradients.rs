//! Derivative rules, each by itself: models of one operator from `tests/python/gradients.py` against PyTorch's autograd
//! in float64, which the script has checked against central differences. First and second derivatives, both efforts,
//! sizes that vary, half precision, and what is refused.

mod support;
mod unets;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use macula::Status;
use macula::onnx::build::{self, Dim, node};
use macula::onnx::grad::{self, Effort, Facts, Gradient, Observation, Questions};
use macula::onnx::proto::GraphProto;
use macula::onnx::{DataType, Limits, Model};
use macula::progress::CancelToken;
use macula::runtime::{ElementType, Runtime, RuntimeOptions, SessionOptions, Tensor};
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
    let mut asking = model.clone();
    let mut found = Observation::default();
    let (sizes, numbers) = asking.edit(|edit| {
        edit.graph_mut().output.clear();
        let mut ask = |op_type: &str, values: &BTreeSet<String>| {
            let mut names = Vec::new();
            for value in values {
                let name = edit.fresh_name(&format!("{value}/asked"));
                edit.graph_mut().node.push(node(op_type, [value.as_str()], [name.as_str()]));
                edit.graph_mut().output.push(build::value(&name, DataType::Int64, None));
                names.push((value.clone(), name));
            }
            names
        };
        let asked = (ask("Shape", &questions.sizes), ask("Identity", &questions.numbers));
        edit.drop_unused();
        Ok(asked)
    })?;
    let outputs: Vec<&str> = sizes.iter().chain(&numbers).map(|(_, name)| name.as_str()).collect();
    let answers = runtime.session(&asking, options)?.run(inputs, &outputs, &CancelToken::new())?;
    for ((value, _), answer) in sizes.iter().zip(&answers) {
        found.sizes.insert(value.clone(), answer.as_slice::<i64>()?.iter().map(|&size| size as usize).collect());
    }
    for ((value, _), answer) in numbers.iter().zip(&answers[sizes.len()..]) {
        found.numbers.insert(value.clone(), answer.as_slice::<i64>()?.to_vec());
    }
    Ok(found)
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
        if !(error <= tolerance) {
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
    let types = model.topology().element_types();
    let mut pairs = Vec::new();
    let mut casts = Vec::new();
    for index in 0..row.outputs {
        let value = format!("y{index}");
        if types.get(value.as_str()) != Some(&DataType::Float) {
            casts.push(node("Cast", [value.as_str()], [format!("{value}/f32").as_str()]).with("to", 1));
            pairs.push((format!("{value}/f32"), format!("u{index}")));
        } else {
            pairs.push((value, format!("u{index}")));
        }
    }
    model
        .edit(|edit| {
            edit.graph_mut().node.extend(casts);
            for (_, cotangent) in &pairs {
                edit.graph_mut().input.push(build::value(cotangent, DataType::Float, None));
            }
            Ok(())
        })
        .unwrap();
    contract(&mut model, &pairs, "total");
    model
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
                edit.graph_mut().input.push(build::value(&direction, DataType::Float, None));
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
        for value in wanted {
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
        if runs == 2 && number == 1 {
            break;
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
