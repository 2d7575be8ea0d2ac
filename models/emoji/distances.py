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


def _within(kernel):
    """The mean over pairs of different pictures."""
    return (kernel.sum() - np.trace(kernel)) / (len(kernel) * (len(kernel) - 1))


class KernelDistance:
    """KID (Binkowski et al. 2018, arXiv 1801.01401) to a reference: the unbiased squared maximum mean discrepancy under the
    kernel (x . y / D + 1)^3. Kernels are computed once, since intervals ask for many parts of the same pictures."""

    def __init__(self, reference):
        self.reference, self.kernel = reference, _kernel(reference, reference)
        self.within = _within(self.kernel)

    def of(self, seen):
        """A function that gives the distance of some rows of `seen`: to the same rows of the reference if it has as many,
        else to all of it."""
        own, across = _kernel(seen, seen), _kernel(seen, self.reference)

        def distance(rows):
            square = np.ix_(rows, rows)
            if len(seen) == len(self.reference):
                return _within(own[square]) + _within(self.kernel[square]) - 2 * across[square].mean()
            return _within(own[square]) + self.within - 2 * across[rows].mean()

        return distance


def frechet_distance(a, b):
    """FID (Heusel et al. 2017, arXiv 1706.08500): of the Gaussians with the means and covariances of two sets."""
    covariances = [np.cov(x.astype(np.float64), rowvar=False) for x in (a, b)]
    # The product of two covariances has eigenvalues that are real and not negative, but for rounding.
    root = np.sqrt(np.maximum(np.linalg.eigvals(covariances[0] @ covariances[1]).real, 0)).sum()
    apart = ((a.mean(0, dtype=np.float64) - b.mean(0, dtype=np.float64)) ** 2).sum()
    return float(apart + sum(np.trace(c) for c in covariances) - 2 * root)


def interval(statistic, prompts, each, times=200, seed=0):
    """`statistic(rows)` of all pictures, `each` of a prompt in a row, with its 95 % interval, by halves of the prompts drawn
    without replacement (delete-half jackknife): their spread about the whole is that of the whole, and no picture stands
    twice in a sample, which would bias a kernel distance."""
    rng = np.random.default_rng(seed)

    def of(chosen):
        return statistic((each * chosen[:, None] + np.arange(each)).ravel())

    whole = of(np.arange(prompts))
    spread = np.array([of(rng.choice(prompts, prompts // 2, replace=False)) for _ in range(times)]) - whole
    low, high = np.quantile(spread, (0.025, 0.975))
    return {"value": float(whole), "low": float(whole + low), "high": float(whole + high)}
