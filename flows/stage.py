"""One stage of DVC's as a task: its output in the log, its progress as an artifact, tried again where that may help."""

import os
import platform
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect import State, allow_failure, get_run_logger, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import TaskRun
from prefect.exceptions import ObjectNotFound
from prefect.futures import PrefectFuture
from prefect.runtime import task_run
from prefect.tasks import Task

from flows import process
from flows.pipeline import DVC, Outcome, Source, StageError, failure, repro
from flows.shown import show_times

PAUSES = [5.0, 30.0, 120.0]
"""Seconds before a stage is tried again."""
FOREVER = 24.0 * 365
"""Hours that a stage may take which has no limit of its own."""
BETWEEN = 2.0
"""Seconds between two states of a progress bar that are shown."""
HOW: dict[Source, str] = {"ran": "ran", "cache": "from the cache", "unchanged": "unchanged"}
PROGRESS = re.compile(r"(\d+)%\|")


def devices() -> list[str]:
    """This worker's own: the GPUs that it was started with, or, where that was not said, the machine's as one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all").split(",")
    return [each.strip() for each in visible if each.strip()] or ["none"]


def slots() -> list[str]:
    """Tags of the tasks that take this worker's devices; each has a global concurrency limit, made here, of 1, if need be."""
    tags = [f"gpu-{platform.node()}-{device}" for device in devices()]
    with get_client(sync_client=True) as client:
        for tag in tags:
            try:
                client.read_global_concurrency_limit_by_name(f"tag:{tag}")
            except ObjectNotFound:
                client.create_concurrency_limit(tag, 1)
    return tags


def may_pass(failed: "Task[..., object]", run: TaskRun, state: "State[object]") -> bool:
    """Whether a task is to be tried again."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, StageError) and error.may_pass


class Lines:
    """Tells a task's log each line, and shows a progress bar as an artifact of the task."""

    def __init__(self, stage: str) -> None:
        self.key = "progress-" + re.sub(r"[^a-z0-9]+", "-", stage.lower())
        self.stage, self.logger = stage, get_run_logger()
        self.artifact: Any = None
        self.shown = -BETWEEN

    def __call__(self, line: str) -> None:
        if not (found := PROGRESS.search(line)):
            self.logger.info(line)
        elif time.monotonic() - self.shown >= BETWEEN or found[1] == "100":
            self.shown, percent = time.monotonic(), float(found[1])
            if self.artifact is None:
                self.artifact = create_progress_artifact(percent, self.key, line.strip())
            else:
                update_progress_artifact(self.artifact, percent, line.strip())


@task(retries=len(PAUSES), retry_delay_seconds=PAUSES, retry_condition_fn=may_pass, cache_policy=NO_CACHE, persist_result=False)
def stage(folder: Path, name: str, *, force: bool, pull: bool, seconds: float, environment: Mapping[str, str]) -> Outcome:
    """Bring a stage up to date; see `flows.pipeline.repro`."""
    start, tell = time.monotonic(), Lines(name)
    source = repro(folder, name, tell, force=force, pull=pull, seconds=seconds, environment=environment)
    tell.logger.info(f"{name}: {HOW[source]}")
    return Outcome(name, source, round(time.monotonic() - start, 1), task_run.run_count or 1)


@task(retries=len(PAUSES), retry_delay_seconds=PAUSES, retry_condition_fn=may_pass, cache_policy=NO_CACHE, persist_result=False)
def push(folder: Path, name: str, remote: str) -> None:
    """Send what a stage made, and that it did, to a remote, for other workers to go on from."""
    lines, tell = list[str](), Lines(f"push {name}")
    for command in (
        [*DVC, "push", "--run-cache", "--remote", remote, name],
        [sys.executable, "-m", "flows.uncached", name, remote],
    ):
        if process.run(command, folder, lambda line: (lines.append(line), tell(line))):
            raise failure(folder, f"push of {name} to {remote}", lines)


def make(
    folder: Path, graph: Mapping[str, list[str]], params: Mapping[str, Any], remote: str | None, to: str | None, force: bool
) -> list[dict[str, Any]]:
    """Bring stages up to date, each as a task that waits for those it needs; what became of each, also as a table's artifact.

    Tasks that use the GPU (params' flows.gpu_stages) also wait for one another, since they share it; others may overlap them.
    A worker's several GPUs are used by each stage, as so many processes.

    Args:
        folder: the workspace.
        graph: the stages, each with those that it needs, in an order in which they can run.
        params: of params.yaml.
        remote: DVC's remote to restore from, if there is one.
        to: the remote to push to, if any.
        force: run stages whatever is cached.

    Raises:
        StageError: some failed, after all have ended that do not need these.
    """
    settings, gpus, taken = params["flows"], devices(), slots()
    hidden = {} if params["compute"]["device"] == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    made, pushed, last = dict[str, "PrefectFuture[Outcome]"](), dict[str, "PrefectFuture[None]"](), list[Any]()
    for name, needed in graph.items():
        kind = name.split("@")[0]
        gpu = kind in settings["gpu_stages"]
        shared = {"PARASOL_PROCESSES": str(len(gpus))} if len(gpus) > 1 else {}
        one: Any = stage.with_options(name=name, task_run_name=name, tags=taken if gpu else [])
        made[name] = one.submit(
            folder,
            name,
            force=force,
            pull=remote is not None,
            seconds=settings["hours"].get(kind, FOREVER) * 3600,
            environment=shared if gpu else hidden,
            wait_for=[*(made[each] for each in needed), *(last if gpu else [])],
        )
        last = [allow_failure(made[name])] if gpu else last
        if to:
            one = push.with_options(name=f"push {name}", task_run_name=f"push {name}")
            pushed[f"push {name}"] = one.submit(folder, name, to, wait_for=[made[name]])
    futures = made | pushed
    for future in futures.values():
        future.wait()
    rows = [_row(name, future) for name, future in made.items()]
    show_times(rows)
    errors = {name: future.state.result(raise_on_failure=False) for name, future in futures.items() if future.state.is_failed()}
    if errors:
        raise StageError("\n".join(map(str, errors.values())))
    for row in rows:
        get_run_logger().info("%s: %s, %.1f s", row["stage"], row["how"], row["seconds"])
    return rows


def _row(name: str, future: "PrefectFuture[Outcome]") -> dict[str, Any]:
    if future.state.is_completed():
        outcome = future.result()
        return {"stage": name, "how": HOW[outcome.source], "seconds": outcome.seconds, "attempts": outcome.attempts}
    return {"stage": name, "how": "failed" if future.state.is_failed() else "not run", "seconds": None, "attempts": None}
