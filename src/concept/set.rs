//! Sets of scalar weights and their algebra.
//!
//! A [`NeuronSet`] says which weights of which projections make up a concept; it holds no weight and knows neither
//! models nor files. An index counts weights of the `[out, in]` layout: `index = row * in_features + column`.
//!
//! A projection's indices are kept as ascending `u32` while fewer than one weight in 32 is a member, and as a bitmap
//! above that: at SDXL size (340,787,200 weights) no set takes more than 43 MB, and every operation is one pass in
//! ascending order.

use std::cmp::Ordering;

use crate::error::{Error, Result};
use crate::memory::zeroed;

/// The most weights a projection may have: 268,435,456, a hundred times the largest of SDXL. A bitmap of as many bits
/// takes 32 MiB.
pub const MAX_PROJECTION_WEIGHTS: u32 = 1 << 28;

/// The most input features a projection may have, so that a column fits in `u16`.
pub const MAX_IN_FEATURES: usize = 1 << 16;

/// A bitmap takes less memory than `u32` indices when more than one weight in this many is a member.
const BITMAP_ABOVE: usize = 32;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Members {
    Sorted(Vec<u32>),
    /// Bit `i % 64` of word `i / 64`; bits past the last weight are zero.
    Bitmap {
        words: Vec<u64>,
        count: usize,
    },
}

/// The members of one projection: strictly ascending indices below [`Indices::weights`].
///
/// The same members are always held the same way, so equality is equality of sets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Indices {
    weights: u32,
    members: Members,
}

pub(super) fn is_dense(count: usize, weights: u32) -> bool {
    count > weights as usize / BITMAP_ABOVE
}

impl Indices {
    /// No member among `weights` weights.
    pub fn empty(weights: u32) -> Self {
        Self { weights, members: Members::Sorted(Vec::new()) }
    }

    /// The members given in strictly ascending order.
    ///
    /// Errors: `InvalidArgument` if the order is broken or an index is not below `weights`; `OutOfMemory`.
    pub fn from_sorted(weights: u32, sorted: Vec<u32>) -> Result<Self> {
        if let Some(pair) = sorted.windows(2).find(|pair| pair[0] >= pair[1]) {
            return Err(Error::invalid_argument(format!(
                "neuron indices must ascend strictly, but {} follows {}",
                pair[1], pair[0]
            )));
        }
        if let Some(last) = sorted.last().filter(|last| **last >= weights) {
            return Err(Error::invalid_argument(format!(
                "neuron index {last} lies outside a projection of {weights} weights"
            )));
        }
        Self::from_members(weights, Members::Sorted(sorted))
    }

    /// The members whose bits are set. `words` must have `weights.div_ceil(64)` words and no bit past the last weight.
    pub(super) fn from_words(weights: u32, words: Vec<u64>) -> Result<Self> {
        debug_assert_eq!(words.len(), (weights as usize).div_ceil(64));
        let count = words.iter().map(|word| word.count_ones() as usize).sum();
        Self::from_members(weights, Members::Bitmap { words, count })
    }

    /// Brings the members into the representation that their number asks for.
    fn from_members(weights: u32, members: Members) -> Result<Self> {
        let members = match members {
            Members::Sorted(sorted) if is_dense(sorted.len(), weights) => {
                let mut words = zeroed::<u64>((weights as usize).div_ceil(64))?;
                for &index in &sorted {
                    words[index as usize / 64] |= 1 << (index % 64);
                }
                Members::Bitmap { words, count: sorted.len() }
            }
            Members::Bitmap { words, count } if !is_dense(count, weights) => {
                let mut sorted = Vec::new();
                sorted.try_reserve_exact(count)?;
                sorted.extend(Bits::new(&words));
                Members::Sorted(sorted)
            }
            canonical => canonical,
        };
        Ok(Self { weights, members })
    }

    /// How many weights the projection has.
    pub fn weights(&self) -> u32 {
        self.weights
    }

    /// How many of them are members.
    pub fn len(&self) -> usize {
        match &self.members {
            Members::Sorted(sorted) => sorted.len(),
            Members::Bitmap { count, .. } => *count,
        }
    }

