//! Which part of a graph a gradient runs through: the nodes that lie on a way from the wanted values to the output.

use std::collections::{HashMap, HashSet};

use super::rules;
use crate::error::{Error, Result};
use crate::onnx::graph::{Topology, captured};
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
        let wanted: HashSet<&str> = wrt.iter().copied().collect();
        let before = topology.before([output], []);
        let mut live: HashSet<&'g str> = HashSet::new();
        let mut nodes = vec![false; graph.node.len()];
        // Nodes stand in topological order.
        for (index, node) in graph.node.iter().enumerate() {
            let mut given = node.input.iter().map(String::as_str).chain(captured(node));
            let reached = given.any(|value| wanted.contains(value) || live.contains(value));
            if reached && before[index] && !rules::is_flat(node) {
                nodes[index] = true;
                let made = node.output.iter().map(String::as_str).filter(|value| !value.is_empty());
                live.extend(made.filter(|value| types.get(value).is_none_or(|data_type| data_type.is_float())));
            }
        }
        for value in wrt {
            if *value != output && !topology.consumers(value).any(|(node, _)| nodes[node]) {
                return Err(Error::invalid_argument(format!("{output:?} does not depend on {value:?}")));
            }
        }
        let named = graph.node.iter().flat_map(|node| node.input.iter().chain(&node.output)).map(String::as_str);
        live.extend(named.filter(|value| wanted.contains(value)));
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
