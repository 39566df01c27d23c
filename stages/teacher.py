"""Stage teacher: trajectories of a fine classical solver, once, for the table to be distilled from."""

import torch
from torch import Tensor

from backends import Backend, Digits, counted_denoiser
from solvers import SOLVERS, Solver, trajectory
from stages.command import command, progress
from stages.files import BACKBONE, TEACHER, reading, write_tensors
from stages.grid import grid
from stages.noise import batches, noise, prompts
from stages.params import Schedule, Teacher


def teacher(*, seed: int, num_steps: int, guidance_scale: float, schedule: Schedule, teacher: Teacher) -> None:
    """Store the states at the student's num_steps nodes, (samples, num_steps, C, H, W), of training and validation noise.

    The teacher's grid is the student's schedule with extra nodes inside each interval; it takes no analytical first step.
    """
    with reading(BACKBONE):
        backend = Digits.load(BACKBONE / "unet.safetensors")
    every = teacher.extra_nodes + 1
    sigmas = grid(schedule, every * (num_steps - 1) + 1, backend.spec)
    solver = SOLVERS[teacher.solver]
    tensors = {"sigmas": sigmas[::every].clone()}
    for split, samples in (("train", teacher.train), ("validation", teacher.validation)):
        stored = []
        for batch in progress(batches(samples, teacher.batch_size), f"teacher {split}", "batch"):
            states = run(backend, guidance_scale, solver, sigmas, seed, split, batch)
            stored.append(states[:, ::every])
        tensors[split] = torch.cat(stored)
    description = {"guidance_scale": guidance_scale, "schedule": schedule.model_dump(), **teacher.model_dump()}
    write_tensors(TEACHER, tensors, description)


@torch.no_grad()
def run(
    backend: Backend, guidance_scale: float, solver: Solver, sigmas: Tensor, seed: int, split: str, samples: range
) -> Tensor:
    """States of the given samples at every node, (B, num_steps, C, H, W)."""
    denoise, _ = counted_denoiser(backend, prompts(samples), guidance_scale)
    start = sigmas[0] * noise(seed, split, samples, backend.spec.shape)
    return torch.stack(list(trajectory(denoise, solver, start, sigmas)), 1)


if __name__ == "__main__":
    command(teacher)
