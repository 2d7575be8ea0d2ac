//! Concepts at work: the keys and values of a prompt with some weights shut or replaced.
//!
//! A concept takes `d = W - value` away from each weight that it holds, all of it where it shuts: `d = W`. Of several
//! concepts on one weight, with strengths `s`, what is taken is the mean of their `d`, weighted by `s`, times
//! `1 - product(1 - s)`: shut weights are multiplied by the product of `1 - s`, and the order does not matter. So
//! `K = C (W - taken)^T = C W^T - C taken^T`: the base keys less a sparse product, exact for every token by itself. A
//! composition never touches a weight; it reads the base and writes keys and values into the caller's buffers. Only
//! self-attention, whose keys and values change with every step, gets the weights `W - taken` themselves, in buffers of
//! the caller's too, and on every row.
//!
//! *Implant* and *erase* concepts (Cones shuts the first; ablation shuts the second) are applied alike: what a set does
//! was settled when it was found.

use std::collections::BTreeMap;
use std::sync::Arc;

use half::{bf16, f16};
use ndarray::{ArrayViewMut2, Axis};
use rayon::ThreadPool;
use rayon::prelude::*;

use super::file::Concept;
use super::kernel::{self, PADDING, Panel, TILE};
use super::projections::{KeysValues, ProjectionWeights, Projections};
use super::set::NeuronSet;
use super::values::Values;
use crate::error::{Error, Result, Status};
use crate::memory::zeroed;
use crate::onnx::attention;

/// A few weights of each row of one projection.
struct SparseRows {
    /// Row `r` has the entries `starts[r]..starts[r + 1]`.
    starts: Vec<u32>,
    /// Ascending in each row, each below the projection's `in_features`; then [`PADDING`] zeros, as in `values`.
    columns: Vec<u16>,
    values: Vec<f32>,
}

impl SparseRows {
    fn entries(&self) -> usize {
        self.values.len() - PADDING
    }
}

/// A concept's neurons with what they take from their weights, gathered from one [`Projections`]. Clones share the weights.
#[derive(Clone)]
pub struct GatheredConcept {
    /// In the order of [`Projections::all`]; `None` where the concept has no neuron.
    projections: Arc<Vec<Option<SparseRows>>>,
    /// [`Projections::id`].
    base_id: u64,
}

impl GatheredConcept {
    /// Gathers a concept's weights from the base on which it was found.
    ///
    /// Errors: `WrongBase` if the concept was found on another base, naming both fingerprints; `InvalidFile` if the set
    /// does not fit the base's projections; `Unsupported` for neurons of self-attention if the base is without its
    /// projections; `OutOfMemory`.
    pub fn new(concept: &Concept, base: &Projections, pool: &ThreadPool) -> Result<Self> {
        let (expected, found) = (concept.metadata.base, base.fingerprint());
        if expected != found {
            return Err(Error::new(
                Status::WrongBase,
                format!(
                    "the concept {:?} was found on the base model {expected}, but this base model is {found}",
                    concept.metadata.title
                ),
            ));
        }
        Self::gather(&concept.neurons, concept.values.as_ref(), base, pool)
            .map_err(|error| Error::new(error.status(), error.message()).at(&concept.metadata.title))
    }

    /// Gathers the weights of a set that is known to belong to the base, to be shut. Errors as [`GatheredConcept::new`],
    /// without `WrongBase`.
    pub fn from_neurons(neurons: &NeuronSet, base: &Projections, pool: &ThreadPool) -> Result<Self> {
        Self::gather(neurons, None, base, pool)
    }

    fn gather(neurons: &NeuronSet, values: Option<&Values>, base: &Projections, pool: &ThreadPool) -> Result<Self> {
        if let Some(values) = values {
            values.check(neurons)?;
        }
        for layer in neurons.layers() {
            let known = base.find(layer.path());
            let shape = known.map(|projection| (projection.out_features, projection.in_features));
            let asked = (layer.out_features(), layer.in_features());
            if shape.is_none() && base.self_attention().is_empty() && attention::is_of_self(layer.path()) {
                return Err(Error::unsupported(format!(
                    "{}: these are neurons of self-attention, and the model was not opened for them",
                    layer.path()
                )));
            }
            if shape != Some(asked) {
                let has = shape.map_or("no such projection".into(), |(out, inputs)| format!("{out} x {inputs}"));
                return Err(Error::invalid_file(format!(
                    "{}: the set asks for {} x {} weights, the base model has {has}",
                    layer.path(),
                    asked.0,
                    asked.1
                )));
            }
        }
        let gather = |projection: &ProjectionWeights| {
            let place = neurons.position(&projection.path);
            let Some((place, layer)) =
                place.map(|at| (at, &neurons.layers()[at])).filter(|(_, l)| !l.indices().is_empty())
            else {
                return Ok(None);
            };
            let members = layer.indices().len();
            let mut rows = SparseRows {
                starts: zeroed(projection.out_features + 1)?,
                columns: zeroed(members + PADDING)?,
                values: zeroed(members + PADDING)?,
            };
            let (mut at, mut row, mut row_end) = (0, 0, projection.in_features);
            let mut indices = zeroed::<u32>(members)?;
            layer.indices().for_each(|index| {
                while index as usize >= row_end {
                    row += 1;
                    rows.starts[row] = at as u32;
                    row_end += projection.in_features;
                }
                rows.columns[at] = (index as usize + projection.in_features - row_end) as u16;
                indices[at] = index;
                at += 1;
            });
            rows.starts[row + 1..].fill(at as u32);
            // By itself, so that many reads are under way at a time: each touches memory of its own.
            projection.weights.gather(&indices, &mut rows.values);
            if let Some(values) = values {
                rows.values.iter_mut().zip(values.layer(place)).for_each(|(taken, value)| *taken -= value);
            }
            Ok(Some(rows))
        };
        let all: Vec<&ProjectionWeights> = base.all().collect();
        let projections = pool.install(|| all.into_par_iter().map(gather).collect::<Result<Vec<_>>>())?;
        Ok(Self { projections: Arc::new(projections), base_id: base.id })
    }

