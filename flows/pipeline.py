"""DVC's pipeline: which stages there are, what each needs, and how one is run."""

import os
import re
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any, Literal

import yaml

from flows import process

DVC = (sys.executable, "-m", "dvc", "--wait-for-lock")
CAPS = Path(".dvc/tmp/batch_sizes")
"""In the workspace, a file for each stage whose batch size was lowered: a run that goes on does not try the larger one."""

NODE = re.compile(r'^"([^"]+)";$', re.MULTILINE)
EDGE = re.compile(r'^"([^"]+)" -> "([^"]+)";$', re.MULTILINE)
REASON = re.compile(r"^(?:stage [^ :]+|pull|generate): (.+)$")  # a line of a stage's, or of another command of Parasol's
STATUS = re.compile(r"exited with (-?\d+)")
KILLED = (-9, 137)  # by signal 9, as a process' status and as a shell's
BATCH = re.compile(r"batch_size is (\d+)")
MAY_PASS = re.compile(  # of DVC's own errors
    r"[Uu]nable to acquire lock|is busy, it is being blocked|failed to (pull|push|transfer|connect)|timed out|Could not connect"
    r"|Connection (reset|refused|aborted)|EndpointConnectionError|SlowDown|temporarily unavailable"
    r"|No such file or directory: '[^']*/\.[\w-]+\.tmp'"  # two that share a cache came to the same entry of its at once
)
HINTS = ("To track the changes with git", "git add ", "To enable auto staging", "dvc config core.autostage", "Use `dvc push`")

Source = Literal["ran", "cache", "unchanged"]


class StageError(Exception):
    """A stage did not end well. The message says why, and what to do.

    Attributes:
        may_pass: whether the same again may end well.
    """

    def __init__(self, message: str, may_pass: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass


@dataclass(frozen=True)
class Outcome:
    """How a stage was made: by its command, by DVC from its cache, or not at all, since nothing had changed."""

    stage: str
    source: Source
    seconds: float
    attempts: int = 1


def read_graph(folder: Path) -> dict[str, list[str]]:
    """Of a DVC repository all stages, in an order in which they can run, each with those that it needs."""
    dot = process.output([*DVC, "dag", "--dot"], folder)
    needs: dict[str, list[str]] = {name: [] for name in NODE.findall(dot)}
    for needed, name in EDGE.findall(dot):
        needs[name].append(needed)
    return {name: needs[name] for name in TopologicalSorter(needs).static_order()}


def select(graph: Mapping[str, list[str]], targets: Collection[str]) -> dict[str, list[str]]:
    """The targets and all that they need, in the graph's order; all stages for no targets.

    A target is a stage, or `sample` for all of sample@....

    Raises:
        ValueError: there is none of that name.
    """
    wanted, groups = set[str](), {name.split("@")[0] for name in graph}
    for target in targets:
        found = {name for name in graph if target in (name, name.split("@")[0])}
        if not found:
            valid = ", ".join([*sorted(groups), *(name for name in graph if "@" in name)])
            raise ValueError(f"targets: found {target!r}; valid: {valid}")
        wanted |= found
    for name in reversed(list(graph)):
        wanted |= set(graph[name]) if name in wanted else set()
    return {name: needed for name, needed in graph.items() if name in wanted or not targets}


def repro(
    folder: Path,
    stage: str,
    tell: Callable[[str], None],
    *,
    force: bool,
    pull: bool,
    seconds: float,
    environment: Mapping[str, str],
) -> Source:
    """Bring one stage up to date, all that it needs being there.

    Args:
        folder: DVC's workspace.
        stage: its name.
        tell: gets the lines of its output.
        force: run it whatever is cached.
        pull: fetch what is missing from the remote.
        seconds: it may take.
        environment: added to its own.

    Raises:
        StageError: with the stage's own reason.
    """
    lines = list[str]()

    def note(line: str) -> None:
        if not line.lstrip().startswith(HINTS):
            lines.append(line)
            tell(line)

    cap = folder / CAPS / stage
    capped = {"PARASOL_BATCH_SIZE": cap.read_text(encoding="utf-8")} if cap.exists() else {}
    options = ["--force"] * force + ["--pull"] * pull
    try:
        status = process.run(
            [*DVC, "repro", "--single-item", *options, stage], folder, note, {**environment, **capped}, seconds
        )
    except TimeoutError:
        raise StageError(
            f"{stage}: took more than {seconds / 3600:g} h, and was stopped; give it more (flows.hours.{stage.split('@')[0]}) "
            "and run the same again: it goes on from what it has saved"
        ) from None
    if status:
        raise failure(folder, stage, lines, status)
    if any(line.startswith("Running stage") for line in lines):
        return "ran"
    return "cache" if any("is cached" in line or line.startswith("Pulling data") for line in lines) else "unchanged"


def failure(folder: Path, stage: str, lines: list[str], ended: int = 1) -> StageError:
    """What a command that failed has said, and whether it may pass; where DVC ran a stage, the status is that stage's."""
    text = "\n".join(lines)
    status = int(found[-1]) if (found := STATUS.findall(text)) else ended
    reason = _reason(lines)
    if status == os.EX_OSERR and (size := BATCH.search(reason)):
        smaller = max(1, int(size[1]) // 2)
        (folder / CAPS).mkdir(parents=True, exist_ok=True)
        (folder / CAPS / stage).write_text(str(smaller), encoding="utf-8")
        return StageError(f"{stage}: {reason}; now with batches of {smaller}", may_pass=True)
    if status in KILLED:
        reason = "killed, as a system does that is short of memory; the same again goes on from what was saved"
    may_pass = status in (os.EX_TEMPFAIL, *KILLED) or (not found and MAY_PASS.search(text) is not None)
    return StageError(f"{stage}: {reason}", may_pass)


def _reason(lines: list[str]) -> str:
    """What the stage says last; else the exception that it ended in; else what DVC says."""
    said = [index for index, line in enumerate(lines) if REASON.match(line)]
    errors = [index for index, line in enumerate(lines) if line.startswith("ERROR: ")]
    traces = [index for index, line in enumerate(lines) if line.startswith("Traceback")]
    if said and (not traces or said[-1] > traces[-1]):
        return REASON.sub(r"\1", lines[said[-1]])
    if errors and traces:
        return lines[errors[0] - 1].strip()
    return lines[errors[0]].rpartition("': ")[2].removeprefix("ERROR: ") if errors else "ended without a word"


def read_hashes(folder: Path) -> dict[str, dict[str, str]]:
    """Of dvc.lock: by stages, the hashes of what they made, by paths."""
    file = folder / "dvc.lock"
    stages: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))["stages"] if file.exists() else {}
    return {name: {out["path"]: out["md5"] for out in stage.get("outs", [])} for name, stage in stages.items()}
