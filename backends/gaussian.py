"""A mixture of Gaussians, whose denoiser is known exactly: the backbone of the tests."""

from collections.abc import Sequence

import torch
from torch import Tensor

from backends.backend import Spec
from solvers import Conditioned


class Gaussian:
    """The data are sum_k weight_k N(mean_k, std_k^2), independent of the prompt.

    Args:
        means: (K, C, H, W).
        stds: (K,).
        weights: summing to 1, (K,).
    """

    def __init__(self, means: Tensor, stds: Tensor, weights: Tensor) -> None:
        if not torch.isclose(weights.sum(), torch.ones_like(weights.sum())):
            raise ValueError(f"weights: {weights.tolist()}; valid: numbers that sum to 1")
        self.means = means
        self.stds = stds
        self.weights = weights
        self.spec = Spec(shape=tuple(means.shape[1:]), sigma_min=0.002, sigma_max=80.0)

    def denoiser(self, prompts: Sequence[str]) -> Conditioned:
        return Conditioned(lambda x, sigma, _: self._denoise(x, sigma), len(prompts))

    def decode(self, x: Tensor) -> Tensor:
        return ((x + 1) / 2).clamp(0, 1)

    def _denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """sum_k p(k | x) E[x0 | x, k], with x | k ~ N(mean_k, std_k^2 + sigma^2)."""
        variance = self.stds**2 + sigma[:, None] ** 2  # (B, K)
        flat, means = x.flatten(1), self.means.flatten(1)  # (B, d), (K, d)
        offset = flat[:, None] - means  # (B, K, d)
        log_density = -offset.square().sum(-1) / (2 * variance) - flat.shape[1] / 2 * variance.log()
        posterior = (self.weights.log() + log_density).softmax(-1)  # (B, K)
        shrink = self.stds**2 / variance  # (B, K)
        return (posterior[..., None] * (means + shrink[..., None] * offset)).sum(1).view_as(x)
