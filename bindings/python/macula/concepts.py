"""Concepts: sets of neurons, their files and their algebra."""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import POINTER, byref, c_char_p, c_float, c_uint32, cast
from dataclasses import dataclass
from typing import Any

import numpy as np

from ._abi import (
    Role, Scope, Values, macula_concept_info, macula_concept_options, macula_layer, macula_layer_info, macula_overlap,
    macula_tensor,
)
from ._library import Handle, StrPath, check, info, library, receive, text
from .options import choice


@dataclass(frozen=True)
class Layer:
    """One K or V projection: its diffusers module path, the shape of its weight, and how many of it are in the set."""

    path: str
    out_features: int
    in_features: int
    neurons: int

    @classmethod
    def of(cls, found: macula_layer_info) -> Layer:
        return cls(found.path.decode(), found.out_features, found.in_features, found.neurons)


@dataclass(frozen=True)
class Overlap:
    """What two concepts have in common: weights of both, of either, and their ratio (the Jaccard index)."""

    intersection: int
    union: int
    jaccard: float

    @classmethod
    def of(cls, found: macula_overlap) -> Overlap:
        return cls(found.intersection_count, found.union_count, found.jaccard)


class Concept(Handle):
    """A set of concept neurons and where it comes from. It never changes."""

    def __init__(self, pointer: int):
        super().__init__(pointer, library.macula_concept_free)
        self._info = info(macula_concept_info, library.macula_concept_get_info, pointer)

    @classmethod
    def load(cls, file: StrPath) -> Concept:
        """Reads a concept file."""
        return cls(receive(library.macula_concept_load, text(file)))

    @classmethod
    def from_bytes(cls, data: bytes) -> Concept:
        """Reads the content of a concept file."""
        return cls(receive(library.macula_concept_load_bytes, data, len(data)))

    @classmethod
    def create(
        cls,
        layers: Mapping[str, tuple[tuple[int, int], Any]],
        fingerprint: str,
        *,
        title: str = "",
        trigger: str = "",
        class_noun: str = "",
        method: str = "",
        architecture: str | None = None,
        role: Role | str = Role.IMPLANT,
        scope: Scope | str = Scope.GLOBAL,
        values: Mapping[str, Any] | None = None,
        precision: Values | str = Values.FLOAT16,
    ) -> Concept:
        """Makes a concept from lists of weights.

        `layers` gives each projection's path the shape `(out_features, in_features)` of its weight and the indices
        `row * in_features + column` of its neurons, ascending; `fingerprint` is the base model's. `values` gives each
        path what its neurons' weights become, kept with `precision`; without it they are shut.
        """
        options = macula_concept_options.new()
        options.fingerprint = text(fingerprint)
        options.title, options.trigger = text(title), text(trigger)
        options.class_noun, options.method = text(class_noun), text(method)
        options.architecture = text(architecture) if architecture is not None else None
        options.role, options.scope = choice(Role, role), choice(Scope, scope)
        options.values = choice(Values, precision) if values is not None else Values.NONE
        made = (macula_layer * len(layers))()
        kept = []
        for one, (path, (shape, indices)) in zip(made, layers.items()):
            numbers = np.asarray(indices)
            if numbers.size and (numbers.min() < 0 or numbers.max() >= 2**32):
                raise ValueError(f"{path}: an index is not in 0 to 2^32 - 1")
            numbers = np.ascontiguousarray(numbers, dtype=np.uint32)
            kept.append(numbers)
            one.path, (one.out_features, one.in_features) = text(path), shape
            one.indices, one.count = cast(numbers.ctypes.data, POINTER(c_uint32)), numbers.size
            if values is not None:
                tuned = np.ascontiguousarray(values[path], dtype=np.float32)
                if tuned.shape != numbers.shape:
                    raise ValueError(f"{path}: {tuned.size} values for {numbers.size} neurons")
                kept.append(tuned)
                one.values = cast(tuned.ctypes.data, POINTER(c_float))
        return cls(receive(library.macula_concept_create, made, len(made), byref(options)))

    def save(self, file: StrPath) -> None:
        """Writes a concept file, `*.safetensors`."""
        check(library.macula_concept_save(self.pointer, text(file)))

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the base model."""
        return self._info.fingerprint.decode()

    @property
    def trigger(self) -> str:
        """The subject's word in prompts."""
        return self._info.trigger.decode()

    @property
    def class_noun(self) -> str:
        """The subject's class."""
        return self._info.class_noun.decode()

    @property
    def title(self) -> str:
        """A name for people."""
        return self._info.title.decode()

    @property
    def method(self) -> str:
        """How the set was found."""
        return self._info.method.decode()

    @property
    def architecture(self) -> str:
        """ModelSpec architecture."""
        return self._info.architecture.decode()

    @property
    def neurons(self) -> int:
        """Number of weights in the set."""
        return self._info.neurons

    @property
    def weights(self) -> int:
        """Number of weights that its projections have."""
        return self._info.weights

    @property
    def density(self) -> float:
        """`neurons / weights`."""
        return self._info.density

    @property
    def memory_bytes(self) -> int:
        """Memory that the set takes."""
        return self._info.memory_bytes

    @property
    def role(self) -> Role:
        """What shutting the neurons does."""
        return Role(self._info.role)

    @property
    def scope(self) -> Scope:
        """Where it acts unless told otherwise."""
        return Scope(self._info.scope)

    @property
    def layers(self) -> list[Layer]:
        """The projections that were looked at, in the order of the paths' bytes."""
        found = [self._layer(at) for at in range(self._info.layer_count)]
        return [Layer.of(one) for one in found]

    def indices(self, layer: int) -> np.ndarray:
        """Indices of one projection's neurons, ascending, `uint32`; `layer` counts in `layers`."""
        return self._numbers(library.macula_concept_get_indices, layer, np.uint32, c_uint32)

    def values(self, layer: int) -> np.ndarray:
        """What one projection's neurons become, `float32`, in the order of `indices`: tuned values, or zeros."""
        return self._numbers(library.macula_concept_get_values, layer, np.float32, c_float)

    def _numbers(self, copy: Any, layer: int, dtype: type, c_type: type) -> np.ndarray:
        count = self._layer(layer).neurons
        numbers = np.empty(max(count, 1), dtype=dtype)
        check(copy(self.pointer, layer, numbers.ctypes.data_as(POINTER(c_type)), count))
        return numbers[:count]

    @property
    def precision(self) -> Values:
        """How tuned values are kept; `Values.NONE` for a concept that shuts."""
        return Values(self._info.values)

    @property
    def token_rows(self) -> list[np.ndarray]:
        """The learnt embedding of the trigger, `float32 [width]` for each text encoder; empty if it was not learnt."""
        rows = []
        for encoder in range(self._info.token_row_count):
            row = macula_tensor()
            check(library.macula_concept_get_token_row(self.pointer, encoder, byref(row)))
            numbers = cast(row.data, POINTER(c_float))
            rows.append(np.ctypeslib.as_array(numbers, (row.shape[0],)).copy())
        return rows

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata as it stands in the file."""
        entries = {}
        for at in range(self._info.entry_count):
            key, value = c_char_p(), c_char_p()
            check(library.macula_concept_get_entry(self.pointer, at, byref(key), byref(value)))
            entries[(key.value or b"").decode()] = (value.value or b"").decode()
        return entries

    def __or__(self, other: Concept) -> Concept:
        return self._combined(library.macula_concept_union, other)

    def __and__(self, other: Concept) -> Concept:
        return self._combined(library.macula_concept_intersection, other)

    def __sub__(self, other: Concept) -> Concept:
        return self._combined(library.macula_concept_difference, other)

    def overlap(self, other: Concept) -> Overlap:
        """What two concepts have in common."""
        total = macula_overlap()
        check(library.macula_concept_overlap(self.pointer, other.pointer, byref(total), None, 0))
        return Overlap.of(total)

    def overlap_by_layer(self, other: Concept) -> dict[str, Overlap]:
        """What they have in common in each projection that either lists."""
        paths = sorted({layer.path.encode() for layer in [*self.layers, *other.layers]})
        total, each = macula_overlap(), (macula_overlap * len(paths))()
        check(library.macula_concept_overlap(self.pointer, other.pointer, byref(total), each, len(paths)))
        return {path.decode(): Overlap.of(one) for path, one in zip(paths, each)}

    def _layer(self, at: int) -> macula_layer_info:
        if not 0 <= at < self._info.layer_count:
            raise IndexError(f"projection {at} of {self._info.layer_count}")
        return info(macula_layer_info, library.macula_concept_get_layer, self.pointer, at)

    def _combined(self, function: Any, other: Concept) -> Concept:
        if not isinstance(other, Concept):
            return NotImplemented
        return Concept(receive(function, self.pointer, other.pointer))

    def __repr__(self) -> str:
        words = " ".join(word for word in (self.trigger, self.class_noun) if word)
        return f"<macula.Concept {words!r}: {self.neurons} of {self.weights} weights>"
