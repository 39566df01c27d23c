"""Runs of rdpo that last: killed, terminated, on several ranks, watched."""

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from metrics import Scorer
from metrics.log_probability import LogProbability
from solvers import load_predictor
from stages.files import RolloutError, StageError

from .conftest import Workspace, run, small

Start = Callable[[dict[str, Any]], Path]


@pytest.fixture
def prepared(finished: Path, workspace: Workspace) -> Start:
    """Makes a folder in which rdpo can run with changed settings."""

    def make(changes: dict[str, Any]) -> Path:
        params = small()
        params["rdpo"] |= changes
        folder = workspace(params)
        for name in ("models/backbone", "models/distilled"):
            shutil.copytree(finished / name, folder / name, dirs_exist_ok=True)
        (folder / "data").mkdir(exist_ok=True)
        for name in ("models/metrics.json", "data/refs.npz"):
            shutil.copy(finished / name, folder / name)
        return folder

    return make


def scoring(score: Scorer) -> type[LogProbability]:
    """A metric that scores like that."""

    class Other(LogProbability):
        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            return score(images, prompts)

    return Other


def change(folder: Path, **changes: Any) -> None:
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["rdpo"] |= changes
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


def deployed(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in [*Path(folder, "models/rdpo").iterdir(), folder / "results/rdpo.csv"]}


