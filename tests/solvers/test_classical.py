"""Classical solvers: convergence orders, known coefficients, and diffusers' schedulers on the same sigmas and network."""

import math
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from backends import Gaussian
from solvers import (
    SOLVERS,
    Counter,
    Noise,
    Solver,
    adams_bashforth,
    advance,
    constant_table,
    ddpm,
    deis,
    dpm_solver_pp,
    euler,
    heun,
    integrate,
    ipndm,
    logsnr,
    polynomial,
    rk4,
    trajectory,
    unipc,
)  # fmt: skip
from solvers.schedules import variance_preserving_time

ORDERS = {
    "euler": 1, "heun": 2, "midpoint": 2, "rk4": 4, "dpm_solver_2": 2, "ddpm": 1,
    "ipndm_1": 1, "ipndm_2": 2, "ipndm_3": 2, "ipndm_4": 2,  # constant-step coefficients on a grid of unequal steps
    "adams_bashforth_1": 1, "adams_bashforth_2": 2, "adams_bashforth_3": 3, "adams_bashforth_4": 4,
    "deis_1": 1, "deis_2": 2, "deis_3": 3, "deis_4": 4, "deis_log_2": 2, "deis_log_3": 3,
    "dpm_solver_pp_1m": 1, "dpm_solver_pp_2m": 2, "dpm_solver_pp_3m": 2, "dpm_solver_pp_3m_corrected": 3,
    "dpm_solver_1m": 1, "dpm_solver_2m": 2, "dpm_solver_3m": 2, "dpm_solver_3m_corrected": 3,
    "unipc_1": 2, "unipc_2": 3, "unipc_3": 4, "unipc_bh1_1": 2, "unipc_bh1_2": 3, "unipc_bh1_3": 4,
    "unipc_noise_1": 2, "unipc_noise_2": 3, "unipc_noise_3": 4,
}  # fmt: skip
"""Global orders in theory, with exact outputs to start from and no lowering at the end."""

FINE = 2560


def test_every_solver_has_an_expected_order() -> None:
    assert set(ORDERS) == set(SOLVERS)


@pytest.fixture(scope="module")
def exact() -> tuple[Gaussian, Tensor, list[Tensor]]:
    """A mixture, a fine grid, and the states at its nodes by a fourth-order method."""
    generator = torch.Generator().manual_seed(0)
    mixture = Gaussian(
        means=torch.randn(3, 1, 2, 2, generator=generator, dtype=torch.float64),
        stds=torch.tensor([0.6, 0.8, 0.5], dtype=torch.float64),
        weights=torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
    )
    sigmas = polynomial(FINE + 1, 0.3, 6.0, rho=3.0)
    x = 6 * torch.randn(8, 1, 2, 2, generator=generator, dtype=torch.float64)
    return mixture, sigmas, list(trajectory(mixture.denoiser([]), rk4, x, sigmas))


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "ddpm"])
def test_convergence_order(name: str, exact: tuple[Gaussian, Tensor, list[Tensor]]) -> None:
    mixture, fine, states = exact
    denoise = mixture.denoiser([])
    errors = []
    for steps in (160, 320, 640):
        every = FINE // steps
        sigmas, known = fine[::every], states[::every]
        denoised = [denoise(x, sigma.expand(len(x))) for x, sigma in zip(known, sigmas, strict=True)]
        # after the first order rises, and before it falls at the end
        first, last = 4, steps - 4
        x, earlier = known[first], []
        for step in range(first, last):
            table = SOLVERS[name](step, sigmas)
            if step == first:
                ahead = int(not bool(table.nodes[0] == table.sigma))  # UniPC knows the output at this node already
                indices = range(first + ahead - table.history, first + ahead)
                directions = [(known[i] - denoised[i]) / sigmas[i] for i in indices]
                earlier = directions if table.form == "noise" else [denoised[i] for i in indices]
            x, earlier = advance(denoise, table, x, earlier)
        errors.append((x - known[last]).square().mean().sqrt().item())
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert slopes[-1] == pytest.approx(ORDERS[name], abs=0.15), (errors, slopes)


