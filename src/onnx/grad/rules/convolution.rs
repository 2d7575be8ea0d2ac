//! Convolutions of one to three dimensions and their transposes. Inputs are `[B, C, ...]`, kernels `[M, C / groups, ...]`.

use super::Rule;
use super::resize::{product, repeated};
use crate::error::{Error, Result};
use crate::onnx::grad::Effort;
use crate::onnx::grad::expr::Expr;
use crate::onnx::grad::facts::Size;
use crate::onnx::grad::site::Site;
use crate::onnx::proto::NodeProto;

pub(super) const RULES: &[(&str, Rule)] = &[("Conv", conv), ("ConvTranspose", conv_transpose)];

/// How a kernel moves over the places, one entry a spatial axis.
#[derive(Clone)]
pub(super) struct Window {
    /// Its sizes. They may vary where a gradient is differentiated: the kernel of a kernel's gradient is a cotangent.
    pub(super) kernel: Vec<Size>,
    pub(super) strides: Vec<i64>,
    pub(super) dilations: Vec<i64>,
    /// Before, and after.
    pub(super) pads: (Vec<i64>, Vec<i64>),
    pub(super) group: i64,
}

/// Reads a window from a node. `small` and `large` are the sizes on either side: a convolution goes from large to small.
pub(super) fn window(at: &Site, kernel: &[Size], small: &[Size], large: &[Size]) -> Result<Window> {
    let axes = kernel.len();
    let ints = |name, default: i64| match at.node.attribute_ints(name) {
        Some(values) if values.len() == axes => Ok(values.to_vec()),
        None => Ok(vec![default; axes]),
        Some(values) => Err(Error::invalid_file(format!("{}: {} {name} for {axes} axes", at.name(), values.len()))),
    };
    let (strides, dilations) = (ints("strides", 1)?, ints("dilations", 1)?);
    let pads = match at.text("auto_pad", "NOTSET") {
        "NOTSET" => match at.node.attribute_ints("pads") {
            Some(pads) if pads.len() == 2 * axes => (pads[..axes].to_vec(), pads[axes..].to_vec()),
            _ => (vec![0; axes], vec![0; axes]),
        },
        "VALID" => (vec![0; axes], vec![0; axes]),
        same => {
            let mut pads = (Vec::new(), Vec::new());
            for axis in 0..axes {
                let sizes = (small[axis + 2].fixed(), large[axis + 2].fixed(), kernel[axis].fixed());
                let (Some(small), Some(large), Some(kernel)) = sizes else {
                    return Err(at.unsupported("padding to the same size where sizes vary from run to run"));
                };
                let reach = (small as i64 - 1) * strides[axis] + (kernel as i64 - 1) * dilations[axis] + 1;
                let total = (reach - large as i64).max(0);
                let before = if same == "SAME_LOWER" { total - total / 2 } else { total / 2 };
                pads.0.push(before);
                pads.1.push(total - before);
            }
            pads
        }
    };
    Ok(Window { kernel: kernel.to_vec(), strides, dilations, pads, group: at.int("group", 1) })
}

impl Window {
    pub(super) fn on(&self, node: NodeProto) -> NodeProto {
        let node = node
            .with("strides", self.strides.as_slice())
            .with("dilations", self.dilations.as_slice())
            .with("group", self.group)
            .with("pads", [self.pads.0.as_slice(), &self.pads.1].concat());
        match self.fixed_kernel() {
            Some(kernel) => node.with("kernel_shape", kernel),
            None => node,
        }
    }

    pub(super) fn fixed_kernel(&self) -> Option<Vec<i64>> {
        self.kernel.iter().map(|size| size.fixed().map(|size| size as i64)).collect()
    }

    /// What the places at the end that no window reaches add to the size of a transposed convolution: the same in every
    /// run, or there is no one graph for them.
    pub(super) fn left_over(&self, at: &Site, small: &[Size], large: &[Size]) -> Result<Vec<i64>> {
        let axis = |axis: usize| {
            let rest = |run: usize| {
                let [small, large, kernel] =
                    [&small[axis + 2], &large[axis + 2], &self.kernel[axis]].map(|size| size.in_run(run) as i64);
                let reach = (small - 1) * self.strides[axis] + (kernel - 1) * self.dilations[axis] + 1;
                large + self.pads.0[axis] + self.pads.1[axis] - reach
            };
            match (1..small[axis + 2].seen().len()).all(|run| rest(run) == rest(0)) {
                true => Ok(rest(0)),
                false => Err(at.unsupported("the places that no window reaches differ between the observed runs")),
            }
        };
        (0..self.kernel.len()).map(axis).collect()
    }
}

/// Whether a second kernel is worth its memory where memory is short: it is at most twice as large as what it moves over.
fn is_small(window: &Window, small: &[Size], large: &[Size]) -> bool {
    let product = |sizes: &[Size]| sizes.iter().map(Size::fixed).product::<Option<usize>>();
    let kernel = [&small[1..2], &large[1..2], &window.kernel].map(product).into_iter().product::<Option<usize>>();
    let values = product(small).max(product(large));
    kernel.zip(values).is_some_and(|(kernel, values)| kernel <= 2 * values)
}

