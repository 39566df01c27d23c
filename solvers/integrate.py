"""The one loop that integrates any table."""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from solvers.denoiser import Denoiser, with_feature
from solvers.table import Numbers, Solver, StepTable, is_used

Noise = Callable[[int], Tensor]
"""The unit noise of a step of the grid, of the shape of x; the same whenever it is asked for."""

Outputs = dict[int, Tensor]
"""Outputs by the column of the table that they stand for."""


def integrate(denoise: Denoiser, solver: Solver, x: Tensor, sigmas: Tensor, noise: Noise | None = None) -> Tensor:
    """Solve dx/dsigma = (x - D(x, sigma)) / sigma from sigmas[0] to sigmas[-1].

    Args:
        denoise: the frozen model.
        solver: gives each step's table.
        x: state at sigmas[0], (B, ...) floating-point; sigmas[0] times unit noise.
        sigmas: strictly decreasing positive noise levels, (num_steps,) on the CPU. The last may be 0 for solvers that neither
            evaluate the network nor take a logarithm there.
        noise: the noise of ancestral steps.

    Returns:
        The state at sigmas[-1], (B, ...).

    Raises:
        ValueError: an argument, a table or what the denoiser returns is not as it has to be.
        FloatingPointError: the denoiser returned a number that is not finite.
    """
    return deque(trajectory(denoise, solver, x, sigmas, noise), maxlen=1).pop()


def trajectory(denoise: Denoiser, solver: Solver, x: Tensor, sigmas: Tensor, noise: Noise | None = None) -> Iterator[Tensor]:
    """Yield the state at each of the num_steps nodes, sigmas[0] first; arguments and errors as in `integrate`."""
    check_grid(sigmas)
    check_state(x)
    outputs: Sequence[Tensor] = ()
    yield x
    for step in range(len(sigmas) - 1):
        table = solver(step, sigmas)
        try:
            x, outputs = advance(denoise, table, x, outputs, fresh_noise(table, step, noise, x))
        except FloatingPointError as error:
            raise FloatingPointError(f"step {step} of {len(sigmas) - 1}: {error}") from error
        yield x


def advance(
    denoise: Denoiser, table: StepTable, x: Tensor, earlier: Sequence[Tensor], fresh: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """One step of the loop.

    Args:
        denoise: the frozen model.
        table: the step's numbers.
        x: state at table.sigma, (B, ...).
        earlier: the columns of the step before (what this returned then), oldest first; the table looks back on the last H.
        fresh: unit noise of an ancestral step, of the shape of x.

    Returns:
        The state at table.sigma_next, and this step's columns, for the step after it.
    """
    check_history(table, len(earlier))
    if table.batch not in (None, len(x)):
        raise ValueError(f"table: of {table.batch} images; valid: one table for all, or one for each of the {len(x)} of x")
    outputs = dict(enumerate(earlier[len(earlier) - table.history :]))
    if table.adapt is not None:
        table = table.adapt(_first_feature(denoise, table, x, outputs))
    elif table.analytic_first:
        put_analytic(table, x, outputs)
    for level in table.levels:
        if wanted := [i for i in level if table.history + i not in outputs]:
            evaluate(denoise, [(table, i, x, outputs) for i in wanted])
    return next_state(table, x, outputs, fresh), [outputs[column] for column in sorted(outputs)]


def evaluate(denoise: Denoiser, wanted: Sequence[tuple[StepTable, int, Tensor, Outputs]]) -> Sequence[Tensor]:
    """Make several evaluations (table, i, x (B, ...), outputs) as one batch; put their outputs in place, return each's D."""
    states, shown = [], []
    for table, i, x, outputs in wanted:
        states.append(evaluation_state(table, i, x, outputs))
        shown.append(_level(table.shown[i], x))
    batch, sigma = (states[0], shown[0]) if len(wanted) == 1 else (torch.cat(states), torch.cat(shown))
    denoised = denoise(batch, sigma)
    check_denoised(denoised, batch, sigma)
    each = denoised.split(len(states[0]))
    for (table, i, _, outputs), y, d in zip(wanted, states, each, strict=True):
        outputs[table.history + i] = output_of(table, i, y, d)
    return each


def evaluation_state(table: StepTable, i: int, x: Tensor, outputs: Outputs) -> Tensor:
    """The state (B, ...) that evaluation i is of."""
    return _state(table, table.rows[i], table.node_levels[i], x, outputs)


def next_state(table: StepTable, x: Tensor, outputs: Outputs, fresh: Tensor | None = None) -> Tensor:
    """The state at table.sigma_next, from all of the step's outputs and an ancestral step's unit noise."""
    if table.noise and fresh is None:
        raise ValueError(f"fresh: None, and the step adds noise {table.noise}; valid: unit noise of the shape of x")
    if fresh is None:
        return _state(table, table.update_row, table.ends[1], x, outputs)
    down = math.sqrt(float(table.sigma_next) ** 2 - table.noise**2)
    return torch.add(_state(table, table.update_row, down, x, outputs), fresh, alpha=table.noise)


def check_history(table: StepTable, available: int) -> None:
    """Raise ValueError unless there are as many earlier outputs as a table looks back on."""
    if table.history > available:
        raise ValueError(f"table: looks back on {table.history} outputs; valid: at most the {available} that there are")


def put_analytic(table: StepTable, x: Tensor, outputs: Outputs) -> None:
    """Put evaluation 0 in place where it is d = x / sqrt(1 + sigma^2) (AFS)."""
    sigma = table.ends[0]
    direction = x / (1 + sigma**2) ** 0.5
    outputs[table.history] = direction if table.form == "noise" else x - sigma * direction


def fresh_noise(table: StepTable, step: int, noise: Noise | None, x: Tensor) -> Tensor | None:
    """The unit noise of an ancestral step, from the caller; None where the step adds none."""
    if not table.noise:
        return None
    if noise is None:
        raise ValueError(f"noise: None, and step {step} is ancestral; valid: a function that gives a step's unit noise")
    fresh = noise(step)
    if fresh.shape != x.shape:
        raise ValueError(f"noise: shape {tuple(fresh.shape)} at step {step}; valid: {tuple(x.shape)}, as x has")
    return fresh.to(x)


def check_grid(sigmas: Tensor) -> None:
    """Raise ValueError unless sigmas is a strictly decreasing grid of at least two nodes, positive but for a last 0."""
    if not isinstance(sigmas, Tensor) or not sigmas.is_floating_point() or sigmas.device.type != "cpu":
        found = f"{sigmas.dtype} on {sigmas.device}" if isinstance(sigmas, Tensor) else type(sigmas).__name__
        raise ValueError(f"sigmas: {found}; valid: a floating-point tensor on the CPU")
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"sigmas: shape {tuple(sigmas.shape)}; valid: (num_steps,) with num_steps >= 2 (it counts nodes)")
    levels = sigmas.tolist()
    for i, (level, following) in enumerate(pairwise(levels)):
        if not (math.inf > level > following >= 0):
            raise ValueError(
                f"sigmas: {level} at node {i}, then {following}; valid: positive and strictly decreasing (the last may be 0)"
            )


