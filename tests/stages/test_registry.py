"""Publishing and pulling, on an S3 server of this machine and in a folder; nothing here leaves the machine."""

import errno
import hashlib
import json
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from solvers import load_predictor, save_predictor
from solvers.predictor import FILES
from stages import registry, remote
from stages.registry import Registry, RegistryError, encode, parse

from .conftest import make

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["s3", "file"])
def url(request: pytest.FixtureRequest, bucket: str, tmp_path: Path) -> str:
    return f"s3://{bucket}/predictors" if request.param == "s3" else f"file://{tmp_path}/predictors"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_what_is_pulled_is_what_was_published(url: str, folder: Path, tmp_path: Path) -> None:
    (folder / "notes.txt").write_text("not of a predictor")
    before = contents(folder)
    Registry(url).publish(folder, "rdpo", "v1.0.0")
    assert Registry(url).pull("rdpo", "v1.0.0", tmp_path / "new" / "out") == "v1.0.0"
    found = contents(tmp_path / "new" / "out")
    assert set(found) == set(FILES)
    assert found["predictor.safetensors"] == before["predictor.safetensors"]
    assert found["predictor.json"] == before["predictor.json"]
    assert contents(folder) == before
    assert load_predictor(tmp_path / "new" / "out").provenance == {"seed": 1}


def test_the_published_card_says_how_to_fetch_it(url: str, folder: Path, tmp_path: Path) -> None:
    found = Registry(url)
    lines = f"```sh\npython -m stages.pull rdpo@v1.0.0 --remote {url} --out A\n```\n"
    for version, card, expected in (
        ("v1.0.0", "# A\n\n## Use\n\nSo.\n", f"# A\n\n## Use\n\n{lines}\nSo.\n"),
        ("v2.0.0", "# A\n", f"# A\n\n## Fetch\n\n{lines}".replace("v1", "v2")),
    ):
        (folder / "README.md").write_text(card)
        sha256 = found.publish(folder, "rdpo", version)
        found.pull("rdpo", version, tmp_path / "out")
        assert (tmp_path / "out" / "README.md").read_text() == expected
        assert found.publish(tmp_path / "out", "rdpo", version) == sha256  # what was pulled is the same content


