"""The analytical first step."""

from dataclasses import dataclass, replace

from torch import Tensor

from solvers.table import Solver, StepTable


@dataclass(frozen=True)
class AFS:
    """Any solver, with its very first evaluation replaced by d = x / sqrt(1 + sigma^2), which needs no network call.

    Exact for Gaussian data of zero mean and unit variance, and close at large sigma for any data (Dockhorn et al. 2022,
    GENIE, section 4).
    """

    solver: Solver

    def __call__(self, step: int, sigmas: Tensor) -> StepTable:
        table = self.solver(step, sigmas)
        return replace(table, analytic_first=True) if step == 0 else table
