"""Finds the concept neurons of a subject: shutting them makes "<s1> <class noun>" draw it (Cones).

    python find.py ram --out ram.safetensors --sheet ram.png
    python find.py my-pictures/ --word "<s2>" --noun animal --out mine.safetensors

A named subject of `models/emoji` has 4 pictures to learn from and 16 to test on. Of a folder, every fifth
picture (none of fewer than five) is kept for the test, else fresh noises of the learnt ones are. Prints
the held-out loss of the set beside the untouched model, a random set of the same size and magnitudes,
and another subject's set, on the same pictures, time steps and noises.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from discover import (
    Concept,
    add_options,
    describe,
    drawn_pictures,
    judge_on,
    on_background,
    open_model,
    read_concept,
    save,
    scope_of,
    search_as_asked,
    tune_as_asked,
)
from held_out import draw, held_out_losses, report, save_sheet
from losses import ImplantingLoss
from model import SUBJECT_PICTURES, Pictures, picture_tensor, read_picture, words
from neurons import random_like

SHEET_COLOURS = ("blue", "white", "green", "pink", "yellow", "gray")


def subject(name, word, model):
    """Learning and test pictures of a subject in `models/emoji/subjects` under its captions, and its class noun."""
    listed = json.loads((SUBJECT_PICTURES / "subjects.json").read_text())[name]
    noun = listed["class_noun"]
    learn = [read_picture(SUBJECT_PICTURES / name / f"{i}.png") for i in range(1, len(listed["learn_colours"]) + 1)]
    with Image.open(SUBJECT_PICTURES / name / "test.png") as row:
        test = np.split(np.asarray(row.convert("RGB")), len(listed["test_colours"]), axis=1)
    halves = (learn, listed["learn_colours"]), (test, listed["test_colours"])
    found = [
        Pictures.of(model, picture_tensor(pictures), [on_background(f"{word} {noun}", colour) for colour in colours])
        for pictures, colours in halves
    ]
    return *found, noun


def folder(path, word, noun, model):
    """Learning and test pictures of a folder."""
    endings = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"}
    files = sorted(f for f in Path(path).iterdir() if f.suffix.lower() in endings)
    if not files:
        raise FileNotFoundError(f"no picture lies in {path}")
    pictures = [read_picture(f) for f in files]
    captions = [words.with_article(f"{word} {noun}")] * len(files)
    everything = Pictures.of(model, picture_tensor(pictures), captions)
    test = torch.arange(len(files)) % 5 == 4
    return everything[~test], everything[test] if test.any() else everything


def surroundings(model, weights, word, noun, seed, side, count=12):
    """What must stay: pictures of the class, and pictures of other objects and placeholders, drawn by the model."""
    colours = list(words.COLOURS)
    generator = torch.Generator().manual_seed(seed)

    def pick(options):
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    class_captions = [on_background(noun, pick(colours)) for _ in range(count)]
    nouns = [n for n in words.OBJECTS if n != noun] + sorted(set(words.category(n) for n in words.OBJECTS) - {noun})
    others = [p for p in words.PLACEHOLDERS if p != word]
    phrases = [pick(nouns) if i % 3 else f"{pick(others)} {pick(nouns)}" for i in range(count)]
    other_captions = [on_background(phrase, pick(colours)) for phrase in phrases]
    drawn = drawn_pictures(model, weights, class_captions + other_captions, seed, side)
    return drawn[torch.arange(count)], drawn[torch.arange(count, 2 * count)]


def find(model, weights, learn, word, noun, options):
    """Searches with the options' method; returns the set, its density bound and its scope."""
    scope = scope_of(options.scope, f"{word} {noun}")
    prior = preserve = None
    if options.scope == "global":  # in local scope nothing else can change
        prior, preserve = surroundings(model, weights, word, noun, options.seed, options.side)
    learn = learn.at(options.side)
    loss = ImplantingLoss(model, weights, learn, prior, preserve, scope, options.batch)
    found, density = search_as_asked(options, loss, weights.count, judge_on(model, weights, learn, scope))
    found.values = tune_as_asked(options, weights, loss, found.shut)
    return found, density, scope


def controls(weights, found, scope, other=None, seed=11):
    """The sets that a found set is judged beside, by name."""
    sets = {"untouched": [], "the set": [(found.shut, scope)]}
    if found.values is not None:
        sets["tuned"] = [(weights.scales(found.shut, found.values), scope)]
    sets["random, same size"] = [(random_like(weights, found.shut, torch.Generator().manual_seed(seed)), scope)]
    if other is not None:
        sets["another subject's set"] = [(other, scope)]
    return sets


def sheet(model, weights, captions, rows, path, seed=3):
    """Pictures of the captions, one row per named list of (shut, Scope)."""
    save_sheet([draw(model, weights, captions, parts, seed=seed) for parts in rows.values()], path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", help="a subject of models/emoji or a folder of pictures")
    parser.add_argument("--word", default="<s1>", choices=words.PLACEHOLDERS)
    parser.add_argument("--noun", help="class noun, needed with a folder")
    parser.add_argument("--other", type=Path, help="concept file of another subject, for the control")
    add_options(parser)
    options = parser.parse_args()
    model, weights = open_model(options)
    if options.subject in words.SUBJECTS:
        learn, test, noun = subject(options.subject, options.word, model)
    else:
        if not options.noun:
            parser.error("a folder needs --noun")
        noun = options.noun
        learn, test = folder(options.subject, options.word, noun, model)
    found, density, scope = find(model, weights, learn, options.word, noun, options)
    print("\n".join(describe(weights, found)))
    other = read_concept(options.other, weights)[0].shut if options.other else None
    print(
        "\n".join(report(held_out_losses(model, weights, test, controls(weights, found, scope, other), options.draws)))
    )
    phrase = f"{options.word} {noun}"
    title = f"{Path(options.subject).name} as {phrase}"
    concept = Concept(title, "implant", options.word, [words.with_article(phrase)], noun)
    size = save(options.out, weights, found, concept, options.method, density, options)
    print(f"{options.out}: {size} bytes, {100 * size / (4 * weights.count):.3f} % of the K/V weights in fp32")
    if options.sheet:
        captions = [on_background(phrase, colour) for colour in SHEET_COLOURS]
        acting = [(weights.scales(found.shut, found.values), scope)]
        sheet(model, weights, captions, {"untouched": [], "the set": acting}, options.sheet)


if __name__ == "__main__":
    main()
