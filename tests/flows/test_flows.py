import asyncio
import base64
import io
import json
import logging
import re
import subprocess
import tomllib
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from PIL import Image
from prefect._internal.uuid7 import uuid7
from prefect.automations import AutomationCore, EventTrigger, Posture
from prefect.client.schemas.objects import TERMINAL_STATES, StateType
from prefect.client.schemas.sorting import LogSort
from prefect.events.actions import ChangeFlowRunState
from prefect.exceptions import ParameterTypeError
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.settings import PREFECT_API_URL, PREFECT_RESULTS_DEFAULT_SERIALIZER, PREFECT_UI_URL, temporary_settings
from prefect.settings.context import get_current_settings
from prefect.states import Completed, Failed, Pending, Running, Scheduled, State
from prefect.utilities.callables import parameter_schema
from prefect.utilities.importtools import import_object
from prefect.utilities.schema_tools import ValidationError, validate
from prefect.utilities.templating import find_placeholders
from prefect.workers.base import BaseJobConfiguration
from safetensors.numpy import save_file

from flows import run, runs, server, shown, stage, sweep
from flows import sample as flow_sample
from flows.pipeline import StageError
from flows.rdpo import known_remote, rdpo
from flows.sample import sample
from stages.params import ParamsError, load_params

from .conftest import ROOT

FLOWS: dict[str, Flow[..., Any]] = {"rdpo": rdpo, "sample": sample, "sweep": sweep.sweep}
PREFECT: dict[str, Any] = yaml.safe_load((ROOT / "prefect.yaml").read_text())
DEPLOYMENTS: dict[str, dict[str, Any]] = {each["name"]: each for each in PREFECT["deployments"]}
BACKBONES = sorted(file.stem for file in (ROOT / "conf/backbone").glob("*.yaml"))
NEEDED: dict[str, dict[str, Any]] = {  # parameters without a default
    "rdpo": {},
    "sample": {"predictor": "rdpo@prod", "registry": "s3://bucket/predictors", "prompts": ["a cat"]},
    "sweep": {"grid": ["num_steps=3,4"]},
}

# ---------------------------------------------------------------- deployments


def flow_of(deployment: str) -> Flow[..., Any]:
    return load_flow_from_entrypoint(DEPLOYMENTS[deployment]["entrypoint"])


def test_deployments_are_named_as_they_are_run() -> None:
    assert {f"{flow_of(name).name}/{name}" for name in DEPLOYMENTS} == {
        "rdpo/rdpo-digits",
        "rdpo/rdpo-sd15",
        "rdpo/rdpo-sd3",
        "rdpo/rdpo-sd3-1024",
        "rdpo/rdpo-flux",
        "sample/sample",
        "sweep/sweep",
    }


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_deployment_waits_for_a_worker_in_turn(name: str) -> None:
    deployment, flow = DEPLOYMENTS[name], flow_of(name)
    given = {**NEEDED[flow.name], **deployment.get("parameters", {})}
    assert flow.validate_parameters(given).items() >= given.items()
    validate(given, parameter_schema(flow).model_dump(), raise_on_error=True, preprocess=True)
    assert deployment["schedules"] == []
    assert deployment["work_pool"] == {"name": server.POOL}
    assert deployment["concurrency_limit"]["limit"] >= 1
    assert deployment["concurrency_limit"]["collision_strategy"] == "ENQUEUE"
    assert all(isinstance(tag, str) for tag in deployment["tags"])
    assert deployment["tags"]


@pytest.mark.parametrize(
    ("name", "family", "height"),
    [
        ("rdpo-digits", "digits", None),
        ("rdpo-sd15", "sd15", 512),
        ("rdpo-sd3", "sd3", 512),
        ("rdpo-sd3-1024", "sd3", 1024),
        ("rdpo-flux", "flux", 1024),
    ],
)
def test_a_deployment_has_its_backbone(name: str, family: str, height: int | None) -> None:
    file = ROOT / "conf/backbone" / f"{DEPLOYMENTS[name]['parameters']['backbone']}.yaml"
    backbone = yaml.safe_load(file.read_text())["backbone"]
    assert (backbone["name"], backbone.get("height")) == (family, height)


def test_flows_run_in_the_clone_that_they_are_installed_from() -> None:
    ((step, given),) = PREFECT["pull"][0].items()
    assert import_object(step)(**given) == {"directory": str(ROOT)}
    assert (ROOT / "prefect.yaml").exists()


