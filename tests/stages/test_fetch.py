"""Fetching models: from a hub and an S3 server of this machine, and from folders; whole, checked, and no more than needed."""

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from moto.backends import get_backend
from safetensors.torch import save_file

from stages import bucket as bucket_module
from stages import fetch, remote, weights
from stages import hub as hub_module
from stages.fetch import FetchError

from .hub import ID, REVISION, FakeHub, Starter, etag, serving

TOKEN = "hf_recognisable"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
CODE = """
import time
from pathlib import Path
from stages import fetch, files, hub, weights
hub.constants.DOWNLOAD_CHUNK_SIZE = 4096  # else what comes of a small file before a cut is not written
{before}
begun = time.monotonic()
try:
    origin = weights.origin("hub", {id!r}, {revision!r})
    paths = fetch.pipeline_files(origin.files(), {components!r}, {variant!r}, origin.place)
    origin.get(paths, Path("out"))
except fetch.FetchError as error:
    print(f"ERROR {{error}}")
    print(f"MAY PASS {{isinstance(error, files.TemporaryError)}}")
print(f"SECONDS {{time.monotonic() - begun}}")
"""


class Tiny(NamedTuple):
    components: list[str]
    plain: dict[str, bytes]
    fp16: dict[str, bytes]
    decoys: dict[str, bytes]

    @property
    def all(self) -> dict[str, bytes]:
        return self.decoys | self.fp16 | self.plain


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """SD3's pipeline in both variants, and what else lies in such a repository."""
    from tiny import saved, tiny_sd3

    folder = tmp_path_factory.mktemp("tiny")
    pipe = tiny_sd3()
    plain = contents(saved(pipe, folder / "plain"))
    pipe.save_pretrained(folder / "fp16", variant="fp16")
    fp16 = contents(folder / "fp16")
    decoys = {
        "README.md": b"#",
        ".gitattributes": b"*",
        "tiny.safetensors": b"x",
        "tiny.ckpt": b"x",
        "flow.fp16.safetensors": b"x",
    }
    decoys |= {"transformer/diffusion_pytorch_model.bin": b"x", "vae/diffusion_flax_model.msgpack": b"x"}
    decoys |= {
        "text_encoder/model.onnx": b"x",
        "text_encoder/pytorch_model.bin.index.json": b"{}",
        "vae/onnx/config.json": b"{}",
    }
    decoys |= {"safety_checker/model.safetensors": b"x", "safety_checker/config.json": b"{}"}
    components = sorted({path.split("/")[0] for path in plain if "/" in path})
    return Tiny(components, plain, fp16, decoys)


@pytest.fixture
def hub(tiny: Tiny) -> Iterator[FakeHub]:
    with serving(dict(tiny.all)) as server:
        yield server


@pytest.fixture(scope="module")
def starter() -> Iterator[Starter]:
    found = Starter()
    yield found
    found.close()


class Client:
    """A process with its own cache that fetches the pipeline into a folder `out`."""

    def __init__(self, starter: Starter, folder: Path, components: list[str], endpoint: str) -> None:
        self.starter, self.folder, self.components = starter, folder, components
        self.environment = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        self.pid = 0

    def start(self, model: str = ID, revision: str = REVISION, variant: str = "", before: str = "", **environment: str) -> None:
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        code = CODE.format(before=before, id=model, revision=revision, components=self.components, variant=variant or None)
        self.pid = self.starter.start(code, self.folder, self.environment | environment)

    def finish(self) -> tuple[str, float]:
        """What it printed, which has no token, and the seconds it took after its imports."""
        self.starter.wait()
        printed = (self.folder / "printed").read_text()
        assert TOKEN not in printed
        assert "Traceback" not in printed, printed
        lines = printed.splitlines()
        error = next((line.removeprefix("ERROR ") for line in lines if line.startswith("ERROR ")), "")
        return error, float(lines[-1].removeprefix("SECONDS ")) if lines and lines[-1].startswith("SECONDS ") else -1.0

    def run(self, *arguments: str, **keywords: str) -> tuple[str, float]:
        self.start(*arguments, **keywords)
        return self.finish()

    @property
    def may_pass(self) -> bool:
        """Whether the last error does by itself."""
        [found] = re.findall("^MAY PASS (.*)$", (self.folder / "printed").read_text(), re.MULTILINE)
        return found == "True"

    @property
    def out(self) -> dict[str, bytes]:
        return contents(self.folder / "out")

    @property
    def storage(self) -> Path:
        return self.folder / "home" / "hub" / f"models--{ID.replace('/', '--')}"


