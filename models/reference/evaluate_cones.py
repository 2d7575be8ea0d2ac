"""Measures concept neurons on kept-out subjects: OUT/cones.json and the sheets OUT/cones-*.png.

    python models/reference/evaluate_cones.py --out out --discover PROGRAM
    python models/reference/evaluate_cones.py --out out

PROGRAM is the compiled `examples/c/discover.c`: the sets are then found by the library. The first eight subjects, whose words
differ, are also found with learnt words, tuned together and drawn by the package `macula`. Without it all is done by the
reference, and nothing is tuned together. Each subject has 4 pictures to learn from and 16 to test on. Four questions are asked:

- held out: is the loss of the test pictures, on noises shared by all sides, lower with the set than without, than with
  a random set of the same size and magnitudes, and than with another subject's set? One-sided paired tests, corrected
  by Holm over the subjects at 0.05.
- drawn: in how many pictures of the subject's prompt does the second judge, which no search saw, find the subject, with
  its weights shut and with tuned values?
- composed: in how many scenes of several subjects does it find them, the sets shut or tuned, each acting on its own
  tokens or all on every token, or tuned together?
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

import numpy as np
import torch

from discover import on_background, open_model, read_concept
from find import controls, find, subject
from held_out import draw, held_out_losses, paired, save_sheet
from losses import Scope
from model import SHIPPED, SUBJECT_PICTURES, plain_label, words
from search import Found
import evaluate as judging
import probe

ALPHA = 0.05
STEPS = 20
SCENES = 256  # that are made to tune subjects together
EMBEDDING_STEPS = 100  # in which their words are learnt before
# Of subjects that are tuned together: four files are at most 2 % of all K/V weights, which Custom Diffusion stores.
TOGETHER = dict(density=0.005, values="float16")
SEARCH = dict(method="learnt-mask", scope="local", threshold=None, rho=0.0, batch=8, preserve_weight=1.0)


@dataclass
class Known:
    """A subject and what was found for it."""

    name: str
    word: str
    noun: str
    learn: object
    test: object
    found: Found
    scope: Scope
    size: int | None  # bytes of the concept file

    @property
    def phrase(self):
        return f"{self.word} {self.noun}"

    def parts(self, weights, scope=None):
        """How the set acts, shut and tuned, each as a list of one (scales, Scope)."""
        scope = scope or self.scope
        shut, values = self.found.shut, self.found.values
        return {"shut": [(weights.scales(shut), scope)], "tuned": [(weights.scales(shut, values), scope)]}


def find_natively(program, model_folder, name, word, noun, options):
    """Runs the host program on the pictures to learn from; returns the concept file."""
    pictures = options.out / "pictures" / name
    pictures.mkdir(parents=True, exist_ok=True)
    colours = json.loads((SUBJECT_PICTURES / "subjects.json").read_text())[name]["learn_colours"]
    for i, colour in enumerate(colours, 1):
        shutil.copy(SUBJECT_PICTURES / name / f"{i}.png", pictures)
        (pictures / f"{i}.txt").write_text(on_background(f"{word} {noun}", colour) + "\n")
    path = options.out / "cones" / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [program, model_folder, pictures, word, noun, path, "--side", options.side, "--seed", options.seed]
    command += ["--class", plain_label(options.side), "--density", options.density, "--batches", options.batches]
    command += ["--tune", options.tune, "--values", options.values]
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
            found, scope, _ = read_concept(path, weights)
        else:
            found, _, scope = find(model, weights, learn, word, noun, options)
        size = path.stat().st_size if options.discover else None
        known.append(Known(name, word, noun, learn, test, found, scope, size))
        print(f"{name}: {int(found.shut.sum())} weights, {size} bytes, {time.time() - began:.0f} s", flush=True)
    return known


class Together:
    """Subjects of different words, found with learnt words and tuned together, by the library."""

    def __init__(self, known, options):
        import macula

        began, listed = time.time(), json.loads((SUBJECT_PICTURES / "subjects.json").read_text())
        self.pipeline = macula.Pipeline(options.model, threads=options.threads)
        side, companions = options.side, []
        for one in known:
            prompts = [on_background(one.phrase, colour) for colour in listed[one.name]["learn_colours"]]
            pictures = [SUBJECT_PICTURES / one.name / f"{i}.png" for i in range(1, len(prompts) + 1)]
            found = self.pipeline.discover(
                pictures, one.word, one.noun, prompts=prompts, size=(side, side), class_label=plain_label(side),
                batches=options.batches, seed=options.seed, embedding_steps=EMBEDDING_STEPS, tune_steps=options.tune,
                **TOGETHER,
            )  # fmt: skip
            companions.append(macula.Companion(found, pictures, prompts))
        tuned = self.pipeline.tune_together(
            companions, steps=options.together, scenes=SCENES, seed=options.seed, values=TOGETHER["values"]
        )
        self.concepts, self.bytes = {}, []
        for one, concept in zip(known, tuned):
            path = options.out / "cones" / f"{one.name}-together.safetensors"
            concept.save(path)
            self.concepts[one.name] = concept
            self.bytes.append(path.stat().st_size)
        self.seconds = round(time.time() - began)
        print(f"{len(known)} subjects tuned together: {self.bytes} bytes, {self.seconds} s", flush=True)

    def drawn(self, group, captions, seed, options):
        """Pictures of these subjects in one scene, one a caption."""
        self.pipeline.compose(*(self.concepts[one.name] for one in group))
        drawing = {"steps": STEPS, "guidance": options.guidance}
        return [
            self.pipeline.draw(caption, seed=1000 * seed + at, **drawing)[0].copy() for at, caption in enumerate(captions)
        ]


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
        sets = controls(weights, one.found, one.scope, known[(i + 1) % len(known)].found.shut)
        losses = held_out_losses(model, weights, one.test, sets, draws)
        ours, tuned = losses.pop("the set"), losses.pop("tuned")
        row = {"untouched_loss": losses["untouched"].mean().item()}
        row["tuned"] = round(paired(tuned, losses["untouched"])[0], 4)
        for control, base in losses.items():
            change, width, p = paired(ours, base)
            row[f"against {control}"] = {"change": round(change, 4), "half_width": round(width, 4), "p": p}
        rows[one.name] = row
        p_values.append([row[f"against {control}"]["p"] for control in losses])
        print(one.name, {k: v["change"] if isinstance(v, dict) else v for k, v in row.items()}, flush=True)
    passed = np.stack([holm(np.array(column)) for column in zip(*p_values)])
    return {"draws": draws, "subjects": rows, "passed": int(passed.all(0).sum()), "of": len(known)}


def found_in(pictures, options):
    """[N, labels] bool by the second judge."""
    return judging.found("second", np.asarray(pictures), options.judges)


def drawn_with(model, weights, captions, parts, seed, options):
    return draw(model, weights, captions, parts, seed=seed, steps=STEPS, guidance=options.guidance)


def drawn(model, weights, known, count, options):
    """Recognition of single subjects, and the sheet."""
    sides = {"untouched": [], "the set": [], "tuned": [], "random, same size": []}
    by_subject, rows = {}, []
    for one in known:
        captions = [on_background(one.phrase, list(words.COLOURS)[i % len(words.COLOURS)]) for i in range(count)]
        sets = controls(weights, one.found, one.scope)
        label, hits = probe.LABELS.index(one.name), {}
        pictures = {}
        for side, parts in sets.items():
            pictures[side] = drawn_with(model, weights, captions, parts, options.seed + 5, options)
            hits[side] = found_in(pictures[side], options)[:, label]
            sides[side] += hits[side].tolist()
        by_subject[one.name] = {side: int(hit.sum()) for side, hit in hits.items()}
        learnt = [np.asarray(p) for p in ((one.learn.x0.permute(0, 2, 3, 1) + 1) * 127.5).round().byte()]
        rows.append([*learnt[:2], *(p for side in ("untouched", "the set", "tuned") for p in pictures[side][:5])])
        print(one.name, by_subject[one.name], "of", count, flush=True)
    save_sheet(rows, options.out / "cones-subjects.png")
    shares = {side: judging.wilson(sum(hits), len(hits)) for side, hits in sides.items()}
    return {"pictures_each": count, "subjects": by_subject, "all": shares}


def scenes(known, number, count, seeds, rng):
    """Groups of `number` subjects under different words, each with a caption for every seed."""
    groups = [g for g in combinations(known, number) if len({one.word for one in g}) == number]
    for group in rng.sample(groups, min(count, len(groups))):
        phrases = " and ".join(words.with_article(one.phrase) for one in group)
        yield group, [f"{phrases} on a {rng.choice(list(words.COLOURS))} background" for _ in range(seeds)]


def shares_found(ways, number):
    """Of how many subjects were found in each picture of `number`, by way: the mean and the shares of nearly all and all."""
    shares = {}
    for way, numbers in ways.items():
        shares[way] = {"mean_found": round(float(np.mean(numbers)), 3)}
        for least in sorted({min(max(number - 1, 2), number), number}):
            name = "all" if least == number else f"at_least_{least}"
            shares[way][name] = judging.wilson(sum(n >= least for n in numbers), len(numbers))
    return shares


def number_found(pictures, group, options):
    """How many of the group's subjects the judge finds in each picture."""
    labels = [probe.LABELS.index(one.name) for one in group]
    return found_in(pictures, options)[:, labels].sum(1).tolist()


