"""The digits' reward: the log-probability that a classifier gives the wanted digit. Range (-inf, 0]; higher is better."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from metrics.classifier import Classifier, labels_of


class LogProbability:
    """A Scorer: log p(prompt | image) in nats. Never the judge's classifier. Differentiable."""

    def __init__(self, file: Path) -> None:
        self.classifier = Classifier.load(file)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        log_probabilities = self.classifier(images.float()).double().log_softmax(-1)
        return log_probabilities.gather(1, labels_of(prompts)[:, None])[:, 0]
