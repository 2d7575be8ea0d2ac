"""Nodes that know concepts only: loading, saving, putting together, looking at. No model.

A `MACULA_CONCEPT` is a `macula.Concept`. A `MACULA_COMPOSITION` is a tuple of `Shut`: what the graph wants done to the
weights of a MODEL, in its order.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import folder_paths
import macula
import numpy as np
import torch

from . import plots

folder_paths.add_model_folder_path("concepts", os.path.join(folder_paths.models_dir, "concepts"))
folder_paths.folder_names_and_paths["concepts"][1].add(".safetensors")

CATEGORY = "macula"


@dataclass(frozen=True)
class Shut:
    """Weights to shut, or to give their tuned values: a concept's, by a share of 0 to 1, to draw or to erase its subject."""

    concept: macula.Concept
    strength: float

    @property
    def erases(self) -> bool:
        return self.concept.role == macula.Role.ERASE


class LoadConcept:
    """A concept file of `models/concepts`."""

    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES, RETURN_NAMES = ("MACULA_CONCEPT",), ("concept",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"concept_name": (folder_paths.get_filename_list("concepts"),)}}

    @classmethod
    def IS_CHANGED(cls, concept_name):
        return os.path.getmtime(folder_paths.get_full_path_or_raise("concepts", concept_name))

    def load(self, concept_name):
        return (macula.Concept.load(folder_paths.get_full_path_or_raise("concepts", concept_name)),)


class SaveConcept:
    """Writes a concept file into the output folder."""

    CATEGORY, FUNCTION, OUTPUT_NODE = CATEGORY, "save", True
    RETURN_TYPES = ()

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {
            "concept": ("MACULA_CONCEPT",),
            "filename_prefix": ("STRING", {"default": "concepts/concept"}),
        }}

    def save(self, concept, filename_prefix):
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            filename_prefix, folder_paths.get_output_directory()
        )
        file = f"{name}_{counter:05}_.safetensors"
        concept.save(os.path.join(folder, file))
        return {"ui": {"text": [os.path.join(subfolder, file)]}}


def _strength():
    return ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.01})


class _AddsConcept:
    """Adds a concept to what is composed and ablated; nodes of it are chained for more."""

    CATEGORY, FUNCTION = CATEGORY, "add"
    RETURN_TYPES, RETURN_NAMES = ("MACULA_COMPOSITION",), ("composition",)
    ROLE: macula.Role
    OTHER: str

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"concept": ("MACULA_CONCEPT",), "strength": _strength()},
            "optional": {"composition": ("MACULA_COMPOSITION",)},
        }

    def add(self, concept, strength, composition=()):
        if concept.role != self.ROLE:
            found = "erase" if concept.role == macula.Role.ERASE else "draw"
            raise ValueError(f"{concept!r} was found to {found} its subject: use the node {self.OTHER}")
        if concept.token_rows:
            raise ValueError(
                f"{concept!r} comes with a learnt embedding of {concept.trigger}, which these nodes can't give to a text "
                "encoder: find it without embedding_steps"
            )
        return ((*composition, Shut(concept, strength)),)


class ComposeConcepts(_AddsConcept):
    """Draws a concept, together with those of the composition that is plugged in."""

    ROLE, OTHER = macula.Role.IMPLANT, "Ablate Concept"


class AblateConcept(_AddsConcept):
    """Draws without a concept that was found to erase, together with the composition that is plugged in."""

    ROLE, OTHER = macula.Role.ERASE, "Compose Concepts"


class ConceptInfo:
    """Sizes and layers of a concept, and what it has in common with another one, as text and as a plot."""

    CATEGORY, FUNCTION, OUTPUT_NODE = CATEGORY, "tell", True
    RETURN_TYPES, RETURN_NAMES = ("STRING", "IMAGE"), ("text", "plot")

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"concept": ("MACULA_CONCEPT",)}, "optional": {"other": ("MACULA_CONCEPT",)}}

    def tell(self, concept, other=None):
        text = "\n".join(describe(concept, other))
        plot = plots.layers(concept, other)
        image = torch.from_numpy(plot.astype(np.float32) / 255)[None]
        return {"ui": {"text": [text], "images": [_preview(plot)]}, "result": (text, image)}


def _preview(plot):
    """Puts a picture where ComfyUI shows it in a node."""
    folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
        "macula_concept", folder_paths.get_temp_directory()
    )
    file = f"{name}_{counter:05}_.png"
    macula.write_png(plot, os.path.join(folder, file))
    return {"filename": file, "subfolder": subfolder, "type": "temp"}


def describe(concept, other=None):
    """The lines of Concept Info."""
    yield f"{concept.title or 'a concept'}: {concept.trigger} {concept.class_noun}".rstrip()
    yield f"{'erases' if concept.role == macula.Role.ERASE else 'draws'} its subject, scope {concept.scope.name.lower()}"
    yield f"{concept.neurons:,} of {concept.weights:,} weights ({concept.density:.3%}), {concept.memory_bytes:,} bytes"
    if concept.precision is not macula.Values.NONE:
        yield f"tuned values, {concept.precision.name.lower()}"
    if concept.token_rows:
        yield f"learnt embedding of {concept.trigger}, for {len(concept.token_rows)} text encoders"
    yield f"base model {concept.fingerprint[:12]}, {concept.architecture}"
    if other is not None:
        common = concept.overlap(other)
        yield f"shared with {other.title or 'the other'}: {common.intersection:,} weights, Jaccard {common.jaccard:.4f}"
    for layer in concept.layers:
        yield f"{layer.neurons:>9,}  {layer.neurons / (layer.out_features * layer.in_features):>8.3%}  {layer.path}"
