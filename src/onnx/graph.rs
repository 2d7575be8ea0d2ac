//! Who makes and who uses each value of a graph.
//!
//! [`Topology`] is an index over one graph that borrows it. It answers for any graph, also one that breaks the rules
//! (two producers of a value, a cycle): the first producer counts, and every walk ends.

use std::collections::{HashMap, HashSet};

use super::proto::tensor_proto::DataType;
use super::proto::{AttributeProto, GraphProto, NodeProto, TensorProto, TypeProto, ValueInfoProto, type_proto};

/// Where a value comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// A graph input without a default, by its index among the inputs.
    Input(usize),
    /// An initializer, by its index; it may be a graph input too, and is then its default.
    Initializer(usize),
    /// A sparse initializer, by its index.
    SparseInitializer(usize),
    /// A node's output.
    Node {
        /// The node's index.
        node: usize,
        /// Which of its outputs.
        output: usize,
    },
}

/// A use of a value by a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Use {
    /// The node's index.
    pub node: usize,
    /// Which of its inputs; `None` if a subgraph of the node uses the value.
    pub input: Option<usize>,
}

/// The producers and users of a graph's values.
pub struct Topology<'g> {
    graph: &'g GraphProto,
    origins: HashMap<&'g str, Origin>,
    uses: HashMap<&'g str, Vec<Use>>,
    inputs: HashSet<&'g str>,
    outputs: HashSet<&'g str>,
}

