"""What the decomposed process costs and how well it draws, beside the plain one, both drawn by the library.

Needs the package `macula` (`bindings/python` with its native library). Draws prompts with combinations that were not
trained: the plain process, the decomposed one at as many steps, and the plain one at as many steps as take at least the
time of the decomposed. The processes take turns, prompt by prompt, so that other load falls on all of them. Writes
OUT/decomposed.json:

- seconds, the time ratio, and the share of the saving that the cost model predicts;
- the kernel distance (KID, Binkowski et al. 2018, arXiv 1801.01401) of the first judge's features to rendered scenes of
  other prompts of the same kind, and, with --full, the Frechet distance (Heusel et al. 2017, arXiv 1706.08500);
- how often the second judge finds every object.
"""

import argparse
import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime

import data
import evaluate
import export
import macula
import probe
import vocabulary as words

BATCH = 2  # pictures of a prompt


@dataclass
class Process:
    """A way to draw, and what came of it."""

    name: str
    steps: int
    schedule: macula.Schedule | None = None
    class_label: int = 0
    seconds: float = 0.0
    pictures: list = field(default_factory=list)

    def draw(self, pipeline, caption, options, first=0, batch=BATCH):
        """Adds pictures of a caption and the time that they took."""
        began = time.perf_counter()
        drawn = pipeline.draw(
            caption,
            steps=self.steps,
            schedule=self.schedule,
            class_label=self.class_label,
            guidance=options.guidance,
            seed=options.seed,
            first_picture=first,
            batch=batch,
        )
        self.seconds += time.perf_counter() - began
        self.pictures += [picture.copy() for picture in drawn]


def draw_in_turn(pipeline, processes, scenes, options):
    """Draws `BATCH` pictures of every scene by every process, whose noise is of the same seeds."""
    for i, scene in enumerate(scenes):
        for process in processes:
            process.draw(pipeline, data.caption(scene), options, first=BATCH * i)
        if (i + 1) % 50 == 0:
            spent = sum(process.seconds for process in processes)
            print(f"{BATCH * (i + 1)} of {BATCH * len(scenes)} pictures each, {spent:.0f} s", flush=True)


def predicted_cost(schedule, steps):
    """Pixels that the model sees in a walk of a schedule, as a share of the plain one's at as many steps."""
    turning, last = schedule.turning_points, schedule.fields["num_train_timesteps"]
    times = {round(t) for t in np.linspace(last, 0, steps + 1)} | set(turning)
    return sum(0.25 ** sum(t >= point for point in turning) for t in times if t) / steps


def speed(pipeline, schedule, steps, batch, options, runs):
    """The median time ratio of `runs` pairs of draws, and the share of the predicted saving that it is."""
    ratios = []
    for i in range(-1, runs):  # the first run at a size takes longer
        plain, decomposed = Process("plain", steps), Process("decomposed", steps, schedule)
        for process in (plain, decomposed):
            process.draw(pipeline, "a cat on a blue background", options, first=batch * max(i, 0), batch=batch)
        if i >= 0:
            ratios.append(decomposed.seconds / plain.seconds)
    ratio, predicted = float(np.median(ratios)), predicted_cost(schedule, steps)
    return {
        "steps": steps,
        "batch": batch,
        "time_ratio": ratio,
        "predicted_cost": predicted,
        "share_of_predicted_saving": (1 - ratio) / (1 - predicted),
    }


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


def frechet_distance(a, b):
    """Of the Gaussians with the means and covariances of two sets of features."""
    covariances = [np.cov(x.astype(np.float64), rowvar=False) for x in (a, b)]
    # The product of two covariances has eigenvalues that are real and not negative, but for rounding.
    root = np.sqrt(np.maximum(np.linalg.eigvals(covariances[0] @ covariances[1]).real, 0)).sum()
    apart = ((a.mean(0, dtype=np.float64) - b.mean(0, dtype=np.float64)) ** 2).sum()
    return float(apart + sum(np.trace(c) for c in covariances) - 2 * root)


