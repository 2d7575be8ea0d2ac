//! Changes to a model: values become outputs or inputs, parts are cut out or joined in. Every change is checked, and a
//! model stays as it was if the change or the check fails. Weights are shared, never copied.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};

use super::build::{self, Dim, Names};
use super::external::ExternalFiles;
use super::graph::{Origin, Topology, captured, element_type};
use super::model::Model;
use super::proto::tensor_proto::DataType;
use super::proto::{FunctionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TensorProto, ValueInfoProto};
use super::tensor;
use super::walk;
use crate::error::{Error, Result};

impl Model {
    /// Changes the model by any number of edits at once, which are checked together at the end: nodes are brought into
    /// topological order, then [`Model::check`] runs. On any error the model is as before.
    ///
    /// ```
    /// # use macula::onnx::{build, DataType, Limits, Model, proto::GraphProto};
    /// # let graph = GraphProto {
    /// #     name: Some("g".into()),
    /// #     input: vec![build::value("x", DataType::Float, Some(&[2.into()]))],
    /// #     output: vec![build::value("z", DataType::Float, Some(&[2.into()]))],
    /// #     node: vec![build::node("Neg", ["x"], ["y"]), build::node("Exp", ["y"], ["z"])],
    /// #     ..GraphProto::default()
    /// # };
    /// # let mut model = Model::new(graph, &[("", 17)], &Limits::default())?;
    /// model.edit(|edit| {
    ///     edit.expose_output("y")?;
    ///     edit.replace_by_input("z", None)?;
    ///     edit.drop_unused();
    ///     Ok(())
    /// })?;
    /// # assert_eq!(model.graph().node.len(), 1);
    /// # Ok::<(), macula::Error>(())
    /// ```
    pub fn edit<R>(&mut self, change: impl FnOnce(&mut Edit) -> Result<R>) -> Result<R> {
        let mut edit = Edit { model: self.clone(), names: None, types: None };
        let answer = change(&mut edit)?;
        let mut model = edit.model;
        sort(&mut model.graph);
        model.check()?;
        *self = model;
        Ok(answer)
    }
}

/// Makes a value an output as well. See [`Edit::expose_output`].
pub fn expose_output(model: &mut Model, value: &str) -> Result<()> {
    model.edit(|edit| edit.expose_output(value))
}

/// Makes a value an input and drops what only made it. See [`Edit::replace_by_input`].
pub fn replace_by_input(model: &mut Model, value: &str, dims: Option<&[Dim]>) -> Result<()> {
    model.edit(|edit| {
        edit.replace_by_input(value, dims)?;
        edit.drop_unused();
        Ok(())
    })
}

/// Gives an initializer an input that overrides it. See [`Edit::override_initializer`].
pub fn override_initializer(model: &mut Model, name: &str) -> Result<()> {
    model.edit(|edit| edit.override_initializer(name))
}

/// Joins another model in. See [`Edit::splice`].
pub fn splice(
    model: &mut Model,
    other: &Model,
    prefix: &str,
    connections: &[(&str, &str)],
) -> Result<HashMap<String, String>> {
    model.edit(|edit| edit.splice(other, prefix, connections))
}

