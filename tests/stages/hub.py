"""A hub on this machine, as far as its client asks it for the files of a model, and a process that starts clients quickly."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

ID = "someone/tiny"
REVISION = hashlib.sha1(b"pinned").hexdigest()

STARTER = """
import json, os, sys, warnings
import stages.command, stages.remote  # slow ones; the hub's client reads the environment when it is imported
assert "huggingface_hub" not in sys.modules
for line in sys.stdin:
    task = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.chdir(task["folder"])
        os.environ |= task["environment"]
        printed = open("printed", "w", buffering=1)
        os.dup2(printed.fileno(), 1), os.dup2(printed.fileno(), 2)
        warnings.simplefilter("error")
        try:
            exec(task["code"], {})
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush(), sys.stdout.flush(), os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Starter:
    """Runs code in new processes that have imported everything but the hub's client; what they print lands in a file."""

    def __init__(self) -> None:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
        root = Path(__file__).parents[2]
        self.process = subprocess.Popen(
            [sys.executable, "-c", STARTER], cwd=root, env=clean | {"NO_PROXY": "127.0.0.1"}, **pipes
        )

    def start(self, code: str, folder: Path, environment: dict[str, str]) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        task = {"code": code, "folder": str(folder), "environment": environment}
        print(json.dumps(task), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def wait(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()


class Request(NamedTuple):
    method: str
    path: str
    start: int
    """Of the range."""
    token: str


class FakeHub(ThreadingHTTPServer):
    """Serves the files of one model, at one revision."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.requests: list[Request] = []
        self.refusal: tuple[int, dict[str, str]] | None = None
        self.cut: dict[str, int] = {}  # once, after so many bytes
        self.stall: dict[str, int] = {}  # likewise, until released
        self.stalled, self.released = threading.Event(), threading.Event()
        self.wrong: dict[str, int] = {}  # so many times

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def got(self, path: str) -> list[Request]:
        """The requests for a file's contents."""
        return [r for r in self.requests if r.method == "GET" and r.path == f"/{ID}/resolve/{REVISION}/{path}"]


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[FakeHub]:
    with FakeHub(files) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.released.set()
        server.shutdown()


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin", ".ckpt"))


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def etag(path: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if is_large(path) else git_hash(data)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub  # type: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.server.requests.append(Request(self.command, path, start, token))
        if self.server.refusal is not None:
            self.answer(self.server.refusal[0], b"", self.server.refusal[1])
        elif not path.removeprefix("/api/models").startswith(f"/{ID}/"):
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif REVISION not in path:
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif path == f"/api/models/{ID}/revision/{REVISION}":
            siblings = [self.told(file, "rfilename", "blobId", "sha256") for file in self.server.files]
            self.answer(200, json.dumps({"id": ID, "sha": REVISION, "siblings": siblings}).encode(), {})
        elif path == f"/api/models/{ID}/tree/{REVISION}":
            tree = [self.told(file, "path", "oid", "oid") | {"type": "file"} for file in self.server.files]
            self.answer(200, json.dumps(tree).encode(), {})
        else:
            self.file(path.removeprefix(f"/{ID}/resolve/{REVISION}/"), start)

    do_HEAD = do_GET  # noqa: N815, as http.server has it

    def told(self, file: str, path: str, blob: str, sha256: str) -> dict[str, Any]:
        data = self.server.files[file]
        lfs = {sha256: hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return {path: file, "size": len(data), blob: git_hash(data)} | ({"lfs": lfs} if is_large(file) else {})

    def file(self, path: str, start: int) -> None:
        data = self.server.files[path]
        headers = {"X-Repo-Commit": REVISION, "ETag": f'"{etag(path, data)}"'}
        if is_large(path):
            headers |= {"X-Linked-Etag": f'"{etag(path, data)}"', "X-Linked-Size": str(len(data))}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        if self.server.wrong.get(path, 0) and self.command == "GET":
            self.server.wrong[path] -= 1
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.answer(206 if start else 200, data[start:], headers, path)

    def answer(self, status: int, data: bytes, headers: dict[str, str], path: str = "") -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if path in self.server.cut:
            data = data[: self.server.cut.pop(path)]
            self.close_connection = True
        if path in self.server.stall:
            self.wfile.write(data[: self.server.stall.pop(path)])
            self.server.stalled.set()
            self.server.released.wait(20)
            self.close_connection = True
        else:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002, as http.server has it
        pass
