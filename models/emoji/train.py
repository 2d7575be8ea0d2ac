"""Trains the text encoder and the UNet together on rendered scenes, on a CPU or a GPU.

The same command starts, resumes and repeats: it continues from WORK/checkpoint.pt; without one, from the
weights of the committed ONNX folder (`--fresh` ignores both). SIGTERM stops it cleanly. The curriculum and
the learning rate follow the steps done, `--steps` being the planned total over all runs: the rate falls in
the second half of the plan, so a longer plan raises it again.
"""

import argparse
import random
import signal
import time
from pathlib import Path

import numpy as np
import torch

import data
import network as net
import sampling
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


BETAS = (0.9, 0.99)  # of Adam
MOMENTUM = 0.95  # of Muon


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

    Returns the weights of 64, 32 and 16 px batches (small pictures teach the words four times cheaper, so
    they come first), the weights of 1, 2, 3 and 4 objects, and the share of tidy scenes.
    """
    if progress < 0.12:
        return (0.1, 0.85, 0.05), (8, 2, 0, 0), 0.9
    if progress < 0.5:
        return (0.25, 0.60, 0.15), (5, 4, 0.5, 0.5), 0.9
    if progress < 0.9:
        return (0.50, 0.37, 0.13), (4, 4.5, 0.5, 1.0), 0.75
    # A single object is large: its detail is learnt last.
    return (0.75, 0.17, 0.08), (7, 3, 0.5, 1.0), 0.75


def learning_rate(peak, step, progress):
    """Linear warm-up over 200 steps, then constant, then a cosine to 3 % over the last half."""
    decay = 0.5 * (1 + np.cos(np.pi * min(max((progress - 0.5) / 0.5, 0), 1)))
    return peak * min(1, (step + 1) / 200) * (0.03 + 0.97 * decay)


def make_batch(size, batch, counts, tidy, newest, art, tokenizer, rng, generator):
    """One batch at one resolution: noisy states, timesteps, token ids, labels, targets and loss weights."""
    scenes = [data.sample_scene(rng, counts, tidy=tidy, newest=newest) for _ in range(batch)]
    pictures = torch.from_numpy(np.stack([data.render(scene, art, rng) for scene in scenes]))
    ids = torch.tensor([e.ids for e in tokenizer.encode_batch([data.caption(s, rng) for s in scenes])])
    x0 = pictures.permute(0, 3, 1, 2).float() / 127.5 - 1
    stage = {64: 0, 32: 1, 16: 2}[size]
    for _ in range(stage):
        x0 = net.down(x0)
    # The first `plain` pictures of the batch belong to the plain process, the others to the decomposed one.
    plain = {64: batch * 5 // 8, 32: batch * 3 // 8, 16: 0}[size]
    if plain:
        x0[:plain] /= 2**stage
    labels = torch.full((batch,), net.STAGE0 + stage)
    labels[:plain] = {64: net.PLAIN, 32: net.PLAIN_SMALL, 16: net.STAGE2}[size]
    first, last = net.stage_range(stage)
    spread = [(torch.arange(n) + torch.rand(n, generator=generator)) / max(n, 1) for n in (plain, batch - plain)]
    timestep = torch.cat([spread[0] * net.STEPS, first + spread[1] * (last + 1 - first)]).long()
    clean = torch.cat([x0[:plain], net.decomposed_signal(x0[plain:], timestep[plain:], stage)])
    bar = net.cumulative_alphas()[timestep][:, None, None, None]
    noise = torch.randn(x0.shape, generator=generator)
    state = bar.sqrt() * clean + (1 - bar).sqrt() * noise
    target = bar.sqrt() * noise - (1 - bar).sqrt() * x0
    weight = torch.where(labels == net.STAGE1, 0.5, torch.where(labels == net.STAGE2, 0.2, 1.0))
    return state, timestep, ids, labels, target, weight


def draw_sheet(model, tokenizer, path, device):
    """Plain pictures in the upper row, decomposed ones below."""
    ids = torch.tensor([e.ids for e in tokenizer.encode_batch(list(SHEET_PROMPTS))])
    empty = torch.tensor(tokenizer.encode("").ids)[None]
    rows = [draw(model, ids, empty, steps=20, device=device) for draw in (sampling.plain, sampling.decomposed)]
    data.sheet([picture for row in rows for picture in row], len(SHEET_PROMPTS)).save(path)


def views(vector, module):
    """Pieces of a vector in the shapes of the module's parameters."""
    pieces, at = [], 0
    for parameter in module.parameters():
        pieces.append(vector[at : at + parameter.numel()].view_as(parameter))
        at += parameter.numel()
    return pieces


def place(module, vector):
    """Makes the module's parameters views of `vector`."""
    for parameter, piece in zip(module.parameters(), views(vector, module)):
        parameter.data = piece


