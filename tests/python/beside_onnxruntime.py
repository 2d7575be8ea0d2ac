"""Macula and the `onnxruntime` package in one process: each runs the same UNet, and they must agree.

Arguments: a model folder, which is imported first (`macula` or `onnxruntime`). Prints both versions and the difference.
"""

import sys

import numpy as np

MODEL, FIRST = sys.argv[1:]


def by_macula():
    import macula

    runtime = macula.Runtime()
    pipeline = macula.Pipeline(MODEL, runtime)
    context = pipeline.encode_prompt("a cat").context
    sample = np.random.default_rng(5).standard_normal((1, *pipeline.latent_shape), dtype=np.float32)
    return lambda: (runtime.version, sample, context, pipeline.denoise(sample, 500, context, class_labels=np.zeros(1)))


def by_onnxruntime():
    import onnxruntime

    session = onnxruntime.InferenceSession(f"{MODEL}/unet/model.onnx", providers=["CPUExecutionProvider"])

    def run(sample, context):
        given = {"sample": sample, "timestep": [500], "encoder_hidden_states": context, "class_labels": [0]}
        inputs = {one.name: one for one in session.get_inputs()}
        kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
        feed = {name: np.asarray(given[name], dtype=kinds[one.type]).reshape(np.shape(given[name])[: len(one.shape)])
                for name, one in inputs.items()}
        return onnxruntime.__version__, session.run(None, feed)[0]

    return run


if FIRST == "macula":
    ours, theirs = by_macula(), by_onnxruntime()
else:
    theirs, ours = by_onnxruntime(), by_macula()
version, sample, context, predicted = ours()
their_version, expected = theirs(sample, context)
again = ours()[3]
assert (again == predicted).all(), "a run of onnxruntime changed what macula predicts"
print(version, their_version, np.linalg.norm(predicted - expected) / np.linalg.norm(expected))
