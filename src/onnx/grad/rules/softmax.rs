//! Softmax and its logarithm.

use super::Rule;
use crate::error::Result;
use crate::onnx::grad::expr::Expr;
use crate::onnx::grad::site::Site;

pub(super) const RULES: &[(&str, Rule)] = &[("Softmax", softmax), ("LogSoftmax", log_softmax)];

fn axis(at: &Site) -> Result<usize> {
    at.axis(at.int("axis", -1), at.rank(0)?)
}

/// y = softmax(x) along one axis:  x̄ = y (ȳ - Σ ȳ y)
fn softmax(at: &Site) -> Result<()> {
    let (axis, rank) = (axis(at)?, at.rank(0)?);
    at.give(0, || {
        let (y, dy) = (at.y(0), at.dy());
        let sum = attended(at, axis, rank).unwrap_or_else(|| (&dy * &y).sum(&[axis as i64], true));
        y * (dy - sum)
    });
    Ok(())
}

/// In attention, where only a product O = Y V follows, Σ ȳ y along a row is Σ ō o along the row of the product: one
/// pass over the large matrix less.
fn attended(at: &Site, axis: usize, rank: usize) -> Option<Expr> {
    let user = at.only_user(0).filter(|node| node.is("MatMul") && axis + 1 == rank)?;
    let [weights, values] = user.input.as_slice() else { return None };
    let product = user.output.first()?;
    let same_rank = at.sweep.facts.sizes(values)?.len() == rank;
    if *weights != at.node.output[0] || !same_rank {
        return None;
    }
    let cotangent = at.cotangent_of(product)?;
    Some((cotangent * at.sweep.value(product)).sum(&[-1], true))
}

/// y = ln softmax(x) along one axis:  x̄ = ȳ - eʸ Σ ȳ
fn log_softmax(at: &Site) -> Result<()> {
    let axis = axis(at)? as i64;
    at.give(0, || at.dy() - at.y(0).exp() * at.dy().sum(&[axis], true));
    Ok(())
}
