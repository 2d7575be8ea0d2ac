//! What a concept's weights become where they are not shut: one tuned value a neuron (the fine-tuning of Cones, arXiv
//! 2303.05125, figure 3, which compares the precisions that are here).

use half::f16;

use super::set::NeuronSet;
use crate::error::{Error, Result};
use crate::memory::collected;

/// How tuned values are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// One bit: two levels for each projection.
    Binary,
    /// Two bits: four levels for each projection.
    Quaternary,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
}

impl Precision {
    /// All, the smallest first.
    pub const ALL: [Self; 4] = [Self::Binary, Self::Quaternary, Self::F16, Self::F32];

    /// As a concept file names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Binary => "binary",
            Self::Quaternary => "quaternary",
            Self::F16 => "float16",
            Self::F32 => "float32",
        }
    }

    /// Bits of a code, where values are kept as codes of a few levels.
    fn code_bits(self) -> Option<usize> {
        match self {
            Self::Binary => Some(1),
            Self::Quaternary => Some(2),
            Self::F16 | Self::F32 => None,
        }
    }

    /// Whether it holds a few levels only, not numbers.
    pub(crate) fn is_coarse(self) -> bool {
        self.code_bits().is_some()
    }

    /// Rounds the values of one projection: to the nearest number, or to the nearest of the levels of least squared error
    /// (Lloyd 1982).
    ///
    /// Errors: [`crate::Status::OutOfMemory`].
    pub(crate) fn round(self, values: &mut [f32]) -> Result<()> {
        match self.code_bits() {
            Some(bits) => {
                let levels = levels(values, 1 << bits)?;
                values.iter_mut().for_each(|value| *value = levels[nearest(&levels, *value)]);
            }
            None if self == Self::F16 => values.iter_mut().for_each(|value| *value = f16::from_f32(*value).to_f32()),
            None => {}
        }
        Ok(())
    }
}

/// A value for each member of a [`NeuronSet`]: what its weight is while the concept acts, in the weight's own unit.
#[derive(Clone, Debug, PartialEq)]
pub struct Values {
    precision: Precision,
    /// In the order of the set's layers and of their indices; just what the precision can hold.
    layers: Vec<Vec<f32>>,
}

impl Values {
    /// Rounds values to a precision, projection by projection. `layers` has a list for each projection of `neurons`, a value
    /// a member.
    ///
    /// Errors: `InvalidArgument` if the lists do not fit the set, or a value is not finite or too large for the precision.
    pub fn new(precision: Precision, neurons: &NeuronSet, layers: Vec<Vec<f32>>) -> Result<Self> {
        let mut rounded = Self { precision, layers };
        rounded.check(neurons)?;
        rounded.layers.iter_mut().try_for_each(|values| precision.round(values))?;
        rounded.check(neurons)?;
        Ok(rounded)
    }

    /// How they are kept.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The values of a projection, by its place in the set's layers, in ascending order of the indices.
    pub fn layer(&self, at: usize) -> &[f32] {
        self.layers.get(at).map_or(&[], Vec::as_slice)
    }

    /// Bytes held.
    pub fn memory_bytes(&self) -> usize {
        self.layers.iter().map(|values| values.capacity() * size_of::<f32>()).sum()
    }

    /// Whether they are one finite value a member.
    ///
    /// Errors: `InvalidArgument` with the projection.
    pub(super) fn check(&self, neurons: &NeuronSet) -> Result<()> {
        if self.layers.len() != neurons.layers().len() {
            let (lists, layers) = (self.layers.len(), neurons.layers().len());
            return Err(Error::invalid_argument(format!("{lists} lists of values for {layers} projections")));
        }
        for (layer, values) in neurons.layers().iter().zip(&self.layers) {
            let (path, members) = (layer.path(), layer.indices().len());
            if values.len() != members {
                return Err(Error::invalid_argument(format!("{path}: {} values for {members} neurons", values.len())));
            }
            if let Some(value) = values.iter().find(|value| !value.is_finite()) {
                let kept = self.precision.name();
                return Err(Error::invalid_argument(format!("{path}: a value is {value} when kept as {kept}")));
            }
        }
        Ok(())
    }