impl<'g> Topology<'g> {
    /// Indexes a graph. Linear in its size.
    pub fn new(graph: &'g GraphProto) -> Self {
        let mut origins = HashMap::with_capacity(graph.node.len() + graph.initializer.len());
        let mut uses: HashMap<&str, Vec<Use>> = HashMap::with_capacity(graph.node.len());
        let mut add = |name: &'g str, origin| {
            if !name.is_empty() {
                origins.entry(name).or_insert(origin);
            }
        };
        for (index, tensor) in graph.initializer.iter().enumerate() {
            add(tensor.name(), Origin::Initializer(index));
        }
        for (index, sparse) in graph.sparse_initializer.iter().enumerate() {
            add(sparse.values.as_ref().map_or("", |values| values.name()), Origin::SparseInitializer(index));
        }
        for (index, input) in graph.input.iter().enumerate() {
            add(input.name(), Origin::Input(index));
        }
        for (index, node) in graph.node.iter().enumerate() {
            for (output, name) in node.output.iter().enumerate() {
                add(name, Origin::Node { node: index, output });
            }
            for (input, name) in node.input.iter().enumerate() {
                if !name.is_empty() {
                    uses.entry(name).or_default().push(Use { node: index, input: Some(input) });
                }
            }
            for name in captured(node) {
                uses.entry(name).or_default().push(Use { node: index, input: None });
            }
        }
        let inputs = graph.input.iter().map(|input| input.name()).collect();
        let outputs = graph.output.iter().map(|output| output.name()).collect();
        Self { graph, origins, uses, inputs, outputs }
    }

    /// The graph.
    pub fn graph(&self) -> &'g GraphProto {
        self.graph
    }

    /// Where a value comes from; `None` if the graph has no such value.
    pub fn origin(&self, value: &str) -> Option<Origin> {
        self.origins.get(value).copied()
    }

    /// The node that makes a value, with its index; `None` for inputs and initializers.
    pub fn producer(&self, value: &str) -> Option<(usize, &'g NodeProto)> {
        match self.origin(value)? {
            Origin::Node { node, .. } => Some((node, self.graph.node.get(node)?)),
            _ => None,
        }
    }

    /// Every use of a value by a node, in the order of nodes; a graph output is no use.
    pub fn uses(&self, value: &str) -> &[Use] {
        self.uses.get(value).map_or(&[], Vec::as_slice)
    }

    /// The nodes that use a value, each once, with their indices.
    pub fn consumers(&self, value: &str) -> impl Iterator<Item = (usize, &'g NodeProto)> {
        let mut last = None;
        let uses = self.uses(value).iter().filter(move |usage| last.replace(usage.node) != Some(usage.node));
        uses.map(|usage| (usage.node, &self.graph.node[usage.node]))
    }

    /// Whether a value is an output of the graph.
    pub fn is_output(&self, value: &str) -> bool {
        self.outputs.contains(value)
    }

    /// The initializer of that name.
    pub fn initializer(&self, value: &str) -> Option<&'g TensorProto> {
        match self.origin(value)? {
            Origin::Initializer(index) => self.graph.initializer.get(index),
            _ => None,
        }
    }

    /// The tensor that a value always is: an initializer that is no graph input, or the `value` of a `Constant` node.
    pub fn constant(&self, value: &str) -> Option<&'g TensorProto> {
        match self.origin(value)? {
            Origin::Initializer(index) => self.graph.initializer.get(index).filter(|_| !self.inputs.contains(value)),
            Origin::Node { node, .. } => {
                let node = self.graph.node.get(node).filter(|node| node.is("Constant"))?;
                node.attribute("value")?.t.as_ref()
            }
            _ => None,
        }
    }

    /// The type and shape that the graph declares for a value.
    pub fn value_info(&self, value: &str) -> Option<&'g ValueInfoProto> {
        let declared = self.graph.input.iter().chain(&self.graph.output).chain(&self.graph.value_info);
        declared.into_iter().find(|info| info.name() == value)
    }

    /// Which nodes the values depend on, as one flag a node: everything before `values`, walking back no further than
    /// the values in `from`.
    pub fn before<'v>(
        &self,
        values: impl IntoIterator<Item = &'v str>,
        from: impl IntoIterator<Item = &'v str>,
    ) -> Vec<bool> {
        let from: HashSet<&str> = from.into_iter().collect();
        let mut marked = vec![false; self.graph.node.len()];
        let mut open: Vec<usize> = Vec::new();
        let mut visit = |value: &str, open: &mut Vec<usize>| {
            if from.contains(value) {
                return;
            }
            if let Some((node, _)) = self.producer(value)
                && !std::mem::replace(&mut marked[node], true)
            {
                open.push(node);
            }
        };
        values.into_iter().for_each(|value| visit(value, &mut open));
        while let Some(node) = open.pop() {
            let node = &self.graph.node[node];
            node.input.iter().for_each(|value| visit(value, &mut open));
            captured(node).into_iter().for_each(|value| visit(value, &mut open));
        }
        marked
    }

    /// Which nodes depend on the values, as one flag a node.
    pub fn after<'v>(&self, values: impl IntoIterator<Item = &'v str>) -> Vec<bool> {
        let mut marked = vec![false; self.graph.node.len()];
        let mut open: Vec<usize> = Vec::new();
        let mut visit = |value: &str, open: &mut Vec<usize>| {
            for usage in self.uses(value) {
                if !std::mem::replace(&mut marked[usage.node], true) {
                    open.push(usage.node);
                }
            }
        };
        values.into_iter().for_each(|value| visit(value, &mut open));
        while let Some(node) = open.pop() {
            self.graph.node[node].output.iter().for_each(|value| visit(value, &mut open));
        }
        marked
    }

    /// The element type of every value for which it follows from the graph's declarations, initializers and the
    /// operators' own rules. Values of unknown, sequence or map type are left out.
    pub fn element_types(&self) -> HashMap<&'g str, DataType> {
        let mut types: HashMap<&'g str, DataType> = HashMap::new();
        let graph = self.graph;
        for tensor in &graph.initializer {
            if let Ok(data_type) = DataType::try_from(tensor.data_type()) {
                types.insert(tensor.name(), data_type);
            }
        }
        for info in graph.input.iter().chain(&graph.output).chain(&graph.value_info) {
            if let Some(data_type) = element_type(info) {
                types.insert(info.name(), data_type);
            }
        }
        for node in &graph.node {
            for (output, name) in node.output.iter().enumerate() {
                if let (false, Some(data_type)) = (types.contains_key(name.as_str()), output_type(node, output, &types))
                {
                    types.insert(name, data_type);
                }
            }
        }
        types
    }
}

