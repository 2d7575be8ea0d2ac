//! Which columns of a packed product are keys and which are values: the columns' numbers are carried through the nodes
//! that take the product apart.

use std::collections::HashMap;

use super::search::{Entry, Search, Step, Text, declared_sizes};
use super::{Rows, constant};

/// Which columns of a product belong to a projection: `blocks` runs of `width` columns, the first one at `first`, one
/// beginning every `stride` columns. A product that holds K alone is one block; one that holds K and V side by side, or
/// head by head, is shared by two projections with different `first`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Columns {
    /// The first column.
    pub first: usize,
    /// The number of runs; at least 1.
    pub blocks: usize,
    /// Columns of a run; at least 1.
    pub width: usize,
    /// From the beginning of a run to that of the next; at least `width`.
    pub stride: usize,
}

impl Columns {
    /// The first `count` columns.
    pub fn all(count: usize) -> Self {
        Self { first: 0, blocks: 1, width: count, stride: count }
    }

    /// The number of columns.
    pub fn len(&self) -> usize {
        self.blocks * self.width
    }

    /// Whether there is none; never true for a projection that was found.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The columns of the product in the order of the projection's features.
    pub fn iter(self) -> impl Iterator<Item = usize> {
        (0..self.blocks).flat_map(move |block| {
            let begin = self.first + block * self.stride;
            begin..begin + self.width
        })
    }

    /// The columns in this order, if they are evenly spaced runs.
    pub(super) fn from_order(order: &[usize]) -> Option<Self> {
        let first = *order.first()?;
        let width = order.iter().enumerate().take_while(|&(offset, &column)| column == first + offset).count();
        let stride = match order.get(width) {
            Some(next) => next.checked_sub(first).filter(|&stride| stride >= width)?,
            None => width,
        };
        let columns = Self { first, blocks: order.len().div_ceil(width), width, stride };
        columns.iter().eq(order.iter().copied()).then_some(columns)
    }
}

/// The columns of a product as they are carried along a few nodes: a small tensor whose entries are column numbers.
#[derive(Clone)]
struct Carried {
    dims: Vec<usize>,
    columns: Vec<usize>,
}

impl Carried {
    fn new(dims: Vec<usize>, columns: Vec<usize>) -> Option<Self> {
        (product(&dims)? == columns.len()).then_some(Self { dims, columns })
    }

    fn axis(&self, axis: i64) -> Option<usize> {
        let rank = self.dims.len() as i64;
        usize::try_from(if axis < 0 { axis + rank } else { axis }).ok().filter(|&axis| axis < self.dims.len())
    }

    /// The entries at the given indices of an axis.
    fn take(&self, axis: usize, indices: &[usize]) -> Option<Self> {
        let size = *self.dims.get(axis)?;
        if self.columns.is_empty() || indices.iter().any(|&index| index >= size) {
            return None;
        }
        let inner = product(&self.dims[axis + 1..])?;
        let mut columns = Vec::new();
        for outer in self.columns.chunks(size * inner) {
            indices.iter().for_each(|index| columns.extend_from_slice(&outer[index * inner..(index + 1) * inner]));
        }
        let mut dims = self.dims.clone();
        dims[axis] = indices.len();
        Self::new(dims, columns)
    }

    /// One of the parts that an axis is split into: of the given sizes, or equal ones, of which the last is smaller if
    /// they do not fit.
    fn part(&self, axis: i64, sizes: Option<Vec<i64>>, parts: usize, position: usize) -> Option<Self> {
        let axis = self.axis(axis)?;
        let size = self.dims[axis];
        let sizes: Vec<usize> = match sizes {
            Some(sizes) => sizes.into_iter().map(|size| usize::try_from(size).ok()).collect::<Option<_>>()?,
            None => {
                let part = size.div_ceil(parts.max(1));
                (0..parts).map(|at| size.saturating_sub(at.saturating_mul(part)).min(part)).collect()
            }
        };
        let begin = sizes.get(..position)?.iter().try_fold(0usize, |sum, &size| sum.checked_add(size))?;
        let end = begin.checked_add(*sizes.get(position)?).filter(|&end| end <= size)?;
        self.take(axis, &(begin..end).collect::<Vec<usize>>())
    }

    fn without(mut self, axis: usize) -> Self {
        self.dims.remove(axis);
        self
    }

