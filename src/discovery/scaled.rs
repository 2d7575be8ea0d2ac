//! From scaled weights to what the graph of a UNet is given, and from its gradient to the scales'.
//!
//! For cross-attention, with `y = C (s ∘ W)ᵀ` the keys or values of texts `C`, and `ȳ` the gradient with respect to them, the
//! gradient with respect to the scales is `W ∘ (ȳᵀ C)`, for the rows on which the scales act. With respect to the texts it is
//! the sum of `ȳ W` over all projections.
//!
//! For self-attention, whose keys and values only the graph knows, the weights `s ∘ W` are inputs: it gives the gradient with
//! respect to them, and the scales' is that times `W`. They act on every row.

use std::sync::Arc;

use ndarray::linalg::general_mat_mul;
use ndarray::{ArrayView2, ArrayViewMut2};
use rayon::ThreadPool;
use rayon::prelude::*;

use super::draw::{ActingRow, Batch};
use crate::concept::{ProjectionWeights, Projections, Weights};
use crate::diffusion::unet::Conditioning;
use crate::error::{Error, Result, Status};
use crate::memory::{PANELS, collected, copied, extend, room, zeroed};
use crate::runtime::Tensor;

/// Weights that have scales.
pub(super) struct ScaledWeights {
    pub(super) projections: Arc<Projections>,
    /// Which of [`Projections::all`] are searched, ascending.
    pub(super) searched: Vec<usize>,
    /// `W` of each searched projection as f32, `[out, in]`.
    pub(super) weights: Vec<Vec<f32>>,
    pub(super) pool: ThreadPool,
}

/// Members of a set in one searched projection.
pub(super) struct MembersOf<'a> {
    set: usize,
    /// Which of [`ScaledWeights::searched`] it is.
    projection: usize,
    /// The place of its first scale.
    from: usize,
    /// Their places, ascending, and their scales.
    places: &'a [usize],
    scales: &'a [f32],
}

/// What the graph is given by scaled weights.
pub(super) struct Steered {
    /// `[B, tokens, out]` of each projection of cross-attention.
    pub(super) keys_values: Vec<Vec<f32>>,
    /// `[out, in]` of each projection of self-attention.
    pub(super) weights: Vec<Vec<f32>>,
}

impl ScaledWeights {
    pub(super) fn searched(&self) -> impl Iterator<Item = &ProjectionWeights> {
        self.searched.iter().map(|&at| self.projection(at))
    }

    /// One of [`Projections::all`].
    fn projection(&self, at: usize) -> &ProjectionWeights {
        let cross = self.projections.as_slice();
        cross.get(at).unwrap_or_else(|| &self.projections.self_attention()[at - cross.len()])
    }

    pub(super) fn searches_self_attention(&self) -> bool {
        self.searched.iter().any(|&at| at >= self.projections.as_slice().len())
    }

    /// The number of scales of a set.
    pub(super) fn len(&self) -> usize {
        self.weights.iter().map(Vec::len).sum()
    }

    /// Which of self-attention's projections a searched one is, if any.
    fn of_self(&self, searched: usize) -> Option<usize> {
        self.searched[searched].checked_sub(self.projections.as_slice().len())
    }

    /// Keys, values and weights as they are.
    pub(super) fn untouched(&self, text: &Conditioning) -> Result<Steered> {
        let of_self = self.projections.self_attention().iter().map(|projection| widened(&projection.weights));
        Ok(Steered { keys_values: self.keys_values(text)?, weights: of_self.collect::<Result<_>>()? })
    }

