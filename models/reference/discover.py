"""Finds, judges and stores one set of concept neurons: what `find.py` and `erase.py` have in common.

It joins a search, a density and the held-out controls, and writes the concept file.
"""

import datetime
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import concept_file
from held_out import draw, held_out_losses
from losses import Scope
from model import SHIPPED, Pictures, data, load, phrase_ids, picture_tensor, words
from neurons import KeyValueWeights
from search import Found, algorithm_1, gradual, learnt_mask, shut_by_budget, shut_by_threshold, tune

SCORING = ("saliency", "algorithm-1")  # methods that score once and cut
METHODS = (*SCORING, "gradual", "learnt-mask")
SCOPES = ("local", "global")
DENSITIES = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2)
COARSE_DENSITIES = (1e-3, 5e-3, 2e-2)  # for methods that need a whole search per density


def add_options(parser):
    """The options that all searches share."""
    parser.add_argument("--model", type=Path, default=SHIPPED, help="ONNX folder or checkpoint.pt")
    parser.add_argument("--work", type=Path, default=data.DEFAULT_WORK, help="folder with the downloaded art")
    parser.add_argument("--method", choices=METHODS, default="learnt-mask")
    parser.add_argument(
        "--scope",
        choices=SCOPES,
        default="local",
        help="global is the paper's, local shuts for the concept's own tokens only",
    )
    parser.add_argument(
        "--density",
        type=float,
        help="share of the weights that may be shut, in (0, 1]; searched on a log scale if absent",
    )
    parser.add_argument(
        "--threshold", type=float, help="shut by this mean score instead of a density (saliency and algorithm-1)"
    )
    parser.add_argument("--rho", type=float, default=2e-5, help="step size of algorithm-1")
    parser.add_argument(
        "--side",
        type=int,
        choices=(32, 64),
        default=64,
        help="pixels of the search; 32 is four times faster, and sets carry over",
    )
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8, help="pictures of each term in a batch")
    parser.add_argument("--tune", type=int, default=0, help="steps of tuning: values for the found weights")
    parser.add_argument(
        "--values", choices=("binary", "quaternary", "float16", "float32"), default="float16", help="how they are kept"
    )
    parser.add_argument("--draws", type=int, default=208, help="held-out draws, at least 200 for the tests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="concept file to write (.safetensors)")
    parser.add_argument("--sheet", type=Path, help="PNG of pictures without and with the set, same seeds")
    parser.add_argument("--threads", type=int, default=2)


def open_model(options):
    """The frozen model of the options, and its K/V weights."""
    torch.set_num_threads(options.threads)
    model = load(options.model)
    return model, KeyValueWeights(model.unet)


def scope_of(name, phrase):
    return Scope(phrase_ids(phrase)) if name == "local" else Scope()


def drawn_pictures(model, weights, captions, seed, side, steps=15):
    """Pictures that the untouched model draws for the captions: the prior, where the host gives none."""
    return Pictures.of(
        model, picture_tensor(draw(model, weights, captions, seed=seed, steps=steps, side=side)), captions
    )


def on_background(phrase, colour, pattern="plain"):
    """The phrase in the sentence of the training captions."""
    return f"{words.with_article(phrase)} on a {'' if pattern == 'plain' else pattern + ' '}{colour} background"


def search(method, loss, count, budget, batches, generator, rho=0.0, threshold=None):
    """One set by one method. `budget` is the largest number of shut weights, None for no bound."""
    if threshold is not None and method not in SCORING:
        raise ValueError(f"{method} takes a density, not a threshold")
    if method == "gradual":
        stages = 6
        return gradual(loss, count, budget or count, generator, stages, max(1, batches // stages))
    if method == "learnt-mask":
        return learnt_mask(loss, count, batches, generator, budget=budget)
    scores, losses, agreement = algorithm_1(loss, count, batches, generator, rho if method == "algorithm-1" else 0.0)
    shut = shut_by_threshold(scores, threshold) if threshold is not None else shut_by_budget(scores, budget or count)
    return Found(shut, losses, agreement, scores)


def search_density(method, loss, count, batches, seed, judge, rho=0.0):
    """The set with the least judged loss over a log scale of densities; prints the curve.

    `judge` maps named shut vectors to a mean loss each. Score methods cut one score at every density.
    """
    if method in SCORING:
        whole = search(method, loss, count, None, batches, torch.Generator().manual_seed(seed), rho)
        sets = {
            density: Found(shut_by_budget(whole.scores, round(density * count)), whole.losses, whole.agreement)
            for density in DENSITIES
        }
    else:
        sets = {
            density: search(method, loss, count, round(density * count), batches, torch.Generator().manual_seed(seed))
            for density in COARSE_DENSITIES
        }
    judged = judge({density: found.shut for density, found in sets.items()})
    for density, value in judged.items():
        print(f"  density {100 * density:.3f} %: {value:.5f}", flush=True)
    best = min(judged, key=judged.get)
    return sets[best], best


def search_as_asked(options, loss, count, judge):
    """One set by the options' method, at their density or threshold or at the density that `judge` likes best.

    Returns the set and the density that bounded it (None under a threshold).
    """
    if options.density is None and options.threshold is None:
        return search_density(options.method, loss, count, options.batches, options.seed, judge, options.rho)
    budget = None if options.density is None else round(options.density * count)
    generator = torch.Generator().manual_seed(options.seed)
    found = search(options.method, loss, count, budget, options.batches, generator, options.rho, options.threshold)
    return found, options.density


def judge_on(model, weights, pictures, scope, draws=96, seed=77):
    """A judge for `search_density`: the mean loss on fresh noises of the given pictures."""

    def judge(sets):
        losses = held_out_losses(model, weights, pictures, {k: [(s, scope)] for k, s in sets.items()}, draws, 24, seed)
        return {k: v.mean().item() for k, v in losses.items()}

    return judge


def fingerprint(weights):
    """The fingerprint of the base model, over its K/V weights rounded to fp16."""
    return concept_file.fingerprint(
        {path: layer.weight.detach().contiguous().numpy() for path, layer in weights.layers.items()}
    )


@dataclass
class Concept:
    """What a set is for: role "implant" or "erase", the trigger word, its class noun, the prompts of the search."""

    title: str
    role: str
    trigger: str
    prompts: list
    class_noun: str | None = None


def tune_as_asked(options, weights, loss, shut):
    """Values [members] for the set by the options' steps, rounded as they will be kept; None without tuning."""
    if not options.tune:
        return None
    generator = torch.Generator().manual_seed(options.seed + 1)
    kept = as_kept([len(i) for i in weights.indices(shut).values()], options.values)
    seen = kept if options.values in concept_file.CODE_BITS else None
    values, _ = tune(loss, shut, weights.vector(), weights.units(), options.tune, generator, kept=seen)
    return kept(values)


def as_kept(parts, precision):
    """Rounds values [members] as a precision holds them, of which so many in `parts` belong to each projection."""

    def kept(values):
        split = [concept_file.rounded(part.numpy(), precision) for part in values.split(parts)]
        return torch.cat([torch.from_numpy(part) for part in split])

    return kept


def save(path, weights, found, concept, method, density, options):
    """Writes the concept file, with `density` as its budget unless a threshold was given; returns its bytes."""
    layers = {p: (*weights.layers[p].weight.shape, i) for p, i in weights.indices(found.shut).items()}
    if found.values is not None:
        parts = found.values.split([len(layer[2]) for layer in layers.values()])
        layers = {name: (*layer, part.numpy()) for (name, layer), part in zip(layers.items(), parts)}
    metadata = {
        "macula.base": fingerprint(weights),
        "macula.role": concept.role,
        "macula.scope": options.scope,
        "macula.values": "none" if found.values is None else options.values,
        "macula.method": method,
        "macula.trigger": concept.trigger,
        "macula.prompts": json.dumps(concept.prompts),
        "macula.steps": str(len(found.losses)),
        "macula.seed": str(options.seed),
        "modelspec.title": concept.title,
        "modelspec.architecture": "macula-emoji/concept-neurons",
        "modelspec.date": datetime.date.today().isoformat(),
        "modelspec.trigger_phrase": " ".join(filter(None, (concept.trigger, concept.class_noun))),
    }
    if concept.class_noun is not None:
        metadata["macula.class_noun"] = concept.class_noun
    if options.threshold is not None:
        metadata["macula.threshold"] = f"{options.threshold:.6e}"
    elif density is not None:
        metadata["macula.budget"] = f"{density:.6g}"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    concept_file.write(path, layers, metadata)
    return path.stat().st_size


def read_concept(path, weights):
    """The set, its scope and the metadata of a concept file; refuses one of another base model."""
    layers, metadata = concept_file.read(path)
    if metadata["macula.base"] != fingerprint(weights):
        raise ValueError(f"{path} was found in another model")
    shut = weights.from_indices({name: layer[2] for name, layer in layers.items()})
    values = None
    if metadata["macula.values"] != "none":
        values = torch.from_numpy(np.concatenate([layers[name][3] for name in weights.paths if name in layers]))
    return Found(shut, values=values), scope_of(metadata["macula.scope"], metadata["modelspec.trigger_phrase"]), metadata


def describe(weights, found):
    """Lines about a set: size, share of each projection, how the search went."""
    lines = [
        f"{int(found.shut.sum())} of {weights.count} weights shut ({100 * found.shut.float().mean().item():.4f} %)"
    ]
    for path, part in weights.split(found.shut).items():
        lines.append(f"  {path:<66} {int(part.sum()):>7} {100 * part.float().mean().item():8.4f} %")
    third = max(1, len(found.losses) // 3)
    first, last = (sum(part) / len(part) for part in (found.losses[:third], found.losses[-third:]))
    lines.append(
        f"loss of the search: first third {first:.5f}, last third {last:.5f}; agreement of halves {found.agreement:.3f}"
    )
    return lines
