//! The derivative rules, one short function an operator, in a file a family. Each says in one line what the operator
//! computes and the cotangent of each input: x̄ for the gradient with respect to x, ȳ for that of the output.
//!
//! A rule emits only operators that have rules themselves.

mod activation;
mod arithmetic;
mod attention;
mod convolution;
mod gather;
mod layout;
mod linear;
mod normalization;
mod pooling;
mod reduction;
mod resize;
mod softmax;

use super::site::Site;
use crate::error::Result;
use crate::onnx::proto::NodeProto;

/// Writes the cotangents of a node's inputs.
pub(super) type Rule = fn(&Site) -> Result<()>;

/// The rules of every family.
const FAMILIES: &[&[(&str, Rule)]] = &[
    activation::RULES,
    arithmetic::RULES,
    attention::RULES,
    convolution::RULES,
    gather::RULES,
    layout::RULES,
    linear::RULES,
    normalization::RULES,
    pooling::RULES,
    reduction::RULES,
    resize::RULES,
    softmax::RULES,
];

/// Operators whose output does not change with a small change of their inputs: no gradient passes them.
const FLAT: &[&str] = &[
    "Shape",
    "Size",
    "ArgMax",
    "ArgMin",
    "NonZero",
    "Sign",
    "Floor",
    "Ceil",
    "Round",
    "Equal",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "LessOrEqual",
    "And",
    "Or",
    "Xor",
    "Not",
    "IsNaN",
    "IsInf",
    "ConstantOfShape",
    "EyeLike",
    "OneHot",
    "Range",
    "RandomNormalLike",
    "RandomUniformLike",
    "Bernoulli",
    "Multinomial",
    "Unique",
    "Hardmax",
];

/// The rule of a node's operator.
pub(super) fn find(node: &NodeProto) -> Option<Rule> {
    if !matches!(node.domain(), "" | "ai.onnx") {
        return None;
    }
    let known = FAMILIES.iter().flat_map(|family| family.iter());
    known.filter(|(op_type, _)| *op_type == node.op_type()).map(|&(_, rule)| rule).next()
}

/// Whether no gradient passes the node.
pub(super) fn is_flat(node: &NodeProto) -> bool {
    matches!(node.domain(), "" | "ai.onnx") && FLAT.contains(&node.op_type())
}

/// The inputs whose integers a rule reads: axes, bounds, pads. Of all other integers it needs the sizes alone.
pub(super) fn reads(node: &NodeProto) -> &'static [usize] {
    match node.op_type() {
        "Slice" => &[1, 2, 3, 4],
        "Pad" => &[1, 3],
        name if name.starts_with("Reduce") => &[1],
        _ => &[],
    }
}
