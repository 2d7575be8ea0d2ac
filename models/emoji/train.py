"""Trains the text encoder and the UNet together on rendered scenes, on a CPU or a GPU.

The same command starts, resumes and repeats: it continues from WORK/checkpoint.pt; without one, from the
weights of the committed ONNX folder (`--fresh` ignores both). The learning rate follows the hours spent,
so `--hours` is the planned total over all runs. Every few minutes it saves a checkpoint and draws a sheet.
"""

import argparse
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import network as net
import vocabulary as words

SHEET_PROMPTS = (
    "a tiger on a blue background",
    "an apple on a white background",
    "a taxi on a green background",
    "a castle on a pink background",
    "a pineapple on a gray background",
    "a tiger and a taxi on a blue background",
    "a banana and a house on a yellow background",
    "an elephant and a pizza on a red background",
    "a rocket and a cactus on a white background",
    "a turtle and a donut and a tree and a strawberry on a purple background",
)


class Model(torch.nn.Module):
    """Both networks, so that one optimiser, one average and one file hold them."""

    def __init__(self):
        super().__init__()
        self.unet = net.build_unet()
        self.text_encoder = net.TextEncoder()

    def forward(self, sample, timestep, input_ids, class_labels):
        return self.unet(sample, timestep, self.text_encoder(input_ids), class_labels)


def plan(progress):
    """The curriculum at a progress in [0, 1].

    Returns the weights of 64, 32 and 16 px batches (small pictures teach the words four times cheaper,
    so they come first) and the weights of 1, 2, 3 and 4 objects.
    """
    if progress < 0.12:
        return (0.1, 0.85, 0.05), (8, 2, 0, 0)
    if progress < 0.3:
        return (0.35, 0.55, 0.10), (5, 4, 0.5, 0.5)
    return (0.66, 0.24, 0.10), (4, 4.5, 0.7, 0.8)


def learning_rate(peak, step, progress):
    """Linear warm-up over 200 steps, then constant, then a cosine to 3 % over the last half."""
    decay = 0.5 * (1 + np.cos(np.pi * min(max((progress - 0.5) / 0.5, 0), 1)))
    return peak * min(1, (step + 1) / 200) * (0.03 + 0.97 * decay)


