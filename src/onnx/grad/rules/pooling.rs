//! Means and maxima over windows, or over all places of a channel. Inputs are `[B, C, ...]`; each channel of each sample
//! is a picture of its own, so that the transpose of a sum over windows is a transposed convolution with ones.

use super::Rule;
use super::convolution::{Window, spread, window};
use super::gather::SCATTER_ADDS;
use super::reduction::{count, shared};
use crate::error::{Error, Result};
use crate::onnx::grad::expr::Expr;
use crate::onnx::grad::facts::Size;
use crate::onnx::grad::site::Site;
use crate::onnx::proto::tensor_proto::DataType;

pub(super) const RULES: &[(&str, Rule)] = &[
    ("AveragePool", average),
    ("MaxPool", maximum),
    ("GlobalAveragePool", global_average),
    ("GlobalMaxPool", global_maximum),
];

/// A pool over windows, with the sizes of its output and its input.
struct Pool {
    window: Window,
    kernel: Vec<i64>,
    small: Vec<Size>,
    large: Vec<Size>,
}

impl Pool {
    fn of(at: &Site) -> Result<Self> {
        let (small, large) = (at.output_sizes(0)?, at.sizes(0)?);
        let kernel = at.node.attribute_ints("kernel_shape").filter(|kernel| kernel.len() + 2 == large.len());
        let kernel =
            kernel.ok_or_else(|| Error::invalid_file(format!("{}: no kernel_shape of its axes", at.name())))?;
        let sizes: Vec<Size> = kernel.iter().map(|&size| Size::always(size.max(1) as usize)).collect();
        Ok(Self { window: window(at, &sizes, &small, &large)?, kernel: kernel.to_vec(), small, large })
    }

    fn rank(&self) -> usize {
        self.large.len()
    }

    /// The same windows where the last ones reach beyond the padding: with as much padding as they reach, and without the
    /// part of the kernel that lies beyond all places of x.
    fn reaching(&self, at: &Site) -> Result<(Window, Vec<i64>)> {
        let (Some(small), Some(large)) = (fixed(&self.small), fixed(&self.large)) else {
            return Err(at.unsupported("windows that reach beyond the padding where sizes vary from run to run"));
        };
        let (mut window, mut kernel) = (self.window.clone(), self.kernel.clone());
        for (axis, size) in kernel.iter_mut().enumerate() {
            let (before, step) = (window.pads.0[axis], window.dilations[axis]);
            *size = (*size).min((large[axis] + before + step - 1) / step);
            let end = (small[axis] - 1) * window.strides[axis] + (*size - 1) * step + 1 - before;
            window.pads.1[axis] = (end - large[axis]).max(0);
        }
        window.kernel = kernel.iter().map(|&size| Size::always(size as usize)).collect();
        Ok((window, kernel))
    }
}

/// `[B, C, ...]` as `[B C, 1, ...]`.
fn pictures(value: &Expr, rank: usize) -> Expr {
    value.reshape(&value.graph().ints(&[-1, 1]).join(&[&value.sizes().slice(0, 2, rank as i64)], 0))
}

/// y = Σ x / n over windows, n the places of a window that count:  x̄ = transposed convolution of ȳ / n with ones
fn average(at: &Site) -> Result<()> {
    let pool = Pool::of(at)?;
    let (window, rank) = (&pool.window, pool.rank());
    let padded = window.pads.0.iter().chain(&window.pads.1).any(|&pad| pad != 0);
    let include = at.int("count_include_pad", 0) != 0;
    let beyond =
        at.int("ceil_mode", 0) != 0 && window.left_over(at, &pool.small, &pool.large)?.iter().any(|&rest| rest < 0);
    let reach = if beyond { pool.reaching(at)? } else { (window.clone(), pool.kernel.clone()) };
    if !at.wants(0) {
        return Ok(());
    }
    let share = match beyond || padded && !include {
        true => at.dy() / counts(at, &pool, include),
        false => at.dy() / pool.kernel.iter().product::<i64>() as f64,
    };
    let (window, kernel) = reach;
    let kernel = at.graph().ints(&[&[1, 1], kernel.as_slice()].concat()).ones_of(at.x(0).data_type);
    let sum = spread(at, &window, &pictures(&share, rank), &kernel, &pool.small, &pool.large)?;
    at.give(0, || sum.reshape(&at.shape(0)));
    Ok(())
}

/// How many places of x each window holds, with those of the padding if they count: `[1, 1, ...]`.
fn counts(at: &Site, pool: &Pool, padding: bool) -> Expr {
    let (window, kernel) = (&pool.window, pool.kernel.as_slice());
    let data_type = at.x(0).data_type;
    let (Some(out), Some(places)) = (fixed(&pool.small), fixed(&pool.large)) else {
        let sizes = at.graph().ints(&[1, 1]).join(&[&at.shape(0).slice(0, 2, pool.rank() as i64)], 0);
        let ones = at.graph().ints(&[&[1, 1], kernel].concat()).ones_of(data_type);
        return sizes.ones_of(data_type).op_with("Conv", &[&ones], |node| window.on(node));
    };
    let along = |axis: usize, place: i64| {
        let first = place * window.strides[axis] - window.pads.0[axis];
        let reached = (0..kernel[axis]).map(|offset| first + offset * window.dilations[axis]);
        let (before, after) = if padding { (window.pads.0[axis], window.pads.1[axis]) } else { (0, 0) };
        reached.filter(|place| (-before..places[axis] + after).contains(place)).count()
    };
    let count = |place: Vec<i64>| place.iter().enumerate().map(|(axis, &place)| along(axis, place)).product::<usize>();
    let counts: Vec<f64> = grid(&out).into_iter().map(|place| count(place) as f64).collect();
    let sizes: Vec<usize> = [1, 1].iter().chain(&out).map(|&size| size as usize).collect();
    at.graph().numbers(data_type, &sizes, &counts)
}

