"""What the decomposed process costs and how well it draws, beside the plain one, both drawn by the library.

Needs the package `macula` (`bindings/python` with its native library). Draws prompts with combinations that were not
trained: at each of some numbers of steps the plain process, the decomposed one, and the plain one at as many steps as take
at least the time of the decomposed. The processes take turns, prompt by prompt, so that other load falls on all of them.
Writes OUT/decomposed.json and OUT/decomposed-curves.png:

- time ratios, and the share of the saving that the cost model predicts, drawn with guidance, as draws are by default, and
  without;
- the kernel distance of the first judge's features to scenes of the same prompts as the model was trained on them and, with
  --full, the Frechet distance. Both are between distributions, so drawing is without guidance, which trades variety for
  clarity. The scenes themselves are rated too: that is what a perfect model would get;
- how often the second judge finds every object;
- the same for smaller samples along curves over steps, turning points and attenuation (`decomposed_curves.py`).

More steps need not draw better: what few steps blur together, the network's own errors in many steps put at odds, such as
objects out of their places. Compare processes where the plain one still gains by a step.
"""

import argparse
import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import data
import decomposed_curves as curves
import evaluate
import export
import macula
import probe
import vocabulary as words
from distances import KernelDistance, features, frechet_distance, interval

BATCH = 2  # pictures of a prompt
RENDERINGS = 4  # of a prompt in a reference
TIDY = 0.75  # share of the reference's scenes, as at the end of training
STEPS_OF_CURVES = (3, 4, 5, 6, 8, 10)
GUIDED, UNGUIDED = 7.5, 1.0  # as draws are by default, and without the second prediction of each step


@dataclass
class Process:
    """A way to draw, and what came of it."""

    name: str
    steps: int
    schedule: macula.Schedule | None = None
    seconds: float = 0.0
    pictures: list = field(default_factory=list)

    def draw(self, pipeline, caption, options, first=0, batch=BATCH, guidance=None):
        """Adds pictures of a caption and the time that they took."""
        began = time.perf_counter()
        drawn = pipeline.draw(
            caption,
            steps=self.steps,
            schedule=self.schedule,
            guidance=options.guidance if guidance is None else guidance,
            seed=options.seed,
            first_picture=first,
            batch=batch,
        )
        self.seconds += time.perf_counter() - began
        self.pictures += [picture.copy() for picture in drawn]

    def predicted_cost(self):
        """Pixels that the model sees, as a share of those of the plain process at as many steps."""
        if self.schedule is None:
            return 1.0
        turning, last = self.schedule.turning_points, self.schedule.fields["num_train_timesteps"]
        times = {round(t) for t in np.linspace(last, 0, self.steps + 1)} | set(turning)
        return sum(0.25 ** sum(t >= point for point in turning) for t in times if t) / self.steps


def draw_in_turn(pipeline, processes, scenes, options):
    """Draws `BATCH` pictures of every scene by every process; picture for picture their noise is of the same seed."""
    for i, scene in enumerate(scenes):
        for process in processes:
            process.draw(pipeline, data.caption(scene), options, first=BATCH * i)
        if (i + 1) % 50 == 0:
            spent = sum(process.seconds for process in processes)
            print(f"{BATCH * (i + 1)} of {BATCH * len(scenes)} pictures each, {spent:.0f} s", flush=True)


def speed(pipeline, schedule, steps, batch, options, guidance):
    """The median time ratio of pairs of draws, and the share of the predicted saving that it is."""
    ratios = []
    for i in range(options.timed + 1):  # the first run at a size takes longer
        plain, decomposed = Process("plain", steps), Process("decomposed", steps, schedule)
        for process in (plain, decomposed):
            process.draw(pipeline, "a cat on a blue background", options, batch * i, batch, guidance)
        ratios.append(decomposed.seconds / plain.seconds)
    ratio, predicted = float(np.median(ratios[1:])), decomposed.predicted_cost()
    return {
        "steps": steps,
        "batch": batch,
        "guidance": guidance,
        "time_ratio": ratio,
        "predicted_cost": predicted,
        "share_of_predicted_saving": (1 - ratio) / (1 - predicted),
    }


