"""One step of any solver as a table of numbers."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

Form = Literal["noise", "data"]
Numbers = list[float] | list[Tensor]
"""Coefficients as the loop uses them: plain numbers where they can be, else (B,) or () tensors with their gradients."""


@dataclass(frozen=True)
class StepTable:
    """The numbers of one step from sigma to sigma_next, with E evaluations of the denoiser.

    A column j of the table is an output: first those of earlier evaluations that the step looks back on (H of them, oldest
    first), then this step's own E. Evaluation i happens at the noise level ``nodes[i]``, at the state y made from the row
    ``stage[i]``; the row ``update`` makes the next state, at sigma_next. With c a row, and y at the noise level sigma_y:

        noise form   y = x + (sigma_y - sigma) sum_j c_j d_j                  d_j = (y_j - D_j) / nodes[j]
        data form    y = alpha x + (1 - alpha) sum_j c_j D_j                  alpha = sigma_y / sigma

    An ancestral step adds ``noise`` times unit noise; its update leads to sqrt(sigma_next^2 - noise^2) instead.

    *S is empty, or (B,) where each image of the batch has a table of its own. Tables live on the CPU whatever device x is on.

    Attributes:
        sigma, sigma_next: noise levels at both ends, ().
        form: what an output is, and how a row makes a state.
        nodes: noise level of each evaluation, (*S, E), in units of sigma.
        stage: coefficients of each evaluation's state, (*S, E, H + E). Row i may use columns before H + i only.
        update: coefficients of the next state, (*S, H + E).
        time_scale: factor on the noise level that the network is shown, (*S, E).
        analytic_first: evaluation 0, at x itself, is not the network's but d = x / sqrt(1 + sigma^2).
        noise: standard deviation of the noise that the step adds, in units of sigma.
        adapt: where the rest of the step depends on evaluation 0: makes the whole table from the feature that the backbone
            gave with it, (B, F), or from None where evaluation 0 is analytic. Evaluation 0 itself stays.

    Raises:
        ValueError: the shapes do not fit together; a row uses an output that is not there yet; a node, where the network is
            evaluated and d = (y - D) / sigma is taken, is not positive; the noise is more than sigma_next holds.
    """

    sigma: Tensor
    sigma_next: Tensor
    form: Form
    nodes: Tensor
    stage: Tensor
    update: Tensor
    time_scale: Tensor
    analytic_first: bool = False
    noise: float = 0.0
    adapt: Callable[[Tensor | None], "StepTable"] | None = None

    def __post_init__(self) -> None:
        evaluations, width = self.nodes.shape[-1], self.update.shape[-1]
        if self.stage.shape[-2:] != (evaluations, width) or self.time_scale.shape[-1] != evaluations or width < evaluations:
            shapes = ", ".join(
                f"{name} {tuple(getattr(self, name).shape)}" for name in ("nodes", "stage", "update", "time_scale")
            )
            raise ValueError(f"table: {shapes}; valid: nodes (E), stage (E, H + E), update (H + E), time_scale (E)")
        self._check_batch_and_order()
        if self.noise and not 0 < self.noise < self.sigma_next:
            raise ValueError(f"noise: {self.noise}; valid: at least 0, less than sigma_next, {self.sigma_next.item()}")

    def _check_batch_and_order(self) -> None:
        """Raise ValueError unless batches agree, rows use earlier outputs alone, and the network is shown positive levels."""
        if self.form not in get_args(Form):
            raise ValueError(f"form: {self.form!r}; valid: {', '.join(get_args(Form))}")
        batches = {tuple(part.shape[:-own]) for part, own in self._parts() if part.ndim > own}
        if len(batches) > 1 or any(len(batch) > 1 for batch in batches):
            raise ValueError(f"table: batches {sorted(batches)}; valid: none, or (B,) for all parts that have one")
        if not self.evaluations:
            return
        lowest = self.nodes.detach().min().item()
        if not lowest > 0:
            here = f"in the step from sigma {self.sigma.item()} to {self.sigma_next.item()}"
            raise ValueError(f"sigmas: the network is evaluated at {lowest} {here}; valid: positive noise levels")
        if bool(self.stage.detach()[..., self.history :].triu().any()):
            raise ValueError(f"stage: {self.stage.tolist()}; valid: rows without outputs of their own evaluation or later ones")

    @property
    def batch(self) -> int | None:
        """B where each image has a table of its own, else None."""
        return next((len(part) for part, own in self._parts() if part.ndim > own), None)

    def _parts(self) -> list[tuple[Tensor, int]]:
        """The tensors of coefficients, with their dimensions without a batch."""
        return [(self.nodes, 1), (self.stage, 2), (self.update, 1), (self.time_scale, 1)]

    @property
    def evaluations(self) -> int:
        """E, evaluations of the step, the analytic one included."""
        return self.nodes.shape[-1]

    @property
    def history(self) -> int:
        """H, outputs of earlier evaluations that the step looks back on."""
        return self.update.shape[-1] - self.evaluations

    @cached_property
    def levels(self) -> list[list[int]]:
        """The network's evaluations, grouped: those of a level need only earlier levels' outputs, so they make one batch."""
        depth: dict[int, int] = {}
        for i in range(int(self.analytic_first), self.evaluations):
            row = self.rows[i][self.history :]
            depth[i] = 1 + max((d for j, d in depth.items() if is_used(row[j])), default=-1)
        return [[i for i, d in depth.items() if d == level] for level in sorted(set(depth.values()))]

    @cached_property
    def rows(self) -> list[Numbers]:
        """The rows of `stage`, as the loop uses them."""
        return [numbers(self.stage[..., i, :]) for i in range(self.evaluations)]

    @cached_property
    def update_row(self) -> Numbers:
        """`update`, as the loop uses it."""
        return numbers(self.update)

    @cached_property
    def ends(self) -> tuple[float | Tensor, float | Tensor]:
        """`sigma` and `sigma_next`, as the loop uses them."""
        return plain(self.sigma), plain(self.sigma_next)

    @cached_property
    def shown(self) -> Numbers:
        """The noise level that the network is shown at each evaluation."""
        return numbers(self.nodes * self.time_scale)

    @cached_property
    def node_levels(self) -> Numbers:
        """`nodes`, as the loop uses them."""
        return numbers(self.nodes)

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


def constant_table(
    sigma: float,
    sigma_next: float,
    form: Form,
    nodes: list[float],
    stage: list[list[float]],
    update: list[float],
    noise: float = 0.0,
) -> StepTable:
    """The table of a classical solver, from plain numbers; arguments as the attributes of `StepTable`.

    Raises:
        ValueError: as `StepTable`; the update's coefficients do not sum to 1; a stage's neither do nor are all 0 (the state x).
    """
    here = f"in the step from sigma {sigma} to {sigma_next}"
    if abs(sum(update) - 1) > 1e-9:
        raise ValueError(f"update: {list(update)} {here}, sum {sum(update)}; valid: coefficients that sum to 1")
    for row in stage:
        if any(row) and abs(sum(row) - 1) > 1e-9:
            raise ValueError(f"stage: {list(row)} {here}, sum {sum(row)}; valid: coefficients that sum to 1, or all 0")
    table = StepTable(
        sigma=torch.tensor(sigma, dtype=torch.float64),
        sigma_next=torch.tensor(sigma_next, dtype=torch.float64),
        form=form,
        nodes=torch.tensor(nodes, dtype=torch.float64),
        stage=torch.tensor(stage, dtype=torch.float64).reshape(len(nodes), len(update)),
        update=torch.tensor(update, dtype=torch.float64),
        time_scale=torch.ones(len(nodes), dtype=torch.float64),
        noise=noise,
    )
    # what the loop would read off the tensors
    vars(table).update(rows=stage, update_row=update, ends=(sigma, sigma_next), node_levels=nodes, shown=nodes)
    return table


def numbers(coefficients: Tensor) -> Numbers:
    """Coefficients (*S, n) as n plain numbers; as n tensors where they differ between images or have gradients."""
    if coefficients.ndim == 1 and not coefficients.requires_grad:
        return coefficients.tolist()
    return list(coefficients.unbind(-1))


def plain(value: Tensor) -> float | Tensor:
    """A number () without its tensor, unless it has a gradient or one value for each image (B,)."""
    return value if value.requires_grad or value.ndim else value.item()


def is_used(coefficient: float | Tensor) -> bool:
    """Whether a coefficient is not zero, for any image."""
    if isinstance(coefficient, Tensor):
        return bool((coefficient.detach() != 0).any())
    return coefficient != 0


def depth(solver: Solver, sigmas: Tensor) -> int:
    """Serial evaluations of the network that a solver makes on a grid (num_steps,), read off its tables."""
    return sum(len(solver(step, sigmas).levels) for step in range(len(sigmas) - 1))
