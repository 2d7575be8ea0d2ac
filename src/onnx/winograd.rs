//! Convolutions of 3 x 3 with fewer products: Winograd's minimal filtering as Lavin and Gray write it (2015, arXiv
//! 1509.09308).
//!
//! A tile of `m x m` places of the output comes from a patch `d` of `t x t` places of the input, `t = m + 2`:
//! `Y = Aᵀ ((G g Gᵀ) ∘ (Bᵀ d B)) A`, which takes `t²` products a tile where the sum takes `9 m²`. Summed over channels, the
//! products in the middle are `t²` products of matrices. ONNX Runtime's kernels for the CPU always take the sum, so here a
//! convolution is written as the steps of that formula, each an operator of its own.

use std::collections::HashMap;

use super::build;
use super::edit::Edit;
use super::graph::Topology;
use super::model::Model;
use super::proto::NodeProto;
use super::tensor::DataType;
use crate::error::Result;

/// How tiles of one size are computed.
struct Filtering {
    /// Places along a side of a tile.
    tile: usize,
    /// `Bᵀ [t, t]`
    input: &'static [f64],
    /// `G [t, 3]`
    kernel: &'static [f64],
    /// `Aᵀ [m, t]`
    output: &'static [f64],
    /// The largest kernel that it is worth it for, in numbers for each number that it moves over: a transformed kernel is
    /// `t² / 9` times as large, and all of it is read for every run.
    largest_kernel: usize,
}

/// F(4 x 4, 3 x 3): a quarter of the products, kernels four times as large, rounding errors some ten times those of the sum.
/// F(2 x 2, 3 x 3): 4 / 9 of the products, kernels 16 / 9 as large, rounding errors as of the sum.
#[rustfmt::skip]
const FILTERINGS: [Filtering; 2] = [
    Filtering {
        tile: 4,
        input: &[
            4., 0., -5., 0., 1., 0.,
            0., -4., -4., 1., 1., 0.,
            0., 4., -4., -1., 1., 0.,
            0., -2., -1., 2., 1., 0.,
            0., 2., -1., -2., 1., 0.,
            0., 4., 0., -5., 0., 1.,
        ],
        kernel: &[
            1. / 4., 0., 0.,
            -1. / 6., -1. / 6., -1. / 6.,
            -1. / 6., 1. / 6., -1. / 6.,
            1. / 24., 1. / 12., 1. / 6.,
            1. / 24., -1. / 12., 1. / 6.,
            0., 0., 1.,
        ],
        output: &[
            1., 1., 1., 1., 1., 0.,
            0., 1., -1., 2., -2., 0.,
            0., 1., 1., 4., 4., 0.,
            0., 1., -1., 8., -8., 1.,
        ],
        largest_kernel: 8,
    },
    Filtering {
        tile: 2,
        input: &[
            1., 0., -1., 0.,
            0., 1., 1., 0.,
            0., -1., 1., 0.,
            0., 1., 0., -1.,
        ],
        kernel: &[
            1., 0., 0.,
            1. / 2., 1. / 2., 1. / 2.,
            1. / 2., -1. / 2., 1. / 2.,
            0., 0., 1.,
        ],
        output: &[
            1., 1., 1., 0.,
            0., 1., -1., -1.,
        ],
        largest_kernel: 64,
    },
];

/// Fewer channels than this on either side do not pay for the transformations.
const FEWEST_CHANNELS: usize = 256;

/// A convolution to be written anew: `x [batch, channels, height, width]` to as many places of `kernels`.
struct Convolution {
    node: usize,
    filtering: &'static Filtering,
    batch: usize,
    channels: usize,
    kernels: usize,
    height: usize,
    width: usize,
    /// The kernel, a constant, or the one that it is [`turned`] from.
    original: String,
    turned: bool,
}

