"""Decomposed processes: schedules whose early steps see smaller states."""

from __future__ import annotations

import json
from collections.abc import Sequence
from ctypes import byref, c_double
from typing import TYPE_CHECKING, Any

import numpy as np

from ._abi import macula_choose_options, macula_component_info, macula_image, macula_schedule_info
from ._library import Handle, StrPath, check, info, library, receive, text
from .images import view

if TYPE_CHECKING:
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