    /// How many weights the concept shuts or replaces.
    pub fn len(&self) -> usize {
        self.projections.iter().flatten().map(SparseRows::entries).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes held, shared by all clones.
    pub fn memory_bytes(&self) -> usize {
        let bytes = |rows: &SparseRows| {
            size_of_val(rows.starts.as_slice())
                + size_of_val(rows.columns.as_slice())
                + size_of_val(rows.values.as_slice())
        };
        self.projections.iter().flatten().map(bytes).sum()
    }
}

/// The rows of keys and values on which a concept acts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rows {
    /// Every token of every entry of the batch: the scope of Cones.
    All,
    /// These (entry of the batch, token) only, e.g. the concept's own words in the conditional entries. With an empty list
    /// keys and values stay the base's. Neurons of self-attention, which knows no tokens, act whatever is listed.
    Only(Vec<(usize, usize)>),
}

#[derive(Clone)]
struct Part {
    concept: GatheredConcept,
    strength: f32,
    rows: Rows,
}

/// Any number of concepts, each with its strength and its rows.
#[derive(Clone, Default)]
pub struct Composition {
    parts: Vec<Part>,
}

impl Composition {
    /// No concept: the base.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a concept. `strength` is the share of what it takes from each weight: 1 shuts it (Cones) or gives it its tuned
    /// value, 0 leaves it. A shut weight of several concepts keeps the product of their `1 - strength`; of several tuned
    /// values it takes the mean, weighted by strength. The order of concepts changes nothing but rounding.
    ///
    /// Errors: `InvalidArgument` if the strength is not in `[0, 1]`.
    pub fn push(&mut self, concept: GatheredConcept, strength: f32, rows: Rows) -> Result<()> {
        if !(0.0..=1.0).contains(&strength) {
            return Err(Error::invalid_argument(format!("a concept's strength lies in 0..=1, {strength} does not")));
        }
        self.parts.push(Part { concept, strength, rows });
        Ok(())
    }

    /// Whether every key and value is the base's.
    pub fn is_base(&self) -> bool {
        self.parts.iter().all(|part| !part.acts())
    }

    /// The concepts that take something from weights of self-attention.
    pub fn of_self_attention(&self, base: &Projections) -> Self {
        let own = |part: &&Part| part.concept.projections.iter().skip(base.as_slice().len()).any(Option::is_some);
        Self { parts: self.parts.iter().filter(|part| part.acts()).filter(own).cloned().collect() }
    }

    /// Whether these are the same concepts with the same strengths, wherever they act.
    pub fn takes_like(&self, other: &Self) -> bool {
        let same = |(a, b): (&Part, &Part)| {
            Arc::ptr_eq(&a.concept.projections, &b.concept.projections) && a.strength == b.strength
        };
        self.parts.len() == other.parts.len() && self.parts.iter().zip(&other.parts).all(same)
    }

