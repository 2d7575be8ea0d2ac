"""Models of one operator with their derivatives, for `tests/gradients.rs`.

A row of the table is a variant of an operator: a node, inputs with values away from kinks, and the same function in
PyTorch, in float64. For each row the folder gets the model, inputs, a cotangent u and a direction v, and by PyTorch's
autograd the output y, the gradient of <u, y>, the Hessian-vector product of <u, y> along v and the Jacobian-vector
product along v. The gradient is also taken by central differences of ONNX's own reference evaluator, in float64, and
must be the same.

    python gradients.py FOLDER
"""

import json
import math
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from safetensors.numpy import save_file

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
INF = float("inf")
FLOATS = dict(f32=np.float32, fp64=np.float64, fp16=np.float16, bf16=ml_dtypes.bfloat16)


# ---------------------------------------------------------------------------------------------------------- the inputs


class Input:
    """A float input: `shape`, or `varied` in the second case; numbers in [low, high] no nearer than `gap` to `kinks`."""

    def __init__(self, *shape, low=-2.0, high=2.0, kinks=(), gap=0.1, varied=None, weight=False, distinct=False):
        self.shape, self.low, self.high, self.kinks, self.gap = shape, low, high, kinks, gap
        self.varied, self.weight, self.distinct = varied, weight, distinct

    def draw(self, rng, shape):
        if self.distinct:  # for maxima: no two numbers closer than a step
            count = math.prod(shape)
            return ((rng.permutation(count).reshape(shape) + 0.5) / count * (self.high - self.low) + self.low).astype(np.float32)
        x = rng.uniform(self.low, self.high, shape)
        for kink in self.kinks:
            near = np.abs(x - kink) < self.gap
            x = np.where(near, kink + np.where(x < kink, -1, 1) * self.gap * (1 + rng.random(shape)), x)
        return x.astype(np.float32)


def X(*shape, **options):
    return Input(*shape, **options)


def W(*shape, **options):
    return Input(*shape, weight=True, **options)


class Fixed:
    """A constant, that no gradient is taken of."""

    def __init__(self, values, dtype=np.float32):
        self.values = np.asarray(values, dtype)


def ints(*values):
    return Fixed(values, np.int64)


def flags(values):
    return Fixed(values, np.bool_)


class Shape:
    """Sizes as an int64 graph input, other ones in the second case."""

    def __init__(self, values, varied):
        self.values, self.varied = np.asarray(values, np.int64), np.asarray(varied, np.int64)


ROWS = []


def row(what, op, inputs, function, opset=17, outputs=1, evaluator=True, half=False, **attributes):
    """`outputs` is a count, or names for outputs with "" for one left out; `evaluator` is False where ONNX's is wrong
    or lacks the variant, "single" where it computes in f32 inside; `half`: also in
    the other types of floating point."""
    ROWS.append(dict(what=f"{op} {what}".strip(), op=op, inputs=inputs, function=function, opset=opset,
                     outputs=outputs, evaluator=evaluator, half=half, attributes=attributes))


# -------------------------------------------------------------------------------------------------- element by element

for name, function, options in [
    ("Identity", lambda x: x + 0, {}),
    ("Exp", torch.exp, {}),
    ("Log", torch.log, dict(low=0.3, high=3)),
    ("Sqrt", torch.sqrt, dict(low=0.3, high=3)),
    ("Reciprocal", torch.reciprocal, dict(kinks=[0], gap=0.5)),
    ("Abs", torch.abs, dict(kinks=[0])),
    ("Sin", torch.sin, {}),
    ("Cos", torch.cos, {}),
    ("Tan", torch.tan, dict(low=-1, high=1)),
    ("Sinh", torch.sinh, {}),
    ("Cosh", torch.cosh, {}),
    ("Asin", torch.asin, dict(low=-0.8, high=0.8)),
    ("Acos", torch.acos, dict(low=-0.8, high=0.8)),
    ("Atan", torch.atan, {}),
    ("Erf", torch.erf, {}),
    ("Sigmoid", torch.sigmoid, {}),
    ("Tanh", torch.tanh, {}),
    ("Relu", torch.relu, dict(kinks=[0])),
    ("Neg", torch.neg, {}),
    ("Softplus", F.softplus, {}),
    ("Softsign", F.softsign, dict(kinks=[0])),
]:
    row("", name, [X(2, 5, varied=(3, 4), **options)], function, half=name in ("Sigmoid", "Tanh", "Erf", "Exp"),
        evaluator="single" if name == "Erf" else True)

row("", "LeakyRelu", [X(3, 5, kinks=[0])], lambda x: F.leaky_relu(x, 0.2), alpha=0.2)
row("", "PRelu", [X(2, 3, 4, kinks=[0]), W(3, 1)], lambda x, s: torch.where(x < 0, x * s, x))
row("", "Elu", [X(3, 5, kinks=[0])], lambda x: F.elu(x, 0.7), alpha=0.7)
row("", "Selu", [X(3, 5, kinks=[0])], F.selu)
row("", "Celu", [X(3, 5, kinks=[0])], lambda x: F.celu(x, 0.7), alpha=0.7)
row("", "ThresholdedRelu", [X(3, 5, kinks=[0.5])], lambda x: torch.where(x > 0.5, x, 0 * x), alpha=0.5)
row("", "HardSigmoid", [X(3, 5, low=-5, high=5, kinks=[-2.5, 2.5])], lambda x: (0.2 * x + 0.5).clamp(0, 1))
row("of a sixth", "HardSigmoid", [X(3, 5, low=-5, high=5, kinks=[-3, 3])], lambda x: (x / 6 + 0.5).clamp(0, 1), alpha=1 / 6, beta=0.5)
row("", "HardSwish", [X(3, 5, low=-5, high=5, kinks=[-3, 3])], F.hardswish)
row("", "Clip", [X(3, 5, kinks=[-1, 1]), Fixed(-1), Fixed(1)], lambda x: x.clamp(-1, 1))
row("below only", "Clip", [X(3, 5, kinks=[-1]), Fixed(-1)], lambda x: x.clamp(min=-1))
row("above only", "Clip", [X(3, 5, kinks=[1]), None, Fixed(1)], lambda x: x.clamp(max=1))
row("", "Mish", [X(3, 5)], F.mish, opset=18)
row("", "Gelu", [X(3, 5)], F.gelu, opset=20, evaluator="single", half=True)
row("tanh", "Gelu", [X(3, 5)], lambda x: F.gelu(x, approximate="tanh"), opset=20, approximate="tanh")
row("", "Swish", [X(3, 5)], lambda x: x * torch.sigmoid(1.3 * x), opset=24, alpha=1.3)
row("to f64", "Cast", [X(3, 5)], lambda x: x + 0, to=TensorProto.DOUBLE)
row("", "CastLike", [X(3, 5), Fixed([1], np.float64)], lambda x: x + 0)
row("", "Dropout", [X(3, 5)], lambda x: x + 0)
row("not in training", "Dropout", [X(3, 5), Fixed(0.3), flags(False)], lambda x: x + 0)

