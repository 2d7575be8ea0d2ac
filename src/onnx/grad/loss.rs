//! Losses that a graph ends in.

use super::super::build::{self, Dim, node};
use super::super::edit;
use super::super::model::Model;
use super::super::proto::tensor_proto::DataType;
use crate::error::{Error, Result};

/// Names of what [`mean_squared_error`] added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeanSquaredError {
    /// Input: the target, of the value's shape, f32.
    pub target: String,
    /// Input: the weight of each sample, `[B]`, f32.
    pub weight: String,
    /// Output: the loss, a number without axes, f32.
    pub loss: String,
    /// Output: the mean squared error of each sample without its weight, `[B]`, f32.
    pub of_samples: String,
}

/// Adds the loss Σ_b weight_b · mean((value_b - target_b)²) over the samples b, the first axis of a `value` of `rank` axes.
///
/// Errors: [`crate::Status::NotFound`]; [`crate::Status::InvalidArgument`] for a rank below 2.
pub fn mean_squared_error(model: &mut Model, value: &str, rank: usize) -> Result<MeanSquaredError> {
    if rank < 2 {
        return Err(Error::invalid_argument(format!("a loss over samples needs 2 axes or more, {value:?} has {rank}")));
    }
    let opset = model.opset("").unwrap_or_default();
    edit::expose_output(model, value)?;
    model.edit(|edit| {
        let mut fresh = |part: &str| edit.fresh_name(&format!("{value}/{part}"));
        let (target, weight, loss, of_samples) = (fresh("target"), fresh("weight"), fresh("loss"), fresh("of_samples"));
        let (float, difference, square, weighted) =
            (fresh("float"), fresh("difference"), fresh("square"), fresh("weighted"));
        let axes: Vec<i64> = (1..rank as i64).collect();
        let mean = match opset >= 18 {
            true => {
                let name = edit.fresh_name("sample_axes");
                edit.graph_mut().initializer.push(build::tensor_i64(&name, &[axes.len()], &axes));
                node("ReduceMean", [square.as_str(), &name], [of_samples.as_str()])
            }
            false => node("ReduceMean", [square.as_str()], [of_samples.as_str()]).with("axes", axes),
        };
        let any = vec![Dim::Any; rank];
        let graph = edit.graph_mut();
        graph.node.extend([
            node("Cast", [value], [float.as_str()]).with("to", DataType::Float as i64),
            node("Sub", [float.as_str(), &target], [difference.as_str()]),
            node("Mul", [difference.as_str(), &difference], [square.as_str()]),
            mean.with("keepdims", 0),
            node("Mul", [of_samples.as_str(), &weight], [weighted.as_str()]),
            node("ReduceSum", [weighted.as_str()], [loss.as_str()]).with("keepdims", 0),
        ]);
        graph.input.push(build::value(&target, DataType::Float, Some(&any)));
        graph.input.push(build::value(&weight, DataType::Float, Some(&[Dim::Any])));
        graph.output.push(build::value(&of_samples, DataType::Float, Some(&[Dim::Any])));
        graph.output.push(build::value(&loss, DataType::Float, Some(&[])));
        Ok(MeanSquaredError { target, weight, loss, of_samples })
    })
}

/// Names of what [`inner_product`] added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InnerProduct {
    /// Inputs: what each value is multiplied with, of its shape, f32.
    pub cotangents: Vec<String>,
    /// Output: the sum of all products, a number without axes, f32.
    pub product: String,
}

/// Adds Σ ⟨ū, value⟩ over `values`, each with an input ū of its own: its derivative is the vector-Jacobian product of all
/// of them together.
///
/// Errors: [`crate::Status::NotFound`]; [`crate::Status::InvalidArgument`] without a value.
pub fn inner_product(model: &mut Model, values: &[&str]) -> Result<InnerProduct> {
    if values.is_empty() {
        return Err(Error::invalid_argument("an inner product needs a value"));
    }
    model.edit(|edit| {
        let mut cotangents = Vec::with_capacity(values.len());
        let mut sums = Vec::with_capacity(values.len());
        for value in values {
            edit.expose_output(value)?;
            let mut fresh = |part: &str| edit.fresh_name(&format!("{value}/{part}"));
            let (along, float, product, sum) = (fresh("along"), fresh("float"), fresh("product"), fresh("sum"));
            let graph = edit.graph_mut();
            graph.input.push(build::value(&along, DataType::Float, None));
            graph.node.extend([
                node("Cast", [*value], [float.as_str()]).with("to", DataType::Float as i64),
                node("Mul", [float.as_str(), &along], [product.as_str()]),
                node("ReduceSum", [product.as_str()], [sum.as_str()]).with("keepdims", 0),
            ]);
            cotangents.push(along);
            sums.push(sum);
        }
        let mut product = sums.remove(0);
        for sum in sums {
            let both = edit.fresh_name("inner_product");
            edit.graph_mut().node.push(node("Add", [product.as_str(), &sum], [both.as_str()]));
            product = both;
        }
        edit.graph_mut().output.push(build::value(&product, DataType::Float, Some(&[])));
        Ok(InnerProduct { cotangents, product })
    })
}