    /// Whether there is no member.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether `index` is a member.
    pub fn contains(&self, index: u32) -> bool {
        match &self.members {
            Members::Sorted(sorted) => sorted.binary_search(&index).is_ok(),
            Members::Bitmap { words, .. } => {
                words.get(index as usize / 64).is_some_and(|word| word >> (index % 64) & 1 == 1)
            }
        }
    }

    /// The members, ascending.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        let (sorted, bits) = match &self.members {
            Members::Sorted(sorted) => (sorted.as_slice(), None),
            Members::Bitmap { words, .. } => (&[][..], Some(Bits::new(words))),
        };
        sorted.iter().copied().chain(bits.into_iter().flatten())
    }

    /// Calls `visit` with each member, ascending: the fast way through a large set.
    pub fn for_each(&self, mut visit: impl FnMut(u32)) {
        match &self.members {
            Members::Sorted(sorted) => sorted.iter().for_each(|&index| visit(index)),
            Members::Bitmap { words, .. } => Bits::new(words).for_each(visit),
        }
    }

    /// The weights that are not members.
    pub fn complement(&self) -> Result<Self> {
        let mut words = zeroed::<u64>((self.weights as usize).div_ceil(64))?;
        words.fill(u64::MAX);
        if let Some(last) = words.last_mut()
            && !self.weights.is_multiple_of(64)
        {
            *last = (1 << (self.weights % 64)) - 1;
        }
        self.for_each(|index| words[index as usize / 64] &= !(1 << (index % 64)));
        Self::from_words(self.weights, words)
    }

    /// How many members two sets of one projection share.
    fn shared(&self, other: &Self) -> usize {
        match (&self.members, &other.members) {
            (Members::Bitmap { words: a, .. }, Members::Bitmap { words: b, .. }) => {
                a.iter().zip(b).map(|(a, b)| (a & b).count_ones() as usize).sum()
            }
            (Members::Sorted(a), Members::Sorted(b)) => {
                let mut shared = 0;
                merge(a, b, |_, ordering| shared += usize::from(ordering == Ordering::Equal));
                shared
            }
            (Members::Sorted(sorted), Members::Bitmap { .. }) => sorted.iter().filter(|i| other.contains(**i)).count(),
            (Members::Bitmap { .. }, Members::Sorted(_)) => other.shared(self),
        }
    }

    /// The members that `keep(in self, in other)` selects; `keep(false, false)` is never asked.
    fn combine(&self, other: &Self, keep: impl Fn(bool, bool) -> bool) -> Result<Self> {
        let members = match (&self.members, &other.members) {
            (Members::Sorted(a), Members::Sorted(b)) => {
                let [left, both, right] = [keep(true, false), keep(true, true), keep(false, true)];
                let most = if left { a.len() } else { a.len().min(b.len()) } + if right { b.len() } else { 0 };
                let mut sorted = Vec::new();
                sorted.try_reserve_exact(most)?;
                merge(a, b, |index, ordering| {
                    let wanted = match ordering {
                        Ordering::Less => left,
                        Ordering::Equal => both,
                        Ordering::Greater => right,
                    };
                    if wanted {
                        sorted.push(index);
                    }
                });
                Members::Sorted(sorted)
            }
            _ => {
                let mut words = self.to_words()?;
                let select = |a: u64, b: u64| {
                    let mask = |wanted: bool| if wanted { u64::MAX } else { 0 };
                    (a & !b & mask(keep(true, false)))
                        | (a & b & mask(keep(true, true)))
                        | (!a & b & mask(keep(false, true)))
                };
                let mut count = 0;
                for (word, theirs) in words.iter_mut().zip(other.to_words()?) {
                    *word = select(*word, theirs);
                    count += word.count_ones() as usize;
                }
                Members::Bitmap { words, count }
            }
        };
        Self::from_members(self.weights, members)
    }

    fn to_words(&self) -> Result<Vec<u64>> {
        let mut words = zeroed::<u64>((self.weights as usize).div_ceil(64))?;
        match &self.members {
            Members::Bitmap { words: ours, .. } => words.copy_from_slice(ours),
            Members::Sorted(sorted) => sorted.iter().for_each(|&i| words[i as usize / 64] |= 1 << (i % 64)),
        }
        Ok(words)
    }

    /// Bytes held for the members.
    pub fn memory_bytes(&self) -> usize {
        match &self.members {
            Members::Sorted(sorted) => sorted.capacity() * size_of::<u32>(),
            Members::Bitmap { words, .. } => words.capacity() * size_of::<u64>(),
        }
    }
}

