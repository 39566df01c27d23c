"""Commands whose output is told line by line, and which end with whoever started them."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

GUARD = Path(__file__).with_name("guard.py")
ERROR = re.compile("fatal: |error: |ERROR: ")
"""How git and DVC begin the line that says why."""
GRACE = 60.0
"""Seconds between SIGTERM and SIGKILL."""

_running = set[subprocess.Popen[bytes]]()
_ended = threading.Event()


class CommandError(Exception):
    """A command that should not fail did."""


class EndedError(Exception):
    """This process is about to end, and starts nothing any more."""

    def __init__(self) -> None:
        super().__init__("stopped, since its run ends; the same again goes on from what was saved")


def run(
    command: Sequence[str],
    folder: Path,
    tell: Callable[[str], object],
    environment: Mapping[str, str] | None = None,
    seconds: float | None = None,
) -> int:
    """The exit status of a command that runs in a folder.

    Args:
        command: the program and its arguments.
        folder: that it runs in.
        tell: gets each line of its output as it comes, and each state of a progress bar; no empty ones.
        environment: added to this process'.
        seconds: that it may take.

    Raises:
        TimeoutError: it took more. It was stopped, as by `stop`.
        EndedError: `end` was called, before this or meanwhile.
    """
    if _ended.is_set():
        raise EndedError
    whole = {**os.environ, **(environment or {}), "PYTHONUNBUFFERED": "1"}
    whole["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{whole['PATH']}"
    guarded = [sys.executable, str(GUARD), str(GRACE), *command]
    process = subprocess.Popen(  # noqa: S603
        guarded,
        cwd=folder,
        env=whole,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    late = threading.Event()
    alarm = threading.Timer(seconds or 0, lambda: (late.set(), _let_go(process)))
    _running.add(process)
    try:
        if seconds is not None:
            alarm.start()
        for line in _lines(process):
            tell(line)
        status = process.wait()
    finally:
        alarm.cancel()
        _let_go(process)
        if process.stdout:
            process.stdout.close()
        process.wait()
        _running.discard(process)
    if late.is_set():
        raise TimeoutError
    if status and _ended.is_set():
        raise EndedError
    return status


def output(command: Sequence[str], folder: Path) -> str:
    """What a command that takes no time prints; CommandError with why, in a line, where it fails."""
    lines = list[str]()
    if run(command, folder, lines.append):
        raise CommandError(next(filter(ERROR.match, lines), lines[-1] if lines else f"{' '.join(command)} failed"))
    return "\n".join(lines)


def stop() -> None:
    """Have every command that runs now save what it has done, and end; return when all have."""
    running = list(_running)
    for process in running:
        _let_go(process)
    for process in running:
        process.wait()


def end() -> None:
    """Start no other command from now on, and have those that run end, without waiting for them."""
    _ended.set()
    for process in list(_running):
        _let_go(process)


def _let_go(process: subprocess.Popen[bytes]) -> None:
    if process.stdin:
        process.stdin.close()


def _lines(process: subprocess.Popen[bytes]) -> Iterator[str]:
    rest = b""
    while chunk := os.read(process.stdout.fileno(), 1 << 16) if process.stdout else b"":
        *lines, rest = re.split(rb"[\r\n]", rest + chunk)
        yield from (line.decode(errors="replace") for line in lines if line.strip())
    if rest.strip():
        yield rest.decode(errors="replace")
