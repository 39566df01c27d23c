"""The command line of stages: exit statuses, batch sizes that the environment caps, and several processes."""

import atexit
import json
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from stages import params
from stages.bucket import S3
from stages.command import command
from stages.files import InputError, StageError, TemporaryError
from stages.hub import NoAnswerError, UnreachableError
from stages.launch import MARK, RankError, _first, run_ranks
from stages.sample import sample

from .conftest import ROOT, Workspace, hashes, small

Ended = Callable[..., tuple[Any, str]]


@pytest.fixture
def ended(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ended:
    """Runs a stage by its command line, in this process: the exit status, and what it said."""
    workspace(small())
    monkeypatch.setattr("signal.signal", lambda *_: None)  # those of this process stay

    def run(stage: Callable[..., None], *arguments: str, has_ranks: bool = True) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", [stage.__name__, *arguments])
        with pytest.raises(SystemExit) as found:
            command(stage, has_ranks)
        return found.value.code, capsys.readouterr().err

    return run


def raising(error: Exception, cause: Exception | None = None) -> Callable[..., None]:
    def teacher(*, teacher: params.Teacher) -> None:
        raise error from cause

    return teacher


@pytest.mark.parametrize(
    ("error", "cause", "status"),
    [
        (StageError("x"), None, 1),
        (StageError("x"), FileNotFoundError("y"), 1),
        (UnreachableError("x"), None, 1),
        (NoAnswerError("x"), None, os.EX_TEMPFAIL),
        (InputError("x"), NoAnswerError("y"), os.EX_TEMPFAIL),
        (InputError("x"), ConnectionError("y"), os.EX_TEMPFAIL),
        (InputError("x"), TimeoutError("y"), os.EX_TEMPFAIL),
        (FloatingPointError("x"), None, 1),
    ],
)
def test_what_may_pass_has_a_status_of_its_own(error: Exception, cause: Exception | None, status: int, ended: Ended) -> None:
    assert ended(raising(error, cause)) == (status, "stage teacher: x\n")


def test_a_bucket_that_cannot_be_reached_may_pass(ended: Ended, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)

    def metrics() -> None:
        S3(f"s3://{bucket}/missing").files()

    status, told = ended(metrics)
    assert status == 1
    assert told.startswith(f"stage metrics: s3://{bucket}/missing: found no files; valid: ")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        status, told = ended(metrics)
    assert status == os.EX_TEMPFAIL
    assert f"stage metrics: s3://{bucket}/missing: listing failed 4 times" in told.splitlines()[-1]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full\nmore"), MemoryError("full"), RuntimeError("full: can't allocate memory")], ids=repr
)
def test_out_of_memory_may_pass_with_a_smaller_batch(error: Exception, ended: Ended, monkeypatch: pytest.MonkeyPatch) -> None:
    status, told = ended(raising(error))
    assert status == os.EX_OSERR
    assert told.startswith("stage teacher: out of memory (full")
    assert "; teacher.batch_size is 256: lower it, in params.yaml or by PARASOL_BATCH_SIZE, or set compute.drop_text" in told
    assert told.endswith("; what is done is kept, the same command goes on\n")
    assert told.count("\n") == 1
    monkeypatch.setenv("PARASOL_BATCH_SIZE", "2")
    status, told = ended(raising(error))
    assert status == os.EX_OSERR
    assert "; teacher.batch_size is 2: lower it" in told
    monkeypatch.setenv("PARASOL_BATCH_SIZE", "1")
    status, told = ended(raising(error))
    assert status == 1
    assert "; teacher.batch_size is 1, the least: set compute.drop_text" in told


def test_out_of_memory_stays_where_no_batch_size_may_be_lowered(ended: Ended, monkeypatch: pytest.MonkeyPatch) -> None:
    def rdpo(*, rdpo: params.RDPO) -> None:
        raise torch.OutOfMemoryError("full")

    def distill(*, distill: params.Distill) -> None:
        raise torch.OutOfMemoryError("full")

    def refs(*, refs: params.Refs) -> None:
        raise torch.OutOfMemoryError("full")

    assert ended(rdpo)[0] == os.EX_OSERR
    monkeypatch.setenv("PARASOL_BATCH_SIZE", "1")
    status, told = ended(rdpo)
    assert status == 1
    assert "; rdpo.batch_size is 4, the least: set compute" in told
    status, told = ended(distill, has_ranks=False)
    assert status == 1
    assert "; distill.batch_size is 16: lower it, or set compute" in told
    assert told.endswith("; another distill.batch_size begins anew\n")
    status, told = ended(refs)
    assert status == 1
    assert "(full); set compute" in told


