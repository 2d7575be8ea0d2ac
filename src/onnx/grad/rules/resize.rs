//! Resizing: along each axis a product with a fixed matrix, `[out, in]`. Its transpose makes the gradient.

use super::Rule;
use crate::error::Result;
use crate::onnx::grad::expr::Expr;
use crate::onnx::grad::facts::Size;
use crate::onnx::grad::site::Site;

pub(super) const RULES: &[(&str, Rule)] = &[("Resize", resize)];

/// How places of the output fall on those of the input.
struct Sampling<'s> {
    mode: &'s str,
    transformation: &'s str,
    rounding: &'s str,
    cubic: f64,
    exclude_outside: bool,
}

impl<'s> Sampling<'s> {
    fn of(at: &Site<'s>) -> Result<Self> {
        let sampling = Self {
            mode: at.text("mode", "nearest"),
            transformation: at.text("coordinate_transformation_mode", "half_pixel"),
            rounding: at.text("nearest_mode", "round_prefer_floor"),
            cubic: at.float("cubic_coeff_a", -0.75),
            exclude_outside: at.int("exclude_outside", 0) != 0,
        };
        if at.int("antialias", 0) != 0 {
            return Err(at.unsupported("antialias"));
        }
        if at.text("keep_aspect_ratio_policy", "stretch") != "stretch" {
            return Err(at.unsupported("keep_aspect_ratio_policy"));
        }
        let known = ["half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric"];
        if !known.contains(&sampling.transformation) || !["nearest", "linear", "cubic"].contains(&sampling.mode) {
            return Err(at.unsupported(&format!("mode {:?} with {:?}", sampling.mode, sampling.transformation)));
        }
        Ok(sampling)
    }
}

/// What a resizing changes.
struct Change {
    small: Vec<Size>,
    large: Vec<Size>,
    /// The scale of each axis, where it is given and constant.
    scales: Vec<Option<f32>>,
    /// The axes that it changes.
    axes: Vec<usize>,
}

impl Change {
    fn of(at: &Site) -> Result<Self> {
        let (large, small) = (at.output_sizes(0)?, at.sizes(0)?);
        let rank = small.len();
        let axes = match at.node.attribute_ints("axes") {
            Some(axes) => axes.iter().map(|&axis| at.axis(axis, rank)).collect::<Result<Vec<_>>>()?,
            None => (0..rank).collect(),
        };
        let mut scales = vec![None; rank];
        if let Some(given) = at.constants(2).filter(|scales| scales.len() == axes.len()) {
            axes.iter().zip(given).for_each(|(&axis, scale)| scales[axis] = Some(scale));
        }
        let changes = |axis: &usize| small[*axis] != large[*axis] || scales[*axis].is_some_and(|scale| scale != 1.0);
        let axes = (0..rank).filter(changes).collect();
        Ok(Self { small, large, scales, axes })
    }
}

/// The whole numbers by which a resizing repeats the places of `[B, C, ...]`, if that is all that it does.
pub(super) fn repeated(at: &Site) -> Result<Option<Vec<i64>>> {
    Ok(factors(&Sampling::of(at)?, &Change::of(at)?))
}

/// y = A x along each axis:  x̄ = Aᵀ ȳ
fn resize(at: &Site) -> Result<()> {
    if !at.wants(0) {
        return Ok(());
    }
    let (sampling, change) = (Sampling::of(at)?, Change::of(at)?);
    if let Some(factors) = factors(&sampling, &change) {
        // Every number was repeated over a block: the sum over the block is its mean by the block's size.
        let count: i64 = factors.iter().product();
        let mean = at.dy().op_with("AveragePool", &[], |node| {
            node.with("kernel_shape", factors.as_slice()).with("strides", factors.as_slice())
        });
        at.give(0, || mean * count as f64);
        return Ok(());
    }
    let mut cotangent = at.dy();
    for axis in change.axes {
        let (Some(from), Some(to)) = (change.small[axis].fixed(), change.large[axis].fixed()) else {
            return Err(at.unsupported("resized along an axis whose size varies from run to run"));
        };
        let scale = match change.scales[axis] {
            Some(scale) => scale,
            None if !at.has(3) && to % from != 0 => return Err(at.unsupported("scales that are no constants")),
            None => to as f32 / from as f32,
        };
        cotangent = product(&cotangent, &sampling.matrix(from, to, scale), from, to, axis, change.small.len());
    }
    at.give(0, || cotangent);
    Ok(())
}

