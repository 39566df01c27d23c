"""What scores images: the metrics that the stage `metrics` was told of."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metrics import Card, Metric, Scorer
from metrics.accuracy import Accuracy
from metrics.colour import brightness, saturation
from metrics.extractors import Extractor, judge
from metrics.log_probability import LogProbability
from metrics.mixture import Mixture
from stages.device import device_of
from stages.files import BACKBONE, METRICS, StageError, reading, write_json
from stages.frozen import DTYPES, Record, loading
from stages.params import MODELS, Compute, Weights

WATCHED: dict[str, Scorer] = {"brightness": brightness, "saturation": saturation}

Scores = dict[str, Tensor]


@dataclass(frozen=True)
class Known:
    """What a metric is, and which weights it has: it goes into every results file.

    Attributes:
        name, card: of the metric.
        weight: in the reward; 0 for a judge.
        models: which weights: id, revision and sha256 of each.
        dtype: of them.
    """

    name: str
    card: Card
    weight: float
    models: list[dict[str, Any]]
    dtype: str

    def plain(self) -> dict[str, Any]:
        """For a JSON file."""
        own = {"name": self.name, "in_reward": self.weight > 0, "weight": self.weight}
        return {**own, **asdict(self.card), "models": self.models, "dtype": self.dtype}


class ScoreError(StageError):
    """Images cannot be scored."""


@dataclass(frozen=True)
class Chosen:
    """What lies in models/metrics.json.

    Attributes:
        reward: metrics by their weights.
        judges, features: names.
        dtype: of metrics' weights on images.
        weights: of models by their names: where they came from, and their sha256.
    """

    reward: dict[str, float]
    judges: list[str]
    features: str
    dtype: str
    weights: dict[str, dict[str, Any]]

    @classmethod
    def load(cls) -> "Chosen":
        """ValueError where it is not what `save` writes."""
        try:
            return cls(**json.loads(METRICS.read_text(encoding="utf-8")))
        except TypeError as error:
            raise ValueError(f"{METRICS}: {error}; valid: what stage metrics writes") from error

    def save(self, file: Path) -> None:
        write_json(file, asdict(self))


@dataclass(frozen=True)
class Scorers:
    """What scores images. Weights are read when they are first needed, or by `load`.

    Attributes:
        reward: what is to be raised.
        judges: of which more is better, never the reward or learned with it.
        watched: what a reward is easily raised by: neither good nor bad.
        extractor: features of images, whose distributions are compared.
        records: what each metric is, and which weights it has.
        origin: the same of the features.
    """

    reward: Mixture
    judges: Mapping[str, Metric]
    watched: Mapping[str, Scorer]
    extractor: Extractor
    records: Sequence[Known]
    origin: dict[str, Any]

    @property
    def features_of(self) -> dict[str, Any]:
        """Whose features these are: distances are between features of the same."""
        return {"extractor": self.extractor.name, **self.origin}

    def load(self) -> None:
        """Read all weights now: before hours of work for them.

        Raises:
            InputError: some are missing or not what they have to be.
        """
        with loading():
            for metric in self.metrics.values():
                metric.load()
            self.extractor.load()

    @property
    def metrics(self) -> dict[str, Any]:
        """Every metric by its name."""
        return {**{name: part.scorer for name, part in self.reward.parts.items()}, **self.judges}

    @torch.no_grad()
    def scores(self, images: Tensor, prompts: Sequence[str]) -> Scores:
        """Of images (B, C, H, W) in [0, 1] and their prompts every score by its name, (B,), and `features` (B, F); float64.

        Raises:
            ScoreError: the images are no images, or a score is not finite.
        """
        every = {**self.metrics, **self.watched}
        scores = {name: finite(name, lambda score=score: score(images, prompts)) for name, score in every.items()}
        return {**scores, "reward": self.reward.mixed(scores), "features": self.features(images)}

    def features(self, images: Tensor) -> Tensor:
        """Of images (B, C, H, W) in [0, 1] their features (B, F), float64.

        Raises:
            ScoreError: the images are no images, or their features not finite.
        """
        return finite(self.extractor.name, lambda: self.extractor(images))


def load_scorers(compute: Compute) -> Scorers:
    """The metrics that stage metrics was told of."""
    with reading(METRICS):
        chosen = Chosen.load()
    known = _Metrics(chosen, device_of(compute))
    weights = chosen.reward
    metrics = {name: known.metric(name) for name in [*weights, *chosen.judges]}
    reward = Mixture.of({name: metrics[name] for name in weights}, weights)
    records = [Known(name, metric.card, weights.get(name, 0.0), **known.origin(name)) for name, metric in metrics.items()]
    judges = {name: metrics[name] for name in chosen.judges}
    return Scorers(reward, judges, WATCHED, known.extractor(chosen.features), records, known.origin(chosen.features))


def finite(name: str, score: Callable[[], Tensor]) -> Tensor:
    """What a metric gives, on the CPU; ScoreError where it cannot, or where that is not finite."""
    try:
        found = score().double().cpu()
    except ValueError as error:
        raise ScoreError(f"{name}: {error}") from error
    bad = (~found.isfinite().flatten(1).all(1) if found.ndim > 1 else ~found.isfinite()).nonzero().flatten().tolist()
    if bad:
        raise ScoreError(f"{name}: not finite for {len(bad)} of {len(found)} images, by row {bad[:4]}; valid: finite numbers")
    return found


class _Metrics:
    """Metrics by their names; what two of them are made of is loaded once."""

    def __init__(self, chosen: Chosen, device: torch.device) -> None:
        self.chosen, self.device, self.dtype = chosen, device, DTYPES[chosen.dtype]
        self.clip = cache(self._clip)

    def metric(self, name: str) -> Metric:
        """The metric of that name. Those of images are imported here: transformers and open_clip take seconds, digits none."""
        match name:
            case "log_probability":
                return LogProbability(BACKBONE / "reward.safetensors")
            case "accuracy":
                return Accuracy(BACKBONE / "judge.safetensors")
            case "hps":
                from metrics.hps import HPS

                return self.of(HPS, "hps")
            case "image_reward":
                from metrics.image_reward import ImageReward

                return self.of(ImageReward, "image_reward", "bert")
            case "mps":
                from metrics.mps import MPS

                return self.of(MPS, "mps", "clip_h14")
            case "pick_score":
                from metrics.clip import PickScore

                return PickScore(self.clip("pick_score"))
            case "clip_score":
                from metrics.clip import ClipScore

                return ClipScore(self.clip("clip_l14"))
            case "aesthetic":
                from metrics.aesthetic import Aesthetic

                with loading():
                    return Aesthetic(self.clip("clip_l14"), self.folder("aesthetic"))
        raise ValueError(f"{METRICS}: metric {name!r}; valid: {', '.join(MODELS)}, log_probability, accuracy")

    def extractor(self, name: str) -> Extractor:
        """The features of that name."""
        match name:
            case "accuracy":
                return judge(BACKBONE / "judge.safetensors")
            case "clip_l14":
                from metrics.clip import ClipFeatures

                return ClipFeatures(self.clip("clip_l14"), name)
            case "inception":
                from metrics.extractors import inception

                with loading():
                    return inception(self.folder("inception"), self.device)
        raise ValueError(f"{METRICS}: features {name!r}; valid: accuracy, clip_l14, inception")

    def of(self, kind: Callable[..., Metric], *models: str) -> Metric:
        """A metric of these models' folders."""
        with loading():
            return kind(*map(self.folder, models), self.device, self.dtype)

    def _clip(self, model: str) -> Any:
        from metrics.clip import Clip

        with loading():
            return Clip(self.folder(model), self.device, self.dtype)

    def folder(self, model: str) -> Path:
        """The folder of a model, fetched again where this machine has not got it."""
        from stages.fetch import metric_files  # what it takes to fetch, which digits' metrics do not
        from stages.weights import weights_folder

        weights = Weights(**self.chosen.weights[model])
        return weights_folder(weights, lambda files, place: metric_files(model, files, weights.variant, place))[0]

    def origin(self, name: str) -> dict[str, Any]:
        """Which weights a metric or features have; the digits' are in models/backbone."""
        kept = ("id", "revision", "sha256")
        models = [{"model": model, **{k: self.chosen.weights[model][k] for k in kept}} for model in MODELS.get(name, ())]
        if models:
            return {"models": models, "dtype": self.chosen.dtype}
        with reading(BACKBONE):
            found = Record.load().sha256
        return {"models": [{"model": "models/backbone", "id": "digits", "revision": None, "sha256": found}], "dtype": "float32"}
