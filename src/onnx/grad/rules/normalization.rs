//! Normalisations: with x̂ = (x - mean) r, r = 1 / √(variance + ε), and ĝ the cotangent of x̂,
//!
//! x̄ = r (ĝ - mean(ĝ) - x̂ mean(ĝ x̂)), means over the normalised axes.

use super::Rule;
use crate::error::Result;
use crate::onnx::grad::expr::Expr;
use crate::onnx::grad::facts::Size;
use crate::onnx::grad::site::Site;

pub(super) const RULES: &[(&str, Rule)] = &[
    ("InstanceNormalization", instance),
    ("GroupNormalization", group),
    ("LayerNormalization", layer),
    ("RMSNormalization", root_mean_square),
    ("BatchNormalization", batch),
    ("LpNormalization", lp),
];

/// x̂ and r.
fn normalised(x: &Expr, axes: &[i64], epsilon: f64) -> (Expr, Expr) {
    let centred = x - x.mean(axes);
    let scale = ((&centred * &centred).mean(axes) + epsilon).sqrt().reciprocal();
    (centred * &scale, scale)
}

fn cotangent(g: &Expr, normal: &Expr, scale: &Expr, axes: &[i64]) -> Expr {
    (g - g.mean(axes) - normal * (g * normal).mean(axes)) * scale
}

/// Whether an input is known to be this number everywhere.
fn is_all(at: &Site, index: usize, number: f32) -> bool {
    at.constants(index).is_some_and(|values| values.iter().all(|&value| value == number))
}

/// A value of one number a channel in a shape that meets `[B, C, ...]` of `rank` axes.
fn of_channels(value: Expr, rank: usize) -> Expr {
    value.unsqueeze(&(1..rank as i64 - 1).collect::<Vec<_>>())
}

fn all_but(rank: usize, kept: usize) -> Vec<i64> {
    (0..rank).filter(|&axis| axis != kept).map(|axis| axis as i64).collect()
}

/// y = γ x̂ + β over the places of each channel:  γ̄ = Σ ȳ x̂,  β̄ = Σ ȳ,  ĝ = γ ȳ
fn instance(at: &Site) -> Result<()> {
    let rank = at.rank(0)?;
    let axes: Vec<i64> = (2..rank as i64).collect();
    let dy = at.dy();
    at.give(2, || dy.sum(&all_but(rank, 1), false));
    if at.wants(0) || at.wants(1) {
        let x = at.x(0);
        let (mut normal, scale) = normalised(&x, &axes, at.float("epsilon", 1e-5));
        let plain = is_all(at, 1, 1.0);
        if plain && is_all(at, 2, 0.0) {
            // What exporters make of group normalisation: the output is x̂ itself.
            normal = at.y(0);
        }
        at.give(1, || (&dy * &normal).sum(&all_but(rank, 1), false));
        at.give(0, || {
            let g = if plain { dy.clone() } else { &dy * of_channels(at.x(1), rank) };
            cotangent(&g, &normal, &scale, &axes)
        });
    }
    Ok(())
}

/// y = γ x̂ + β over groups of channels; γ and β have one number a channel (a group before operator set 21)
fn group(at: &Site) -> Result<()> {
    let rank = at.rank(0)?;
    let groups = at.int("num_groups", 1);
    let sizes = at.sizes(0)?;
    let Some(channels) = sizes[1].fixed() else {
        return Err(at.unsupported("the number of channels varies from run to run"));
    };
    if at.sizes(1)?.iter().all(|size| size.fixed() != Some(channels)) {
        return Err(at.unsupported("a scale for each group, expected one for each channel (operator set 21 or newer)"));
    }
    let grouped = at.graph().ints(&[0, groups, -1]);
    let dy = at.dy();
    at.give(2, || dy.sum(&all_but(rank, 1), false));
    if at.wants(0) || at.wants(1) {
        let shape = at.shape(0);
        let (normal, scale) = normalised(&at.x(0).reshape(&grouped), &[2], at.float("epsilon", 1e-5));
        at.give(1, || (&dy * normal.reshape(&shape)).sum(&all_but(rank, 1), false));
        at.give(0, || {
            let g = (&dy * of_channels(at.x(1), rank)).reshape(&grouped);
            cotangent(&g, &normal, &scale, &[2]).reshape(&shape)
        });
    }
    Ok(())
}

