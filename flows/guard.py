"""Runs a command that must not outlive whoever started it: `python guard.py SECONDS COMMAND...`.

Whoever starts it holds the other end of its standard input. When that closes, because the holder wants the command to stop or
was killed, even with -9, the command's processes get SIGTERM, at which stages save what they have done, and SIGKILL after so
many seconds. Exits with the command's status.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import psutil


def stop(group: int, seconds: float) -> None:
    """End all processes of a group, and what else its first one has started: torchrun's ranks have sessions of their own."""
    family = list[psutil.Process]()
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(group).children(recursive=True)
    _stop_group(group, seconds)
    for process in family:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def _stop_group(group: int, seconds: float) -> None:
    for sent in (signal.SIGTERM, signal.SIGKILL):
        until = time.monotonic() + seconds
        try:
            os.killpg(group, sent)
            while time.monotonic() < until:
                os.killpg(group, 0)  # is one of them left?
                time.sleep(0.05)
        except ProcessLookupError:
            return


def main(seconds: float, command: list[str]) -> int:
    """The command's status, as a shell tells it."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)  # noqa: S603
    for meant_for_the_holder in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(meant_for_the_holder, signal.SIG_IGN)

    stopping = threading.Event()

    def watch() -> None:
        os.read(0, 1)
        stopping.set()
        stop(process.pid, seconds)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    status = process.wait()
    if stopping.is_set():
        watcher.join()
    elif status:
        stop(process.pid, seconds)  # of what a killed command has started
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
