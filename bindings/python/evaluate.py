"""What a Python host pays beside the native work, on the shipped model: figures, one JSON object a line.

`python_overhead_us` is what `Pipeline.denoise` takes longer than the same call of the native function with arguments that
were made before. `gil_release_share` is the speed that another Python thread keeps while pictures are drawn. The two sides
of each figure run in turn, and other load of the machine is left out: one counts the thread's own processor time, the
other takes away the time for which the thread waited for a core.
"""

import json
import os
import threading
import time
from ctypes import byref
from pathlib import Path
from statistics import median

import numpy as np

import macula
from macula._abi import macula_denoise_inputs
from macula._library import check, library, numbers, tensor

MODEL = Path(__file__).resolve().parents[2] / "models/emoji/onnx"
# A small state, so that little of the call is noise of the work itself.
SIDE = 16


def figure(name, value, bound, note):
    print(json.dumps({"name": name, "value": value, "bound": bound, "note": note}), flush=True)


def overhead(pipeline, rounds=2000):
    """Microseconds by which the method's call is longer than the bare one: the median of differences of neighbours."""
    context = pipeline.encode_prompt("a cat").context
    sample = np.random.default_rng(5).standard_normal((1, pipeline.latent_shape[0], SIDE, SIDE), dtype=np.float32)
    labels, out = np.zeros(1, dtype=np.int64), np.empty_like(sample)
    inputs = macula_denoise_inputs.new()
    inputs.sample, inputs.context = numbers(sample), numbers(context)
    inputs.class_labels, inputs.timestep = numbers(labels, np.int64), 500
    made = tensor(out)
    native, arguments = library.macula_pipeline_denoise, (pipeline.pointer, byref(inputs), byref(made))

    def bare():
        check(native(*arguments))

    def method():
        pipeline.denoise(sample, 500, context, class_labels=labels, out=out)

    def seconds(call):
        start = time.thread_time()
        call()
        return time.thread_time() - start

    bare()
    expected = out.copy()
    method()
    assert (out == expected).all(), "the two calls predict differently"
    pairs = []
    for at in range(rounds):
        sides = (bare, method) if at % 2 else (method, bare)
        took = {side: seconds(side) for side in sides}
        pairs.append((took[method], took[bare]))
    call = median(bare for _, bare in pairs) * 1e6
    return median(method - bare for method, bare in pairs) * 1e6, f"beside a call of {call:.0f} us"


def share_of_speed(pipeline, rounds=10, seconds=0.5):
    """The speed of a thread that counts, while pictures are drawn, as a share of its speed while nothing is done."""
    counted, ended = 0, threading.Event()

    def count():
        nonlocal counted
        while not ended.is_set():
            counted += 1

    def now():
        """The count, and the seconds in which the thread could have counted: not those of waiting for a core."""
        waited = int(Path(f"/proc/self/task/{counter.native_id}/schedstat").read_text().split()[1])
        return counted, time.perf_counter() - waited / 1e9

    def speed(work):
        before, start = now()
        work()
        after, end = now()
        return (after - before) / (end - start)

    def draw():
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pipeline.draw("a cat", steps=20, guidance=1.0)

    def rest():
        time.sleep(seconds)

    counter = threading.Thread(target=count)
    counter.start()
    try:
        shares = []
        for at in range(rounds):
            sides = (draw, rest) if at % 2 else (rest, draw)
            speeds = {side: speed(side) for side in sides}
            shares.append(speeds[draw] / speeds[rest])
    finally:
        ended.set()
        counter.join()
    return median(shares), f"median of {rounds} rounds of {seconds} s, {min(shares):.2f} to {max(shares):.2f}"


def main():
    with macula.Pipeline(MODEL, threads=1) as pipeline:
        value, note = overhead(pipeline)
        figure("python_overhead_us", value, "<= 200", note)
    # A core is left to the thread that counts.
    cores = len(os.sched_getaffinity(0))
    with macula.Pipeline(MODEL, threads=max(1, cores - 1)) as pipeline:
        value, note = share_of_speed(pipeline)
        figure("gil_release_share", value, ">= 0.9", f"{note}, {max(1, cores - 1)} of {cores} cores draw")


if __name__ == "__main__":
    main()
