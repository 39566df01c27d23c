"""Stage sample@SAMPLER: images of the test noise by one sampler, in one archive."""

from pathlib import Path

import torch
from torch import Tensor

from backends import Backend, Digits, Spec, counted_denoiser
from solvers import AFS, EPD, SOLVERS, Solver, depth, integrate, load_predictor
from stages.command import command, progress
from stages.files import BACKBONE, SAMPLES, reading, require, sha256, write_tensors
from stages.grid import grid
from stages.noise import batches, noise, prompts
from stages.params import Classical, Learned, ParamsError, Sample, Sampler


def sample(
    sampler: str,
    *,
    seed: int,
    num_steps: int,
    afs: bool,
    guidance_scale: float,
    samplers: dict[str, Sampler],
    sample: Sample,
) -> None:
    """Write the final states (n, C, H, W), and what they cost. SAMPLER is one of params.yaml's samplers."""
    with reading(BACKBONE):
        backend = Digits.load(BACKBONE / "unet.safetensors")
    match samplers[sampler]:
        case Classical() as classical:
            solver, sigmas = classical_solver(sampler, classical, num_steps, afs, backend.spec)
        case Learned(model=model):
            with reading(Path(model)) as folder:
                solver = load_predictor(folder)
                require(folder, "guidance_scale", solver.guidance_scale, guidance_scale)
                require(folder, "backbone", solver.backbone["sha256"], sha256(BACKBONE / "unet.safetensors"))
            sigmas = solver.sigmas
    states, serial, rows = [], set[int](), 0
    for batch in progress(batches(sample.images, sample.batch_size), f"sample {sampler}", "batch"):
        x, batch_serial, batch_rows = run(backend, solver, sigmas, guidance_scale, seed, "test", batch)
        states.append(x)
        serial.add(batch_serial)
        rows += batch_rows
    (serial_evaluations,) = serial
    cost = {"serial_evaluations": serial_evaluations, "total_evaluations": rows / sample.images}
    write_tensors(SAMPLES / f"{sampler}.safetensors", {"states": torch.cat(states)}, cost)


@torch.no_grad()
def run(
    backend: Backend, solver: Solver, sigmas: Tensor, guidance_scale: float, seed: int, split: str, samples: range
) -> tuple[Tensor, int, int]:
    """Final states (B, C, H, W) of the given samples, the serial evaluations, and the network's rows of all images."""
    denoise, counter = counted_denoiser(backend, prompts(samples), guidance_scale)
    start = sigmas[0] * noise(seed, split, samples, backend.spec.shape)
    return integrate(denoise, solver, start, sigmas), counter.depth, counter.rows


def classical_solver(name: str, sampler: Classical, num_steps: int, afs: bool, spec: Spec) -> tuple[Solver, Tensor]:
    """A classical solver and its grid; without num_steps of its own, with as many serial evaluations as the learned table."""
    solver = AFS(SOLVERS[sampler.solver]) if sampler.afs else SOLVERS[sampler.solver]
    if sampler.num_steps is not None:
        return solver, grid(sampler.schedule, sampler.num_steps, spec)
    student = EPD(num_steps, num_points=1, scale_dir=0.0, scale_time=0.0)
    budget = depth(AFS(student) if afs else student, grid(sampler.schedule, num_steps, spec))
    for nodes in range(2, budget + 3):
        sigmas = grid(sampler.schedule, nodes, spec)
        if depth(solver, sigmas) == budget:
            return solver, sigmas
    raise ParamsError(
        f"samplers.{name}: no num_steps gives {sampler.solver} with afs: {sampler.afs} the learned table's {budget} serial "
        f"evaluations; valid: afs: {not sampler.afs}, or a num_steps of its own"
    )


if __name__ == "__main__":
    command(sample)
