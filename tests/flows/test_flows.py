import re
import subprocess
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from prefect._internal.uuid7 import uuid7
from prefect.automations import AutomationCore, EventTrigger, Posture
from prefect.client.schemas.objects import TERMINAL_STATES, StateType
from prefect.events.actions import ChangeFlowRunState
from prefect.exceptions import ParameterTypeError
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.settings import PREFECT_RESULTS_DEFAULT_SERIALIZER
from prefect.settings.context import get_current_settings
from prefect.utilities.callables import parameter_schema
from prefect.utilities.importtools import import_object
from prefect.utilities.schema_tools import ValidationError, validate

from flows import runs, server, stage, sweep
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
