"""Images of given samples by any solver: what the stages that sample have in common."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backends import Spec
from solvers import AFS, SOLVERS, Solver, integrate
from stages.frozen import Frozen
from stages.grid import grid
from stages.noise import fresh_noise, noise
from stages.params import Classical, classical_nodes


@dataclass(frozen=True)
class Run:
    """A solver on its grid, with the guidance scale and the seed of the noise."""

    solver: Solver
    sigmas: Tensor
    guidance_scale: float
    seed: int

    @torch.no_grad()
    def states(self, frozen: Frozen, split: str, samples: Sequence[int]) -> dict[str, Tensor]:
        """Of each of B samples the final state (B, ...), and its cost, float64 (B,): serial evaluations, and network rows."""
        spec = frozen.backend.spec
        denoise, counter = frozen.denoiser(split, samples, self.guidance_scale)
        start = spec.state(self.sigmas[0] * noise(self.seed, split, samples, spec.shape))
        fresh = fresh_noise(self.seed, split, samples, spec.shape)
        x = integrate(denoise, self.solver, start, self.sigmas, lambda step: spec.state(fresh(step)))
        each = torch.ones(len(samples), dtype=torch.float64)
        return {"states": x, "serial": each * counter.depth, "total": each * counter.rows / len(samples)}


def cost(rows: dict[str, Tensor]) -> dict[str, float]:
    """Serial and total evaluations per image, of what `Run.states` gave."""
    (serial,) = set(rows["serial"].tolist())
    return {"serial_evaluations": int(serial), "total_evaluations": rows["total"].mean().item()}


def classical_solver(sampler: Classical, serial: int, spec: Spec) -> tuple[Solver, Tensor]:
    """A classical solver and its grid; without num_steps of its own, of so many serial evaluations."""
    found = classical_nodes(sampler, serial)
    if found is None:
        raise ValueError(f"serial: {serial}; valid: a number of evaluations that {sampler.solver} can make")
    num_steps, afs = found
    solver = SOLVERS[sampler.solver]
    return AFS(solver) if afs else solver, grid(sampler.schedule, num_steps, spec)
