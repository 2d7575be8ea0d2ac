"""Measures what published peers do at the same tasks: OUT/peers.json and the pictures OUT/peers-*.png.

    python models/reference/evaluate_peers.py --out out --discover PROGRAM --erase PROGRAM

The programs are the compiled `examples/c/discover.c` and `erase.c`: our sets are found by the library.

- composed: four subjects alone and in scenes of two, three and four, by tuned sets on their own tokens, and by tuning all
  K and V weights for each and merging them (Custom Diffusion), at some 300 times the bytes.
- ablated: what erasing a word does to it and to the other objects, over density, beside ConceptPrune (`ablation.py`).
"""

import argparse
import json
import random
import time
from pathlib import Path

import custom_diffusion
from ablation import WORDS, ablated
from discover import open_model
from evaluate_cones import (
    SEARCH,
    add_search,
    drawn_with,
    find_all,
    number_found,
    scenes,
    shares_found,
)
from held_out import save_sheet
from model import phrase_ids, words

SUBJECTS = 4
SCENES = ((1, 12), (2, 4), (3, 6), (4, 24))  # subjects in a scene, seeds of each scene


def composed(model, weights, known, options):
    """How many subjects are found by either way, over the same scenes and seeds."""
    regular, began = custom_diffusion.regular_contexts(model), time.time()
    tuned = {
        one.name: custom_diffusion.tuned(
            model, weights, one.learn, one.word, one.noun, options.side, options.tune, seed=options.seed
        )
        for one in known
    }
    print(f"all K and V weights tuned for {len(known)} subjects: {time.time() - began:.0f} s", flush=True)
    shares, rows = {}, []
    for number, seeds in SCENES:
        rng, ways = random.Random(f"{options.seed} peers {number}"), {}
        for i, (group, captions) in enumerate(scenes(known, number, len(known), seeds, rng)):
            ours = [part for one in group for part in one.parts(weights)["tuned"]]
            theirs = [(tuned[one.name], words.with_article(one.phrase), phrase_ids(one.phrase)) for one in group]
            pictures = {"tuned sets, own tokens": drawn_with(model, weights, captions, ours, 900 + i, options)}
            with custom_diffusion.installed(weights, custom_diffusion.merged(model, weights, theirs, regular)):
                pictures["Custom Diffusion"] = drawn_with(model, weights, captions, [], 900 + i, options)
            for way, some in pictures.items():
                ways.setdefault(way, []).extend(number_found(some, group, options))
            rows.append([picture for some in pictures.values() for picture in some[:4]])
        shares[number] = shares_found(ways, number)
        print(f"scenes of {number}: {shares[number]}", flush=True)
    save_sheet(rows, options.out / "peers-composed.png")
    return shares


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_search(parser)
    parser.add_argument("--erase", type=Path, required=True, help="the compiled host program that erases")
    parser.add_argument("--full", action="store_true", help="forgets more words")
    options = parser.parse_args()
    vars(options).update(SEARCH)
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.time()
    model, weights = open_model(options)
    known = find_all(model, weights, list(words.SUBJECTS)[:SUBJECTS], options)
    report = {
        "bytes_each": {"tuned sets": [one.size for one in known], "Custom Diffusion": 4 * weights.count},
        "composed": composed(model, weights, known, options),
        "ablated": ablated(model, weights, options.erase, WORDS[: None if options.full else 2], options),
        "seconds": round(time.time() - began),
    }
    (options.out / "peers.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
