"""AMED, one image at a time, and the feature it needs."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from backends import Gaussian
from solvers import (
    AFS,
    AMED,
    Counter,
    FeatureDenoiser,
    Guided,
    integrate,
    parallel_integrate,
    polynomial,
)  # fmt: skip

from .conftest import SIGMAS, WithFeature, disturbed, one


@pytest.mark.parametrize("afs", [False, True])
def test_amed_equals_the_naive_formula(afs: bool, mixture: Gaussian, start: Tensor) -> None:
    torch.manual_seed(0)
    amed = disturbed(AMED(5, 3, scale_dir=0.1, scale_time=0.2))
    sigmas, denoise = polynomial(5, 0.01, 20.0), one(mixture)

    def naive(x: Tensor) -> Tensor:
        for n, (t, t_next) in enumerate(pairwise(sigmas)):
            analytic = afs and n == 0
            d = x / torch.sqrt(1 + t**2) if analytic else (x - denoise(x, t)) / t
            feature = torch.zeros(1, 3).double() if analytic else x.flatten()[None, :3] / t
            r, o, a = amed.predict(feature, t, t_next)[0]  # type: ignore[operator]
            o, a = 1 + 0.1 * (2 * torch.sigmoid(o / 2) - 1), 1 + 0.2 * (2 * torch.sigmoid(a / 2) - 1)
            tau = t_next**r * t ** (1 - r)
            x_m = x + (tau - t) * d
            x = x + (t_next - t) * o * (x_m - denoise(x_m, a * tau)) / tau
        return x

    counter = Counter(WithFeature(mixture))
    with torch.no_grad():
        found = integrate(counter, AFS(amed) if afs else amed, 20 * start, sigmas)
        assert torch.allclose(found, torch.stack([naive(x) for x in 20 * start]), rtol=1e-11)
    assert (counter.depth, counter.rows) == (8 - afs, (8 - afs) * len(start))
    assert len({tuple(amed.predict(x[None, :3].double(), sigmas[0], sigmas[1])[0].tolist()) for x in start.flatten(1)}) == 8  # type: ignore[operator]


def test_amed_needs_features_that_fit(mixture: Gaussian, start: Tensor) -> None:
    sigmas = polynomial(5, 0.01, 20.0)
    with pytest.raises(TypeError, match=r"denoise: .* gives no feature; valid: a FeatureDenoiser"):
        integrate(mixture.denoiser([]), AMED(5, 3, 0.0, 0.0), start, sigmas)
    with pytest.raises(ValueError, match=r"feature: \(8, 3\); valid: \(B, 4\)"):
        integrate(WithFeature(mixture), AMED(5, 4, 0.0, 0.0), start, sigmas)

    class TooFew(WithFeature):
        def with_feature(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
            return self(x, sigma), torch.ones(2, 3).double()

    with pytest.raises(ValueError, match=r"denoise: gave a feature of shape \(2, 3\); valid: finite numbers, \(8, F\)"):
        integrate(TooFew(mixture), AMED(5, 3, 0.0, 0.0), start, sigmas)
    with pytest.raises(ValueError, match="7 nodes; valid: 5"):
        integrate(WithFeature(mixture), AMED(5, 3, 0.0, 0.0), start, SIGMAS)
    with pytest.raises(ValueError, match="adapts to the backbone's features"):
        parallel_integrate(WithFeature(mixture), AMED(5, 3, 0.0, 0.0), start, sigmas, 2, 0.0)


def test_guidance_gives_the_feature_of_the_wanted_conditions(mixture: Gaussian, start: Tensor) -> None:
    class Conditional(WithFeature):
        def with_feature(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
            assert len(x) == 4 * len(start)  # two states, each with the wanted and the other conditions
            return self(x, sigma), torch.arange(len(x)).double()[:, None]

    guided: FeatureDenoiser = Guided(Counter(Conditional(mixture)), 2.0, len(start))
    _, feature = guided.with_feature(torch.cat([start, start]), torch.ones(16).double())
    assert feature[:, 0].tolist() == [*range(8), *range(16, 24)]
