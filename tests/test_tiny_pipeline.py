"""The whole pipeline through DVC, on a tiny text-to-image model, in a clone of the repository."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def run(folder: Path, *command: str) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(folder)}
    for role in ("AUTHOR", "COMMITTER"):
        environment |= {f"GIT_{role}_NAME": "someone", f"GIT_{role}_EMAIL": "someone@example.org"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_experiment_on_a_tiny_backbone(tmp_path: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for file in filter(lambda file: (ROOT / file).exists(), listed.stdout.splitlines()):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        run(tmp_path, "git", *command)
    run(tmp_path, sys.executable, "examples/tiny.py")
    for model in (tmp_path / "data/tiny").iterdir():
        assert sum(file.stat().st_size for file in model.rglob("*")) < 1e7
    run(tmp_path, "dvc", "exp", "run", "-S", "backbone=tiny_sd3", "evaluate@distilled")  # the rest is tested without DVC
    params = yaml.safe_load((tmp_path / "params.yaml").read_text())
    assert params["backbone"]["name"] == "sd3", "it composed conf/"
    results = json.loads((tmp_path / "results/distilled.json").read_text())
    assert (results["n"], results["serial_evaluations"], results["total_evaluations"]) == (50, 6, 18)
    assert not yaml.safe_load(run(tmp_path, "dvc", "status", "--json", "evaluate@distilled"))
    # outputs hold no weights: those stay where the machine keeps them
    outputs = sum(file.stat().st_size for file in (tmp_path / "models/backbone").rglob("*"))
    assert outputs < 1e5
