import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from solvers import load_predictor
from stages.noise import SPLITS, noise

from .conftest import Workspace, hashes, run, small

SAMPLERS = ["reference", "euler", "heun", "distilled", "rdpo"]


def test_the_report_has_a_row_for_every_sampler(finished: Path) -> None:
    lines = (finished / "results/report.md").read_text().splitlines()
    rows = {cells[0]: cells for cells in ([c.strip() for c in line.strip("|").split("|")] for line in lines[2:7])}
    assert list(rows) == SAMPLERS
    cost = {name: (int(row[1]), float(row[2])) for name, row in rows.items()}
    assert cost == {"reference": (8, 8), "euler": (5, 5), "heun": (5, 5), "distilled": (5, 8), "rdpo": (5, 8)}
    assert all("±" in cell for cell in rows["euler"][3:])
    head = ["FD-100", "FD to reference", "KID", "precision", "recall", "RMSE", "log_probability (reward)", "accuracy"]
    assert [cell.strip() for cell in lines[0].strip("|").split("|")][3:] == [*head, "brightness"], (
        "no column for what is 0 everywhere"
    )
    assert "n: 100 test samples" in "\n".join(lines)
    pairs = [line for line in lines if line.startswith("| log_probability (reward)")]
    assert [line.split("|")[2].strip() for line in pairs] == ["reference", "euler", "heun", "rdpo"]
    page = (finished / "results/report.html").read_text()
    assert page.count("data:image/png;base64,") == 20 * len(SAMPLERS)
    assert page.count("data:image/svg+xml;base64,") >= 5
    assert "http://" not in page
    assert "https://" not in page


def test_results_are_what_the_scores_say(finished: Path) -> None:
    states = {name: load_file(finished / f"data/samples/{name}.safetensors")["states"] for name in SAMPLERS}
    for name in SAMPLERS:
        result = json.loads((finished / f"results/{name}.json").read_text())
        scores = parquet.read_table(finished / f"data/scores/{name}.parquet").to_pandas()
        rmse = (states[name] - states["reference"]).square().mean().sqrt()
        assert result["rmse"] == pytest.approx(rmse.item())
        for key in ("reward", "log_probability", "accuracy", "brightness", "saturation"):
            assert result[key] == pytest.approx(scores[key].mean())
            assert result[f"{key}_se"] == pytest.approx(scores[key].std() / 10)
        assert result["rmse"] == pytest.approx(scores["squared_error"].mean() ** 0.5)
        assert scores["sample"].tolist() == list(range(100))
        assert scores["prompt"].tolist() == list("0123456789") * 10
        assert result["n"] == 100


def test_results_say_how_they_were_measured(finished: Path) -> None:
    result = json.loads((finished / "results/euler.json").read_text())
    (protocol,) = result["protocol"]
    known = {"label": "FD-100", "extractor": "digits-judge", "n": 100, "seeds": "0-99", "ranges": 1, "dtype": "float32"}
    assert {key: protocol[key] for key in known} == known
    assert protocol["tool"] == f"torch-fidelity {version('torch-fidelity')}"
    assert protocol["reference"]["images"] == 1797 - 360
    assert protocol["reference"]["statistics_sha256"] == hashlib.sha256((finished / "data/refs.npz").read_bytes()).hexdigest()
    assert protocol["distances"] == [result["frechet_distance"]]
    own = json.loads((finished / "models/backbone/backbone.json").read_text())["sha256"]
    assert [(m["name"], m["in_reward"], m["weight"]) for m in result["metrics"]] == [
        ("log_probability", True, 1.0),
        ("accuracy", False, 0.0),
    ]
    assert all(metric["models"][0]["sha256"] == own and metric["scale"] and metric["range"] for metric in result["metrics"])


