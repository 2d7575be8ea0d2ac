//! Operators that only move numbers.

use super::Rule;
use super::gather::unpick;
use crate::error::Result;
use crate::onnx::grad::expr::Expr;
use crate::onnx::grad::facts::Size;
use crate::onnx::grad::site::{Part, Site};

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
    ("Pad", pad),
    ("Tile", tile),
    ("DepthToSpace", depth_to_space),
    ("SpaceToDepth", space_to_depth),
    ("Trilu", trilu),
    ("CumSum", cumulative_sum),
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
    let sizes: Vec<Option<i64>> = (0..at.inputs())
        .map(|index| Ok(at.sizes(index)?[axis].fixed().map(|size| size as i64)))
        .collect::<Result<_>>()?;
    let Some(sizes) = sizes.into_iter().collect::<Option<Vec<i64>>>() else {
        return concat_of_any_sizes(at, axis as i64);
    };
    let mut start = 0;
    for (index, size) in sizes.into_iter().enumerate() {
        at.give(index, || at.dy().slice(axis as i64, start, start + size));
        start += size;
    }
    Ok(())
}

fn concat_of_any_sizes(at: &Site, axis: i64) -> Result<()> {
    let sizes: Vec<Expr> = (0..at.inputs()).map(|index| at.shape(index).slice(0, axis, axis + 1)).collect();
    let sizes = sizes[0].join(&sizes[1..].iter().collect::<Vec<_>>(), 0);
    let dy = at.dy();
    let types = vec![Some(dy.data_type); at.inputs()];
    let parts = at.graph().nodes("Split", &[&dy, &sizes], &types, |node| node.with("axis", axis));
    parts.into_iter().enumerate().for_each(|(index, part)| at.give(index, || part));
    Ok(())
}

/// yᵢ = parts of x along one axis:  x̄ = ȳ₁ ‖ ȳ₂ ‖ ...
fn split(at: &Site) -> Result<()> {
    let axis = at.int("axis", 0);
    if at.node.output.iter().any(String::is_empty) {
        return Err(at.unsupported("a part that is left out"));
    }
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
    let count = at.sizes(1)?.first().and_then(Size::fixed).unwrap_or(0);
    let axes = at.ints("axes", 3)?.unwrap_or_else(|| (0..count as i64).collect());
    let axes = axes.into_iter().map(|axis| at.axis(axis, rank)).collect::<Result<Vec<_>>>()?;
    let bounds = [1, 2, 4].map(|index| at.known_ints(index));
    if let (&[axis], true) = (axes.as_slice(), at.fixed_sizes(0).is_some())
        && let [Some(starts), Some(ends), steps] = &bounds
        && let (&[start], &[end]) = (starts.as_slice(), ends.as_slice())
        && let Some(size) = sizes[axis].fixed()
        && (!at.has(4) || steps.as_deref() == Some(&[1]))
    {
        let places = places(start, end, 1, size as i64);
        if let Some(&start) = places.first() {
            at.give_part(0, Part { cotangent: at.dy(), axis, start: start as usize, count: places.len() });
            return Ok(());
        }
    }
    let mut cotangent = at.dy();
    for (index, axis) in axes.into_iter().enumerate() {
        let size = sizes[axis].fixed().map(|size| size as i64);
        let bound = |of: usize| bounds[of].as_ref().and_then(|bounds| bounds.get(index).copied());
        let step = if at.has(4) { bound(2) } else { Some(1) };
        cotangent = match (bound(0), bound(1), step, size) {
            (Some(start), Some(end), Some(step), Some(size)) => {
                spread(at, cotangent, axis, rank, &places(start, end, step, size), size)
            }
            (Some(0), Some(end), Some(1), None) if end >= i64::from(i32::MAX) => cotangent,
            (Some(start), _, Some(1), None)
                if sizes[axis].seen().iter().all(|&size| (0..=size as i64).contains(&start)) =>
            {
                pad_from(at, cotangent, start, axis, rank)
            }
            _ => {
                // The numbers of the places, sliced in the same way.
                let (size, place) = (at.shape(0).slice(0, axis as i64, axis as i64 + 1), index as i64);
                let of = |input: usize| at.x(input).slice(0, place, place + 1);
                let (zero, one) = (at.graph().int(0), at.graph().int(1));
                let all = zero.op("Range", &[&size.squeeze(&[0]), &one]);
                let step = if at.has(4) { of(4) } else { at.graph().ints(&[1]) };
                let picks = all.op("Slice", &[&of(1), &of(2), &at.graph().ints(&[0]), &step]);
                let shape = cotangent.sizes();
                let before = (axis > 0).then(|| shape.slice(0, 0, axis as i64));
                let after = (axis + 1 < rank).then(|| shape.slice(0, axis as i64 + 1, i64::MAX));
                let parts: Vec<Expr> = before.into_iter().chain([size]).chain(after).collect();
                let shape = parts[0].join(&parts[1..].iter().collect::<Vec<_>>(), 0);
                unpick(cotangent, &picks, 1, &shape, axis, rank)
            }
        };
    }
    at.give(0, || cotangent);
    Ok(())
}

