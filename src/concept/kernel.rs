//! The sparse product at the heart of a composition: a few weights of one row times the contexts of many tokens.
//!
//! It knows slices only. The instruction set is chosen at run time (AVX-512, AVX2 with FMA, or portable); on one machine
//! the result does not depend on anything but the arguments.

/// How a product is computed on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Simd {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl Simd {
    /// The widest that this machine has.
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f") {
                return Self::Avx512;
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return Self::Avx2;
            }
        }
        Self::Portable
    }
}

/// The contexts of some tokens, turned so that one weight meets all tokens in one stretch of memory: `[in, lanes]`.
pub(super) struct Panel {
    /// The tokens' rows in the prompt.
    pub rows: Vec<u32>,
    /// `rows.len()` rounded up to 8, or to a multiple of 16.
    pub lanes: usize,
    context: Vec<f32>,
}

impl Panel {
    /// Panels of the given rows of a context `[rows, in]`, each small enough to stay in a core's own cache.
    pub fn split(context: &[f32], in_features: usize, rows: &[u32]) -> crate::Result<Vec<Self>> {
        const CACHE_FLOATS: usize = 1 << 17;
        let most = (CACHE_FLOATS / in_features / 16 * 16).clamp(16, 160);
        let panels = rows.len().div_ceil(most);
        let even = rows.len().div_ceil(panels.max(1)).next_multiple_of(if rows.len() > 8 { 16 } else { 8 });
        rows.chunks(even.max(1)).map(|rows| Self::new(context, in_features, rows)).collect()
    }

    fn new(context: &[f32], in_features: usize, rows: &[u32]) -> crate::Result<Self> {
        let lanes = if rows.len() <= 8 { 8 } else { rows.len().next_multiple_of(16) };
        let mut turned = super::set::zeroed::<f32>(in_features * lanes)?;
        // Sixteen rows at a time: one written cache line takes all of them.
        for (block, rows) in rows.chunks(16).enumerate() {
            let rows: Vec<&[f32]> =
                rows.iter().map(|&row| &context[row as usize * in_features..][..in_features]).collect();
            for (column, lanes) in turned.chunks_exact_mut(lanes).enumerate() {
                for (lane, row) in lanes[16 * block..].iter_mut().zip(&rows) {
                    *lane = row[column];
                }
            }
        }
        Ok(Self { rows: rows.to_vec(), lanes, context: turned })
    }

    /// Bytes held.
    pub fn memory_bytes(&self) -> usize {
        size_of_val(self.context.as_slice()) + size_of_val(self.rows.as_slice())
    }

    /// `sums[lane] = sum over e of values[e] * context[columns[e], lane]`.
    ///
    /// # Safety
    /// The machine has what `simd` names, each column is below the `in_features` of [`Panel::split`], and `sums` has
    /// [`Panel::lanes`] places.
    #[inline]
    pub unsafe fn multiply(&self, simd: Simd, columns: &[u16], values: &[f32], sums: &mut [f32]) {
        debug_assert_eq!(columns.len(), values.len());
        debug_assert_eq!(sums.len(), self.lanes);
        debug_assert!(columns.iter().all(|&column| (usize::from(column) + 1) * self.lanes <= self.context.len()));
        // SAFETY: the caller's promise; lanes is 8 or a multiple of 16, so that every vector width below divides it.
        unsafe {
            match simd {
                #[cfg(target_arch = "x86_64")]
                Simd::Avx512 if self.lanes >= 16 => x86::avx512(&self.context, self.lanes, columns, values, sums),
                #[cfg(target_arch = "x86_64")]
                Simd::Avx512 | Simd::Avx2 => x86::avx2(&self.context, self.lanes, columns, values, sums),
                Simd::Portable => multiply::<[f32; 8]>(&self.context, self.lanes, columns, values, sums),
            }
        }
    }
}

trait Vector: Copy {
    const LANES: usize;
    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    /// `self + a * b`.
    unsafe fn add_product(self, a: Self, b: Self) -> Self;
    unsafe fn add(self, other: Self) -> Self;
}

