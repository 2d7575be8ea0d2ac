"""What a search lowers: losses of a UNet as functions of the scales of its K/V weights.

The concept-implanting loss is DreamBooth's with prior preservation, as Cones uses it; here the network
predicts v = sqrt(abar) eps - sqrt(1 - abar) x0 instead of eps:

    L_con(s) = E || v_s(z_t, t, c) - v ||^2 + w E || v_s(z'_t', t', c_pr) - v' ||^2

The anchor loss (erasing) and the preserve term are ours; v_1 is the untouched network, a an anchor:

    L_era(s) = E || v_s(z_t, t, c) - v_1(z_t, t, a) ||^2
    L_pre(s) = E || v_s(z'_t', t', c') - v_1(z'_t', t', c') ||^2

Norms are means over elements. A loss is called with scales [N] and a generator; it draws pictures,
time steps (evenly spread over a batch) and noises from the generator and returns a scalar.
"""

from dataclasses import dataclass

import torch

from model import Pictures, net, plain_label
from neurons import phrase_rows


@dataclass
class Draw:
    """Noisy pictures and what the network should say: state and v [B, 3, H, W], timestep [B]."""

    state: torch.Tensor
    timestep: torch.Tensor
    v: torch.Tensor
    pictures: Pictures

    @classmethod
    def of(cls, pictures, which, generator):
        """Noises the pictures numbered by `which`, at time steps stratified over the batch."""
        pictures, batch = pictures[which], len(which)
        spread = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
        timestep = (spread * net.STEPS).long()
        bar = net.cumulative_alphas()[timestep][:, None, None, None]
        noise = torch.randn(pictures.x0.shape, generator=generator)
        state = bar.sqrt() * pictures.x0 + (1 - bar).sqrt() * noise
        return cls(state, timestep, bar.sqrt() * noise - (1 - bar).sqrt() * pictures.x0, pictures)

    @classmethod
    def random(cls, pictures, batch, generator):
        """`batch` pictures, each as often as the others in the long run."""
        rounds = [torch.randperm(len(pictures), generator=generator) for _ in range(-(-batch // len(pictures)))]
        return cls.of(pictures, torch.cat(rounds)[:batch], generator)

    def __len__(self):
        return len(self.state)


def predict(model, draws):
    """v for several draws in one batch, split again by draw. The scales must already act."""
    joined = Pictures.joined([d.pictures for d in draws])
    state = torch.cat([d.state for d in draws]).contiguous(memory_format=torch.channels_last)
    labels = torch.full((len(state),), plain_label(state.shape[2]))
    v = model.unet(state, torch.cat([d.timestep for d in draws]), joined.text, labels)
    return v.split([len(d) for d in draws])


class Scope:
    """Where a concept acts: on every token (`phrase` None), or on the rows of its own phrase."""

    def __init__(self, phrase=None):
        self.phrase = phrase

    def rows(self, ids):
        return None if self.phrase is None else phrase_rows(ids, self.phrase)

    def touches(self, pictures):
        """False where shutting cannot change a prediction for these captions."""
        return self.phrase is None or bool(self.rows(pictures.ids).any())


def predict_under(model, weights, scales, scope, draws):
    """`predict` with the scales acting in their scope."""
    rows = scope.rows(torch.cat([d.pictures.ids for d in draws]))
    with weights.acting((scales, rows)):
        return predict(model, draws)


class ImplantingLoss:
    """L_con + preserve_weight * L_pre. In token scope terms that cannot change are left out."""

    def __init__(
        self,
        model,
        weights,
        instance,
        prior=None,
        preserve=None,
        scope=None,
        batch=6,
        prior_weight=1.0,
        preserve_weight=1.0,
    ):
        self.model, self.weights, self.scope, self.batch = model, weights, scope or Scope(), batch
        self.instance = instance
        self.prior = prior if prior is not None and self.scope.touches(prior) else None
        self.preserve = preserve if preserve is not None and self.scope.touches(preserve) else None
        self.prior_weight, self.preserve_weight = prior_weight, preserve_weight

    def __call__(self, scales, generator):
        draws = [Draw.random(self.instance, self.batch, generator)]
        targets, factors = [draws[0].v], [1.0]
        if self.prior is not None:
            draws.append(Draw.random(self.prior, self.batch, generator))
            targets.append(draws[-1].v)
            factors.append(self.prior_weight)
        if self.preserve is not None:
            draws.append(Draw.random(self.preserve, self.batch, generator))
            with torch.no_grad():
                targets += predict(self.model, draws[-1:])
            factors.append(self.preserve_weight)
        said = predict_under(self.model, self.weights, scales, self.scope, draws)
        return sum(f * ((v - t) ** 2).mean() for f, v, t in zip(factors, said, targets))


class AnchorLoss:
    """L_era + preserve_weight * L_pre. `anchor` are the pictures of `concept` under neutral captions."""

    def __init__(self, model, weights, concept, anchor, preserve=None, scope=None, batch=6, preserve_weight=1.0):
        self.model, self.weights, self.scope, self.batch = model, weights, scope or Scope(), batch
        self.concept, self.anchor = concept, anchor
        self.preserve = preserve if preserve is not None and self.scope.touches(preserve) else None
        self.preserve_weight = preserve_weight

    def __call__(self, scales, generator):
        which = torch.randperm(len(self.concept), generator=generator)[: self.batch]
        draws = [Draw.of(self.concept, which, generator)]
        neutral = Draw(draws[0].state, draws[0].timestep, draws[0].v, self.anchor[which])
        asked, factors = [neutral], [1.0]
        if self.preserve is not None:
            draws.append(Draw.random(self.preserve, self.batch, generator))
            asked.append(draws[-1])
            factors.append(self.preserve_weight)
        with torch.no_grad():
            targets = predict(self.model, asked)
        said = predict_under(self.model, self.weights, scales, self.scope, draws)
        return sum(f * ((v - t) ** 2).mean() for f, v, t in zip(factors, said, targets))
