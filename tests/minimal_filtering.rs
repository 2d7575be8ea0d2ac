//! Convolutions written as minimal filtering give what ONNX Runtime's own kernel gives, in gradients too, and nothing else is
//! touched.

mod support;

use std::collections::HashMap;

use macula::onnx::build::{self, Dim, node};
use macula::onnx::grad::{self, Effort, Facts};
use macula::onnx::proto::{GraphProto, NodeProto};
use macula::onnx::{DataType, Limits, Model, winograd};
use macula::progress::CancelToken;
use macula::runtime::{Runtime, RuntimeOptions, SessionOptions, Tensor, observe};
use rand_chacha::ChaCha8Rng;
use rand_core::{RngCore, SeedableRng};

const CHANNELS: usize = 256;
const KERNELS: usize = 288;

/// Numbers between -1 and 1.
fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| random.next_u32() as f32 / 2f32.powi(31) - 1.0).collect()
}

struct Case {
    batch: usize,
    height: usize,
    width: usize,
    channels: usize,
    node: NodeProto,
    /// Nodes that make another kernel "k" of the kernel "w".
    before: Vec<NodeProto>,
    turned: bool,
}

impl Case {
    fn new(batch: usize, height: usize, width: usize) -> Self {
        let node = node("Conv", ["x", "w", "b"], ["y"]).with("kernel_shape", [3, 3]).with("pads", [1; 4]).named("conv");
        Self { batch, height, width, channels: CHANNELS, node, before: Vec::new(), turned: false }
    }

    /// As a gradient convolves: with the kernel backwards, and its channels exchanged.
    fn turned(mut self) -> Self {
        self.turned = true;
        self.before = vec![
            node("Slice", ["w", "last", "first", "axes", "last"], ["flipped"]),
            node("Transpose", ["flipped"], ["k"]).with("perm", [1, 0, 2, 3]),
        ];
        self.node.input = vec!["x".into(), "k".into()];
        self
    }

    fn with(mut self, change: impl FnOnce(NodeProto) -> NodeProto) -> Self {
        self.node = change(std::mem::take(&mut self.node));
        self
    }

    fn model(&self) -> (Model, HashMap<String, Vec<usize>>) {
        let &Self { batch, height, width, channels, .. } = self;
        let kernel = if self.turned { [channels, KERNELS, 3, 3] } else { [KERNELS, channels, 3, 3] };
        let sizes = vec![batch, channels, height, width];
        let dims: Vec<Dim> = sizes.iter().map(|&size| Dim::Fixed(size as i64)).collect();
        let graph = GraphProto {
            name: Some("convolution".into()),
            node: self.before.iter().chain([&self.node]).cloned().collect(),
            initializer: vec![
                build::tensor_f32("w", &kernel, &numbers(kernel.iter().product(), 1)),
                build::tensor_f32("b", &[KERNELS], &numbers(KERNELS, 2)),
                build::tensor_i64("last", &[2], &[-1, -1]),
                build::tensor_i64("first", &[2], &[-9, -9]),
                build::tensor_i64("axes", &[2], &[2, 3]),
            ],
            input: vec![build::value("x", DataType::Float, Some(&dims))],
            output: vec![build::value("y", DataType::Float, None)],
            ..GraphProto::default()
        };
        (Model::new(graph, &[("", 17)], &Limits::default()).unwrap(), HashMap::from([("x".to_owned(), sizes)]))
    }

    fn run(&self, runtime: &Runtime, model: &Model) -> Vec<f32> {
        let sizes = [self.batch, self.channels, self.height, self.width];
        let x = Tensor::from_vec(&sizes, numbers(sizes.iter().product(), 3)).unwrap();
        let session = runtime.session(model, &SessionOptions::default()).unwrap();
        let answer = session.run(&[("x", &x)], &["y"], &CancelToken::new()).unwrap();
        answer[0].as_slice::<f32>().unwrap().to_vec()
    }
}

