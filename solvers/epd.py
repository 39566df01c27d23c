"""EPD-Solver and EPD-Plugin: K gradient evaluations per step, at learned points, as one batch (Zhu et al. 2025, ICCV)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from solvers.classical import ADAMS_BASHFORTH, check_order
from solvers.table import StepTable


@dataclass(frozen=True)
class EPDTable:
    """The numbers of EPD-Solver for N = num_steps - 1 intervals and K points; a Solver. For the interval sigma -> sigma':

        d = (x - D(x, sigma)) / sigma
        tau_k = sigma'^r_k sigma^(1 - r_k)          x_k = x + (tau_k - sigma) d
        d_k = (x_k - D(x_k, a_k tau_k)) / tau_k     x' = x + (sigma' - sigma) sum_k w_k o_k d_k

    EPD-Plugin (max_order above 1, on iPNDM) leads to the points by the Adams-Bashforth combination of d and the d of earlier
    steps, of order min(max_order, step + 1), in place of d. *S is empty, or (B,) where each image has a table of its own.

    Attributes:
        position: r in (0, 1), where a point lies on the geometric way from sigma to sigma', (*S, N, K).
        weight: w, summing to 1 over the points, (*S, N, K).
        direction_scale: o, (*S, N, K).
        time_scale: a, factor on the noise level shown to the network, (*S, N, K).
        max_order: 1 to 4; 1 is EPD-Solver.
    """

    position: Tensor
    weight: Tensor
    direction_scale: Tensor
    time_scale: Tensor
    max_order: int = 1

    def __post_init__(self) -> None:
        check_order(self.max_order, len(ADAMS_BASHFORTH))
        shapes = [tuple(value.shape) for value in (self.position, self.weight, self.direction_scale, self.time_scale)]
        if len(set(shapes)) > 1 or len(shapes[0]) not in (2, 3) or 0 in shapes[0]:
            raise ValueError(f"position, weight, direction_scale, time_scale: {shapes}; valid: one shape, (N, K) or (B, N, K)")

    @property
    def num_steps(self) -> int:
        """Nodes of the grid: intervals + 1."""
        return self.position.shape[-2] + 1

    @property
    def num_points(self) -> int:
        """K."""
        return self.position.shape[-1]

    def __call__(self, step: int, sigmas: Tensor) -> StepTable:
        if len(sigmas) != self.num_steps:
            raise ValueError(f"sigmas: {len(sigmas)} nodes; valid: {self.num_steps}, as many as the table was made for")
        sigma, sigma_next = sigmas[step], sigmas[step + 1]
        points = self.num_points
        r, w = self.position[..., step, :], self.weight[..., step, :]
        lead = ADAMS_BASHFORTH[min(self.max_order, step + 1) - 1]  # of d, one in each step's 1 + K columns
        stage = torch.zeros(1 + points, len(lead), 1 + points, dtype=sigmas.dtype)
        stage[1:, :, 0] = torch.tensor(lead, dtype=sigmas.dtype)
        update = _prepend(torch.zeros_like(sigma), w * self.direction_scale[..., step, :])
        return StepTable(
            sigma=sigma,
            sigma_next=sigma_next,
            form="noise",
            nodes=_prepend(sigma, sigma_next**r * sigma ** (1 - r)),
            stage=stage.flatten(1),
            update=torch.nn.functional.pad(update, ((len(lead) - 1) * (1 + points), 0)),
            time_scale=_prepend(torch.ones_like(sigma), self.time_scale[..., step, :]),
        )

    def sorted(self) -> "EPDTable":
        """The same solver with each interval's points in the order of their positions."""
        position, order = self.position.sort(-1)
        w, o, a = (value.gather(-1, order) for value in (self.weight, self.direction_scale, self.time_scale))
        return EPDTable(position, w, o, a, self.max_order)


class EPD(nn.Module):
    """A learnable EPDTable: r = sigmoid, w = softmax, o and a within 1 +- their range. Starts from evenly spread points.

    Args:
        num_steps: nodes of the grid.
        num_points: K.
        scale_dir: o lies in [1 - scale_dir, 1 + scale_dir].
        scale_time: a lies in [1 - scale_time, 1 + scale_time].
        max_order: as in EPDTable.
    """

    def __init__(self, num_steps: int, num_points: int, scale_dir: float, scale_time: float, max_order: int = 1) -> None:
        super().__init__()
        check_scales(scale_dir=scale_dir, scale_time=scale_time)
        if num_steps < 2 or num_points < 1:
            raise ValueError(f"num_steps, num_points: {num_steps}, {num_points}; valid: 2 nodes or more, 1 point or more")
        shape = (num_steps - 1, num_points)
        even = torch.arange(1, num_points + 1, dtype=torch.float64) / (num_points + 1)
        self.position = nn.Parameter(even.logit().repeat(num_steps - 1, 1))
        self.weight = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        self.direction_scale = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        self.time_scale = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        self.scale_dir = scale_dir
        self.scale_time = scale_time
        self.max_order = max_order

    def table(self) -> EPDTable:
        """The table that the parameters stand for; differentiable."""
        return EPDTable(
            position=self.position.sigmoid(),
            weight=self.weight.softmax(-1),
            direction_scale=within(self.scale_dir, self.direction_scale),
            time_scale=within(self.scale_time, self.time_scale),
            max_order=self.max_order,
        )

    def __call__(self, step: int, sigmas: Tensor) -> StepTable:
        return self.table()(step, sigmas)


def check_scales(**scales: float) -> None:
    """Raise ValueError unless the ranges of scales, by name, are in [0, 1)."""
    for name, value in scales.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name}: {value}; valid: at least 0, below 1")


def within(range_: float, value: Tensor) -> Tensor:
    """A factor in [1 - range_, 1 + range_] from any number, 1 from 0."""
    return 1 + range_ * (2 * (value / 2).sigmoid() - 1)


def _prepend(value: Tensor, values: Tensor) -> Tensor:
    """A number () before the last dimension's entries: (*S, K) -> (*S, 1 + K)."""
    return torch.cat([value.expand(*values.shape[:-1], 1), values], -1)
