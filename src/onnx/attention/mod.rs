//! Where a diffusion model's text becomes the keys and values of its cross-attention, and the picture those of its
//! self-attention.
//!
//! An exported weight keeps neither its name nor its layout, and exporters disagree on both. What they all keep is the
//! structure: the text input reaches a matrix product with a constant weight, whose result meets the queries in front
//! of a Softmax (a key) or the Softmax's result (a value), or enters a fused attention operator at a known place. So
//! [`find`] walks forward from the text input, [`find_self`] from every other product, and neither trusts a name or an order;
//! names serve only to tell which module of the model a projection is. This file knows graphs, but not what is done with the
//! weights.

mod columns;
mod fuse;
mod inputs;
mod names;
mod search;
#[cfg(test)]
mod tests;

use bytes::Bytes;

use super::graph::Topology;
use super::model::Model;
use super::proto::TensorProto;
use super::tensor::DataType;
use crate::error::{Error, Result};

pub use columns::Columns;
pub(super) use fuse::around;
pub use fuse::fuse;
pub use inputs::{KeyValueInput, WeightInput, externalise, weights_as_inputs};
pub use names::is_of_self;
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
/// fused operator or packed with those of the queries, or if only the keys or only the values of an attention were found.
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
