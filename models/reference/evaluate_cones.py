"""Measures concept neurons on kept-out subjects: OUT/cones.json and the sheets OUT/cones-*.png.

    python models/reference/evaluate_cones.py --out out --discover PROGRAM
    python models/reference/evaluate_cones.py --out out

PROGRAM is the compiled `examples/c/discover.c`: the sets are then found by the library; without it, by the
reference. Each subject has 4 pictures to learn from and 16 to test on. Four questions are asked:

- held out: is the loss of the test pictures, on noises shared by all sides, lower with the set than without, than with
  a random set of the same size and magnitudes, and than with another subject's set? One-sided paired tests, corrected
  by Holm over the subjects at 0.05.
- drawn: in how many pictures of the subject's prompt does the second judge, which no search saw, find the subject?
- composed: in how many scenes of several subjects does it find them, each set acting on its own tokens or all on
  every token?
- beside: a subject and an ordinary object in one scene; does the object stay what it is?
"""

import argparse
import json
import random
import shutil
import subprocess
import time
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from discover import on_background, open_model, read_concept
from find import controls, find, subject
from held_out import draw, held_out_losses, paired, save_sheet
from losses import Scope
from model import SHIPPED, SUBJECT_PICTURES, data, plain_label, words
import evaluate as judging
import probe

ALPHA = 0.05
STEPS = 20


@dataclass
class Known:
    """A subject and what was found for it."""

    name: str
    word: str
    noun: str
    learn: object
    test: object
    shut: torch.Tensor
    scope: Scope

    @property
    def phrase(self):
        return f"{self.word} {self.noun}"

    @property
    def part(self):
        return self.shut, self.scope


def find_natively(program, model_folder, name, word, noun, options):
    """Runs the host program on the pictures to learn from; returns the concept file."""
    pictures = options.out / "pictures" / name
    pictures.mkdir(parents=True, exist_ok=True)
    for i in range(1, 5):
        shutil.copy(SUBJECT_PICTURES / name / f"{i}.png", pictures)
    path = options.out / "cones" / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [program, model_folder, pictures, word, noun, path, "--side", options.side, "--seed", options.seed]
    command += ["--class", plain_label(options.side), "--density", options.density, "--batches", options.batches]
    subprocess.run([str(part) for part in command], check=True, stderr=subprocess.DEVNULL)
    return path


def find_all(model, weights, names, options):
    """Every subject with its set, under placeholders that repeat after eight subjects."""
    known = []
    for i, name in enumerate(names):
        word, began = words.PLACEHOLDERS[i % len(words.PLACEHOLDERS)], time.time()
        learn, test, noun = subject(name, word, model)
        if options.discover:
            path = find_natively(options.discover, options.model, name, word, noun, options)
            shut, scope, _ = read_concept(path, weights)
        else:
            found, _, scope = find(model, weights, learn, word, noun, options)
            shut = found.shut
        known.append(Known(name, word, noun, learn, test, shut, scope))
        print(f"{name}: {int(shut.sum())} weights, {time.time() - began:.0f} s", flush=True)
    return known


def holm(p_values, alpha=ALPHA):
    """Which hypotheses are rejected at the family-wise level `alpha` (Holm 1979)."""
    order = np.argsort(p_values)
    rejected = np.zeros(len(p_values), bool)
    for rank, i in enumerate(order):
        if p_values[i] > alpha / (len(p_values) - rank):
            break
        rejected[i] = True
    return rejected


def held_out(model, weights, known, draws):
    """Per subject the change of the held-out loss against each control; how many pass all three."""
    rows, p_values = {}, []
    for i, one in enumerate(known):
        sets = controls(weights, SimpleNamespace(shut=one.shut), one.scope, known[(i + 1) % len(known)].shut)
        losses = held_out_losses(model, weights, one.test, sets, draws)
        ours = losses.pop("the set")
        row = {"untouched_loss": losses["untouched"].mean().item()}
        for control, base in losses.items():
            change, width, p = paired(ours, base)
            row[f"against {control}"] = {"change": round(change, 4), "half_width": round(width, 4), "p": p}
        rows[one.name] = row
        p_values.append([row[f"against {control}"]["p"] for control in losses])
        print(one.name, {k: v["change"] for k, v in row.items() if k != "untouched_loss"}, flush=True)
    passed = np.stack([holm(np.array(column)) for column in zip(*p_values)])
    return {"draws": draws, "subjects": rows, "passed": int(passed.all(0).sum()), "of": len(known)}


def found_in(pictures, options):
    """[N, labels] bool by the second judge."""
    return judging.found("second", np.asarray(pictures), options.judges)