# ---------------------------------------------------------------- parameters


def refused(flow: Flow[..., Any], **given: Any) -> str:
    with pytest.raises(ParameterTypeError) as error:
        flow.validate_parameters({**NEEDED[flow.name], **given})
    return str(error.value)


@pytest.mark.parametrize("name", FLOWS)
def test_the_backbones_are_those_of_conf(name: str) -> None:
    """In the pages' form, on the server, and in the flow."""
    schema = parameter_schema(FLOWS[name]).model_dump()
    assert schema["properties"]["backbone"]["enum"] == BACKBONES
    with pytest.raises(ValidationError):
        validate({**NEEDED[name], "backbone": "sd4"}, schema, raise_on_error=True, preprocess=True)
    assert f"found 'sd4'; valid: {', '.join(BACKBONES)}" in refused(FLOWS[name], backbone="sd4")


@pytest.mark.parametrize(
    "override",
    [
        "num_steps=4",
        "rdpo=published",
        "prompts.negative=",
        "prompts.negative=a\nb = c",
        "+rdpo.new=[1,2]",
        "++rdpo.new=1",
        "~samplers.heun",
        "~rdpo=shared",
        "family@rdpo=epd",
        "family=published/epd",
        "params.yaml:num_steps=4",
    ],
)
def test_overrides_are_those_of_hydra(override: str) -> None:
    assert rdpo.validate_parameters({"overrides": [override]})["overrides"] == [override]


@pytest.mark.parametrize(
    "override",
    ["", "num_steps", "=4", "-S", "--force", "--config-dir=/tmp", "-S=4", "num steps=4", "~", "+++a=1"],
)
def test_other_overrides_are_refused(override: str) -> None:
    said = refused(rdpo, overrides=["num_steps=4", override])
    assert f"found {override!r}; valid: KEY=VALUE, +KEY=VALUE or ~KEY" in said
    assert "overrides.1" in said


@pytest.mark.parametrize(
    ("flow", "given", "said"),
    [
        (rdpo, {"targets": "report"}, "targets"),
        (rdpo, {"push": "perhaps"}, "push"),
        (sample, {"prompts": []}, "prompts"),
        (sample, {"images": 0}, "images"),
        (sample, {"seed": -1}, "seed"),
        (sweep.sweep, {"grid": ["num_steps"]}, "grid.0"),
    ],
)
def test_parameters_that_are_wrong_are_named(flow: Flow[..., Any], given: dict[str, Any], said: str) -> None:
    assert said in refused(flow, **given)


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ({"backbone": "sd3_512"}, "sd3_512"),
        (
            {"backbone": "sd3_512", "overrides": ["num_steps=4", "rdpo=published"], "targets": []},
            "sd3_512 num_steps=4 rdpo=published",
        ),
        ({"backbone": "digits", "targets": ["sample", "refs"]}, "digits sample refs"),
        ({"backbone": "digits", "predictor": "rdpo@prod", "prompts": ["a"]}, "digits rdpo@prod"),
        ({"backbone": "digits", "grid": ["num_steps=3,4"]}, "digits num_steps=3,4"),
        ({"backbone": "digits", "overrides": ["a=" + "b" * 200]}, "digits a=" + "b" * 88 + "..."),
    ],
)
def test_a_run_is_named_after_what_is_run(parameters: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "flow_run", SimpleNamespace(parameters=parameters))
    assert runs.run_name() == name
    assert len(name) <= 100


@pytest.mark.parametrize(
    ("text", "slug"),
    [("SD3 num_steps=4", "sd3-num-steps-4"), ("~a..b--c ", "a-b-c"), ("sample@euler", "sample-euler"), ("ä+", "")],
)
def test_slug(text: str, slug: str) -> None:
    assert runs.slug(text) == slug


