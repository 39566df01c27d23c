import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from backends import Gaussian
from solvers import AFS, EPD, SOLVERS, Counter, EPDTable, Guided, StepTable, depth, euler, heun, integrate, logsnr, polynomial

ORDERS = {"euler": 1, "heun": 2, "dpm_solver_2": 2, "dpm_solver_pp_2m": 2, "ipndm_2": 2, "ipndm_3": 2, "ipndm_4": 2}
"""Asymptotic global orders with the usual first-order start; iPNDM's constant-step coefficients cap it at 2 on these grids."""


def test_every_solver_has_an_expected_order() -> None:
    assert set(ORDERS) == set(SOLVERS)


@pytest.mark.parametrize("name", SOLVERS)
def test_convergence_order(name: str, mixture: Gaussian, start: Tensor) -> None:
    denoise = mixture.denoiser([])
    x = 10 * start
    exact = integrate(denoise, heun, x, polynomial(5121, 0.1, 10.0))
    errors = [
        (integrate(denoise, SOLVERS[name], x, polynomial(steps + 1, 0.1, 10.0)) - exact).abs().max().item()
        for steps in (160, 320, 640)
    ]
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert slopes[-1] == pytest.approx(ORDERS[name], abs=0.15), slopes


@pytest.mark.parametrize("name", SOLVERS)
def test_one_gaussian_has_a_known_solution(name: str, start: Tensor) -> None:
    """For N(mean, std^2) the trajectory is mean + (x - mean) sqrt((std^2 + sigma^2) / (std^2 + sigma_max^2))."""
    mean, std = torch.full((1, 1, 2, 2), 0.4, dtype=torch.float64), 0.7
    one = Gaussian(mean, torch.tensor([std], dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    sigmas = polynomial(1001, 0.01, 20.0)
    x = sigmas[0] * start
    exact = mean + (x - mean) * math.sqrt((std**2 + 0.01**2) / (std**2 + 20.0**2))
    found = integrate(one.denoiser([]), SOLVERS[name], x, sigmas)
    assert torch.allclose(found, exact, atol=2e-2 if name == "euler" else 1e-4)


@pytest.mark.parametrize("name", SOLVERS)
def test_afs_replaces_the_first_evaluation_only(name: str, mixture: Gaussian, start: Tensor) -> None:
    """The same as a network that answers x - sigma x / sqrt(1 + sigma^2) at the first node, and one evaluation less."""
    sigmas = polynomial(6, 0.002, 80.0)

    def replaced(x: Tensor, sigma: Tensor) -> Tensor:
        return x - 80 * x / math.sqrt(1 + 80**2) if sigma[0] == 80 else mixture.denoiser([])(x, sigma)

    plain, afs = Counter(replaced), Counter(mixture.denoiser([]))
    expected = integrate(plain, SOLVERS[name], 80 * start, sigmas)
    assert torch.allclose(integrate(afs, AFS(SOLVERS[name]), 80 * start, sigmas), expected, rtol=1e-9, atol=1e-12)
    assert afs.depth == plain.depth - 1
    assert afs.rows == plain.rows - len(start)


def test_the_two_forms_of_euler_agree(mixture: Gaussian, start: Tensor) -> None:
    sigmas = logsnr(9, 0.01, 20.0)

    def data_form(step: int, sigmas: Tensor) -> StepTable:
        return replace(euler(step, sigmas), form="data")

    found = [integrate(mixture.denoiser([]), s, sigmas[0] * start, sigmas) for s in (euler, data_form)]
    assert torch.allclose(found[0], found[1], rtol=1e-12)


def random_table(points: int, num_steps: int, batch: tuple[int, ...] = ()) -> EPDTable:
    generator = torch.Generator().manual_seed(points)
    shape = (*batch, num_steps - 1, points)
    position, weight, direction, time = (torch.rand(4, *shape, generator=generator, dtype=torch.float64) * 0.8 + 0.1).unbind()
    return EPDTable(position, weight / weight.sum(-1, keepdim=True), 0.9 + direction / 5, 0.9 + time / 5)


def naive_epd(mixture: Gaussian, table: EPDTable, x: Tensor, sigmas: Tensor, afs: bool) -> Tensor:
    """One image and one point at a time, as the paper writes it."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return mixture.denoiser([])(x[None], sigma[None])[0]

    for n in range(len(sigmas) - 1):
        t, t_next = sigmas[n], sigmas[n + 1]
        d = x / torch.sqrt(1 + t**2) if afs and n == 0 else (x - denoise(x, t)) / t
        total = torch.zeros_like(x)
        for k in range(table.num_points):
            tau = t_next ** table.position[n, k] * t ** (1 - table.position[n, k])
            x_k = x + (tau - t) * d
            d_k = (x_k - denoise(x_k, table.time_scale[n, k] * tau)) / tau
            total += table.weight[n, k] * table.direction_scale[n, k] * d_k
        x = x + (t_next - t) * total
    return x


@pytest.mark.parametrize("sigma_max", [80.0, 1.0], ids=["ve", "flow"])
@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("points", [1, 2, 3])
def test_epd_equals_the_naive_formula(points: int, afs: bool, sigma_max: float, mixture: Gaussian, start: Tensor) -> None:
    sigmas = polynomial(5, 0.003, sigma_max)
    table = random_table(points, 5)
    counter = Counter(mixture.denoiser([]))
    found = integrate(counter, AFS(table) if afs else table, sigma_max * start, sigmas)
    expected = torch.stack([naive_epd(mixture, table, x, sigmas, afs) for x in sigma_max * start])
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert counter.depth == 2 * 4 - afs
    assert counter.rows / len(start) == (1 + points) * 4 - afs
    assert depth(AFS(table) if afs else table, sigmas) == counter.depth


def test_a_table_for_each_image_equals_one_image_at_a_time(mixture: Gaussian, start: Tensor) -> None:
    sigmas = polynomial(4, 0.002, 80.0)
    tables = random_table(2, 4, batch=(len(start),))
    found = integrate(mixture.denoiser([]), AFS(tables), 80 * start, sigmas)
    for i in range(len(start)):
        own = EPDTable(tables.position[i], tables.weight[i], tables.direction_scale[i], tables.time_scale[i])
        assert torch.allclose(integrate(mixture.denoiser([]), AFS(own), 80 * start[i : i + 1], sigmas)[0], found[i], rtol=1e-12)


def test_sorting_the_points_changes_nothing(mixture: Gaussian, start: Tensor) -> None:
    sigmas = polynomial(4, 0.002, 80.0)
    table = random_table(3, 4)
    assert bool((table.sorted().position.diff(dim=-1) >= 0).all())
    found = [integrate(mixture.denoiser([]), t, 80 * start, sigmas) for t in (table, table.sorted())]
    assert torch.allclose(found[0], found[1], rtol=1e-12)


def test_gradients_reach_every_learned_number(mixture: Gaussian, start: Tensor) -> None:
    sigmas = polynomial(4, 0.002, 80.0)
    epd = EPD(4, 2, scale_dir=0.05, scale_time=0.05)
    integrate(mixture.denoiser([]), epd, 80 * start, sigmas).square().mean().backward()
    for name, parameter in epd.named_parameters():
        assert parameter.grad is not None
        assert bool((parameter.grad != 0).all()), name


def test_epd_starts_evenly_spread_and_stays_in_range() -> None:
    table = EPD(3, 3, scale_dir=0.1, scale_time=0.0).table()
    assert torch.allclose(table.position, torch.tensor([0.25, 0.5, 0.75]).double().expand(2, 3))
    assert torch.allclose(table.weight, torch.full((2, 3), 1 / 3).double())
    epd = EPD(3, 3, scale_dir=0.1, scale_time=0.0)
    with torch.no_grad():
        epd.direction_scale.fill_(100.0)
        epd.time_scale.fill_(100.0)
    assert epd.table().direction_scale.max().item() == pytest.approx(1.1)
    assert bool((epd.table().time_scale == 1).all())


def test_guidance_is_the_formula_in_one_call(start: Tensor) -> None:
    prompts = torch.arange(16.0).double().view(-1, 1, 1, 1)  # 8 wanted, then 8 others

    def conditional(x: Tensor, sigma: Tensor) -> Tensor:
        return x * sigma.view(-1, 1, 1, 1) + prompts.repeat(len(x) // 16, 1, 1, 1)

    counter = Counter(conditional)
    x, sigma = torch.cat([start, 2 * start]), torch.arange(1.0, 17.0).double()
    found = Guided(counter, 3.0, batch=8)(x, sigma)
    unguided = x * sigma.view(-1, 1, 1, 1)
    wanted, other = unguided + prompts[:8].repeat(2, 1, 1, 1), unguided + prompts[8:].repeat(2, 1, 1, 1)
    assert torch.allclose(found, other + 3 * (wanted - other))
    assert (counter.depth, counter.rows) == (1, 32)


def test_levels_are_read_off_the_zeros() -> None:
    sigmas = polynomial(3, 0.1, 10.0)
    table = euler(0, sigmas)
    stage = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 0.5, 0.5, 0]]).double()
    four = replace(table, nodes=torch.ones(4).double(), stage=stage, update=torch.ones(4).double() / 4)
    assert four.levels == [[0], [1, 2], [3]]
    assert replace(four, analytic_first=True).levels == [[1, 2], [3]]
    assert four.consistent
    assert not replace(four, update=torch.ones(4).double()).consistent


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([1.0], "num_steps >= 2"),
        ([1.0, 2.0], "strictly decreasing"),
        ([1.0, 0.0], "positive"),
        ([1.0, float("nan")], "positive"),
    ],
)
def test_a_bad_grid_is_refused(sigmas: list[float], message: str, mixture: Gaussian, start: Tensor) -> None:
    with pytest.raises(ValueError, match=message):
        integrate(mixture.denoiser([]), euler, start, torch.tensor(sigmas))


def test_more_history_than_steps_is_refused(mixture: Gaussian, start: Tensor) -> None:
    def hasty(step: int, sigmas: Tensor) -> StepTable:
        return SOLVERS["ipndm_2"](step + 1, torch.cat([2 * sigmas[:1], sigmas]))

    with pytest.raises(ValueError, match="looks back on 1 outputs; there are 0"):
        integrate(mixture.denoiser([]), hasty, start, polynomial(3, 0.1, 1.0))


def test_an_epd_table_refuses_another_grid(mixture: Gaussian, start: Tensor) -> None:
    with pytest.raises(ValueError, match="5 nodes; valid: 4"):
        integrate(mixture.denoiser([]), random_table(2, 4), start, polynomial(5, 0.1, 1.0))
