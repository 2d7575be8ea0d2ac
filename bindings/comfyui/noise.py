"""Noise levels of a diffusers scheduler's fields, in NumPy: ComfyUI knows its own by name only, Macula by these fields."""

from __future__ import annotations

import numpy as np

#: The least share of the signal that is left: one of 0, which some schedules end in, would be an infinite level.
LEAST = 1e-9


def noise_levels(fields):
    """Sigma of each training step, `sqrt((1 - alphas_cumprod) / alphas_cumprod)`."""
    kept = np.maximum(alphas_cumprod(fields), LEAST)
    return np.sqrt((1 - kept) / kept)


def alphas_cumprod(fields):
    """Share of the signal's variance after each training step."""
    if fields.get("alphas_cumprod") is not None:
        return np.asarray(fields["alphas_cumprod"], dtype=np.float64)
    kept = np.cumprod(1 - betas(fields))
    if fields.get("rescale_betas_zero_snr"):
        # Zero terminal SNR (arXiv 2305.08891, algorithm 1).
        root = np.sqrt(kept)
        kept = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return kept


def betas(fields):
    """Variance of the noise of each training step."""
    if fields.get("trained_betas") is not None:
        return np.asarray(fields["trained_betas"], dtype=np.float64)
    count, schedule = fields.get("num_train_timesteps", 1000), fields.get("beta_schedule", "linear")
    first, last = fields.get("beta_start", 1e-4), fields.get("beta_end", 0.02)
    if schedule == "linear":
        return np.linspace(first, last, count)
    if schedule == "scaled_linear":
        return np.linspace(first**0.5, last**0.5, count) ** 2
    if schedule == "squaredcos_cap_v2":
        level = np.cos((np.linspace(0, 1, count + 1) + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - level[1:] / level[:-1], 0.999)
    raise ValueError(f"beta_schedule is {schedule}; known are linear, scaled_linear and squaredcos_cap_v2")
