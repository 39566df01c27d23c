"""D-ODE, against least squares step by step."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from backends import Gaussian
from solvers import (
    AFS,
    SOLVERS,
    fit_d_ode,
    integrate,
    polynomial,
    trajectory,
)  # fmt: skip


def test_d_ode_refuses_trajectories_of_another_grid_and_bears_what_never_changes(start: Tensor) -> None:
    sigmas = polynomial(6, 0.01, 20.0)
    states = torch.stack([sigma * start for sigma in sigmas], 1)
    for wrong in (states[:, :5], torch.cat([states, states], 1)):
        with pytest.raises(ValueError, match=r"states: shape .*; valid: \(B, 6, ...\), one for each node"):
            fit_d_ode(lambda x, sigma: 0 * x, wrong, sigmas, False)
    table = fit_d_ode(lambda x, sigma: 0 * x, states, sigmas, False)
    assert torch.allclose(table.update, torch.tensor([[0.0, 1.0]]).double().expand(5, 2))


@pytest.mark.parametrize("afs", [False, True])
def test_d_ode_is_the_least_squares_fit_step_by_step(afs: bool, mixture: Gaussian, start: Tensor) -> None:
    sigmas = polynomial(6, 0.01, 20.0)
    x = 20 * start
    fine = list(trajectory(mixture.denoiser([]), SOLVERS["heun"], x, polynomial(41, 0.01, 20.0)))
    teacher = torch.stack(fine[::8], 1)
    table = fit_d_ode(mixture.denoiser([]), teacher, sigmas, afs)
    before: Tensor | None = None
    for n, (t, t_next) in enumerate(pairwise(sigmas)):
        denoised = x - t * x / torch.sqrt(1 + t**2) if afs and n == 0 else mixture.denoiser([])(x, t.expand(len(x)))
        euler = denoised + t_next / t * (x - denoised)
        if before is not None:
            change = (1 - t_next / t) * (denoised - before)
            best = torch.linalg.lstsq(change.flatten()[:, None], (teacher[:, n + 1] - euler).flatten()[:, None]).solution.item()
            euler = euler + best * change
            assert table.update[n].tolist() == pytest.approx([-best, 1 + best], rel=1e-9)
        x, before = euler, denoised
    found = integrate(mixture.denoiser([]), AFS(table) if afs else table, 20 * start, sigmas)
    assert torch.allclose(found, x, rtol=1e-10)
    plain = integrate(mixture.denoiser([]), AFS(SOLVERS["euler"]) if afs else SOLVERS["euler"], 20 * start, sigmas)
    assert (found - teacher[:, -1]).norm() < (plain - teacher[:, -1]).norm()
