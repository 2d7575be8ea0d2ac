//! The walk from the text input to the products that make keys and values, and from each product to its attention.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::super::build::{self, Dim};
use super::super::graph::Topology;
use super::super::model::Model;
use super::super::proto::{NodeProto, TensorProto, ValueInfoProto};
use super::super::tensor::{self, DataType};
use super::{Columns, Projection, Role, Rows, Weight};
use crate::error::{Error, Result};

/// A projection that was found, before it has a name.
pub(super) struct Found {
    pub(super) projection: Projection,
    /// The nodes that may tell its module: the product and the bias.
    pub(super) nodes: Vec<usize>,
    /// The nodes between it and the ends of its attentions.
    pub(super) around: Vec<usize>,
    /// Every attention that it enters.
    pub(super) attentions: Vec<usize>,
}

/// A value that depends on the text alone.
#[derive(Clone, Copy)]
pub(super) struct Text<'g> {
    pub(super) value: &'g str,
    pub(super) rows: Rows,
    /// The graph input.
    pub(super) input: &'g str,
    /// The node that made it something else than the text, if one did.
    pub(super) changed: Option<usize>,
}

/// A step of a walk: a node, and which of its outputs was followed.
#[derive(Clone, Copy)]
pub(super) struct Step {
    pub(super) node: usize,
    pub(super) output: usize,
}

/// A place where a value enters an attention.
pub(super) struct Entry {
    pub(super) role: Role,
    /// The Softmax or the fused attention.
    pub(super) attention: usize,
    /// The way to it.
    pub(super) steps: Vec<Step>,
    /// Where the value holds K and V itself: which index of the second axis from behind.
    pub(super) slot: Option<usize>,
}

pub(super) struct Search<'m> {
    pub(super) model: &'m Model,
    pub(super) topology: Topology<'m>,
    pub(super) types: HashMap<&'m str, DataType>,
}