/// The part of a model that computes `outputs` from `inputs`, as a model of its own with exactly these inputs and
/// outputs, in this order. The weights in between come with it.
///
/// Errors: [`crate::Status::NotFound`] for a value that the model has not; [`crate::Status::InvalidArgument`] if the
/// outputs also depend on an input of the model that `inputs` does not cut off (the message names it);
/// [`crate::Status::Unsupported`] if the element type of a value can't be found out.
pub fn cut(model: &Model, inputs: &[&str], outputs: &[&str]) -> Result<Model> {
    let graph = &model.graph;
    let topology = Topology::new(graph);
    for value in inputs.iter().chain(outputs) {
        if topology.origin(value).is_none() {
            return Err(Error::not_found(format!("the graph has no value {value:?} to cut at")));
        }
    }
    let kept = topology.before(outputs.iter().copied(), inputs.iter().copied());
    let types = topology.element_types();
    let declare = |value: &&str| match topology.value_info(value) {
        Some(info) if super::graph::element_type(info).is_some() => Ok(info.clone()),
        _ => match (types.get(value), topology.initializer(value)) {
            (Some(&data_type), Some(tensor)) => Ok(declare_tensor(data_type, tensor)),
            (Some(&data_type), None) => Ok(build::value(value, data_type, None)),
            (None, _) => Err(unknown_type(value)),
        },
    };
    let mut part = GraphProto {
        name: graph.name.clone(),
        doc_string: graph.doc_string.clone(),
        input: inputs.iter().map(declare).collect::<Result<_>>()?,
        output: outputs.iter().map(declare).collect::<Result<_>>()?,
        ..GraphProto::default()
    };
    let needed_by_node = |(node, kept): (&NodeProto, &bool)| kept.then(|| node.clone());
    part.node = graph.node.iter().zip(&kept).filter_map(needed_by_node).collect();
    let inputs: HashSet<&str> = inputs.iter().copied().collect();
    let needed = needed_values(&part);
    for input in &graph.input {
        let has_default = matches!(topology.origin(input.name()), Some(Origin::Initializer(_)));
        if needed.contains(input.name()) && !inputs.contains(input.name()) && !has_default {
            return Err(Error::invalid_argument(format!(
                "the outputs {outputs:?} also depend on the input {:?}: cut at it, too",
                input.name()
            )));
        }
    }
    let wanted = |name: &str| needed.contains(name) && !inputs.contains(name);
    let initializers = graph.initializer.iter().filter(|tensor| wanted(tensor.name())).cloned().collect();
    let sparse =
        |tensor: &&super::proto::SparseTensorProto| tensor.values.as_ref().is_some_and(|values| wanted(values.name()));
    let sparse_initializers = graph.sparse_initializer.iter().filter(sparse).cloned().collect();
    let made: HashSet<&str> = part.node.iter().flat_map(|node| &node.output).map(String::as_str).collect();
    let inner = |info: &&ValueInfoProto| made.contains(info.name()) && !inputs.contains(info.name());
    let value_info: Vec<_> = graph.value_info.iter().filter(inner).cloned().collect();
    let annotated = |name: &str| made.contains(name) || needed.contains(name);
    let annotations = &graph.quantization_annotation;
    let annotations = annotations.iter().filter(|one| annotated(one.tensor_name())).cloned().collect();
    drop(needed);
    part.initializer = initializers;
    part.sparse_initializer = sparse_initializers;
    part.value_info = value_info;
    part.quantization_annotation = annotations;
    let header = ModelProto { training_info: Vec::new(), ..model.header.clone() };
    let mut part = Model { header, graph: part, files: model.files.clone(), limits: model.limits.clone() };
    part.forget_unused();
    part.check()?;
    Ok(part)
}

/// A graph that grows by nodes and constants, whose names begin with that of the value they are for. Made by
/// [`Edit::growing`].
pub struct Growing<'e> {
    edit: &'e mut Edit,
    prefix: &'e str,
}

impl Growing<'_> {
    fn fresh(&mut self, what: &str) -> String {
        self.edit.fresh_name(&format!("{}/{what}", self.prefix))
    }

    /// Adds a node without outputs and answers the one that it gets.
    pub fn node(&mut self, mut node: NodeProto) -> String {
        let name = self.fresh(node.op_type());
        node.output.push(name.clone());
        self.edit.graph_mut().node.push(node.named(&name));
        name
    }

    /// Adds a node in the place of another, whose name and outputs it gets.
    pub fn instead(&mut self, mut node: NodeProto, of: &NodeProto) {
        node.output.clone_from(&of.output);
        self.edit.graph_mut().node.push(node.named(of.name()));
    }

    /// Adds a list of integers.
    pub fn integers(&mut self, values: &[i64]) -> String {
        let name = self.fresh("sizes");
        self.edit.graph_mut().initializer.push(build::tensor_i64(&name, &[values.len()], values));
        name
    }

    /// Adds numbers.
    pub fn numbers(&mut self, sizes: &[usize], values: &[f32]) -> String {
        let name = self.fresh("numbers");
        self.edit.graph_mut().initializer.push(build::tensor_f32(&name, sizes, values));
        name
    }

    /// The value in another shape.
    pub fn reshape(&mut self, value: &str, sizes: &[usize]) -> String {
        let sizes: Vec<i64> = sizes.iter().map(|&size| size as i64).collect();
        let sizes = self.integers(&sizes);
        self.node(build::node("Reshape", [value, &sizes], []))
    }

    /// The value with its axes in another order.
    pub fn transpose(&mut self, value: &str, order: &[i64]) -> String {
        self.node(build::node("Transpose", [value], []).with("perm", order))
    }
}

/// A model while it is changed. Made by [`Model::edit`].
pub struct Edit {
    model: Model,
    names: Option<Names>,
    types: Option<HashMap<String, DataType>>,
}

