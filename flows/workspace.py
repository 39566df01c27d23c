"""A clone of the repository for each run, sharing DVC's cache: no two runs are ever in the same one at once."""

import fcntl
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any, TextIO, cast

import psutil
import yaml
from dvc.config import Config
from dvc.utils.hydra import compose_and_dump
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from flows import process
from flows.pipeline import DVC

VARIABLE = "PARASOL_WORKSPACES"
"""The environment variable of the folder that has all of them, if not .dvc/tmp/flows of the repository."""
KEPT_DAYS = 7
"""For which the workspace of a run that ended well stays, for its report. Others stay, to go on."""
DONE = "done"


@dataclass(frozen=True)
class Workspace:
    """A clone.

    Attributes:
        folder: where it is.
        interrupted: the id of the run that was here last, if it never ended: it was killed.
    """

    folder: Path
    interrupted: str | None


def backbones(source: Path) -> list[str]:
    """Those that a repository has settings for."""
    return sorted(file.stem for file in (source / "conf/backbone").glob("*.yaml"))


def clean_commit(source: Path) -> str:
    """The commit of a repository; ValueError where files that git knows have changed since, or where there is none."""
    try:
        commit = process.output(["git", "rev-parse", "HEAD"], source)
        changed = process.output(["git", "status", "--porcelain", "--untracked-files=no"], source).splitlines()
    except process.CommandError as error:
        raise ValueError(f"{source}: found no git repository with a commit ({error}); valid: a clone of Parasol's") from None
    if changed:
        names = ", ".join(line[3:] for line in changed[:5]) + (", ..." if len(changed) > 5 else "")
        raise ValueError(f"{source}: found changes that are not committed, to {names}; valid: none (git commit, or git stash)")
    return commit


@contextmanager
def workspace(source: Path, commit: str, work: Sequence[str], run: str) -> Iterator[Workspace]:
    """A workspace of a commit, this run's alone while it lasts.

    The same work comes back to the same one, and finds what an earlier run has saved, unless another run is in it.

    Args:
        source: the repository.
        commit: of it.
        work: what is to be done.
        run: this run's id.
    """
    root = Path(os.environ.get(VARIABLE, source / ".dvc/tmp/flows")).absolute()
    root.mkdir(parents=True, exist_ok=True)
    name = sha256(json.dumps([commit, *work]).encode()).hexdigest()[:12]
    folder, lock = next(
        (folder, lock) for number in count(1) if (lock := _lock(folder := root / f"{name}-{number}")) is not None
    )
    with lock:
        _prune(root)
        before = lock.read()
        _note(lock, run)
        try:
            if not folder.exists():
                _clone(source, commit, folder)
            _configure(source, folder)
            _forget_killed(folder)
            yield Workspace(folder, before if before not in ("", DONE) else None)
        except BaseException as error:
            if not isinstance(error, Exception):
                process.end()
            process.stop()
            _note(lock, "")
            raise
        _note(lock, DONE)