def is_hidden_matrix(name, parameter):
    """True for the matrices and kernels that Muon trains: all but embeddings and the first and last layers."""
    ends = ("embedding", "conv_in", "conv_out")
    return parameter.ndim > 1 and not any(end in name for end in ends)


def reads_text(name):
    """True for the text encoder and the cross-attention's keys and values, which concept files are made for."""
    return name.startswith("text_encoder.") or any(end in name for end in ("attn2.to_k.", "attn2.to_v."))


def orthogonal(matrix):
    """A matrix [M, N] with its singular values brought near one by five Newton-Schulz steps.

    The quintic's coefficients are those of Muon (Jordan et al. 2024): fast at small values, not exact at one.
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
    return (x.T if tall else x).float()


class Training:
    """All numbers of a run as flat vectors [N] in shared memory, N parameters, so that every worker sees them.

    The optimisers are written out here since each worker updates its own share of the parameters: Muon for
    the hidden matrices, with steps as long as Adam's (Liu et al. 2025), and AdamW for everything else.
    """

    def __init__(self, model, workers, device, keep_text=False):
        start = torch.cat([p.detach().flatten() for p in model.parameters()]).to(device)
        self.weights, self.average = start, start.clone()
        self.gradients = torch.zeros(workers, len(start), device=device)
        self.mean, self.square = torch.zeros_like(start), torch.zeros_like(start)
        self.norms = torch.zeros(workers, dtype=torch.float64, device=device)
        self.stop = torch.zeros(2, dtype=torch.int64)  # asked for by a signal, decided by worker 0
        if device == "cpu":
            for value in vars(self).values():
                value.share_memory_()
        self.shares = self._shared_out(model, workers, keep_text)

    @staticmethod
    def _shared_out(model, workers, keep_text):
        """For every worker its parameters as (slice of the vectors, shape of the matrix or None, decay).

        Orthogonalising costs length times the shorter side; the dearest goes first to whoever has least to do.
        """
        costs, at = [], 0
        for name, parameter in model.named_parameters():
            rows, count = parameter.shape[0], parameter.numel()
            matrix = (rows, count // rows) if is_hidden_matrix(name, parameter) else None
            cost = count * (min(matrix) + 10 if matrix else 10)
            if not (keep_text and reads_text(name)):
                costs.append((cost, slice(at, at + count), matrix, 0.01 * (parameter.ndim > 1)))
            at += count
        shares, load = [[] for _ in range(workers)], [0] * workers
        for cost, *task in sorted(costs, key=lambda entry: -entry[0]):
            least = load.index(min(load))
            shares[least].append(task)
            load[least] += cost
        return shares

    def update(self, step, rate, barrier):
        """One step with the mean gradient of the workers on this worker's parameters, and their running average."""
        share = [(self.gradients[:, part].mean(0), part, *rest) for part, *rest in self.shares[barrier.rank]]
        self.norms[barrier.rank] = sum(gradient.double().square().sum() for gradient, *_ in share)
        barrier.wait()
        scale = min(1.0, 1.0 / (self.norms.sum().sqrt().item() + 1e-12))
        for gradient, part, matrix, decay in share:
            gradient *= scale
            weights, mean = self.weights[part], self.mean[part]
            weights.mul_(1 - rate * decay)
            if matrix:
                mean.lerp_(gradient, 1 - MOMENTUM)
                direction = orthogonal(gradient.lerp(mean, MOMENTUM).view(matrix)).flatten()
                weights.add_(direction, alpha=-rate * 0.2 * max(matrix) ** 0.5)
            else:
                square = self.square[part]
                mean.lerp_(gradient, 1 - BETAS[0])
                square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
                root = (square / (1 - BETAS[1] ** (step + 1))).sqrt_().add_(1e-8)
                weights.addcdiv_(mean, root, value=-rate / (1 - BETAS[0] ** (step + 1)))
            self.average[part].lerp_(weights, 1 - min(0.999, (2 + step) / (11 + step)))

    def save(self, path, state):
        """Writes the checkpoint beside the old one first, so that a crash leaves a whole file."""
        held = {name: getattr(self, name) for name in ("weights", "average", "mean", "square")}
        torch.save({**held, "state": state}, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)

    def load(self, saved):
        for name in ("weights", "average", "mean", "square"):
            getattr(self, name).copy_(saved[name])


class Barrier:
    """Where the workers wait for one another, and this worker's number."""

    def __init__(self, shared, rank):
        self.shared, self.rank = shared, rank

    def wait(self):
        self.shared.wait()


def averaged_model(saved):
    """The model with the averaged weights of a loaded checkpoint."""
    model = Model()
    place(model, saved["average"].cpu())
    return model.eval()


