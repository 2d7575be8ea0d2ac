//! A model in operators on tensors only, which is what reads a graph operator by operator, as a gradient does: functions
//! are put in the place of their calls, and sequences that a tensor is split into become parts of the tensor.

use std::borrow::Cow;
use std::collections::HashMap;

use super::build::{self, Names};
use super::graph::Topology;
use super::inline::inlined;
use super::model::Model;
use super::proto::{NodeProto, TensorProto};
use crate::error::Result;

/// The model without functions and without `SequenceAt` of what `SplitToSequence` made; itself if it has neither. Values
/// keep their names, and the same model always gives the same new ones. A sequence whose parts do not follow from
/// constants is left as it is.
///
/// Errors: those of [`inlined`].
pub fn plain(model: &Model) -> Result<Cow<'_, Model>> {
    match inlined(model)? {
        Cow::Borrowed(model) => without_sequences(model),
        Cow::Owned(model) => Ok(Cow::Owned(without_sequences(&model)?.into_owned())),
    }
}

fn without_sequences(model: &Model) -> Result<Cow<'_, Model>> {
    // `Split` takes its sizes from an input, as here, since operator set 13.
    let graph = model.graph();
    if model.opset("").is_none_or(|opset| opset < 13) || !graph.node.iter().any(|node| node.is("SequenceAt")) {
        return Ok(Cow::Borrowed(model));
    }
    let topology = model.topology();
    let mut rewrite =
        Rewrite { model, topology: &topology, names: Names::of(graph), split: HashMap::new(), constants: Vec::new() };
    let mut nodes = Vec::with_capacity(graph.node.len());
    for node in &graph.node {
        match rewrite.part(node) {
            Some(parts) => nodes.extend(parts),
            None => nodes.push(node.clone()),
        }
    }
    let constants = rewrite.constants;
    let mut plain = model.clone();
    plain.edit(|edit| {
        edit.graph_mut().node = nodes;
        edit.graph_mut().initializer.extend(constants);
        edit.drop_unused();
        Ok(())
    })?;
    Ok(Cow::Owned(plain))
}

/// What stands in the place of sequences.
struct Rewrite<'m> {
    model: &'m Model,
    topology: &'m Topology<'m>,
    names: Names,
    /// The parts of each sequence that became a `Split`.
    split: HashMap<&'m str, Vec<String>>,
    constants: Vec<TensorProto>,
}

impl<'m> Rewrite<'m> {
    /// The nodes in the place of a `SequenceAt`, if they can be told.
    fn part(&mut self, node: &'m NodeProto) -> Option<Vec<NodeProto>> {
        let (sequence, position) = match (node.is("SequenceAt"), node.input.as_slice()) {
            (true, [sequence, position]) => (sequence.as_str(), position.as_str()),
            _ => return None,
        };
        let (_, source) = self.topology.producer(sequence).filter(|(_, node)| node.is("SplitToSequence"))?;
        let axis = source.attribute_i("axis").unwrap_or(0);
        let tensor = source.input.first()?;
        let given = source.input.get(1).filter(|name| !name.is_empty());
        let output = node.output.first()?;
        let Some(given) = given else {
            let kept = source.attribute_i("keepdims").unwrap_or(1) != 0;
            return Some(self.one(tensor, position, axis, kept, output));
        };
        let (sizes, scalar) = self.integers(given)?;
        let position = *self.integers(position)?.0.first()?;
        if scalar {
            return self.slice(tensor, *sizes.first()?, position, axis, output);
        }
        let at = if position < 0 { position.checked_add(sizes.len() as i64)? } else { position };
        let mut nodes = Vec::new();
        if !self.split.contains_key(sequence) {
            let parts: Vec<String> = sizes.iter().map(|_| self.names.fresh(&format!("{sequence}/part"))).collect();
            let outputs = parts.iter().map(String::as_str);
            nodes.push(build::node("Split", [tensor.as_str(), given.as_str()], outputs).with("axis", axis));
            self.split.insert(sequence, parts);
        }
        let part = self.split[sequence].get(usize::try_from(at).ok()?)?;
        nodes.push(build::node("Identity", [part.as_str()], [output.as_str()]));
        Some(nodes)
    }

    /// Slice number `position` along an axis, which stays with size one if it is `kept`.
    fn one(&mut self, tensor: &str, position: &str, axis: i64, kept: bool, output: &str) -> Vec<NodeProto> {
        if !kept {
            return vec![build::node("Gather", [tensor, position], [output]).with("axis", axis)];
        }
        let (first, listed) = (self.ints(&[0]), self.names.fresh(&format!("{output}/position")));
        vec![
            build::node("Unsqueeze", [position, first.as_str()], [listed.as_str()]),
            build::node("Gather", [tensor, listed.as_str()], [output]).with("axis", axis),
        ]
    }

    /// Part number `position` of equal parts of `size`, of which the last one may be smaller. Counted from the back it
    /// can't be told without the tensor's size.
    fn slice(&mut self, tensor: &str, size: i64, position: i64, axis: i64, output: &str) -> Option<Vec<NodeProto>> {
        let start = size.checked_mul(position).filter(|&start| size > 0 && start >= 0)?;
        let bounds = [start, start.checked_add(size)?, axis].map(|value| self.ints(&[value]));
        let inputs = std::iter::once(tensor).chain(bounds.iter().map(String::as_str));
        Some(vec![build::node("Slice", inputs, [output])])
    }

    /// A constant of integers, by the name of its value.
    fn ints(&mut self, values: &[i64]) -> String {
        let name = self.names.fresh("sequence/constant");
        self.constants.push(build::tensor_i64(&name, &[values.len()], values));
        name
    }

    /// The integers of a constant, and whether it has no axes.
    fn integers(&self, value: &str) -> Option<(Vec<i64>, bool)> {
        let tensor = self.topology.constant(value)?;
        Some((self.model.tensor(tensor).ok()?.to_i64().ok()?, tensor.dims.is_empty()))
    }
}
