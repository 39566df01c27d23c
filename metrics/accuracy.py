"""The digits' judge: 1 where an independent classifier reads the wanted digit, else 0. Never a reward."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from metrics import Card
from metrics.classifier import Classifier, labels_of


class Accuracy:
    """A Metric: whether the judge's most probable digit is the prompt."""

    card: ClassVar[Card] = Card(
        scale="share of images that are read as the wanted digit",
        range="0.9 to 1",
        preprocessing="none",
        source="another classifier trained on the digits",
    )

    def __init__(self, file: Path) -> None:
        self.file = file

    @cached_property
    def classifier(self) -> Classifier:
        return Classifier.load(self.file)

    def load(self) -> None:
        _ = self.classifier

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return (self.classifier(images.float()).argmax(-1) == labels_of(prompts)).double()
