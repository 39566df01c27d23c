"""What the solvers call, and wrappers around it."""

import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class Denoiser(Protocol):
    """E[x0 | x] of a frozen diffusion model; prompt or class, guidance, dtype and device are closed over."""

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x (M*B, ...) at noise levels sigma (M*B,) -> D (M*B, ...); row i has condition i mod B."""
        ...


@runtime_checkable
class FeatureDenoiser(Denoiser, Protocol):
    """A denoiser that can also say what its network saw."""

    def with_feature(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """As a call, with the U-Net's bottleneck averaged over its channels, (M*B, F), without gradient."""
        ...


def with_feature(denoise: Denoiser, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """D (M*B, ...) and the feature (M*B, F); raises TypeError where the denoiser has none."""
    if not isinstance(denoise, FeatureDenoiser):
        raise TypeError(f"denoise: {type(denoise).__name__} gives no feature; valid: a FeatureDenoiser, as AMED needs")
    denoised, feature = denoise.with_feature(x, sigma)
    if feature.ndim != 2 or len(feature) != len(x) or not math.isfinite(feature.sum().item()):
        raise ValueError(f"denoise: gave a feature of shape {tuple(feature.shape)}; valid: finite numbers, ({len(x)}, F)")
    return denoised, feature


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
        self._count(x)
        return self.denoise(x, sigma)

    def with_feature(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        self._count(x)
        return with_feature(self.denoise, x, sigma)

    def _count(self, x: Tensor) -> None:
        self.depth += 1
        self.rows += x.shape[0]


class Checkpointed:
    """A denoiser whose network's activations are not kept for the gradient but made again: one call's memory instead of all."""

    def __init__(self, denoise: Denoiser) -> None:
        self.denoise = denoise

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return checkpoint(self.denoise, x, sigma, use_reentrant=False)

    def with_feature(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return checkpoint(with_feature, self.denoise, x, sigma, use_reentrant=False)


class Deduplicated:
    """A denoiser that evaluates copies of a state once: rows that come as `copies` times the same states, at the same noise
    levels, as the first evaluation of several tables on one noise does.

    Args:
        denoise: a denoiser; of a call with M copies of x (M*B, ...), row i has condition i mod B.
        copies: how many; any number of rows that it does not divide is evaluated as it is.
    """

    def __init__(self, denoise: Denoiser, copies: int) -> None:
        self.denoise = denoise
        self.copies = copies

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        rows, rest = divmod(len(x), self.copies)
        # each equals the one `rows` before it
        if rest or not (torch.equal(sigma[rows:], sigma[:-rows]) and torch.equal(x[rows:], x[:-rows])):
            return self.denoise(x, sigma)
        return self.denoise(x[:rows], sigma[:rows]).repeat(self.copies, *[1] * (x.ndim - 1))


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
        return self._guide(self.denoise(*self._both(x, sigma)))

    def with_feature(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The feature is that of the wanted conditions."""
        out, feature = with_feature(self.denoise, *self._both(x, sigma))
        return self._guide(out), feature.unflatten(0, (-1, 2, self.batch))[:, 0].flatten(0, 1)

    def _both(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        if len(x) % self.batch:
            raise ValueError(f"x: {len(x)} rows; valid: a multiple of the {self.batch} conditions that the guidance has")
        rows = x.unflatten(0, (-1, 1, self.batch)).expand(-1, 2, -1, *x.shape[1:])  # (M, 2, B, ...)
        sigmas = sigma.unflatten(0, (-1, 1, self.batch)).expand(-1, 2, -1)
        return rows.flatten(0, 2), sigmas.flatten()

    def _guide(self, out: Tensor) -> Tensor:
        wanted, other = out.unflatten(0, (-1, 2, self.batch)).unbind(1)  # (M, B, ...) each
        return torch.lerp(other, wanted, self.scale).flatten(0, 1)