# ---------------------------------------------------------------------------------------------------------- arithmetic

for name, function in [("Add", torch.add), ("Sub", torch.sub), ("Mul", torch.mul), ("Div", torch.div)]:
    b = dict(kinks=[0], gap=0.5) if name == "Div" else {}
    row("", name, [X(2, 3, varied=(4, 3)), X(2, 3, varied=(4, 3), **b)], function, half=name == "Div")
    row("to more axes", name, [X(3, 1), X(2, 3, 4, varied=(5, 3, 2), **b)], function)
    row("to fewer axes", name, [X(2, 3, 4), W(4, **b)], function)
    row("both ways", name, [X(2, 1, 4), X(3, 1, **b)], function)
    row("with a number", name, [X(2, 3), W(**b)], function)
row("square", "Pow", [X(2, 5), Fixed(2)], lambda x: x**2, half=True)
row("cube", "Pow", [X(2, 5), Fixed(3)], lambda x: x**3)
row("minus one half", "Pow", [X(2, 5, low=0.5), Fixed(-0.5)], lambda x: x**-0.5)
row("of integer type", "Pow", [X(2, 5), Fixed(3, np.int64)], lambda x: x**3)
row("by a tensor", "Pow", [X(2, 5, low=0.5), X(5)], torch.pow)
row("nothing", "Pow", [X(2, 5), Fixed(0)], lambda x: x * 0 + 1)
row("one", "Pow", [X(2, 5), Fixed(1)], lambda x: x**1)
row("", "Sum", [X(2, 3), X(3), X(2, 1)], lambda a, b, c: a + b + c)
row("of one", "Sum", [X(2, 3)], lambda a: a + 0)
row("", "Mean", [X(2, 3), X(3), X(2, 1)], lambda a, b, c: (a + b + c) / 3)
row("", "Max", [X(2, 5, distinct=True), X(2, 5, low=-1.93, distinct=True)], torch.maximum)
row("", "Min", [X(2, 5, distinct=True), X(5, low=-1.93, distinct=True)], torch.minimum)
row("of three", "Max", [X(5, distinct=True), X(5, low=-1.93, distinct=True), X(5, low=-1.77, distinct=True)],
    lambda a, b, c: torch.maximum(torch.maximum(a, b), c))
row("of one", "Max", [X(2, 3)], lambda a: a + 0)
row("", "Where", [flags([[True], [False]]), X(2, 3), X(3)], torch.where)
row("one side", "Where", [flags([[True], [False]]), X(2, 3), Fixed(-9)], lambda a: torch.where(torch.tensor([[True], [False]]), a, -9))
row("fmod", "Mod", [X(2, 5, kinks=[-1.5, 0, 1.5]), Fixed(1.5)], lambda a: torch.fmod(a, 1.5), fmod=1)

# -------------------------------------------------------------------------------------------------------------- layout

row("", "Reshape", [X(2, 3, 4, varied=(4, 3, 4)), ints(-1, 12)], lambda x: x.reshape(-1, 12))
row("sizes that vary", "Reshape", [X(2, 3, 4, varied=(4, 3, 4)), Shape([6, 4], [12, 4])], lambda x: x.reshape(-1, 4))
row("", "Flatten", [X(2, 3, 4)], lambda x: x.reshape(6, 4), axis=2)
row("", "Squeeze", [X(2, 1, 4, 1, varied=(3, 1, 4, 1)), ints(1, -1)], lambda x: x.reshape(-1, 4))
row("all", "Squeeze", [X(2, 1, 4, 1)], lambda x: x.reshape(2, 4))
row("", "Unsqueeze", [X(2, 4, varied=(3, 4)), ints(0, -1)], lambda x: x[None, ..., None])
row("", "Transpose", [X(2, 3, 4, varied=(5, 3, 4))], lambda x: x.permute(2, 0, 1), perm=[2, 0, 1])
row("reversed", "Transpose", [X(2, 3, 4)], lambda x: x.permute(2, 1, 0))
row("", "Expand", [X(3, 1), ints(2, 3, 4)], lambda x: x.expand(2, 3, 4))
row("by sizes that vary", "Expand", [X(3, 1), Shape([2, 3, 4], [5, 3, 2])], None)
row("", "Concat", [X(2, 3), X(2, 1), W(2, 2)], lambda *x: torch.cat(x, 1), axis=1)
row("sizes that vary", "Concat", [X(2, 3, varied=(4, 3)), X(2, 3, varied=(3, 3))], lambda *x: torch.cat(x, 0), axis=0)
row("of one", "Concat", [X(2, 3)], lambda x: x + 0, axis=-1)
row("", "Split", [X(2, 7), ints(2, 5)], lambda x: x.split([2, 5], 1), outputs=2, axis=1)
row("equal", "Split", [X(2, 6)], lambda x: x.split(2, 1), outputs=3, axis=-1)
row("equal with a count", "Split", [X(2, 7)], lambda x: x.split(3, 1), opset=18, outputs=3, axis=1, num_outputs=3)
row("", "Slice", [X(4, 5), ints(1, 0), ints(3, -1)], lambda x: x[1:3, :-1])
row("with axes", "Slice", [X(4, 5, varied=(3, 5)), ints(2), ints(2**63 - 1), ints(-1)], lambda x: x[:, 2:])
row("with steps", "Slice", [X(4, 7), ints(6), ints(-100), ints(1), ints(-2)], lambda x: x[:, [6, 4, 2, 0]])
row("with wide steps", "Slice", [X(7, 2), ints(1), ints(7), ints(0), ints(3)], lambda x: x[1:7:3])
row("to the end where sizes vary", "Slice", [X(4, 5, varied=(6, 5)), ints(1), ints(2**31 - 1), ints(0), ints(1)], lambda x: x[1:])
row("from the end where sizes vary", "Slice", [X(4, 5, varied=(6, 5)), ints(-3), ints(-1), ints(0)], lambda x: x[-3:-1])
row("backwards where sizes vary", "Slice", [X(4, 5, varied=(6, 5)), ints(-1), ints(-2**63 + 1), ints(0), ints(-1)], lambda x: x.flip(0))
row("bounds that vary", "Slice", [X(4, 5, varied=(6, 5)), Shape([0], [1]), Shape([3], [5]), ints(0)], None)
row("", "Tile", [X(2, 3, varied=(4, 3)), ints(2, 3)], lambda x: x.repeat(2, 3))
row("of sizes that vary", "Tile", [X(2, 3), Shape([1, 2], [3, 2])], None)
row("", "Trilu", [X(2, 4, 5)], torch.triu)
row("lower", "Trilu", [X(4, 5), Fixed(-1, np.int64)], lambda x: x.tril(-1), upper=0)
row("", "DepthToSpace", [X(2, 8, 2, 3, varied=(1, 8, 3, 3))], lambda x: x.unflatten(1, (2, 2, 2)).permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3), blocksize=2)
row("CRD", "DepthToSpace", [X(2, 8, 2, 3)], lambda x: F.pixel_shuffle(x, 2), blocksize=2, mode="CRD")
row("", "SpaceToDepth", [X(2, 2, 4, 6, varied=(1, 2, 6, 6))], lambda x: x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 3, 5, 1, 2, 4).flatten(1, 3), blocksize=2)
row("", "CumSum", [X(3, 4), Fixed(1, np.int64)], lambda x: x.cumsum(1))
row("from behind, exclusive", "CumSum", [X(3, 4), Fixed(0, np.int64)], lambda x: x.flip(0).cumsum(0).flip(0) - x, reverse=1, exclusive=1)


