"""Stage refs: the statistics that Frechet distances are measured from, and what images that no network has seen score."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

from metrics.frechet import (
    Statistics,
    load_statistics,
    lowest,
    require_images,
    save_statistics,
    statistics,
)
from stages.checkpoint import Work
from stages.command import command
from stages.files import BACKBONE, METRICS, REFS, RESULTS, InputError, atomic, read_tensors, reading, sha256, write_json
from stages.frozen import DATA, RECORD, load_frozen, loading
from stages.imagesets import ImageSet, batches, digest, image_set, rule
from stages.params import Classical, Compute, OtherImages, RealImages, Refs, Sampler
from stages.parts import by_parts, forget
from stages.ranks import Ranks
from stages.sampling import Run, classical_solver
from stages.scorers import WATCHED, Scorers, Scores, load_scorers
from stages.statistics import mean_error

FIRST = 2**39
"""Of the samples of training noise that reference images are made of: nothing is ever learned from so late a one."""

PART = 1024
"""Real images whose features are kept at a time: a run that is killed goes on after the last."""


@dataclass(frozen=True)
class Reference:
    """What distances are measured from.

    Attributes:
        statistics: of its features.
        features: (n, F), where they are known.
        record: which images these are.
        held_out: scores of other images, (n,) each, and their `features`, if there are any.
    """

    statistics: Statistics
    features: Tensor | None
    record: dict[str, Any]
    held_out: Scores


def refs(*, seed: int, guidance_scale: float, compute: Compute, samplers: dict[str, Sampler], refs: Refs) -> None:
    """Mean and covariance of the features of reference images, as npz (mu, sigma) in EDM's format.

    These are real images, of the digits, a zip, a folder or a data set, whose statistics may be those of a file, too; or the
    model's own, by the sampler `reference`, of noise that nothing else has. Others that no network has seen are scored as a
    sampler's images are: what a perfect sampler would get. Under torchrun the ranks split the samples.
    """
    ranks, scorers = Ranks(), load_scorers(compute)
    match refs:
        case RealImages():
            found = digits(scorers) if ranks.first else None  # no work that would be worth splitting
        case OtherImages(source="reference", images=int(count)):
            found = own(seed, guidance_scale, compute, samplers["reference"], refs, count, scorers, ranks)
        case OtherImages(source="statistics", path=str(path)):
            found = foreign(Path(path), refs, scorers) if ranks.first else None
        case OtherImages(source="zip" | "folder" | "dataset" as kind, path=str(path)):
            images = image_set(kind, path, refs.size, refs.revision, refs.split, refs.column, refs.images)
            found = real(images, refs, scorers, ranks)
        case _:
            raise InputError(f"refs: found {refs}; valid: as conf/ explains")
    if found is not None:
        write(found, scorers)
        forget("refs")
    ranks.close()


def digits(scorers: Scorers) -> Reference:
    """The training digits, and the held-out ones."""
    with reading(BACKBONE):
        data, _ = read_tensors(BACKBONE / DATA)
        train, held_out = (
            scorers.scores(data[f"{split}_images"], [str(label) for label in data[f"{split}_labels"].tolist()])
            for split in ("train", "held_out")
        )
    record = {"source": "the training digits", "images": len(train["features"])}
    return Reference(statistics(train["features"]), train["features"], record, held_out)


def own(
    seed: int,
    guidance_scale: float,
    compute: Compute,
    reference: Sampler,
    refs: OtherImages,
    count: int,
    scorers: Scorers,
    ranks: Ranks,
) -> Reference | None:
    """So many images, and as many others; None on all ranks but the first."""
    if not isinstance(reference, Classical):
        raise InputError(f"samplers.reference.solver: found {reference.solver!r}; valid: a classical solver")
    enough(count, scorers)
    scorers.load()
    samples = range(FIRST, FIRST + 2 * count)
    frozen = load_frozen(guidance_scale, compute, {"train": samples})
    run = Run(*classical_solver(reference, 0, frozen.backend.spec), guidance_scale, seed)

    @torch.no_grad()
    def scores(batch: range) -> Scores:
        chosen = [samples[position] for position in batch]
        images = frozen.backend.decode(run.states(frozen, "train", chosen)["states"])
        return scorers.scores(images, frozen.prompts("train", chosen))

    params = {"seed": seed, "guidance_scale": guidance_scale, "reference": reference, "refs": refs}
    rows = by_parts("refs", Work(params, [RECORD, METRICS], {"batch_size"}), ranks, len(samples), refs.batch_size, scores)
    if rows is None:
        return None
    features = rows["features"][:count]
    record = {"source": "the model's own images, by the sampler reference", "images": count}
    return Reference(statistics(features), features, record, {name: values[count:] for name, values in rows.items()})


def real(images: ImageSet, refs: OtherImages, scorers: Scorers, ranks: Ranks) -> Reference | None:
    """Real images, which have no prompts: of the scores only the watched ones; None on all ranks but the first."""
    enough(len(images), scorers)
    with loading():
        scorers.extractor.load()  # of real images, nothing else is asked
    found = digest(images)
    checked(found, refs)

    @torch.no_grad()
    def scores(part: range) -> Scores:
        rows = list[Scores]()
        for batch in batches(images, refs.batch_size, torch.cuda.is_available(), part):
            watched = {name: score(batch.double() / 255, [""] * len(batch)) for name, score in WATCHED.items()}
            rows.append({**watched, "features": scorers.features(batch)})
        return {name: torch.cat([each[name] for each in rows]) for name in rows[0]}

    work = Work({"refs": refs, "digest": found}, [METRICS], {"batch_size"})
    rows = by_parts("refs", work, ranks, len(images), PART, scores)
    if rows is None:
        return None
    features = rows.pop("features")
    record = {"source": refs.source, "path": refs.path, "images": len(images), "cut": rule(refs.size), "sha256": found}
    return Reference(statistics(features), features, record, rows)


def foreign(file: Path, refs: OtherImages, scorers: Scorers) -> Reference:
    """Statistics that others made, of so many images."""
    with loading():
        found = load_statistics(file, scorers.extractor.width)
    checked(sha256(file), refs)
    record = {"source": "statistics", "path": str(file), "images": refs.images, "sha256": sha256(file)}
    return Reference(found, None, record, {})


def checked(found: str, refs: OtherImages) -> None:
    """Raise InputError unless real images or statistics are those that were asked for; tell which they are."""
    if refs.sha256 not in (None, found):
        raise InputError(f"refs.sha256: found {found} for {refs.path}; valid: {refs.sha256}, as asked for")
    typer.echo(f"{refs.path}: sha256 {found}", err=True)


def enough(count: int, scorers: Scorers) -> None:
    """Raise InputError unless there are enough images for a covariance."""
    try:
        require_images(count, scorers.extractor.width)
    except ValueError as error:
        raise InputError(f"refs: {error}") from error


def write(found: Reference, scorers: Scorers) -> None:
    """The statistics of what was seen, and the means of what was not."""
    record = found.record | {"features": scorers.features_of}
    with atomic(REFS) as temporary:
        save_statistics(temporary, found.statistics, found.features, record)
    scores = dict(found.held_out)
    features = scores.pop("features", None)
    results: dict[str, Any] = {"n": len(next(iter(scores.values()), []))}
    if features is not None:
        frechet = lowest(features, found.statistics)
        results |= {"frechet_distance": frechet.value, "frechet_distance_se": mean_error(frechet.influence)}
    for name, values in scores.items():
        results |= {name: values.mean().item(), f"{name}_se": mean_error(values)}
    # real images have no prompts, so that no metric has scored them
    records = [known.plain() for known in scorers.records if known.name in scores]
    write_json(RESULTS / "held_out.json", {**results, "protocol": [record], "metrics": records})


if __name__ == "__main__":
    command(refs, has_ranks=True)