    /// Writes the effective weights of self-attention, `W - taken`: they act on the whole picture, whatever the rows of a
    /// concept are.
    ///
    /// `outputs` has one buffer `[out, in]` per projection, in the order of [`Projections::self_attention`]. The result
    /// depends on nothing but the composition. Errors: as [`Composition::write`].
    pub fn write_self_attention(
        &self,
        base: &Projections,
        outputs: &mut [Output<'_>],
        pool: &ThreadPool,
    ) -> Result<()> {
        let projections = base.self_attention();
        let sizes = projections.iter().map(|projection| projection.out_features * projection.in_features);
        check(sizes, outputs)?;
        let parts = self.parts.iter().filter(|part| part.acts()).collect::<Vec<_>>();
        if parts.iter().any(|part| part.concept.base_id != base.id) {
            return Err(Error::invalid_argument("a concept was gathered from another base model"));
        }
        let group = Group { parts, panels: Panels::Own(Vec::new()) };
        let first = base.as_slice().len();
        pool.install(|| {
            let each = outputs.par_iter_mut().zip(projections).enumerate();
            each.try_for_each_init(Scratch::default, |scratch, (at, (output, projection))| match output {
                Output::F32(to) => group.effective_weights(first + at, projection, to, scratch),
                Output::F16(to) => group.effective_weights(first + at, projection, to, scratch),
                Output::Bf16(to) => group.effective_weights(first + at, projection, to, scratch),
            })
        })
    }

    /// Writes the effective keys and values of a prompt.
    ///
    /// `outputs` has one buffer `[batch, tokens, out]` per projection, in the order of [`Projections::as_slice`].
    /// `held` says what they hold already and is brought up to date: rows that are and stay the base's are not written.
    /// Give the same `held` with the same buffers, and a new one whenever anybody else wrote to them. After a failure
    /// the content of the buffers is unknown, and `held` says so.
    ///
    /// The result depends on nothing but the composition and the prompt: not on threads, nor on what the buffers held.
    /// Rows on which no concept acts are the base's, bit for bit.
    ///
    /// Errors: `InvalidArgument` if a buffer has another size, a row lies outside the prompt, or a concept was gathered
    /// from another base; `OutOfMemory`.
    pub fn write(
        &self,
        prompt: &KeysValues,
        outputs: &mut [Output<'_>],
        held: &mut Held,
        pool: &ThreadPool,
    ) -> Result<()> {
        let before = std::mem::take(held);
        check(prompt.base().iter().map(Vec::len), outputs)?;
        let (groups, touched) = self.groups(prompt)?;
        let known = before.prompt == prompt.id;
        let restore: Vec<u32> = (0..touched.len() as u32)
            .filter(|&row| (!known || before.touched[row as usize]) && !touched[row as usize])
            .collect();
        let job = Job { prompt, groups: &groups, restore: &restore };
        let mut views = Vec::new();
        for ((projection, output), base) in outputs.iter_mut().enumerate().zip(prompt.base()) {
            let shape = (touched.len(), base.len() / touched.len());
            views.push((projection, View::new(shape, output)?));
        }
        let mut tasks = Vec::new();
        for (projection, view) in &mut views {
            view.tasks(*projection, &mut tasks);
        }
        pool.install(|| tasks.into_par_iter().for_each_init(Scratch::default, |scratch, task| job.run(task, scratch)));
        *held = Held { prompt: prompt.id, touched };
        Ok(())
    }

    /// Rows of equal concepts together, and which rows have any.
    fn groups<'a>(&'a self, prompt: &'a KeysValues) -> Result<(Vec<Group<'a>>, Vec<bool>)> {
        let rows = prompt.batch() * prompt.tokens();
        let mut acting: Vec<Vec<usize>> = Vec::new();
        acting.try_reserve_exact(rows)?;
        acting.resize(rows, Vec::new());
        for (number, part) in self.parts.iter().enumerate() {
            if part.concept.base_id != prompt.base_id {
                return Err(Error::invalid_argument(
                    "a concept was gathered from another base model than the prompt's",
                ));
            }
            let mut act = |row: usize| {
                if part.acts() && acting[row].last() != Some(&number) {
                    acting[row].push(number);
                }
            };
            match &part.rows {
                Rows::All => (0..rows).for_each(act),
                Rows::Only(listed) => {
                    for &(entry, token) in listed {
                        if entry >= prompt.batch() || token >= prompt.tokens() {
                            return Err(Error::invalid_argument(format!(
                                "row (entry {entry}, token {token}) lies outside a prompt of {} entries with {} tokens",
                                prompt.batch(),
                                prompt.tokens()
                            )));
                        }
                        act(entry * prompt.tokens() + token);
                    }
                }
            }
        }
        let touched = acting.iter().map(|parts| !parts.is_empty()).collect();
        let mut together: BTreeMap<Vec<usize>, Vec<u32>> = BTreeMap::new();
        for (row, parts) in acting.into_iter().enumerate().filter(|(_, parts)| !parts.is_empty()) {
            together.entry(parts).or_default().push(row as u32);
        }
        let groups = together.into_iter().map(|(numbers, in_group)| {
            let panels = if in_group.len() == rows {
                Panels::Prompt(&prompt.panels)
            } else {
                Panels::Own(Panel::split(&prompt.context, prompt.in_features, &in_group)?)
            };
            Ok(Group { parts: numbers.into_iter().map(|number| &self.parts[number]).collect(), panels })
        });
        Ok((groups.collect::<Result<_>>()?, touched))
    }
}

impl Part {
    fn acts(&self) -> bool {
        self.strength > 0.0 && !self.concept.is_empty()
    }
}

/// A caller's buffer for the keys or values of one projection, `[batch, tokens, out]`.
pub enum Output<'a> {
    /// IEEE single precision.
    F32(&'a mut [f32]),
    /// IEEE half precision; rounded to nearest, ties to even.
    F16(&'a mut [f16]),
    /// bfloat16; rounded likewise.
    Bf16(&'a mut [bf16]),
}

impl Output<'_> {
    fn len(&self) -> usize {
        match self {
            Self::F32(numbers) => numbers.len(),
            Self::F16(numbers) => numbers.len(),
            Self::Bf16(numbers) => numbers.len(),
        }
    }
}

fn check(sizes: impl ExactSizeIterator<Item = usize>, outputs: &[Output<'_>]) -> Result<()> {
    if outputs.len() != sizes.len() {
        return Err(Error::invalid_argument(format!("{} buffers for {} projections", outputs.len(), sizes.len())));
    }
    for (number, (output, size)) in outputs.iter().zip(sizes).enumerate() {
        if output.len() != size {
            return Err(Error::invalid_argument(format!(
                "buffer {number} has {} numbers, the projection gives {size}",
                output.len()
            )));
        }
    }
    Ok(())
}

/// What a set of buffers holds: see [`Composition::write`]. [`Held::default`] is for buffers of unknown content.
#[derive(Clone, Debug, Default)]
pub struct Held {
    /// [`KeysValues::id`], or 0.
    prompt: u64,
    /// Rows that are not the base's.
    touched: Vec<bool>,
}

enum Panels<'a> {
    Prompt(&'a [Panel]),
    Own(Vec<Panel>),
}

/// Rows on which the same concepts act.
struct Group<'a> {
    parts: Vec<&'a Part>,
    panels: Panels<'a>,
}

/// One output as a matrix `[rows, out]`.
enum View<'a> {
    F32(ArrayViewMut2<'a, f32>),
    F16(ArrayViewMut2<'a, f16>),
    Bf16(ArrayViewMut2<'a, bf16>),
}

impl<'a> View<'a> {
    fn new(shape: (usize, usize), output: &'a mut Output<'_>) -> Result<Self> {
        let wrong = |error| Error::invalid_argument("a buffer does not fit its projection").caused_by(error);
        Ok(match output {
            Output::F32(numbers) => Self::F32(ArrayViewMut2::from_shape(shape, numbers).map_err(wrong)?),
            Output::F16(numbers) => Self::F16(ArrayViewMut2::from_shape(shape, numbers).map_err(wrong)?),
            Output::Bf16(numbers) => Self::Bf16(ArrayViewMut2::from_shape(shape, numbers).map_err(wrong)?),
        })
    }

    /// Parts the view into blocks of columns.
    fn tasks<'b>(&'b mut self, projection: usize, tasks: &mut Vec<Task<'b>>) {
        let mut add = |block: usize, view| tasks.push(Task { projection, first: block * BLOCK_COLUMNS, view });
        match self {
            Self::F32(view) => {
                view.axis_chunks_iter_mut(Axis(1), BLOCK_COLUMNS).enumerate().for_each(|(b, v)| add(b, View::F32(v)));
            }
            Self::F16(view) => {
                view.axis_chunks_iter_mut(Axis(1), BLOCK_COLUMNS).enumerate().for_each(|(b, v)| add(b, View::F16(v)));
            }
            Self::Bf16(view) => {
                view.axis_chunks_iter_mut(Axis(1), BLOCK_COLUMNS).enumerate().for_each(|(b, v)| add(b, View::Bf16(v)));
            }
        }
    }
}

/// Output features that one task computes: a few cache lines of every row.
const BLOCK_COLUMNS: usize = 64;

struct Task<'a> {
    projection: usize,
    /// The first output feature.
    first: usize,
    view: View<'a>,
}

trait Element: Copy {
    fn from_f32(value: f32) -> Self;
}

impl Element for f32 {
    fn from_f32(value: f32) -> Self {
        value
    }
}

impl Element for f16 {
    fn from_f32(value: f32) -> Self {
        f16::from_f32(value)
    }
}

impl Element for bf16 {
    fn from_f32(value: f32) -> Self {
        bf16::from_f32(value)
    }
}

/// Memory that a thread keeps from task to task.
#[derive(Default)]
struct Scratch {
    /// For each column the product of `1 - strength` and the sum of strengths so far; 1 and 0 between rows.
    met: Vec<(f32, f32)>,
    starts: Vec<u32>,
    columns: Vec<u16>,
    values: Vec<f32>,
    sums: Vec<f32>,
}

/// What is to be subtracted from a block of output features: `scale` times the product with `rows`.
struct Correction<'a> {
    rows: kernel::Rows<'a>,
    scale: f32,
}

struct Job<'a> {
    prompt: &'a KeysValues,
    groups: &'a [Group<'a>],
    restore: &'a [u32],
}

