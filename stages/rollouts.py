"""Images by drawn tables, and their rewards: what reinforcement learning spends its time on."""

import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from backends import counted_denoiser
from metrics.mixture import Mixture
from solvers import Checkpointed, Counter, Deduplicated, Draw, Policy, Predictor, integrate
from solvers.families import Table
from stages.files import FAILED, RolloutError, StageError, write_tensors
from stages.frozen import Frozen
from stages.noise import noise
from stages.ranks import RANK

Grouping = Literal["shared", "prompt", "mixed"]


@dataclass(frozen=True)
class Batch:
    """Scores of rollouts, of k tables in each of G groups, (k, G), float64: the `reward`, and what it is made of, by name; and
    the network's rows spent on them.
    """

    scores: dict[str, Tensor]
    rows: int

    @property
    def rewards(self) -> Tensor:
        return self.scores["reward"]


class Rollouts:
    """Samples from the frozen model by any table in place of the distilled predictor's, and scores the images.

    Args:
        frozen, reward: the model with its prompts, and what is to be raised.
        distilled: says grid, guidance scale and AFS.
        seed: of the noise.
        batch_size: images at a time; changes the speed only.
    """

    def __init__(self, frozen: Frozen, reward: Mixture, distilled: Predictor, seed: int, batch_size: int) -> None:
        self.backend, self.prompts = frozen.backend, frozen.prompts
        self.reward = reward
        self.distilled = distilled
        self.seed = seed
        self.batch_size = batch_size

    def images(self, table: Table, start: Tensor, wanted: Sequence[str], checkpointed: bool = False) -> tuple[Tensor, Counter]:
        """Images (M*B, C, H, W) in [0, 1] of unit noise (M*B, ...), of which row i has prompt i mod B, and what they cost.

        By one table, or by a batch of M*B tables. The M states of a prompt are evaluated once where they are the same. With
        `checkpointed` the counter goes on in the backward pass, which evaluates the network again.
        """
        predictor = replace(self.distilled, table=table)
        negative = [self.prompts.negative] * len(wanted)
        denoise, counter = counted_denoiser(self.backend, wanted, predictor.guidance_scale, negative)
        denoise = Checkpointed(denoise) if checkpointed else Deduplicated(denoise, len(start) // len(wanted))
        x = integrate(denoise, predictor, self.backend.spec.state(predictor.sigmas[0] * start), predictor.sigmas)
        return self.backend.decode(x), counter

    def score(self, images: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
        """Of images (M*B, ...) whose row i has prompt i mod B, what the reward is made of and the `reward`; each checked.

        (M*B,), float64 on the CPU.
        """
        repeated = [wanted[i % len(wanted)] for i in range(len(images))]
        scores = {name: checked(name, part.scorer(images, repeated), repeated) for name, part in self.reward.parts.items()}
        return {**scores, "reward": self.reward.mixed(scores)}

    def batch(
        self, policy: Policy, draw: Draw, iteration: int, groups: int, tables: int, grouping: Grouping, mine: slice
    ) -> Batch:
        """This rank's share of an iteration's rollouts: k tables in each of G groups, which have a prompt each.

        Args:
            policy: makes tables of the draw.
            draw: for all groups; the j-th table of the g-th is in row j G + g.
            iteration: decides prompts and noise: its groups have those of training samples iteration G to (iteration + 1) G.
            groups, tables: G and k.
            grouping: "shared": a group has one noise; else each of its samples has its own.
            mine: which of the groups.

        Raises:
            RolloutError: the model or the reward failed, or gave what it may not; the batch is in data/failed.
        """
        mine_of = {name: numbers.unflatten(0, (tables, -1))[:, mine] for name, numbers in draw.items()}  # (k, G', N, n)
        samples = range(iteration * groups, (iteration + 1) * groups)[mine]
        wanted, start = self.prompts("train", samples), self._noise(samples, tables, grouping)
        size, rows, pending = max(1, self.batch_size // tables), 0, list[Future[dict[str, Tensor]]]()
        with kept(f"rdpo-{iteration}", {"start": start, **mine_of}, wanted), ThreadPoolExecutor(1) as scorer, torch.no_grad():
            for part in (slice(first, first + size) for first in range(0, len(samples), size)):
                table = policy.table({name: numbers[:, part].flatten(0, 1) for name, numbers in mine_of.items()})
                images, counter = self.images(table, start[:, part].flatten(0, 1), wanted[part])
                rows += counter.rows
                for earlier in pending[-1:]:  # no more than one part waits to be scored
                    earlier.result()
                pending.append(scorer.submit(self._scored, images, wanted[part], f"rdpo-{iteration}-images"))
            found = [future.result() for future in pending]
        every = {name: torch.cat([scores[name].unflatten(0, (tables, -1)) for scores in found], 1) for name in found[0]}
        return Batch(every, rows)

    def _scored(self, images: Tensor, wanted: Sequence[str], name: str) -> dict[str, Tensor]:
        with kept(name, {"images": images}, wanted), torch.no_grad():  # which is each thread's own
            return self.score(images, wanted)

    def _noise(self, samples: range, tables: int, grouping: Grouping) -> Tensor:
        """Unit noise (k, G', ...)."""
        shape = self.backend.spec.shape
        if grouping == "shared":
            return noise(self.seed, "train", samples, shape).expand(tables, -1, *shape)
        own = [sample * tables + table for table in range(tables) for sample in samples]
        return noise(self.seed, "train", own, shape).unflatten(0, (tables, -1))


def checked(name: str, scores: Tensor, wanted: Sequence[str]) -> Tensor:
    """Scores (B,) of B images by prompts, as float64 on the CPU.

    Raises:
        RolloutError: they are of another shape or not finite.
    """
    if not isinstance(scores, Tensor) or scores.shape != (len(wanted),):
        found = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise RolloutError(f"{name}: {found}; valid: ({len(wanted)},), a number for each image")
    scores = scores.double().cpu()
    if not bool(scores.isfinite().all()):
        bad = (~scores.isfinite()).nonzero().flatten().tolist()
        found = {row: (scores[row].item(), wanted[row]) for row in bad[:4]}
        raise RolloutError(f"{name}: not finite for {len(bad)} of {len(wanted)} images, by row {found}; valid: finite numbers")
    return scores


def tensors_of(table: Table) -> dict[str, Tensor]:
    """A table's numbers by name."""
    return {name: value for name, value in vars(table).items() if isinstance(value, Tensor)}


@contextmanager
def kept(name: str, tensors: dict[str, Tensor], wanted: Sequence[str]) -> Iterator[None]:
    """Write tensors and prompts to data/failed where what is done with them fails, and say where."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):  # nothing is wrong with the batch but its size
        raise
    except Exception as error:
        file = FAILED / f"{name}-rank{RANK}.safetensors"
        write_tensors(file, tensors, {"prompts": list(wanted), "error": traceback.format_exc()})
        told = str(error) if isinstance(error, StageError | FloatingPointError) else f"{type(error).__name__}: {error}"
        raise RolloutError(f"{told}; see {file}") from error
