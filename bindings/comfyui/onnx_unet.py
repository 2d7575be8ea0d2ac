"""The UNet of a Macula pipeline in the place of ComfyUI's torch one."""

from __future__ import annotations

import comfy.conds
import macula
import numpy as np
import torch

from .jobs import interruptible

#: What a MODEL keeps in `transformer_options`: its composition, and the stage of a decomposed process with its class label.
COMPOSITION, STAGE = "macula_composition", "macula_stage"

#: What Encode Prompt adds to a CONDITIONING, and how it gets to the UNet.
PROMPT, PROMPTS = "macula_prompt", "macula_prompts"


class PromptCond(comfy.conds.CONDRegular):
    """The prompts of a batch's parts, a `macula.Embedding` each."""

    def process_cond(self, batch_size, **_):
        return self._copy_with(self.cond)

    def can_concat(self, other):
        # ComfyUI repeats the shorter of two texts, and the places of words with it.
        return self.cond[0].context.shape == other.cond[0].context.shape

    def concat(self, others):
        return [*self.cond, *(prompt for other in others for prompt in other.cond)]

    def size(self):
        return [1]


class OnnxUNet(torch.nn.Module):
    """Called as ComfyUI calls a diffusion model: `x` `[B, C, H, W]`, `timesteps` `[B]`, `context` `[B, rows, features]`.

    With the prompts of `macula_prompts`, one for each part of the batch, a concept acts where it was found to act: usually on
    its own words in the conditional parts. Without, nobody knows where its words stand, so it acts on every token.
    """

    dtype = torch.float32

    def __init__(self, pipeline: macula.Pipeline, takes_class: bool):
        super().__init__()
        self.pipeline = pipeline
        self.takes_class = takes_class
        self.composed: tuple | None = ()
        #: The most numbers of a latent's plane that were predicted at once: what the memory figures are known for.
        self.largest = 0

    def forward(
        self, x, timesteps, context=None, control=None, transformer_options={}, macula_prompts=None, **extra
    ):
        if control is not None:
            raise ValueError("a Macula UNet takes no ControlNet: its ONNX graph has no inputs for one")
        composition = transformer_options.get(COMPOSITION, ())
        stage, label = transformer_options.get(STAGE, (0, None))
        sample, states = (one.detach().to("cpu", torch.float32).contiguous().numpy() for one in (x, context))
        states = np.broadcast_to(states, (sample.shape[0], *states.shape[1:]))
        predicted = np.empty_like(sample)
        self.largest = max(self.largest, sample.shape[0] * sample.shape[2] * sample.shape[3])
        runs = self.runs(timesteps.flatten().tolist(), composition, macula_prompts, transformer_options)
        with interruptible() as cancel:
            for timestep, prompt, terms, unconditional, conditional in runs:
                self.compose(terms)
                entries = [*unconditional, *conditional]
                labels = np.full(len(entries), label or 0) if self.takes_class else None
                predicted[entries] = self.pipeline.denoise(
                    sample[entries], timestep, states[entries], class_labels=labels, embedding=prompt,
                    first_conditional=len(unconditional), stage=stage, cancel=cancel,
                )
        return torch.from_numpy(predicted).to(x.device, x.dtype)

    @staticmethod
    def runs(timesteps, composition, prompts, options):
        """Which entries of a batch go into one prediction: timestep, prompt, terms, unconditional and conditional entries."""
        known = prompts is not None
        terms = tuple((one, macula.Scope.DEFAULT if known else macula.Scope.GLOBAL) for one in composition)
        local = known and any(one.concept.scope == macula.Scope.LOCAL for one in composition)
        if not local:
            for timestep in dict.fromkeys(timesteps):
                yield timestep, None, terms, [], [at for at, step in enumerate(timesteps) if step == timestep]
            return
        kinds = options.get("cond_or_uncond") or [0] * len(prompts)
        groups = {}
        for at, timestep in enumerate(timesteps):
            part = at * len(prompts) // len(timesteps)
            # The first kind is what is drawn; the others steer away.
            key = (timestep, prompts[part] if kinds[part] == 0 else None)
            groups.setdefault(key, []).append(at)
        for timestep in dict.fromkeys(timesteps):
            away = groups.pop((timestep, None), [])
            for prompt in [prompt for step, prompt in groups if step == timestep]:
                yield timestep, prompt, terms, away, groups[timestep, prompt]
                away = []
            if away:
                everywhere = tuple(term for term in terms if term[0].concept.scope == macula.Scope.GLOBAL)
                yield timestep, None, everywhere, [], away

    def compose(self, terms):
        """Makes the pipeline's composition that of the graph; costs nothing if it is already."""
        if terms == self.composed:
            return
        shut = {True: [], False: []}
        for one, scope in terms:
            shut[one.erases].append(macula.Term(one.concept, one.strength, scope))
        self.composed = None
        self.pipeline.compose(*shut[False])
        self.pipeline.ablate(*shut[True])
        self.composed = terms
