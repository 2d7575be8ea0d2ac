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
    let axis = axis(at)? as i64;
    at.give(0, || {
        let (y, dy) = (at.y(0), at.dy());
        match at.sweep.centred.borrow().contains(&at.node.output[0]) {
            true => y * dy,
            false => &y * (&dy - (&dy * &y).sum(&[axis], true)),
        }
    });
    Ok(())
}

/// From how many numbers on a matrix of attention weights is large: joining a column to others is then cheap beside a pass
/// over it.
const LARGE: usize = 1 << 20;

/// The cotangent of attention weights Y that only a product O = Y V takes, less its sum along each row: ȳ - Σ ȳ y, which is
/// what the rule of their softmax wants. Σ ȳ y is Σ ō o along the row of the product. For large weights one more column of
/// the product ȳ = Ō Vᵀ takes it away, without a pass over them: [Ō, -Σ ō o] [V, 1]ᵀ. `at` is the product; `None` if it is
/// none like this.
pub(super) fn centred(at: &Site) -> Result<Option<Expr>> {
    let Some(node) = at.maker(0).filter(|node| node.is("Softmax")) else { return Ok(None) };
    let softmax = Site { node, sweep: at.sweep };
    let (rank, weights) = (at.rank(0)?, &at.node.input[0]);
    let only = softmax.only_user(0).is_some_and(|user| std::ptr::eq(user, at.node)) && *weights != at.node.input[1];
    if *weights != node.output[0] || !only || axis(&softmax)? + 1 != rank || at.rank(1)? != rank {
        return Ok(None);
    }
    at.sweep.centred.borrow_mut().insert(weights.clone());
    let (dy, y, values) = (at.dy(), at.y(0), at.x(1));
    let large = at.fixed_sizes(0).is_some_and(|sizes| sizes[rank - 2] * sizes[rank - 1] >= LARGE);
    Ok(Some(match large {
        true => less_sum(&dy, &y).matmul(&with_ones(&values, rank).transpose_last(rank)),
        false => dy.matmul(&values.transpose_last(rank)) - (dy * y).sum(&[-1], true),
    }))
}

/// [Ō, -Σ ō o]
pub(super) fn less_sum(dy: &Expr, y: &Expr) -> Expr {
    dy.join(&[&-(dy * y).sum(&[-1], true)], -1)
}

/// [V, 1] of `rank` axes
pub(super) fn with_ones(values: &Expr, rank: usize) -> Expr {
    let column = values.slice(rank as i64 - 1, 0, 1);
    values.join(&[&column.sizes().ones_of(values.data_type)], -1)
}

/// y = ln softmax(x) along one axis:  x̄ = ȳ - eʸ Σ ȳ
fn log_softmax(at: &Site) -> Result<()> {
    let axis = axis(at)? as i64;
    at.give(0, || at.dy() - at.y(0).exp() * at.dy().sum(&[axis], true));
    Ok(())
}
