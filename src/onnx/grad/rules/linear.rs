//! Products of matrices.

use std::collections::HashMap;

use super::{Rule, attention, softmax};
use crate::error::{Error, Result};
use crate::onnx::grad::Effort;
use crate::onnx::grad::expr::Expr;
use crate::onnx::grad::facts::Size;
use crate::onnx::grad::site::Site;

pub(super) const RULES: &[(&str, Rule)] = &[("MatMul", matmul), ("Gemm", gemm), ("Einsum", einsum)];

/// Y = A B over the last two axes, the others broadcast:  Ā = Ȳ Bᵀ,  B̄ = Aᵀ Ȳ, summed over broadcast axes
fn matmul(at: &Site) -> Result<()> {
    if at.effort() == Effort::Memory && attention::again(at)? {
        return Ok(());
    }
    let (left, right) = (at.rank(0)?, at.rank(1)?);
    if left == 1 || right == 1 {
        return matmul_of_vectors(at, left, right);
    }
    if right == 2 && left > 2 {
        return matmul_by_matrix(at, left);
    }
    if at.wants(0) {
        let full = softmax::centred(at)?.unwrap_or_else(|| at.dy().matmul(&at.x(1).transpose_last(right)));
        let sizes = with_last(at.output_sizes(0)?, &at.sizes(0)?);
        let summed = at.unbroadcast(full, sizes, 0)?;
        at.give(0, || summed);
    }
    if at.wants(1) {
        let full = at.x(0).transpose_last(left).matmul(&at.dy());
        let sizes = with_last(at.output_sizes(0)?, &at.sizes(1)?);
        let summed = at.unbroadcast(full, sizes, 1)?;
        at.give(1, || summed);
    }
    Ok(())
}

/// The sizes of a product's cotangent: the batch axes of the output, the last two of the operand.
fn with_last(mut output: Vec<Size>, operand: &[Size]) -> Vec<Size> {
    let (kept, last) = (output.len() - 2, operand.len() - 2);
    output.truncate(kept);
    output.extend_from_slice(&operand[last..]);
    output
}

/// One matrix for all rows: rows are taken as one batch, so that the matrix's cotangent is one product.
fn matmul_by_matrix(at: &Site, left: usize) -> Result<()> {
    let rows = |value: Expr, last: &Size| match last.fixed() {
        Some(size) => Ok(value.reshape_to(&[-1, size as i64])),
        None => Err(at.unsupported("the inner size of a product by a matrix varies from run to run")),
    };
    let (a, y) = (at.sizes(0)?, at.output_sizes(0)?);
    if at.wants(0) {
        let product = match at.effort() {
            Effort::Speed => at.dy().matmul(&at.x(1).transpose(&[1, 0])),
            Effort::Memory => {
                let flat = rows(at.dy(), &y[left - 1])?;
                flat.op_with("Gemm", &[&at.x(1)], |node| node.with("transB", 1)).reshape(&at.shape(0))
            }
        };
        at.give(0, || product);
    }
    if at.wants(1) {
        let product = rows(at.x(0), &a[left - 1])?
            .op_with("Gemm", &[&rows(at.dy(), &y[left - 1])?], |node| node.with("transA", 1));
        at.give(1, || product);
    }
    Ok(())
}

/// A vector is a matrix of one row (left) or one column (right) whose axis the result does not have.
fn matmul_of_vectors(at: &Site, left: usize, right: usize) -> Result<()> {
    let mut dy = at.dy();
    if right == 1 {
        dy = dy.unsqueeze(&[-1]);
    }
    if left == 1 {
        dy = dy.unsqueeze(&[-2]);
    }
    let a = if left == 1 { at.x(0).unsqueeze(&[0]) } else { at.x(0) };
    let b = if right == 1 { at.x(1).unsqueeze(&[1]) } else { at.x(1) };
    let (a_rank, b_rank) = (left.max(2), right.max(2));
    let batch: Vec<i64> = (0..a_rank.max(b_rank) as i64 - 2).collect();
    if at.wants(0) {
        let full = dy.matmul(&b.transpose_last(b_rank));
        let cotangent = if left == 1 { full.sum(&batch, false).squeeze(&[-2]) } else { full };
        at.give(0, || cotangent);
    }
    if at.wants(1) {
        let full = a.transpose_last(a_rank).matmul(&dy);
        let cotangent = if right == 1 { full.sum(&batch, false).squeeze(&[-1]) } else { full };
        at.give(1, || cotangent);
    }
    Ok(())
}

