"""The digits judge's features, as an extractor of torch-fidelity."""

from pathlib import Path

from torch import Tensor
from torch_fidelity import FeatureExtractorBase, register_feature_extractor

from metrics.classifier import Classifier

JUDGE = "digits-judge"
LAYER = "hidden"


class JudgeFeatures(FeatureExtractorBase):
    """torch-fidelity's extractor of the digits judge: uint8 images (B, 1, 8, 8) -> last hidden layer (B, 32).

    It is told all of torch-fidelity's settings, of which it needs one.
    """

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str, **_: object) -> None:
        super().__init__(name, features_list)
        self.classifier = Classifier.load(Path(feature_extractor_weights_path))

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return (LAYER,)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return LAYER

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> None:
        return None

    def forward(self, input: Tensor) -> tuple[Tensor]:  # noqa: A002  torch-fidelity's name
        return (self.classifier.features(input.float() / 255).double(),)


register_feature_extractor(JUDGE, JudgeFeatures)
