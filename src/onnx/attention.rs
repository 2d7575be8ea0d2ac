//! Where a diffusion model's text becomes the keys and values of its cross-attention.
//!
//! An exported weight keeps neither its name nor its layout, and exporters disagree on both. What they all keep is the
//! structure: the text input reaches a matrix product with a constant weight, whose result meets the queries in front
//! of a Softmax (a key) or the Softmax's result (a value), or enters a fused attention operator at a known place. So
//! [`find`] walks forward from the text input and never trusts a name or an order; names serve only to tell which module
//! of the model a projection is. This file knows graphs, but not what is done with the weights.

use std::collections::{BTreeMap, HashMap, HashSet};

use bytes::Bytes;

use super::build::{self, Dim};
use super::edit::Edit;
use super::graph::Topology;
use super::model::Model;
use super::proto::{NodeProto, TensorProto, ValueInfoProto};
use super::tensor::DataType;
use crate::error::{Error, Result};

/// The usual name of the text input of an exported UNet.
pub const TEXT_INPUT: &str = "encoder_hidden_states";

/// What a projection gives to its attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// K: compared with the queries.
    Key,
    /// V: averaged by the attention's weights.
    Value,
}

impl Role {
    /// The name of the linear layer in a diffusers attention module: `to_k` or `to_v`.
    pub fn module(self) -> &'static str {
        match self {
            Self::Key => "to_k",
            Self::Value => "to_v",
        }
    }
}

/// Which columns of a product belong to a projection: `blocks` runs of `width` columns, the first one at `first`, one
/// beginning every `stride` columns. A product that holds K alone is one block; one that holds K and V side by side, or
/// head by head, is shared by two projections with different `first`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Columns {
    /// The first column.
    pub first: usize,
    /// The number of runs; at least 1.
    pub blocks: usize,
    /// Columns of a run; at least 1.
    pub width: usize,
    /// From the beginning of a run to that of the next; at least `width`.
    pub stride: usize,
}

impl Columns {
    /// The first `count` columns.
    pub fn all(count: usize) -> Self {
        Self { first: 0, blocks: 1, width: count, stride: count }
    }

    /// The number of columns.
    pub fn len(&self) -> usize {
        self.blocks * self.width
    }

    /// Whether there is none; never true for a projection that was found.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The columns of the product in the order of the projection's features.
    pub fn iter(self) -> impl Iterator<Item = usize> {
        (0..self.blocks).flat_map(move |block| {
            let begin = self.first + block * self.stride;
            begin..begin + self.width
        })
    }

    /// The columns in this order, if they are evenly spaced runs.
    fn from_order(order: &[usize]) -> Option<Self> {
        let first = *order.first()?;
        let width = order.iter().enumerate().take_while(|&(offset, &column)| column == first + offset).count();
        let stride = match order.get(width) {
            Some(next) => next.checked_sub(first).filter(|&stride| stride >= width)?,
            None => width,
        };
        let columns = Self { first, blocks: order.len().div_ceil(width), width, stride };
        columns.iter().eq(order.iter().copied()).then_some(columns)
    }
}

/// The constant that a projection multiplies the text with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weight {
    /// The initializer's name, or the output of the `Constant` node that holds it.
    pub name: String,
    /// The stored element type; the graph may cast it to another before the product.
    pub data_type: DataType,
    /// Whether it is stored `[out, in]`, as torch has it; otherwise `[in, out]`, as the product needs it.
    pub out_by_in: bool,
    /// The number of products in the graph that use it: above 1 the weight is shared by several modules.
    pub users: usize,
}

/// A linear layer that makes the keys or the values of one attention from the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Projection {
    /// The layer's place in the model as diffusers names it, whatever the exporter wrote, e.g.
    /// `down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k`. A packed layer (`to_kv`) appears as its two parts.
    /// If the export tells no module, `cross_attention.N.to_k` by the order of the attentions in the graph.
    pub path: String,
    /// Whether it makes keys or values.
    pub role: Role,
    /// The weight of the product.
    pub weight: Weight,
    /// The name of the constant that is added to the product, if any; it has as many entries as the product columns.
    pub bias: Option<String>,
    /// Which columns of the product, of the weight and of the bias are this projection's.
    pub columns: Columns,
    /// The columns of the product in all; more than [`Projection::out_features`] if it is packed.
    pub product_columns: usize,
    /// The width of the text's embedding.
    pub in_features: usize,
    /// The width of the keys or values: all heads.
    pub out_features: usize,
    /// The graph input that the text comes from, `[batch, tokens, in_features]`.
    pub text_input: String,
    /// The value that the product reads: the text input, or a view of it.
    pub input: String,
    /// The value that holds the keys or values (at [`Projection::columns`]), bias included.
    pub output: String,
    /// The element type of [`Projection::output`], if the graph tells it.
    pub data_type: Option<DataType>,
    /// How the rows of [`Projection::output`] lie.
    pub rows: Rows,
    /// The index of the node that is the attention's Softmax, or the fused attention: equal for the K and the V of one.
    /// The first one if several attentions use the same keys.
    pub attention: usize,
}

