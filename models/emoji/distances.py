"""Distances of drawn pictures to a distribution, in the first judge's features, with intervals."""

import numpy as np
import onnxruntime


def features(pictures, folder):
    """[N, D] of the first judge for [N, 64, 64, 3] uint8 pictures."""
    session = onnxruntime.InferenceSession(folder / "first.onnx", providers=["CPUExecutionProvider"])
    x = pictures.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1
    return np.concatenate([session.run(["features"], {"picture": x[i : i + 250]})[0] for i in range(0, len(x), 250)])


def _kernel(x, y):
    return (x.astype(np.float64) @ y.T / x.shape[1] + 1) ** 3


def _by_prompt(kernel, rows, columns):
    """The kernel's means over the pictures of each pair of prompts."""
    return kernel.reshape(len(kernel) // rows, rows, -1, columns).mean((1, 3))


class KernelDistance:
    """KID (Binkowski et al. 2018, arXiv 1801.01401) to a reference of the same prompts, `each` pictures of a prompt in a
    row: the unbiased squared maximum mean discrepancy under the kernel (x . y / D + 1)^3.

    Only pictures of different prompts are paired. That leaves the estimate unbiased, as prompts are drawn independently and
    so are the pictures of a prompt; and since both sides show the same prompts, which ones they are falls out of the
    difference, where it is most of the noise of a distance between samples of prompts of their own."""

    def __init__(self, reference, each):
        self.reference, self.each = reference, each
        self.within = _by_prompt(_kernel(reference, reference), each, each)

    def of(self, seen, each):
        """A function that gives the distance on some prompts, by index; `seen` shows the first ones, `each` pictures of
        each in a row."""
        prompts = len(seen) // each
        across = _by_prompt(_kernel(seen, self.reference[: prompts * self.each]), each, self.each)
        within = _by_prompt(_kernel(seen, seen), each, each)
        discrepancy = within + self.within[:prompts, :prompts] - across - across.T

        def distance(chosen):
            part = discrepancy[np.ix_(chosen, chosen)]
            return (part.sum() - np.trace(part)) / (len(part) * (len(part) - 1))

        return distance


def frechet_distance(a, b):
    """FID (Heusel et al. 2017, arXiv 1706.08500): of the Gaussians with the means and covariances of two sets."""
    covariances = [np.cov(x.astype(np.float64), rowvar=False) for x in (a, b)]
    # The product of two covariances has eigenvalues that are real and not negative, but for rounding.
    root = np.sqrt(np.maximum(np.linalg.eigvals(covariances[0] @ covariances[1]).real, 0)).sum()
    apart = ((a.mean(0, dtype=np.float64) - b.mean(0, dtype=np.float64)) ** 2).sum()
    return float(apart + sum(np.trace(c) for c in covariances) - 2 * root)


def interval(statistic, prompts, times=200, seed=0):
    """`statistic(chosen)` of all prompts with its 95 % interval, by halves of the prompts drawn without replacement
    (delete-half jackknife): their spread about the whole is that of the whole, and no prompt stands twice in a sample,
    which would bias a kernel distance."""
    rng = np.random.default_rng(seed)
    whole = statistic(np.arange(prompts))
    halves = [rng.choice(prompts, prompts // 2, replace=False) for _ in range(times)]
    low, high = np.quantile(np.array([statistic(half) for half in halves]) - whole, (0.025, 0.975))
    return {"value": float(whole), "low": float(whole + low), "high": float(whole + high)}
