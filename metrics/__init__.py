"""Whatever scores images, one metric per file.

A Scorer maps images (B, C, H, W) in [0, 1] and their B prompts to scores (B,), float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

import torchvision_on_cpu as torchvision_on_cpu  # here, so that it precedes every import of torchvision

Scorer = Callable[[Tensor, Sequence[str]], Tensor]


@dataclass(frozen=True)
class Card:
    """What a metric's numbers are, beside which weights they are by.

    Attributes:
        scale: what the number is.
        range: what good images have.
        preprocessing: how the model sees an image.
        source: paper and code that it is of.
        divisor: of a score in a mixed reward, which makes it about 1 at most.
    """

    scale: str
    range: str
    preprocessing: str
    source: str
    divisor: float = 1.0


class Metric(Protocol):
    """A Scorer that says what it is; more is better. Its weights are read when it is first called, or by `load`."""

    card: ClassVar[Card]

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor: ...

    def load(self) -> None: ...