    fn reshaped(self, shape: &[Option<i64>], zero_copies: bool) -> Option<Self> {
        let mut dims = Vec::new();
        let mut open = None;
        for (axis, &size) in shape.iter().enumerate() {
            match size {
                Some(0) if zero_copies => dims.push(*self.dims.get(axis)?),
                Some(-1) if open.replace(axis).is_some() => return None,
                Some(-1) => dims.push(1),
                // What the graph computes from sizes that it does not fix is a number of rows: 1 here.
                None => dims.push(1),
                Some(size) => dims.push(usize::try_from(size).ok()?),
            }
        }
        if let Some(axis) = open {
            dims[axis] = self.columns.len().checked_div(product(&dims)?)?;
        }
        Self::new(dims, self.columns)
    }

    fn transposed(&self, perm: &[usize]) -> Option<Self> {
        let mut sorted = perm.to_vec();
        sorted.sort_unstable();
        if !sorted.into_iter().eq(0..self.dims.len()) {
            return None;
        }
        let mut strides = vec![1; self.dims.len()];
        for axis in (1..self.dims.len()).rev() {
            strides[axis - 1] = strides[axis] * self.dims[axis];
        }
        let dims: Vec<usize> = perm.iter().map(|&axis| self.dims[axis]).collect();
        let mut index = vec![0; dims.len()];
        let mut columns = Vec::with_capacity(self.columns.len());
        for _ in 0..self.columns.len() {
            columns.push(self.columns[perm.iter().zip(&index).map(|(&axis, &at)| strides[axis] * at).sum::<usize>()]);
            for axis in (0..dims.len()).rev() {
                index[axis] += 1;
                if index[axis] < dims[axis] {
                    break;
                }
                index[axis] = 0;
            }
        }
        Self::new(dims, columns)
    }
}

/// The number of entries of a shape.
fn product(dims: &[usize]) -> Option<usize> {
    dims.iter().try_fold(1usize, |product, &dim| product.checked_mul(dim))
}

/// A list of integers, some of which the graph computes from sizes that it does not fix.
type Integers = Vec<Option<i64>>;

impl<'m> Search<'m> {
    /// Which columns of a packed product reach an attention by the given way, in the order in which they arrive.
    pub(super) fn picked(&self, output: &'m str, columns: usize, text: Text<'m>, entry: &Entry) -> Option<Columns> {
        let declared = self.topology.value_info(text.input).and_then(declared_sizes)?;
        let size = |axis: usize| declared.get(axis).copied()?.and_then(|dim| usize::try_from(dim).ok());
        let (batch, tokens) = (size(0).unwrap_or(1), size(1).unwrap_or(1));
        let count = batch.checked_mul(tokens)?;
        // Rows are copies of each other; a size that no model has is not worth following.
        if count.checked_mul(columns).is_none_or(|entries| entries > 1 << 22) {
            return None;
        }
        let dims = match text.rows {
            Rows::BatchTokens => vec![batch, tokens, columns],
            Rows::Flat => vec![count, columns],
            Rows::Other => return None,
        };
        let mut carried = Carried::new(dims, (0..count).flat_map(|_| 0..columns).collect())?;
        let mut shapes: HashMap<&str, Vec<usize>> = HashMap::from([(output, carried.dims.clone())]);
        if let Rows::BatchTokens = text.rows {
            let features = declared.get(2).copied()?.and_then(|dim| usize::try_from(dim).ok())?;
            shapes.insert(text.input, vec![batch, tokens, features]);
        }
        for step in &entry.steps {
            // A shape may be taken from any part of a Split.
            for (output, name) in self.node(step.node).output.iter().enumerate() {
                if let Some(part) = self.carry(carried.clone(), Step { output, ..*step }, &shapes) {
                    shapes.insert(name, part.dims);
                }
            }
            carried = self.carry(carried, *step, &shapes)?;
        }
        if let Some(slot) = entry.slot {
            let axis = carried.dims.len().checked_sub(2)?;
            carried = carried.take(axis, &[slot])?;
        }
        let mut seen = vec![false; columns];
        let order: Vec<usize> =
            carried.columns.into_iter().filter(|&column| !std::mem::replace(&mut seen[column], true)).collect();
        Columns::from_order(&order)
    }