/// How the rows of a view of the text `[batch, tokens, features]` lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Rows {
    /// `[batch, tokens, features]`.
    BatchTokens,
    /// `[batch * tokens, features]`.
    Flat,
    /// In a way that this library does not follow (the text was expanded or its axes were exchanged).
    Other,
}

impl Projection {
    /// The projection's weight as stored: `[out_features, in_features]`, row-major, little-endian elements of
    /// [`Weight::data_type`], whatever the model's layout is.
    pub fn read_weight(&self, model: &Model) -> Result<Bytes> {
        let topology = model.topology();
        let tensor = model.tensor(constant(&topology, &self.weight.name)?)?;
        let data = tensor.read()?;
        let size = data.len().checked_div(tensor.elements()).unwrap_or(0);
        let columns = self.product_columns;
        if tensor.elements() != columns * self.in_features {
            return Err(Error::invalid_argument(format!(
                "{}: weight {:?} has shape {:?}: the projection was found in another model",
                self.path,
                self.weight.name,
                tensor.dims()
            )));
        }
        if self.weight.out_by_in && self.columns == Columns::all(columns) {
            return Ok(data);
        }
        let length = self.out_features * self.in_features * size;
        let mut out: Vec<u8> = Vec::new();
        out.try_reserve_exact(length)?;
        if self.weight.out_by_in {
            let row = self.in_features * size;
            for column in self.columns.iter() {
                out.extend_from_slice(&data[column * row..(column + 1) * row]);
            }
        } else {
            out.resize(length, 0);
            let order: Vec<usize> = self.columns.iter().collect();
            transpose(&data, columns, &order, self.in_features, size, &mut out);
        }
        Ok(out.into())
    }

    /// The projection's bias: `[out_features]` as f32; `None` if it has none.
    pub fn read_bias(&self, model: &Model) -> Result<Option<Vec<f32>>> {
        let Some(name) = &self.bias else { return Ok(None) };
        let values = model.tensor(constant(&model.topology(), name)?)?.to_f32()?;
        // A bias of one entry is added to every column.
        let entry = |column: usize| values.get(if values.len() == 1 { 0 } else { column }).copied();
        let picked = self.columns.iter().map(entry).collect::<Option<Vec<f32>>>();
        picked.map(Some).ok_or_else(|| {
            Error::invalid_argument(format!("{}: bias {name:?} has {} entries", self.path, values.len()))
        })
    }
}

/// Writes `source` `[rows, columns]` as `[order.len(), rows]`, taking the columns in that order. Goes over tiles, so
/// that neither side is walked with a stride longer than a tile.
fn transpose(source: &[u8], columns: usize, order: &[usize], rows: usize, size: usize, target: &mut [u8]) {
    const TILE: usize = 32;
    for (tile, picked) in order.chunks(TILE).enumerate() {
        for begin in (0..rows).step_by(TILE) {
            for (offset, &column) in picked.iter().enumerate() {
                for row in begin..rows.min(begin + TILE) {
                    let from = (row * columns + column) * size;
                    let to = ((tile * TILE + offset) * rows + row) * size;
                    target[to..to + size].copy_from_slice(&source[from..from + size]);
                }
            }
        }
    }
}

fn constant<'g>(topology: &Topology<'g>, name: &str) -> Result<&'g TensorProto> {
    topology
        .initializer(name)
        .or_else(|| topology.constant(name))
        .ok_or_else(|| Error::not_found(format!("the graph has no constant {name:?}")))
}

/// Every projection that makes keys or values of the text input, ordered by [`Projection::path`] (byte order).
///
/// Errors: [`crate::Status::NotFound`] if the graph has no such input; [`crate::Status::Unsupported`], naming the
/// operator and the node, if the weights are quantised, if the text passes through something else before the keys and
/// values, or if nothing was found.
pub fn find(model: &Model, text_input: &str) -> Result<Vec<Projection>> {
    let topology = model.topology();
    let graph = model.graph();
    let names = || graph.input.iter().map(|input| input.name()).collect::<Vec<_>>().join(", ");
    if !graph.input.iter().any(|input| input.name() == text_input) {
        return Err(Error::not_found(format!("the model has no input {text_input:?}; its inputs are {}", names())));
    }
    let search = Search { model, types: topology.element_types(), topology };
    let mut found = search.products(text_input)?;
    if found.is_empty() {
        return Err(Error::unsupported(format!(
            "no cross-attention reads the input {text_input:?}: no key or value was found among the products that it \
             reaches; the model's inputs are {}",
            names()
        )));
    }
    search.pair(&found)?;
    search.name(&mut found);
    let mut projections: Vec<Projection> = found.into_iter().map(|found| found.projection).collect();
    projections.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(projections)
}

