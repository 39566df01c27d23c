"""Grids of noise levels. ``num_steps`` counts nodes, as the papers' configurations do: num_steps - 1 intervals.

Each maps (num_steps, sigma_min, sigma_max) to strictly decreasing sigmas, float64 (num_steps,), from sigma_max to sigma_min.
They raise ValueError where num_steps < 2 or not 0 < sigma_min < sigma_max. A schedule with (M + 1)(num_steps - 1) + 1 nodes
has the nodes of the one with num_steps at every (M + 1)-th place.
"""

import math

import torch
from torch import Tensor


def polynomial(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Uniform in sigma^(1/rho) (Karras et al. 2022, EDM, equation 5)."""
    u = _uniform(num_steps, sigma_min, sigma_max)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return _exact_ends((high + u * (low - high)) ** rho, sigma_min, sigma_max)


def logsnr(num_steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    """Uniform in log sigma (Lu et al. 2022, DPM-Solver)."""
    u = _uniform(num_steps, sigma_min, sigma_max)
    return _exact_ends(sigma_max * (sigma_min / sigma_max) ** u, sigma_min, sigma_max)


def time_uniform(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 1.0) -> Tensor:
    """Uniform in tau^(1/rho), where tau is the time of the variance-preserving process with linear beta (Song et al. 2021).

    sigma(tau)^2 = exp(beta_d tau^2 / 2 + beta_min tau) - 1, with beta_d and beta_min such that sigma(1) = sigma_max and
    sigma(0.001) = sigma_min.
    """
    u = _uniform(num_steps, sigma_min, sigma_max)
    end = 1e-3
    log_low, log_high = math.log(sigma_min**2 + 1), math.log(sigma_max**2 + 1)
    beta_d = 2 * (log_low / end - log_high) / (end - 1)
    beta_min = log_high - beta_d / 2
    tau = (1 + u * (end ** (1 / rho) - 1)) ** rho
    return _exact_ends(torch.expm1(beta_d / 2 * tau**2 + beta_min * tau).sqrt(), sigma_min, sigma_max)


def _uniform(num_steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    if num_steps < 2:
        raise ValueError(f"num_steps: {num_steps}; valid: 2 or more (it counts nodes: num_steps - 1 intervals)")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"sigma_min, sigma_max: {sigma_min}, {sigma_max}; valid: 0 < sigma_min < sigma_max")
    return torch.linspace(0, 1, num_steps, dtype=torch.float64)


def _exact_ends(sigmas: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
    """The same grid without the rounding at its ends."""
    sigmas[0], sigmas[-1] = sigma_max, sigma_min
    return sigmas
