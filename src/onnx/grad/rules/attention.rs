//! The attention operator of operator set 23, whose weights are computed again: the forward node does not give them. And
//! attention that is written out, where its weights are computed again to save memory.

use super::Rule;
use super::softmax::{less_sum, with_ones};
use crate::error::{Error, Result};
use crate::onnx::attention::around;
use crate::onnx::grad::expr::Expr;
use crate::onnx::grad::facts::Size;
use crate::onnx::grad::site::Site;
use crate::onnx::proto::tensor_proto::DataType;

pub(super) const RULES: &[(&str, Rule)] = &[("Attention", attention)];

/// How the inputs lie: heads as an axis, `[B, H, S, D]`, or side by side in the last one, `[B, S, H D]`.
struct Layout {
    flat: bool,
    heads: i64,
    /// Heads of keys and values; each serves `heads / kv_heads` heads of queries.
    kv_heads: i64,
}

impl Layout {
    fn of(at: &Site) -> Result<Self> {
        let head = |sizes: &[Size]| sizes[1].fixed().map(|size| size as i64);
        let (q, k) = (at.sizes(0)?, at.sizes(1)?);
        let flat = q.len() == 3;
        let counts = match flat {
            true => at.node.attribute_i("q_num_heads").zip(at.node.attribute_i("kv_num_heads")),
            false => head(&q).zip(head(&k)),
        };
        let Some((heads, kv_heads)) = counts.filter(|&(heads, kv_heads)| kv_heads > 0 && heads % kv_heads == 0) else {
            return Err(Error::invalid_file(format!("{}: no fixed number of heads", at.name())));
        };
        Ok(Self { flat, heads, kv_heads })
    }

    fn grouped(&self) -> bool {
        self.heads != self.kv_heads
    }

    /// `[B, H, S, D]`; with grouped heads `[B, kv_heads, group, S, D]`, group 1 for keys and values.
    fn apart(&self, value: Expr, heads: i64) -> Expr {
        let value = match self.flat {
            true => value.reshape_to(&[0, 0, heads, -1]).transpose(&[0, 2, 1, 3]),
            false => value,
        };
        if !self.grouped() {
            return value;
        }
        let tail = value.sizes().slice(0, 2, 4);
        value.reshape(&value.graph().ints(&[0, self.kv_heads, heads / self.kv_heads]).join(&[&tail], 0))
    }

    /// Back to the layout of the inputs.
    fn together(&self, value: Expr, heads: i64) -> Expr {
        let value = if self.grouped() { self.ungrouped(&value, heads) } else { value };
        if !self.flat {
            return value;
        }
        value.transpose(&[0, 2, 1, 3]).reshape_to(&[0, 0, -1])
    }

    /// `[B, kv_heads, group, ...]` as `[B, H, ...]`.
    fn ungrouped(&self, value: &Expr, heads: i64) -> Expr {
        let sizes = value.sizes();
        let head = value.graph().ints(&[0, heads]);
        value.reshape(&head.join(&[&sizes.slice(0, 3, 5)], 0))
    }

    fn axes(&self) -> usize {
        if self.grouped() { 5 } else { 4 }
    }
}

