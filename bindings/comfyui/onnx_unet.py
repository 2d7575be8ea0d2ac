"""The UNet of a Macula pipeline in the place of ComfyUI's torch one."""

from __future__ import annotations

import macula
import numpy as np
import torch

#: Where a MODEL keeps its composition in `transformer_options`.
COMPOSITION = "macula_composition"


class OnnxUNet(torch.nn.Module):
    """Called as ComfyUI calls a diffusion model: `x` `[B, C, H, W]`, `timesteps` `[B]`, `context` `[B, rows, features]`."""

    dtype = torch.float32

    def __init__(self, pipeline: macula.Pipeline):
        super().__init__()
        self.pipeline = pipeline
        self.composed: tuple | None = ()

    def forward(self, x, timesteps, context=None, control=None, transformer_options={}, **extra):
        if control is not None:
            raise ValueError("a Macula UNet takes no ControlNet: its ONNX graph has no inputs for one")
        self.compose(transformer_options.get(COMPOSITION, ()))
        steps = timesteps.flatten().tolist()
        if len(set(steps)) == 1:
            return self.predict(x, steps[0], context)
        parts = [self.predict(x[at : at + 1], step, context[at : at + 1]) for at, step in enumerate(steps)]
        return torch.cat(parts)

    def predict(self, x, timestep, context):
        sample, states = (one.detach().to("cpu", torch.float32).contiguous().numpy() for one in (x, context))
        states = np.broadcast_to(states, (sample.shape[0], *states.shape[1:]))
        return torch.from_numpy(self.pipeline.denoise(sample, timestep, states)).to(x.device, x.dtype)

    def compose(self, shut):
        """Makes the pipeline's composition that of the graph; costs nothing if it is already."""
        if shut == self.composed:
            return
        # Every token: a MODEL does not know where in the conditioning a concept's words stand.
        terms = {True: [], False: []}
        for one in shut:
            terms[one.erases].append(macula.Term(one.concept, one.strength, macula.Scope.GLOBAL))
        self.composed = None
        self.pipeline.compose(*terms[False])
        self.pipeline.ablate(*terms[True])
        self.composed = shut
