"""Stage refs: the statistics that Frechet distances are measured from, and what images that no network has seen score."""

import numpy as np
import torch
from torch import Tensor

from metrics.frechet import bootstrap_distances, distance, statistics
from stages.checkpoint import Work
from stages.command import command
from stages.files import BACKBONE, REFS, RESULTS, InputError, atomic, read_tensors, reading, write_json
from stages.frozen import DATA, RECORD, load_frozen
from stages.params import Classical, Compute, Evaluate, OwnImages, RealImages, Refs, Sampler
from stages.parts import by_parts, forget
from stages.ranks import Ranks
from stages.sampling import Run, classical_solver
from stages.scorers import load_scorers
from stages.statistics import mean_error

FIRST = 2**39
"""Of the samples of training noise that reference images are made of: nothing is ever learned from so late a one."""

Scores = dict[str, Tensor]


def refs(
    *, seed: int, guidance_scale: float, compute: Compute, samplers: dict[str, Sampler], refs: Refs, evaluate: Evaluate
) -> None:
    """Mean and covariance of the features of reference images, as npz (mu, sigma) in EDM's format.

    These are real images, or the model's own, by the sampler `reference`, of noise that nothing else has. Others that no
    network has seen are scored as a sampler's images are: what a perfect sampler would get. Under torchrun the ranks split the
    samples.
    """
    ranks = Ranks()
    match refs:
        case RealImages():
            found = real(compute) if ranks.first else None  # no work that would be worth splitting
        case OwnImages():
            found = own(seed, guidance_scale, compute, samplers["reference"], refs, ranks)
    if found is not None:
        write(*found, evaluate)
        forget("refs")
    ranks.close()


def real(compute: Compute) -> tuple[Scores, Scores]:
    """The scores of the training digits, and of the held-out ones."""
    scorers = load_scorers(compute)
    with reading(BACKBONE):
        data, _ = read_tensors(BACKBONE / DATA)
    train, held_out = (
        scorers.scores(data[f"{split}_images"], [str(label) for label in data[f"{split}_labels"].tolist()])
        for split in ("train", "held_out")
    )
    return train, held_out


def own(
    seed: int, guidance_scale: float, compute: Compute, reference: Sampler, refs: OwnImages, ranks: Ranks
) -> tuple[Scores, Scores] | None:
    """The scores of so many images, and of as many others; None on all ranks but the first."""
    if not isinstance(reference, Classical):
        raise InputError(f"samplers.reference.solver: found {reference.solver!r}; valid: a classical solver")
    samples = range(FIRST, FIRST + 2 * refs.images)
    frozen, scorers = load_frozen(guidance_scale, compute, {"train": samples}), load_scorers(compute)
    run = Run(*classical_solver(reference, 0, frozen.backend.spec), guidance_scale, seed)

    def scores(batch: range) -> Scores:
        chosen = [samples[position] for position in batch]
        images = frozen.backend.decode(run.states(frozen, "train", chosen)["states"])
        return scorers.scores(images, frozen.prompts("train", chosen))

    params = {"seed": seed, "guidance_scale": guidance_scale, "reference": reference, "refs": refs}
    rows = by_parts(
        "refs", Work(params, [RECORD], {"batch_size"}), ranks, len(samples), refs.batch_size, torch.no_grad()(scores)
    )
    if rows is None:
        return None
    first, second = ({name: values[half] for name, values in rows.items()} for half in halves(refs.images))
    return first, second


def halves(count: int) -> tuple[slice, slice]:
    """The first so many, and the rest."""
    return slice(0, count), slice(count, None)


def write(seen: Scores, held_out: Scores, evaluate: Evaluate) -> None:
    """The statistics of what was seen, and the means of what was not."""
    found = statistics(seen["features"])
    with atomic(REFS) as temporary, temporary.open("wb") as file:
        np.savez(file, mu=found["mu"], sigma=found["sigma"])
    features = held_out["features"]
    results = {
        "n": len(features),
        "frechet_distance": distance(statistics(features), found),
        "frechet_distance_se": float(bootstrap_distances(features, found, evaluate.bootstrap).std()),
    }
    for name, values in held_out.items():
        if name != "features":
            results |= {name: values.mean().item(), f"{name}_se": mean_error(values)}
    write_json(RESULTS / "held_out.json", results)


if __name__ == "__main__":
    command(refs, has_ranks=True)
