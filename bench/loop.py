"""What the loop itself costs: integration with a denoiser that does nothing, beside diffusers' schedulers' `step`.

Run:  python bench/loop.py > bench/loop.md
"""

import sys
from pathlib import Path

# or bench/solvers.py would hide the package
sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

import datetime
import platform
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from solvers import SOLVERS, integrate, polynomial

SHAPE, STEPS, REPEATS = (1, 4, 64, 64), 50, 40
SIGMAS = polynomial(STEPS + 1, 0.03, 14.0)


def euler(x: Tensor, zeros: Tensor) -> None:
    """The arithmetic of a step alone: d, and the next state."""
    for sigma, sigma_next in LEVELS:
        x = torch.add(x, (x - zeros) / sigma, alpha=sigma_next - sigma)


def dpm_solver_pp_2m(x: Tensor, zeros: Tensor) -> None:
    """The same for two outputs."""
    for sigma, sigma_next in LEVELS:
        alpha = sigma_next / sigma
        x = (x * alpha).add_(zeros, alpha=1.5 * (1 - alpha)).add_(zeros, alpha=-0.5 * (1 - alpha))


def unipc_3(x: Tensor, zeros: Tensor) -> None:
    """And for a predictor of three outputs and a corrector of four."""
    for sigma, sigma_next in LEVELS:
        alpha = sigma_next / sigma
        for outputs in (3, 4):
            y = x * alpha
            for _ in range(outputs):
                y.add_(zeros, alpha=1 - alpha)
        x = y


LEVELS = list(zip(SIGMAS[:-1].tolist(), SIGMAS[1:].tolist(), strict=True))
CASES: dict[str, tuple[Callable[[Tensor, Tensor], None], str, dict[str, Any]]] = {
    "euler": (euler, "EulerDiscreteScheduler", {}),
    "dpm_solver_pp_2m": (dpm_solver_pp_2m, "DPMSolverMultistepScheduler", {"solver_order": 2}),
    "unipc_3": (unipc_3, "UniPCMultistepScheduler", {"solver_order": 3}),
}


def microseconds(work: Callable[[], object]) -> float:
    """Per step, the least of all repeats."""
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return 1e6 * min(times) / STEPS


def scheduled(name: str, config: dict[str, Any], x: Tensor, zeros: Tensor) -> Callable[[], None]:
    """Sampling with a scheduler of diffusers; only its `step` is called."""
    with warnings.catch_warnings(action="ignore"):
        import diffusers

        diffusers.utils.logging.set_verbosity_error()  # of `scale_model_input`, which belongs to the network's call
        scheduler = getattr(diffusers, name)(**config)

    def work() -> None:
        scheduler.set_timesteps(STEPS)
        scheduler.set_begin_index(0)
        sample = x
        for timestep in scheduler.timesteps:
            sample = scheduler.step(zeros, timestep, sample).prev_sample

    return work


INTRODUCTION = f"""\
`python bench/loop.py`, {datetime.date.today()}; one thread of {platform.machine()}, torch {torch.__version__}, no GPU.

Microseconds per evaluation at {SHAPE}, {STEPS} evaluations, the least of {REPEATS} runs, by a denoiser that returns zeros.
arithmetic: the solver's tensor operations written out by hand. beyond: the loop less that. cold: a first run on a new grid,
whose tables are not made yet. diffusers: the scheduler's `step`, arithmetic included, on float32.

| solver | dtype | arithmetic | loop | beyond | cold | diffusers |
|---|---|---|---|---|---|---|"""


def main() -> None:
    print(INTRODUCTION)
    for name, (arithmetic, scheduler, config) in CASES.items():
        for dtype in (torch.float32, torch.float64):
            x, zeros = torch.randn(SHAPE, dtype=dtype), torch.zeros(SHAPE, dtype=dtype)
            bare = microseconds(lambda arithmetic=arithmetic, x=x, zeros=zeros: arithmetic(x, zeros))
            started = time.perf_counter()
            # a new grid
            integrate(lambda x, sigma, zeros=zeros: zeros, SOLVERS[name], x, SIGMAS + torch.rand(()).item())
            cold = 1e6 * (time.perf_counter() - started) / STEPS
            loop = microseconds(
                lambda name=name, start=x, zeros=zeros: integrate(lambda x, sigma: zeros, SOLVERS[name], start, SIGMAS)
            )
            theirs = microseconds(scheduled(scheduler, config, x, zeros)) if dtype == torch.float32 else None
            cells = [
                f"{bare:.0f}",
                f"{loop:.0f}",
                f"{loop - bare:.0f}",
                f"{cold:.0f}",
                "" if theirs is None else f"{theirs:.0f}",
            ]
            print(f"| {name} | {str(dtype).removeprefix('torch.')} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    main()
