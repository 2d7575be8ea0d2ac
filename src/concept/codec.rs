//! The compressed form of one projection's indices: Rice-coded gaps in two streams.
//!
//! It knows bytes and [`Indices`], not files. Every byte string is either decoded or refused with `InvalidFile`; a
//! decoder reads nothing outside its payload and allocates at most 32 times its length, or a bitmap of the claimed
//! weights where the complement is coded.
//!
//! The bytes are described in [`super::file`]. With `r = 0` the unary stream is the bitmap itself. A random set takes 1.00
//! to 1.05 times its entropy bound at every density. All low parts have one length, and the position `p` of the `i`-th one
//! gives `p - i` as the sum of all high parts so far: a decoder reads both streams without waiting on bit lengths.

use super::set::{Indices, is_dense, projection_weights};
use crate::error::{Error, Result};
use crate::memory::zeroed;

const HEADER_BYTES: usize = 13;
const COMPLEMENT: u8 = 0x80;
const MAX_RICE_PARAMETER: u32 = 31;

/// A payload's own account of what it holds; the streams are not read yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub out_features: usize,
    pub in_features: usize,
    pub weights: u32,
    count: usize,
    rice_parameter: u32,
    complement: bool,
}

/// The payload of a projection of `out_features` x `in_features` weights.
pub(super) fn encode(out_features: usize, in_features: usize, indices: &Indices) -> Result<Vec<u8>> {
    debug_assert_eq!(projection_weights(out_features, in_features).ok(), Some(indices.weights()));
    let complement = 2 * indices.len() as u64 > u64::from(indices.weights());
    let coded = if complement { &indices.complement()? } else { indices };
    let mut gaps = Vec::new();
    gaps.try_reserve_exact(coded.len())?;
    let mut next = 0;
    coded.for_each(|index| {
        gaps.push(index - next);
        next = index + 1;
    });
    let (rice_parameter, bits) = rice_parameter(&gaps);
    let low_bytes = (gaps.len() as u64 * u64::from(rice_parameter)).div_ceil(8) as usize;
    let unary_bytes = (bits - gaps.len() as u64 * u64::from(rice_parameter)).div_ceil(8) as usize;
    let mut payload = zeroed::<u8>(HEADER_BYTES + low_bytes + unary_bytes)?;
    let (header, streams) = payload.split_at_mut(HEADER_BYTES);
    header[0..4].copy_from_slice(&(out_features as u32).to_le_bytes());
    header[4..8].copy_from_slice(&(in_features as u32).to_le_bytes());
    header[8..12].copy_from_slice(&(gaps.len() as u32).to_le_bytes());
    header[12] = rice_parameter as u8 | if complement { COMPLEMENT } else { 0 };
    let (low, unary) = streams.split_at_mut(low_bytes);
    let (mut low_bit, mut unary_bit) = (0usize, 0usize);
    for gap in gaps {
        for bit in 0..rice_parameter {
            low[low_bit / 8] |= ((gap >> bit & 1) as u8) << (low_bit % 8);
            low_bit += 1;
        }
        unary_bit += (gap >> rice_parameter) as usize;
        unary[unary_bit / 8] |= 1 << (unary_bit % 8);
        unary_bit += 1;
    }
    Ok(payload)
}

/// The least parameter with the fewest bits in both streams, and those bits.
fn rice_parameter(gaps: &[u32]) -> (u32, u64) {
    let bits = |r: u32| gaps.iter().map(|gap| u64::from(gap >> r) + 1 + u64::from(r)).sum::<u64>();
    // Raising r saves sum(ceil((gap >> r) / 2)) bits, ever less, and costs one bit a gap: the cost is convex.
    let mut best = (0, bits(0));
    for r in 1..=MAX_RICE_PARAMETER {
        let cost = bits(r);
        if cost > best.1 {
            break;
        }
        if cost < best.1 {
            best = (r, cost);
        }
    }
    best
}