/// A graph input that takes the keys or values of a projection: see [`externalise`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyValueInput {
    /// The projection's [`Projection::path`].
    pub path: String,
    /// Whether it takes keys or values.
    pub role: Role,
    /// The input's name: the path, unless a value of that name was there.
    pub name: String,
    /// The element type of the input.
    pub data_type: DataType,
    /// The last size of its shape `[batch, tokens, out_features]`.
    pub out_features: usize,
}

/// Gives every projection's result an input `[batch, tokens, out_features]`, bias included, and drops the products and
/// the weights that nothing else uses. The inputs come in the order of `projections`, behind those that the model has.
///
/// The model then computes what it did when each input is the text times the projection's weight plus its bias, batch
/// and tokens being those of the text input. That input stays and must still be given with the right shape: exports
/// take sizes from it.
///
/// Errors: [`crate::Status::Unsupported`] if the rows of a projection lie in another way than the text's, or if only a
/// part of a packed product is among `projections`; [`crate::Status::NotFound`] if `projections` are not this model's.
/// The model is then as before.
pub fn externalise(model: &mut Model, projections: &[Projection]) -> Result<Vec<KeyValueInput>> {
    model.edit(|edit| {
        let mut inputs: Vec<KeyValueInput> = Vec::with_capacity(projections.len());
        for projection in projections {
            let data_type = projection.data_type.filter(|data_type| data_type.is_float()).ok_or_else(|| {
                Error::unsupported(format!("{}: its element type is not a floating type", projection.path))
            })?;
            let text = edit.graph().input.iter().find(|input| input.name() == projection.text_input);
            let mut dims = text.and_then(build::declared_dims).unwrap_or_default();
            if dims.len() != 3 {
                return Err(Error::unsupported(format!(
                    "the input {:?} has {} axes, expected [batch, tokens, features]",
                    projection.text_input,
                    dims.len()
                )));
            }
            dims[2] = Dim::Fixed(projection.out_features as i64);
            let name = edit.fresh_name(&projection.path);
            edit.graph_mut().input.push(build::value(&name, data_type, Some(&dims)));
            inputs.push(KeyValueInput {
                path: projection.path.clone(),
                role: projection.role,
                name,
                data_type,
                out_features: projection.out_features,
            });
        }
        let mut products: BTreeMap<&str, Vec<(&Projection, &KeyValueInput)>> = BTreeMap::new();
        for pair in projections.iter().zip(&inputs) {
            products.entry(&pair.0.output).or_default().push(pair);
        }
        for (output, mut parts) in products {
            parts.sort_by_key(|(projection, _)| projection.columns.first);
            let value = packed(edit, output, &parts)?;
            if !edit.graph().node.iter().any(|node| node.output.iter().any(|name| name == output)) {
                return Err(Error::not_found(format!("the graph has no value {output:?}: found in another model?")));
            }
            edit.redirect(output, &value);
        }
        edit.drop_unused();
        Ok(inputs)
    })
}

/// Adds the nodes that bring inputs into the layout of the product that they stand for, and answers its new value.
fn packed(edit: &mut Edit, output: &str, parts: &[(&Projection, &KeyValueInput)]) -> Result<String> {
    let [(first, input), ..] = parts else { return Ok(output.to_owned()) };
    let Columns { blocks, .. } = first.columns;
    let width: usize = parts.iter().map(|(projection, _)| projection.columns.width).sum();
    let mut next = 0;
    for (projection, _) in parts {
        let columns = projection.columns;
        let fits = columns.first == next && columns.blocks == blocks && (blocks == 1 || columns.stride == width);
        if !fits || projection.rows == Rows::Other || projection.rows != first.rows {
            return Err(Error::unsupported(format!(
                "{}: what makes it can't be replaced by an input: its rows are not the text's rows, or its product makes \
                 more than the keys and values that were asked for",
                projection.path
            )));
        }
        next += columns.width;
    }
    if next * blocks != first.product_columns {
        return Err(Error::unsupported(format!(
            "{}: its product makes more than the keys and values that were asked for",
            first.path
        )));
    }
    let reshape = |edit: &mut Edit, value: &str, shape: &[i64]| {
        let (name, dims) = (edit.fresh_name(&format!("{value}/rows")), edit.fresh_name(&format!("{value}/shape")));
        edit.graph_mut().initializer.push(build::tensor_i64(&dims, &[shape.len()], shape));
        edit.graph_mut().node.push(build::node("Reshape", [value, &dims], [name.as_str()]).named(&name));
        name
    };
    let mut value = input.name.clone();
    if parts.len() > 1 {
        let mut values = Vec::with_capacity(parts.len());
        for (projection, input) in parts {
            let columns = projection.columns;
            values.push(match blocks {
                1 => input.name.clone(),
                _ => reshape(edit, &input.name, &[0, 0, blocks as i64, columns.width as i64]),
            });
        }
        value = edit.fresh_name(&format!("{output}/packed"));
        let node = build::node("Concat", values.iter().map(String::as_str), [value.as_str()]);
        edit.graph_mut().node.push(node.with("axis", -1).named(&value));
        if blocks > 1 {
            value = reshape(edit, &value, &[0, 0, first.product_columns as i64]);
        }
    }
    if first.rows == Rows::Flat {
        value = reshape(edit, &value, &[-1, first.product_columns as i64]);
    }
    Ok(value)
}

