"""Learned multistep tables, against their formula written naively, and what they have as special cases."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from backends import Gaussian
from solvers import (
    AFS,
    SOLVERS,
    Counter,
    Denoiser,
    Multistep,
    MultistepTable,
    Solver,
    integrate,
    parallel_integrate,
    polynomial,
)  # fmt: skip

from .conftest import SIGMAS, disturbed, epd_table, generator, one


@pytest.mark.parametrize(
    "start_name", ["ipndm_2", "ipndm_4", "adams_bashforth_3", "dpm_solver_pp_2m", "dpm_solver_pp_3m", "deis_3"]
)
@pytest.mark.parametrize("points", [1, 2, 3])
@pytest.mark.parametrize("afs", [False, True])
def test_a_multistep_student_starts_as_its_classical_solver(
    start_name: str, points: int, afs: bool, mixture: Gaussian, start: Tensor
) -> None:
    student = Multistep(SOLVERS[start_name], SIGMAS, points, history=3, scale_time=0.2)
    assert torch.allclose(student.sigmas(), SIGMAS, rtol=1e-12)
    solvers: list[Solver] = [AFS(s) if afs else s for s in (SOLVERS[start_name], student.table())]
    expected = integrate(mixture.denoiser([]), solvers[0], 80 * start, SIGMAS)
    counter = Counter(mixture.denoiser([]))
    found = integrate(counter, solvers[1], 80 * start, student.sigmas())
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-10)
    assert counter.depth == 6 - afs
    assert counter.rows == len(start) * (5 * points + (not afs))


def naive_multistep(denoise: Denoiser, table: MultistepTable, x: Tensor, sigmas: Tensor, afs: bool) -> Tensor:
    """As the docstring says it, for one image: every output ever made, and each row aligned with the newest."""
    outputs: list[Tensor] = []
    points = table.num_points
    for n, (sigma, sigma_next) in enumerate(pairwise(sigmas)):

        def state(row: Tensor, at: Tensor, past: list[Tensor], sigma: Tensor = sigma, x: Tensor = x) -> Tensor:
            terms = list(zip(reversed(row.tolist()), reversed(past), strict=False))
            total = sum((c * out for c, out in terms), start=torch.zeros_like(x))
            if table.form == "noise":
                return x + (at - sigma) * total
            return at / sigma * x + (1 - at / sigma) * total

        new = []
        for k in range(points if n else 1):
            y = state(table.stage[n, k, :-points], table.nodes[n, k], outputs) if k else x
            node = table.nodes[n, k]
            if n == 0 and afs:
                denoised = x - sigma * x / torch.sqrt(1 + sigma**2)
            else:
                denoised = denoise(y, table.time_scale[n, k] * node)
            new.append((y - denoised) / node if table.form == "noise" else denoised)
        row = table.update[n] if n else table.update[n, : table.update.shape[1] - points + 1]
        x = state(row, sigma_next, outputs + new)
        outputs += new
    return x


@pytest.mark.parametrize("form", ["ipndm_2", "dpm_solver_pp_2m"])
@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("sigma_max", [80.0, 1.0], ids=["ve", "flow"])
@pytest.mark.parametrize(("points", "history"), [(1, 1), (1, 3), (2, 2), (3, 1), (3, 3)])
def test_multistep_equals_the_naive_formula(
    points: int, history: int, sigma_max: float, afs: bool, form: str, mixture: Gaussian, start: Tensor
) -> None:
    student = Multistep(SOLVERS[form], polynomial(6, 0.003, sigma_max), points, history, scale_time=0.2)
    disturbed(student)
    table, sigmas = student.table(), student.sigmas().detach()
    x = sigma_max * start
    with torch.no_grad():
        found = integrate(mixture.denoiser([]), AFS(table) if afs else table, x, sigmas)
        expected = torch.stack([naive_multistep(one(mixture), table, image, sigmas, afs) for image in x])
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10)
        side_by_side, _ = parallel_integrate(mixture.denoiser([]), AFS(table) if afs else table, x, sigmas, 3, 0.0)
        assert torch.allclose(side_by_side, expected, rtol=1e-8, atol=1e-9)


def test_a_learned_grid_keeps_its_ends_and_falls() -> None:
    student = Multistep(SOLVERS["ipndm_2"], SIGMAS, 1, 1, 0.0)
    with torch.no_grad():
        student.grid.copy_(3 * torch.randn(6, generator=generator(1), dtype=torch.float64))
    sigmas = student.sigmas()
    assert torch.allclose(sigmas[[0, -1]], SIGMAS[[0, -1]], rtol=1e-12)
    assert bool((sigmas.diff() < 0).all())


def test_gradients_reach_every_number_that_a_multistep_student_uses(mixture: Gaussian, start: Tensor) -> None:
    student = Multistep(SOLVERS["ipndm_2"], SIGMAS, 2, 2, 0.2)
    disturbed(student)
    integrate(mixture.denoiser([]), AFS(student.table()), 80 * start, student.sigmas()).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    used = {name: (gradient != 0).double().mean().item() for name, gradient in gradients.items() if gradient is not None}
    assert used["grid"] == 1
    # all but what the first steps have not: the points of step 0, and history before it
    assert used["position"] == used["time_scale"] == 5 / 6
    assert used["update"] == (1 + 3 + 5 + 6 * 3) / (6 * 6)
    assert used["stage"] == (0 + 1 + 3 + 4 * 3) / (6 * 4)


@pytest.mark.parametrize("name", ["heun", "ipndm_4", "ddpm"])
def test_a_start_that_does_not_fit_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"start: .* in a step; valid: 1, looking back on at most history = 2"):
        Multistep(SOLVERS[name], SIGMAS, 2, 2, 0.2)


def test_a_multistep_table_refuses_another_grid(mixture: Gaussian, start: Tensor) -> None:
    table = Multistep(SOLVERS["ipndm_2"], SIGMAS, 1, 1, 0.0).table()
    with pytest.raises(ValueError, match="5 nodes; valid: 7"):
        integrate(mixture.denoiser([]), table, start, polynomial(5, 0.1, 1.0))


def test_a_multistep_table_refuses_other_noise_levels(mixture: Gaussian, start: Tensor) -> None:
    table = Multistep(SOLVERS["ipndm_2"], SIGMAS, 1, 1, 0.0).table()
    with pytest.raises(ValueError, match=r"sigmas: .* at node 1; valid: .*, the grid that the table was made for"):
        integrate(mixture.denoiser([]), table, start, polynomial(7, 0.002, 80.0))


@pytest.mark.parametrize(
    ("sigmas", "points", "history", "message"),
    [
        (torch.tensor([20.0, 5.0, 0.0]).double(), 2, 1, "sigmas: 0 at the end; valid: a positive noise level"),
        (torch.tensor([1.0, 5.0, 20.0]).double(), 2, 1, "sigmas: .*; valid: positive and strictly decreasing"),
        (SIGMAS, 0, 1, "num_points, history: 0, 1; valid: 1 or more; 1 to 6, the steps of the grid"),
        (SIGMAS, 2, 0, "num_points, history: 2, 0; valid: "),
        (SIGMAS, 2, 7, "num_points, history: 2, 7; valid: 1 or more; 1 to 6, the steps of the grid"),
    ],
)
def test_bad_settings_of_multistep_are_refused(sigmas: Tensor, points: int, history: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Multistep(SOLVERS["euler"], sigmas, points, history, 0.0)


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("points", [1, 2, 3])
def test_epd_is_a_special_case_of_multistep(points: int, afs: bool, mixture: Gaussian, start: Tensor) -> None:
    """An interval is two steps, the first to the first point; the second's look-ahead points are the others."""
    sigmas, epd = polynomial(4, 0.002, 80.0), epd_table(points, 4).sorted()
    tau = sigmas[1:, None] ** epd.position * sigmas[:-1, None] ** (1 - epd.position)  # (N, K)
    grid = torch.cat([torch.stack([sigmas[:-1], tau[:, 0]], 1).flatten(), sigmas[-1:]])
    nodes = grid[:-1, None].repeat(1, points)
    nodes[1::2] = tau
    stage = torch.zeros(6, points, 2 * points, dtype=torch.float64)
    update = torch.zeros(6, 2 * points, dtype=torch.float64)
    time_scale = torch.ones(6, points, dtype=torch.float64)
    for n in range(3):
        d = 0 if n else points - 1  # the column of d: the very first step has one output only
        update[2 * n, points] = 1
        stage[2 * n + 1, 1:, d] = 1
        ahead, rest, whole = tau[n, 0] - sigmas[n], sigmas[n + 1] - tau[n, 0], sigmas[n + 1] - sigmas[n]
        update[2 * n + 1, d] = -ahead / rest
        update[2 * n + 1, points:] = whole / rest * epd.weight[n] * epd.direction_scale[n]
        time_scale[2 * n + 1] = epd.time_scale[n]
    joint = MultistepTable("noise", nodes, stage, update, time_scale)
    found = [
        integrate(mixture.denoiser([]), AFS(solver) if afs else solver, 80 * start, g)
        for solver, g in ((epd, sigmas), (joint, grid))
    ]
    assert torch.allclose(found[0], found[1], rtol=1e-9, atol=1e-10)
