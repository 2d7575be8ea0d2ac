//! The sparse product at the heart of a composition: a few weights of one row times the contexts of many tokens.
//!
//! It knows slices only. The instruction set is chosen at run time (AVX-512, AVX2 with FMA, or portable); on one machine
//! the result does not depend on anything but the arguments.

/// How a product is computed on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Simd {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl Simd {
    /// The widest that this machine has.
    fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                return if is_x86_feature_detected!("avx512f") { Self::Avx512 } else { Self::Avx2 };
            }
        }
        Self::Portable
    }

    fn lanes(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => 16,
            _ => 8,
        }
    }
}

/// The contexts of some tokens, turned so that one weight meets all tokens in one stretch of memory: `[in, lanes]`.
pub(super) struct Panel {
    /// The tokens' rows in the prompt.
    pub rows: Vec<u32>,
    /// `rows.len()` rounded up to whole vectors, at most [`MAX_VECTORS`].
    pub lanes: usize,
    simd: Simd,
    context: Vec<f32>,
}

/// As many vectors of sums are held in registers.
const MAX_VECTORS: usize = 10;

impl Panel {
    /// Panels of the given rows of a context `[rows, in]`, each small enough to stay in a core's own cache.
    pub fn split(context: &[f32], in_features: usize, rows: &[u32]) -> crate::Result<Vec<Self>> {
        Self::split_for(Simd::detect(), context, in_features, rows)
    }

    fn split_for(simd: Simd, context: &[f32], in_features: usize, rows: &[u32]) -> crate::Result<Vec<Self>> {
        const CACHE_FLOATS: usize = 1 << 17;
        let simd = match simd {
            #[cfg(target_arch = "x86_64")]
            Simd::Avx512 if rows.len() <= 8 => Simd::Avx2,
            other => other,
        };
        let width = simd.lanes();
        let most = (CACHE_FLOATS / in_features / width).clamp(1, MAX_VECTORS) * width;
        let panels = rows.len().div_ceil(most).max(1);
        let even = rows.len().div_ceil(panels).next_multiple_of(width);
        rows.chunks(even.max(1)).map(|rows| Self::new(simd, context, in_features, rows)).collect()
    }

    fn new(simd: Simd, context: &[f32], in_features: usize, rows: &[u32]) -> crate::Result<Self> {
        let lanes = rows.len().next_multiple_of(simd.lanes());
        let mut turned = crate::memory::zeroed::<f32>(in_features * lanes)?;
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
        Ok(Self { rows: rows.to_vec(), lanes, simd, context: turned })
    }

    /// Bytes held.
    pub fn memory_bytes(&self) -> usize {
        size_of_val(self.context.as_slice()) + size_of_val(self.rows.as_slice())
    }

    /// For each row `r` of a sparse matrix:
    /// `sums[r, lane] = sum over its entries e of values[e] * context[columns[e], lane]`.
    ///
    /// # Safety
    /// Each of `rows.columns` is below the `in_features` of [`Panel::split`].
    pub unsafe fn multiply(&self, rows: Rows<'_>, sums: &mut [f32]) {
        debug_assert!(rows.columns.iter().all(|&column| (usize::from(column) + 1) * self.lanes <= self.context.len()));
        // SAFETY: the caller's promise; the machine has `simd`, and `lanes` counts whole vectors of it.
        unsafe {
            match self.simd {
                #[cfg(target_arch = "x86_64")]
                Simd::Avx512 => x86::avx512(&self.context, self.lanes, rows, sums),
                #[cfg(target_arch = "x86_64")]
                Simd::Avx2 => x86::avx2(&self.context, self.lanes, rows, sums),
                Simd::Portable => multiply::<[f32; 8]>(&self.context, self.lanes, rows, sums),
            }
        }
    }
}

/// Rows of a sparse matrix: row `r` has the entries `starts[r]..starts[r + 1]`.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub starts: &'a [u32],
    /// [`PADDING`] more than the last start, so that a row can be read in whole strides.
    pub columns: &'a [u16],
    /// As many as columns; what lies in the padding does not matter.
    pub values: &'a [f32],
}

/// How far columns and values of [`Rows`] reach beyond the last entry.
pub(super) const PADDING: usize = STRIDE - 1;