/// Zeros before and after the rows of `value` along an axis, which lie from place `start` on in input 0.
fn pad_from(at: &Site, value: Expr, start: i64, axis: usize, rank: usize) -> Expr {
    let size = |shape: Expr| shape.slice(0, axis as i64, axis as i64 + 1);
    let after = size(at.shape(0)) - size(value.sizes()) - at.graph().ints(&[start]);
    let mut before = vec![0; rank + axis];
    before[axis] = start;
    let pads = at.graph().ints(&before);
    let pads = match rank - axis - 1 {
        0 => pads.join(&[&after], 0),
        behind => pads.join(&[&after, &at.graph().ints(&vec![0; behind])], 0),
    };
    value.op("Pad", &[&pads])
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

/// y = x with more places around:  x̄ = ȳ without them. Where they repeat places of x, these get their cotangents too.
fn pad(at: &Site) -> Result<()> {
    let mode = at.text("mode", "constant");
    if mode == "constant" {
        return pad_by_number(at);
    }
    if !at.wants(0) {
        return Ok(());
    }
    let rank = at.rank(0)?;
    let pads = at.ints("pads", 1)?.ok_or_else(|| at.unsupported("its pads are missing"))?;
    let axes = padded_axes(at, rank)?;
    let mut dy = at.dy();
    for (&axis, (&before, &after)) in axes.iter().zip(pads.iter().zip(&pads[axes.len()..])) {
        if before < 0 || after < 0 {
            return Err(at.unsupported("pads below 0 in a mode that repeats"));
        }
        dy = fold(at, &dy, axis as i64, before, after, mode)?;
    }
    at.give(0, || dy);
    Ok(())
}

fn padded_axes(at: &Site, rank: usize) -> Result<Vec<usize>> {
    match at.ints("axes", 3)? {
        Some(axes) => axes.into_iter().map(|axis| at.axis(axis, rank)).collect(),
        None => Ok((0..rank).collect()),
    }
}

fn pad_by_number(at: &Site) -> Result<()> {
    let rank = at.rank(0)?;
    let pads = match padded_axes(at, rank)? {
        axes if !at.has(3) || axes.iter().copied().eq(0..rank) => at.x(1),
        axes => {
            let given = at.ints("pads", 1)?.ok_or_else(|| at.unsupported("its pads are missing"))?;
            let mut all = vec![0; 2 * rank];
            for (place, axis) in axes.iter().enumerate() {
                (all[*axis], all[rank + axis]) = (given[place], given[axes.len() + place]);
            }
            at.graph().ints(&all)
        }
    };
    at.give(0, || at.dy().op("Pad", &[&-&pads]));
    if at.wants(2) {
        // Negative pads leave out places of x, and none of the number's.
        let zero = at.graph().ints(&[0]);
        let inside = at.dy().op("Pad", &[&-pads.op("Max", &[&zero])]);
        let axes: Vec<i64> = (0..rank as i64).collect();
        at.give(2, || (at.dy().sum(&axes, false) - inside.sum(&axes, false)).reshape(&at.shape(2)));
    }
    Ok(())
}

/// Adds what lies in the first `before` and last `after` places along an axis to the places that they repeat.
fn fold(at: &Site, dy: &Expr, axis: i64, before: i64, after: i64, mode: &str) -> Result<Expr> {
    const END: i64 = i64::MAX;
    let end = |count: i64| if count == 0 { END } else { -count };
    let mut inner = dy.slice(axis, before, end(after));
    let (head, tail) = (dy.slice(axis, 0, before), dy.slice(axis, -after, END));
    // The places from `start` on, as many as `extra` has, are replaced by their sum with it.
    let mut add = |start: i64, stop: i64, extra: Expr| {
        let sum = inner.slice(axis, start, stop) + extra;
        let (first, last) = (inner.slice(axis, 0, start), inner.slice(axis, stop, END));
        inner = match (start == 0, stop == END) {
            (true, _) => sum.join(&[&last], axis),
            (_, true) => first.join(&[&sum], axis),
            _ => first.join(&[&sum, &last], axis),
        };
    };
    match mode {
        "reflect" => {
            if before > 0 {
                add(1, before + 1, head.flip(&[axis]));
            }
            if after > 0 {
                add(-after - 1, -1, tail.flip(&[axis]));
            }
        }
        "edge" => {
            if before > 0 {
                add(0, 1, head.sum(&[axis], true));
            }
            if after > 0 {
                add(-1, END, tail.sum(&[axis], true));
            }
        }
        "wrap" => {
            if before > 0 {
                add(-before, END, head);
            }
            if after > 0 {
                add(0, after, tail);
            }
        }
        other => return Err(at.unsupported(&format!("mode {other:?}"))),
    }
    Ok(inner)
}

/// y = x repeated along each axis:  x̄ = Σ of the repetitions of ȳ
fn tile(at: &Site) -> Result<()> {
    let rank = at.rank(0)?;
    at.give(0, || {
        let (repeats, sizes) = (at.x(1).unsqueeze(&[1]), at.shape(0).unsqueeze(&[1]));
        let split = repeats.join(&[&sizes], 1).reshape_to(&[-1]);
        at.dy().reshape(&split).sum(&(0..rank as i64).map(|axis| 2 * axis).collect::<Vec<_>>(), false)
    });
    Ok(())
}

/// y = channels of x laid into blocks of places:  x̄ = the blocks of ȳ as channels
fn depth_to_space(at: &Site) -> Result<()> {
    let size = at.int("blocksize", 1);
    at.give(0, || {
        let channels = at.dy().op_with("SpaceToDepth", &[], |node| node.with("blocksize", size));
        match at.text("mode", "DCR") {
            // The place in the block is the first part of the channel's number.
            "DCR" => channels,
            _ => {
                let split = channels.reshape(&at.graph().ints(&[0, size * size, -1]).join(&[&places_of(at)], 0));
                split.transpose(&[0, 2, 1, 3, 4]).reshape(&at.shape(0))
            }
        }
    });
    Ok(())
}

/// The two spatial sizes of input 0.
fn places_of(at: &Site) -> Expr {
    at.shape(0).slice(0, 2, 4)
}

/// y = blocks of places of x as channels:  x̄ = the channels of ȳ laid into blocks
fn space_to_depth(at: &Site) -> Result<()> {
    let size = at.int("blocksize", 1);
    at.give(0, || at.dy().op_with("DepthToSpace", &[], |node| node.with("blocksize", size)));
    Ok(())
}

/// y = x above or below a diagonal, 0 elsewhere:  x̄ = ȳ in the same part
fn trilu(at: &Site) -> Result<()> {
    let (upper, diagonal) = (at.int("upper", 1), at.has(1).then(|| at.x(1)));
    at.give(0, || at.dy().op_with("Trilu", &diagonal.iter().collect::<Vec<_>>(), |node| node.with("upper", upper)));
    Ok(())
}

/// y = sums of x up to each place along an axis:  x̄ = sums of ȳ from each place on
fn cumulative_sum(at: &Site) -> Result<()> {
    let (exclusive, reverse) = (at.int("exclusive", 0), i64::from(at.int("reverse", 0) == 0));
    at.give(0, || {
        at.dy().op_with("CumSum", &[&at.x(1)], |node| node.with("exclusive", exclusive).with("reverse", reverse))
    });
    Ok(())
}