impl Edit {
    /// A graph to add nodes to, on behalf of a value.
    pub fn growing<'e>(&'e mut self, value: &'e str) -> Growing<'e> {
        Growing { edit: self, prefix: value }
    }

    /// The graph as edited so far.
    pub fn graph(&self) -> &GraphProto {
        &self.model.graph
    }

    /// The graph, to add nodes, initializers, inputs and outputs. The order of nodes does not matter: they are sorted
    /// when the edit ends.
    pub fn graph_mut(&mut self) -> &mut GraphProto {
        &mut self.model.graph
    }

    /// A name that no value or node has, as close to `wish` as can be. It is taken from now on.
    pub fn fresh_name(&mut self, wish: &str) -> String {
        let graph = &self.model.graph;
        self.names.get_or_insert_with(|| Names::of(graph)).fresh(wish)
    }

    /// Imports an operator set if the model does not yet; it must be of the same version if it does.
    pub fn import_opset(&mut self, domain: &str, version: i64) -> Result<()> {
        match self.model.opset(domain) {
            None => {
                let opset = OperatorSetIdProto { domain: Some(domain.into()), version: Some(version) };
                self.model.header.opset_import.push(opset);
                Ok(())
            }
            Some(present) if present == version => Ok(()),
            Some(present) => Err(Error::unsupported(format!(
                "the model uses version {present} of the operator set {domain:?}, not {version}"
            ))),
        }
    }

    /// Declares an input to be of these sizes, if the graph has such an input: what computes with sizes then follows from
    /// constants.
    pub fn fix_input(&mut self, name: &str, sizes: &[usize]) {
        let input = self.model.graph.input.iter_mut().find(|info| info.name() == name);
        if let Some((info, data_type)) = input.and_then(|info| element_type(info).map(|data_type| (info, data_type))) {
            let dims: Vec<Dim> = sizes.iter().map(|&size| Dim::Fixed(size as i64)).collect();
            *info = build::value(name, data_type, Some(&dims));
        }
    }

    /// Makes a value of the graph an output as well; nothing changes if it is one.
    ///
    /// Errors: [`crate::Status::NotFound`]; [`crate::Status::Unsupported`] if its element type can't be found out.
    pub fn expose_output(&mut self, value: &str) -> Result<()> {
        if self.model.graph.output.iter().any(|output| output.name() == value) {
            return Ok(());
        }
        let info = self.declaration(value)?;
        self.model.graph.value_info.retain(|info| info.name() != value);
        self.model.graph.output.push(info);
        Ok(())
    }

    /// Makes a value that a node computes an input of the same name: its users take the input instead. What computed
    /// it stays until [`Edit::drop_unused`]. `dims` is the declared shape; `None` takes what the graph declares for the
    /// value, or leaves it open.
    ///
    /// Errors: [`crate::Status::NotFound`]; [`crate::Status::InvalidArgument`] for an input or initializer;
    /// [`crate::Status::Unsupported`] if its element type can't be found out.
    pub fn replace_by_input(&mut self, value: &str, dims: Option<&[Dim]>) -> Result<()> {
        let mut info = self.declaration(value)?;
        if let (Some(dims), Some(data_type)) = (dims, super::graph::element_type(&info)) {
            info = build::value(value, data_type, Some(dims));
        }
        let makes = |node: &NodeProto| node.output.iter().any(|output| output == value);
        let Some(index) = self.model.graph.node.iter().position(makes) else {
            return Err(Error::invalid_argument(format!(
                "{value:?} is an input or initializer, expected a value that a node computes"
            )));
        };
        // The old value keeps a name of its own: an operator may not allow this output to be left out.
        let replaced = self.fresh_name(&format!("{value}/replaced"));
        let node = &mut self.model.graph.node[index];
        node.output.iter_mut().filter(|output| *output == value).for_each(|output| output.clone_from(&replaced));
        self.model.graph.value_info.retain(|info| info.name() != value);
        self.model.graph.input.push(info);
        Ok(())
    }