def test_three_ranges_report_the_lowest(upstream: Path, workspace: Workspace) -> None:
    """As EDM's protocol has it."""
    params = small()
    params["sample"]["seeds"], params["evaluate"]["ranges"] = "0-98", 3
    workspace(params)
    for sampler in ("reference", "euler"):
        run("sample", [sampler])
    run("evaluate", ["euler"])
    found = json.loads(Path("results/euler.json").read_text())
    (protocol,) = found["protocol"]
    assert (protocol["label"], protocol["n"], protocol["ranges"], len(set(protocol["distances"]))) == ("FD-33", 33, 3, 3)
    assert found["frechet_distance"] == min(protocol["distances"])
    assert found["n"] == 99


def test_rdpo_never_deploys_a_worse_distance(finished: Path) -> None:
    chosen = load_predictor(finished / "models/rdpo").provenance["chosen"]
    assert chosen["frechet_distance"] <= chosen["distilled_frechet_distance"]
    assert chosen["gain"] >= 0


def test_no_digit_is_used_twice(finished: Path, upstream: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train and held-out digits, and the halves that the two classifiers learn from, share no image."""
    from stages import digits as module

    given: dict[str, torch.Tensor] = {}

    def capture(seed: int, name: str, params: Any, images: torch.Tensor, labels: torch.Tensor) -> Any:
        given[name] = images
        if name == "judge":
            raise KeyboardInterrupt  # the last that is trained: nothing need be written

    monkeypatch.setattr(module, "train_network", lambda *_: None)
    monkeypatch.setattr(module, "train_classifier", capture)
    with pytest.raises(KeyboardInterrupt):
        run("backbone", [])
    data = load_file(finished / "models/backbone/digits.safetensors")
    split = flat(data["train_images"]) + flat(data["held_out_images"])
    pixels, _ = load_digits(return_X_y=True)
    assert sorted(split) == sorted(flat(torch.tensor(pixels).float() / 16))
    assert sorted(flat(given["reward"]) + flat(given["judge"])) == sorted(flat(data["train_images"]))


def flat(images: torch.Tensor) -> list[tuple[float, ...]]:
    return [tuple(row) for row in images.flatten(1).tolist()]


def test_distillation_learns(finished: Path) -> None:
    """Iteration 0 is the evenly spread start; what is kept is the best on validation noise."""
    with (finished / "results/distill.csv").open() as file:
        errors = [float(line["validation_rmse"]) for line in csv.DictReader(file)]
    kept = load_predictor(finished / "models/distilled").provenance["chosen"]["validation_rmse"]
    assert kept == min(errors) < errors[0]


def test_no_noise_is_in_two_splits() -> None:
    ranges = sorted(SPLITS.values(), key=lambda indices: indices.start)
    assert all(one.stop <= other.start for one, other in pairwise(ranges))
    drawn = [noise(0, split, range(3), (4,)) for split in SPLITS]
    assert len({tuple(row.tolist()) for rows in drawn for row in rows}) == 9
    assert torch.equal(noise(0, "test", [5, 2], (4,))[1], noise(0, "test", [2], (4,))[0])
    assert not torch.equal(noise(0, "test", [2], (4,)), noise(1, "test", [2], (4,)))


@pytest.mark.parametrize("batch_size", [1, 7])
def test_samples_do_not_depend_on_the_batch_size(batch_size: int, finished: Path, workspace: Workspace) -> None:
    params = small()
    params["sample"]["batch_size"] = batch_size
    folder = workspace(params)
    shutil.copytree(finished / "models", folder / "models")
    run("sample", ["distilled"])
    assert hashes(folder, "data/samples") == {
        name: digest for name, digest in hashes(finished, "data/samples").items() if "distilled" in name
    }


@pytest.mark.parametrize("stage", ["backbone", "distill", "rdpo"])
@pytest.mark.parametrize("interruption", [1, 3])
def test_an_interrupted_stage_goes_on_to_the_same_bytes(
    stage: str, interruption: int, upstream: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted right after its 1st or 3rd checkpoint."""
    from stages.checkpoint import Checkpoint

    outputs = {
        "backbone": ["models/backbone"],
        "distill": ["models/distilled", "results/distill.csv"],
        "rdpo": ["models/rdpo", "results/rdpo.csv"],
    }[stage]
    expected = hashes(upstream, *outputs)
    for name in outputs:
        shutil.rmtree(upstream / name) if (upstream / name).is_dir() else (upstream / name).unlink()
    if stage == "rdpo":
        assert expected.keys() > {"models/rdpo/predictor.json"}
    save, saved = Checkpoint.save, 0

    def interrupt(self: Checkpoint, parts: Any, values: Any) -> None:
        nonlocal saved
        save(self, parts, values)
        saved += 1
        if saved == interruption:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(stage, [])
    assert hashes(upstream, *outputs) == {}
    run(stage, [])
    more = 2 if stage == "rdpo" else 0  # which also saves when it is interrupted, and at its end
    assert saved == 3 + more, "what was done before the interruption was not done again"
    assert hashes(upstream, *outputs) == expected
    assert not (upstream / f"data/checkpoints/{stage}.safetensors").exists()


def test_a_checkpoint_of_other_work_is_refused_with_what_differs(upstream: Path) -> None:
    from stages.checkpoint import Checkpoint
    from stages.files import CheckpointError
    from stages.params import load_params

    params, inputs = load_params(), [Path("models/distilled/predictor.json")]
    mine = Checkpoint("rdpo", {"seed": 0, "rdpo": params.rdpo}, inputs, {"batch_size"})
    mine.save({"part": {"x": torch.ones(2)}}, {"cursor": 3})
    assert mine.load() is not None
    smaller = params.rdpo.model_copy(update={"batch_size": 3})
    assert Checkpoint("rdpo", {"seed": 0, "rdpo": smaller}, inputs, {"batch_size"}).load() is not None
    other = params.rdpo.model_copy(update={"learning_rate": 1.0, "patience": None})
    differs = "rdpo.learning_rate was 0.0001, is 1.0; rdpo.patience was 5, is None"
    with pytest.raises(CheckpointError, match=f"rdpo.safetensors: .*: {differs}; valid: the same, to go on with it, or no"):
        Checkpoint("rdpo", {"seed": 0, "rdpo": other}, inputs, {"batch_size"}).load()
    with pytest.raises(CheckpointError, match=r"other work: seed was 0, is 1; valid: the same"):
        Checkpoint("rdpo", {"seed": 1, "rdpo": params.rdpo}, inputs, {"batch_size"}).load()
    inputs[0].write_text("{}")
    with pytest.raises(CheckpointError, match=r"models/distilled/predictor.json was [0-9a-f]{12}, is [0-9a-f]{12}; valid"):
        Checkpoint("rdpo", {"seed": 0, "rdpo": params.rdpo}, inputs, {"batch_size"}).load()
    mine.path.write_bytes(mine.path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"data/checkpoints/rdpo.safetensors: damaged \(.*; valid: a whole one, or no"):
        mine.load()
    mine.remove()
    assert mine.load() is None


def heed_signals() -> None:
    """What is started in the background may have been told to ignore Ctrl-C, and hands that down."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def command(stage: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", f"stages.{stage}", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        preexec_fn=heed_signals,
    )


@pytest.fixture
def killed() -> Iterator[list[subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def test_kill_9_and_again_gives_the_same_bytes(finished: Path, workspace: Workspace, killed: list[Any]) -> None:
    folder = workspace(small())
    process = command("backbone")
    killed.append(process)
    checkpoint = folder / "data/checkpoints/backbone.safetensors"
    deadline = time.monotonic() + 60
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert checkpoint.exists()
    assert not (folder / "models/backbone").exists()
    again = command("backbone")
    killed.append(again)
    _, errors = again.communicate(timeout=120)
    assert again.returncode == 0, errors
    assert hashes(folder, "models/backbone") == hashes(finished, "models/backbone")


def test_ctrl_c_says_so_and_leaves_nothing_half_written(workspace: Workspace, killed: list[Any]) -> None:
    folder = workspace(small())
    process = command("backbone")
    killed.append(process)
    deadline = time.monotonic() + 60
    while not (folder / "data/checkpoints/backbone.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stage backbone: interrupted; nothing is half-written" in errors
    assert "Traceback" not in errors
    assert {file.name for file in (folder / "data").rglob("*") if file.is_file()} <= {"backbone.safetensors", "backbone"}


def failure(stage: str, *arguments: str) -> str:
    _, errors = (process := command(stage, *arguments)).communicate(timeout=60)
    assert process.returncode == 1, errors
    assert "Traceback" not in errors
    return errors


@pytest.mark.parametrize(
    ("stage", "arguments", "spoilt", "maker"),
    [
        ("refs", [], "models/backbone/digits.safetensors", "backbone"),
        ("refs", [], "models/metrics.json", "metrics"),
        ("teacher", [], "models/backbone/unet.safetensors", "backbone"),
        ("sample", ["euler"], "models/backbone/backbone.json", "backbone"),
        ("distill", [], "models/backbone/prompts.json", "backbone"),
        ("distill", [], "data/teacher.safetensors", "teacher"),
        ("rdpo", [], "models/distilled/predictor.json", "distill"),
        ("rdpo", [], "data/refs.npz", "refs"),
        ("sample", ["rdpo"], "models/rdpo/predictor.safetensors", "rdpo"),
        ("evaluate", ["euler"], "data/samples/reference.safetensors", "sample@reference"),
        ("report", [], "results/euler.json", "evaluate@euler"),
        ("report", [], "results/rdpo.csv", "rdpo"),
    ],
)
@pytest.mark.parametrize("damage", ["missing", "corrupt", "truncated"])
def test_a_spoilt_input_names_the_stage_that_makes_it(
    stage: str, arguments: list[str], spoilt: str, maker: str, damage: str, upstream: Path
) -> None:
    from stages.files import InputError

    file = upstream / spoilt
    match damage:
        case "missing":
            file.unlink()
        case "corrupt":
            file.write_bytes(b"\x80\x04not what it should be")
        case "truncated":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(InputError, match=rf"stage {maker} (makes it: dvc repro {maker}|writes .* {maker})") as error:
        run(stage, arguments)
    assert str(Path(spoilt).parent) in str(error.value)


def test_the_command_line_reports_in_one_line(upstream: Path) -> None:
    (upstream / "data/refs.npz").unlink()
    assert "stage rdpo: data/refs.npz: missing; stage refs makes it: dvc repro refs" in failure("rdpo")
    for stage in ("sample", "evaluate"):
        assert "samplers: found no 'a/b'; valid: reference, euler, heun, distilled, rdpo" in failure(stage, "a/b")


def test_what_other_parameters_made_is_not_used(upstream: Path, workspace: Workspace) -> None:
    from stages.files import InputError

    params = small()
    params["num_steps"] = 3
    workspace(params)
    with pytest.raises(InputError, match=r"num_steps 4; valid: 3\); make it again: dvc repro .* teacher"):
        run("distill", [])
    workspace(small() | {"guidance_scale": 2.0})
    with pytest.raises(InputError, match=r"guidance_scale: 2.0; valid: 1.0, .*make it again: dvc repro .* distill"):
        run("sample", ["distilled"])


def test_a_full_disk_is_told_and_leaves_nothing(upstream: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    def full(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    before = hashes(upstream, "data", "models", "results")
    monkeypatch.setattr(Path, "write_bytes", full)
    for stage, arguments in (("backbone", []), ("teacher", []), ("distill", []), ("sample", ["euler"])):
        with pytest.raises(OSError, match=r"no space left: '(data|models)/"):
            run(stage, arguments)
    shutil.rmtree(upstream / "data/parts")  # which say of what work they will be
    assert hashes(upstream, "data", "models", "results") == before
