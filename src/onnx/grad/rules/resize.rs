//! Changes of the picture's size.

use super::Rule;
use crate::error::Result;
use crate::onnx::grad::site::Site;

pub(super) const RULES: &[(&str, Rule)] = &[("Resize", resize)];

/// y = x with every place repeated a whole number of times:  x̄ = the sum of ȳ over the repetitions
fn resize(at: &Site) -> Result<()> {
    let (from, to) = (at.sizes(0)?, at.output_sizes(0)?);
    let mut factors = Vec::new();
    for (small, large) in from.iter().zip(&to) {
        let mut runs = small.seen().iter().zip(large.seen()).map(|(small, large)| (large / small, large % small));
        let Some((factor, 0)) = runs.next() else { return Err(at.unsupported("not a whole factor")) };
        if runs.any(|other| other != (factor, 0)) {
            return Err(at.unsupported("a factor that varies from run to run"));
        }
        factors.push(factor as i64);
    }
    if at.text("mode", "nearest") != "nearest" {
        return Err(at.unsupported("another mode than nearest"));
    }
    let count: i64 = factors.iter().product();
    at.give(0, || {
        at.dy()
            .op_with("AveragePool", &[], |node| node.with("kernel_shape", &factors[2..]).with("strides", &factors[2..]))
            * count as f64
    });
    Ok(())
}
