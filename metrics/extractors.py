"""Features of images, for distances of distributions: of any extractor registered with torch-fidelity."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Protocol

import torch
from torch import Tensor
from torch_fidelity import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor

from metrics.classifier import FEATURES
from metrics.images import ROUNDING, levels
from metrics.judge_features import JUDGE, LAYER
from metrics.state import reading, require

INCEPTION = "inception-v3-compat"
FILE = "weights-inception-2015-12-05-6726825d.pth"

ROWS = 64
"""Images that an extractor sees at once."""


class Extractor(Protocol):
    """Images (B, C, H, W) in [0, 1], rounded to 8 bits as files would hold them, or uint8 -> features (B, width).

    These are float64, on the CPU. An image's do not depend on its batch, to rounding.

    Attributes:
        name: what the features are, for records.
        width: how many.
        resize: how images come to the size that the model sees, for records.
    """

    name: str
    width: int
    resize: str

    def load(self) -> None: ...

    def __call__(self, images: Tensor) -> Tensor: ...


class Registered(Extractor):
    """An extractor registered with torch-fidelity. Its file is read when it is first needed, and nothing in it executed.

    Args:
        name: there. It has to read its weights by torch.load or more safely.
        layer: which of its features.
        width, resize: an Extractor's.
        weights: its file.
        device: None: the CPU.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: there is no such extractor. When it is first used: the file is damaged, has other weights, or a pickle of
            anything but plain data.
    """

    def __init__(
        self, name: str, layer: str, width: int, resize: str, weights: Path, device: torch.device | None = None
    ) -> None:
        if name not in FEATURE_EXTRACTORS_REGISTRY:
            raise ValueError(f"extractor: found {name!r}; valid: {', '.join(sorted(FEATURE_EXTRACTORS_REGISTRY))}")
        require(weights)
        self.name, self.layer, self.width, self.resize = name, layer, width, resize
        self.weights, self.device = weights, device or torch.device("cpu")

    @cached_property
    def model(self) -> FeatureExtractorBase:
        with reading(self.weights), _no_pickles():
            model = create_feature_extractor(
                self.name, [self.layer], cuda=False, verbose=False, feature_extractor_weights_path=str(self.weights)
            )
        return model.to(self.device)

    def load(self) -> None:
        _ = self.model

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        parts = _eight_bits(images).split(ROWS)
        return torch.cat([self.model(part.to(self.device, non_blocking=True))[0].double().cpu() for part in parts])


def inception(folder: Path, device: torch.device | None = None) -> Registered:
    """The 2048 features of FID (Heusel et al. 2017): a folder with FILE, torch-fidelity's copy of TensorFlow's weights."""
    return Registered(INCEPTION, "2048", 2048, "bilinear to 299 x 299 as TensorFlow 1", folder / FILE, device)


def judge(weights: Path) -> Registered:
    """The digits judge's last hidden layer."""
    return Registered(JUDGE, LAYER, FEATURES, "none: 8 x 8 pixels", weights)


def _eight_bits(images: Tensor) -> Tensor:
    """Images (B, C, H, W) in [0, 1], or uint8 -> uint8."""
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"images: {tuple(images.shape)}; valid: (B, C, H, W), none of them 0")
    if images.dtype == torch.uint8:
        return images
    low, high = images.aminmax()
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # NaN is neither
        raise ValueError(f"images: from {low:.4g} to {high:.4g}; valid: from 0 to 1")
    return levels(images).to(torch.uint8)


_CREATING = Lock()


@contextmanager
def _no_pickles() -> Iterator[None]:
    """Have torch.load read plain data only, whatever it is told: torch-fidelity tells it to execute what it finds.

    The variable is the process's, so one extractor is created at a time.
    """
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    with _CREATING:
        before = os.environ.get(name)
        os.environ[name] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before
