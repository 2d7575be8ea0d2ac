"""Trains the two judges: small classifiers that say which objects and subjects a picture shows.

The first judge may be used while searching and developing, the second (another architecture and seed)
only for final scores. Both give one probability per label of `LABELS`; the last one, "nothing", means
that no known thing is in the picture. Training pictures also show foreign emoji, blur and noise, so that
drawings that only resemble an object count for little. A label is *found* above its threshold, which is
set so that at most 2 % of the pictures without the label pass.
"""

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from torch import nn

import data
import export
import vocabulary as words

FOLDER = Path(__file__).resolve().parent / "judges"
NOTHING = "nothing"
LABELS = tuple(words.OBJECTS) + tuple(words.SUBJECTS) + (NOTHING,)
FALSE_FINDS = 0.02
POOL, RENEWED = 3072, 16


class StridedJudge(nn.Module):
    """First judge: plain convolutions with strides, batch norm, mean pooling."""

    def __init__(self):
        super().__init__()
        widths = (3, 24, 48, 72, 96)
        blocks = []
        for before, after in zip(widths, widths[1:]):
            blocks += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            blocks += [nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*blocks)
        self.head = nn.Linear(96 * 2, len(LABELS))

    def features(self, picture):
        """[B, 3, 64, 64] in [-1, 1] -> [B, 192]: mean and maximum over places."""
        x = self.body(picture)
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)

    def forward(self, picture):
        features = self.features(picture)
        return torch.sigmoid(self.head(features)), features


class ResidualUnit(nn.Module):
    """Depthwise 5 x 5 convolution and two pointwise ones around a residual path."""

    def __init__(self, width):
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.widen = nn.Conv2d(width, 3 * width, 1)
        self.narrow = nn.Conv2d(3 * width, width, 1)

    def forward(self, x):
        return x + self.narrow(F.gelu(self.widen(self.norm(self.depthwise(x)))))


class ResidualJudge(nn.Module):
    """Second judge: patches, depthwise residual units, softly weighted pooling."""

    def __init__(self):
        super().__init__()
        widths = (40, 80, 128)
        stages = [nn.Conv2d(3, widths[0], 4, stride=4), ResidualUnit(widths[0])]
        for before, after in zip(widths, widths[1:]):
            stages += [nn.BatchNorm2d(before), nn.Conv2d(before, after, 2, stride=2), ResidualUnit(after)]
        self.body = nn.Sequential(*stages, nn.BatchNorm2d(widths[-1]), nn.Conv2d(widths[-1], 192, 1), nn.GELU())
        self.head = nn.Linear(192, len(LABELS))

    def features(self, picture):
        """[B, 3, 64, 64] in [-1, 1] -> [B, 192]: each channel's places weighted by their own softmax."""
        x = self.body(picture).flatten(2)
        return (x * torch.softmax(x, 2)).sum(2)

    def forward(self, picture):
        features = self.features(picture)
        return torch.sigmoid(self.head(features)), features


def judged_scene(art, others, rng):
    """A picture of 0 to 4 known and foreign things, and its 0/1 label vector."""
    count = rng.choices((0, 1, 2, 3, 4), (0.5, 4, 4, 1, 1))[0]
    known = {noun: ("google", name) for noun, (name, _) in words.OBJECTS.items()}
    subjects = {name: (source, drawing) for name, (source, drawing, _) in words.SUBJECTS.items()}
    keys, labels = [], np.zeros(len(LABELS), np.float32)
    for _ in range(count):
        kind = rng.random()
        if kind < 0.2:
            keys.append(rng.choice(others))
            continue
        pool = subjects if kind < 0.5 else known
        name = rng.choice(list(pool))
        keys.append(pool[name])
        labels[LABELS.index(name)] = 1
    if not labels.any():
        labels[-1] = 1
    pattern = rng.choice(words.PATTERNS) if rng.random() < 0.5 else "plain"
    scene = data.Scene(keys, [], rng.choice(list(words.COLOURS)), pattern, rng.random() < 0.5)
    return data.render(scene, art, rng), labels


def foreign_keys(art):
    """Drawings that no label stands for: the candidates and 200 others; the last 60 are kept for testing."""
    candidates = [("google", name) for name, _ in words.CANDIDATES.values()]
    rest = art.load_others(200)
    return candidates + rest[:-60], rest[-60:]


def batch_of(count, art, others, rng):
    """`count` judged scenes as tensors: pictures [B, 3, 64, 64] in [-1, 1] and labels [B, len(LABELS)]."""
    pictures, labels = zip(*(judged_scene(art, others, rng) for _ in range(count)))
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x, torch.from_numpy(np.stack(labels))