/// The cotangent of a convolution's input: the transposed convolution of `dy`. `small` are the sizes of `dy`, `large`
/// those of the input.
pub(super) fn spread(
    at: &Site,
    window: &Window,
    dy: &Expr,
    kernel: &Expr,
    small: &[Size],
    large: &[Size],
) -> Result<Expr> {
    let rest = window.left_over(at, small, large)?;
    let unit = |values: &[i64]| values.iter().all(|&value| value == 1);
    let turned = |sizes: Vec<i64>| {
        let pads = |pads: &[i64]| -> Vec<i64> {
            (0..pads.len()).map(|axis| window.dilations[axis] * (sizes[axis] - 1) - pads[axis]).collect()
        };
        let pads = (pads(&window.pads.0), pads(&window.pads.1));
        pads.0.iter().chain(&pads.1).all(|&pad| pad >= 0).then_some(pads)
    };
    if (at.effort() == Effort::Speed || is_small(window, small, large))
        && unit(&window.strides)
        && window.group == 1
        && let Some(pads) = window.fixed_kernel().and_then(turned)
    {
        // With stride 1 it is a convolution with the turned kernel, which runs faster.
        let turned = Window {
            kernel: window.kernel.clone(),
            strides: window.strides.clone(),
            dilations: window.dilations.clone(),
            pads,
            group: 1,
        };
        return Ok(dy.op_with("Conv", &[&turned_kernel(kernel, small.len())], |node| turned.on(node)));
    }
    // A transposed convolution may add less than a stride; what goes beyond are places without any cotangent.
    let added: Vec<i64> = rest.iter().zip(&window.strides).map(|(&rest, &stride)| rest.clamp(0, stride - 1)).collect();
    let spread =
        dy.op_with("ConvTranspose", &[kernel], |node| window.on(node).with("output_padding", added.as_slice()));
    let beyond: Vec<i64> = rest.iter().zip(&added).map(|(&rest, &added)| rest - added).collect();
    if beyond.iter().all(|&count| count == 0) {
        return Ok(spread);
    }
    let mut pads = vec![0; small.len() + 2];
    pads.extend(beyond);
    Ok(spread.op("Pad", &[&at.graph().ints(&pads)]))
}

/// A kernel backwards along its places, with input and output channels exchanged.
fn turned_kernel(kernel: &Expr, rank: usize) -> Expr {
    let mut order: Vec<usize> = (0..rank).collect();
    order.swap(0, 1);
    kernel.flip(&(2..rank as i64).collect::<Vec<_>>()).transpose(&order)
}

/// The cotangent of what a convolution's input was repeated from: for a window of stride 1 over an input each place of
/// which is a block of `factors` equal places, which nothing else takes. The places of a block are summed in the kernel,
/// which then moves by whole blocks: with blocks of 2 x 2 and a kernel of 3 x 3, 4 products for each number instead of 9.
fn of_repeated(at: &Site, window: &Window) -> Result<bool> {
    let Some(resize) = at.maker(0).filter(|node| node.is("Resize") && node.output[0] == at.node.input[0]) else {
        return Ok(false);
    };
    let resize = Site { node: resize, sweep: at.sweep };
    let unit = |values: &[i64]| values.iter().all(|&value| value == 1);
    let alone = resize.only_user(0).is_some_and(|user| std::ptr::eq(user, at.node));
    if at.effort() != Effort::Speed || !alone || !unit(&window.strides) || !unit(&window.dilations) || window.group != 1
    {
        return Ok(false);
    }
    let (Some(kernel), Some(factors)) = (window.fixed_kernel(), repeated(&resize)?) else { return Ok(false) };
    let pads = |pads: &[i64]| kernel.iter().zip(pads).map(|(&size, &pad)| size - 1 - pad).collect::<Vec<_>>();
    let pads = (pads(&window.pads.0), pads(&window.pads.1));
    if pads.0.iter().chain(&pads.1).any(|&pad| pad < 0) || at.sizes(0)?[2..] != at.output_sizes(0)?[2..] {
        return Ok(false);
    }
    let rank = kernel.len() + 2;
    let mut summed = at.x(1);
    for (axis, (&size, &factor)) in kernel.iter().zip(&factors).enumerate() {
        // What meets the first place of a block meets the following ones, one place further on.
        let (size, wide, factor) = (size as usize, (size + factor - 1) as usize, factor as usize);
        let meets = |index: usize| (index / wide..index / wide + factor).contains(&(index % wide));
        let matrix: Vec<f64> = (0..size * wide).map(|index| f64::from(u8::from(meets(index)))).collect();
        summed = product(&summed, &matrix, wide, size, axis + 2, rank);
    }
    let sizes = kernel.iter().zip(&factors).map(|(&size, &factor)| Size::always((size + factor - 1) as usize));
    let blocks =
        Window { kernel: sizes.collect(), strides: factors, dilations: window.dilations.clone(), pads, group: 1 };
    resize.give(0, || at.dy().op_with("Conv", &[&turned_kernel(&summed, rank)], |node| blocks.on(node)));
    Ok(true)
}

