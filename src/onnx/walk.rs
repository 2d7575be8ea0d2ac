//! Reaches every tensor of a model, wherever it hides: initializers, sparse initializers, node attributes, subgraphs,
//! model-local functions and training information. Every check of tensors goes through here, so that none is missed.

use std::fmt;

use super::proto::{AttributeProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto};
use crate::error::{Error, Result};

/// Where in a model something is, for messages; written out only when an error is.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    outer: Option<&'a Place<'a>>,
    kind: &'static str,
    name: &'a str,
}

impl<'a> Place<'a> {
    pub(super) fn root(kind: &'static str, name: &'a str) -> Self {
        Self { outer: None, kind, name }
    }

    pub(super) fn inside(&'a self, kind: &'static str, name: &'a str) -> Place<'a> {
        Place { outer: Some(self), kind, name }
    }

    pub(super) fn of_node(&'a self, node: &'a NodeProto) -> Place<'a> {
        // A node without a name is best found by what it makes.
        let name = match node.name() {
            "" => node.output.iter().map(String::as_str).find(|output| !output.is_empty()).unwrap_or(""),
            name => name,
        };
        self.inside("node", name)
    }
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(outer) = self.outer {
            write!(f, "{outer}, ")?;
        }
        // Names come from the file: shown quoted and cut, so that they can't forge or flood a message.
        const SHOWN: usize = 120;
        match self.name.char_indices().nth(SHOWN) {
            Some((end, _)) => write!(f, "{} {:?}...", self.kind, &self.name[..end]),
            None => write!(f, "{} {:?}", self.kind, self.name),
        }
    }
}

type Visit<'v> = dyn FnMut(&TensorProto, Place<'_>) -> Result<()> + 'v;

/// Calls `visit` for every tensor of a model whose graph is `graph`.
pub(super) fn each_tensor(model: &ModelProto, graph: &GraphProto, visit: &mut Visit<'_>) -> Result<()> {
    graph_tensors(graph, Place::root("graph", graph.name()), visit)?;
    for function in &model.functions {
        let place = Place::root("function", function.name());
        for attribute in &function.attribute_proto {
            attribute_tensors(attribute, place, visit)?;
        }
        for node in &function.node {
            node_tensors(node, place, visit)?;
        }
    }
    for training in &model.training_info {
        for graph in training.initialization.iter().chain(&training.algorithm) {
            graph_tensors(graph, Place::root("training graph", graph.name()), visit)?;
        }
    }
    Ok(())
}

fn graph_tensors(graph: &GraphProto, place: Place<'_>, visit: &mut Visit<'_>) -> Result<()> {
    for tensor in &graph.initializer {
        visit(tensor, place.inside("initializer", tensor.name()))?;
    }
    for sparse in &graph.sparse_initializer {
        sparse_tensors(sparse, place, visit)?;
    }
    graph.node.iter().try_for_each(|node| node_tensors(node, place, visit))
}

fn node_tensors(node: &NodeProto, place: Place<'_>, visit: &mut Visit<'_>) -> Result<()> {
    let place = place.of_node(node);
    node.attribute.iter().try_for_each(|attribute| attribute_tensors(attribute, place, visit))
}

fn attribute_tensors(attribute: &AttributeProto, place: Place<'_>, visit: &mut Visit<'_>) -> Result<()> {
    let place = place.inside("attribute", attribute.name());
    for tensor in attribute.t.iter().chain(&attribute.tensors) {
        visit(tensor, place)?;
    }
    for sparse in attribute.sparse_tensor.iter().chain(&attribute.sparse_tensors) {
        sparse_tensors(sparse, place, visit)?;
    }
    for graph in attribute.g.iter().chain(&attribute.graphs) {
        graph_tensors(graph, place.inside("graph", graph.name()), visit)?;
    }
    Ok(())
}

fn sparse_tensors(sparse: &SparseTensorProto, place: Place<'_>, visit: &mut Visit<'_>) -> Result<()> {
    let (Some(values), Some(indices)) = (&sparse.values, &sparse.indices) else {
        return Err(Error::invalid_file(format!("{place}: a sparse tensor lacks its values or indices")));
    };
    visit(values, place.inside("sparse values", values.name()))?;
    visit(indices, place.inside("sparse indices", values.name()))
}

type Change<'v> = dyn FnMut(&mut TensorProto) -> Result<()> + 'v;

/// As [`each_tensor`], to change them.
pub(super) fn each_tensor_mut(model: &mut ModelProto, graph: &mut GraphProto, change: &mut Change<'_>) -> Result<()> {
    graph_tensors_mut(graph, change)?;
    for function in &mut model.functions {
        function.attribute_proto.iter_mut().try_for_each(|attribute| attribute_tensors_mut(attribute, change))?;
        for node in &mut function.node {
            node.attribute.iter_mut().try_for_each(|attribute| attribute_tensors_mut(attribute, change))?;
        }
    }
    for training in &mut model.training_info {
        let graphs = training.initialization.iter_mut().chain(&mut training.algorithm);
        graphs.into_iter().try_for_each(|graph| graph_tensors_mut(graph, change))?;
    }
    Ok(())
}

pub(super) fn graph_tensors_mut(graph: &mut GraphProto, change: &mut Change<'_>) -> Result<()> {
    graph.initializer.iter_mut().try_for_each(&mut *change)?;
    graph.sparse_initializer.iter_mut().try_for_each(|sparse| sparse_tensors_mut(sparse, change))?;
    for node in &mut graph.node {
        node.attribute.iter_mut().try_for_each(|attribute| attribute_tensors_mut(attribute, change))?;
    }
    Ok(())
}

fn attribute_tensors_mut(attribute: &mut AttributeProto, change: &mut Change<'_>) -> Result<()> {
    attribute.t.iter_mut().chain(&mut attribute.tensors).try_for_each(&mut *change)?;
    let mut sparse = attribute.sparse_tensor.iter_mut().chain(&mut attribute.sparse_tensors);
    sparse.try_for_each(|sparse| sparse_tensors_mut(sparse, change))?;
    attribute.g.iter_mut().chain(&mut attribute.graphs).try_for_each(|graph| graph_tensors_mut(graph, change))
}

fn sparse_tensors_mut(sparse: &mut SparseTensorProto, change: &mut Change<'_>) -> Result<()> {
    sparse.values.iter_mut().chain(&mut sparse.indices).try_for_each(change)
}
