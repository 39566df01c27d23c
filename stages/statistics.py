"""Means and their uncertainty."""

from dataclasses import dataclass

import torch
from torch import Tensor


def mean_error(values: Tensor) -> float:
    """Standard error of the mean of independent values (n,)."""
    return values.std().item() / len(values) ** 0.5


def half_interval(values: Tensor) -> float:
    """Half the 95 % interval of that mean."""
    return 1.96 * mean_error(values)


@dataclass(frozen=True)
class Paired:
    """Values against those of a base on the same prompts and noise.

    Attributes:
        mean: of the values.
        difference: mean of the values less the base's.
        error: standard error of that.
        wins: share of pairs in which the value is the larger; a tie is half a win.
        wins_95: the 95 % interval of that share.
    """

    mean: float
    difference: float
    error: float
    wins: float
    wins_95: tuple[float, float]

    @property
    def half(self) -> float:
        """Half the 95 % interval of the difference."""
        return 1.96 * self.error


def paired(values: Tensor, base: Tensor) -> Paired:
    """Compare values with a base's, (n,) each, pair by pair.

    The interval of the wins is that of Agresti and Coull (1998), with two wins and two losses added: it has a width even where
    all pairs are won.
    """
    difference = values - base
    won = (difference.sign() + 1) / 2
    more = torch.cat([won, won.new_tensor([1, 1, 0, 0])])
    middle, half = more.mean().item(), half_interval(more)
    return Paired(
        mean=values.mean().item(),
        difference=difference.mean().item(),
        error=mean_error(difference),
        wins=won.mean().item(),
        wins_95=(max(0.0, middle - half), min(1.0, middle + half)),
    )