def make_batch(size, batch, counts, art, tokenizer, rng, generator):
    """One batch at one resolution: noisy states, timesteps, token ids, labels, targets and loss weights."""
    scenes = [data.sample_scene(rng, counts) for _ in range(batch)]
    pictures = torch.from_numpy(np.stack([data.render(scene, art, rng) for scene in scenes]))
    ids = torch.tensor([e.ids for e in tokenizer.encode_batch([data.caption(s, rng) for s in scenes])])
    x0 = pictures.permute(0, 3, 1, 2).float() / 127.5 - 1
    stage = {64: 0, 32: 1, 16: 2}[size]
    for _ in range(stage):
        x0 = net.down(x0)
    # The first `plain` pictures of the batch belong to the plain process, the others to the decomposed one.
    plain = {64: batch * 3 // 4, 32: batch // 2, 16: 0}[size]
    if plain:
        x0[:plain] /= 2**stage
    labels = torch.full((batch,), net.STAGE0 + stage)
    labels[:plain] = {64: net.PLAIN, 32: net.PLAIN_SMALL, 16: net.STAGE2}[size]
    first, last = net.stage_range(stage)
    even = (torch.arange(batch) + torch.rand(batch, generator=generator)) / torch.tensor([max(plain, 1)] * plain + [batch - plain] * (batch - plain))
    even[plain:] -= plain / (batch - plain)
    timestep = torch.where(torch.arange(batch) < plain, even * net.STEPS, first + even * (last + 1 - first)).long()
    signal = torch.cat([x0[:plain], net.decomposed_signal(x0[plain:], timestep[plain:], stage)])
    bar = net.cumulative_alphas()[timestep][:, None, None, None]
    noise = torch.randn(x0.shape, generator=generator)
    state = bar.sqrt() * signal + (1 - bar).sqrt() * noise
    target = bar.sqrt() * noise - (1 - bar).sqrt() * x0
    weight = torch.where(labels == net.STAGE1, 0.5, torch.where(labels == net.STAGE2, 0.2, 1.0))
    return state, timestep, ids, labels, target, weight


@torch.no_grad()
def sample(model, input_ids, empty_ids, size=64, steps=25, guidance=3.0, seed=0, label=net.PLAIN, device="cpu"):
    """DDIM of the plain process with guidance; returns pictures [B, H, W, 3] uint8."""
    bars = net.cumulative_alphas()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((len(input_ids), 3, size, size), generator=generator).to(device)
    ids = torch.cat([input_ids, empty_ids.expand(len(input_ids), -1)]).to(device)
    text = model.text_encoder(ids)
    times = torch.linspace(net.STEPS, 0, steps + 1).round().long() - 1
    for now, after in zip(times[:-1], times[1:]):
        label_batch = torch.full((len(ids),), label, device=device)
        v = model.unet(torch.cat([x, x]), now.to(device).expand(len(ids)), text, label_batch)
        with_text, without = v.chunk(2)
        v = without + guidance * (with_text - without)
        a, s = bars[now].sqrt(), (1 - bars[now]).sqrt()
        x0 = (a * x - s * v).clamp(-1, 1)
        eps = (x - a * x0) / s
        bar = bars[after] if after >= 0 else torch.tensor(1.0)
        x = bar.sqrt() * x0 + (1 - bar).sqrt() * eps
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


@torch.no_grad()
def sample_decomposed(model, input_ids, empty_ids, steps=25, guidance=3.0, seed=0, device="cpu"):
    """DDIM of the decomposed process (16, 32, then 64 px); returns pictures [B, H, W, 3] uint8."""
    bars = torch.cat([torch.ones(1), net.cumulative_alphas()])
    generator = torch.Generator().manual_seed(seed)
    ids = torch.cat([input_ids, empty_ids.expand(len(input_ids), -1)]).to(device)
    text = model.text_encoder(ids)
    times = sorted({round(t) for t in np.linspace(net.STEPS, 0, steps + 1)} | set(net.TURNING_POINTS), reverse=True)
    stage = len(net.TURNING_POINTS)
    x = torch.randn((len(input_ids), 3, 16, 16), generator=generator).to(device)
    for now, after in zip(times[:-1], times[1:]):
        batch = torch.full((len(ids),), now - 1, device=device)
        v = model.unet(torch.cat([x, x]), batch, text, torch.full((len(ids),), net.STAGE0 + stage, device=device))
        with_text, without = v.chunk(2)
        v = without + guidance * (with_text - without)
        a, s = bars[now].sqrt(), (1 - bars[now]).sqrt()
        # The decomposed signal is linear, so a component's scale can be applied and undone part by part.
        parts_x, parts_v = _components(x, stage), _components(v, stage)
        b, r = bars[after].sqrt(), (1 - bars[after]).sqrt()
        clean, noise = [], []
        for i, (y, w) in enumerate(zip(parts_x, parts_v)):
            scale = a * _fade(now, stage + i)
            clean.append((a * y - s * w) / (a * scale + s * s))
        x0 = _assemble(clean).clamp(-(2**stage), 2**stage)
        for i, (y, c) in enumerate(zip(parts_x, _components(x0, stage))):
            noise.append((y - a * _fade(now, stage + i) * c) / s)
        moved = [b * _fade(after, stage + i) * c + r * e for i, (c, e) in enumerate(zip(_components(x0, stage), noise))]
        x = _assemble(moved)
        if stage and now == net.TURNING_POINTS[stage - 1]:
            fresh = torch.randn((len(x), 3, 2 * x.shape[2], 2 * x.shape[3]), generator=generator).to(device)
            x = net.up(x) + r * (fresh - net.up(net.down(fresh)))
            stage -= 1
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _fade(t, index):
    if index == len(net.TURNING_POINTS):
        return 1.0
    return net.ATTENUATION ** ((t / net.TURNING_POINTS[index]) ** net.POWER)


def _components(x, stage):
    """High parts of the stages from `stage` on, then the last low part, each in its own coordinates."""
    parts = []
    for _ in range(len(net.TURNING_POINTS) - stage):
        low = net.down(x)
        parts.append(x - net.up(low))
        x = low
    return parts + [x]


def _assemble(parts):
    x = parts[-1]
    for high in reversed(parts[:-1]):
        x = net.up(x) + high
    return x


def draw_sheet(model, tokenizer, path, device):
    """Plain pictures in the upper row, decomposed ones below."""
    ids = torch.tensor([e.ids for e in tokenizer.encode_batch(list(SHEET_PROMPTS))])
    empty = torch.tensor(tokenizer.encode("").ids)[None]
    rows = [draw(model, ids, empty, steps=20, device=device) for draw in (sample, sample_decomposed)]
    data.sheet([picture for row in rows for picture in row], len(SHEET_PROMPTS)).save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=data.DEFAULT_WORK, help="downloads and checkpoints")
    parser.add_argument("--hours", type=float, default=12.0, help="planned hours over all runs")
    parser.add_argument("--rate", type=float, default=6e-4, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fresh", action="store_true", help="start from new weights")
    options = parser.parse_args()

    work, device = options.work, options.device
    art, tokenizer = data.Art(work), words.build_tokenizer()
    torch.manual_seed(options.seed)
    model = Model().to(device).to(memory_format=torch.channels_last)
    average = Model().to(device).to(memory_format=torch.channels_last).requires_grad_(False)
    average.load_state_dict(model.state_dict())
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.99), fused=True)
    state = {"step": 0, "hours": 0.0, "pictures": {16: 0, 32: 0, 64: 0}}

    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists() and not options.fresh:
        saved = torch.load(checkpoint, map_location=device, weights_only=False)
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["average"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
        print(f"resumed at step {state['step']}, {state['hours']:.2f} h", flush=True)
    elif not options.fresh:
        from export import load_shipped_weights

        state = load_shipped_weights(model) or state
        average.load_state_dict(model.state_dict())
        print(f"started from the shipped weights, {state['hours']:.2f} h", flush=True)

    losses, began = {16: [], 32: [], 64: []}, time.time()
    reported = saved_at = drawn_at = began
    hours_before = state["hours"]
    while state["hours"] < options.hours:
        progress = state["hours"] / options.hours
        # Seeded by the step, so a resumed run sees the batches that an unbroken one would have seen.
        rng = random.Random(options.seed * 1_000_003 + state["step"])
        generator = torch.Generator().manual_seed(rng.getrandbits(40))
        sizes, counts = plan(progress)
        size = rng.choices((64, 32, 16), sizes)[0]
        batch = {64: 24, 32: 40, 16: 64}[size]
        tensors = make_batch(size, batch, counts, art, tokenizer, rng, generator)
        x, timestep, ids, labels, target, weight = (t.to(device) for t in tensors)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options.rate, state["step"], progress)
        with torch.autocast(device, torch.bfloat16):
            v = model(x.contiguous(memory_format=torch.channels_last), timestep, ids, labels)
        loss = ((v.float() - target) ** 2).mean((1, 2, 3))
        (loss * weight).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        state["step"] += 1
        state["pictures"][size] += batch
        state["hours"] = hours_before + (time.time() - began) / 3600
        decay = min(0.999, (1 + state["step"]) / (10 + state["step"]))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        losses[size].append(loss.mean().item())
        if time.time() - reported > 60:
            means = " ".join(f"{s}px {np.mean(l):.4f}" for s, l in losses.items() if l)
            counted = {s: n for s, n in state["pictures"].items()}
            print(f"step {state['step']} {state['hours']:.3f} h loss {means} pictures {counted}", flush=True)
            losses, reported = {16: [], 32: [], 64: []}, time.time()
        if time.time() - saved_at > 300 or state["hours"] >= options.hours:
            save(checkpoint, model, average, optimizer, state)
            saved_at = time.time()
        if time.time() - drawn_at > 720 or state["hours"] >= options.hours:
            draw_sheet(average, tokenizer, work / "sheet.png", device)
            drawn_at = time.time()


def save(path, model, average, optimizer, state):
    """Writes the checkpoint beside the old one first, so that a crash leaves a whole file."""
    held = {"model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict(), "state": state}
    torch.save(held, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


if __name__ == "__main__":
    main()
