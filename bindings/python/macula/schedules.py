"""Decomposed processes: schedules whose early steps see smaller states, and walks of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from ctypes import byref, c_double
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ._abi import (
    macula_choose_options, macula_component_info, macula_image, macula_schedule_info, macula_trajectory_info,
    macula_trajectory_options,
)
from ._library import Closable, Handle, StrPath, check, info, library, numbers, receive, tensor, text
from .images import view
from .options import TrajectoryOptions, fill

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .pipeline import Pipeline


class Schedule(Handle):
    """A decomposed process as data, which never changes; for `Pipeline.draw`."""

    def __init__(self, pointer: int):
        super().__init__(pointer, library.macula_schedule_free)
        self._info = info(macula_schedule_info, library.macula_schedule_get_info, pointer)

    @classmethod
    def from_json(cls, fields: str | dict[str, Any]) -> Schedule:
        """Reads a schedule, given as text or as its fields; `macula_schedule_from_json` has their names and ranges."""
        words = fields if isinstance(fields, str) else json.dumps(fields)
        return cls(receive(library.macula_schedule_from_json, text(words)))

    @classmethod
    def choose(
        cls,
        pipeline: Pipeline,
        pictures: Sequence[np.ndarray],
        *,
        turning_points: int = 2,
        drop_error: float = 1e-3,
        attenuation: tuple[float, float] = (0.1, 2.0),
        stage_costs: Sequence[float] | None = None,
        plot: StrPath | None = None,
    ) -> tuple[Schedule, float]:
        """The earliest turning points within a budget, and the cost of a walk over all times as a share of the plain one's.

        - `pictures`: arrays `[H, W, 3]` like those that the model draws.
        - `turning_points`: the most; `drop_error`: the most that dropping a component may cost, in nats per dimension.
        - `attenuation`: r in (0, 1] and q in [1, 1000].
        - `stage_costs`: of one model call at each stage, `turning_points + 1` numbers in any unit.
        - `plot`: an SVG file that is written.
        """
        wanted = macula_choose_options.new()
        views = [view(one) for one in pictures]
        wanted.pictures, wanted.picture_count = (macula_image * len(views))(*views), len(views)
        wanted.turning_points, wanted.drop_error = turning_points, drop_error
        wanted.attenuation_r, wanted.attenuation_q = attenuation
        if stage_costs is not None:
            if len(stage_costs) != turning_points + 1:
                raise ValueError(f"{len(stage_costs)} stage costs for {turning_points + 1} stages")
            wanted.stage_costs = (c_double * len(stage_costs))(*stage_costs)
        wanted.plot = text(plot) if plot is not None else None
        cost = c_double()
        chosen = receive(library.macula_schedule_choose, pipeline.pointer, byref(wanted), byref(cost))
        return cls(chosen), cost.value

    @property
    def fields(self) -> dict[str, Any]:
        """What `from_json` reads as this schedule."""
        return json.loads(self._info.json)

    @property
    def turning_points(self) -> list[int]:
        """Times from which on the state has half the sides."""
        return self.fields["turning_points"]

    def drop_error(self, component: int, time: int, mean_square: float) -> float:
        """What it costs to take a component, 0 the finest, for noise at a time: nats per dimension, if its clean coordinates
        have this mean square."""
        found = info(macula_component_info, library.macula_schedule_get_component, self.pointer, component, time)
        return found.drop_error * mean_square

    def check(self, pipeline: Pipeline, size: tuple[int, int] = (0, 0), batch: int = 1) -> None:
        """Raises unless the pipeline's model can be walked by it to pictures of a size (width, height); makes ready for as
        many states at once: the pictures of a draw, twice as many with guidance."""
        check(library.macula_schedule_check(self.pointer, pipeline.pointer, *size, batch, None))

    def begin(self, **options: Unpack[TrajectoryOptions]) -> Trajectory:
        """Begins to walk it, for a sampler loop of your own; see `TrajectoryOptions`."""
        walk = macula_trajectory_options.new()
        fill(walk, options, TrajectoryOptions)
        begun = receive(library.macula_schedule_begin, self.pointer, byref(walk))
        return Trajectory(begun, (walk.batch, walk.channels))


class Trajectory(Closable):
    """A walk under way, from noise to clean states: what each step needs, and its arithmetic.

    States are float32 arrays `[batch, channels, height, width]` whose sides double at each lift.
    """

    def __init__(self, pointer: int, states: tuple[int, int]):
        super().__init__(pointer, library.macula_trajectory_free)
        self._states = states

    @property
    def now(self) -> Moment:
        """Where it is, and what the coming step needs."""
        found = info(macula_trajectory_info, library.macula_trajectory_get_info, self.pointer)
        return Moment(
            step=found.step, step_count=found.step_count, done=bool(found.done), stage=found.stage,
            timestep=found.timestep, input_scale=found.input_scale,
            class_label=found.class_label if found.has_class_label else None,
            shape=(*self._states, found.height, found.width),
            next_shape=(*self._states, found.next_height, found.next_width),
            needs_noise=bool(found.needs_noise), lifts=bool(found.lifts),
        )

    def start(self, noise: np.ndarray, clean: np.ndarray | None = None) -> np.ndarray:
        """The state before the first step, of standard normal noise of its shape and, with a `start_step`, of clean states."""
        state = np.empty(self.now.shape, dtype=np.float32)
        check(library.macula_trajectory_start(self.pointer, numbers(noise), numbers(clean), byref(tensor(state))))
        return state

    def step(
        self,
        sample: np.ndarray,
        prediction: np.ndarray,
        noise: np.ndarray | None = None,
        lift_noise: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Takes the coming step from the model's prediction for `input_scale * sample`: the next state, and the clean one
        as it is predicted now.

        - `noise`: standard normal, of the state's shape, if `needs_noise`; `lift_noise`: of the next shape, if `lifts`.
        """
        now = self.now
        state, clean = (np.empty(shape, dtype=np.float32) for shape in (now.next_shape, now.shape))
        given = (numbers(one) for one in (sample, prediction, noise, lift_noise))
        check(library.macula_trajectory_step(self.pointer, *given, byref(tensor(state)), byref(tensor(clean))))
        return state, clean


@dataclass(frozen=True)
class Moment:
    """Where a trajectory is, and what its coming step needs.

    - `timestep`, `class_label`: what the model is told; `input_scale`: what it wants the state multiplied by.
    - `shape`, `next_shape`: of the state before and after the step.
    """

    step: int
    step_count: int
    done: bool
    stage: int
    timestep: float
    input_scale: float
    class_label: int | None
    shape: tuple[int, int, int, int]
    next_shape: tuple[int, int, int, int]
    needs_noise: bool
    lifts: bool