/// The spatial sizes, if they are the same in every run.
fn fixed(sizes: &[Size]) -> Option<Vec<i64>> {
    sizes[2..].iter().map(|size| size.fixed().map(|size| size as i64)).collect()
}

/// y = max x over windows:  x̄ = Σ ȳ at the places of the maxima
fn maximum(at: &Site) -> Result<()> {
    if at.cotangent(1).is_some() {
        return Err(at.unsupported("no gradient through indices"));
    }
    let pool = Pool::of(at)?;
    if !at.wants(0) {
        return Ok(());
    }
    let places = places(at, &pool);
    let cotangent = if at.graph().opset() >= SCATTER_ADDS {
        let flat = at.shape(0).op_with("ReduceProd", &[], |node| node.with("keepdims", 1));
        let zeros = flat.zeros_of(at.dy().data_type);
        let add = |node: crate::onnx::proto::NodeProto| node.with("axis", 0).with("reduction", "add");
        zeros.op_with("ScatterElements", &[&places.reshape_to(&[-1]), &at.dy().reshape_to(&[-1])], add)
    } else {
        maximum_by_offsets(at, &pool, &places)?
    };
    at.give(0, || cotangent.reshape(&at.shape(0)));
    Ok(())
}

/// The index in x, as one row of numbers, of the maximum of each window.
fn places(at: &Site, pool: &Pool) -> Expr {
    let window = &pool.window;
    let x = at.x(0);
    let outputs = at.graph().nodes("MaxPool", &[&x], &[Some(x.data_type), Some(DataType::Int64)], |node| {
        let node = node
            .with("kernel_shape", pool.kernel.as_slice())
            .with("strides", window.strides.as_slice())
            .with("dilations", window.dilations.as_slice())
            .with("ceil_mode", at.int("ceil_mode", 0));
        node.with("pads", [window.pads.0.as_slice(), &window.pads.1].concat())
    });
    outputs[1].clone()
}

/// Without a scattering sum: ȳ is laid into one channel for each offset in the window, 0 where the maximum is elsewhere,
/// and a transposed convolution puts each channel at its offset.
fn maximum_by_offsets(at: &Site, pool: &Pool, places: &Expr) -> Result<Expr> {
    let (window, kernel) = (&pool.window, &pool.kernel);
    let (Some(out), Some(places_of_x)) = (fixed(&pool.small), fixed(&pool.large)) else {
        return Err(at.unsupported("sizes that vary from run to run (operator set 16 or newer allows them)"));
    };
    let offsets = grid(kernel);
    let mut expected = Vec::new();
    for offset in &offsets {
        for place in grid(&out) {
            let axis = |flat: i64, axis: usize| {
                let at =
                    place[axis] * window.strides[axis] + offset[axis] * window.dilations[axis] - window.pads.0[axis];
                flat * places_of_x[axis] + if (0..places_of_x[axis]).contains(&at) { at } else { i64::MIN / 4 }
            };
            expected.push((0..out.len()).fold(0, axis));
        }
    }
    let graph = at.graph();
    let count = offsets.len() as i64;
    let expected = graph.ints(&expected).reshape_to(&[&[1, count], out.as_slice()].concat());
    let within = pictures(places, pool.rank()).op("Mod", &[&graph.int(places_of_x.iter().product())]);
    let zero = at.dy().number(0.0);
    let laid = within.equals(&expected).choose(&pictures(&at.dy(), pool.rank()), &zero);
    let diagonal: Vec<f64> =
        (0..count * count).map(|index| f64::from(u8::from(index / count == index % count))).collect();
    let sizes: Vec<usize> = [count, 1].iter().chain(kernel).map(|&size| size as usize).collect();
    let offsets = graph.numbers(laid.data_type, &sizes, &diagonal);
    spread(at, window, &laid, &offsets, &pool.small, &pool.large)
}

/// All places of a grid, row by row.
fn grid(sizes: &[i64]) -> Vec<Vec<i64>> {
    let mut places = vec![Vec::new()];
    for &size in sizes {
        let longer = |place: &Vec<i64>| (0..size).map(|at| [place.as_slice(), &[at]].concat()).collect::<Vec<_>>();
        places = places.iter().flat_map(longer).collect();
    }
    places
}

fn spatial(at: &Site) -> Result<Vec<i64>> {
    Ok((2..at.rank(0)? as i64).collect())
}

/// y = Σ x / n over all places:  x̄ = ȳ / n everywhere
fn global_average(at: &Site) -> Result<()> {
    let count = count(at, &spatial(at)?)?;
    at.give(0, || (at.dy() / count()).expand(&at.shape(0)));
    Ok(())
}

/// y = max x over all places:  x̄ = ȳ where x = y, shared by those that are equal
fn global_maximum(at: &Site) -> Result<()> {
    let axes = spatial(at)?;
    at.give(0, || shared(&at.x(0), &at.y(0), at.dy(), &axes));
    Ok(())
}