/// Entries of a narrow panel that are taken at a time.
const STRIDE: usize = 8;

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
/// As [`Panel::multiply`]; `lanes` is at most [`MAX_VECTORS`] whole vectors, and the machine has the instructions of `V`.
#[inline(always)]
unsafe fn multiply<V: Vector>(context: &[f32], lanes: usize, rows: Rows<'_>, sums: &mut [f32]) {
    // SAFETY: the caller's promise.
    unsafe {
        match lanes / V::LANES {
            1 => narrow::<V, 1>(context, rows, sums),
            2 => narrow::<V, 2>(context, rows, sums),
            3 => wide::<V, 3>(context, rows, sums),
            4 => wide::<V, 4>(context, rows, sums),
            5 => wide::<V, 5>(context, rows, sums),
            6 => wide::<V, 6>(context, rows, sums),
            7 => wide::<V, 7>(context, rows, sums),
            8 => wide::<V, 8>(context, rows, sums),
            9 => wide::<V, 9>(context, rows, sums),
            _ => wide::<V, MAX_VECTORS>(context, rows, sums),
        }
    }
}

/// Panels of `N` vectors, entry by entry: `N` multiply-adds are under way at a time.
///
/// # Safety
/// As [`multiply`], with panels of `N` vectors.
#[inline(always)]
unsafe fn wide<V: Vector, const N: usize>(context: &[f32], rows: Rows<'_>, sums: &mut [f32]) {
    for (bounds, sums) in rows.starts.windows(2).zip(sums.chunks_exact_mut(N * V::LANES)) {
        let entries = bounds[0] as usize..bounds[1] as usize;
        // SAFETY: each column's row of N vectors lies inside the context, and `sums` has N vectors.
        unsafe {
            let mut total = [V::splat(0.0); N];
            for (&column, &value) in rows.columns[entries.clone()].iter().zip(&rows.values[entries]) {
                add_row(&mut total, context.as_ptr().add(usize::from(column).wrapping_mul(N * V::LANES)), value);
            }
            store_row(&total, sums);
        }
    }
}

/// Panels of few vectors: [`STRIDE`] entries at a time, those of the next row times zero, so that short rows of unequal
/// length neither wait on one sum nor mislead the branch predictor.
///
/// # Safety
/// As [`multiply`], with panels of `N` vectors.
#[inline(always)]
unsafe fn narrow<V: Vector, const N: usize>(context: &[f32], rows: Rows<'_>, sums: &mut [f32]) {
    const WAYS: usize = 4;
    for (bounds, sums) in rows.starts.windows(2).zip(sums.chunks_exact_mut(N * V::LANES)) {
        let (mut at, end) = (bounds[0] as usize, bounds[1] as usize);
        // SAFETY: as for `wide`; columns and values are sliced with the padding.
        unsafe {
            let mut partial = [[V::splat(0.0); N]; WAYS];
            while at < end {
                let columns = &rows.columns[at..at + STRIDE];
                let kept = &KEEP[(end - at).min(STRIDE)];
                let mut values = [0.0; STRIDE];
                for ((value, stored), kept) in values.iter_mut().zip(&rows.values[at..at + STRIDE]).zip(kept) {
                    *value = f32::from_bits(stored.to_bits() & kept);
                }
                for (entry, (&column, value)) in columns.iter().zip(values).enumerate() {
                    let row = context.as_ptr().add(usize::from(column).wrapping_mul(N * V::LANES));
                    add_row(&mut partial[entry % WAYS], row, value);
                }
                at += STRIDE;
            }
            let [mut total, rest @ ..] = partial;
            for sums in rest {
                for (total, sum) in total.iter_mut().zip(sums) {
                    *total = total.add(sum);
                }
            }
            store_row(&total, sums);
        }
    }
}

/// Row `n` keeps the first `n` numbers.
const KEEP: [[u32; STRIDE]; STRIDE + 1] = {
    let mut keep = [[0; STRIDE]; STRIDE + 1];
    let mut n = 0;
    while n <= STRIDE {
        let mut entry = 0;
        while entry < n {
            keep[n][entry] = u32::MAX;
            entry += 1;
        }
        n += 1;
    }
    keep
};