/// `Aᵀ y` along one axis, of a matrix of `to` rows and `from` columns.
pub(super) fn product(value: &Expr, matrix: &[f64], from: usize, to: usize, axis: usize, rank: usize) -> Expr {
    let graph = value.graph();
    let matrix_of = |dims| graph.numbers(value.data_type, dims, matrix);
    if axis + 1 == rank {
        return value.matmul(&matrix_of(&[to, from]));
    }
    if axis + 2 == rank {
        let turned: Vec<f64> = (0..from * to).map(|index| matrix[index % to * from + index / to]).collect();
        return graph.numbers(value.data_type, &[from, to], &turned).matmul(value);
    }
    let mut order: Vec<usize> = (0..rank).collect();
    order.swap(axis, rank - 1);
    value.transpose(&order).matmul(&matrix_of(&[to, from])).transpose(&order)
}

fn factors(sampling: &Sampling, change: &Change) -> Option<Vec<i64>> {
    let Change { small, large, scales, axes } = change;
    if sampling.mode != "nearest"
        || !(3..=5).contains(&small.len())
        || axes.is_empty()
        || axes.iter().any(|&axis| axis < 2)
    {
        return None;
    }
    let factor = |axis: usize| {
        let mut runs = small[axis].seen().iter().zip(large[axis].seen());
        let factor = large[axis].seen().first()? / small[axis].seen().first()?.max(&1);
        let repeats = |(&small, &large): (&usize, &usize)| {
            let scale = scales[axis].unwrap_or(factor as f32);
            let from = |to| sampling.nearest(to, small, large, scale);
            large == small * factor && scale == factor as f32 && (0..large).all(|to| from(to) == to / factor)
        };
        (factor > 0 && runs.all(repeats)).then_some(factor as i64)
    };
    (2..small.len()).map(factor).collect()
}

impl Sampling<'_> {
    /// The place in the input, of size `from`, that place `place` of the output, of size `to`, falls on. In f32, as
    /// runtimes compute it: where a place lies half-way, rounding decides.
    fn place(&self, place: usize, from: usize, to: usize, scale: f32) -> f32 {
        let (place_, from, to_) = (place as f32, from as f32, to as f32);
        match self.transformation {
            "asymmetric" => place_ / scale,
            "align_corners" if to == 1 => 0.0,
            "align_corners" => place_ * (from - 1.0) / (to_ - 1.0),
            "pytorch_half_pixel" if to == 1 => 0.0,
            "half_pixel_symmetric" => {
                let middle = from / 2.0;
                middle * (1.0 - to_ / (scale * from)) + (place_ + 0.5) / scale - 0.5
            }
            _ => (place_ + 0.5) / scale - 0.5,
        }
    }

    fn nearest(&self, place: usize, from: usize, to: usize, scale: f32) -> usize {
        let place = self.place(place, from, to, scale);
        let rounded = match self.rounding {
            "floor" => place.floor(),
            "ceil" => place.ceil(),
            "round_prefer_ceil" => (place + 0.5).floor(),
            _ => (place - 0.5).ceil(),
        };
        rounded.clamp(0.0, from as f32 - 1.0) as usize
    }

    /// `[to, from]`, row by row: what each place of the input gives to each of the output.
    fn matrix(&self, from: usize, to: usize, scale: f32) -> Vec<f64> {
        let mut matrix = vec![0.0; from * to];
        for (place, row) in matrix.chunks_exact_mut(from).enumerate() {
            let mut give = |at: i64, weight: f64| row[at.clamp(0, from as i64 - 1) as usize] += weight;
            if self.mode == "nearest" {
                give(self.nearest(place, from, to, scale) as i64, 1.0);
                continue;
            }
            let position = f64::from(self.place(place, from, to, scale));
            if self.mode == "linear" {
                let position = position.clamp(0.0, from as f64 - 1.0);
                let weight = position - position.floor();
                give(position.floor() as i64, 1.0 - weight);
                give(position.floor() as i64 + 1, weight);
                continue;
            }
            let first = position.floor() as i64 - 1;
            let inside = |at: i64| !self.exclude_outside || (0..from as i64).contains(&at);
            let weights: Vec<f64> = (first..first + 4)
                .map(|at| if inside(at) { self.cubic_weight((position - at as f64).abs()) } else { 0.0 })
                .collect();
            let total: f64 = if self.exclude_outside { weights.iter().sum() } else { 1.0 };
            (first..).zip(&weights).for_each(|(at, weight)| give(at, weight / total));
        }
        matrix
    }

    /// The cubic convolution kernel (Keys 1981, equation 4) with parameter a.
    fn cubic_weight(&self, distance: f64) -> f64 {
        let (a, d) = (self.cubic, distance);
        match d {
            _ if d <= 1.0 => ((a + 2.0) * d - (a + 3.0)) * d * d + 1.0,
            _ if d < 2.0 => ((a * d - 5.0 * a) * d + 8.0 * a) * d - 4.0 * a,
            _ => 0.0,
        }
    }
}
