"""Stage rdpo: the distilled table fine-tuned for a reward, by reinforcement learning (RDPO), its gradient, or search."""

import sys
import time
from dataclasses import dataclass, fields, replace
from typing import Any

import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from metrics.frechet import load_record, load_statistics
from solvers import AMED, Drawable, Metric, Policy, Predictor, Spread, load_predictor, save_predictor
from solvers.families import Table
from stages.checkpoint import Checkpoint, under
from stages.command import command, progress
from stages.files import (
    DISTILLED,
    LIVE,
    LOGS,
    METRICS,
    RDPO,
    REFS,
    RESULTS,
    InputError,
    StageError,
    atomic,
    reading,
    require,
    sha256,
    write_csv,
)
from stages.frozen import RECORD, load_frozen
from stages.methods import METHODS, Method, asked_of
from stages.params import RDPO as RDPOParams  # noqa: N811
from stages.params import Compute
from stages.ranks import Ranks
from stages.rollouts import Rollouts, tensors_of
from stages.scorers import load_scorers
from stages.trace import Trace
from stages.training import seeded
from stages.validation import Point, Validation, Watch

UNTIED = {"batch_size", "iterations", "kl_alarm", "checkpoint_every", "checkpoint_minutes"}
"""Parameters that may be others when a run goes on: they do not change what an iteration computes."""


def rdpo(*, seed: int, guidance_scale: float, compute: Compute, rdpo: RDPOParams) -> None:
    """Raise the reward; deploy the table that is best on validation noise among those that no judge finds worse.

    Under torchrun the ranks split the rollouts.
    """
    ranks = Ranks()
    if rdpo.groups % ranks.size:
        raise InputError(f"rdpo.groups: {rdpo.groups} for {ranks.size} ranks; valid: a multiple of the ranks, which split them")
    with reading(DISTILLED):
        distilled = load_predictor(DISTILLED, guidance_scale=guidance_scale)
    policy = new_policy(distilled.table, rdpo, seed)
    asked = {"train": asked_of(rdpo), "validation": range(rdpo.validation)}
    frozen, scorers = load_frozen(guidance_scale, compute, asked), load_scorers(compute)
    with reading(REFS):
        refs = load_statistics(REFS, scorers.extractor.width)
        require(REFS, "features of", load_record(REFS).get("features"), scorers.features_of)
    scorers.load()
    watch = Watch(scorers.judges, scorers.watched, scorers.extractor, refs)
    rollouts = Rollouts(frozen, scorers.reward, distilled, seed, rdpo.batch_size)
    method = METHODS[rdpo.method](policy, rollouts, ranks, rdpo, seed)
    validation = Validation(rollouts, watch, ranks, seed, rdpo.validation)
    inputs = [RECORD, METRICS, REFS, *sorted(DISTILLED.iterdir())]
    checkpoint = Checkpoint("rdpo", {"seed": seed, "rdpo": rdpo}, inputs, UNTIED)
    training = Training(method, validation, checkpoint, ranks, rdpo)
    training.run()
    if ranks.first:
        write(training, distilled, seed, rdpo)
        checkpoint.remove()
    ranks.close()


def new_policy(table: Table, rdpo: RDPOParams, seed: int) -> Policy:
    """Around a distilled table."""
    if isinstance(table, AMED):
        raise InputError(f"{DISTILLED}: family amed; valid: another distill.family, which has a table to draw around")
    spread = Spread(rdpo.concentration, rdpo.direction_std, rdpo.time_std, rdpo.coefficient_std, rdpo.node_std)
    try:
        return seeded(seed, "policy", lambda: Policy(table, spread, rdpo.hidden, rdpo.blocks))
    except ValueError as error:
        raise InputError(f"{DISTILLED}: no policy can be drawn around this table: {error}") from error


@dataclass(frozen=True)
class Progress:
    """What a run has come to after a whole iteration.

    Attributes:
        curve: validations, that of the distilled table first.
        chosen: the one to deploy.
        best: its table.
        done: iterations.
        rows: of the network, spent on rollouts.
        kl: KL(policy || policy at the start).
        stopped: why the run ended, where it did before its last iteration.
    """

    curve: list[Point]
    chosen: Point
    best: Drawable
    done: int = 0
    rows: float = 0.0
    kl: float = 0.0
    stopped: str = ""


