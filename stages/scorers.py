"""What scores images: the metrics that the stage `backbone` was told of."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from metrics import Scorer
from metrics.accuracy import Accuracy
from metrics.colour import brightness, saturation
from metrics.frechet import JUDGE, Frechet
from metrics.log_probability import LogProbability
from stages.device import device_of
from stages.files import BACKBONE, reading
from stages.frozen import RECORD, Record, loading
from stages.params import Compute, Weights


@dataclass(frozen=True)
class Scorers:
    """What scores images.

    Attributes:
        reward: what is to be raised.
        judges: of which more is better, never the reward or learned with it.
        watched: what a reward is easily raised by: neither good nor bad.
        frechet: distances of distributions of images.
    """

    reward: Scorer
    judges: dict[str, Scorer]
    watched: dict[str, Scorer]
    frechet: Frechet

    @torch.no_grad()
    def scores(self, images: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Of images (B, C, H, W) in [0, 1] and their prompts every score by its name, (B,), and `features` (B, F); float64."""
        every = {"reward": self.reward, **self.judges, **self.watched}
        scores = {name: score(images, prompts).double().cpu() for name, score in every.items()}
        return {**scores, "features": self.frechet.features(images)}


def load_scorers(compute: Compute) -> Scorers:
    """The metrics that the backbone was made with."""
    device = device_of(compute)
    with reading(BACKBONE):
        record = Record.load()
    judges = {name: scorer(name, record, device) for name in record.judges}
    watched = {"brightness": brightness, "saturation": saturation}
    return Scorers(scorer(record.reward, record, device), judges, watched, frechet(record, device))


def model_of(record: Record, name: str) -> Path:
    """The folder of a metric's model, fetched again where this machine has not got it."""
    from stages.fetch import model_files  # what it takes to fetch, which digits' metrics do not
    from stages.weights import weights_folder

    weights = Weights(**record.weights[name])
    return weights_folder(weights, lambda files, place: model_files(files, weights.variant, place))[0]


def scorer(name: str, record: Record, device: torch.device) -> Scorer:
    """The metric of that name."""
    match name:
        case "log_probability":
            with reading(BACKBONE):
                return LogProbability(BACKBONE / "reward.safetensors")
        case "accuracy":
            with reading(BACKBONE):
                return Accuracy(BACKBONE / "judge.safetensors")
        case "clip_score" | "pick_score":
            from metrics.clip import ClipScore, PickScore  # transformers, as diffusers, takes seconds

            folder = model_of(record, name)
            with loading():
                return {"clip_score": ClipScore, "pick_score": PickScore}[name](folder, device)
    raise ValueError(f"{RECORD}: metric {name!r}; valid: log_probability, accuracy, clip_score, pick_score")


def frechet(record: Record, device: torch.device) -> Frechet:
    """Distances in the features of the metric that has them."""
    if record.features == "accuracy":
        with reading(BACKBONE):
            return Frechet(JUDGE, BACKBONE / "judge.safetensors")
    from metrics.clip import CLIP

    folder = model_of(record, record.features)
    with loading():
        return Frechet(CLIP, folder, cuda=device.type == "cuda")
