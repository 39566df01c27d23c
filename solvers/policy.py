"""A distribution over learned tables, for reinforcement learning (RDPO)."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Dirichlet, Distribution, Independent, LogNormal, kl_divergence

from solvers.epd import EPDTable
from solvers.multistep import MultistepTable

SMALLEST = 1e-6  # a drawn share is at least this: log-probabilities stay finite, points stay apart

Draw = dict[str, Tensor]
"""Drawn tables, as what the policy draws. Of EPD tables `segments` (B, N, K + 1), the lengths of the pieces that the K
positions cut (0, 1) into, and `weight` (B, N, K); `direction_scale` and `time_scale`, where they are not kept, (B, N, K). Of
multistep tables `direction_scale` is a factor on each coefficient of the next states, (B, N, W)."""


class Policy(nn.Module):
    """Per interval: segments ~ Dirichlet, weights ~ Dirichlet, scales ~ log-normal. Multistep tables have scales alone.

    A small network gives residuals on the logarithms of the Dirichlets' concentrations, around concentration * (base table),
    and of the scales. Its last layer starts at zero, so the policy's mean starts as the base table.

    Args:
        base: the distilled table; an EPD table's points are sorted within each interval.
        concentration: sum of each base Dirichlet's parameters; the larger, the closer the draws stay to the mean.
        scale_std: standard deviation of the logarithm of `direction_scale` and of `time_scale`; 0 keeps the base table's.
        hidden, blocks: width and residual blocks of the network.
    """

    def __init__(
        self, base: EPDTable | MultistepTable, concentration: float, scale_std: dict[str, float], hidden: int, blocks: int
    ) -> None:
        super().__init__()
        self.base = base.sorted() if isinstance(base, EPDTable) else base
        self.scale_std = {name: std for name, std in scale_std.items() if std > 0}
        self.start: dict[str, Tensor] = {}
        if isinstance(self.base, EPDTable):
            edge = torch.zeros_like(self.base.position[:, :1])
            segments = torch.diff(self.base.position, prepend=edge, append=edge + 1)
            self.start = {"segments": (concentration * segments).log(), "weight": (concentration * self.base.weight).log()}
            self.scales = {"direction_scale": self.base.direction_scale, "time_scale": self.base.time_scale}
            self.used = {name: torch.ones_like(value) for name, value in self.scales.items()}
        else:
            self.scales = {"direction_scale": torch.ones_like(self.base.update), "time_scale": self.base.time_scale}
            # a factor on nothing is drawn, but it is no part of the table: the first step's other points, what never was there
            used_points = torch.ones_like(self.base.time_scale)
            used_points[0, 1:] = 0
            self.used = {"direction_scale": (self.base.update != 0).double(), "time_scale": used_points}
        for name, std in self.scale_std.items():
            self.start[name] = self.scales[name].log() - std**2 / 2  # so that the log-normal's mean is the base's
        if not self.start:
            raise ValueError(f"scale_std: {scale_std}; valid: one above 0, or there is nothing to draw of a multistep table")
        self.embedding = nn.Embedding(self.base.num_steps - 1, hidden, dtype=torch.float64)
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
        total = torch.zeros((), dtype=torch.float64)
        for name, distribution in self.distributions().items():
            if name in self.used:
                each = distribution.base_dist.log_prob(draw[name]) * self.used[name]  # type: ignore[attr-defined]
                total = total + each.sum((-2, -1))
            else:
                total = total + distribution.log_prob(draw[name]).sum(-1)
        return total

    def kl(self) -> Tensor:
        """KL(policy || policy at the start), summed over parts and intervals, ()."""
        base, total = self._distributions(list(self.start.values())), torch.zeros((), dtype=torch.float64)
        for name, p in self.distributions().items():
            if name in self.used:
                each = kl_divergence(p.base_dist, base[name].base_dist) * self.used[name]  # type: ignore[attr-defined]
            else:
                each = kl_divergence(p, base[name])
            total = total + each.sum()
        return total

    def table(self, draw: Draw) -> EPDTable | MultistepTable:
        """The drawn tables: those of the draw's parts that it lacks are the base's."""
        if isinstance(self.base, MultistepTable):
            update = self.base.update * draw.get("direction_scale", self.scales["direction_scale"])
            return replace(self.base, update=update, time_scale=draw.get("time_scale", self.base.time_scale))
        position = draw["segments"].cumsum(-1)[..., :-1]
        scales = {name: draw.get(name, value.expand_as(position)) for name, value in self.scales.items()}
        return replace(self.base, position=position, weight=draw["weight"], **scales)

    def mean(self) -> EPDTable | MultistepTable:
        """The table to deploy: the distributions' means."""
        with torch.no_grad():
            return self.table({name: distribution.mean for name, distribution in self.distributions().items()})

    def _distributions(self, logs: list[Tensor]) -> dict[str, Distribution]:
        """From the logarithms of concentrations and of scales, in the order of `start`."""
        named = dict(zip(self.start, logs, strict=True))
        scales = {name: Independent(LogNormal(named[name], std), 1) for name, std in self.scale_std.items()}
        shares = {name: Dirichlet(logs.exp()) for name, logs in named.items() if name not in scales}
        return {**shares, **scales}


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
