//! Whether a model keeps the rules: every value is made once and before it is used, names are unique where they are
//! visible, operators are imported, functions end, and all counts are within the limits. Used when a model is opened
//! and after each edit. Reads no tensor data.

use std::collections::{HashMap, HashSet};

use super::fold;
use super::limits::Limits;
use super::proto::tensor_shape_proto::dimension;
use super::proto::{FunctionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TypeProto, type_proto};
use super::tensor;
use super::walk::{self, Place};
use crate::error::{Error, Result};

/// Checks a model. `external` is asked about every tensor whose data is external, with the bytes that it must have.
pub(super) fn model(
    header: &ModelProto,
    graph: &GraphProto,
    limits: &Limits,
    external: &mut dyn FnMut(&super::proto::TensorProto, u64) -> Result<()>,
) -> Result<()> {
    tensors(header, graph, limits, external)?;
    let functions = Functions::new(&header.functions)?;
    let check = Check { limits, functions: &functions };
    let mut count = Count::default();
    let place = Place::root("graph", graph.name());
    check.graph(graph, None, place, 1, &header.opset_import, &mut count)?;
    for training in &header.training_info {
        // Its algorithm goes on from the graph, so it may use every value of it.
        let outer = Scope::of_finished(graph);
        for part in training.initialization.iter().chain(&training.algorithm) {
            let place = Place::root("training graph", part.name());
            check.graph(part, Some(&outer), place, 1, &header.opset_import, &mut count)?;
        }
    }
    for function in &header.functions {
        check.function(function, &header.opset_import, &mut count)?;
    }
    check.expanded_nodes(graph)?;
    fold::check(header, graph, limits)
}

fn tensors(
    header: &ModelProto,
    graph: &GraphProto,
    limits: &Limits,
    external: &mut dyn FnMut(&super::proto::TensorProto, u64) -> Result<()>,
) -> Result<()> {
    let mut total = 0u64;
    let mut count = 0;
    walk::each_tensor(header, graph, &mut |tensor, place| {
        count += 1;
        if count > limits.tensors {
            return Err(above("the model", "tensors", limits.tensors));
        }
        if tensor.dims.len() > limits.rank {
            return Err(above(place, "dimensions", limits.rank));
        }
        let bytes = tensor::stored_bytes(tensor).map_err(|error| error.at(place))?;
        if bytes > limits.tensor_bytes {
            return Err(above(place, "bytes", limits.tensor_bytes));
        }
        total = total.saturating_add(bytes);
        if total > limits.total_tensor_bytes {
            return Err(above("the model", "bytes of tensors", limits.total_tensor_bytes));
        }
        if tensor::is_external(tensor) {
            external(tensor, bytes).map_err(|error| error.at(place))?;
        }
        Ok(())
    })
}

fn above(what: impl std::fmt::Display, unit: &str, limit: impl std::fmt::Display) -> Error {
    Error::limit_exceeded(format!("{what} has more than {limit} {unit}"))
}

/// What names a function: domain, name and overload.
pub(super) type FunctionKey<'a> = (&'a str, &'a str, &'a str);

fn domain(domain: &str) -> &str {
    if domain == "ai.onnx" { "" } else { domain }
}

pub(super) fn called(node: &NodeProto) -> FunctionKey<'_> {
    (domain(node.domain()), node.op_type(), node.overload())
}

/// The model-local functions by what names them.
pub(super) struct Functions<'a> {
    all: &'a [FunctionProto],
    by_key: HashMap<FunctionKey<'a>, usize>,
}

impl<'a> Functions<'a> {
    pub(super) fn new(all: &'a [FunctionProto]) -> Result<Self> {
        let mut by_key = HashMap::new();
        for (index, function) in all.iter().enumerate() {
            let key = (domain(function.domain()), function.name(), function.overload());
            if by_key.insert(key, index).is_some() {
                return Err(Error::invalid_file(format!("function {:?} is defined twice", function.name())));
            }
        }
        Ok(Self { all, by_key })
    }

    pub(super) fn find(&self, key: &FunctionKey) -> Option<&'a FunctionProto> {
        self.all.get(*self.by_key.get(key)?)
    }
}

/// The values that a node can see: those of its graph so far, and of the graphs around it.
struct Scope<'a> {
    outer: Option<&'a Scope<'a>>,
    values: HashSet<&'a str>,
}

impl<'a> Scope<'a> {
    fn of_finished(graph: &'a GraphProto) -> Self {
        let mut values: HashSet<&str> = graph.input.iter().map(|input| input.name()).collect();
        values.extend(graph.initializer.iter().map(|tensor| tensor.name()));
        values.extend(graph.sparse_initializer.iter().filter_map(|sparse| Some(sparse.values.as_ref()?.name())));
        values.extend(graph.node.iter().flat_map(|node| &node.output).map(String::as_str));
        Self { outer: None, values }
    }

    fn sees(&self, name: &str) -> bool {
        self.values.contains(name) || self.outer.is_some_and(|outer| outer.sees(name))
    }
}

#[derive(Default)]
struct Count {
    nodes: usize,
}