/// Calls `visit` with each index of either ascending slice once, and whether it is only in `a` (`Less`), in both
/// (`Equal`) or only in `b` (`Greater`).
fn merge(mut a: &[u32], mut b: &[u32], mut visit: impl FnMut(u32, Ordering)) {
    while let ([first_a, rest_a @ ..], [first_b, rest_b @ ..]) = (a, b) {
        let ordering = first_a.cmp(first_b);
        visit(*first_a.min(first_b), ordering);
        a = if ordering.is_le() { rest_a } else { a };
        b = if ordering.is_ge() { rest_b } else { b };
    }
    a.iter().for_each(|&index| visit(index, Ordering::Less));
    b.iter().for_each(|&index| visit(index, Ordering::Greater));
}

/// The positions of the set bits of a bitmap, ascending.
struct Bits<'a> {
    words: std::slice::Iter<'a, u64>,
    word: u64,
    base: u32,
}

impl<'a> Bits<'a> {
    fn new(words: &'a [u64]) -> Self {
        let mut words = words.iter();
        Self { word: words.next().copied().unwrap_or(0), words, base: 0 }
    }
}

impl Iterator for Bits<'_> {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        while self.word == 0 {
            self.word = *self.words.next()?;
            self.base += 64;
        }
        let position = self.base + self.word.trailing_zeros();
        self.word &= self.word - 1;
        Some(position)
    }
}

/// One projection of a [`NeuronSet`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    path: String,
    out_features: u32,
    in_features: u32,
    indices: Indices,
}

impl Layer {
    /// A projection of `out_features` x `in_features` weights at a module path, and its members.
    ///
    /// Errors: `InvalidArgument` if the path is empty, a side is zero, `in_features` is above [`MAX_IN_FEATURES`], the
    /// weights are above [`MAX_PROJECTION_WEIGHTS`], or `indices` counts another number of weights.
    pub fn new(path: impl Into<String>, out_features: usize, in_features: usize, indices: Indices) -> Result<Self> {
        let path = path.into();
        let weights = projection_weights(out_features, in_features).map_err(|error| error.at(&path))?;
        if path.is_empty() {
            return Err(Error::invalid_argument("a projection needs a module path"));
        }
        if indices.weights != weights {
            return Err(Error::invalid_argument(format!(
                "{path}: the indices count {} weights, the projection has {weights}",
                indices.weights
            )));
        }
        Ok(Self { path, out_features: out_features as u32, in_features: in_features as u32, indices })
    }

    /// The diffusers module path, e.g. `down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Rows of the weight.
    pub fn out_features(&self) -> usize {
        self.out_features as usize
    }

    /// Columns of the weight.
    pub fn in_features(&self) -> usize {
        self.in_features as usize
    }

    /// The members.
    pub fn indices(&self) -> &Indices {
        &self.indices
    }

    fn like(&self, indices: Indices) -> Self {
        Self { path: self.path.clone(), indices, ..*self }
    }
}

/// `out_features * in_features`, checked against the limits of this module.
pub(super) fn projection_weights(out_features: usize, in_features: usize) -> Result<u32> {
    let weights = (out_features as u128) * (in_features as u128);
    if weights == 0 || in_features > MAX_IN_FEATURES || weights > u128::from(MAX_PROJECTION_WEIGHTS) {
        return Err(Error::invalid_argument(format!(
            "a projection of {out_features} x {in_features} weights: both sides must be positive, the columns at most \
             {MAX_IN_FEATURES} and the weights at most {MAX_PROJECTION_WEIGHTS}"
        )));
    }
    Ok(weights as u32)
}

