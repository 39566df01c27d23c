"""What the flows have in common: what they take, how a run is named, begun and ended."""

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from prefect import State, get_run_logger
from prefect.runtime import flow_run
from prefect.states import Failed
from pydantic import AfterValidator, Field

from flows import process
from flows.pipeline import StageError
from flows.server import ALONE, bury
from flows.workspace import backbones, clean_commit, compose, workspace

SOURCE = Path.cwd()
"""The repository whose commits are run: where the deployment's pull step leads, or the flow is called."""
LONGEST = 100
"""Characters of a name."""


@dataclass(frozen=True)
class Begun:
    """A run that may start.

    Attributes:
        folder: its workspace.
        commit: that is there.
        params: of its params.yaml.
    """

    folder: Path
    commit: str
    params: dict[str, Any]


def checkout() -> dict[str, str]:
    """prefect.yaml's pull step: flows run in the clone that the worker's environment was installed from."""
    return {"directory": str(Path(__file__).parents[1])}


def _known(backbone: str) -> str:
    if backbone not in (valid := backbones(SOURCE)):
        raise ValueError(f"found {backbone!r}; valid: {', '.join(valid)}")
    return backbone


def _no_options(override: str) -> str:
    """Overrides have the form KEY=VALUE, +KEY=VALUE or ~KEY: none is an option of a command line."""
    if not re.fullmatch(r"(\+{0,2}[\w@][\w@./:-]*=.*)|(~[\w@./-]+(=.*)?)", override, re.DOTALL):
        raise ValueError(f"found {override!r}; valid: KEY=VALUE, +KEY=VALUE or ~KEY, as for dvc exp run -S")
    return override


Backbone = Annotated[str, AfterValidator(_known), Field(json_schema_extra={"enum": list[Any](backbones(SOURCE))})]
"""A file of conf/backbone."""
Overrides = Annotated[
    list[Annotated[str, AfterValidator(_no_options)]], Field(description="as for dvc exp run -S: num_steps=4, rdpo=published")
]


def slug(text: str) -> str:
    """Letters, digits and single hyphens, as keys of artifacts and names of git's may have."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def run_name() -> str:
    """Of a run, from its parameters: the backbone, and what was changed."""
    given = flow_run.parameters
    parts = [
        given.get("backbone"),
        given.get("predictor"),
        *given.get("overrides", []),
        *given.get("grid", []),
        *given.get("targets", []),
    ]
    name = " ".join(str(part) for part in parts if part)
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 3]}..."


def experiment_name() -> str:
    """Of this run's experiment of DVC's; no two runs have the same."""
    return f"{slug(run_name())[:40].strip('-')}-{str(flow_run.id)[-12:]}"  # ids of one time begin alike


@contextmanager
def begun(work: Sequence[str], backbone: str, overrides: Sequence[str]) -> "Iterator[Begun]":
    """This run's workspace and its parameters; ValueError where the repository or the overrides are not as they have to be."""
    run, commit = str(flow_run.id), clean_commit(SOURCE)
    with workspace(SOURCE, commit, [*work, backbone, *overrides], run) as space:
        if space.interrupted not in (None, run):
            bury(space.interrupted)
        yield Begun(space.folder, commit, compose(SOURCE, space.folder, backbone, overrides))


def watched(body: Callable[[], dict[str, Any]]) -> "dict[str, Any] | State[Any]":
    """What a flow's body gives; a failed state whose message is the reason alone, where it cannot go on.

    If this process was started by a worker and the worker dies, it ends as if it had been cancelled: a worker's devices must
    be free when the worker is gone.
    """
    if "PREFECT__FLOW_RUN_ID" in os.environ:
        _watch_parent()
    try:
        return body()
    except (ValueError, StageError, process.CommandError) as error:
        get_run_logger().error(str(error))
        return Failed(message=str(error))


@cache  # once in a process: flows call flows
def _watch_parent() -> None:
    parent, run = os.getppid(), str(flow_run.id)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        process.end()
        with suppress(Exception):  # the server may be gone as well
            bury(run, ALONE)
        os._exit(128 + signal.SIGTERM)  # not by way of Prefect, which would tell another reason

    threading.Thread(target=watch, daemon=True).start()
