"""Stage sample@SAMPLER: images of the test noise by one sampler, in one archive."""

from pathlib import Path

import torch
from torch import Tensor

from solvers import load_predictor
from stages.checkpoint import Work
from stages.command import command
from stages.files import SAMPLES, reading, write_tensors
from stages.frozen import RECORD, load_frozen
from stages.params import Classical, Compute, Distill, Learned, Sample, Sampler, serial_evaluations
from stages.parts import by_parts, forget
from stages.ranks import Ranks
from stages.sampling import Run, classical_solver, cost
from stages.seeds import parse_seeds


def sample(
    sampler: str,
    *,
    seed: int,
    num_steps: int,
    afs: bool,
    guidance_scale: float,
    compute: Compute,
    distill: Distill,
    samplers: dict[str, Sampler],
    sample: Sample,
) -> None:
    """Write the final states (n, ...), their samples, and what they cost. SAMPLER is one of params.yaml's samplers.

    Under torchrun the ranks split the samples.
    """
    ranks, name, seeds = Ranks(), f"sample@{sampler}", parse_seeds(sample.seeds)
    chosen, inputs = samplers[sampler], [RECORD]
    frozen = load_frozen(guidance_scale, compute, {"test": seeds})
    match chosen:
        case Classical():
            serial = serial_evaluations(num_steps, afs, distill)
            solver, sigmas = classical_solver(chosen, serial, frozen.backend.spec)
        case Learned(model=model):
            with reading(Path(model)) as folder:
                solver = load_predictor(
                    folder,
                    backbone=frozen.identity.name,
                    revision=frozen.identity.revision,
                    guidance_scale=guidance_scale,
                )
                inputs += sorted(folder.iterdir())
            sigmas = solver.sigmas
    run = Run(solver, sigmas, guidance_scale, seed)
    params = {"seed": seed, "guidance_scale": guidance_scale, "sigmas": str(sigmas.tolist())}
    work = Work({**params, "sampler": chosen, "sample": sample}, inputs, {"batch_size"})

    def states(batch: range) -> dict[str, Tensor]:
        return run.states(frozen, "test", [seeds[position] for position in batch])

    rows = by_parts(name, work, ranks, len(seeds), sample.batch_size, states)
    if rows is not None:
        tensors = {"states": rows["states"], "samples": torch.tensor(seeds)}
        write_tensors(SAMPLES / f"{sampler}.safetensors", tensors, cost(rows))
        forget(name)
    ranks.close()


if __name__ == "__main__":
    command(sample, has_ranks=True)
