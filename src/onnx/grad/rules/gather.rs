//! Operators that pick by indices, and those that write at indices. Each is the other's transpose: what was picked twice
//! gets the sum of both cotangents. Operator sets below 16 have no scattering sum; there it is a product with a matrix
//! of zeros and ones.

use super::Rule;
use crate::error::Result;
use crate::onnx::grad::expr::Expr;
use crate::onnx::grad::site::Site;
use crate::onnx::proto::tensor_proto::DataType;

pub(super) const RULES: &[(&str, Rule)] = &[
    ("Gather", gather),
    ("GatherElements", gather_elements),
    ("GatherND", gather_nd),
    ("ScatterElements", scatter_elements),
    ("ScatterND", scatter_nd),
];

/// The first operator set in which scattering can add.
pub(super) const SCATTER_ADDS: i64 = 16;

/// `[count, R]`: zeros, to which row `rows[k]` of K is added `values[k]` of `[K, R]`. Rows may count from the end.
pub(super) fn add_rows(rows: &Expr, values: &Expr, count: &Expr) -> Expr {
    let graph = values.graph();
    if graph.opset() >= SCATTER_ADDS {
        let width = values.sizes().slice(0, 1, 2);
        let zeros = count.join(&[&width], 0).zeros_of(values.data_type);
        return zeros.op_with("ScatterND", &[&rows.unsqueeze(&[-1]), values], |node| node.with("reduction", "add"));
    }
    one_hot(rows, count, values.data_type).transpose(&[1, 0]).matmul(values)
}

/// 1 at each index, 0 elsewhere, along a new last axis.
fn one_hot(indices: &Expr, count: &Expr, data_type: DataType) -> Expr {
    let graph = indices.graph();
    let ends = graph.numbers(data_type, &[2], &[0.0, 1.0]);
    graph.node("OneHot", &[indices, count, &ends], data_type, |node| node)
}

/// The cotangent of a value of `rank` axes and the given shape, of which `dy` was picked by `indices` along one axis.
pub(super) fn unpick(dy: Expr, indices: &Expr, index_rank: usize, shape: &Expr, axis: usize, rank: usize) -> Expr {
    // As rows: the axes of the indices first, then the others.
    let around = (0..axis).chain(axis + index_rank..rank - 1 + index_rank);
    let order: Vec<usize> = (axis..axis + index_rank).chain(around).collect();
    let moved = dy.transpose(&order);
    let others = moved.sizes().slice(0, index_rank as i64, i64::MAX);
    let count = shape.slice(0, axis as i64, axis as i64 + 1);
    let values = moved.op_with("Flatten", &[], |node| node.with("axis", index_rank as i64));
    let rows = indices.cast(DataType::Int64).reshape_to(&[-1]);
    let sum = add_rows(&rows, &values, &count).reshape(&count.join(&[&others], 0));
    let back: Vec<usize> = (1..=axis).chain([0]).chain(axis + 1..rank).collect();
    sum.transpose(&back)
}

/// y = x[i] along one axis:  x̄ = Σ ȳ at the places i
fn gather(at: &Site) -> Result<()> {
    let (rank, index_rank) = (at.rank(0)?, at.output_rank(0)? + 1 - at.rank(0)?);
    let axis = at.axis(at.int("axis", 0), rank)?;
    at.give(0, || unpick(at.dy(), &at.x(1), index_rank, &at.shape(0), axis, rank));
    Ok(())
}

/// y = x[.., i, ..] with an index for each number:  x̄ = Σ ȳ at the places i
fn gather_elements(at: &Site) -> Result<()> {
    let rank = at.rank(0)?;
    let axis = at.axis(at.int("axis", 0), rank)?;
    if at.graph().opset() >= SCATTER_ADDS {
        at.give(0, || {
            at.zeros(0).op_with("ScatterElements", &[&at.x(1), &at.dy()], |node| {
                node.with("axis", axis as i64).with("reduction", "add")
            })
        });
        return Ok(());
    }
    let (large, small) = (at.sizes(0)?, at.output_sizes(0)?);
    let others: Option<Vec<i64>> = (0..rank)
        .map(|other| match other == axis {
            true => Some(0),
            false => Some(large[other].fixed()? as i64 - small[other].fixed()? as i64),
        })
        .collect();
    let same = (0..rank).all(|other| other == axis || large[other] == small[other]);
    let Some(beyond) = others.or(same.then(|| vec![0; rank])) else {
        return Err(at.unsupported("sizes that vary from run to run (operator set 16 or newer allows them)"));
    };
    at.give(0, || {
        let count = at.shape(0).slice(0, axis as i64, axis as i64 + 1);
        let picks = one_hot(&at.x(1), &count, at.dy().data_type);
        let sum = (picks * at.dy().unsqueeze(&[-1])).sum(&[axis as i64], false);
        let order: Vec<usize> = (0..axis).chain([rank - 1]).chain(axis..rank - 1).collect();
        let sum = sum.transpose(&order);
        match beyond.iter().all(|&size| size == 0) {
            true => sum,
            false => sum.op("Pad", &[&at.graph().ints(&[vec![0; rank], beyond].concat())]),
        }
    });
    Ok(())
}

