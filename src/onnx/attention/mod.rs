//! Where a diffusion model's text becomes the keys and values of its cross-attention, and the picture those of its
//! self-attention.
//!
//! An exported weight keeps neither its name nor its layout, and exporters disagree on both. What they all keep is the
//! structure: the text input reaches a matrix product with a constant weight, whose result meets the queries in front
//! of a Softmax (a key) or the Softmax's result (a value), or enters a fused attention operator at a known place. So
//! [`find`] walks forward from the text input and never trusts a name or an order; names serve only to tell which module
//! of the model a projection is. This file knows graphs, but not what is done with the weights.

mod columns;
mod fuse;
mod names;
mod search;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use bytes::Bytes;

use super::build::{self, Dim};
use super::edit::Edit;
use super::graph::Topology;
use super::model::Model;
use super::proto::{NodeProto, TensorProto};
use super::tensor::DataType;
use crate::error::{Error, Result};

pub use columns::Columns;
pub(super) use fuse::around;
pub use fuse::fuse;
use search::Search;

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

/// The constant that a projection multiplies the text with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Weight {
    /// The initializer's name, or the output of the `Constant` node that holds it.
    pub name: String,
    /// The stored element type; the graph may cast it to another before the product.
    pub data_type: DataType,
    /// Whether it is stored `[out, in]`, as torch has it; otherwise `[in, out]`, as the product needs it.
    pub out_by_in: bool,
    /// The number of products that use it, or of attentions that use its one product: above 1 several modules share it
    /// (an exporter may leave one product where equal ones were, and only one of their paths).
    pub users: usize,
}

/// A linear layer that makes the keys or the values of one attention.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Projection {
    /// The layer's place in the model as diffusers names it, whatever the exporter wrote, e.g.
    /// `down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k`. A packed layer (`to_kv`) appears as its two parts.
    /// If the export tells no module, `cross_attention.N.to_k` or `self_attention.N.to_k` by the order of the attentions in
    /// the graph.
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
    /// The width of what it multiplies: for cross-attention, of the text's embedding.
    pub in_features: usize,
    /// The width of the keys or values: all heads.
    pub out_features: usize,
    /// The graph input that the text comes from, `[batch, tokens, in_features]`; empty for self-attention.
    pub text_input: String,
    /// The value that the product reads: the text input or a view of it, or for self-attention what the picture has become.
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
    let graph = model.graph();
    let names = || graph.input.iter().map(|input| input.name()).collect::<Vec<_>>().join(", ");
    if !graph.input.iter().any(|input| input.name() == text_input) {
        return Err(Error::not_found(format!("the model has no input {text_input:?}; its inputs are {}", names())));
    }
    let search = Search::new(model);
    let mut found = search.products(text_input)?;
    if found.is_empty() {
        return Err(Error::unsupported(format!(
            "no cross-attention reads the input {text_input:?}: no key or value was found among the products that it \
             reaches; the model's inputs are {}",
            names()
        )));
    }
    search.pair(&found)?;
    search.name(&mut found, "cross_attention");
    Ok(by_path(found))
}

/// Every projection that makes keys or values, but for those of the text (`cross`, from [`find`]): those of self-attention,
/// ordered by [`Projection::path`]. None if the model has none.
///
/// Errors: [`crate::Status::Unsupported`], naming the operator and the node, if the weights are quantised, if they are inside a
/// fused operator, or if only the keys or only the values of an attention were found.
pub fn find_self(model: &Model, cross: &[Projection]) -> Result<Vec<Projection>> {
    let search = Search::new(model);
    let texts = cross.iter().map(|projection| projection.input.as_str()).collect();
    let mut found = search.products_of_others(&texts)?;
    search.pair(&found)?;
    search.name(&mut found, "self_attention");
    Ok(by_path(found))
}

fn by_path(found: Vec<search::Found>) -> Vec<Projection> {
    let mut projections: Vec<Projection> = found.into_iter().map(|found| found.projection).collect();
    projections.sort_by(|a, b| a.path.cmp(&b.path));
    projections
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

/// A graph input that takes the weights of a projection: see [`weights_as_inputs`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightInput {
    /// The projection's [`Projection::path`].
    pub path: String,
    /// The input's name: the path, unless a value of that name was there.
    pub name: String,
    /// Its shape `[out_features, in_features]`.
    pub shape: [usize; 2],
}

/// Gives every projection's weights an input `[out_features, in_features]`, of the type in which the product computes, and
/// drops the constants that nothing else uses. The inputs come in the order of `projections`, behind those that the model has.
///
/// Errors: [`crate::Status::Unsupported`] if several projections share a product;
/// [`crate::Status::NotFound`] if `projections` are not this model's. The model is then as before.
pub fn weights_as_inputs(model: &mut Model, projections: &[Projection]) -> Result<Vec<WeightInput>> {
    let places: Vec<(usize, DataType)> = {
        let topology = model.topology();
        let types = topology.element_types();
        let place = |projection: &Projection| {
            let node = product_of(&topology, projection)?;
            let factor = topology.graph().node[node].input[1].as_str();
            types.get(factor).filter(|data_type| data_type.is_float()).map(|data_type| (node, *data_type))
        };
        let missing = |projection: &Projection| {
            Error::not_found(format!("{}: the graph has no such product: found in another model?", projection.path))
        };
        let places = projections.iter().map(|one| place(one).ok_or_else(|| missing(one)));
        places.collect::<Result<_>>()?
    };
    model.edit(|edit| {
        let mut inputs = Vec::with_capacity(projections.len());
        for (projection, (node, data_type)) in projections.iter().zip(places) {
            let Projection { path, columns, product_columns, out_features, in_features, .. } = projection;
            if *columns != Columns::all(*product_columns) {
                return Err(Error::unsupported(format!(
                    "{path}: keys and values, or those of several attentions, are made in one product"
                )));
            }
            let name = edit.fresh_name(path);
            let dims = [Dim::Fixed(*out_features as i64), Dim::Fixed(*in_features as i64)];
            edit.graph_mut().input.push(build::value(&name, data_type, Some(&dims)));
            // As torch has it, which is what a transposing Gemm takes; any other product takes it turned.
            let mut factor = name.clone();
            if edit.graph().node[node].attribute_i("transB").unwrap_or(0) == 0 {
                factor = edit.fresh_name(&format!("{name}/turned"));
                let turned = build::node("Transpose", [name.as_str()], [factor.as_str()]);
                edit.graph_mut().node.push(turned.with("perm", vec![1, 0]).named(&factor));
            }
            edit.graph_mut().node[node].input[1] = factor;
            inputs.push(WeightInput { path: path.clone(), name, shape: [*out_features, *in_features] });
        }
        edit.drop_unused();
        Ok(inputs)
    })
}

/// The node that multiplies with a projection's weight.
fn product_of(topology: &Topology<'_>, projection: &Projection) -> Option<usize> {
    let is_product = |node: &NodeProto| {
        node.input.len() > 1
            && node.input[0] == projection.input
            && search::is_one_of(node, &["MatMul", "Gemm", "FusedMatMul"])
    };
    let (index, node) = topology.producer(&projection.output)?;
    if is_product(node) {
        return Some(index);
    }
    // The bias is added behind it.
    let mut before = node.input.iter().filter_map(|value| topology.producer(value));
    before.find(|(_, node)| is_product(node)).map(|(index, _)| index)
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