/// The declared element type of a tensor value.
pub fn element_type(info: &ValueInfoProto) -> Option<DataType> {
    let tensor = tensor_type(info.r#type.as_ref()?)?;
    DataType::try_from(tensor.elem_type()).ok().filter(|&data_type| data_type != DataType::Undefined)
}

fn tensor_type(value: &TypeProto) -> Option<&type_proto::Tensor> {
    match value.value.as_ref()? {
        type_proto::Value::TensorType(tensor) => Some(tensor),
        _ => None,
    }
}

/// The element type of a node's output by the operator's rule.
fn output_type(node: &NodeProto, output: usize, types: &HashMap<&str, DataType>) -> Option<DataType> {
    let of_input = |index: usize| types.get(node.input.get(index)?.as_str()).copied();
    let of_attribute = |name| DataType::try_from(i32::try_from(node.attribute_i(name)?).ok()?).ok();
    let standard = matches!(node.domain(), "" | "ai.onnx" | "com.microsoft");
    if !standard || node.attribute.iter().any(|attribute| attribute.g.is_some()) {
        return None;
    }
    match (node.op_type(), output) {
        ("Cast", 0) => of_attribute("to"),
        ("CastLike", 0) => of_input(1),
        ("Shape" | "Size" | "NonZero" | "ArgMax" | "ArgMin", _) => Some(DataType::Int64),
        ("TopK" | "MaxPool", 1) | ("Unique", 1..) => Some(DataType::Int64),
        ("Dropout", 1) => Some(DataType::Bool),
        (
            "Equal" | "Greater" | "GreaterOrEqual" | "Less" | "LessOrEqual" | "And" | "Or" | "Xor" | "Not" | "IsNaN"
            | "IsInf",
            _,
        ) => Some(DataType::Bool),
        ("Where", _) => of_input(1),
        ("OneHot", _) => of_input(2),
        ("DequantizeLinear", _) => of_input(1),
        ("QuantizeLinear", _) => of_input(2).or(Some(DataType::Uint8)),
        ("DynamicQuantizeLinear", 0 | 2) => Some(DataType::Uint8),
        ("MatMulInteger" | "ConvInteger", _) => Some(DataType::Int32),
        ("RandomNormal" | "RandomUniform", _) => of_attribute("dtype").or(Some(DataType::Float)),
        ("EyeLike" | "RandomNormalLike" | "RandomUniformLike" | "Bernoulli" | "Multinomial", _) => {
            of_attribute("dtype").or_else(|| of_input(0))
        }
        ("ConstantOfShape", _) => match node.attribute("value").and_then(|value| value.t.as_ref()) {
            Some(tensor) => DataType::try_from(tensor.data_type()).ok(),
            None => Some(DataType::Float),
        },
        ("Constant", _) => {
            let attribute = node.attribute.first()?;
            match attribute.name() {
                "value" => DataType::try_from(attribute.t.as_ref()?.data_type()).ok(),
                "value_float" | "value_floats" => Some(DataType::Float),
                "value_int" | "value_ints" => Some(DataType::Int64),
                "value_string" | "value_strings" => Some(DataType::String),
                _ => None,
            }
        }
        ("SequenceAt" | "SequenceConstruct" | "SplitToSequence" | "ConcatFromSequence" | "Optional", _) => None,
        // All other standard operators give what they are given.
        _ => of_input(0),
    }
}

/// The names that the subgraphs of a node use without making them, i.e. values of the graphs around it.
pub fn captured(node: &NodeProto) -> Vec<&str> {
    let mut names = Vec::new();
    for attribute in &node.attribute {
        for graph in attribute.g.iter().chain(&attribute.graphs) {
            free_names(graph, &mut names);
        }
    }
    names.sort_unstable();
    names.dedup();
    names
}

fn free_names<'g>(graph: &'g GraphProto, free: &mut Vec<&'g str>) {
    let mut own: HashSet<&str> = graph.input.iter().map(|input| input.name()).collect();
    own.extend(graph.initializer.iter().map(|tensor| tensor.name()));
    own.extend(graph.sparse_initializer.iter().filter_map(|sparse| Some(sparse.values.as_ref()?.name())));
    own.extend(graph.node.iter().flat_map(|node| node.output.iter().map(String::as_str)));
    let mut used: Vec<&str> = graph.output.iter().map(|output| output.name()).collect();
    for node in &graph.node {
        used.extend(node.input.iter().map(String::as_str));
        if node.attribute.iter().any(|attribute| attribute.g.is_some() || !attribute.graphs.is_empty()) {
            used.extend(captured(node));
        }
    }
    free.extend(used.into_iter().filter(|name| !name.is_empty() && !own.contains(name)));
}

impl NodeProto {
    /// Whether this is the standard operator of that name.
    pub fn is(&self, op_type: &str) -> bool {
        self.op_type() == op_type && matches!(self.domain(), "" | "ai.onnx")
    }

    /// The attribute of that name.
    pub fn attribute(&self, name: &str) -> Option<&AttributeProto> {
        self.attribute.iter().find(|attribute| attribute.name() == name)
    }

