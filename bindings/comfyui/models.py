"""Nodes that have to do with a MODEL: loading an ONNX one, applying concepts, finding them."""

from __future__ import annotations

import json
import os

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import folder_paths
import macula
import numpy as np
import torch

from .concepts import CATEGORY
from .onnx_unet import COMPOSITION, OnnxUNet
from .weights import patches

folder_paths.add_model_folder_path("macula", os.path.join(folder_paths.models_dir, "macula"))


class MaculaModel(comfy.model_base.BaseModel):
    """A model without torch weights, that says truthfully what a run takes. Latents and noise are those of SD1.x."""

    def __init__(self, pipeline, model_type):
        channels = pipeline.latent_shape[0]
        config = comfy.supported_models.SD15({"disable_unet_model_creation": True, "in_channels": channels})
        super().__init__(config, model_type, device=torch.device("cpu"))
        self.diffusion_model = OnnxUNet(pipeline)

    def memory_required(self, input_shape, cond_shapes={}):
        memory = self.diffusion_model.pipeline.memory
        return memory.arena_peak or 0


def folders():
    """Names of the model folders below `models/macula` and the user's extra paths."""
    found = {}
    for root in folder_paths.get_folder_paths("macula"):
        for name in sorted(os.listdir(root)) if os.path.isdir(root) else []:
            if os.path.isfile(os.path.join(root, name, "model_index.json")):
                found.setdefault(name, os.path.join(root, name))
    return found


def prediction(path):
    """What a model folder's UNet predicts, as ComfyUI calls it."""
    with open(os.path.join(path, "scheduler/scheduler_config.json"), encoding="utf-8") as file:
        kind = json.load(file).get("prediction_type", "epsilon")
    kinds = {
        "epsilon": comfy.model_base.ModelType.EPS,
        "v_prediction": comfy.model_base.ModelType.V_PREDICTION,
    }
    if kind not in kinds:
        raise ValueError(f"{path} predicts {kind}; known are {', '.join(kinds)}")
    return kinds[kind]


class LoadMaculaUNet:
    """A model folder in the diffusers ONNX layout of `models/macula`; its UNet works with every sampler node."""

    CATEGORY, FUNCTION = CATEGORY, "load"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        providers = [one.name.lower() for one in macula.Provider]
        return {"required": {"folder": (list(folders()),), "provider": (providers,)}}

    def load(self, folder, provider):
        path = folders().get(folder)
        if path is None:
            raise FileNotFoundError(f"models/macula has no folder {folder} with a model_index.json")
        model_type = prediction(path)
        pipeline = macula.Pipeline(path, provider=provider)
        if pipeline.latent_shape[0] != 4 or os.path.isdir(os.path.join(path, "text_encoder_2")):
            raise ValueError(f"{folder} is no SD1.x or SD2.x model: no other kind can be loaded yet")
        model = MaculaModel(pipeline, model_type)
        cpu = torch.device("cpu")
        size = pipeline.memory.weights or 0
        return (comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu, size=size),)


def onnx_unet(model):
    """The `OnnxUNet` of a MODEL, `None` if it is ComfyUI's own."""
    unet = model.model.diffusion_model
    return unet if isinstance(unet, OnnxUNet) else None


class ApplyConcept:
    """Gives a MODEL what is composed and ablated: one of Macula's, or ComfyUI's own SD1.x or SDXL.

    It acts on every token. Other MODELs keep what they have, and the base weights come back bit for bit.
    """

    CATEGORY, FUNCTION = CATEGORY, "apply"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "composition": ("MACULA_COMPOSITION",)}}

    def apply(self, model, composition):
        applied = model.clone()
        if onnx_unet(model) is not None:
            options = applied.model_options.setdefault("transformer_options", {})
            options[COMPOSITION] = (*options.get(COMPOSITION, ()), *composition)
            return (applied,)
        keys = comfy.utils.unet_to_diffusers(model.model.model_config.unet_config)
        for one in composition:
            wanted = patches(one.concept, keys)
            refused = set(wanted) - set(applied.add_patches(wanted, one.strength))
            if refused:
                raise ValueError(f"the model has no weight {sorted(refused)[0]} ({len(refused)} are missing)")
        return (applied,)


class FindConceptNeurons:
    """Finds the neurons of a subject from a few pictures of it. Interrupt stops it at once."""

    CATEGORY, FUNCTION = CATEGORY, "find"
    RETURN_TYPES, RETURN_NAMES = ("MACULA_CONCEPT",), ("concept",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "pictures": ("IMAGE",),
                "trigger": ("STRING", {"default": "<s1>"}),
                "class_noun": ("STRING", {"default": "dog"}),
                "density": ("FLOAT", {"default": 0.01, "min": 0.0001, "max": 1.0, "step": 0.0001, "round": 0.0001}),
                "batches": ("INT", {"default": 60, "min": 13, "max": 10000}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**64 - 1}),
            },
            "optional": {"tune_steps": ("INT", {"default": 0, "min": 0, "max": 10000})},
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    def find(self, model, pictures, trigger, class_noun, density, batches, seed, tune_steps=0, unique_id=None):
        unet = onnx_unet(model)
        if unet is None:
            raise ValueError("concept neurons are found on a model of Load Macula UNet (ONNX)")
        bar = comfy.utils.ProgressBar(batches + tune_steps, node_id=unique_id)

        def progress(now):
            comfy.model_management.throw_exception_if_processing_interrupted()
            behind = batches if now.stage == "tune" else 0
            bar.update_absolute(behind + now.done, batches + tune_steps)

        concept = unet.pipeline.discover(
            to_bytes(pictures), trigger, class_noun, density=density, batches=batches, seed=seed,
            tune_steps=tune_steps, progress=progress,
        )
        return (concept,)


def to_bytes(pictures):
    """An IMAGE `[B, H, W, 3]` of 0 to 1 as arrays of bytes."""
    pixels = pictures.detach().to("cpu", torch.float32).clamp(0, 1).mul(255).round().to(torch.uint8).numpy()
    return [np.ascontiguousarray(one[..., :3]) for one in pixels]
