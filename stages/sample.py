"""Stage sample@SAMPLER: images of the test noise by one sampler, in one archive."""

from pathlib import Path

import torch
from torch import Tensor

from backends import Backend, Digits, Spec, counted_denoiser
from solvers import AFS, SOLVERS, Solver, integrate, load_predictor
from stages.command import command, progress
from stages.files import BACKBONE, SAMPLES, reading, sha256, write_tensors
from stages.grid import grid
from stages.noise import batches, fresh_noise, noise, prompts
from stages.params import Classical, Distill, Learned, Sample, Sampler, classical_nodes, serial_evaluations


def sample(
    sampler: str,
    *,
    seed: int,
    num_steps: int,
    afs: bool,
    guidance_scale: float,
    distill: Distill,
    samplers: dict[str, Sampler],
    sample: Sample,
) -> None:
    """Write the final states (n, C, H, W), and what they cost. SAMPLER is one of params.yaml's samplers."""
    with reading(BACKBONE):
        backend = Digits.load(BACKBONE / "unet.safetensors")
    match samplers[sampler]:
        case Classical() as classical:
            serial = serial_evaluations(num_steps, afs, distill)
            solver, sigmas = classical_solver(classical, serial, backend.spec)
        case Learned(model=model):
            with reading(Path(model)) as folder:
                revision = sha256(BACKBONE / "unet.safetensors")
                solver = load_predictor(folder, revision=revision, guidance_scale=guidance_scale)
            sigmas = solver.sigmas
    states, depths, rows = [], set[int](), 0
    for batch in progress(batches(sample.images, sample.batch_size), f"sample {sampler}", "batch"):
        x, batch_serial, batch_rows = run(backend, solver, sigmas, guidance_scale, seed, "test", batch)
        states.append(x)
        depths.add(batch_serial)
        rows += batch_rows
    (depth,) = depths
    cost = {"serial_evaluations": depth, "total_evaluations": rows / sample.images}
    write_tensors(SAMPLES / f"{sampler}.safetensors", {"states": torch.cat(states)}, cost)


@torch.no_grad()
def run(
    backend: Backend, solver: Solver, sigmas: Tensor, guidance_scale: float, seed: int, split: str, samples: range
) -> tuple[Tensor, int, int]:
    """Final states (B, C, H, W) of the given samples, the serial evaluations, and the network's rows of all images."""
    denoise, counter = counted_denoiser(backend, prompts(samples), guidance_scale)
    start = sigmas[0] * noise(seed, split, samples, backend.spec.shape)
    fresh = fresh_noise(seed, split, samples, backend.spec.shape)
    return integrate(denoise, solver, start, sigmas, fresh), counter.depth, counter.rows


def classical_solver(sampler: Classical, serial: int, spec: Spec) -> tuple[Solver, Tensor]:
    """A classical solver and its grid; without num_steps of its own, of so many serial evaluations."""
    found = classical_nodes(sampler, serial)
    if found is None:
        raise ValueError(f"serial: {serial}; valid: a number of evaluations that {sampler.solver} can make")
    num_steps, afs = found
    solver = SOLVERS[sampler.solver]
    return AFS(solver) if afs else solver, grid(sampler.schedule, num_steps, spec)


if __name__ == "__main__":
    command(sample)
