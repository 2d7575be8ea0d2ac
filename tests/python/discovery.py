"""Batches of a search on the shipped UNet, with what the PyTorch reference says of them, for `tests/discovery.rs`.

usage: discovery.py SCOPE VERSION FOLDER     SCOPE: local or global; VERSION: of the model, not used

FOLDER/batches.safetensors: for each batch b `b.state`, `b.timestep`, `b.v`, `b.text`, `b.labels`, `b.weight` and
`b.rows` (the entries of [B, L] on which a set acts, flat), and the results: `slope` at scales of one and `mixed` at the
scales `scales` for batch 0 with their `loss`es, the sets `saliency` and `learnt` as flat indices.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "models" / "reference"))

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import search  # noqa: E402
from find import subject  # noqa: E402
from losses import Draw, Scope, predict_under  # noqa: E402
from model import load, phrase_ids, plain_label  # noqa: E402
from neurons import KeyValueWeights  # noqa: E402

BATCHES, BATCH, SIDE = 12, 4, 32


def main():
    scope_name, folder = sys.argv[1], pathlib.Path(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    model = load()
    weights = KeyValueWeights(model.unet)
    learn, _, noun = subject("octopus", "<s2>", model)
    learn = learn.at(SIDE)
    scope = Scope(phrase_ids(f"<s2> {noun}")) if scope_name == "local" else Scope()
    generator = torch.Generator().manual_seed(5)
    draws = [Draw.random(learn, BATCH, generator) for _ in range(BATCHES)]
    calls = iter(())

    def loss(scales, _):
        draw = draws[next(calls)]
        (said,) = predict_under(model, weights, scales, scope, [draw])
        return ((said - draw.v) ** 2).mean()

    tensors = {}
    for at, draw in enumerate(draws):
        rows = scope.rows(draw.pictures.ids)
        rows = torch.ones_like(draw.pictures.ids, dtype=torch.bool) if rows is None else rows
        tensors |= {
            f"{at}.state": draw.state,
            f"{at}.timestep": draw.timestep,
            f"{at}.v": draw.v,
            f"{at}.text": draw.pictures.text,
            f"{at}.labels": torch.full((BATCH,), plain_label(SIDE)),
            f"{at}.weight": torch.full((BATCH,), 1 / BATCH),
            f"{at}.rows": rows.flatten().nonzero()[:, 0],
        }
    scales = torch.rand(weights.count, generator=generator)
    for name, at in (("slope", torch.ones(weights.count)), ("mixed", scales)):
        calls = iter((0,))
        tensors[name], value = search.gradient(loss, at, None)
        tensors[f"{name}_loss"] = torch.tensor([value])
    tensors["scales"] = scales
    calls = iter(range(BATCHES))
    scores, _, agreement = search.saliency(loss, weights.count, BATCHES, None)
    shut = search.shut_by_budget(scores, round(0.002 * weights.count))
    tensors["saliency"] = shut.nonzero()[:, 0]
    tensors["agreement"] = torch.tensor([agreement])
    calls = iter(range(BATCHES))
    learnt = search.learnt_mask(loss, weights.count, BATCHES, None, rate=0.2, budget=round(0.01 * weights.count))
    tensors["learnt"] = learnt.shut.nonzero()[:, 0]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "batches.safetensors")


if __name__ == "__main__":
    main()