def test_the_same_again_does_nothing_but_what_is_new(url: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = Registry(url).publish(folder, "rdpo", "v1.0.0")
    assert capsys.readouterr().err == ""
    assert Registry(url + "/").publish(folder, "rdpo", "v1.0.0", stage="prod") == first
    assert "published already with the same content" in capsys.readouterr().err
    assert Registry(url).resolve("rdpo", "prod") == "v1.0.0"


def test_a_version_never_changes(url: str, folder: Path, tmp_path: Path) -> None:
    found = Registry(url)
    first = found.publish(folder, "rdpo", "v1.0.0")
    second = make(tmp_path / "second", 2)
    with pytest.raises(RegistryError, match=f"other content, record sha256 {first}; this one has [0-9a-f]{{64}}; valid: "):
        found.publish(second, "rdpo", "v1.0.0", stage="prod")
    found.pull("rdpo", "v1.0.0", tmp_path / "out")
    assert load_predictor(tmp_path / "out").provenance == {"seed": 1}
    with pytest.raises(RegistryError, match=r"found no rdpo@prod; valid: v1.0.0"):
        found.resolve("rdpo", "prod")


def test_stages_move_and_latest_is_the_highest_release(url: str, folder: Path, tmp_path: Path) -> None:
    found = Registry(url)
    found.publish(folder, "rdpo", "v2.0.0-rc.2", stage="prod")
    found.publish(folder, "rdpo", "v2.0.0-rc.10")
    assert found.resolve("rdpo", "latest") == "v2.0.0-rc.10"
    found.publish(folder, "rdpo", "v1.9.0")
    found.publish(make(tmp_path / "second", 2), "rdpo", "v1.10.0", stage="prod")
    assert found.resolve("rdpo", "latest") == "v1.10.0"
    assert found.resolve("rdpo", "prod") == "v1.10.0"
    assert found.pull("rdpo", "prod", tmp_path / "out") == "v1.10.0"
    assert load_predictor(tmp_path / "out").provenance == {"seed": 2}
    found.publish(folder, "other", "v9.0.0")
    assert found.resolve("rdpo", "latest") == "v1.10.0"
    with pytest.raises(RegistryError, match=r"found no rdpo@v3.0.0; valid: v1.9.0, v1.10.0, v2.0.0-rc.2, v2.0.0-rc.10, prod"):
        found.pull("rdpo", "v3.0.0", tmp_path / "out")
    with pytest.raises(RegistryError, match=r"found no rdpo@stable; valid: v1.9.0"):
        found.resolve("rdpo", "stable")
    for version in ("v1.0.0", "latest", "prod"):
        with pytest.raises(RegistryError, match=r"found no none; valid: other, rdpo"):
            found.pull("none", version, tmp_path / "out")


def test_a_sha256_pins_the_record(url: str, folder: Path, tmp_path: Path) -> None:
    found = Registry(url)
    sha256 = found.publish(folder, "rdpo", "v1.0.0")
    assert found.pull("rdpo", "v1.0.0", tmp_path / "out", sha256) == "v1.0.0"
    with pytest.raises(RegistryError, match=rf"sha256 {sha256}; valid: {'0' * 64}, as asked for"):
        found.pull("rdpo", "v1.0.0", tmp_path / "out", "0" * 64)


# What lies at the remote is not trusted

RECORD = "rdpo/versions/v1.0.0.json"
Damage = Callable[[Registry], None]


def entries(found: Registry) -> dict[str, dict[str, object]]:
    return json.loads(found.remote.read(RECORD, 10**6))["files"]


def place(found: Registry, file: str) -> str:
    return f"rdpo/objects/{entries(found)[file]['sha256']}"


def edit_object(file: str, change: Callable[[bytes], bytes]) -> Damage:
    return lambda found: found.remote.write(place(found, file), change(found.remote.read(place(found, file), 10**6)))


def swap(file: str, other: str) -> Damage:
    """Put an object in another's place."""
    return lambda found: found.remote.write(place(found, file), found.remote.read(place(found, other), 10**6))


def edit_record(change: Callable[[str], str]) -> Damage:
    def damage(found: Registry) -> None:
        record = found.remote.read(RECORD, 10**6).decode()
        assert change(record) != record
        found.remote.write(RECORD, change(record).encode())

    return damage


def edit_entry(**changes: object) -> Damage:
    """Change an entry of the record, which is otherwise as publishing writes it."""

    def damage(found: Registry) -> None:
        record = json.loads(found.remote.read(RECORD, 10**6))
        record["files"]["predictor.json"] |= changes
        found.remote.write(RECORD, (json.dumps(record, indent=2) + "\n").encode())

    return damage


def forge(file: str, data: bytes) -> Damage:
    """Replace a file, with a record that agrees."""

    def damage(found: Registry) -> None:
        files = {file: found.remote.read(place(found, file), 10**6) for file in FILES} | {file: data}
        found.remote.write(f"rdpo/objects/{hashlib.sha256(data).hexdigest()}", data)
        found.remote.write(RECORD, encode("rdpo", "v1.0.0", files))

    return damage


def check_refusal(url: str, damage: Damage, message: str, folder: Path, tmp_path: Path) -> None:
    """Nothing of it is pulled, and what was there before is left alone."""
    found = Registry(url)
    found.publish(folder, "rdpo", "v1.0.0")
    damage(found)
    out = tmp_path / "at" / "out"
    shutil.copytree(folder, out)
    before = contents(out)
    with pytest.raises(RegistryError, match=message):
        found.pull("rdpo", "v1.0.0", out)
    assert contents(out) == before
    assert list(out.parent.iterdir()) == [out]


OTHER = r"objects/[0-9a-f]*: .* bytes, sha256 .*; valid: .* bytes with that of its name"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *((edit_object(file, lambda data: b"x" + data[1:]), OTHER) for file in FILES),
        *((edit_object(file, lambda data: data[:-1]), OTHER) for file in FILES),
        (edit_object("README.md", lambda data: data + b"x"), "objects/.*: more than .* bytes, sha256 .*; valid: .* bytes"),
        (edit_object("README.md", lambda data: b""), "objects/.*: 0 bytes, sha256 .*; valid: .* bytes"),
        (swap("predictor.json", "README.md"), OTHER),
        (edit_entry(sha256="0" * 64), f"objects/{'0' * 64}: missing, though {RECORD} names it as its predictor.json"),
    ],
)
def test_objects_that_were_tampered_with_are_refused(
    url: str, damage: Damage, message: str, folder: Path, tmp_path: Path
) -> None:
    check_refusal(url, damage, message, folder, tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        edit_record(lambda text: text.replace("README.md", "../x")),
        edit_record(lambda text: text.replace("README.md", "/etc/x")),
        edit_record(lambda text: text.replace('"predictor.json"', '"predictor.pkl"')),
        edit_record(lambda text: text.replace("rdpo", "other")),
        edit_record(lambda text: text.replace("v1.0.0", "v0.9.0")),
        edit_record(lambda text: text.replace('"format_version": 1', '"format_version": 2')),
        edit_record(lambda text: text.replace('"format_version": 1', '"format_version": true')),
        edit_record(lambda text: text.replace('"name"', '"extra": 1, "name"')),
        edit_record(lambda text: text.replace('"name"', '"name": "rdpo", "name"')),
        edit_record(lambda text: "[" * 4000),
        edit_record(lambda text: "[]"),
        edit_record(lambda text: text[:-2]),
        edit_record(lambda text: text + " " * 10**6),
        edit_record(lambda text: ""),
        edit_entry(size=2**24 + 1),
        edit_entry(size=-1),
        edit_entry(size=True),
        edit_entry(size=553.0),
        edit_entry(size="553"),
        edit_entry(sha256="../../x"),
        edit_entry(sha256="A" * 64),
        edit_entry(sha256=None),
    ],
)
def test_records_that_were_tampered_with_are_refused(damage: Damage, folder: Path, tmp_path: Path) -> None:
    message = r"versions/v1.0.0.json: found .*; valid: the record of rdpo@v1.0.0, with sha256 and size \(at most 16777216\)"
    check_refusal(f"file://{tmp_path}/predictors", damage, message, folder, tmp_path)