/// The cotangent of a kernel: the convolution of the input `large` with `small`, batch and channels exchanged.
fn of_kernel(
    at: &Site,
    window: &Window,
    large: &Expr,
    small: &Expr,
    large_sizes: &[Size],
    small_sizes: &[Size],
) -> Result<Expr> {
    let rank = window.kernel.len() + 2;
    let (groups, places): (i64, Vec<usize>) = (window.group, (2..rank).collect());
    let order = |first: &[usize], shift: usize| -> Vec<usize> {
        first.iter().copied().chain(places.iter().map(|&axis| axis + shift)).collect()
    };
    let (left, right) = if groups == 1 {
        (large.transpose(&order(&[1, 0], 0)), small.transpose(&order(&[1, 0], 0)))
    } else {
        // [B, G·C, ...] as [C, G·B, ...] and [B, G·M, ...] as [G·M, B, ...]: one group sees its own channels only.
        let (sizes, int) = (large.sizes(), |value: i64| at.graph().ints(&[value]));
        let tail = sizes.slice(0, 2, rank as i64);
        let split = large.reshape(&sizes.slice(0, 0, 1).join(&[&int(groups), &int(-1), &tail], 0));
        let inner = split.sizes().slice(0, 2, 3);
        let left = split.transpose(&order(&[2, 1, 0], 1)).reshape(&inner.join(&[&int(-1), &tail], 0));
        (left, small.transpose(&order(&[1, 0], 0)))
    };
    // Strides and dilations change places: one step of the kernel is a dilation in x, one step of ȳ a stride.
    let swapped = Window {
        kernel: small_sizes[2..].to_vec(),
        strides: window.dilations.clone(),
        dilations: window.strides.clone(),
        pads: window.pads.clone(),
        group: groups,
    };
    let full = left.op_with("Conv", &[&right], |node| swapped.on(node));
    // Places at the end that no window reached make the result larger than the kernel.
    let rest = window.left_over(at, small_sizes, large_sizes)?;
    let full = fit(full, &rest, &window.dilations, &at.sizes(1)?, || at.shape(1));
    Ok(full.transpose(&order(&[1, 0], 0)))
}

/// Cuts a value of too many places to the sizes that it should have: it has `rest / step` more along each axis.
fn fit(mut value: Expr, rest: &[i64], steps: &[i64], sizes: &[Size], shape: impl Fn() -> Expr) -> Expr {
    for (axis, _) in rest.iter().zip(steps).enumerate().filter(|(_, (rest, step))| rest >= step) {
        let axis = axis + 2;
        value = match sizes[axis].fixed() {
            Some(size) => value.slice(axis as i64, 0, size as i64),
            None => {
                let [start, along, step] = [0, axis as i64, 1].map(|number| value.graph().ints(&[number]));
                let end = shape().slice(0, axis as i64, axis as i64 + 1);
                value.op("Slice", &[&start, &end, &along, &step])
            }
        };
    }
    value
}

fn bias(at: &Site, rank: usize) {
    let axes: Vec<i64> = (0..rank as i64).filter(|&axis| axis != 1).collect();
    at.give(2, || at.dy().sum(&axes, false));
}

/// y = x ∗ w + b:  x̄ = transposed convolution of ȳ with w,  w̄ = convolution of x with ȳ,  b̄ = Σ ȳ
fn conv(at: &Site) -> Result<()> {
    let (large, small) = (at.sizes(0)?, at.output_sizes(0)?);
    let window = window(at, &at.sizes(1)?[2..], &small, &large)?;
    bias(at, large.len());
    if at.wants(0) && !of_repeated(at, &window)? {
        let cotangent = spread(at, &window, &at.dy(), &at.x(1), &small, &large)?;
        at.give(0, || cotangent);
    }
    if at.wants(1) {
        let cotangent = of_kernel(at, &window, &at.x(0), &at.dy(), &large, &small)?;
        at.give(1, || cotangent);
    }
    Ok(())
}

/// y = transposed convolution of x with w, plus b:  x̄ = ȳ ∗ w,  w̄ = convolution of ȳ with x,  b̄ = Σ ȳ
fn conv_transpose(at: &Site) -> Result<()> {
    let (small, large) = (at.sizes(0)?, at.output_sizes(0)?);
    if at.text("auto_pad", "NOTSET") != "NOTSET" || at.node.attribute_ints("output_shape").is_some() {
        return Err(at.unsupported("automatic padding or a given output shape"));
    }
    let window = window(at, &at.sizes(1)?[2..], &small, &large)?;
    bias(at, large.len());
    if at.wants(0) {
        let rest = window.left_over(at, &small, &large)?;
        let full = at.dy().op_with("Conv", &[&at.x(1)], |node| window.on(node));
        let full = fit(full, &rest, &window.strides, &small, || at.shape(0));
        at.give(0, || full);
    }
    if at.wants(1) {
        let cotangent = of_kernel(at, &window, &at.dy(), &at.x(0), &large, &small)?;
        at.give(1, || cotangent);
    }
    Ok(())
}
