//! Functions of one input, element by element.

use super::Rule;
use crate::error::Result;
use crate::onnx::grad::expr::Expr;
use crate::onnx::grad::site::Site;

pub(super) const RULES: &[(&str, Rule)] = &[
    ("Identity", through),
    ("Cast", through),
    ("CastLike", through),
    ("Dropout", dropout),
    ("Exp", exp),
    ("Log", log),
    ("Sqrt", sqrt),
    ("Reciprocal", reciprocal),
    ("Abs", abs),
    ("Sin", sin),
    ("Cos", cos),
    ("Tan", tan),
    ("Asin", asin),
    ("Acos", acos),
    ("Atan", atan),
    ("Sinh", sinh),
    ("Cosh", cosh),
    ("Erf", erf),
    ("Sigmoid", sigmoid),
    ("Tanh", tanh),
    ("Relu", relu),
    ("LeakyRelu", leaky_relu),
    ("ThresholdedRelu", thresholded_relu),
    ("PRelu", prelu),
    ("Elu", elu),
    ("Selu", selu),
    ("Celu", celu),
    ("HardSigmoid", hard_sigmoid),
    ("HardSwish", hard_swish),
    ("Clip", clip),
    ("Softplus", softplus),
    ("Softsign", softsign),
    ("Mish", mish),
    ("Gelu", gelu),
    ("Swish", swish),
];

/// The density of the standard normal distribution's factor 1 / √(2π).
const NORMAL: f64 = 0.398_942_280_401_432_7;

fn give(at: &Site, derivative: impl FnOnce(Expr) -> Expr) -> Result<()> {
    at.give(0, || at.dy() * derivative(at.x(0)));
    Ok(())
}

/// `ȳ` where x lies above a bound, 0 elsewhere.
fn above(x: &Expr, bound: f64, cotangent: &Expr) -> Expr {
    x.number(bound).less(x).choose(cotangent, &cotangent.number(0.0))
}

/// y = x, in whatever precision:  x̄ = ȳ
fn through(at: &Site) -> Result<()> {
    at.give(0, || at.dy().cast(at.x(0).data_type));
    Ok(())
}

/// y = x, outside of training:  x̄ = ȳ
fn dropout(at: &Site) -> Result<()> {
    match at.has(2) && at.known_flag(2) != Some(false) {
        true => Err(at.unsupported("its training form; export the model for inference")),
        false => through(at),
    }
}

/// y = eˣ:  x̄ = ȳ y
fn exp(at: &Site) -> Result<()> {
    give(at, |_| at.y(0))
}

/// y = ln x:  x̄ = ȳ / x
fn log(at: &Site) -> Result<()> {
    at.give(0, || at.dy() / at.x(0));
    Ok(())
}

/// y = √x:  x̄ = ȳ / 2y
fn sqrt(at: &Site) -> Result<()> {
    at.give(0, || at.dy() * 0.5 / at.y(0));
    Ok(())
}

/// y = 1 / x:  x̄ = -ȳ y²
fn reciprocal(at: &Site) -> Result<()> {
    give(at, |_| -(at.y(0) * at.y(0)))
}

/// y = |x|:  x̄ = ȳ sign x
fn abs(at: &Site) -> Result<()> {
    give(at, |x| x.sign())
}

/// y = sin x:  x̄ = ȳ cos x
fn sin(at: &Site) -> Result<()> {
    give(at, |x| x.cos())
}

/// y = cos x:  x̄ = -ȳ sin x
fn cos(at: &Site) -> Result<()> {
    give(at, |x| -x.sin())
}

/// y = tan x:  x̄ = ȳ (1 + y²)
fn tan(at: &Site) -> Result<()> {
    give(at, |_| at.y(0) * at.y(0) + 1.0)
}

/// y = arcsin x:  x̄ = ȳ / √(1 - x²)
fn asin(at: &Site) -> Result<()> {
    give(at, |x| (1.0 - &x * &x).sqrt().reciprocal())
}

/// y = arccos x:  x̄ = -ȳ / √(1 - x²)
fn acos(at: &Site) -> Result<()> {
    give(at, |x| -(1.0 - &x * &x).sqrt().reciprocal())
}

/// y = arctan x:  x̄ = ȳ / (1 + x²)
fn atan(at: &Site) -> Result<()> {
    give(at, |x| (&x * &x + 1.0).reciprocal())
}

/// y = sinh x:  x̄ = ȳ cosh x
fn sinh(at: &Site) -> Result<()> {
    give(at, |x| x.op("Cosh", &[]))
}

/// y = cosh x:  x̄ = ȳ sinh x
fn cosh(at: &Site) -> Result<()> {
    give(at, |x| x.op("Sinh", &[]))
}

/// y = erf x:  x̄ = ȳ 2/√π e^(-x²)
fn erf(at: &Site) -> Result<()> {
    give(at, |x| (-(&x * &x)).exp() * std::f64::consts::FRAC_2_SQRT_PI)
}

/// y = σ(x):  x̄ = ȳ y (1 - y)
fn sigmoid(at: &Site) -> Result<()> {
    give(at, |_| at.y(0) * (1.0 - at.y(0)))
}

/// y = tanh x:  x̄ = ȳ (1 - y²)
fn tanh(at: &Site) -> Result<()> {
    give(at, |_| 1.0 - at.y(0) * at.y(0))
}

/// y = max(x, 0):  x̄ = ȳ where x > 0
fn relu(at: &Site) -> Result<()> {
    at.give(0, || above(&at.x(0), 0.0, &at.dy()));
    Ok(())
}