    /// The values of a projection as the bytes of a file: little-endian numbers; or the levels, ascending, as f32 and then
    /// a code a value, the first in the lowest bits.
    ///
    /// Errors: `OutOfMemory`.
    pub(super) fn encode(&self, at: usize) -> Result<Vec<u8>> {
        let values = self.layer(at);
        let Some(bits) = self.precision.code_bits() else {
            return match self.precision {
                Precision::F16 => collected(values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes())),
                _ => collected(values.iter().flat_map(|value| value.to_le_bytes())),
            };
        };
        let levels = levels(values, 1 << bits)?;
        let mut bytes: Vec<u8> = levels.iter().flat_map(|level| level.to_le_bytes()).collect();
        for group in values.chunks(8 / bits) {
            let codes = group.iter().enumerate();
            bytes.push(codes.fold(0, |byte, (place, value)| byte | (nearest(&levels, *value) << (place * bits)) as u8));
        }
        Ok(bytes)
    }

    /// The values of a projection with `members` neurons, from what [`Values::encode`] gives.
    ///
    /// Errors: `InvalidFile` for another number of bytes, levels that do not ascend, or bits after the last code.
    pub(super) fn decode(precision: Precision, bytes: &[u8], members: usize) -> Result<Vec<f32>> {
        let levels = precision.code_bits().map_or(0, |bits| 1 << bits);
        let expected = match precision.code_bits() {
            Some(bits) => 4 * levels + (members * bits).div_ceil(8),
            None if precision == Precision::F16 => 2 * members,
            None => 4 * members,
        };
        if bytes.len() != expected {
            let found = bytes.len();
            return Err(Error::invalid_file(format!("{members} values take {expected} bytes, not {found}")));
        }
        let f32s = |bytes: &[u8]| -> Vec<f32> {
            bytes.as_chunks::<4>().0.iter().map(|number| f32::from_le_bytes(*number)).collect()
        };
        let Some(bits) = precision.code_bits() else {
            return Ok(match precision {
                Precision::F16 => {
                    bytes.as_chunks::<2>().0.iter().map(|number| f16::from_le_bytes(*number).to_f32()).collect()
                }
                _ => f32s(bytes),
            });
        };
        let (levels, codes) = bytes.split_at(4 * levels);
        let levels = f32s(levels);
        if !levels.is_sorted() {
            return Err(Error::invalid_file(format!("the levels {levels:?} do not ascend")));
        }
        let code = |at: usize| codes[at * bits / 8] >> (at * bits % 8) & ((1 << bits) - 1);
        if codes.last().is_some_and(|last| u32::from(*last).checked_shr(used(members * bits)).unwrap_or(0) != 0) {
            return Err(Error::invalid_file("the codes have bits after their end"));
        }
        Ok((0..members).map(|at| levels[usize::from(code(at))]).collect())
    }
}

/// Bits that are used in the last byte of a stream.
fn used(bits: usize) -> u32 {
    (bits + 7) as u32 % 8 + 1
}

/// The `count` levels of least squared error, ascending: Lloyd's iteration from the values' quantiles. Values that are
/// already of so few levels are kept as they are.
///
/// Errors: [`crate::Status::OutOfMemory`].
fn levels(values: &[f32], count: usize) -> Result<Vec<f32>> {
    let mut sorted = collected(values.iter().copied().filter(|value| value.is_finite()))?;
    sorted.sort_unstable_by(f32::total_cmp);
    let mut distinct: Vec<f32> = sorted.chunk_by(|a, b| a == b).map(|alike| alike[0]).take(count + 1).collect();
    if distinct.len() <= count {
        distinct.resize(count, distinct.last().copied().unwrap_or(0.0));
        return Ok(distinct);
    }
    let quantile = |at: usize| sorted[(2 * at + 1) * sorted.len() / (2 * count)];
    let mut levels: Vec<f32> = (0..count).map(quantile).collect();
    for _ in 0..100 {
        let (mut start, mut next) = (0, Vec::with_capacity(count));
        for at in 0..count {
            let middle = levels.get(at + 1).map(|above| (f64::from(levels[at]) + f64::from(*above)) / 2.0);
            let end = middle.map_or(sorted.len(), |middle| sorted.partition_point(|value| f64::from(*value) <= middle));
            let own = &sorted[start..end.max(start)];
            let mean = own.iter().map(|value| f64::from(*value)).sum::<f64>() / own.len() as f64;
            next.push(if own.is_empty() { levels[at] } else { mean as f32 });
            start = end.max(start);
        }
        if next == levels {
            break;
        }
        levels = next;
    }
    Ok(levels)
}