/// Writes every convolution anew for which it pays on a CPU, and answers how many bytes their kernels then take. These are
/// the ones in f32 of 3 x 3 and stride 1 around each place, of constant kernels and many channels, where `sizes` tells those
/// of the input. The results differ by rounding: by some 4e-7 of the largest number with small tiles, 8e-6 with large ones.
pub fn minimal_filtering(model: &mut Model, sizes: &HashMap<String, Vec<usize>>) -> Result<u64> {
    let found = convolutions(model, sizes);
    if !found.is_empty() {
        model.edit(|edit| {
            let nodes = std::mem::take(&mut edit.graph_mut().node);
            let mut transforms = HashMap::new();
            let mut found = found.iter().peekable();
            for (index, node) in nodes.into_iter().enumerate() {
                match found.next_if(|convolution| convolution.node == index) {
                    Some(convolution) => convolution.write(edit, &node, &mut transforms),
                    None => edit.graph_mut().node.push(node),
                }
            }
            Ok(())
        })?;
    }
    Ok(found.iter().map(Convolution::bytes).sum())
}

fn convolutions(model: &Model, sizes: &HashMap<String, Vec<usize>>) -> Vec<Convolution> {
    let topology = model.topology();
    let types = topology.element_types();
    let mut found = Vec::new();
    for (index, node) in topology.graph().node.iter().enumerate().filter(|(_, node)| node.is("Conv")) {
        let [x, kernel, ..] = node.input.as_slice() else { continue };
        if !around_each_place(node) || types.get(x.as_str()) != Some(&DataType::Float) {
            continue;
        }
        let (original, turned) = match turned(model, &topology, kernel) {
            Some(original) => (original, true),
            None => (kernel.as_str(), false),
        };
        let Some(&[outer, inner, 3, 3]) = topology.constant(original).map(|tensor| tensor.dims.as_slice()) else {
            continue;
        };
        let [kernels, taken] = if turned { [inner, outer] } else { [outer, inner] }.map(|size| size as usize);
        let Some(&[batch, channels, height, width]) = sizes.get(x).map(Vec::as_slice) else { continue };
        if channels != taken {
            continue;
        }
        let numbers = batch * height * width * channels.max(kernels);
        let pays = |filtering: &&Filtering| {
            height.is_multiple_of(filtering.tile)
                && width.is_multiple_of(filtering.tile)
                && channels.min(kernels) >= FEWEST_CHANNELS
                && 9 * channels * kernels <= filtering.largest_kernel * numbers
        };
        if let Some(filtering) = FILTERINGS.iter().find(pays) {
            let original = original.to_owned();
            found.push(Convolution {
                node: index,
                filtering,
                batch,
                channels,
                kernels,
                height,
                width,
                original,
                turned,
            });
        }
    }
    found
}

/// Whether a convolution has a kernel of 3 x 3, stride 1, and as many places after it as before.
fn around_each_place(node: &NodeProto) -> bool {
    let ints = |name, default: &[i64]| node.attribute_ints(name).is_none_or(|values| values == default);
    node.attribute_ints("kernel_shape").is_some_and(|sizes| sizes == [3, 3])
        && node.attribute_ints("pads").is_some_and(|pads| pads == [1; 4])
        && node.attribute_s("auto_pad").is_none_or(|pads| pads == "NOTSET")
        && ints("strides", &[1, 1])
        && ints("dilations", &[1, 1])
        && node.attribute_i("group").is_none_or(|groups| groups == 1)
}

/// `M ⊗ M` for a matrix of `columns` columns: what it does to both axes of a patch.
fn squared(matrix: &[f64], columns: usize) -> Vec<f32> {
    let rows = || matrix.chunks_exact(columns);
    let pairs = rows().flat_map(|a| rows().map(move |b| (a, b)));
    pairs.flat_map(|(a, b)| a.iter().flat_map(move |x| b.iter().map(move |y| (x * y) as f32))).collect()
}

/// The kernel that another one is, read backwards along both sides, with input and output channels exchanged: what the rule
/// of convolutions convolves with. Its own transformation takes fewer steps than that of what it becomes.
fn turned<'g>(model: &Model, topology: &Topology<'g>, kernel: &str) -> Option<&'g str> {
    let of = |value: &str, op_type| topology.producer(value).map(|(_, node)| node).filter(|node| node.is(op_type));
    let exchanged = of(kernel, "Transpose").filter(|node| node.attribute_ints("perm") == Some(&[1, 0, 2, 3]))?;
    let flipped = of(exchanged.input.first()?, "Slice")?;
    let [original, from, to, axes, steps] = flipped.input.as_slice() else { return None };
    let all = |value: &str, wanted: fn(i64) -> bool| {
        let numbers = model.tensor(topology.constant(value)?).ok()?.to_i64().ok()?;
        numbers.iter().all(|&number| wanted(number)).then_some(numbers)
    };
    all(from, |number| number == -1)?;
    all(to, |number| number < -3)?;
    all(steps, |number| number == -1)?;
    (all(axes, |_| true)? == [2, 3]).then_some(original)
}