def test_convergence_order_of_ddpm(exact: tuple[Gaussian, Tensor, list[Tensor]]) -> None:
    """To the path of the same Brownian motion on a fine grid: where D does not change, two steps and their noise are one."""
    mixture, fine, _ = exact
    generator = torch.Generator().manual_seed(1)
    unit = torch.randn(FINE, 64, 1, 2, 2, generator=generator, dtype=torch.float64)
    x = 6 * torch.randn(64, 1, 2, 2, generator=generator, dtype=torch.float64)

    def std(a: int, b: int) -> Tensor:
        return fine[b] * torch.sqrt(1 - (fine[b] / fine[a]) ** 2)

    def coupled(every: int) -> Noise:
        def noise(step: int) -> Tensor:
            a, b = step * every, (step + 1) * every
            parts = [(fine[b] / fine[i + 1]) ** 2 * std(i, i + 1) * unit[i] for i in range(a, b)]
            return torch.stack(parts).sum(0) / std(a, b)

        return noise

    assert coupled(32)(3).std().item() == pytest.approx(1, abs=0.1)
    true = integrate(mixture.denoiser([]), ddpm, x, fine, coupled(1))
    found = [integrate(mixture.denoiser([]), ddpm, x, fine[::every], coupled(every)) for every in (128, 64, 32)]
    errors = [(f - true).square().mean().sqrt().item() for f in found]
    slopes = [math.log2(a / b) for a, b in pairwise(errors)]
    assert slopes[-1] == pytest.approx(ORDERS["ddpm"], abs=0.15), (errors, slopes)


def test_ddpm_keeps_the_distribution() -> None:
    """One Gaussian: 1,000 ancestral steps end with its mean and standard deviation."""
    one = Gaussian(torch.full((1, 1, 1, 1), 0.4).double(), torch.tensor([0.7]).double(), torch.ones(1).double())
    sigmas = polynomial(1001, 0.002, 80.0)
    generator = torch.Generator().manual_seed(0)
    x = 80 * torch.randn(20_000, 1, 1, 1, generator=generator, dtype=torch.float64)
    found = integrate(one.denoiser([]), ddpm, x, sigmas, lambda _: torch.randn(x.shape, generator=generator).double())
    assert found.mean().item() == pytest.approx(0.4, abs=4 * 0.7 / 20_000**0.5)
    assert found.std().item() == pytest.approx(0.7, abs=4 * 0.7 / 40_000**0.5)