/// Scalar weights of a model's projections: a concept's neurons.
///
/// Projections are listed whether they have members or not (the set says what was looked at), each path once, in
/// byte-wise order of their paths.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NeuronSet {
    layers: Vec<Layer>,
}

impl NeuronSet {
    /// The set of these projections.
    ///
    /// Errors: `InvalidArgument` if a path comes twice.
    pub fn new(mut layers: Vec<Layer>) -> Result<Self> {
        layers.sort_by(|a, b| a.path.cmp(&b.path));
        if let Some(pair) = layers.windows(2).find(|pair| pair[0].path == pair[1].path) {
            return Err(Error::invalid_argument(format!("projection {} comes twice", pair[0].path)));
        }
        Ok(Self { layers })
    }

    /// The projections, in byte-wise order of their paths.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The projection at a module path.
    pub fn layer(&self, path: &str) -> Option<&Layer> {
        self.position(path).map(|at| &self.layers[at])
    }

    /// The place in [`NeuronSet::layers`] of the projection at a module path.
    pub fn position(&self, path: &str) -> Option<usize> {
        self.layers.binary_search_by(|layer| layer.path.as_str().cmp(path)).ok()
    }

    /// How many weights are members.
    pub fn len(&self) -> u64 {
        self.layers.iter().map(|layer| layer.indices.len() as u64).sum()
    }

    /// Whether no weight is a member.
    pub fn is_empty(&self) -> bool {
        self.layers.iter().all(|layer| layer.indices.is_empty())
    }

    /// How many weights the listed projections have.
    pub fn weights(&self) -> u64 {
        self.layers.iter().map(|layer| u64::from(layer.indices.weights)).sum()
    }

    /// Members over weights, in `[0, 1]`; 0 if no projection is listed.
    pub fn density(&self) -> f64 {
        if self.layers.is_empty() { 0.0 } else { self.len() as f64 / self.weights() as f64 }
    }

    /// The least number of bits that tell this set from all others with as many members in each projection:
    /// the sum of `log2 C(weights, members)`.
    pub fn entropy_bits(&self) -> f64 {
        let bits = |layer: &Layer| {
            let (n, k) = (f64::from(layer.indices.weights), layer.indices.len() as f64);
            (libm::lgamma(n + 1.0) - libm::lgamma(k + 1.0) - libm::lgamma(n - k + 1.0)) / std::f64::consts::LN_2
        };
        self.layers.iter().map(bits).sum()
    }

    /// Members of either set. Lists the projections of both.
    ///
    /// Errors, also of the other operations: `InvalidArgument` if a path has two shapes; `OutOfMemory`.
    pub fn union(&self, other: &Self) -> Result<Self> {
        self.combine(other, |a, b| a | b)
    }

    /// Members of both sets. Lists the projections of both.
    pub fn intersection(&self, other: &Self) -> Result<Self> {
        self.combine(other, |a, b| a & b)
    }

    /// Members of this set that are not in `other`. Lists the projections of both.
    pub fn difference(&self, other: &Self) -> Result<Self> {
        self.combine(other, |a, b| a & !b)
    }

    fn combine(&self, other: &Self, keep: impl Fn(bool, bool) -> bool + Copy) -> Result<Self> {
        let mut layers = Vec::new();
        layers.try_reserve_exact(self.layers.len() + other.layers.len())?;
        self.pair(other, |ours, theirs| {
            layers.push(match (ours, theirs) {
                (Some(a), Some(b)) => a.like(a.indices.combine(&b.indices, keep)?),
                (Some(a), None) if keep(true, false) => a.clone(),
                (None, Some(b)) if keep(false, true) => b.clone(),
                (Some(only), None) | (None, Some(only)) => only.like(Indices::empty(only.indices.weights)),
                (None, None) => return Ok(()),
            });
            Ok(())
        })?;
        Ok(Self { layers })
    }

