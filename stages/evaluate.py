"""Stage evaluate@SAMPLER: what the images of one sampler are worth, per image and on the whole, with uncertainties."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from pyarrow import parquet
from torch import Tensor

from metrics.extractors import INCEPTION
from metrics.frechet import (
    TOOL,
    Lowest,
    kernel_distance,
    label,
    load_features,
    load_record,
    load_statistics,
    lowest,
    precision_recall,
    require_images,
)
from stages.checkpoint import Work
from stages.command import command
from stages.files import (
    BACKBONE,
    METRICS,
    REFS,
    RESULTS,
    SAMPLES,
    SCORES,
    InputError,
    atomic,
    read_tensors,
    reading,
    require,
    sha256,
    write_json,
    write_tensors,
)
from stages.frozen import PROMPTS, RECORD, load_decoder
from stages.params import Compute, Evaluate
from stages.parts import by_parts, forget
from stages.prompts import Prompts
from stages.ranks import Ranks
from stages.scorers import Scorers, Scores, load_scorers
from stages.seeds import shown_seeds
from stages.statistics import mean_error


@dataclass(frozen=True)
class Archive:
    """What a sampler made: final states (n, ...), of which samples (n,), and what they cost."""

    states: Tensor
    samples: list[int]
    cost: dict[str, float]


def evaluate(sampler: str, *, compute: Compute, evaluate: Evaluate) -> None:
    """Score the archive of SAMPLER against the reference images and, on the same noise, against the reference's archive.

    Under torchrun the ranks split the images.
    """
    ranks, name = Ranks(), f"evaluate@{sampler}"
    files = [SAMPLES / f"{each}.safetensors" for each in (sampler, "reference")]
    mine = archive(files[0])
    others = archive(files[1], mine.samples)
    with reading(BACKBONE):
        wanted = Prompts.load(PROMPTS)("test", mine.samples)
    decode, scorers = load_decoder(compute), load_scorers(compute)
    with reading(REFS):
        load_statistics(REFS, scorers.extractor.width)
        require(REFS, "features of", load_record(REFS).get("features"), scorers.features_of)
    if len(mine.samples) % evaluate.ranges:
        raise InputError(f"evaluate.ranges: found {evaluate.ranges} for {len(mine.samples)} images; valid: what divides them")
    try:
        require_images(len(mine.samples) // evaluate.ranges, scorers.extractor.width)
    except ValueError as error:
        raise InputError(f"sample.seeds: {error}") from error

    @torch.no_grad()
    def scored(batch: range) -> Scores:
        scorers.load()
        rows = slice(batch.start, batch.stop)
        found = scorers.scores(decode(mine.states[rows]), wanted[rows])
        squared_error = (mine.states[rows] - others.states[rows]).square().flatten(1).mean(1)
        return {**found, "squared_error": squared_error, "reference_features": scorers.features(decode(others.states[rows]))}

    scores = by_parts(name, Work({}, [RECORD, METRICS, *files]), ranks, len(wanted), evaluate.batch_size, scored)
    if scores is not None:
        with reading(REFS):
            refs, kept, reference = load_statistics(REFS), load_features(REFS), load_record(REFS)
        features = scores.pop("features")
        frechet = lowest(features, refs, evaluate.ranges)
        moved = {"frechet_distance": frechet, "distance_to_reference": lowest(features, scores.pop("reference_features"))}
        rows = scores | {f"{key}_influence": found.influence for key, found in moved.items()}
        write_scores(SCORES / f"{sampler}.parquet", mine.samples, wanted, rows)
        with torch.no_grad():
            pictures = (decode(mine.states[: evaluate.pictures]).float() * 255).round().to(torch.uint8).cpu()
        write_tensors(SCORES / f"{sampler}.safetensors", {"pictures": pictures})
        results = summary(scores, moved) | (of_features(features, kept) if kept is not None else {})
        ordered = {"n": len(wanted), **mine.cost, **dict(sorted(results.items()))}
        protocol = record(scorers, frechet, mine.samples, reference)
        write_json(
            RESULTS / f"{sampler}.json",
            {**ordered, "protocol": [protocol], "metrics": [known.plain() for known in scorers.records]},
        )
        forget(name)
    ranks.close()


def summary(scores: Scores, distances: Mapping[str, Lowest]) -> dict[str, float]:
    """Means and distances, each with its standard error ("_se")."""
    rmse = scores["squared_error"].mean().sqrt().item()
    results = {"rmse": rmse, "rmse_se": mean_error(scores["squared_error"]) / (2 * rmse) if rmse else 0.0}
    for name, found in distances.items():
        results |= {name: found.value, f"{name}_se": mean_error(found.influence)}
    for name in scores.keys() - {"squared_error"}:
        results |= {name: scores[name].mean().item(), f"{name}_se": mean_error(scores[name])}
    return results


def of_features(features: Tensor, reference: Tensor) -> dict[str, float]:
    """What takes the reference's features, not only their statistics."""
    kernel, error = kernel_distance(features, reference)
    return {"kernel_distance": kernel, "kernel_distance_se": error, **precision_recall(features, reference)}


def record(scorers: Scorers, found: Lowest, samples: list[int], reference: dict[str, Any]) -> dict[str, Any]:
    """How the distances of distributions were measured."""
    extractor, each = scorers.extractor, len(samples) // len(found.each)
    return {
        "name": "frechet_distance",
        "label": label("FID" if extractor.name == INCEPTION else "FD", each),
        "tool": TOOL,
        **scorers.features_of,
        "resize": extractor.resize,
        "n": each,
        "seeds": shown_seeds(samples),
        "ranges": len(found.each),
        "distances": found.each,
        "reference": {**{k: v for k, v in reference.items() if k != "features"}, "statistics_sha256": sha256(REFS)},
    }


def write_scores(file: Path, samples: list[int], prompts: list[str], scores: Scores) -> None:
    """A row for each prompt: its sample, and its image's scores."""
    columns = {name: scores[name].numpy() for name in sorted(scores)}
    with atomic(file) as temporary:
        parquet.write_table(pa.table({"sample": samples, "prompt": prompts, **columns}), temporary)


def archive(path: Path, samples: list[int] | None = None) -> Archive:
    """What a sampler made; of the samples given, if some are."""
    with reading(path):
        tensors, cost = read_tensors(path)
        states, found = tensors["states"], tensors["samples"].tolist()
        require(path, "states", len(states), len(found))
        if samples is not None:
            require(path, "samples", found, samples)
        return Archive(states, found, {key: cost[key] for key in ("serial_evaluations", "total_evaluations")})


if __name__ == "__main__":
    command(evaluate, has_ranks=True)