    /// Keys and values as they are. Equal texts share a product.
    fn keys_values(&self, text: &Conditioning) -> Result<Vec<Vec<f32>>> {
        let Conditioning { batch, tokens, context, .. } = text;
        let of = |context: &[f32], batch: usize| -> Result<Vec<Vec<f32>>> {
            Ok(self.projections.keys_values(context, batch, *tokens, &self.pool)?.into_base())
        };
        let texts: Vec<&[f32]> = context.chunks((context.len() / batch.max(&1)).max(1)).collect();
        let first_like = |at: usize| texts[..at].iter().position(|known| *known == texts[at]).unwrap_or(at);
        let like: Vec<usize> = (0..texts.len()).map(first_like).collect();
        let distinct: Vec<usize> = (0..texts.len()).filter(|&at| like[at] == at).collect();
        if texts.len() != *batch || distinct.len() == texts.len() {
            return of(context, *batch);
        }
        let mut contexts = Vec::new();
        distinct.iter().try_for_each(|&at| extend(&mut contexts, texts[at].iter().copied()))?;
        let shared_out = |values: Vec<f32>| {
            let (size, mut all) = (values.len() / distinct.len(), Vec::new());
            for first in &like {
                let place = distinct.partition_point(|at| at < first);
                extend(&mut all, values[place * size..][..size].iter().copied())?;
            }
            Ok(all)
        };
        of(&contexts, distinct.len())?.into_iter().map(shared_out).collect()
    }

    /// Keys, values and weights, with `scales` acting on the rows of a batch, those of self-attention on all.
    pub(super) fn steered(&self, part: &Batch, scales: &[f32]) -> Result<Steered> {
        let text = &part.conditioning;
        let mut steered = self.untouched(text)?;
        let mut rest = scales;
        for (searched, own) in self.weights.iter().enumerate() {
            let (scales, others) = rest.split_at(own.len());
            if let Some(at) = self.of_self(searched) {
                steered.weights[at].iter_mut().zip(scales).for_each(|(weight, scale)| *weight *= scale);
            }
            rest = others;
        }
        self.steer(&mut steered.keys_values, text, &rows_of(&part.rows, 0)?, scales)?;
        Ok(steered)
    }

