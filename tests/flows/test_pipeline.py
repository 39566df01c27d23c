import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.lock import FAILED_TO_LOCK_MESSAGE, LockError
from dvc.repo import Repo, lock_repo
from dvc.rwlock import _check_blockers

from flows import pipeline, process
from flows.pipeline import StageError, failure, read_graph, read_hashes, repro, select

FOUND = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
GRAPH = {
    "backbone": [],
    "refs": ["backbone"],
    "rdpo": ["backbone", "refs"],
    "sample@euler": ["backbone"],
    "sample@rdpo": ["rdpo"],
    "report": ["sample@euler", "sample@rdpo"],
}
WHY = "ERROR: failed to reproduce 'rdpo': failed to run: python -m stages.rdpo, exited with {}"
EXCEPTION = ["Traceback (most recent call last):", '  File "x", line 1', "ZeroDivisionError: a"]
WAITS = "stage rdpo: waiting for another process that runs it"
KILLED = "killed, as a system does that is short of memory; the same again goes on from what was saved"


def make(repository: Path, stage: str = "backbone", **options: Any) -> tuple[str, list[str]]:
    """How a stage came about, and the lines that were told."""
    lines = list[str]()
    plain: dict[str, Any] = {"force": False, "pull": False, "seconds": 60, "environment": {}}
    return repro(repository, stage, lines.append, **plain | options), lines


def test_the_graph_is_dvcs(repository: Path) -> None:
    """In an order in which stages can run, which need not be that of dvc.yaml."""
    file = repository / "dvc.yaml"
    stages = yaml.safe_load(file.read_text())["stages"]
    file.write_text(yaml.safe_dump({"stages": dict(reversed(stages.items()))}, sort_keys=False))
    graph = read_graph(repository)
    assert {name: sorted(needed) for name, needed in graph.items()} == {
        "backbone": [],
        "refs": ["backbone"],
        "rdpo": ["backbone", "refs"],
        "sample@euler": ["rdpo"],
        "sample@rdpo": ["rdpo"],
        "report": ["sample@euler", "sample@rdpo"],
    }
    names = list(graph)
    assert all(names.index(needed) < names.index(name) for name in graph for needed in graph[name])


@pytest.mark.parametrize(
    ("targets", "selected"),
    [
        ([], list(GRAPH)),
        (["backbone"], ["backbone"]),
        (["rdpo"], ["backbone", "refs", "rdpo"]),
        (["sample@euler"], ["backbone", "sample@euler"]),
        (["sample"], ["backbone", "refs", "rdpo", "sample@euler", "sample@rdpo"]),
        (["sample@euler", "refs"], ["backbone", "refs", "sample@euler"]),
        (["report"], list(GRAPH)),
    ],
)
def test_selected_are_targets_and_what_they_need(targets: list[str], selected: list[str]) -> None:
    assert select(GRAPH, targets) == {name: GRAPH[name] for name in selected}
    assert list(select(GRAPH, targets)) == selected


@pytest.mark.parametrize("unknown", ["distill", "sample@heun", "sample@", ""])
def test_an_unknown_target_is_told_the_right_ones(unknown: str) -> None:
    valid = "backbone, rdpo, refs, report, sample, sample@euler, sample@rdpo"
    with pytest.raises(ValueError, match=f"^targets: found '{unknown}'; valid: {valid}$"):
        select(GRAPH, ["rdpo", unknown])


def test_a_stage_runs_is_unchanged_or_comes_from_the_cache(repository: Path) -> None:
    source, lines = make(repository, environment={"PARASOL_PROCESSES": "2"})
    assert source == "ran"
    assert "backbone: no cap, 2 process" in lines
    assert not [line for line in lines if "git" in line or "dvc push" in line or "autostage" in line]
    made = repository / "models/backbone"
    text = made.read_bytes()
    assert read_hashes(repository) == {"backbone": {"models/backbone": hashlib.md5(text).hexdigest()}}

    assert make(repository)[0] == "unchanged"

    made.unlink()
    (repository / "dvc.lock").unlink()
    assert make(repository)[0] == "cache"
    assert made.read_bytes() == text


