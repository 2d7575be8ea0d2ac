//! What projections make, or their weights, given by the host: inputs in their place.

use std::collections::BTreeMap;

use super::super::build::{self, Dim};
use super::super::edit::Edit;
use super::super::graph::Topology;
use super::super::model::Model;
use super::super::proto::NodeProto;
use super::super::tensor::DataType;
use super::{Columns, Projection, Role, Rows, search};
use crate::error::{Error, Result};

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