def roughen(x, generator):
    """Blurs a third of the pictures by 2 x 2 or 4 x 4 resampling and adds noise to half, as drawings are rough."""
    x = x.clone()
    third = len(x) // 3
    scale = 0.5 if torch.rand(1, generator=generator) < 0.8 else 0.35
    small = F.interpolate(x[:third], scale_factor=scale, mode="bilinear", antialias=True)
    x[:third] = F.interpolate(small, size=x.shape[2:], mode="bilinear")
    half = x[third // 2 : third // 2 + len(x) // 2]
    half += torch.randn(half.shape, generator=generator) * torch.rand((len(half), 1, 1, 1), generator=generator) * 0.2
    return x.clamp(-1, 1)


def train_judge(judge, seed, steps, art, others):
    """Trains one judge for `steps` batches of 64."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    nn.init.constant_(judge.head.bias, -3.0)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.02)
    # A pool of scenes, a few of them renewed every step: drawing is dearer than a step of so small a network.
    pool_x, pool_y = batch_of(POOL, art, others, rng)
    reported = time.time()
    judge.train()
    for step in range(steps):
        x, y = batch_of(RENEWED, art, others, rng)
        at = step * RENEWED % POOL
        pool_x[at : at + RENEWED], pool_y[at : at + RENEWED] = x, y
        chosen = torch.randint(POOL, (64,), generator=generator)
        x, y = roughen(pool_x[chosen], generator), pool_y[chosen]
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 100) * max(0.01, 1 - step / steps)
        with torch.autocast("cpu", torch.bfloat16):
            logits = judge.head(judge.features(x))
        loss = F.binary_cross_entropy_with_logits(logits.float(), y * 0.99 + 0.002)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if time.time() - reported > 30:
            print(f"  step {step} loss {loss.item():.3f}", flush=True)
            reported = time.time()
    return judge.eval()


@torch.no_grad()
def thresholds_of(judge, x, y):
    """Per label the lowest threshold >= 0.3 at which at most 2 % of the pictures without it pass."""
    p = torch.cat([judge(part)[0] for part in x.split(256)])
    found = []
    for i in range(len(LABELS)):
        negatives = p[y[:, i] == 0, i]
        found.append(max(0.3, torch.quantile(negatives, 1 - FALSE_FINDS / 2).item()))
    return torch.tensor(found)


def accuracy(p, y, thresholds):
    """Shares over all labels: found where present, found where absent, and whole pictures judged right."""
    hits = p > thresholds
    present = y > 0
    per_label_false = ((hits & ~present).sum(0) / (~present).sum(0)).max().item()
    return {
        "recall": (hits & present).sum().item() / present.sum().item(),
        "false_finds": (hits & ~present).sum().item() / (~present).sum().item(),
        "worst_label_false_finds": per_label_false,
        "pictures_all_right": (hits == present).all(1).float().mean().item(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=data.DEFAULT_WORK)
    parser.add_argument("--out", type=Path, default=FOLDER)
    parser.add_argument("--steps", type=int, default=4500, help="batches of 64 for each judge")
    options = parser.parse_args()
    art = data.Art(options.work)
    seen, unseen = foreign_keys(art)
    setting_x, setting_y = batch_of(3000, art, seen, random.Random(10_001))
    test_x, test_y = batch_of(3000, art, unseen, random.Random(10_002))
    report = {"labels": list(LABELS)}
    for name, build, seed in (("first", StridedJudge, 11), ("second", ResidualJudge, 22)):
        torch.manual_seed(seed)
        judge = train_judge(build(), seed, options.steps, art, seen)
        thresholds = thresholds_of(judge, setting_x, setting_y)
        path = options.out / f"{name}.onnx"
        inputs = {"picture": torch.zeros(2, 3, data.SIZE, data.SIZE)}
        batch = {0: "batch"}
        export.write_onnx(judge, inputs, {"picture": batch, "probabilities": batch, "features": batch}, path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        p = np.concatenate([session.run(["probabilities"], {"picture": part.numpy()})[0] for part in test_x.split(256)])
        figures = accuracy(torch.from_numpy(p), test_y, thresholds)
        report[name] = {
            "architecture": build.__name__,
            "seed": seed,
            "steps": options.steps,
            "parameters": sum(w.numel() for w in judge.parameters()),
            "thresholds": {label: round(t, 4) for label, t in zip(LABELS, thresholds.tolist())},
            "on_3000_unseen_scenes": {key: round(value, 4) for key, value in figures.items()},
        }
        print(name, report[name]["on_3000_unseen_scenes"], f"{path.stat().st_size / 1024:.0f} KiB", flush=True)
    (options.out / "judges.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