/// # Safety
/// The machine has the instructions of `V`, and `sums` has `N` vectors.
#[inline(always)]
unsafe fn store_row<V: Vector, const N: usize>(total: &[V; N], sums: &mut [f32]) {
    debug_assert_eq!(sums.len(), N * V::LANES);
    for (n, total) in total.iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { total.store(sums.as_mut_ptr().add(n * V::LANES)) };
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

/// Output features whose sums are kept before they are written: one cache line of f32 in every row.
pub(super) const TILE: usize = 16;

/// The sums of four lanes for [`TILE`] rows of a matrix, `sums[row, lane]`, as `[lane, row]`.
#[inline(always)]
pub(super) fn turn(sums: &[f32], lanes: usize, first_lane: usize, turned: &mut [[f32; TILE]; 4]) {
    for row in (0..TILE).step_by(4) {
        let at = |row: usize| sums[row * lanes + first_lane..].first_chunk::<4>().copied().unwrap_or_default();
        let four = transpose([at(row), at(row + 1), at(row + 2), at(row + 3)]);
        for (turned, four) in turned.iter_mut().zip(four) {
            if let Some(turned) = turned[row..].first_chunk_mut::<4>() {
                *turned = four;
            }
        }
    }
}

/// Asks for up to [`TILE`] numbers that are needed soon: rows lie too far apart for the machine to foresee them.
#[inline(always)]
pub(super) fn prefetch<T>(numbers: &[T]) {
    #[cfg(target_arch = "x86_64")]
    for end in [numbers.first(), numbers.get(TILE - 1).or(numbers.last())].into_iter().flatten() {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: x86-64 has SSE; a prefetch changes nothing that the program can see.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::from_ref(end).cast()) };
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn transpose(rows: [[f32; 4]; 4]) -> [[f32; 4]; 4] {
    use std::arch::x86_64::*;
    // SAFETY: x86-64 has SSE; each load and store is of four numbers.
    unsafe {
        let [mut a, mut b, mut c, mut d] = rows.map(|row| _mm_loadu_ps(row.as_ptr()));
        _MM_TRANSPOSE4_PS(&mut a, &mut b, &mut c, &mut d);
        [a, b, c, d].map(|row| {
            let mut four = [0.0; 4];
            _mm_storeu_ps(four.as_mut_ptr(), row);
            four
        })
    }
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
fn transpose(rows: [[f32; 4]; 4]) -> [[f32; 4]; 4] {
    std::array::from_fn(|lane| std::array::from_fn(|row| rows[row][lane]))
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Rows, Vector, multiply};
    use std::arch::x86_64::*;

    /// # Safety
    /// As [`multiply`].
    #[target_feature(enable = "avx512f")]
    pub unsafe fn avx512(context: &[f32], lanes: usize, rows: Rows<'_>, sums: &mut [f32]) {
        // SAFETY: the caller's promise.
        unsafe { multiply::<__m512>(context, lanes, rows, sums) }
    }

    /// # Safety
    /// As [`multiply`].
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn avx2(context: &[f32], lanes: usize, rows: Rows<'_>, sums: &mut [f32]) {
        // SAFETY: the caller's promise.
        unsafe { multiply::<__m256>(context, lanes, rows, sums) }
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
                let mut columns: Vec<u16> = (0..count).map(|e| (e * 31 % in_features) as u16).collect();
                let mut values: Vec<f32> = (0..count).map(|_| uniform()).collect();
                columns.extend([0; PADDING]);
                values.extend([f32::NAN; PADDING]);
                for &simd in &widths {
                    let all: Vec<u32> = (0..rows as u32).collect();
                    let mut seen = 0;
                    for panel in Panel::split_for(simd, &context, in_features, &all).unwrap() {
                        // An empty row, then the one that is looked at.
                        let starts = [0, 0, count as u32];
                        let mut sums = vec![f32::NAN; 2 * panel.lanes];
                        let sparse = Rows { starts: &starts, columns: &columns, values: &values };
                        // SAFETY: the columns are below in_features.
                        unsafe { panel.multiply(sparse, &mut sums) };
                        let (empty, sums) = sums.split_at(panel.lanes);
                        assert!(empty.iter().all(|&sum| sum == 0.0));
                        for (&row, &sum) in panel.rows.iter().zip(sums) {
                            let product = |(&column, &value): (&u16, &f32)| {
                                f64::from(value) * f64::from(context[row as usize * in_features + column as usize])
                            };
                            let expected: f64 = columns.iter().zip(&values).take(count).map(product).sum();
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