impl Job<'_> {
    fn run(&self, task: Task<'_>, scratch: &mut Scratch) {
        match task.view {
            View::F32(view) => self.write(task.projection, task.first, view, scratch),
            View::F16(view) => self.write(task.projection, task.first, view, scratch),
            View::Bf16(view) => self.write(task.projection, task.first, view, scratch),
        }
    }

    fn write<T: Element>(
        &self,
        projection: usize,
        first: usize,
        mut output: ArrayViewMut2<'_, T>,
        scratch: &mut Scratch,
    ) {
        let features = output.ncols();
        let base = self.prompt.base()[projection].as_slice();
        let out_features = base.len() / output.nrows();
        let base_row = |row: u32| &base[row as usize * out_features + first..][..features];
        for &row in self.restore {
            store(&mut output, row, 0, base_row(row).iter().copied());
        }
        for group in self.groups {
            let mut sums = std::mem::take(&mut scratch.sums);
            let mut turned = [[0.0; TILE]; 4];
            let correction = group.correction(projection, first, features, self.prompt.in_features, scratch);
            let panels = match &group.panels {
                Panels::Prompt(panels) => panels,
                Panels::Own(panels) => panels.as_slice(),
            };
            for panel in panels {
                sums.resize(TILE * panel.lanes, 0.0);
                for tile in (0..features).step_by(TILE) {
                    let width = TILE.min(features - tile);
                    for &row in &panel.rows {
                        kernel::prefetch(&base_row(row)[tile..]);
                        kernel::prefetch(slice_of(&mut output, row, tile));
                    }
                    let starts = &correction.rows.starts[tile..=tile + width];
                    // SAFETY: columns of a `SparseRows` of cross-attention are below the `in_features` of its base, which is the prompt's
                    // (`Composition::groups`).
                    unsafe { panel.multiply(kernel::Rows { starts, ..correction.rows }, &mut sums) };
                    for (four, rows) in panel.rows.chunks(4).enumerate() {
                        kernel::turn(&sums, panel.lanes, 4 * four, &mut turned);
                        for (&row, sums) in rows.iter().zip(&turned) {
                            let base = &base_row(row)[tile..tile + width];
                            let effective = |(base, sum): (&f32, &f32)| base - correction.scale * sum;
                            match base.first_chunk::<TILE>() {
                                Some(base) => store(&mut output, row, tile, base.iter().zip(sums).map(effective)),
                                None => store(&mut output, row, tile, base.iter().zip(sums).map(effective)),
                            }
                        }
                    }
                }
            }
            scratch.sums = sums;
        }
    }
}