def compose(source: Path, folder: Path, backbone: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Compose conf/ into a workspace's params.yaml, as `dvc exp run -S` does, and bring the files that it names.

    Raises:
        ValueError: that cannot be; with the names that there are.
    """
    if backbone not in backbones(folder):
        raise ValueError(f"backbone: found {backbone!r}; valid: {', '.join(backbones(folder))}")
    given = [override.removeprefix("params.yaml:") for override in overrides]
    try:
        composed = _compose(folder, [f"backbone={backbone}", *given])
    except (HydraException, OmegaConfBaseException) as error:
        said = re.sub(r"\s+", " ", str(error)).partition(" Config search path")[0].strip()
        if found := re.search(r"Could not override '([\w.]+)'", said):
            keys = _compose(folder, [f"backbone={backbone}"])
            for key in found[1].split(".")[:-1]:
                keys = keys[key] if isinstance(keys.get(key), dict) else keys
            said += f"; valid: {', '.join(map(str, keys))}"
        raise ValueError(f"overrides: {said}; they are those of dvc exp run -S") from None
    lines = list[str]()
    if process.run([sys.executable, "-m", "stages.params"], folder, lines.append):
        raise ValueError("overrides: " + "; ".join(line.removeprefix("params.yaml: ") for line in lines))
    _bring(source, folder, composed)
    return composed


def save_experiment(source: Path, folder: Path, name: str, push: bool) -> str | None:
    """Make what a workspace holds an experiment of DVC's, of that name, in the repository that it was cloned from.

    Args:
        source: that repository.
        folder: the workspace.
        name: of the experiment.
        push: have it also at the source's origin.

    Returns:
        Why it could not be pushed, if it could not: the rest is done then.

    Raises:
        CommandError: it could not be saved.
    """
    process.output([*DVC, "exp", "save", "--force", "--name", name], folder)
    refs = process.output(["git", "for-each-ref", "--format=%(refname)", "refs/exps"], folder).splitlines()
    ref = next(ref for ref in refs if ref.endswith(f"/{name}"))
    process.output(["git", "push", "--quiet", "--force", "origin", f"{ref}:{ref}"], folder)
    if push:
        try:
            process.output(["git", "push", "--quiet", "--force", "origin", f"{ref}:{ref}"], source)
        except process.CommandError as error:
            return f"{error}; valid: a remote origin that may be written to, then: dvc exp push origin {name}"
    return None


def _compose(folder: Path, overrides: list[str]) -> dict[str, Any]:
    params = folder / "params.yaml"
    compose_and_dump(params, str(folder / "conf"), None, "config", "hydra_plugins", overrides)
    return yaml.safe_load(params.read_text(encoding="utf-8"))


def remotes(folder: Path) -> tuple[list[str], str | None]:
    """The names of DVC's remotes, and which of them is the default."""
    config = Config(str(folder / ".dvc"))
    return sorted(config["remote"]), config["core"].get("remote")


def use_remote(folder: Path, remote: str | None) -> str | None:
    """Make a remote the workspace's default: `dvc repro --pull` knows no other."""
    if remote is not None:
        with _local(folder) as local:
            local["core"] = {**local.get("core", {}), "remote": remote}
    return remote


@contextmanager
def _local(folder: Path) -> Iterator[dict[str, Any]]:
    """What is to be written to a clone's .dvc/config.local, which others may not read: it has secrets."""
    (folder / ".dvc/config.local").touch(mode=0o600)
    with Config(str(folder / ".dvc")).edit("local") as local:
        yield cast(dict[str, Any], local)


def _lock(folder: Path) -> TextIO | None:
    """The file of a workspace, locked for as long as it is open; None where another process has it."""
    file = folder.with_name(f"{folder.name}.lock").open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    file.seek(0)
    return file


def _note(lock: TextIO, text: str) -> None:
    lock.truncate(0)
    lock.write(text)
    lock.flush()


def _prune(root: Path) -> None:
    """Remove workspaces of old runs that ended well."""
    for file in root.glob("*.lock"):
        folder = file.with_suffix("")
        if time.time() - file.stat().st_mtime > KEPT_DAYS * 86400 and (lock := _lock(folder)) is not None:
            with lock:  # the file stays: another process may just have opened it
                if lock.read() == DONE:
                    shutil.rmtree(folder, ignore_errors=True)
                    _note(lock, "")


def _clone(source: Path, commit: str, folder: Path) -> None:
    """All or nothing."""
    new = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    process.output(["git", "clone", "--quiet", "--no-checkout", str(source), str(new)], source)
    process.output(["git", "checkout", "--quiet", "--detach", commit], new)
    for key, value in {"user.name": "Parasol", "user.email": f"parasol@{platform.node()}"}.items():
        if process.run(["git", "config", key], new, str):  # a container's git knows nobody, and an experiment is a commit
            process.output(["git", "config", key, value], new)
    new.rename(folder)


def _configure(source: Path, folder: Path) -> None:
    """Give a clone its source's cache and remotes, their secrets too."""
    found = Config(str(source / ".dvc"))
    with _local(folder) as local:
        local["cache"] = {**found["cache"], "dir": found["cache"].get("dir", str(source / ".dvc/cache"))}
        local["remote"] = found["remote"]
        local["core"] = {"remote": found["core"]["remote"]} if "remote" in found["core"] else {}


def _forget_killed(folder: Path) -> None:
    """Remove DVC's notes of who works in a clone, if nobody does.

    They are numbers of processes. DVC waits for ever for one that was killed where another has its number meanwhile: after the
    machine has started again, or in another container.
    """
    if not any(each.info["cwd"] == str(folder.resolve()) for each in psutil.process_iter(["cwd"])):
        (folder / ".dvc/tmp/rwlock").unlink(missing_ok=True)


def _bring(source: Path, folder: Path, params: dict[str, Any]) -> None:
    """Link, or copy, the files and folders that parameters name and git does not know: prompts, weights, images."""
    stages = yaml.safe_load((folder / "dvc.yaml").read_text(encoding="utf-8"))["stages"].values()
    made = [out for stage in stages for out in stage.get("do", stage).get("outs", []) if isinstance(out, str)]
    known = [Path(path) for path in [*made, *process.output(["git", "ls-files"], folder).splitlines()]]
    taken = {path for each in known for path in (each, *each.parents)}  # `data` is a source of references, and has all outputs
    for name in map(Path, filter(None, _strings(params))):
        there, here = source / name, folder / name
        if name in taken or name.is_absolute() or ".." in name.parts or not there.exists():
            continue
        here.parent.mkdir(parents=True, exist_ok=True)
        if there.is_file():
            here.unlink(missing_ok=True)
            _link(str(there), str(here))
        else:
            shutil.rmtree(here, ignore_errors=True)
            shutil.copytree(there, here, copy_function=_link)


def _strings(value: Any) -> set[str]:
    match value:
        case dict():
            return set().union(*map(_strings, value.values()))
        case list():
            return set().union(*map(_strings, value))
        case str():
            return {value}
    return set()


def _link(there: str, here: str) -> None:
    try:
        os.link(there, here)
    except OSError:  # on another file system
        shutil.copy2(there, here)
