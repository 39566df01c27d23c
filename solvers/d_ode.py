"""D-ODE: a multistep solver whose one number per step is found in closed form (Kim et al. 2024)."""

from itertools import pairwise

import torch
from torch import Tensor

from solvers.denoiser import Denoiser
from solvers.integrate import advance, check_grid
from solvers.multistep import MultistepTable
from solvers.table import StepTable


@torch.no_grad()
def fit_d_ode(denoise: Denoiser, states: Tensor, sigmas: Tensor, afs: bool) -> MultistepTable:
    """Euler's step with D_n + lambda_n (D_n - D_{n-1}) in place of D_n, each lambda the least squares fit to a teacher.

    x' = Euler(x) + lambda (1 - sigma' / sigma) (D_n - D_{n-1}), step by step, so that later ones make up for earlier ones.

    Args:
        denoise: the frozen model.
        states: the teacher's at each node, (B, num_steps, ...).
        sigmas: the nodes, (num_steps,).
        afs: whether the first direction is the analytic one.

    Returns:
        The table, in data form, with one point per step and one step of history.
    """
    check_grid(sigmas)
    if states.ndim < 3 or states.shape[1] != len(sigmas):
        raise ValueError(f"states: shape {tuple(states.shape)}; valid: (B, {len(sigmas)}, ...), one for each node of sigmas")
    x, earlier, update = states[:, 0], [], torch.zeros(len(sigmas) - 1, 2, dtype=torch.float64)
    for step, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        width = min(step, 1) + 1
        euler = StepTable(
            sigma=sigma,
            sigma_next=sigma_next,
            form="data",
            nodes=sigma[None],
            stage=torch.zeros(1, width, dtype=torch.float64),
            update=torch.eye(width, dtype=torch.float64)[-1],
            time_scale=torch.ones(1, dtype=torch.float64),
            analytic_first=afs and step == 0,
        )
        x, earlier = advance(denoise, euler, x, earlier)
        update[step, 1] = 1
        if step > 0:
            change = (1 - sigma_next / sigma).item() * (earlier[1] - earlier[0])
            # a denoised state that does not change leaves nothing to fit
            factor = ((states[:, step + 1] - x) * change).sum() / change.square().sum().clamp_min(1e-300)
            update[step] += torch.stack([-factor, factor]).cpu()
            x = x + factor * change
    ones = torch.ones(len(update), 1, dtype=torch.float64)
    return MultistepTable("data", sigmas[:-1, None].clone(), torch.zeros(len(update), 1, 2, dtype=torch.float64), update, ones)
