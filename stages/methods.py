"""How `rdpo` raises a reward: the policy gradient (RDPO), the reward's own gradient, or a search (CMA-ES)."""

from abc import ABC, abstractmethod

import numpy as np
import torch
from cmaes import CMA
from torch import Tensor

from solvers import Draw, Drawable, Policy
from stages.checkpoint import adam_state, load_adam_state, under
from stages.draws import drawn
from stages.files import RolloutError
from stages.noise import noise
from stages.params import RDPO
from stages.ranks import Ranks
from stages.rollouts import Grouping, Rollouts, kept
from stages.training import descend, rng

SAME = 1e-6
"""Rewards of a batch whose advantages are below this share of the largest reward are the same but for rounding."""

Numbers = dict[str, float]
"""Of an iteration, by name; "rows" are evaluations of the network."""


class Method(ABC):
    """Changes a policy, iteration by iteration; every rank holds the same one.

    Args:
        policy: at its start.
        rollouts: make and score images.
        ranks: among which the rollouts of an iteration are split, by groups.
        settings: params.yaml's.
        seed: of the draws.
    """

    def __init__(self, policy: Policy, rollouts: Rollouts, ranks: Ranks, settings: RDPO, seed: int) -> None:
        self.policy = policy
        self.rollouts = rollouts
        self.ranks = ranks
        self.settings = settings
        self.seed = seed

    @abstractmethod
    def step(self, iteration: int) -> Numbers:
        """One iteration's rollouts, and what is learned from them; the same iteration draws the same numbers in every run."""

    @abstractmethod
    def table(self) -> Drawable:
        """The table that it has come to."""

    @abstractmethod
    def kl(self) -> float:
        """KL(policy || policy at the start)."""

    @abstractmethod
    def state(self) -> dict[str, dict[str, Tensor]]:
        """What the next iteration depends on, as copies."""

    @abstractmethod
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on from a checkpoint of `state`."""

    def rewards(self, draw: Draw, iteration: int, grouping: Grouping) -> tuple[Tensor, Numbers]:
        """Rewards (k, G) of an iteration's groups, by all ranks, their statistics, the means of what they are made of, and the
        network's rows: all that ranks exchange.
        """
        count, tables = self.settings.groups, self.settings.tables
        mine = self.ranks.share(count)
        batch = self.rollouts.batch(self.policy, draw, iteration, count, tables, grouping, mine)
        # the rows ride along, each group with its part of them, and so do the parts' means over its tables
        groups = batch.rewards.shape[1]
        rows = torch.full((groups, 1), batch.rows / groups, dtype=torch.float64)
        means = [batch.scores[name].mean(0)[:, None] for name in self.rollouts.reward.parts]
        every = self.ranks.gather(torch.cat([batch.rewards.T, rows, *means], 1), count)
        rewards, (rows, *means) = every[:, :tables].T, every[:, tables:].unbind(1)
        return rewards, {
            "reward": rewards.mean().item(),
            "reward_std": rewards.std().item(),
            "reward_std_in_group": rewards.var(0).mean().sqrt().item(),
            **{f"reward_{name}": mean.mean().item() for name, mean in zip(self.rollouts.reward.parts, means, strict=True)},
            "rows": rows.sum().item(),
        }

    def groups(self, iteration: int) -> range:
        """Training samples whose prompts an iteration's groups have."""
        return range(iteration * self.settings.groups, (iteration + 1) * self.settings.groups)


def asked_of(settings: RDPO) -> range:
    """Training samples whose prompts the iterations' rollouts have: one for each group, or for each image."""
    each = settings.groups * (settings.tables if settings.method == "reward_gradient" else 1)
    return range(each, (settings.iterations + 1) * each)


