"""Classical solvers: constant tables."""

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from solvers.schedules import variance_preserving_time
from solvers.table import Form, Solver, StepTable, constant_table

Levels = tuple[float, ...]
"""Noise levels: of the outputs that a step uses, oldest first, and of the next node."""

CACHED = 4096  # tables kept per solver: a grid's are needed again for each batch
POINTS, WEIGHTS = map(torch.from_numpy, np.polynomial.legendre.leggauss(64))


def _of_two_levels(build: Callable[[float, float], StepTable]) -> Solver:
    """The solver whose tables depend on the step's two noise levels alone."""
    cached = lru_cache(maxsize=CACHED)(build)

    def table(step: int, sigmas: Tensor) -> StepTable:
        sigma, sigma_next = _levels(sigmas, step, step + 1)
        return cached(sigma, sigma_next)

    table.__doc__ = build.__doc__
    return table


@_of_two_levels
def euler(sigma: float, sigma_next: float) -> StepTable:
    """First order; DDIM (Song et al. 2021) in these coordinates."""
    return constant_table(sigma, sigma_next, "noise", [sigma], [[0.0]], [1.0])


@_of_two_levels
def heun(sigma: float, sigma_next: float) -> StepTable:
    """Second order, two evaluations (Karras et al. 2022, algorithm 1, with the corrector at the last step too)."""
    return constant_table(sigma, sigma_next, "noise", [sigma, sigma_next], [[0.0, 0.0], [1.0, 0.0]], [0.5, 0.5])


@_of_two_levels
def midpoint(sigma: float, sigma_next: float) -> StepTable:
    """Second order, two evaluations, the second at the mean of both noise levels."""
    nodes = [sigma, (sigma + sigma_next) / 2]
    return constant_table(sigma, sigma_next, "noise", nodes, [[0.0, 0.0], [1.0, 0.0]], [0.0, 1.0])


