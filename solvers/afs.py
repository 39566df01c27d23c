"""The analytical first step."""

from dataclasses import dataclass, replace

from torch import Tensor

from solvers.table import Solver, StepTable


@dataclass(frozen=True)
class AFS:
    """Any solver, with its very first evaluation replaced by d = x / sqrt(1 + sigma^2), which needs no network call.

    The direction points away from the data's mean 0, which is all that counts at large sigma (Dockhorn et al. 2022, GENIE). For
    Gaussian data of unit variance the exact one is x sigma / (1 + sigma^2): this is larger by a factor 1 + 1 / (2 sigma^2).
    """

    solver: Solver

    def __call__(self, step: int, sigmas: Tensor) -> StepTable:
        table = self.solver(step, sigmas)
        return replace(table, analytic_first=True) if step == 0 else table
