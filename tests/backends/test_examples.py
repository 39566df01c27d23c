import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from solvers import EPD, Backbone, Predictor, logsnr, save_predictor

ROOT = Path(__file__).parents[2]


def run(arguments: list[str], folder: Path, path: Path | None = None) -> str:
    """What a command prints, in a folder, with a virtual environment's programs first."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if path is not None:
        environment |= {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}
        environment.pop("PYTHONPATH", None)
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_makes_the_same_image_in_both_ways(tmp_path: Path) -> None:
    printed = run([sys.executable, str(ROOT / "examples/use_in_diffusers.py"), "--family", "sd3"], tmp_path)
    assert printed.splitlines()[:2] == ["batched: 10 calls of the network", "successive: 15 calls of the network"]
    assert int(re.findall(r"pixel: (\d+) of 255", printed)[0]) <= 1
    assert (tmp_path / "lighthouse.png").read_bytes().startswith(b"\x89PNG")


def required(parasol: Distribution) -> set[str]:
    """What is installed with a distribution, without its extras."""
    found, wanted = set[str](), [parasol]
    while wanted:
        for text in wanted.pop().requires or []:
            requirement = Requirement(text)
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            if requirement.name not in found:
                found.add(requirement.name)
                wanted.append(distribution(requirement.name))
    return found


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new virtual environment: Parasol as a wheel in it, and what that requires, by links into this one."""
    folder = tmp_path_factory.mktemp("clean")
    source = folder / "source"
    for file in run(["git", "ls-files", "-co", "--exclude-standard"], ROOT).splitlines():
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, source / file)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "dist", "./source"]
    run([*build, "--disable-pip-version-check"], folder)
    run([sys.executable, "-m", "venv", "--without-pip", "venv"], folder)
    (wheel,) = (folder / "dist").iterdir()
    (packages,) = (folder / "venv/lib").glob("*/site-packages")
    shutil.unpack_archive(wheel, packages, "zip")
    (metadata,) = packages.glob("parasol_solvers-*.dist-info")
    for name in required(PathDistribution(metadata)):
        for file in distribution(name).files or []:
            top = file.parts[0]
            if top != ".." and not top.endswith(".pth") and not (packages / top).exists():
                (packages / top).symlink_to(distribution(name).locate_file(top))  # type: ignore[arg-type]
    return folder / "venv/bin"


def test_fetching_and_sampling_takes_the_card_s_five_lines(clean: Path, tmp_path: Path) -> None:
    from tiny import saved, tiny_sd15

    model = saved(tiny_sd15(), tmp_path / "model")
    table = EPD(6, 2, 0.0, 0.0).requires_grad_(False).table()
    backbone = Backbone(str(model), None, "none", "StableDiffusionPipeline")
    predictor = Predictor(table, logsnr(6, 0.03, 14.6), False, backbone, 3.0, {})
    (tmp_path / "made").mkdir()
    save_predictor(predictor, tmp_path / "made")
    remote = f"file://{tmp_path}/remote"
    run([sys.executable, "-m", "stages.publish", "made", "tiny@v1.0.0", "--remote", remote], tmp_path)
    run([sys.executable, "-m", "stages.pull", "tiny@latest", "--remote", remote, "--out", "seen"], tmp_path)
    blocks = re.findall(r"```(\w+)\n(.*?)```", (tmp_path / "seen/README.md").read_text().split("## How")[0], re.DOTALL)
    assert [kind for kind, _ in blocks] == ["sh", "python"]
    assert sum(len(lines.strip().splitlines()) for _, lines in blocks) == 5
    (_, shell), (_, python) = blocks
    (tmp_path / "user").mkdir()
    run(["bash", "-ec", shell], tmp_path / "user", clean)
    python += "import solvers\nprint(images[0].size, solvers.__file__)"
    printed = run(["python", "-c", python], tmp_path / "user", clean)
    assert printed.splitlines()[-1].startswith(f"(16, 16) {clean.parent}")
