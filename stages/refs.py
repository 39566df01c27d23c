"""Stage refs: statistics of the real digits, which Frechet distances are measured from."""

import numpy as np

from metrics.frechet import JUDGE, Frechet, statistics
from stages.command import command
from stages.files import BACKBONE, DIGITS, REFS, atomic, read_tensors, reading


def refs() -> None:
    """Mean and covariance of the judge's features over the training split, as npz (mu, sigma) in EDM's format."""
    with reading(DIGITS):
        data, _ = read_tensors(DIGITS)
    with reading(BACKBONE):
        frechet = Frechet(JUDGE, BACKBONE / "judge.safetensors")
    found = statistics(frechet.features(data["train_images"]))
    with atomic(REFS) as temporary, temporary.open("wb") as file:
        np.savez(file, mu=found["mu"], sigma=found["sigma"])


if __name__ == "__main__":
    command(refs)
