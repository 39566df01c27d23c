"""What a table is worth on fixed validation prompts and noise, against the table that training starts from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from metrics import Scorer
from metrics.extractors import Extractor
from metrics.frechet import Statistics, distance, require_images, statistics
from solvers import Drawable
from stages.files import InputError, RolloutError
from stages.noise import batches, noise
from stages.ranks import Ranks
from stages.rollouts import Rollouts, checked, kept, tensors_of
from stages.statistics import half_interval

MOVED = 0.1
"""Share of its start by which a watched quantity may move before it is told."""

ROUNDING = 1e-7
"""Rewards whose standard deviation is below this share of the largest are one number, as single precision has it."""

Point = dict[str, float]


@dataclass(frozen=True)
class Watch:
    """What looks at images beside the reward, so that a reward raised at their cost is seen.

    Attributes:
        judges: scores of which more is better, never the reward or learned with it.
        watched: what a reward is easily raised by: told when it moves, neither good nor bad.
        extractor, refs: of the distance to real images.
    """

    judges: Mapping[str, Scorer]
    watched: Mapping[str, Scorer]
    extractor: Extractor
    refs: Statistics


class Validation:
    """Scores tables on so many samples of validation noise, split among ranks, paired with the table that it starts with.

    Args:
        rollouts: make and score images.
        watch: judges of the images.
        ranks: among which the samples are split.
        seed, samples: which noise, how many.

    Attributes:
        start, start_distance: scores by name, (samples,), and Frechet distance of the first table; kept in checkpoints.
        rows: of the network, spent on validation.
    """

    def __init__(self, rollouts: Rollouts, watch: Watch, ranks: Ranks, seed: int, samples: int) -> None:
        self.rollouts = rollouts
        self.watch = watch
        self.ranks = ranks
        self.seed = seed
        self.samples = samples
        try:
            require_images(samples, watch.extractor.width)
        except ValueError as error:
            raise InputError(f"rdpo.validation: {error}") from error
        self.start: dict[str, Tensor] = {}
        self.start_distance = math.inf
        self.rows = 0.0

    def begin(self, table: Drawable) -> Point:
        """The point of the table that others will be compared with."""
        self.start, self.start_distance = self._scores(table, 0)
        return self._point(0, self.start, self.start_distance, 0.0)

    def point(self, iteration: int, table: Drawable, kl: float) -> Point:
        """A table's mean scores and their paired changes from the start, each with half its 95 % interval ("_95")."""
        return self._point(iteration, *self._scores(table, iteration), kl)

    def _point(self, iteration: int, scores: dict[str, Tensor], found: float, kl: float) -> Point:
        gain = scores["reward"] - self.start["reward"]
        point = {
            "iteration": iteration,
            "reward": scores["reward"].mean().item(),
            "reward_95": half_interval(scores["reward"]),
            "gain": gain.mean().item(),
            "gain_95": half_interval(gain),
            "frechet_distance": found,
        }
        for name in [*self.rollouts.reward.parts, *self.watch.judges, *self.watch.watched]:
            change = scores[name] - self.start[name]
            point |= {name: scores[name].mean().item(), f"{name}_change": change.mean().item()}
            point[f"{name}_change_95"] = half_interval(change)
        return {**point, "kl": kl}

    def alarms(self, point: Point) -> list[str]:
        """What has become worse, or is other than at the start."""
        found = [f"{name} {point[f'{name}_change']:+.4f} ± {point[f'{name}_change_95']:.4f}" for name in self._fallen(point)]
        if point["frechet_distance"] > self.start_distance:
            found.append(f"frechet_distance {point['frechet_distance']:.4f}, above {self.start_distance:.4f} at the start")
        for name in self.watch.watched:
            change, half, start = point[f"{name}_change"], point[f"{name}_change_95"], self.start[name].mean().item()
            if abs(change) - half > MOVED * start:
                found.append(f"{name} {change:+.3f} ± {half:.3f} from {start:.3f}")
        return found

    def worse(self, point: Point) -> bool:
        """Whether a point may not be deployed: its distance is above the start's, or a judge has fallen beyond its interval."""
        return point["frechet_distance"] > self.start_distance or bool(self._fallen(point))

    def _fallen(self, point: Point) -> list[str]:
        """Judges that find a point worse than the start, by their 95 % interval."""
        return [name for name in self.watch.judges if point[f"{name}_change"] + point[f"{name}_change_95"] < 0]

    @torch.no_grad()
    def _scores(self, table: Drawable, iteration: int) -> tuple[dict[str, Tensor], float]:
        """Scores by name, (samples,), and the Frechet distance."""
        mine = range(self.samples)[self.ranks.share(self.samples)]
        others = {**self.watch.judges, **self.watch.watched}
        parts: list[dict[str, Tensor]] = []
        rows = 0
        for batch in batches(len(mine), self.rollouts.batch_size):
            samples = mine[batch.start : batch.stop]
            wanted = self.rollouts.prompts("validation", samples)
            start = noise(self.seed, "validation", samples, self.rollouts.backend.spec.shape)
            with kept(f"rdpo-{iteration}-validation", {"start": start, **tensors_of(table)}, wanted):
                images, counter = self.rollouts.images(table, start, wanted)
                scores = {name: checked(name, scorer(images, wanted), wanted) for name, scorer in others.items()}
                parts.append({**self.rollouts.score(images, wanted), **scores, "features": self.watch.extractor(images)})
            rows += counter.rows
        every = {name: self.ranks.gather(torch.cat([part[name] for part in parts]), self.samples) for name in parts[0]}
        self.rows += self.ranks.sum(torch.tensor(float(rows), dtype=torch.float64)).item()
        features = every.pop("features")
        with kept(
            f"rdpo-{iteration}-validation",
            {**every, **tensors_of(table)},
            self.rollouts.prompts("validation", range(self.samples)),
        ):
            check_spread(every)
            found = distance(statistics(features), self.watch.refs)
            if not math.isfinite(found):
                raise RolloutError(f"frechet_distance: {found} at iteration {iteration}; valid: a finite number")
        return every, found


def check_spread(scores: dict[str, Tensor]) -> None:
    """Raise RolloutError where scores are too large to be compared, or all rewards are the same but for rounding."""
    for name, values in scores.items():
        if not math.isfinite(values.std().item()):
            raise RolloutError(f"{name}: up to {values.abs().max().item():.3g}; valid: numbers that can be squared")
    reward = scores["reward"]
    if reward.std() <= ROUNDING * reward.abs().max():
        found = f"{reward[0].item():.6g} for all {len(reward)} validation images"
        raise RolloutError(f"reward: {found}; valid: one that tells images apart")
