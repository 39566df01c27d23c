"""AMED-Solver: one learned intermediate point per step, chosen from what the network saw (Zhou et al. 2024)."""

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from solvers.epd import check_scales, within
from solvers.table import StepTable

WIDTH, CHANNELS = 128, 8


class AMED(nn.Module):
    """A Solver whose second evaluation and scales depend on the backbone's feature h at the first, for each image:

        d = (x - D(x, sigma)) / sigma
        r, o, a = g(h, sigma, sigma')               tau = sigma'^r sigma^(1 - r)
        d_m = (x_m - D(x_m, a tau)) / tau           x_m = x + (tau - sigma) d
        x' = x + (sigma' - sigma) o d_m

    g is two layers on h beside embeddings of both noise levels. Under AFS the first step has no feature: h = 0 there.

    Args:
        num_steps: nodes of the grid.
        features: F, of the backbone's feature (B, F).
        scale_dir: o lies in [1 - scale_dir, 1 + scale_dir].
        scale_time: a lies in [1 - scale_time, 1 + scale_time].
    """

    def __init__(self, num_steps: int, features: int, scale_dir: float, scale_time: float) -> None:
        super().__init__()
        check_scales(scale_dir=scale_dir, scale_time=scale_time)
        self.num_steps = num_steps
        self.features = features
        self.scale_dir = scale_dir
        self.scale_time = scale_time
        self.bottleneck = nn.Sequential(nn.Linear(features, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 4))
        self.level = nn.Sequential(nn.Linear(CHANNELS, CHANNELS), nn.SiLU())
        self.heads = nn.Linear(4 + 2 * CHANNELS, 3)
        nn.init.zeros_(self.heads.bias)
        self.double()

    @property
    def num_points(self) -> int:
        """K, points of one step."""
        return 1

    def table(self) -> "AMED":
        """Itself: its numbers differ between images, so that there is no one table."""
        return self

    def __call__(self, step: int, sigmas: Tensor) -> StepTable:
        if len(sigmas) != self.num_steps:
            raise ValueError(f"sigmas: {len(sigmas)} nodes; valid: {self.num_steps}, as many as the predictor was made for")
        sigma, sigma_next = sigmas[step], sigmas[step + 1]
        table = StepTable(
            sigma=sigma,
            sigma_next=sigma_next,
            form="noise",
            nodes=torch.stack([sigma, (sigma * sigma_next).sqrt()]),
            stage=torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=torch.float64),
            update=torch.tensor([0.0, 1.0], dtype=torch.float64),
            time_scale=torch.ones(2, dtype=torch.float64),
        )

        def adapt(feature: Tensor | None) -> StepTable:
            feature = torch.zeros(1, self.features) if feature is None else feature
            position, direction, time = self.predict(feature, sigma, sigma_next).unbind(-1)
            ones = torch.ones_like(position)
            return replace(
                table,
                nodes=torch.stack([sigma * ones, sigma_next**position * sigma ** (1 - position)], -1),
                stage=table.stage.expand(len(position), 2, 2),
                update=torch.stack([0 * ones, within(self.scale_dir, direction)], -1),
                time_scale=torch.stack([ones, within(self.scale_time, time)], -1),
                adapt=None,
            )

        return replace(table, adapt=adapt)

    def predict(self, feature: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        """Features (B, F) and the noise levels () of a step -> r in (0, 1) and what o and a are made from, (B, 3)."""
        if feature.shape[-1] != self.features:
            raise ValueError(f"feature: {tuple(feature.shape)}; valid: (B, {self.features}), as the predictor was made for")
        h = self.bottleneck(feature.cpu().double())
        levels = self.level(torch.stack([_embedding(sigma), _embedding(sigma_next)])).flatten()
        out = self.heads(torch.cat([h, levels.expand(len(h), -1)], -1))
        return torch.cat([out[:, :1].sigmoid(), out[:, 1:]], -1)


def _embedding(sigma: Tensor) -> Tensor:
    """Sines and cosines of a noise level (), (CHANNELS,)."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(CHANNELS // 2, dtype=torch.float64) / (CHANNELS // 2 - 1))
    return torch.cat([(sigma * frequencies).sin(), (sigma * frequencies).cos()])
