"""Classical solvers: constant tables."""

import torch
from torch import Tensor

from solvers.table import Solver, StepTable


def euler(step: int, sigmas: Tensor) -> StepTable:
    """First order; DDIM (Song et al. 2021) in these coordinates."""
    return _noise_form(sigmas, step, [sigmas[step]], [[0.0]], [1.0])


def heun(step: int, sigmas: Tensor) -> StepTable:
    """Second order, two evaluations (Karras et al. 2022, algorithm 1, with the corrector at the last step too)."""
    return _noise_form(sigmas, step, [sigmas[step], sigmas[step + 1]], [[0.0, 0.0], [1.0, 0.0]], [0.5, 0.5])


def dpm_solver_2(step: int, sigmas: Tensor) -> StepTable:
    """Second order, two evaluations, the second at the geometric mean (Lu et al. 2022, DPM-Solver, r = 1/2)."""
    middle = (sigmas[step] * sigmas[step + 1]).sqrt()
    return _noise_form(sigmas, step, [sigmas[step], middle], [[0.0, 0.0], [1.0, 0.0]], [0.0, 1.0])


ADAMS_BASHFORTH = ([1.0], [-1 / 2, 3 / 2], [5 / 12, -16 / 12, 23 / 12], [-9 / 24, 37 / 24, -59 / 24, 55 / 24])
"""Coefficients of the constant-step Adams-Bashforth methods of order 1 to 4, oldest output first."""


def ipndm(max_order: int) -> Solver:
    """iPNDM (Zhang and Chen 2023): the Adams-Bashforth coefficients of constant steps, on any grid; max_order 1 to 4."""
    if not 1 <= max_order <= len(ADAMS_BASHFORTH):
        raise ValueError(f"max_order: {max_order}; valid: 1 to {len(ADAMS_BASHFORTH)}")

    def table(step: int, sigmas: Tensor) -> StepTable:
        update = ADAMS_BASHFORTH[min(max_order, step + 1) - 1]
        return _noise_form(sigmas, step, [sigmas[step]], [[0.0] * len(update)], update)

    return table


def dpm_solver_pp_2m(step: int, sigmas: Tensor) -> StepTable:
    """DPM-Solver++(2M), data form (Lu et al. 2022, DPM-Solver++, algorithm 2); first order at the first and last step."""
    last = step == len(sigmas) - 2
    if step == 0 or last:
        update = torch.tensor([1.0], dtype=torch.float64)
    else:
        before, now, after = sigmas[step - 1 : step + 2].log()
        half = 0.5 * (now - after) / (before - now)  # h / (2 h_before), h = -log sigma after - (-log sigma now)
        update = torch.stack([-half, 1 + half])
    return StepTable(
        sigma=sigmas[step],
        sigma_next=sigmas[step + 1],
        form="data",
        nodes=sigmas[step : step + 1],
        stage=torch.zeros(1, len(update), dtype=torch.float64),
        update=update,
        time_scale=torch.ones(1, dtype=torch.float64),
    )


SOLVERS: dict[str, Solver] = {
    "euler": euler,
    "heun": heun,
    "dpm_solver_2": dpm_solver_2,
    "dpm_solver_pp_2m": dpm_solver_pp_2m,
    "ipndm_2": ipndm(2),
    "ipndm_3": ipndm(3),
    "ipndm_4": ipndm(4),
}


def _noise_form(sigmas: Tensor, step: int, nodes: list[Tensor], stage: list[list[float]], update: list[float]) -> StepTable:
    return StepTable(
        sigma=sigmas[step],
        sigma_next=sigmas[step + 1],
        form="noise",
        nodes=torch.stack(nodes),
        stage=torch.tensor(stage, dtype=torch.float64),
        update=torch.tensor(update, dtype=torch.float64),
        time_scale=torch.ones(len(nodes), dtype=torch.float64),
    )