def pad(x, pads, value=0.0):
    rank = x.ndim
    return F.pad(x, [p for axis in reversed(range(rank)) for p in (pads[axis], pads[rank + axis])], value=value)


def picked(x, axis, index):
    return x.index_select(axis, torch.as_tensor(index))


row("", "Pad", [X(2, 3, varied=(3, 3)), ints(0, 1, 2, 3)], lambda x: pad(x, [0, 1, 2, 3]))
row("by a number", "Pad", [X(2, 3), ints(0, 1, 2, 3), W()], lambda x, c: torch.where(pad(torch.ones_like(x), [0, 1, 2, 3]) > 0, pad(x, [0, 1, 2, 3]), c))
row("negative", "Pad", [X(3, 4), ints(-1, 1, 0, -2)], lambda x: pad(x, [-1, 1, 0, -2]), evaluator=False)
row("with axes", "Pad", [X(2, 3), ints(1, 2), None, ints(-1)], lambda x: pad(x, [0, 1, 0, 2]), opset=18)
row("reflected", "Pad", [X(2, 4, varied=(3, 4)), ints(0, 2, 1, 3)], lambda x: picked(picked(x, 1, [2, 1, 0, 1, 2, 3, 2, 1, 0]), 0, list(range(x.shape[0])) + [x.shape[0] - 2]), mode="reflect")
row("by edges", "Pad", [X(2, 3), ints(0, 2, 1, 1)], lambda x: picked(picked(x, 1, [0, 0, 0, 1, 2, 2]), 0, [0, 1, 1]), mode="edge")
row("reflected where sizes vary", "Pad", [X(1, 1, 4, 4, varied=(1, 1, 5, 6)), ints(0, 0, 1, 2, 0, 0, 2, 1)], lambda x: F.pad(x, [2, 1, 1, 2], mode="reflect"), mode="reflect")
row("wrapped", "Pad", [X(2, 3), ints(0, 1, 0, 2)], lambda x: picked(x, 1, [2, 0, 1, 2, 0, 1]), opset=19, mode="wrap")

# ------------------------------------------------------------------------------------------------------------ gathering

row("", "Gather", [X(5, 3), ints(4, 0, 4)], lambda x: x[[4, 0, 4]])
row("of two axes", "Gather", [X(2, 5, 3, varied=(3, 5, 3)), Fixed([[4, 0], [-1, 2]], np.int64)], lambda x: x[:, torch.tensor([[4, 0], [-1, 2]])], axis=1)
row("of numbers", "Gather", [X(5), Fixed([[4, 0], [4, -1]], np.int64)], lambda x: x[torch.tensor([[4, 0], [4, -1]])])
row("of one number in set 13", "Gather", [X(5), Fixed(-2, np.int64)], lambda x: x[-2], opset=13)
row("of one", "Gather", [X(2, 3), Fixed(1, np.int64)], lambda x: x[:, 1], axis=-1)
row("where sizes vary", "Gather", [X(4, 3, varied=(6, 3)), ints(1, -1, 1)], lambda x: x[[1, -1, 1]])
row("int32 indices", "Gather", [X(4, 3), Fixed([1, -1, 1], np.int32)], lambda x: x[[1, -1, 1]])
row("indices that are an input", "Gather", [X(4, 3), Shape([1, -1, 1], [0, 2])], None)
row("", "GatherElements", [X(3, 4), Fixed([[0, -1], [3, 3]], np.int64)], lambda x: x[:2].gather(1, torch.tensor([[0, 3], [3, 3]])), axis=1, evaluator=False)
row("first axis", "GatherElements", [X(3, 2), Fixed([[0, 2], [1, 1], [0, 0], [2, -3]], np.int64)], lambda x: x.gather(0, torch.tensor([[0, 2], [1, 1], [0, 0], [2, 0]])), axis=0)
row("", "GatherND", [X(3, 4, 2), Fixed([[0, 1], [2, -1], [0, 1]], np.int64)], lambda x: x[[0, 2, 0], [1, 3, 1]])
row("of numbers", "GatherND", [X(3, 4), Fixed([[0, 1], [2, 3]], np.int64)], lambda x: x[[0, 2], [1, 3]])
row("by batch", "GatherND", [X(2, 4, 3), Fixed([[1], [3]], np.int64)], lambda x: x[[0, 1], [1, 3]], batch_dims=1)
for opset in (13, 16):
    index = [[0, 2], [1, 1]]
    row(f"in set {opset}", "ScatterElements", [X(3, 4), Fixed([[0, -2], [1, 3]], np.int64), X(2, 2)],
        lambda x, u: x.scatter(1, torch.tensor([[0, 2], [1, 3]]), u), opset=opset, axis=1)
    row(f"in set {opset}", "ScatterND", [X(4, 3), Fixed([[3], [1]], np.int64), X(2, 3)],
        lambda x, u: x.index_copy(0, torch.tensor([3, 1]), u), opset=opset)
    row(f"numbers in set {opset}", "ScatterND", [X(4, 3), Fixed([[3, 1], [-3, 0]], np.int64), X(2)],
        lambda x, u: x.index_put((torch.tensor([3, 1]), torch.tensor([1, 0])), u), opset=opset)
    row(f"repeated in set {opset}", "Gather", [X(4, 3), ints(1, -1, 1)], lambda x: x[[1, -1, 1]], opset=opset)
    row(f"repeated in set {opset}", "GatherElements", [X(3, 4), Fixed([[0, -1], [3, 3]], np.int64)], lambda x: x[:2].gather(1, torch.tensor([[0, 3], [3, 3]])), opset=opset, axis=1, evaluator=False)
    row(f"repeated in set {opset}", "GatherND", [X(3, 4, 2), Fixed([[0, 1], [2, -1], [0, 1]], np.int64)], lambda x: x[[0, 2, 0], [1, 3, 1]], opset=opset)
row("added", "ScatterElements", [X(3, 4), Fixed([[0, 0], [1, 3]], np.int64), X(2, 2)], lambda x, u: x.scatter_add(1, torch.tensor([[0, 0], [1, 3]]), u), axis=1, reduction="add")
row("added", "ScatterND", [X(4, 3), Fixed([[3], [3]], np.int64), X(2, 3)], lambda x, u: x.index_add(0, torch.tensor([3, 3]), u), reduction="add")

# ---------------------------------------------------------------------------------------------------------- reductions

