import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from backends import Gaussian
from solvers import (
    AFS,
    EPD,
    SOLVERS,
    Counter,
    EPDTable,
    Guided,
    StepTable,
    advance,
    depth,
    euler,
    integrate,
    logsnr,
    polynomial,
)


@pytest.mark.parametrize("name", SOLVERS)
def test_afs_replaces_the_first_evaluation_only(name: str, mixture: Gaussian, start: Tensor) -> None:
    """The same as a network that answers x - sigma x / sqrt(1 + sigma^2) at the first node, and one evaluation less."""
    sigmas = polynomial(6, 0.002, 80.0)

    def replaced(x: Tensor, sigma: Tensor) -> Tensor:
        return x - 80 * x / math.sqrt(1 + 80**2) if sigma[0] == 80 else mixture.denoiser([])(x, sigma)

    plain, afs = Counter(replaced), Counter(mixture.denoiser([]))
    fresh = [torch.randn(start.shape, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in range(5)]
    expected = integrate(plain, SOLVERS[name], 80 * start, sigmas, fresh.__getitem__)
    found = integrate(afs, AFS(SOLVERS[name]), 80 * start, sigmas, fresh.__getitem__)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)
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
    table = euler(0, polynomial(3, 0.1, 10.0))
    ones = torch.ones(4).double()
    stage = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 0.5, 0.5, 0]]).double()
    four = replace(table, nodes=ones, stage=stage, update=ones / 4, time_scale=ones)
    assert four.levels == [[0], [1, 2], [3]]
    assert replace(four, analytic_first=True).levels == [[1, 2], [3]]
    assert four.consistent
    assert not replace(four, update=ones).consistent


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        (torch.tensor([1.0]), r"sigmas: shape \(1,\); valid: .*num_steps >= 2"),
        (torch.ones(2, 2), r"sigmas: shape \(2, 2\); valid: \(num_steps,\)"),
        (torch.tensor([2.0, 1.0, 1.5]), "sigmas: 1.0 at node 1, then 1.5; valid: positive and strictly decreasing"),
        (torch.tensor([2.0, 2.0]), "sigmas: 2.0 at node 0, then 2.0; valid: positive and strictly decreasing"),
        (torch.tensor([1.0, 0.0, -1.0]), "sigmas: 0.0 at node 1, then -1.0; valid: positive"),
        (torch.tensor([1.0, float("nan")]), "sigmas: 1.0 at node 0, then nan; valid: positive"),
        (torch.tensor([float("inf"), 1.0]), "sigmas: inf at node 0, then 1.0; valid: positive"),
        (torch.tensor([2, 1]), "sigmas: torch.int64 on cpu; valid: a floating-point tensor on the CPU"),
        (torch.ones(3, device="meta"), "sigmas: torch.float32 on meta; valid: a floating-point tensor on the CPU"),
        ([2.0, 1.0], "sigmas: list; valid: a floating-point tensor"),
    ],
)
def test_a_bad_grid_is_refused(sigmas: Tensor, message: str, mixture: Gaussian, start: Tensor) -> None:
    with pytest.raises(ValueError, match=message):
        integrate(mixture.denoiser([]), euler, start, sigmas)


@pytest.mark.parametrize(
    "x",
    [torch.ones(2, 3).long(), torch.tensor(1.0), torch.ones(3), torch.ones(0, 3), torch.ones(2, 3).half()],
)
def test_a_bad_state_is_refused(x: Tensor, mixture: Gaussian) -> None:
    with pytest.raises(ValueError, match=r"x: torch\..*, shape .*; valid: float32 or float64 .*, \(B, ...\)"):
        integrate(mixture.denoiser([]), euler, x, polynomial(3, 0.1, 1.0))


def test_a_state_that_is_no_tensor_or_not_finite_is_refused(mixture: Gaussian, start: Tensor) -> None:
    sigmas = polynomial(3, 0.1, 1.0)
    with pytest.raises(ValueError, match="x: ndarray; valid: a tensor"):
        integrate(mixture.denoiser([]), euler, start.numpy(), sigmas)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="x: numbers that are not finite; valid: sigmas"):
        integrate(mixture.denoiser([]), euler, start * math.nan, sigmas)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda x: x[:1], r"denoise: returned \(1, 1, 2, 2\).*; valid: \(8, 1, 2, 2\), torch.float64, on cpu"),
        (lambda x: None, r"denoise: returned NoneType; valid: a tensor of shape \(8, 1, 2, 2\)"),
        (lambda x: x.float(), "denoise: returned .*torch.float32.*; valid: .*torch.float64"),
        (lambda x: x.to("meta"), "denoise: returned .*on meta; valid: .*on cpu"),
    ],
)
def test_a_denoiser_that_returns_something_else_is_refused(
    broken: Callable[[Tensor], Tensor], message: str, start: Tensor
) -> None:
    with pytest.raises(ValueError, match=message):
        integrate(lambda x, sigma: broken(x), euler, start, polynomial(3, 0.1, 1.0))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_denoiser_that_returns_nan_is_named_with_rows_and_level(value: float, start: Tensor) -> None:
    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        broken = x.clone()
        if sigma[0] < 1:
            broken[3, 0, 1, 1] = value
        return broken

    with pytest.raises(FloatingPointError, match=r"not finite in rows \[3\] of 8 at sigma \[0\.5\]; valid: finite"):
        integrate(denoise, euler, start, torch.tensor([2.0, 1.0, 0.5, 0.1]))