@pytest.mark.parametrize(
    ("file", "data", "message"),
    [
        ("predictor.safetensors", pickle.dumps({}), "predictor.safetensors: sha256"),
        ("predictor.json", b"[" * 10**5, "^rdpo@v1.0.0.* recursion depth"),
        ("predictor.json", b"\xff", "predictor.json: not JSON"),
        ("predictor.json", b"{}", "predictor.json: "),
    ],
)
def test_what_is_no_predictor_is_not_pulled(file: str, data: bytes, message: str, folder: Path, tmp_path: Path) -> None:
    check_refusal(f"file://{tmp_path}/predictors", forge(file, data), message, folder, tmp_path)


@pytest.mark.parametrize(
    "pointer",
    [b"", b"[]", b'{"version": "v1.0.0", "x": 1}', b'{"version": "../x"}', b'{"version": "v1.0"}', b'{"version": "\xff"}'],
)
def test_a_stage_that_points_nowhere_is_refused(pointer: bytes, folder: Path, tmp_path: Path) -> None:
    found = Registry(f"file://{tmp_path}/predictors")
    found.publish(folder, "rdpo", "v1.0.0", stage="prod")
    found.remote.write("rdpo/stages/prod.json", pointer)
    with pytest.raises(RegistryError, match=r'prod.json: found .*; valid: {"version": "v1.0.0"}'):
        found.resolve("rdpo", "prod")


# What is refused before the network is used


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, bucket: str) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(remote.Bucket, "_tried", fail)


