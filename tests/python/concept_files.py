"""The NumPy implementation of concept files and fingerprints, as an oracle for the Rust one.

    python concept_files.py rewrite FOLDER      opens FOLDER/*.safetensors by the safetensors package, reads each by
                                                `concept_file.read`, writes it again as NAME.again
    python concept_files.py make FOLDER         writes FOLDER/NAME.safetensors and its indices, NAME.json
    python concept_files.py fingerprint FILE... prints the fingerprint of the cross-attention weights in each file
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "models" / "reference"))
import concept_file  # noqa: E402

TYPES = {"float16": np.float16, "float32": np.float32}


def rewrite(folder):
    for path in sorted(Path(folder).glob("*.safetensors")):
        layers, metadata = concept_file.read(path)
        rows = concept_file.read_rows(path)
        with safe_open(path, "np") as file:
            assert file.metadata() == metadata
            precision = metadata["macula.values"]
            types = {name + concept_file.SUFFIX: np.uint8 for name in layers}
            if precision != "none":
                types |= {name + concept_file.VALUES_SUFFIX: np.dtype(TYPES.get(precision, np.uint8)) for name in layers}
            types |= {concept_file.ROW_NAME.format(number): np.float32 for number in range(len(rows))}
            assert {name: file.get_tensor(name).dtype for name in file.keys()} == types
        concept_file.write(path.with_suffix(".again"), layers, metadata, rows)


def make(folder):
    random = np.random.default_rng(5)
    for density in [0.0, 0.0005, 0.01, 0.1, 0.3, 0.45, 0.7, 0.99, 1.0]:
        layers = {}
        for path, shape in {"b.0.attn2.to_k": (37, 48), "b.0.attn2.to_v": (64, 48), "a.10.attn2.to_k": (1, 3000)}.items():
            members = random.choice(shape[0] * shape[1], int(density * shape[0] * shape[1]), replace=False)
            layers[path] = (*shape, np.sort(members))
        metadata = {
            "macula.base": "ab" * 32,
            "macula.trigger": "<s1>",
            "macula.class_noun": "dög",
            "macula.prompts": json.dumps(["a <s1> dög", 'say "no"']),
            "macula.threshold": "0.00012",
            "macula.seed": str(2**64 - 1),
            "modelspec.title": "A dög",
            "modelspec.architecture": "stable-diffusion-v1/concept-neurons",
            "modelspec.author": "somebody",
        }
        concept_file.write(Path(folder) / f"made-{density}.safetensors", layers, metadata)
        listed = {path: [int(index) for index in layer[2]] for path, layer in layers.items()}
        (Path(folder) / f"made-{density}.json").write_text(json.dumps(listed))


def fingerprint(*files):
    import torch

    for path in files:
        with safe_open(path, "pt") as file:
            weights = {
                name.removesuffix(".weight"): file.get_tensor(name).to(torch.float32).numpy()
                for name in file.keys()
                if ".attn2." in name and name.endswith(".weight")
            }
        print(concept_file.fingerprint(weights))


if __name__ == "__main__":
    {"rewrite": rewrite, "make": make, "fingerprint": fingerprint}[sys.argv[1]](*sys.argv[2:])
