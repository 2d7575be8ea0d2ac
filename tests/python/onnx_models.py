"""Makes small models whose weights are stored in every way that exporters use: `onnx_models.py FOLDER`.

Each `FOLDER/<storage>-<type>/model.onnx` computes the same network; `storage` says where its weights lie.
"""

import sys
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

TYPES = {"f32": TensorProto.FLOAT, "f16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def tensor(name, values, dtype, typed):
    array = values.astype(helper.tensor_dtype_to_np_dtype(dtype))
    if typed:
        return helper.make_tensor(name, dtype, array.shape, array.flatten())
    return numpy_helper.from_array(array, name)


def network(dtype, typed):
    """y = Relu(x w1 + b1) w2, with weights cast to f32 so that every processor can run them, and a branch."""
    random = np.random.default_rng(1)
    shapes = {"w1": (48, 64), "b1": (64,), "w2": (64, 32), "gain": (32,)}
    initializers = [tensor(n, random.standard_normal(s) / 4, dtype, typed) for n, s in shapes.items()]
    initializers.append(helper.make_tensor("flag", TensorProto.BOOL, [], [True]))
    initializers.append(helper.make_tensor("axes", TensorProto.INT64, [1], [0]))
    nodes = [helper.make_node("Cast", [n], [n + "_f32"], to=TensorProto.FLOAT) for n in shapes]
    branches = {}
    for branch, op in (("then_branch", "Mul"), ("else_branch", "Add")):
        output = helper.make_tensor_value_info(branch, TensorProto.FLOAT, None)
        branches[branch] = helper.make_graph(
            [helper.make_node(op, ["p", "gain_f32"], [branch])], branch, [], [output]
        )
    nodes += [
        helper.make_node("MatMul", ["x", "w1_f32"], ["h"], name="first"),
        helper.make_node("Add", ["h", "b1_f32"], ["hb"]),
        helper.make_node("Relu", ["hb"], ["r"]),
        helper.make_node("MatMul", ["r", "w2_f32"], ["p"], name="second"),
        helper.make_node("If", ["flag"], ["q"], **branches),
        helper.make_node("Unsqueeze", ["q", "axes"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 48])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "batch", 32])
    graph = helper.make_graph(nodes, "network", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def main(folder):
    for type_name, dtype in TYPES.items():
        for storage in ("raw", "typed", "onnx_data", "data", "weights_pb", "each"):
            model = network(dtype, storage == "typed")
            place = folder / f"{storage}-{type_name}"
            place.mkdir()
            path = place / "model.onnx"
            location = {"onnx_data": "model.onnx_data", "data": "unet.data", "weights_pb": "weights.pb"}.get(storage)
            if location:
                onnx.save(model, path, save_as_external_data=True, location=location, size_threshold=256)
            elif storage == "each":
                onnx.save(model, path, save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=256)
            else:
                onnx.save(model, path)


main(Path(sys.argv[1]))