def work_on(rank, training, shared_barrier, state, options):
    """One worker: gradients of its own share of every batch, then the update of its own part of the weights."""
    workers, device, barrier = options.workers, options.device, Barrier(shared_barrier, rank)
    if device == "cpu":
        torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    art, tokenizer = data.Art(options.work), words.build_tokenizer()
    model, drawn = Model().to(device), Model().to(device).eval()
    place(model, training.weights)
    place(drawn, training.average)
    for parameter, gradient in zip(model.parameters(), views(training.gradients[rank], model)):
        parameter.grad = gradient
    losses, began = {16: [], 32: [], 64: []}, time.time()
    reported = saved_at = drawn_at = began
    hours_before = state["hours"]
    while not training.stop[1]:
        progress = state["step"] / options.steps
        # Seeded by the step, so a resumed run sees the batches that an unbroken one would have seen.
        rng = random.Random(options.seed * 1_000_003 + state["step"])
        sizes, counts, tidy = plan(progress)
        sizes = options.shares or sizes
        newest = options.newest if progress < 0.9 else 0
        size = rng.choices((64, 32, 16), sizes)[0]
        rng.seed(f"{rng.random()} {rank}")
        generator = torch.Generator().manual_seed(rng.getrandbits(40))
        batch = options.batch * 64 // size
        tensors = make_batch(size, batch, counts, tidy, newest, art, tokenizer, rng, generator)
        x, timestep, ids, labels, target, weight = (t.to(device) for t in tensors)
        training.gradients[rank].zero_()
        with torch.autocast(device, torch.bfloat16):
            v = model(x.contiguous(memory_format=torch.channels_last), timestep, ids, labels)
        loss = ((v.float() - target) ** 2).mean((1, 2, 3))
        (loss * weight).mean().backward()
        barrier.wait()
        rate = learning_rate(options.rate, state["step"], progress)
        with torch.no_grad():
            training.update(state["step"], rate, barrier)

        state["step"] += 1
        state["pictures"][size] += batch * workers
        state["hours"] = hours_before + (time.time() - began) / 3600
        losses[size].append(loss.mean().item())
        if rank == 0 and (training.stop[0] or state["step"] >= options.steps):
            training.stop[1] = 1
        barrier.wait()
        if rank:
            continue
        if time.time() - reported > 60:
            means = " ".join(f"{s}px {np.mean(values):.4f}" for s, values in losses.items() if values)
            print(f"step {state['step']} {state['hours']:.3f} h loss {means} pictures {state['pictures']}", flush=True)
            losses, reported = {16: [], 32: [], 64: []}, time.time()
        if time.time() - saved_at > 300:
            training.save(options.work / "checkpoint.pt", state)
            saved_at = time.time()
        if time.time() - drawn_at > 1800:
            draw_sheet(drawn, tokenizer, options.work / "sheet.png", device)
            drawn_at = time.time()
    if rank == 0:
        training.save(options.work / "checkpoint.pt", state)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=data.DEFAULT_WORK, help="downloads and checkpoints")
    parser.add_argument("--steps", type=int, default=20000, help="planned steps over all runs")
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, help="processes; by default one per core, or one on a GPU")
    parser.add_argument("--batch", type=int, default=16, help="pictures of 64 px per worker and step; 2 and 4 times as many of 32 and 16 px")
    parser.add_argument("--newest", type=int, default=0, help="the last N objects come twice as often until 90 %% of the plan: for a run that goes on with new ones")
    parser.add_argument("--shares", type=float, nargs=3, help="of 64, 32 and 16 px batches, in place of the curriculum's")
    parser.add_argument("--keep-text", action="store_true", help="leave the text encoder, keys and values as they are, and so concept files valid")
    parser.add_argument("--fresh", action="store_true", help="start from new weights")
    options = parser.parse_args()
    if options.workers is None:
        options.workers = 1 if options.device != "cpu" else max(1, torch.get_num_threads())

    data.fetch(options.work)
    torch.manual_seed(options.seed)
    model = Model()
    state = {"step": 0, "hours": 0.0, "pictures": {16: 0, 32: 0, 64: 0}}
    checkpoint = options.work / "checkpoint.pt"
    resumed = checkpoint.exists() and not options.fresh
    if not resumed and not options.fresh:
        from export import load_shipped_weights

        state = load_shipped_weights(model) or state
    training = Training(model, options.workers, options.device, options.keep_text)
    if resumed:
        saved = torch.load(checkpoint, map_location=options.device, weights_only=True)
        training.load(saved)
        state = saved["state"]
    print(f"from step {state['step']}, {state['hours']:.2f} h, {options.workers} workers", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: training.stop.__setitem__(0, 1))
    # One process per core: two threads that meet after every operator lose a third where cores are shared.
    context = torch.multiprocessing.get_context("spawn")
    arguments = (training, context.Barrier(options.workers), state, options)
    torch.multiprocessing.start_processes(work_on, arguments, options.workers, start_method="spawn")


if __name__ == "__main__":
    main()
