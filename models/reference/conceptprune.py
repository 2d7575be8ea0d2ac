"""ConceptPrune (arXiv 2405.19237), the peer of erasing: weights that a concept uses more than its reference does.

The score of a weight is Wanda's, |W_ij| times the norm of input j over all tokens and time steps. In each row the weights
of the largest scores under the concept's prompts are taken, as far as they score higher there than under the reference
prompts. The paper prunes the second matrix of the feed-forward networks (`FEED_FORWARD`); the same score on the K and V
projections (`KEYS_AND_VALUES`) stands beside our sets. Written from the paper's equations.
"""

from contextlib import contextmanager

import torch

FEED_FORWARD = ".ff.net.2"
KEYS_AND_VALUES = ("attn2.to_k", "attn2.to_v")


@torch.no_grad()
def input_norms(layers, run):
    """The norm of each input feature [in] of the named layers over all that `run()` shows them, by path."""
    squares, handles = {}, []
    for path, layer in layers.items():
        def record(_, inputs, path=path):
            squares[path] = squares.get(path, 0) + inputs[0].double().square().flatten(0, -2).sum(0)

        handles.append(layer.register_forward_pre_hook(record))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return {path: square.sqrt().float() for path, square in squares.items()}


def layers_of(unet, endings):
    """The linear layers whose module paths end so, by path."""
    return {path: layer for path, layer in sorted(unet.named_modules()) if path.endswith(endings)}


def skilled(layers, concept, reference, density):
    """The weights to prune, boolean [out, in] by path: the highest ranks of all rows until `density` of all is reached.

    `concept` and `reference` are the norms of the inputs under either's prompts.
    """
    ranks = {}
    for path, layer in layers.items():
        size = layer.weight.detach().abs()
        ours, theirs = size * concept[path], size * reference[path]
        rank = torch.where(ours > theirs, ours, -1.0).argsort(1, descending=True).argsort(1)
        ranks[path] = torch.where(ours > theirs, rank, rank.shape[1])
    wanted = round(density * sum(rank.numel() for rank in ranks.values()))
    usable = torch.cat([rank[rank < rank.shape[1]] for rank in ranks.values()])
    last = usable.sort().values[min(wanted, len(usable)) - 1]
    return {path: rank <= last for path, rank in ranks.items()}


@contextmanager
def pruned(layers, masks):
    """While open, the masked weights are zero."""
    kept = {path: layer.weight.detach().clone() for path, layer in layers.items()}
    try:
        with torch.no_grad():
            for path, layer in layers.items():
                layer.weight.masked_fill_(masks[path], 0.0)
        yield
    finally:
        with torch.no_grad():
            for path, layer in layers.items():
                layer.weight.copy_(kept[path])
