"""What the stages that learn have in common. Every random number depends on (seed, what for, iteration), never on history."""

import math
import zlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

T = TypeVar("T")


def rng(seed: int, purpose: str, iteration: int = 0) -> np.random.Generator:
    """The random numbers of one iteration of one piece of work."""
    return np.random.default_rng([seed, zlib.crc32(purpose.encode()), iteration])


def generator(seed: int, purpose: str, iteration: int = 0) -> torch.Generator:
    """The same for torch."""
    return torch.Generator().manual_seed(int(rng(seed, purpose, iteration).integers(2**63)))


def seeded(seed: int, purpose: str, build: Callable[[], T]) -> T:
    """What `build` makes with torch's global generator seeded for it; the generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, purpose).initial_seed())
        return build()


def cosine(iteration: int, iterations: int) -> float:
    """Share of the learning rate: from 1 at the first iteration towards 0 at the last."""
    return 0.5 * (1 + math.cos(math.pi * iteration / iterations))


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, share: float, frozen: Sequence[nn.Parameter] = ()) -> float:
    """One step down the gradient of a loss, clipped to norm 1; returns the norm that it had.

    Args:
        optimizer: of all parameters.
        loss: a number, ().
        share: of the optimizer's learning rates, in this step.
        frozen: parameters to leave alone in it.

    Raises:
        FloatingPointError: the loss or its gradient is not finite.
    """
    if not bool(loss.isfinite()):
        raise FloatingPointError(f"loss: {loss.item()}; valid: a finite number")
    optimizer.zero_grad()
    loss.backward()
    for parameter in frozen:
        parameter.grad = None
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    length = nn.utils.clip_grad_norm_(parameters, 1.0)
    if not bool(length.isfinite()):
        raise FloatingPointError(f"norm of the loss's gradient: {length.item()}; valid: a finite number")
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] *= share
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    return length.item()
