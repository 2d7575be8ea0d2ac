"""The attention K and V weights of a UNet as one vector of scalars, and sets of them shut.

A *scale* vector s [N] multiplies the weights, s_i = 0 shuts weight i (a concept neuron). The N
weights are counted over the projections in the order of their module paths, inside each in [out, in]
layout. Global scope (the Cones paper) shuts a weight for every token; token scope (ours) only for the
tokens of a phrase such as "<s1> animal". As K and V are linear per token,

    K = C W^T - sum_j r_j * (C (W * (1 - s_j))^T),        r_j [B, L, 1] = 1 on the rows of concept j,

so nothing is stored but the sparse difference. Where several concepts act on one row, their scales
multiply: the union of the shut sets. This file knows nothing of losses, diffusion or files.
"""

from contextlib import contextmanager

import torch
import torch.nn.functional as F


class KeyValueWeights:
    """The K and V projections below `unet` that read the text (`attn2`), the picture itself (`attn1`), or both in this order."""

    def __init__(self, unet, attentions=("attn2",)):
        self.layers = {}
        for attention in attentions:
            ends = (f"{attention}.to_k", f"{attention}.to_v")
            self.layers |= dict(sorted((path, layer) for path, layer in unet.named_modules() if path.endswith(ends)))
        self.sizes = [layer.weight.numel() for layer in self.layers.values()]
        self.count = sum(self.sizes)

    @property
    def paths(self):
        return list(self.layers)

    def vector(self):
        """All weights as one vector [N]."""
        return torch.cat([layer.weight.detach().reshape(-1) for layer in self.layers.values()])

    def units(self):
        """The standard deviation of the projection of each weight [N]: what its values are counted in."""
        layers = self.layers.values()
        return torch.cat([w.std(correction=0).expand(w.numel()) for w in (layer.weight.detach() for layer in layers)])

    def scales(self, shut, values=None):
        """Scales [N] under which the weights in `shut` are zero or have `values` [members], and the others their own."""
        if values is None:
            return 1 - shut.float()
        members = shut.nonzero()[:, 0]
        return torch.ones(self.count).index_put((members,), values / self.vector()[members])

    def split(self, vector):
        """A vector [N] as a dict from path to [out, in] views."""
        parts = vector.split(self.sizes)
        return {path: part.view(layer.weight.shape) for (path, layer), part in zip(self.layers.items(), parts)}

    def indices(self, shut):
        """A boolean vector [N] as a dict from path to the sorted flat indices (numpy int64) that are shut."""
        return {path: part.reshape(-1).nonzero()[:, 0].numpy() for path, part in self.split(shut).items()}

    def from_indices(self, indices):
        """The inverse of `indices`."""
        shut = torch.zeros(self.count, dtype=torch.bool)
        for path, part in self.split(shut).items():
            part.view(-1)[torch.as_tensor(indices.get(path, [])).long()] = True
        return shut

    @contextmanager
    def acting(self, *parts):
        """While open, the UNet runs under `parts`: pairs of scales [N] (float or shut booleans) and rows.

        rows is None for all tokens, or a boolean [B, L] for the batch that will be run. Gradients flow
        into float scales.
        """
        parts = [(1 - s.float() if s.dtype == torch.bool else s, rows) for s, rows in parts]
        handles = []
        try:
            groups = _row_groups(parts)
            for path, layer in self.layers.items():
                terms = []
                for members, rows in groups:
                    scale = self.split(parts[members[0]][0])[path]
                    for other in members[1:]:
                        scale = scale * self.split(parts[other][0])[path]
                    terms.append((1 - scale, rows))
                handles.append(layer.register_forward_hook(_correction(terms)))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _row_groups(parts):
    """Splits the rows by which parts act on them: a list of (part numbers, rows [B, L, 1] or None for all)."""
    if all(rows is None for _, rows in parts):
        return [(list(range(len(parts))), None)] if parts else []
    shape = next(rows.shape for _, rows in parts if rows is not None)
    code = torch.zeros(shape, dtype=torch.long)
    for i, (_, rows) in enumerate(parts):
        code += (1 << i) * (torch.ones(shape, dtype=torch.long) if rows is None else rows.long())
    groups = []
    for value in code.unique().tolist():
        members = [i for i in range(len(parts)) if value >> i & 1]
        if members:
            groups.append((members, (code == value)[..., None]))
    return groups


def _correction(terms):
    def hook(layer, inputs, output):
        context = inputs[0]
        for away, rows in terms:
            difference = F.linear(context, layer.weight * away)
            output = output - (difference if rows is None else torch.where(rows, difference, 0.0))
        return output

    return hook


def phrase_rows(ids, phrase):
    """The rows of a concept's own tokens: boolean [B, L] for ids [B, L] and a tuple of token ids.

    Every occurrence of the first token, and the later ones as far as they follow it without a gap: for
    "<s1> animal" the placeholder and the class noun behind it, but no other "animal".
    """
    ids = torch.as_tensor(ids)
    rows = torch.zeros(ids.shape, dtype=torch.bool)
    reached = ids == phrase[0]
    rows |= reached
    for token in phrase[1:]:
        reached = F.pad(reached[:, :-1], (1, 0)) & (ids == token)
        rows |= reached
    return rows


def jaccard(first, second):
    """Size of the intersection over that of the union; 1 for two empty sets."""
    union = (first | second).sum().item()
    return (first & second).sum().item() / union if union else 1.0


def random_like(weights, shut, generator, bins=32):
    """A random set with the size of `shut` in each projection and its histogram of magnitudes.

    Magnitudes are sorted into `bins` quantiles per projection; from each bin as many weights are drawn as
    `shut` holds there.
    """
    drawn = torch.zeros_like(shut)
    values, wanted, out = weights.split(weights.vector().abs()), weights.split(shut), weights.split(drawn)
    for path in weights.paths:
        order = values[path].reshape(-1).argsort()
        ours, chosen = wanted[path].reshape(-1), out[path].view(-1)
        for bin_members in order.tensor_split(bins):
            count = int(ours[bin_members].sum())
            chosen[bin_members[torch.randperm(len(bin_members), generator=generator)[:count]]] = True
    return drawn
