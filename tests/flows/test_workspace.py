import fcntl
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.config import Config

from flows import process
from flows import workspace as workspaces
from flows.process import CommandError
from flows.workspace import KEPT_DAYS, Workspace, clean_commit, compose, remotes, save_experiment, use_remote, workspace

from .conftest import ROOT, git, make_repository

HOLDER = """\
import sys, time
from pathlib import Path
from typing import Any
from flows.workspace import clean_commit, workspace

source, run = Path(sys.argv[1]), sys.argv[2]
with workspace(source, clean_commit(source), ["rdpo", "digits"], run) as space:
    (space.folder / "data").mkdir()
    (space.folder / "data/checkpoint").write_text("step 7")
    print(space.folder, flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    return make_repository(folder / "repository", folder / "remote")


@pytest.fixture
def source(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository for one test."""
    monkeypatch.delenv(workspaces.VARIABLE, raising=False)
    return Path(shutil.copytree(original, tmp_path / "source"))


def commit(source: Path) -> str:
    git(source, "add", "-A")
    git(source, "commit", "-qm", "more")
    return clean_commit(source)


def opened(source: Path, work: Sequence[str] = ("digits",), run: str = "run") -> Workspace:
    """A workspace of a run that has ended well."""
    with workspace(source, clean_commit(source), work, run) as space:
        return space


# ---------------------------------------------------------------- what is run


def test_a_commit_is_clean_whatever_git_does_not_know(source: Path) -> None:
    (source / "notes.txt").write_text("mine")
    assert clean_commit(source) == git(source, "rev-parse", "HEAD").strip()


@pytest.mark.parametrize("staged", [False, True])
def test_changes_that_are_not_committed_are_named(staged: bool, source: Path) -> None:
    (source / "params.yaml").write_text("a: 1\n")
    (source / "stages/work.py").unlink()
    if staged:
        git(source, "add", "-A")
    with pytest.raises(ValueError, match=r": found changes that .*, to params\.yaml, stages/work\.py; valid: none \(git"):
        clean_commit(source)


def test_of_many_changes_some_are_named(source: Path) -> None:
    for number in range(6):
        (source / f"new{number}").touch()
    git(source, "add", "-A")
    with pytest.raises(ValueError, match=r"to new0, new1, new2, new3, new4, \.\.\.; valid"):
        clean_commit(source)


def test_what_is_no_repository_or_has_no_commit_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r": found no git repository with a commit \(fatal: .*; valid: a clone of Parasol's$"):
        clean_commit(tmp_path)
    git(tmp_path, "init", "-q")
    with pytest.raises(ValueError, match=": found no git repository with a commit"):
        clean_commit(tmp_path)


# ---------------------------------------------------------------- whose a workspace is


def test_a_workspace_is_the_commit_whatever_came_later(source: Path) -> None:
    first = clean_commit(source)
    (source / "untracked").touch()
    (source / "later").touch()
    git(source, "add", "later")
    git(source, "commit", "-qm", "later")
    with workspace(source, first, ["digits"], "run") as space:
        assert git(space.folder, "rev-parse", "HEAD").strip() == first
        assert git(space.folder, "status", "--porcelain") == ""
        assert not (space.folder / "later").exists()
        assert not (space.folder / "untracked").exists()
        assert space.folder.parent == source / ".dvc/tmp/flows"
    assert git(source, "status", "--porcelain") == "?? untracked\n"


