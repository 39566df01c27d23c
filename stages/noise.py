"""The noise of every sample, a function of (seed, index) alone."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from solvers import Noise

SPLITS = {"train": range(0, 2**40), "validation": range(2**40, 2**41), "test": range(2**41, 2**42)}
"""Indices of the samples to learn from, to choose by, and to report on: no noise is ever in two of them."""


def noise(seed: int, split: str, samples: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """Unit noise of the given samples of a split, float64 (B, *shape)."""
    indices = (SPLITS[split][sample] for sample in samples)
    draws = [np.random.default_rng([seed, index]).standard_normal(shape) for index in indices]
    return torch.from_numpy(np.stack(draws))


def fresh_noise(seed: int, split: str, samples: Iterable[int], shape: tuple[int, ...]) -> Noise:
    """The noise of ancestral steps: unit noise float64 (B, *shape) by (seed, sample, step), beside that of `noise`."""
    indices = [SPLITS[split][sample] for sample in samples]

    def of_step(step: int) -> Tensor:
        seeds = [np.random.SeedSequence([seed, index], spawn_key=(step,)) for index in indices]
        return torch.from_numpy(np.stack([np.random.default_rng(s).standard_normal(shape) for s in seeds]))

    return of_step


def batches(samples: int, size: int) -> list[range]:
    """The samples 0 to samples - 1 in batches of that size, the last one smaller where it must be."""
    return [range(first, min(first + size, samples)) for first in range(0, samples, size)]
