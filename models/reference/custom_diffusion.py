"""Custom Diffusion (arXiv 2212.04488), the peer of composing: all cross-attention K and V weights are tuned for each subject,
and several subjects are merged in closed form. Written from the paper's equations.

A subject costs a whole copy of these weights. Tuned weights act on every token.
"""

from contextlib import contextmanager

import torch

from find import surroundings
from losses import ImplantingLoss
from model import token_ids, words
from neurons import phrase_rows

RIDGE = 1e-3  # share of the mean square of the regular contexts, for features that they hardly have
REGULAR_CAPTIONS = 400


def tuned(model, weights, learn, word, noun, side, steps, batch=8, rate=0.03, seed=0):
    """All K and V weights [out, in] by path, tuned by AdamW on the implanting loss with prior preservation.

    `rate` is in standard deviations of a projection. The model is left as it was.
    """
    prior, _ = surroundings(model, weights, word, noun, seed, side)
    loss = ImplantingLoss(model, weights, learn.at(side), prior, batch=batch)
    kept = {path: layer.weight.detach().clone() for path, layer in weights.layers.items()}
    groups = [
        {"params": [layer.weight.requires_grad_(True)], "lr": rate * layer.weight.std().item()}
        for layer in weights.layers.values()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator, untouched = torch.Generator().manual_seed(seed), torch.ones(weights.count)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(untouched, generator).backward()
        optimizer.step()
        schedule.step()
    found = {path: layer.weight.detach().clone() for path, layer in weights.layers.items()}
    with torch.no_grad():
        for path, layer in weights.layers.items():
            layer.weight.requires_grad_(False).copy_(kept[path])
    return found


@torch.no_grad()
def regular_contexts(model):
    """Contexts [N, C] of captions of ordinary objects, what merging should leave alone."""
    nouns, colours = list(words.OBJECTS), list(words.COLOURS)
    captions = [
        f"{words.with_article(nouns[i % len(nouns)])} and {words.with_article(nouns[(7 * i + 3) % len(nouns)])} on a "
        f"{colours[i % len(colours)]} background"
        for i in range(REGULAR_CAPTIONS)
    ]
    ids = token_ids(captions)
    return model.text_encoder(ids)[ids != words.WORDS.index(words.PAD)]


@torch.no_grad()
def merged(model, weights, subjects, regular):
    """One set of weights for several subjects, each a (tuned weights, caption, phrase ids).

    argmin_W |W C_reg - W_0 C_reg|^2 subject to W c = W_n c for the contexts c of each subject's own tokens, where W_n are its
    tuned weights: W = W_0 + v d with d = C (C_reg^T C_reg)^-1 and v = (V - W_0 C^T) (d C^T)^-1.
    """
    own = []
    for _, caption, phrase in subjects:
        ids = token_ids([caption])
        own.append(model.text_encoder(ids)[phrase_rows(ids, phrase)].double())
    contexts, regular = torch.cat(own), regular.double()
    square = regular.T @ regular
    square += RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=torch.float64)
    directions = torch.linalg.solve(square, contexts.T).T
    grip = directions @ contexts.T
    found = {}
    for path, layer in weights.layers.items():
        base = layer.weight.double()
        wanted = torch.cat([rows @ parts[path].double().T for rows, (parts, _, _) in zip(own, subjects)])
        steps = torch.linalg.solve(grip, wanted - contexts @ base.T)
        found[path] = (base + steps.T @ directions).float()
    return found


@contextmanager
def installed(weights, found):
    """While open, the UNet has these K and V weights."""
    kept = {path: layer.weight.detach().clone() for path, layer in weights.layers.items()}
    try:
        with torch.no_grad():
            for path, layer in weights.layers.items():
                layer.weight.copy_(found[path])
        yield
    finally:
        with torch.no_grad():
            for path, layer in weights.layers.items():
                layer.weight.copy_(kept[path])
