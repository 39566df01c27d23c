"""The digits' reward: the log-probability that a classifier gives the wanted digit. Range (-inf, 0]; higher is better."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from metrics import Card
from metrics.classifier import Classifier, labels_of


class LogProbability:
    """A Metric: log p(prompt | image) in nats. Never the judge's classifier. Differentiable."""

    card: ClassVar[Card] = Card(
        scale="log-probability of the wanted digit, in nats",
        range="-0.2 to 0",
        preprocessing="none",
        source="a classifier trained on the digits",
    )

    def __init__(self, file: Path) -> None:
        self.file = file

    @cached_property
    def classifier(self) -> Classifier:
        return Classifier.load(self.file)

    def load(self) -> None:
        _ = self.classifier

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        log_probabilities = self.classifier(images.float()).double().log_softmax(-1)
        return log_probabilities.gather(1, labels_of(prompts)[:, None])[:, 0]