/// The operators that keep every row of a value by itself and every feature in its place.
const VIEWS: [&str; 9] =
    ["Identity", "Cast", "Dropout", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand"];

/// The operators that quantise an activation or multiply with a quantised weight.
const QUANTISED: [&str; 15] = [
    "QuantizeLinear",
    "DynamicQuantizeLinear",
    "DequantizeLinear",
    "MatMulInteger",
    "MatMulInteger16",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "QLinearMatMul",
    "QGemm",
    "MatMulNBits",
    "MatMulBnb4",
    "MatMulFpQ4",
    "GatherBlockQuantized",
    "QAttention",
    "DynamicQuantizeLSTM",
];

/// The operators between a projection's result and its attention.
pub(super) const TO_ATTENTION: [&str; 22] = [
    "Identity",
    "Cast",
    "Dropout",
    "Reshape",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "Transpose",
    "Expand",
    "Tile",
    "Mul",
    "Div",
    "Slice",
    "Split",
    "SplitToSequence",
    "SequenceAt",
    "Gather",
    "Concat",
    "Pad",
    "LayerNormalization",
    "RMSNormalization",
    "SimplifiedLayerNormalization",
];

/// The operators between the product of queries and keys and the Softmax: scale, mask, layout.
const TO_SOFTMAX: [&str; 15] = [
    "Identity",
    "Cast",
    "Mul",
    "Div",
    "Add",
    "Sub",
    "Where",
    "Clip",
    "Max",
    "Reshape",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "Transpose",
    "Tanh",
];

/// The operators between the Softmax and the product with the values.
const FROM_SOFTMAX: [&str; 10] =
    ["Identity", "Cast", "Dropout", "Where", "Mul", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"];

/// Values that a walk from a projection may meet; real ones meet a few dozen.
const LONGEST_WALK: usize = 1 << 12;

/// The operators that multiply two matrices.
const PRODUCTS: [&str; 4] = ["MatMul", "Gemm", "FusedMatMul", "Einsum"];

pub(super) fn is_one_of(node: &NodeProto, operators: &[&str]) -> bool {
    matches!(node.domain(), "" | "ai.onnx" | "com.microsoft" | "com.microsoft.experimental")
        && operators.contains(&node.op_type())
}

/// An operator and its node, as a message names them.
fn describe(node: &NodeProto) -> String {
    match node.name() {
        "" => format!("{} (the unnamed node that makes {:?})", node.op_type(), node.output.first().map_or("", |v| v)),
        name => format!("{} (node {name:?})", node.op_type()),
    }
}

impl<'m> Search<'m> {
    pub(super) fn new(model: &'m Model) -> Self {
        let topology = model.topology();
        Self { model, types: topology.element_types(), topology }
    }

    pub(super) fn node(&self, index: usize) -> &'m NodeProto {
        &self.topology.graph().node[index]
    }

    /// Walks forward from the text to every key and value.
    pub(super) fn products(&self, text_input: &str) -> Result<Vec<Found>> {
        let graph = self.topology.graph();
        let Some(input) = graph.input.iter().find(|input| input.name() == text_input) else { return Ok(Vec::new()) };
        let rows = if rank(&self.topology, input.name()) == Some(3) { Rows::BatchTokens } else { Rows::Other };
        let input = input.name();
        // What also depends on another input is the image's side.
        let others = graph.input.iter().map(|input| input.name()).filter(|&other| other != input);
        let mixed = self.topology.after(others.filter(|other| self.topology.initializer(other).is_none()));
        let mut open = vec![Text { value: input, rows, input, changed: None }];
        let mut seen: HashSet<&str> = HashSet::from([input]);
        let mut found = Vec::new();
        while let Some(text) = open.pop() {
            for usage in self.topology.uses(text.value) {
                let (Some(position), node) = (usage.input, self.node(usage.node)) else { continue };
                if is_one_of(node, &QUANTISED) {
                    return Err(Error::unsupported(format!(
                        "the text input reaches {}: quantised keys and values can't be steered; export the model in \
                         fp32, fp16 or bf16",
                        describe(node)
                    )));
                }
                if let Some(new) = self.product(text, usage.node, position)? {
                    if let (Some(first), Some(changed)) = (new.first(), text.changed) {
                        return Err(Error::unsupported(format!(
                            "{} makes keys or values of {:?}, which is not the text input {text_input:?} itself: it \
                             passes through {} first",
                            describe(self.node(first.nodes[0])),
                            text.value,
                            describe(self.node(changed))
                        )));
                    }
                    if !new.is_empty() {
                        found.extend(new);
                        continue;
                    }
                }
                if self.calls_function(node) || node.op_type().contains("Attention") {
                    return Err(Error::unsupported(format!(
                        "the text input enters {}, inside which keys and values can't be followed",
                        describe(node)
                    )));
                }
                let view = is_one_of(node, &VIEWS);
                if if view { position != 0 } else { mixed[usage.node] } {
                    continue;
                }
                let changed = text.changed.or((!view).then_some(usage.node));
                let rows = if view { self.rows_after(node, text.rows) } else { Rows::Other };
                for value in node.output.iter().filter(|value| !value.is_empty()) {
                    if seen.insert(value) {
                        open.push(Text { value, rows, input, changed });
                    }
                }
            }
        }
        Ok(found)
    }

    /// Every product with a constant whose result enters an attention as keys or values, but for products of `texts`.
    pub(super) fn products_of_others(&self, texts: &HashSet<&str>) -> Result<Vec<Found>> {
        let mut found = Vec::new();
        for (index, node) in self.topology.graph().node.iter().enumerate() {
            let value = node.input.first().filter(|value| !value.is_empty() && !texts.contains(value.as_str()));
            let Some(value) = value else { continue };
            let fused = is_one_of(node, &["PackedAttention", "PackedMultiHeadAttention"])
                || node.domain() == "com.microsoft" && node.op_type() == "Attention"
                || is_one_of(node, &["MultiHeadAttention", "GroupQueryAttention"])
                    && node.input.get(1).is_none_or(|keys| keys.is_empty());
            if fused {
                return Err(Error::unsupported(format!(
                    "{} makes queries, keys and values of self-attention inside: they can't be told apart; export the model \
                     without fused attention",
                    describe(node)
                )));
            }
            let rows = match rank(&self.topology, value) {
                Some(2) => Rows::Flat,
                Some(3) => Rows::BatchTokens,
                _ => Rows::Other,
            };
            match self.product(Text { value, rows, input: "", changed: None }, index, 0) {
                // A weight that can't be read makes something else.
                Err(_) if !self.enters_attention(node) => {}
                product => found.extend(product?.unwrap_or_default()),
            }
        }
        Ok(found)
    }

    /// Whether what a product makes, with a bias perhaps, are keys or values.
    fn enters_attention(&self, product: &'m NodeProto) -> bool {
        let Some(output) = product.output.first() else { return false };
        let sums = self.topology.consumers(output).filter(|(_, node)| node.is("Add"));
        let values = sums.filter_map(|(_, node)| node.output.first()).chain([output]);
        values.into_iter().any(|value| !self.entries(value).is_empty())
    }

    fn calls_function(&self, node: &NodeProto) -> bool {
        let functions = &self.model.header().functions;
        functions.iter().any(|function| function.name() == node.op_type() && function.domain() == node.domain())
    }

    /// How rows lie after a view.
    fn rows_after(&self, node: &NodeProto, rows: Rows) -> Rows {
        match (node.op_type(), rows) {
            ("Identity" | "Cast" | "Dropout", rows) => rows,
            ("Reshape", Rows::BatchTokens | Rows::Flat) => {
                match node.output.first().and_then(|value| rank(&self.topology, value)) {
                    Some(2) => Rows::Flat,
                    Some(3) => Rows::BatchTokens,
                    _ => Rows::Other,
                }
            }
            ("Flatten", Rows::BatchTokens) if matches!(node.attribute_i("axis"), Some(2 | -1)) => Rows::Flat,
            ("Flatten", Rows::Flat) if matches!(node.attribute_i("axis"), None | Some(1 | -1)) => Rows::Flat,
            ("Transpose", Rows::BatchTokens) if node.attribute_ints("perm") == Some(&[0, 1, 2]) => rows,
            _ => Rows::Other,
        }
    }

    /// The projections that a node is, if it multiplies the text with a constant: `None` if it does not, none in the
    /// list if the product is used for something else than keys and values.
    fn product(&self, text: Text<'m>, index: usize, position: usize) -> Result<Option<Vec<Found>>> {
        let node = self.node(index);
        if position != 0 || !is_one_of(node, &["MatMul", "Gemm", "FusedMatMul"]) {
            return Ok(None);
        }
        let Some(factor) = node.input.get(1) else { return Ok(None) };
        let Some(weight) = self.weight(factor)? else { return Ok(None) };
        let flag = |name| node.attribute_i(name).unwrap_or(0) != 0;
        let scale = |name| node.attribute_f(name).unwrap_or(1.0) == 1.0;
        let transposed = flag("transB");
        let out_by_in = weight.transposed != transposed;
        let [rows, columns] = match (weight.dims, out_by_in) {
            ([rows, columns], false) => [rows, columns],
            ([rows, columns], true) => [columns, rows],
        };

        // The bias is the Gemm's third input, or the other operand of an Add.
        let Some(mut output) = node.output.first().map(String::as_str) else { return Ok(None) };
        let mut nodes = vec![index];
        let mut bias = None;
        match node.input.get(2).map(String::as_str).filter(|name| !name.is_empty()) {
            Some(name) => match self.folded(name) {
                Some(tensor) => bias = Some(tensor.name),
                None => return Ok(None),
            },
            None => {
                if let [usage] = self.topology.uses(output)
                    && self.node(usage.node).is("Add")
                    && let [a, b] = &self.node(usage.node).input[..]
                    && let Some(sum) = self.node(usage.node).output.first()
                    && let other = if usage.input == Some(0) { b } else { a }
                    && let Some(tensor) = self.folded(other)
                    && (tensor.elements() == columns || tensor.elements() == 1)
                    && tensor.tensor.dims.last().is_none_or(|&last| last as usize == tensor.elements())
                {
                    bias = Some(tensor.name);
                    output = sum;
                    nodes.push(usage.node);
                }
            }
        }

        let entries = self.entries(output);
        if entries.is_empty() {
            return Ok(Some(Vec::new()));
        }
        if flag("transA") || flag("transBatchA") || flag("transBatchB") || !scale("alpha") || !scale("beta") {
            return Err(Error::unsupported(format!(
                "{} makes keys or values with a transposed text or a scaled product",
                describe(node)
            )));
        }
        let mut parts: BTreeMap<Role, (Columns, Vec<usize>, Vec<usize>)> = BTreeMap::new();
        let packed = entries.iter().any(|entry| entry.slot.is_some() || entry.role != entries[0].role);
        for entry in &entries {
            let picked = match packed {
                false => Columns::all(columns),
                true => self.picked(output, columns, text, entry).ok_or_else(|| {
                    Error::unsupported(format!(
                        "{} makes keys and values in one product, and how they are taken apart can't be followed",
                        describe(node)
                    ))
                })?,
            };
            let (known, around, attentions) = parts.entry(entry.role).or_insert((picked, Vec::new(), Vec::new()));
            if *known != picked {
                return Err(Error::unsupported(format!(
                    "{} makes keys or values of several attentions in one product",
                    describe(node)
                )));
            }
            around.extend(entry.steps.iter().map(|step| step.node).chain([entry.attention]));
            attentions.push(entry.attention);
        }
        let found = parts.into_iter().map(|(role, (picked, around, attentions))| Found {
            projection: Projection {
                path: String::new(),
                role,
                weight: Weight {
                    name: weight.name.to_owned(),
                    data_type: weight.data_type,
                    out_by_in,
                    users: self.topology.uses(weight.name).len().max(attentions.len()),
                },
                bias: bias.map(str::to_owned),
                columns: picked,
                product_columns: columns,
                in_features: rows,
                out_features: picked.len(),
                text_input: text.input.to_owned(),
                input: text.value.to_owned(),
                output: output.to_owned(),
                data_type: self.types.get(output).copied(),
                rows: text.rows,
                attention: attentions.iter().copied().min().unwrap_or_default(),
            },
            nodes: nodes.clone(),
            around,
            attentions,
        });
        Ok(Some(found.collect()))
    }

    /// Fails unless every attention that was met has both its keys and its values from the text.
    pub(super) fn pair(&self, found: &[Found]) -> Result<()> {
        for one in found {
            let role = one.projection.role;
            let meets = |attention: usize| {
                found.iter().any(|other| other.projection.role != role && other.attentions.contains(&attention))
            };
            if let Some(&attention) = one.attentions.iter().find(|&&attention| !meets(attention)) {
                let (this, other) = match role {
                    Role::Key => ("keys", "values"),
                    Role::Value => ("values", "keys"),
                };
                return Err(Error::unsupported(format!(
                    "{} gives {this} to the attention of {}, whose {other} were not found",
                    describe(self.node(one.nodes[0])),
                    describe(self.node(attention))
                )));
            }
        }
        Ok(())
    }

    /// The stored matrix behind a factor, through casts and transposes.
    fn weight(&self, value: &'m str) -> Result<Option<StoredMatrix<'m>>> {
        let Some(stored) = self.folded(value) else { return Ok(None) };
        if let Some(node) = stored.quantised {
            return Err(Error::unsupported(format!(
                "keys or values are made with a weight that passes through {}: quantised ones can't be steered; export the \
                 model in fp32, fp16 or bf16",
                describe(self.node(node))
            )));
        }
        let dims: Option<Vec<usize>> = stored.tensor.dims.iter().map(|&dim| usize::try_from(dim).ok()).collect();
        let (Some(&[rows, columns]), Ok(data_type)) = (dims.as_deref(), DataType::try_from(stored.tensor.data_type()))
        else {
            return Ok(None);
        };
        if rows == 0 || columns == 0 || !data_type.is_float() {
            return Ok(None);
        }
        Ok(Some(StoredMatrix { name: stored.name, data_type, dims: [rows, columns], transposed: stored.transposed }))
    }

    /// The tensor that a value is computed from by nothing but casts, transposes and dequantisation.
    fn folded(&self, value: &'m str) -> Option<Stored<'m>> {
        let (mut value, mut transposed, mut quantised) = (value, false, None);
        // A graph may hold a cycle; no sound one has a chain of constants this long.
        for _ in 0..16 {
            if let Some(tensor) = self.topology.initializer(value).or_else(|| self.topology.constant(value)) {
                return Some(Stored { name: value, tensor, transposed, quantised });
            }
            let (index, node) = self.topology.producer(value)?;
            if is_one_of(node, &["DequantizeLinear", "DequantizeBFP", "MatMulNBits"]) {
                quantised = Some(index);
            } else if node.is("Transpose") {
                match node.attribute_ints("perm") {
                    None | Some([1, 0]) => transposed = !transposed,
                    Some([0, 1]) => {}
                    _ => return None,
                }
            } else if !is_one_of(node, &["Identity", "Cast", "CastLike"]) {
                return None;
            }
            value = node.input.first()?;
        }
        None
    }

    /// Every place where a value enters an attention as keys or values.
    fn entries(&self, value: &'m str) -> Vec<Entry> {
        let mut entries = Vec::new();
        let mut seen: HashSet<&str> = HashSet::from([value]);
        let mut open: Vec<(&str, Vec<Step>)> = vec![(value, Vec::new())];
        while let Some((value, steps)) = open.pop().filter(|_| seen.len() < LONGEST_WALK) {
            for usage in self.topology.uses(value) {
                let (Some(input), node) = (usage.input, self.node(usage.node)) else { continue };
                let given = |index: usize| node.input.get(index).is_some_and(|name| !name.is_empty());
                let mut add = |role, attention, slot| {
                    entries.push(Entry { role, attention, steps: steps.clone(), slot });
                };
                let fused = is_one_of(node, &["MultiHeadAttention", "GroupQueryAttention"]) || node.is("Attention");
                if fused {
                    match (input, given(2)) {
                        (1, true) => add(Role::Key, usage.node, None),
                        (2, true) => add(Role::Value, usage.node, None),
                        // One tensor [batch, tokens, heads, 2, head size].
                        (1, false) => {
                            add(Role::Key, usage.node, Some(0));
                            add(Role::Value, usage.node, Some(1));
                        }
                        _ => {}
                    }
                } else if is_one_of(node, &PRODUCTS) && input < 2 {
                    let Some(other) = node.input.get(1 - input) else { continue };
                    if let Some(softmax) = self.softmax_behind(other) {
                        add(Role::Value, softmax, None);
                    } else if let Some((softmax, turned)) = node.output.first().and_then(|value| self.softmax_ahead(value))
                        // Softmax runs over the keys, the last axis, to which the second factor gives its columns; the
                        // first factor of such a product is the queries.
                        && (input == 1) != turned
                    {
                        add(Role::Key, softmax, None);
                    }
                } else if is_one_of(node, &TO_ATTENTION) && (input == 0 || is_one_of(node, &["Mul", "Div", "Concat"])) {
                    for (output, value) in node.output.iter().enumerate().filter(|(_, value)| !value.is_empty()) {
                        if seen.insert(value) {
                            let mut steps = steps.clone();
                            steps.push(Step { node: usage.node, output });
                            open.push((value, steps));
                        }
                    }
                }
            }
        }
        entries
    }

    /// The Softmax whose result a value is.
    fn softmax_behind(&self, value: &str) -> Option<usize> {
        let mut open = vec![value];
        let mut seen: HashSet<&str> = HashSet::new();
        while let Some(value) = open.pop().filter(|_| seen.len() < LONGEST_WALK) {
            let Some((index, node)) = self.topology.producer(value) else { continue };
            if node.is("Softmax") {
                return Some(index);
            }
            if is_one_of(node, &FROM_SOFTMAX) {
                // Shapes and conditions come after the first input, except in Where.
                let inputs = if is_one_of(node, &["Where", "Mul"]) { node.input.len() } else { 1 };
                open.extend(
                    node.input
                        .iter()
                        .take(inputs)
                        .map(String::as_str)
                        .filter(|&value| !value.is_empty() && seen.insert(value)),
                );
            }
        }
        None
    }

    /// The Softmax that a product of queries and keys enters, and whether its last two axes are exchanged on the way.
    fn softmax_ahead(&self, value: &'m str) -> Option<(usize, bool)> {
        let mut open = vec![(value, false)];
        let mut seen: HashSet<&str> = HashSet::from([value]);
        while let Some((value, turned)) = open.pop().filter(|_| seen.len() < LONGEST_WALK) {
            for (index, node) in self.topology.consumers(value) {
                if node.is("Softmax") {
                    return Some((index, turned));
                }
                if is_one_of(node, &TO_SOFTMAX) {
                    let turned = turned != (node.is("Transpose") && turns_last_axes(node));
                    open.extend(
                        node.output.iter().filter(|value| seen.insert(value)).map(|value| (value.as_str(), turned)),
                    );
                }
            }
        }
        None
    }
}

/// Whether a Transpose exchanges the last two axes.
fn turns_last_axes(node: &NodeProto) -> bool {
    match node.attribute_ints("perm") {
        Some(perm) => perm.last().is_some_and(|&last| last != perm.len() as i64 - 1),
        None => true,
    }
}

/// A constant and what lies between it and its user.
struct Stored<'m> {
    name: &'m str,
    tensor: &'m TensorProto,
    transposed: bool,
    quantised: Option<usize>,
}

impl Stored<'_> {
    fn elements(&self) -> usize {
        tensor::checked_elements(&self.tensor.dims).and_then(|count| count.try_into().ok()).unwrap_or(0)
    }
}

struct StoredMatrix<'m> {
    name: &'m str,
    data_type: DataType,
    dims: [usize; 2],
    transposed: bool,
}

