import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from solvers import EPD, Backbone, EPDTable, Predictor, polynomial, save_predictor
from stages.frozen import Frozen
from stages.prompts import Prompts

ROOT = Path(__file__).parents[2]

TEN = Prompts({split: list("0123456789") for split in ("train", "validation", "test")}, "")
"""The digits in turn."""


def frozen_of(backend: Any) -> Frozen:
    """A model that is asked for digits."""
    return Frozen(backend, TEN, Backbone("mixture", None, "none"))


Workspace = Callable[[dict[str, Any]], Path]


def small() -> dict[str, Any]:
    """The repository's parameters, cut down to seconds."""
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        params: dict[str, Any] = OmegaConf.to_container(compose("config"), resolve=True)  # type: ignore[assignment]
    params["backbone"] |= {"channels": 16, "iterations": 60, "batch_size": 32, "checkpoint_every": 20}
    params["backbone"] |= {"classifier_iterations": 60}
    params["teacher"] |= {"extra_nodes": 1, "train": 64, "validation": 32}
    params["distill"] |= {"iterations": 6, "batch_size": 16, "validate_every": 2}
    params["rdpo"] |= {"groups": 4, "tables": 4, "iterations": 6, "validate_every": 2, "warmup": 2, "validation": 100}
    params["rdpo"] |= {"checkpoint_every": 2}
    params["rdpo"] |= {"learning_rate": 1e-4}
    params["samplers"] = {name: params["samplers"][name] for name in ("reference", "euler", "heun", "distilled", "rdpo")}
    params["samplers"]["reference"]["num_steps"] = 5
    params["sample"] |= {"seeds": "0-99", "batch_size": 64}
    params["prompts"]["file"] = str(ROOT / params["prompts"]["file"])
    return params


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """Makes an empty folder with these parameters the working directory."""

    def make(params: dict[str, Any]) -> Path:
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return make


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every stage has run with small parameters."""
    from stages.params import load_params

    folder = tmp_path_factory.mktemp("finished")
    (folder / "params.yaml").write_text(yaml.safe_dump(small(), sort_keys=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        params = load_params()
        for stage, sampler in plan(list(params.samplers)):
            run(stage, sampler)
    return folder


@pytest.fixture
def upstream(finished: Path, workspace: Workspace) -> Path:
    """A copy of it, to spoil."""
    folder = workspace(small())
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """An S3 server on this machine; requests with any credentials may do everything, others what a bucket's policy allows."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A new bucket there, with credentials and the endpoint in the environment, and no configuration of the user's."""
    from moto.backends import get_backend

    name = f"bucket-{len(get_backend('s3')['123456789012']['aws'].buckets)}"
    for variable in [variable for variable in os.environ if variable.startswith("AWS_")]:
        monkeypatch.delenv(variable)
    environment = {"NO_PROXY": "127.0.0.1", "AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
    environment |= {"AWS_ACCESS_KEY_ID": "recognisable-key", "AWS_SECRET_ACCESS_KEY": "recognisable-secret"}
    environment |= {"AWS_SESSION_TOKEN": "recognisable-token", "HOME": str(tmp_path / "home"), "TERM": "dumb"}
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    get_backend("s3")["123456789012"]["aws"].create_bucket(name, "us-east-1")
    return name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A predictor's."""
    return make(tmp_path / "first", 1)


def make(folder: Path, seed: int) -> Path:
    """A predictor in a new folder; other seeds have other numbers."""
    table = EPD(4, 2, scale_dir=0.05, scale_time=0.05).table()
    table = EPDTable(
        table.position.detach(), table.weight.detach(), table.direction_scale.detach(), table.time_scale.detach() + seed / 100
    )
    predictor = Predictor(table, polynomial(4, 0.002, 80.0), True, Backbone("digits", "0" * 64, "none"), 1.0, {"seed": seed})
    folder.mkdir()
    save_predictor(predictor, folder)
    return folder


def hashes(folder: Path, *names: str) -> dict[str, str]:
    files = [file for name in names for file in ([folder / name] if (folder / name).is_file() else (folder / name).rglob("*"))]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()}


def plan(samplers: list[str]) -> list[tuple[str, list[str]]]:
    """The stages in order, with their arguments."""
    first = [(stage, []) for stage in ("backbone", "metrics", "refs", "teacher", "distill", "rdpo")]
    each = [(stage, [sampler]) for stage in ("sample", "evaluate") for sampler in samplers]
    return [*first, *each, ("report", [])]


def run(stage: str, arguments: list[str]) -> None:
    """A stage in this process, with its sections of the params.yaml that lies here."""
    import importlib
    import inspect

    from stages.params import load_params

    function = getattr(importlib.import_module(f"stages.{stage}"), stage)
    params = load_params()
    sections = [p.name for p in inspect.signature(function).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    function(*arguments, **{name: getattr(params, name) for name in sections})
