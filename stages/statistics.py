"""Means and their uncertainty."""

from torch import Tensor


def mean_error(values: Tensor) -> float:
    """Standard error of the mean of independent values (n,)."""
    return values.std().item() / len(values) ** 0.5


def half_interval(values: Tensor) -> float:
    """Half the 95 % interval of that mean."""
    return 1.96 * mean_error(values)
