"""Stage evaluate@SAMPLER: what the images of one sampler are worth, per image and on the whole, with uncertainties."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from pyarrow import parquet
from torch import Tensor

from metrics.frechet import (
    TOOL,
    bootstrap_distances,
    distance,
    kernel_distance,
    label,
    load_features,
    load_record,
    load_statistics,
    lowest,
    precision_recall,
    require_images,
    resampled,
    statistics,
)
from stages.checkpoint import Work
from stages.command import command, progress
from stages.files import (
    BACKBONE,
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

NOT_SCORES = {"features", "reference_features"}


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
        return {**found, "squared_error": squared_error, "reference_features": scorers.extractor(decode(others.states[rows]))}

    scores = by_parts(name, Work({}, [RECORD, *files]), ranks, len(wanted), evaluate.batch_size, scored)
    if scores is not None:
        with reading(REFS):
            results, resamples = summary(scores, evaluate, sampler)
            protocol = record(scorers, scores["features"], mine.samples, evaluate)
        with torch.no_grad():
            pictures = (decode(mine.states[: evaluate.pictures]).float() * 255).round().to(torch.uint8).cpu()
        write_scores(SCORES / f"{sampler}.parquet", mine.samples, wanted, scores)
        write_tensors(SCORES / f"{sampler}.safetensors", {**resamples, "pictures": pictures})
        lists = {"protocol": [protocol], "metrics": list(scorers.records)}
        write_json(RESULTS / f"{sampler}.json", {"n": len(wanted), **mine.cost, **results, **lists})
        forget(name)
    ranks.close()


def summary(scores: Scores, evaluate: Evaluate, sampler: str) -> tuple[dict[str, float], Scores]:
    """Distances and means, each with its standard error ("_se"), and the resampled distances and errors, (bootstrap,)."""
    features, other = scores["features"], scores["reference_features"]
    refs, kept = load_statistics(REFS, features.shape[1]), load_features(REFS)
    results, resamples = dict[str, float](), Scores()
    results["frechet_distance"], _ = lowest(features, refs, evaluate.ranges)
    results["distance_to_reference"] = distance(statistics(features), statistics(other))
    distances = {"frechet_distance": (refs, evaluate.ranges), "distance_to_reference": (other, 1)}
    for name, (drawn, ranges) in progress([*distances.items()], f"evaluate {sampler}", "distance"):
        resamples[name] = torch.from_numpy(bootstrap_distances(features, drawn, evaluate.bootstrap, ranges))
    squared_error = scores["squared_error"]
    results["rmse"] = squared_error.mean().sqrt().item()
    rows = resampled(len(squared_error), evaluate.bootstrap)
    resamples["rmse"] = torch.stack([squared_error[chosen].mean().sqrt() for chosen in rows])
    errors = {name: values.std().item() for name, values in resamples.items()}
    for name in scores.keys() - NOT_SCORES - {"squared_error"}:
        results[name], errors[name] = scores[name].mean().item(), mean_error(scores[name])
    if kept is not None:
        results["kernel_distance"], errors["kernel_distance"] = kernel_distance(features, kept)
        found = precision_recall(features, kept)
        for name in ("precision", "recall"):
            results[name], errors[name] = found[name], found[f"{name}_se"]
    ordered = {key: value for name in sorted(results) for key, value in ((name, results[name]), (f"{name}_se", errors[name]))}
    return ordered, {f"{name}_bootstrap": values for name, values in resamples.items()}


def record(scorers: Scorers, features: Tensor, samples: list[int], evaluate: Evaluate) -> dict[str, Any]:
    """How the distances of distributions were measured."""
    extractor, each = scorers.extractor, len(samples) // evaluate.ranges
    _, distances = lowest(features, load_statistics(REFS), evaluate.ranges)
    return {
        "name": "frechet_distance",
        "label": label("FID" if extractor.name == "inception-v3-compat" else "FD", each),
        "tool": TOOL,
        "extractor": extractor.name,
        **scorers.origin,
        "resize": extractor.resize,
        "n": each,
        "seeds": shown_seeds(samples),
        "ranges": evaluate.ranges,
        "distances": distances,
        "reference": {**load_record(REFS), "statistics_sha256": sha256(REFS)},
    }


def write_scores(file: Path, samples: list[int], prompts: list[str], scores: Scores) -> None:
    """A row for each prompt: its sample, and its image's scores."""
    columns = {name: scores[name].numpy() for name in sorted(scores.keys() - NOT_SCORES)}
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
