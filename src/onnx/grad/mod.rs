//! The gradient of an ONNX model is an ONNX model: reverse-mode differentiation by appended standard operators.
//!
//! [`questions`] tells what must be observed in a run of the [`plain`] model, [`Facts`] takes the answers, and [`vjp`]
//! appends the backward graph. One rule a kind of operator, in `rules/`, writes the cotangents of a node's inputs from
//! those of its outputs. Rules emit only operators that have rules, so a gradient can be differentiated again: a
//! Jacobian-vector product is a sweep over a sweep ([`jvp`]). Gradients of fp16 and bf16 models are computed in f32.

mod expr;
mod facts;
mod loss;
mod path;
mod recompute;
mod rules;
mod site;

use std::cell::RefCell;
use std::collections::HashMap;

use expr::{Expr, Graph};
use facts::Size;
pub use facts::{Facts, Observation, Questions, questions};
pub use loss::{InnerProduct, MeanSquaredError, inner_product, mean_squared_error};
use path::Path;
use recompute::{Forward, Plan};
use site::{Site, Sweep, describe};

use super::build::{self, Dim, Names};
use super::graph::Topology;
use super::model::Model;
use super::plain::plain;
use super::proto::tensor_proto::DataType;
use super::proto::{NodeProto, TensorProto};
use crate::error::{Error, Result};

/// What a backward pass may spend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Effort {
    /// The fastest backward graph: weights may be kept a second time, transposed or turned.
    #[default]
    Speed,
    /// No second copy of a weight that is large beside what it acts on, and no attention weights kept from the forward pass:
    /// they are computed again, block by block.
    Memory,
}

/// What a gradient may spend.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spending {
    /// Of the backward pass.
    pub effort: Effort,
    /// Most bytes of the forward pass's values that are there for the backward pass at a time. What does not fit is computed
    /// again from what is kept; where even that is too much, as little as can be is kept. `None`: all is kept.
    pub activations: Option<u64>,
}

impl From<Effort> for Spending {
    fn from(effort: Effort) -> Self {
        Self { effort, activations: None }
    }
}

/// A model with its gradient appended.
#[derive(Clone, Debug)]
pub struct Gradient {
    /// The model. Its outputs are those that it had and `gradients`.
    pub model: Model,
    /// The input that takes the cotangent of the differentiated output: of its shape, f32 (f64 for f64 models).
    pub cotangent: String,
    /// The outputs that hold the gradients, in the order of the values asked for; each of its value's shape, f32 or f64.
    pub gradients: Vec<String>,
    /// What is known of the sizes of its values: of those that were observed and of their cotangents, where they are fixed.
    pub sizes: HashMap<String, Vec<usize>>,
    /// Most bytes of values of the forward pass that the backward pass finds at a time, without those that do not depend on
    /// what was differentiated.
    pub activations: u64,
}

/// Appends the vector-Jacobian product: given a cotangent ū of `output`, the gradient of ⟨ū, output⟩ with respect to each
/// value of `wrt` (initializers, inputs or inner values).
///
/// Errors: [`crate::Status::NotFound`] for a value that the graph has not; [`crate::Status::InvalidArgument`] if a value
/// is not of floating point, if the output does not depend on it, or if `facts` lacks something;
/// [`crate::Status::Unsupported`] for an operator without a rule, named with its node and operator set.
pub fn vjp(
    model: &Model,
    facts: &Facts,
    wrt: &[&str],
    output: &str,
    spending: impl Into<Spending>,
) -> Result<Gradient> {
    let Spending { effort, activations } = spending.into();
    let model = &*plain(model)?;
    let opset = model.opset("").unwrap_or_default();
    if opset < 13 {
        return Err(Error::unsupported(format!(
            "gradients need operator set 13 or newer, the model uses {opset}: export it anew"
        )));
    }
    let topology = model.topology();
    let path = Path::new(model, &topology, wrt, output)?;
    let given = Given { model, topology: &topology, path: &path, facts, wrt, output, effort };
    let mut swept = given.sweep(&Plan::default())?;
    let forward = Forward::new(&topology, &path, facts, &swept.nodes, &swept.marks, &swept.gradients);
    let plan = forward.plan(activations.unwrap_or(u64::MAX));
    if !plan.is_empty() {
        swept = given.sweep(&plan)?;
    }
    let dims = |value: &str| {
        let dim = |size: &Size| size.fixed().map_or(Dim::Any, |size| Dim::Fixed(size as i64));
        Some(facts.sizes(value)?.iter().map(dim).collect::<Vec<_>>())
    };
    let mut gradients = Vec::new();
    let mut outputs = Vec::new();
    for (value, found) in wrt.iter().zip(&swept.gradients) {
        // An output of its own, also where two gradients are one value or the cotangent itself.
        let name = swept.names.fresh(&format!("{value}/gradient"));
        outputs.push(build::node("Identity", [&*found.name], [name.as_str()]).named(name.clone()));
        gradients.push(build::value(&name, found.data_type, dims(value).as_deref()));
    }
    let cotangent_dims = dims(output);
    let sizes = sizes(facts, &swept);
    let names = gradients.iter().map(|info| info.name().to_owned()).collect();
    let mut model = model.clone();
    model.edit(|edit| {
        let graph = edit.graph_mut();
        graph.node.extend(swept.nodes);
        graph.node.extend(outputs);
        graph.initializer.extend(swept.initializers);
        graph.input.push(build::value(&swept.seed.name, swept.seed.data_type, cotangent_dims.as_deref()));
        graph.output.extend(gradients);
        Ok(())
    })?;
    let cotangent = swept.seed.name.to_string();
    Ok(Gradient { model, cotangent, gradients: names, sizes, activations: plan.peak })
}