/// The place of the level that is nearest to a value; the lower of two.
fn nearest(levels: &[f32], value: f32) -> usize {
    let distance = |level: &f32| (f64::from(*level) - f64::from(value)).abs();
    (1..levels.len()).fold(0, |best, at| if distance(&levels[at]) < distance(&levels[best]) { at } else { best })
}

#[cfg(test)]
mod tests {
    use super::super::{Indices, Layer};
    use super::*;
    use crate::error::Status;
    use proptest::prelude::*;

    fn set(members: &[usize]) -> NeuronSet {
        let layer = |(at, &members): (usize, &usize)| {
            let indices = Indices::from_sorted(400, (0..members as u32).map(|index| 3 * index).collect()).unwrap();
            Layer::new(format!("layer{at}"), 20, 20, indices).unwrap()
        };
        NeuronSet::new(members.iter().enumerate().map(layer).collect()).unwrap()
    }

    proptest! {
        #[test]
        fn values_come_back_as_their_precision_holds_them(
            values in proptest::collection::vec(-3f32..3.0, 0..60),
            others in proptest::collection::vec(-1e-3f32..1e-3, 0..9),
        ) {
            let neurons = set(&[values.len(), others.len()]);
            for precision in Precision::ALL {
                let kept = Values::new(precision, &neurons, vec![values.clone(), others.clone()]).unwrap();
                for at in [0, 1] {
                    let own = kept.layer(at);
                    prop_assert_eq!(&Values::decode(precision, &kept.encode(at).unwrap(), own.len()).unwrap(), own);
                    let step = match precision {
                        Precision::F32 => 0.0,
                        Precision::F16 => 2e-3,
                        Precision::Binary | Precision::Quaternary => 6.0,
                    };
                    let given = if at == 0 { &values } else { &others };
                    prop_assert!(own.iter().zip(given).all(|(a, b)| (a - b).abs() <= step));
                }
                // Rounding what is rounded changes nothing.
                let layers = vec![kept.layer(0).to_vec(), kept.layer(1).to_vec()];
                prop_assert_eq!(&Values::new(precision, &neurons, layers).unwrap(), &kept);
            }
        }
    }

    #[test]
    fn levels_lie_where_the_values_do() {
        let neurons = set(&[8]);
        let values = vec![-1.0, -1.1, -0.9, 0.0, 0.0, 2.0, 5.0, 5.2];
        let quaternary = Values::new(Precision::Quaternary, &neurons, vec![values.clone()]).unwrap();
        assert_eq!(quaternary.layer(0), [-1.0, -1.0, -1.0, 0.0, 0.0, 2.0, 5.1, 5.1]);
        // -1, 0, 2, 5.1 as f32; codes 0 0 0 1, 1 2 3 3, two bits each, the first lowest.
        let bytes = quaternary.encode(0).unwrap();
        assert_eq!(bytes[16..], [0b01_00_00_00, 0b11_11_10_01]);
        let binary = Values::new(Precision::Binary, &neurons, vec![values]).unwrap();
        let (low, high) = (binary.layer(0)[0], binary.layer(0)[7]);
        assert!(binary.layer(0).iter().all(|value| *value == low || *value == high));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let neurons = set(&[3]);
        for layers in [vec![], vec![vec![1.0; 2]], vec![vec![1.0, f32::NAN, 0.0]]] {
            let error = Values::new(Precision::F32, &neurons, layers).unwrap_err();
            assert_eq!(error.status(), Status::InvalidArgument);
        }
        let error = Values::new(Precision::F16, &neurons, vec![vec![1e6, 0.0, 0.0]]).unwrap_err();
        assert!(error.message().contains("layer0") && error.message().contains("inf"), "{error}");
        let good = Values::new(Precision::Quaternary, &neurons, vec![vec![1.0, 2.0, 3.0]]).unwrap().encode(0).unwrap();
        let mut beyond = good.clone();
        beyond[16] |= 0x40;
        let mut falling = good.clone();
        falling[..4].copy_from_slice(&9f32.to_le_bytes());
        for bytes in [&good[..16], &[good.clone(), vec![0]].concat(), &beyond, &falling] {
            assert_eq!(Values::decode(Precision::Quaternary, bytes, 3).unwrap_err().status(), Status::InvalidFile);
        }
    }
}