def test_the_same_work_comes_back_to_what_it_saved(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(workspaces.VARIABLE, str(tmp_path / "elsewhere"))
    first = opened(source)
    assert first.folder.parent == tmp_path / "elsewhere"
    (first.folder / "saved").touch()
    again = opened(source)
    assert again == first
    assert (again.folder / "saved").exists()
    assert opened(source, ["sd3"]).folder != first.folder
    assert opened(source, ["digits", ""]).folder != first.folder
    (source / "later").touch()
    commit(source)
    assert opened(source).folder != first.folder


def test_two_runs_of_the_same_work_at_once_are_apart(source: Path) -> None:
    work, found = clean_commit(source), list[Path]()
    with ExitStack() as stack:
        for run in "abc":
            found.append(stack.enter_context(workspace(source, work, ["digits"], run)).folder)
    assert len(set(found)) == 3
    assert opened(source).folder == found[0]


def test_a_run_that_was_killed_is_told_and_its_work_goes_on(source: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(source), "the-first"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout
        folder = Path(holder.stdout.readline().strip())
        with workspace(source, clean_commit(source), ["rdpo", "digits"], "meanwhile") as other:
            assert other.folder != folder
            assert other.interrupted is None
        holder.kill()
    with workspace(source, clean_commit(source), ["rdpo", "digits"], "the-second") as space:
        assert space == Workspace(folder, "the-first")
        assert (space.folder / "data/checkpoint").read_text() == "step 7"
    assert opened(source, ["rdpo", "digits"]) == Workspace(folder, None)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_run_that_failed_was_not_killed(error: type[BaseException], source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands are ended; for good where the process itself is to end."""
    ended = list[str]()
    monkeypatch.setattr(process, "stop", lambda: ended.append("stop"))
    monkeypatch.setattr(process, "end", lambda: ended.append("end"))

    def fail() -> None:
        with workspace(source, clean_commit(source), ["digits"], "run") as space:
            (space.folder / "saved").touch()
            raise error

    with pytest.raises(error):
        fail()
    assert ended == ["end"] * (error is KeyboardInterrupt) + ["stop"]
    again = opened(source)
    assert again.interrupted is None
    assert (again.folder / "saved").exists()


def test_a_killed_process_whose_number_another_has_does_not_block(source: Path) -> None:
    folder = opened(source).folder
    lock = folder / ".dvc/tmp/rwlock"
    note = json.dumps({"read": {}, "write": {str(folder / "models/backbone"): {"pid": os.getppid(), "cmd": "dvc repro"}}})
    lock.parent.mkdir(exist_ok=True)
    lock.write_text(note)
    with subprocess.Popen(["sleep", "60"], cwd=folder) as still_there:
        assert opened(source).folder == folder
        assert lock.read_text() == note
        still_there.kill()
    assert opened(source).folder == folder
    assert not lock.exists()


def test_a_clone_is_whole_or_not_there(source: Path) -> None:
    with pytest.raises(CommandError), workspace(source, "0" * 40, ["digits"], "run"):
        pass
    root = source / ".dvc/tmp/flows"
    assert not [folder for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
    folder = opened(source).folder
    folder.rename(new := root / f".{folder.name}.new")  # as if it had been killed before it was whole
    (new / "half").touch()
    (new / "params.yaml").unlink()
    assert opened(source).folder == folder
    assert git(folder, "status", "--porcelain") == ""
    assert not new.exists()


# ---------------------------------------------------------------- what is removed


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """Of workspaces, some of them old."""
    root = tmp_path / "root"
    old, new = time.time() - (KEPT_DAYS + 0.1) * 86400, time.time() - (KEPT_DAYS - 0.1) * 86400
    for name, text, used in [
        ("old-1", "done", old),
        ("old-2", "done", old),
        ("new-1", "done", new),
        ("failed-1", "", old),
        ("killed-1", "some-run", old),
        ("taken-1", "done", old),
    ]:
        (root / name).mkdir(parents=True)
        (root / name / "file").touch()
        lock = root / f"{name}.lock"
        lock.write_text(text)
        os.utime(lock, (used, used))
    with (root / "taken-1.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield root


def left(root: Path) -> set[str]:
    return {folder.name for folder in root.iterdir() if folder.is_dir()}


KEPT = {"new-1", "failed-1", "killed-1", "taken-1"}


def test_old_workspaces_of_runs_that_ended_well_are_removed(source: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(workspaces.VARIABLE, str(root))
    assert left(root) == {"old-1", "old-2", *KEPT}
    folder = opened(source).folder
    assert left(root) == {folder.name, *KEPT}
    assert opened(source).folder == folder


# ---------------------------------------------------------------- DVC's cache and remotes


def test_a_workspace_has_its_sources_cache_and_remotes(source: Path, tmp_path: Path) -> None:
    secret = "p#a, 's\" %x"
    with (source / ".dvc/config").open("a") as file:
        file.write("['remote \"beside\"']\n    url = ../../beside\n['remote \"bucket\"']\n    url = s3://bucket/folder\n")
        file.write("[cache]\n    dir = ../../cache\n    type = hardlink,symlink\n")
    commit(source)
    local: Any
    with Config(str(source / ".dvc")).edit("local") as local:
        local["remote"] = {"bucket": {"secret_access_key": secret}, "own": {"url": str(tmp_path / "own")}}
        local["core"] = {"remote": "own"}
    folder = opened(source).folder
    found, expected = Config(str(folder / ".dvc")), Config(str(source / ".dvc"))
    assert found["remote"] == expected["remote"]
    assert found["remote"]["beside"]["url"] == str(tmp_path / "beside")
    assert found["remote"]["bucket"]["secret_access_key"] == secret
    assert found["cache"] == expected["cache"]
    assert found["cache"]["dir"] == str(tmp_path / "cache")
    assert remotes(folder) == (["beside", "bucket", "own", "storage"], "own")
    assert stat.S_IMODE((folder / ".dvc/config.local").stat().st_mode) == 0o600
    assert git(folder, "status", "--porcelain") == ""


def test_a_workspace_follows_its_sources_settings(source: Path) -> None:
    folder = opened(source).folder
    assert Config(str(folder / ".dvc"))["cache"]["dir"] == str(source / ".dvc/cache")
    assert remotes(folder) == (["storage"], "storage")
    local = source / ".dvc/config.local"
    local.write_text("['remote \"own\"']\n    url = /own\n[core]\n    remote = own\n")
    assert opened(source).folder == folder
    assert remotes(folder) == (["own", "storage"], "own")
    local.unlink()
    opened(source)
    assert remotes(folder) == (["storage"], "storage")


def test_the_remote_of_one_run_is_not_that_of_the_next(source: Path) -> None:
    config = source / ".dvc/config"
    config.write_text(config.read_text().replace("    remote = storage\n", ""))
    commit(source)
    folder = opened(source).folder
    assert remotes(folder) == (["storage"], None)
    assert use_remote(folder, "storage") == "storage"
    assert remotes(folder) == (["storage"], "storage")
    assert stat.S_IMODE((folder / ".dvc/config.local").stat().st_mode) == 0o600
    assert opened(source).folder == folder
    assert use_remote(folder, None) is None
    assert remotes(folder) == (["storage"], None)


# ---------------------------------------------------------------- parameters


@pytest.fixture(scope="module")
def place(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace for tests that compose its parameters anew."""
    return Path(shutil.copytree(original, tmp_path_factory.mktemp("place") / "workspace"))


def test_parameters_are_composed_as_dvc_does(original: Path, place: Path, source: Path) -> None:
    overrides = ["rdpo.steps=4", "~samplers.euler", "+rdpo.new.list=[1,two]", "++report.base=${backbone.name}"]
    dvc = [sys.executable, "-m", "dvc", "exp", "run", "--queue", "-S", "backbone=sd3"]
    subprocess.run([*dvc, *(part for each in overrides for part in ("-S", each))], cwd=source, check=True, capture_output=True)
    found = compose(original, place, "sd3", [overrides[0], f"params.yaml:{overrides[1]}", *overrides[2:]])
    assert (place / "params.yaml").read_text() == git(source, "show", "refs/exps/celery/stash:params.yaml")
    assert found == yaml.safe_load((place / "params.yaml").read_text())
    assert found["rdpo"]["new"] == {"list": [1, "two"]}
    assert found["report"]["base"] == found["backbone"]["name"] == "sd3"
    assert list(found["samplers"]) == ["rdpo"]


def test_nothing_of_an_earlier_composition_stays(original: Path, place: Path) -> None:
    compose(original, place, "sd3", ["rdpo.steps=4"])
    found = compose(original, place, "digits", [])
    assert (found["backbone"]["name"], found["rdpo"]["steps"]) == ("digits", 0)
    assert (place / "params.yaml").read_text() == (original / "params.yaml").read_text()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rdpo.stepz=3", "Could not override 'rdpo.stepz'.*; valid: steps, pause, fail, batch_size;"),
        (
            "rpdo.steps=3",
            "Could not override 'rpdo.steps'.*; valid: rdpo, sample, .*, backbone, refs;",
        ),
        ("samplers.euler.steps=3", "Could not override 'samplers.euler.steps'.*; valid: model;"),
        ("~samplers.heun", "Could not delete from config. 'samplers.heun' does not exist.;"),
        ("+rdpo.steps=3", "An item is already at 'rdpo.steps'"),
        ("rdpo.steps=[3", "no viable alternative at input"),
        ("rdpo.steps=3,4", "Ambiguous value for argument 'rdpo.steps=3,4'"),
        ("rdpo.steps=${steps}", "Interpolation key 'steps' not found"),
        ("conf.yaml:rdpo.steps=3", "Error parsing override 'conf.yaml:rdpo.steps=3'"),
        ("backbone@rdpo=sd3", "backbone@rdpo"),
    ],
)
def test_overrides_that_cannot_be_are_refused(override: str, said: str, original: Path, place: Path) -> None:
    with pytest.raises(ValueError, match=f"^overrides: .*{said}") as refused:
        compose(original, place, "digits", ["rdpo.pause=0.5", override])
    assert str(refused.value).endswith("; they are those of dvc exp run -S")
    assert "\n" not in str(refused.value)
    assert str(place) not in str(refused.value)


def test_values_that_are_wrong_are_refused(original: Path, place: Path) -> None:
    with pytest.raises(ValueError, match=r"^overrides: rdpo\.pause: found -1; valid: 0 or more$"):
        compose(original, place, "digits", ["rdpo.pause=-1"])


def test_an_unknown_backbone_is_told_the_right_ones(original: Path, place: Path) -> None:
    with pytest.raises(ValueError, match=r"^backbone: found 'sd4'; valid: digits, sd3$"):
        compose(original, place, "sd4", [])


# ---------------------------------------------------------------- files


def bring(source: Path, **named: str) -> Path:
    """A workspace that had been in use, with parameters that name files."""
    folder = opened(source).folder
    (folder / "data/checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "data/checkpoints/rdpo").write_text("step 7")
    compose(source, folder, "digits", [f"++rdpo.files.{name}={value}" for name, value in named.items()])
    assert (folder / "data/checkpoints/rdpo").read_text() == "step 7"
    return folder


def test_files_that_parameters_name_are_brought(source: Path) -> None:
    (source / "data/images/some").mkdir(parents=True)
    (source / "data/images/some/a.png").write_text("a")
    (source / "data/mine.txt").write_text("a cat")
    folder = bring(source, prompts="data/mine.txt", images="data/images", none="data/none.txt")
    assert (folder / "data/mine.txt").read_text() == "a cat"
    assert (folder / "data/images/some/a.png").read_text() == "a"
    (source / "data/images/some/a.png").rename(source / "data/images/b.png")
    (source / "data/mine.txt").write_text("a dog")
    assert bring(source, prompts="data/mine.txt", images="data/images") == folder
    assert (folder / "data/mine.txt").read_text() == "a dog"
    assert sorted(file.name for file in (folder / "data/images").rglob("*.png")) == ["b.png"]


def test_files_are_copied_from_another_file_system(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(there: str, here: str) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)
    (source / "data").mkdir()
    (source / "data/mine.txt").write_text("a cat")
    folder = bring(source, prompts="data/mine.txt")
    assert (folder / "data/mine.txt").read_text() == "a cat"


def test_what_stages_make_is_not_brought(source: Path) -> None:
    (source / "models").mkdir()
    (source / "models/backbone").write_text("of another run")
    assert not (bring(source, model="models/backbone") / "models/backbone").exists()


def test_a_folder_with_what_git_or_stages_know_is_not_brought(source: Path) -> None:
    """refs.source of the digits is `data`, and there may be a folder of that name, with checkpoints."""
    (source / "data").mkdir()
    (source / "data/refs").write_text("of another run")
    (source / "stages/notes").write_text("mine")
    folder = bring(source, a="data", b="data/", c=".", d="stages", e="stages/", f="stages/work.py")
    assert not (folder / "data/refs").exists()
    assert not (folder / "stages/notes").exists()
    assert git(folder, "status", "--porcelain").splitlines() == [" M params.yaml"]


def test_files_elsewhere_are_not_brought(source: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    folder = bring(source, outside="../secret", whole=str(tmp_path / "secret"), around="data/../../secret")
    assert not list(folder.parent.rglob("secret"))


# ---------------------------------------------------------------- the experiment


def test_an_experiment_is_in_the_source_and_where_it_was_pushed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # git knows nobody's name, as in a container
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    (source / "dvc.yaml").write_text("stages: {}\n")  # whose outputs would have to be there
    (source / "results/report.md").write_text("| before |\n")
    head = commit(source)
    git(tmp_path, "init", "-q", "--bare", "origin")
    git(source, "remote", "add", "origin", str(tmp_path / "origin"))
    folder = opened(source).folder
    compose(source, folder, "sd3", [])
    (folder / "results/report.md").write_text("| n |\n")
    assert save_experiment(source, folder, "sd3-1a2b", push=True) is None
    ref = f"refs/exps/{head[:2]}/{head[2:]}/sd3-1a2b"
    for place in (source, tmp_path / "origin"):
        assert git(place, "for-each-ref", "--format=%(refname)", "refs/exps").split() == [ref]
        assert yaml.safe_load(git(place, "show", f"{ref}:params.yaml"))["backbone"]["name"] == "sd3"
        assert git(place, "show", f"{ref}:results/report.md") == "| n |\n"
        assert git(place, "show", "--no-patch", "--format=%an", ref) == "Parasol\n"
    assert clean_commit(source) == head

    git(source, "remote", "set-url", "origin", str(tmp_path / "nowhere"))
    monkeypatch.setattr(workspaces, "DVC", ["true"])  # what is to be saved is the same
    git(source, "update-ref", "-d", ref)
    refused = save_experiment(source, folder, "sd3-1a2b", push=True)
    assert refused
    assert refused.endswith("; valid: a remote origin that may be written to, then: dvc exp push origin sd3-1a2b")
    assert git(source, "rev-parse", ref) == git(tmp_path / "origin", "rev-parse", ref)
    monkeypatch.setattr(workspaces, "DVC", ["false"])
    with pytest.raises(CommandError):
        save_experiment(source, folder, "sd3-1a2b", push=False)
