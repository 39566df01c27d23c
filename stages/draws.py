"""Tables drawn from a policy for groups: independently, or spread evenly within each group."""

import math
from typing import Literal

import numpy as np
import torch
from scipy.special import gammaincinv, ndtri
from scipy.stats.qmc import Sobol
from torch import Tensor
from torch.distributions import Dirichlet, LogNormal

from solvers import Draw, Policy
from solvers.policy import shares

Spacing = Literal["independent", "sobol"]

EDGE = 1e-12  # quantiles stay as far from 0 and 1: draws stay finite


def drawn(policy: Policy, spacing: Spacing, rng: np.random.Generator, groups: int, tables: int) -> Draw:
    """k tables for each of G groups, the j-th of the g-th in row j G + g; with "sobol" a group's are a scrambled sequence."""
    if spacing == "independent":
        return policy.draw(rng, groups * tables)
    whole = math.ceil(math.log2(tables))  # of the sequence: it is even in powers of two
    points = [Sobol(numbers_of(policy), rng=rng).random_base2(whole)[:tables] for _ in range(groups)]
    return at_quantiles(policy, torch.from_numpy(np.stack(points, 1)).flatten(0, 1))


def numbers_of(policy: Policy) -> int:
    """D, numbers in a drawn table."""
    return sum(part.drawn().numel() for part in policy.parts.values())


@torch.no_grad()
def at_quantiles(policy: Policy, uniform: Tensor) -> Draw:
    """Numbers in (0, 1), (B, D), to tables: by the inverse distribution functions of what the policy draws."""
    found, first = {}, 0
    for name, distribution in policy.distributions().items():
        shape = policy.parts[name].drawn().shape
        u = uniform[:, first : first + shape.numel()].unflatten(1, shape).clamp(EDGE, 1 - EDGE).numpy()
        first += shape.numel()
        if isinstance(distribution, Dirichlet):
            found[name] = shares(torch.from_numpy(gammaincinv(distribution.concentration.numpy(), u)))
            continue
        normal = distribution.base_dist if isinstance(distribution, LogNormal) else distribution
        values = normal.loc + normal.scale * torch.from_numpy(ndtri(u))  # type: ignore[attr-defined]
        found[name] = values.exp() if isinstance(distribution, LogNormal) else values
    return found
