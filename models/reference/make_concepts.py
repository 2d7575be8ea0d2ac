"""Makes the concept files that are shipped: four subjects and two erasures, of one exported model.

    python make_concepts.py --model models/emoji/onnx --out models/concepts

Run it again after every export: a concept file names the exact weights that it was found in. Each file is
judged on pictures and noises that no search saw (`--judge` also prints the controls), and a sheet of pictures
without and with each set, and of two subjects in one scene, is written to WORK/concepts.png.
"""

import argparse
import time
from pathlib import Path
from types import SimpleNamespace

import torch

from discover import add_options, describe, draw, on_background, open_model, save
from erase import erase
from erase import judge as judge_erasure
from evaluate import held_out_losses, report, save_sheet
from find import controls, find, subject
from model import data, words

# name -> (placeholder, method, scope, density or None, batches)
SUBJECTS = {
    "flat-elephant": ("<s1>", "learnt-mask", "local", None, 40),
    "green-apple": ("<s2>", "learnt-mask", "local", None, 40),
    "ram": ("<s3>", "learnt-mask", "local", None, 40),
    "tractor": ("<s4>", "learnt-mask", "local", None, 40),
}
# word -> (anchor, method, scope, density or None, batches)
ERASURES = {
    "tiger": ("animal", "learnt-mask", "local", None, 30),
    "taxi": ("vehicle", "learnt-mask", "local", None, 30),
}
