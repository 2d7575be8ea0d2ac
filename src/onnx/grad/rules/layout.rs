//! Operators that only move numbers.

use super::Rule;
use crate::error::Result;
use crate::onnx::grad::expr::Expr;
use crate::onnx::grad::site::Site;

pub(super) const RULES: &[(&str, Rule)] = &[
    ("Reshape", reshape),
    ("Flatten", reshape),
    ("Squeeze", reshape),
    ("Unsqueeze", reshape),
    ("Transpose", transpose),
    ("Expand", expand),
    ("Concat", concat),
    ("Split", split),
    ("Slice", slice),
];

/// y = x in another shape:  x̄ = ȳ in the shape of x
fn reshape(at: &Site) -> Result<()> {
    at.give(0, || at.dy().reshape(&at.shape(0)));
    Ok(())
}

/// y = x with its axes in another order:  x̄ = ȳ in the inverse order
fn transpose(at: &Site) -> Result<()> {
    let rank = at.rank(0)?;
    let order = at.node.attribute_ints("perm").map_or_else(|| (0..rank as i64).rev().collect(), <[i64]>::to_vec);
    let mut inverse = vec![0; rank];
    for (to, &from) in order.iter().enumerate() {
        inverse[at.axis(from, rank)?] = to;
    }
    at.give(0, || at.dy().transpose(&inverse));
    Ok(())
}

/// y = x repeated along axes of size 1:  x̄ = ȳ summed over them
fn expand(at: &Site) -> Result<()> {
    at.give_broadcast(0, || at.dy())
}

/// y = x₁ ‖ x₂ ‖ ... along one axis:  x̄ᵢ = its part of ȳ
fn concat(at: &Site) -> Result<()> {
    let axis = at.axis(at.int("axis", 0), at.rank(0)?)?;
    let mut start = Some(0i64);
    for index in 0..at.inputs() {
        let size = at.sizes(index)?[axis].fixed().map(|size| size as i64);
        let end = start.zip(size).map(|(start, size)| start + size);
        if at.wants(index) {
            let (Some(start), Some(end)) = (start, end) else {
                return Err(at.unsupported("joined along an axis whose sizes vary from run to run"));
            };
            at.give(index, || at.dy().slice(axis as i64, start, end));
        }
        start = end;
    }
    Ok(())
}

/// yᵢ = parts of x along one axis:  x̄ = ȳ₁ ‖ ȳ₂ ‖ ...
fn split(at: &Site) -> Result<()> {
    let axis = at.int("axis", 0);
    at.give(0, || {
        let part = |index| at.cotangent(index).unwrap_or_else(|| at.y(index).zeros());
        let parts: Vec<Expr> = (0..at.outputs()).map(part).collect();
        let others: Vec<&Expr> = parts[1..].iter().collect();
        parts[0].op_with("Concat", &others, |node| node.with("axis", axis))
    });
    Ok(())
}

/// y = x[starts : ends : steps]:  x̄ = ȳ at its places, zeros elsewhere
fn slice(at: &Site) -> Result<()> {
    if !at.wants(0) {
        return Ok(());
    }
    let sizes = at.sizes(0)?;
    let rank = sizes.len();
    let missing = || at.unsupported("its bounds are missing");
    let starts = at.ints("starts", 1)?.ok_or_else(missing)?;
    let ends = at.ints("ends", 2)?.ok_or_else(missing)?;
    let axes = at.ints("axes", 3)?.unwrap_or_else(|| (0..starts.len() as i64).collect());
    let steps = at.ints("steps", 4)?.unwrap_or_else(|| vec![1; starts.len()]);
    let mut cotangent = at.dy();
    for (((start, end), axis), step) in starts.into_iter().zip(ends).zip(axes).zip(steps) {
        let axis = at.axis(axis, rank)?;
        let Some(size) = sizes[axis].fixed().map(|size| size as i64) else {
            if start == 0 && step == 1 && end >= i64::from(i32::MAX) {
                continue;
            }
            return Err(at.unsupported("a slice along an axis whose size varies from run to run"));
        };
        let places = places(start, end, step, size);
        cotangent = spread(at, cotangent, axis, rank, &places, size);
    }
    at.give(0, || cotangent);
    Ok(())
}

/// The indices that a slice takes along an axis, in its order.
fn places(start: i64, end: i64, step: i64, size: i64) -> Vec<i64> {
    let from_end = |bound: i64| if bound < 0 { bound.saturating_add(size) } else { bound };
    let mut places = Vec::new();
    if step > 0 {
        let (mut at, end) = (from_end(start).clamp(0, size), from_end(end).clamp(0, size));
        while at < end {
            places.push(at);
            at += step;
        }
    } else if step < 0 {
        let (mut at, end) = (from_end(start).clamp(-1, size - 1), from_end(end).clamp(-1, size - 1));
        while at > end {
            places.push(at);
            at += step;
        }
    }
    places
}

/// Puts the rows of `value` along an axis at `places` of `size`, zeros between them.
fn spread(at: &Site, value: Expr, axis: usize, rank: usize, places: &[i64], size: i64) -> Expr {
    let contiguous = places.windows(2).all(|pair| pair[1] == pair[0] + 1);
    if contiguous {
        let first = places.first().copied().unwrap_or(0);
        let after = size - first - places.len() as i64;
        if first == 0 && after == 0 {
            return value;
        }
        let mut pads = vec![0; 2 * rank];
        (pads[axis], pads[rank + axis]) = (first, after);
        return value.op("Pad", &[&at.graph().ints(&pads)]);
    }
    // Each row of the result is a row of the value or of zeros: picked from the value with one row of zeros behind it.
    let count = places.len() as i64;
    let mut pads = vec![0; 2 * rank];
    pads[rank + axis] = 1;
    let padded = value.op("Pad", &[&at.graph().ints(&pads)]);
    let mut picks = vec![count; size as usize];
    for (from, &to) in places.iter().enumerate() {
        picks[to as usize] = from as i64;
    }
    let picks = at.graph().ints(&picks);
    at.graph().node("Gather", &[&padded, &picks], value.data_type, |node| node.with("axis", axis as i64))
}
