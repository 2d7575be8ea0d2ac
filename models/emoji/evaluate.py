"""Draws 500 prompts with combinations that were not trained and lets the judges count.

Runs the exported ONNX folder. Writes OUT/model.json and the sheet OUT/model.png. The tier is decided by the
second judge, which nothing else uses. One object: held-out (object, colour) pairs; two and four objects:
at least one held-out pair of objects. Intervals are Wilson's at 95 %.
"""

import argparse
import json
import random
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import onnxruntime

import data
import export
import probe
import sampling
import vocabulary as words

COUNTS = {1: 200, 2: 200, 4: 100}
TIERS = {  # at least so many objects; shares for one, both of two, three of four
    1: (16, 0.95, 0.80, None),
    2: (40, 0.95, 0.85, 0.80),
}


def prompts(seed, times=1):
    """500 scenes times `times`: for each count of objects, drawn evenly over the objects and held-out combinations."""
    rng = random.Random(seed)
    scenes = []
    for count, number in COUNTS.items():
        number *= times
        while number:
            nouns = rng.sample(list(words.OBJECTS), count)
            colours = list(words.COLOURS)
            if count == 1:
                colours = [c for c in colours if words.colour_is_held_out(nouns[0], c)]
            elif not any(words.pair_is_held_out(*pair) for pair in combinations(nouns, 2)):
                continue
            if colours:
                scenes.append(data.Scene([], nouns, rng.choice(colours)))
                number -= 1
    return scenes


def wilson(successes, trials, z=1.96):
    """Share and 95 % interval."""
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * (share * (1 - share) / trials + z * z / (4 * trials**2)) ** 0.5 / (1 + z * z / trials)
    return {"share": round(share, 4), "low": round(centre - half, 4), "high": round(centre + half, 4), "of": trials}


def found(name, pictures, folder):
    """[N, labels] bool: what the judge `name` finds in [N, 64, 64, 3] uint8 pictures."""
    thresholds = json.loads((folder / "judges.json").read_text())[name]["thresholds"]
    session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
    x = pictures.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    p = np.concatenate([session.run(["probabilities"], {"picture": x[i : i + 250]})[0] for i in range(0, len(x), 250)])
    return p > np.array([thresholds[label] for label in probe.LABELS])


def score(hits, scenes):
    """Shares of pictures that are right, by number of objects, and how often a single object is right."""
    right = {1: [], 2: [], 4: []}
    three_of_four, strangers = [], []
    single = {noun: [] for noun in words.OBJECTS}
    for row, scene in zip(hits, scenes):
        seen = [row[probe.LABELS.index(noun)] for noun in scene.nouns]
        right[len(seen)].append(all(seen))
        if len(seen) == 1:
            single[scene.nouns[0]].append(seen[0])
        if len(seen) == 4:
            three_of_four.append(sum(seen) >= 3)
        wanted = {probe.LABELS.index(noun) for noun in scene.nouns}
        strangers.append(any(row[i] for i in range(len(words.OBJECTS)) if i not in wanted))
    return {
        "one_object": wilson(sum(right[1]), len(right[1])),
        "both_of_two": wilson(sum(right[2]), len(right[2])),
        "three_of_four": wilson(sum(three_of_four), len(three_of_four)),
        "all_of_four": wilson(sum(right[4]), len(right[4])),
        "another_object_found": wilson(sum(strangers), len(strangers)),
        "one_object_by_noun": {noun: f"{sum(s)}/{len(s)}" for noun, s in single.items()},
    }


def tier_of(figures):
    """The highest tier whose shares are all reached, 0 for none."""
    shares = [figures[name]["share"] for name in ("one_object", "both_of_two", "three_of_four")]
    reached = 0
    for tier, (objects, *needed) in TIERS.items():
        if len(words.OBJECTS) >= objects and all(n is None or s >= n for s, n in zip(shares, needed)):
            reached = tier
    return reached


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=export.FOLDER, help="ONNX folder")
    parser.add_argument("--judges", type=Path, default=probe.FOLDER)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[2] / "out")
    parser.add_argument("--process", choices=("plain", "decomposed"), default="plain")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--full", action="store_true", help="2,000 prompts instead of 500")
    options = parser.parse_args()
    if not (options.judges / "judges.json").exists():
        parser.error(f"{options.judges} holds no judges; train them with models/emoji/probe.py")
    model, tokenizer = sampling.OnnxModel(options.model), words.build_tokenizer()
    draw = getattr(sampling, options.process)
    scenes = prompts(options.seed, 4 if options.full else 1)
    began, pictures = time.time(), []
    for start in range(0, len(scenes), 20):
        ids, empty = sampling.encode(tokenizer, [data.caption(scene) for scene in scenes[start : start + 20]])
        pictures.append(draw(model, ids, empty, options.steps, options.guidance, seed=1000 * options.seed + start))
    pictures = np.concatenate(pictures)
    report = {
        "prompts": len(scenes),
        "objects": len(words.OBJECTS),
        "process": options.process,
        "steps": options.steps,
        "guidance": options.guidance,
        "seconds": round(time.time() - began, 1),
        "training": json.loads((options.model / "training.json").read_text()),
    }
    for name in ("first", "second"):
        report[name + "_judge"] = score(found(name, pictures, options.judges), scenes)
    report["tier"] = tier_of(report["second_judge"])
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "model.json").write_text(json.dumps(report, indent=2) + "\n")
    shown = [i for count in COUNTS for i in [j for j, s in enumerate(scenes) if len(s.nouns) == count][:40]]
    data.sheet([pictures[i] for i in shown], 20).save(options.out / "model.png")
    print(json.dumps({key: value for key, value in report.items() if key != "training"}, indent=2))


if __name__ == "__main__":
    main()
