"""Find Concept Neurons: from pictures or latents and CONDITIONING, as ComfyUI has them, to a concept."""

from __future__ import annotations

import comfy.sample
import macula
import torch

from .concepts import CATEGORY
from .jobs import SearchProgress, interruptible
from .models import pipeline_of
from .onnx_unet import PROMPT

#: How many pictures of the class are drawn that the user does not give, in how many steps.
CLASS_PICTURES, CLASS_STEPS = 12, 20


class FindConceptNeurons:
    """Finds the neurons of a subject in a few pictures of it, or latents. Interrupt stops it at once.

    A prompt of Encode Prompt lets the concept act on its own words; with any other CONDITIONING it acts on every token, and
    pictures of the class, given or drawn, keep the class as it is.
    """

    CATEGORY, FUNCTION = CATEGORY, "find"
    RETURN_TYPES, RETURN_NAMES = ("MACULA_CONCEPT",), ("concept",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL",),
                "subject": ("CONDITIONING",),
                "trigger": ("STRING", {"default": "<s1>"}),
                "class_noun": ("STRING", {"default": "dog"}),
                "density": ("FLOAT", {"default": 0.01, "min": 0.0001, "max": 1.0, "step": 0.0001, "round": 0.0001}),
                "batches": ("INT", {"default": 60, "min": 13, "max": 10000}),
                "batch": ("INT", {"default": 8, "min": 1, "max": 64}),
                "tune_steps": ("INT", {"default": 0, "min": 0, "max": 10000}),
                "seed": ("INT", {"default": 0, "min": 0, "max": 2**64 - 1}),
            },
            "optional": {
                "pictures": ("IMAGE",),
                "vae": ("VAE",),
                "latents": ("LATENT",),
                "subject_class": ("CONDITIONING",),
                "class_pictures": ("IMAGE",),
                "class_latents": ("LATENT",),
            },
            "hidden": {"unique_id": "UNIQUE_ID"},
        }

    def find(
        self, model, subject, trigger, class_noun, density, batches, batch, tune_steps, seed, pictures=None, vae=None,
        latents=None, subject_class=None, class_pictures=None, class_latents=None, unique_id=None,
    ):
        pipeline = pipeline_of(model, "finding concept neurons")
        own = encoded(model, pictures, vae, latents, "pictures")
        if own is None:
            raise ValueError("there is nothing to learn from: connect pictures with a vae, or latents")
        context, prompt = text_of(subject)
        asked = {"scope": "local" if prompt else "global"}
        if prompt is None:
            if subject_class is None:
                raise ValueError("subject_class is not connected: without it the whole class would look like the subject")
            of_class = encoded(model, class_pictures, vae, class_latents, "class_pictures")
            if of_class is None:
                of_class = drawn(model, subject_class, own, seed)
            asked |= {"class_latents": of_class.numpy(), "class_context": text_of(subject_class)[0]}
        with interruptible() as cancel:
            concept = pipeline.discover_encoded(
                own.numpy(), context, trigger, class_noun, embedding=prompt, density=density, batches=batches, batch=batch,
                tune_steps=tune_steps, seed=seed, cancel=cancel,
                progress=SearchProgress(batches, tune_steps, unique_id), **asked,
            )
        return (concept,)


def encoded(model, pictures, vae, latents, name):
    """Latents `[N, C, h, w]` as the UNet sees them; `None` if nothing is connected."""
    if pictures is not None and latents is not None:
        raise ValueError(f"{name} and latents are both connected: one of them says what the subject looks like")
    if pictures is not None:
        if vae is None:
            raise ValueError(f"{name} needs a vae, which encodes them")
        samples = vae.encode(pictures[..., :3])
    elif latents is not None:
        samples = latents["samples"]
    else:
        return None
    return model.model.process_latent_in(samples).detach().to("cpu", torch.float32).contiguous()


def text_of(conditioning):
    """The encoding of the first prompt of a CONDITIONING, and what Encode Prompt said of it."""
    states, said = conditioning[0]
    prompt = said.get(PROMPT)
    if prompt is not None and states.shape[1:] != prompt.context.shape[1:]:
        prompt = None
    return states[:1].detach().to("cpu", torch.float32).contiguous().numpy(), prompt


def drawn(model, subject_class, like, seed):
    """Latents of the class as the model draws them, as many as a search needs."""
    noise = torch.randn((CLASS_PICTURES, *like.shape[1:]), generator=torch.Generator().manual_seed(seed))
    # Without guidance, because there is no other text to steer away from.
    samples = comfy.sample.sample(
        model, noise, CLASS_STEPS, 1.0, "ddim", "sgm_uniform", subject_class, subject_class, torch.zeros_like(noise),
        seed=seed, disable_pbar=True,
    )
    return model.model.process_latent_in(samples).to("cpu", torch.float32).contiguous()