/// Reads and checks a payload's header.
pub(super) fn header(payload: &[u8]) -> Result<Header> {
    let Some((header, streams)) = payload.split_first_chunk::<HEADER_BYTES>() else {
        return Err(Error::invalid_file(format!("a payload of {} bytes has no room for its header", payload.len())));
    };
    let field = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]) as usize;
    let (out_features, in_features, count) = (field(0), field(4), field(8));
    let weights =
        projection_weights(out_features, in_features).map_err(|error| Error::invalid_file(error.message()))?;
    let rice_parameter = u32::from(header[12] & !COMPLEMENT);
    if rice_parameter > MAX_RICE_PARAMETER {
        return Err(Error::invalid_file(format!("the Rice parameter {rice_parameter} is above {MAX_RICE_PARAMETER}")));
    }
    if count > weights as usize {
        return Err(Error::invalid_file(format!("{count} indices cannot lie among {weights} weights")));
    }
    let least = (count as u64 * u64::from(rice_parameter)).div_ceil(8) + (count as u64).div_ceil(8);
    if (streams.len() as u64) < least {
        return Err(Error::invalid_file(format!(
            "{count} indices take at least {least} bytes, but {} are there",
            streams.len()
        )));
    }
    Ok(Header { out_features, in_features, weights, count, rice_parameter, complement: header[12] & COMPLEMENT != 0 })
}

/// Up to 8 bytes as a little-endian number, zeros past the end.
#[inline(always)]
fn word_at(bytes: &[u8], at: usize) -> u64 {
    match bytes.get(at..).and_then(|rest| rest.first_chunk::<8>()) {
        Some(chunk) => u64::from_le_bytes(*chunk),
        None => {
            let mut chunk = [0; 8];
            let rest = bytes.get(at..).unwrap_or(&[]);
            chunk[..rest.len()].copy_from_slice(rest);
            u64::from_le_bytes(chunk)
        }
    }
}

/// Calls `visit` with each coded index, ascending. The caller has checked that the unary stream has `header.count` ones;
/// indices may lie outside the projection.
#[inline(always)]
fn for_each_coded(header: &Header, low: &[u8], unary: &[u8], mut visit: impl FnMut(u64)) {
    let r = header.rice_parameter;
    let mask = (1u64 << r) - 1;
    let (mut member, mut low_bit, mut low_sum) = (0u64, 0usize, 0u64);
    for at in (0..unary.len()).step_by(8) {
        let mut word = word_at(unary, at);
        let base = 8 * at as u64;
        while word != 0 {
            let one = base + u64::from(word.trailing_zeros());
            word &= word - 1;
            low_sum += (word_at(low, low_bit / 8) >> (low_bit % 8)) & mask;
            low_bit += r as usize;
            visit(((one - member) << r) + low_sum + member);
            member += 1;
        }
    }
}

