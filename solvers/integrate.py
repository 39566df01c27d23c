"""The one loop that integrates any table."""

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from solvers.denoiser import Denoiser
from solvers.table import Solver, StepTable, nonzero


def integrate(denoise: Denoiser, solver: Solver, x: Tensor, sigmas: Tensor) -> Tensor:
    """Solve dx/dsigma = (x - D(x, sigma)) / sigma from sigmas[0] to sigmas[-1].

    Args:
        denoise: the frozen model.
        solver: gives each step's table.
        x: state at sigmas[0], (B, ...); sigmas[0] times unit noise.
        sigmas: strictly decreasing positive noise levels, (num_steps,).

    Returns:
        The state at sigmas[-1], (B, ...).
    """
    return deque(trajectory(denoise, solver, x, sigmas), maxlen=1).pop()


def trajectory(denoise: Denoiser, solver: Solver, x: Tensor, sigmas: Tensor) -> Iterator[Tensor]:
    """Yield the state at each of the num_steps nodes, sigmas[0] first; arguments and errors as in `integrate`."""
    check_grid(sigmas)
    outputs: list[Tensor] = []
    yield x
    for step in range(len(sigmas) - 1):
        table = solver(step, sigmas)
        x, outputs = _advance(denoise, table, x, outputs)
        yield x


def check_grid(sigmas: Tensor) -> None:
    """Raise ValueError unless sigmas is a strictly decreasing, positive, one-dimensional grid of at least two nodes."""
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"sigmas: shape {tuple(sigmas.shape)}; valid: (num_steps,) with num_steps >= 2")
    if not bool((sigmas > 0).all()) or not bool((sigmas.diff() < 0).all()):
        raise ValueError(f"sigmas: {sigmas.tolist()}; valid: positive and strictly decreasing")


def _advance(denoise: Denoiser, table: StepTable, x: Tensor, earlier: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """One step: the next state, and the outputs that the step after it can look back on (this step's columns)."""
    first = table.history
    if first > len(earlier):
        raise ValueError(f"the step looks back on {first} outputs; there are {len(earlier)}")
    outputs = dict(enumerate(earlier[len(earlier) - first :]))  # column -> output
    if table.analytic_first:
        direction = x / torch.sqrt(1 + table.sigma**2)
        outputs[first] = direction if table.form == "noise" else x - table.sigma * direction
    for level in table.levels:
        nodes = [table.nodes[..., i] for i in level]
        states = [_state(table, table.stage[..., i, :], node, x, outputs) for i, node in zip(level, nodes, strict=True)]
        shown = [table.time_scale[..., i] * node for i, node in zip(level, nodes, strict=True)]
        sigmas = torch.cat([s.to(x).expand(len(x)) for s in shown])  # (M*B,)
        denoised = denoise(torch.cat(states), sigmas).chunk(len(level))
        for i, node, y, d in zip(level, nodes, states, denoised, strict=True):
            outputs[first + i] = d if table.form == "data" else (y - d) / _per_image(node, x)
    x = _state(table, table.update, table.sigma_next, x, outputs)
    return x, [outputs[column] for column in sorted(outputs)]


def _state(table: StepTable, row: Tensor, sigma: Tensor, x: Tensor, outputs: dict[int, Tensor]) -> Tensor:
    """The state at noise level sigma, () or (B,), that a row of coefficients (*S, H + E) makes of x and the outputs."""
    used = nonzero(row.unsqueeze(-2))[0].tolist()
    # a coefficient that is learned keeps its term even where it happens to be 0: its gradient is not
    total = sum(
        (_per_image(row[..., j], x) * out for j, out in outputs.items() if used[j] or row.requires_grad),
        start=torch.zeros((), dtype=x.dtype, device=x.device),
    )
    if table.form == "noise":
        return x + _per_image(sigma - table.sigma, x) * total
    alpha = _per_image(sigma / table.sigma, x)
    return alpha * x + (1 - alpha) * total


def _per_image(value: Tensor, x: Tensor) -> Tensor:
    """A coefficient, () or (B,), in the shape that multiplies x (B, ...)."""
    return value.to(x).reshape(-1, *[1] * (x.ndim - 1)) if value.ndim else value
