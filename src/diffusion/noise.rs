//! Standard normal noise that depends on nothing but its address: seed, image, step and position.
//!
//! The generator is counter-based (ChaCha with 12 rounds), so any part of any stream can be computed by itself: the same
//! numbers come out on every platform, for every thread count and whatever else is drawn in the same batch. It knows no
//! shapes and no schedules.
//!
//! The key is the seed (8 bytes, little endian, then 24 zeros). The stream number is `image * 2^32 + step`, where step 0
//! is the start noise and step `i + 1` the noise added by a sampler's step `i`. Values `2k` and `2k + 1` come from the
//! stream's 64-bit words `2k` and `2k + 1`, `a` and `b`, by Box and Muller (1958):
//!
//! ```text
//! u = ((a >> 11) + 1) / 2^53 in (0, 1],   v = (b >> 11) / 2^53 in [0, 1)
//! z_2k = sqrt(-2 ln u) cos(2 pi v),   z_2k+1 = sqrt(-2 ln u) sin(2 pi v)
//! ```
//!
//! computed in `f64` with portable (software) logarithm, sine and cosine, and rounded to `f32`.

use rand_chacha::ChaCha12Rng;
use rand_core::{RngCore, SeedableRng};

/// Fills `out` with the standard normal values at positions `0..out.len()` of the given stream.
pub fn standard_normal(seed: u64, image: u32, step: u32, out: &mut [f32]) {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    let mut words = ChaCha12Rng::from_seed(key);
    words.set_stream(u64::from(image) << 32 | u64::from(step));
    const UNIT: f64 = 1.0 / (1_u64 << 53) as f64;
    for pair in out.chunks_mut(2) {
        let u = ((words.next_u64() >> 11) + 1) as f64 * UNIT;
        let v = (words.next_u64() >> 11) as f64 * UNIT;
        let radius = libm::sqrt(-2.0 * libm::log(u));
        let angle = std::f64::consts::TAU * v;
        pair[0] = (radius * libm::cos(angle)) as f32;
        if let Some(second) = pair.get_mut(1) {
            *second = (radius * libm::sin(angle)) as f32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(seed: u64, image: u32, step: u32, count: usize) -> Vec<f32> {
        let mut out = vec![0.0; count];
        standard_normal(seed, image, step, &mut out);
        out
    }

    #[test]
    fn values_are_those_of_the_definition() {
        // Computed in Python from RFC 8439's block function with 12 rounds and Python's log, sin and cos.
        let golden = [
            0.986_243_7,
            -0.16483444,
            -0.683_607_4,
            1.076_429_2,
            -0.444_531_14,
            -0.650_073_3,
            1.251_075_1,
            0.093_720_34,
            1.736_163_3,
            1.446_749_3,
            -0.276_415_5,
            0.255_517_7,
            1.023_635,
            -0.039655827,
            -0.198_360_64,
            -0.625_404_8,
            0.613_418_1,
            0.786_761_46,
            0.38874802,
            0.279_751_75_f32,
        ];
        let drawn = draw(42, 3, 7, golden.len());
        assert_eq!(drawn, golden);
    }

    #[test]
    fn a_shorter_draw_is_the_beginning_of_a_longer_one() {
        let long = draw(7, 1, 3, 1001);
        for count in [0, 1, 2, 5, 1000] {
            assert_eq!(draw(7, 1, 3, count), long[..count]);
        }
    }

    #[test]
    fn seeds_images_and_steps_have_streams_of_their_own() {
        let base = draw(7, 0, 0, 4096);
        for other in [draw(8, 0, 0, 4096), draw(7, 1, 0, 4096), draw(7, 0, 1, 4096)] {
            let dot: f64 = base.iter().zip(&other).map(|(a, b)| f64::from(a * b)).sum::<f64>() / 4096.0;
            assert!(dot.abs() < 4.0 / 64.0, "correlation {dot}");
        }
    }

    #[test]
    fn moments_and_distribution_are_those_of_the_standard_normal() {
        let count = 1 << 20;
        let mut values = draw(2023, 0, 0, count);
        let n = count as f64;
        let moment = |p: i32| values.iter().map(|z| f64::from(*z).powi(p)).sum::<f64>() / n;
        // Four standard errors: Var(z) = 1, Var(z^2) = 2, Var(z^3) = 15, Var(z^4) = 96.
        for (p, expected, variance) in [(1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)] {
            let got = moment(p);
            assert!((got - expected).abs() < 4.0 * f64::sqrt(variance / n), "moment {p} is {got}");
        }
        values.sort_by(f32::total_cmp);
        let cdf = |z: f32| 0.5 * libm::erfc(-f64::from(z) / std::f64::consts::SQRT_2);
        let distance = values
            .iter()
            .enumerate()
            .map(|(rank, z)| {
                let f = cdf(*z);
                (f - rank as f64 / n).abs().max(((rank + 1) as f64 / n - f).abs())
            })
            .fold(0.0, f64::max);
        // Kolmogorov's distance exceeds 1.95 / sqrt(n) with probability 0.001.
        assert!(distance < 1.95 / n.sqrt(), "Kolmogorov distance {distance}");
    }
}