impl Convolution {
    /// Of the transformed kernel.
    fn bytes(&self) -> u64 {
        let patch = (self.filtering.tile + 2).pow(2);
        (patch * self.channels * self.kernels * size_of::<f32>()) as u64
    }

    fn write(&self, edit: &mut Edit, node: &NodeProto, transforms: &mut HashMap<(usize, usize), String>) {
        let &Self { filtering, batch, channels, kernels, height, width, .. } = self;
        let Filtering { tile, input, kernel, output, .. } = filtering;
        let (side, rows, columns) = (tile + 2, height / tile, width / tile);
        let (patch, tiles) = (side * side, rows * columns);
        let mut graph = edit.growing(&node.output[0]);
        let [m, t] = [*tile, side].map(|size| size as i64);

        // Bᵀ d B, of every channel by itself: a convolution that steps from tile to tile.
        let transform = transforms.entry((side, channels)).or_insert_with(|| {
            let one = graph.numbers(&[patch, 1, side, side], &squared(input, side));
            let repeats = graph.integers(&[channels as i64, 1, 1, 1]);
            graph.node(build::node("Tile", [&*one, &repeats], []))
        });
        let patches = build::node("Conv", [node.input[0].as_str(), transform], [])
            .with("kernel_shape", [t, t])
            .with("strides", [m, m])
            .with("pads", [1; 4])
            .with("group", channels as i64);
        let patches = graph.node(patches);
        // [patch, channels, batch * tiles]
        let patches = match batch {
            // ONNX Runtime takes this exchange into the product that follows.
            1 => {
                let apart = graph.reshape(&patches, &[channels, patch, tiles]);
                graph.transpose(&apart, &[1, 0, 2])
            }
            _ => {
                let apart = graph.reshape(&patches, &[batch, channels, patch, tiles]);
                let exchanged = graph.transpose(&apart, &[2, 1, 0, 3]);
                graph.reshape(&exchanged, &[patch, channels, batch * tiles])
            }
        };

        // G g Gᵀ, [patch, kernels, channels], which follows from constants.
        let mut matrix = squared(kernel, 3);
        if self.turned {
            matrix.chunks_exact_mut(9).for_each(<[f32]>::reverse);
        }
        let equation = if self.turned { "pxy,cmxy->pmc" } else { "pxy,mcxy->pmc" };
        let matrix = graph.numbers(&[patch, 3, 3], &matrix);
        let weights = build::node("Einsum", [&*matrix, &self.original], []).with("equation", equation);
        let weights = graph.node(weights);
        let products = graph.node(build::node("MatMul", [&*weights, &patches], []));

        // Aᵀ ... A, and tiles side by side.
        let flat = graph.reshape(&products, &[patch, kernels * batch * tiles]);
        let matrix = graph.numbers(&[tile * tile, patch], &squared(output, side));
        let places = graph.node(build::node("MatMul", [&*matrix, &flat], []));
        let apart = graph.reshape(&places, &[1, tile * tile * kernels * batch, rows, columns]);
        let mut whole = build::node("DepthToSpace", [&*apart], []).with("blocksize", m);
        if batch > 1 {
            let whole_tiles = graph.node(whole);
            let apart = graph.reshape(&whole_tiles, &[kernels, batch, height, width]);
            whole = build::node("Transpose", [&*apart], []).with("perm", [1, 0, 2, 3]);
        }
        match node.input.get(2).filter(|bias| !bias.is_empty()) {
            None => graph.instead(whole, node),
            Some(bias) => {
                let whole = graph.node(whole);
                let bias = graph.reshape(bias, &[kernels, 1, 1]);
                graph.instead(build::node("Add", [&*whole, &bias], []), node);
            }
        }
    }
}