@pytest.fixture
def client(starter: Starter, hub: FakeHub, tiny: Tiny, tmp_path: Path) -> Client:
    return Client(starter, tmp_path, tiny.components, hub.url)


def test_what_is_needed_comes_once_and_then_from_the_cache(client: Client, hub: FakeHub, tiny: Tiny) -> None:
    assert client.run(HF_TOKEN=TOKEN)[0] == ""
    assert client.out == tiny.plain
    assert {request.token for request in hub.requests} == {TOKEN}
    assert (client.folder / "out" / WEIGHTS).samefile(client.storage / "blobs" / etag("x.bin", tiny.plain[WEIGHTS]))  # a link
    hub.requests.clear()
    assert client.run()[0] == ""
    assert client.out == tiny.plain
    shutil.rmtree(client.folder / "data")  # another workspace: only what the cache holds is known
    assert client.run(HF_HUB_OFFLINE="1")[0] == ""
    assert client.out == tiny.plain
    assert hub.requests == []
    assert client.run(HF_ENDPOINT=refusing())[0] == ""
    assert client.out == tiny.plain
    error, _ = client.run(variant="fp16", HF_HUB_OFFLINE="1")
    assert error.startswith(f"{ID} at {REVISION} in the hub's cache {client.folder}/home/hub (and no network): text_encoder: ")
    assert error.endswith("found no weights of variant fp16; valid: null, for none")
    hub.requests.clear()
    assert client.run(variant="fp16")[0] == ""
    assert client.out == tiny.fp16
    assert not any(hub.got(path) for path in tiny.plain)


def test_a_cache_that_the_client_filled_needs_no_network(client: Client, hub: FakeHub, tiny: Tiny) -> None:
    fill = f"import huggingface_hub; huggingface_hub.snapshot_download({ID!r}, revision={REVISION!r})"
    assert client.run(before=fill + "; hub.constants.HF_HUB_OFFLINE = True")[0] == ""
    assert client.out == tiny.plain


def refusing() -> str:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and does not listen
        return f"http://127.0.0.1:{unused.getsockname()[1]}"


def test_without_network_or_cache_the_way_out_is_told_soon(client: Client) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        black_hole = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for environment, reason in (
            ({"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": f"{client.folder}/home/hub/"}, "HF_HUB_OFFLINE is set"),
            ({"HF_ENDPOINT": refusing()}, "cannot be reached (ConnectError: "),
            ({"HF_ENDPOINT": black_hole}, f"{black_hole} cannot be reached (ReadTimeout: "),
        ):
            error, seconds = client.run(**environment)
            assert seconds < 5
            assert client.may_pass == (reason != "HF_HUB_OFFLINE is set")
            assert error.startswith(f"{ID} at {REVISION} on the hub: ")
            assert reason in error
            assert f"the cache {client.folder}/home/hub lacks all of its files; valid: " in error
            assert f"`hf download {ID} --revision {REVISION}`" in error
            assert error.endswith("backbone.source=FOLDER, or at S3, backbone.source=s3://BUCKET/PREFIX")


def test_a_look_up_of_names_that_hangs_is_left_behind() -> None:
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.1 s"):
        hub_module._within(0.1, lambda: time.sleep(1))
    assert time.monotonic() - begun < 0.9


def test_missing_files_are_named_without_network(client: Client, hub: FakeHub) -> None:
    assert client.run()[0] == ""
    (client.storage / "snapshots" / REVISION / WEIGHTS).unlink()
    error, _ = client.run(HF_ENDPOINT=refusing())
    assert f"the cache {client.folder}/home/hub lacks {WEIGHTS}; valid: that cache" in error
    hub.requests.clear()
    assert client.run()[0] == ""
    assert not hub.got(WEIGHTS)  # the blob is there


def test_a_cut_connection_is_continued(client: Client, hub: FakeHub, tiny: Tiny) -> None:
    hub.cut[WEIGHTS] = 50_000
    assert client.run()[0] == ""
    assert client.out == tiny.plain
    first, second = hub.got(WEIGHTS)
    assert first.start == 0
    assert 0 < second.start <= 50_000