class Judges:
    """What the judges say of drawings, beside rendered scenes: `reference` are pictures, `RENDERINGS` of a scene."""

    def __init__(self, folder, scenes, reference):
        self.folder = folder
        self.reference = features(reference, folder)
        self.distance = KernelDistance(self.reference, RENDERINGS)
        self.wanted = [[probe.LABELS.index(noun) for noun in scene.nouns] for scene in scenes for _ in range(BATCH)]

    def see(self, pictures):
        """Features, and whether every object was found, a row a picture of the first scenes."""
        pictures = np.stack(pictures)
        hits = evaluate.found("second", pictures, self.folder)
        right = np.array([row[wanted].all() for row, wanted in zip(hits, self.wanted)])
        return features(pictures, self.folder), right

    def rate(self, pictures):
        """Figures of pictures of the first scenes."""
        seen, right = self.see(pictures)
        prompts = len(seen) // BATCH
        return {
            "pictures": len(seen),
            "kernel_distance": interval(self.distance.of(seen, BATCH), prompts),
            "every_object_found": evaluate.wilson(int(right.sum()), len(right)),
        }

    def compare(self, ours, theirs):
        """The first process against the second, on the same prompts and seeds."""
        (seen, right), (other, other_right) = self.see(ours.pictures), self.see(theirs.pictures)
        prompts = len(seen) // BATCH
        own, others = self.distance.of(seen, BATCH), self.distance.of(other, BATCH)
        won = 100 * (right.astype(int) - other_right).reshape(prompts, BATCH).mean(1)
        return {
            "steps": ours.steps,
            "against": f"{theirs.name}, {theirs.steps} steps",
            "time_ratio": ours.seconds / theirs.seconds,
            "kernel_distance_ratio": interval(lambda chosen: own(chosen) / others(chosen), prompts),
            "every_object_found_points": interval(lambda chosen: won[chosen].mean(), prompts),
        }


def compare_processes(pipeline, judges, scenes, options):
    """The comparison of quality, and the plain processes that were drawn for it, by steps."""
    schedule = pipeline.schedule
    speeds = [speed(pipeline, schedule, steps, BATCH, options, options.guidance) for steps in options.steps]
    fewer = [int(np.ceil(timed["steps"] * timed["time_ratio"])) for timed in speeds]
    plain = {steps: Process("plain", steps) for steps in sorted({*options.steps, *fewer})}
    decomposed = {steps: Process("decomposed", steps, schedule) for steps in options.steps}
    processes = [*plain.values(), *decomposed.values()]
    draw_in_turn(pipeline, processes, scenes, options)
    runs = []
    for process in processes:
        row = {"process": process.name, "steps": process.steps, "seconds": process.seconds}
        row |= judges.rate(process.pictures)
        if options.full:
            row["frechet_distance"] = frechet_distance(judges.see(process.pictures)[0], judges.reference)
        runs.append(row)
    pairs = [(decomposed[own], plain[other]) for own, less in zip(options.steps, fewer) for other in (own, less)]
    return {"speed": speeds, "runs": runs, "decomposed": [judges.compare(*pair) for pair in pairs]}, plain


def draw_point(pipeline, judges, scenes, process, options):
    """Draws the scenes by a process: its cost and what the judges say."""
    for i, scene in enumerate(scenes):
        process.draw(pipeline, data.caption(scene), options, first=BATCH * i)
    return {"predicted_cost": process.predicted_cost(), "seconds": process.seconds} | judges.rate(process.pictures)


def measure_steps(pipeline, judges, scenes, options):
    """A row for every number of steps of either process."""
    rows = []
    for steps in STEPS_OF_CURVES:
        for process in (Process("plain", steps), Process("decomposed", steps, pipeline.schedule)):
            row = {"process": process.name, "steps": steps}
            rows.append(row | draw_point(pipeline, judges, scenes, process, options))
            print(f"{process.name}, {steps} steps: {process.seconds:.0f} s", flush=True)
    return rows