/// Y = α A' B' + β C, A' = A or Aᵀ:  with G = α Ȳ:  Ā = G B'ᵀ (or its transpose),  B̄ = A'ᵀ G,  C̄ = β Ȳ
fn gemm(at: &Site) -> Result<()> {
    let (a_turned, b_turned) = (at.int("transA", 0) != 0, at.int("transB", 0) != 0);
    let (alpha, beta) = (at.float("alpha", 1.0), at.float("beta", 1.0));
    let product = |left: Expr, left_turned: bool, right: Expr, right_turned: bool| {
        left.op_with("Gemm", &[&right], |node| {
            node.with("transA", i64::from(left_turned))
                .with("transB", i64::from(right_turned))
                .with("alpha", alpha as f32)
        })
    };
    at.give(0, || match a_turned {
        false => product(at.dy(), false, at.x(1), !b_turned),
        true => product(at.x(1), b_turned, at.dy(), true),
    });
    at.give(1, || match b_turned {
        false => product(at.x(0), !a_turned, at.dy(), false),
        true => product(at.dy(), true, at.x(0), a_turned),
    });
    at.give_broadcast(2, || if beta == 1.0 { at.dy() } else { at.dy() * beta })
}

/// y = Σ Π xᵢ with a letter for each axis:  x̄ᵢ = the same of ȳ and the other operands, in the letters of xᵢ
fn einsum(at: &Site) -> Result<()> {
    let equation = spelled_out(at)?;
    let (left, output) = equation.split_once("->").unwrap_or_default();
    let operands: Vec<&str> = left.split(',').collect();
    let repeated = |letters: &str| letters.char_indices().any(|(place, letter)| letters[..place].contains(letter));
    if operands.iter().any(|operand| repeated(operand)) {
        return Err(at.unsupported(&format!("a diagonal in {equation:?}")));
    }
    if operands.len() != at.inputs() {
        return Err(Error::invalid_file(format!("{}: {equation:?} for {} operands", at.name(), at.inputs())));
    }
    let mut sizes: HashMap<char, Size> = HashMap::new();
    for (index, operand) in operands.iter().enumerate() {
        for (letter, size) in operand.chars().zip(at.sizes(index)?) {
            if sizes.insert(letter, size.clone()).is_some_and(|other| other != size) {
                return Err(at.unsupported(&format!("{letter:?} of {equation:?} has size 1 in one operand only")));
            }
        }
    }
    for (index, letters) in operands.iter().enumerate() {
        at.give(index, || {
            let others: Vec<usize> = (0..at.inputs()).filter(|&other| other != index).collect();
            let given = || std::iter::once(output).chain(others.iter().map(|&other| operands[other]));
            let (kept, summed): (Vec<_>, Vec<_>) =
                letters.char_indices().partition(|&(_, letter)| given().any(|letters| letters.contains(letter)));
            let kept: String = kept.into_iter().map(|(_, letter)| letter).collect();
            let equation = format!("{}->{kept}", given().collect::<Vec<_>>().join(","));
            let values: Vec<Expr> = others.iter().map(|&other| at.x(other)).collect();
            let product = at
                .dy()
                .op_with("Einsum", &values.iter().collect::<Vec<_>>(), |node| node.with("equation", equation.as_str()));
            // An axis that only this operand has was summed: every place of it gets the same.
            let axes: Vec<i64> = summed.iter().map(|&(axis, _)| axis as i64).collect();
            if axes.is_empty() { product } else { product.unsqueeze(&axes).expand(&at.shape(index)) }
        });
    }
    Ok(())
}

/// The equation of a sum with its output, and a letter for each axis of an ellipsis.
fn spelled_out(at: &Site) -> Result<String> {
    let equation: String = at.text("equation", "").chars().filter(|letter| !letter.is_whitespace()).collect();
    let (left, right) =
        equation.split_once("->").map_or((equation.as_str(), None), |(left, right)| (left, Some(right)));
    let operands: Vec<&str> = left.split(',').collect();
    let Some((index, dotted)) = operands.iter().enumerate().find(|(_, operand)| operand.contains("...")) else {
        return Ok(format!("{left}->{}", output(left, right, "")));
    };
    // It stands for as many axes in each operand.
    let hidden = at.rank(index)?.checked_sub(dotted.len() - "...".len());
    let hidden = hidden.ok_or_else(|| Error::invalid_file(format!("{}: {dotted:?} for fewer axes", at.name())))?;
    let unused: String =
        ('A'..='Z').chain('a'..='z').filter(|&letter| !equation.contains(letter)).take(hidden).collect();
    if unused.len() < hidden {
        return Err(at.unsupported(&format!("more axes in {equation:?} than there are letters")));
    }
    Ok(format!("{}->{}", left.replace("...", &unused), output(left, right, &unused)))
}

/// The output of an equation: if it is left out, the axes of the ellipsis and those that one operand alone has, in the
/// order of the alphabet.
fn output(left: &str, right: Option<&str>, hidden: &str) -> String {
    match right {
        Some(right) => right.replace("...", hidden),
        None => {
            let once = |letter: &char| letter.is_alphabetic() && left.matches(*letter).count() == 1;
            let mut letters: Vec<char> = left.chars().filter(once).collect();
            letters.sort_unstable();
            hidden.chars().chain(letters).collect()
        }
    }
}