def test_a_killed_download_is_continued(client: Client, hub: FakeHub, tiny: Tiny) -> None:
    hub.stall[WEIGHTS] = 50_000
    client.start()
    assert hub.stalled.wait(20)
    [part] = [file for file in (client.storage / "blobs").iterdir() if file.suffix == ".incomplete"]
    deadline = time.monotonic() + 10
    while part.stat().st_size == 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(client.pid, signal.SIGKILL)
    client.starter.wait()
    had = part.stat().st_size
    assert 0 < had <= 50_000
    assert client.run()[0] == ""
    assert client.out == tiny.plain
    assert [request.start for request in hub.got(WEIGHTS)] == [0, had]
    assert not part.exists()


def test_what_comes_damaged_is_fetched_once_more(client: Client, hub: FakeHub, tiny: Tiny) -> None:
    hub.wrong = {WEIGHTS: 1, "model_index.json": 1}
    assert client.run()[0] == ""
    assert client.out == tiny.plain
    assert len(hub.got(WEIGHTS)) == len(hub.got("model_index.json")) == 2


@pytest.mark.parametrize("path", [WEIGHTS, "model_index.json"])
def test_what_comes_damaged_twice_is_an_error(client: Client, hub: FakeHub, tiny: Tiny, path: str) -> None:
    hub.wrong[path] = 2
    error, _ = client.run()
    data = tiny.plain[path]
    found = etag(path, data[:-1] + bytes([data[-1] ^ 1]))
    assert error.startswith(
        f"{path} of {ID} at {REVISION} on the hub: came twice, found hash {found}; valid: {etag(path, data)}"
    )
    assert len(hub.got(path)) == 2
    assert path not in client.out
    assert not client.may_pass
    assert not list((client.storage / "blobs").glob(f"{etag(path, data)}*"))


def test_a_damaged_cache_is_mended(client: Client, hub: FakeHub, tiny: Tiny) -> None:
    assert client.run()[0] == ""
    digest = etag(WEIGHTS, tiny.plain[WEIGHTS])
    blob = client.storage / "blobs" / digest
    blob.write_bytes(blob.read_bytes()[:-1])
    hub.requests.clear()
    error, _ = client.run(HF_HUB_OFFLINE="1")
    found = hashlib.sha256(blob.read_bytes()).hexdigest()
    assert f"lacks {WEIGHTS} (corrupt: found hash {found}; valid: {digest}); valid: that cache" in error
    assert client.run()[0] == ""
    assert client.out == tiny.plain
    assert [request.path.rsplit("/", 1)[-1] for request in hub.requests] == [REVISION, WEIGHTS.rsplit("/", 1)[-1]]


def test_a_full_disk_is_told_with_the_part(client: Client) -> None:
    before = f"""
def full(*_, **__):
    raise OSError({errno.ENOSPC}, "No space left on device")
hub.http_get = full
try:
    weights.origin("hub", {ID!r}, {REVISION!r}).get(["model_index.json"], Path("out"))
except OSError as error:
    print("FULL", error.errno, error.filename, flush=True)
    raise SystemExit from None
"""
    client.start(before=before)
    client.starter.wait()
    printed = (client.folder / "printed").read_text()
    assert f"FULL {errno.ENOSPC} {client.storage}/blobs/" in printed
    assert ".incomplete" in printed


