"""Parallel in time: ParaDiGMS and ParaSolver, with any solver."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from solvers.denoiser import Counter, Denoiser
from solvers.integrate import (
    Noise,
    Outputs,
    check_grid,
    check_history,
    check_state,
    evaluate,
    fresh_noise,
    next_state,
    put_analytic,
)
from solvers.table import Solver, StepTable

Init = Literal["copy", "x0"]


@dataclass(frozen=True)
class ParallelStatistics:
    """What a parallel integration took.

    Attributes:
        iterations: sweeps over the window.
        serial_evaluations: calls of the denoiser, one after the other (latency), the true steps' included.
        total_evaluations: rows per image of all calls together (compute).
        strides: intervals that each sweep moved the window on by.
    """

    iterations: int
    serial_evaluations: int
    total_evaluations: float
    strides: list[int]


@torch.no_grad()
def parallel_integrate(
    denoise: Denoiser,
    solver: Solver,
    x: Tensor,
    sigmas: Tensor,
    window: int,
    tolerance: float,
    init: Init = "x0",
    true_steps: int | None = None,
    intervals: int | None = None,
    noise: Noise | None = None,
) -> tuple[Tensor, ParallelStatistics]:
    """Solve what `integrate` solves, many intervals side by side, in sweeps that end where `integrate` does.

    With Phi_n the solver over interval n, a sweep finds Phi_n(X_n) for all n of a window in one go, and moves the nodes to

        X'_i = X_i,   X'_{n+1} = Phi_n(X_n) + (s_n / s_{n+1}) (X'_n - X_n)        s = 1 / sqrt(1 + sigma^2)

    (Shih et al. 2023, ParaDiGMS, algorithm 1: a running sum in the variance-preserving scale s x; Lu et al. 2025, ParaSolver:
    Newton's method with each step's derivative set to the identity there.) Node i + 1 is then exact; the window moves on to the
    first node that moved by more than the tolerance, so that there are never more sweeps than intervals.

    Args:
        denoise, solver, x, sigmas, noise: as in `integrate`; the noise of a step is asked for once.
        window: intervals side by side.
        tolerance: root mean square move of an image's node, in units of an ancestral step's noise there, that counts as none.
            0 gives `integrate`'s result.
        init: what a node starts from. "copy": the node before it, in the scale s x (ParaDiGMS); "x0": the straight way from
            it to the newest denoised state (ParaSolver).
        true_steps: first intervals that are integrated one by one; at least 1, the default, for "x0", and 0 for "copy".
        intervals: how many the grid's steps are dealt to, as evenly as can be; the steps of one follow one another. None: each
            its own, which has the least serial evaluations.

    Returns:
        The state at sigmas[-1], (B, ...), and what it took.

    Raises:
        ValueError, FloatingPointError: as `integrate`, and where an argument is out of its range.
    """
    check_grid(sigmas)
    check_state(x)
    steps = len(sigmas) - 1
    count = steps if intervals is None else intervals
    if not 1 <= count <= steps:
        raise ValueError(f"intervals: {count}; valid: 1 to {steps}, the steps of the grid")
    first = _checked_first(window, tolerance, init, true_steps, count)
    counter = Counter(denoise)
    sweeps = _Sweeps(counter, solver, sigmas, [round(n * steps / count) for n in range(count + 1)], init, noise)
    nodes = {0: x}
    for n in range(first):
        nodes[n + 1] = sweeps.guess(n, nodes[n])
        nodes[n + 1] = sweeps.solve({n: nodes[n]})[n]
    start, end, strides = first, first, list[int]()
    while start < count:
        for n in range(end, end := min(start + window, count)):
            nodes[n + 1] = sweeps.guess(n, nodes[n])
        found = sweeps.solve({n: nodes[n] for n in range(start, end)})
        moves, candidate = [], nodes[start]
        for n in range(start, end):
            candidate = found[n] if n == start else found[n] + sweeps.ratio(n) * (candidate - nodes[n])
            moves.append((candidate - nodes[n + 1]).square().flatten(1).mean(1).max() / sweeps.variances[n])
            found[n] = candidate
        nodes |= {n + 1: found[n] for n in range(start, end)}
        exceeded = (torch.stack(moves) > tolerance**2).tolist()
        stride = exceeded.index(True) + 1 if True in exceeded else len(exceeded)
        nodes = {n: node for n, node in nodes.items() if n >= start + stride}
        start += stride
        sweeps.forget(start)
        strides.append(stride)
    return nodes[count], ParallelStatistics(len(strides), counter.depth, counter.rows / len(x), strides)


class _Sweeps:
    """Phi over the intervals of a window, and what their steps leave for one another.

    Outputs are numbered through all steps of the grid: a step looks back on the last ones before its own. Those of a step
    before it in the window are of this sweep where they are there already, else of the last.
    """

    def __init__(
        self, denoise: Denoiser, solver: Solver, sigmas: Tensor, bounds: list[int], init: Init, noise: Noise | None
    ) -> None:
        self.denoise = denoise
        self.solver = solver
        self.sigmas = sigmas
        self.bounds = bounds  # the step that each interval starts with
        self.init = init
        self.noise = noise
        levels = sigmas[bounds].tolist()
        # of an ancestral step over each interval; 0 where it ends at sigma 0, and as small as the others there
        variances = [(after * math.sqrt(1 - (after / before) ** 2)) ** 2 for before, after in pairwise(levels)]
        least = min((variance for variance in variances if variance > 0), default=1.0)
        self.variances = [max(variance, least) for variance in variances]
        self.tables: dict[int, StepTable] = {}
        self.first: dict[int, int] = {0: 0}  # number of a step's first own output
        self.outputs: dict[int, Tensor] = {}
        self.fresh: dict[int, Tensor | None] = {}
        self.denoised: Tensor | None = None  # the newest, of the last row of a call

    def ratio(self, n: int) -> float:
        """s_n / s_{n+1}, which the start of interval n has in its end."""
        before, after = self.sigmas[[self.bounds[n], self.bounds[n + 1]]].tolist()
        return math.sqrt((1 + after**2) / (1 + before**2))

    def guess(self, n: int, x: Tensor) -> Tensor:
        """Take interval n into the window: a first guess of its end from its start, (B, ...), and of its steps' outputs."""
        start = x
        for step in self._steps(n):
            table = self.tables[step] = self.solver(step, self.sigmas)
            if table.adapt is not None:
                raise ValueError(f"solver: step {step} adapts to the backbone's features; valid: a solver whose tables do not")
            before = self.tables.get(step - 1)
            check_history(table, 0 if before is None else before.history + before.evaluations)
            self.first[step + 1] = self.first[step] + table.evaluations
            self.fresh[step] = fresh_noise(table, step, self.noise, x)
            denoised = x if self.denoised is None or self.init == "copy" else self.denoised
            sigma, sigma_next = float(table.sigma), float(table.sigma_next)
            output = denoised if table.form == "data" else (x - denoised) / sigma
            self.outputs |= dict.fromkeys(range(self.first[step], self.first[step + 1]), output)
            x = torch.lerp(denoised, x, math.sqrt(sigma_next**2 - table.noise**2) / sigma)
            if (fresh := self.fresh[step]) is not None:
                x = torch.add(x, fresh, alpha=table.noise)
        return self.ratio(n) * start if self.init == "copy" else x

    def solve(self, nodes: dict[int, Tensor]) -> dict[int, Tensor]:
        """The states at the ends of intervals from those at their starts, (B, ...) each; they advance side by side."""
        states = dict(nodes)
        for turn in range(max(len(self._steps(n)) for n in nodes)):
            steps = {n: self._steps(n)[turn] for n in nodes if turn < len(self._steps(n))}
            for n, step in steps.items():
                if self.tables[step].analytic_first:
                    columns: Outputs = {}
                    put_analytic(self.tables[step], states[n], columns)
                    self._put(step, self.tables[step].history, columns)
            for level in range(max(len(self.tables[step].levels) for step in steps.values())):
                self._evaluate({n: step for n, step in steps.items() if level < len(self.tables[step].levels)}, level, states)
            for n, step in steps.items():
                states[n] = next_state(self.tables[step], states[n], self._columns(step), self.fresh[step])
        return states

    def forget(self, n: int) -> None:
        """Drop what no interval from n on needs: a step looks back on the columns of the one before it at most."""
        step = self.bounds[n]
        before = self.tables[step - 1]
        needed = self.first[step] - before.history - before.evaluations
        self.outputs = {number: output for number, output in self.outputs.items() if number >= needed}
        self.tables = {s: table for s, table in self.tables.items() if s >= step - 1}
        self.fresh = {s: fresh for s, fresh in self.fresh.items() if s >= step}

    def _steps(self, n: int) -> range:
        return range(self.bounds[n], self.bounds[n + 1])

    def _columns(self, step: int) -> Outputs:
        """The outputs by the columns of a step's table."""
        table, first = self.tables[step], self.first[step]
        return {column: self.outputs[first - table.history + column] for column in range(table.history + table.evaluations)}

    def _put(self, step: int, column: int, columns: Outputs) -> None:
        self.outputs[self.first[step] - self.tables[step].history + column] = columns[column]

    def _evaluate(self, steps: dict[int, int], level: int, states: dict[int, Tensor]) -> None:
        """One level of the given steps, by interval, as one batch."""
        columns = {step: self._columns(step) for step in steps.values()}
        wanted = [(n, step, i) for n, step in steps.items() for i in self.tables[step].levels[level]]
        denoised = evaluate(self.denoise, [(self.tables[step], i, states[n], columns[step]) for n, step, i in wanted])
        self.denoised = denoised[-1]
        for _, step, i in wanted:
            self._put(step, self.tables[step].history + i, columns[step])


def _checked_first(window: int, tolerance: float, init: Init, true_steps: int | None, count: int) -> int:
    """The number of true steps; raises ValueError where one of the arguments is out of its range."""
    if window < 1:
        raise ValueError(f"window: {window}; valid: 1 or more")
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance: {tolerance}; valid: 0 or more, finite")
    if init not in get_args(Init):
        raise ValueError(f"init: {init!r}; valid: {', '.join(get_args(Init))}")
    least = 1 if init == "x0" else 0
    if true_steps is not None and not least <= true_steps <= count:
        raise ValueError(f"true_steps: {true_steps}; valid: {least} to {count}, the intervals, for init {init!r}")
    return least if true_steps is None else true_steps
