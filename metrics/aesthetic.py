"""LAION's aesthetic predictor: what people would give an image, whatever it was to show."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import normalize

from metrics import Card
from metrics.clip import PREPROCESSING, Clip
from metrics.head import Head
from metrics.images import check
from metrics.state import load_exactly, read_state, require

FILE = "sac+logos+ava1-l14-linearMSE.pth"


class Aesthetic:
    """A Metric: a linear map of the normalised image features of OpenAI's ViT-L/14. Differentiable. Prompts do not matter.

    Args:
        clip: whose features; shared with whatever else looks at them.
        folder: with FILE, as published (a state dict).
    """

    card: ClassVar[Card] = Card(
        scale="1 to 10, as rated by people",
        range="5 to 6.5",
        preprocessing=PREPROCESSING + "; features of length 1",
        source="Schuhmann 2022, improved-aesthetic-predictor, sac+logos+ava1-l14-linearMSE",
        divisor=10.0,
    )

    def __init__(self, clip: Clip, folder: Path) -> None:
        self.clip, self.file = clip, folder / FILE
        require(self.file)

    @cached_property
    def head(self) -> Head:
        head = Head(self.clip.width)
        load_exactly(head, read_state(self.file), self.file)
        return head.to(self.clip.device).eval().requires_grad_(False)

    def load(self) -> None:
        self.clip.load()
        _ = self.head

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        check(images, prompts)
        return self.head(normalize(self.clip.image_features(images).float(), dim=-1))[:, 0].double()