@pytest.mark.parametrize("name", ["", "Rdpo", "a/b", "..", "a.b", "-a", "a-", "a_b", "a\n", "é", "a b"])
@pytest.mark.usefixtures("no_network")
def test_bad_names_are_refused(name: str, folder: Path, tmp_path: Path) -> None:
    found = Registry("s3://bucket")
    with pytest.raises(RegistryError, match=r"name: found .*; valid: a to z"):
        found.publish(folder, name, "v1.0.0")
    with pytest.raises(RegistryError, match=r"name: found .*; valid: a to z"):
        found.pull(name, "v1.0.0", tmp_path / "out")
    with pytest.raises(RegistryError, match=r"stage: found .*; valid: a to z"):
        found.publish(folder, "rdpo", "v1.0.0", stage=name)
    with pytest.raises(RegistryError, match=r"stage: found .*; valid: a to z"):
        found.resolve("rdpo", name)


@pytest.mark.parametrize(
    "version",
    ["", "1.0.0", "v1.0", "v01.0.0", "v1.0.0+build", "v1.0.0\n", "v1.0.0/../x", "latest", "prod", "v１.0.0", "v" + "1" * 5000],
)
@pytest.mark.usefixtures("no_network")
def test_bad_versions_are_refused(version: str, folder: Path) -> None:
    with pytest.raises(RegistryError, match=r"version: found .*; valid: as v1.0.0 or v1.0.0-rc.1"):
        Registry("s3://bucket").publish(folder, "rdpo", version)


@pytest.mark.usefixtures("no_network")
def test_latest_is_no_stage(folder: Path) -> None:
    with pytest.raises(RegistryError, match=r"stage: found 'latest'; valid: .*; not 'latest'"):
        Registry("s3://bucket").publish(folder, "rdpo", "v1.0.0", stage="latest")


@pytest.mark.parametrize("sha256", ["", "0" * 63, "0" * 65, "g" * 64])
@pytest.mark.usefixtures("no_network")
def test_a_bad_sha256_is_refused(sha256: str, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"sha256: found .*; valid: 64 hexadecimal digits"):
        Registry("s3://bucket").pull("rdpo", "v1.0.0", tmp_path / "out", sha256)


@pytest.mark.parametrize(
    "url",
    [
        *("", "models", "/models", "file://models", "file://host/models", "file:///a\nb", "https://bucket/x", "gs://bucket/x"),
        *("s3://", "s3://b", "s3://Bucket/x", "s3://bucket//x", "s3://bucket/..", "s3://bucket/a/../b", "s3://bucket/./b"),
        *("s3://bucket/a?versionId=1", "s3://bucket/a#b", "s3://bucket\n", "s3::file:///x"),
    ],
)
@pytest.mark.usefixtures("no_network")
def test_bad_remotes_are_refused(url: str) -> None:
    with pytest.raises(RegistryError, match=r"remote: found .*; valid: s3://BUCKET/PREFIX, .*, or file:///FOLDER"):
        Registry(url)


@pytest.mark.parametrize("url", ["s3://ab:hidden@bucket/x", "https://ab:hid@den@bucket/", "s3://bucket/x?secret=hidden"])
@pytest.mark.usefixtures("no_network")
def test_credentials_in_a_remote_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(RegistryError, match="found a URL with credentials or a query in it") as caught:
        Registry(url)
    assert "hid" not in str(caught.value)


@pytest.mark.usefixtures("no_network")
def test_credentials_are_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(RegistryError, match="no AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment; valid: both"):
        Registry("s3://bucket")
    Registry("s3://bucket", anonymous=True)


def damaged(folder: Path) -> None:
    (folder / "predictor.safetensors").write_bytes(b"x")


def without_card(folder: Path) -> None:
    (folder / "README.md").unlink()


def not_text(folder: Path) -> None:
    (folder / "README.md").write_bytes(b"\xff")


