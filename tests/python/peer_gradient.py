"""The other side of the gradient benchmark: PyTorch's forward and backward pass, and whole searches.

Reads one command a line from standard input and answers with one JSON object a line:

    open small|sd15 THREADS -> {}            the shipped UNet, or one of Stable Diffusion 1.5's size with random weights
    inputs B SIDE TOKENS    -> {}            random inputs of that batch, size and prompt length
    step                    -> {"seconds"}   time of a loss and its gradient for all cross-attention K and V weights
    search SUBJECT SIDE N B -> {"seconds"}   time of a search for a subject: pictures read, N batches of B, a learnt mask
    peak                    -> {"bytes"}     peak resident memory of this process
"""

import json
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "models" / "reference"))


class Side:
    """A UNet and what it is run with."""

    def __init__(self, which, threads):
        torch.set_num_threads(int(threads))
        self.small = which == "small"
        if self.small:
            import model

            self.model = model.load()
            self.unet = self.model.unet
        else:
            import export_unets

            self.unet = export_unets.build("sd15").requires_grad_(False)
        self.weights = [
            layer.weight for path, layer in self.unet.named_modules() if path.endswith(("attn2.to_k", "attn2.to_v"))
        ]

    def inputs(self, batch, side, tokens):
        channels = self.unet.config.in_channels if not self.small else 3
        features = self.weights[0].shape[1]
        self.state, self.target = torch.randn(2, batch, channels, side, side).unbind()
        self.text = torch.randn(batch, tokens, features)
        self.timestep = torch.full((batch,), 500)
        self.labels = torch.zeros(batch, dtype=torch.long)

    def step(self):
        for weight in self.weights:
            weight.requires_grad_(True)
        if self.small:
            said = self.unet(self.state, self.timestep, self.text, self.labels)
        else:
            said = self.unet(self.state, self.timestep, self.text, return_dict=False)[0]
        torch.autograd.grad(((said - self.target) ** 2).mean(), self.weights)

    def search(self, name, side, batches, batch):
        from find import find, subject
        from neurons import KeyValueWeights

        for weight in self.weights:
            weight.requires_grad_(False)
        options = SimpleNamespace(scope="local", seed=0, side=side, method="learnt-mask", density=0.01, threshold=None,
                                  rho=0.0, batches=batches, batch=batch, tune=0)
        learn, _, noun = subject(name, "<s1>", self.model)
        find(self.model, KeyValueWeights(self.unet), learn, "<s1>", noun, options)


def main():
    side = None
    for line in sys.stdin:
        command, *arguments = line.split()
        answer, start = {}, time.perf_counter()
        if command == "open":
            side = Side(*arguments)
        elif command == "inputs":
            side.inputs(*map(int, arguments))
        elif command == "step":
            side.step()
            answer["seconds"] = time.perf_counter() - start
        elif command == "search":
            side.search(arguments[0], *map(int, arguments[1:]))
            answer["seconds"] = time.perf_counter() - start
        elif command == "peak":
            answer["bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
