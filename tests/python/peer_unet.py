"""The other side of the UNet benchmark: the same model, untouched, in Python's onnxruntime.

Reads one command a line from standard input and answers with one JSON object a line:

    open MODEL THREADS      -> {"seconds"}   time to make the session
    inputs B H W L          -> {}            random inputs of that batch, size and prompt length
    step                    -> {"seconds"}   time of one run
    peak                    -> {"bytes"}     peak resident memory of this process
"""

import json
import resource
import sys
import time

import numpy as np
import onnxruntime

DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(double)": np.float64,
}


def open_session(model, threads):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(threads)
    options.add_session_config_entry("session.intra_op.spin_duration_us", "50")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def make_inputs(session, batch, height, width, length):
    """Random inputs; the fixed sizes of the graph win over the wished ones."""
    generator = np.random.default_rng(0)
    feeds = {}
    for value in session.get_inputs():
        wish = {4: [batch, 4, height, width], 3: [batch, length, 768], 1: [batch], 0: []}[len(value.shape)]
        shape = [given if isinstance(given, int) else wanted for given, wanted in zip(value.shape, wish)]
        if value.name == "timestep":
            data = np.full(shape, 500)
        elif value.name == "class_labels":
            data = np.zeros(shape)
        else:
            data = generator.standard_normal(shape)
        feeds[value.name] = data.astype(DTYPES[value.type])
    return feeds


def main():
    session = feeds = None
    for line in sys.stdin:
        command, *arguments = line.split()
        answer = {}
        start = time.perf_counter()
        if command == "open":
            session = open_session(*arguments)
            answer["seconds"] = time.perf_counter() - start
        elif command == "inputs":
            feeds = make_inputs(session, *map(int, arguments))
        elif command == "step":
            session.run(None, feeds)
            answer["seconds"] = time.perf_counter() - start
        elif command == "peak":
            answer["bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
