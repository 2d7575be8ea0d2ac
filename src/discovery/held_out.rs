//! How many weights to shut: the size whose loss on batches that no search saw is the lowest. Good sizes lie orders of
//! magnitude apart from concept to concept, so they are tried on a log scale, each set a part of the next larger one.

use std::ops::Range;

use super::search::{Loss, Search, finite_slope};
use crate::error::Result;
use crate::memory::collected;

/// The sizes to try: 1, 2 and 5 times powers of ten, from `least` up to `most`, which is the last.
pub(super) fn sizes(least: usize, most: usize) -> Vec<usize> {
    let steps = (0..)
        .map_while(|power| 10usize.checked_pow(power))
        .flat_map(|ten| [ten, ten.saturating_mul(2), ten.saturating_mul(5)]);
    steps.skip_while(|&size| size < least).take_while(|&size| size < most).chain([most]).collect()
}

/// The mean loss of the `size` highest ranked weights of a search over `batches`, all of which it did not see.
///
/// Errors: those of the loss; [`crate::Status::NotFinite`] naming the size.
pub(super) fn loss_of(search: &Search, size: usize, batches: Range<usize>, loss: Loss<'_>) -> Result<f64> {
    let scales = collected(search.found_within(size)?.shut.into_iter().map(|shut| f32::from(u8::from(!shut))))?;
    let (mut sum, count) = (0.0, batches.len() as f64);
    for batch in batches {
        sum += finite_slope(loss, &scales, batch, || format!("a set of {size} weights on a held-out batch"))?.loss;
    }
    Ok(sum / count)
}

/// The size of the lowest loss; of equal ones the smallest.
pub(super) fn best(tried: &[(usize, f64)]) -> Option<usize> {
    tried.iter().min_by(|a, b| a.1.total_cmp(&b.1).then(a.0.cmp(&b.0))).map(|&(size, _)| size)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discovery::search::{Bound, Method, Slope};

    #[test]
    fn sizes_are_spread_evenly_over_a_log_scale() {
        assert_eq!(sizes(40, 3000), [50, 100, 200, 500, 1000, 2000, 3000]);
        assert_eq!(sizes(1, 1), [1]);
        assert_eq!(sizes(7, 5), [5]);
    }

    /// Shutting weight i changes the loss by its entry to first order, but each pair of shut weights costs 1 more.
    #[test]
    fn the_size_of_the_lowest_held_out_loss_is_chosen() {
        let gains = [9.0, 7.0, 3.5, 2.6, 2.5, 0.1];
        let mut loss = |scales: &[f32], _: usize| {
            let shut = scales.iter().filter(|&&scale| scale == 0.0).count() as f64;
            let gained: f64 = scales.iter().zip(gains).map(|(scale, gain)| f64::from(1.0 - scale) * gain).sum();
            Ok(Slope { loss: shut * (shut - 1.0) - gained, scales: gains.map(|gain| gain as f32).to_vec() })
        };
        let bound = Bound::HeldOut(6);
        let mut search = Search::new(6, 4, Method::Algorithm1 { rho: 0.0 }, bound).unwrap();
        while !search.is_done() {
            search.step(&mut loss).unwrap();
        }
        let tried: Vec<(usize, f64)> =
            sizes(1, 6).into_iter().map(|size| (size, loss_of(&search, size, 4..6, &mut loss).unwrap())).collect();
        assert_eq!(tried[..3], [(1, -9.0), (2, -14.0), (5, 20.0 - 24.6)]);
        assert_eq!(best(&tried), Some(2));
        assert!(Search::new(6, 4, Method::Gradual { stages: 2 }, bound).is_err());
    }
}