/// y = x[i₁, i₂, ...] with tuples of indices along the last axis of i:  x̄ = Σ ȳ at the places i
fn gather_nd(at: &Site) -> Result<()> {
    let batch = at.int("batch_dims", 0);
    if batch == 0 && at.graph().opset() >= SCATTER_ADDS {
        at.give(0, || at.zeros(0).op_with("ScatterND", &[&at.x(1), &at.dy()], |node| node.with("reduction", "add")));
        return Ok(());
    }
    let (sizes, indices) = (at.sizes(0)?, at.sizes(1)?);
    let fixed: Option<Vec<i64>> = sizes.iter().map(|size| size.fixed().map(|size| size as i64)).collect();
    let given: Option<Vec<i64>> = indices.iter().map(|size| size.fixed().map(|size| size as i64)).collect();
    let (Some(sizes), Some(given)) = (fixed, given) else {
        return Err(
            at.unsupported("sizes that vary from run to run (operator set 16 or newer without batch axes allows them)")
        );
    };
    let (batch, tuple) = (batch as usize, given[given.len() - 1]);
    let picked = &sizes[batch..batch + tuple as usize];
    let row = |sizes: &[i64]| sizes.iter().product::<i64>();
    at.give(0, || {
        let graph = at.graph();
        // Each tuple as the number of a row of x, with the batch before it.
        let strides: Vec<i64> = (1..=picked.len()).map(|axis| row(&picked[axis..])).collect();
        let tuples = at.x(1).reshape_to(&[row(&sizes[..batch]), -1, tuple]);
        let positive = tuples.less(&graph.int(0)).choose(&(&tuples + &graph.ints(picked)), &tuples);
        let rows = (positive * graph.ints(&strides)).sum(&[-1], false);
        let firsts: Vec<i64> = (0..row(&sizes[..batch])).map(|index| index * row(picked)).collect();
        let rows = rows + graph.ints(&firsts).unsqueeze(&[1]);
        let values = at.dy().reshape_to(&[-1, row(&sizes[batch + picked.len()..])]);
        let count = graph.ints(&[row(&sizes[..batch + picked.len()])]);
        add_rows(&rows.reshape_to(&[-1]), &values, &count).reshape_to(&sizes)
    });
    Ok(())
}

/// Whether a scattering adds, or replaces what was there.
fn adds(at: &Site) -> Result<bool> {
    match at.text("reduction", "none") {
        "none" => Ok(false),
        "add" => Ok(true),
        other => Err(at.unsupported(&format!("reduction {other:?}"))),
    }
}

/// y = x with u at the places i:  x̄ = ȳ with 0 there,  ū = ȳ[i]; or with u added:  x̄ = ȳ,  ū = ȳ[i]
fn scatter_elements(at: &Site) -> Result<()> {
    let (adds, axis) = (adds(at)?, at.int("axis", 0));
    at.give(0, || match adds {
        true => at.dy(),
        false => at.dy().op_with("ScatterElements", &[&at.x(1), &at.zeros(2)], |node| node.with("axis", axis)),
    });
    at.give(2, || at.dy().op_with("GatherElements", &[&at.x(1)], |node| node.with("axis", axis)));
    Ok(())
}

/// As [`scatter_elements`] with rows at the places that tuples of indices name.
fn scatter_nd(at: &Site) -> Result<()> {
    let adds = adds(at)?;
    at.give(0, || match adds {
        true => at.dy(),
        false => at.dy().op("ScatterND", &[&at.x(1), &at.zeros(2)]),
    });
    at.give(2, || at.dy().op("GatherND", &[&at.x(1)]));
    Ok(())
}
