"""The Decomposed Sampler: early steps see smaller latents. ComfyUI's guider predicts, Macula's trajectory walks."""

from __future__ import annotations

import json

import comfy.model_base
import comfy.model_patcher
import comfy.samplers
import macula
import numpy as np
import torch

from .concepts import CATEGORY
from .models import model_type, onnx_unet
from .noise import noise_levels
from .onnx_unet import STAGE


class DecomposedProcess(comfy.samplers.Sampler):
    """A SAMPLER that walks a schedule. `sigmas` are those of all its steps; it may be given the last of them only."""

    def __init__(self, schedule: macula.Schedule, walk: dict, sigmas: torch.Tensor):
        self.schedule, self.walk, self.sigmas = schedule, walk, sigmas

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        model = model_wrap.inner_model
        if denoise_mask is not None or any("area" in one or "mask" in one for one in all_conds(model_wrap)):
            raise ValueError("a decomposed process takes no masks or areas: its early steps see smaller latents")
        batch, channels, height, width = noise.shape
        trajectory = self.schedule.begin(
            batch=batch, channels=channels, height=height, width=width, start_step=self.first_step(sigmas), **self.walk
        )
        # What steps add has another seed than the start noise, which ComfyUI drew and which lifts bring back too.
        generator = torch.Generator().manual_seed(((extra_args.get("seed") or 0) + 1) % 2**64)

        def normal(shape):
            return torch.randn(shape, generator=generator).numpy()

        def predict(now, state):
            """The guided prediction, worked back from the clean latent, which is what ComfyUI's guiders give."""
            sigma = model.model_sampling.sigma(torch.tensor([now.timestep])).to(torch.float64)
            scale = (sigma**2 + 1).sqrt()
            given = torch.from_numpy(state).to(torch.float64) * now.input_scale * scale
            options = comfy.model_patcher.create_model_options_clone(extra_args["model_options"])
            options.setdefault("transformer_options", {})[STAGE] = (now.stage, now.class_label)
            told = [one.to(noise.device, torch.float32) for one in (given, sigma.expand(batch))]
            clean = model_wrap(*told, model_options=options, seed=extra_args.get("seed")).to("cpu", torch.float64)
            if model.model_type == comfy.model_base.ModelType.V_PREDICTION:
                prediction = (given / scale**2 - clean) * scale / sigma
            else:
                prediction = (given - clean) / sigma
            return prediction.to(torch.float32).numpy()

        def own(latent):
            return latent.to("cpu", torch.float32).numpy()

        now = trajectory.now
        start = coarse(own(noise), now.shape)
        state = trajectory.start(start, own(latent_image) if now.step else None)
        steps = now.step_count - now.step
        for step in range(steps):
            now = trajectory.now
            prediction = predict(now, state)
            state, clean = trajectory.step(
                state, prediction,
                normal(now.shape) if now.needs_noise else None,
                coarse(own(noise), now.next_shape) if now.lifts else None,
            )
            if callback is not None:
                callback(step, torch.from_numpy(clean), torch.from_numpy(state), steps)
        return torch.from_numpy(state).to(noise.device)

    def first_step(self, sigmas):
        """Which step the given sigmas begin with."""
        first = len(self.sigmas) - len(sigmas)
        if first < 0 or not torch.allclose(sigmas.cpu(), self.sigmas[first:], rtol=1e-4, atol=1e-6):
            raise ValueError("a decomposed process needs the SIGMAS that its own node gives, or the last of them")
        return first


def all_conds(guider):
    """What every prompt of a guider says."""
    return [one for conds in guider.conds.values() for one in conds or []]


def coarse(noise, shape):
    """White noise of a smaller size: the orthonormal coarse coordinates of a larger one."""
    batch, channels, height, width = shape
    factor = noise.shape[2] // height
    blocks = noise.reshape(batch, channels, height, factor, width, factor)
    return np.ascontiguousarray(blocks.sum(axis=(3, 5)) / factor)


class DecomposedSampler:
    """A decomposed process as SAMPLER and SIGMAS for SamplerCustom: its early steps take less time.

    The MODEL's own, or one given as JSON. The last SIGMAS of a split start from a latent.
    """

    CATEGORY, FUNCTION = CATEGORY, "make"
    RETURN_TYPES = ("SAMPLER", "SIGMAS")

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "steps": ("INT", {"default": 25, "min": 1, "max": 1000}),
                "method": (["default", "ddim", "ddpm", "dpm_multistep"],),
                "eta": ("FLOAT", {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.01}),
            },
            "optional": {"schedule": ("STRING", {"multiline": True, "default": ""})},
        }

    def make(self, model, steps, method, eta, schedule=""):
        process = self.schedule(model, schedule)
        fields, sampling = process.fields, model.get_model_object("model_sampling")
        levels = torch.from_numpy(noise_levels(fields)).to(sampling.sigmas)
        if (
            model_type(fields) != model.model.model_type or levels.shape != sampling.sigmas.shape
            or not torch.allclose(levels, sampling.sigmas, rtol=1e-2)
        ):
            raise ValueError("the schedule is another model's: its noise levels or predictions are not those of this MODEL")
        walk = {"steps": steps, "sampler": method, "eta": eta}
        sigmas = sampling.sigma(torch.tensor(timesteps(process, walk))).cpu()
        sigmas = torch.cat([sigmas, torch.zeros(1)])
        return (DecomposedProcess(process, walk, sigmas), sigmas)

    @staticmethod
    def schedule(model, text):
        if text.strip():
            try:
                return macula.Schedule.from_json(json.loads(text))
            except json.JSONDecodeError as reason:
                raise ValueError(f"the schedule is no JSON: {reason}") from None
        unet = onnx_unet(model)
        if unet is None:
            raise ValueError("this MODEL brings no decomposed process: give one as JSON")
        return unet.pipeline.schedule


def timesteps(schedule, walk):
    """What the model is told at each step: they don't depend on the size, so the smallest one is walked."""
    side = 2 ** len(schedule.turning_points)
    told = []
    with schedule.begin(channels=1, height=side, width=side, **walk) as trajectory:
        while not (now := trajectory.now).done:
            told.append(now.timestep)
            empty = np.zeros(now.shape, dtype=np.float32)
            trajectory.step(empty, empty, empty, np.zeros(now.next_shape, dtype=np.float32))
    return told