def large(folder: Path) -> None:
    (folder / "README.md").write_bytes(bytes(2**24 + 1))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damaged, "first/predictor.safetensors: sha256 .*; valid: .*, as its record says"),
        (
            without_card,
            "first/README.md: missing; valid: a predictor's folder, with predictor.safetensors, ",
        ),
        (not_text, "first/README.md: .*; valid: a text in UTF-8"),
        (large, "first/README.md: more than 16777216 bytes; valid: at most as many"),
        (shutil.rmtree, "first/predictor.safetensors: missing; valid: a predictor's folder"),
    ],
)
@pytest.mark.usefixtures("no_network")
def test_what_is_no_predictor_is_not_published(spoil: Callable[[Path], None], message: str, folder: Path) -> None:
    spoil(folder)
    with pytest.raises(RegistryError, match=message):
        Registry("s3://bucket").publish(folder, "rdpo", "v1.0.0")


def test_names_with_versions() -> None:
    assert parse("rdpo@v1.0.0-rc.1") == ("rdpo", "v1.0.0-rc.1")
    assert parse("rdpo@latest") == ("rdpo", "latest")
    assert parse("rdpo@prod") == parse("rdpo#prod") == ("rdpo", "prod")
    for spec in ("rdpo", "rdpo@", "@v1.0.0", "rdpo#latest", "rdpo#v1.0.0", "rdpo@v1.0.0@prod", "rdpo#prod#1", "", "#"):
        with pytest.raises(RegistryError, match=r"predictor: found .*; valid: NAME@v1.0.0, NAME@latest"):
            parse(spec)


# The folder that is pulled to


def other_file(out: Path) -> None:
    (out / "notes.txt").write_text("precious")


def other_folder(out: Path) -> None:
    (out / "predictor.json").unlink()
    (out / "predictor.json").mkdir()


def a_file(out: Path) -> None:
    shutil.rmtree(out)
    out.write_text("precious")


def a_link(out: Path) -> None:
    out.rename(out.with_name("precious"))
    out.symlink_to("precious")


@pytest.mark.parametrize("spoil", [other_file, other_folder, a_file, a_link])
@pytest.mark.usefixtures("no_network")
def test_what_is_no_predictor_is_not_replaced(spoil: Callable[[Path], None], folder: Path, tmp_path: Path) -> None:
    spoil(folder)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RegistryError, match=r"first: found .*; valid: a new folder, an empty one, or a predictor's"):
        Registry("s3://bucket").pull("rdpo", "v1.0.0", folder)
    assert sorted(tmp_path.rglob("*")) == before


def test_empty_and_older_folders_are_replaced(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Registry(f"file://{tmp_path}/predictors")
    found.publish(folder, "rdpo", "v1.0.0")
    out = tmp_path / "at" / "out"
    out.mkdir(parents=True)
    found.pull("rdpo", "v1.0.0", out)
    (out / "README.md").write_text("older")
    monkeypatch.chdir(out.parent)
    found.pull("rdpo", "v1.0.0", Path("out"))
    assert (out / "README.md").read_text() != "older"
    assert list(out.parent.iterdir()) == [out]


def test_several_may_pull_to_the_same_folder_at_once(folder: Path, tmp_path: Path) -> None:
    url, out = f"file://{tmp_path}/predictors", tmp_path / "at" / "out"
    Registry(url).publish(folder, "rdpo", "v1.0.0")
    Registry(url).publish(make(tmp_path / "second", 2), "rdpo", "v2.0.0")
    errors = at_once([lambda v=version: Registry(url).pull("rdpo", v, out) for version in ("v1.0.0", "v2.0.0") * 4])
    assert errors == []
    assert load_predictor(out).provenance["seed"] in (1, 2)
    assert list(out.parent.iterdir()) == [out]


def at_once(calls: list[Callable[[], object]]) -> list[Exception]:
    """What calls raise that run at the same time."""
    errors = []

    def run(call: Callable[[], object]) -> None:
        try:
            call()
        except RegistryError as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.mark.parametrize(("code", "message"), [(errno.ENOSPC, "No space left on device"), (errno.EACCES, "Permission denied")])
def test_what_the_disk_refuses_is_told(
    code: int, message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:1])
        raise OSError(code, os.strerror(code))

    Registry(f"file://{tmp_path}/predictors").publish(folder, "rdpo", "v1.0.0")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(remote, "write", full)
    with pytest.raises(RegistryError, match=message):
        Registry(f"file://{tmp_path}/predictors").publish(folder, "rdpo", "v2.0.0")
    monkeypatch.setattr(registry, "write", full)
    with pytest.raises(RegistryError, match=f"first: {message}"):
        Registry(f"file://{tmp_path}/predictors").pull("rdpo", "v1.0.0", folder)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_older_predictor_comes_back_if_the_new_one_cannot_take_its_place(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    Registry(f"file://{tmp_path}/predictors").publish(make(tmp_path / "second", 2), "rdpo", "v1.0.0")
    before, files = contents(folder), sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(RegistryError, match="first: Input/output error"):
        Registry(f"file://{tmp_path}/predictors").pull("rdpo", "v1.0.0", folder)
    assert contents(folder) == before
    assert sorted(tmp_path.rglob("*")) == files


def test_a_folder_below_a_file_is_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RegistryError, match=r"file/predictors/rdpo/versions/v1.0.0.json: Not a directory"):
        Registry(f"file://{tmp_path}/file/predictors").publish(folder, "rdpo", "v1.0.0")
    Registry(f"file://{tmp_path}/predictors").publish(folder, "rdpo", "v1.0.0")
    with pytest.raises(RegistryError, match="file/out: "):
        Registry(f"file://{tmp_path}/predictors").pull("rdpo", "v1.0.0", tmp_path / "file" / "out")