for name, function, options in [
    ("ReduceSum", lambda x, a, k: x.sum(a, keepdim=k), {}),
    ("ReduceMean", lambda x, a, k: x.mean(a, keepdim=k), {}),
    ("ReduceSumSquare", lambda x, a, k: (x * x).sum(a, keepdim=k), {}),
    ("ReduceL1", lambda x, a, k: x.abs().sum(a, keepdim=k), dict(kinks=[0])),
    ("ReduceL2", lambda x, a, k: (x * x).sum(a, keepdim=k).sqrt(), {}),
    ("ReduceLogSum", lambda x, a, k: x.sum(a, keepdim=k).log(), dict(low=0.5)),
    ("ReduceLogSumExp", lambda x, a, k: x.logsumexp(a, keepdim=k), {}),
    ("ReduceMax", lambda x, a, k: x.amax(a, keepdim=k), dict(distinct=True)),
    ("ReduceMin", lambda x, a, k: x.amin(a, keepdim=k), dict(distinct=True)),
]:
    for opset in (13, 18):
        by_input = opset == 18 or name == "ReduceSum"

        def reduce(what, axes, keep, shape=(2, 3, 4), varied=None):
            attributes = {} if keep else dict(keepdims=0)
            inputs = [X(*shape, varied=varied, **options)]
            if axes is not None:
                inputs += [ints(*axes)] if by_input else []
                attributes |= {} if by_input else dict(axes=axes)
            reduced = tuple(axes) if axes is not None else tuple(range(len(shape)))
            row(f"{what} in set {opset}", name, inputs, lambda x, f=function: f(x, reduced, keep), opset=opset, **attributes)

        reduce("", [1], True, varied=(3, 3, 5))
        reduce("flat", [0, -1], False, varied=(3, 3, 5))
        if opset == 18:
            reduce("all", None, True)
            reduce("to a number", None, False)
row("of nothing", "ReduceSum", [X(2, 3)], lambda x: x + 0, noop_with_empty_axes=1, opset=18)
row("", "ReduceProd", [X(2, 3, 4, kinks=[0])], lambda x: x.prod(1, keepdim=True), axes=[1])
row("flat", "ReduceProd", [X(2, 3, 4, kinks=[0]), ints(0, 2)], lambda x: x.prod(2).prod(0), opset=18, keepdims=0)
row("", "Softmax", [X(2, 3, 4, varied=(3, 3, 5))], lambda x: x.softmax(-1), half=True)
row("inner axis", "Softmax", [X(2, 3, 4)], lambda x: x.softmax(1), axis=1)
row("", "LogSoftmax", [X(2, 3, 4, varied=(3, 3, 5))], lambda x: x.log_softmax(1), axis=1)

# ------------------------------------------------------------------------------------------------------------ products

for what, a, b in [
    ("", (2, 3), (3, 4)), ("by a matrix", (2, 5, 3), (3, 4)), ("of batches", (2, 5, 3), (2, 3, 4)),
    ("broadcast", (2, 1, 5, 3), (4, 3, 2)), ("of a matrix", (5, 3), (2, 3, 4)), ("row by matrix", (3,), (3, 4)),
    ("row by batch", (3,), (2, 3, 4)), ("matrix by column", (5, 3), (3,)), ("batch by column", (2, 5, 3), (3,)), ("of vectors", (3,), (3,)),
    ("broadcast ones", (1, 5, 3), (2, 3, 4)),
]:
    row(what, "MatMul", [X(*a), W(*b) if what == "by a matrix" else X(*b)], torch.matmul, half=what in ("", "of batches"))
row("where sizes vary", "MatMul", [X(2, 5, 3, varied=(3, 4, 3)), X(3, 4)], torch.matmul)
row("of batches that vary", "MatMul", [X(2, 5, 3, varied=(3, 4, 6)), X(2, 3, 5, varied=(3, 6, 4))], torch.matmul)
for ta in (0, 1):
    for tb in (0, 1):
        row(f"{ta}{tb}", "Gemm", [X(*((3, 2) if ta else (2, 3))), W(*((4, 3) if tb else (3, 4))), X(4)],
            lambda a, b, c, ta=ta, tb=tb: 0.5 * (a.T if ta else a) @ (b.T if tb else b) + 1.5 * c, transA=ta, transB=tb, alpha=0.5, beta=1.5)
row("without C", "Gemm", [X(2, 3, varied=(4, 3)), X(3, 4)], lambda a, b: a @ b, half=True)
row("column C", "Gemm", [X(2, 3), X(3, 4), X(2, 1)], lambda a, b, c: a @ b + c)
for equation, shapes in [
    ("ij,jk->ik", [(2, 3), (3, 4)]), ("bhid,bhjd->bhij", [(2, 2, 3, 4), (2, 2, 5, 4)]), ("bij,bjk->bk", [(2, 3, 4), (2, 4, 2)]),
    ("ij->ji", [(2, 3)]), ("ij->", [(2, 3)]), ("i,j->ij", [(3,), (4,)]), ("ij,jk,kl->il", [(2, 3), (3, 4), (4, 2)]),
    ("ij,k->i", [(2, 3), (4,)]), ("bhwc,hkc->bhwk", [(2, 3, 4, 2), (3, 5, 2)]), ("ij,jk", [(2, 3), (3, 4)]), ("ba,b", [(2, 3), (2,)]),
]:
    row(equation, "Einsum", [X(*shape) for shape in shapes], lambda *x, e=equation: torch.einsum(e, *x), equation=equation)
for equation, shapes in [
    ("...ij,...jk->...ik", [(2, 3, 4), (2, 4, 2)]), ("b...i,ij->b...j", [(2, 3, 5, 4), (4, 2)]), ("i...,i->...", [(2, 3), (2,)]),
    ("...i,...i", [(2, 3, 4), (2, 3, 4)]),
]:
    row(equation, "Einsum", [X(*shape) for shape in shapes], lambda *x, e=equation: torch.einsum(e, *x), equation=equation, evaluator=False)
row("where sizes vary", "Einsum", [X(2, 3, 4, varied=(3, 5, 4)), X(2, 6, 4, varied=(3, 2, 4))], lambda *x: torch.einsum("bid,bjd->bij", *x), equation="b i d, b j d -> b i j")


