"""Learned multistep solvers: S4S (one point per step) and the joint family, with K points per step as one batch."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from solvers.epd import check_scales, within
from solvers.integrate import check_grid
from solvers.table import Form, Solver, StepTable


@dataclass(frozen=True)
class MultistepTable:
    """The numbers of a multistep solver; a Solver. N = num_steps - 1 steps, K points in each but the first, H steps of history.

    A step makes one batch of K evaluations: of the main state x at sigma, and of K - 1 look-ahead states further on, which are
    made from the outputs of earlier steps alone. The next state weighs all outputs of the last H steps and of this one. Both
    are rows as in `StepTable`. The first step's only point is the main one, analytic under AFS: its direction then leads to the
    second's look-ahead points. (Looking ahead along it in the first step already, without AFS, was worse on the digits.)

    A row has W = (H + 1) K columns: the outputs of the last H steps, oldest first, then this step's K. The first steps, which
    have fewer, use the last ones of them.

    Attributes:
        form: noise or data, as in `StepTable`.
        nodes: noise levels of the points, the main one first, (*S, N, K); the main ones are the same for all images.
        stage: coefficients of the points' states; zeros for the main one, and in the last K columns, (*S, N, K, W).
        update: coefficients of the next states, (*S, N, W); *S as in `StepTable`.
        time_scale: factors on the noise levels shown to the network, (*S, N, K).
    """

    form: Form
    nodes: Tensor
    stage: Tensor
    update: Tensor
    time_scale: Tensor

    @property
    def num_steps(self) -> int:
        """Nodes of the grid: steps + 1."""
        return self.nodes.shape[-2] + 1

    @property
    def num_points(self) -> int:
        """K."""
        return self.nodes.shape[-1]

    @property
    def history(self) -> int:
        """H."""
        return self.update.shape[-1] // self.num_points - 1

    def __call__(self, step: int, sigmas: Tensor) -> StepTable:
        if len(sigmas) != self.num_steps:
            raise ValueError(f"sigmas: {len(sigmas)} nodes; valid: {self.num_steps}, as many as the table was made for")
        made_for, found = self.nodes[..., step, 0].flatten()[0].item(), sigmas[step].item()
        if abs(found - made_for) > 1e-6 * made_for:
            raise ValueError(f"sigmas: {found} at node {step}; valid: {made_for}, the grid that the table was made for")
        points = self.num_points if step else 1
        width = points + available(step, self.num_points, self.history)
        last = self.update.shape[-1] - (0 if step else self.num_points - 1)  # the first step's own column is its main point's
        columns = slice(last - width, last)
        return StepTable(
            sigma=sigmas[step],
            sigma_next=sigmas[step + 1],
            form=self.form,
            nodes=self.nodes[..., step, :points],
            stage=self.stage[..., step, :points, columns],
            update=self.update[..., step, columns],
            time_scale=self.time_scale[..., step, :points],
        )


def available(step: int, points: int, history: int) -> int:
    """Outputs of the last `history` steps before a step: `points` of each, but one of the very first."""
    return 0 if step == 0 else min(history * points, 1 + (step - 1) * points)


class Multistep(nn.Module):
    """A learnable MultistepTable with its grid, which start as a classical multistep solver's.

    Coefficients are residuals on the classical ones of the grid at the start; look-ahead points start evenly spread up to the
    next node, along the newest main output, with weight 0. The grid is uniform in cumsum(softmax(grid)) on the way from
    log sigma_0 to log sigma_N: both ends stay. (S4S, Frankel et al. 2025, with num_points 1; the grid is LD3's, Tong et al.
    2025.)

    Args:
        start: a classical solver with one evaluation per step.
        sigmas: the grid to start from, (num_steps,).
        num_points: K. 1 is S4S.
        history: H, at least what `start` looks back on.
        scale_time: the noise levels shown to the network may be scaled by 1 +- this (decoupled times); 0: not at all.
    """

    def __init__(self, start: Solver, sigmas: Tensor, num_points: int, history: int, scale_time: float) -> None:
        super().__init__()
        check_grid(sigmas)
        check_scales(scale_time=scale_time)
        if sigmas[-1] == 0:
            raise ValueError("sigmas: 0 at the end; valid: a positive noise level, since the grid is learned in log sigma")
        if num_points < 1 or not 1 <= history <= len(sigmas) - 1:
            found = f"{num_points}, {history}"
            raise ValueError(f"num_points, history: {found}; valid: 1 or more; 1 to {len(sigmas) - 1}, the steps of the grid")
        steps, old = len(sigmas) - 1, history * num_points
        tables = [start(step, sigmas) for step in range(steps)]
        self.form: Form = tables[0].form
        self.scale_time = scale_time
        self.ends = sigmas[[0, -1]].log()
        self.base = torch.zeros(steps, old + num_points, dtype=torch.float64)
        self.lead = torch.zeros(steps, num_points - 1, old, dtype=torch.float64)
        for step, table in enumerate(tables):
            if table.evaluations != 1 or table.history > history or table.noise:
                found = f"{table.evaluations} evaluations looking back on {table.history}"
                raise ValueError(f"start: {found} in a step; valid: 1, looking back on at most history = {history}")
            # a step's main output is its first; the very first step has no other
            main = [old - back * num_points if back < step else old - 1 - (step - 1) * num_points for back in range(step + 1)]
            for back, coefficient in enumerate(reversed(table.update.tolist())):
                self.base[step, main[back] if back else old] = coefficient
            if step:
                self.lead[step, :, main[1]] = 1
        even = torch.arange(1, num_points, dtype=torch.float64) / max(num_points - 1, 1)
        self.grid = nn.Parameter((-sigmas.log().diff()).log())
        self.position = nn.Parameter(even.repeat(steps, 1))
        self.stage = nn.Parameter(torch.zeros_like(self.lead))
        self.update = nn.Parameter(torch.zeros_like(self.base))
        self.time_scale = nn.Parameter(torch.zeros(steps, num_points, dtype=torch.float64))

    def sigmas(self) -> Tensor:
        """The learned grid, (num_steps,); differentiable."""
        shares = self.grid.softmax(0).cumsum(0)[:-1]
        inner = torch.lerp(self.ends[0], self.ends[1], shares)
        return torch.cat([self.ends[:1], inner, self.ends[1:]]).exp()

    def table(self) -> MultistepTable:
        """The table that the parameters stand for; differentiable."""
        sigmas = self.sigmas()
        sigma, sigma_next = sigmas[:-1, None], sigmas[1:, None]
        # nothing beyond the grid's ends, which the network may not know
        highest, lowest = self.ends.exp()
        ahead = (sigma ** (1 - self.position) * sigma_next**self.position).clamp(lowest, highest)
        nodes = torch.cat([sigma, ahead], 1)
        shown = (nodes * within(self.scale_time, self.time_scale)).clamp(lowest, highest)
        main = self.lead.new_zeros(len(self.lead), 1, self.lead.shape[-1])
        return MultistepTable(
            form=self.form,
            nodes=nodes,
            stage=nn.functional.pad(torch.cat([main, self.lead + self.stage], 1), (0, self.time_scale.shape[1])),
            update=self.base + self.update,
            time_scale=shown / nodes,
        )

    def __call__(self, step: int, sigmas: Tensor) -> StepTable:
        return self.table()(step, sigmas)