/// Y = P V, P = softmax(S), S = cap(s Q Kᵀ) + M:  V̄ = Pᵀ Ȳ,  S̄ = P (Ȳ Vᵀ - Σ Ȳ Y),  M̄ = S̄,  T̄ = S̄ cap',
/// Q̄ = s T̄ K,  K̄ = s T̄ᵀ Q
fn attention(at: &Site) -> Result<()> {
    if (4..at.inputs()).any(|index| at.has(index)) || (1..at.outputs()).any(|index| at.cotangent(index).is_some()) {
        return Err(
            at.unsupported("past keys and values, or a gradient through keys, values and weights that it also gives")
        );
    }
    let layout = Layout::of(at)?;
    let (axes, cap) = (layout.axes(), at.float("softcap", 0.0));
    let causal = at.int("is_causal", 0) != 0;
    if cap != 0.0 && (causal || at.has(3)) {
        return Err(at.unsupported("softcap together with a mask"));
    }
    let q = layout.apart(at.x(0), layout.heads);
    let k = layout.apart(at.x(1), layout.kv_heads);
    let v = layout.apart(at.x(2), layout.kv_heads);
    let dy = layout.apart(at.dy(), layout.heads);
    let scale = match at.node.attribute_f("scale").filter(|&scale| scale != 0.0) {
        Some(scale) => f64::from(scale),
        None => {
            let width = at.sizes(0)?.last().and_then(Size::fixed).map(|size| size as f64);
            let width = width.ok_or_else(|| at.unsupported("a head size that varies from run to run"))?;
            (if layout.flat { width / layout.heads as f64 } else { width }).powf(-0.5)
        }
    };
    let products = (&q * scale).matmul(&k.transpose_last(axes));
    let capped = (cap != 0.0).then(|| (&products / cap).tanh());
    let scores = match &capped {
        Some(capped) => capped * cap,
        None => masked(at, &layout, products, causal),
    };
    let weights = scores.op_with("Softmax", &[], |node| node.with("axis", -1));
    // Keys and values of a group get the sum over its heads.
    let shared = |value: Expr| if layout.grouped() { value.sum(&[2], true) } else { value };
    at.give(2, || layout.together(shared(weights.transpose_last(axes).matmul(&dy)), layout.kv_heads));
    if !(at.wants(0) || at.wants(1) || at.wants(3)) {
        return Ok(());
    }
    let y = layout.apart(at.y(0), layout.heads);
    let mut bar = &weights * (dy.matmul(&v.transpose_last(axes)) - (&dy * y).sum(&[-1], true));
    if at.wants(3) {
        let of_scores = if layout.grouped() { layout.ungrouped(&bar, layout.heads) } else { bar.clone() };
        let output = at.output_sizes(0)?;
        let keys = at.sizes(1)?[if layout.flat { 1 } else { 2 }].clone();
        let queries = output[if layout.flat { 1 } else { 2 }].clone();
        let heads = Size::always(layout.heads as usize);
        let summed = at.unbroadcast(of_scores, vec![output[0].clone(), heads, queries, keys], 3)?;
        at.give(3, || summed);
    }
    if let Some(capped) = capped {
        bar = bar * (1.0 - &capped * &capped);
    }
    let bar = bar * scale;
    at.give(0, || layout.together(bar.matmul(&k), layout.heads));
    at.give(1, || layout.together(shared(bar.transpose_last(axes).matmul(&q)), layout.kv_heads));
    Ok(())
}

/// The scores with the mask added, or -∞ where flags or causality hide a key.
fn masked(at: &Site, layout: &Layout, products: Expr, causal: bool) -> Expr {
    if !causal && !at.has(3) {
        return products;
    }
    let mut scores = if layout.grouped() { layout.ungrouped(&products, layout.heads) } else { products };
    let hidden = scores.number(f64::NEG_INFINITY);
    if causal {
        let square = scores.sizes().slice(0, 2, 4);
        let seen = square.ones_of(DataType::Float).op_with("Trilu", &[], |node| node.with("upper", 0));
        scores = seen.number(0.0).less(&seen).choose(&scores, &hidden);
    }
    if at.has(3) {
        let mask = at.x(3);
        scores = match mask.data_type {
            DataType::Bool => mask.choose(&scores, &hidden),
            _ => scores + mask,
        };
    }
    if !layout.grouped() {
        return scores;
    }
    let tail = scores.sizes().slice(0, 2, 4);
    scores.reshape(&scores.graph().ints(&[0, layout.kv_heads, layout.heads / layout.kv_heads]).join(&[&tail], 0))
}

