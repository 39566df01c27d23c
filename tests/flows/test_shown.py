"""What people see of a run."""

import base64
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from flows import sample as flow_sample
from flows import shown, stage


class Artifacts(list[tuple[Any, str, str]]):
    """What would be sent to a server."""

    def add(self, content: Any, key: str, description: str) -> None:
        assert re.fullmatch("[a-z0-9-]+", key)
        assert description
        self.append((content, key, description))


@pytest.fixture
def artifacts(monkeypatch: pytest.MonkeyPatch) -> Artifacts:
    found = Artifacts()
    for kind in ("table", "markdown", "image"):
        monkeypatch.setattr(shown, f"create_{kind}_artifact", found.add)
    return found


def picture(artifact: tuple[Any, str, str]) -> Image.Image:
    head, _, data = artifact[0].partition(",")
    assert head == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_times_are_a_table(artifacts: Artifacts) -> None:
    rows = [{"stage": "rdpo", "how": "ran", "seconds": 1.5, "attempts": 2}]
    shown.show_times(rows)
    assert [artifact[:2] for artifact in artifacts] == [(rows, "stages")]


def test_numbers_are_a_table(artifacts: Artifacts) -> None:
    shown.show_numbers({"euler": {"n": 2, "rmse": 0.5}}, "digits-1a2b")
    rows = [{"sampler": "euler", "n": 2, "rmse": 0.5, "experiment": "digits-1a2b"}]
    assert [artifact[:2] for artifact in artifacts] == [(rows, "numbers")]


def test_the_report_has_links(artifacts: Artifacts, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results/report.md").write_text("| FD |\n| --- |\n| 1 |\n")
    assert shown.show_report(tmp_path, {"Page": "`here`", "All": "`dvc`"}) == "| FD |\n| --- |\n| 1 |\n"
    ((text, key, _),) = artifacts
    assert key == "results"
    assert text == "| FD |\n| --- |\n| 1 |\n\n## Where it is\n\n- Page: `here`\n- All: `dvc`\n"


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (10, 10, 1), (13, 10, 2), (33, 10, 2)])
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_a_grid(count: int, columns: int, rows: int, channels: int, artifacts: Artifacts, tmp_path: Path) -> None:
    """Of the first twenty, line by line, black where there are none."""
    folder = tmp_path / "data/scores"
    folder.mkdir(parents=True)
    levels = np.arange(count, dtype=np.uint8) % 20 * 5 + 100
    pictures = np.broadcast_to(levels[:, None, None, None], (count, channels, 6, 4))
    save_file({"pictures": np.ascontiguousarray(pictures), "other": np.zeros(2)}, folder / "dpm_2.safetensors")
    save_file({"pictures": np.ascontiguousarray(pictures)}, folder / "euler.safetensors")
    shown.show_pictures(tmp_path)
    assert [artifact[1] for artifact in artifacts] == ["pictures-dpm-2", "pictures-euler"]
    assert artifacts[0][2] == f"dpm_2: the first {min(count, 20)} images"
    image = picture(artifacts[0])
    times = 960 // (4 * columns)
    assert image.size == (4 * columns * times, 6 * rows * times)
    grid = np.asarray(image.convert("L"), dtype=int)
    for index in range(rows * columns):
        row, column = divmod(index, columns)
        expected = 100 + index * 5 if index < count else 0
        assert abs(grid[int((row + 0.5) * 6 * times), int((column + 0.5) * 4 * times)] - expected) <= 2


@pytest.mark.parametrize(("size", "shown_as"), [((8, 4), (960, 480)), ((700, 10), (700, 10)), ((1920, 1001), (960, 500))])
def test_images_are_as_wide_as_the_page(size: tuple[int, int], shown_as: tuple[int, int], artifacts: Artifacts) -> None:
    shown.show_image("rdpo@v1.0.0", Image.new("RGB", size, "red"), "red")
    assert artifacts[0][1:] == ("pictures-rdpo-v1-0-0", "red")
    assert picture(artifacts[0]).size == shown_as


def test_results_are_the_numbers_of_each_sampler_that_was_made(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    for name in ("euler", "of_another_run"):
        found = {"n": 2, "rmse": 0.5, "list": [1], "name": "x", "none": None}
        (tmp_path / f"results/{name}.json").write_text(json.dumps(found))
    made = ["results/euler.json", "results/report.md", "models/metrics.json"]
    assert shown.read_results(tmp_path, made) == {"euler": {"n": 2, "rmse": 0.5}}
    assert shown.read_results(tmp_path, []) == {}


def test_samples_are_shown_with_cost_and_scores(artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what stages.generate writes; one image has no standard error."""
    for kind in ("table", "markdown"):
        monkeypatch.setattr(flow_sample, f"create_{kind}_artifact", artifacts.add)
    Image.new("L", (8, 4)).save(tmp_path / "grid.png")
    found = {
        "n": 1,
        "serial_evaluations": 5,
        "total_evaluations": 8.0,
        "metrics": [{"name": "reward", "mean": 0.12345, "se": None}, {"name": "judge", "mean": 2.0, "se": 0.0}],
        "images": [{"file": "0000.png", "prompt": "a cat", "sample": 0, "scores": {"reward": 0.1, "judge": 2.0}}],
    }
    flow_sample.show(tmp_path, "rdpo@prod", found)
    assert [artifact[1] for artifact in artifacts] == ["pictures-rdpo-prod", "images", "samples"]
    assert artifacts[1][0] == [{"file": "0000.png", "prompt": "a cat", "sample": 0, "reward": 0.1, "judge": 2.0}]
    assert artifacts[2][0].startswith("1 images by rdpo@prod, 5 serial and 8 total evaluations each.\n\n| metric |")
    assert "| reward | 0.1235 |  |\n| judge | 2 | 0 |\n" in artifacts[2][0]


def test_a_progress_bar_is_an_artifact_and_the_rest_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    logged, progress, clock = list[str](), list[tuple[str, float]](), [0.0]
    monkeypatch.setattr(stage, "get_run_logger", lambda: SimpleNamespace(info=logged.append))
    monkeypatch.setattr(stage, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def create(percent: float, key: str, description: str) -> str:
        assert re.fullmatch("[a-z0-9-]+", key)
        progress.append((description, percent))
        return "the artifact"

    def update(artifact: str, percent: float, description: str) -> None:
        assert artifact == "the artifact"
        progress.append((description, percent))

    monkeypatch.setattr(stage, "create_progress_artifact", create)
    monkeypatch.setattr(stage, "update_progress_artifact", update)
    lines = stage.Lines("sample@dpm_2")
    for seconds, line in [
        (0.0, "begins"),
        (0.1, " rdpo:   1%|   | 1/100 "),
        (1.0, "rdpo:   2%|   | 2/100"),
        (1.5, "half 50% done"),
        (2.5, "rdpo:   3%|   | 3/100"),
        (2.6, "rdpo: 100%|###| 100/100"),
    ]:
        clock[0] = seconds
        lines(line)
    assert logged == ["begins", "half 50% done"]
    assert progress == [("rdpo:   1%|   | 1/100", 1.0), ("rdpo:   3%|   | 3/100", 3.0), ("rdpo: 100%|###| 100/100", 100.0)]
