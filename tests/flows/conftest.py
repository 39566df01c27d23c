import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PIPELINE = """\
stages:
  backbone:
    cmd: python -m stages.work backbone
    params: [backbone]
    deps: [stages/work.py]
    outs: [models/backbone]
  refs:
    cmd: python -m stages.work refs models/backbone
    params: [refs]
    deps: [models/backbone]
    outs: [data/refs]
  rdpo:
    cmd: python -m stages.work rdpo models/backbone data/refs
    params: [rdpo]
    deps: [models/backbone, data/refs]
    outs: [models/rdpo]
    plots:
      - results/rdpo.csv: {cache: false}
  sample:
    foreach: ${samplers}
    do:
      cmd: python -m stages.work sample@${key} models/rdpo
      params: [sample]
      deps: [models/rdpo]
      outs: ["data/samples/${key}"]
  report:
    cmd: python -m stages.work report data/samples/euler data/samples/rdpo
    params: [report]
    deps: [data/samples]
    outs:
      - results/report.md: {cache: false}
      - results/distilled.json: {cache: false}
      - results/rdpo.json: {cache: false}
"""

CONFIG = """\
defaults:
  - _self_
  - backbone: digits

rdpo: {steps: 0, pause: 0.0, fail: null, batch_size: 8}
sample: {pause: 0.0}
report: {base: rdpo}
samplers: {euler: {model: models/rdpo}, rdpo: {model: models/rdpo}}
compute: {device: auto}
flows:
  gpu_stages: [backbone, rdpo, sample]
  hours: {backbone: 1, refs: 1, rdpo: 1, sample: 1, report: 1}
"""

BACKBONE = """\
# @package _global_

backbone: {name: NAME, pause: 0.0}
refs: {pause: 0.0}
"""

WORK = '''\
"""A stage that hashes its inputs, in so many steps with a checkpoint after each, as the real ones do in hours."""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import yaml

name, *inputs = sys.argv[1:]
settings = yaml.safe_load(Path("params.yaml").read_text())[name.split("@")[0]]
out = {"report": "results/report.md", "refs": "data/refs"}.get(name, f"models/{name}")
out = Path(f"data/samples/{name.split('@')[1]}" if "@" in name else out)
checkpoint = Path("data/checkpoints") / name.replace("@", "-")


def stop(*_):
    print(f"stage {name}: terminated; nothing is half-written, the same command goes on", file=sys.stderr)
    sys.exit(143)


signal.signal(signal.SIGTERM, stop)
cap, processes = os.environ.get("PARASOL_BATCH_SIZE", "no"), os.environ.get("PARASOL_PROCESSES", "one")
print(f"{name}: {cap} cap, {processes} process", flush=True)
time.sleep(settings.get("pause", 0.0))
match settings.get("fail"):
    case "wrong":
        print(f"stage {name}: learning_rate: found -1; valid: above 0", file=sys.stderr)
        sys.exit(1)
    case "network":  # twice
        tried = Path("data/tried")
        tried.parent.mkdir(exist_ok=True)
        before = tried.read_text() if tried.exists() else ""
        tried.write_text(before + "x")
        if len(before) < 2:
            print(f"stage {name}: the hub cannot be reached", file=sys.stderr)
            sys.exit(75)
    case "memory" if int(os.environ.get("PARASOL_BATCH_SIZE", "8")) > 2:
        found = os.environ.get("PARASOL_BATCH_SIZE", "8")
        print(f"stage {name}: out of memory (CUDA); rdpo.batch_size is {found}: lower it", file=sys.stderr)
        sys.exit(71)
state = b"".join(Path(each).read_bytes() for each in inputs)
done = 0
if checkpoint.exists():
    done = int(checkpoint.read_text().split()[0])
    state = bytes.fromhex(checkpoint.read_text().split()[1])
    print(f"{name}: goes on from step {done}", flush=True)
for step in range(done, settings.get("steps", 0)):
    time.sleep(0.1)
    state = hashlib.sha256(state + bytes([step % 256])).digest()
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    new = checkpoint.with_suffix(".new")
    new.write_text(f"{step + 1} {state.hex()}")
    new.replace(checkpoint)
    print(f"\\r{name}: {100 * (step + 1) // settings['steps']}%|#| {step + 1}", end="", file=sys.stderr, flush=True)
out.parent.mkdir(parents=True, exist_ok=True)
made = hashlib.sha256(state + str(sorted(settings.items())).encode()).hexdigest()
out.write_text(f"# {name}\\n\\n| n |\\n| --- |\\n| {made} |\\n")
if name == "report":
    out.with_suffix(".html").write_text("<p>report</p>")
    numbers = {"n": 8, "serial_evaluations": 5, "total_evaluations": 8}
    numbers |= {"frechet_distance": state[0], "frechet_distance_se": 0.5}
    for sampler in ("distilled", "rdpo"):
        out.with_name(f"{sampler}.json").write_text(json.dumps(numbers))
if name == "rdpo":
    Path("results/rdpo.csv").write_text(f"step,reward\\n{settings['steps']},{state[0]}\\n")
checkpoint.unlink(missing_ok=True)
'''

PARAMS = '''\
"""Refuses negative pauses."""

import sys
from pathlib import Path

import yaml

found = yaml.safe_load(Path("params.yaml").read_text())["rdpo"]["pause"]
if found < 0:
    print(f"params.yaml: rdpo.pause: found {found}; valid: 0 or more", file=sys.stderr)
    sys.exit(1)
'''

DEPLOYMENTS = """\
name: parasol
pull:
  - prefect.deployments.steps.set_working_directory: {directory: "{{ $REPOSITORY }}"}
deployments:
  - {name: rdpo-digits, entrypoint: flows.rdpo.rdpo, work_pool: {name: gpu}, schedules: []}
  - {name: sweep, entrypoint: flows.sweep.sweep, work_pool: {name: gpu}, schedules: []}
"""


COMPOSE = "import sys; from dvc.utils.hydra import *; compose_and_dump('params.yaml', sys.argv[1], None, 'config', 'x', [])"


def git(folder: Path, *arguments: str) -> str:
    """What git prints in a folder."""
    named = {
        f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in (("NAME", "x"), ("EMAIL", "x@x.org"))
    }
    done = subprocess.run(
        ["git", *arguments], cwd=folder, env={**os.environ, **named}, capture_output=True, text=True, check=True
    )
    return done.stdout


def make_repository(folder: Path, remote: Path) -> Path:
    """A repository with a pipeline of the real one's shape whose stages take a tenth of a second, and a DVC remote."""
    files = {
        "dvc.yaml": PIPELINE,
        "conf/config.yaml": CONFIG,
        "conf/backbone/digits.yaml": BACKBONE.replace("NAME", "digits"),
        "conf/backbone/sd3.yaml": BACKBONE.replace("NAME", "sd3"),
        "stages/__init__.py": "",
        "stages/work.py": WORK,
        "stages/params.py": PARAMS,
        "prefect.yaml": DEPLOYMENTS,
        ".gitignore": "/data/\n/models/\n__pycache__\n",
        ".dvc/config": f"[core]\n    analytics = false\n    remote = storage\n['remote \"storage\"']\n    url = {remote}\n"
        "[hydra]\n    enabled = true\n",
        ".dvc/.gitignore": "/config.local\n/tmp\n/cache\n",
        "results/.gitkeep": "",
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    git(folder, "init", "-q", "-b", "main")
    subprocess.run([sys.executable, "-c", COMPOSE, folder / "conf"], cwd=folder, check=True)
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "all")
    return folder


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return make_repository(tmp_path / "repository", tmp_path / "remote")