def test_refusals_say_what_to_do(client: Client, hub: FakeHub) -> None:
    other = REVISION[::-1]
    assert client.run(revision=other)[0] == f"{ID}: found no revision {other} on the hub; valid: one of its commits"
    assert client.run("someone/else")[0].startswith(f"someone/else: found no such model at {hub.url}; valid: OWNER/NAME")
    hub.refusal = (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": f"not for {TOKEN}"})
    gated = client.run(HF_TOKEN=TOKEN)[0]
    assert gated.startswith(
        f"{ID} at {REVISION} on the hub: access denied, it is gated; accept the licence on the model's page, "
    )
    assert gated.endswith(f"{hub.url}/{ID}, while logged in, and set HF_TOKEN to a token of that account")
    hub.refusal = (401, {"X-Error-Message": f"Invalid credentials in Authorization header: {TOKEN}"})
    error = client.run(HF_TOKEN=TOKEN)[0]
    assert "refused, 401 (Invalid credentials in Authorization header: [HF_TOKEN]); valid: no HF_TOKEN, or one" in error
    assert not client.may_pass
    hub.refusal = (503, {})
    assert f"{hub.url} answered 503" in client.run()[0]
    assert client.may_pass
    hub.refusal = (200, {"Content-Type": "text/html"})
    assert f"{hub.url}: found no hub there" in client.run()[0]
    assert not client.may_pass


def test_a_file_that_comes_short_may_come_whole(client: Client) -> None:
    before = """
def short(*_, **__):
    raise OSError("Consistency check failed")  # as the client has it
hub.http_get = short
"""
    error, _ = client.run(before=before)
    assert re.search(
        r"/blobs/.*\.incomplete: Consistency check failed; what came is kept in .*, the same command goes on$", error
    )
    assert client.may_pass


@pytest.mark.parametrize("revision", ["main", None, "", REVISION[:12], REVISION.upper()])
def test_a_revision_is_pinned(revision: str | None) -> None:
    with pytest.raises(
        FetchError, match=r"found revision .*, which is not pinned; valid: the 40 hexadecimal digits of a commit"
    ):
        weights.origin("hub", ID, revision)


@pytest.mark.parametrize("id", [None, "", "a/b/c", "../x"])
def test_a_model_has_an_id(id: str | None) -> None:  # noqa: A002
    with pytest.raises(FetchError, match="found no id of a model; valid: OWNER/NAME"):
        weights.origin("hub", id, REVISION)


@pytest.mark.parametrize("source", ["", "https://somewhere/x", "s3://UPPER/x", "gs://bucket/x", "s3://user:password@bucket/x"])
def test_sources_are_three(source: str) -> None:
    with pytest.raises(FetchError, match=r"source: found .*; valid: hub, s3://BUCKET/PREFIX, or a folder's path") as caught:
        weights.origin(source, None, None)
    assert "password" not in str(caught.value)


def test_a_variants_files_are_chosen(tiny: Tiny) -> None:
    assert fetch.pipeline_files(tiny.all, tiny.components, None, "x") == sorted(tiny.plain)
    assert fetch.pipeline_files(tiny.all, tiny.components, "fp16", "x") == sorted(tiny.fp16)
    fewer = fetch.pipeline_files(tiny.all, ["scheduler", "vae"], None, "x")
    assert fewer == sorted(path for path in tiny.plain if path.startswith(("model_index", "scheduler/", "vae/")))


def test_shards_and_their_indices_are_of_one_variant() -> None:
    common = ["config.json", "merges.txt", "spiece.model"]
    plain = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    half = [
        "model.fp16-00001-of-00002.safetensors",
        "model-00002-of-00002.fp16.safetensors",
        "model.safetensors.index.fp16.json",
    ]
    other = ["pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "unknown.safetensors", "x/config.json"]
    assert fetch.model_files([*common, *plain, *half, *other], None, "x") == sorted(common + plain)
    assert fetch.model_files([*common, *plain, *half, *other], "fp16", "x") == sorted(common + half)


@pytest.mark.parametrize(
    ("without", "variant", "message"),
    [
        ("model_index.json", None, "x: found no model_index.json among .*; valid: a pipeline in diffusers' layout"),
        ("vae/.*", None, "x: found no vae but safety_checker, scheduler, .*; valid: scheduler, "),
        (
            "transformer/.*safetensors",
            None,
            "transformer: found diffusion_pytorch_model.bin and no safetensors: pickles are refused, since reading one can "
            "execute code; valid: a repository or a revision with",
        ),
        ("vae/diffusion.*", None, "vae: found no weights among config.json; valid: "),
        ("none", "bf16", "text_encoder: found no weights of variant bf16; valid: fp16, null, for none"),
        (".*/diffusion_pytorch_model.fp16.*", "fp16", "transformer: found no weights of variant fp16; valid: null, for none"),
        ("vae/diffusion_pytorch_model.safetensors", None, "vae: found no weights of variant null; valid: fp16"),
    ],
)
def test_what_lacks_is_named(tiny: Tiny, without: str, variant: str | None, message: str) -> None:
    files = [path for path in tiny.all if not re.fullmatch(without, path)]
    with pytest.raises(FetchError, match=message):
        fetch.pipeline_files(files, tiny.components, variant, "x")


def test_a_model_needs_a_configuration() -> None:
    with pytest.raises(FetchError, match=r"x: found no config.json among model.safetensors; valid: a model in transformers'"):
        fetch.model_files(["model.safetensors"], None, "x")


def test_a_folder_is_copied(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tmp_path / "real"
    for path, data in tiny.all.items():
        (real / path).parent.mkdir(parents=True, exist_ok=True)
        (real / path).write_bytes(data)
    (tmp_path / "blob").write_bytes(tiny.plain[WEIGHTS])
    (real / WEIGHTS).unlink()
    (real / WEIGHTS).symlink_to(tmp_path / "blob")
    (real / "vae").rename(tmp_path / "vae")
    (real / "vae").symlink_to(tmp_path / "vae")
    (real / "circle").symlink_to(real)
    origin = weights.origin(str(real), None, None)
    assert origin.place == str(real)
    assert origin.files() == {path: len(data) for path, data in tiny.all.items()}
    origin.get(sorted(tiny.plain), tmp_path / "copied")
    assert contents(tmp_path / "copied") == tiny.plain
    (tmp_path / "blob").write_bytes(b"written later")
    assert contents(tmp_path / "copied") == tiny.plain
    assert not any(path.is_symlink() for path in (tmp_path / "copied").rglob("*"))

    def full(source: Path, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(source))

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="no space left") as caught:
        origin.get([WEIGHTS], tmp_path / "full")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "full" / WEIGHTS))
    assert contents(tmp_path / "full") == {}


