"""Parallel in time: ParaDiGMS and ParaSolver on the digits backbone, against one step after the other.

Run after `make run`, about five minutes:  python bench/parallel.py > bench/parallel.md
"""

import sys
from pathlib import Path

# or bench/solvers.py would hide the package
sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

import datetime
import platform
import time

import torch
from torch import Tensor

from metrics.extractors import judge
from metrics.frechet import lowest
from solvers import SOLVERS, integrate, parallel_integrate, time_uniform
from solvers.parallel import Init
from stages.files import BACKBONE
from stages.frozen import Frozen, load_frozen
from stages.noise import batches, fresh_noise, noise
from stages.params import load_params
from stages.statistics import half_interval

SEED, SAMPLES, BATCH = 0, 128, 32
RUNS = [  # solver, steps, tolerances; the grid is that of the variance-preserving process, uniform in time
    ("ddpm", 1000, (0.5, 0.1)),
    ("euler", 100, (0.1, 0.01)),
    ("dpm_solver_pp_2m", 100, (0.1, 0.01)),
]
WINDOW = 100


INTRODUCTION = f"""\
`python bench/parallel.py`; one thread of {platform.machine()}, torch {torch.__version__}, no GPU, {datetime.date.today()}.

{SAMPLES} images of validation noise in batches of {BATCH}, window {WINDOW}, time_uniform 1. sweeps, serial and total
evaluations: means over the batches (a batch moves on with its slowest image), ± their standard deviation. RMSE: to the
sequential images, on the same noise, of states in [-1, 1]. FD: Frechet distance to them in the judge's features, ± half a 95 %
interval. seconds: of all images, on a CPU, where a larger batch is no faster per image: what is gained is
serial evaluations.

| solver | steps | method | tolerance | sweeps | serial | total | RMSE | FD | seconds |
|---|---|---|---|---|---|---|---|---|---|"""
METHODS: dict[str, Init] = {"ParaDiGMS": "copy", "ParaSolver": "x0"}


def main() -> None:
    frozen = load_frozen(1.0, load_params().compute, {})
    backend = frozen.backend
    extractor = judge(BACKBONE / "judge.safetensors")
    print(INTRODUCTION)
    for name, steps, tolerances in RUNS:
        sigmas = time_uniform(steps + 1, backend.spec.sigma_min, backend.spec.sigma_max)
        started = time.perf_counter()
        expected = torch.cat([sequential(frozen, name, sigmas, part) for part in batches(SAMPLES, BATCH)])
        seconds = time.perf_counter() - started
        print(f"| {name} | {steps} | sequential | | | {steps} | {steps} | 0 | 0 | {seconds:.0f} |", flush=True)
        features = extractor(backend.decode(expected))
        for tolerance in tolerances:
            for method, init in METHODS.items():
                started = time.perf_counter()
                found, taken = [], []
                for part in batches(SAMPLES, BATCH):
                    x, denoise, fresh = start_of(frozen, sigmas, part)
                    x, statistics_of = parallel_integrate(
                        denoise, SOLVERS[name], x, sigmas, WINDOW, tolerance, init, noise=fresh
                    )
                    found.append(x)
                    taken.append([statistics_of.iterations, statistics_of.serial_evaluations, statistics_of.total_evaluations])
                seconds = time.perf_counter() - started
                states = torch.cat(found)
                own = extractor(backend.decode(states))
                cost = torch.tensor(taken, dtype=torch.float64)
                cells = [f"{m:.1f} ± {s:.1f}" for m, s in zip(cost.mean(0).tolist(), cost.std(0).tolist(), strict=True)]
                rmse = (states - expected).square().mean().sqrt().item()
                frechet = lowest(own, features)
                fd = f"{frechet.value:.4f} ± {half_interval(frechet.influence):.4f}"
                cells = [name, str(steps), method, f"{tolerance:g}", *cells, f"{rmse:.4f}", fd, f"{seconds:.0f}"]
                print("| " + " | ".join(cells) + " |", flush=True)


def start_of(frozen: Frozen, sigmas: Tensor, samples: range):
    """State, denoiser and the steps' noise of some samples."""
    shape = frozen.backend.spec.shape
    start = sigmas[0] * noise(SEED, "validation", samples, shape)
    return start, frozen.denoiser("validation", samples, 1.0)[0], fresh_noise(SEED, "validation", samples, shape)


def sequential(frozen: Frozen, name: str, sigmas: Tensor, samples: range) -> Tensor:
    x, denoise, fresh = start_of(frozen, sigmas, samples)
    return integrate(denoise, SOLVERS[name], x, sigmas, fresh)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    main()