#[test]
fn tiles_of_both_sizes_give_what_the_sum_gives() {
    support::onnxruntime();
    let runtime = Runtime::load(&RuntimeOptions::default()).unwrap();
    // With few places the kernel is large beside them, and tiles are small: their errors are those of the sum.
    for (name, case, side, bound) in [
        ("small tiles", Case::new(1, 8, 12), 4, 1e-6),
        ("small tiles of a batch", Case::new(2, 6, 8), 4, 1e-6),
        ("small tiles, turned", Case::new(1, 8, 12).turned(), 4, 1e-6),
        ("large tiles", Case::new(1, 32, 24), 6, 2e-5),
        ("large tiles of a batch", Case::new(3, 16, 24), 6, 2e-5),
        ("large tiles of a batch, turned", Case::new(3, 16, 24).turned(), 6, 2e-5),
        ("small tiles where large ones do not fit", Case::new(1, 30, 24), 4, 1e-6),
    ] {
        let (mut model, sizes) = case.model();
        let sum = case.run(&runtime, &model);
        let bytes = winograd::minimal_filtering(&mut model, &sizes).unwrap();
        assert_eq!(bytes, (4 * side * side) as u64 * (CHANNELS * KERNELS) as u64, "{name}");
        let steps = model.graph().node.iter().find(|node| node.is("Conv")).unwrap();
        assert_eq!(steps.attribute_ints("kernel_shape"), Some(&[side, side][..]), "{name}");
        let filtered = case.run(&runtime, &model);
        let error = support::relative_error(&filtered, &sum);
        assert!(error > 0.0 && error <= bound, "{name}: {error:e}");
    }
}

/// Both directions of a convolution: what its rule convolves with is recognised.
#[test]
fn a_gradient_is_filtered_there_and_back() {
    support::onnxruntime();
    let runtime = Runtime::load(&RuntimeOptions::default()).unwrap();
    let case = Case::new(1, 8, 12);
    let (mut model, sizes) = case.model();
    // Squares, so that the gradient needs the convolution's result.
    model
        .edit(|edit| {
            let graph = edit.graph_mut();
            graph.node.push(node("Mul", ["y", "y"], ["z"]));
            graph.output = vec![build::value("z", DataType::Float, None)];
            Ok(())
        })
        .unwrap();
    let tensor = |sizes: &[usize], seed| Tensor::from_vec(sizes, numbers(sizes.iter().product(), seed)).unwrap();
    let x = tensor(&sizes["x"], 3);
    let asked = grad::questions(&model, &["x"], "z").unwrap();
    let seen =
        observe(&runtime, &model, &asked, &[("x", &x)], &SessionOptions::default(), &CancelToken::new()).unwrap();
    let gradient = grad::vjp(&model, &Facts::new(&[seen]).unwrap(), &["x"], "z", Effort::Speed).unwrap();
    let cotangent = tensor(&[1, KERNELS, 8, 12], 4);
    let run = |model: &Model| {
        let session = runtime.session(model, &SessionOptions::default()).unwrap();
        let given = [("x", &x), (gradient.cotangent.as_str(), &cotangent)];
        let answer = session.run(&given, &[gradient.gradients[0].as_str()], &CancelToken::new()).unwrap();
        answer[0].as_slice::<f32>().unwrap().to_vec()
    };
    let mut filtered = gradient.model.clone();
    let bytes = winograd::minimal_filtering(&mut filtered, &gradient.sizes).unwrap();
    assert_eq!(bytes, 2 * 4 * 16 * (CHANNELS * KERNELS) as u64);
    let error = support::relative_error(&run(&filtered), &run(&gradient.model));
    assert!(error > 0.0 && error <= 2e-6, "{error:e}");
}

#[test]
fn what_it_does_not_fit_is_left_alone() {
    let fits = || Case::new(1, 8, 12);
    let few = Case { channels: 64, ..fits() };
    let mut kernel_that_varies = fits().with(|mut node| {
        node.input[1] = "k".into();
        node
    });
    kernel_that_varies.before =
        vec![node("ReduceMax", ["x"], ["factor"]).with("keepdims", 0), node("Mul", ["w", "factor"], ["k"])];
    for (name, case) in [
        ("an odd side", Case::new(1, 7, 12)),
        ("few channels", few),
        ("few places", Case::new(1, 2, 2)),
        ("a stride", fits().with(|node| node.with("strides", [2, 2]))),
        ("a dilation", fits().with(|node| node.with("dilations", [2, 2]))),
        (
            "no pads",
            fits().with(|mut node| {
                node.attribute.retain(|attribute| attribute.name() != "pads");
                node
            }),
        ),
        ("a kernel that depends on the input", kernel_that_varies),
    ] {
        let (mut model, sizes) = case.model();
        let before = model.graph().clone();
        assert_eq!(winograd::minimal_filtering(&mut model, &sizes).unwrap(), 0, "{name}");
        assert_eq!(*model.graph(), before, "{name}");
    }
    let (mut model, _) = fits().model();
    assert_eq!(winograd::minimal_filtering(&mut model, &HashMap::new()).unwrap(), 0, "sizes that are not known");
}