def test_experiments_of_runs_at_once_have_names_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where what differs is cut off; and git takes them."""
    names = set[str]()
    for value in range(20):
        overrides = ["rdpo.learning_rate=" + "0" * 40 + str(value)]
        run = SimpleNamespace(parameters={"backbone": "sd3_512", "overrides": overrides}, id=str(uuid7()))
        monkeypatch.setattr(runs, "flow_run", run)
        names.add(runs.experiment_name())
    assert len(names) == 20
    for name in names:
        assert re.fullmatch(r"sd3-512-rdpo-learning-rate[a-z0-9-]{1,50}", name)
    subprocess.run(["git", "check-ref-format", f"refs/exps/ab/cd/{names.pop()}"], check=True)


# ---------------------------------------------------------------- sweeps


@pytest.mark.parametrize(
    ("grid", "each"),
    [
        (["num_steps=3,4", "distill.points=1,2"], [[f"num_steps={n}", f"distill.points={p}"] for n in (3, 4) for p in (1, 2)]),
        (["num_steps=choice(3,4)"], [["num_steps=3"], ["num_steps=4"]]),
        (["num_steps=range(3,6)"], [["num_steps=3"], ["num_steps=4"], ["num_steps=5"]]),
        (["rdpo=published,shared", "a=[1,2]"], [["rdpo=published", "a=[1,2]"], ["rdpo=shared", "a=[1,2]"]]),
        (["~samplers.heun", "+a=1"], [["~samplers.heun=null", "+a=1"]]),
    ],
)
def test_a_grid_is_every_combination(grid: list[str], each: list[list[str]]) -> None:
    assert sweep.expand(grid) == each


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        (["a=range(0,101)"], r"^grid: found 101 combinations; valid: 1 to 100$"),
        (["a=[1"], r"^grid: .*; valid: as num_steps=3,4$"),
        (["samplers=glob(*)"], r"^grid: .*; valid: as num_steps=3,4$"),
        (["a=interval(0,1)"], r"^grid: .*; valid: as num_steps=3,4$"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(grid: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=re.compile(said, re.DOTALL)):
        sweep.expand(grid)


def test_a_sweep_compares_what_stages_report() -> None:
    """Of the committed results."""
    results = shown.read_results(ROOT, [f"results/{name}.json" for name in sweep.LEARNED])
    rows = [
        sweep.row([f"num_steps={n}", "a=b"], {"sampler": name, **results[name], "experiment": f"e-{n}"})
        for n in (3, 4)
        for name in sweep.LEARNED
    ]
    assert rows[1] == {
        "overrides": "num_steps=3 a=b",
        "sampler": "rdpo",
        "n": results["rdpo"]["n"],
        "serial": results["rdpo"]["serial_evaluations"],
        "total": results["rdpo"]["total_evaluations"],
        "FD": f"{results['rdpo']['frechet_distance']:.4g} ± {1.96 * results['rdpo']['frechet_distance_se']:.2g}",
        "FD to reference": rows[1]["FD to reference"],
        "RMSE": rows[1]["RMSE"],
        "reward": rows[1]["reward"],
        "experiment": "e-3",
    }
    lines = sweep.table(rows).splitlines()
    assert lines[0] == "| overrides | sampler | n | serial | total | FD | FD to reference | RMSE | reward | experiment |"
    assert lines[1] == "| " + " | ".join(["---"] * 10) + " |"
    assert lines[3].startswith("| num_steps=3 a=b | rdpo | 4096 | 5 | 8.0 | ")
    assert len(lines[2:6]) == len([line for line in lines if line.startswith("| num_steps")]) == 4


def test_a_comparison_has_each_number_below_its_name() -> None:
    """Where experiments differ in what they measure."""
    rows = [{"overrides": "a", "FD": "1", "experiment": "x"}, {"overrides": "b", "reward": "2", "experiment": "y"}]
    header, _, *lines = sweep.table(rows).splitlines()[:4]
    names = [cell.strip() for cell in header.strip("|").split("|")]
    found = [dict(zip(names, (cell.strip() for cell in line.strip("|").split("|")), strict=True)) for line in lines]
    assert [{name: each[name] for name in row} for row, each in zip(rows, found, strict=True)] == rows


class Elsewhere:
    """Of a server, what a sweep asks of it: each run goes through the states that its parameters say; the last one remains."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self.set = list[list[State[Any]]](), list[tuple[int, str | None]]()
        monkeypatch.setattr(sweep, "get_client", lambda sync_client: nullcontext(self))
        monkeypatch.setattr(sweep, "run_deployment", self.run)
        monkeypatch.setattr(sweep, "find_deployment", lambda client, name: None)
        monkeypatch.setattr(sweep, "EVERY", 0.001)
        monkeypatch.setattr(sweep, "get_run_logger", lambda: logging.getLogger("sweep"))

    def run(self, deployment: str, parameters: dict[str, list[State[Any]]], timeout: float) -> Any:
        assert (deployment, timeout) == ("rdpo/rdpo-sd3", 0)
        self.left.append(list(parameters["states"]))
        return SimpleNamespace(id=len(self.left) - 1)

    def read_flow_run(self, run: int) -> Any:
        return SimpleNamespace(state=self.left[run].pop(0) if len(self.left[run]) > 1 else self.left[run][0])

    def set_flow_run_state(self, run: int, state: State[Any]) -> None:
        self.set.append((run, state.name))


