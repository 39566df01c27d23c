"""Stage refs: statistics of the real digits, which Frechet distances are measured from, and what held-out digits score."""

import numpy as np

from metrics.accuracy import Accuracy
from metrics.frechet import JUDGE, Frechet, bootstrap_distances, distance, statistics
from metrics.log_probability import LogProbability
from stages.command import command
from stages.files import BACKBONE, DIGITS, REFS, RESULTS, atomic, read_tensors, reading, write_json
from stages.params import Evaluate
from stages.statistics import mean_error


def refs(*, evaluate: Evaluate) -> None:
    """Mean and covariance of the judge's features over the training split, as npz (mu, sigma) in EDM's format.

    The held-out digits, which no network has seen, are scored as a sampler's images are: what a perfect sampler would get.
    """
    with reading(DIGITS):
        data, _ = read_tensors(DIGITS)
        real, held_out = data["train_images"], data["held_out_images"]
        prompts = [str(label) for label in data["held_out_labels"].tolist()]
    with reading(BACKBONE):
        frechet = Frechet(JUDGE, BACKBONE / "judge.safetensors")
        judge = Accuracy(BACKBONE / "judge.safetensors")
        reward = LogProbability(BACKBONE / "reward.safetensors")
    found = statistics(frechet.features(real))
    with atomic(REFS) as temporary, temporary.open("wb") as file:
        np.savez(file, mu=found["mu"], sigma=found["sigma"])
    features, accuracy, rewards = frechet.features(held_out), judge(held_out, prompts), reward(held_out, prompts)
    scores = {
        "n": len(held_out),
        "frechet_distance": distance(statistics(features), found),
        "frechet_distance_se": float(bootstrap_distances(features, found, evaluate.bootstrap).std()),
        "accuracy": accuracy.mean().item(),
        "accuracy_se": mean_error(accuracy),
        "reward": rewards.mean().item(),
        "reward_se": mean_error(rewards),
    }
    write_json(RESULTS / "held_out.json", scores)


if __name__ == "__main__":
    command(refs)
