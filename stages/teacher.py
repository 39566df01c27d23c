"""Stage teacher: trajectories of a fine classical solver, once, for the table to be distilled from."""

from collections.abc import Sequence

import torch
from torch import Tensor

from solvers import SOLVERS, Solver, trajectory
from stages.checkpoint import Work
from stages.command import command
from stages.files import TEACHER, write_tensors
from stages.frozen import RECORD, Frozen, load_frozen
from stages.grid import grid
from stages.noise import noise
from stages.params import Compute, Schedule, Teacher
from stages.parts import by_parts, forget
from stages.ranks import Ranks


def teacher(
    *, seed: int, num_steps: int, guidance_scale: float, compute: Compute, schedule: Schedule, teacher: Teacher
) -> None:
    """Store the states at the student's num_steps nodes, (samples, num_steps, ...), of training and validation noise.

    The teacher's grid is the student's schedule with extra nodes inside each interval; it takes no analytical first step. Under
    torchrun the ranks split the samples.
    """
    ranks, counts = Ranks(), {"train": teacher.train, "validation": teacher.validation}
    frozen = load_frozen(guidance_scale, compute, {split: range(count) for split, count in counts.items()})
    every = teacher.extra_nodes + 1
    sigmas = grid(schedule, every * (num_steps - 1) + 1, frozen.backend.spec)
    solver, tensors = SOLVERS[teacher.solver], {"sigmas": sigmas[::every].clone()}
    params = {"seed": seed, "num_steps": num_steps, "guidance_scale": guidance_scale, "schedule": schedule, "teacher": teacher}
    work = Work(params, [RECORD], {"batch_size"})
    for split, count in counts.items():

        def states(batch: range, split: str = split) -> dict[str, Tensor]:
            return {"states": run(frozen, guidance_scale, solver, sigmas, seed, split, batch)[:, ::every]}

        rows = by_parts(f"teacher-{split}", work, ranks, count, teacher.batch_size, states)
        tensors[split] = rows["states"] if rows is not None else torch.empty(0)
    if ranks.first:
        description = {
            "guidance_scale": guidance_scale,
            "schedule": schedule.model_dump(),
            **teacher.model_dump(exclude={"batch_size"}),
        }
        write_tensors(TEACHER, tensors, description)
        for split in counts:
            forget(f"teacher-{split}")
    ranks.close()


@torch.no_grad()
def run(
    frozen: Frozen, guidance_scale: float, solver: Solver, sigmas: Tensor, seed: int, split: str, samples: Sequence[int]
) -> Tensor:
    """States of the given samples at every node, (B, num_steps, ...)."""
    spec = frozen.backend.spec
    denoise, _ = frozen.denoiser(split, samples, guidance_scale)
    start = spec.state(sigmas[0] * noise(seed, split, samples, spec.shape))
    return torch.stack([x.cpu() for x in trajectory(denoise, solver, start, sigmas)], 1)


if __name__ == "__main__":
    command(teacher, has_ranks=True)