/// The indices of a payload, and the projection's shape.
///
/// Errors: `InvalidFile` for anything that [`encode`] cannot have written; `OutOfMemory`.
pub(super) fn decode(payload: &[u8]) -> Result<(Header, Indices)> {
    let header = header(payload)?;
    let low_bytes = (header.count as u64 * u64::from(header.rice_parameter)).div_ceil(8) as usize;
    let (low, unary) = payload[HEADER_BYTES..].split_at(low_bytes);
    let padding = (low_bytes * 8) as u64 - header.count as u64 * u64::from(header.rice_parameter);
    if low.last().is_some_and(|last| u64::from(last.leading_zeros()) < padding) || unary.last() == Some(&0) {
        return Err(Error::invalid_file("a stream has bits after its end"));
    }
    let ones: usize = (0..unary.len()).step_by(8).map(|at| word_at(unary, at).count_ones() as usize).sum();
    if ones != header.count {
        return Err(Error::invalid_file(format!("the payload says {} indices and holds {ones}", header.count)));
    }
    let outside = |last: u64| {
        Error::invalid_file(format!("neuron index {last} lies outside a projection of {} weights", header.weights))
    };
    let coded = if is_dense(header.count, header.weights) {
        let mut words = zeroed::<u64>((header.weights as usize).div_ceil(64))?;
        if header.rice_parameter == 0 {
            let last = 8 * unary.len() as u64 - 1 - u64::from(unary.last().map_or(0, |last| last.leading_zeros()));
            if last >= u64::from(header.weights) {
                return Err(outside(last));
            }
            for (word, at) in words.iter_mut().zip((0..unary.len()).step_by(8)) {
                *word = word_at(unary, at);
            }
        } else {
            let (mut last, mut at, mut members) = (0, 0, 0);
            for_each_coded(&header, low, unary, |index| {
                last = index;
                if index / 64 != at {
                    words.get_mut(at as usize).into_iter().for_each(|word| *word = members);
                    (at, members) = (index / 64, 0);
                }
                members |= 1 << (index % 64);
            });
            words.get_mut(at as usize).into_iter().for_each(|word| *word = members);
            if last >= u64::from(header.weights) {
                return Err(outside(last));
            }
        }
        Indices::from_words(header.weights, words)?
    } else {
        let mut sorted: Vec<u32> = zeroed(header.count)?;
        let (mut at, mut last) = (0, 0);
        for_each_coded(&header, low, unary, |index| {
            last = index;
            // Truncation is harmless: indices ascend, and the last one is checked below.
            if let Some(slot) = sorted.get_mut(at) {
                *slot = index as u32;
            }
            at += 1;
        });
        if last >= u64::from(header.weights) {
            return Err(outside(last));
        }
        Indices::from_sorted(header.weights, sorted).map_err(|error| Error::invalid_file(error.message()))?
    };
    let indices = if header.complement { coded.complement()? } else { coded };
    Ok((header, indices))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Status;
    use proptest::prelude::*;
    use rand_chacha::ChaCha8Rng;
    use rand_core::{RngCore, SeedableRng};

    fn random(weights: u32, density: f64, seed: u64) -> Indices {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let member = |_: &u32| f64::from(random.next_u32()) < density * 2f64.powi(32);
        Indices::from_sorted(weights, (0..weights).filter(member).collect()).unwrap()
    }

    #[test]
    fn every_density_comes_back_and_stays_near_the_entropy_bound() {
        let (out, inputs) = (640, 768);
        for density in [0.0, 5e-4, 1e-3, 0.01, 0.03, 0.05, 0.1, 0.2, 0.3, 0.38, 0.45, 0.5, 0.62, 0.8, 0.95, 0.999, 1.0]
        {
            let indices = random(out * inputs, density, 7);
            let payload = encode(out as usize, inputs as usize, &indices).unwrap();
            let (header, decoded) = decode(&payload).unwrap();
            assert_eq!((header.out_features, header.in_features), (out as usize, inputs as usize));
            assert_eq!(decoded, indices);
            let layer = super::super::Layer::new("a", out as usize, inputs as usize, indices).unwrap();
            let bound = super::super::NeuronSet::new(vec![layer]).unwrap().entropy_bits() / 8.0;
            assert!(payload.len() as f64 <= 1.055 * bound + 14.0, "{density}: {} of {bound}", payload.len());
        }
    }

    #[test]
    fn a_payload_is_what_its_description_says() {
        // Gaps 2, 0, 5 with r = 1: low bits 0, 0, 1; unary 01 1 001.
        let indices = Indices::from_sorted(12, vec![2, 3, 9]).unwrap();
        let payload = encode(3, 4, &indices).unwrap();
        assert_eq!(payload, [3, 0, 0, 0, 4, 0, 0, 0, 3, 0, 0, 0, 1, 0b100, 0b100110]);
    }

    proptest! {
        #[test]
        fn any_set_comes_back(weights in 1u32..3000, density in 0f64..1.0, seed: u64) {
            let indices = random(weights, density * density, seed);
            let payload = encode(1, weights as usize, &indices).unwrap();
            prop_assert_eq!(decode(&payload).unwrap().1, indices);
        }

        #[test]
        fn bytes_are_decoded_or_refused(mut payload in proptest::collection::vec(any::<u8>(), 0..200), small: bool) {
            if small && payload.len() >= HEADER_BYTES {
                for at in [2, 3, 6, 7, 10, 11] {
                    payload[at] = 0;
                }
                payload[9] = 0;
                payload[12] &= 0x87;
            }
            match decode(&payload) {
                Ok((header, indices)) => {
                    let again = encode(header.out_features, header.in_features, &indices).unwrap();
                    prop_assert_eq!(decode(&again).unwrap().1, indices);
                }
                Err(error) => prop_assert_eq!(error.status(), Status::InvalidFile),
            }
        }
    }

    #[test]
    fn every_truncation_is_refused_and_every_bit_flip_is_survived() {
        for density in [0.02, 0.2, 0.7] {
            let indices = random(40 * 24, density, 3);
            let payload = encode(40, 24, &indices).unwrap();
            for end in 0..payload.len() {
                assert_eq!(decode(&payload[..end]).unwrap_err().status(), Status::InvalidFile, "{end}");
            }
            let mut longer = payload.clone();
            longer.push(0);
            assert!(decode(&longer).is_err());
            for bit in 0..payload.len() * 8 {
                let mut flipped = payload.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                match decode(&flipped) {
                    Ok((header, other)) => {
                        assert!(other != indices || (header.out_features, header.in_features) != (40, 24));
                    }
                    Err(error) => assert_eq!(error.status(), Status::InvalidFile),
                }
            }
        }
    }
}
