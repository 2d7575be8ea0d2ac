"""Subspace diffusion (Jing et al. 2022, arXiv 2205.01490) with matrices, for `tests/decomposed.rs`.

usage: subspace_diffusion.py FOLDER  (writes cases.json and values.f32 there)

The subspace is that of pictures that are constant in 2 x 2 blocks, spanned by the orthonormal columns of U. Reverse
diffusion runs on U^T x down to the turning point and there goes on in the full space, from

    U y + sqrt(sigma^2 + signal^2 s^2) (1 - U U^T) z

with s the root mean square of the data's dropped coordinates (their section 4; s = 0 leaves noise alone). The noise
prediction is e(x, t) = 0.3 x + 0.5 sin(3 x + t / 100) - 0.2 at both sizes. All in float64.
"""

import json
import pathlib
import sys

import numpy as np

SIDE, TIMES, STEPS = 8, 1000, 20


def basis(side):
    """U [side^2, side^2 / 4]: half the indicator of each block, pixels in reading order."""
    rows = np.kron(np.eye(side // 2), np.ones((2, 1)))
    return np.kron(rows, rows) / 2


def model(x, t):
    return 0.3 * x + 0.5 * np.sin(3 * x + t / 100) - 0.2


def step(x, t, a, b, kind, z):
    """From signal power a to the greater b, by the posterior of arXiv 2006.11239 or by arXiv 2010.02502 without noise."""
    e = model(x, t)
    x0 = (x - np.sqrt(1 - a) * e) / np.sqrt(a)
    if kind == "DDIMScheduler":
        return np.sqrt(b) * x0 + np.sqrt(1 - b) * e
    beta = 1 - a / b
    mean = np.sqrt(b) * beta / (1 - a) * x0 + np.sqrt(a / b) * (1 - b) / (1 - a) * x
    return mean + np.sqrt((1 - b) / (1 - a) * beta) * z


def run(kind, turning, spread, bars, noise):
    u = basis(SIDE)
    times = sorted({round(t) for t in np.linspace(TIMES, 0, STEPS + 1)} | {turning}, reverse=True)
    x, states = noise["start"], []
    for index, (now, after) in enumerate(zip(times[:-1], times[1:])):
        z = noise["steps"][index]
        x = step(x, now - 1, bars[now], bars[after], kind, u.T @ z if now >= turning else z)
        if now == turning:
            std = np.sqrt(1 - bars[after] + bars[after] * spread**2)
            z = noise["lift"]
            x = u @ x + std * (z - u @ (u.T @ z))
        states.append(x)
    return states


def main(folder):
    rng = np.random.default_rng(3)
    count = SIDE * SIDE
    noise = {
        "start": rng.standard_normal(count // 4),
        "lift": rng.standard_normal(count),
        "steps": rng.standard_normal((STEPS + 1, count)),
    }
    bars = np.concatenate([[1], np.cumprod(1 - np.linspace(1e-4, 0.02, TIMES))])
    u = basis(SIDE)
    assert np.allclose(u.T @ u, np.eye(count // 4))
    values = [noise["start"], noise["lift"], noise["steps"]]
    cases = []
    for kind in ("DDPMScheduler", "DDIMScheduler"):
        for turning, spread in ((500, 0.0), (500, 0.08), (330, 0.05), (910, 0.0)):
            states = run(kind, turning, spread, bars, noise)
            cases.append({"kind": kind, "turning": turning, "spread": spread, "states": [len(s) for s in states]})
            values += states
    np.concatenate([np.ravel(v) for v in values]).astype("<f4").tofile(pathlib.Path(folder) / "values.f32")
    described = {"side": SIDE, "steps": STEPS, "alphas_cumprod": bars[1:].tolist(), "cases": cases}
    (pathlib.Path(folder) / "cases.json").write_text(json.dumps(described))


if __name__ == "__main__":
    main(sys.argv[1])
