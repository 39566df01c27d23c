"""Errors of buckets: those that pass, and those that do not; on an S3 server of this machine, and on ones that misbehave."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from moto.backends import get_backend
from typer.testing import CliRunner

from solvers import load_predictor
from stages import publish, pull, remote, scrub
from stages.registry import Registry, RegistryError
from stages.remote import NoAnswerError

HIDDEN = ("recognisable-key", "recognisable-secret", "recognisable-token")


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Those that would have been made."""
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


def test_a_missing_bucket_is_told_at_once(bucket: str, folder: Path, tmp_path: Path, pauses: list[float]) -> None:
    found = Registry("s3://missing/x")
    for call in (
        lambda: found.publish(folder, "rdpo", "v1.0.0"),
        lambda: found.pull("rdpo", "v1.0.0", tmp_path / "out"),
        lambda: found.pull("rdpo", "latest", tmp_path / "out"),
    ):
        with pytest.raises(RegistryError, match=r"^s3://missing/x: no such bucket; check its name and AWS_ENDPOINT_URL$"):
            call()
    assert pauses == []


READ_ALL = {"Effect": "Allow", "Principal": "*", "Action": ["s3:GetObject", "s3:ListBucket"]}


def test_anonymous_readers_need_a_public_bucket(
    bucket: str, folder: Path, tmp_path: Path, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"s3://{bucket}/predictors"
    Registry(url).publish(folder, "rdpo", "v1.0.0")
    for variable in remote.SECRETS:
        monkeypatch.delenv(variable)
    with pytest.raises(RegistryError, match=r"access denied, reading rdpo/versions/v1.0.0.json \(.*\); check the AWS_\* cred"):
        Registry(url, anonymous=True).pull("rdpo", "v1.0.0", tmp_path / "out")
    resources = [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"]
    policy = {"Version": "2012-10-17", "Statement": [READ_ALL | {"Resource": resources}]}
    get_backend("s3")["123456789012"]["aws"].put_bucket_policy(bucket, json.dumps(policy).encode())
    assert Registry(url, anonymous=True).pull("rdpo", "latest", tmp_path / "out") == "v1.0.0"
    with pytest.raises(RegistryError, match="access denied, writing rdpo/objects/"):
        Registry(url, anonymous=True).publish(folder, "rdpo", "v2.0.0")
    assert pauses == []


def test_an_endpoint_that_cannot_be_reached_is_tried_four_times(
    tmp_path: Path, bucket: str, pauses: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(NoAnswerError, match=r"^s3://bucket: reading rdpo/versions/v1.0.0.json failed 4 times \(Endpoint"):
            Registry("s3://bucket").pull("rdpo", "v1.0.0", tmp_path / "out")
    assert pauses == [0.5, 1.0, 2.0]
    warnings = capsys.readouterr().err.splitlines()
    assert [line.rsplit(";", 1)[1] for line in warnings] == [" again in 0.5 s", " again in 1.0 s", " again in 2.0 s"]


def test_an_endpoint_that_never_answers_is_given_up(
    tmp_path: Path, bucket: str, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "TIMEOUTS", {"connect_timeout": 0.2, "read_timeout": 0.2})
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(NoAnswerError, match=r"failed 4 times \(ReadTimeoutError: "):
            Registry("s3://bucket").pull("rdpo", "v1.0.0", tmp_path / "out")
    assert pauses == [0.5, 1.0, 2.0]


def test_a_bad_endpoint_is_told_at_once(
    tmp_path: Path, bucket: str, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost")
    with pytest.raises(RegistryError, match="Invalid endpoint: localhost; check AWS_ENDPOINT_URL"):
        Registry("s3://bucket").pull("rdpo", "v1.0.0", tmp_path / "out")
    assert pauses == []


class Flaky(ThreadingHTTPServer):
    """A proxy to an S3 server; `faults` are what happens to the next requests instead."""

    def __init__(self, target: str) -> None:
        super().__init__(("127.0.0.1", 0), FlakyHandler)
        self.target = target.removeprefix("http://")
        self.faults: list[str] = []
        self.requests = 0


class FlakyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        assert isinstance(self.server, Flaky)
        self.server.requests += 1
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        fault = self.server.faults.pop(0) if self.server.faults else ""
        if fault.isdigit():
            self.answer(int(fault), b"<Error><Code>Fault</Code><Message>Later</Message></Error>")
            return
        connection = http.client.HTTPConnection(self.server.target)
        connection.request(self.command, self.path, body, dict(self.headers))
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        if fault == "lost":
            self.close_connection = True
        else:
            self.answer(answer.status, data, cut=fault == "cut")

    do_PUT = do_GET  # noqa: N815, as http.server has it

    def answer(self, status: int, data: bytes, cut: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = self.close_connection or cut

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002, as http.server has it
        pass


@pytest.fixture
def flaky(endpoint: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Flaky]:
    with Flaky(endpoint) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("fault", ["500", "503", "429", "cut", "lost"])
def test_passing_errors_are_waited_out(
    fault: str, flaky: Flaky, bucket: str, folder: Path, tmp_path: Path, pauses: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    found = Registry(f"s3://{bucket}/predictors")
    if fault != "cut":
        flaky.faults = [fault, fault]
    found.publish(folder, "rdpo", "v1.0.0")
    flaky.faults = [fault, fault]
    found.pull("rdpo", "v1.0.0", tmp_path / "out")
    assert load_predictor(tmp_path / "out").provenance == {"seed": 1}
    assert flaky.faults == []
    assert pauses == {"cut": [0.5, 1.0], "lost": [0.5, 0.5]}.get(fault, [0.5, 1.0, 0.5, 1.0])  # aiohttp tries lost ones again
    assert len(capsys.readouterr().err.splitlines()) == len(pauses)


def test_a_record_whose_answer_was_lost_is_published(flaky: Flaky, bucket: str, folder: Path, pauses: list[float]) -> None:
    flaky.faults = ["", "", "", "", "lost"]  # a look at the record, three objects, then the record itself
    Registry(f"s3://{bucket}/predictors").publish(folder, "rdpo", "v1.0.0")
    assert flaky.faults == []
    assert Registry(f"s3://{bucket}/predictors").resolve("rdpo", "latest") == "v1.0.0"


def test_an_endpoint_that_stays_down_is_given_up(
    flaky: Flaky, bucket: str, folder: Path, tmp_path: Path, pauses: list[float]
) -> None:
    flaky.faults = ["503"] * 10
    with pytest.raises(NoAnswerError, match=r"failed 4 times \(OSError: .*Later\); check the network"):
        Registry(f"s3://{bucket}/predictors").pull("rdpo", "v1.0.0", tmp_path / "out")
    assert (flaky.requests, pauses) == (4, [0.5, 1.0, 2.0])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("status", ["400", "404", "405"])
def test_what_will_not_pass_is_told_at_once(status: str, flaky: Flaky, bucket: str, folder: Path, pauses: list[float]) -> None:
    flaky.faults = ["", status]
    with pytest.raises(
        RegistryError, match=r"refused, writing rdpo/objects/.* \(.*Later\); check the URL and AWS_ENDPOINT_URL"
    ):
        Registry(f"s3://{bucket}/predictors").publish(folder, "rdpo", "v1.0.0")
    assert pauses == []


def test_messages_are_one_line_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "long/secret\n")
    assert scrub.scrubbed("a long/secret\n\x1b[2Jat 'http://user:pass@word@host/x', user:pass@host") == (
        "a [AWS_SECRET_ACCESS_KEY] [2Jat [credentials]@host/x', [credentials]@host"
    )
    assert scrub.scrubbed("file:///a@b: rdpo@v1.0.0") == "file:///a@b: rdpo@v1.0.0"
    assert len(scrub.scrubbed("a:" * 10**6)) == scrub.MESSAGE + len(" ... ")


def test_no_command_ever_prints_credentials(
    bucket: str, flaky: Flaky, folder: Path, tmp_path: Path, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, out, runner = f"s3://{bucket}/predictors", str(tmp_path / "out"), CliRunner()

    def check(expected: int, message: str, app: object, *arguments: str) -> None:
        result = runner.invoke(app, arguments)  # type: ignore[arg-type]
        assert result.exit_code == expected, result.output
        assert message in result.output
        shown = result.output + repr(result.exception) + repr(result.exc_info)
        assert not any(hidden in shown for hidden in (*HIDDEN, "in-the-url"))
        assert expected == 0 or len(result.stderr.splitlines()) == 1 + len(pauses)
        pauses.clear()

    check(0, "published at", publish.app, str(folder), "rdpo@v1.0.0", "--remote", url)
    check(0, "rdpo v1.0.0 in", pull.app, "rdpo@latest", "--remote", url, "--out", out)
    check(1, "access denied", pull.app, "rdpo@latest", "--remote", url, "--out", out, "--anonymous")
    check(1, "no such bucket", pull.app, "rdpo@latest", "--remote", "s3://missing", "--out", out)
    check(1, "found no rdpo@v3.0.0", pull.app, "rdpo@v3.0.0", "--remote", url, "--out", out)
    check(1, "a URL with credentials", pull.app, "rdpo@v3.0.0", "--remote", "s3://a:in-the-url@b/", "--out", out)
    flaky.faults = ["503"] * 4
    check(1, "failed 4 times", publish.app, str(folder), "rdpo@v2.0.0", "--remote", url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:in-the-url@127.0.0.1:1")
    check(1, "failed 4 times", pull.app, "rdpo@latest", "--remote", url, "--out", out)
    check(1, "failed 4 times", pull.app, "rdpo@latest", "--remote", url, "--out", out, "--anonymous")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "user:in-the-url@host")
    check(1, "", pull.app, "rdpo@latest", "--remote", url, "--out", out)

    def echo(*args: object) -> None:  # a server that repeats what it was sent
        raise OSError(f"no\n{HIDDEN} at https://user:in-the-url@host/x")

    monkeypatch.setattr(remote, "sync", echo)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{flaky.server_port}")
    check(1, " at [credentials]@host/x", pull.app, "rdpo@latest", "--remote", url, "--out", out)
