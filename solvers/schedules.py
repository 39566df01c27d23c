"""Grids of noise levels. ``num_steps`` counts nodes, as the papers' configurations do: num_steps - 1 intervals.

Each schedule maps (num_steps, sigma_min, sigma_max) to strictly decreasing sigmas, float64 (num_steps,), from sigma_max to
sigma_min. They raise ValueError where num_steps < 2 or not 0 < sigma_min < sigma_max. A schedule with M nodes more inside each
interval has the nodes of the one without at every (M + 1)-th place.
"""

import math

import torch
from torch import Tensor


def polynomial(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Uniform in sigma^(1/rho) (Karras et al. 2022, EDM, equation 5)."""
    u = _uniform(num_steps, sigma_min, sigma_max, rho=rho)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return _exact_ends((high + u * (low - high)) ** rho, sigma_min, sigma_max)


def logsnr(num_steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    """Uniform in log sigma (Lu et al. 2022, DPM-Solver)."""
    u = _uniform(num_steps, sigma_min, sigma_max)
    return _exact_ends(sigma_max * (sigma_min / sigma_max) ** u, sigma_min, sigma_max)


def time_uniform(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 1.0) -> Tensor:
    """Uniform in tau^(1/rho), where tau is the time of the variance-preserving process with linear beta (Song et al. 2021).

    sigma(tau)^2 = exp(beta_d tau^2 / 2 + beta_min tau) - 1, with beta_d and beta_min such that sigma(1) = sigma_max and
    sigma(0.001) = sigma_min. Ends too near to each other have no such process that falls all the way: for sigma_max 1,
    sigma_min has to be at most 0.026. The inverse is `variance_preserving_time`.
    """
    u = _uniform(num_steps, sigma_min, sigma_max, rho=rho)
    beta_d, beta_min = _betas(sigma_min, sigma_max)
    tau = (1 + u * (FIRST_TIME ** (1 / rho) - 1)) ** rho
    return _exact_ends(torch.expm1(beta_d / 2 * tau**2 + beta_min * tau).sqrt(), sigma_min, sigma_max)


def variance_preserving_time(sigma: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
    """The time tau in [0, 1] of noise levels, of any shape, in the process of `time_uniform`."""
    beta_d, beta_min = _betas(sigma_min, sigma_max)
    level = torch.log1p(sigma**2)
    return 2 * level / (beta_min + torch.sqrt(beta_min**2 + 2 * beta_d * level))


def discrete(num_steps: int, sigma_min: float, sigma_max: float, table: Tensor, rho: float = 1.0) -> Tensor:
    """Uniform in t^(1/rho), where t is the time in a backbone's own table of noise levels; t in (0, 1].

    Args:
        num_steps, sigma_min, sigma_max: as for every schedule; both levels within the table.
        table: the backbone's noise levels sqrt((1 - alphas_cumprod) / alphas_cumprod), increasing, (T,); entry i has the time
            (i + 1) / T.
        rho: 1 spaces the nodes evenly in t, as EPD-Solver does for Stable Diffusion.
    """
    u = _uniform(num_steps, sigma_min, sigma_max, rho=rho)
    ends = torch.tensor([sigma_max, sigma_min], dtype=torch.float64)
    high, low = (discrete_time(ends, table) ** (1 / rho)).tolist()
    return _exact_ends(discrete_sigma((high + u * (low - high)) ** rho, table), sigma_min, sigma_max)


def discrete_time(sigma: Tensor, table: Tensor) -> Tensor:
    """The time t of noise levels within a backbone's table (T,), of any shape; the inverse of `discrete_sigma`.

    Between the table's entries log alphas_cumprod = -log(1 + sigma^2) is linear in t.
    """
    _check_table(table)
    if bool(((sigma < table[0] * (1 - 1e-9)) | (sigma > table[-1] * (1 + 1e-9))).any()):
        raise ValueError(f"sigma: {sigma.tolist()}; valid: within the table, {table[0].item()} to {table[-1].item()}")
    times = torch.arange(1, len(table) + 1, dtype=torch.float64) / len(table)
    return _interpolate(torch.log1p(sigma.double() ** 2), torch.log1p(table.double() ** 2), times)


def discrete_sigma(time: Tensor, table: Tensor) -> Tensor:
    """The noise levels of times t in [1 / T, 1] in a backbone's table (T,)."""
    _check_table(table)
    times = torch.arange(1, len(table) + 1, dtype=torch.float64) / len(table)
    return torch.expm1(_interpolate(time.double(), times, torch.log1p(table.double() ** 2))).sqrt()


def flowmatch(num_steps: int, sigma_min: float, sigma_max: float = 1.0, shift: float = 1.0) -> Tensor:
    """Uniform in s, where sigma = shift s / (1 + (shift - 1) s): rectified flow's time-shifted grid (Esser et al. 2024).

    SD3 has shift 3 and sigma_min 3 / 1002 (s = 0.001), FLUX `dynamic_shift`. Diffusers' FlowMatchEulerDiscreteScheduler has the
    same nodes, a 0 after them, and sigma_min shifted twice where the shift is static.
    """
    u = _uniform(num_steps, sigma_min, sigma_max, shift=shift)
    if sigma_max > 1:
        raise ValueError(f"sigma_max: {sigma_max}; valid: at most 1, the flow's noise")
    low, high = (sigma / (shift - (shift - 1) * sigma) for sigma in (sigma_min, sigma_max))
    s = high + u * (low - high)
    return _exact_ends(shift * s / (1 + (shift - 1) * s), sigma_min, sigma_max)


def dynamic_shift(tokens: int, shifts: tuple[float, float] = (0.5, 1.15), counts: tuple[int, int] = (256, 4096)) -> float:
    """FLUX's shift for that many image tokens, (height / 16) (width / 16): e^mu with mu linear, 0.5 at 256 and 1.15 at 4096."""
    (low, high), (few, many) = shifts, counts
    return math.exp(low + (high - low) * (tokens - few) / (many - few))


FIRST_TIME = 1e-3
"""The time of sigma_min in the variance-preserving process."""


def _betas(sigma_min: float, sigma_max: float) -> tuple[float, float]:
    log_low, log_high = math.log1p(sigma_min**2), math.log1p(sigma_max**2)
    beta_d = 2 * (log_low / FIRST_TIME - log_high) / (FIRST_TIME - 1)
    return beta_d, log_high - beta_d / 2


def _check_table(table: Tensor) -> None:
    if table.ndim != 1 or len(table) < 2 or not bool((table > 0).all()) or not bool((table.diff() > 0).all()):
        raise ValueError(f"table: shape {tuple(table.shape)}; valid: positive increasing noise levels (T,), T >= 2")


def _interpolate(x: Tensor, known: Tensor, values: Tensor) -> Tensor:
    """Piecewise linear through (known, values), known increasing."""
    right = torch.searchsorted(known, x).clamp(1, len(known) - 1)
    share = (x - known[right - 1]) / (known[right] - known[right - 1])
    return torch.lerp(values[right - 1], values[right], share)


def _uniform(num_steps: int, sigma_min: float, sigma_max: float, **positive: float) -> Tensor:
    """The nodes 0 to 1; raises ValueError where an argument is out of its range, those named too."""
    if not isinstance(num_steps, int) or num_steps < 2:
        raise ValueError(f"num_steps: {num_steps}; valid: 2 or more, whole (it counts nodes: num_steps - 1 intervals)")
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"sigma_min, sigma_max: {sigma_min}, {sigma_max}; valid: 0 < sigma_min < sigma_max")
    for name, value in positive.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: {value}; valid: {name} > 0, finite")
    return torch.linspace(0, 1, num_steps, dtype=torch.float64)


def _exact_ends(sigmas: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
    """The same grid without the rounding at its ends; raises ValueError where it does not fall strictly."""
    sigmas[0], sigmas[-1] = sigma_max, sigma_min
    if not bool((sigmas.diff() < 0).all()):
        found = f"{sigma_min}, {sigma_max} give {sigmas.tolist()[:8]}"
        raise ValueError(
            f"sigma_min, sigma_max: {found}; valid: ends between which this schedule falls, further from each other"
        )
    return sigmas