def test_what_dvc_push_leaves_out_is_pushed(repository: Path, tmp_path: Path) -> None:
    for stage in ("backbone", "refs", "rdpo"):
        make(repository, stage)
    assert push_uncached(repository, "rdpo") == (0, "")
    curve = hashlib.md5((repository / "results/rdpo.csv").read_bytes()).hexdigest()
    assert [file.parent.name + file.name for file in tmp_path.glob("remote/files/md5/*/*")] == [curve]
    for stage in ("sample@euler", "sample@rdpo", "report"):
        make(repository, stage)
    assert push_uncached(repository, "report") == (0, "")  # what is no metric and no plot, DVC does not keep


def push_uncached(repository: Path, stage: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "flows.uncached", stage, "storage"]
    done = subprocess.run(command, cwd=repository, env=FOUND, capture_output=True, text=True)
    return done.returncode, done.stderr + done.stdout


def test_a_push_waits_while_another_stage_writes_the_lock_file(repository: Path) -> None:
    make(repository)
    lock = repository / "dvc.lock"
    whole, command = lock.read_text(), [sys.executable, "-m", "flows.uncached", "backbone", "storage"]
    with Repo(str(repository)) as repo, lock_repo(repo):
        lock.write_text(whole.removeprefix("schema: '2.0'"))
        push = subprocess.Popen(command, cwd=repository, env=FOUND, stderr=subprocess.PIPE)
        with pytest.raises(subprocess.TimeoutExpired):
            push.wait(4)
        lock.write_text(whole)
    assert (push.communicate(timeout=60)[1], push.returncode) == (b"", 0)


def test_out_of_memory_lowers_the_batch_until_it_fits(repository: Path) -> None:
    params, cap = repository / "params.yaml", repository / ".dvc/tmp/batch_sizes/backbone"
    params.write_text(params.read_text().replace("name: digits", "fail: memory"))
    cap.parent.mkdir(parents=True)
    cap.write_text("4")
    with pytest.raises(StageError) as failed:
        make(repository)
    assert str(failed.value) == "backbone: out of memory (CUDA); rdpo.batch_size is 4: lower it; now with batches of 2"
    assert failed.value.may_pass
    source, lines = make(repository)
    assert source == "ran"
    assert "backbone: 2 cap, one process" in lines


def test_what_was_killed_may_pass_and_what_is_missing_not(repository: Path) -> None:
    work = repository / "stages/work.py"
    work.write_text("import os\n\nos.kill(os.getpid(), 9)\n" + work.read_text())
    with pytest.raises(StageError, match=f"^backbone: {KILLED}$") as killed:
        make(repository)
    assert killed.value.may_pass
    with pytest.raises(StageError, match=r"^refs: .*No such file or directory: '.*models/backbone'$") as missing:
        make(repository, "refs")
    assert not missing.value.may_pass


def test_what_takes_too_long_says_how_to_give_it_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], folder: Path, tell: Any, environment: Any, seconds: float) -> int:
        assert seconds == 5400
        raise TimeoutError

    monkeypatch.setattr(process, "run", run)
    with pytest.raises(StageError, match=r"^sample@euler: took more than 1\.5 h, .*\(flows\.hours\.sample\)") as failed:
        make(tmp_path, "sample@euler", seconds=5400)
    assert not failed.value.may_pass


