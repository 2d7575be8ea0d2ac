"""Held-out losses of sets of concept neurons, on paired draws, and sheets of pictures.

Every set is judged on the same pictures, time steps and noises, so differences are paired. Controls: a
random set of the same size and magnitudes, and another subject's set.
"""

import math

import torch

from losses import Draw, predict
from model import data, plain_label, sampling, token_ids


@torch.no_grad()
def held_out_losses(model, weights, pictures, sets, draws=208, batch=26, seed=1):
    """Loss of every draw, float64 [draws], for each named set.

    `sets` maps a name to a list of (scales or shut [N], Scope); an empty list is the untouched network.
    """
    generator = torch.Generator().manual_seed(seed)
    losses = {name: [] for name in sets}
    for first in range(0, draws, batch):
        which = torch.arange(first, min(first + batch, draws)) % len(pictures)
        drawn = Draw.of(pictures, which, generator)
        for name, parts in sets.items():
            with weights.acting(*((scales, scope.rows(drawn.pictures.ids)) for scales, scope in parts)):
                (said,) = predict(model, [drawn])
            losses[name].append(((said.double() - drawn.v.double()) ** 2).mean((1, 2, 3)))
    return {name: torch.cat(values) for name, values in losses.items()}


def paired(losses, base):
    """Relative change of the mean loss against `base` with its 95 % half-width, and the one-sided p of a drop.

    The p value is that of a paired test with the normal distribution, right for 200 draws.
    """
    change = losses - base
    error = change.std().item() / math.sqrt(len(change))
    z = change.mean().item() / error if error else 0.0
    scale = base.mean().item()
    return change.mean().item() / scale, 1.96 * error / scale, 0.5 * math.erfc(-z / math.sqrt(2))


def report(losses):
    """Lines of text: each set's mean loss, and its paired change against the first one."""
    names = list(losses)
    base = losses[names[0]]
    lines = [f"{names[0]:<28} {base.mean().item():.5f}"]
    for name in names[1:]:
        change, width, p = paired(losses[name], base)
        lines.append(
            f"{name:<28} {losses[name].mean().item():.5f}  {100 * change:+6.2f} % +- {100 * width:.2f}  p(drop) {p:.1e}"
        )
    return lines


def draw(model, weights, captions, parts=(), seed=0, steps=20, guidance=3.0, side=64):
    """Pictures uint8 [B, side, side, 3] by DDIM under `parts`, pairs of (scales or shut [N], Scope)."""
    ids, empty = token_ids(captions), token_ids([""])
    both = torch.cat([ids, empty.expand(len(ids), -1)])
    with weights.acting(*((scales, scope.rows(both)) for scales, scope in parts)):
        return sampling.plain(
            model, ids, empty, steps=steps, guidance=guidance, seed=seed, size=side, label=plain_label(side)
        )


def save_sheet(rows, path):
    """Writes rows of equally many pictures as one PNG."""
    data.sheet([picture for row in rows for picture in row], len(rows[0])).save(path)
