"""Stage evaluate@SAMPLER: what the images of one sampler are worth, per image and on the whole, with uncertainties."""

from pathlib import Path

import torch
from torch import Tensor

from backends import Digits
from metrics.accuracy import Accuracy
from metrics.frechet import JUDGE, Frechet, bootstrap_distances, distance, load_statistics, resampled, statistics
from metrics.log_probability import LogProbability
from stages.command import command, progress
from stages.files import BACKBONE, REFS, RESULTS, SAMPLES, SCORES, read_tensors, reading, require, write_json, write_tensors
from stages.noise import prompts
from stages.params import Evaluate
from stages.statistics import mean_error


def evaluate(sampler: str, *, evaluate: Evaluate) -> None:
    """Score the archive of SAMPLER against the real digits and, on the same noise, against the reference's archive."""
    states, cost = archive(SAMPLES / f"{sampler}.safetensors")
    reference, _ = archive(SAMPLES / "reference.safetensors", len(states))
    with reading(BACKBONE):
        backend = Digits.load(BACKBONE / "unet.safetensors")
        reward = LogProbability(BACKBONE / "reward.safetensors")
        judge = Accuracy(BACKBONE / "judge.safetensors")
        frechet = Frechet(JUDGE, BACKBONE / "judge.safetensors")
    with reading(REFS):
        refs = load_statistics(REFS)
    images, wanted = backend.decode(states), prompts(range(len(states)))
    features = frechet.features(images)
    reference_features = frechet.features(backend.decode(reference))
    squared_error = (states - reference).square().flatten(1).mean(1)
    scores = {
        "reward": reward(images, wanted),
        "accuracy": judge(images, wanted),
        "squared_error": squared_error,
        "rmse_bootstrap": torch.stack(
            [squared_error[rows].mean().sqrt() for rows in resampled(len(states), evaluate.bootstrap)]
        ),
    }
    others = [("frechet_distance", refs), ("distance_to_reference", reference_features)]
    for name, other in progress(others, f"evaluate {sampler}", "distance"):
        scores[f"{name}_bootstrap"] = torch.from_numpy(bootstrap_distances(features, other, evaluate.bootstrap))
    results = {
        "n": len(states),
        **cost,
        "frechet_distance": distance(statistics(features), refs),
        "frechet_distance_se": scores["frechet_distance_bootstrap"].std().item(),
        "distance_to_reference": distance(statistics(features), statistics(reference_features)),
        "distance_to_reference_se": scores["distance_to_reference_bootstrap"].std().item(),
        "rmse": squared_error.mean().sqrt().item(),
        "rmse_se": scores["rmse_bootstrap"].std().item(),
        "accuracy": scores["accuracy"].mean().item(),
        "accuracy_se": mean_error(scores["accuracy"]),
        "reward": scores["reward"].mean().item(),
        "reward_se": mean_error(scores["reward"]),
    }
    write_tensors(SCORES / f"{sampler}.safetensors", scores)
    write_json(RESULTS / f"{sampler}.json", results)


def archive(path: Path, images: int | None = None) -> tuple[Tensor, dict[str, float]]:
    """Final states (n, C, H, W) of one sampler and what they cost; of that many images where it is given."""
    with reading(path):
        tensors, cost = read_tensors(path)
        states = tensors["states"]
        require(path, "images", len(states), images or len(states))
        return states, {key: cost[key] for key in ("serial_evaluations", "total_evaluations")}


if __name__ == "__main__":
    command(evaluate)
