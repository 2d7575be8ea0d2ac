"""Batches of a search on the shipped UNet, with what the PyTorch reference says of them, for `tests/discovery.rs`.

usage: discovery.py LOSS VERSION FOLDER     VERSION: of the model, not used

LOSS: `local` or `global`, the implanting loss in that scope; `both`, the global one for self-attention too; `erase`, the
anchor loss with a preserve term, global; `together`, the implanting loss of two subjects in one text, each with a set for the
rows of its own words.

FOLDER/batches.safetensors: for each batch b `b.state`, `b.timestep`, `b.v`, `b.text`, `b.labels`, `b.weight` and
`b.rows` (the entries of [B, L] on which a set acts, flat) with `b.sets` (which one), and the results: `slope` at scales of
one and `mixed` at the scales `scales` for batch 0 with their `loss`es, the sets `saliency` and `learnt` as flat indices, and
the `P.values` that tuning gives the latter with `P.losses`, over the batches once more, from its `untouched` weights in their
`units`, for the precisions P; so many of its weights are in each projection as `parts` has. For `together` all scales are
those of one set behind those of the other, there are no searches, `learnt` is a random set, and its tuning begins at `start`.
`b.v` is what the prediction should be: for `erase` the untouched one for the anchors and for the preserved texts themselves.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "models" / "reference"))

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import search  # noqa: E402
from discover import as_kept  # noqa: E402
from find import subject  # noqa: E402
from losses import AnchorLoss, Draw, Scope, predict, predict_under  # noqa: E402
from model import Pictures, load, phrase_ids, plain_label  # noqa: E402
from neurons import KeyValueWeights  # noqa: E402

BATCHES, BATCH, SIDE = 12, 4, 32


class Implant:
    """The implanting loss of a subject; batch b is what the generator b draws."""

    def __init__(self, model, weights, scope_name):
        self.model, self.weights = model, weights
        learn, _, noun = subject("octopus", "<s2>", model)
        self.pictures = learn.at(SIDE)
        self.scope = Scope(phrase_ids(f"<s2> {noun}")) if scope_name == "local" else Scope()

    def batch(self, generator):
        """The draws of a batch with their targets and weights."""
        draw = Draw.random(self.pictures, BATCH, generator)
        return [(draw, draw.v, 1.0)]

    def __call__(self, scales, generator):
        draw = Draw.random(self.pictures, BATCH, generator)
        (said,) = predict_under(self.model, self.weights, scales, self.scope, [draw])
        return ((said - draw.v) ** 2).mean()


class Erase:
    """The anchor loss of a word with a preserve term of half its weight, on pictures that show something."""

    def __init__(self, model, weights):
        self.model, self.scope = model, Scope()
        learn, _, _ = subject("octopus", "<s2>", model)
        x0 = learn.at(SIDE).x0
        phrases = ("a tiger", "an animal", "a taxi")
        captions = ([f"{phrase} on a blue background"] * len(x0) for phrase in phrases)
        self.concept, self.anchor, self.preserve = (Pictures.of(model, x0, text) for text in captions)
        self.loss = AnchorLoss(
            model, weights, self.concept, self.anchor, self.preserve, self.scope, BATCH, preserve_weight=0.5
        )

    @torch.no_grad()
    def batch(self, generator):
        which = torch.randperm(len(self.concept), generator=generator)[:BATCH]
        draw = Draw.of(self.concept, which, generator)
        preserved = Draw.random(self.preserve, BATCH, generator)
        anchored = Draw(draw.state, draw.timestep, draw.v, self.anchor[which])
        wanted, kept = predict(self.model, [anchored, preserved])
        return [(draw, wanted, 1.0), (preserved, kept, 0.5)]

    def __call__(self, scales, generator):
        return self.loss(scales, generator)


class Together:
    """The implanting loss of two subjects, on pictures of one whose texts name both; scales [2 N]."""

    def __init__(self, model, weights):
        self.model, self.weights = model, weights
        learn, _, noun = subject("octopus", "<s2>", model)
        phrases = (f"<s2> {noun}", "<s1> fruit")
        x0 = learn.at(SIDE).x0
        self.pictures = Pictures.of(model, x0, [f"a {' and a '.join(phrases)} on a blue background"] * len(x0))
        self.scopes = [Scope(phrase_ids(phrase)) for phrase in phrases]

    def batch(self, generator):
        draw = Draw.random(self.pictures, BATCH, generator)
        return [(draw, draw.v, 1.0)]

    def __call__(self, scales, generator):
        draw = Draw.random(self.pictures, BATCH, generator)
        parts = [(own, scope.rows(draw.pictures.ids)) for own, scope in zip(scales.chunk(2), self.scopes)]
        with self.weights.acting(*parts):
            (said,) = predict(self.model, [draw])
        return ((said - draw.v) ** 2).mean()


def generators(count=BATCHES):
    return [torch.Generator().manual_seed(50 + at) for at in range(count)]


def stored(at, parts, scopes):
    """A batch as tensors."""
    ids = torch.cat([draw.pictures.ids for draw, _, _ in parts])
    of_sets = [scope.rows(ids) for scope in scopes]
    of_sets = [torch.ones_like(ids, dtype=torch.bool) if rows is None else rows for rows in of_sets]
    rows = [rows.flatten().nonzero()[:, 0] for rows in of_sets]
    return {
        f"{at}.state": torch.cat([draw.state for draw, _, _ in parts]),
        f"{at}.timestep": torch.cat([draw.timestep for draw, _, _ in parts]),
        f"{at}.v": torch.cat([target for _, target, _ in parts]),
        f"{at}.text": torch.cat([draw.pictures.text for draw, _, _ in parts]),
        f"{at}.labels": torch.full((len(ids),), plain_label(SIDE)),
        f"{at}.weight": torch.cat([torch.full((BATCH,), factor / BATCH) for _, _, factor in parts]),
        f"{at}.rows": torch.cat(rows),
        f"{at}.sets": torch.cat([torch.full_like(own, number) for number, own in enumerate(rows)]),
    }


def main():
    name, folder = sys.argv[1], pathlib.Path(sys.argv[3])
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    model = load()
    weights = KeyValueWeights(model.unet, ("attn2", "attn1") if name == "both" else ("attn2",))
    if name == "together":
        asked = Together(model, weights)
    else:
        asked = Erase(model, weights) if name == "erase" else Implant(model, weights, name)
    scopes = asked.scopes if name == "together" else [asked.scope]
    count, untouched, units = weights.count, weights.vector(), weights.units()
    if name == "together":
        count, untouched, units = 2 * count, untouched.repeat(2), units.repeat(2)
    tensors = {}
    for at, generator in enumerate(generators()):
        tensors |= stored(at, asked.batch(generator), scopes)
    calls = iter(())

    def loss(scales, _):
        return asked(scales, next(calls))

    fresh = torch.Generator().manual_seed(5)
    tensors["scales"] = torch.rand(count, generator=fresh)
    for slope, at in (("slope", torch.ones(count)), ("mixed", tensors["scales"])):
        calls = iter(generators(1))
        tensors[slope], value = search.gradient(loss, at, None)
        tensors[f"{slope}_loss"] = torch.tensor([value])
    start = None
    if name == "together":
        learnt = torch.rand(count, generator=fresh) < 0.01
        tensors["start"] = start = 0.5 * untouched[learnt]
    else:
        calls = iter(generators())
        scores, _, agreement = search.saliency(loss, count, BATCHES, None)
        shut = search.shut_by_budget(scores, round(0.002 * count))
        tensors["saliency"] = shut.nonzero()[:, 0]
        tensors["agreement"] = torch.tensor([agreement])
        calls = iter(generators())
        learnt = search.learnt_mask(loss, count, BATCHES, None, rate=0.2, budget=round(0.01 * count)).shut
    tensors["learnt"] = learnt.nonzero()[:, 0]
    sets = 2 if name == "together" else 1
    sizes = [layer.weight.numel() for layer in weights.layers.values()] * sets
    parts = [int(own.sum()) for own in learnt.split(sizes)]
    tensors["parts"] = torch.tensor(parts)
    for precision, kept in (("float32", None), ("quaternary", as_kept(parts, "quaternary"))):
        calls = iter(generators())
        tuned = search.tune(loss, learnt, untouched, units, BATCHES, None, start=start, kept=kept)
        tensors[f"{precision}.values"], tensors[f"{precision}.losses"] = tuned[0], torch.tensor(tuned[1])
    tensors["untouched"], tensors["units"] = untouched[learnt], units[learnt]
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "batches.safetensors")


if __name__ == "__main__":
    main()