def measure_curves(pipeline, judges, scenes, rendering, steps, options):
    """A row for every point of the curves over turning points and attenuation."""
    found, spreads = curves.points(pipeline, list(rendering))
    rows = []
    for point in found:
        process = Process("decomposed", steps, point.schedule)
        rows.append(point.described(spreads) | draw_point(pipeline, judges, scenes, process, options))
        print(f"{point.models}, {point.chosen}: {point.schedule.turning_points}, {process.seconds:.0f} s", flush=True)
    return rows


def some_scenes(seed, count):
    """Scenes of prompts that were not trained."""
    scenes = evaluate.prompts(seed, -(-count // 500))
    random.Random(seed).shuffle(scenes)
    return scenes[:count]


def rendered(scenes, each, seed):
    """`each` pictures of every scene by the renderer: [N, 64, 64, 3] uint8."""
    rng, art, pictures = random.Random(seed), data.Art(), []
    for scene in scenes:
        keys = [("google", words.OBJECTS[noun][0]) for noun in scene.nouns]
        for _ in range(each):
            variant = data.Scene(keys, scene.nouns, scene.colour, tidy=rng.random() < TIDY)
            pictures.append(data.render(variant, art, rng))
    return np.stack(pictures)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=export.FOLDER, help="ONNX folder")
    parser.add_argument("--judges", type=Path, default=probe.FOLDER)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[2] / "out")
    parser.add_argument("--steps", type=int, nargs="+", default=[6, 10], help="of both processes in the comparisons of quality; the last for the curves")
    parser.add_argument("--guidance", type=float, default=UNGUIDED, help="of the pictures whose quality is compared")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--curve-pictures", type=int, default=160, help="of each point of the curves")
    parser.add_argument("--timed", type=int, default=9, help="pairs of draws that each time ratio is the median of")
    parser.add_argument("--full", action="store_true", help="5,000 pictures and the Frechet distance")
    options = parser.parse_args()
    began = time.perf_counter()
    pipeline = macula.Pipeline(options.model)
    wanted = 5000 if options.full else options.pictures
    drawn = [(guidance, batch) for guidance in (GUIDED, UNGUIDED) for batch in (1, 4)]
    speeds = [speed(pipeline, pipeline.schedule, 25, batch, options, guidance) for guidance, batch in drawn]
    scenes = some_scenes(options.seed, wanted // BATCH)
    reference = rendered(scenes, RENDERINGS, options.seed)
    judges = Judges(options.judges, scenes, reference)
    themselves = judges.rate(list(rendered(scenes, BATCH, options.seed + 1)))
    compared, plain = compare_processes(pipeline, judges, scenes, options)
    few, steps = scenes[: options.curve_pictures // BATCH], options.steps[-1]
    over_steps = measure_steps(pipeline, judges, few, options)
    rows = measure_curves(pipeline, judges, few, reference, steps, options)
    beside = judges.rate(plain[steps].pictures[: BATCH * len(few)])
    report = {
        "guidance": options.guidance,
        "decomposed_time_ratio": speeds[0]["time_ratio"],
        "share_of_predicted_saving": speeds[0]["share_of_predicted_saving"],
        "speeds": [*speeds, *compared.pop("speed")],
        "scenes_themselves": themselves,
        **compared,
        "over_steps": over_steps,
        "curves": {"steps": steps, "plain": beside, "points": rows},
        "seconds": time.perf_counter() - began,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "decomposed.json").write_text(json.dumps(report, indent=2) + "\n")
    curves.plot(rows, beside, over_steps).save(options.out / "decomposed-curves.png")
    print(json.dumps({key: value for key, value in report.items() if key not in ("curves", "over_steps")}, indent=2))


if __name__ == "__main__":
    main()
