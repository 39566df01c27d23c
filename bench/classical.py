"""Which schedule suits each classical solver, with and without AFS, on validation noise.

The samplers of conf/config.yaml take the best of the first three schedules.
Run after `make run`:  python bench/classical.py > bench/classical.md
"""

import itertools

import torch

from backends import Digits
from solvers import SOLVERS
from stages.files import BACKBONE
from stages.grid import grid
from stages.params import Classical, LogSNR, ParamsError, Polynomial, TimeUniform, load_params
from stages.sample import classical_solver, run

SCHEDULES = {
    "polynomial 7": Polynomial(name="polynomial", rho=7.0),
    "logsnr": LogSNR(name="logsnr"),
    "time_uniform 1": TimeUniform(name="time_uniform", rho=1.0),
    "time_uniform 2": TimeUniform(name="time_uniform", rho=2.0),
}
SAMPLES = range(1024)


def main() -> None:
    params = load_params()
    backend = Digits.load(BACKBONE / "unet.safetensors")
    fine = grid(SCHEDULES["time_uniform 2"], 33, backend.spec)
    reference, _, _ = run(backend, SOLVERS["heun"], fine, params.guidance_scale, params.seed, "validation", SAMPLES)
    print(
        f"RMSE to Heun with 64 evaluations (time_uniform 2) on {len(SAMPLES)} validation samples, ± half a 95 % interval.\n"
        f"Every sampler makes the serial evaluations of the learned table of num_steps {params.num_steps}, afs {params.afs}.\n"
    )
    print("| solver | AFS | " + " | ".join(SCHEDULES) + " |\n|---|---|" + "---|" * len(SCHEDULES))
    for solver, afs in itertools.product(SOLVERS, (False, True)):
        cells = []
        for schedule in SCHEDULES.values():
            sampler = Classical.model_validate(
                {"solver": solver, "model": "models/backbone", "schedule": schedule, "afs": afs, "num_steps": None}
            )
            try:
                made, sigmas = classical_solver(solver, sampler, params.num_steps, params.afs, backend.spec)
            except ParamsError:
                cells.append("–")  # no grid makes that number of evaluations
                continue
            x, _, _ = run(backend, made, sigmas, params.guidance_scale, params.seed, "validation", SAMPLES)
            squared = (x - reference).square().flatten(1).mean(1)
            rmse = squared.mean().sqrt()
            half = 1.96 * squared.std() / len(squared) ** 0.5 / (2 * rmse)  # delta method
            cells.append(f"{rmse:.4f} ± {half:.4f}")
        if set(cells) != {"–"}:
            print(f"| {solver} | {'yes' if afs else 'no'} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