/// A projection that was found, before it has a name.
struct Found {
    projection: Projection,
    /// The nodes that may tell its module: the product and the bias.
    nodes: Vec<usize>,
    /// The nodes between it and the ends of its attentions.
    around: Vec<usize>,
    /// Every attention that it enters.
    attentions: Vec<usize>,
}

/// A value that depends on the text alone.
#[derive(Clone, Copy)]
struct Text<'g> {
    value: &'g str,
    rows: Rows,
    /// The graph input.
    input: &'g str,
    /// The node that made it something else than the text, if one did.
    changed: Option<usize>,
}

/// A step of a walk: a node, and which of its outputs was followed.
#[derive(Clone, Copy)]
struct Step {
    node: usize,
    output: usize,
}

/// A place where a value enters an attention.
struct Entry {
    role: Role,
    /// The Softmax or the fused attention.
    attention: usize,
    /// The way to it.
    steps: Vec<Step>,
    /// Where the value holds K and V itself: which index of the second axis from behind.
    slot: Option<usize>,
}

struct Search<'m> {
    model: &'m Model,
    topology: Topology<'m>,
    types: HashMap<&'m str, DataType>,
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

/// The operators that may stand between the text and its projections in models that change the text first.
const CHANGES: [&str; 23] = [
    "MatMul",
    "Gemm",
    "FusedMatMul",
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Concat",
    "Slice",
    "Split",
    "Gather",
    "Pad",
    "Where",
    "LayerNormalization",
    "RMSNormalization",
    "SkipLayerNormalization",
    "Relu",
    "Gelu",
    "Erf",
    "Tanh",
    "Sigmoid",
    "Conv",
    "Clip",
];