fn trailing(at: &Site, default: i64) -> Result<(usize, Vec<i64>)> {
    let rank = at.rank(0)?;
    let first = at.axis(at.int("axis", default), rank)?;
    Ok((rank, (first as i64..rank as i64).collect()))
}

fn no_statistics(at: &Site) -> Result<()> {
    match (1..at.outputs()).any(|index| at.cotangent(index).is_some()) {
        true => Err(at.unsupported("no gradient through the mean and deviation that it also gives")),
        false => Ok(()),
    }
}

/// y = γ x̂ + β over the axes from `axis` on:  γ̄ = Σ ȳ x̂,  β̄ = Σ ȳ,  ĝ = γ ȳ
fn layer(at: &Site) -> Result<()> {
    no_statistics(at)?;
    let (_, axes) = trailing(at, -1)?;
    let dy = at.dy();
    at.give_broadcast(2, || dy.clone())?;
    if at.wants(0) || at.wants(1) {
        let (normal, scale) = normalised(&at.x(0), &axes, at.float("epsilon", 1e-5));
        at.give_broadcast(1, || &dy * &normal)?;
        at.give(0, || cotangent(&(&dy * at.x(1)), &normal, &scale, &axes));
    }
    Ok(())
}

/// y = γ x r, r = 1 / √(mean(x²) + ε):  γ̄ = Σ ȳ x r,  x̄ = r (ĝ - x r² mean(ĝ x)) with ĝ = γ ȳ
fn root_mean_square(at: &Site) -> Result<()> {
    let (_, axes) = trailing(at, -1)?;
    let (x, dy) = (at.x(0), at.dy());
    let scale = ((&x * &x).mean(&axes) + at.float("epsilon", 1e-5)).sqrt().reciprocal();
    at.give_broadcast(1, || &dy * &x * &scale)?;
    at.give(0, || {
        let g = &dy * at.x(1);
        (&g - &x * (&scale * &scale * (&g * &x).mean(&axes))) * &scale
    });
    Ok(())
}

/// y = γ (x - μ) r + β with fixed μ and r = 1 / √(σ² + ε):  x̄ = ȳ γ r,  γ̄ = Σ ȳ (x - μ) r,  β̄ = Σ ȳ,  μ̄ = -Σ ȳ γ r
fn batch(at: &Site) -> Result<()> {
    if at.int("training_mode", 0) != 0 {
        return Err(at.unsupported("its training form; export the model for inference"));
    }
    let sizes: Vec<Size> = at.sizes(0)?;
    let rank = sizes.len();
    let others = all_but(rank, 1);
    let (dy, variance) = (at.dy(), at.x(4));
    let scale = (&variance + at.float("epsilon", 1e-5)).sqrt().reciprocal();
    let slope = &scale * at.x(1);
    at.give(0, || &dy * of_channels(slope.clone(), rank));
    let centred = || at.x(0) - of_channels(at.x(3), rank);
    at.give(1, || (&dy * centred()).sum(&others, false) * &scale);
    at.give(2, || dy.sum(&others, false));
    at.give(3, || -(dy.sum(&others, false) * &slope));
    at.give(4, || (&dy * centred()).sum(&others, false) * (&slope * &scale * &scale * -0.5));
    Ok(())
}

/// y = x / ‖x‖₂ along one axis:  x̄ = (ȳ - y Σ ȳ y) / ‖x‖₂; with p = 1, x̄ = (ȳ - sign(x) Σ ȳ y) / ‖x‖₁
fn lp(at: &Site) -> Result<()> {
    let axis = at.axis(at.int("axis", -1), at.rank(0)?)? as i64;
    let power = at.int("p", 2);
    at.give(0, || {
        let (x, y, dy) = (at.x(0), at.y(0), at.dy());
        let along = (&dy * &y).sum(&[axis], true);
        match power {
            1 => (dy - x.sign() * along) / x.abs().sum(&[axis], true),
            _ => (dy - y * along) / (&x * &x).sum(&[axis], true).sqrt(),
        }
    });
    Ok(())
}