def conv(x, w, b=None, strides=1, dilations=1, pads=None, group=1):
    if pads is not None:
        x = pad(x, [0, 0, *pads[: len(pads) // 2], 0, 0, *pads[len(pads) // 2 :]])
    return getattr(F, f"conv{x.ndim - 2}d")(x, w, b, strides, 0, dilations, group)


def conv_transpose(x, w, b=None, strides=(1, 1), dilations=(1, 1), pads=None, extra=None, group=1):
    axes = x.ndim - 2
    pads, extra = pads or [0] * 2 * axes, extra or [0] * axes
    y = getattr(F, f"conv_transpose{axes}d")(x, w, None, strides, 0, 0, group, dilations)
    # Output padding reads more of the product where pads cut it, and zeros beyond.
    y = pad(y, [0] * (axes + 2) + [0, 0, *extra])
    y = pad(y, [0, 0, *(-p for p in pads[:axes]), 0, 0, *(-p for p in pads[axes:])])
    return y if b is None else y + b.reshape(-1, *[1] * axes)


for what, x, w, more in [
    ("", (2, 3, 5, 6), (4, 3, 3, 3), {}),
    ("padded", (2, 3, 5, 6), (4, 3, 3, 3), dict(pads=[1, 1, 1, 1])),
    ("unevenly padded", (1, 2, 5, 6), (3, 2, 3, 3), dict(pads=[0, 1, 2, 0])),
    ("with strides", (2, 3, 6, 7), (4, 3, 3, 3), dict(strides=[2, 2], pads=[1, 1, 1, 1])),
    ("with wide strides", (1, 2, 9, 8), (3, 2, 2, 2), dict(strides=[3, 4])),
    ("pointwise", (2, 3, 4, 4), (5, 3, 1, 1), {}),
    ("pointwise with strides", (2, 3, 5, 5), (4, 3, 1, 1), dict(strides=[2, 2])),
    ("dilated", (1, 2, 7, 8), (3, 2, 3, 2), dict(dilations=[2, 3])),
    ("dilated with strides", (1, 2, 9, 9), (3, 2, 3, 2), dict(dilations=[2, 3], strides=[2, 2], pads=[1, 0, 1, 2])),
    ("in groups", (2, 4, 5, 5), (6, 2, 3, 3), dict(group=2, pads=[1, 1, 1, 1])),
    ("depthwise", (2, 3, 5, 5), (3, 1, 3, 3), dict(group=3, pads=[1, 1, 1, 1], strides=[2, 1])),
    ("with more padding than kernel", (1, 2, 3, 3), (2, 2, 2, 2), dict(pads=[2, 3, 2, 2])),
    ("of one axis", (2, 3, 8), (4, 3, 3), dict(strides=[2], pads=[1, 0])),
    ("of three axes", (1, 2, 4, 4, 3), (3, 2, 2, 3, 2), dict(pads=[0, 1, 0, 1, 1, 1])),
]:
    bias = [W(w[0])] if what in ("", "with strides", "of one axis") else []
    row(what, "Conv", [X(*x), W(*w)] + bias, lambda x, w, b=None, m=more: conv(x, w, b, **m), **more)
row("in set 22", "Conv", [X(2, 3, 5, 6), W(4, 3, 3, 3)], lambda x, w: conv(x, w, pads=[1] * 4), opset=22, half=True, pads=[1] * 4)
row("where sizes vary", "Conv", [X(2, 3, 6, 4, varied=(1, 3, 8, 6)), W(4, 3, 3, 3), W(4)], lambda x, w, b: conv(x, w, b, pads=[1] * 4), pads=[1] * 4)
row("with strides where sizes vary", "Conv", [X(2, 3, 6, 4, varied=(1, 3, 8, 6)), W(4, 3, 3, 3)], lambda x, w: conv(x, w, strides=2, pads=[1] * 4), pads=[1] * 4, strides=[2, 2])
row("in groups where sizes vary", "Conv", [X(2, 4, 6, 4, varied=(1, 4, 8, 6)), W(4, 2, 3, 3)], lambda x, w: conv(x, w, pads=[1] * 4, group=2), pads=[1] * 4, group=2)
row("valid", "Conv", [X(1, 2, 5, 6), W(3, 2, 3, 2)], lambda x, w: conv(x, w), auto_pad="VALID")
row("same upper", "Conv", [X(1, 2, 5, 6), W(3, 2, 3, 2)], lambda x, w: conv(x, w, strides=2, pads=[1, 0, 1, 0]), auto_pad="SAME_UPPER", strides=[2, 2])
row("same lower", "Conv", [X(1, 2, 5, 6), W(3, 2, 2, 2)], lambda x, w: conv(x, w, pads=[1, 1, 0, 0]), auto_pad="SAME_LOWER", evaluator=False)
for what, x, w, more in [
    ("", (2, 3, 4, 5), (3, 4, 3, 3), {}),
    ("doubling", (2, 3, 3, 4), (3, 4, 4, 4), dict(strides=[2, 2], pads=[1, 1, 1, 1])),
    ("with output padding", (1, 2, 3, 4), (2, 3, 3, 3), dict(strides=[2, 2], pads=[1, 1, 1, 1], output_padding=[1, 1])),
    ("with output padding beyond", (1, 2, 3, 4), (2, 3, 2, 2), dict(strides=[3, 3], output_padding=[2, 1])),
    ("dilated", (1, 2, 3, 4), (2, 3, 3, 2), dict(dilations=[2, 3])),
    ("in groups", (2, 4, 3, 3), (4, 3, 3, 3), dict(group=2, strides=[2, 1], pads=[1, 0, 0, 1])),
    ("of one axis", (2, 3, 5), (3, 2, 3), dict(strides=[2])),
]:
    bias = [W(w[1])] if what in ("", "doubling") else []

    def function(x, w, b=None, m=more):
        return conv_transpose(x, w, b, m.get("strides", 1), m.get("dilations", 1), m.get("pads"), m.get("output_padding"), m.get("group", 1))

    row(what, "ConvTranspose", [X(*x), W(*w)] + bias, function, evaluator="groups" not in what and "beyond" not in what, **more)
row("where sizes vary", "ConvTranspose", [X(2, 3, 3, 4, varied=(1, 3, 5, 2)), W(3, 4, 4, 4)], lambda x, w: conv_transpose(x, w, strides=(2, 2), pads=[1] * 4), strides=[2, 2], pads=[1] * 4)

# ------------------------------------------------------------------------------------------------------ normalisations


def normal(x, axes, epsilon):
    c = x - x.mean(axes, keepdim=True)
    return c / ((c * c).mean(axes, keepdim=True) + epsilon).sqrt()


def channels(v, x):
    return v.reshape(-1, *[1] * (x.ndim - 2))


row("", "InstanceNormalization", [X(2, 3, 4, 5, varied=(1, 3, 3, 5)), W(3), W(3)], lambda x, s, b: normal(x, (2, 3), 1e-5) * channels(s, x) + channels(b, x))
row("plain", "InstanceNormalization", [X(2, 3, 8), Fixed([1] * 3), Fixed([0] * 3)], lambda x: normal(x, (2,), 1e-3), opset=22, epsilon=1e-3, half=True)
row("", "GroupNormalization", [X(2, 4, 3, 5, varied=(1, 4, 2, 5)), W(4), W(4)], lambda x, s, b: normal(x.reshape(x.shape[0], 2, -1), (2,), 1e-5).reshape(x.shape) * channels(s, x) + channels(b, x), opset=21, num_groups=2, evaluator="single", half=True)
row("", "LayerNormalization", [X(2, 3, 8, varied=(4, 2, 8)), W(8), W(8)], lambda x, s, b: normal(x, (-1,), 1e-5) * s + b, half=True)
row("of two axes", "LayerNormalization", [X(2, 3, 4), W(3, 4)], lambda x, s: normal(x, (-2, -1), 1e-3) * s, axis=1, epsilon=1e-3)
row("", "RMSNormalization", [X(2, 3, 8, varied=(4, 2, 8)), W(8)], lambda x, s: x / ((x * x).mean(-1, keepdim=True) + 1e-5).sqrt() * s, opset=23)
row("", "BatchNormalization", [X(2, 3, 4, varied=(3, 3, 2)), W(3), W(3), W(3), W(3, low=0.5)], lambda x, s, b, m, v: (x - channels(m, x)) / (channels(v, x) + 1e-5).sqrt() * channels(s, x) + channels(b, x))
row("", "LpNormalization", [X(2, 5)], lambda x: x / (x * x).sum(-1, keepdim=True).sqrt())
row("1", "LpNormalization", [X(2, 5, kinks=[0])], lambda x: x / x.abs().sum(0, keepdim=True), p=1, axis=0, evaluator=False)

# ------------------------------------------------------------------------------------------------------------- pooling


def windows(x, kernel, strides=None, pads=None, dilations=None, value=0.0):
    """[B, C, places..., offsets...]"""
    axes = len(kernel)
    strides, dilations, pads = strides or [1] * axes, dilations or [1] * axes, pads or [0] * 2 * axes
    x = pad(x, [0, 0, *pads[:axes], 0, 0, *pads[axes:]], value)
    for axis in range(axes):
        places = (x.shape[2 + axis] - (kernel[axis] - 1) * dilations[axis] - 1) // strides[axis] + 1
        index = torch.arange(places)[:, None] * strides[axis] + torch.arange(kernel[axis])[None] * dilations[axis]
        x = x.index_select(2 + axis, index.flatten()).unflatten(2 + axis, (places, kernel[axis])).movedim(3 + axis, -1)
    return x


def max_pool(x, kernel, **more):
    return windows(x, kernel, value=-INF, **more).flatten(-len(kernel)).amax(-1)


def average_pool(x, kernel, count_include_pad=0, **more):
    total = windows(x, kernel, **more).flatten(-len(kernel)).sum(-1)
    counted = torch.full_like(total, math.prod(kernel)) if count_include_pad else windows(torch.ones_like(x), kernel, **more).flatten(-len(kernel)).sum(-1)
    return total / counted


for what, x, kernel, more in [
    ("", (2, 3, 4, 6), [2, 2], dict(strides=[2, 2])),
    ("with a rest", (1, 2, 5, 7), [2, 3], dict(strides=[2, 3])),
    ("padded", (1, 2, 5, 6), [3, 3], dict(strides=[2, 2], pads=[1, 1, 1, 1])),
    ("unevenly padded", (1, 2, 5, 6), [3, 2], dict(pads=[1, 0, 0, 1])),
    ("of one axis", (2, 3, 7), [3], dict(strides=[2])),
    ("of three axes", (1, 2, 3, 4, 4), [2, 2, 2], dict(strides=[1, 2, 2])),
]:
    row(what, "MaxPool", [X(*x, distinct=True)], lambda x, k=kernel, m=more: max_pool(x, k, **m), kernel_shape=kernel, **more)
    row(what, "AveragePool", [X(*x)], lambda x, k=kernel, m=more: average_pool(x, k, **m), kernel_shape=kernel, **more)
    if "padded" in what:
        row(what + " and counted", "AveragePool", [X(*x)], lambda x, k=kernel, m=more: average_pool(x, k, 1, **m), kernel_shape=kernel, count_include_pad=1, **more)
for what, x, kernel, strides, pads, beyond in [
    ("beyond", (1, 2, 5, 6), [2, 3], [2, 2], [0, 0, 0, 0], [0, 0, 1, 1]),
    ("beyond the padding", (1, 2, 6, 5), [3, 3], [3, 2], [1, 1, 0, 0], [1, 1, 2, 1]),
    ("of a kernel larger than all", (2, 2, 3, 2), [9, 8], [9, 8], [0] * 4, [0, 0, 6, 6]),
]:
    row(what, "AveragePool", [X(*x)], lambda x, k=kernel, s=strides, b=beyond: average_pool(x, k, strides=s, pads=b), kernel_shape=kernel, strides=strides, pads=pads, ceil_mode=1, evaluator=False)
for opset in (17, 19):
    row(f"beyond the padding, which counts, in set {opset}", "AveragePool", [X(1, 2, 6, 7)], lambda x: F.avg_pool2d(x, 3, 3, 1, ceil_mode=True), kernel_shape=[3, 3], strides=[3, 3], pads=[1] * 4, count_include_pad=1, ceil_mode=1, opset=opset, evaluator=False)
row("dilated", "MaxPool", [X(1, 2, 7, 7, distinct=True)], lambda x: max_pool(x, [3, 2], dilations=[2, 3]), kernel_shape=[3, 2], dilations=[2, 3])
row("dilated", "AveragePool", [X(1, 2, 7, 7)], lambda x: average_pool(x, [3, 2], dilations=[2, 3]), kernel_shape=[3, 2], dilations=[2, 3], opset=19)
row("where sizes vary", "MaxPool", [X(1, 2, 4, 6, distinct=True, varied=(2, 2, 6, 4))], lambda x: max_pool(x, [2, 2], strides=[2, 2]), kernel_shape=[2, 2], strides=[2, 2])
row("where sizes vary", "AveragePool", [X(1, 2, 4, 6, varied=(2, 2, 6, 4))], lambda x: average_pool(x, [2, 2], strides=[2, 2]), kernel_shape=[2, 2], strides=[2, 2])
row("padded where sizes vary", "AveragePool", [X(1, 2, 4, 6, varied=(2, 2, 6, 4))], lambda x: average_pool(x, [3, 3], pads=[1] * 4), kernel_shape=[3, 3], pads=[1] * 4)
row("in set 13", "MaxPool", [X(1, 2, 4, 6, distinct=True)], lambda x: max_pool(x, [3, 3]), kernel_shape=[3, 3], opset=13)
row("with a rounded-up size", "MaxPool", [X(1, 2, 5, 5, distinct=True)], lambda x: max_pool(x, [2, 2], strides=[2, 2], pads=[0, 0, 1, 1]), kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)
row("same", "MaxPool", [X(1, 2, 5, 5, distinct=True)], lambda x: max_pool(x, [2, 2], strides=[2, 2], pads=[0, 0, 1, 1]), kernel_shape=[2, 2], strides=[2, 2], auto_pad="SAME_UPPER")
row("", "GlobalAveragePool", [X(2, 3, 4, 5, varied=(1, 3, 2, 5))], lambda x: x.mean((2, 3), keepdim=True))
row("", "GlobalMaxPool", [X(2, 3, 4, 5, distinct=True, varied=(1, 3, 2, 5))], lambda x: x.amax((2, 3), keepdim=True))

# ------------------------------------------------------------------------------------------------------------ resizing


def resize(what, x, scales=None, sizes=None, opset=17, varied=None, **attributes):
    inputs = [X(*x, varied=varied), None, Fixed(scales) if scales else None] + ([ints(*sizes)] if sizes else [])
    row(what, "Resize", inputs, None, opset=opset, **attributes)


resize("nearest doubled", (1, 2, 3, 4), [1, 1, 2, 2], varied=(2, 2, 4, 2), mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")
resize("nearest doubled in set 13", (1, 2, 3, 4), [1, 1, 2, 3], opset=13, varied=(2, 2, 4, 2), mode="nearest")
resize("nearest to sizes", (1, 2, 3, 4), sizes=[1, 2, 5, 6], mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor")
resize("nearest ceil", (1, 2, 3, 4), [1, 1, 1.5, 1.7], mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="ceil")
resize("nearest prefer ceil", (1, 2, 3, 4), [1, 1, 1.5, 1.7], mode="nearest", nearest_mode="round_prefer_ceil")
resize("nearest halved", (1, 2, 6, 4), [1, 1, 0.5, 0.5], mode="nearest")
for mode in ("linear", "cubic"):
    for transformation in ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric"):
        resize(f"{mode} {transformation}", (1, 2, 3, 4), [1, 1, 2, 2], mode=mode, coordinate_transformation_mode=transformation)
        resize(f"{mode} {transformation} to sizes", (1, 2, 5, 4), sizes=[1, 2, 3, 6], mode=mode, coordinate_transformation_mode=transformation)
resize("cubic outside excluded", (1, 1, 4, 5), [1, 1, 2, 1.5], mode="cubic", exclude_outside=1, cubic_coeff_a=-0.5)
resize("linear with axes", (1, 2, 3, 4), [2, 1.5], opset=18, mode="linear", axes=[2, 3])
resize("linear half_pixel_symmetric", (1, 2, 3, 4), [1, 1, 1.7, 2.3], opset=19, mode="linear", coordinate_transformation_mode="half_pixel_symmetric")
resize("linear of a batch", (2, 3), [1.5, 2], mode="linear")
resize("linear of one axis", (1, 2, 5), [1, 1, 1.7], mode="linear")
resize("linear batch that varies", (1, 2, 3, 3), [1, 1, 2, 2], varied=(3, 2, 3, 3), mode="linear")

# ----------------------------------------------------------------------------------------------------------- attention


def attention(q, k, v, mask=None, heads=None, scale=None, causal=False, softcap=0.0):
    flat = q.ndim == 3
    if flat:
        q, k, v = (x.unflatten(2, (h, -1)).transpose(1, 2) for x, h in zip((q, k, v), (heads[0], heads[1], heads[1])))
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    # ONNX caps before the mask is added from operator set 24 on; the runtime does in 23 as well.
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        scores = scores + torch.full(scores.shape[-2:], -INF).triu(1)
    if mask is not None:
        scores = scores + (torch.where(mask, 0.0, -INF) if mask.dtype == torch.bool else mask)
    y = scores.softmax(-1) @ v
    return y.transpose(1, 2).flatten(2) if flat else y


Q, K, V = (2, 3, 4, 5), (2, 3, 6, 5), (2, 3, 6, 4)
seen = np.random.default_rng(1).random((4, 6)) < 0.7
seen[:, 0] = True
MASK = torch.tensor(seen)
row("", "Attention", [X(*Q, varied=(1, 3, 2, 5)), X(*K, varied=(1, 3, 5, 5)), X(*V, varied=(1, 3, 5, 4))], attention, opset=23, half=True)
row("flat", "Attention", [X(2, 4, 6), X(2, 5, 6), X(2, 5, 9)], lambda q, k, v: attention(q, k, v, heads=(3, 3)), opset=23, q_num_heads=3, kv_num_heads=3)
row("flat and grouped", "Attention", [X(2, 4, 12, varied=(1, 2, 12)), X(2, 5, 6, varied=(1, 7, 6)), X(2, 5, 4, varied=(1, 7, 4))], lambda q, k, v: attention(q, k, v, heads=(4, 2)), opset=23, q_num_heads=4, kv_num_heads=2)
row("grouped", "Attention", [X(1, 4, 3, 5), X(1, 2, 4, 5), X(1, 2, 4, 3)], attention, opset=23)
row("scaled", "Attention", [X(*Q), X(*K), X(*V)], lambda *x: attention(*x, scale=0.3), opset=23, scale=0.3)
row("masked by flags", "Attention", [X(*Q), X(*K), X(*V), flags(seen)], lambda q, k, v: attention(q, k, v, MASK), opset=23)
row("masked by numbers", "Attention", [X(*Q), X(*K), X(*V), X(4, 6)], attention, opset=23)
row("masked by numbers of heads", "Attention", [X(*Q), X(*K), X(*V), X(2, 1, 4, 6)], attention, opset=23)
row("causal", "Attention", [X(2, 3, 4, 5), X(2, 3, 4, 5), X(2, 3, 4, 3)], lambda *x: attention(*x, causal=True), opset=23, is_causal=1)
row("capped", "Attention", [X(*Q), X(*K), X(*V)], lambda *x: attention(*x, softcap=1.5), opset=23, softcap=1.5)

# ------------------------------------------------------------------------------------------------------------- oracles


def build(row, arrays, floats):
    """The model, with float inputs of the numpy type `floats`, and the values of its graph inputs."""
    names, inputs, initializers, feeds = [], [], [], {}
    for index, (spec, array) in enumerate(zip(row["inputs"], arrays)):
        if spec is None:
            names.append("")
            continue
        names.append(name := f"x{index}")
        if array.dtype == np.float32 and not (row["op"] == "Resize" and index == 2):
            array = array.astype(floats)
        if isinstance(spec, Shape) or isinstance(spec, Input) and not spec.weight:
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            varied = getattr(spec, "varied", None)
            others = array.shape if varied is None else np.shape(varied) if isinstance(spec, Shape) else varied
            sizes = spec.shape if isinstance(spec, Input) else spec.values.shape
            declared = [size if size == other else None for size, other in zip(sizes, others)]
            inputs.append(helper.make_tensor_value_info(name, kind, declared))
            feeds[name] = array
        else:
            initializers.append(numpy_helper.from_array(array, name))
    outputs = [f"y{index}" for index in range(row["outputs"])]
    node = helper.make_node(row["op"], names, outputs, name="the/node", **row["attributes"])
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(floats))
    if row["op"] in ("Cast", "CastLike"):
        kind = TensorProto.DOUBLE
    graph = helper.make_graph([node], "one operator", inputs, [helper.make_tensor_value_info(name, kind, None) for name in outputs], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", row["opset"])], ir_version=10 if row["opset"] < 23 else 11), feeds


def plain(tensor):
    return tensor.detach().numpy(force=True)


def linear_by_evaluator(row, arrays):
    """The function of an operator that is linear in its only float input, as the matrix of ONNX's evaluator."""
    model, feeds = build(row, arrays, np.float64)
    evaluator = ReferenceEvaluator(model)
    x = feeds["x0"]
    columns = []
    for index in range(x.size):
        unit = np.zeros(x.size)
        unit[index] = 1
        columns.append(evaluator.run(None, feeds | {"x0": unit.reshape(x.shape)})[0])
    shape = columns[0].shape
    matrix = torch.tensor(np.stack([column.reshape(-1) for column in columns], 1))
    return lambda x: (matrix @ x.reshape(-1)).reshape(shape)


def case(row, rng, first):
    """One case: arrays to store. The `first` case's arrays if this is the second, which has the same weights."""
    arrays, second = [], first is not None
    for index, spec in enumerate(row["inputs"]):
        if isinstance(spec, Input) and spec.weight and second:
            arrays.append(first[index])
        elif isinstance(spec, Input):
            shape = spec.varied if second and spec.varied else spec.shape
            drawn = spec.draw(rng, shape)
            if row["half"]:  # numbers that f32, fp16 and bf16 all have
                drawn = (drawn.view(np.uint32) & 0xFFFF0000).view(np.float32)
            arrays.append(drawn)
        elif isinstance(spec, Shape):
            arrays.append(spec.varied if second else spec.values)
        else:
            arrays.append(None if spec is None else spec.values)
    wanted = [index for index, spec in enumerate(row["inputs"]) if isinstance(spec, Input)]
    function = row["function"] or linear_by_evaluator(row, arrays)
    points = tuple(torch.tensor(arrays[index].astype(np.float64), requires_grad=True) for index in wanted)
    fixed = {i: torch.tensor(a) for i, a in enumerate(arrays) if isinstance(row["inputs"][i], Fixed) and a.dtype == np.bool_ and row["op"] == "Where"}

    def outputs(*points):
        given = iter(points)
        args = [fixed[0]] + list(points) if fixed and len(points) == 2 else list(points)
        y = function(*args)
        return y if isinstance(y, (tuple, list)) else (y,)

    ys = outputs(*points)
    draw = lambda like: rng.standard_normal(tuple(like.shape)).astype(np.float32)
    us = [draw(y) for y in ys]
    vs = [draw(x) for x in points]
    u64 = [torch.tensor(u.astype(np.float64), requires_grad=True) for u in us]
    v64 = [torch.tensor(v.astype(np.float64)) for v in vs]
    total = sum((u * y).sum() for u, y in zip(u64, ys))
    gradients = torch.autograd.grad(total, points, create_graph=True)
    along = sum((g * v).sum() for g, v in zip(gradients, v64))
    second_order = torch.autograd.grad(along, points, allow_unused=True, retain_graph=True) if along.requires_grad else [None] * len(points)
    pushed = torch.func.jvp(lambda *p: tuple(outputs(*p)), tuple(p.detach() for p in points), tuple(v64))[1]
    by_reverse = torch.autograd.grad(along, u64, allow_unused=True)
    for one, other in zip(pushed, by_reverse):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9), row["what"]

    if row["evaluator"]:
        model, feeds = build(row, arrays, np.float64)
        weights = {initializer.name: numpy_helper.to_array(initializer) for initializer in model.graph.initializer}
        for index in wanted:  # initializers become inputs that are stepped like the others
            if f"x{index}" in weights:
                feeds[f"x{index}"] = weights[f"x{index}"]
                model.graph.input.append(helper.make_tensor_value_info(f"x{index}", TensorProto.DOUBLE, None))
        kept = [one for one in model.graph.initializer if one.name not in feeds]
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)
        evaluator = ReferenceEvaluator(model)
        value = lambda feeds: sum(float((y * u).sum()) for y, u in zip(evaluator.run(None, feeds), us))
        for y, of_torch in zip(evaluator.run(None, feeds), ys):
            close(row, "forward", y, plain(of_torch), 1e-6)
        for index, gradient in zip(wanted, gradients):
            x = feeds[name := f"x{index}"]
            places = rng.permutation(x.size)[:16]
            # The error of a step h is h² by the third derivative, and rounding / h.
            step, tolerance = (1e-2, 2e-3) if row["evaluator"] == "single" else (1e-5, 1e-5)
            differences = []
            for place in places:
                ends = []
                for sign in (1, -1):
                    moved = x.copy().reshape(-1)
                    moved[place] += sign * step
                    ends.append(value(feeds | {name: moved.reshape(x.shape)}))
                differences.append((ends[0] - ends[1]) / (2 * step))
            close(row, f"differences of {name}", np.array(differences), plain(gradient).reshape(-1)[places], tolerance)

    stored = {f"x{i}": a for i, a in enumerate(arrays) if a is not None}
    stored |= {f"y{i}": plain(y) for i, y in enumerate(ys)} | {f"u{i}": u for i, u in enumerate(us)}
    for index, g, v, h in zip(wanted, gradients, vs, second_order):
        stored |= {f"g{index}": plain(g), f"v{index}": v, f"h{index}": np.zeros(v.shape) if h is None else plain(h)}
    stored |= {f"p{i}": plain(p) for i, p in enumerate(pushed)}
    return arrays, {name: np.array(array, order="C", copy=True) for name, array in stored.items()}


def close(row, what, found, expected, tolerance):
    error = np.abs(np.asarray(found) - expected).max(initial=0) / max(np.abs(expected).max(initial=0), 1e-3)
    assert np.shape(found) == np.shape(expected) and error <= tolerance, f"{row['what']}: the oracles differ in {what}: {error:.2e}, {np.shape(found)} {np.shape(expected)}"


def main():
    folder, only = Path(sys.argv[-1]), sys.argv[1:-1]
    folder.mkdir(parents=True, exist_ok=True)
    index, failures = [], []
    for number, row in enumerate(ROWS):
        if only and row["op"] not in only:
            continue
        rng = np.random.default_rng(number)
        varies = any(getattr(spec, "varied", None) is not None for spec in row["inputs"])
        try:
            cases = [case(row, rng, None)]
            cases += [case(row, rng, cases[0][0])] if varies else []
        except Exception as error:
            failures.append(f"{row['what']}: {type(error).__name__}: {error}")
            continue
        for number_of_case, (_, stored) in enumerate(cases):
            save_file(stored, folder / f"{number}-{number_of_case}.safetensors")
        for floats in FLOATS if row["half"] else ["f32"]:
            model, feeds = build(row, cases[0][0], FLOATS[floats])
            (folder / f"{number}-{floats}.onnx").write_bytes(model.SerializeToString())
        wanted = [f"x{i}" for i, spec in enumerate(row["inputs"]) if isinstance(spec, Input)]
        index.append(dict(number=number, what=row["what"], op=row["op"], opset=row["opset"], cases=len(cases), wanted=wanted,
                          inputs=list(feeds) if row["half"] else list(build(row, cases[0][0], np.float32)[1]), outputs=row["outputs"], half=row["half"]))
    assert not failures, "\n".join(failures)
    (folder / "index.json").write_text(json.dumps(index, indent=1))


main()
