"""Nodes that have to do with a MODEL: loading an ONNX one, encoding prompts for it, applying concepts."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import folder_paths
import macula
import torch

from .concepts import CATEGORY
from .jobs import interruptible
from .noise import noise_levels
from .onnx_unet import COMPOSITION, PROMPT, PROMPTS, OnnxUNet, PromptCond
from .weights import patches

folder_paths.add_model_folder_path("macula", os.path.join(folder_paths.models_dir, "macula"))


class PixelSpace(comfy.latent_formats.LatentFormat):
    """Of models without a VAE, whose latents are the pictures themselves, from -1 to 1."""

    latent_channels = 3
    spacial_downscale_ratio = 1

    def __init__(self):
        self.latent_rgb_factors = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


class MaculaModel(comfy.model_base.BaseModel):
    """A model without torch weights: its UNet is a pipeline's. Noise levels and latents are those of the model folder."""

    def __init__(self, folder: Path, pipeline: macula.Pipeline):
        scheduler = read_json(folder / "scheduler/scheduler_config.json")
        channels = pipeline.latent_shape[0]
        config = comfy.supported_models.SD15({"disable_unet_model_creation": True, "in_channels": channels})
        config.latent_format = latent_format(folder, channels)
        super().__init__(config, model_type(scheduler), device=torch.device("cpu"))
        self.model_sampling.set_sigmas(torch.from_numpy(noise_levels(scheduler)))
        unet = read_json(folder / "unet/config.json")
        takes_class = any(unet.get(key) is not None for key in ("num_class_embeds", "class_embed_type"))
        self.diffusion_model = OnnxUNet(pipeline, takes_class)

    def extra_conds(self, **kwargs):
        conds = super().extra_conds(**kwargs)
        prompt, states = kwargs.get(PROMPT), kwargs.get("cross_attn")
        # Another node may have put something else in the place of the prompt's encoding.
        if prompt is not None and states is not None and states.shape[1:] == prompt.context.shape[1:]:
            conds[PROMPTS] = PromptCond([prompt])
        return conds

    def memory_required(self, input_shape, cond_shapes={}):
        """What ONNX Runtime's arenas took for the largest run so far, or more for a larger one; ComfyUI's guess before the
        first."""
        unet = self.diffusion_model
        known = unet.pipeline.memory.arena_peak if unet.largest else None
        if known is None:
            return super().memory_required(input_shape, cond_shapes)
        return known * max(1.0, input_shape[0] * math.prod(input_shape[2:]) / unet.largest)


def read_json(path):
    """The fields of a file; none if it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def latent_format(folder, channels):
    """How ComfyUI's latents are scaled for the model."""
    if channels == 3:
        return PixelSpace()
    if channels != 4 or (folder / "text_encoder_2").is_dir():
        raise ValueError(f"{folder.name} is no model in pixel space, nor SD1.x or SD2.x: no other kind can be loaded yet")
    scale = read_json(folder / "vae_decoder/config.json").get("scaling_factor")
    return comfy.latent_formats.SD15(scale) if scale else comfy.latent_formats.SD15()


def model_type(scheduler):
    """What a model predicts, as ComfyUI calls it."""
    kind = scheduler.get("prediction_type", "epsilon")
    kinds = {
        "epsilon": comfy.model_base.ModelType.EPS,
        "v_prediction": comfy.model_base.ModelType.V_PREDICTION,
    }
    if kind not in kinds:
        raise ValueError(f"the model predicts {kind}; known are {', '.join(kinds)}")
    return kinds[kind]


def folders():
    """Names of the model folders below `models/macula` and the user's extra paths."""
    found = {}
    for root in folder_paths.get_folder_paths("macula"):
        for name in sorted(os.listdir(root)) if os.path.isdir(root) else []:
            if os.path.isfile(os.path.join(root, name, "model_index.json")):
                found.setdefault(name, Path(root, name))
    return found


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
        pipeline = macula.Pipeline(path, provider=provider)
        model = MaculaModel(path, pipeline)
        cpu = torch.device("cpu")
        size = pipeline.memory.weights or 0
        return (comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu, size=size),)


def onnx_unet(model):
    """The `OnnxUNet` of a MODEL, `None` if it is ComfyUI's own."""
    unet = model.model.diffusion_model
    return unet if isinstance(unet, OnnxUNet) else None


def pipeline_of(model, what):
    """The pipeline of a MODEL of Load Macula UNet, without which there is no `what`."""
    unet = onnx_unet(model)
    if unet is None:
        raise ValueError(f"{what} needs a MODEL of Load Macula UNet (ONNX)")
    return unet.pipeline


class EncodePrompt:
    """Encodes a prompt with the text encoder of a model folder. Concepts then know where their words stand in it."""

    CATEGORY, FUNCTION = CATEGORY, "encode"
    RETURN_TYPES = ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "text": ("STRING", {"multiline": True, "dynamicPrompts": True})}}

    def encode(self, model, text):
        with interruptible() as cancel:
            prompt = pipeline_of(model, "a prompt's encoding").encode_prompt(text, cancel)
        return ([[torch.from_numpy(prompt.context.copy()), {PROMPT: prompt}]],)


class ApplyConcept:
    """Gives a MODEL what is composed and ablated: one of Macula's, or ComfyUI's own SD1.x or SDXL.

    Other MODELs keep what they have, and the base weights come back bit for bit.
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
