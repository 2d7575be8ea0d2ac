"""Draws pictures with both processes (DDIM, classifier-free guidance). `network.py` has the formulas.

A `model` is anything with `unet(sample, timestep, text, class_labels)` and `text_encoder(ids)` on tensors:
the PyTorch networks, or `OnnxModel` over the exported folder.
"""

from pathlib import Path

import numpy as np
import onnxruntime
import torch

import network as net


class OnnxModel:
    """The exported networks, run by ONNX Runtime on the CPU."""

    def __init__(self, folder):
        def load(part):
            path = Path(folder) / part / "model.onnx"
            return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

        self._unet, self._text_encoder = load("unet"), load("text_encoder")

    def unet(self, sample, timestep, text, class_labels):
        feeds = zip(("sample", "timestep", "encoder_hidden_states", "class_labels"), (sample, timestep, text, class_labels))
        return torch.from_numpy(self._unet.run(None, {name: value.numpy() for name, value in feeds})[0])

    def text_encoder(self, ids):
        return torch.from_numpy(self._text_encoder.run(None, {"input_ids": ids.numpy()})[0])


def encode(tokenizer, prompts):
    """Token ids [B, MAX_LENGTH] of the prompts and [1, MAX_LENGTH] of the empty one."""
    ids = torch.tensor([e.ids for e in tokenizer.encode_batch(list(prompts))])
    return ids, torch.tensor(tokenizer.encode("").ids)[None]


class _Guided:
    """The UNet's output for fixed prompts: without text plus `guidance` times the difference that the text makes."""

    def __init__(self, model, ids, empty_ids, guidance, device):
        both = torch.cat([ids, empty_ids.expand(len(ids), -1)]).to(device)
        self.model, self.guidance = model, guidance
        self.text = model.text_encoder(both)

    def __call__(self, x, timestep, label):
        count = len(self.text)
        times = torch.full((count,), timestep, device=x.device)
        labels = torch.full((count,), label, device=x.device)
        with_text, without = self.model.unet(torch.cat([x, x]), times, self.text, labels).chunk(2)
        return without + self.guidance * (with_text - without)


def _pixels(x):
    """[B, 3, H, W] in [-1, 1] -> [B, H, W, 3] uint8."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


@torch.no_grad()
def plain(model, ids, empty_ids, steps=25, guidance=3.0, seed=0, size=64, label=net.PLAIN, device="cpu"):
    """The plain process at one size; returns pictures [B, size, size, 3] uint8."""
    bars = torch.cat([torch.ones(1), net.cumulative_alphas()])
    predict = _Guided(model, ids, empty_ids, guidance, device)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((len(ids), 3, size, size), generator=generator).to(device)
    times = [round(t) for t in np.linspace(net.STEPS, 0, steps + 1)]
    for now, after in zip(times[:-1], times[1:]):
        v = predict(x, now - 1, label)
        a, s = bars[now].sqrt(), (1 - bars[now]).sqrt()
        x0 = (a * x - s * v).clamp(-1, 1)
        eps = (x - a * x0) / s
        x = bars[after].sqrt() * x0 + (1 - bars[after]).sqrt() * eps
    return _pixels(x)


@torch.no_grad()
def decomposed(model, ids, empty_ids, steps=25, guidance=3.0, seed=0, device="cpu"):
    """The decomposed process, 16, 32, then 64 pixels; returns pictures [B, 64, 64, 3] uint8."""
    bars = torch.cat([torch.ones(1), net.cumulative_alphas()])
    predict = _Guided(model, ids, empty_ids, guidance, device)
    generator = torch.Generator().manual_seed(seed)
    stage = len(net.TURNING_POINTS)
    x = torch.randn((len(ids), 3, 64 >> stage, 64 >> stage), generator=generator).to(device)
    times = sorted({round(t) for t in np.linspace(net.STEPS, 0, steps + 1)} | set(net.TURNING_POINTS), reverse=True)
    for now, after in zip(times[:-1], times[1:]):
        v = predict(x, now - 1, net.STAGE0 + stage)
        a, s = bars[now].sqrt(), (1 - bars[now]).sqrt()
        b, r = bars[after].sqrt(), (1 - bars[after]).sqrt()
        states = _components(x, stage)
        scales = [a * _fade(now, stage + i) for i in range(len(states))]
        clean = [(a * y - s * w) / (a * scale + s * s) for y, w, scale in zip(states, _components(v, stage), scales)]
        clean = _components(_assemble(clean).clamp(-(2**stage), 2**stage), stage)
        noise = [(y - scale * c) / s for y, c, scale in zip(states, clean, scales)]
        x = _assemble([b * _fade(after, stage + i) * c + r * e for i, (c, e) in enumerate(zip(clean, noise))])
        if stage and now == net.TURNING_POINTS[stage - 1]:
            fresh = torch.randn((len(x), 3, 2 * x.shape[2], 2 * x.shape[3]), generator=generator).to(device)
            x = net.up(x) + r * (fresh - net.up(net.down(fresh)))
            stage -= 1
    return _pixels(x)


def _fade(t, index):
    """Attenuation of the component that is dropped at turning point `index`; the last component never fades."""
    if index == len(net.TURNING_POINTS):
        return 1.0
    return net.ATTENUATION ** ((t / net.TURNING_POINTS[index]) ** net.POWER)


def _components(x, stage):
    """High parts of the stages from `stage` on, each in its own coordinates, then the last low part."""
    parts = []
    for _ in range(len(net.TURNING_POINTS) - stage):
        low = net.down(x)
        parts.append(x - net.up(low))
        x = low
    return parts + [x]


def _assemble(parts):
    """The inverse of `_components`."""
    x = parts[-1]
    for high in reversed(parts[:-1]):
        x = net.up(x) + high
    return x
