"""The digits' judge: 1 where an independent classifier reads the wanted digit, else 0. Never a reward."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from metrics.classifier import Classifier, labels_of


class Accuracy:
    """A Scorer: whether the judge's most probable digit is the prompt."""

    def __init__(self, file: Path) -> None:
        self.classifier = Classifier.load(file)

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return (self.classifier(images.float()).argmax(-1) == labels_of(prompts)).double()
