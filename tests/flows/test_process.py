import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from flows import process

from .conftest import ROOT

FAMILY = """\
# A command with a child: each says in a file that it is there, and in another that it was asked to end.
import os, signal, subprocess, sys, time
from pathlib import Path

name, at_the_end, *others = sys.argv[1:]


def end(*_):
    Path(f"{name}.saved").write_text("saved")
    if at_the_end != "stay":
        sys.exit(int(at_the_end))


signal.signal(signal.SIGTERM, end)
if others:
    subprocess.Popen([sys.executable, __file__, *others], start_new_session=others[0] == "rank")
Path(f"{name}.new").write_text(str(os.getpid()))
Path(f"{name}.new").rename(f"{name}.pid")
print(name, flush=True)
while True:
    time.sleep(0.02)
"""

HOLDER = """\
import sys
from pathlib import Path
from flows import process

process.GRACE = 0.5
process.run(sys.argv[1:], Path(), print)
"""


def wait_until(true: Callable[[], bool], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def family(tmp_path: Path) -> Iterator[list[str]]:
    """The beginning of a command that runs FAMILY; what it started is gone after the test, whatever came of it."""
    file = tmp_path / "family.py"
    file.write_text(FAMILY)
    yield [sys.executable, str(file)]
    for pid in pids(tmp_path).values():
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def pids(folder: Path) -> dict[str, int]:
    return {file.stem: int(file.read_text()) for file in folder.glob("*.pid")}


def saved(folder: Path) -> set[str]:
    return {file.stem for file in folder.glob("*.saved")}


class Running(threading.Thread):
    """`process.run` in the background, and its status, or why it has none."""

    def __init__(self, command: list[str], folder: Path, there: int) -> None:
        super().__init__(daemon=True)
        self.command, self.folder = command, folder
        self.status: int | None = None
        self.error: Exception | None = None
        self.start()
        wait_until(lambda: len(pids(folder)) == there)

    def run(self) -> None:
        try:
            self.status = process.run(self.command, self.folder, lambda _: None)
        except process.EndedError as error:
            self.error = error

    def ended(self) -> int | None:
        self.join(20)
        assert not self.is_alive()
        return self.status


def python(script: str) -> list[str]:
    return [sys.executable, "-c", script]


@pytest.mark.parametrize(
    ("printed", "told"),
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\r\n\r\ntwo\r\n", ["one", "two"]),
        (b"\r 0%|  |\r50%|# |\r100%|##|\nlast", [" 0%|  |", "50%|# |", "100%|##|", "last"]),
        (b"  \n\n\tkept\n", ["\tkept"]),
        (b"caf\xc3\xa9 \xff\n", ["café \ufffd"]),
        (b"", []),
        (b"x" * 200_000 + b"\ny", ["x" * 200_000, "y"]),
    ],
)
def test_lines(printed: bytes, told: list[str], tmp_path: Path) -> None:
    (tmp_path / "printed").write_bytes(printed)
    lines = list[str]()
    assert process.run(["cat", "printed"], tmp_path, lines.append) == 0
    assert lines == told


def test_lines_come_when_they_are_printed_and_characters_whole(tmp_path: Path) -> None:
    """The command waits for an answer to each line, of which there are two halves."""
    script = """
import os, time
from pathlib import Path
for number in range(2):
    os.write(1 + number, b"caf\\xc3")  # to standard output, then to standard error
    time.sleep(0.1)
    os.write(1 + number, b"\\xa9\\n")
    while not Path(f"answer{number}").exists():
        time.sleep(0.01)
"""
    lines = list[str]()

    def tell(line: str) -> None:
        (tmp_path / f"answer{len(lines)}").touch()
        lines.append(line)

    assert process.run(python(script), tmp_path, tell, seconds=20) == 0
    assert lines == ["café", "café"]


