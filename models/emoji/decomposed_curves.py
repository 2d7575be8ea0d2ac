"""Schedules along curves over turning points and attenuation, chosen by hand and by the automatic rule, and the plot of
these and of the numbers of steps.

The trained model was trained for one schedule; along its curves it is asked for others, which shows how far it carries. The
ordinary models, which are the same UNet told that it draws plain pictures of 64 or of 32 pixels, were trained for none, so
that their curves show what the turning point itself does. All points draw the same prompts with the same seeds, so that they
differ by less than their intervals say.

Between the two stands a mixture: the trained process, but the UNet at full size is told that it draws plain pictures. A
lifted component has no signal at first, and the network's error in it is magnified by sigma / (alpha_bar fade + sigma^2):
some of it stays as a grain on even grounds. Told that nothing fades, the network takes the component for stronger than it is
and draws it bolder, so that it may fade less for as much detail. Nor is this stage bound to the trained turning point then.
The other turning point is tried later too: from the same means of blocks and the same noise, the UNet at 16 pixels predicts
far worse than at 32.
"""

from dataclasses import dataclass

import macula
from plot import Panel, grid

STRETCHES = (0.67, 0.83, 1.0, 1.17, 1.33)  # of the trained turning points
FADES = (1.0, 0.3, 0.1, 0.03, 0.01)  # r at the trained turning points
TRAINED_BUDGETS = (1e-3, 1e-4, 1e-5, 1e-6)  # nats per dimension
ORDINARY_TURNING_POINTS = (200, 350, 500, 650, 800, 900)
ORDINARY_BUDGETS = (3e-2, 1e-2, 3e-3, 1e-3)
PLAIN_LABELS = [0, 4]  # of 64 and of 32 pixels
MIXED_TURNING_POINTS = ((360, 720), (400, 880), (440, 900))
MIXED_FADE = 0.3


@dataclass
class Point:
    """One schedule on a curve."""

    models: str  # "trained", "ordinary" or "mixed"
    over: str  # "turning points" or "attenuation"
    chosen: str  # "by hand" or "by rule"
    schedule: macula.Schedule
    drop_error_budget: float | None = None

    def described(self, spreads):
        """What it is, for the JSON file; `spreads` are root mean squares of what is dropped at each turning point."""
        fields = self.schedule.fields
        dropped = list(enumerate(zip(self.schedule.turning_points, spreads)))
        return {
            "models": self.models,
            "over": self.over,
            "chosen": self.chosen,
            "drop_error_budget": self.drop_error_budget,
            "turning_points": self.schedule.turning_points,
            "attenuation": fields["attenuation"],
            "lift_std": fields.get("lift_std"),
            "drop_errors": [self.schedule.drop_error(i, turning - 1, std**2) for i, (turning, std) in dropped],
        }


def points(pipeline, pictures):
    """The points of all curves, and the spreads of the two finest components of the pictures."""
    trained = pipeline.schedule.fields
    fade = trained["attenuation"]["r"], trained["attenuation"]["q"]

    def of(fields, **changes):
        return macula.Schedule.from_json({**fields, **changes})

    def by_rule(budget, turning_points, attenuation):
        chosen, _ = macula.Schedule.choose(
            pipeline, pictures, turning_points=turning_points, drop_error=budget, attenuation=attenuation
        )
        return chosen.fields

    spreads = by_rule(1e-3, 2, fade)["lift_std"]
    plain = {"attenuation": {"r": 1.0, "q": 1.0}, "stage_class_labels": PLAIN_LABELS, "ordinary_models": True}
    plain = {**trained, **plain, "stage_sizes": trained["stage_sizes"][:2], "lift_std": spreads[:1]}
    found = []
    for stretch in STRETCHES:
        turning = [round(stretch * t) for t in trained["turning_points"]]
        found.append(Point("trained", "turning points", "by hand", of(trained, turning_points=turning)))
    for budget in TRAINED_BUDGETS:
        schedule = of(by_rule(budget, 2, fade), stage_class_labels=trained["stage_class_labels"])
        found.append(Point("trained", "turning points", "by rule", schedule, budget))
    for turning in ORDINARY_TURNING_POINTS:
        found.append(Point("ordinary", "turning points", "by hand", of(plain, turning_points=[turning])))
    for budget in ORDINARY_BUDGETS:
        turning = by_rule(budget, 1, (1.0, 1.0))["turning_points"]
        found.append(Point("ordinary", "turning points", "by rule", of(plain, turning_points=turning), budget))
    mixed = {**trained, "stage_class_labels": [PLAIN_LABELS[0], *trained["stage_class_labels"][1:]]}
    for turning in MIXED_TURNING_POINTS:
        schedule = of(mixed, turning_points=list(turning), attenuation={"r": MIXED_FADE, "q": fade[1]})
        found.append(Point("mixed", "turning points", "by hand", schedule))
    for r in FADES:
        attenuation = {"r": r, "q": fade[1]}
        found.append(Point("trained", "attenuation", "by hand", of(trained, attenuation=attenuation)))
        found.append(Point("mixed", "attenuation", "by hand", of(mixed, attenuation=attenuation)))
    return found, spreads


def plot(rows, plain, over_steps):
    """One picture of the points that were measured; `plain` is the row of the plain process on the same prompts,
    `over_steps` are rows of both processes at several numbers of steps."""
    measures = {
        "kernel distance to training's scenes": lambda row: [row["kernel_distance"][k] for k in ("value", "low", "high")],
        "every object found, %": lambda row: [100 * row["every_object_found"][k] for k in ("share", "low", "high")],
    }
    panels = []
    for title, of in measures.items():
        level = "plain", of(plain)[0]
        cost = Panel(title, "predicted cost of the turning points, the plain process's being 1", level=level)
        fade = Panel(title, "r of the attenuation, at the trained turning points", logarithmic=True, level=level)
        for row in rows:
            over_cost = row["over"] == "turning points"
            panel, x = (cost, row["predicted_cost"]) if over_cost else (fade, row["attenuation"]["r"])
            panel.curves.setdefault(f"{row['models']}, {row['chosen']}", []).append((x, *of(row)))
        time = Panel(title, "ms a picture, at several numbers of steps")
        for row in over_steps:
            point = 1000 * row["seconds"] / row["pictures"], *of(row)
            time.curves.setdefault(row["process"], []).append(point)
        panels += [time, cost, fade]
    return grid(panels, 3)