@_of_two_levels
def rk4(sigma: float, sigma_next: float) -> StepTable:
    """The classical fourth-order Runge-Kutta method, four evaluations."""
    middle = (sigma + sigma_next) / 2
    stage = [[0.0] * 4, [1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]
    update = [1 / 6, 1 / 3, 1 / 3, 1 / 6]
    return constant_table(sigma, sigma_next, "noise", [sigma, middle, middle, sigma_next], stage, update)


@_of_two_levels
def dpm_solver_2(sigma: float, sigma_next: float) -> StepTable:
    """Second order, two evaluations, the second at the geometric mean (Lu et al. 2022, DPM-Solver, r = 1/2)."""
    nodes = [sigma, math.sqrt(sigma * sigma_next)]
    return constant_table(sigma, sigma_next, "noise", nodes, [[0.0, 0.0], [1.0, 0.0]], [0.0, 1.0])


@_of_two_levels
def ddpm(sigma: float, sigma_next: float) -> StepTable:
    """The ancestral step (Ho et al. 2020, equations 6 and 7) in these coordinates; first order, with fresh noise.

    The posterior of x' given x and D has mean D + (sigma' / sigma)^2 (x - D) and variance sigma'^2 (1 - (sigma' / sigma)^2):
    Euler to sigma'^2 / sigma, then that noise.
    """
    noise = sigma_next * math.sqrt(1 - (sigma_next / sigma) ** 2)
    return constant_table(sigma, sigma_next, "noise", [sigma], [[0.0]], [1.0], noise)


ADAMS_BASHFORTH = ([1.0], [-1 / 2, 3 / 2], [5 / 12, -16 / 12, 23 / 12], [-9 / 24, 37 / 24, -59 / 24, 55 / 24])
"""Coefficients of the constant-step Adams-Bashforth methods of order 1 to 4, oldest output first."""


def ipndm(max_order: int) -> Solver:
    """iPNDM (Zhang and Chen 2023): the Adams-Bashforth coefficients of constant steps, on any grid; max_order 1 to 4."""
    check_order(max_order, 4)
    return _multistep("noise", max_order, lambda levels: ADAMS_BASHFORTH[len(levels) - 2])


def adams_bashforth(max_order: int) -> Solver:
    """Adams-Bashforth with variable steps: d is interpolated in sigma and integrated exactly; max_order 1 to 4."""
    check_order(max_order, 4)
    return _multistep("noise", max_order, lambda levels: _interpolated(levels, lambda sigma: sigma, log_spaced=False))


def deis(max_order: int, variable: Literal["time", "log_sigma"] = "time") -> Solver:
    """DEIS (Zhang and Chen 2023): d is interpolated in another variable, and integrated exactly over sigma; max_order 1 to 4.

    Args:
        max_order: outputs used, as soon as there are as many.
        variable: the time of the variance-preserving process that has sigma 0.002 to 80 ("tab"), or log sigma ("log-rho").
    """
    check_order(max_order, 4)
    variables = {"time": lambda sigma: variance_preserving_time(sigma, 0.002, 80.0), "log_sigma": torch.log}
    if variable not in variables:
        raise ValueError(f"variable: {variable!r}; valid: {', '.join(variables)}")
    return _multistep("noise", max_order, lambda levels: _interpolated(levels, variables[variable], log_spaced=True))


def dpm_solver_pp(max_order: int, form: Form = "data", *, corrected: bool = False, lower_order_final: bool = True) -> Solver:
    """Multistep DPM-Solver++ (Lu et al. 2022, DPM-Solver++, algorithm 2; `form` "noise": DPM-Solver's multistep variant).

    Args:
        max_order: 1 to 3.
        form: what is expanded in log sigma, the denoised state or the direction.
        corrected: order 3 as published takes for the second derivative half of what its formula expects, and converges with
            order 2. Corrected, it is of order 3.
        lower_order_final: lower the order over the last steps, down to 1 at the last one.
    """
    check_order(max_order, 3)
    _check_form(form)

    def coefficients(levels: Levels) -> list[float]:
        outputs = np.eye(len(levels) - 1)[::-1]  # m0, the newest, m1, m2 as rows of coefficients, oldest first
        if len(outputs) == 1:
            return [1.0]
        h, *before = _log_steps(levels)
        r0 = before[0] / h
        d10 = (outputs[0] - outputs[1]) / r0
        if len(outputs) == 2:
            return (outputs[0] + d10 / 2).tolist()
        r1 = before[1] / h
        d11 = (outputs[1] - outputs[2]) / r1
        first = d10 + (d10 - d11) * r0 / (r0 + r1)  # h m'
        second = (d10 - d11) / (r0 + r1) * (2 if corrected else 1)  # h^2 m''
        phi1, phi2, phi3 = _phi(h if form == "noise" else -h, 3)
        return (outputs[0] + (phi2 * first + phi3 * second) / phi1).tolist()

    return _multistep(form, max_order, coefficients, lower_order_final)


def unipc(
    max_order: int, form: Form = "data", variant: Literal["bh1", "bh2"] = "bh2", *, lower_order_final: bool = True
) -> Solver:
    """UniPC (Zhao et al. 2023, algorithm 1): a multistep predictor, corrected with the evaluation at what it predicts.

    That evaluation is also the next step's first, so a step makes one: step n corrects with D(x_predicted, sigma_{n+1}), and
    step n + 1 looks back on it as on any earlier output. The last step is the predictor's alone.

    Args:
        max_order: 1 to 3, of the predictor; the corrector's is one higher.
        form: what is expanded in log sigma, the denoised state or the direction.
        variant: the function B(h) of the paper: h, or e^h - 1.
        lower_order_final: lower the order over the last steps, down to 1 at the last one.
    """
    check_order(max_order, 3)
    _check_form(form)
    if variant not in ("bh1", "bh2"):
        raise ValueError(f"variant: {variant!r}; valid: bh1, bh2")

    def coefficients(levels: Levels, corrected: bool) -> list[float]:
        """Of the outputs at levels[:-1], oldest first; corrected, of the one at levels[-1] too."""
        order = len(levels) - 1
        if order == 1 and not corrected:
            return [1.0]
        h, *before = _log_steps(levels)
        places = np.array([*(-np.cumsum(before) / h), 1.0][: order - 1 + corrected])  # of the others than m0, in units of h
        outputs = np.eye(order + corrected)  # oldest first; m0 is outputs[order - 1]
        others = np.array([*outputs[: order - 1][::-1], *outputs[order:]])
        differences = (others - outputs[order - 1]) / places[:, None]
        z = h if form == "noise" else -h
        phi1, *phi = _phi(z, len(places) + 1)
        scale = phi1 if variant == "bh2" else z
        if len(places) == 1:
            rho = np.array([0.5])  # as the authors do: the equation's solution up to the order
        else:
            powers = places ** np.arange(len(places))[:, None]
            rho = np.linalg.solve(powers, [math.factorial(q) * value / scale for q, value in enumerate(phi, 1)])
        return (outputs[order - 1] + scale / phi1 * rho @ differences).tolist()

    @lru_cache(maxsize=CACHED)
    def build(levels: Levels, first: bool, last: bool) -> StepTable:
        predictor = coefficients(levels, corrected=False)
        width = len(predictor) + (not last)
        nodes = [levels[-2]] * first + [levels[-1]] * (not last)
        stage = [[0.0] * width] * first + [[*predictor, 0.0]] * (not last)
        update = predictor if last else coefficients(levels, corrected=True)
        return constant_table(levels[-2], levels[-1], form, nodes, stage, update)

    def table(step: int, sigmas: Tensor) -> StepTable:
        order = _order(step, len(sigmas), max_order, lower_order_final)
        return build(_levels(sigmas, step - order + 1, step + 1), step == 0, step == len(sigmas) - 2)

    return table


def _multistep(
    form: Form, max_order: int, coefficients: Callable[[Levels], list[float]], lower_order_final: bool = False
) -> Solver:
    """One evaluation per step, at its first node; `coefficients` of the outputs there and before, oldest first."""

    @lru_cache(maxsize=CACHED)
    def build(levels: Levels) -> StepTable:
        update = coefficients(levels)
        return constant_table(levels[-2], levels[-1], form, [levels[-2]], [[0.0] * len(update)], update)

    def table(step: int, sigmas: Tensor) -> StepTable:
        order = _order(step, len(sigmas), max_order, lower_order_final)
        return build(_levels(sigmas, step - order + 1, step + 1))

    return table


def _levels(sigmas: Tensor, first: int, last: int) -> Levels:
    """Noise levels of the nodes first to last."""
    if sigmas.requires_grad:
        raise ValueError("sigmas: with gradient; valid: a constant grid, since classical tables are made of plain numbers")
    return tuple(sigmas[first : last + 1].tolist())


def _order(step: int, num_steps: int, max_order: int, lower_order_final: bool) -> int:
    """As high as there are outputs for; lowered towards the end only once it has been at its highest."""
    if step + 1 < max_order or not lower_order_final:
        return min(max_order, step + 1)
    return min(max_order, num_steps - 1 - step)


def _interpolated(levels: Levels, variable: Callable[[Tensor], Tensor], log_spaced: bool) -> list[float]:
    """Coefficients that integrate over sigma exactly the polynomial in variable(sigma) through the outputs at levels[:-1].

    By Gauss-Legendre quadrature in sigma or, where the variable needs it, in log sigma.
    """
    known = variable(torch.tensor(levels[:-1], dtype=torch.float64))  # (order,)
    low, high = levels[-1], levels[-2]
    if log_spaced:
        low, high = _log(low), _log(high)
    places = (high + low) / 2 + (high - low) / 2 * POINTS
    sigma, weight = (places.exp(), WEIGHTS * places.exp()) if log_spaced else (places, WEIGHTS)
    at = variable(sigma)
    basis = [
        torch.stack(
            [(at - known[j]) / (known[k] - known[j]) for j in range(len(known)) if j != k] or [torch.ones_like(at)]
        ).prod(0)
        for k in range(len(known))
    ]
    return ((torch.stack(basis) * weight).sum(1) / weight.sum()).tolist()


def _log_steps(levels: Levels) -> list[float]:
    """Steps in -log sigma, the newest first."""
    logs = [_log(level) for level in levels]
    return [before - after for before, after in pairwise(logs)][::-1]


def _log(sigma: float) -> float:
    if sigma <= 0:
        raise ValueError(f"sigmas: {sigma}, and the solver takes its logarithm; valid: a positive noise level there")
    return math.log(sigma)


def _phi(z: float, count: int) -> list[float]:
    """phi_1 = e^z - 1, phi_2 = phi_1 / z - 1, phi_3 = phi_2 / z - 1 / 2, phi_4 = phi_3 / z - 1 / 6 and so on."""
    return list(accumulate(range(1, count), lambda phi, k: phi / z - 1 / math.factorial(k), initial=math.expm1(z)))


def check_order(max_order: int, highest: int) -> None:
    """Raise ValueError unless 1 <= max_order <= highest."""
    if max_order not in range(1, highest + 1):
        raise ValueError(f"max_order: {max_order}; valid: 1 to {highest}")


def _check_form(form: Form) -> None:
    if form not in get_args(Form):
        raise ValueError(f"form: {form!r}; valid: {', '.join(get_args(Form))}")


SOLVERS: dict[str, Solver] = {
    "euler": euler,
    "heun": heun,
    "midpoint": midpoint,
    "rk4": rk4,
    "dpm_solver_2": dpm_solver_2,
    "ddpm": ddpm,
    **{f"ipndm_{order}": ipndm(order) for order in (1, 2, 3, 4)},
    **{f"adams_bashforth_{order}": adams_bashforth(order) for order in (1, 2, 3, 4)},
    **{f"deis_{order}": deis(order) for order in (1, 2, 3, 4)},
    **{f"deis_log_{order}": deis(order, "log_sigma") for order in (2, 3)},
    **{f"dpm_solver_pp_{order}m": dpm_solver_pp(order) for order in (1, 2, 3)},
    "dpm_solver_pp_3m_corrected": dpm_solver_pp(3, corrected=True),
    **{f"dpm_solver_{order}m": dpm_solver_pp(order, "noise") for order in (1, 2, 3)},
    "dpm_solver_3m_corrected": dpm_solver_pp(3, "noise", corrected=True),
    **{f"unipc_{order}": unipc(order) for order in (1, 2, 3)},
    **{f"unipc_bh1_{order}": unipc(order, variant="bh1") for order in (1, 2, 3)},
    **{f"unipc_noise_{order}": unipc(order, "noise") for order in (1, 2, 3)},
}
"""Every classical solver by name."""