struct Check<'a> {
    limits: &'a Limits,
    functions: &'a Functions<'a>,
}

impl<'a> Check<'a> {
    fn graph(
        &self,
        graph: &'a GraphProto,
        outer: Option<&Scope<'_>>,
        place: Place<'_>,
        depth: usize,
        opsets: &[OperatorSetIdProto],
        count: &mut Count,
    ) -> Result<()> {
        if depth > self.limits.subgraph_depth {
            return Err(above(place, "graphs around it", self.limits.subgraph_depth));
        }
        let mut scope = Scope { outer, values: HashSet::with_capacity(graph.node.len() + graph.initializer.len()) };
        for values in [graph.input.len(), graph.output.len()] {
            self.at_most_values(values, place)?;
        }
        for input in &graph.input {
            let place = place.inside("input", input.name());
            self.define(&mut scope, input.name(), place)?;
            self.declared_type(input.r#type.as_ref(), place)?;
        }
        let mut constants = HashSet::with_capacity(graph.initializer.len());
        let sparse = graph.sparse_initializer.iter().filter_map(|sparse| sparse.values.as_ref());
        for tensor in graph.initializer.iter().chain(sparse) {
            let place = place.inside("initializer", tensor.name());
            if !constants.insert(tensor.name()) {
                return Err(Error::invalid_file(format!("{place}: the name is used twice")));
            }
            // An initializer with the name of an input is that input's default.
            if !scope.values.contains(tensor.name()) {
                self.define(&mut scope, tensor.name(), place)?;
            }
        }
        self.nodes(&graph.node, &mut scope, place, depth, opsets, count)?;
        for info in &graph.value_info {
            let place = place.inside("value_info", info.name());
            self.name_length(info.name(), place)?;
            self.declared_type(info.r#type.as_ref(), place)?;
        }
        let mut outputs = HashSet::with_capacity(graph.output.len());
        for output in &graph.output {
            let place = place.inside("output", output.name());
            if !scope.sees(output.name()) {
                return Err(Error::invalid_file(format!("{place}: no node makes this value")));
            }
            if !outputs.insert(output.name()) {
                return Err(Error::invalid_file(format!("{place}: the output is listed twice")));
            }
            self.declared_type(output.r#type.as_ref(), place)?;
        }
        Ok(())
    }

    fn function(&self, function: &'a FunctionProto, model: &[OperatorSetIdProto], count: &mut Count) -> Result<()> {
        let place = Place::root("function", function.name());
        let mut scope = Scope { outer: None, values: HashSet::new() };
        for input in &function.input {
            self.define(&mut scope, input, place.inside("input", input))?;
        }
        // A function imports operator sets by itself; those that it leaves out are the model's.
        let opsets: Vec<OperatorSetIdProto> = function.opset_import.iter().chain(model).cloned().collect();
        self.nodes(&function.node, &mut scope, place, 1, &opsets, count)?;
        match function.output.iter().find(|output| !scope.sees(output)) {
            Some(output) => Err(Error::invalid_file(format!("{place}: no node makes its output {output:?}"))),
            None => Ok(()),
        }
    }

    fn nodes(
        &self,
        nodes: &'a [NodeProto],
        scope: &mut Scope<'a>,
        place: Place<'_>,
        depth: usize,
        opsets: &[OperatorSetIdProto],
        count: &mut Count,
    ) -> Result<()> {
        count.nodes += nodes.len();
        if count.nodes > self.limits.nodes {
            return Err(above("the model", "nodes", self.limits.nodes));
        }
        for node in nodes {
            let place = place.of_node(node);
            if node.op_type().is_empty() {
                return Err(Error::invalid_file(format!("{place}: has no operator")));
            }
            if node.op_type() == "EPContext" {
                return Err(Error::unsupported(format!(
                    "{place}: EPContext holds or names an engine compiled elsewhere, which is run unchecked"
                )));
            }
            for name in [node.op_type(), node.name(), node.domain(), node.overload()] {
                self.name_length(name, place)?;
            }
            let imported = |opset: &OperatorSetIdProto| domain(opset.domain()) == domain(node.domain());
            if !opsets.iter().any(imported) {
                return Err(Error::invalid_file(format!(
                    "{place}: operator {} is of the domain {:?}, which the model does not import",
                    node.op_type(),
                    node.domain()
                )));
            }
            self.at_most_values(node.input.len().max(node.output.len()), place)?;
            if let Some(unknown) = node.input.iter().find(|input| !input.is_empty() && !scope.sees(input)) {
                return Err(Error::invalid_file(format!(
                    "{place}: its input {unknown:?} is not made before it (missing, cyclic or out of order)"
                )));
            }
            let mut names = HashSet::new();
            for attribute in &node.attribute {
                let place = place.inside("attribute", attribute.name());
                self.name_length(attribute.name(), place)?;
                if !names.insert(attribute.name()) {
                    return Err(Error::invalid_file(format!("{place}: the attribute is given twice")));
                }
                for graph in attribute.g.iter().chain(&attribute.graphs) {
                    self.graph(graph, Some(&*scope), place, depth + 1, opsets, count)?;
                }
            }
            for output in node.output.iter().filter(|output| !output.is_empty()) {
                self.define(scope, output, place.inside("output", output))?;
            }
        }
        Ok(())
    }

    fn define<'s>(&self, scope: &mut Scope<'s>, name: &'s str, place: Place<'_>) -> Result<()> {
        if name.is_empty() {
            return Err(Error::invalid_file(format!("{place}: has no name")));
        }
        self.name_length(name, place)?;
        if scope.sees(name) {
            return Err(Error::invalid_file(format!("{place}: another value has this name")));
        }
        scope.values.insert(name);
        Ok(())
    }

    fn name_length(&self, name: &str, place: Place<'_>) -> Result<()> {
        if name.len() > self.limits.name_bytes {
            return Err(above(place, "bytes in a name", self.limits.name_bytes));
        }
        if name.contains('\0') {
            return Err(Error::invalid_file(format!("{place}: a name holds a NUL byte")));
        }
        Ok(())
    }

    fn at_most_values(&self, values: usize, place: Place<'_>) -> Result<()> {
        if values > self.limits.values_per_node {
            return Err(above(place, "inputs or outputs", self.limits.values_per_node));
        }
        Ok(())
    }

    fn declared_type(&self, declared: Option<&TypeProto>, place: Place<'_>) -> Result<()> {
        use type_proto::Value;
        let shape = match declared.and_then(|declared| declared.value.as_ref()) {
            None => return Ok(()),
            Some(Value::TensorType(tensor)) => tensor.shape.as_ref(),
            Some(Value::SparseTensorType(tensor)) => tensor.shape.as_ref(),
            Some(Value::SequenceType(sequence)) => return self.declared_type(sequence.elem_type.as_deref(), place),
            Some(Value::OptionalType(optional)) => return self.declared_type(optional.elem_type.as_deref(), place),
            Some(Value::MapType(map)) => return self.declared_type(map.value_type.as_deref(), place),
            Some(Value::OpaqueType(_)) => return Ok(()),
        };
        let dims = shape.map_or(&[][..], |shape| &shape.dim);
        if dims.len() > self.limits.rank {
            return Err(above(place, "dimensions", self.limits.rank));
        }
        let mut fixed = Vec::new();
        for dim in dims {
            match &dim.value {
                Some(dimension::Value::DimValue(size)) => fixed.push(*size),
                Some(dimension::Value::DimParam(name)) => self.name_length(name, place)?,
                None => {}
            }
        }
        // A shape whose known sizes overflow can't be of a value that anyone could hold.
        match tensor::checked_elements(&fixed) {
            Some(elements) if elements <= self.limits.tensor_bytes => Ok(()),
            Some(_) => Err(above(place, "elements", self.limits.tensor_bytes)),
            None => Err(Error::invalid_file(format!("{place}: shape {fixed:?} is negative or too large"))),
        }
    }

    /// Bounds what is left when every call of a function is replaced by its body, as ONNX Runtime does: a few functions
    /// that call each other twice make an astronomical graph.
    fn expanded_nodes(&self, graph: &GraphProto) -> Result<()> {
        let mut sizes = vec![FunctionSize::Unknown; self.functions.all.len()];
        for index in 0..sizes.len() {
            self.function_size(index, &mut sizes, 0)?;
        }
        let nodes = self.expanded(&graph.node, &mut sizes, 0)?;
        if nodes > self.limits.nodes as u64 {
            return Err(above("the model with its functions expanded", "nodes", self.limits.nodes));
        }
        Ok(())
    }

    fn expanded(&self, nodes: &[NodeProto], sizes: &mut [FunctionSize], depth: usize) -> Result<u64> {
        let mut total = 0u64;
        for node in nodes {
            let size = match self.functions.by_key.get(&called(node)) {
                Some(&index) => self.function_size(index, sizes, depth)?,
                None => 1,
            };
            total = total.saturating_add(size);
            for attribute in &node.attribute {
                for graph in attribute.g.iter().chain(&attribute.graphs) {
                    total = total.saturating_add(self.expanded(&graph.node, sizes, depth)?);
                }
            }
        }
        Ok(total)
    }

    fn function_size(&self, index: usize, sizes: &mut [FunctionSize], depth: usize) -> Result<u64> {
        let function = &self.functions.all[index];
        match sizes[index] {
            FunctionSize::Known(size) => Ok(size),
            FunctionSize::Open => {
                Err(Error::invalid_file(format!("function {:?} calls itself, directly or by others", function.name())))
            }
            FunctionSize::Unknown if depth >= self.limits.subgraph_depth => Err(above(
                format_args!("function {:?}", function.name()),
                "calls around it",
                self.limits.subgraph_depth,
            )),
            FunctionSize::Unknown => {
                sizes[index] = FunctionSize::Open;
                let size = self.expanded(&function.node, sizes, depth + 1)?;
                sizes[index] = FunctionSize::Known(size);
                Ok(size)
            }
        }
    }
}

#[derive(Clone, Copy)]
enum FunctionSize {
    Unknown,
    Open,
    Known(u64),
}