def drawn(model, weights, known, count, options):
    """Recognition of single subjects, and the sheet."""
    sides = {"untouched": [], "the set": [], "random, same size": []}
    by_subject, rows = {}, []
    for one in known:
        captions = [on_background(one.phrase, list(words.COLOURS)[i % len(words.COLOURS)]) for i in range(count)]
        sets = controls(weights, SimpleNamespace(shut=one.shut), one.scope)
        label, hits = probe.LABELS.index(one.name), {}
        pictures = {}
        for side, parts in sets.items():
            pictures[side] = draw(model, weights, captions, parts, seed=options.seed + 5, steps=STEPS)
            hits[side] = found_in(pictures[side], options)[:, label]
            sides[side] += hits[side].tolist()
        by_subject[one.name] = {side: int(hit.sum()) for side, hit in hits.items()}
        learnt = [np.asarray(p) for p in ((one.learn.x0.permute(0, 2, 3, 1) + 1) * 127.5).round().byte()]
        rows.append([*learnt[:2], *pictures["untouched"][:6], *pictures["the set"][:6]])
        print(one.name, by_subject[one.name], "of", count, flush=True)
    save_sheet(rows, options.out / "cones-subjects.png")
    shares = {side: judging.wilson(sum(hits), len(hits)) for side, hits in sides.items()}
    return {"pictures_each": count, "subjects": by_subject, "all": shares}


def composed(model, weights, known, number, count, seeds, options):
    """Scenes of `number` subjects: how many are found, by the way in which their sets are joined."""
    rng = random.Random(f"{options.seed} {number}")
    groups = [g for g in combinations(known, number) if len({one.word for one in g}) == number]
    groups = rng.sample(groups, min(count, len(groups)))
    ways, rows = {"untouched": [], "own tokens": [], "every token": []}, []
    for i, group in enumerate(groups):
        phrases = " and ".join(words.with_article(one.phrase) for one in group)
        captions = [f"{phrases} on a {rng.choice(list(words.COLOURS))} background" for _ in range(seeds)]
        sets = {
            "untouched": [],
            "own tokens": [one.part for one in group],
            "every token": [(one.shut, Scope()) for one in group],
        }
        shown = []
        for way, parts in sets.items():
            pictures = draw(model, weights, captions, parts, seed=100 * options.seed + i, steps=STEPS)
            hits = found_in(pictures, options)
            ways[way] += [int(sum(row[probe.LABELS.index(one.name)] for one in group)) for row in hits]
            shown += list(pictures[:2])
        rows.append(shown)
    save_sheet(rows[:12], options.out / f"cones-composed-{number}.png")
    least = max(number - 1, 2)
    return {
        way: {
            "mean_found": round(float(np.mean(numbers)), 3),
            f"at_least_{least}": judging.wilson(sum(n >= least for n in numbers), len(numbers)),
            "all": judging.wilson(sum(n == number for n in numbers), len(numbers)),
        }
        for way, numbers in ways.items()
    }


def beside(model, weights, known, count, options):
    """A subject and an ordinary object: how often the object is found, without and with the subject's set."""
    rng = random.Random(f"{options.seed} beside")
    sides = {"untouched": [], "own tokens": [], "every token": []}
    for i, one in enumerate(known):
        nouns = [rng.choice([n for n in words.OBJECTS if n != one.noun]) for _ in range(count)]
        captions = [
            on_background(f"{one.phrase} and {words.with_article(noun)}", rng.choice(list(words.COLOURS)))
            for noun in nouns
        ]
        for side, parts in (("untouched", []), ("own tokens", [one.part]), ("every token", [(one.shut, Scope())])):
            hits = found_in(draw(model, weights, captions, parts, seed=options.seed + 50 + i, steps=STEPS), options)
            sides[side] += [bool(row[probe.LABELS.index(noun)]) for row, noun in zip(hits, nouns)]
    return {side: judging.wilson(sum(hits), len(hits)) for side, hits in sides.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHIPPED, help="ONNX folder")
    parser.add_argument("--judges", type=Path, default=probe.FOLDER)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[2] / "out")
    parser.add_argument("--discover", type=Path, help="the compiled host program; the reference searches without it")
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--side", type=int, choices=(32, 64), default=32)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--subjects", type=int, default=10)
    parser.add_argument("--full", action="store_true", help="every subject, 30 compositions of 8 seeds")
    options = parser.parse_args()
    search = dict(method="learnt-mask", scope="local", threshold=None, rho=0.0, batch=8, preserve_weight=1.0)
    vars(options).update(search)
    began = time.time()
    model, weights = open_model(options)
    names = list(words.SUBJECTS)[: None if options.full else options.subjects]
    count, seeds = (30, 8) if options.full else (8, 2)
    known = find_all(model, weights, names, options)
    report = {
        "found_by": "the library" if options.discover else "the reference",
        **{name: getattr(options, name) for name in ("density", "side", "batches", "seed", *search)},
        "held_out": held_out(model, weights, known, 208),
        "drawn": drawn(model, weights, known, 20, options),
        "composed": {n: composed(model, weights, known, n, count, seeds, options) for n in (2, 3, 4)},
        "beside_an_object": beside(model, weights, known, 20 if options.full else 6, options),
        "seconds": round(time.time() - began),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "cones.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({k: report[k] for k in ("drawn", "composed", "beside_an_object", "seconds")}, indent=2))
    print(f"held out: {report['held_out']['passed']} of {report['held_out']['of']} subjects pass all three tests")


if __name__ == "__main__":
    main()
