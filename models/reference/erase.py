"""Finds the neurons that carry a word: shutting them makes the prediction for it that for an anchor (ours).

    python erase.py tiger --out no-tiger.safetensors --sheet no-tiger.png
    python erase.py tiger --anchor object --scope global --out no-tiger.safetensors

The anchor is a neutral word; by default the word's category. Pictures are drawn by the model itself, alone
and beside other objects. Prints, on scenes rendered for the test: the distance between the predictions for
the word and the untouched ones for the anchor, the loss of the word's scenes (which should rise) and of
scenes without it (which should stay), each untouched, with the set and with a random one.
"""

import argparse
import random

import numpy as np
import torch

from discover import (
    Concept,
    add_options,
    describe,
    drawn_pictures,
    on_background,
    open_model,
    save,
    scope_of,
    search_as_asked,
)
from find import controls, sheet
from held_out import held_out_losses, report
from losses import AnchorLoss, Draw, predict
from model import Pictures, data, picture_tensor, words


def erasure(word, anchor):
    """How an erasing set is described in its file."""
    return Concept(f"without {word}", "erase", word, [words.with_article(word), words.with_article(anchor)])


def captions_about(phrase, others, colours):
    """One caption for each pair of another object (or None) and a background colour."""
    return [
        on_background(phrase if other is None else f"{phrase} and {words.with_article(other)}", c)
        for other, c in zip(others, colours)
    ]


def material(model, weights, word, anchor, seed, side, count=16):
    """Pictures of the word, the same under the anchor's captions, and pictures of other things to preserve."""
    rng = random.Random(f"{seed} {word}")
    nouns = [n for n in words.OBJECTS if n != word]
    others = [rng.choice(nouns) if i % 2 else None for i in range(count)]
    colours = [rng.choice(list(words.COLOURS)) for _ in range(count)]
    about, neutral = (captions_about(phrase, others, colours) for phrase in (word, anchor))
    kept = [rng.choice(nouns + [words.category(word)]) for _ in range(count)]
    beside = [rng.choice(nouns) if i % 3 == 2 else None for i in range(count)]
    preserved = [caption for k, o, c in zip(kept, beside, colours) for caption in captions_about(k, [o], [c])]
    drawn = drawn_pictures(model, weights, about + preserved, seed, side)
    concept = drawn[torch.arange(count)]
    return concept, Pictures.of(model, concept.x0, neutral), drawn[torch.arange(count, 2 * count)]


def erase(model, weights, word, anchor, options):
    """Searches with the options' method; returns the set, its density bound and its scope."""
    scope = scope_of(options.scope, word)
    concept, neutral, preserve = material(model, weights, word, anchor, options.seed, options.side)
    loss = AnchorLoss(model, weights, concept, neutral, preserve, scope, options.batch, options.preserve_weight)

    @torch.no_grad()
    def judge(sets):
        seeds = range(100, 108)
        return {
            name: sum(loss(1 - shut.float(), torch.Generator().manual_seed(seed)).item() for seed in seeds) / len(seeds)
            for name, shut in sets.items()
        }

    found, density = search_as_asked(options, loss, weights.count, judge)
    return found, density, scope


def test_scenes(model, art, word, seed=5, count=52):
    """Rendered scenes with the word and without it, under their plain captions."""
    rng = random.Random(f"{seed} test {word}")
    with_word, without = [], []
    while len(with_word) < count or len(without) < count:
        scene = data.sample_scene(rng, (3, 2, 0, 0))
        wanted = with_word if word in scene.nouns else without
        if len(wanted) < count:
            wanted.append((data.render(scene, art, rng), data.caption(scene)))
    return [Pictures.of(model, picture_tensor(np.stack(p)), c) for p, c in (zip(*with_word), zip(*without))]


def renamed(model, pictures, word, anchor):
    """The same pictures with the anchor's caption in place of the word's."""
    captions = [c.replace(words.with_article(word), words.with_article(anchor)) for c in pictures.captions]
    return Pictures.of(model, pictures.x0, captions)


@torch.no_grad()
def distances(model, weights, pictures, wished, sets, draws, seed=1, batch=26):
    """Squared distance of each draw between the prediction for `pictures` and the untouched one for `wished`.

    Both hold the same pictures, with different captions or the same. Returns float64 [draws] per named set.
    """
    generator = torch.Generator().manual_seed(seed)
    distances = {name: [] for name in sets}
    for first in range(0, draws, batch):
        which = torch.arange(first, min(first + batch, draws)) % len(pictures)
        drawn = Draw.of(pictures, which, generator)
        (target,) = predict(model, [Draw(drawn.state, drawn.timestep, drawn.v, wished[which])])
        for name, parts in sets.items():
            with weights.acting(*((scales, scope.rows(drawn.pictures.ids)) for scales, scope in parts)):
                (said,) = predict(model, [drawn])
            distances[name].append(((said.double() - target.double()) ** 2).mean((1, 2, 3)))
    return {name: torch.cat(values) for name, values in distances.items()}


def judge(model, weights, found, scope, word, anchor, art, draws):
    """Lines of the three held-out figures."""
    sets = controls(weights, found, scope)
    with_word, without = test_scenes(model, art, word)
    lines = [f"distance to the prediction for {anchor!r}"]
    lines += report(distances(model, weights, with_word, renamed(model, with_word, word, anchor), sets, draws))
    lines += [f"loss of scenes with {word!r}"] + report(held_out_losses(model, weights, with_word, sets, draws))
    lines += [f"loss of scenes without {word!r}"] + report(held_out_losses(model, weights, without, sets, draws))
    return lines


def judge_drawn(model, weights, found, scope, word, anchor, draws):
    """The figures on pictures that the model draws itself, other ones than the search saw."""
    sets = controls(weights, found, scope)
    concept, neutral, preserve = material(model, weights, word, anchor, seed=1000, side=64)
    lines = [f"distance to the prediction for {anchor!r}"] + report(
        distances(model, weights, concept, neutral, sets, draws)
    )
    moved = distances(model, weights, preserve, preserve, {"the set": sets["the set"]}, draws)["the set"]
    return lines + [f"squared change of the predictions for other captions: {moved.mean().item():.2e}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", choices=list(words.OBJECTS), help="what to erase")
    parser.add_argument("--anchor", help=f"neutral word, for example {words.ANY_OBJECT!r}; the category if absent")
    parser.add_argument("--preserve-weight", type=float, default=1.0)
    add_options(parser)
    options = parser.parse_args()
    anchor = options.anchor or words.category(options.word)
    model, weights = open_model(options)
    found, density, scope = erase(model, weights, options.word, anchor, options)
    print("\n".join(describe(weights, found)))
    print("\n".join(judge(model, weights, found, scope, options.word, anchor, data.Art(options.work), options.draws)))
    size = save(
        options.out,
        weights,
        found,
        erasure(options.word, anchor),
        f"{options.method}, anchor {anchor}",
        density,
        options,
    )
    print(f"{options.out}: {size} bytes")
    if options.sheet:
        captions = [on_background(options.word, c) for c in ("blue", "white", "green")] + [
            on_background(n, "blue") for n in list(words.OBJECTS)[-3:]
        ]
        sheet(model, weights, captions, {"untouched": [], "the set": [(found.shut, scope)]}, options.sheet)


if __name__ == "__main__":
    main()