def test_more_history_than_steps_is_refused(mixture: Gaussian, start: Tensor) -> None:
    def hasty(step: int, sigmas: Tensor) -> StepTable:
        return SOLVERS["ipndm_2"](step + 1, torch.cat([2 * sigmas[:1], sigmas]))

    with pytest.raises(ValueError, match="table: looks back on 1 outputs; valid: at most the 0 that there are"):
        integrate(mixture.denoiser([]), hasty, start, polynomial(3, 0.1, 1.0))


@pytest.mark.parametrize("changed", [{"update": torch.ones(3)}, {"time_scale": torch.ones(2)}, {"stage": torch.zeros(2, 1)}])
def test_a_table_of_shapes_that_do_not_fit_is_refused(changed: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"table: nodes .*; valid: nodes \(E\), stage \(E, H \+ E\)"):
        replace(euler(0, polynomial(3, 0.1, 1.0)), **changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"form": "x0"}, "form: 'x0'; valid: noise, data"),
        (
            {"nodes": torch.tensor([1.0, -0.5]).double()},
            "sigmas: the network is evaluated at -0.5 in the step from",
        ),
        (
            {"nodes": torch.tensor([1.0, 0.0]).double()},
            r"sigmas: .* at 0.0 .*; valid: positive noise levels",
        ),
        ({"stage": torch.tensor([[0.0, 0.0], [0.0, 1.0]]).double()}, "stage: .*; valid: rows without outputs of their own"),
        ({"stage": torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double()}, "stage: .*; valid: rows without outputs of their own"),
        ({"nodes": torch.ones(3, 2), "update": torch.ones(4, 2)}, r"table: batches \[\(3,\), \(4,\)\]; valid: none, or \(B,\)"),
        ({"nodes": torch.ones(3, 4, 2)}, r"table: batches \[\(3, 4\)\]; valid: none, or \(B,\)"),
    ],
)
def test_a_table_that_says_nonsense_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SOLVERS["heun"](0, polynomial(3, 0.1, 1.0)), **changed)


def test_a_table_for_other_images_is_refused(mixture: Gaussian, start: Tensor) -> None:
    with pytest.raises(ValueError, match="table: of 3 images; valid: one table for all, or one for each of the 8 of x"):
        integrate(mixture.denoiser([]), random_table(2, 4, batch=(3,)), 80 * start, polynomial(4, 0.002, 80.0))


@pytest.mark.parametrize("weight", [torch.ones(3, 1), torch.ones(1, 2), torch.ones(2)])
def test_an_epd_table_of_other_shapes_is_refused(weight: Tensor) -> None:
    with pytest.raises(ValueError, match=r"position, weight, direction_scale, time_scale: .*; valid: one shape, \(N, K\)"):
        replace(random_table(2, 4), weight=weight)


def test_bad_settings_of_epd_are_refused() -> None:
    with pytest.raises(ValueError, match=r"scale_time: 2.0; valid: at least 0, below 1"):
        EPD(4, 2, scale_dir=0.0, scale_time=2.0)
    with pytest.raises(ValueError, match="num_steps, num_points: 4, 0; valid: 2 nodes or more, 1 point or more"):
        EPD(4, 0, scale_dir=0.0, scale_time=0.0)
    with pytest.raises(ValueError, match="max_order: 9; valid: 1 to 4"):
        EPD(4, 2, scale_dir=0.0, scale_time=0.0, max_order=9).table()


def test_guidance_of_other_conditions_is_refused(mixture: Gaussian, start: Tensor) -> None:
    with pytest.raises(ValueError, match="x: 8 rows; valid: a multiple of the 5 conditions"):
        Guided(mixture.denoiser([]), 2.0, batch=5)(start, torch.ones(8).double())


def test_ancestral_noise_must_be_given_and_fit(mixture: Gaussian, start: Tensor) -> None:
    sigmas = polynomial(3, 0.1, 1.0)
    with pytest.raises(ValueError, match="noise: None, and step 0 is ancestral; valid: a function"):
        integrate(mixture.denoiser([]), SOLVERS["ddpm"], start, sigmas)
    with pytest.raises(ValueError, match=r"noise: shape \(1, 1, 2, 2\) at step 0; valid: \(8, 1, 2, 2\)"):
        integrate(mixture.denoiser([]), SOLVERS["ddpm"], start, sigmas, lambda _: start[:1])
    with pytest.raises(ValueError, match=r"fresh: None, and the step adds noise .*; valid: unit noise"):
        advance(mixture.denoiser([]), SOLVERS["ddpm"](0, sigmas), start, ())
    with pytest.raises(ValueError, match=r"noise: 2.0; valid: at least 0, less than sigma_next"):
        replace(euler(0, sigmas), noise=2.0)


def test_an_epd_table_refuses_another_grid(mixture: Gaussian, start: Tensor) -> None:
    with pytest.raises(ValueError, match="5 nodes; valid: 4"):
        integrate(mixture.denoiser([]), random_table(2, 4), start, polynomial(5, 0.1, 1.0))


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_solver_pp_3m", "unipc_3", "ddpm"])
def test_float32_states_stay_float32(name: str, start: Tensor) -> None:
    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        assert x.dtype == sigma.dtype == torch.float32
        return x / (1 + sigma.view(-1, 1, 1, 1) ** 2)

    sigmas = polynomial(6, 0.01, 10.0)
    found = integrate(denoise, SOLVERS[name], 10 * start.float(), sigmas, lambda _: start.float())
    double = integrate(
        lambda x, sigma: denoise(x.float(), sigma.float()).double(), SOLVERS[name], 10 * start, sigmas, lambda _: start
    )
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), double, rtol=1e-4, atol=1e-5)