    /// Visits the projections of both sets in order, those of one path together.
    fn pair(&self, other: &Self, mut visit: impl FnMut(Option<&Layer>, Option<&Layer>) -> Result<()>) -> Result<()> {
        let (mut a, mut b) = (self.layers.as_slice(), other.layers.as_slice());
        loop {
            let ordering = match (a.first(), b.first()) {
                (None, None) => return Ok(()),
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                (Some(a), Some(b)) => a.path.cmp(&b.path),
            };
            let ours = if ordering.is_le() { a.split_off_first() } else { None };
            let theirs = if ordering.is_ge() { b.split_off_first() } else { None };
            if let (Some(a), Some(b)) = (ours, theirs)
                && (a.out_features, a.in_features) != (b.out_features, b.in_features)
            {
                return Err(Error::invalid_argument(format!(
                    "{}: one set has a projection of {} x {} weights, the other of {} x {}",
                    a.path, a.out_features, a.in_features, b.out_features, b.in_features
                )));
            }
            visit(ours, theirs)?;
        }
    }

    /// How far two sets overlap, in each projection and in all. Nothing is built.
    pub fn overlap(&self, other: &Self) -> Result<Overlap> {
        let mut layers = Vec::new();
        let mut total = Shared::default();
        self.pair(other, |ours, theirs| {
            let count = |layer: Option<&Layer>| layer.map_or(0, |layer| layer.indices.len() as u64);
            let intersection = match (ours, theirs) {
                (Some(a), Some(b)) => a.indices.shared(&b.indices) as u64,
                _ => 0,
            };
            let shared = Shared { intersection, union: count(ours) + count(theirs) - intersection };
            total.intersection += shared.intersection;
            total.union += shared.union;
            if let Some(layer) = ours.or(theirs) {
                layers.push((layer.path.clone(), shared));
            }
            Ok(())
        })?;
        Ok(Overlap { layers, total })
    }

    /// Bytes held for the members.
    pub fn memory_bytes(&self) -> usize {
        self.layers.iter().map(|layer| layer.indices.memory_bytes()).sum()
    }
}

/// What two sets have in common: see [`NeuronSet::overlap`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlap {
    /// Module path and overlap of each projection of either set, in byte-wise order of the paths.
    pub layers: Vec<(String, Shared)>,
    /// The overlap of the whole sets.
    pub total: Shared,
}

/// Sizes of an intersection and of a union.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shared {
    /// Members of both sets.
    pub intersection: u64,
    /// Members of either set.
    pub union: u64,
}

