"""EPD-Plugin, one point at a time."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from backends import Gaussian
from solvers import (
    AFS,
    Counter,
    integrate,
    polynomial,
)  # fmt: skip

from .conftest import epd_table, one

ADAMS_BASHFORTH = [[1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]


@pytest.mark.parametrize("sigma_max", [80.0, 1.0], ids=["ve", "flow"])
@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("points", [1, 2, 3])
@pytest.mark.parametrize("max_order", [2, 3, 4])
def test_epd_plugin_equals_the_naive_formula(
    max_order: int, points: int, afs: bool, sigma_max: float, mixture: Gaussian, start: Tensor
) -> None:
    sigmas, table, denoise = polynomial(6, 0.003, sigma_max), epd_table(points, 6, max_order), one(mixture)

    def naive(x: Tensor) -> Tensor:
        past: list[Tensor] = []
        for n, (t, t_next) in enumerate(pairwise(sigmas)):
            past.append(x / torch.sqrt(1 + t**2) if afs and n == 0 else (x - denoise(x, t)) / t)
            coefficients = ADAMS_BASHFORTH[min(max_order, n + 1) - 1]
            lead = sum(c * d for c, d in zip(coefficients, reversed(past), strict=False))
            total = torch.zeros_like(x)
            for k in range(points):
                tau = t_next ** table.position[n, k] * t ** (1 - table.position[n, k])
                x_k = x + (tau - t) * lead
                total += (
                    table.weight[n, k] * table.direction_scale[n, k] * (x_k - denoise(x_k, table.time_scale[n, k] * tau)) / tau
                )
            x = x + (t_next - t) * total
        return x

    counter = Counter(mixture.denoiser([]))
    found = integrate(counter, AFS(table) if afs else table, sigma_max * start, sigmas)
    assert torch.allclose(found, torch.stack([naive(x) for x in sigma_max * start]), rtol=1e-12, atol=1e-12)
    assert counter.depth == 2 * 5 - afs
    assert counter.rows / len(start) == (1 + points) * 5 - afs
