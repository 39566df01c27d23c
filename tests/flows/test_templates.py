"""The job templates of containers."""

import asyncio
import json
import re
import tomllib
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.utilities.schema_tools import ValidationError, validate
from prefect.utilities.templating import find_placeholders
from prefect.workers.base import BaseJobConfiguration

from .conftest import ROOT


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
