"""A distribution over learned tables, for reinforcement learning (RDPO)."""

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Dirichlet, Distribution, LogNormal, Normal, kl_divergence

from solvers.epd import EPDTable
from solvers.multistep import MultistepTable

SMALLEST = 1e-6  # a share of the base is at least this: log-concentrations stay finite
SMALLEST_DRAWN = 1e-9  # and of a draw: log-probabilities stay finite, points stay apart
LOG_STD = (-7.0, 2.0)
"""Range of the logarithm of a standard deviation, as published."""

Draw = dict[str, Tensor]
"""Drawn tables, as what the policy draws: (B, N, n) each. Of EPD tables `segments`, the lengths of the K + 1 pieces that the K
positions cut (0, 1) into, `weight`, `direction_scale` and `time_scale`. Of multistep tables `update`, the coefficients of the
next states, `node` and `stage`, noise levels and coefficients of the K - 1 look-ahead points, and `time_scale`."""

Distributions = dict[str, Distribution]
Drawable = EPDTable | MultistepTable
"""The tables that a policy draws around, and draws."""


@dataclass(frozen=True)
class Spread:
    """How far draws stray from the distilled table at the start; 0 keeps the table's numbers.

    Attributes:
        concentration: sum of each Dirichlet's parameters (positions and weights of EPD tables); the larger, the closer.
        direction_scale, time_scale: standard deviation of these scales' logarithms.
        coefficient: standard deviation of a multistep table's coefficients.
        node: standard deviation of the logarithm of a look-ahead point's noise level.
    """

    concentration: float = 1000.0
    direction_scale: float = 0.0
    time_scale: float = 0.0
    coefficient: float = 0.0
    node: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.concentration < math.inf:
            raise ValueError(f"concentration: {self.concentration}; valid: a positive number")
        lowest, highest = (round(math.exp(end), 4) for end in LOG_STD)
        for name in [field.name for field in fields(self)][1:]:
            std = getattr(self, name)
            if std != 0 and not lowest <= std <= highest:
                raise ValueError(f"{name}: standard deviation {std}; valid: 0, or {lowest} to {highest}")


class Policy(nn.Module):
    """Per interval: segments and weights ~ Dirichlet, scales and nodes ~ log-normal, coefficients ~ normal.

    A small network of the interval gives residuals on the logarithms of the concentrations, and on the locations and
    logarithms of the standard deviations, around those at the start. Its last layer starts at zero, so the policy's mean
    starts as the base table. (RDPO, in EPD-Solver's second publication; the network is the published one.)

    Args:
        base: the distilled table; an EPD table's points are sorted within each interval.
        spread: of the draws at the start.
        hidden, blocks: width and residual blocks of the network.

    Raises:
        ValueError: points coincide, or nothing is to be drawn.
    """

    def __init__(self, base: Drawable, spread: Spread, hidden: int, blocks: int) -> None:
        super().__init__()
        self.base = base.sorted() if isinstance(base, EPDTable) else base
        self.parts = _epd_parts(self.base, spread) if isinstance(self.base, EPDTable) else _multistep_parts(self.base, spread)
        if not self.parts:
            raise ValueError(f"spread: {spread}; valid: something to draw of a multistep table (coefficient, time_scale, node)")
        self.embedding = nn.Embedding(self.base.num_steps - 1, hidden, dtype=torch.float64)
        self.blocks = nn.ModuleList(_Residual(hidden) for _ in range(blocks))
        self.head = nn.Linear(hidden, sum(part.start.shape[-1] for part in self.parts.values()), dtype=torch.float64)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def distributions(self) -> Distributions:
        """What each part of a table is drawn from: (N, n) numbers."""
        h = self.embedding.weight
        for block in self.blocks:
            h = block(h)
        residuals = self.head(h).split([part.start.shape[-1] for part in self.parts.values()], -1)
        return {name: part.distribution(r) for (name, part), r in zip(self.parts.items(), residuals, strict=True)}

    def deviations(self) -> Tensor:
        """Standard deviations, at the start, of what locates the draws: (D,) in the order that `shifted` takes them.

        They are of the logarithms of gamma variates (whose shares the Dirichlets are), of logarithms, of coefficients.
        """
        return torch.cat([part.deviations()[part.drawn().bool()] for part in self.parts.values()])

    def shifted(self, offsets: Tensor) -> Distributions:
        """The distributions at the start, moved by D offsets: what a search without the network looks through."""
        found, first = {}, 0
        for name, part in self.parts.items():
            mask = part.drawn().bool()
            last = first + int(mask.sum())
            moved = torch.zeros_like(part.start)
            moved[..., : mask.shape[-1]][mask] = offsets[first:last]
            found[name] = part.distribution(moved)
            first = last
        return found

    def draw(self, rng: np.random.Generator, tables: int) -> Draw:
        """Draw that many tables."""
        with torch.no_grad():
            return {name: _draw(rng, distribution, tables) for name, distribution in self.distributions().items()}

    def log_prob(self, draw: Draw) -> Tensor:
        """Log-density of each table, summed over its parts and intervals, (B,)."""
        found = self.distributions()
        return torch.stack([part.total(found[name].log_prob(draw[name])) for name, part in self.parts.items()]).sum(0)

    def kl(self, distributions: Distributions | None = None) -> Tensor:
        """KL(policy || policy at the start), summed over parts and intervals, (); of other distributions where given."""
        found = self.distributions() if distributions is None else distributions
        each = [part.total(kl_divergence(found[name], part.distribution())) for name, part in self.parts.items()]
        return torch.stack(each).sum()

    def entropy(self) -> Tensor:
        """Differential entropy, summed over parts and intervals, ()."""
        found = self.distributions()
        return torch.stack([part.total(found[name].entropy()) for name, part in self.parts.items()]).sum()

    def table(self, draw: Draw) -> Drawable:
        """The drawn tables: what the draw lacks is the base's."""
        if isinstance(self.base, MultistepTable):
            return _multistep_table(self.base, draw)
        position = draw["segments"].cumsum(-1)[..., :-1]
        kept = {name: getattr(self.base, name) for name in ("direction_scale", "time_scale")}
        scales = {name: draw.get(name, value.expand_as(position)) for name, value in kept.items()}
        return replace(self.base, position=position, weight=draw["weight"], **scales)

    def mean(self, distributions: Distributions | None = None) -> Drawable:
        """The table to deploy: the distributions' means. Differentiable."""
        found = self.distributions() if distributions is None else distributions
        return self.table({name: distribution.mean for name, distribution in found.items()})