@pytest.mark.parametrize(("command", "status"), [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", 137), ("kill -15 $$", 143)])
def test_the_status_is_that_of_a_shell(command: str, status: int, tmp_path: Path) -> None:
    assert process.run(["sh", "-c", command], tmp_path, print) == status


def test_a_command_has_the_environment_the_folder_no_input_and_this_pythons_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEPT", "kept")
    monkeypatch.setenv("CHANGED", "old")
    said = process.output(["sh", "-c", "echo $KEPT $CHANGED $PYTHONUNBUFFERED; pwd; wc -c; echo $PATH"], tmp_path)
    assert said.splitlines()[0] == "kept old 1"
    assert said.splitlines()[1:3] == [str(tmp_path), "0"]
    assert said.splitlines()[3].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    lines = list[str]()
    process.run(["sh", "-c", "echo $KEPT $CHANGED"], tmp_path, lines.append, {"CHANGED": "new"})
    assert lines == ["kept new"]
    assert os.environ["CHANGED"] == "old"


@pytest.mark.parametrize(
    ("printed", "why"),
    [
        (r"first\nlast\n", "last"),
        (r"fatal: this\nhint: that\n", "fatal: this"),
        (r"ERROR: this\n\nhint: that\n", "ERROR: this"),
        (r"error: this\n", "error: this"),
        ("", r"sh -c printf ''; exit 2 failed"),
    ],
)
def test_output_of_a_command_that_fails_is_why(printed: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(process.CommandError, match=f"^{re.escape(why)}$"):
        process.output(["sh", "-c", f"printf '{printed}'; exit 2"], tmp_path)


def test_output_is_what_a_command_prints(tmp_path: Path) -> None:
    assert process.output(["printf", r"a\nerror: b\n"], tmp_path) == "a\nerror: b"
    with pytest.raises(process.CommandError, match="'no-such-program'"):
        process.output(["no-such-program"], tmp_path)


@pytest.mark.parametrize("at_the_end", ["0", "stay"])
def test_what_takes_too_long_is_ended_with_all_that_it_started(
    at_the_end: str, family: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the command itself ends: its child does not at SIGTERM."""
    monkeypatch.setattr(process, "GRACE", 0.3)
    failures = list[BaseException]()

    def run() -> None:
        try:
            process.run([*family, "parent", at_the_end, "child", "stay"], tmp_path, lambda _: None, seconds=0.5)
        except TimeoutError as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert len(failures) == 1
    assert pids(tmp_path).keys() == saved(tmp_path) == {"parent", "child"}
    assert not any(map(alive, pids(tmp_path).values()))


def test_what_has_a_session_of_its_own_ends_last(family: list[str], tmp_path: Path) -> None:
    """As torchrun's ranks have: torchrun is to end them, so that they are not asked."""
    running = Running([*family, "parent", "143", "rank", "stay"], tmp_path, there=2)
    process.stop()
    assert running.ended() == 143
    assert saved(tmp_path) == {"parent"}
    assert not any(map(alive, pids(tmp_path).values()))


def test_stop_lets_a_command_save_before_it_ends(family: list[str], tmp_path: Path) -> None:
    running = Running([*family, "parent", "143", "child", "0"], tmp_path, there=2)
    process.stop()
    assert running.ended() == 143
    assert saved(tmp_path) == {"parent", "child"}
    assert not any(map(alive, pids(tmp_path).values()))


def test_stop_kills_what_stays_when_it_has_been_asked(
    family: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "GRACE", 0.3)
    running = Running([*family, "parent", "stay"], tmp_path, there=1)
    start = time.monotonic()
    process.stop()
    assert running.ended() == 137
    assert time.monotonic() - start > 0.3
    assert saved(tmp_path) == {"parent"}


def test_after_the_end_nothing_is_started(family: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_ended", threading.Event())
    running = Running([*family, "parent", "143"], tmp_path, there=1)
    process.end()
    assert running.ended() is None
    assert str(running.error) == "stopped, since its run ends; the same again goes on from what was saved"
    assert saved(tmp_path) == {"parent"}
    with pytest.raises(process.EndedError):
        process.run(["touch", "started"], tmp_path, print)
    assert not (tmp_path / "started").exists()


def test_a_command_ends_where_its_lines_cannot_be_told(family: list[str], tmp_path: Path) -> None:
    def tell(line: str) -> None:
        raise ValueError(line)

    with pytest.raises(ValueError, match=r"^parent$"):
        process.run([*family, "parent", "143"], tmp_path, tell)
    wait_until(lambda: saved(tmp_path) == {"parent"} and not alive(pids(tmp_path)["parent"]))


def test_a_command_and_its_children_end_when_their_holder_is_killed(family: list[str], tmp_path: Path) -> None:
    command = [*python(HOLDER), *family, "parent", "143", "child", "stay"]
    with subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL
    ) as holder:
        wait_until(lambda: len(pids(tmp_path)) == 2)
        guard = next(each.pid for each in psutil.Process(holder.pid).children())
        holder.kill()
    wait_until(lambda: not any(map(alive, [guard, *pids(tmp_path).values()])))
    assert saved(tmp_path) == {"parent", "child"}


def test_signals_that_are_meant_for_the_holder_do_not_end_a_command(family: list[str], tmp_path: Path) -> None:
    running = Running([*family, "parent", "143"], tmp_path, there=1)
    (guard,) = psutil.Process().children()
    time.sleep(0.1)  # in which the guard begins to ignore them
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        guard.send_signal(signum)
    time.sleep(0.1)
    assert alive(guard.pid)
    assert saved(tmp_path) == set()
    process.stop()
    assert running.ended() == 143
