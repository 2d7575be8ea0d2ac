"""Tests of the reference on closed forms and on tiny networks: `python -m unittest` in this folder."""

import unittest
from types import SimpleNamespace

import torch

from held_out import paired
from losses import Draw, ImplantingLoss, Scope, predict, predict_under
from model import Pictures, net, phrase_ids, token_ids
from neurons import KeyValueWeights, jaccard, phrase_rows, random_like
from search import algorithm_1, gradual, learnt_mask, saliency, shut_by_budget, shut_by_threshold

TINY = dict(
    sample_size=8,
    in_channels=12,
    out_channels=12,
    block_out_channels=(8, 16),
    layers_per_block=1,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=12,
    attention_head_dim=2,
    norm_num_groups=4,
    num_class_embeds=8,
)


def tiny(dtype=torch.float32, seed=0):
    """A tiny random UNet, its K/V weights, and four random pictures with random text states."""
    torch.manual_seed(seed)
    unet = net.PixelUNet(**TINY)
    unet.set_attn_processor(net.DirectAttention())
    unet = unet.to(dtype).eval().requires_grad_(False)
    captions = ("a <s1> animal", "a <s1> animal and an animal", "an animal", "a tiger on a blue background")
    ids = token_ids(captions)
    x0 = torch.randn(4, 3, 16, 16, dtype=dtype).clamp(-1, 1)
    pictures = Pictures(x0, ids, torch.randn(4, ids.shape[1], 12, dtype=dtype), captions)
    return SimpleNamespace(unet=unet), KeyValueWeights(unet), pictures


class ClosedForm(unittest.TestCase):
    """L = 1/2 ||theta - theta*||^2 with theta_0 = (1, 2, -1), theta* = (0, 2, -1.5), rho = 0.1, K = 2."""

    start = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    goal = torch.tensor([0.0, 2.0, -1.5], dtype=torch.float64)

    def loss(self, scales, generator=None):
        return 0.5 * ((scales * self.start - self.goal) ** 2).sum()

    def test_two_steps(self):
        visited = []

        def loss(scales, generator):
            visited.append(scales.detach() * self.start)
            return self.loss(scales)

        scores, losses, _ = algorithm_1(loss, 3, 2, None, rho=0.1)
        torch.testing.assert_close(2 * scores, torch.tensor([1.81, 0.0, -0.9725], dtype=torch.float64))
        torch.testing.assert_close(visited[1], torch.tensor([0.9, 2.0, -1.05], dtype=torch.float64))
        shut = shut_by_threshold(2 * scores, 0.1)
        self.assertEqual(shut.tolist(), [True, False, False])
        self.assertAlmostEqual(losses[0], 0.625)
        self.assertAlmostEqual(self.loss(1 - shut.double()).item(), 0.125)

    def test_tiny_rho_is_one_shot_saliency(self):
        moved = algorithm_1(self.loss, 3, 50, None, rho=2e-5)[0]
        torch.testing.assert_close(moved, saliency(self.loss, 3, 50, None)[0].double(), rtol=2e-3, atol=0)

    def test_budget_takes_only_positive_scores(self):
        self.assertEqual(shut_by_budget(torch.tensor([0.5, -1.0, 0.1, 0.0]), 3).tolist(), [True, False, True, False])

    def test_all_methods_agree_with_the_best_mask(self):
        for found in (gradual(self.loss, 3, 1, None, stages=1), learnt_mask(self.loss, 3, 40, None)):
            self.assertEqual(found.shut.tolist(), [True, False, False])
        self.assertEqual(int(learnt_mask(lambda s, g: s.sum(), 3, 40, None, budget=2).shut.sum()), 2)

    def test_penalty_reopens(self):
        self.assertFalse(learnt_mask(self.loss, 3, 40, None, penalty=2.0).shut.any())


class Hooks(unittest.TestCase):
    def test_shut_equals_zeroed_weights(self):
        model, weights, pictures = tiny()
        generator = torch.Generator().manual_seed(3)
        shut = torch.rand(weights.count, generator=generator) < 0.3
        draw = Draw.random(pictures, 4, generator)
        (untouched,) = predict(model, [draw])
        (hooked,) = predict_under(model, weights, shut, Scope(), [draw])
        for path, part in weights.split(shut).items():
            weights.layers[path].weight[part] = 0
        (zeroed,) = predict(model, [draw])
        torch.testing.assert_close(hooked, zeroed, rtol=1e-5, atol=1e-5)
        self.assertGreater((zeroed - untouched).abs().max().item(), 1e-3)

    def test_union_and_token_rows(self):
        _, weights, pictures = tiny()
        generator = torch.Generator().manual_seed(4)
        first, second = (torch.rand(weights.count, generator=generator) < 0.2 for _ in range(2))
        rows = phrase_rows(pictures.ids, phrase_ids("<s1> animal"))
        path, layer = next(iter(weights.layers.items()))
        context = pictures.text

        def output(*shut):
            keep = ~torch.stack([weights.split(s)[path] for s in shut]).any(0)
            return context @ (layer.weight * keep).T

        with weights.acting((first, None), (second, None)):
            torch.testing.assert_close(layer(context), output(first, second))
        with weights.acting((first, rows), (second, None)):
            expected = torch.where(rows[..., None], output(first, second), output(second))
            torch.testing.assert_close(layer(context), expected)
        torch.testing.assert_close(layer(context), context @ layer.weight.T)

    def test_phrase_rows(self):
        ids = token_ids(["a <s1> animal and an animal", "an animal and a <s2> animal", "a tiger"])
        self.assertEqual(phrase_rows(ids, phrase_ids("<s1> animal"))[:, :7].nonzero().tolist(), [[0, 2], [0, 3]])
        self.assertEqual(phrase_rows(ids, phrase_ids("tiger")).nonzero().tolist(), [[2, 2]])

    def test_unknown_word_is_refused(self):
        with self.assertRaisesRegex(ValueError, "platypus"):
            token_ids(["a platypus"])