@dataclass(frozen=True)
class _Part:
    """What is drawn of every interval.

    Attributes:
        family: of its distributions.
        start: its numbers at the start: logarithms of concentrations (N, n), or n locations and n logarithms of standard
            deviations (N, 2 n).
        used: 0 where a number that is drawn is no part of the table, (N, n); of a Dirichlet, of whole intervals, (N,).
    """

    family: Literal["dirichlet", "log_normal", "normal"]
    start: Tensor
    used: Tensor

    def distribution(self, residual: Tensor | float = 0.0) -> Distribution:
        numbers = self.start + residual
        if self.family == "dirichlet":
            return Dirichlet(numbers.exp())
        location, log_std = numbers.chunk(2, -1)
        std = log_std.clamp(*LOG_STD).exp()
        return LogNormal(location, std) if self.family == "log_normal" else Normal(location, std)

    def total(self, each: Tensor) -> Tensor:
        """Log-densities, divergences or entropies, of each number (..., N, n) or Dirichlet (..., N) -> their sum (...)."""
        return (each * self.used).sum(tuple(range(-self.used.ndim, 0)))

    def drawn(self) -> Tensor:
        """`used` for each number, (N, n)."""
        return self.used if self.used.ndim == 2 else self.used[:, None].expand_as(self.start)

    def deviations(self) -> Tensor:
        """Standard deviations, (N, n)."""
        if self.family == "dirichlet":
            return torch.polygamma(1, self.start.exp()).sqrt()
        return self.start.chunk(2, -1)[1].exp()


def _epd_parts(base: EPDTable, spread: Spread) -> dict[str, _Part]:
    edge = torch.zeros_like(base.position[:, :1])
    shares = {"segments": torch.diff(base.position, prepend=edge, append=edge + 1), "weight": base.weight}
    found = {
        "segments": f"points {base.position.tolist()}, two of which, or a point and an end of its interval, coincide",
        "weight": f"weights {base.weight.tolist()}",
    }
    for name, value in shares.items():
        if not bool((value >= SMALLEST).all()):
            valid = "points inside (0, 1)" if name == "segments" else "positive weights"
            raise ValueError(f"base: {found[name]}; valid: {valid}, apart from one another, by {SMALLEST} or more")
    of_intervals = torch.ones_like(edge[:, 0])
    parts = {name: _Part("dirichlet", (spread.concentration * s).log(), of_intervals) for name, s in shares.items()}
    scales = {"direction_scale": spread.direction_scale, "time_scale": spread.time_scale}
    return parts | {name: _log_normal(getattr(base, name), std) for name, std in scales.items() if std}