    /// Gives an initializer an input of its name, whose default it becomes; nothing changes if it has one.
    ///
    /// Below format version 4 an initializer always had an input, and no initializer was constant: the version is raised
    /// to 4, and only this one gets an input.
    ///
    /// Errors: [`crate::Status::NotFound`] if there is no such initializer.
    pub fn override_initializer(&mut self, name: &str) -> Result<()> {
        let graph = &mut self.model.graph;
        let Some(tensor) = graph.initializer.iter().find(|tensor| tensor.name() == name) else {
            return Err(Error::not_found(format!("the graph has no initializer {name:?}")));
        };
        let info = declare_tensor(tensor::data_type_of(tensor)?, tensor);
        if self.model.header.ir_version() < 4 {
            let names: HashSet<&str> = graph.initializer.iter().map(|tensor| tensor.name()).collect();
            graph.input.retain(|input| !names.contains(input.name()));
            self.model.header.ir_version = Some(4);
        }
        if !graph.input.iter().any(|input| input.name() == name) {
            graph.value_info.retain(|info| info.name() != name);
            graph.input.push(info);
        }
        Ok(())
    }

    /// Lets every user of `value`, subgraphs included, take `other` instead. A graph output `value` stays what it was.
    /// `other` may come later in the edit: to put a part behind a value, redirect its users to the part's output first,
    /// then add the part, which itself still takes `value`.
    pub fn redirect(&mut self, value: &str, other: &str) {
        for node in &mut self.model.graph.node {
            redirect_node(node, value, other);
        }
    }

    /// Joins another model in. Its values and nodes get `prefix` before their names; each `(input, value)` of
    /// `connections` connects an input of `other` to a value of this graph, and inputs left unconnected become inputs.
    /// Its outputs are not made outputs of this model. Answers the new name of each of them.
    ///
    /// Errors: [`crate::Status::NotFound`] for an input or value that is not there;
    /// [`crate::Status::InvalidArgument`] for a name that is taken, an element type that differs or an input connected
    /// twice; [`crate::Status::Unsupported`] if both models use different versions of an operator set or different
    /// functions of the same name.
    pub fn splice(
        &mut self,
        other: &Model,
        prefix: &str,
        connections: &[(&str, &str)],
    ) -> Result<HashMap<String, String>> {
        for opset in &other.header.opset_import {
            self.import_opset(opset.domain(), opset.version())?;
        }
        self.model.header.ir_version = Some(self.model.header.ir_version().max(other.header.ir_version()));
        for function in &other.header.functions {
            let key = (function.domain(), function.name(), function.overload());
            let functions = &mut self.model.header.functions;
            match functions.iter().find(|known| (known.domain(), known.name(), known.overload()) == key) {
                None => functions.push(function.clone()),
                Some(known) if known == function => {}
                Some(_) => {
                    return Err(Error::unsupported(format!(
                        "both models have a function {:?}, and they differ",
                        function.name()
                    )));
                }
            }
        }
        let mut connected: HashMap<&str, &str> = HashMap::new();
        for &(input, value) in connections {
            let Some(info) = other.graph.input.iter().find(|info| info.name() == input) else {
                return Err(Error::not_found(format!("the model to join in has no input {input:?}")));
            };
            let present = self.declaration(value)?;
            let types = (super::graph::element_type(info), super::graph::element_type(&present));
            if let (Some(expected), Some(found)) = types
                && expected != found
            {
                return Err(Error::invalid_argument(format!(
                    "input {input:?} takes {}, {value:?} is {}",
                    expected.as_str_name(),
                    found.as_str_name()
                )));
            }
            if connected.insert(input, value).is_some() {
                return Err(Error::invalid_argument(format!("input {input:?} is connected twice")));
            }
        }
        let rename = |name: &str| match connected.get(name) {
            Some(value) => (*value).to_owned(),
            None if name.is_empty() => String::new(),
            None => format!("{prefix}{name}"),
        };
        let mut part = other.graph.clone();
        // A connected input no longer has a default.
        part.initializer.retain(|tensor| !connected.contains_key(tensor.name()));
        part.input.retain(|input| !connected.contains_key(input.name()));
        part.value_info.retain(|info| !connected.contains_key(info.name()));
        rename_graph(&mut part, prefix, &rename);
        let present = Topology::new(&self.model.graph);
        let new_values = part.node.iter().flat_map(|node| &node.output).map(String::as_str);
        let new_values = new_values.chain(part.input.iter().map(|input| input.name()));
        let new_values = new_values.chain(part.initializer.iter().map(|tensor| tensor.name()));
        if let Some(clash) = new_values.filter(|name| !name.is_empty()).find(|name| present.origin(name).is_some()) {
            return Err(Error::invalid_argument(format!(
                "{clash:?} is taken: choose another prefix than {prefix:?} for the names to join in"
            )));
        }
        let files = &mut self.model.files;
        walk::graph_tensors_mut(&mut part, &mut |tensor| adopt_file(tensor, &other.files, files))?;
        let outputs = other.graph.output.iter();
        let outputs = outputs.map(|output| (output.name().to_owned(), rename(output.name()))).collect();
        let graph = &mut self.model.graph;
        graph.node.append(&mut part.node);
        graph.initializer.append(&mut part.initializer);
        graph.sparse_initializer.append(&mut part.sparse_initializer);
        graph.input.append(&mut part.input);
        graph.value_info.append(&mut part.value_info);
        graph.quantization_annotation.append(&mut part.quantization_annotation);
        // What was declared of an output is still known of the value, unless the value is one of this graph's own.
        let own: HashSet<&str> = connected.values().copied().collect();
        let declared: HashSet<String> =
            graph.value_info.iter().chain(&graph.input).map(|info| info.name().to_owned()).collect();
        let known = |info: &ValueInfoProto| !own.contains(info.name()) && !declared.contains(info.name());
        graph.value_info.extend(part.output.into_iter().filter(known));
        self.names = None;
        self.types = None;
        Ok(outputs)
    }