class Training:
    """Iterations, validations, checkpoints, and what is told of them; goes on from a checkpoint.

    Args:
        method: what an iteration is.
        validation: of its table.
        checkpoint: where it is kept; the first rank alone writes it.
        ranks, settings: as for the method.

    Raises:
        CheckpointError: the checkpoint is of other work.
        StageError: ranks go on from different iterations.
    """

    def __init__(
        self, method: Method, validation: Validation, checkpoint: Checkpoint, ranks: Ranks, settings: RDPOParams
    ) -> None:
        self.method = method
        self.validation = validation
        self.checkpoint = checkpoint
        self.ranks = ranks
        self.settings = settings
        if (saved := checkpoint.load()) is None:
            start = validation.begin(method.table())
            self.now = Progress([start], start, method.table())
        else:
            tensors, values = saved
            method.restore(tensors)
            validation.start = under("start", tensors)
            validation.start_distance, validation.rows = values.pop("start_distance"), values.pop("validation_rows")
            self.now = Progress(best=replace(method.table(), **under("best", tensors)), **values)
        if ranks.sum(torch.tensor(float(self.now.done), dtype=torch.float64)).item() != self.now.done * ranks.size:
            raise StageError(
                f"rank {ranks.rank}: goes on from iteration {self.now.done}, others from elsewhere; valid: one folder for all "
                f"ranks, so that all read {checkpoint.path}"
            )

    def run(self) -> None:
        """To the last iteration, or to where it has to stop; what whole iterations came to is saved, whatever ends it."""
        trace = Trace(LOGS / "rdpo.jsonl", LIVE, self.now.done) if self.ranks.first else None
        todo = range(0) if self.now.stopped else range(self.now.done + 1, self.settings.iterations + 1)
        bar = progress(todo, "rdpo", "iteration", self.now.done)
        state, saved = self._state(), time.monotonic()
        try:
            for iteration in bar:
                entry, alarms = self._iterate(iteration)
                if trace is not None:
                    trace.add(entry)
                    tell(bar, entry, self.now, alarms)
                state = self._state()  # after the log: a line too many is taken back, one that lacks stays away
                late = time.monotonic() - saved > 60 * self.settings.checkpoint_minutes
                if late or iteration % self.settings.checkpoint_every == 0:
                    self._save(state)
                    saved = time.monotonic()
                if self.now.stopped:
                    break
        finally:  # done, failed or told to stop
            self._save(state)
            if trace is not None:
                trace.close()

    def _iterate(self, iteration: int) -> tuple[dict[str, Any], list[str]]:
        """One iteration: an entry of the log, and what there is to be alarmed at."""
        began = time.perf_counter()
        found, settings = self.method.step(iteration), self.settings
        seconds, kl = time.perf_counter() - began, self.method.kl()
        entry = {"iteration": iteration, **found, "kl": kl, "seconds": seconds}
        entry["images_per_second"] = settings.groups * settings.tables / seconds
        entry["memory_mb"] = psutil.Process().memory_info().rss / 2**20
        now = replace(self.now, done=iteration, rows=self.now.rows + found["rows"], kl=kl)
        alarms = list[str]()
        if settings.kl_alarm is not None and kl > settings.kl_alarm >= self.now.kl:
            alarms.append(f"kl {kl:.4g}, above {settings.kl_alarm:g}")
        if settings.kl_limit is not None and kl > settings.kl_limit:
            now = replace(now, stopped=f"kl {kl:.4g} is above the limit, {settings.kl_limit:g}")
        if now.stopped or iteration % settings.validate_every == 0 or iteration == settings.iterations:
            now = self._validated(now, kl)
            alarms += self.validation.alarms(now.curve[-1])
            entry |= {f"validation_{name}": value for name, value in now.curve[-1].items() if name != "iteration"}
        self.now = now
        return {**entry, "alarms": alarms, "stopped": now.stopped}, [*alarms, *filter(None, [now.stopped])]

    def _validated(self, now: Progress, kl: float) -> Progress:
        """With the current table's point, which is chosen where it is the best that may be deployed."""
        point = self.validation.point(now.done, self.method.table(), kl)
        now = replace(now, curve=[*now.curve, point])
        if not now.stopped and point["reward"] > now.chosen["reward"] and not self.validation.worse(point):
            return replace(now, chosen=point, best=self.method.table())
        since = sum(p["iteration"] > now.chosen["iteration"] for p in now.curve)
        if not now.stopped and self.settings.patience is not None and since >= self.settings.patience:
            return replace(now, stopped=f"{since} validations without a better table to deploy")
        return now

    def _state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """All that a checkpoint holds."""
        values = {f.name: getattr(self.now, f.name) for f in fields(self.now) if f.name != "best"}
        values |= {"start_distance": self.validation.start_distance, "validation_rows": self.validation.rows}
        parts = {"best": tensors_of(self.now.best), "start": self.validation.start}
        return {**self.method.state(), **parts}, values

    def _save(self, state: tuple[dict[str, dict[str, Tensor]], dict[str, Any]]) -> None:
        if self.ranks.first and state[1]["done"]:
            self.checkpoint.save(*state)


def tell(bar: "tqdm[int]", entry: dict[str, Any], now: Progress, alarms: list[str]) -> None:
    """Put the state of affairs beside the progress bar, and alarms above it."""
    found = {"reward": f"{entry['reward']:.4f}", "gain": f"{now.curve[-1]['gain']:+.4f}", "kl": f"{entry['kl']:.3g}"}
    if "clip_fraction" in entry:
        found["clip"] = f"{entry['clip_fraction']:.0%}"
    bar.set_postfix({**found, "images/s": f"{entry['images_per_second']:.0f}"}, refresh=False)
    for alarm in alarms:
        bar.write(f"rdpo: iteration {entry['iteration']}: {alarm}", file=sys.stderr)


def write(training: Training, distilled: Predictor, seed: int, rdpo: RDPOParams) -> None:
    """The predictor and its curve."""
    now = training.now
    chosen = {**now.chosen, "distilled_frechet_distance": training.validation.start_distance}
    provenance = {
        "stage": "rdpo",
        "parameters": {name: value for name, value in rdpo.model_dump().items() if name not in UNTIED},
        "seed": seed,
        "parent_sha256": sha256(DISTILLED / "predictor.safetensors"),
        "iterations": now.done,
        "rollout_rows": now.rows,
        "validation_rows": training.validation.rows,
        "stopped": now.stopped,
        "chosen": chosen,
    }
    metrics = (
        Metric("reward", chosen["reward"], chosen["reward_95"], rdpo.validation, "validation noise"),
        Metric("reward less the distilled", chosen["gain"], chosen["gain_95"], rdpo.validation, "the same, paired"),
    )
    write_csv(RESULTS / "rdpo.csv", [{**point, "deployed": int(point == now.chosen)} for point in now.curve])
    with atomic(RDPO) as folder:
        folder.mkdir()
        save_predictor(replace(distilled, table=now.best, provenance=provenance, metrics=metrics), folder, RDPO.name)


if __name__ == "__main__":
    command(rdpo, has_ranks=True)
