"""The Frechet distance of feature distributions, by torch-fidelity. Lower is better; compare only at equal n and features."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity import FeatureExtractorBase, register_feature_extractor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.utils import create_feature_extractor, extract_featuresdict_from_input_id

from metrics.classifier import Classifier

Statistics = dict[str, NDArray[np.float64]]
"""`mu` (F,) and `sigma` (F, F), as in EDM's npz files."""

JUDGE = "digits-judge"


class JudgeFeatures(FeatureExtractorBase):
    """torch-fidelity's extractor of the digits judge: uint8 images (B, 1, 8, 8) -> last hidden layer (B, 32)."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str, verbose: bool = False) -> None:
        super().__init__(name, features_list)
        self.classifier = Classifier.load(Path(feature_extractor_weights_path))

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("hidden",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "hidden"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> None:
        return None

    def forward(self, input: Tensor) -> tuple[Tensor]:  # noqa: A002  torch-fidelity's name
        return (self.classifier.features(input.float() / 255).double(),)


register_feature_extractor(JUDGE, JudgeFeatures)


class Frechet:
    """Frechet distances in the features of a registered extractor.

    Args:
        extractor: its name with torch-fidelity.
        weights: its weights' file.
        cuda: whether it runs on the current CUDA device.
    """

    def __init__(self, extractor: str, weights: Path, cuda: bool = False) -> None:
        self.cuda = cuda
        self.extractor = create_feature_extractor(
            extractor, ["hidden"], cuda=cuda, feature_extractor_weights_path=str(weights), verbose=False
        )

    def features(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1], rounded to 8 bits as files would hold them -> features (B, F), float64."""
        found = extract_featuresdict_from_input_id(
            1, self.extractor, input1=_Images(images), batch_size=512, cuda=self.cuda, save_cpu_ram=True, verbose=False
        )
        return found["hidden"]


def statistics(features: Tensor) -> Statistics:
    """Features (n, F) -> their mean and covariance."""
    return fid_features_to_statistics(features)


def load_statistics(file: Path) -> Statistics:
    """Read an npz of mu and sigma."""
    with file.open("rb") as opened, np.load(opened, allow_pickle=False) as found:
        return {"mu": found["mu"], "sigma": found["sigma"]}


def distance(one: Statistics, other: Statistics) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) (Heusel et al. 2017)."""
    return fid_statistics_to_metric(one, other, verbose=False)[KEY_METRIC_FID]


def bootstrap_distances(features: Tensor, other: Statistics | Tensor, resamples: int) -> NDArray[np.float64]:
    """Distances of resampled features (n, F), (resamples,), to fixed statistics or to features of the same n samples.

    Resample r draws the same rows of whatever features, so distances on the same noise are paired: their standard deviation is
    a standard error, that of their difference too. Their mean is not an estimate: resampling raises a distance.
    """
    return np.array(
        [
            distance(statistics(features[rows]), statistics(other[rows]) if isinstance(other, Tensor) else other)
            for rows in resampled(len(features), resamples)
        ]
    )


def resampled(n: int, resamples: int) -> Iterator[Tensor]:
    """Row numbers drawn with replacement, (n,) each."""
    for resample in range(resamples):
        yield torch.from_numpy(np.random.default_rng([n, resample]).integers(0, n, n))


class _Images(Dataset[Tensor]):
    def __init__(self, images: Tensor) -> None:
        self.images = (images.cpu() * 255).round().to(torch.uint8)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]
