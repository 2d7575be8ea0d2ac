//! Attention that is written out, as one operator.
//!
//! Exporters write attention as two products around a Softmax, whose scores `[.., queries, keys]` are by far the largest
//! values of a diffusion UNet. ONNX Runtime's `MultiHeadAttention` goes over them block by block and never holds them,
//! but its own optimizer does not find attention in these graphs. Heads do not mix, so every axis in front of the last
//! two becomes a part of the batch of an attention with one head, whatever it means to the model.

use super::super::build::node;
use super::super::edit::{Edit, Growing};
use super::super::graph::Topology;
use super::super::model::Model;
use super::super::proto::NodeProto;
use super::super::tensor::DataType;
use super::search;
use crate::error::Result;

/// ONNX Runtime's own operators.
const DOMAIN: &str = "com.microsoft";

/// An attention in the graph: `softmax(scale * queries * keys) * values`.
pub(in crate::onnx) struct Written {
    /// `[.., queries, features]`
    pub(in crate::onnx) queries: String,
    /// `[.., features, keys]`
    pub(in crate::onnx) keys: String,
    /// `[.., keys, features]`
    pub(in crate::onnx) values: String,
    /// `[.., queries, features]`
    pub(in crate::onnx) result: String,
    pub(in crate::onnx) scale: f32,
    axes: usize,
}

/// Replaces every attention in f32 and without a mask that is written out, and answers how many there were. The results
/// differ by rounding.
///
/// The model then holds an operator that only ONNX Runtime has, and that has no derivative rule.
pub fn fuse(model: &mut Model) -> Result<usize> {
    let found = written(model);
    if !found.is_empty() {
        model.edit(|edit| {
            edit.import_opset(DOMAIN, 1)?;
            found.iter().for_each(|attention| replace(edit, attention));
            edit.drop_unused();
            Ok(())
        })?;
    }
    Ok(found.len())
}

fn written(model: &Model) -> Vec<Written> {
    // Before version 13 a Softmax ran over several axes at once.
    if model.opset("").is_none_or(|version| version < 13) {
        return Vec::new();
    }
    let topology = model.topology();
    let types = topology.element_types();
    let softmaxes = topology.graph().node.iter().filter(|node| node.is("Softmax"));
    let attentions = softmaxes.filter_map(|softmax| around(model, &topology, softmax));
    attentions.filter(|attention| types.get(attention.queries.as_str()) == Some(&DataType::Float)).collect()
}

/// The attention around a Softmax, if nothing but a scale lies between it and the two products.
pub(in crate::onnx) fn around(model: &Model, topology: &Topology<'_>, softmax: &NodeProto) -> Option<Written> {
    let mut scores = made_for_one(topology, softmax.input.first()?)?;
    let mut scale = 1.0;
    if let ("Mul" | "Div", [a, b]) = (scores.op_type(), &scores.input[..]) {
        let factor = |value| scalar(model, topology, value);
        let scaled = match (scores.op_type(), factor(a), factor(b)) {
            ("Mul", Some(factor), _) => (b, factor),
            ("Mul", None, Some(factor)) => (a, factor),
            ("Div", _, Some(divisor)) => (a, 1.0 / divisor),
            _ => return None,
        };
        scale = scaled.1;
        scores = made_for_one(topology, scaled.0)?;
    }
    let [queries, keys] = product(scores)?;
    let axes = axes(topology, queries).or_else(|| axes(topology, keys))?;
    if axes < 3 || softmax.attribute_i("axis").is_some_and(|axis| axis != -1 && axis != axes as i64 - 1) {
        return None;
    }
    let weights = softmax.output.first()?;
    made_for_one(topology, weights)?;
    let (_, average) = topology.consumers(weights).next()?;
    let [_, values] = product(average).filter(|[first, second]| first == weights && second != weights)?;
    let result = average.output.first().filter(|result| !topology.is_output(result))?;
    Some(Written {
        queries: queries.clone(),
        keys: keys.clone(),
        values: values.clone(),
        result: result.clone(),
        scale,
        axes,
    })
}

/// The node that makes a value which one node uses, once, and nobody outside sees.
fn made_for_one<'g>(topology: &Topology<'g>, value: &str) -> Option<&'g NodeProto> {
    let (_, node) = topology.producer(value)?;
    (topology.uses(value).len() == 1 && !topology.is_output(value)).then_some(node)
}

fn product(node: &NodeProto) -> Option<&[String; 2]> {
    node.is("MatMul").then_some(&node.input)?.first_chunk()
}

/// The one number that a constant holds.
fn scalar(model: &Model, topology: &Topology<'_>, value: &str) -> Option<f32> {
    let tensor = model.tensor(topology.constant(value)?).ok().filter(|tensor| tensor.elements() == 1)?;
    tensor.to_f32().ok()?.first().copied().filter(|number| number.is_finite() && *number != 0.0)
}

/// The number of a value's axes, through what does not change it.
fn axes(topology: &Topology<'_>, value: &str) -> Option<usize> {
    let mut value = value;
    // A graph may hold a cycle; no sound one has a chain this long.
    for _ in 0..16 {
        if let Some(axes) = search::rank(topology, value) {
            return Some(axes);
        }
        let (_, node) = topology.producer(value)?;
        match node.op_type() {
            "Transpose" => return Some(node.attribute_ints("perm")?.len()),
            // The other factor is a scale.
            "Mul" | "Div" | "Cast" | "Identity" => value = node.input.first()?,
            _ => return None,
        }
    }
    None
}

/// The sizes of a value's axes from one on, up to another; negative ones count from behind.
fn sizes(graph: &mut Growing, value: &str, from: i64, to: i64) -> String {
    let sizes = graph.node(node("Shape", [value], []));
    let (from, to) = (graph.integers(&[from]), graph.integers(&[to]));
    graph.node(node("Slice", [&*sizes, &from, &to], []))
}

/// The value in a shape that is put together from sizes.
fn reshape(graph: &mut Growing, value: &str, sizes: [&str; 2]) -> String {
    let shape = graph.node(node("Concat", sizes, []).with("axis", 0));
    graph.node(node("Reshape", [value, &shape], []))
}

/// Adds the fused attention, and lets everyone who used the written one's result take its own.
fn replace(edit: &mut Edit, attention: &Written) {
    let Written { queries, keys, values, result, scale, axes } = attention;
    let mut graph = edit.growing(result);
    let mut exchanged: Vec<i64> = (0..*axes as i64).collect();
    exchanged.swap(axes - 2, axes - 1);
    let keys = graph.node(node("Transpose", [keys.as_str()], []).with("perm", exchanged));
    let rest = graph.integers(&[-1]);
    let [q, k, v] = [queries, &keys, values].map(|value| {
        let last_two = sizes(&mut graph, value, -2, i64::MAX);
        reshape(&mut graph, value, [&rest, &last_two])
    });
    let fused = node("MultiHeadAttention", [&*q, &k, &v], []).in_domain(DOMAIN);
    let fused = graph.node(fused.with("num_heads", 1).with("scale", *scale));
    let all_but_last = sizes(&mut graph, queries, 0, -1);
    let fused = reshape(&mut graph, &fused, [&all_but_last, &rest]);
    edit.redirect(result, &fused);
}