def log(folder: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    lines = (folder / "data/logs/rdpo.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


@pytest.fixture
def start_stage() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts the stage in a process of its own, which does not outlive the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*launcher: str) -> subprocess.Popen[str]:
        command = [sys.executable, *launcher, "-m", "stages.rdpo"]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        started.append(
            subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # whatever started the tests
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def wait_for_iteration(folder: Path, iteration: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        file = folder / "data/logs/rdpo.jsonl"
        if file.exists() and len(file.read_text().splitlines()) >= iteration:
            return
        time.sleep(0.005)
    raise AssertionError("no such iteration came")


LONG = {"iterations": 80, "checkpoint_every": 3, "validate_every": 20, "patience": None, "kl_limit": None}


@pytest.mark.parametrize("method", ["rdpo", "cma_es"])
def test_kill_9_at_any_iteration_and_again_gives_the_same_bytes(method: str, prepared: Start, start_stage: Any) -> None:
    folder = prepared(LONG | {"method": method})
    run("rdpo", [])
    expected, entries = deployed(folder), log(folder)
    plots = {file.name: file.read_bytes() for file in (folder / "data/live/rdpo/plots/metrics").iterdir()}
    for name in ("models/rdpo", "data/live", "data/logs"):
        shutil.rmtree(folder / name)
    (folder / "results/rdpo.csv").unlink()
    process = start_stage()
    after = random.Random(time.time_ns()).randrange(4, 50)
    wait_for_iteration(folder, after)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, f"it ended before it was killed, after iteration {after}"
    assert (folder / "data/checkpoints/rdpo.safetensors").exists()
    assert not (folder / "models/rdpo").exists()
    run("rdpo", [])
    assert deployed(folder) == expected
    assert not (folder / "data/checkpoints/rdpo.safetensors").exists()
    timed = {"seconds", "images_per_second", "memory_mb"}
    untimed = [[{k: v for k, v in entry.items() if k not in timed} for entry in found] for found in (entries, log(folder))]
    assert untimed[0] == untimed[1], "the log has every iteration once"
    assert {file.name: file.read_bytes() for file in (folder / "data/live/rdpo/plots/metrics").iterdir()} == plots


@pytest.mark.parametrize(("signum", "processes"), [(signal.SIGTERM, "1"), (signal.SIGINT, "2")])
def test_a_signal_loses_at_most_one_iteration(
    signum: signal.Signals, processes: str, prepared: Start, start_stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARASOL_PROCESSES", processes)
    folder = prepared(LONG | {"iterations": 400, "checkpoint_every": 1000, "checkpoint_minutes": 60.0, "validate_every": 100})
    process = start_stage()
    wait_for_iteration(folder, 5)
    process.send_signal(signum)
    process.send_signal(signum)  # as torchrun does, and impatient hands
    _, errors = process.communicate(timeout=60)
    word, status = {signal.SIGTERM: ("terminated", 143), signal.SIGINT: ("interrupted", 130)}[signum]
    assert process.returncode == status, errors
    assert errors.count(f"stage rdpo: {word}; nothing is half-written, the same command goes on") == 1
    assert "Traceback" not in errors
    done, logged = saved(folder)["done"], log(folder)[-1]["iteration"]
    assert logged - 1 <= done <= logged
    change(folder, learning_rate=2e-4)
    with pytest.raises(StageError, match=r"rdpo.learning_rate was 0.0001, is 0.0002; valid: the same"):
        run("rdpo", [])
    change(folder, learning_rate=1e-4, iterations=done + 1, batch_size=8, checkpoint_every=1)  # of these it is all the same
    run("rdpo", [])
    assert [entry["iteration"] for entry in log(folder)] == list(range(1, done + 2))


def saved(folder: Path) -> dict[str, Any]:
    from stages.files import read_tensors

    return read_tensors(folder / "data/checkpoints/rdpo.safetensors")[1]["values"]


@pytest.mark.parametrize("method", ["rdpo", "reward_gradient", "cma_es"])
def test_two_ranks_come_to_the_table_of_one(
    method: str, prepared: Start, start_stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that the stage starts by itself to the same bytes, and torchrun's."""
    folder = prepared({"method": method})
    run("rdpo", [])
    alone, curve, expected = load_predictor(folder / "models/rdpo"), csv_of(folder), deployed(folder)
    shutil.rmtree(folder / "models/rdpo")
    if method == "rdpo":
        monkeypatch.setenv("PARASOL_PROCESSES", "3")  # which do not divide its 4 groups: two
        process = start_stage()
    else:
        process = start_stage("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert method != "rdpo" or deployed(folder) == expected
    both = load_predictor(folder / "models/rdpo")
    assert both.provenance["rollout_rows"] == alone.provenance["rollout_rows"]
    assert both.provenance["validation_rows"] == alone.provenance["validation_rows"]
    for name, value in vars(alone.table).items():
        if isinstance(value, Tensor):
            assert torch.allclose(getattr(both.table, name), value, rtol=0, atol=1e-6), name
    for row, other in zip(*(csv.DictReader(text.splitlines()) for text in (curve, csv_of(folder))), strict=True):
        assert {k: pytest.approx(float(v), abs=1e-6) for k, v in row.items()} == {k: float(v) for k, v in other.items()}


def csv_of(folder: Path) -> str:
    return (folder / "results/rdpo.csv").read_text()


def test_groups_that_ranks_cannot_split_are_refused(prepared: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages import rdpo as module

    prepared({"groups": 3})

    class Two:
        rank, size = 0, 2

    monkeypatch.setattr(module, "Ranks", Two)
    with pytest.raises(StageError, match=r"rdpo.groups: 3 for 2 ranks; valid: a multiple of the ranks"):
        run("rdpo", [])


def test_the_log_is_strict_and_the_plots_are_it(prepared: Start) -> None:
    folder = prepared({"method": "rdpo"})
    run("rdpo", [])
    entries = log(folder)
    assert [entry["iteration"] for entry in entries] == list(range(1, 7))
    for key in ("reward", "kl", "clip_fraction", "images_per_second", "memory_mb", "rows"):
        assert all(isinstance(entry[key], float) for entry in entries), key
    assert [entry["iteration"] for entry in entries if "validation_gain" in entry] == [2, 4, 6]
    table = (folder / "data/live/rdpo/plots/metrics/reward.tsv").read_text().splitlines()
    assert [float(line.split("\t")[1]) for line in table[1:]] == [entry["reward"] for entry in entries]
    assert not (folder / "data/live/rdpo/plots/metrics/seconds.tsv").exists()
    chosen = load_predictor(folder / "models/rdpo").provenance
    assert chosen["iterations"] == 6
    assert chosen["rollout_rows"] == sum(entry["rows"] for entry in entries)


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    from stages.trace import Trace

    trace = Trace(tmp_path / "log.jsonl", tmp_path / "live", 0)
    trace.add({"iteration": 1, "reward": float("nan"), "kl": float("inf")})
    trace.add({"iteration": 2, "reward": 0.5, "kl": 1.0})
    trace.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"iteration": 3, "rew')  # killed while it wrote
    again = Trace(tmp_path / "log.jsonl", tmp_path / "live", 1)
    again.close()
    assert (tmp_path / "log.jsonl").read_text() == '{"iteration": 1, "reward": null, "kl": null}\n'


def test_it_stops_at_the_kl_limit_and_deploys_what_was_before(prepared: Start, capsys: pytest.CaptureFixture[str]) -> None:
    folder = prepared({"kl_alarm": 1e-4, "kl_limit": 0.3, "validate_every": 1})
    run("rdpo", [])
    entries = log(folder)
    assert entries[-1]["kl"] > 0.3 >= entries[-2]["kl"]
    assert "is above the limit, 0.3" in entries[-1]["stopped"]
    assert any(", above 0.0001" in alarm for entry in entries for alarm in entry["alarms"])
    found = load_predictor(folder / "models/rdpo").provenance
    assert found["stopped"] == entries[-1]["stopped"]
    assert found["chosen"]["kl"] <= 0.3
    assert "rdpo: iteration" in capsys.readouterr().err


def falling(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A judge that finds each image worse than the one that it saw at its place before."""
    falling.calls += 1  # type: ignore[attr-defined]
    return torch.full((len(images),), -float(falling.calls)).double() + images.double().mean((1, 2, 3))  # type: ignore[attr-defined]


def test_what_a_judge_finds_worse_is_told_and_not_deployed(
    prepared: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from stages import scorers

    falling.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(scorers, "Accuracy", scoring(falling))
    folder = prepared({"patience": 2, "validate_every": 1, "iterations": 6})
    run("rdpo", [])
    entries = log(folder)
    assert [entry["stopped"] for entry in entries] == ["", "2 validations without a better table to deploy"]
    assert all(any(alarm.startswith("accuracy -") for alarm in entry["alarms"]) for entry in entries)
    assert load_predictor(folder / "models/rdpo").provenance["chosen"]["iteration"] == 0
    distilled, best = (load_file(folder / f"models/{name}/predictor.safetensors") for name in ("distilled", "rdpo"))
    assert all(torch.allclose(best[name].sort(-1).values, distilled[name].sort(-1).values) for name in distilled)
    assert "rdpo: iteration 1: accuracy -" in capsys.readouterr().err


def test_brightness_that_moves_is_told(prepared: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages import scorers

    calls: list[int] = []

    def brightening(images: Tensor, prompts: Sequence[str]) -> Tensor:
        calls.append(len(images))
        return images.double().mean((1, 2, 3)) * (1 + 0.2 * (len(calls) - 2))

    monkeypatch.setitem(scorers.WATCHED, "brightness", brightening)
    folder = prepared({"validate_every": 2})
    run("rdpo", [])
    found = [alarm for entry in log(folder) for alarm in entry["alarms"] if alarm.startswith("brightness")]
    assert len(found) >= 2


@pytest.mark.parametrize(
    ("late", "message"),
    [
        (
            lambda r: torch.full_like(r, 0.25),
            r"reward: 0.25 for all 100 validation images; valid: one that .*see data/fai",
        ),
        (lambda r: 0.25 + 1e-9 * r, r"reward: 0.25 for all 100 validation images"),
        (lambda r: 1e300 * r, r"log_probability: up to .*e\+300; valid: numbers that can be squared; see data/failed"),
    ],
)
def test_a_reward_that_stops_telling_images_apart_is_told(
    late: Any, message: str, prepared: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second validation, as of a server that falls back to a default."""
    from stages import scorers

    class Failing(LogProbability):
        calls = 0

        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            Failing.calls += len(images) == 100
            found = super().__call__(images, prompts)
            return late(found) if Failing.calls == 2 and len(images) == 100 else found

    monkeypatch.setattr(scorers, "LogProbability", Failing)
    folder = prepared({})
    with pytest.raises(RolloutError, match=message):
        run("rdpo", [])
    assert saved(folder)["done"] == 1
    assert (folder / "data/failed/rdpo-2-validation-rank0.safetensors").exists()


@pytest.mark.parametrize("which", ["accuracy", "brightness", "network", "distance"])
def test_what_is_not_finite_in_a_validation_is_told(which: str, prepared: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second one: nothing that cannot be compared is ever deployed."""
    from stages import rdpo as module
    from stages import scorers, validation
    from stages.rollouts import Rollouts

    calls: list[int] = []

    def spoilt(images: Tensor, prompts: Sequence[str]) -> Tensor:
        calls.append(1)
        return torch.full((len(images),), float("nan") if len(calls) > 1 else 1.0)

    class Broken(Rollouts):
        def images(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 4:  # after the first validation and two iterations
                raise FloatingPointError("denoise: returned numbers that are not finite")
            return super().images(*args, **kwargs)

    folder = prepared({})
    match which:
        case "accuracy":
            monkeypatch.setattr(scorers, "Accuracy", scoring(spoilt))
        case "brightness":
            monkeypatch.setitem(scorers.WATCHED, "brightness", spoilt)
        case "network":
            monkeypatch.setattr(module, "Rollouts", Broken)
        case "distance":
            monkeypatch.setattr(
                validation, "distance", lambda *_: calls.append(1) or (1.0 if len(calls) == 1 else float("nan"))
            )
    told = {"network": "numbers that are not finite; see", "distance": "frechet_distance: nan at iteration 2; valid"}
    with pytest.raises(RolloutError, match=told.get(which, rf"{which}: not finite for 100 of 100 images")):
        run("rdpo", [])
    assert saved(folder)["done"] == 1
    assert not (folder / "models/rdpo").exists()
    assert (folder / "data/failed/rdpo-2-validation-rank0.safetensors").exists()


def test_a_distance_that_rises_is_told(prepared: Start) -> None:
    folder = prepared({"learning_rate": 1e-3, "warmup": 0})
    run("rdpo", [])
    found = load_predictor(folder / "models/rdpo").provenance["chosen"]
    entries = [entry for entry in log(folder) if "validation_gain" in entry]
    for entry in entries:
        rose = entry["validation_frechet_distance"] > found["distilled_frechet_distance"]
        assert rose == any(alarm.startswith("frechet_distance ") for alarm in entry["alarms"])
    assert any(entry["validation_frechet_distance"] > found["distilled_frechet_distance"] for entry in entries)


def test_a_table_that_none_can_be_drawn_around_is_told(prepared: Start) -> None:
    from dataclasses import replace

    from solvers import save_predictor

    folder = prepared({})
    distilled = load_predictor(folder / "models/distilled")
    table: Any = distilled.table
    position = table.position.clone()
    position[1] = position[1, 0]
    shutil.rmtree(folder / "models/distilled")
    (folder / "models/distilled").mkdir()
    save_predictor(replace(distilled, table=replace(table, position=position)), folder / "models/distilled", "distilled")
    with pytest.raises(
        StageError, match=r"models/distilled: no policy can be drawn around this table: base: points .*coincide"
    ):
        run("rdpo", [])


def test_a_stage_that_has_no_ranks_is_not_run_by_torchrun(prepared: Start) -> None:
    prepared({})
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "WORLD_SIZE": "2", "RANK": "1"}
    found = subprocess.run(
        [sys.executable, "-m", "stages.distill"], capture_output=True, text=True, env=environment, check=False
    )
    assert found.returncode == 1
    assert found.stderr == "stage distill: runs as one process; valid: python -m, without torchrun\n"


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            lambda images, prompts: torch.full((len(images),), -1.0),
            r"reward: -1 for all 100 validation images; valid: one that",
        ),
        (
            lambda images, prompts: torch.full((len(images),), float("nan")),
            r"log_probability: not finite for 100 of 100 images",
        ),
        (lambda images, prompts: torch.zeros(len(images), 2), r"log_probability: shape \(100, 2\); valid: \(100,\)"),
    ],
)
def test_a_bad_reward_is_told_before_anything_is_learned(
    reward: Any, message: str, prepared: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages import scorers

    monkeypatch.setattr(scorers, "LogProbability", scoring(reward))
    prepared({})
    with pytest.raises(RolloutError, match=message):
        run("rdpo", [])


def test_a_reward_that_fails_later_leaves_checkpoint_and_batch(prepared: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    from stages import scorers

    class Failing(LogProbability):
        calls = 0

        def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
            Failing.calls += 1
            found = super().__call__(images, prompts)
            return found * float("nan") if Failing.calls == 9 else found

    folder = prepared({"checkpoint_every": 100})
    run("rdpo", [])
    expected = deployed(folder)
    shutil.rmtree(folder / "models/rdpo")
    with monkeypatch.context() as patch:
        patch.setattr(scorers, "LogProbability", Failing)
        with pytest.raises(RolloutError, match=r"not finite for 16 of 16 images, .*see data/failed/rdpo-\d-images-rank0.saf"):
            run("rdpo", [])
    assert saved(folder)["done"] == log(folder)[-1]["iteration"] > 2
    run("rdpo", [])
    assert deployed(folder) == expected


@pytest.mark.parametrize(
    "chosen", [{"method": "cma_es"}, {"method": "reward_gradient"}, {"group": "mixed", "minibatch": 4}], ids=str
)
def test_every_method_runs_and_resumes_as_a_stage(
    chosen: dict[str, Any], prepared: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.checkpoint import Checkpoint

    folder = prepared(chosen)
    run("rdpo", [])
    expected = deployed(folder)
    shutil.rmtree(folder / "models/rdpo")
    save, times = Checkpoint.save, 0

    def interrupt(self: Checkpoint, parts: Any, values: Any) -> None:
        nonlocal times
        save(self, parts, values)
        times += 1
        if times == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run("rdpo", [])
    assert saved(folder)["done"] == 2
    run("rdpo", [])
    assert deployed(folder) == expected