/// One row of a block of columns of a row-major matrix, from a column on.
#[inline(always)]
fn slice_of<'a, T>(output: &'a mut ArrayViewMut2<'_, T>, row: u32, first: usize) -> &'a mut [T] {
    output.row_mut(row as usize).into_slice().and_then(|row| row.get_mut(first..)).unwrap_or_default()
}

#[inline(always)]
fn store<T: Element>(output: &mut ArrayViewMut2<'_, T>, row: u32, first: usize, numbers: impl Iterator<Item = f32>) {
    slice_of(output, row, first).iter_mut().zip(numbers).for_each(|(to, number)| *to = T::from_f32(number));
}

impl Group<'_> {
    /// Writes a projection's weights `[out, in]` without what the group's concepts take away.
    fn effective_weights<T: Element>(
        &self,
        projection: usize,
        ProjectionWeights { out_features, in_features, weights, .. }: &ProjectionWeights,
        to: &mut [T],
        scratch: &mut Scratch,
    ) -> Result<()> {
        let Correction { rows, scale } = self.correction(projection, 0, *out_features, *in_features, scratch);
        let (mut widened, mut row_of) = (Vec::new(), zeroed::<f32>(*in_features)?);
        for (row, to) in to.chunks_exact_mut(*in_features).enumerate() {
            row_of.copy_from_slice(weights.widen(row * in_features..(row + 1) * in_features, &mut widened)?);
            for entry in rows.starts[row] as usize..rows.starts[row + 1] as usize {
                row_of[usize::from(rows.columns[entry])] -= scale * rows.values[entry];
            }
            to.iter_mut().zip(&row_of).for_each(|(to, value)| *to = T::from_f32(*value));
        }
        Ok(())
    }

    /// The weights that the group's concepts take away from `features` output features, from the `first` on.
    fn correction<'a>(
        &'a self,
        projection: usize,
        first: usize,
        features: usize,
        in_features: usize,
        scratch: &'a mut Scratch,
    ) -> Correction<'a> {
        let with_rows =
            |part: &&'a Part| part.concept.projections[projection].as_ref().map(|rows| (rows, part.strength));
        if let [part] = self.parts.as_slice()
            && let Some((rows, scale)) = with_rows(part)
        {
            let starts = &rows.starts[first..=first + features];
            return Correction { rows: kernel::Rows { starts, columns: &rows.columns, values: &rows.values }, scale };
        }
        let Scratch { met, starts, columns, values, .. } = scratch;
        met.resize(in_features, (1.0, 0.0));
        let concepts = || self.parts.iter().filter_map(with_rows);
        let entries =
            |rows: &SparseRows, feature: usize| rows.starts[feature] as usize..rows.starts[feature + 1] as usize;
        let most: usize =
            concepts().map(|(rows, _)| (rows.starts[first + features] - rows.starts[first]) as usize).sum();
        columns.resize(most + PADDING, 0);
        values.resize(most + PADDING, 0.0);
        starts.clear();
        starts.push(0);
        let mut end = 0;
        for feature in first..first + features {
            let begin = end;
            for (rows, strength) in concepts() {
                let entries = entries(rows, feature);
                let from = rows.columns[entries.clone()].iter().zip(&rows.values[entries.clone()]);
                let to = columns[end..].iter_mut().zip(&mut values[end..]);
                for ((to_column, to_value), (&column, &value)) in to.zip(from) {
                    *to_column = column;
                    *to_value = value * strength;
                    let (kept, sum) = &mut met[usize::from(column)];
                    *kept *= 1.0 - strength;
                    *sum += strength;
                }
                end += entries.len();
            }
            for (column, value) in columns[begin..end].iter().zip(&mut values[begin..end]) {
                let (kept, sum) = met[usize::from(*column)];
                *value *= if kept + sum == 1.0 { 1.0 } else { (1.0 - kept) / sum };
            }
            columns[begin..end].iter().for_each(|&column| met[usize::from(column)] = (1.0, 0.0));
            starts.push(end as u32);
        }
        Correction { rows: kernel::Rows { starts, columns, values }, scale: 1.0 }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Indices, Layer, Metadata, ProjectionWeights, Weights};
    use super::*;
    use proptest::prelude::*;
    use rand_chacha::ChaCha8Rng;
    use rand_core::{RngCore, SeedableRng};

    const SHAPES: [(&str, usize); 3] = [("a.to_k", 70), ("a.to_v", 70), ("b.to_k", 130)];
    const IN: usize = 48;

    struct Random(ChaCha8Rng);

    impl Random {
        fn new(seed: u64) -> Self {
            Self(ChaCha8Rng::seed_from_u64(seed))
        }

        fn numbers(&mut self, count: usize) -> Vec<f32> {
            (0..count).map(|_| self.0.next_u32() as f32 / 2f32.powi(31) - 1.0).collect()
        }

        fn neurons(&mut self, density: f64) -> NeuronSet {
            let layers = SHAPES.map(|(path, out)| {
                let weights = (out * IN) as u32;
                let member = |_: &u32| f64::from(self.0.next_u32()) < density * 2f64.powi(32);
                let indices = Indices::from_sorted(weights, (0..weights).filter(member).collect()).unwrap();
                Layer::new(path, out, IN, indices).unwrap()
            });
            NeuronSet::new(layers.into()).unwrap()
        }
    }

    fn base(seed: u64) -> Projections {
        let mut random = Random::new(seed);
        let projections = SHAPES.map(|(path, out)| {
            let numbers = random.numbers(out * IN);
            let weights = match path {
                "a.to_k" => Weights::F32(numbers),
                "a.to_v" => Weights::F16(numbers.into_iter().map(f16::from_f32).collect()),
                _ => Weights::Bf16(numbers.into_iter().map(bf16::from_f32).collect()),
            };
            let bias = (path == "b.to_k").then(|| random.numbers(out));
            ProjectionWeights { path: path.into(), out_features: out, in_features: IN, weights, bias }
        });
        Projections::new(projections.into()).unwrap()
    }

    fn pool(threads: usize) -> ThreadPool {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap()
    }

    /// Keys and values by the definition, in f64: every weight times the product of `1 - strength` over the concepts that
    /// hold it and act on the row.
    fn by_definition(
        base: &Projections,
        context: &[f32],
        tokens: usize,
        concepts: &[(NeuronSet, f32, Rows)],
    ) -> Vec<Vec<f64>> {
        let acts = |rows: &Rows, row: usize| match rows {
            Rows::All => true,
            Rows::Only(listed) => listed.contains(&(row / tokens, row % tokens)),
        };
        let outputs = base.as_slice().iter().map(|projection| {
            let mut output = Vec::new();
            let mut weights = vec![0.0; projection.out_features * IN];
            projection.weights.gather(&(0..weights.len() as u32).collect::<Vec<_>>(), &mut weights);
            for (row, context) in context.chunks_exact(IN).enumerate() {
                for feature in 0..projection.out_features {
                    let mut sum = projection.bias.as_ref().map_or(0.0, |bias| f64::from(bias[feature]));
                    for (column, &number) in context.iter().enumerate() {
                        let index = feature * IN + column;
                        let mut weight = f64::from(weights[index]);
                        for (neurons, strength, rows) in concepts {
                            let layer = neurons.layer(&projection.path).unwrap();
                            if acts(rows, row) && layer.indices().contains(index as u32) {
                                weight *= 1.0 - f64::from(*strength);
                            }
                        }
                        sum += weight * f64::from(number);
                    }
                    output.push(sum);
                }
            }
            output
        });
        outputs.collect()
    }

    struct Buffers {
        numbers: Vec<Vec<f32>>,
        held: Held,
    }

    impl Buffers {
        fn new(prompt: &KeysValues) -> Self {
            let numbers = prompt.base().iter().map(|base| vec![f32::NAN; base.len()]).collect();
            Self { numbers, held: Held::default() }
        }

        fn write(&mut self, composition: &Composition, prompt: &KeysValues, pool: &ThreadPool) -> Vec<Vec<u32>> {
            let mut outputs: Vec<Output<'_>> = self.numbers.iter_mut().map(|n| Output::F32(n)).collect();
            composition.write(prompt, &mut outputs, &mut self.held, pool).unwrap();
            self.bits()
        }

        fn bits(&self) -> Vec<Vec<u32>> {
            bits(&self.numbers)
        }
    }

    fn bits(numbers: &[Vec<f32>]) -> Vec<Vec<u32>> {
        numbers.iter().map(|numbers| numbers.iter().map(|number| number.to_bits()).collect()).collect()
    }

    fn compose(base: &Projections, concepts: &[(NeuronSet, f32, Rows)], pool: &ThreadPool) -> Composition {
        let mut composition = Composition::new();
        for (neurons, strength, rows) in concepts {
            let gathered = GatheredConcept::from_neurons(neurons, base, pool).unwrap();
            assert_eq!(gathered.len() as u64, neurons.len());
            composition.push(gathered, *strength, rows.clone()).unwrap();
        }
        composition
    }

    fn rows(batch: usize, tokens: usize) -> impl Strategy<Value = Rows> {
        prop_oneof![Just(Rows::All), proptest::collection::vec((0..batch, 0..tokens), 0..7).prop_map(Rows::Only),]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn keys_and_values_are_those_of_the_definition(
            seed: u64,
            (batch, tokens, concepts) in (1usize..4, 1usize..20).prop_flat_map(|(batch, tokens)| {
                let density = prop_oneof![Just(0.0), Just(0.02), Just(0.3)];
                let strength = prop_oneof![Just(1f32), 0f32..=1.0, Just(0f32)];
                let concept = (density, strength, rows(batch, tokens));
                (Just(batch), Just(tokens), proptest::collection::vec(concept, 0..5))
            }),
        ) {
            let (pool, mut random) = (pool(2), Random::new(seed));
            let base = base(seed);
            let context = random.numbers(batch * tokens * IN);
            let prompt = base.keys_values(&context, batch, tokens, &pool).unwrap();
            let concepts: Vec<_> = concepts
                .into_iter()
                .map(|(density, strength, rows)| (random.neurons(density), strength, rows))
                .collect();
            let mut buffers = Buffers::new(&prompt);
            let composed = buffers.write(&compose(&base, &concepts, &pool), &prompt, &pool);
            let expected = by_definition(&base, &context, tokens, &concepts);
            for (output, expected) in buffers.numbers.iter().zip(&expected) {
                for (number, expected) in output.iter().zip(expected) {
                    prop_assert!((f64::from(*number) - expected).abs() < 1e-5, "{number} {expected}");
                }
            }
            // Rows on which nothing acts are the base's; removing all gives back the base; a second time is the first.
            let acting = |row: usize| concepts.iter().any(|(neurons, strength, rows)| {
                *strength > 0.0 && !neurons.is_empty() && match rows {
                    Rows::All => true,
                    Rows::Only(listed) => listed.contains(&(row / tokens, row % tokens)),
                }
            });
            for (output, base) in composed.iter().zip(bits(prompt.base())) {
                let out = base.len() / (batch * tokens);
                for row in (0..batch * tokens).filter(|row| !acting(*row)) {
                    prop_assert_eq!(&output[row * out..][..out], &base[row * out..][..out]);
                }
            }
            prop_assert_eq!(buffers.write(&Composition::new(), &prompt, &pool), bits(prompt.base()));
            prop_assert_eq!(buffers.write(&compose(&base, &concepts, &pool), &prompt, &pool), composed);
        }
    }

    #[test]
    fn a_then_b_then_a_is_a_on_any_number_of_threads() {
        let base = base(3);
        let mut random = Random::new(4);
        let context = random.numbers(2 * 9 * IN);
        let a = [(random.neurons(0.05), 1.0, Rows::All), (random.neurons(0.05), 0.4, Rows::Only(vec![(1, 3)]))];
        let b = [(random.neurons(0.1), 0.7, Rows::Only(vec![(0, 0), (1, 8)]))];
        let mut seen = None;
        for threads in [1, 2, 5] {
            let pool = pool(threads);
            let prompt = base.keys_values(&context, 2, 9, &pool).unwrap();
            let (a, b) = (compose(&base, &a, &pool), compose(&base, &b, &pool));
            let mut buffers = Buffers::new(&prompt);
            let first = buffers.write(&a, &prompt, &pool);
            let second = buffers.write(&b, &prompt, &pool);
            assert_ne!(first, second);
            assert_eq!(buffers.write(&a, &prompt, &pool), first);
            assert_eq!(Buffers::new(&prompt).write(&b, &prompt, &pool), second);
            let seen = seen.get_or_insert((first.clone(), second.clone()));
            assert_eq!(*seen, (first, second));
        }
    }

    #[test]
    fn a_local_concept_writes_its_rows_and_no_other() {
        let (base, pool) = (base(5), pool(1));
        let mut random = Random::new(6);
        let prompt = base.keys_values(&random.numbers(2 * 9 * IN), 2, 9, &pool).unwrap();
        let local = [(random.neurons(0.2), 1.0, Rows::Only(vec![(1, 4)]))];
        let mut buffers = Buffers::new(&prompt);
        buffers.write(&Composition::new(), &prompt, &pool);
        let marked = 1.5e9;
        buffers.numbers.iter_mut().flatten().for_each(|number| *number = marked);
        buffers.write(&compose(&base, &local, &pool), &prompt, &pool);
        for numbers in &buffers.numbers {
            let out = numbers.len() / 18;
            for (row, numbers) in numbers.chunks_exact(out).enumerate() {
                assert!(numbers.iter().all(|&number| (number == marked) == (row != 13)), "{row}");
            }
        }
    }

    #[test]
    fn half_precision_buffers_get_the_rounded_numbers() {
        let (base, pool) = (base(7), pool(2));
        let mut random = Random::new(8);
        let prompt = base.keys_values(&random.numbers(9 * IN), 1, 9, &pool).unwrap();
        let composition = compose(&base, &[(random.neurons(0.2), 1.0, Rows::Only(vec![(0, 4), (0, 5)]))], &pool);
        let mut single = Buffers::new(&prompt);
        single.write(&composition, &prompt, &pool);
        let mut halves: Vec<_> = prompt.base().iter().map(|base| vec![f16::NAN; base.len()]).collect();
        let mut brains: Vec<_> = prompt.base().iter().map(|base| vec![bf16::NAN; base.len()]).collect();
        let mut outputs: Vec<_> = halves.iter_mut().map(|n| Output::F16(n)).collect();
        composition.write(&prompt, &mut outputs, &mut Held::default(), &pool).unwrap();
        let mut outputs: Vec<_> = brains.iter_mut().map(|n| Output::Bf16(n)).collect();
        composition.write(&prompt, &mut outputs, &mut Held::default(), &pool).unwrap();
        let singles = single.numbers.iter().flatten();
        for ((single, half), brain) in singles.zip(halves.iter().flatten()).zip(brains.iter().flatten()) {
            assert_eq!(f16::from_f32(*single).to_bits(), half.to_bits());
            assert_eq!(bf16::from_f32(*single).to_bits(), brain.to_bits());
        }
    }

    #[test]
    fn a_concept_of_another_base_is_refused_with_both_fingerprints() {
        let (ours, theirs, pool) = (base(1), base(2), pool(1));
        let neurons = Random::new(9).neurons(0.1);
        let metadata = Metadata::new(theirs.fingerprint(), "a red clock", "stable-diffusion-v1/concept-neurons");
        let mut concept = Concept { metadata, neurons, values: None, token: None };
        let error = GatheredConcept::new(&concept, &ours, &pool).err().unwrap();
        assert_eq!(error.status(), Status::WrongBase);
        for fingerprint in [ours.fingerprint(), theirs.fingerprint()] {
            assert!(error.message().contains(&fingerprint.to_string()));
        }
        let gathered = GatheredConcept::new(&concept, &theirs, &pool).unwrap();
        let mut composition = Composition::new();
        composition.push(gathered, 1.0, Rows::All).unwrap();
        let prompt = ours.keys_values(&[0.0; IN], 1, 1, &pool).unwrap();
        let mut numbers: Vec<_> = prompt.base().to_vec();
        let mut outputs: Vec<_> = numbers.iter_mut().map(|n| Output::F32(n)).collect();
        let error = composition.write(&prompt, &mut outputs, &mut Held::default(), &pool).unwrap_err();
        assert_eq!(error.status(), Status::InvalidArgument);

        let layer = |path: &str, out| Layer::new(path, out, IN, Indices::empty((out * IN) as u32)).unwrap();
        for (layer, says) in [(layer("c.to_k", 70), "no such projection"), (layer("a.to_k", 71), "70 x 48")] {
            concept.neurons = NeuronSet::new(vec![layer]).unwrap();
            let error = GatheredConcept::new(&concept, &theirs, &pool).err().unwrap();
            assert_eq!(error.status(), Status::InvalidFile);
            assert!(error.message().contains(says), "{error}");
        }
    }

    #[test]
    fn wrong_arguments_are_refused() {
        let (base, pool) = (base(1), pool(1));
        let mut random = Random::new(2);
        assert!(base.keys_values(&[0.0; IN + 1], 1, 1, &pool).is_err());
        assert!(base.keys_values(&[], 0, 5, &pool).is_err());
        assert!(base.keys_values(&[0.0; IN], usize::MAX, 2, &pool).is_err());
        let prompt = base.keys_values(&random.numbers(2 * 3 * IN), 2, 3, &pool).unwrap();
        let gathered = GatheredConcept::from_neurons(&random.neurons(0.1), &base, &pool).unwrap();
        for strength in [-0.1, 1.1, f32::NAN, f32::INFINITY] {
            assert!(Composition::new().push(gathered.clone(), strength, Rows::All).is_err());
        }
        for row in [(2, 0), (0, 3), (usize::MAX, usize::MAX)] {
            let mut composition = Composition::new();
            composition.push(gathered.clone(), 1.0, Rows::Only(vec![row])).unwrap();
            let mut numbers: Vec<_> = prompt.base().to_vec();
            let mut outputs: Vec<_> = numbers.iter_mut().map(|n| Output::F32(n)).collect();
            assert!(composition.write(&prompt, &mut outputs, &mut Held::default(), &pool).is_err());
        }
        let mut numbers: Vec<_> = prompt.base().to_vec();
        numbers[1].pop();
        let mut outputs: Vec<_> = numbers.iter_mut().map(|n| Output::F32(n)).collect();
        assert!(Composition::new().write(&prompt, &mut outputs, &mut Held::default(), &pool).is_err());
        assert!(Composition::new().write(&prompt, &mut outputs[..2], &mut Held::default(), &pool).is_err());
        assert!(Projections::new(Vec::new()).is_err());
    }
}