@pytest.mark.parametrize(("force", "pull", "options"), [(True, False, ["--force"]), (False, True, ["--pull"])])
def test_options_of_dvc(force: bool, pull: bool, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = list[list[str]]()
    monkeypatch.setattr(process, "run", lambda command, *_: commands.append(command))
    make(tmp_path, "rdpo", force=force, pull=pull)
    assert commands == [[*pipeline.DVC, "repro", "--single-item", *options, "rdpo"]]


@pytest.mark.parametrize(
    ("said", "status", "message", "may_pass"),
    [
        (["rdpo: 3%|", "stage rdpo: the hub cannot be reached"], 75, "the hub cannot be reached", True),
        (["stage rdpo: rdpo.rho: found -1; valid: above 0"], 1, "rdpo.rho: found -1; valid: above 0", False),
        (["stage sample@a.b: no"], 1, "no", False),
        ([WAITS, "stage rdpo: how it is"], 1, "how it is", False),
        (["stage rdpo: out of memory"], 71, "out of memory", False),  # no batch to lower
        (["stage rdpo: terminated; the same goes on"], 143, "terminated; the same goes on", False),
        (EXCEPTION, 1, "ZeroDivisionError: a", False),
        ([WAITS, *EXCEPTION], 1, "ZeroDivisionError: a", False),
        (["timed out once"], 1, "failed to run: python -m stages.rdpo, exited with 1", False),
        (["stage rdpo: goes on"], -9, KILLED, True),
        (["stage rdpo: goes on"], 137, KILLED, True),
    ],
)
def test_why_a_stage_failed(said: list[str], status: int, message: str, may_pass: bool, tmp_path: Path) -> None:
    error = failure(tmp_path, "rdpo", [*said, WHY.format(status)])
    assert (str(error), error.may_pass) == (f"rdpo: {message}", may_pass)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "may_pass"),
    [
        (FAILED_TO_LOCK_MESSAGE, True),
        ("failed to push data to the cloud - 2 files failed to upload", True),
        ("failed to pull data from the cloud - Checkout failed", True),
        ("unexpected error - Could not connect to the endpoint URL", True),
        ("unexpected error - [Errno 104] Connection reset by peer", True),
        ("[Errno 2] No such file or directory: '/cache/runs/ab/abcd/.u4BYAbsnIHuH4s7waLfd-w.tmp'", True),
        ("[Errno 2] No such file or directory: '/source/data/a.tmp'", False),
        ("Stage 'rdpo' not found inside 'dvc.yaml' file", False),
        ("unable to read: 'params.yaml', YAML file structure is corrupted", False),
    ],
)
def test_why_dvc_failed(words: str, may_pass: bool, tmp_path: Path) -> None:
    error = failure(tmp_path, "rdpo", ["Running it", f"ERROR: {words}"])
    assert (str(error), error.may_pass) == (f"rdpo: {words}", may_pass)


def test_a_lock_that_is_busy_may_pass(tmp_path: Path) -> None:
    output = str(tmp_path / "models/rdpo")
    lock = {"read": {}, "write": {output: {"pid": os.getppid(), "cmd": "dvc repro"}}}
    with pytest.raises(LockError) as busy:
        _check_blockers(str(tmp_path), lock, {"pid": 0, "cmd": ""}, mode="write", waiters=[output])
    lines = f"ERROR: failed to reproduce 'rdpo': {busy.value}".splitlines()
    assert failure(tmp_path, "rdpo", lines).may_pass


def test_why_another_command_failed(tmp_path: Path) -> None:
    error = failure(tmp_path, "pull", ["rdpo v1", "pull: the bucket cannot be reached", "exited with 75"])
    assert (str(error), error.may_pass) == ("pull: the bucket cannot be reached", True)
    error = failure(tmp_path, "generate", ["generate: prompts: missing", "exited with 1"])
    assert (str(error), error.may_pass) == ("generate: prompts: missing", False)
    assert str(failure(tmp_path, "push of rdpo to s3", [])) == "push of rdpo to s3: ended without a word"


def test_a_batch_of_one_is_not_lowered_to_none(tmp_path: Path) -> None:
    lines = ["stage rdpo: out of memory; rdpo.batch_size is 1: lower it", WHY.format(os.EX_OSERR)]
    assert str(failure(tmp_path, "rdpo", lines)).endswith("; now with batches of 1")


def test_dvc_itself_killed_may_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "run", lambda *_: 128 + signal.SIGKILL)
    with pytest.raises(StageError, match=f"^backbone: {KILLED}$") as failed:
        make(tmp_path)
    assert failed.value.may_pass


def test_hashes_of_no_lock_and_of_stages_without_outputs(tmp_path: Path) -> None:
    assert read_hashes(tmp_path) == {}
    (tmp_path / "dvc.lock").write_text(
        "schema: '2.0'\nstages:\n  a: {cmd: x}\n  b@c: {cmd: x, deps: [{path: d, md5: '1'}], outs: [{path: e, md5: 2.dir}]}\n"
    )
    assert read_hashes(tmp_path) == {"a": {}, "b@c": {"e": "2.dir"}}
