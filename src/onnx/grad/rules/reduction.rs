//! Sums, means, norms and extremes over axes.

use super::Rule;
use crate::error::Result;
use crate::onnx::grad::expr::Expr;
use crate::onnx::grad::site::Site;

pub(super) const RULES: &[(&str, Rule)] = &[
    ("ReduceSum", sum),
    ("ReduceMean", mean),
    ("ReduceSumSquare", sum_square),
    ("ReduceL1", l1),
    ("ReduceL2", l2),
    ("ReduceLogSumExp", log_sum_exp),
    ("ReduceMax", extreme),
    ("ReduceMin", extreme),
];

/// The axes that are reduced, from the front; with none of them the output is the input.
fn axes(at: &Site) -> Result<Vec<i64>> {
    let rank = at.rank(0)?;
    match at.ints("axes", 1)?.filter(|axes| !axes.is_empty()) {
        Some(axes) => axes.into_iter().map(|axis| Ok(at.axis(axis, rank)? as i64)).collect(),
        None if at.int("noop_with_empty_axes", 0) != 0 => Ok(Vec::new()),
        None => Ok((0..rank as i64).collect()),
    }
}

/// A value of the output's shape with the reduced axes back at size 1.
fn kept(at: &Site, value: Expr, axes: &[i64]) -> Expr {
    if at.int("keepdims", 1) != 0 { value } else { value.unsqueeze(axes) }
}

/// y = Σ x:  x̄ = ȳ everywhere
fn sum(at: &Site) -> Result<()> {
    let axes = axes(at)?;
    at.give(0, || kept(at, at.dy(), &axes).expand(&at.shape(0)));
    Ok(())
}

/// y = Σ x / n:  x̄ = ȳ / n everywhere
fn mean(at: &Site) -> Result<()> {
    let axes = axes(at)?;
    let sizes = at.sizes(0)?;
    let fixed: Option<usize> = axes.iter().map(|&axis| sizes[axis as usize].fixed()).product();
    at.give(0, || {
        let dy = kept(at, at.dy(), &axes);
        let share = match fixed {
            Some(count) => dy / count as f64,
            None => {
                let picked = at.shape(0).op("Gather", &[&at.graph().ints(&axes)]);
                let count = picked.op_with("ReduceProd", &[], |node| node.with("keepdims", 0));
                let data_type = dy.data_type;
                dy / count.cast(data_type)
            }
        };
        share.expand(&at.shape(0))
    });
    Ok(())
}

/// y = Σ x²:  x̄ = 2 x ȳ
fn sum_square(at: &Site) -> Result<()> {
    let axes = axes(at)?;
    at.give(0, || at.x(0) * (kept(at, at.dy(), &axes) * 2.0));
    Ok(())
}

/// y = Σ |x|:  x̄ = sign(x) ȳ
fn l1(at: &Site) -> Result<()> {
    let axes = axes(at)?;
    at.give(0, || at.x(0).sign() * kept(at, at.dy(), &axes));
    Ok(())
}

/// y = √Σ x²:  x̄ = x ȳ / y, and 0 where y = 0
fn l2(at: &Site) -> Result<()> {
    let axes = axes(at)?;
    at.give(0, || {
        let y = at.y(0);
        let safe = y.equals(&y.number(0.0)).choose(&y.number(1.0), &y);
        at.x(0) * kept(at, at.dy() / safe, &axes)
    });
    Ok(())
}

/// y = ln Σ eˣ:  x̄ = ȳ e^(x - y)
fn log_sum_exp(at: &Site) -> Result<()> {
    let axes = axes(at)?;
    at.give(0, || (at.x(0) - kept(at, at.y(0), &axes)).exp() * kept(at, at.dy(), &axes));
    Ok(())
}

/// y = max x or min x:  x̄ = ȳ where x = y, shared by those that are equal
fn extreme(at: &Site) -> Result<()> {
    let axes = axes(at)?;
    at.give(0, || {
        let x = at.x(0);
        let is = x.equals(&kept(at, at.y(0), &axes)).choose(&x.number(1.0), &x.number(0.0));
        let share = kept(at, at.dy(), &axes) / is.sum(&axes, true);
        is * share
    });
    Ok(())
}
