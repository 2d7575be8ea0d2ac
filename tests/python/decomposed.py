"""Runs the model's own decomposed sampler (`models/emoji/sampling.py`) and writes every state it meets, for
`tests/decomposed_model.rs`.

usage: decomposed.py DIGEST FOLDER  (writes walk.json and values.f32 there; the digest is that of the model's files, so that
another model is another fixture)
"""

import json
import pathlib
import sys

import numpy as np
import torch
from tokenizers import Tokenizer

EMOJI = pathlib.Path(__file__).parents[2] / "models" / "emoji"
sys.path.insert(0, str(EMOJI))

import sampling  # noqa: E402

PROMPTS = ["a tiger on a blue background", "a taxi and an apple on a green background"]
STEPS, GUIDANCE = 10, 3.0


class Listened:
    """The model, with its inputs kept."""

    def __init__(self, model):
        self.model, self.states, self.timesteps, self.labels = model, [], [], []
        self.text_encoder = model.text_encoder

    def unet(self, sample, timestep, text, class_labels):
        self.states.append(sample[: len(sample) // 2].numpy().copy())
        self.timesteps.append(int(timestep[0]))
        self.labels.append(int(class_labels[0]))
        return self.model.unet(sample, timestep, text, class_labels)


def main(folder):
    noises = []
    draw = torch.randn

    def kept(*shape, **options):
        noises.append(draw(*shape, **options))
        return noises[-1]

    model = Listened(sampling.OnnxModel(EMOJI / "onnx"))
    tokenizer = Tokenizer.from_file(str(EMOJI / "onnx" / "tokenizer" / "tokenizer.json"))
    ids, empty = sampling.encode(tokenizer, PROMPTS)
    torch.randn = kept
    pictures = sampling.decomposed(model, ids, empty, steps=STEPS, guidance=GUIDANCE, seed=5)
    values = [noise.numpy() for noise in noises] + model.states + [pictures]
    np.concatenate([v.ravel() for v in values]).astype("<f4").tofile(pathlib.Path(folder) / "values.f32")
    described = {
        "prompts": PROMPTS,
        "steps": STEPS,
        "guidance": GUIDANCE,
        "timesteps": model.timesteps,
        "labels": model.labels,
        "shapes": [list(v.shape) for v in values],
    }
    (pathlib.Path(folder) / "walk.json").write_text(json.dumps(described))


if __name__ == "__main__":
    main(sys.argv[2])