def composed(model, weights, known, number, count, seeds, options, together=None):
    """Scenes of `number` subjects: how many are found, by the way in which their sets are joined."""
    rng = random.Random(f"{options.seed} {number}")
    ways, rows = {}, []
    for i, (group, captions) in enumerate(scenes(known, number, count, seeds, rng)):
        sets, shown = {"untouched": []}, []
        for where, scope in (("own tokens", None), ("every token", Scope())):
            for how in ("shut", "tuned"):
                sets[f"{how}, {where}"] = [part for one in group for part in one.parts(weights, scope)[how]]
        seed = 100 * options.seed + i
        drawn = {way: drawn_with(model, weights, captions, parts, seed, options) for way, parts in sets.items()}
        if together:
            drawn["tuned together"] = together.drawn(group, captions, seed, options)
        for way, pictures in drawn.items():
            ways.setdefault(way, []).extend(number_found(pictures, group, options))
            shown += list(pictures[:2])
        rows.append(shown)
    save_sheet(rows[:12], options.out / f"cones-composed-{number}.png")
    return shares_found(ways, number)


def beside(model, weights, known, count, options):
    """A subject and an ordinary object: how often the object is found, without and with the subject's set."""
    rng = random.Random(f"{options.seed} beside")
    sides = {"untouched": [], "shut": [], "tuned": []}
    for i, one in enumerate(known):
        nouns = [rng.choice([n for n in words.OBJECTS if n != one.noun]) for _ in range(count)]
        captions = [
            on_background(f"{one.phrase} and {words.with_article(noun)}", rng.choice(list(words.COLOURS)))
            for noun in nouns
        ]
        for side, parts in {"untouched": [], **one.parts(weights)}.items():
            hits = found_in(drawn_with(model, weights, captions, parts, options.seed + 50 + i, options), options)
            sides[side] += [bool(row[probe.LABELS.index(noun)]) for row, noun in zip(hits, nouns)]
    return {side: judging.wilson(sum(hits), len(hits)) for side, hits in sides.items()}


