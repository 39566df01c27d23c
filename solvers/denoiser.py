"""What the solvers call, and wrappers around it."""

from typing import Protocol

import torch
from torch import Tensor


class Denoiser(Protocol):
    """E[x0 | x] of a frozen diffusion model; prompt or class, guidance, dtype and device are closed over."""

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x (M*B, ...) at noise levels sigma (M*B,) -> D (M*B, ...); row i has condition i mod B."""
        ...


class Counter:
    """A denoiser that counts its cost.

    Attributes:
        depth: calls, one after the other (latency).
        rows: rows in all calls together (compute); divide by the number of images.
    """

    def __init__(self, denoise: Denoiser) -> None:
        self.denoise = denoise
        self.depth = 0
        self.rows = 0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.depth += 1
        self.rows += x.shape[0]
        return self.denoise(x, sigma)


class Guided:
    """Classifier-free guidance D = D_u + scale (D_c - D_u) as one batched call (Ho and Salimans 2022, equation 6).

    Args:
        denoise: a denoiser of 2 B conditions: the B wanted ones, then the B that guidance leads away from.
        scale: guidance scale; 1 is the conditional model.
        batch: B.
    """

    def __init__(self, denoise: Denoiser, scale: float, batch: int) -> None:
        self.denoise = denoise
        self.scale = scale
        self.batch = batch

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        rows = x.unflatten(0, (-1, 1, self.batch)).expand(-1, 2, -1, *x.shape[1:])  # (M, 2, B, ...)
        sigmas = sigma.unflatten(0, (-1, 1, self.batch)).expand(-1, 2, -1)
        out = self.denoise(rows.flatten(0, 2), sigmas.flatten())
        wanted, other = out.unflatten(0, (-1, 2, self.batch)).unbind(1)  # (M, B, ...) each
        return torch.lerp(other, wanted, self.scale).flatten(0, 1)