    /// Drops nodes that no output depends on, and initializers, declarations, functions and external files that nothing
    /// uses any more. Inputs stay.
    pub fn drop_unused(&mut self) {
        let topology = Topology::new(&self.model.graph);
        let kept = topology.before(self.model.graph.output.iter().map(|output| output.name()), []);
        let graph = &mut self.model.graph;
        let mut index = 0;
        graph.node.retain(|_| {
            index += 1;
            kept.get(index - 1).copied().unwrap_or(true)
        });
        let needed: HashSet<String> = needed_values(graph).into_iter().map(str::to_owned).collect();
        // The default of an input goes with the input.
        let inputs: HashSet<String> = graph.input.iter().map(|input| input.name().to_owned()).collect();
        let used = |name: &str| needed.contains(name) || inputs.contains(name);
        graph.initializer.retain(|tensor| used(tensor.name()));
        graph.sparse_initializer.retain(|sparse| sparse.values.as_ref().is_some_and(|values| used(values.name())));
        let made: HashSet<&str> = graph.node.iter().flat_map(|node| &node.output).map(String::as_str).collect();
        graph.value_info.retain(|info| made.contains(info.name()));
        graph.quantization_annotation.retain(|one| made.contains(one.tensor_name()) || used(one.tensor_name()));
        self.model.forget_unused();
    }

    /// Drops the inputs that nothing uses, with their defaults, and answers their names. Calls for
    /// [`Edit::drop_unused`] first.
    pub fn drop_unused_inputs(&mut self) -> Vec<String> {
        self.drop_unused();
        let graph = &mut self.model.graph;
        let needed: HashSet<String> = needed_values(graph).into_iter().map(str::to_owned).collect();
        let (kept, dropped) = std::mem::take(&mut graph.input).into_iter().partition(|i| needed.contains(i.name()));
        graph.input = kept;
        let dropped: Vec<String> = dropped.iter().map(|input: &ValueInfoProto| input.name().to_owned()).collect();
        graph.initializer.retain(|tensor| needed.contains(tensor.name()));
        self.model.forget_unused();
        dropped
    }

    /// The declared or inferred type of a value.
    fn declaration(&mut self, value: &str) -> Result<ValueInfoProto> {
        let graph = &self.model.graph;
        let declared = graph.input.iter().chain(&graph.output).chain(&graph.value_info);
        let declared = declared.into_iter().find(|info| info.name() == value);
        if let Some(info) = declared
            && super::graph::element_type(info).is_some()
        {
            let made = |node: &NodeProto| node.output.iter().any(|output| output == value);
            let initializer = |tensor: &TensorProto| tensor.name() == value;
            let input = |input: &ValueInfoProto| input.name() == value;
            // A declaration alone makes no value.
            if graph.node.iter().any(made) || graph.input.iter().any(input) || graph.initializer.iter().any(initializer)
            {
                return Ok(info.clone());
            }
        }
        if let Some(tensor) = graph.initializer.iter().find(|tensor| tensor.name() == value) {
            return Ok(declare_tensor(tensor::data_type_of(tensor)?, tensor));
        }
        if !graph.node.iter().any(|node| node.output.iter().any(|output| output == value)) {
            return Err(Error::not_found(format!("the graph has no value {value:?}")));
        }
        // Kept for the next edits, which mostly ask about values that were there from the start.
        if self.types.as_ref().is_none_or(|types| !types.contains_key(value)) {
            let types = Topology::new(graph).element_types();
            self.types = Some(types.into_iter().map(|(name, data_type)| (name.to_owned(), data_type)).collect());
        }
        let data_type = self.types.as_ref().and_then(|types| types.get(value).copied());
        data_type.map(|data_type| build::value(value, data_type, None)).ok_or_else(|| unknown_type(value))
    }
}

