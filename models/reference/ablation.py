"""Forgetting a word: what erasing sets and ConceptPrune do to it and to the other objects, over density.

A word is forgotten if the second judge no longer finds it in pictures of it; the others should be found as before. Ours
acts on the rows of the word alone (local) and is searched by the library; ConceptPrune's acts on every row.
"""

import subprocess
from dataclasses import dataclass

import numpy as np
import torch

import conceptprune
import evaluate as judging
import plot
import probe
from discover import on_background, read_concept
from erase import material
from held_out import draw
from losses import Draw, predict
from model import plain_label, words

WORDS = ("tiger", "taxi", "pizza", "rocket")
DENSITIES = (0.001, 0.004, 0.016)
OTHERS = 16
OWN = 12
STEPS = 15
BATCHES, BATCH, DRAWN_SIDE = 8, 8, 32


@dataclass
class Counts:
    """How often the word and the others were found."""

    own: list
    others: list


def found_by_library(program, model_folder, word, density, options):
    """Runs the host program `examples/c/erase.c`; returns the concept file."""
    path = options.out / "ablation" / f"{word}-{density}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [program, model_folder, path, word]
    for colour in words.COLOURS:
        command += [on_background(word, colour), on_background(words.category(word), colour)]
    command += ["--density", density, "--class", plain_label(options.side), "--side", options.side]
    subprocess.run([str(part) for part in command], check=True, stdout=subprocess.DEVNULL)
    return path


def counted(model, weights, word, parts, options):
    """Draws the word and the others under `parts` and asks the judge."""
    colours = list(words.COLOURS)
    others = [noun for noun in words.OBJECTS if noun != word][:: max(1, (len(words.OBJECTS) - 1) // OTHERS)][:OTHERS]
    nouns = [word] * OWN + others
    captions = [on_background(noun, colours[i % len(colours)]) for i, noun in enumerate(nouns)]
    pictures = draw(model, weights, captions, parts, seed=options.seed + 9, steps=STEPS)
    hits = judging.found("second", np.asarray(pictures), options.judges)
    hits = [bool(row[probe.LABELS.index(noun)]) for row, noun in zip(hits, nouns)]
    return Counts(hits[:OWN], hits[OWN:])


def norms(model, layers, pictures, seed):
    """Input norms over noisy pictures at time steps of the whole process."""
    generator = torch.Generator().manual_seed(seed)

    def run():
        for _ in range(BATCHES):
            predict(model, [Draw.random(pictures, BATCH, generator)])

    return conceptprune.input_norms(layers, run)


def ablated(model, weights, program, forgotten, options):
    """Shares found by word, way and density, with 95 % intervals; writes the curves to peers-ablated.png."""
    ways = {}
    base = Counts([], [])

    def add(way, density, counts):
        into = ways.setdefault(way, {}).setdefault(density, Counts([], []))
        into.own += counts.own
        into.others += counts.others

    for word in forgotten:
        counts = counted(model, weights, word, [], options)
        base.own += counts.own
        base.others += counts.others
        concept, neutral, _ = material(model, weights, word, words.category(word), options.seed, DRAWN_SIDE)
        for way, endings in (
            ("ConceptPrune, feed-forward", conceptprune.FEED_FORWARD),
            ("ConceptPrune, K and V", conceptprune.KEYS_AND_VALUES),
        ):
            layers = conceptprune.layers_of(model.unet, endings)
            ours, theirs = (norms(model, layers, pictures, options.seed) for pictures in (concept, neutral))
            for density in DENSITIES:
                with conceptprune.pruned(layers, conceptprune.skilled(layers, ours, theirs, density)):
                    add(way, density, counted(model, weights, word, [], options))
        for density in DENSITIES:
            found, scope, _ = read_concept(found_by_library(program, options.model, word, density, options), weights)
            add("erasing set (ours)", density, counted(model, weights, word, [(found.shut, scope)], options))
        print(f"ablated: {word}", flush=True)
    return {"words": forgotten, **report(base, ways, options)}


def report(base, ways, options):
    """As JSON, and as a picture."""
    panels = []
    for what, title in (("own", "the word itself is found"), ("others", "other objects are found")):
        curves = {}
        for way, by_density in ways.items():
            shares = {d: judging.wilson(sum(getattr(c, what)), len(getattr(c, what))) for d, c in by_density.items()}
            curves[way] = [(100 * d, s["share"], s["low"], s["high"]) for d, s in shares.items()]
        hits = getattr(base, what)
        panels.append(plot.Panel(title, "density, %", True, curves, ("untouched", sum(hits) / len(hits))))
    plot.grid(panels, 2).save(options.out / "peers-ablated.png")

    def shares(counts):
        return {what: judging.wilson(sum(hits), len(hits)) for what, hits in vars(counts).items()}

    by_way = {way: {str(d): shares(counts) for d, counts in by_density.items()} for way, by_density in ways.items()}
    return {"untouched": shares(base), **by_way}
