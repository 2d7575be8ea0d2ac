"""What the decomposed process costs and how well it draws, beside the plain one.

Runs the exported ONNX folder on prompts with combinations that were not trained: the plain process, the decomposed one at
as many steps, and the plain one at about as much time as the decomposed takes. Writes OUT/decomposed.json: seconds, the
time ratio and the share of the predicted saving that it is; the kernel distance (KID, Binkowski et al. 2018, arXiv
1801.01401, of the first judge's features to rendered scenes of other prompts of the same kind) with resampled intervals;
and how often the second judge finds every object.
"""

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import onnxruntime

import data
import evaluate
import export
import network as net
import probe
import sampling
import vocabulary as words

BATCH = 20


def features(pictures, folder):
    """[N, D] of the first judge for [N, 64, 64, 3] uint8 pictures."""
    session = onnxruntime.InferenceSession(folder / "first.onnx", providers=["CPUExecutionProvider"])
    x = pictures.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    return np.concatenate([session.run(["features"], {"picture": x[i : i + 250]})[0] for i in range(0, len(x), 250)])


def kernel_distance(a, b):
    """Unbiased squared maximum mean discrepancy under the kernel (x . y / D + 1)^3."""

    def kernel(x, y):
        return (x.astype(np.float64) @ y.T / x.shape[1] + 1) ** 3

    def within(x):
        k = kernel(x, x)
        return (k.sum() - np.trace(k)) / (len(x) * (len(x) - 1))

    return within(a) + within(b) - 2 * kernel(a, b).mean()


def interval(statistic, count, seed=0, times=200):
    """`statistic(rows)` of all rows with its 95 % interval, by halves drawn without replacement (delete-half jackknife):
    their spread about the whole is that of the whole, and no picture stands twice in a sample, which would bias a kernel
    distance."""
    rng = np.random.default_rng(seed)
    whole = statistic(np.arange(count))
    spread = np.array([statistic(rng.choice(count, count // 2, replace=False)) for _ in range(times)]) - whole
    low, high = np.quantile(spread, (0.025, 0.975))
    return {"value": whole, "low": whole + low, "high": whole + high}


def draw(name, model, tokenizer, scenes, steps, guidance, seed):
    """Pictures of all scenes and the seconds that they took."""
    pictures, seconds = [], 0.0
    for start in range(0, len(scenes), BATCH):
        ids, empty = sampling.encode(tokenizer, [data.caption(scene) for scene in scenes[start : start + BATCH]])
        began = time.perf_counter()
        pictures.append(getattr(sampling, name)(model, ids, empty, steps, guidance, seed=1000 * seed + start))
        seconds += time.perf_counter() - began
    return np.concatenate(pictures), seconds


def predicted_cost(steps):
    """Pixels that the decomposed process sees, as a share of the plain one's at as many steps."""
    times = {round(t) for t in np.linspace(net.STEPS, 0, steps + 1)} | set(net.TURNING_POINTS)
    return sum(0.25 ** sum(t >= turning for turning in net.TURNING_POINTS) for t in times if t) / steps


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=export.FOLDER, help="ONNX folder")
    parser.add_argument("--judges", type=Path, default=probe.FOLDER)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[2] / "out")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--full", action="store_true", help="5,000 pictures")
    options = parser.parse_args()
    model, tokenizer = sampling.OnnxModel(options.model), words.build_tokenizer()
    wanted = 5000 if options.full else options.pictures

    def some_scenes(seed):
        scenes = evaluate.prompts(seed, -(-wanted // 500))
        random.Random(seed).shuffle(scenes)
        return scenes[:wanted]

    # The two sides of a kernel distance must be independent: other prompts than those that are drawn.
    scenes, others = some_scenes(options.seed), some_scenes(options.seed + 1)
    rng, art = random.Random(options.seed + 1), data.Art()
    for scene in others:
        scene.keys = [("google", words.OBJECTS[noun][0]) for noun in scene.nouns]
    reference = features(np.stack([data.render(scene, art, rng) for scene in others]), options.judges)
    for name in ("plain", "decomposed"):  # the first run at a size takes longer
        draw(name, model, tokenizer, scenes[:BATCH], 4, options.guidance, options.seed)

    report = {"pictures": len(scenes), "guidance": options.guidance}

    def judged(name, steps):
        pictures, seconds = draw(name, model, tokenizer, scenes, steps, options.guidance, options.seed)
        seen = features(pictures, options.judges)
        hits = evaluate.found("second", pictures, options.judges)
        right = [all(row[probe.LABELS.index(noun)] for noun in scene.nouns) for row, scene in zip(hits, scenes)]
        return {
            "process": name,
            "steps": steps,
            "seconds": seconds,
            "kernel_distance": interval(lambda rows: kernel_distance(seen[rows], reference[rows]), len(scenes)),
            "every_object_found": evaluate.wilson(sum(right), len(right)),
        }

    plain, decomposed = judged("plain", options.steps), judged("decomposed", options.steps)
    ratio = decomposed["seconds"] / plain["seconds"]
    report["decomposed_time_ratio"] = ratio
    report["predicted_cost"] = predicted_cost(options.steps)
    report["share_of_predicted_saving"] = (1 - ratio) / (1 - report["predicted_cost"])
    report["runs"] = [plain, decomposed, judged("plain", max(1, round(options.steps * ratio)))]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "decomposed.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