impl Model {
    /// Drops functions that nothing calls and external files that no tensor names.
    fn forget_unused(&mut self) {
        let mut called: HashSet<[&str; 3]> = HashSet::new();
        let mut open: Vec<&[NodeProto]> = vec![&self.graph.node];
        for training in &self.header.training_info {
            open.extend(training.initialization.iter().chain(&training.algorithm).map(|graph| graph.node.as_slice()));
        }
        while let Some(nodes) = open.pop() {
            for node in nodes {
                let graphs = node.attribute.iter().flat_map(|attribute| attribute.g.iter().chain(&attribute.graphs));
                open.extend(graphs.map(|graph| graph.node.as_slice()));
                let key = [node.domain(), node.op_type(), node.overload()];
                if called.insert(key) {
                    let same = self.header.functions.iter().filter(|function| function_key(function) == key);
                    open.extend(same.map(|function| function.node.as_slice()));
                }
            }
        }
        let mut kept: Vec<bool> =
            self.header.functions.iter().map(|function| called.contains(&function_key(function))).collect();
        kept.reverse();
        self.header.functions.retain(|_| kept.pop().unwrap_or(true));
        let mut locations = HashSet::new();
        let collected = walk::each_tensor(&self.header, &self.graph, &mut |tensor, _| {
            let entries = tensor.external_data.iter().filter(|entry| entry.key() == "location");
            locations.extend(entries.map(|entry| entry.value().to_owned()));
            Ok(())
        });
        // A malformed tensor stops the walk; the check at the end of the edit reports it.
        if collected.is_ok() {
            self.files.retain(|location| locations.contains(location));
        }
    }
}

fn function_key(function: &FunctionProto) -> [&str; 3] {
    [function.domain(), function.name(), function.overload()]
}

/// Brings nodes into topological order, keeping their present order where it is free. Nodes on a cycle or with unknown
/// inputs stay behind the others, for the check to report.
fn sort(graph: &mut GraphProto) {
    let order = {
        let topology = Topology::new(graph);
        let mut waits_for = vec![0usize; graph.node.len()];
        let mut sorted = true;
        for (index, node) in graph.node.iter().enumerate() {
            for value in node.input.iter().map(String::as_str).chain(captured(node)) {
                if let Some((producer, _)) = topology.producer(value) {
                    waits_for[index] += 1;
                    sorted &= producer < index;
                }
            }
        }
        if sorted {
            return;
        }
        let free = |(index, &count): (usize, &usize)| (count == 0).then_some(Reverse(index));
        let mut ready: BinaryHeap<Reverse<usize>> = waits_for.iter().enumerate().filter_map(free).collect();
        let mut order = Vec::with_capacity(graph.node.len());
        while let Some(Reverse(index)) = ready.pop() {
            order.push(index);
            for (output, value) in graph.node[index].output.iter().enumerate() {
                if topology.origin(value) != Some(Origin::Node { node: index, output }) {
                    continue;
                }
                for usage in topology.uses(value) {
                    waits_for[usage.node] -= 1;
                    if waits_for[usage.node] == 0 {
                        ready.push(Reverse(usage.node));
                    }
                }
            }
        }
        let placed: HashSet<usize> = order.iter().copied().collect();
        order.extend((0..graph.node.len()).filter(|index| !placed.contains(index)));
        order
    };
    let mut nodes: Vec<Option<NodeProto>> = std::mem::take(&mut graph.node).into_iter().map(Some).collect();
    graph.node = order.into_iter().filter_map(|index| nodes[index].take()).collect();
}

fn redirect_node(node: &mut NodeProto, value: &str, other: &str) {
    node.input.iter_mut().filter(|input| *input == value).for_each(|input| *input = other.to_owned());
    for graph in node.attribute.iter_mut().flat_map(|attribute| attribute.g.iter_mut().chain(&mut attribute.graphs)) {
        graph.node.iter_mut().for_each(|node| redirect_node(node, value, other));
        for output in graph.output.iter_mut().filter(|output| output.name() == value) {
            output.name = Some(other.to_owned());
        }
    }
}