    /// Keys, values and weights with scales of these members only, each on the rows of its set.
    pub(super) fn steered_at(&self, part: &Batch, members: &[MembersOf<'_>]) -> Result<Steered> {
        let mut steered = self.untouched(&part.conditioning)?;
        let (features, context) = (self.projections.in_features(), &part.conditioning.context);
        for MembersOf { set, projection, from, places, scales } in members {
            let weights = &self.weights[*projection];
            if let Some(at) = self.of_self(*projection) {
                let own = &mut steered.weights[at];
                places.iter().zip(*scales).for_each(|(place, scale)| own[place - from] *= scale);
                continue;
            }
            let (out, rows) = (weights.len() / features, rows_of(&part.rows, *set)?);
            let values = &mut steered.keys_values[self.searched[*projection]];
            for (place, scale) in places.iter().zip(*scales) {
                let (column, feature) = ((place - from) / features, (place - from) % features);
                let change = weights[place - from] * (scale - 1.0);
                rows.iter().for_each(|row| values[row * out + column] += context[row * features + feature] * change);
            }
        }
        Ok(steered)
    }

    /// Shares out members of sets, in the order of their places. There must be a scale at all.
    pub(super) fn by_projection<'a>(
        &self,
        mut places: &'a [usize],
        mut scales: &'a [f32],
    ) -> Result<Vec<MembersOf<'a>>> {
        let mut shares = Vec::new();
        while let Some(first) = places.first() {
            let set = first / self.len();
            let mut from = set * self.len();
            for (projection, weights) in self.weights.iter().enumerate() {
                let own = places.partition_point(|&place| place - from < weights.len());
                let ((places_of, others), (scales_of, scales_left)) = (places.split_at(own), scales.split_at(own));
                if own > 0 {
                    let share = MembersOf { set, projection, from, places: places_of, scales: scales_of };
                    extend(&mut shares, [share])?;
                }
                (places, scales, from) = (others, scales_left, from.saturating_add(weights.len()));
            }
        }
        Ok(shares)
    }

    /// Brings the keys and values of some rows to `scales`.
    fn steer(&self, values: &mut [Vec<f32>], text: &Conditioning, rows: &[usize], scales: &[f32]) -> Result<()> {
        if rows.is_empty() {
            return Ok(());
        }
        let features = self.projections.in_features();
        let mut touched = zeroed::<f32>(rows.len() * features)?;
        for (row, target) in rows.iter().zip(touched.chunks_exact_mut(features)) {
            target.copy_from_slice(&text.context[row * features..(row + 1) * features]);
        }
        let mut rest = scales;
        let mut scaled = Vec::with_capacity(self.weights.len());
        let mut targets: Vec<Option<&mut Vec<f32>>> = values.iter_mut().map(Some).collect();
        for (weights, &at) in self.weights.iter().zip(&self.searched) {
            let (own, others) = rest.split_at(weights.len());
            let target = targets.get_mut(at).and_then(Option::take);
            scaled.extend(target.map(|values| (at, weights, own, values)));
            rest = others;
        }
        self.pool.install(|| {
            scaled.into_par_iter().try_for_each(|(at, weights, scales, values)| {
                let projection = &self.projections.as_slice()[at];
                let out = projection.out_features;
                let scaled = collected(weights.iter().zip(scales).map(|(weight, scale)| weight * scale))?;
                let mut product = zeroed::<f32>(rows.len() * out)?;
                multiply(&touched, [rows.len(), features], &scaled, [out, features], &mut product)?;
                for (row, product) in rows.iter().zip(product.chunks_exact(out)) {
                    let target = &mut values[row * out..(row + 1) * out];
                    match &projection.bias {
                        Some(bias) => {
                            target.iter_mut().zip(product).zip(bias).for_each(|((to, a), b)| *to = a + b);
                        }
                        None => target.copy_from_slice(product),
                    }
                }
                Ok::<(), Error>(())
            })
        })
    }

    /// Σ `ȳ W` over all projections, `[rows, features]`.
    pub(super) fn through_weights(&self, cotangents: &[Vec<f32>], rows: usize) -> Result<Vec<f32>> {
        let features = self.projections.in_features();
        let products = self.pool.install(|| {
            let each = self.projections.as_slice().par_iter().zip(cotangents).map(|(projection, cotangents)| {
                let (out, weights) = (projection.out_features, widened(&projection.weights)?);
                let mut product = zeroed::<f32>(rows * features)?;
                product_of(
                    ArrayView2::from_shape([rows, out], cotangents).map_err(unfit)?,
                    ArrayView2::from_shape([out, features], &weights).map_err(unfit)?,
                    &mut product,
                )?;
                Ok(product)
            });
            each.collect::<Result<Vec<_>>>()
        })?;
        // In the order of the projections, so that the sum does not depend on threads.
        let mut sum = zeroed::<f32>(rows * features)?;
        for product in &products {
            sum.iter_mut().zip(product).for_each(|(sum, value)| *sum += value);
        }
        Ok(sum)
    }

    /// The gradients of each searched projection.
    ///
    /// Errors: [`Status::NotFinite`], naming the projection.
    fn cotangents<'t>(&self, answers: &'t [Tensor]) -> Result<Vec<&'t [f32]>> {
        let finite = |(answer, projection): (&'t Tensor, &ProjectionWeights)| {
            let cotangents = answer.as_slice::<f32>()?;
            if cotangents.iter().any(|value| !value.is_finite()) {
                let what = format!("the gradient of {} is not finite", projection.path);
                return Err(Error::new(Status::NotFinite, what));
            }
            Ok(cotangents)
        };
        answers.iter().zip(self.searched()).map(finite).collect()
    }

    /// Adds to the slope of each member's scale what [`ScaledWeights::add_slopes`] would.
    pub(super) fn add_slopes_of(
        &self,
        members: &[MembersOf<'_>],
        part: &Batch,
        answers: &[Tensor],
        slopes: &mut [f32],
    ) -> Result<()> {
        let (features, context) = (self.projections.in_features(), &part.conditioning.context);
        let cotangents = self.cotangents(answers)?;
        let mut rest = slopes;
        for MembersOf { set, projection, from, places, .. } in members {
            let (slopes, others) = rest.split_at_mut(places.len());
            rest = others;
            let (weights, cotangents) = (&self.weights[*projection], cotangents[*projection]);
            let mut add = |slope_of: &dyn Fn(usize) -> f32| {
                let each = slopes.iter_mut().zip(*places);
                each.for_each(|(slope, place)| *slope += weights[place - from] * slope_of(place - from));
            };
            if self.of_self(*projection).is_some() {
                add(&|at| cotangents[at]);
                continue;
            }
            let (out, rows) = (weights.len() / features, rows_of(&part.rows, *set)?);
            add(&|at| {
                let (column, feature) = (at / features, at % features);
                rows.iter().map(|row| cotangents[row * out + column] * context[row * features + feature]).sum()
            });
        }
        Ok(())
    }

    /// Adds to the slope of each scale `W ∘ (ȳᵀ C)` of the rows on which it acts, or of self-attention `W` times its gradient.
    pub(super) fn add_slopes(&self, part: &Batch, answers: &[Tensor], slopes: &mut [f32]) -> Result<()> {
        let cotangents = self.cotangents(answers)?;
        let rows = rows_of(&part.rows, 0)?;
        let features = self.projections.in_features();
        let context = &part.conditioning.context;
        let mut turned = zeroed::<f32>(rows.len() * features)?;
        for (at, row) in rows.iter().enumerate() {
            for (feature, value) in context[row * features..(row + 1) * features].iter().enumerate() {
                turned[feature * rows.len() + at] = *value;
            }
        }
        let mut rest = slopes;
        let mut targets = Vec::with_capacity(self.weights.len());
        for weights in &self.weights {
            let (own, others) = rest.split_at_mut(weights.len());
            targets.push(own);
            rest = others;
        }
        self.pool.install(|| {
            targets.into_par_iter().enumerate().try_for_each(|(at, slopes)| {
                let (weights, cotangents) = (&self.weights[at], cotangents[at]);
                let out = weights.len() / features;
                if self.of_self(at).is_some() {
                    slopes.iter_mut().zip(cotangents).zip(weights).for_each(|((slope, g), w)| *slope += g * w);
                    return Ok(());
                }
                if rows.is_empty() {
                    return Ok(());
                }
                let mut of_rows = zeroed::<f32>(out * rows.len())?;
                for (at, row) in rows.iter().enumerate() {
                    for (column, value) in cotangents[row * out..(row + 1) * out].iter().enumerate() {
                        of_rows[column * rows.len() + at] = *value;
                    }
                }
                let mut product = zeroed::<f32>(out * features)?;
                multiply(&of_rows, [out, rows.len()], &turned, [features, rows.len()], &mut product)?;
                slopes.iter_mut().zip(product).zip(weights).for_each(|((slope, g), w)| *slope += g * w);
                Ok(())
            })
        })
    }
}

