"""A host as type checkers see it; it is never run. What is right passes, and every line that is marked as wrong must be
found: an unused mark is an error.
"""

from pathlib import Path

import numpy as np
from typing_extensions import assert_type

import macula


def draws(folder: Path, noise: np.ndarray) -> np.ndarray:
    with macula.Pipeline(folder, threads=2, provider="cuda", allow_fallback=True) as pipeline:
        assert_type(pipeline, macula.Pipeline)
        images = pipeline.draw("a cat", seed=7, sampler=macula.Sampler.DDIM, noise=noise, progress=tell)
        assert_type(images, macula.Images)
        assert_type(len(images[:2]), int)
        images.save(0, folder / "cat.png")
        pipeline.draw("a cat", stepz=3)  # type: ignore[call-arg]
        pipeline.draw("a cat", steps="many")  # type: ignore[arg-type]
        pipeline.draw(7)  # type: ignore[arg-type]
        return images[0]


def tell(progress: macula.Progress) -> None:
    assert_type(progress.loss, float | None)
    assert_type(progress.preview, np.ndarray | None)
    progress.done = "much"  # type: ignore[assignment]


def finds(pipeline: macula.Pipeline, token: macula.CancelToken) -> macula.Concept:
    subject = pipeline.discover(["1.png", Path("2.png")], "<s1>", "cat", checkpoint="here", tune_steps=10, cancel=token)
    word = pipeline.discover_erasing("tiger", {"a tiger": "an animal"}, preserve=["a lion"], progress=True)
    assert_type(subject | word, macula.Concept)
    pipeline.compose(subject, macula.Term(word, strength=0.5, scope="local"))
    pipeline.compose("subject")  # type: ignore[arg-type]
    pipeline.discover_erasing("tiger", ["a tiger"])  # type: ignore[arg-type]
    subject - "cat"  # type: ignore[operator]
    return subject


def predicts(pipeline: macula.Pipeline, sample: np.ndarray) -> np.ndarray:
    schedule, cost = macula.Schedule.choose(pipeline, [sample])
    assert_type(schedule, macula.Schedule)
    assert_type(cost, float)
    try:
        return pipeline.denoise(sample, 500, pipeline.encode_prompt("a cat").context)
    except macula.MaculaError as error:
        assert_type(error.status, macula.Status | int)
        pipeline.closes()  # type: ignore[attr-defined]
        raise
