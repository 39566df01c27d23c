from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from metrics import Metric, Scorer
from metrics.accuracy import Accuracy
from metrics.log_probability import LogProbability
from metrics.mixture import Mixture, Part


def constant(value: float) -> Scorer:
    return lambda images, prompts: torch.full((len(images),), value, dtype=torch.float64)


def red(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images[:, 0].double().mean((1, 2))


def test_published_weights_and_divisors() -> None:
    """The published reward of five metrics, weighted 1 each: of 0.25, 21, 0.5, 0.27 and 5.2."""
    scores = {"hps": (0.25, 1.0), "pick": (21.0, 26.0), "image": (0.5, 10.0), "clip": (0.27, 1.0), "aesthetic": (5.2, 10.0)}
    mixture = Mixture({name: Part(constant(score), 1.0, divisor) for name, (score, divisor) in scores.items()})
    found = mixture(torch.zeros(3, 3, 2, 2), ["a"] * 3)
    assert found.tolist() == pytest.approx([(0.25 + 21 / 26 + 0.05 + 0.27 + 0.52) / 5] * 3, rel=1e-12)


def test_the_divisors_are_the_published_ones() -> None:
    from metrics.aesthetic import Aesthetic
    from metrics.clip import ClipScore, PickScore
    from metrics.hps import HPS
    from metrics.image_reward import ImageReward

    kinds: list[type[Metric]] = [HPS, PickScore, ImageReward, ClipScore, Aesthetic, LogProbability, Accuracy]
    assert [kind.card.divisor for kind in kinds] == [1, 26, 10, 1, 10, 1, 1]


@pytest.mark.parametrize(("weights", "share"), [((1, 1), 0.5), ((3, 1), 0.75), ((0.2, 0.6), 0.25)])
def test_weights_are_shares(weights: tuple[float, float], share: float) -> None:
    images = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    mixture = Mixture({"red": Part(red, weights[0]), "one": Part(constant(8.0), weights[1], 4.0)})
    expected = share * red(images, []) + (1 - share) * 2
    assert torch.allclose(mixture(images, ["a"] * 4), expected, rtol=1e-12)
    scores = {"red": red(images, []), "one": torch.full((4,), 8.0).double()}
    assert torch.equal(mixture(images, ["a"] * 4), mixture.mixed(scores))


def test_one_metric_is_its_own_mixture_at_any_weight() -> None:
    images = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    for weight in (1.0, 0.5, 4.0):
        assert torch.equal(Mixture({"red": Part(red, weight)})(images, ["a"] * 4), red(images, []))


def test_a_negative_score_still_tells_images_apart() -> None:
    """The published reward cuts quotients off at 0, so that all images of a negative ImageReward are equal."""
    images = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    found = Mixture({"below": Part(lambda images, prompts: red(images, prompts) - 2, 1.0, 10.0)})(images, ["a"] * 4)
    assert found.std() > 0
    assert bool((found < 0).all())


def test_a_mixture_has_the_gradient_of_its_parts() -> None:
    images = torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mixture = Mixture({"red": Part(red, 1.0, 2.0), "one": Part(constant(1.0), 1.0)})
    (gradient,) = torch.autograd.grad(mixture(images, ["a"] * 2).sum(), images)
    expected = torch.zeros_like(images)
    expected[:, 0] = 1 / 4 / 2 / 2
    assert torch.allclose(gradient, expected)


def test_it_takes_divisors_from_cards(tmp_path: Path) -> None:
    metric = LogProbability(tmp_path / "never-read.safetensors")
    assert Mixture.of({"digits": metric}, {"digits": 2.0}).parts == {"digits": Part(metric, 2.0, 1.0)}