/// The rows on which a set acts.
fn rows_of(rows: &[ActingRow], set: usize) -> Result<Vec<usize>> {
    collected(rows.iter().filter(|acting| acting.set == set).map(|acting| acting.row))
}

pub(super) fn widened(weights: &Weights) -> Result<Vec<f32>> {
    match weights {
        Weights::F32(weights) => copied(weights),
        Weights::F16(weights) => collected(weights.iter().map(|weight| weight.to_f32())),
        Weights::Bf16(weights) => collected(weights.iter().map(|weight| weight.to_f32())),
    }
}

/// `to [m, n] = a [m, k] bᵀ` with `b [n, k]`.
fn multiply(a: &[f32], a_shape: [usize; 2], b: &[f32], b_shape: [usize; 2], to: &mut [f32]) -> Result<()> {
    let a = ArrayView2::from_shape(a_shape, a).map_err(unfit)?;
    let b = ArrayView2::from_shape(b_shape, b).map_err(unfit)?;
    product_of(a, b.reversed_axes(), to)
}

/// `to [m, n] = a [m, k] b [k, n]`.
fn product_of(a: ArrayView2<'_, f32>, b: ArrayView2<'_, f32>, to: &mut [f32]) -> Result<()> {
    let mut to = ArrayViewMut2::from_shape([a.nrows(), b.ncols()], to).map_err(unfit)?;
    room(PANELS)?;
    general_mat_mul(1.0, &a, &b, 0.0, &mut to);
    Ok(())
}

fn unfit(error: ndarray::ShapeError) -> Error {
    Error::invalid_argument("a size does not fit its numbers").caused_by(error)
}
