"""Stage evaluate@SAMPLER: what the images of one sampler are worth, per image and on the whole, with uncertainties."""

from pathlib import Path

import torch
from torch import Tensor

from metrics.frechet import Statistics, bootstrap_distances, distance, load_statistics, resampled, statistics
from stages.checkpoint import Work
from stages.command import command, progress
from stages.files import BACKBONE, REFS, RESULTS, SAMPLES, SCORES, read_tensors, reading, require, write_json, write_tensors
from stages.frozen import PROMPTS, RECORD, load_decoder
from stages.params import Compute, Evaluate
from stages.parts import by_parts, forget
from stages.prompts import Prompts
from stages.ranks import Ranks
from stages.scorers import load_scorers
from stages.statistics import mean_error

Scores = dict[str, Tensor]


def evaluate(sampler: str, *, compute: Compute, evaluate: Evaluate) -> None:
    """Score the archive of SAMPLER against the reference images and, on the same noise, against the reference's archive.

    Under torchrun the ranks split the images.
    """
    ranks, name = Ranks(), f"evaluate@{sampler}"
    files = [SAMPLES / f"{each}.safetensors" for each in (sampler, "reference")]
    states, samples, cost = archive(files[0])
    reference, _, _ = archive(files[1], samples)
    with reading(BACKBONE):
        wanted = Prompts.load(PROMPTS)("test", samples.tolist())
    with reading(REFS):
        refs = load_statistics(REFS)
    decode, scorers = load_decoder(compute), load_scorers(compute)

    @torch.no_grad()
    def scored(batch: range) -> dict[str, Tensor]:
        mine, others = states[batch.start : batch.stop], reference[batch.start : batch.stop]
        found = scorers.scores(decode(mine), wanted[batch.start : batch.stop])
        squared_error = (mine - others).square().flatten(1).mean(1)
        return {**found, "squared_error": squared_error, "reference_features": scorers.frechet.features(decode(others))}

    work = Work({}, [RECORD, *files])
    scores = by_parts(name, work, ranks, len(states), evaluate.batch_size, scored)
    if scores is not None:
        results, resamples = summary(scores, refs, evaluate, sampler)
        with torch.no_grad():
            pictures = (decode(states[: evaluate.pictures]).float() * 255).round().to(torch.uint8).cpu()
        each = {key: values for key, values in scores.items() if values.ndim == 1}
        write_tensors(
            SCORES / f"{sampler}.safetensors", {**each, **resamples, "pictures": pictures}, {"prompts": wanted[: len(pictures)]}
        )
        write_json(RESULTS / f"{sampler}.json", {"n": len(states), **cost, **results})
        forget(name)
    ranks.close()


def summary(scores: Scores, refs: Statistics, evaluate: Evaluate, sampler: str) -> tuple[dict[str, float], Scores]:
    """Distances and means, each with its standard error ("_se"), and the resampled distances and errors, (bootstrap,)."""
    features, other = scores["features"], scores["reference_features"]
    results, resamples = dict[str, float](), Scores()
    distances = {"frechet_distance": (refs, refs), "distance_to_reference": (other, statistics(other))}
    for name, (drawn, fixed) in progress([*distances.items()], f"evaluate {sampler}", "distance"):
        results[name] = distance(statistics(features), fixed)
        resamples[name] = torch.from_numpy(bootstrap_distances(features, drawn, evaluate.bootstrap))
    squared_error = scores["squared_error"]
    results["rmse"] = squared_error.mean().sqrt().item()
    rows = resampled(len(squared_error), evaluate.bootstrap)
    resamples["rmse"] = torch.stack([squared_error[chosen].mean().sqrt() for chosen in rows])
    errors = {f"{name}_se": values.std().item() for name, values in resamples.items()}
    for name in scores.keys() - {"features", "reference_features", "squared_error"}:
        results[name], errors[f"{name}_se"] = scores[name].mean().item(), mean_error(scores[name])
    ordered = {
        key: value for name in sorted(results) for key, value in ((name, results[name]), (f"{name}_se", errors[f"{name}_se"]))
    }
    return ordered, {f"{name}_bootstrap": values for name, values in resamples.items()}


def archive(path: Path, samples: Tensor | None = None) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Final states (n, ...) of one sampler, of which samples (n,), which have to be those given, and what they cost."""
    with reading(path):
        tensors, cost = read_tensors(path)
        states, found = tensors["states"], tensors["samples"]
        require(path, "states", len(states), len(found))
        if samples is not None:
            require(path, "samples", found.tolist(), samples.tolist())
        return states, found, {key: cost[key] for key in ("serial_evaluations", "total_evaluations")}


if __name__ == "__main__":
    command(evaluate, has_ranks=True)
