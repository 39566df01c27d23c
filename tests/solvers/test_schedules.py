import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from solvers import discrete, discrete_sigma, discrete_time, dynamic_shift, flowmatch, logsnr, polynomial, time_uniform
from solvers.schedules import variance_preserving_time


def test_polynomial_is_uniform_in_the_root() -> None:
    roots = polynomial(9, 0.002, 80.0, rho=5.0) ** (1 / 5)
    assert torch.allclose(roots.diff(), roots.diff().mean().expand(8))


def test_logsnr_is_uniform_in_the_logarithm() -> None:
    logs = logsnr(9, 0.002, 80.0).log()
    assert torch.allclose(logs.diff(), logs.diff().mean().expand(8))


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_time_uniform_is_uniform_in_the_root_of_time(rho: float) -> None:
    roots = variance_preserving_time(time_uniform(9, 0.002, 80.0, rho), 0.002, 80.0) ** (1 / rho)
    assert torch.allclose(roots.diff(), roots.diff().mean().expand(8), rtol=1e-9)


def test_variance_preserving_time_inverts_the_process() -> None:
    """sigma^2 = exp(integral of beta) - 1 with linear beta, tau = 1 at sigma_max and 0.001 at sigma_min."""
    sigma = torch.logspace(-2.5, 1.9, 50, dtype=torch.float64)
    tau = variance_preserving_time(sigma, 0.002, 80.0)
    high, low = math.log1p(80.0**2), math.log1p(0.002**2)
    half, beta_min = torch.linalg.solve(torch.tensor([[1.0, 1.0], [1e-6, 1e-3]]).double(), torch.tensor([high, low]).double())
    assert torch.allclose(torch.expm1(half * tau**2 + beta_min * tau).sqrt(), sigma, rtol=1e-6)


def alphas_cumprod() -> Tensor:
    """Stable Diffusion's."""
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)


TABLE = ((1 - alphas_cumprod()) / alphas_cumprod()).sqrt()


def test_discrete_is_uniform_in_the_time_of_the_table() -> None:
    low, high = TABLE[0].item(), TABLE[-1].item()
    times = discrete_time(discrete(11, low, high, TABLE), TABLE)
    assert torch.allclose(times, torch.linspace(1, 1e-3, 11, dtype=torch.float64), rtol=1e-9)
    roots = discrete_time(discrete(11, low, high, TABLE, rho=2.0), TABLE).sqrt()
    assert torch.allclose(roots.diff(), roots.diff().mean().expand(10), rtol=1e-9)


