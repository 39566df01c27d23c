from pathlib import Path

import numpy as np
import pytest
import torch

from metrics.accuracy import Accuracy
from metrics.classifier import Classifier
from metrics.frechet import JUDGE, Frechet, bootstrap_distances, distance, load_statistics, statistics
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


def test_features_are_the_judges_on_eight_bits(weights: Path) -> None:
    images = torch.rand(600, 1, 8, 8, generator=torch.Generator().manual_seed(0))  # more than one batch
    expected = Classifier.load(weights).features((images * 255).round() / 255)
    assert torch.allclose(Frechet(JUDGE, weights).features(images), expected.double(), atol=1e-6)


def test_the_distance_of_gaussians_is_the_closed_form() -> None:
    """With diagonal covariances: |mu1 - mu2|^2 + sum (std1 - std2)^2."""
    mean, std = np.array([1.0, -2.0, 0.5]), np.array([1.0, 2.0, 0.1])
    one = {"mu": np.zeros(3), "sigma": np.eye(3)}
    other = {"mu": mean, "sigma": np.diag(std**2)}
    assert distance(one, other) == pytest.approx((mean**2).sum() + ((std - 1) ** 2).sum())
    assert distance(other, other) == pytest.approx(0, abs=1e-9)


def test_statistics_survive_a_file(tmp_path: Path) -> None:
    found = statistics(torch.randn(100, 4, dtype=torch.float64))
    np.savez(tmp_path / "refs.npz", mu=found["mu"], sigma=found["sigma"])
    loaded = load_statistics(tmp_path / "refs.npz")
    assert all(np.array_equal(loaded[key], found[key]) for key in ("mu", "sigma"))


def test_a_pickled_array_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "refs.npz", mu=np.array([object()]), sigma=np.eye(1))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        load_statistics(tmp_path / "refs.npz")


def test_bootstrap_gives_the_standard_error() -> None:
    """Distances of 40 independent samples of the same size spread as the bootstrap of one of them says."""
    rng = torch.Generator().manual_seed(0)
    other = {"mu": np.full(2, 3.0), "sigma": np.eye(2)}
    samples = [torch.randn(500, 2, generator=rng, dtype=torch.float64) for _ in range(40)]
    spread = np.std([distance(statistics(sample), other) for sample in samples])
    assert bootstrap_distances(samples[0], other, 200).std() == pytest.approx(spread, rel=0.35)


def test_bootstrap_is_paired() -> None:
    """The same rows are drawn for every sampler, so a constant shift leaves the difference almost without spread."""
    features = torch.randn(500, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    other = {"mu": np.zeros(2), "sigma": np.eye(2)}
    assert bootstrap_distances(features, features, 5) == pytest.approx(np.zeros(5), abs=1e-9)
    shifted = bootstrap_distances(features + 1e-3, other, 50) - bootstrap_distances(features, other, 50)
    assert shifted.std() < 0.01 * bootstrap_distances(features, other, 50).std() + 1e-3


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