/// The operators between a projection's result and its attention.
const TO_ATTENTION: [&str; 20] = [
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

/// The operators that multiply two matrices.
const PRODUCTS: [&str; 4] = ["MatMul", "Gemm", "FusedMatMul", "Einsum"];

fn is_one_of(node: &NodeProto, operators: &[&str]) -> bool {
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
    fn node(&self, index: usize) -> &'m NodeProto {
        &self.topology.graph().node[index]
    }

    /// Walks forward from the text to every key and value.
    fn products(&self, text_input: &str) -> Result<Vec<Found>> {
        let graph = self.topology.graph();
        let Some(input) = graph.input.iter().find(|input| input.name() == text_input) else { return Ok(Vec::new()) };
        let rows = if rank(&self.topology, input.name()) == Some(3) { Rows::BatchTokens } else { Rows::Other };
        let input = input.name();
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
                if !(view && position == 0 || !view && is_one_of(node, &CHANGES)) {
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

    fn calls_function(&self, node: &NodeProto) -> bool {
        let functions = &self.model.header().functions;
        functions.iter().any(|function| function.name() == node.op_type() && function.domain() == node.domain())
    }

    /// How rows lie after a view.
    fn rows_after(&self, node: &NodeProto, rows: Rows) -> Rows {
        match (node.op_type(), rows) {
            ("Identity" | "Cast" | "Dropout", rows) => rows,
            ("Reshape", Rows::BatchTokens | Rows::Flat) => match rank(&self.topology, &node.output[0]) {
                Some(2) => Rows::Flat,
                Some(3) => Rows::BatchTokens,
                _ => Rows::Other,
            },
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
        let mut output = node.output[0].as_str();
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
                    && let Some(other) = usage.input.and_then(|input| self.node(usage.node).input.get(1 - input))
                    && let Some(tensor) = self.folded(other)
                    && (tensor.elements() == columns || tensor.elements() == 1)
                    && tensor.tensor.dims.last().is_none_or(|&last| last as usize == tensor.elements())
                {
                    bias = Some(tensor.name);
                    output = &self.node(usage.node).output[0];
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
                    users: self.topology.uses(weight.name).len(),
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

    /// The stored matrix behind a factor, through casts and transposes.
    fn weight(&self, value: &'m str) -> Result<Option<StoredMatrix<'m>>> {
        let Some(stored) = self.folded(value) else { return Ok(None) };
        if let Some(node) = stored.quantised {
            return Err(Error::unsupported(format!(
                "the text input is multiplied with a weight that passes through {}: quantised keys and values can't be \
                 steered; export the model in fp32, fp16 or bf16",
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
        while let Some((value, steps)) = open.pop() {
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
                    } else if let Some((softmax, turned)) = self.softmax_ahead(&node.output[0])
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
        while let Some(value) = open.pop() {
            let Some((index, node)) = self.topology.producer(value) else { continue };
            if node.is("Softmax") {
                return Some(index);
            }
            if is_one_of(node, &FROM_SOFTMAX) {
                // Shapes and conditions come after the first input, except in Where.
                let inputs = if is_one_of(node, &["Where", "Mul"]) { &node.input[..] } else { &node.input[..1] };
                open.extend(inputs.iter().map(String::as_str).filter(|&value| !value.is_empty() && seen.insert(value)));
            }
        }
        None
    }

    /// The Softmax that a product of queries and keys enters, and whether its last two axes are exchanged on the way.
    fn softmax_ahead(&self, value: &'m str) -> Option<(usize, bool)> {
        let mut open = vec![(value, false)];
        let mut seen: HashSet<&str> = HashSet::from([value]);
        while let Some((value, turned)) = open.pop() {
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
        Some(perm) => perm.last().is_some_and(|&last| last + 1 != perm.len() as i64),
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
        super::tensor::checked_elements(&self.tensor.dims).and_then(|count| count.try_into().ok()).unwrap_or(0)
    }
}

struct StoredMatrix<'m> {
    name: &'m str,
    data_type: DataType,
    dims: [usize; 2],
    transposed: bool,
}

/// The number of axes of a value, if the graph tells it.
fn rank(topology: &Topology<'_>, value: &str) -> Option<usize> {
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
fn declared_sizes(info: &ValueInfoProto) -> Option<Vec<Option<i64>>> {
    let size = |dim: Dim| match dim {
        Dim::Fixed(size) => Some(size),
        Dim::Named(_) | Dim::Any => None,
    };
    Some(build::declared_dims(info)?.into_iter().map(size).collect())
}

impl Search<'_> {
    /// Fails unless every attention that was met has both its keys and its values from the text.
    fn pair(&self, found: &[Found]) -> Result<()> {
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

    /// Gives every projection its module's path.
    fn name(&self, found: &mut [Found]) {
        let mut attentions: Vec<usize> = found.iter().map(|one| one.projection.attention).collect();
        attentions.sort_unstable();
        attentions.dedup();
        let mut modules: HashMap<usize, String> = HashMap::new();
        for one in found.iter_mut() {
            let own = one.nodes.iter().find_map(|&node| module_of(self.node(node)));
            if let Some(path) = own.as_deref().and_then(|path| layer_path(path, one.projection.role)) {
                if let Some((attention, _)) = path.rsplit_once('.') {
                    modules.insert(one.projection.attention, attention.to_owned());
                }
                one.projection.path = path;
            }
        }
        for one in found.iter_mut().filter(|one| one.projection.path.is_empty()) {
            let Projection { attention, role, .. } = one.projection;
            let around = || {
                let nodes = one.nodes.iter().chain(&one.around).map(|&node| self.node(node));
                nodes.filter_map(module_of).find_map(|path| attention_path(&path))
            };
            let module = modules.get(&attention).cloned().or_else(around).or_else(|| self.module_after(attention));
            let number = attentions.binary_search(&attention).unwrap_or_default();
            let module = module.unwrap_or_else(|| format!("cross_attention.{number}"));
            one.projection.path = format!("{module}.{}", role.module());
        }
        // A module that runs twice in one graph gives its projections the same path.
        let mut order: Vec<usize> = (0..found.len()).collect();
        order.sort_by_key(|&index| found[index].projection.attention);
        let mut seen: HashMap<String, usize> = HashMap::new();
        for index in order {
            let path = &mut found[index].projection.path;
            let count = seen.entry(path.clone()).or_insert(0);
            *count += 1;
            if *count > 1 {
                path.push_str(&format!("#{count}"));
            }
        }
    }

    /// The module of an attention by the names of the layer that its result enters: `to_out.0`.
    fn module_after(&self, attention: usize) -> Option<String> {
        let mut open = vec![(self.node(attention).output.first()?.as_str(), 0)];
        while let Some((value, depth)) = open.pop() {
            for (_, node) in self.topology.consumers(value).filter(|_| depth < 12) {
                if let Some(path) = module_of(node).and_then(|path| attention_path(&path)) {
                    return Some(path);
                }
                if is_one_of(node, &TO_ATTENTION) || is_one_of(node, &["MatMul", "Einsum"]) {
                    open.extend(node.output.iter().map(|value| (value.as_str(), depth + 1)));
                }
            }
        }
        None
    }
}

/// The module that a node was exported from, with dots, as the exporter recorded it.
fn module_of(node: &NodeProto) -> Option<String> {
    let metadata = |key: &str| node.metadata_props.iter().find(|entry| entry.key() == key).map(|entry| entry.value());
    // ['', 'down_blocks.0', ..., 'down_blocks.0. ... .attn2.to_k', 'linear_8']: the last entry is the operation.
    if let Some(scopes) = metadata("pkg.torch.onnx.name_scopes") {
        let entries: Vec<&str> = scopes.split('\'').skip(1).step_by(2).collect();
        if let [.., module, _] = entries[..]
            && !module.is_empty()
        {
            return Some(normalized(module));
        }
    }
    // ": Model/down_blocks.0: Block/ ... /down_blocks.0. ... .to_k: Linear/linear_8: aten.linear.default"
    if let Some(namespace) = metadata("namespace") {
        let entries: Vec<&str> = namespace.split('/').filter_map(|entry| Some(entry.split_once(": ")?.0)).collect();
        if let [.., module, _] = entries[..]
            && !module.is_empty()
        {
            return Some(normalized(module));
        }
    }
    // "/down_blocks.0/attentions.0/transformer_blocks.0/attn2/to_k/MatMul"
    let (scope, _) = node.name().rsplit_once('/')?;
    let path = scope.split('/').filter(|part| !part.is_empty()).collect::<Vec<_>>().join(".");
    (!path.is_empty()).then(|| normalized(&path))
}

/// A path without what wraps the UNet.
fn normalized(path: &str) -> String {
    let parts: Vec<&str> = path.split('.').collect();
    let root = parts.iter().position(|part| matches!(*part, "down_blocks" | "mid_block" | "up_blocks"));
    parts[root.unwrap_or(0)..].join(".")
}

/// The path of a projection whose product belongs to the module `path`: that of the layer, or of its part if it is
/// packed. `None` if the module can't be a projection's.
fn layer_path(path: &str, role: Role) -> Option<String> {
    let (parent, layer) = path.rsplit_once('.')?;
    match layer {
        "to_k" | "to_v" | "to_kv" | "to_qkv" => Some(format!("{parent}.{}", role.module())),
        _ => attention_path(path).map(|attention| format!("{attention}.{}", role.module())),
    }
}

/// The part of a path down to the attention module; `None` if there is none in it.
fn attention_path(path: &str) -> Option<String> {
    let parts: Vec<&str> = path.split('.').collect();
    let last = parts.iter().rposition(|part| part.starts_with("attn") && !part.starts_with("attns"))?;
    Some(parts[..=last].join("."))
}

/// The columns of a product as they are carried along a few nodes: a small tensor whose entries are column numbers.
#[derive(Clone)]
struct Carried {
    dims: Vec<usize>,
    columns: Vec<usize>,
}

impl Carried {
    fn new(dims: Vec<usize>, columns: Vec<usize>) -> Option<Self> {
        (dims.iter().product::<usize>() == columns.len()).then_some(Self { dims, columns })
    }

    fn axis(&self, axis: i64) -> Option<usize> {
        let rank = self.dims.len() as i64;
        usize::try_from(if axis < 0 { axis + rank } else { axis }).ok().filter(|&axis| axis < self.dims.len())
    }

    /// The entries at the given indices of an axis.
    fn take(&self, axis: usize, indices: &[usize]) -> Option<Self> {
        let size = *self.dims.get(axis)?;
        if indices.iter().any(|&index| index >= size) {
            return None;
        }
        let inner: usize = self.dims[axis + 1..].iter().product();
        let mut columns = Vec::new();
        for outer in self.columns.chunks(size * inner) {
            indices.iter().for_each(|index| columns.extend_from_slice(&outer[index * inner..(index + 1) * inner]));
        }
        let mut dims = self.dims.clone();
        dims[axis] = indices.len();
        Self::new(dims, columns)
    }

    fn without(mut self, axis: usize) -> Self {
        self.dims.remove(axis);
        self
    }

    fn reshaped(self, shape: &[Option<i64>], zero_copies: bool) -> Option<Self> {
        let mut dims = Vec::new();
        let mut open = None;
        for (axis, &size) in shape.iter().enumerate() {
            match size {
                Some(0) if zero_copies => dims.push(*self.dims.get(axis)?),
                Some(-1) if open.replace(axis).is_some() => return None,
                Some(-1) => dims.push(1),
                // What the graph computes from sizes that it does not fix is a number of rows: 1 here.
                None => dims.push(1),
                Some(size) => dims.push(usize::try_from(size).ok()?),
            }
        }
        if let Some(axis) = open {
            dims[axis] = self.columns.len().checked_div(dims.iter().product())?;
        }
        Self::new(dims, self.columns)
    }

    fn transposed(&self, perm: &[usize]) -> Option<Self> {
        let mut sorted = perm.to_vec();
        sorted.sort_unstable();
        if !sorted.into_iter().eq(0..self.dims.len()) {
            return None;
        }
        let mut strides = vec![1; self.dims.len()];
        for axis in (1..self.dims.len()).rev() {
            strides[axis - 1] = strides[axis] * self.dims[axis];
        }
        let dims: Vec<usize> = perm.iter().map(|&axis| self.dims[axis]).collect();
        let mut index = vec![0; dims.len()];
        let mut columns = Vec::with_capacity(self.columns.len());
        for _ in 0..self.columns.len() {
            columns.push(self.columns[perm.iter().zip(&index).map(|(&axis, &at)| strides[axis] * at).sum::<usize>()]);
            for axis in (0..dims.len()).rev() {
                index[axis] += 1;
                if index[axis] < dims[axis] {
                    break;
                }
                index[axis] = 0;
            }
        }
        Self::new(dims, columns)
    }
}

/// A list of integers, some of which the graph computes from sizes that it does not fix.
type Integers = Vec<Option<i64>>;

impl<'m> Search<'m> {
    /// Which columns of a packed product reach an attention by the given way, in the order in which they arrive.
    fn picked(&self, output: &'m str, columns: usize, text: Text<'m>, entry: &Entry) -> Option<Columns> {
        let declared = self.topology.value_info(text.input).and_then(declared_sizes)?;
        let size = |axis: usize| declared.get(axis).copied()?.and_then(|dim| usize::try_from(dim).ok());
        let (batch, tokens) = (size(0).unwrap_or(1), size(1).unwrap_or(1));
        let count = batch.checked_mul(tokens)?;
        // Rows are copies of each other; a size that no model has is not worth following.
        if count.checked_mul(columns).is_none_or(|entries| entries > 1 << 26) {
            return None;
        }
        let dims = match text.rows {
            Rows::BatchTokens => vec![batch, tokens, columns],
            Rows::Flat => vec![count, columns],
            Rows::Other => return None,
        };
        let mut carried = Carried::new(dims, (0..count).flat_map(|_| 0..columns).collect())?;
        let mut shapes: HashMap<&str, Vec<usize>> = HashMap::from([(output, carried.dims.clone())]);
        if let Rows::BatchTokens = text.rows {
            let features = declared.get(2).copied()?.and_then(|dim| usize::try_from(dim).ok())?;
            shapes.insert(text.input, vec![batch, tokens, features]);
        }
        for step in &entry.steps {
            carried = self.carry(carried, *step, &shapes)?;
            let output = self.node(step.node).output.get(step.output)?;
            shapes.insert(output, carried.dims.clone());
        }
        if let Some(slot) = entry.slot {
            let axis = carried.dims.len().checked_sub(2)?;
            carried = carried.take(axis, &[slot])?;
        }
        let mut seen = vec![false; columns];
        let order: Vec<usize> =
            carried.columns.into_iter().filter(|&column| !std::mem::replace(&mut seen[column], true)).collect();
        Columns::from_order(&order)
    }

    /// One node's effect on carried columns.
    fn carry(&self, carried: Carried, step: Step, shapes: &HashMap<&str, Vec<usize>>) -> Option<Carried> {
        let node = self.node(step.node);
        let integers = |input: usize| self.integers(node.input.get(input)?, shapes, 0);
        let known = |input: usize| integers(input)?.into_iter().collect::<Option<Vec<i64>>>();
        let listed = |name, input| match node.attribute_ints(name) {
            Some(ints) => Some(ints.to_vec()),
            None => known(input),
        };
        match node.op_type() {
            "Identity" | "Cast" | "Dropout" | "Mul" | "Div" => Some(carried),
            "Reshape" => carried.reshaped(&integers(1)?, node.attribute_i("allowzero").unwrap_or(0) == 0),
            "Flatten" => {
                let axis = carried.axis(node.attribute_i("axis").unwrap_or(1))?;
                let outer = i64::try_from(carried.dims[..axis].iter().product::<usize>()).ok()?;
                carried.reshaped(&[Some(outer), Some(-1)], false)
            }
            "Transpose" => {
                let perm = match node.attribute_ints("perm") {
                    Some(perm) => perm.iter().map(|&axis| usize::try_from(axis).ok()).collect::<Option<Vec<_>>>()?,
                    None => (0..carried.dims.len()).rev().collect(),
                };
                carried.transposed(&perm)
            }
            "Squeeze" => {
                let mut axes =
                    listed("axes", 1)?.into_iter().map(|axis| carried.axis(axis)).collect::<Option<Vec<_>>>()?;
                axes.sort_unstable();
                axes.dedup();
                if axes.iter().any(|&axis| carried.dims[axis] != 1) {
                    return None;
                }
                Some(axes.into_iter().rev().fold(carried, Carried::without))
            }
            "Unsqueeze" => {
                let axes = listed("axes", 1)?;
                let rank = (carried.dims.len() + axes.len()) as i64;
                let mut axes: Vec<i64> =
                    axes.into_iter().map(|axis| if axis < 0 { axis + rank } else { axis }).collect();
                axes.sort_unstable();
                let mut carried = carried;
                for axis in axes {
                    let axis = usize::try_from(axis).ok().filter(|&axis| axis <= carried.dims.len())?;
                    carried.dims.insert(axis, 1);
                }
                Some(carried)
            }
            "Split" => {
                let axis = carried.axis(node.attribute_i("axis").unwrap_or(0))?;
                let size = carried.dims[axis];
                let sizes: Vec<usize> = match node.attribute_ints("split").map(<[i64]>::to_vec).or_else(|| known(1)) {
                    Some(sizes) => sizes.into_iter().map(|size| usize::try_from(size).ok()).collect::<Option<_>>()?,
                    // Equal parts; the last one is smaller if they do not fit.
                    None => {
                        let part = size.div_ceil(node.output.len().max(1));
                        (0..node.output.len()).map(|at| size.saturating_sub(at * part).min(part)).collect()
                    }
                };
                let begin: usize = sizes.get(..step.output)?.iter().sum();
                let indices: Vec<usize> = (begin..begin.checked_add(*sizes.get(step.output)?)?).collect();
                carried.take(axis, &indices)
            }
            "Slice" => {
                let (starts, ends) = (known(1)?, known(2)?);
                let axes = match node.input.get(3).filter(|name| !name.is_empty()) {
                    Some(_) => known(3)?,
                    None => (0..starts.len() as i64).collect(),
                };
                let steps = match node.input.get(4).filter(|name| !name.is_empty()) {
                    Some(_) => known(4)?,
                    None => vec![1; starts.len()],
                };
                let mut carried = carried;
                for (index, &axis) in axes.iter().enumerate() {
                    let axis = carried.axis(axis)?;
                    let size = carried.dims[axis] as i64;
                    let clamp = |at: i64| (if at < 0 { at.saturating_add(size) } else { at }).clamp(0, size) as usize;
                    let step = usize::try_from(*steps.get(index)?).ok().filter(|&step| step > 0)?;
                    let indices: Vec<usize> =
                        (clamp(*starts.get(index)?)..clamp(*ends.get(index)?)).step_by(step).collect();
                    carried = carried.take(axis, &indices)?;
                }
                Some(carried)
            }
            "Gather" => {
                let axis = carried.axis(node.attribute_i("axis").unwrap_or(0))?;
                let size = carried.dims[axis] as i64;
                let indices: Option<Vec<usize>> =
                    known(1)?.into_iter().map(|at| usize::try_from(if at < 0 { at + size } else { at }).ok()).collect();
                let indices = indices?;
                let scalar = constant(&self.topology, node.input.get(1)?).is_ok_and(|tensor| tensor.dims.is_empty());
                let taken = carried.take(axis, &indices)?;
                Some(if scalar { taken.without(axis) } else { taken })
            }
            _ => None,
        }
    }

    /// A list of integers of the graph, as far as it follows from constants and the shapes of carried values.
    fn integers(&self, value: &str, shapes: &HashMap<&str, Vec<usize>>, depth: usize) -> Option<Integers> {
        if depth > 24 {
            return None;
        }
        if let Some(tensor) = self.topology.initializer(value).or_else(|| self.topology.constant(value)) {
            let tensor = self.model.tensor(tensor).ok().filter(|tensor| tensor.elements() <= 64)?;
            return Some(tensor.to_i64().ok()?.into_iter().map(Some).collect());
        }
        let (_, node) = self.topology.producer(value)?;
        let input = |index: usize| self.integers(node.input.get(index)?, shapes, depth + 1);
        let one = |index: usize| match input(index)?[..] {
            [Some(value)] => Some(value),
            _ => None,
        };
        let paired = |compute: fn(i64, i64) -> Option<i64>| {
            let (a, b) = (input(0)?, input(1)?);
            let at = |list: &Integers, index: usize| if list.len() == 1 { list[0] } else { *list.get(index)? };
            Some((0..a.len().max(b.len())).map(|index| compute(at(&a, index)?, at(&b, index)?)).collect())
        };
        match node.op_type() {
            "Constant" => match node.attribute_i("value_int") {
                Some(value) => Some(vec![Some(value)]),
                None => Some(node.attribute_ints("value_ints")?.iter().copied().map(Some).collect()),
            },
            "Shape" => {
                let of = node.input.first()?.as_str();
                let dims: Integers = match shapes.get(of) {
                    Some(dims) => dims.iter().map(|&dim| i64::try_from(dim).ok()).collect(),
                    None => self.topology.value_info(of).and_then(declared_sizes)?,
                };
                let rank = dims.len() as i64;
                let at = |name, default| {
                    let at = node.attribute_i(name).unwrap_or(default);
                    (if at < 0 { at.saturating_add(rank) } else { at }).clamp(0, rank) as usize
                };
                Some(dims.get(at("start", 0)..at("end", rank))?.to_vec())
            }
            "Identity" | "Cast" | "Squeeze" | "Unsqueeze" | "Reshape" | "Floor" => input(0),
            "Concat" => {
                let parts = (0..node.input.len()).map(|index| input(index).or(Some(vec![None])));
                Some(parts.collect::<Option<Vec<_>>>()?.concat())
            }
            "Gather" => {
                let (list, indices) = (input(0)?, input(1)?);
                let at = |index: i64| if index < 0 { index + list.len() as i64 } else { index };
                indices.iter().map(|&index| list.get(usize::try_from(at(index?)).ok()?).copied()).collect()
            }
            "Slice" => {
                let list = input(0)?;
                let size = list.len() as i64;
                let clamp = |at: i64| (if at < 0 { at.saturating_add(size) } else { at }).clamp(0, size) as usize;
                Some(list.get(clamp(one(1)?)..clamp(one(2)?))?.to_vec())
            }
            "Add" => paired(i64::checked_add),
            "Sub" => paired(i64::checked_sub),
            "Mul" => paired(i64::checked_mul),
            "Div" => paired(i64::checked_div),
            _ => None,
        }
    }
}
