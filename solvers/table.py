"""One step of any solver as a table of numbers."""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepTable:
    """The numbers of one step from sigma to sigma_next, with E evaluations of the denoiser.

    A column j of the table is an output: first those of earlier evaluations that the step looks back on (H of them, oldest
    first), then this step's own E. Evaluation i happens at the noise level ``nodes[i]``, at the state y made from the row
    ``stage[i]``; the row ``update`` makes the next state, at sigma_next. With c a row, and y at the noise level sigma_y:

        noise form   y = x + (sigma_y - sigma) sum_j c_j d_j                  d_j = (y_j - D_j) / nodes[j]
        data form    y = alpha x + (1 - alpha) sum_j c_j D_j                  alpha = sigma_y / sigma

    *S is empty, or (B,) where each image of the batch has a table of its own.

    Attributes:
        sigma, sigma_next: noise levels at both ends, ().
        form: what an output is, and how a row makes a state.
        nodes: noise level of each evaluation, (*S, E), in units of sigma.
        stage: coefficients of each evaluation's state, (*S, E, H + E). Row i may use columns before H + i only.
        update: coefficients of the next state, (*S, H + E).
        time_scale: factor on the noise level that the network is shown, (*S, E).
        analytic_first: evaluation 0, at x itself, is not the network's but d = x / sqrt(1 + sigma^2).
    """

    sigma: Tensor
    sigma_next: Tensor
    form: Literal["noise", "data"]
    nodes: Tensor
    stage: Tensor
    update: Tensor
    time_scale: Tensor
    analytic_first: bool = False

    @property
    def evaluations(self) -> int:
        """E, evaluations of the step, the analytic one included."""
        return self.nodes.shape[-1]

    @property
    def history(self) -> int:
        """H, outputs of earlier evaluations that the step looks back on."""
        return self.update.shape[-1] - self.evaluations

    @property
    def levels(self) -> list[list[int]]:
        """The network's evaluations, grouped: those of a level need only earlier levels' outputs, so they make one batch."""
        needs = nonzero(self.stage)[:, self.history :].tolist()  # (E, E)
        depth: dict[int, int] = {}
        for i in range(int(self.analytic_first), self.evaluations):
            depth[i] = 1 + max((d for j, d in depth.items() if needs[i][j]), default=-1)
        return [[i for i, d in depth.items() if d == level] for level in sorted(set(depth.values()))]

    @property
    def consistent(self) -> bool:
        """Whether the update's coefficients sum to 1, so that a constant output is integrated exactly."""
        total = self.update.sum(-1)
        return bool(torch.allclose(total, torch.ones_like(total), rtol=0, atol=1e-9))


class Solver(Protocol):
    """Maps a step of a grid to its table. A classical solver gives constants, a learned one what it has learned.

    The whole grid is given, since a multistep table depends on the steps before and on how many are left.
    """

    def __call__(self, step: int, sigmas: Tensor) -> StepTable:
        """The table of the step sigmas[step] -> sigmas[step + 1]; sigmas: strictly decreasing, (num_steps,)."""
        ...


def nonzero(coefficients: Tensor) -> Tensor:
    """Which coefficients are not zero for some image: (*S, ...) -> bool (...), where the last dimensions are the table's."""
    used = coefficients.detach() != 0
    return used.flatten(0, -3).any(0) if used.ndim > 2 else used


def depth(solver: Solver, sigmas: Tensor) -> int:
    """Serial evaluations of the network that a solver makes on a grid (num_steps,), read off its tables."""
    return sum(len(solver(step, sigmas).levels) for step in range(len(sigmas) - 1))