/// y = x where x > a, else 0:  x̄ = ȳ or 0
fn thresholded_relu(at: &Site) -> Result<()> {
    at.give(0, || above(&at.x(0), at.float("alpha", 1.0), &at.dy()));
    Ok(())
}

/// y = x where x ≥ 0, else a x:  x̄ = ȳ or a ȳ
fn leaky_relu(at: &Site) -> Result<()> {
    let slope = at.float("alpha", 0.01);
    at.give(0, || {
        let x = at.x(0);
        x.less(&x.number(0.0)).choose(&(at.dy() * slope), &at.dy())
    });
    Ok(())
}

/// y = x where x ≥ 0, else s x:  x̄ = ȳ or s ȳ,  s̄ = x ȳ where x < 0
fn prelu(at: &Site) -> Result<()> {
    let x = at.x(0);
    let negative = x.less(&x.number(0.0));
    at.give_broadcast(0, || negative.choose(&(at.dy() * at.x(1)), &at.dy()))?;
    at.give_broadcast(1, || negative.choose(&(at.dy() * &x), &x.number(0.0)))
}

/// y = x where x > 0, else a (eˣ - 1):  x̄ = ȳ or ȳ a eˣ
fn exponential(at: &Site, scale: f64, steepness: f64, outer: f64) -> Result<()> {
    at.give(0, || {
        let x = at.x(0);
        let below = at.dy() * (&x * steepness).exp() * (scale * steepness * outer);
        x.number(0.0).less(&x).choose(&(at.dy() * outer), &below)
    });
    Ok(())
}

fn elu(at: &Site) -> Result<()> {
    exponential(at, at.float("alpha", 1.0), 1.0, 1.0)
}

fn selu(at: &Site) -> Result<()> {
    exponential(at, at.float("alpha", 1.673_263_2), 1.0, at.float("gamma", 1.050_701))
}

fn celu(at: &Site) -> Result<()> {
    let alpha = at.float("alpha", 1.0);
    exponential(at, alpha, 1.0 / alpha, 1.0)
}

/// y = clip(a x + b, 0, 1):  x̄ = a ȳ where 0 < y < 1
fn hard_sigmoid(at: &Site) -> Result<()> {
    let (alpha, y) = (at.float("alpha", 0.2), at.y(0));
    at.give(0, || {
        let inner = above(&y, 0.0, &(at.dy() * alpha));
        y.less(&y.number(1.0)).choose(&inner, &y.number(0.0))
    });
    Ok(())
}

/// y = x clip(x/6 + 1/2, 0, 1):  x̄ = ȳ (x/3 + 1/2) where |x| < 3, ȳ above, 0 below
fn hard_swish(at: &Site) -> Result<()> {
    at.give(0, || {
        let (x, dy) = (at.x(0), at.dy());
        let middle = &dy * (&x / 3.0 + 0.5);
        x.less(&x.number(3.0)).choose(&above(&x, -3.0, &middle), &dy)
    });
    Ok(())
}

/// y = min(max(x, low), high):  x̄ = ȳ where low ≤ x ≤ high
fn clip(at: &Site) -> Result<()> {
    if at.wants(1) || at.wants(2) {
        return Err(at.unsupported("no gradient with respect to a bound"));
    }
    at.give(0, || {
        let (x, mut passed) = (at.x(0), at.dy());
        let zero = passed.number(0.0);
        if at.has(1) {
            passed = x.less(&at.x(1)).choose(&zero, &passed);
        }
        if at.has(2) {
            passed = at.x(2).less(&x).choose(&zero, &passed);
        }
        passed
    });
    Ok(())
}

/// y = ln(1 + eˣ):  x̄ = ȳ σ(x)
fn softplus(at: &Site) -> Result<()> {
    give(at, |x| x.sigmoid())
}

/// y = x / (1 + |x|):  x̄ = ȳ / (1 + |x|)²
fn softsign(at: &Site) -> Result<()> {
    give(at, |x| (x.abs() + 1.0).power(-2.0))
}

/// y = x tanh(s), s = ln(1 + eˣ):  x̄ = ȳ (tanh s + x (1 - tanh² s) σ(x))
fn mish(at: &Site) -> Result<()> {
    give(at, |x| {
        let t = x.op("Softplus", &[]).tanh();
        &t + &x * (1.0 - &t * &t) * x.sigmoid()
    })
}

/// y = x Φ(x):  x̄ = ȳ (Φ(x) + x φ(x)); or with tanh in place of erf, of u = √(2/π) (x + 0.044715 x³):
/// x̄ = ȳ ((1 + tanh u) / 2 + x (1 - tanh² u) u' / 2)
fn gelu(at: &Site) -> Result<()> {
    if at.text("approximate", "none") == "tanh" {
        let scale = (2.0 / std::f64::consts::PI).sqrt();
        return give(at, |x| {
            let square = &x * &x;
            let t = (&x * (&square * (0.044_715 * scale) + scale)).tanh();
            let slope = square * (3.0 * 0.044_715 * scale) + scale;
            (&t + 1.0) * 0.5 + &x * (1.0 - &t * &t) * slope * 0.5
        });
    }
    give(at, |x| {
        let below = ((&x * std::f64::consts::FRAC_1_SQRT_2).erf() + 1.0) * 0.5;
        below + &x * (&x * &x * -0.5).exp() * NORMAL
    })
}

/// y = x σ(a x):  x̄ = ȳ (σ + a y (1 - σ))
fn swish(at: &Site) -> Result<()> {
    let alpha = at.float("alpha", 1.0);
    give(at, |x| {
        let gate = (&x * alpha).sigmoid();
        &gate + at.y(0) * (1.0 - &gate) * alpha
    })
}