/// The number of axes of a value, if the graph tells it.
pub(super) fn rank(topology: &Topology<'_>, value: &str) -> Option<usize> {
    if let Some(info) = topology.value_info(value)
        && let Some(dims) = declared_sizes(info)
    {
        return Some(dims.len());
    }
    let (_, node) = topology.producer(value)?;
    match node.op_type() {
        "Reshape" => length(topology, node.input.get(1)?, 0),
        _ => None,
    }
}

/// The number of entries of a list of integers that a graph computes.
fn length(topology: &Topology<'_>, value: &str, depth: usize) -> Option<usize> {
    if let Some(tensor) = topology.initializer(value).or_else(|| topology.constant(value)) {
        return match tensor.dims[..] {
            [] => Some(1),
            [count] => usize::try_from(count).ok(),
            _ => None,
        };
    }
    let (_, node) = topology.producer(value).filter(|_| depth < 8)?;
    match node.op_type() {
        "Concat" => node.input.iter().map(|part| length(topology, part, depth + 1)).sum(),
        "Unsqueeze" => Some(1),
        "Cast" | "Identity" => length(topology, node.input.first()?, depth + 1),
        "Shape" if node.attribute.is_empty() => rank(topology, node.input.first()?),
        "Reshape" => Some(1),
        "Constant" => node.attribute_ints("value_ints").map(<[i64]>::len),
        _ => None,
    }
}

/// The declared sizes of a value, those that are fixed; `None` if not even the rank is declared.
pub(super) fn declared_sizes(info: &ValueInfoProto) -> Option<Vec<Option<i64>>> {
    let size = |dim: Dim| match dim {
        Dim::Fixed(size) => Some(size),
        Dim::Named(_) | Dim::Any => None,
    };
    Some(build::declared_dims(info)?.into_iter().map(size).collect())
}
