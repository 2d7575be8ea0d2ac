//! Which part of a graph a gradient runs through: the nodes that lie on a way from the wanted values to the output.

use std::collections::{HashMap, HashSet};

use super::rules;
use crate::error::{Error, Result};
use crate::onnx::graph::{Topology, captured};
use crate::onnx::model::Model;
use crate::onnx::proto::NodeProto;
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
        // Forwards: what depends on a wanted value. Nodes stand in topological order.
        let wanted: HashSet<&str> = wrt.iter().copied().collect();
        let mut live: HashSet<&'g str> = HashSet::new();
        let mut nodes = vec![false; graph.node.len()];
        for (index, node) in graph.node.iter().enumerate().filter(|(_, node)| !rules::is_flat(node)) {
            let given: Vec<&str> = given(node).filter(|value| wanted.contains(value) || live.contains(value)).collect();
            if !given.is_empty() {
                nodes[index] = true;
                live.extend(given);
                let made = node.output.iter().map(String::as_str).filter(|value| !value.is_empty());
                live.extend(made.filter(|value| types.get(value).is_none_or(|data_type| data_type.is_float())));
            }
        }
        // Backwards: what the output depends on, among these.
        let mut needed: HashSet<&str> = HashSet::from([output]);
        for (on, node) in nodes.iter_mut().zip(&graph.node).rev().filter(|(on, _)| **on) {
            *on = node.output.iter().any(|value| needed.contains(value.as_str()));
            if *on {
                needed.extend(given(node).filter(|value| live.contains(value)));
            }
        }
        match wrt.iter().find(|value| !needed.contains(*value)) {
            Some(value) => Err(Error::invalid_argument(format!("{output:?} does not depend on {value:?}"))),
            None => Ok(Self { nodes, live, types }),
        }
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

/// The values that a node takes, in its subgraphs too.
fn given(node: &NodeProto) -> impl Iterator<Item = &str> {
    node.input.iter().map(String::as_str).chain(captured(node))
}
