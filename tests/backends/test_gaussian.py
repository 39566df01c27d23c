import pytest
import torch

from backends import Gaussian


def test_the_denoiser_is_the_posterior_mean() -> None:
    """Against quadrature of E[x0 | x] in one dimension."""
    means, stds, weights = torch.tensor([-1.0, 0.5]), torch.tensor([0.2, 0.4]), torch.tensor([0.3, 0.7])
    mixture = Gaussian(means.double().view(2, 1, 1, 1), stds.double(), weights.double())
    x0 = torch.linspace(-6, 6, 200001, dtype=torch.float64)
    prior = sum(w * torch.exp(-((x0 - m) ** 2) / (2 * s**2)) / s for m, s, w in zip(means, stds, weights, strict=True))
    for x, sigma in ((0.3, 0.1), (-2.0, 1.0), (5.0, 20.0)):
        posterior = prior * torch.exp(-((x - x0) ** 2) / (2 * sigma**2))
        expected = (posterior * x0).sum() / posterior.sum()
        found = mixture.denoiser([])(torch.full((1, 1, 1, 1), x).double(), torch.tensor([sigma]).double())
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_weights_must_sum_to_one() -> None:
    with pytest.raises(ValueError, match="weights"):
        Gaussian(torch.zeros(2, 1, 1, 1), torch.ones(2), torch.ones(2))
