"""Concepts on torch weights: the same weights are shut or replaced in ComfyUI's own UNet as Macula does in an ONNX one."""

from __future__ import annotations

import numpy as np
import torch
from comfy.weight_adapter.base import WeightAdapterBase


class ChangedWeights(WeightAdapterBase):
    """Moves chosen entries of a weight `[out_features, in_features]` by `strength` towards their values: 0 where shut.

    It acts where it stands in the list of patches: on the base weight with the LoRAs before it.
    """

    name = "macula"

    def __init__(self, loaded_keys, weights):
        self.loaded_keys = loaded_keys
        #: Flat indices of the entries, what they become, and the shape that the indices count in.
        self.weights = weights

    def calculate_weight(
        self, weight, key, strength, strength_model, offset, function, intermediate_dtype=torch.float32,
        original_weight=None,
    ):
        indices, values, shape = self.weights
        if tuple(weight.shape) != tuple(shape):
            raise ValueError(f"{key} is {list(weight.shape)}, the concept was found on {list(shape)}")
        entries = indices.to(weight.device)
        flat = weight.reshape(-1)
        changed = flat.index_select(0, entries) * (1.0 - strength) + values.to(weight.device, weight.dtype) * strength
        flat.index_copy_(0, entries, changed)
        return flat.reshape(weight.shape)


def patches(concept, keys):
    """The patches of a concept for `ModelPatcher.add_patches`.

    `keys` gives each diffusers path (`down_blocks...attn2.to_k.weight`) its name in the UNet. Raises if the UNet lacks a
    projection that the concept acts on.
    """
    made, missing = {}, []
    for at, layer in enumerate(concept.layers):
        if not layer.neurons:
            continue
        name = keys.get(f"{layer.path}.weight")
        if name is None:
            missing.append(layer.path)
            continue
        key = f"diffusion_model.{name}"
        indices = torch.from_numpy(concept.indices(at).astype(np.int64))
        values = torch.from_numpy(concept.values(at))
        made[key] = ChangedWeights({key}, (indices, values, (layer.out_features, layer.in_features)))
    if missing:
        raise ValueError(f"the concept is not of this kind of model: it has no {missing[0]} ({len(missing)} are missing)")
    return made
