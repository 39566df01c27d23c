"""Versions and stages of predictors by git, DVC and gto: from a publisher's clone, by S3, to readers that have none of it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from moto.backends import get_backend
from moto.s3.models import get_canned_acl

from solvers import EPD, EPDTable, Predictor, load_predictor, polynomial, save_predictor
from solvers.predictor import FILES, Backbone

ROOT = Path(__file__).parents[2]
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())

Run = Callable[..., str]


@pytest.fixture
def run(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A command in a folder, with the endpoint unset unless a test sets it; the user's own configuration is out of reach."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path / "global"))
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    for variable in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL"):
        monkeypatch.setenv(variable, "someone@example.org")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")

    def run(folder: Path, command: str, endpoint: str = "", expected: int = 0) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "AWS_ENDPOINT_URL"}
        if endpoint:
            environment["AWS_ENDPOINT_URL"] = endpoint
        done = subprocess.run(command.split(), cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == expected, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    return run


def write(folder: Path, seed: int) -> None:
    """A predictor in models/rdpo of a repository."""
    table = EPD(4, 2, scale_dir=0.05, scale_time=0.05).table()
    table = EPDTable(table.position.detach(), table.weight.detach(), table.direction_scale.detach(), table.time_scale.detach())
    predictor = Predictor(table, polynomial(4, 0.002, 80.0), True, Backbone("digits", "0" * 64, "none"), 1.0, {"seed": seed})
    save_predictor(predictor, folder)


def seed(folder: Path) -> object:
    assert {file.name for file in folder.iterdir()} == set(FILES)
    return load_predictor(folder).provenance["seed"]


def test_artifacts_are_what_the_pipeline_makes() -> None:
    assert set(PIPELINE["artifacts"]) == {"predictor", "distilled"}
    outs = [out for stage in PIPELINE["stages"].values() for out in stage.get("outs", [])]
    for artifact in PIPELINE["artifacts"].values():
        assert set(artifact) == {"path", "type", "desc", "labels"}
        assert artifact["path"] in outs
        assert artifact["type"] == "model"


def test_versions_and_stages_go_by_git_and_contents_by_s3(
    run: Run, endpoint: str, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the publisher: the pipeline's own section of artifacts, a stage that makes one of them, and a remote of git's
    origin, mine, theirs, reader = (tmp_path / name for name in ("origin.git", "mine", "theirs", "reader"))
    for folder in (mine, reader):
        folder.mkdir()
    run(tmp_path, f"git init -q --bare -b main {origin}")
    run(mine, "git init -q -b main")
    run(mine, f"git remote add origin {origin}")
    run(mine, "dvc init -q")
    source = tmp_path / "source"
    stages = {"rdpo": {"cmd": f"cp -r {source} models/rdpo", "outs": ["models/rdpo"]}}
    (mine / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages, "artifacts": PIPELINE["artifacts"]}))
    (mine / "models").mkdir()
    run(mine, f"dvc remote add -d storage s3://{bucket}/dvc")
    run(mine, f"dvc remote modify --local storage endpointurl {endpoint}")
    for number, version in ((1, "v1.0.0"), (2, "v1.1.0")):
        source.mkdir(exist_ok=True)
        write(source, number)
        run(mine, "dvc repro -q --force")
        run(mine, "git add -A")
        run(mine, f"git commit -q -m {version}")
        run(mine, "dvc push -q")  # the endpoint from the configuration that is not committed
        run(mine, f"gto register predictor --version {version}")
        run(mine, f"gto assign predictor --version {version} --stage prod")
    run(mine, "git push -q --tags origin main")
    assert endpoint not in (mine / ".dvc" / "config").read_text()
    shutil.rmtree(mine)  # whatever comes from now on, comes from the remotes
    shutil.rmtree(tmp_path / "site")

    # a clone
    run(tmp_path, f"git clone -q {origin} {theirs}")
    run(theirs, "dvc pull -q", endpoint)
    assert seed(theirs / "models" / "rdpo") == 2

    # a reader without one, the repository by its path or its URL, the endpoint from the environment or the command line
    run(reader, f"dvc artifacts get {origin} predictor --rev v1.0.0 --out first", endpoint)
    assert seed(reader / "first") == 1

    # the stage goes back, for which gto wants --force
    run(theirs, "gto assign predictor --version v1.0.0 --stage prod --force")
    run(theirs, "git push -q --tags origin")
    run(reader, f"dvc artifacts get file://{origin} predictor --stage prod --out prod --remote-config endpointurl={endpoint}")
    assert seed(reader / "prod") == 1

    # a public bucket needs no credentials
    for key in get_backend("s3")["123456789012"]["aws"].buckets[bucket].keys.values():
        key.set_acl(get_canned_acl("public-read"))
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(variable)
    command = f"dvc artifacts get {origin} predictor --out public --remote-config allow_anonymous_login=true"
    run(reader, command, endpoint)
    assert seed(reader / "public") == 2  # the latest