def test_folders_without_the_files_are_told(tmp_path: Path) -> None:
    with pytest.raises(
        FetchError, match=r"missing: found nothing; valid: a folder with a model's files, hub, or s3://BUCKET/PREF"
    ):
        weights.origin(str(tmp_path / "missing"), None, None).files()
    (tmp_path / "there.json").write_text("{}")
    origin = weights.origin(str(tmp_path), None, None)
    with pytest.raises(FetchError, match=r"lost.json: found no file; valid: there.json"):
        origin.get(["lost.json"], tmp_path / "out")
    for path in ("../there.json", "/etc/passwd", "a/../../b", ""):
        with pytest.raises(FetchError, match=r"found the path .* for a file; valid: ones inside the folder"):
            origin.get([path], tmp_path / "out")
    (tmp_path / "broken").symlink_to("gone")
    with pytest.raises(FetchError, match="broken: found a link to gone, which is not there; valid: files"):
        origin.files()


@pytest.fixture
def model(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A model's files at S3, below a prefix that others share the beginning of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bucket_module, "BLOCK", 1000)
    files = {"config.json": b"{}", "vae/model.safetensors": os.urandom(10_500), "empty.txt": b""}
    for path, data in files.items():
        remote.Bucket(bucket, anonymous=False).write(f"m/tiny/{path}", data)
    remote.Bucket(bucket, anonymous=False).write("m/tiny2/config.json", b"other")
    return files


def test_a_prefix_is_fetched(model: dict[str, bytes], bucket: str, tmp_path: Path) -> None:
    origin = weights.origin(f"s3://{bucket}/m/tiny", None, None)
    assert origin.place == f"s3://{bucket}/m/tiny"
    assert origin.files() == {path: len(data) for path, data in model.items()}
    origin.get(sorted(model), tmp_path / "out")
    assert contents(tmp_path / "out") == model
    assert list((tmp_path / "data/downloads").iterdir()) == []
    with pytest.raises(FetchError, match=f"s3://{bucket}/m/none: found no files; valid: a prefix below which"):
        weights.origin(f"s3://{bucket}/m/none", None, None).files()
    with pytest.raises(FetchError, match="s3://missing: no such bucket; check its name and AWS_ENDPOINT_URL"):
        weights.origin("s3://missing", None, None).files()
    with pytest.raises(
        FetchError, match=f"s3://{bucket}/m/tiny: found no lost.json; valid: config.json, empty.txt, vae/model.safetensors"
    ):
        origin.get(["lost.json"], tmp_path / "out")


def test_an_interrupted_object_is_continued(
    model: dict[str, bytes], bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[int] = []
    block = bucket_module._Objects.block

    def interrupted(self: bucket_module._Objects, path: str, start: int, end: int) -> bytes:
        if starts.count(3000) == 0 and start == 3000:
            starts.append(start)
            raise KeyboardInterrupt
        starts.append(start)
        return block(self, path, start, end)

    monkeypatch.setattr(bucket_module._Objects, "block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        weights.origin(f"s3://{bucket}/m/tiny", None, None).get(["vae/model.safetensors"], tmp_path / "out")
    [part] = (tmp_path / "data/downloads").glob("*/model.safetensors.part")
    assert part.stat().st_size == 3000
    weights.origin(f"s3://{bucket}/m/tiny/", None, None).get(["vae/model.safetensors"], tmp_path / "out")
    assert starts == [*range(0, 3001, 1000), *range(3000, 10_500, 1000)]
    assert contents(tmp_path / "out") == {"vae/model.safetensors": model["vae/model.safetensors"]}
    part.parent.mkdir()
    part.write_bytes(bytes(10_500))  # whole and wrong
    weights.origin(f"s3://{bucket}/m/tiny", None, None).get(["vae/model.safetensors"], tmp_path / "out")
    assert contents(tmp_path / "out") == {"vae/model.safetensors": model["vae/model.safetensors"]}
    monkeypatch.setattr(bucket_module._Objects, "block", lambda self, path, start, end: bytes(end - start))
    with pytest.raises(
        FetchError, match=r"vae/model.safetensors: came twice, found MD5 [0-9a-f]{32}; valid: [0-9a-f]{32}, its"
    ):
        weights.origin(f"s3://{bucket}/m/tiny", None, None).get(["vae/model.safetensors"], tmp_path / "out2")
    assert not (tmp_path / "out2").exists()


def test_without_credentials_reading_is_anonymous(
    model: dict[str, bytes], bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in remote.SECRETS:
        monkeypatch.delenv(variable)
    origin = weights.origin(f"s3://{bucket}/m/tiny", None, None)
    with pytest.raises(FetchError, match=r"access denied, reading config.json \(.*\); check the AWS_\* credentials"):
        origin.get(sorted(model), tmp_path / "out")
    resources = [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"]
    allowed = {"Effect": "Allow", "Principal": "*", "Action": ["s3:GetObject", "s3:ListBucket"], "Resource": resources}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [allowed]})
    get_backend("s3")["123456789012"]["aws"].put_bucket_policy(bucket, policy.encode())
    origin.get(sorted(model), tmp_path / "out")
    assert contents(tmp_path / "out") == model


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    file = tmp_path / "vae" / "model.safetensors"
    file.parent.mkdir()
    save_file({"x": torch.zeros(100)}, file)
    fetch.check_weights(tmp_path)
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole + b"x", whole[:20], b"", b"version of a pointer"):
        file.write_bytes(damaged)
        with pytest.raises(
            FetchError, match=rf"vae/model.safetensors: found {len(damaged)} bytes, damaged \(.*\); valid: safeten"
        ):
            fetch.check_weights(tmp_path)
    file.write_bytes(whole)
    index = tmp_path / "vae" / "model.safetensors.index.fp16.json"
    index.write_text(json.dumps({"weight_map": {"x": "model.safetensors", "y": "lost.safetensors"}}))
    with pytest.raises(FetchError, match=r"index.fp16.json: found no lost.safetensors beside it; valid: every shard"):
        fetch.check_weights(tmp_path)
    index.write_text("[]")
    with pytest.raises(FetchError, match=r"index.fp16.json: found no index \(.*\); valid: JSON with a weight_map"):
        fetch.check_weights(tmp_path)


def test_checksums_are_those_of_sha256sum(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z").write_bytes(os.urandom(5_000_000))
    (tmp_path / "a").write_bytes(b"")
    found = fetch.checksums(tmp_path)
    assert list(found) == ["a", "b/z"]
    for path, digest in found.items():
        assert digest == hashlib.sha256((tmp_path / path).read_bytes()).hexdigest()


@pytest.mark.parametrize("secret", ["token from a file", "environment"])
def test_no_message_holds_a_token(secret: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text(f"{TOKEN}\n" if secret != "environment" else "")
    monkeypatch.setattr(fetch.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN if secret == "environment" else "")
    assert str(FetchError(f"a {TOKEN}\nb")) == "a [HF_TOKEN] b"


def test_objects_that_change_meanwhile_are_told(
    model: dict[str, bytes], bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = bucket_module._Objects.block

    def change(self: bucket_module._Objects, path: str, start: int, end: int) -> bytes:
        data = block(self, path, start, end)
        self.write(path, b"[]")
        return data

    monkeypatch.setattr(bucket_module._Objects, "block", change)
    with pytest.raises(FetchError, match=r"found config.json changed by now; valid: objects that stay as they are; try again"):
        weights.origin(f"s3://{bucket}/m/tiny", None, None).get(["config.json"], tmp_path / "out")


def test_an_etag_of_a_key_of_ones_own_is_no_md5(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    remote.Bucket(bucket, anonymous=False).write("m/config.json", b"{}")
    monkeypatch.setattr(bucket_module, "digest", lambda file, algorithm: "0" * 32)
    origin = weights.origin(f"s3://{bucket}/m", None, None)
    with pytest.raises(FetchError, match=r"came twice, found MD5 0{32}; valid: "):
        origin.get(["config.json"], tmp_path / "out")
    s3 = remote.Bucket(bucket, anonymous=False).fs
    s3.call_s3("put_object", Bucket=bucket, Key="m/config.json", Body=b"{}", ServerSideEncryption="aws:kms")
    origin.get(["config.json"], tmp_path / "out")
    assert contents(tmp_path / "out") == {"config.json": b"{}"}


def test_metrics_files_are_chosen() -> None:
    """Of repositories that hold much else."""
    others = ["README.md", "model.bin", "tokenizer.json", "other.pt"]
    files = [*others, "HPS_v2.1_compressed.pt", "HPS_v2_compressed.pt"]
    assert fetch.metric_files("hps", files, None, "hub") == ["HPS_v2.1_compressed.pt"]
    assert "open_clip_config.json" in fetch.metric_files("hps", [*files, "open_clip_config.json"], None, "folder")
    bert = [
        "config.json",
        "vocab.txt",
        "tokenizer.json",
        "pytorch_model.bin",
        "model.safetensors",
        "coreml/fill-mask/config.json",
    ]
    assert fetch.metric_files("bert", bert, None, "hub") == ["config.json", "tokenizer.json", "vocab.txt"]
    clip = ["config.json", "merges.txt", "vocab.json", "model.safetensors", "open_clip_pytorch_model.bin"]
    assert fetch.metric_files("clip_h14", clip, None, "hub") == ["config.json", "merges.txt", "vocab.json"]
    assert "model.safetensors" in fetch.metric_files("clip_l14", clip, None, "hub")
    assert fetch.metric_files("image_reward", ["ImageReward.pt", "med_config.json", "x"], None, "hub") == [
        "ImageReward.pt",
        "med_config.json",
    ]


@pytest.mark.parametrize(
    ("model", "files", "message"),
    [
        (
            "hps",
            ["HPS_v2_compressed.pt"],
            r"there: found no HPS_v2.1_compressed.pt among HPS_v2_compressed.pt; valid: hps's as pub",
        ),
        ("image_reward", ["ImageReward.pt"], r"there: found no med_config.json among ImageReward.pt; valid: image_reward's"),
        ("mps", [], r"there: found no MPS_overall_checkpoint.pth among nothing; valid: mps's as published"),
        (
            "bert",
            ["config.json"],
            r"there: found no tokenizer among config.json; valid: config.json, vocab.txt, tokenizer.json",
        ),
        ("clip_l14", ["config.json", "pytorch_model.bin"], r"pickles are refused"),
    ],
)
def test_what_a_metric_lacks_is_named(model: str, files: list[str], message: str) -> None:
    with pytest.raises(FetchError, match=message):
        fetch.metric_files(model, files, None, "there")


@pytest.mark.parametrize("kept", [0, 3, 0.5, 0.99])
def test_truncated_checkpoints_are_named(kept: float, tmp_path: Path) -> None:
    file = tmp_path / "ImageReward.pt"
    torch.save({"a": torch.zeros(1000)}, file)
    fetch.check_weights(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(kept if kept > 1 else kept * len(whole))])
    with pytest.raises(FetchError, match=r"ImageReward.pt: found \d+ bytes, damaged; valid: what torch.save writes"):
        fetch.check_weights(tmp_path)


def test_what_is_fetched_is_what_metrics_read() -> None:
    from metrics import aesthetic, extractors, hps, image_reward, mps
    from stages.params import MODELS, WEIGHTLESS

    files = {name: needed[0] for name, (needed, _) in fetch.ONE_FILE.items()}
    modules = {"hps": hps, "image_reward": image_reward, "aesthetic": aesthetic, "mps": mps, "inception": extractors}
    assert files == {name: module.FILE for name, module in modules.items()}
    assert set(fetch.WEIGHTLESS_MODELS) == WEIGHTLESS
    assert {*files, *WEIGHTLESS} < {model for models in MODELS.values() for model in models}