def test_ddpm_is_the_variance_preserving_posterior(mixture: Gaussian, start: Tensor) -> None:
    """Ho et al. 2020, equation 7, in its own variables y = sqrt(abar) x."""
    sigmas = logsnr(5, 0.1, 10.0)
    abar = 1 / (1 + sigmas**2)
    fresh = torch.randn(4, *start.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y = abar[0].sqrt() * sigmas[0] * start
    for n in range(4):
        denoised = mixture.denoiser([])(y / abar[n].sqrt(), sigmas[n].expand(len(y)))
        alpha, before = abar[n] / abar[n + 1], abar[n + 1]
        mean = (before.sqrt() * (1 - alpha) * denoised + alpha.sqrt() * (1 - before) * y) / (1 - abar[n])
        y = mean + torch.sqrt((1 - before) / (1 - abar[n]) * (1 - alpha)) * fresh[n]
    found = integrate(mixture.denoiser([]), ddpm, sigmas[0] * start, sigmas, lambda step: fresh[step])
    assert torch.allclose(found, y / abar[-1].sqrt(), rtol=1e-12)


@pytest.mark.parametrize("name", [name for name in SOLVERS if name != "ddpm"])
def test_one_gaussian_has_a_known_solution(name: str, start: Tensor) -> None:
    """For N(mean, std^2) the trajectory is mean + (x - mean) sqrt((std^2 + sigma^2) / (std^2 + sigma_max^2))."""
    mean, std = torch.full((1, 1, 2, 2), 0.4, dtype=torch.float64), 0.7
    one = Gaussian(mean, torch.tensor([std], dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    sigmas = polynomial(1001, 0.01, 20.0)
    x = sigmas[0] * start
    true = mean + (x - mean) * math.sqrt((std**2 + 0.01**2) / (std**2 + 20.0**2))
    found = integrate(one.denoiser([]), SOLVERS[name], x, sigmas)
    assert torch.allclose(found, true, atol=2e-2 if ORDERS[name] == 1 else 1e-3)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("num_steps", [2, 3, 4, 9])
def test_cost(name: str, num_steps: int, mixture: Gaussian, start: Tensor) -> None:
    """One network call per step for the multistep solvers, UniPC's corrector included."""
    per_step = {"heun": 2, "midpoint": 2, "dpm_solver_2": 2, "rk4": 4}.get(name, 1)
    counter = Counter(mixture.denoiser([]))
    integrate(counter, SOLVERS[name], start, polynomial(num_steps, 0.1, 1.0), lambda _: start)
    assert counter.depth == per_step * (num_steps - 1)
    assert counter.rows == len(start) * counter.depth


FIRST_ORDER = [euler, *(make(1) for make in (ipndm, adams_bashforth, deis, dpm_solver_pp)), dpm_solver_pp(1, "noise")]


def test_all_first_order_methods_are_euler(mixture: Gaussian, start: Tensor) -> None:
    sigmas = logsnr(9, 0.01, 20.0)
    found = [integrate(mixture.denoiser([]), solver, 20 * start, sigmas) for solver in FIRST_ORDER]
    assert all(torch.allclose(found[0], other, rtol=1e-11) for other in found[1:])


def test_adams_bashforth_of_order_2_is_its_formula() -> None:
    sigmas = polynomial(8, 0.002, 80.0)
    for n in range(1, 7):
        h, before = sigmas[n + 1] - sigmas[n], sigmas[n] - sigmas[n - 1]
        expected = torch.stack([-h / (2 * before), 1 + h / (2 * before)])
        assert torch.allclose(adams_bashforth(2)(n, sigmas).update, expected, rtol=1e-10)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_interpolating_methods_are_exact_for_what_they_interpolate(order: int) -> None:
    """d = variable(sigma)^k, k < order, is integrated over the step to rounding, whatever the grid."""
    grid = polynomial(8, 0.02, 50.0)
    step = 5
    variables: list[tuple[Solver, Callable[[Tensor], Tensor]]] = [
        (adams_bashforth(order), lambda sigma: sigma),
        (deis(order), lambda sigma: variance_preserving_time(sigma, 0.002, 80.0)),
        (deis(order, "log_sigma"), torch.log),
    ]
    for solver, variable in variables:
        known = grid[step - order + 1 : step + 1]
        fine = logsnr(200_001, grid[step + 1].item(), grid[step].item())
        for k in range(order):
            true = torch.trapezoid(variable(fine) ** k, fine)
            found = (grid[step + 1] - grid[step]) * (solver(step, grid).update * variable(known) ** k).sum()
            assert found.item() == pytest.approx(true.item(), rel=1e-7)


def test_orders_rise_and_fall() -> None:
    """`lower_order_final`: order k while it rises, at the end what is left; without it the highest."""
    sigmas = logsnr(9, 0.01, 20.0)
    lowered, full = dpm_solver_pp(3), dpm_solver_pp(3, lower_order_final=False)
    assert [lowered(step, sigmas).update.numel() for step in range(8)] == [1, 2, 3, 3, 3, 3, 2, 1]
    assert [full(step, sigmas).update.numel() for step in range(8)] == [1, 2, 3, 3, 3, 3, 3, 3]
    assert [unipc(3)(step, sigmas).history for step in range(8)] == [0, 2, 3, 3, 3, 3, 2, 1]


@pytest.mark.parametrize("make", [ipndm, adams_bashforth, deis, dpm_solver_pp, unipc])
@pytest.mark.parametrize("order", [0, 5, -1, 2.5])
def test_a_bad_order_is_refused(make: Callable[..., Solver], order: int) -> None:
    with pytest.raises(ValueError, match=f"max_order: {order}; valid: 1 to [34]"):
        make(order)


def test_a_bad_choice_is_refused() -> None:
    with pytest.raises(ValueError, match="variable: 'rho'; valid: time, log_sigma"):
        deis(2, "rho")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="variant: 'bh3'; valid: bh1, bh2"):
        unipc(2, variant="bh3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="form: 'x0'; valid: noise, data"):
        dpm_solver_pp(2, "x0")  # type: ignore[arg-type]


def test_a_grid_may_end_with_0_where_nothing_divides_by_it(mixture: Gaussian, start: Tensor) -> None:
    """The last step to 0 is then D itself for a first-order one."""
    sigmas = torch.cat([logsnr(5, 0.01, 20.0), torch.zeros(1).double()])
    for name in ("euler", "ipndm_3", "adams_bashforth_3", "dpm_solver_pp_3m", "unipc_3"):
        found = integrate(mixture.denoiser([]), SOLVERS[name], 20 * start, sigmas)
        if name == "euler":
            before = integrate(mixture.denoiser([]), euler, 20 * start, sigmas[:-1])
            assert torch.allclose(found, mixture.denoiser([])(before, sigmas[-2].expand(len(start))), rtol=1e-12)
        assert bool(found.isfinite().all())
    for name, message in (("heun", "evaluated at 0.0"), ("dpm_solver_2", "evaluated at 0.0"), ("deis_3", "logarithm")):
        with pytest.raises(ValueError, match=f"sigmas: .*{message}.*; valid: .*positive"):
            integrate(mixture.denoiser([]), SOLVERS[name], 20 * start, sigmas)


def test_a_table_that_does_not_sum_to_1_is_refused() -> None:
    with pytest.raises(ValueError, match=r"update: \[0.5, 0.6\] .* sum 1.1; valid: coefficients that sum to 1"):
        constant_table(2.0, 1.0, "noise", [2.0], [[0.0, 0.0]], [0.5, 0.6])
    with pytest.raises(ValueError, match=r"stage: \[0.9, 0.0\] .*; valid: coefficients that sum to 1, or all 0"):
        constant_table(2.0, 1.0, "noise", [2.0, 1.5], [[0.0, 0.0], [0.9, 0.0]], [0.5, 0.5])


def test_a_grid_with_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match="sigmas: with gradient; valid: a constant grid"):
        euler(0, polynomial(3, 0.1, 1.0).requires_grad_())


def diffusers(name: str, **config: Any) -> Any:
    with warnings.catch_warnings(action="ignore"):
        import diffusers

        return getattr(diffusers, name)(prediction_type="epsilon", **config)


SAME = {
    "euler": (euler, "EulerDiscreteScheduler", {}),
    "heun": (heun, "HeunDiscreteScheduler", {}),
    "dpm_solver_pp_2m": (dpm_solver_pp(2), "DPMSolverMultistepScheduler", {"solver_order": 2}),
    "dpm_solver_pp_3m": (dpm_solver_pp(3), "DPMSolverMultistepScheduler", {"solver_order": 3}),
    "dpm_solver_2m": (
        dpm_solver_pp(2, "noise"),
        "DPMSolverMultistepScheduler",
        {"solver_order": 2, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    ),
    "unipc_bh2_2": (unipc(2), "UniPCMultistepScheduler", {"solver_order": 2}),
    "unipc_bh2_3": (unipc(3), "UniPCMultistepScheduler", {"solver_order": 3}),
    "unipc_bh1_3": (unipc(3, variant="bh1"), "UniPCMultistepScheduler", {"solver_order": 3, "solver_type": "bh1"}),
    "unipc_noise_3": (unipc(3, "noise"), "UniPCMultistepScheduler", {"solver_order": 3, "predict_x0": False}),
    # diffusers' DEIS interpolates in log sigma, and lowers its order at the end: "tab", in time, it does not have
    "deis_log_3": (deis(3, "log_sigma"), "DEISMultistepScheduler", {"solver_order": 3, "lower_order_final": False}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SAME)
def test_diffusers_gives_the_same(name: str, mixture: Gaussian, start: Tensor) -> None:
    """On the same 11 nodes and the same network. Euler's and Heun's state is x, the others' x / sqrt(1 + sigma^2)."""
    solver, scheduler_name, config = SAME[name]
    sigmas = polynomial(11, 0.03, 14.0)
    scheduler = diffusers(scheduler_name, **config)
    scheduler.set_timesteps(10)
    twice = scheduler_name == "HeunDiscreteScheduler"  # its two evaluations per step are two calls of `step`
    # both ends of a step stand in its list twice, and the last node, which `set_timesteps` makes 0, is ours
    scheduler.sigmas = torch.cat([sigmas[:1], sigmas[1:].repeat_interleave(2)]) if twice else sigmas
    calls = len(sigmas) - 1 + twice * (len(sigmas) - 1)
    scheduler.timesteps = torch.arange(calls).flip(0).float()
    scheduler.set_begin_index(0)
    scaled = scheduler_name not in ("EulerDiscreteScheduler", "HeunDiscreteScheduler")
    x = sigmas[0] * start
    sample = x / torch.sqrt(1 + sigmas[0] ** 2) if scaled else x
    for call, timestep in enumerate(scheduler.timesteps):
        at = scheduler.sigmas[call]
        state = sample * torch.sqrt(1 + at**2) if scaled else sample
        noise = (state - mixture.denoiser([])(state.double(), at.expand(len(state)))) / at
        sample = scheduler.step(noise, timestep, sample).prev_sample
    expected = sample * torch.sqrt(1 + sigmas[-1] ** 2) if scaled else sample
    found = integrate(mixture.denoiser([]), solver, x, sigmas)
    assert (found - expected).norm() < 1e-5 * expected.norm()
