//! Arithmetic of two or more inputs with broadcasting, powers and choices.

use super::Rule;
use crate::error::Result;
use crate::onnx::grad::site::Site;

pub(super) const RULES: &[(&str, Rule)] = &[
    ("Add", add),
    ("Sub", sub),
    ("Mul", mul),
    ("Div", div),
    ("Neg", neg),
    ("Pow", pow),
    ("Sum", sum),
    ("Mean", mean),
    ("Max", extreme),
    ("Min", extreme),
    ("Where", choose),
    ("Mod", modulo),
];

/// y = a + b:  ā = ȳ,  b̄ = ȳ
fn add(at: &Site) -> Result<()> {
    at.give_broadcast(0, || at.dy())?;
    at.give_broadcast(1, || at.dy())
}

/// y = a - b:  ā = ȳ,  b̄ = -ȳ
fn sub(at: &Site) -> Result<()> {
    at.give_broadcast(0, || at.dy())?;
    if at.wants(1) {
        // The sign is turned after the sum, which is the smaller.
        let summed = at.unbroadcast(at.dy(), at.output_sizes(0)?, 1)?;
        at.give(1, || -summed);
    }
    Ok(())
}

/// y = a b:  ā = ȳ b,  b̄ = ȳ a
fn mul(at: &Site) -> Result<()> {
    if swish(at) {
        return Ok(());
    }
    at.give_broadcast(0, || at.dy() * at.x(1))?;
    at.give_broadcast(1, || at.dy() * at.x(0))
}

/// y = x σ(x), written as a product of x and a Sigmoid that nothing else takes:  x̄ = ȳ (σ + y - y σ)
fn swish(at: &Site) -> bool {
    let gate =
        |index: usize| at.maker(index).filter(|node| node.is("Sigmoid") && node.input[0] == at.node.input[1 - index]);
    let Some(index) = (0..2).find(|&index| gate(index).is_some_and(|gate| at.only_user_of(&gate.output[0]).is_some()))
    else {
        return false;
    };
    at.give(1 - index, || {
        let (gate, y) = (at.x(index), at.y(0));
        at.dy() * (&gate + (&y - &y * &gate))
    });
    true
}

/// y = a / b:  ā = ȳ / b,  b̄ = -ȳ y / b
fn div(at: &Site) -> Result<()> {
    at.give_broadcast(0, || at.dy() / at.x(1))?;
    at.give_broadcast(1, || -(at.dy() * at.y(0)) / at.x(1))
}

/// y = -x:  x̄ = -ȳ
fn neg(at: &Site) -> Result<()> {
    at.give(0, || -at.dy());
    Ok(())
}

/// y = aᵇ:  ā = ȳ b aᵇ⁻¹,  b̄ = ȳ y ln a, and 0 where a = 0
fn pow(at: &Site) -> Result<()> {
    let exponent = at.constants(1).filter(|values| values.len() == 1).map(|values| f64::from(values[0]));
    at.give_broadcast(0, || match exponent {
        Some(0.0) => at.dy() * 0.0,
        Some(exponent) => at.dy() * at.x(0).power(exponent - 1.0) * exponent,
        None => {
            let b = at.x(1).cast(at.x(0).data_type);
            at.dy() * &b * at.x(0).op("Pow", &[&(&b - 1.0)])
        }
    })?;
    at.give_broadcast(1, || {
        let a = at.x(0);
        let positive = a.number(0.0).less(&a);
        let log = positive.choose(&a, &a.number(1.0)).log();
        at.dy() * at.y(0) * log
    })
}

/// y = Σ xᵢ:  x̄ᵢ = ȳ
fn sum(at: &Site) -> Result<()> {
    (0..at.inputs()).try_for_each(|index| at.give_broadcast(index, || at.dy()))
}

/// y = Σ xᵢ / n:  x̄ᵢ = ȳ / n
fn mean(at: &Site) -> Result<()> {
    let count = at.inputs() as f64;
    (0..at.inputs()).try_for_each(|index| at.give_broadcast(index, || at.dy() / count))
}

/// y = max xᵢ or min xᵢ:  x̄ᵢ = ȳ where xᵢ = y, shared by those that are equal
fn extreme(at: &Site) -> Result<()> {
    let count = at.inputs();
    if count == 1 {
        at.give(0, || at.dy());
        return Ok(());
    }
    let one = at.dy().number(1.0);
    let zero = at.dy().number(0.0);
    let is = |index| at.x(index).equals(&at.y(0)).choose(&one, &zero);
    let share = at.dy() / (1..count).fold(is(0), |sum, index| sum + is(index));
    (0..count).try_for_each(|index| at.give_broadcast(index, || &share * is(index)))
}

/// y = c ? a : b:  ā = c ? ȳ : 0,  b̄ = c ? 0 : ȳ
fn choose(at: &Site) -> Result<()> {
    let zero = at.dy().number(0.0);
    at.give_broadcast(1, || at.x(0).choose(&at.dy(), &zero))?;
    // The type of a choice is that of its second input.
    at.give_broadcast(2, || at.x(0).choose(&zero, &at.dy()))
}

/// y = a - b trunc(a / b):  ā = ȳ; with respect to the divisor there is none
fn modulo(at: &Site) -> Result<()> {
    if at.wants(1) {
        return Err(at.unsupported("no gradient with respect to a divisor"));
    }
    at.give_broadcast(0, || at.dy())
}