impl Vector for [f32; 8] {
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        [value; 8]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller gives a place of eight numbers; arrays of f32 need no more alignment than f32.
        unsafe { *from.cast() }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: as for `load`.
        unsafe { *to.cast() = self }
    }

    #[inline(always)]
    unsafe fn add_product(self, a: Self, b: Self) -> Self {
        std::array::from_fn(|lane| self[lane] + a[lane] * b[lane])
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        std::array::from_fn(|lane| self[lane] + other[lane])
    }
}

/// # Safety
/// As [`Panel::multiply`]; `lanes` is a multiple of `V::LANES`, and the machine has the instructions of `V`.
#[inline(always)]
unsafe fn multiply<V: Vector>(context: &[f32], lanes: usize, columns: &[u16], values: &[f32], sums: &mut [f32]) {
    let mut lane = 0;
    while lane < lanes {
        let vectors = ((lanes - lane) / V::LANES).min(10);
        // SAFETY: the caller's promise; lane + vectors * LANES <= lanes.
        unsafe {
            let (context, sums) = (context.as_ptr().add(lane), sums.as_mut_ptr().add(lane));
            // The second number keeps at least eight sums in flight, as a multiply-add takes several cycles.
            match vectors {
                1 => strip::<V, 1, 8>(context, lanes, columns, values, sums),
                2 => strip::<V, 2, 4>(context, lanes, columns, values, sums),
                3 => strip::<V, 3, 3>(context, lanes, columns, values, sums),
                4 => strip::<V, 4, 2>(context, lanes, columns, values, sums),
                5 => strip::<V, 5, 2>(context, lanes, columns, values, sums),
                6 => strip::<V, 6, 1>(context, lanes, columns, values, sums),
                7 => strip::<V, 7, 1>(context, lanes, columns, values, sums),
                8 => strip::<V, 8, 1>(context, lanes, columns, values, sums),
                9 => strip::<V, 9, 1>(context, lanes, columns, values, sums),
                _ => strip::<V, 10, 1>(context, lanes, columns, values, sums),
            }
        }
        lane += vectors * V::LANES;
    }
}

/// `N` vectors of sums, held in registers over all values; `WAYS` values at a time.
///
/// # Safety
/// As [`multiply`], with `N * V::LANES` lanes from `context` and `sums` on.
#[inline(always)]
unsafe fn strip<V: Vector, const N: usize, const WAYS: usize>(
    context: *const f32,
    lanes: usize,
    columns: &[u16],
    values: &[f32],
    sums: *mut f32,
) {
    // SAFETY: each column's row of `lanes` numbers lies inside the context, and `sums` has N vectors.
    unsafe {
        let mut partial = [[V::splat(0.0); N]; WAYS];
        let (mut columns, mut values) = (columns.chunks_exact(WAYS), values.chunks_exact(WAYS));
        for (columns, values) in (&mut columns).zip(&mut values) {
            for ((sums, &column), &value) in partial.iter_mut().zip(columns).zip(values) {
                add_row(sums, context.add(usize::from(column) * lanes), value);
            }
        }
        for (&column, &value) in columns.remainder().iter().zip(values.remainder()) {
            add_row(&mut partial[0], context.add(usize::from(column) * lanes), value);
        }
        for n in 0..N {
            let total = partial.iter().skip(1).fold(partial[0][n], |total, sums| total.add(sums[n]));
            total.store(sums.add(n * V::LANES));
        }
    }
}