    /// One node's effect on carried columns.
    fn carry(&self, carried: Carried, step: Step, shapes: &HashMap<&str, Vec<usize>>) -> Option<Carried> {
        let node = self.node(step.node);
        let integers = |input: usize| self.integers(node.input.get(input)?, shapes, 0);
        let known = |input: usize| integers(input)?.into_iter().collect::<Option<Vec<i64>>>();
        let listed = |name, input| match node.attribute_ints(name) {
            Some(ints) => Some(ints.to_vec()),
            None => known(input),
        };
        match node.op_type() {
            "Identity" | "Cast" | "Dropout" | "Mul" | "Div" => Some(carried),
            "Reshape" => carried.reshaped(&integers(1)?, node.attribute_i("allowzero").unwrap_or(0) == 0),
            "Flatten" => {
                let axis = carried.axis(node.attribute_i("axis").unwrap_or(1))?;
                let outer = i64::try_from(product(&carried.dims[..axis])?).ok()?;
                carried.reshaped(&[Some(outer), Some(-1)], false)
            }
            "Transpose" => {
                let perm = match node.attribute_ints("perm") {
                    Some(perm) => perm.iter().map(|&axis| usize::try_from(axis).ok()).collect::<Option<Vec<_>>>()?,
                    None => (0..carried.dims.len()).rev().collect(),
                };
                carried.transposed(&perm)
            }
            "Squeeze" => {
                let mut axes =
                    listed("axes", 1)?.into_iter().map(|axis| carried.axis(axis)).collect::<Option<Vec<_>>>()?;
                axes.sort_unstable();
                axes.dedup();
                if axes.iter().any(|&axis| carried.dims[axis] != 1) {
                    return None;
                }
                Some(axes.into_iter().rev().fold(carried, Carried::without))
            }
            "Unsqueeze" => {
                let axes = listed("axes", 1)?;
                let rank = (carried.dims.len() + axes.len()) as i64;
                let mut axes: Vec<i64> =
                    axes.into_iter().map(|axis| if axis < 0 { axis + rank } else { axis }).collect();
                axes.sort_unstable();
                let mut carried = carried;
                for axis in axes {
                    let axis = usize::try_from(axis).ok().filter(|&axis| axis <= carried.dims.len())?;
                    carried.dims.insert(axis, 1);
                }
                Some(carried)
            }
            "Split" => {
                let listed = node.attribute_ints("split").map(<[i64]>::to_vec).or_else(|| known(1));
                carried.part(node.attribute_i("axis").unwrap_or(0), listed, node.output.len(), step.output)
            }
            // A sequence is carried as what it was split from.
            "SplitToSequence" if node.input.len() == 2 => Some(carried),
            "SequenceAt" => {
                let (_, split) =
                    self.topology.producer(node.input.first()?).filter(|(_, n)| n.is("SplitToSequence"))?;
                let sizes = self.integers(split.input.get(1)?, shapes, 0)?.into_iter().collect::<Option<Vec<i64>>>()?;
                let position = usize::try_from(*known(1)?.first()?).ok()?;
                let scalar = constant(&self.topology, split.input.get(1)?).is_ok_and(|tensor| tensor.dims.is_empty());
                let axis = split.attribute_i("axis").unwrap_or(0);
                let sizes = match sizes[..] {
                    // One number is the size of every part, of which the last one may be smaller.
                    [size] if scalar => {
                        let whole = carried.dims[carried.axis(axis)?];
                        let size = usize::try_from(size).ok().filter(|&size| size > 0)?;
                        let parts = whole.div_ceil(size);
                        (0..parts).map(|at| (whole - at * size).min(size) as i64).collect()
                    }
                    _ => sizes,
                };
                let parts = sizes.len();
                carried.part(axis, Some(sizes), parts, position)
            }
            "Slice" => {
                let (starts, ends) = (known(1)?, known(2)?);
                let axes = match node.input.get(3).filter(|name| !name.is_empty()) {
                    Some(_) => known(3)?,
                    None => (0..starts.len() as i64).collect(),
                };
                let steps = match node.input.get(4).filter(|name| !name.is_empty()) {
                    Some(_) => known(4)?,
                    None => vec![1; starts.len()],
                };
                let mut carried = carried;
                for (index, &axis) in axes.iter().enumerate() {
                    let axis = carried.axis(axis)?;
                    let size = carried.dims[axis] as i64;
                    let clamp = |at: i64| (if at < 0 { at.saturating_add(size) } else { at }).clamp(0, size) as usize;
                    let step = usize::try_from(*steps.get(index)?).ok().filter(|&step| step > 0)?;
                    let indices: Vec<usize> =
                        (clamp(*starts.get(index)?)..clamp(*ends.get(index)?)).step_by(step).collect();
                    carried = carried.take(axis, &indices)?;
                }
                Some(carried)
            }
            "Gather" => {
                let axis = carried.axis(node.attribute_i("axis").unwrap_or(0))?;
                let size = carried.dims[axis] as i64;
                let indices: Option<Vec<usize>> =
                    known(1)?.into_iter().map(|at| usize::try_from(if at < 0 { at + size } else { at }).ok()).collect();
                let indices = indices?;
                let scalar = constant(&self.topology, node.input.get(1)?).is_ok_and(|tensor| tensor.dims.is_empty());
                let taken = carried.take(axis, &indices)?;
                Some(if scalar { taken.without(axis) } else { taken })
            }
            _ => None,
        }
    }

