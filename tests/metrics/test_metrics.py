from pathlib import Path

import pytest
import torch

from metrics.accuracy import Accuracy
from metrics.classifier import Classifier
from metrics.log_probability import LogProbability


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "classifier.safetensors"
    Classifier().save(file)
    return file


def test_scores_are_the_classifiers(weights: Path) -> None:
    images = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    prompts = [str(i % 10) for i in range(20)]
    probabilities = Classifier.load(weights)(images.float()).softmax(-1)
    wanted = probabilities[torch.arange(20), torch.arange(20) % 10]
    assert torch.allclose(LogProbability(weights)(images, prompts), wanted.log().double(), atol=1e-6)
    best = probabilities.argmax(-1)
    assert bool((Accuracy(weights)(images, [str(digit.item()) for digit in best]) == 1).all())
    assert bool((Accuracy(weights)(images, [str((digit.item() + 1) % 10) for digit in best]) == 0).all())


def test_brightness_and_saturation_are_hsvs() -> None:
    import colorsys

    from metrics.colour import brightness, saturation

    images = torch.rand(3, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    images[0, :, 0, 0] = 0.0  # black
    for i, image in enumerate(images):
        pixels = [colorsys.rgb_to_hsv(*pixel) for pixel in image.flatten(1).T.double().tolist()]
        assert brightness(images, [""] * 3)[i].item() == pytest.approx(sum(p[2] for p in pixels) / 20)
        assert saturation(images, [""] * 3)[i].item() == pytest.approx(sum(p[1] for p in pixels) / 20)
    grey = images[:, :1]
    assert bool((saturation(grey, [""] * 3) == 0).all())
    assert torch.allclose(brightness(grey, [""] * 3), grey.double().mean((1, 2, 3)))