impl Shared {
    /// The Jaccard index, `intersection / union`, in `[0, 1]`; 0 for two empty sets.
    pub fn jaccard(&self) -> f64 {
        if self.union == 0 { 0.0 } else { self.intersection as f64 / self.union as f64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn set(weights: u32, members: &BTreeSet<u32>) -> NeuronSet {
        let indices = Indices::from_sorted(weights, members.iter().copied().collect()).unwrap();
        let empty = Indices::empty(6);
        NeuronSet::new(vec![
            Layer::new("b.to_v", weights as usize, 1, indices).unwrap(),
            Layer::new("a.to_k", 2, 3, empty).unwrap(),
        ])
        .unwrap()
    }

    fn members(set: &NeuronSet) -> BTreeSet<u32> {
        let layer = set.layer("b.to_v").unwrap();
        let listed: Vec<u32> = layer.indices().iter().collect();
        let mut visited = Vec::new();
        layer.indices().for_each(|index| visited.push(index));
        assert_eq!(listed, visited);
        assert_eq!(listed.len(), layer.indices().len());
        assert!(listed.windows(2).all(|pair| pair[0] < pair[1]));
        listed.into_iter().collect()
    }

    /// Subsets of `0..weights` from empty over sparse to full.
    fn subset(weights: u32) -> impl Strategy<Value = BTreeSet<u32>> {
        prop_oneof![
            proptest::collection::btree_set(0..weights, 0..=(weights as usize / 40)),
            proptest::collection::btree_set(0..weights, 0..=weights as usize),
            Just((0..weights).collect()),
        ]
    }

    fn pair() -> impl Strategy<Value = (u32, BTreeSet<u32>, BTreeSet<u32>)> {
        (1u32..400).prop_flat_map(|weights| (Just(weights), subset(weights), subset(weights)))
    }

    proptest! {
        #[test]
        fn the_algebra_is_that_of_ordered_sets((weights, a, b) in pair()) {
            let (x, y) = (set(weights, &a), set(weights, &b));
            prop_assert_eq!(&members(&x), &a);
            prop_assert_eq!(&x.union(&y).unwrap(), &set(weights, &(&a | &b)));
            prop_assert_eq!(&x.intersection(&y).unwrap(), &set(weights, &(&a & &b)));
            prop_assert_eq!(&x.difference(&y).unwrap(), &set(weights, &(&a - &b)));
            let complement = x.layer("b.to_v").unwrap().indices().complement().unwrap();
            prop_assert_eq!(complement.iter().collect::<BTreeSet<_>>(), &(0..weights).collect::<BTreeSet<_>>() - &a);
            let overlap = x.overlap(&y).unwrap();
            let expected = Shared { intersection: (&a & &b).len() as u64, union: (&a | &b).len() as u64 };
            prop_assert_eq!(overlap.total, expected);
            prop_assert_eq!(&overlap.layers, &vec![
                ("a.to_k".to_string(), Shared::default()), ("b.to_v".to_string(), expected),
            ]);
            for index in 0..weights {
                prop_assert_eq!(x.layer("b.to_v").unwrap().indices().contains(index), a.contains(&index));
            }
        }
    }

    #[test]
    fn projections_of_one_side_are_listed_in_the_result() {
        let one = |path: &str| {
            let indices = Indices::from_sorted(6, vec![1, 4]).unwrap();
            NeuronSet::new(vec![Layer::new(path, 2, 3, indices).unwrap()]).unwrap()
        };
        let (a, b) = (one("a"), one("b"));
        let sizes = |set: NeuronSet| set.layers().iter().map(|layer| layer.indices().len()).collect::<Vec<_>>();
        assert_eq!(sizes(a.union(&b).unwrap()), [2, 2]);
        assert_eq!(sizes(a.intersection(&b).unwrap()), [0, 0]);
        assert_eq!(sizes(a.difference(&b).unwrap()), [2, 0]);
        assert_eq!(a.overlap(&b).unwrap().total.jaccard(), 0.0);
        assert_eq!(a.union(&b).unwrap().density(), 4.0 / 12.0);
    }

    #[test]
    fn contradictions_are_refused() {
        assert!(Indices::from_sorted(6, vec![1, 1]).is_err());
        assert!(Indices::from_sorted(6, vec![2, 1]).is_err());
        assert!(Indices::from_sorted(6, vec![6]).is_err());
        assert!(Layer::new("a", 2, 3, Indices::empty(5)).is_err());
        assert!(Layer::new("a", 0, 3, Indices::empty(0)).is_err());
        assert!(Layer::new("a", usize::MAX, 3, Indices::empty(0)).is_err());
        assert!(Layer::new("", 2, 3, Indices::empty(6)).is_err());
        let layer = |out, inputs| Layer::new("a", out, inputs, Indices::empty(6)).unwrap();
        assert!(NeuronSet::new(vec![layer(2, 3), layer(2, 3)]).is_err());
        let (a, b) = (NeuronSet::new(vec![layer(2, 3)]).unwrap(), NeuronSet::new(vec![layer(3, 2)]).unwrap());
        assert!(a.union(&b).unwrap_err().message().contains("2 x 3"));
    }

    #[test]
    fn the_entropy_bound_is_that_of_binomial_coefficients() {
        let indices = Indices::from_sorted(10, vec![0, 3, 9]).unwrap();
        let set = NeuronSet::new(vec![Layer::new("a", 2, 5, indices).unwrap()]).unwrap();
        assert!((set.entropy_bits() - 120f64.log2()).abs() < 1e-9);
    }
}