def check_state(x: Tensor) -> None:
    """Raise ValueError unless x is a batch of finite states in single or double precision."""
    if not isinstance(x, Tensor):
        raise ValueError(f"x: {type(x).__name__}; valid: a tensor")
    if x.dtype not in (torch.float32, torch.float64) or x.ndim < 2 or len(x) == 0:
        valid = "float32 or float64 (only the backend computes in half precision), (B, ...) with B >= 1"
        raise ValueError(f"x: {x.dtype}, shape {tuple(x.shape)}; valid: {valid}")
    if not math.isfinite(x.detach().sum().item()):
        raise ValueError("x: numbers that are not finite; valid: sigmas[0] times unit noise")


def check_denoised(denoised: Tensor, batch: Tensor, sigma: Tensor) -> None:
    """Raise unless the denoiser returned finite numbers of its input's shape, dtype and device."""
    if not isinstance(denoised, Tensor):
        raise ValueError(f"denoise: returned {type(denoised).__name__}; valid: a tensor of shape {tuple(batch.shape)}")
    if denoised.shape != batch.shape or denoised.dtype != batch.dtype or denoised.device != batch.device:
        found, valid = (f"{tuple(t.shape)}, {t.dtype}, on {t.device}" for t in (denoised, batch))
        raise ValueError(f"denoise: returned {found}; valid: {valid}, as the state it was given")
    if not math.isfinite(denoised.detach().sum().item()):  # one number off the device, since it costs least
        rows = (~denoised.detach().isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        raise FloatingPointError(
            f"denoise: returned numbers that are not finite in rows {rows[:8]} of {len(batch)} at sigma "
            f"{[sigma[row].item() for row in rows[:8]]}; valid: finite numbers"
        )


def _first_feature(denoise: Denoiser, table: StepTable, x: Tensor, outputs: Outputs) -> Tensor | None:
    """Put evaluation 0 in place, and return the feature that the backbone gives with it."""
    if table.analytic_first:
        return put_analytic(table, x, outputs)
    sigma = _level(table.shown[0], x)
    denoised, feature = with_feature(denoise, x, sigma)
    check_denoised(denoised, x, sigma)
    outputs[table.history] = output_of(table, 0, x, denoised)
    return feature


def output_of(table: StepTable, i: int, y: Tensor, denoised: Tensor) -> Tensor:
    """What evaluation i leaves for later rows: the direction, or the denoised state itself."""
    if table.form == "data":
        return denoised
    return (y - denoised) / _per_image(table.node_levels[i], y)


def _state(table: StepTable, row: Numbers, sigma: float | Tensor, x: Tensor, outputs: Outputs) -> Tensor:
    """The state at noise level sigma that a row of coefficients makes of x and the outputs."""
    terms = [(c, outputs[j]) for j, c in enumerate(row) if j in outputs and (is_used(c) or _is_learned(c))]
    if table.form == "noise":
        y, share = x, sigma - table.ends[0]
    else:
        alpha = sigma / table.ends[0]
        y, share = x * _per_image(alpha, x), 1 - alpha
    for c, output in terms:
        coefficient = share * c
        if isinstance(coefficient, Tensor):
            y = y + _per_image(coefficient, x) * output
        else:
            y = torch.add(y, output, alpha=coefficient)
    return y


def _is_learned(coefficient: float | Tensor) -> bool:
    return isinstance(coefficient, Tensor) and coefficient.requires_grad


def _level(sigma: float | Tensor, x: Tensor) -> Tensor:
    """A noise level, one number or (B,), for each image of x (B, ...)."""
    if isinstance(sigma, Tensor):
        return sigma.to(x).expand(len(x))
    return x.new_full((len(x),), sigma)


def _per_image(value: float | Tensor, x: Tensor) -> float | Tensor:
    """A coefficient, one number or (B,), as it multiplies x (B, ...)."""
    if isinstance(value, Tensor):
        return value.to(x).reshape(-1, *[1] * (x.ndim - 1)) if value.ndim else value.to(x)
    return value
