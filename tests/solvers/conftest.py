"""What the tests of the learned families share."""

import torch
from torch import Tensor

from backends import Gaussian
from solvers import (
    AMED,
    Denoiser,
    EPDTable,
    Multistep,
    time_uniform,
)  # fmt: skip

SIGMAS = time_uniform(7, 0.002, 80.0, rho=2.0)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def disturbed(student: Multistep | AMED, seed: int = 0) -> Multistep | AMED:
    """With all its parameters somewhere else than at their start."""
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator(seed), dtype=torch.float64)
    return student


def one(mixture: Gaussian) -> Denoiser:
    """The denoiser of a single image, (C, H, W), at a level ()."""
    return lambda x, sigma: mixture.denoiser([])(x[None], sigma[None])[0]


def epd_table(points: int, num_steps: int, max_order: int = 1) -> EPDTable:
    shape = (4, num_steps - 1, points)
    position, weight, direction, time = (
        torch.rand(shape, generator=generator(points), dtype=torch.float64) * 0.8 + 0.1
    ).unbind()
    return EPDTable(position, weight / weight.sum(-1, keepdim=True), 0.9 + direction / 5, 0.9 + time / 5, max_order)


class WithFeature:
    """A mixture's denoiser that gives the first three numbers of its state as a feature."""

    def __init__(self, mixture: Gaussian) -> None:
        self.denoise = mixture.denoiser([])

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.denoise(x, sigma)

    def with_feature(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return self(x, sigma), x.flatten(1)[:, :3] / sigma[:, None]