/// Attention that is written out, at its last product: from the cotangent of its result to those of queries, keys and
/// values, without what lies between. Nothing but queries, keys, values and result is kept from the forward pass; the
/// weights, by far the largest values of a UNet, are computed again in [`BLOCK`]s. Answers whether it is such a product.
pub(super) fn again(at: &Site) -> Result<bool> {
    let sweep = at.sweep;
    let softmax = at.maker(0).filter(|node| node.is("Softmax"));
    let Some(found) = softmax.and_then(|softmax| around(sweep.model, sweep.topology, softmax)) else {
        return Ok(false);
    };
    let sizes = [&found.queries, &found.keys, &found.values].map(|value| sweep.fixed_sizes(value));
    let [Some(q), Some(k), Some(v)] = sizes else { return Ok(false) };
    let lead = q.len() - 2;
    let same = q.len() == k.len() && k.len() == v.len() && q[..lead] == k[..lead] && k[..lead] == v[..lead];
    if found.result != at.node.output[0] || !same || v[lead + 1] != q[lead + 1] {
        return Ok(false);
    }
    let shape = Shape { heads: q[..lead].iter().product(), queries: q[lead], keys: v[lead], features: q[lead + 1] };
    let flat = |value: Expr, of: [usize; 2]| match lead {
        1 => value,
        _ => value.reshape_to(&[shape.heads as i64, of[0] as i64, of[1] as i64]),
    };
    let (of_queries, of_keys) = ([shape.queries, shape.features], [shape.keys, shape.features]);
    let cotangents = blocks(
        &shape,
        f64::from(found.scale),
        &flat(sweep.value(&found.queries), of_queries),
        &flat(sweep.value(&found.keys), [shape.features, shape.keys]),
        &flat(sweep.value(&found.values), of_keys),
        &flat(sweep.value(&found.result), of_queries),
        &flat(at.dy(), of_queries),
    );
    let [queries, keys, values] = cotangents;
    for (value, cotangent, sizes) in
        [(&found.queries, queries, &q), (&found.keys, keys.transpose(&[0, 2, 1]), &k), (&found.values, values, &v)]
    {
        if sweep.path.is_live(value) {
            let sizes: Vec<i64> = sizes.iter().map(|&size| size as i64).collect();
            sweep.add(value, if lead == 1 { cotangent } else { cotangent.reshape_to(&sizes) });
        }
    }
    Ok(true)
}

/// Bytes of the scores that are held at once, in f32.
const BLOCK: usize = 16 << 20;

struct Shape {
    heads: usize,
    queries: usize,
    keys: usize,
    features: usize,
}

/// The cotangents of queries, keys (both `[heads, places, features]`) and values.
fn blocks(shape: &Shape, scale: f64, q: &Expr, k: &Expr, v: &Expr, y: &Expr, dy: &Expr) -> [Expr; 3] {
    let row = shape.keys * size_of::<f32>();
    let heads = (BLOCK / (row * shape.queries).max(1)).clamp(1, shape.heads);
    let rows = (BLOCK / row.max(1)).clamp(1, shape.queries);
    let part = |value: &Expr, axis: usize, from: usize, count: usize, whole: usize| match count < whole {
        true => value.slice(axis as i64, from as i64, (from + count).min(whole) as i64),
        false => value.clone(),
    };
    let mut all: [Vec<Expr>; 3] = Default::default();
    for head in (0..shape.heads).step_by(heads) {
        let [q, k, v, y, dy] = [q, k, v, y, dy].map(|value| part(value, 0, head, heads, shape.heads));
        let (turned_k, turned_v) = (k.transpose(&[0, 2, 1]), with_ones(&v, 3).transpose(&[0, 2, 1]));
        let (mut of_queries, mut of_others) = (Vec::new(), Vec::<[Expr; 2]>::new());
        for first in (0..shape.queries).step_by(rows) {
            let [q, y, dy] = [&q, &y, &dy].map(|value| part(value, 1, first, rows, shape.queries));
            let q = q * scale;
            let weights = q.matmul(&k).op_with("Softmax", &[], |node| node.with("axis", -1));
            let bar = &weights * less_sum(&dy, &y).matmul(&turned_v);
            let queries = bar.matmul(&turned_k) * scale;
            let keys = bar.transpose(&[0, 2, 1]).matmul(&q);
            let values = weights.transpose(&[0, 2, 1]).matmul(&dy);
            let [queries, keys, values] = together(shape, rows.min(shape.queries - first), [queries, keys, values]);
            of_queries.push(queries);
            of_others.push([keys, values]);
        }
        let sums = of_others.into_iter().reduce(|[a, b], [c, d]| [a + c, b + d]);
        let joined = of_queries[0].join_all(&of_queries[1..], 1);
        for (all, one) in all.iter_mut().zip(std::iter::once(joined).chain(sums.into_iter().flatten())) {
            all.push(one);
        }
    }
    all.map(|parts| parts[0].join_all(&parts[1..], 0))
}

/// The three cotangents of a block as parts of one value: nothing can take one of them before all are there, so that no
/// order of the nodes keeps the scores of two blocks.
fn together(shape: &Shape, rows: usize, cotangents: [Expr; 3]) -> [Expr; 3] {
    let [queries, keys, values] = cotangents;
    let joined = queries.join(&[&keys, &values], 1);
    let mut start = 0;
    [rows, shape.keys, shape.keys].map(|count| {
        start += count;
        joined.slice(1, (start - count) as i64, start as i64)
    })
}
