//! Which part of a graph a gradient runs through: the nodes that lie on a way from the wanted values to the output.

use std::collections::{HashMap, HashSet};

use super::rules;
use crate::error::{Error, Result};
use crate::onnx::graph::Topology;
use crate::onnx::model::Model;
use crate::onnx::proto::tensor_proto::DataType;

/// The way from the wanted values to the output.
pub(super) struct Path<'g> {
    nodes: Vec<bool>,
    live: HashSet<&'g str>,
    types: HashMap<&'g str, DataType>,
}

impl<'g> Path<'g> {
    /// Errors: [`crate::Status::NotFound`] for a value that the graph has not; [`crate::Status::InvalidArgument`] if a
    /// value is not of floating point or the output does not depend on it.
    pub(super) fn new(model: &'g Model, topology: &Topology<'g>, wrt: &[&str], output: &str) -> Result<Self> {
        let graph = model.graph();
        let types = topology.element_types();
        for value in wrt.iter().chain([&output]) {
            if topology.origin(value).is_none() {
                return Err(Error::not_found(format!("the graph has no value {value:?} to differentiate")));
            }
            if let Some(data_type) = types.get(value)
                && !data_type.is_float()
            {
                return Err(Error::invalid_argument(format!(
                    "{value:?} is {}: only values of floating point have a gradient",
                    data_type.as_str_name()
                )));
            }
        }
        let differentiable = |value: &str| types.get(value).is_none_or(|data_type| data_type.is_float());
        let names: HashMap<&str, &'g str> = graph
            .node
            .iter()
            .flat_map(|node| node.input.iter().chain(&node.output))
            .map(|name| (name.as_str(), name.as_str()))
            .collect();
        let mut live: HashSet<&'g str> = wrt.iter().filter_map(|value| names.get(value).copied()).collect();
        let before = topology.before([output], []);
        let mut nodes = vec![false; graph.node.len()];
        for (index, node) in graph.node.iter().enumerate() {
            let reached = node.input.iter().any(|input| live.contains(input.as_str()))
                || crate::onnx::graph::captured(node).iter().any(|value| live.contains(value));
            if reached && !rules::is_flat(node) {
                nodes[index] = before[index];
                live.extend(
                    node.output.iter().map(String::as_str).filter(|value| !value.is_empty() && differentiable(value)),
                );
            }
        }
        let depends = topology.before([output], []);
        for value in wrt {
            let used = *value == output || topology.consumers(value).any(|(node, _)| depends[node] && nodes[node]);
            if !used {
                return Err(Error::invalid_argument(format!("{output:?} does not depend on {value:?}")));
            }
        }
        Ok(Self { nodes, live, types })
    }

    /// Whether each node lies on the way.
    pub(super) fn nodes(&self) -> &[bool] {
        &self.nodes
    }

    /// Whether a value depends on a wanted one.
    pub(super) fn is_live(&self, value: &str) -> bool {
        self.live.contains(value)
    }

    pub(super) fn data_type(&self, value: &str) -> Option<DataType> {
        self.types.get(value).copied()
    }
}