/// `sums += value * row`.
///
/// # Safety
/// The machine has the instructions of `V`, and `row` is the first of `N * V::LANES` numbers.
#[inline(always)]
unsafe fn add_row<V: Vector, const N: usize>(sums: &mut [V; N], row: *const f32, value: f32) {
    // SAFETY: the caller's promise.
    unsafe {
        let value = V::splat(value);
        for (n, sum) in sums.iter_mut().enumerate() {
            *sum = sum.add_product(value, V::load(row.add(n * V::LANES)));
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Vector, multiply};
    use std::arch::x86_64::*;

    /// # Safety
    /// As [`multiply`].
    #[target_feature(enable = "avx512f")]
    pub unsafe fn avx512(context: &[f32], lanes: usize, columns: &[u16], values: &[f32], sums: &mut [f32]) {
        // SAFETY: the caller's promise.
        unsafe { multiply::<__m512>(context, lanes, columns, values, sums) }
    }

    /// # Safety
    /// As [`multiply`].
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn avx2(context: &[f32], lanes: usize, columns: &[u16], values: &[f32], sums: &mut [f32]) {
        // SAFETY: the caller's promise.
        unsafe { multiply::<__m256>(context, lanes, columns, values, sums) }
    }

    macro_rules! vector {
        ($vector:ty, $lanes:literal, $splat:ident, $load:ident, $store:ident, $add_product:ident, $add:ident) => {
            impl Vector for $vector {
                const LANES: usize = $lanes;

                #[inline(always)]
                unsafe fn splat(value: f32) -> Self {
                    // SAFETY: the machine has the instruction, by the caller's promise; so below.
                    unsafe { $splat(value) }
                }

                #[inline(always)]
                unsafe fn load(from: *const f32) -> Self {
                    // SAFETY: as above, and the caller gives a whole vector.
                    unsafe { $load(from) }
                }

                #[inline(always)]
                unsafe fn store(self, to: *mut f32) {
                    // SAFETY: as above.
                    unsafe { $store(to, self) }
                }

                #[inline(always)]
                unsafe fn add_product(self, a: Self, b: Self) -> Self {
                    // SAFETY: as above.
                    unsafe { $add_product(a, b, self) }
                }

                #[inline(always)]
                unsafe fn add(self, other: Self) -> Self {
                    // SAFETY: as above.
                    unsafe { $add(self, other) }
                }
            }
        };
    }

    vector!(__m512, 16, _mm512_set1_ps, _mm512_loadu_ps, _mm512_storeu_ps, _mm512_fmadd_ps, _mm512_add_ps);
    vector!(__m256, 8, _mm256_set1_ps, _mm256_loadu_ps, _mm256_storeu_ps, _mm256_fmadd_ps, _mm256_add_ps);
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand_chacha::ChaCha8Rng;
    use rand_core::{RngCore, SeedableRng};

    #[test]
    fn every_width_gives_the_product() {
        let mut random = ChaCha8Rng::seed_from_u64(1);
        let mut uniform = || random.next_u32() as f32 / 2f32.powi(31) - 1.0;
        let mut widths = vec![Simd::Portable, Simd::detect()];
        #[cfg(target_arch = "x86_64")]
        if Simd::detect() == Simd::Avx512 {
            widths.push(Simd::Avx2);
        }
        for (in_features, rows) in [(5, 1), (64, 3), (64, 8), (40, 9), (33, 77), (48, 154), (32, 170), (8192, 40)] {
            let context: Vec<f32> = (0..in_features * rows).map(|_| uniform()).collect();
            for count in [0usize, 1, 2, 7, 8, 30] {
                let columns: Vec<u16> = (0..count).map(|e| (e * 31 % in_features) as u16).collect();
                let values: Vec<f32> = (0..count).map(|_| uniform()).collect();
                for &simd in &widths {
                    let all: Vec<u32> = (0..rows as u32).collect();
                    let mut seen = 0;
                    for panel in Panel::split(&context, in_features, &all).unwrap() {
                        let mut sums = vec![f32::NAN; panel.lanes];
                        // SAFETY: the width is detected, the columns are below in_features.
                        unsafe { panel.multiply(simd, &columns, &values, &mut sums) };
                        for (&row, &sum) in panel.rows.iter().zip(&sums) {
                            let product = |(&column, &value): (&u16, &f32)| {
                                f64::from(value) * f64::from(context[row as usize * in_features + column as usize])
                            };
                            let expected: f64 = columns.iter().zip(&values).map(product).sum();
                            assert!((f64::from(sum) - expected).abs() < 1e-5, "{simd:?} {rows} {count}");
                            seen += 1;
                        }
                    }
                    assert_eq!(seen, rows);
                }
            }
        }
    }
}
