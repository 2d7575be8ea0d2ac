"""Runs models with onnxruntime: `run_models.py JOBS.json`.

JOBS is a list of {"model": path, "check": bool, "inputs": {name: {"shape": [...], "values": [...]}}}. Answers, on
standard output, a list of {output name: {"shape": [...], "values": [...]}}. Inputs and outputs are float32. With
"check", the model must also pass `onnx.checker` with its external data.
"""

import json
import sys

import numpy as np
import onnx
import onnxruntime

onnxruntime.set_default_logger_severity(3)
answers = []
for job in json.load(open(sys.argv[1])):
    if job["check"]:
        onnx.checker.check_model(job["model"], full_check=True)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(job["model"], options, providers=["CPUExecutionProvider"])
    feeds = {
        name: np.array(value["values"], dtype=np.float32).reshape(value["shape"])
        for name, value in job["inputs"].items()
    }
    names = [output.name for output in session.get_outputs()]
    results = zip(names, session.run(names, feeds), strict=True)
    answers.append({n: {"shape": list(r.shape), "values": r.astype(np.float32).flatten().tolist()} for n, r in results})
json.dump(answers, sys.stdout)