/// Renames every value by `rename` and puts `prefix` before every node's name, in subgraphs too.
pub(super) fn rename_graph(graph: &mut GraphProto, prefix: &str, rename: &dyn Fn(&str) -> String) {
    let apply = |name: &mut Option<String>| {
        if let Some(name) = name {
            *name = rename(name);
        }
    };
    for info in graph.input.iter_mut().chain(&mut graph.output).chain(&mut graph.value_info) {
        apply(&mut info.name);
    }
    let sparse = graph.sparse_initializer.iter_mut().filter_map(|sparse| sparse.values.as_mut());
    graph.initializer.iter_mut().chain(sparse).for_each(|tensor| apply(&mut tensor.name));
    for annotation in &mut graph.quantization_annotation {
        apply(&mut annotation.tensor_name);
        annotation.quant_parameter_tensor_names.iter_mut().for_each(|parameter| apply(&mut parameter.value));
    }
    for node in &mut graph.node {
        if let Some(name) = node.name.as_mut().filter(|name| !name.is_empty()) {
            name.insert_str(0, prefix);
        }
        node.input.iter_mut().chain(&mut node.output).for_each(|name| *name = rename(name));
        for attribute in &mut node.attribute {
            let graphs = attribute.g.iter_mut().chain(&mut attribute.graphs);
            graphs.for_each(|graph| rename_graph(graph, prefix, rename));
        }
    }
}

/// Lets a tensor of another model name its file by a location that is free in this one.
fn adopt_file(tensor: &mut TensorProto, from: &ExternalFiles, into: &mut ExternalFiles) -> Result<()> {
    if !tensor::is_external(tensor) {
        return Ok(());
    }
    for entry in tensor.external_data.iter_mut().filter(|entry| entry.key() == "location") {
        let file = from.get(entry.value()).ok_or_else(|| {
            Error::invalid_argument(format!("{:?} is not one of the model's checked external files", entry.value()))
        })?;
        entry.value = Some(into.adopt(file));
    }
    Ok(())
}

fn unknown_type(value: &str) -> Error {
    Error::unsupported(format!("the element type of {value:?} is neither declared nor follows from its operator"))
}

fn declare_tensor(data_type: DataType, tensor: &TensorProto) -> ValueInfoProto {
    let dims: Vec<Dim> = tensor.dims.iter().map(|&dim| Dim::Fixed(dim)).collect();
    build::value(tensor.name(), data_type, Some(&dims))
}

/// Every value that the nodes and outputs of a graph use.
fn needed_values(graph: &GraphProto) -> HashSet<&str> {
    let mut needed: HashSet<&str> = graph.output.iter().map(|output| output.name()).collect();
    for node in &graph.node {
        needed.extend(node.input.iter().map(String::as_str));
        needed.extend(captured(node));
    }
    needed
}

#[cfg(test)]
mod tests {
    use super::super::build::{node, tensor_f32, tensor_i64, value};
    use super::super::limits::Limits;
    use super::super::proto::GraphProto;
    use super::*;
    use crate::error::Status;

