//! Calls of model-local functions replaced by the functions' nodes: what reads a graph operator by operator, as a
//! gradient does, then sees standard operators only.

use std::borrow::Cow;
use std::collections::HashMap;

use super::build::{self, Names};
use super::check::{Functions, called};
use super::edit::rename_graph;
use super::model::Model;
use super::proto::{AttributeProto, FunctionProto, GraphProto, NodeProto};
use crate::error::{Error, Result};

/// The model without calls of its functions; itself if it has none. Values and nodes from inside a function get the
/// calling node's name before theirs; the same model always gives the same names.
///
/// Errors: [`crate::Status::Unsupported`] for a function that imports another version of an operator set than the model.
pub fn inlined(model: &Model) -> Result<Cow<'_, Model>> {
    if model.header.functions.is_empty() {
        return Ok(Cow::Borrowed(model));
    }
    let functions = Functions::new(&model.header.functions)?;
    let mut names = Names::of(&model.graph);
    let mut inlined = model.clone();
    inlined.edit(|edit| {
        for function in &model.header.functions {
            for opset in &function.opset_import {
                edit.import_opset(opset.domain(), opset.version()).map_err(|error| {
                    Error::unsupported(format!("function {:?}: {}", function.name(), error.message()))
                })?;
            }
        }
        inline_graph(edit.graph_mut(), &functions, &mut names);
        edit.drop_unused();
        Ok(())
    })?;
    Ok(Cow::Owned(inlined))
}

fn inline_graph(graph: &mut GraphProto, functions: &Functions, names: &mut Names) {
    let nodes = std::mem::take(&mut graph.node);
    graph.node = nodes.into_iter().flat_map(|node| expand(node, functions, names)).collect();
}

/// The nodes that a node stands for. Ends because no function calls itself, which every model is checked for.
fn expand(mut node: NodeProto, functions: &Functions, names: &mut Names) -> Vec<NodeProto> {
    for attribute in &mut node.attribute {
        attribute.g.iter_mut().chain(&mut attribute.graphs).for_each(|graph| inline_graph(graph, functions, names));
    }
    match functions.find(&called(&node)) {
        Some(function) => {
            body(&node, function, names).into_iter().flat_map(|node| expand(node, functions, names)).collect()
        }
        None => vec![node],
    }
}

/// The nodes of a function in the place of its call.
fn body(call: &NodeProto, function: &FunctionProto, names: &mut Names) -> Vec<NodeProto> {
    let prefix = format!("{}/", if call.name().is_empty() { call.op_type() } else { call.name() });
    let given = |values: &[String], index: usize| values.get(index).cloned().unwrap_or_default();
    let mut renamed: HashMap<&str, String> = HashMap::new();
    for (index, name) in function.input.iter().enumerate() {
        renamed.insert(name, given(&call.input, index));
    }
    let mut nodes = Vec::new();
    for (index, name) in function.output.iter().enumerate() {
        let wanted = given(&call.output, index);
        match renamed.get(name.as_str()) {
            // An input that is an output as well.
            Some(value) if !wanted.is_empty() => {
                nodes.push(build::node("Identity", [value.as_str()], [wanted.as_str()]))
            }
            Some(_) => {}
            None if wanted.is_empty() => {}
            None => drop(renamed.insert(name, wanted)),
        }
    }
    let mut own = Vec::new();
    function.node.iter().for_each(|node| made_by(node, &mut own));
    for name in own {
        renamed.entry(name).or_insert_with(|| names.fresh(&format!("{prefix}{name}")));
    }
    let rename = |name: &str| renamed.get(name).cloned().unwrap_or_else(|| name.to_owned());
    let mut part = GraphProto { node: function.node.clone(), ..GraphProto::default() };
    part.node.iter_mut().for_each(|node| resolve(node, call, function));
    rename_graph(&mut part, &prefix, &rename);
    nodes.append(&mut part.node);
    nodes
}

/// The names of all values that a node makes, in its subgraphs too.
fn made_by<'n>(node: &'n NodeProto, names: &mut Vec<&'n str>) {
    names.extend(node.output.iter().map(String::as_str).filter(|name| !name.is_empty()));
    for graph in node.attribute.iter().flat_map(|attribute| attribute.g.iter().chain(&attribute.graphs)) {
        names.extend(graph.input.iter().map(|input| input.name()));
        names.extend(graph.initializer.iter().map(|tensor| tensor.name()));
        let sparse = graph.sparse_initializer.iter().filter_map(|sparse| sparse.values.as_ref());
        names.extend(sparse.map(|values| values.name()));
        graph.node.iter().for_each(|node| made_by(node, names));
    }
}

/// Puts in the attributes that a node of a function takes from the call, or from the function's defaults. One that
/// neither gives is left out.
fn resolve(node: &mut NodeProto, call: &NodeProto, function: &FunctionProto) {
    let value = |attribute: AttributeProto| {
        if attribute.ref_attr_name().is_empty() {
            return Some(attribute);
        }
        let name = attribute.ref_attr_name();
        let default = function.attribute_proto.iter().find(|default| default.name() == name);
        let mut found = call.attribute(name).or(default)?.clone();
        found.name.clone_from(&attribute.name);
        Some(found)
    };
    node.attribute = std::mem::take(&mut node.attribute).into_iter().filter_map(value).collect();
    for graph in node.attribute.iter_mut().flat_map(|attribute| attribute.g.iter_mut().chain(&mut attribute.graphs)) {
        graph.node.iter_mut().for_each(|node| resolve(node, call, function));
    }
}