class Gradients(unittest.TestCase):
    def check(self, scope):
        model, weights, pictures = tiny(torch.float64)
        instance, prior = pictures[torch.tensor([0, 1])], pictures[torch.tensor([2, 3])]
        loss = ImplantingLoss(model, weights, instance, prior, prior, scope, batch=2)
        scales = torch.rand(weights.count, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        leaf = scales.clone().requires_grad_(True)

        def at(values):
            return loss(values, torch.Generator().manual_seed(2))

        (slope,) = torch.autograd.grad(at(leaf), leaf)
        largest = slope.abs().topk(12).indices
        for i in largest.tolist():
            step = torch.zeros_like(scales)
            step[i] = 1e-5
            central = (at(scales + step) - at(scales - step)) / 2e-5
            self.assertLess(abs(central - slope[i]) / slope[largest[0]].abs(), 1e-6)

    def test_central_differences_global(self):
        self.check(Scope())

    def test_central_differences_token_rows(self):
        self.check(Scope(phrase_ids("<s1> animal")))

    def test_saliency_is_weight_times_gradient(self):
        model, weights, pictures = tiny(torch.float64)
        generator = torch.Generator().manual_seed(5)
        draw = Draw.random(pictures, 4, generator)
        ones = torch.ones(weights.count, dtype=torch.float64, requires_grad=True)
        (said,) = predict_under(model, weights, ones, Scope(), [draw])
        (slope,) = torch.autograd.grad(((said - draw.v) ** 2).mean(), ones)
        for layer in weights.layers.values():
            layer.weight.requires_grad_(True)
        (((predict(model, [draw])[0] - draw.v) ** 2).mean()).backward()
        direct = torch.cat([(layer.weight * layer.weight.grad).reshape(-1) for layer in weights.layers.values()])
        torch.testing.assert_close(slope, direct.detach())


class Planted(unittest.TestCase):
    """Weights that were zero get a large value; the set found at their density must contain them.

    Attention over few tokens, and many pictures with random text states, make the weights identifiable:
    averages over many tokens would leave the network's output the same for other sets.
    """

    PICTURES, TOKENS = 96, 2

    def setUp(self):
        self.model, self.weights, _ = tiny(seed=7)
        x0 = torch.randn(self.PICTURES, 3, 8, 8).clamp(-1, 1)
        text = 2 * torch.randn(self.PICTURES, self.TOKENS, TINY["cross_attention_dim"])
        pictures = Pictures(x0, torch.zeros(self.PICTURES, self.TOKENS, dtype=torch.long), text, ("",) * self.PICTURES)
        generator = torch.Generator().manual_seed(8)
        self.planted = torch.rand(self.weights.count, generator=generator) < 0.02
        sign = torch.randn(self.weights.count, generator=generator).sign()
        values = 4 * self.weights.vector().std() * sign * (1 + torch.rand(self.weights.count, generator=generator))
        self.draw = Draw.random(pictures, self.PICTURES, generator)
        values, marks = self.weights.split(values), self.weights.split(self.planted)
        for path, layer in self.weights.layers.items():
            layer.weight[marks[path]] = 0
        (self.clean,) = predict(self.model, [self.draw])
        for path, layer in self.weights.layers.items():
            layer.weight[marks[path]] = values[path][marks[path]]

    def loss(self, scales, generator=None):
        """The squared distance to the network without the plant."""
        (said,) = predict_under(self.model, self.weights, scales, Scope(), [self.draw])
        return ((said - self.clean) ** 2).mean()

    @torch.no_grad()
    def guilty(self):
        """Planted weights whose removal alone lowers the loss."""
        ones = torch.ones(self.weights.count)
        whole = self.loss(ones)
        lowered = torch.zeros_like(self.planted)
        for i in self.planted.nonzero()[:, 0].tolist():
            ones[i] = 0
            lowered[i] = self.loss(ones) < whole
            ones[i] = 1
        return lowered

    def test_search_finds_the_plant(self):
        guilty, count = self.guilty(), self.weights.count
        budget = int(self.planted.sum())
        self.assertGreater(int(guilty.sum()), budget // 2)
        for found in (
            gradual(self.loss, count, budget, None, stages=budget, batches=1).shut,
            learnt_mask(self.loss, count, 100, None, budget=budget).shut,
        ):
            self.assertLessEqual(int(found.sum()), budget)
            self.assertGreaterEqual((found & guilty).sum().item() / guilty.sum().item(), 0.9)

    def test_random_control_has_the_same_size_and_magnitudes(self):
        generator = torch.Generator().manual_seed(9)
        drawn = random_like(self.weights, self.planted, generator, bins=8)
        values = self.weights.split(self.weights.vector().abs())
        wanted, got = self.weights.split(self.planted), self.weights.split(drawn)
        for path in self.weights.paths:
            order = values[path].reshape(-1).argsort()
            for members in order.tensor_split(8):
                self.assertEqual(wanted[path].reshape(-1)[members].sum(), got[path].reshape(-1)[members].sum())
        self.assertLess(jaccard(drawn, self.planted), 0.6)


class Statistics(unittest.TestCase):
    def test_paired(self):
        base = torch.rand(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 1
        change, width, p = paired(base * 0.95, base)
        self.assertAlmostEqual(change, -0.05)
        self.assertLess(p, 1e-6)
        self.assertLess(width, 0.01)


if __name__ == "__main__":
    unittest.main()
