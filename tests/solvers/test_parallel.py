"""Parallel in time: the same result as one step after the other, in fewer serial evaluations."""

import math
from collections import Counter as Tally
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
    Noise,
    Solver,
    StepTable,
    integrate,
    logsnr,
    parallel_integrate,
    polynomial,
    time_uniform,
)  # fmt: skip

STEPS = 12
SIGMAS = polynomial(STEPS + 1, 0.03, 14.0)


def fixed_noise(shape: torch.Size) -> Noise:
    fresh = [torch.randn(shape, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in range(200)]
    return fresh.__getitem__


ALL: dict[str, Solver] = {
    **SOLVERS,
    "afs": AFS(SOLVERS["dpm_solver_pp_3m"]),
    "epd": AFS(EPD(STEPS + 1, 3, scale_dir=0.05, scale_time=0.05).table()),
}


@pytest.mark.parametrize("window", [1, 2, 5, STEPS, 100])
@pytest.mark.parametrize("name", ALL)
def test_tolerance_0_gives_the_sequential_result(name: str, window: int, mixture: Gaussian, start: Tensor) -> None:
    noise = fixed_noise(start.shape)
    expected = integrate(mixture.denoiser([]), ALL[name], 14 * start, SIGMAS, noise)
    for init in ("x0", "copy"):
        found, taken = parallel_integrate(mixture.denoiser([]), ALL[name], 14 * start, SIGMAS, window, 0.0, init, noise=noise)
        assert (found - expected).abs().max() < 1e-10
        assert taken.iterations == len(taken.strides) <= STEPS
        assert sum(taken.strides) == STEPS - (init == "x0")


@pytest.mark.parametrize("name", ["euler", "dpm_solver_pp_2m", "ddpm", "unipc_3", "heun"])
@pytest.mark.parametrize("intervals", [1, 5, 6, 11])
def test_two_levels_give_the_sequential_result(name: str, intervals: int, mixture: Gaussian, start: Tensor) -> None:
    noise = fixed_noise(start.shape)
    expected = integrate(mixture.denoiser([]), SOLVERS[name], 14 * start, SIGMAS, noise)
    for init in ("x0", "copy"):
        found, taken = parallel_integrate(
            mixture.denoiser([]), SOLVERS[name], 14 * start, SIGMAS, 4, 0.0, init, intervals=intervals, noise=noise
        )
        assert (found - expected).abs().max() < 1e-10
        assert taken.iterations <= intervals


@pytest.mark.parametrize("true_steps", [1, 3, STEPS])
def test_true_steps_are_exact_and_counted(true_steps: int, mixture: Gaussian, start: Tensor) -> None:
    expected = integrate(mixture.denoiser([]), SOLVERS["dpm_solver_pp_2m"], 14 * start, SIGMAS)
    counter = Counter(mixture.denoiser([]))
    found, taken = parallel_integrate(counter, SOLVERS["dpm_solver_pp_2m"], 14 * start, SIGMAS, 4, 0.0, true_steps=true_steps)
    assert (found - expected).abs().max() < 1e-10
    assert taken.serial_evaluations == counter.depth == true_steps + taken.iterations
    assert taken.total_evaluations == counter.rows / len(start)
    assert sum(taken.strides) == STEPS - true_steps


@pytest.mark.parametrize("name", ["euler", "dpm_solver_pp_2m", "ddpm"])
def test_many_steps_take_far_fewer_sweeps_from_x0_fewest(name: str, mixture: Gaussian, start: Tensor) -> None:
    """And end near the sequential result: within a few times the tolerance, in units of the last steps' noise."""
    sigmas, noise = time_uniform(201, 0.002, 80.0, rho=2.0), fixed_noise(start.shape)
    expected = integrate(mixture.denoiser([]), SOLVERS[name], 80 * start, sigmas, noise)
    iterations = {}
    for init in ("x0", "copy"):
        found, taken = parallel_integrate(mixture.denoiser([]), SOLVERS[name], 80 * start, sigmas, 50, 0.02, init, noise=noise)
        iterations[init] = taken.iterations
        assert (found - expected).square().mean().sqrt() < 0.03
        assert taken.serial_evaluations == taken.iterations + (init == "x0")
    assert iterations["x0"] < iterations["copy"] < 60


def test_a_smaller_tolerance_is_nearer(mixture: Gaussian, start: Tensor) -> None:
    sigmas = time_uniform(101, 0.002, 80.0, rho=2.0)
    expected = integrate(mixture.denoiser([]), SOLVERS["euler"], 80 * start, sigmas)
    found = [parallel_integrate(mixture.denoiser([]), SOLVERS["euler"], 80 * start, sigmas, 40, t) for t in (1.0, 0.1, 0.01)]
    errors = [(x - expected).square().mean().sqrt().item() for x, _ in found]
    assert errors[0] > errors[1] > errors[2]
    iterations = [taken.iterations for _, taken in found]
    assert iterations[0] <= iterations[1] <= iterations[2]


def test_each_image_must_meet_the_tolerance(mixture: Gaussian, start: Tensor) -> None:
    """A batch moves on with its slowest image: at least as many sweeps as any image alone, and none alone as a hidden mean."""
    sigmas = time_uniform(101, 0.002, 80.0, rho=2.0)
    alone = [
        parallel_integrate(mixture.denoiser([]), SOLVERS["euler"], 80 * x[None], sigmas, 40, 0.05)[1].iterations for x in start
    ]
    together = parallel_integrate(mixture.denoiser([]), SOLVERS["euler"], 80 * start, sigmas, 40, 0.05)[1].iterations
    assert together >= max(alone)
    assert len(set(alone)) > 1


def test_the_noise_of_a_step_is_asked_for_once(mixture: Gaussian, start: Tensor) -> None:
    asked: Tally[int] = Tally()
    noise = fixed_noise(start.shape)

    def counted(step: int) -> Tensor:
        asked[step] += 1
        return noise(step)

    parallel_integrate(mixture.denoiser([]), SOLVERS["ddpm"], 14 * start, SIGMAS, 5, 0.1, noise=counted)
    assert asked == Tally(range(STEPS))


def test_all_intervals_at_once_are_one_batch(mixture: Gaussian, start: Tensor) -> None:
    """Row i has condition i mod B, and every call at most window times the rows of a sequential one."""
    sizes: list[int] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        sizes.append(len(x))
        assert len(sigma) == len(x)
        assert all(len(set(group.tolist())) == 1 for group in sigma.split(len(start)))
        return mixture.denoiser([])(x, sigma)

    parallel_integrate(denoise, SOLVERS["euler"], 14 * start, SIGMAS, 5, 0.0, "copy")
    assert sizes[0] == 5 * len(start)
    assert all(size % len(start) == 0 and size <= 5 * len(start) for size in sizes)


@pytest.mark.parametrize("name", ["euler", "dpm_solver_pp_2m"])
def test_a_grid_that_ends_with_0(name: str, mixture: Gaussian, start: Tensor) -> None:
    """The last interval's ancestral noise is 0 there: no division by it."""
    sigmas = torch.cat([logsnr(20, 0.01, 20.0), torch.zeros(1).double()])
    expected = integrate(mixture.denoiser([]), SOLVERS[name], 20 * start, sigmas)
    found, taken = parallel_integrate(mixture.denoiser([]), SOLVERS[name], 20 * start, sigmas, 8, 0.01)
    assert (found - expected).abs().max() < 0.05
    assert taken.iterations < 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window: 0; valid: 1 or more"),
        ({"tolerance": -0.1}, "tolerance: -0.1; valid: 0 or more, finite"),
        ({"tolerance": math.nan}, "tolerance: nan; valid: 0 or more"),
        ({"init": "noise"}, "init: 'noise'; valid: copy, x0"),
        ({"true_steps": 0}, "true_steps: 0; valid: 1 to 12, the intervals, for init 'x0'"),
        ({"true_steps": 13}, "true_steps: 13; valid: 1 to 12"),
        ({"intervals": 0}, "intervals: 0; valid: 1 to 12"),
        ({"intervals": 13}, "intervals: 13; valid: 1 to 12, the steps of the grid"),
        ({"sigmas": SIGMAS.flip(0)}, "sigmas: .*; valid: positive and strictly decreasing"),
        ({"x": torch.ones(3)}, "x: .*; valid: float32 or float64"),
        ({"solver": SOLVERS["ddpm"]}, "noise: None, and step 0 is ancestral"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str, mixture: Gaussian, start: Tensor) -> None:
    valid = {"solver": SOLVERS["euler"], "x": 14 * start, "sigmas": SIGMAS, "window": 4, "tolerance": 0.1}
    with pytest.raises(ValueError, match=message):
        parallel_integrate(mixture.denoiser([]), **(valid | arguments))


def test_more_history_than_the_step_before_leaves_is_refused_as_in_the_loop(mixture: Gaussian, start: Tensor) -> None:
    def abrupt(step: int, sigmas: Tensor) -> StepTable:
        return SOLVERS["euler" if step < 3 else "ipndm_3"](step, sigmas)

    message = "table: looks back on 2 outputs; valid: at most the 1 that there are"
    with pytest.raises(ValueError, match=message):
        integrate(mixture.denoiser([]), abrupt, 14 * start, SIGMAS)
    with pytest.raises(ValueError, match=message):
        parallel_integrate(mixture.denoiser([]), abrupt, 14 * start, SIGMAS, 4, 0.0)


def test_nan_stops_it(start: Tensor) -> None:
    with pytest.raises(FloatingPointError, match="denoise: returned numbers that are not finite"):
        parallel_integrate(lambda x, sigma: x * math.nan, SOLVERS["euler"], start, SIGMAS, 4, 0.1)
