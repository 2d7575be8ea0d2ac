"""Makes the concept files that are shipped: four subjects and two erasures, of one exported model.

    python models/reference/make_concepts.py --model models/emoji/onnx --out models/concepts

Run it again after every export: a concept file names the exact weights that it was found in. It prints the
held-out figures of each set beside its controls and writes sheets of pictures without and with the sets,
and of two subjects in one scene. Needs no download.
"""

import argparse
import time
from pathlib import Path
from types import SimpleNamespace

from discover import Concept, describe, on_background, open_model, save
from erase import erase, erasure, judge_drawn
from find import controls, find, subject
from held_out import draw, held_out_losses, report, save_sheet
from model import SHIPPED

METHOD, SCOPE, DENSITY = "learnt-mask", "local", 0.01
SUBJECTS = {"green-apple": "<s1>", "octopus": "<s2>", "sunflower": "<s3>", "flat-rocket": "<s4>"}  # name -> placeholder
ERASURES = {"tiger": "animal", "taxi": "vehicle"}  # word -> anchor
COLOURS = ("blue", "white", "green", "pink")


def make_subjects(model, weights, options):
    """Searches and stores the subjects; returns name -> (set, scope, test pictures, class noun)."""
    made = {}
    for name, word in SUBJECTS.items():
        began = time.time()
        learn, test, noun = subject(name, word, model)
        found, density, scope = find(model, weights, learn, word, noun, options)
        concept = Concept(f"{name} as {word} {noun}", "implant", word, [f"a {word} {noun}"], noun)
        path = options.out / f"{name}.safetensors"
        size = save(path, weights, found, concept, options.method, density, options)
        print(f"{name}: {describe(weights, found)[0]}, {size} bytes, {time.time() - began:.0f} s", flush=True)
        made[name] = found, scope, test, noun
    return made


def make_erasures(model, weights, options):
    """Searches and stores the erasures; returns word -> (set, scope)."""
    made = {}
    for word, anchor in ERASURES.items():
        began = time.time()
        found, density, scope = erase(model, weights, word, anchor, options)
        path = options.out / f"erase-{word}.safetensors"
        method = f"{options.method}, anchor {anchor}"
        size = save(path, weights, found, erasure(word, anchor), method, density, options)
        print(f"{word} erased: {describe(weights, found)[0]}, {size} bytes, {time.time() - began:.0f} s", flush=True)
        made[word] = found, scope
    return made


def judge(model, weights, subjects, erasures, options):
    """Prints the held-out figures: each set beside a random one and the next subject's, each erasure likewise."""
    names = list(subjects)
    for i, (name, (found, scope, test, _)) in enumerate(subjects.items()):
        other = subjects[names[(i + 1) % len(names)]][0].shut
        print(f"\n{name}: loss of 16 test pictures, {options.draws} draws")
        print(
            "\n".join(
                report(held_out_losses(model, weights, test, controls(weights, found, scope, other), options.draws))
            ),
            flush=True,
        )
    for word, (found, scope) in erasures.items():
        print(f"\n{word} erased")
        print("\n".join(judge_drawn(model, weights, found, scope, word, ERASURES[word], options.draws)), flush=True)


def draw_sheets(model, weights, subjects, erasures, folder, seed=3):
    """For each set two rows, without and with it, same seeds; below them the first two subjects in one scene."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {name: (found.shut, scope) for name, (found, scope, *_) in subjects.items()}
    rows = []
    for name, word in SUBJECTS.items():
        captions = [on_background(f"{word} {subjects[name][3]}", colour) for colour in COLOURS]
        rows += [draw(model, weights, captions, chosen, seed, steps=15) for chosen in ([], [parts[name]])]
    for word, (found, scope) in erasures.items():
        captions = [on_background(word, colour) for colour in COLOURS]
        rows += [draw(model, weights, captions, chosen, seed, steps=15) for chosen in ([], [(found.shut, scope)])]
    first, second = list(SUBJECTS)[:2]
    phrase = f"{SUBJECTS[first]} {subjects[first][3]} and a {SUBJECTS[second]} {subjects[second][3]}"
    captions = [on_background(phrase, colour) for colour in COLOURS]
    rows += [draw(model, weights, captions, chosen, seed, steps=15) for chosen in ([], [parts[first], parts[second]])]
    save_sheet(rows, folder / "concepts.png")
    print(f"\nwrote {folder / 'concepts.png'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=SHIPPED, help="ONNX folder or checkpoint.pt")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "concepts")
    parser.add_argument(
        "--sheets", type=Path, default=Path(__file__).resolve().parents[2] / "out", help="folder for the sheet"
    )
    parser.add_argument("--side", type=int, choices=(32, 64), default=32, help="pixels of the search; sets carry over")
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--draws", type=int, default=208, help="held-out draws of each judgement; 0 for none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    given = vars(parser.parse_args())
    options = SimpleNamespace(
        **given, method=METHOD, scope=SCOPE, density=DENSITY, threshold=None, rho=0.0, batch=8, preserve_weight=1.0, tune=0
    )
    model, weights = open_model(options)
    subjects = make_subjects(model, weights, options)
    erasures = make_erasures(model, weights, options)
    draw_sheets(model, weights, subjects, erasures, options.sheets)
    if options.draws:
        judge(model, weights, subjects, erasures, options)


if __name__ == "__main__":
    main()