    /// The integer attribute of that name.
    pub fn attribute_i(&self, name: &str) -> Option<i64> {
        self.attribute(name)?.i
    }

    /// The float attribute of that name.
    pub fn attribute_f(&self, name: &str) -> Option<f32> {
        self.attribute(name)?.f
    }

    /// The list of integers of that name.
    pub fn attribute_ints(&self, name: &str) -> Option<&[i64]> {
        self.attribute(name).map(|attribute| attribute.ints.as_slice())
    }

    /// The text attribute of that name.
    pub fn attribute_s(&self, name: &str) -> Option<&str> {
        std::str::from_utf8(self.attribute(name)?.s.as_deref()?).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::super::build::{node, tensor_f32, tensor_i64, value};
    use super::*;

    #[test]
    fn broken_graphs_are_answered_and_every_walk_ends() {
        let graph = GraphProto {
            input: vec![value("x", DataType::Float, None), value("w", DataType::Float, None)],
            initializer: vec![tensor_f32("w", &[1], &[1.0])],
            node: vec![
                node("Add", ["x", "loop"], ["a"]),
                node("Neg", ["a"], ["loop"]),
                node("Exp", ["x"], ["a"]),
                node("Mul", ["a", "a"], ["y", ""]),
            ],
            output: vec![value("y", DataType::Float, None)],
            ..GraphProto::default()
        };
        let topology = Topology::new(&graph);
        assert_eq!(topology.origin("a"), Some(Origin::Node { node: 0, output: 0 }));
        assert_eq!(topology.origin("w"), Some(Origin::Initializer(0)));
        assert_eq!(topology.origin(""), None);
        assert!(topology.constant("w").is_none(), "the default of an input is no constant");
        let of = |node, input| Use { node, input: Some(input) };
        assert_eq!(topology.uses("a"), [of(1, 0), of(3, 0), of(3, 1)]);
        assert_eq!(topology.consumers("a").map(|(index, _)| index).collect::<Vec<_>>(), [1, 3]);
        assert_eq!(topology.before(["y"], []), [true, true, false, true]);
        assert_eq!(topology.before(["y"], ["a"]), [false, false, false, true]);
        assert_eq!(topology.after(["loop"]), [true, true, false, true]);
        assert!(topology.is_output("y") && !topology.is_output("a"));
    }

    #[test]
    fn values_captured_by_subgraphs_are_uses() {
        let inner = GraphProto {
            node: vec![node("Add", ["x", "own"], ["z"]), node("Constant", [], ["unused"])],
            initializer: vec![tensor_f32("own", &[], &[1.0])],
            output: vec![value("z", DataType::Float, None)],
            ..GraphProto::default()
        };
        let outer = GraphProto {
            name: Some("outer".into()),
            node: vec![node("If", ["condition"], ["nested"]).with("then_branch", inner)],
            output: vec![value("nested", DataType::Float, None)],
            ..GraphProto::default()
        };
        let graph =
            GraphProto { node: vec![node("If", ["c"], ["y"]).with("then_branch", outer)], ..GraphProto::default() };
        assert_eq!(captured(&graph.node[0]), ["condition", "x"]);
        assert_eq!(Topology::new(&graph).uses("x"), [Use { node: 0, input: None }]);
    }

    #[test]
    fn element_types_follow_from_operators() {
        let graph = GraphProto {
            input: vec![value("x", DataType::Float16, None)],
            initializer: vec![tensor_i64("shape", &[1], &[1])],
            node: vec![
                node("Cast", ["x"], ["c"]).with("to", DataType::Double as i64),
                node("Shape", ["c"], ["s"]),
                node("Less", ["c", "c"], ["l"]),
                node("Where", ["l", "c", "c"], ["w"]),
                node("ConstantOfShape", ["shape"], ["f"]),
                node("Reshape", ["x", "shape"], ["r"]),
                node("Mystery", ["x"], ["m"]).in_domain("elsewhere"),
            ],
            ..GraphProto::default()
        };
        let types = Topology::new(&graph).element_types();
        let of = |name: &str| types.get(name).copied();
        assert_eq!((of("c"), of("s"), of("l")), (Some(DataType::Double), Some(DataType::Int64), Some(DataType::Bool)));
        assert_eq!(
            (of("w"), of("f"), of("r")),
            (Some(DataType::Double), Some(DataType::Float), Some(DataType::Float16))
        );
        assert_eq!(of("m"), None);
    }
}