    /// x, w -> MatMul -> m; m, b -> Add -> a; a -> Relu -> y; x -> Neg -> unused.
    fn model() -> Model {
        let graph = GraphProto {
            name: Some("layer".into()),
            input: vec![value("x", DataType::Float, Some(&["batch".into(), 3.into()]))],
            output: vec![value("y", DataType::Float, Some(&["batch".into(), 2.into()]))],
            initializer: vec![
                tensor_f32("w", &[3, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
                tensor_f32("b", &[2], &[0.5, -0.5]),
                tensor_i64("nobody", &[1], &[7]),
            ],
            node: vec![
                node("MatMul", ["x", "w"], ["m"]).named("to_k"),
                node("Add", ["m", "b"], ["a"]),
                node("Relu", ["a"], ["y"]),
                node("Neg", ["x"], ["unused"]),
            ],
            ..GraphProto::default()
        };
        Model::new(graph, &[("", 17)], &Limits::default()).unwrap()
    }

    fn names(infos: &[ValueInfoProto]) -> Vec<&str> {
        infos.iter().map(|info| info.name()).collect()
    }

    #[test]
    fn a_failed_edit_leaves_the_model_as_it_was() {
        let mut model = model();
        let before = model.to_bytes().unwrap();
        let error = model
            .edit(|edit| {
                edit.replace_by_input("m", None)?;
                edit.graph_mut().node.push(node("Relu", ["missing"], ["other"]));
                Ok(())
            })
            .unwrap_err();
        assert!(error.message().contains("\"missing\""), "{error}");
        assert_eq!(model.to_bytes().unwrap(), before);
        let cycle = model.edit(|edit| {
            edit.graph_mut().node.push(node("Relu", ["q"], ["p"]));
            edit.graph_mut().node.push(node("Relu", ["p"], ["q"]));
            Ok(())
        });
        assert_eq!(cycle.unwrap_err().status(), Status::InvalidFile);
        let twice = model.edit(|edit| {
            edit.graph_mut().node.push(node("Relu", ["x"], ["m"]));
            Ok(())
        });
        assert!(twice.unwrap_err().message().contains("another value has this name"));
        assert_eq!(model.to_bytes().unwrap(), before);
    }

    #[test]
    fn replacing_a_value_drops_what_made_it_and_keeps_its_type() {
        let mut model = model();
        replace_by_input(&mut model, "m", Some(&["batch".into(), 2.into()])).unwrap();
        assert_eq!(names(&model.graph().input), ["x", "m"]);
        assert_eq!(model.graph().node.iter().map(|node| node.op_type()).collect::<Vec<_>>(), ["Add", "Relu"]);
        assert_eq!(model.graph().initializer.iter().map(|one| one.name()).collect::<Vec<_>>(), ["b"]);
        assert_eq!(super::super::graph::element_type(&model.graph().input[1]), Some(DataType::Float));
        assert_eq!(model.edit(|edit| Ok(edit.drop_unused_inputs())).unwrap(), ["x"]);
        assert_eq!(replace_by_input(&mut model, "b", None).unwrap_err().status(), Status::InvalidArgument);
        assert_eq!(replace_by_input(&mut model, "z", None).unwrap_err().status(), Status::NotFound);
    }

    #[test]
    fn cutting_names_the_input_that_was_forgotten() {
        let model = model();
        let part = cut(&model, &["m"], &["y"]).unwrap();
        assert_eq!((names(&part.graph().input), names(&part.graph().output)), (vec!["m"], vec!["y"]));
        assert_eq!(part.graph().node.len(), 2);
        assert!(cut(&model, &["b"], &["y"]).unwrap_err().message().contains("\"x\""));
        assert_eq!(cut(&model, &["m"], &["nothing"]).unwrap_err().status(), Status::NotFound);
        let weight = cut(&model, &["x", "w"], &["a"]).unwrap();
        assert_eq!(weight.graph().initializer.len(), 1);
    }

    #[test]
    fn splicing_renames_and_checks_types_and_operator_sets() {
        let mut model = model();
        let other = self::model();
        let outputs = splice(&mut model, &other, "second/", &[("x", "x")]).unwrap();
        assert_eq!(outputs["y"], "second/y");
        assert_eq!(names(&model.graph().input), ["x"]);
        model.edit(|edit| edit.expose_output("second/y")).unwrap();
        assert!(splice(&mut model, &other, "second/", &[("x", "x")]).unwrap_err().message().contains("is taken"));
        assert!(splice(&mut model, &other, "third/", &[("x", "nobody")]).unwrap_err().message().contains("INT64"));
        let newer = Model::new(other.graph().clone(), &[("", 18)], &Limits::default()).unwrap();
        let error = splice(&mut model, &newer, "third/", &[]).unwrap_err();
        assert_eq!(error.status(), Status::Unsupported, "{error}");
    }

    #[test]
    fn nodes_are_sorted_when_an_edit_ends() {
        let mut model = model();
        model
            .edit(|edit| {
                let name = edit.fresh_name("m");
                assert_eq!(name, "m_1");
                edit.redirect("m", &name);
                edit.graph_mut().node.push(node("Identity", ["m"], [name.as_str()]));
                Ok(())
            })
            .unwrap();
        let order: Vec<_> = model.graph().node.iter().map(|node| node.op_type()).collect();
        assert_eq!(order, ["MatMul", "Neg", "Identity", "Add", "Relu"]);
    }

    #[test]
    fn an_initializer_gets_one_input_that_overrides_it() {
        let mut model = model();
        override_initializer(&mut model, "w").unwrap();
        override_initializer(&mut model, "w").unwrap();
        assert_eq!(names(&model.graph().input), ["x", "w"]);
        assert_eq!(model.graph().initializer.len(), 3);
        assert_eq!(override_initializer(&mut model, "m").unwrap_err().status(), Status::NotFound);
    }
}