def interval(statistic, prompts, seed=0, times=200):
    """`statistic(rows)` of all pictures with its 95 % interval, by halves of the prompts drawn without replacement
    (delete-half jackknife): their spread about the whole is that of the whole, and no picture stands twice in a sample,
    which would bias a kernel distance."""
    rng = np.random.default_rng(seed)

    def of(chosen):
        return statistic((BATCH * chosen[:, None] + np.arange(BATCH)).ravel())

    whole = of(np.arange(prompts))
    spread = np.array([of(rng.choice(prompts, prompts // 2, replace=False)) for _ in range(times)]) - whole
    low, high = np.quantile(spread, (0.025, 0.975))
    return {"value": float(whole), "low": float(whole + low), "high": float(whole + high)}


class Judges:
    """What the judges say of drawings, beside rendered scenes."""

    def __init__(self, folder, scenes, reference):
        self.folder, self.scenes = folder, scenes
        self.reference = features(reference, folder)
        self.wanted = [[probe.LABELS.index(noun) for noun in scene.nouns] for scene in scenes for _ in range(BATCH)]

    def see(self, process):
        """Features and whether every object was found, a row a picture."""
        pictures = np.stack(process.pictures)
        hits = evaluate.found("second", pictures, self.folder)
        right = np.array([row[wanted].all() for row, wanted in zip(hits, self.wanted)])
        return features(pictures, self.folder), right

    def distance(self, seen, rows=slice(None)):
        """The kernel distance of some features to as many of the reference, or, if those are more, to all of them."""
        reference = self.reference[rows] if len(self.reference) == len(seen) else self.reference
        return kernel_distance(seen[rows], reference)

    def rate(self, process, full):
        """The figures of one process."""
        seen, right = self.see(process)
        row = {
            "process": process.name,
            "steps": process.steps,
            "pictures": len(seen),
            "seconds": process.seconds,
            "kernel_distance": interval(lambda rows: self.distance(seen, rows), len(seen) // BATCH),
            "every_object_found": evaluate.wilson(int(right.sum()), len(right)),
        }
        if full:
            row["frechet_distance"] = frechet_distance(seen, self.reference)
        return row

    def compare(self, ours, theirs):
        """The first process against the second, on the same prompts and seeds."""
        (seen, right), (other, other_right) = self.see(ours), self.see(theirs)
        prompts = len(seen) // BATCH

        def ratio(rows):
            return self.distance(seen, rows) / self.distance(other, rows)

        def points(rows):
            return 100 * (right[rows].mean() - other_right[rows].mean())

        return {
            "against": f"{theirs.name}, {theirs.steps} steps",
            "kernel_distance_ratio": interval(ratio, prompts),
            "every_object_found_points": interval(points, prompts),
            "time_ratio": ours.seconds / theirs.seconds,
        }


def some_scenes(seed, count):
    """Scenes of prompts that were not trained."""
    scenes = evaluate.prompts(seed, -(-count // 500))
    random.Random(seed).shuffle(scenes)
    return scenes[:count]


def rendered(scenes, seed):
    """Pictures of scenes by the renderer, [N, 64, 64, 3] uint8."""
    rng, art = random.Random(seed), data.Art()
    for scene in scenes:
        scene.keys = [("google", words.OBJECTS[noun][0]) for noun in scene.nouns]
    return np.stack([data.render(scene, art, rng) for scene in scenes])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=export.FOLDER, help="ONNX folder")
    parser.add_argument("--judges", type=Path, default=probe.FOLDER)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[2] / "out")
    parser.add_argument("--steps", type=int, default=10, help="of both processes in the comparison of quality")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--timed", type=int, default=7, help="pairs of draws that each time ratio is the median of")
    parser.add_argument("--full", action="store_true", help="5,000 pictures and the Frechet distance")
    options = parser.parse_args()
    began = time.perf_counter()
    pipeline = macula.Pipeline(options.model)
    schedule = pipeline.schedule
    wanted = 5000 if options.full else options.pictures

    speeds = [
        speed(pipeline, schedule, steps, batch, options, options.timed)
        for steps, batch in ((25, 1), (25, 4), (options.steps, BATCH))
    ]
    fewer = -(-options.steps * speeds[-1]["time_ratio"] // 1)
    plain, decomposed = Process("plain", options.steps), Process("decomposed", options.steps, schedule)
    equal_time = Process("plain", int(fewer))
    processes = [plain, decomposed, equal_time]
    # The two sides of a kernel distance must be independent: other prompts than those that are drawn.
    scenes = some_scenes(options.seed, wanted // BATCH)
    judges = Judges(options.judges, scenes, rendered(some_scenes(options.seed + 1, wanted), options.seed + 1))
    draw_in_turn(pipeline, processes, scenes, options)

    report = {
        "guidance": options.guidance,
        "decomposed_time_ratio": speeds[0]["time_ratio"],
        "share_of_predicted_saving": speeds[0]["share_of_predicted_saving"],
        "speeds": speeds,
        "runs": [judges.rate(process, options.full) for process in processes],
        "decomposed": [judges.compare(decomposed, other) for other in (plain, equal_time)],
        "seconds": time.perf_counter() - began,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "decomposed.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