/// The sizes of the values that were observed and of their cotangents, where no run changes them.
fn sizes(facts: &Facts, swept: &Swept) -> HashMap<String, Vec<usize>> {
    let mut known = HashMap::new();
    for (value, sizes) in facts.all_sizes() {
        let Some(fixed) = sizes.iter().map(Size::fixed).collect::<Option<Vec<usize>>>() else { continue };
        if let Some(cotangent) = swept.cotangents.get(value) {
            known.insert(cotangent.name.to_string(), fixed.clone());
        }
        known.insert(value.to_owned(), fixed);
    }
    known
}

/// What is differentiated, and how.
struct Given<'g> {
    model: &'g Model,
    topology: &'g Topology<'g>,
    path: &'g Path<'g>,
    facts: &'g Facts,
    wrt: &'g [&'g str],
    output: &'g str,
    effort: Effort,
}

/// What a reverse sweep wrote.
struct Swept {
    nodes: Vec<NodeProto>,
    initializers: Vec<TensorProto>,
    names: Names,
    /// The cotangent of the output, an input.
    seed: Expr,
    gradients: Vec<Expr>,
    /// Of each value that has one.
    cotangents: HashMap<String, Expr>,
    /// Forward nodes, and where in `nodes` what their rules wrote begins.
    marks: Vec<(usize, usize)>,
}

impl<'g> Given<'g> {
    fn sweep(&self, plan: &Plan<'g>) -> Result<Swept> {
        let &Self { model, topology, path, facts, wrt, output, effort } = self;
        let opset = model.opset("").unwrap_or_default();
        let graph = Graph::new(Names::of(model.graph()), opset);
        let data_type = match path.data_type(output) {
            Some(DataType::Double) => DataType::Double,
            _ => DataType::Float,
        };
        let seed = graph.value(&graph.fresh(&format!("{output}/cotangent")), data_type);
        let sweep = Sweep {
            model,
            topology,
            path,
            facts,
            effort,
            wrt,
            graph: graph.clone(),
            cotangents: RefCell::new(HashMap::from([(output.to_owned(), seed.clone())])),
            copies: RefCell::default(),
            centred: RefCell::default(),
            parts: RefCell::default(),
        };
        let mut marks = Vec::new();
        let mut entered: Option<usize> = None;
        let nodes = model.graph().node.iter().zip(path.nodes()).enumerate();
        for (index, (node, _)) in nodes.rev().filter(|(_, (_, on))| **on) {
            node.output.iter().for_each(|output| sweep.settle(output));
            let cotangent = node.output.iter().find_map(|output| sweep.cotangents.borrow().get(output).cloned());
            let Some(cotangent) = cotangent else { continue };
            let Some(rule) = rules::find(node) else {
                return Err(Error::unsupported(format!("{} has no derivative rule", describe(node, opset))));
            };
            if let Some((number, segment)) = plan.segment(index)
                && entered.replace(number) != Some(number)
            {
                segment.enter(&sweep, &cotangent);
            }
            marks.push((index, graph.len()));
            graph.enter(if node.name().is_empty() { node.op_type() } else { node.name() });
            rule(&Site { node, sweep: &sweep })?;
        }
        graph.enter("");
        let gradients = wrt.iter().map(|value| {
            sweep.settle(value);
            let found = sweep.cotangents.borrow().get(*value).cloned();
            found.ok_or_else(|| Error::invalid_argument(format!("{output:?} does not depend on {value:?}")))
        });
        let gradients = gradients.collect::<Result<Vec<_>>>()?;
        let (nodes, initializers, names) = graph.take();
        let cotangents = sweep.cotangents.into_inner();
        Ok(Swept { nodes, initializers, names, seed, gradients, cotangents, marks })
    }
}

/// The model of a Jacobian-vector product J v of `output` with respect to the value `wrt`: the derivative of the
/// vector-Jacobian product along its own cotangent, which it is linear in.
///
/// `first` is what [`vjp`] gave for `wrt` and `output`, `facts` were observed on its model for
/// `questions(&first.model, &[&first.cotangent], &first.gradients[0])`. The answer's input [`Gradient::cotangent`] takes
/// the direction v, of `wrt`'s shape; its only gradient is J v, of `output`'s shape. Nothing else of it depends on the
/// first cotangent, whose input is dropped; `first` must have been made without a limit on its activations, since what it
/// computes again waits for that cotangent.
pub fn jvp(first: &Gradient, facts: &Facts, spending: impl Into<Spending>) -> Result<Gradient> {
    let [gradient] = first.gradients.as_slice() else {
        return Err(Error::invalid_argument(format!(
            "a Jacobian-vector product is along one value, the first gradient has {}",
            first.gradients.len()
        )));
    };
    let mut second = vjp(&first.model, facts, &[&first.cotangent], gradient, spending)?;
    second.model.edit(|edit| {
        let kept = second.gradients.first().cloned().unwrap_or_default();
        edit.graph_mut().output.retain(|output| output.name() == kept);
        edit.drop_unused();
        edit.drop_unused_inputs();
        Ok(())
    })?;
    if second.model.graph().input.iter().any(|input| input.name() == first.cotangent) {
        let why = "the first gradient computes values again, a Jacobian-vector product needs one that keeps them all";
        return Err(Error::invalid_argument(why));
    }
    Ok(second)
}