def test_experiments_elsewhere_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    there = Elsewhere(monkeypatch)
    ends = [[Pending(), Running(), Completed()], [Running(), Failed()]]
    states = sweep.elsewhere("rdpo/rdpo-sd3", [{"states": each} for each in ends])
    assert [state.name for state in states] == ["Completed", "Failed"]
    assert there.set == []


@pytest.mark.parametrize(
    ("error", "ended"), [(KeyboardInterrupt, [(1, "Cancelling"), (2, "Cancelling")]), (ConnectionError, [])]
)
def test_experiments_elsewhere_end_with_their_sweep_if_it_is_cancelled(
    error: type[BaseException], ended: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Elsewhere(monkeypatch)

    def sleep(seconds: float) -> None:
        raise error

    monkeypatch.setattr(sweep.time, "sleep", sleep)
    with pytest.raises(error):
        sweep.elsewhere("rdpo/rdpo-sd3", [{"states": [each]} for each in (Completed(), Running(), Scheduled())])
    assert there.set == ended


@pytest.mark.parametrize(("patience", "told"), [(0.0, 2), (60.0, 0)])
def test_an_experiment_that_no_worker_takes_is_told_once(
    patience: float, told: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sweep, "PATIENCE", patience)
    Elsewhere(monkeypatch)
    sweep.elsewhere("rdpo/rdpo-sd3", [{"states": [*[Scheduled()] * 5, Completed()]}] * 2)
    assert [record.args for record in caplog.records if "no worker takes it" in record.message] == [(0,), (1,)][:told]


# ---------------------------------------------------------------- the command line


def test_every_line_of_a_run_is_told_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Also one that reaches the server after later ones have, and more than one answer of the server's holds."""
    lines = [SimpleNamespace(id=uuid7(), message=str(number), task_run_id=None) for number in range(400)]
    looks = [lines[:10] + lines[11:30], lines[:30], lines[:199] + lines[200:220], lines]

    class Client:
        looked = 0

        def read_flow_run(self, run: int) -> Any:
            return SimpleNamespace(id=run, state=Running() if self.looked < len(looks) else Completed())

        def read_logs(self, wanted: object, offset: int, sort: LogSort) -> list[Any]:
            assert sort == LogSort.TIMESTAMP_ASC
            there = looks[min(self.looked, len(looks) - 1)]
            self.looked += 1
            return there[offset : offset + 200]

        def read_task_runs(self, flow_run_filter: object) -> list[Any]:
            return []

    client: Any = Client()
    monkeypatch.setattr(run, "EVERY", 0.0)
    of: Any = SimpleNamespace(id=uuid7())
    assert run._follow(client, of, patience=1).id == of.id
    told = [int(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(told) == list(range(400))


def test_a_server_that_goes_away_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def follow(*_: object) -> None:
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(run, "get_client", lambda sync_client: nullcontext())
    monkeypatch.setattr(httpx, "get", lambda url, timeout: httpx.Response(200, request=httpx.Request("GET", url)))
    monkeypatch.setattr(run, "_start", lambda *_: SimpleNamespace(id="1a2b", name="digits"))
    monkeypatch.setattr(run, "_follow", follow)
    url: Any = {PREFECT_API_URL: "http://127.0.0.1:1/api", PREFECT_UI_URL: "http://127.0.0.1:1"}
    said = r"^server: http://127.0.0.1:1/api does not answer any more \(refused\); .*: http://127.0.0.1:1/runs/flow-run/1a2b$"
    with temporary_settings(url), pytest.raises(run.RunError, match=said):
        run.run("rdpo/rdpo-digits", {}, patience=1)


# ---------------------------------------------------------------- what is shown


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


# ---------------------------------------------------------------- rules


@pytest.mark.parametrize("name", FLOWS)
def test_results_are_json_and_kept(name: str) -> None:
    assert FLOWS[name].persist_result is True
    assert FLOWS[name].result_serializer == "json"


def test_nothing_is_pickled_and_runs_give_signs_of_life() -> None:
    """By pyproject.toml, which Prefect reads where it runs."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["prefect"]
    assert settings["results"]["default_serializer"] == PREFECT_RESULTS_DEFAULT_SERIALIZER.value() == "json"
    assert settings["flows"]["heartbeat_frequency"] == get_current_settings().flows.heartbeat_frequency


def test_the_server_watches_for_runs_that_are_silent() -> None:
    """For longer than two signs of life are apart; those that have ended are no longer expected to give any."""
    found = AutomationCore.model_validate_json(server._watch().model_dump_json())
    assert isinstance(found.trigger, EventTrigger)
    assert (found.trigger.posture, found.trigger.threshold) == (Posture.Proactive, 1)
    assert found.trigger.within.total_seconds() >= 2 * (get_current_settings().flows.heartbeat_frequency or 0)
    assert found.trigger.after == {"prefect.flow-run.heartbeat"}
    ended = {f"prefect.flow-run.{state.name.title()}" for state in StateType if state in TERMINAL_STATES}
    assert found.trigger.expect == found.trigger.after | ended
    (action,) = found.actions
    assert isinstance(action, ChangeFlowRunState)
    assert action.state == StateType.CRASHED
    assert "Run the same again" in (action.message or "")


@pytest.mark.parametrize(
    ("visible", "devices"),
    [(None, ["all"]), ("0", ["0"]), ("2, 3", ["2", "3"]), ("", ["none"]), ("GPU-8a2b", ["GPU-8a2b"])],
)
def test_a_worker_has_the_devices_that_it_was_started_with(
    visible: str | None, devices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert stage.devices() == devices


@pytest.mark.parametrize(
    ("error", "again"), [(StageError("a", may_pass=True), True), (StageError("a"), False), (ValueError("a"), False)]
)
def test_only_what_may_pass_is_tried_again(error: Exception, again: bool) -> None:
    state: Any = SimpleNamespace(result=lambda raise_on_failure: error)
    task: Any = None
    assert stage.may_pass(task, task, state) is again
    assert stage.stage.retry_condition_fn is stage.push.retry_condition_fn is stage.may_pass
    assert stage.stage.persist_result is False


@pytest.fixture
def remotes(tmp_path: Path) -> Path:
    """A workspace with two remotes, none of them the default."""
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("['remote \"a\"']\n    url = /a\n['remote \"b\"']\n    url = /b\n")
    return tmp_path


def test_a_remote_that_is_there_is_used(remotes: Path) -> None:
    assert known_remote(remotes, None, push=False) is None
    assert known_remote(remotes, "b", push=True) == "b"
    (remotes / ".dvc/config.local").write_text("[core]\n    remote = a\n")
    assert known_remote(remotes, None, push=True) == "a"


@pytest.mark.parametrize(
    ("remote", "push", "said"),
    [
        ("c", False, "remote: found 'c'; valid: a, b"),
        (None, True, "push: found no default remote to push to; valid: one of a, b"),
    ],
)
def test_a_remote_that_is_not_there_is_refused(remote: str | None, push: bool, said: str, remotes: Path) -> None:
    with pytest.raises(ValueError, match=f"^{said}$"):
        known_remote(remotes, remote, push)
    (remotes / ".dvc/config").write_text("")
    with pytest.raises(ValueError, match="dvc remote add"):
        known_remote(remotes, remote, push)


# ---------------------------------------------------------------- conf


STAGES = set(yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"])


def test_conf_knows_every_stage() -> None:
    settings = yaml.safe_load((ROOT / "conf/config.yaml").read_text())["flows"]
    assert set(settings["hours"]) == STAGES
    assert set(settings["gpu_stages"]) < STAGES


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"gpu_stages": ["rdpo", "trainer"]},
            "flows.gpu_stages: found .*'trainer'.*; valid: 'backbone', 'metrics', .* or 'report'",
        ),
        ({"hours": {"trainer": 1}}, "flows.hours.trainer: .*; valid: 'backbone', .* or 'report'"),
        ({"hours": {"rdpo": 0}}, "flows.hours.rdpo: found 0; valid: greater than 0"),
        ({"gpus": 1}, "flows: unknown gpus; valid: gpu_stages, hours"),
    ],
)
def test_other_stages_are_refused(changes: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params | {"flows": params["flows"] | changes}))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ParamsError, match=said):
        load_params()


# ---------------------------------------------------------------- containers


def template(kind: str) -> dict[str, Any]:
    return json.loads((ROOT / f"flows/{kind}.json").read_text())


class Configuration(BaseJobConfiguration, extra="allow"):
    """Whatever a worker's own class makes of a template."""


def resolved(kind: str, **values: Any) -> dict[str, Any]:
    """What a worker starts a container with."""
    found = template(kind)
    validate({**values}, found["variables"], raise_on_error=True, preprocess=True)
    client: Any = SimpleNamespace()
    return asyncio.run(Configuration.from_template_and_values(found, values, client=client)).model_dump()


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
def test_templates_use_every_variable_and_no_other(kind: str) -> None:
    found = template(kind)
    names = {placeholder.name for placeholder in find_placeholders(found["job_configuration"])}
    assert names == set(found["variables"]["properties"])
    for name, variable in found["variables"]["properties"].items():
        if "default" in variable:
            validate({name: variable["default"]}, found["variables"], raise_on_error=True, ignore_required=True)
    assert re.search(r"\w\.(io|com|org)/", json.dumps(found["variables"])) is None


@pytest.mark.parametrize("kind", ["docker", "kubernetes"])
@pytest.mark.parametrize(
    ("values", "said"), [({}, "'image' is a required property"), ({"image": "parasol", "gpus": -2}, "-2 is less than")]
)
def test_a_run_in_a_container_needs_an_image(kind: str, values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        resolved(kind, **values)


@pytest.mark.parametrize("gpus", [1, 4, -1])
def test_a_docker_container_has_gpus_and_what_runs_share(gpus: int) -> None:
    found = resolved("docker", image="parasol:1", gpus=gpus, cache="/data/cache", env={"CUDA_VISIBLE_DEVICES": "0,1"})
    assert found["image"] == "parasol:1"
    assert found["container_create_kwargs"] == {
        "device_requests": [{"driver": "nvidia", "count": gpus, "capabilities": [["gpu"]]}],
        "shm_size": "8g",
        "init": True,
        "uts_mode": "host",
    }
    assert found["volumes"] == ["/data/cache:/parasol/.dvc/cache", "parasol-workspaces:/workspaces", "parasol-hub:/hub"]
    assert found["env"] == {
        "PARASOL_WORKSPACES": "/workspaces",
        "HF_HOME": "/hub",
        "PREFECT_RESULTS_LOCAL_STORAGE_PATH": "/workspaces/.results",
        "CUDA_VISIBLE_DEVICES": "0,1",
    }


def test_a_docker_container_has_one_gpu_by_default() -> None:
    assert resolved("docker", image="parasol")["container_create_kwargs"]["device_requests"][0]["count"] == 1


def test_a_kubernetes_job_has_gpus_and_what_runs_share() -> None:
    values = {"gpus": 8, "claim": "mine", "clone": "/srv/parasol", "shm_size": "16Gi", "memory_limit": "64Gi"}
    found = resolved("kubernetes", image="parasol:1", **values)
    spec = found["job_manifest"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert container["image"] == "parasol:1"
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 8, "memory": "64Gi"}, "requests": {}}
    assert container["env"]["PARASOL_WORKSPACES"] == "/workspaces"
    assert {mount["mountPath"]: (mount["name"], mount.get("subPath")) for mount in container["volumeMounts"]} == {
        "/srv/parasol/.dvc/cache": ("data", "cache"),
        container["env"]["PARASOL_WORKSPACES"]: ("data", "workspaces"),
        container["env"]["HF_HOME"]: ("data", "hub"),
        "/dev/shm": ("memory", None),
    }
    assert spec["volumes"] == [
        {"name": "data", "persistentVolumeClaim": {"claimName": "mine"}},
        {"name": "memory", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}},
    ]
    assert spec["terminationGracePeriodSeconds"] > 60  # process.GRACE, and some


def test_a_kubernetes_job_is_one_pod_that_is_not_tried_again() -> None:
    spec = resolved("kubernetes", image="parasol")["job_manifest"]["spec"]
    assert {name: value for name, value in spec.items() if name != "template"} == {
        "backoffLimit": 0,  # a stage's own retries are enough
        "parallelism": 1,
        "completions": 1,
    }


def test_templates_are_installed_with_the_flows() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    installed = {file.name for pattern in packages["flows"] for file in (ROOT / "flows").glob(pattern)}
    assert installed == {"docker.json", "kubernetes.json"}
