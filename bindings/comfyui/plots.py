"""Plots as arrays `[H, W, 3]` of bytes, drawn with Pillow, which ComfyUI has: a concept's layers, the loss of a search."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAPER, INK, FAINT = (250, 250, 248), (34, 34, 40), (206, 206, 200)
FIRST, BOTH, SECOND = (47, 111, 178), (120, 70, 140), (214, 96, 58)


def layers(concept, other=None):
    """A bar for each projection, as long as the share of its weights that is in the concept; with another concept, what
    only the first has, what both have, and what only the other has."""
    bars, names = _bars(concept, other), (concept.title or "concept", other and (other.title or "the other"))
    row, left, width, top, bottom = 16, 330, 900, 58, 34
    plot = Image.new("RGB", (width, top + row * max(len(bars), 1) + bottom), PAPER)
    draw, font = ImageDraw.Draw(plot), ImageFont.load_default(12)
    most = max((sum(shares) for _, shares in bars), default=0) or 1
    right = width - 70
    legend = [(FIRST, names[0])] + ([(BOTH, "both"), (SECOND, names[1])] if other else [])
    draw.text((12, 10), "Share of each projection's weights", INK, ImageFont.load_default(15))
    at = 12
    for colour, name in legend:
        draw.rectangle((at, 36, at + 10, 46), colour)
        draw.text((at + 16, 34), name, INK, font)
        at += 40 + draw.textlength(name, font)
    for tick in _ticks(most):
        x = left + tick / most * (right - left)
        draw.line((x, top, x, plot.height - bottom), FAINT)
        draw.text((x, plot.height - bottom + 6), f"{tick:.3g} %", INK, font, anchor="ma")
    for number, (path, shares) in enumerate(bars):
        y, x = top + number * row, left
        draw.text((left - 10, y + row / 2), _short(path), INK, font, anchor="rm")
        for colour, share in zip((FIRST, BOTH, SECOND), shares):
            end = x + share / most * (right - left)
            if share > 0:
                draw.rectangle((x, y + 3, max(end, x + 1), y + row - 3), colour)
            x = end
        draw.text((x + 6, y + row / 2), f"{sum(shares):.2f} %", INK, font, anchor="lm")
    return np.asarray(plot)


def _bars(concept, other):
    """For each projection its path and, in percent, what only the first, both, and only the other have."""
    own = {layer.path: layer for layer in concept.layers}
    if other is None:
        return [(path, (_percent(layer.neurons, layer), 0, 0)) for path, layer in own.items()]
    foreign = {layer.path: layer for layer in other.layers}
    bars = []
    for path, overlap in concept.overlap_by_layer(other).items():
        layer, common = own.get(path) or foreign[path], overlap.intersection
        counts = [side[path].neurons - common if path in side else 0 for side in (own, foreign)]
        bars.append((path, tuple(_percent(count, layer) for count in (counts[0], common, counts[1]))))
    return bars


def _percent(count, layer):
    return 100 * count / (layer.out_features * layer.in_features)


def _short(path):
    """A projection's path without the words that all have."""
    for word in (".transformer_blocks", ".attentions", ".attn2"):
        path = path.replace(word, "")
    return path


def _ticks(most):
    """Two to five round numbers up to the largest."""
    step = 10.0 ** np.floor(np.log10(most))
    step = next(step * part for part in (1, 0.5, 0.25) if most / (step * part) >= 2)
    return np.arange(0, most * 1.0001, step)


def loss_curve(losses, total):
    """The running loss over the batches of a search of `total`."""
    width, height, left, bottom = 480, 240, 62, 26
    plot = Image.new("RGB", (width, height), PAPER)
    draw, font = ImageDraw.Draw(plot), ImageFont.load_default(12)
    values = [loss for _, loss in losses]
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1
    area = (left, 14, width - 14, height - bottom)

    def place(done, loss):
        return (
            area[0] + done / total * (area[2] - area[0]),
            area[3] - (loss - low) / span * (area[3] - area[1]),
        )

    draw.rectangle(area, outline=FAINT)
    for loss in {low, high}:
        draw.text((left - 8, place(0, loss)[1]), f"{loss:.4f}", INK, font, anchor="rm")
    draw.text((left, height - 20), "0", INK, font, anchor="ma")
    draw.text((area[2], height - 20), f"{total} batches", INK, font, anchor="ra")
    points = [place(done, loss) for done, loss in losses]
    if len(points) > 1:
        draw.line(points, FIRST, 2)
    x, y = points[-1]
    draw.ellipse((x - 3, y - 3, x + 3, y + 3), FIRST)
    return np.asarray(plot)