class _Descent(Method):
    """What the methods with a gradient have: the policy's network, and AdamW."""

    def __init__(self, policy: Policy, rollouts: Rollouts, ranks: Ranks, settings: RDPO, seed: int) -> None:
        super().__init__(policy, rollouts, ranks, settings, seed)
        # no decay: the KL term is what holds the policy back
        self.optimizer = torch.optim.AdamW(policy.parameters(), lr=settings.learning_rate, weight_decay=0.0)

    @torch.no_grad()
    def table(self) -> Drawable:
        return self.policy.mean()

    @torch.no_grad()
    def kl(self) -> float:
        return self.policy.kl().item()

    def state(self) -> dict[str, dict[str, Tensor]]:
        parts = {"policy": self.policy.state_dict(), "adam": adam_state(self.optimizer)}
        return {part: {name: value.detach().clone() for name, value in named.items()} for part, named in parts.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.policy.load_state_dict(under("policy", tensors))
        load_adam_state(self.optimizer, under("adam", tensors))

    def warmed(self, iteration: int) -> float:
        """Of the learning rate, while it warms up."""
        return min(1.0, iteration / self.settings.warmup) if self.settings.warmup else 1.0

    def penalty(self) -> Tensor:
        """What is added to the loss: KL to the start, less entropy, by their coefficients."""
        return self.settings.kl * self.policy.kl() - self.settings.entropy * self.policy.entropy()


class PolicyGradient(_Descent):
    """RDPO: PPO's clipped objective on whole tables, with a leave-one-out baseline (RLOO). Needs no gradient of the reward."""

    def step(self, iteration: int) -> Numbers:
        settings = self.settings
        rollouts = settings.groups * settings.tables
        draw = drawn(self.policy, settings.draws, rng(self.seed, "rdpo", iteration), settings.groups, settings.tables)
        rewards, numbers = self.rewards(draw, iteration, settings.group)
        advantage = advantages(rewards, settings.group).flatten()
        with torch.no_grad():
            old = self.policy.log_prob(draw)
        lengths, clipped = list[float](), list[float]()
        with kept(f"rdpo-{iteration}", {"rewards": rewards, **draw}, self.rollouts.prompts("train", self.groups(iteration))):
            for chosen in self._minibatches(iteration, rollouts):
                ratio = (self.policy.log_prob({name: numbers[chosen] for name, numbers in draw.items()}) - old[chosen]).exp()
                loss = surrogate(advantage[chosen], ratio, settings.clip) + self.penalty()
                lengths.append(descend(self.optimizer, loss, self.warmed(iteration)))
                clipped.append(((ratio - 1).abs() > settings.clip).double().mean().item())
        return {**numbers, "clip_fraction": float(np.mean(clipped)), "gradient_norm": float(np.mean(lengths))}

    def _minibatches(self, iteration: int, rollouts: int) -> list[Tensor]:
        """Rows of the rollouts that each gradient step is of."""
        if self.settings.minibatch is None:
            return [torch.arange(rollouts)] * self.settings.epochs
        order = rng(self.seed, "minibatches", iteration)
        epochs = [torch.from_numpy(order.permutation(rollouts)) for _ in range(self.settings.epochs)]
        return [part for epoch in epochs for part in epoch.split(self.settings.minibatch)]


class RewardGradient(_Descent):
    """The gradient of the reward of the mean table's images, through decoder and sampler. Draws nothing.

    The network's activations are made again for the gradient, call by call. The rollouts, groups times tables of them, have
    each their own prompt and noise.
    """

    def step(self, iteration: int) -> Numbers:
        count = self.settings.groups * self.settings.tables
        mine = range(iteration * count, (iteration + 1) * count)[self.ranks.share(count)]
        means = {name: distribution.mean for name, distribution in self.policy.distributions().items()}
        leaves = {name: mean.detach().requires_grad_() for name, mean in means.items()}
        gradients = [torch.zeros_like(leaf) for leaf in leaves.values()]
        totals, rows = torch.zeros(1 + len(self.rollouts.reward.parts)).double(), 0
        for part in (mine[first : first + self.rollouts.batch_size] for first in range(0, len(mine), self.rollouts.batch_size)):
            start, wanted = (
                noise(self.seed, "train", part, self.rollouts.backend.spec.shape),
                self.rollouts.prompts("train", part),
            )
            with kept(f"rdpo-{iteration}", {"start": start, **{name: leaf.detach() for name, leaf in leaves.items()}}, wanted):
                images, counter = self.rollouts.images(self.policy.table(dict(leaves)), start, wanted, checkpointed=True)
                scores = self.rollouts.score(images, wanted)
                rewards = scores["reward"]
                if not rewards.requires_grad:
                    raise RolloutError("reward: has no gradient; valid: a differentiable reward, or rdpo.method rdpo or cma_es")
                # of the table alone: none of the network's weights
                found = torch.autograd.grad(-rewards.sum() / count, list(leaves.values()), allow_unused=True)
                if not all(bool(gradient.isfinite().all()) for gradient in found if gradient is not None):
                    raise RolloutError("reward: its gradient by the table is not finite; valid: finite numbers")
            gradients = [g if f is None else g + f for g, f in zip(gradients, found, strict=True)]
            totals += torch.stack([scores[name].detach().sum() for name in ("reward", *self.rollouts.reward.parts)])
            rows += counter.rows
        sent = torch.cat([*(g.flatten() for g in gradients), totals / count, torch.tensor([float(rows)]).double()])
        *parts, totals, spent = self.ranks.sum(sent).split([*(g.numel() for g in gradients), len(totals), 1])
        inner = [(mean * part.view_as(mean)).sum() for mean, part in zip(means.values(), parts, strict=True)]
        length = descend(self.optimizer, torch.stack(inner).sum() + self.penalty(), self.warmed(iteration))
        names = ["reward", *(f"reward_{name}" for name in self.rollouts.reward.parts)]
        return {**dict(zip(names, totals.tolist(), strict=True)), "gradient_norm": length, "rows": spent.item()}


class CMAES(Method):
    """CMA-ES over the locations of the policy's distributions (Hansen 2016; the package cmaes). Needs no network, no gradient.

    A generation's tables are compared on the same prompts and noise. The steps start at the policy's spread.
    """

    def __init__(self, policy: Policy, rollouts: Rollouts, ranks: Ranks, settings: RDPO, seed: int) -> None:
        super().__init__(policy, rollouts, ranks, settings, seed)
        self.deviations = policy.deviations()
        self.told: list[Tensor] = []
        self.search = self._new()

    def _new(self) -> CMA:
        seed = int(rng(self.seed, "cma_es").integers(2**31))
        return CMA(np.zeros(len(self.deviations)), 1.0, seed=seed, population_size=self.settings.tables)

    @torch.no_grad()
    def step(self, iteration: int) -> Numbers:
        asked = [self.search.ask() for _ in range(self.settings.tables)]
        found = [self.policy.shifted(torch.from_numpy(x) * self.deviations) for x in asked]
        means = {name: torch.stack([each[name].mean for each in found]) for name in found[0]}
        draw = {name: mean.repeat_interleave(self.settings.groups, 0) for name, mean in means.items()}
        rewards, numbers = self.rewards(draw, iteration, "shared")
        self._tell(asked, rewards.mean(1))
        return numbers

    def _tell(self, asked: list[np.ndarray], values: Tensor) -> None:
        self.told.append(values)
        self.search.tell([(x, -value) for x, value in zip(asked, values.tolist(), strict=True)])

    @torch.no_grad()
    def table(self) -> Drawable:
        return self.policy.mean(self.policy.shifted(torch.from_numpy(self.search.mean) * self.deviations))

    @torch.no_grad()
    def kl(self) -> float:
        return self.policy.kl(self.policy.shifted(torch.from_numpy(self.search.mean) * self.deviations)).item()

    def state(self) -> dict[str, dict[str, Tensor]]:
        """What it was told: all else follows from that and the seed."""
        return {"cma_es": {"told": torch.stack(self.told)}} if self.told else {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.told, self.search = [], self._new()
        for values in under("cma_es", tensors).get("told", torch.empty(0)):
            self._tell([self.search.ask() for _ in values], values)


METHODS: dict[str, type[Method]] = {"rdpo": PolicyGradient, "reward_gradient": RewardGradient, "cma_es": CMAES}


def advantages(rewards: Tensor, grouping: Grouping) -> Tensor:
    """Rewards (k, G) of k tables in each of G groups -> advantages (k, G), of standard deviation 1; all 0 where none differ.

    Each reward less the mean of the k - 1 others of its group ("shared", "prompt"). "mixed" is the published baseline: the
    rollouts in the order of their groups are cut into k rows, of which a column is taken for a group, so that it mixes
    prompts; and the mean over the batch is taken off.
    """
    tables, groups = rewards.shape
    if grouping == "mixed":
        columns = rewards.T.reshape(tables, groups)
        advantage = (columns - (columns.sum(0) - columns) / (tables - 1)).reshape(groups, tables).T
        advantage = advantage - advantage.mean()
    else:
        advantage = rewards - (rewards.sum(0) - rewards) / (tables - 1)
    scale = advantage.square().mean().sqrt()
    return advantage / scale.clamp_min(max(SAME * rewards.abs().max().item(), 1e-8))


def surrogate(advantage: Tensor, ratio: Tensor, clip: float) -> Tensor:
    """PPO's loss: advantages (B,) and ratios of probabilities (B,) -> () (Schulman et al. 2017, equation 7, negated)."""
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)).mean()
