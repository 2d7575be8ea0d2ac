"""Searches for concept neurons: which scales to set to zero so that a loss falls.

A loss is any function of scales s [N] and a generator; s = 1 is the untouched network. The derivative
dL/ds_i at s = 1 equals theta_i dL/dtheta_i, the first-order saliency: where it is positive, shrinking
weight i lowers the loss. From Cones: `algorithm_1` with threshold. With rho = 0 it is `saliency`, the mean
one-shot score. Ours: the budget, `gradual` and `learnt_mask`. `tune` is the paper's fine-tuning: the found weights get
values instead of being shut. This file knows no network.
"""

import math
from dataclasses import dataclass, field

import torch


@dataclass
class Found:
    """A set: `shut` boolean [N], the loss of each batch, how alike two halves of the draws scored, the scores, and the
    values [members] that tuning gave it."""

    shut: torch.Tensor
    losses: list = field(default_factory=list)
    agreement: float = float("nan")
    scores: torch.Tensor | None = None
    values: torch.Tensor | None = None


def gradient(loss, scales, generator):
    """dL/ds at `scales` for one batch, float32 [N], and the loss."""
    scales = scales.detach().requires_grad_(True)
    value = loss(scales, generator)
    (slope,) = torch.autograd.grad(value, scales)
    if not torch.isfinite(slope).all():
        raise FloatingPointError(f"the loss is {value.item()} and its gradient is not finite")
    return slope, value.item()


def algorithm_1(loss, count, steps, generator, rho=0.0):
    """Algorithm 1 of Cones: the mean of a_k = theta_k g_k along theta_{k+1} = theta_k (1 - rho a_k).

    In scales, theta_k = s_k theta_0 and a_k = s_k dL/ds_k. Scores are summed in float64. Returns the mean
    score [N] (the paper's sum divided by the steps, so that a threshold does not depend on them), the
    losses, and the correlation of the scores of even and odd steps.
    """
    scales = torch.ones(count, dtype=torch.float64 if rho else torch.float32)
    halves, losses = torch.zeros((2, count), dtype=torch.float64), []
    for k in range(steps):
        slope, value = gradient(loss, scales, generator)
        score = scales * slope
        halves[k % 2] += score
        losses.append(value)
        if rho:
            scales = scales * (1 - rho * score)
    agreement = torch.corrcoef(halves)[0, 1].item() if steps > 1 else float("nan")
    return halves.sum(0) / steps, losses, agreement


def saliency(loss, count, batches, generator):
    """The mean of theta * g over draws: Algorithm 1 with rho = 0."""
    return algorithm_1(loss, count, batches, generator)


def shut_by_threshold(scores, tau):
    """Weights whose mean score reaches tau: kept iff score < tau, as in Algorithm 1."""
    return scores >= tau


def shut_by_budget(scores, budget):
    """The `budget` weights of the largest score, fewer where fewer are positive."""
    best = scores.topk(min(budget, len(scores))).indices
    shut = torch.zeros(len(scores), dtype=torch.bool)
    shut[best[scores[best] > 0]] = True
    return shut


def gradual(loss, count, budget, generator, stages=6, batches=8):
    """Shuts in stages of geometrically growing size and scores the open weights anew between them."""
    shut, losses = torch.zeros(count, dtype=torch.bool), []
    for stage in range(1, stages + 1):
        goal = round(budget ** (stage / stages))
        scores = torch.zeros(count, dtype=torch.float64)
        for _ in range(batches):
            slope, value = gradient(loss, 1 - shut.float(), generator)
            scores += slope
            losses.append(value)
        scores[shut] = -torch.inf
        shut |= shut_by_budget(scores, goal - int(shut.sum()))
    return Found(shut, losses)


def learnt_mask(loss, count, batches, generator, rate=0.04, betas=(0.9, 0.99), penalty=0.0, budget=None, grow=0.5):
    """A scale per weight, learnt by Adam; a weight is shut while its scale is below one half.

    The loss sees the binary mask and its gradient is passed straight through to the scales, which start at
    one and are kept in [0, 1]. `penalty` is the price of a shut weight, added to the loss as
    penalty * sum(1 - s). With a `budget`, the shut weights are at most that many: those of the largest
    0.4 q_i - s_i, where q is the sum of all dL/ds so far over its largest entry. Adam brings weights of small
    and of large effect down alike; q puts the large ones first. The budget grows geometrically over the first
    `grow` part of the batches.
    """
    scales = torch.ones(count)
    mean, square, total = torch.zeros(count), torch.zeros(count), torch.zeros(count, dtype=torch.float64)
    shut, losses = torch.zeros(count, dtype=torch.bool), []
    for k in range(1, batches + 1):
        slope, value = gradient(loss, 1 - shut.float(), generator)
        losses.append(value)
        total += slope
        slope = slope - penalty
        mean.lerp_(slope, 1 - betas[0])
        square.lerp_(slope * slope, 1 - betas[1])
        step = (mean / (1 - betas[0] ** k)) / ((square / (1 - betas[1] ** k)).sqrt() + 1e-12)
        scales = (scales - rate * step).clamp(0, 1)
        shut = scales < 0.5
        if budget is not None:
            allowed = round(budget ** min(1.0, k / max(1, grow * batches)))
            if int(shut.sum()) > allowed:
                gain = total / total.abs().max().clamp(min=1e-30)
                shut = shut_by_budget(torch.where(shut, 1.0 - scales + 0.4 * gain, 0.0), allowed)
    return Found(shut, losses)


def tune(
    loss,
    shut,
    weights,
    units,
    steps,
    generator,
    rate=0.1,
    decay=0.01,
    betas=(0.9, 0.99),
    warm_up=10,
    start=None,
    kept=None,
):
    """Learns values for the shut weights, and for no other, by AdamW: float32 [members], and the losses. They begin at zero,
    or at `start` [members].

    `weights` [N] are the untouched ones, `units` [N] what a step of one means for each: the standard deviation of its
    projection. The step size rises over `warm_up` steps to `rate` and falls to zero by a half cosine. Where `kept` gives the
    few levels among which values [members] will be kept, the second half of the steps sees them so, and slopes are passed
    straight through (arXiv 1308.3432).
    """
    members = shut.nonzero()[:, 0]
    ours, unit = weights[members], units[members]
    values = torch.zeros(len(members)) if start is None else start / unit
    values.requires_grad_(True)
    optimizer = torch.optim.AdamW([values], lr=rate, betas=betas, eps=1e-12, weight_decay=decay)
    losses = []
    for k in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, k / warm_up) * 0.5 * (1 + math.cos(math.pi * k / steps))
        seen = values * unit
        if kept is not None and 2 * (k - 1) >= steps:
            seen = seen + (kept(seen.detach()) - seen).detach()
        scales = torch.ones(len(weights)).index_put((members,), seen / ours)
        value = loss(scales, generator)
        optimizer.zero_grad()
        value.backward()
        if not torch.isfinite(values.grad).all():
            raise FloatingPointError(f"the loss is {value.item()} and its gradient is not finite")
        optimizer.step()
        losses.append(value.item())
    return (values * unit).detach(), losses