def add_search(parser):
    """How subjects are searched for, tuned and drawn."""
    parser.add_argument("--model", type=Path, default=SHIPPED, help="ONNX folder")
    parser.add_argument("--judges", type=Path, default=probe.FOLDER)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[2] / "out")
    parser.add_argument("--discover", type=Path, help="the compiled host program; the reference searches without it")
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--tune", type=int, default=150, help="steps of tuning")
    parser.add_argument("--together", type=int, default=2000, help="steps of tuning together")
    parser.add_argument("--values", choices=("binary", "quaternary", "float16", "float32"), default="quaternary")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--side", type=int, choices=(32, 64), default=32)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_search(parser)
    parser.add_argument("--subjects", type=int, default=10)
    parser.add_argument("--full", action="store_true", help="every subject, 30 compositions of 8 seeds")
    options = parser.parse_args()
    vars(options).update(SEARCH)
    began = time.time()
    model, weights = open_model(options)
    names = list(words.SUBJECTS)[: None if options.full else options.subjects]
    count, seeds = (30, 8) if options.full else (8, 2)
    known = find_all(model, weights, names, options)
    first = known[: len(words.PLACEHOLDERS)]
    together = Together(first, options) if options.discover else None
    report = {
        "found_by": "the library" if options.discover else "the reference",
        **{n: getattr(options, n) for n in ("density", "tune", "together", "values", "guidance", "side", "batches", "seed", *SEARCH)},
        "concept_bytes": [one.size for one in known],
        "share_of_kv_bytes": [one.size and round(one.size / (4 * weights.count), 5) for one in known],
        "held_out": held_out(model, weights, known, 208),
        "drawn": drawn(model, weights, known, 20, options),
        "found_together": TOGETHER,
        "together_bytes": together and together.bytes,
        "share_of_kv_bytes_of_four": together and round(4 * max(together.bytes) / (4 * weights.count), 5),
        "together_seconds": together and together.seconds,
        "composed": {
            n: composed(model, weights, first, n, count, seeds, options, together) for n in (2, 3, 4) if n <= len(first)
        },
        "beside_an_object": beside(model, weights, known, 20 if options.full else 6, options),
        "seconds": round(time.time() - began),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "cones.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({k: report[k] for k in ("drawn", "composed", "beside_an_object", "seconds")}, indent=2))
    print(f"held out: {report['held_out']['passed']} of {report['held_out']['of']} subjects pass all three tests")


if __name__ == "__main__":
    main()