def _multistep_parts(base: MultistepTable, spread: Spread) -> dict[str, _Part]:
    """The first step has its main point alone; coefficients of 0 are of outputs that never were there, or stay 0."""
    points = torch.ones_like(base.time_scale)
    points[0, 1:] = 0
    parts = {}
    if spread.coefficient:
        parts["update"] = _normal(base.update, spread.coefficient)
    if spread.coefficient and base.num_points > 1:
        parts["stage"] = _normal(_ahead(base), spread.coefficient)
    if spread.node and base.num_points > 1:
        parts["node"] = _log_normal(base.nodes[:, 1:], spread.node, points[:, 1:])
    if spread.time_scale:
        parts["time_scale"] = _log_normal(base.time_scale, spread.time_scale, points)
    return parts


def _log_normal(mean: Tensor, std: float, used: Tensor | None = None) -> _Part:
    """Of the given means (N, n)."""
    start = torch.cat([mean.log() - std**2 / 2, torch.full_like(mean, math.log(std))], -1)
    return _Part("log_normal", start, torch.ones_like(mean) if used is None else used)


def _normal(mean: Tensor, std: float) -> _Part:
    """Of the given means (N, n), where they are not 0."""
    start = torch.cat([mean, torch.full_like(mean, math.log(std))], -1)
    return _Part("normal", start, (mean != 0).double())


def _ahead(base: MultistepTable) -> Tensor:
    """The coefficients that look-ahead states may have, (N, (K - 1) H K)."""
    return base.stage[:, 1:, : -base.num_points].flatten(1)


def _multistep_table(base: MultistepTable, draw: Draw) -> MultistepTable:
    """Nothing is evaluated, or shown to the network, beyond the noise levels of the base, which it may not know."""
    found: dict[str, Tensor] = {}
    if "update" in draw:
        found["update"] = draw["update"] * (base.update != 0)
    if "stage" in draw:
        ahead = (draw["stage"] * (_ahead(base) != 0)).unflatten(-1, base.stage[0, 1:, : -base.num_points].shape)
        # the main point's row is above, the step's own columns beside
        found["stage"] = nn.functional.pad(ahead, (0, base.num_points, 1, 0))
    if "node" in draw:
        ahead = draw["node"].clamp(base.nodes.min(), base.nodes.max())
        found["nodes"] = torch.cat([base.nodes[:, :1].expand(*ahead.shape[:-1], 1), ahead], -1)
    if "node" in draw or "time_scale" in draw:
        nodes, shown = found.get("nodes", base.nodes), torch.cat([base.nodes, base.nodes * base.time_scale])
        found["time_scale"] = (nodes * draw.get("time_scale", base.time_scale)).clamp(shown.min(), shown.max()) / nodes
    return replace(base, **found)


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, dtype=torch.float64)
        self.linear = nn.Linear(width, width, dtype=torch.float64)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.linear(nn.functional.silu(self.norm(h)))


def _draw(rng: np.random.Generator, distribution: Distribution, count: int) -> Tensor:
    """That many independent draws, (count, N, n)."""
    match distribution:
        case Dirichlet(concentration=concentration):  # normalised gamma variates
            return shares(torch.from_numpy(rng.standard_gamma(concentration.numpy(), (count, *concentration.shape))))
        case LogNormal(loc=loc, scale=scale):
            return torch.from_numpy(rng.lognormal(loc.numpy(), scale.numpy(), (count, *loc.shape)))
        case Normal(loc=loc, scale=scale):
            return torch.from_numpy(rng.normal(loc.numpy(), scale.numpy(), (count, *loc.shape)))
    raise TypeError(f"distribution: {distribution}; valid: Dirichlet, LogNormal, Normal")


def shares(gamma: Tensor) -> Tensor:
    """Gamma variates (..., n) -> what they make of their sum, (..., n): a Dirichlet's draw."""
    gamma = gamma.clamp_min(1e-300)  # those of small concentrations underflow, maybe all of them
    found = (gamma / gamma.sum(-1, keepdim=True)).clamp_min(SMALLEST_DRAWN)
    return found / found.sum(-1, keepdim=True)
