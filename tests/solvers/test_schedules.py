import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from solvers import logsnr, polynomial, time_uniform


def test_polynomial_is_uniform_in_the_root() -> None:
    roots = polynomial(9, 0.002, 80.0, rho=5.0) ** (1 / 5)
    assert torch.allclose(roots.diff(), roots.diff().mean().expand(8))


def test_logsnr_is_uniform_in_the_logarithm() -> None:
    logs = logsnr(9, 0.002, 80.0).log()
    assert torch.allclose(logs.diff(), logs.diff().mean().expand(8))


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_time_uniform_is_uniform_in_the_root_of_time(rho: float) -> None:
    """Invert log(1 + sigma^2) = beta_d tau^2 / 2 + beta_min tau, solved from its values at tau = 1 and 0.001."""
    high, low = math.log1p(80.0**2), math.log1p(0.002**2)
    half, beta_min = torch.linalg.solve(torch.tensor([[1.0, 1.0], [1e-6, 1e-3]]).double(), torch.tensor([high, low]).double())
    levels = torch.log1p(time_uniform(9, 0.002, 80.0, rho) ** 2)
    tau = (-beta_min + torch.sqrt(beta_min**2 + 4 * half * levels)) / (2 * half)
    roots = tau ** (1 / rho)
    assert torch.allclose(roots.diff(), roots.diff().mean().expand(8), rtol=1e-5)


@pytest.mark.parametrize("schedule", [polynomial, logsnr, time_uniform])
@pytest.mark.parametrize("num_steps", [2, 3, 10, 101])
def test_every_schedule(schedule: Callable[..., Tensor], num_steps: int) -> None:
    sigmas = schedule(num_steps, 0.002, 80.0)
    assert sigmas.shape == (num_steps,)
    assert sigmas.dtype == torch.float64
    assert (sigmas[0].item(), sigmas[-1].item()) == (80.0, 0.002)
    assert bool((sigmas.diff() < 0).all())
    fine = schedule(8 * (num_steps - 1) + 1, 0.002, 80.0)
    assert torch.allclose(fine[::8], sigmas, rtol=1e-9)
    with pytest.raises(ValueError, match="num_steps: 1; valid: 2 or more"):
        schedule(1, 0.002, 80.0)
    for low, high in ((0.0, 1.0), (2.0, 1.0), (1.0, math.inf)):
        with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
            schedule(num_steps, low, high)