# Several publishers, and those that die


def test_of_publishers_at_once_one_wins(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [make(tmp_path / str(seed), seed) for seed in range(4)]
    together = threading.Barrier(len(folders))
    kind = type(Registry(url).remote)
    create = kind.create

    def wait(self: remote.Remote, path: str, data: bytes) -> None:
        together.wait(20)  # all have uploaded, and none has seen another's record
        create(self, path, data)  # type: ignore[arg-type]

    monkeypatch.setattr(kind, "create", wait)
    errors = at_once([lambda f=folder: Registry(url).publish(f, "rdpo", "v1.0.0") for folder in folders])
    assert len(errors) == 3
    assert all("published already with other content" in str(error) for error in errors)
    Registry(url).pull("rdpo", "v1.0.0", tmp_path / "out")
    seed = load_predictor(tmp_path / "out").provenance["seed"]
    assert contents(tmp_path / "out")["predictor.safetensors"] == contents(folders[seed])["predictor.safetensors"]


def test_publishers_of_the_same_at_once_all_succeed(url: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Registry(url)
    create = found.remote.create

    def lost_answer(path: str, data: bytes) -> None:
        create(path, data)
        create(path, data)

    monkeypatch.setattr(found.remote, "create", lost_answer)
    assert found.publish(folder, "rdpo", "v1.0.0") == Registry(url).publish(folder, "rdpo", "v1.0.0")


DYING = """
import sys, time
from stages import remote
from stages.registry import Registry

def create(self, path, data):
    print("before the record", flush=True)
    time.sleep(60)

remote.Bucket.create = remote.Folder.create = create
Registry(sys.argv[1]).publish(sys.argv[2], "rdpo", "v1.0.0", "prod")
"""


def test_a_publisher_that_is_killed_leaves_no_version(url: str, folder: Path, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", DYING, url, folder], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout
        assert process.stdout.readline() == "before the record\n"
        process.send_signal(signal.SIGKILL)
    assert len(Registry(url).remote.names("rdpo/objects")) == 3
    for version in ("v1.0.0", "latest", "prod"):
        with pytest.raises(RegistryError, match="found no rdpo; valid: none yet"):
            Registry(url).pull("rdpo", version, tmp_path / "out")
    Registry(url).publish(folder, "rdpo", "v1.0.0", "prod")
    assert Registry(url).pull("rdpo", "prod", tmp_path / "out") == "v1.0.0"


def test_a_folder_in_one_that_does_not_exist_is_not_made(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=f"no folder {tmp_path}/none; valid: a folder in one that exists"):
        Registry(f"file://{tmp_path}/none/predictors").publish(folder, "rdpo", "v1.0.0")
    assert not (tmp_path / "none").exists()


def test_publishing_again_mends_what_was_damaged(url: str, folder: Path, tmp_path: Path) -> None:
    found = Registry(url)
    found.publish(folder, "rdpo", "v1.0.0")
    sha256 = hashlib.sha256((folder / "predictor.safetensors").read_bytes()).hexdigest()
    found.remote.write(f"rdpo/objects/{sha256}", b"damaged")
    with pytest.raises(RegistryError, match=f"rdpo/objects/{sha256}: 7 bytes"):
        found.pull("rdpo", "v1.0.0", tmp_path / "out")
    found.publish(folder, "rdpo", "v1.0.0")
    assert found.pull("rdpo", "latest", tmp_path / "out") == "v1.0.0"


@pytest.mark.parametrize("title", ["few sd3", "sd3 (K = 2)", "größe", "it's"])
def test_a_card_of_any_title_is_fetched_to_the_folder_that_it_reads(title: str, folder: Path, tmp_path: Path) -> None:
    save_predictor(load_predictor(folder), folder, title)
    (tmp_path / "remote").mkdir()
    Registry(f"file://{tmp_path}/remote").publish(folder, "rdpo", "v1.0.0")
    Registry(f"file://{tmp_path}/remote").pull("rdpo", "v1.0.0", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    (line,) = re.findall(r"```sh\n(.*)\n```", card)
    assert shlex.split(line)[-2:] == ["--out", title]
    assert f"load_predictor({json.dumps(title, ensure_ascii=False)})" in card


@pytest.mark.parametrize("version", ["v1.0.0", "latest", "prod"])
def test_a_folder_that_does_not_exist_is_told(version: str, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=f"file://{tmp_path}/none: no such folder; check the URL"):
        Registry(f"file://{tmp_path}/none").pull("rdpo", version, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("version", ["1.0", "v1.0", "V1.0.0", "1"])
def test_what_is_nearly_a_version_is_told_so(version: str, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=f"version: found '{version}'; valid: as v1.0.0 or v1.0.0-rc.1, latest, or a stage"):
        Registry(f"file://{tmp_path}").pull("rdpo", version, tmp_path / "out")
    with pytest.raises(RegistryError, match=f"stage: found '{version}'; valid: .* nothing like a version"):
        Registry(f"file://{tmp_path}").publish(tmp_path, "rdpo", "v1.0.0", stage=version)


# The commands


def test_the_commands_of_a_shell(bucket: str, folder: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        module = [sys.executable, "-m", *arguments]
        # from another folder, as users do
        return subprocess.run(module, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})

    url = f"s3://{bucket}/predictors"
    done = run("stages.publish", str(folder), "rdpo@v1.0.0", "--remote", url, "--stage", "prod")
    sha256 = Registry(url).publish(folder, "rdpo", "v1.0.0")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"rdpo v1.0.0 published at {url} stage prod sha256 {sha256}\n"
    done = run("stages.pull", "rdpo#prod", "--remote", url, "--sha256", sha256)
    tensors = hashlib.sha256((folder / "predictor.safetensors").read_bytes()).hexdigest()
    assert (done.returncode, done.stderr, done.stdout) == (0, "", f"rdpo v1.0.0 in rdpo sha256 {tensors}\n")
    assert load_predictor(tmp_path / "rdpo").provenance == {"seed": 1}
    (tmp_path / "rdpo" / "notes.txt").write_text("mine")
    done = run("stages.pull", "rdpo#prod", "--remote", url)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"pull: {tmp_path}/rdpo: found a folder with 'notes.txt'; valid: ")
    assert len(done.stderr.splitlines()) == 1


def test_the_commands_need_nothing_of_the_pipeline() -> None:
    names = "{'omegaconf', 'pydantic', 'dvc', 'prefect', 'hydra', 'diffusers', 'stages.params', 'stages.command'}"
    code = f"import sys, stages.pull, stages.publish; print({names} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"
