"""Tune Concepts Together: concepts that were found alone learn to share a picture."""

from __future__ import annotations

import macula

from .concepts import CATEGORY
from .jobs import SearchProgress, interruptible
from .models import pipeline_of

#: The most concepts of the node; a concept and its pictures are two inputs.
MOST, LEAST = 4, 2


class TuneConceptsTogether:
    """Tunes two to four concepts together, on scenes of their subjects side by side, so that these can share a picture.
    Interrupt stops it at once."""

    CATEGORY, FUNCTION = CATEGORY, "tune"
    RETURN_TYPES = ("MACULA_CONCEPT",) * MOST
    RETURN_NAMES = tuple(f"concept_{at}" for at in range(1, MOST + 1))

    @classmethod
    def INPUT_TYPES(cls):
        def pairs(numbers):
            return {key: (kind,) for at in numbers for key, kind in _inputs(at)}

        return {
            "required": {
                "model": ("MODEL",),
                **pairs(range(1, LEAST + 1)),
                "steps": ("INT", {"default": 300, "min": 1, "max": 100000}),
                "scenes": ("INT", {"default": 128, "min": 1, "max": 4096}),
                "class_label": ("INT", {"default": 0, "min": 0, "max": 1000}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**64 - 1}),
            },
            "optional": pairs(range(LEAST + 1, MOST + 1)),
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    def tune(self, model, steps, scenes, class_label, seed, unique_id=None, **given):
        pipeline = pipeline_of(model, "tuning concepts together")
        companions, numbers = [], []
        for at in range(1, MOST + 1):
            concept, pictures = (given.get(key) for key, _ in _inputs(at))
            if (concept is None) != (pictures is None):
                raise ValueError(f"concept_{at} and pictures_{at} belong together: connect both or none")
            if concept is not None:
                shown = (pictures[..., :3].clamp(0, 1) * 255).round().byte().cpu().numpy()
                companions.append(macula.Companion(concept, list(shown)))
                numbers.append(at)
        with interruptible() as cancel:
            tuned = pipeline.tune_together(
                companions, steps=steps, scenes=scenes, class_label=class_label, seed=seed, cancel=cancel,
                progress=SearchProgress(0, steps, unique_id),
            )
        by_number = dict(zip(numbers, tuned))
        return tuple(by_number.get(at) for at in range(1, MOST + 1))


def _inputs(at):
    return (f"concept_{at}", "MACULA_CONCEPT"), (f"pictures_{at}", "IMAGE")