def test_discrete_time_and_sigma_are_inverse_and_go_through_the_table() -> None:
    times = torch.arange(1, 1001).double() / 1000
    assert torch.allclose(discrete_sigma(times, TABLE), TABLE, rtol=1e-10)
    assert torch.allclose(discrete_time(TABLE, TABLE), times, rtol=1e-10)
    between = torch.rand(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.999 + 0.001
    assert torch.allclose(discrete_time(discrete_sigma(between, TABLE), TABLE), between, rtol=1e-9)


def test_discrete_refuses_what_the_table_does_not_hold() -> None:
    with pytest.raises(ValueError, match=r"sigma: .*; valid: within the table, 0\.029"):
        discrete(5, 0.001, 10.0, TABLE)
    with pytest.raises(ValueError, match=r"table: .*; valid: positive increasing noise levels"):
        discrete(5, 0.1, 10.0, TABLE.flip(0))


def test_flowmatch_is_uniform_before_its_shift() -> None:
    grid = flowmatch(11, 3 / 1002, shift=3.0)
    s = grid / (3 - 2 * grid)
    assert torch.allclose(s, torch.linspace(1, 0.001, 11, dtype=torch.float64), rtol=1e-9)
    assert torch.allclose(flowmatch(11, 0.1), torch.linspace(1, 0.1, 11, dtype=torch.float64), rtol=1e-9)


def test_dynamic_shift_is_that_of_flux() -> None:
    assert math.log(dynamic_shift(256)) == pytest.approx(0.5)
    assert math.log(dynamic_shift((1024 // 16) ** 2)) == pytest.approx(1.15)


@pytest.mark.filterwarnings("ignore")
def test_flowmatch_has_diffusers_nodes() -> None:
    """SD3's static shift, which the scheduler applies twice to sigma_min; FLUX' dynamic one, on its pipeline's sigmas."""
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

    static = FlowMatchEulerDiscreteScheduler(shift=3.0)
    static.set_timesteps(11)
    twice = 3 * (3 / 1002) / (1 + 2 * (3 / 1002))
    assert torch.allclose(torch.as_tensor(static.sigmas)[:-1].double(), flowmatch(11, twice, shift=3.0), rtol=1e-5)
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    dynamic.set_timesteps(sigmas=[1 - 0.1 * n for n in range(10)], mu=1.15)
    shift = dynamic_shift(4096)
    last = shift * 0.1 / (1 + (shift - 1) * 0.1)
    assert torch.allclose(torch.as_tensor(dynamic.sigmas)[:-1].double(), flowmatch(10, last, shift=shift), rtol=1e-5)


def test_flowmatch_refuses_more_than_the_flow_has() -> None:
    with pytest.raises(ValueError, match=r"sigma_max: 80.0; valid: at most 1"):
        flowmatch(4, 0.002, 80.0)
    with pytest.raises(ValueError, match=r"shift: 0.0; valid: shift > 0, finite"):
        flowmatch(4, 0.002, shift=0.0)


def test_time_uniform_refuses_ends_that_it_does_not_fall_between() -> None:
    assert bool((time_uniform(6, 0.02, 1.0).diff() < 0).all())
    for low, high in ((0.05, 1.0), (0.1, 1.0), (0.5, 14.0)):
        with pytest.raises(ValueError, match=rf"sigma_min, sigma_max: {low}, {high} give .*; valid: ends between which"):
            time_uniform(6, low, high)


@pytest.mark.parametrize("rho", [0.0, -1.0, math.nan, math.inf])
def test_a_bad_rho_is_refused(rho: float) -> None:
    for schedule in (polynomial, time_uniform, partial(discrete, table=TABLE)):
        with pytest.raises(ValueError, match=rf"rho: {rho}; valid: rho > 0, finite"):
            schedule(4, 0.05, 14.0, rho=rho)


def test_num_steps_is_whole() -> None:
    with pytest.raises(ValueError, match=r"num_steps: 4.0; valid: 2 or more, whole \(it counts nodes"):
        polynomial(4.0, 0.05, 14.0)  # type: ignore[arg-type]


SCHEDULES: dict[str, Callable[[int, float, float], Tensor]] = {
    "polynomial": polynomial,
    "logsnr": logsnr,
    "time_uniform": time_uniform,
    "time_uniform 2": partial(time_uniform, rho=2.0),
    "discrete": partial(discrete, table=TABLE),
    "flowmatch": partial(flowmatch, shift=3.0),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_steps", [2, 3, 10, 101])
def test_every_schedule(name: str, num_steps: int) -> None:
    schedule, low, high = SCHEDULES[name], 0.05, 1.0 if name == "flowmatch" else 14.0
    sigmas = schedule(num_steps, low, high)
    assert sigmas.shape == (num_steps,)
    assert sigmas.dtype == torch.float64
    assert (sigmas[0].item(), sigmas[-1].item()) == (high, low)
    assert bool((sigmas.diff() < 0).all())
    fine = schedule(8 * (num_steps - 1) + 1, low, high)
    assert torch.allclose(fine[::8], sigmas, rtol=1e-9)
    with pytest.raises(ValueError, match="num_steps: 1; valid: 2 or more"):
        schedule(1, low, high)
    for below, above in ((0.0, 1.0), (2.0, 1.0), (1.0, math.inf)):
        with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
            schedule(num_steps, below, above)
