"""A distribution over EPD tables, for reinforcement learning (RDPO)."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Dirichlet, Distribution, Independent, LogNormal, kl_divergence

from solvers.epd import EPDTable

SMALLEST = 1e-6  # a drawn share is at least this: log-probabilities stay finite, points stay apart

Draw = dict[str, Tensor]
"""Drawn tables, as what the policy draws: `segments` (B, N, K + 1), the lengths of the pieces that the K positions cut (0, 1)
into; `weight` (B, N, K); and those of `direction_scale` and `time_scale` (B, N, K) that are not kept."""


class Policy(nn.Module):
    """Per interval: segments ~ Dirichlet, weights ~ Dirichlet, scales ~ log-normal.

    A small network gives residuals on the logarithms of the Dirichlets' concentrations, around concentration * (base table),
    and of the scales. Its last layer starts at zero, so the policy's mean starts as the base table.

    Args:
        base: the distilled table, (N, K); its points are sorted within each interval.
        concentration: sum of each base Dirichlet's parameters; the larger, the closer the draws stay to the mean.
        scale_std: standard deviation of the logarithm of `direction_scale` and of `time_scale`; 0 keeps the base table's.
        hidden, blocks: width and residual blocks of the network.
    """

    def __init__(self, base: EPDTable, concentration: float, scale_std: dict[str, float], hidden: int, blocks: int) -> None:
        super().__init__()
        self.base = base.sorted()
        self.scale_std = {name: std for name, std in scale_std.items() if std > 0}
        edge = torch.zeros_like(self.base.position[:, :1])
        segments = torch.diff(self.base.position, prepend=edge, append=edge + 1)
        self.start = {"segments": (concentration * segments).log(), "weight": (concentration * self.base.weight).log()}
        for name, std in self.scale_std.items():
            self.start[name] = getattr(self.base, name).log() - std**2 / 2  # so that the log-normal's mean is the base's
        self.embedding = nn.Embedding(len(segments), hidden, dtype=torch.float64)
        self.blocks = nn.ModuleList(_Residual(hidden) for _ in range(blocks))
        self.head = nn.Linear(hidden, sum(s.shape[-1] for s in self.start.values()), dtype=torch.float64)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def distributions(self) -> dict[str, Distribution]:
        """What each part of a table is drawn from: batch shape (N,), event shape (K,) or (K + 1,)."""
        h = self.embedding.weight
        for block in self.blocks:
            h = block(h)
        residuals = self.head(h).split([s.shape[-1] for s in self.start.values()], -1)
        return self._distributions([s + r for s, r in zip(self.start.values(), residuals, strict=True)])

    def draw(self, rng: np.random.Generator, tables: int) -> Draw:
        """Draw that many tables."""
        with torch.no_grad():
            return {name: _draw(rng, distribution, tables) for name, distribution in self.distributions().items()}

    def log_prob(self, draw: Draw) -> Tensor:
        """Log-density of each table, summed over its parts and intervals, (B,)."""
        parts = [distribution.log_prob(draw[name]) for name, distribution in self.distributions().items()]
        return torch.stack(parts).sum((0, -1))

    def kl(self) -> Tensor:
        """KL(policy || policy at the start), summed over parts and intervals, ()."""
        base = self._distributions(list(self.start.values()))
        return torch.stack([kl_divergence(p, base[name]).sum() for name, p in self.distributions().items()]).sum()

    def table(self, draw: Draw) -> EPDTable:
        """The drawn tables, (B, N, K)."""
        position = draw["segments"].cumsum(-1)[..., :-1]
        return EPDTable(
            position=position,
            weight=draw["weight"],
            direction_scale=draw.get("direction_scale", self.base.direction_scale.expand_as(position)),
            time_scale=draw.get("time_scale", self.base.time_scale.expand_as(position)),
        )

    def mean(self) -> EPDTable:
        """The table to deploy: the distributions' means, (N, K)."""
        with torch.no_grad():
            return self.table({name: distribution.mean for name, distribution in self.distributions().items()})

    def _distributions(self, logs: list[Tensor]) -> dict[str, Distribution]:
        """From the logarithms of concentrations and of scales, in the order of `start`."""
        named = dict(zip(self.start, logs, strict=True))
        scales = {name: Independent(LogNormal(named[name], std), 1) for name, std in self.scale_std.items()}
        return {"segments": Dirichlet(named["segments"].exp()), "weight": Dirichlet(named["weight"].exp()), **scales}


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, dtype=torch.float64)
        self.linear = nn.Linear(width, width, dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.linear(nn.functional.silu(self.norm(h)))


def _draw(rng: np.random.Generator, distribution: Distribution, count: int) -> Tensor:
    """That many independent draws, (count, N, K)."""
    if isinstance(distribution, Dirichlet):  # normalised gamma variates
        concentration = distribution.concentration
        gamma = torch.from_numpy(rng.standard_gamma(concentration.numpy(), (count, *concentration.shape)))
        shares = (gamma / gamma.sum(-1, keepdim=True)).clamp_min(SMALLEST)
        return shares / shares.sum(-1, keepdim=True)
    base = distribution.base_dist  # type: ignore[attr-defined]
    return torch.from_numpy(rng.lognormal(base.loc.numpy(), base.scale.numpy(), (count, *base.loc.shape)))