def test_the_environment_caps_batch_sizes(ended: Ended, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def teacher(*, teacher: params.Teacher) -> None:
        seen.append(teacher.batch_size)

    def rdpo(*, rdpo: params.RDPO) -> None:
        seen.append(rdpo.batch_size)

    def distill(*, distill: params.Learning) -> None:
        seen.append(distill.batch_size)

    def report(*, report: params.Report) -> None:
        pass

    for cap, expected in (("", [256, 512, 16]), ("1000", [256, 512, 16]), ("10", [10, 10, 16]), ("3", [3, 4, 16])):
        monkeypatch.setenv("PARASOL_BATCH_SIZE", cap)
        for stage, has_ranks in ((teacher, True), (rdpo, True), (distill, False), (report, False)):
            assert ended(stage, has_ranks=has_ranks) == (0, "")
        assert seen == expected
        found = [json.loads(Path(f"data/times/{name}.json").read_text()) for name in ("teacher", "rdpo", "distill", "report")]
        assert [times.get("batch_size") for times in found] == [*expected, None]
        assert all(times.keys() >= {"seconds", "peak_memory_mb"} for times in found)
        seen.clear()


@pytest.mark.parametrize("variable", ["PARASOL_BATCH_SIZE", "PARASOL_PROCESSES"])
@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", " 3", "9" * 5000])
def test_the_environment_is_checked_before_work(
    variable: str, value: str, ended: Ended, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    for has_ranks in (True, False):
        status, told = ended(raising(AssertionError("was run")), has_ranks=has_ranks)
        assert (status, told) == (1, f"stage teacher: {variable}: found {value!r}; valid: a whole number from 1\n")


def test_only_stages_with_ranks_are_several_processes(ended: Ended, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARASOL_PROCESSES", "7")
    started: list[tuple[str, list[str], int]] = []
    monkeypatch.setattr("stages.command.run_ranks", lambda *given: started.append(given))

    def nothing(*, rdpo: params.RDPO) -> None:
        pass

    def rdpo(*, rdpo: params.RDPO) -> None:
        pass

    assert ended(nothing, has_ranks=False) == (0, "")
    assert started == []
    assert ended(rdpo) == (0, "")
    assert started == [("stages.rdpo", [], 4)], "of the 4 groups"
    assert json.loads(Path("data/times/rdpo.json").read_text())["seconds"] > 0
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert ended(rdpo) == (0, ""), "as torchrun has it"
    assert len(started) == 1
    monkeypatch.delenv("WORLD_SIZE")
    Path("params.yaml").write_text("seed: 0\n")
    assert ended(rdpo)[0] == 1
    assert len(started) == 1, "not before params.yaml is known to be right"


@pytest.mark.parametrize(("groups", "most", "expected"), [(16, 3, 2), (16, 16, 16), (16, 10**9, 16), (15, 4, 3), (7, 6, 1)])
def test_groups_are_split_evenly(groups: int, most: int, expected: int) -> None:
    section = params.RDPO.model_validate(small()["rdpo"] | {"groups": groups})
    assert section.ranks(most) == expected


def test_a_rank_tells_who_started_it_alone(ended: Ended, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MARK, "true")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "error.json")
    assert ended(raising(NoAnswerError("x"))) == (os.EX_TEMPFAIL, "")
    assert json.loads(Path("error.json").read_text())["message"]["message"] == "RankError: x"


def test_the_hub_s_silence_is_told_from_offline_mode() -> None:
    assert issubclass(NoAnswerError, UnreachableError)
    assert not issubclass(UnreachableError, TemporaryError)


def test_two_processes_make_the_same_bytes(ended: Ended, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(finished / "models", "models")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PARASOL_PROCESSES", "2")
    assert ended(sample, "distilled")[0] == 0
    assert hashes(Path(), "data/samples") == {
        name: digest for name, digest in hashes(finished, "data/samples").items() if "distilled" in name
    }
    assert json.loads(Path("data/times/sample@distilled.json").read_text())["batch_size"] == 64


RANK = """
import os, signal, sys, time
from pathlib import Path
from stages.launch import report

rank, what = int(os.environ["RANK"]), sys.argv[1]

def fail(message, status):
    assert report(message)
    sys.exit(status)

def stop(*_):
    Path(f"saved-{rank}").touch()
    fail("told to stop", 143)

signal.signal(signal.SIGTERM, stop)
Path(f"{rank}").write_text(os.environ["OMP_NUM_THREADS"])
while not Path(f"{1 - rank}").exists():
    time.sleep(0.01)
if what == "is well":
    sys.exit(0)
if rank == 0 and what == "is killed":
    time.sleep(0.05)
    fail("rank 0: another rank has stopped", 1)
if rank == 1:
    match what:
        case "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "crashes":
            sys.exit(3)
        case "ends all":
            os.kill(os.getppid(), signal.SIGTERM)
        case "fails":
            fail("the hub is away", 75)
time.sleep(60)
"""


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A module for ranks that do nothing, in the working directory; the launcher's own handlers of signals go again."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    (tmp_path / "rank.py").write_text(RANK)
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def saved() -> set[str]:
    return {file.name for file in Path().glob("saved-*")}


def test_threads_are_shared_by_ranks(ranks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
    run_ranks("rank", ["is well"], 2)
    assert [Path(str(rank)).read_text() for rank in range(2)] == ["4", "4"]


@pytest.mark.parametrize(
    ("what", "status", "message"),
    [
        ("fails", 75, "the hub is away"),
        ("is killed", 137, "a rank was ended by signal 9; the same command goes on"),
        ("crashes", 3, "a rank failed, and says why above"),
    ],
)
def test_the_first_rank_that_fails_is_told_and_the_others_save(what: str, status: int, message: str, ranks: None) -> None:
    with pytest.raises(RankError) as found:
        run_ranks("rank", [what], 2)
    assert (str(found.value), found.value.status) == (message, status)
    assert what == "is killed" or saved() == {"saved-0"}


def test_a_rank_that_the_launcher_had_to_kill_is_not_the_first(tmp_path: Path) -> None:
    file = tmp_path / "error.json"
    file.write_text(json.dumps({"message": {"message": "RankError: the hub is away", "extraInfo": {"timestamp": "2"}}}))
    killed, failed = (ProcessFailure(rank, 1, status, str(path)) for rank, status, path in ((0, -9, ""), (1, 75, file)))
    found = _first([killed, failed])
    assert (str(found), found.status) == ("the hub is away", 75)


def test_ranks_do_not_outlive_a_signal(ranks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = list[tuple[object, ...]]()
    monkeypatch.setattr(atexit, "register", lambda *call: ends.append(call))
    with pytest.raises(SignalException):
        run_ranks("rank", ["ends all"], 2)
    assert (os._exit, 143) in ends
    assert saved() == {"saved-0", "saved-1"}
