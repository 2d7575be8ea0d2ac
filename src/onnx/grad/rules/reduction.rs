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
    ("ReduceLogSum", log_sum),
    ("ReduceLogSumExp", log_sum_exp),
    ("ReduceProd", product),
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
    let count = count(at, &axes)?;
    at.give(0, || (kept(at, at.dy(), &axes) / count()).expand(&at.shape(0)));
    Ok(())
}

/// How many numbers the axes of input 0 hold.
pub(super) fn count<'s>(at: &'s Site, axes: &[i64]) -> Result<impl Fn() -> Expr + use<'s>> {
    let sizes = at.sizes(0)?;
    let fixed: Option<usize> = axes.iter().map(|&axis| sizes[axis as usize].fixed()).product();
    let axes = axes.to_vec();
    Ok(move || match fixed {
        Some(count) => at.x(0).number(count as f64),
        None => {
            let picked = at.shape(0).op("Gather", &[&at.graph().ints(&axes)]);
            picked.op_with("ReduceProd", &[], |node| node.with("keepdims", 0)).cast(at.x(0).data_type)
        }
    })
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

/// y = ln Σ x:  x̄ = ȳ e⁻ʸ everywhere
fn log_sum(at: &Site) -> Result<()> {
    let axes = axes(at)?;
    at.give(0, || kept(at, at.dy() * (-at.y(0)).exp(), &axes).expand(&at.shape(0)));
    Ok(())
}

/// y = Π x:  x̄ = ȳ y / x, which is no number where x = 0
fn product(at: &Site) -> Result<()> {
    let axes = axes(at)?;
    at.give(0, || kept(at, at.dy() * at.y(0), &axes) / at.x(0));
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
    at.give(0, || shared(&at.x(0), &kept(at, at.y(0), &axes), kept(at, at.dy(), &axes), &axes));
    Ok(())
}

/// `cotangent` where `x` equals `y` along the axes, which both have with size 1: shared by those that are equal.
pub(super) fn shared(x: &Expr, y: &Expr, cotangent: Expr, axes: &[i64]) -> Expr {
    let is = x.equals(y).choose(&x.number(1.0), &x.number(0.0));
    let share = cotangent / is.sum(axes, true);
    is * share
}
