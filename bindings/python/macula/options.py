"""Options by keyword, with the names, meanings and defaults of the option structs of macula.h."""

from __future__ import annotations

import os
from enum import IntEnum
from typing import Any, Mapping, TypedDict

from . import _abi
from ._library import StrPath, text


class SessionOptions(TypedDict, total=False):
    """How the models of a pipeline are run (`macula_session_options`)."""

    provider: _abi.Provider | str
    device_id: int
    allow_fallback: bool
    threads: int
    inter_op_threads: int
    affinity: str
    spinning: bool
    optimization: _abi.Optimization | str
    deterministic: bool
    memory_pattern: bool
    arena: bool
    shrink_arena: bool
    arena_as_requested: bool
    memory_limit: int
    cache_folder: StrPath
    cache_limit: int
    convolution_search: _abi.ConvolutionSearch | str
    convolution_max_workspace: bool
    tf32: bool
    fp16: bool
    builder_level: int
    max_workspace: int
    engine_cache: StrPath
    timing_cache: StrPath


class DrawOptions(TypedDict, total=False):
    """What to draw, besides the prompt (`macula_draw_options`)."""

    negative_prompt: str
    seed: int
    guidance: float
    guidance_rescale: float
    eta: float
    steps: int
    start_step: int
    batch: int
    first_picture: int
    width: int
    height: int
    sampler: _abi.Sampler | str
    karras: int
    preview: bool
    class_label: int


class TrajectoryOptions(TypedDict, total=False):
    """How a schedule is walked (`macula_trajectory_options`)."""

    batch: int
    channels: int
    height: int
    width: int
    steps: int
    start_step: int
    sampler: _abi.Sampler | str
    eta: float


class DiscoverOptions(TypedDict, total=False):
    """How to search, besides what for (`macula_discover_options`)."""

    density: float
    seed: int
    batches: int
    batch: int
    lot: int
    drawn_pictures: int
    scope: _abi.Scope | str
    method: _abi.Method | str
    searched: _abi.Searched | str
    attention: _abi.Attention | str
    save_memory: bool
    activation_bytes: int
    class_label: int
    checkpoint: StrPath
    preserve_weight: float
    tune_steps: int
    tune_rate: float
    values: _abi.Values | str
    embedding_steps: int
    embedding_rate: float


class TogetherOptions(TypedDict, total=False):
    """How to tune concepts together, besides which (`macula_together_options`)."""

    steps: int
    rate: float
    scenes: int
    seed: int
    batch: int
    lot: int
    save_memory: bool
    activation_bytes: int
    class_label: int
    checkpoint: StrPath
    values: _abi.Values | str
    timestep_power: float


def choice(kind: type[IntEnum], value: IntEnum | int | str) -> int:
    """A value of an enumeration, also by its name in any case: `"ddim"`."""
    if isinstance(value, str):
        if value.upper() not in kind.__members__:
            raise ValueError(f"{value!r} is no {kind.__name__}: {', '.join(name.lower() for name in kind.__members__)}")
        return kind[value.upper()]
    return kind(value)


def fill(options: _abi.Struct, given: Mapping[str, Any], allowed: type) -> None:
    """Puts keywords into an option struct."""
    for name, value in given.items():
        if name not in allowed.__annotations__:
            raise TypeError(f"{name!r} is no option; there are {', '.join(sorted(allowed.__annotations__))}")
        # An enumeration has the name of the fields that hold it: `convolution_search`, `ConvolutionSearch`.
        kind = getattr(_abi, "".join(word.capitalize() for word in name.split("_")), None)
        if kind is not None:
            value = choice(kind, value)
        elif isinstance(value, (str, os.PathLike)):
            value = text(value)
        try:
            setattr(options, name, value)
        except TypeError as reason:
            raise TypeError(f"{name} = {value!r}: {reason}") from None
        if isinstance(value, int) and getattr(options, name) != value:
            raise ValueError(f"{name} = {value} is out of range")