    /// A list of integers of the graph, as far as it follows from constants and the shapes of carried values.
    fn integers(&self, value: &str, shapes: &HashMap<&str, Vec<usize>>, depth: usize) -> Option<Integers> {
        if depth > 24 {
            return None;
        }
        if let Some(tensor) = self.topology.initializer(value).or_else(|| self.topology.constant(value)) {
            let tensor = self.model.tensor(tensor).ok().filter(|tensor| tensor.elements() <= 64)?;
            return Some(tensor.to_i64().ok()?.into_iter().map(Some).collect());
        }
        let (_, node) = self.topology.producer(value)?;
        let input = |index: usize| self.integers(node.input.get(index)?, shapes, depth + 1);
        let one = |index: usize| match input(index)?[..] {
            [Some(value)] => Some(value),
            _ => None,
        };
        let paired = |compute: fn(i64, i64) -> Option<i64>| {
            let (a, b) = (input(0)?, input(1)?);
            let at = |list: &Integers, index: usize| if list.len() == 1 { list[0] } else { *list.get(index)? };
            Some((0..a.len().max(b.len())).map(|index| compute(at(&a, index)?, at(&b, index)?)).collect())
        };
        match node.op_type() {
            "Constant" => match node.attribute_i("value_int") {
                Some(value) => Some(vec![Some(value)]),
                None => Some(node.attribute_ints("value_ints")?.iter().copied().map(Some).collect()),
            },
            "Shape" => {
                let of = node.input.first()?.as_str();
                let dims: Integers = match shapes.get(of) {
                    Some(dims) => dims.iter().map(|&dim| i64::try_from(dim).ok()).collect(),
                    None => self.topology.value_info(of).and_then(declared_sizes)?,
                };
                let rank = dims.len() as i64;
                let at = |name, default| {
                    let at = node.attribute_i(name).unwrap_or(default);
                    (if at < 0 { at.saturating_add(rank) } else { at }).clamp(0, rank) as usize
                };
                Some(dims.get(at("start", 0)..at("end", rank))?.to_vec())
            }
            "Identity" | "Cast" | "Squeeze" | "Unsqueeze" | "Reshape" | "Floor" => input(0),
            "Concat" => {
                let parts = (0..node.input.len()).map(|index| input(index).or(Some(vec![None])));
                Some(parts.collect::<Option<Vec<_>>>()?.concat())
            }
            "Gather" => {
                let (list, indices) = (input(0)?, input(1)?);
                let at = |index: i64| if index < 0 { index + list.len() as i64 } else { index };
                indices.iter().map(|&index| list.get(usize::try_from(at(index?)).ok()?).copied()).collect()
            }
            "Slice" => {
                let list = input(0)?;
                let size = list.len() as i64;
                let clamp = |at: i64| (if at < 0 { at.saturating_add(size) } else { at }).clamp(0, size) as usize;
                Some(list.get(clamp(one(1)?)..clamp(one(2)?))?.to_vec())
            }
            "Add" => paired(i64::checked_add),
            "Sub" => paired(i64::checked_sub),
            "Mul" => paired(i64::checked_mul),
            "Div" => paired(i64::checked_div),
            _ => None,
        }
    }
}
