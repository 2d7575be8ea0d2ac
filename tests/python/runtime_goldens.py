"""Writes small models of several element types, inputs for them, and what Python's ONNX Runtime answers.

usage: runtime_goldens.py FOLDER
Each case is NAME.onnx and NAME.json: {"inputs": {name: tensor}, "outputs": {name: tensor}} where a tensor is
{"dtype": ONNX's number, "shape": [...], "bytes": hex}.
"""

import json
import pathlib
import sys

import numpy
import onnx
import onnxruntime
from onnx import TensorProto, helper

folder = pathlib.Path(sys.argv[1])
random = numpy.random.default_rng(7)


def record(array):
    number = helper.np_dtype_to_tensor_dtype(array.dtype)
    return {"dtype": int(number), "shape": list(array.shape), "bytes": array.tobytes().hex()}


def write(name, nodes, inputs, outputs, weights=()):
    ports = [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), [None] * a.ndim) for n, a in inputs.items()]
    results = [helper.make_tensor_value_info(n, kind, None) for n, kind in outputs]
    graph = helper.make_graph(nodes, name, ports, results, [onnx.numpy_helper.from_array(a, n) for n, a in weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(model))
    onnx.save(model, folder / f"{name}.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), options, providers=["CPUExecutionProvider"])
    names = [n for n, _ in outputs]
    answers = dict(zip(names, session.run(names, inputs)))
    case = {"inputs": {n: record(a) for n, a in inputs.items()}, "outputs": {n: record(a) for n, a in answers.items()}}
    (folder / f"{name}.json").write_text(json.dumps(case))


def normal(*shape, dtype=numpy.float32):
    return random.standard_normal(shape).astype(dtype)


node = helper.make_node
write(
    "attention",
    [
        node("MatMul", ["context", "k"], ["keys"]),
        node("MatMul", ["context", "v"], ["values"]),
        node("Transpose", ["keys"], ["turned"], perm=[0, 2, 1]),
        node("MatMul", ["query", "turned"], ["logits"]),
        node("Softmax", ["logits"], ["weights"], axis=-1),
        node("MatMul", ["weights", "values"], ["result"]),
        node("Shape", ["result"], ["size"]),
    ],
    {"query": normal(2, 50, 32), "context": normal(2, 9, 48)},
    [("result", TensorProto.FLOAT), ("size", TensorProto.INT64)],
    [("k", normal(48, 32)), ("v", normal(48, 32))],
)
write(
    "block",
    [
        node("Conv", ["sample", "w", "b"], ["a"], pads=[1, 1, 1, 1]),
        node("InstanceNormalization", ["a", "scale", "shift"], ["n"]),
        node("Sigmoid", ["n"], ["s"]),
        node("Mul", ["n", "s"], ["silu"]),
        node("Conv", ["silu", "w2"], ["y"], pads=[1, 1, 1, 1], strides=[2, 2]),
    ],
    {"sample": normal(2, 16, 24, 20)},
    [("y", TensorProto.FLOAT)],
    [("w", normal(32, 16, 3, 3)), ("b", normal(32)), ("scale", normal(32)), ("shift", normal(32)), ("w2", normal(8, 32, 3, 3))],
)
kinds = [numpy.float16, numpy.float32, numpy.float64, numpy.int64, numpy.int32, numpy.int8, numpy.uint8, numpy.bool_]
whole = {f"x{i}": (normal(3, 5) * 40).clip(0, 100).astype(kind) for i, kind in enumerate(kinds)}
number = helper.np_dtype_to_tensor_dtype
write(
    "types",
    [node("Transpose", [f"x{i}"], [f"y{i}"]) for i in range(len(kinds))],
    whole,
    [(f"y{i}", number(numpy.dtype(kind))) for i, kind in enumerate(kinds)],
)
write(
    "halves",
    [node("Cast", ["x"], ["y"], to=TensorProto.FLOAT16), node("Cast", ["x"], ["z"], to=TensorProto.BFLOAT16), node("Cast", ["z"], ["w"], to=TensorProto.FLOAT)],
    {"x": normal(4, 6)},
    [("y", TensorProto.FLOAT16), ("w", TensorProto.FLOAT)],
)
write("empty", [node("Relu", ["x"], ["y"])], {"x": normal(0, 4)}, [("y", TensorProto.FLOAT)])
