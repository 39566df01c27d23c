"""What the solvers call, and wrappers around it."""

import math
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
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


class Conditioned:
    """A denoiser that can also evaluate rows in another order than its conditions are in, or some of them.

    Args:
        evaluate: maps x (R, ...), sigma (R,) and the rows' conditions (R,), each from 0 to B - 1, to D (R, ...).
        conditions: B.
    """

    def __init__(self, evaluate: Callable[[Tensor, Tensor, Tensor], Tensor], conditions: int) -> None:
        self.evaluate = evaluate
        self.conditions = conditions

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.rows(x, sigma, slice(0, len(x)))

    def rows(self, x: Tensor, sigma: Tensor, which: slice) -> Tensor:
        """D of some rows of a call, in its order: the slice of x (M*B, ...) and sigma (M*B,)."""
        rows = torch.arange(len(x), device=x.device)[which]
        return self.evaluate(x[which], sigma[which], rows % max(self.conditions, 1))


class Sharded:
    """Spreads the rows of each call (points of a step, windows, halves of guidance) over the processes of a group.

    Every process of the group makes the same calls and gets all their rows; each evaluates as many as the others, but for one.
    Without gradient.

    Args:
        denoise: the same in all of them, each with its own copy of the network.
        group: of torch.distributed, whose backend moves tensors of the state's device; None: all processes.
    """

    def __init__(self, denoise: Conditioned, group: dist.ProcessGroup | None = None) -> None:
        self.denoise = denoise
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.group = group

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (x.requires_grad or sigma.requires_grad):
            raise ValueError("x, sigma: with gradient, which does not cross processes; valid: under torch.no_grad()")
        shares = [slice(len(x) * rank // self.size, len(x) * (rank + 1) // self.size) for rank in range(self.size)]
        mine = self.denoise.rows(x, sigma, shares[self.rank]) if _count(shares[self.rank]) else x[:0]
        padded = x.new_zeros(max(map(_count, shares)), *x.shape[1:])  # gathered tensors have to be of one shape
        padded[: len(mine)] = mine
        every = [torch.empty_like(padded) for _ in shares]
        dist.all_gather(every, padded, group=self.group)
        return torch.cat([part[: _count(share)] for part, share in zip(every, shares, strict=True)])


def _count(rows: slice) -> int:
    return rows.stop - rows.start


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
