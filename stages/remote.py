"""Where predictors are published: few operations on a bucket or a folder, with errors that say what to do about them."""

import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol, TypeVar

import typer
from botocore.exceptions import BotoCoreError, ClientError
from botocore.exceptions import ConnectionError as NoConnectionError
from fsspec.asyn import sync
from s3fs import S3FileSystem
from s3fs.core import S3_RETRYABLE_ERRORS

from stages.files import TemporaryError
from stages.scrub import SECRETS, scrubbed

T = TypeVar("T")

PAUSES = (0.5, 1.0, 2.0)
"""Seconds between the tries of an operation on a bucket."""

TIMEOUTS = {"connect_timeout": 5, "read_timeout": 10}
"""Seconds that one try waits for a connection, and then for each piece of an answer."""

BUCKET = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9](?:/(?!\.{1,2}(?:/|$))[A-Za-z0-9_.=+-]+)*)/?")


class RegistryError(Exception):
    """What is wrong with a registry, its remote or what lies there: one line without credentials."""

    def __init__(self, message: str) -> None:
        super().__init__(scrubbed(message))


class NoAnswerError(RegistryError, TemporaryError):
    """A bucket that cannot be reached, or answers that it cannot answer now."""


def told(message: str) -> None:
    """On standard error, without credentials."""
    typer.echo(scrubbed(message), err=True)


class Remote(Protocol):
    """Files below a URL, by paths relative to it.

    Raises:
        FileNotFoundError: of `read`, for a file that is not there.
        FileExistsError: of `create`.
        RegistryError: whatever else goes wrong.
    """

    url: str

    def read(self, path: str, limit: int) -> bytes:
        """A file, of which at most `limit` + 1 bytes are read."""
        ...

    def write(self, path: str, data: bytes) -> None:
        """A file, whole or not at all, whether it exists or not."""
        ...

    def create(self, path: str, data: bytes) -> None:
        """A file that does not exist: of several that try, one succeeds."""
        ...

    def names(self, path: str) -> list[str]:
        """What a folder holds; none if it does not exist."""
        ...


def connect(url: str, anonymous: bool) -> Remote:
    """The remote of a URL, s3://BUCKET/PREFIX or file:///FOLDER; nothing is sent yet."""
    if found := BUCKET.fullmatch(url):
        return Bucket(found[1], anonymous)
    if url.startswith("file:///") and url.isprintable():
        return Folder(Path(os.path.normpath(url.removeprefix("file://"))))
    shown = "a URL with credentials or a query in it" if re.search("[@?]", url) else repr(url)
    raise RegistryError(
        f"remote: found {shown}; valid: s3://BUCKET/PREFIX, with credentials and AWS_ENDPOINT_URL in the environment, or "
        "file:///FOLDER"
    )


class Bucket:
    """A bucket, or a prefix in one; the endpoint is botocore's, from AWS_ENDPOINT_URL."""

    def __init__(self, root: str, anonymous: bool) -> None:
        key, secret, token = (None if anonymous else os.environ.get(name) or None for name in SECRETS)
        if not anonymous and not (key and secret):
            raise RegistryError(
                "remote: no AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment; valid: both, or --anonymous "
                "to read a public bucket"
            )
        self.url = f"s3://{root}"
        self.root = root
        self.fs: Any = S3FileSystem(
            anon=anonymous,
            key=key,
            secret=secret,
            token=token,
            config_kwargs={**TIMEOUTS, "retries": {"mode": "standard", "total_max_attempts": 1}},
            skip_instance_cache=True,
            use_listings_cache=False,
        )
        self.fs.retries = 1  # those are here

    def read(self, path: str, limit: int) -> bytes:
        def read() -> bytes:
            bucket, key, _ = self.fs.split_path(f"{self.root}/{path}")
            body = self.fs.call_s3("get_object", Bucket=bucket, Key=key)["Body"]
            return sync(self.fs.loop, _drain, body, limit)  # type: ignore[return-value], which fsspec does not declare

        return self._tried(f"reading {path}", read, FileNotFoundError)

    def write(self, path: str, data: bytes) -> None:
        self._tried(f"writing {path}", lambda: self.fs.pipe_file(f"{self.root}/{path}", data))

    def create(self, path: str, data: bytes) -> None:
        self._tried(f"writing {path}", lambda: self.fs.pipe_file(f"{self.root}/{path}", data, mode="create"), FileExistsError)

    def names(self, path: str) -> list[str]:
        def read() -> list[str]:
            return [name.rsplit("/", 1)[-1] for name in self.fs.ls(f"{self.root}/{path}", detail=False)]

        with suppress(FileNotFoundError):
            return self._tried(f"listing {path}", read, FileNotFoundError)
        return []

    def _tried(self, what: str, operation: Callable[[], T], *meant: type[OSError]) -> T:
        """An operation, again after an error that may pass; those that are meant stay."""
        last = ""
        for pause in (*PAUSES, None):
            try:
                return operation()
            except (*S3_RETRYABLE_ERRORS, NoConnectionError, OSError) as error:
                code, status = _answer(error)
                if code == "NoSuchBucket":
                    raise RegistryError(f"{self.url}: no such bucket; check its name and AWS_ENDPOINT_URL") from None
                if isinstance(error, meant) and not error.errno:  # of s3fs; those with a number are of files on this machine
                    raise
                if isinstance(error, PermissionError):
                    raise RegistryError(
                        f"{self.url}: access denied, {what} ({error}); check the AWS_* credentials and what they may do: who "
                        "may not list is denied what does not exist, too"
                    ) from None
                if 400 <= status < 500 and status not in (408, 409, 429) and code not in ("RequestTimeout", "SlowDown"):
                    raise RegistryError(f"{self.url}: refused, {what} ({error}); check the URL and AWS_ENDPOINT_URL") from None
                last = f"{type(error).__name__}: {error}"
            except (BotoCoreError, ValueError) as error:
                raise RegistryError(f"{self.url}: {error}; check AWS_ENDPOINT_URL and the other AWS_* variables") from None
            if pause is not None:
                told(f"{self.url}: {what} failed ({last}); again in {pause} s")
                time.sleep(pause)
        raise NoAnswerError(
            f"{self.url}: {what} failed {len(PAUSES) + 1} times ({last}); check the network and AWS_ENDPOINT_URL, then "
            "give the same command again"
        )


async def _drain(body: Any, limit: int) -> bytes:
    data = bytearray()
    try:
        while len(data) <= limit and (more := await body.read(limit + 1 - len(data))):
            data += more
    finally:
        body.close()
    return bytes(data)


def _answer(error: BaseException) -> tuple[str, int]:
    """The server's error code and HTTP status; "" and 0 if it gave none."""
    if not isinstance(error.__cause__, ClientError):
        return "", 0
    response: Any = error.__cause__.response
    return response["Error"].get("Code", ""), response["ResponseMetadata"].get("HTTPStatusCode", 0)


class Folder:
    """A folder on this machine or on a file system that several mount."""

    def __init__(self, root: Path) -> None:
        self.url = f"file://{root}"
        self.root = root

    def read(self, path: str, limit: int) -> bytes:
        with plainly(self.root / path, FileNotFoundError), (self.root / path).open("rb") as file:
            return file.read(limit + 1)

    def write(self, path: str, data: bytes) -> None:
        if not self.root.parent.is_dir():  # all of the path may be mistyped
            raise RegistryError(f"{self.url}: no folder {self.root.parent}; valid: a folder in one that exists")
        with plainly(self.root / path), _beside(self.root / path, data) as temporary:
            temporary.rename(self.root / path)

    def create(self, path: str, data: bytes) -> None:
        with plainly(self.root / path, FileExistsError), _beside(self.root / path, data) as temporary:
            (self.root / path).hardlink_to(temporary)

    def names(self, path: str) -> list[str]:
        if not self.root.is_dir():
            raise RegistryError(f"{self.url}: no such folder; check the URL")
        with suppress(FileNotFoundError), plainly(self.root / path, FileNotFoundError):
            return [file.name for file in (self.root / path).iterdir()]
        return []


@contextmanager
def _beside(path: Path, data: bytes) -> Iterator[Path]:
    """A temporary file with the data, of another name for each process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        write(temporary, data)
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def write(path: Path, data: bytes) -> None:
    """A new file, on the disk when this returns."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def plainly(path: Path, *meant: type[OSError]) -> Iterator[None]:
    """Turn what the file system refuses at a path, as on a full disk, into a RegistryError; errors that are meant stay."""
    try:
        yield
    except meant:
        raise
    except OSError as error:
        where = f" ({error.filename})" if error.filename not in (None, str(path)) else ""
        raise RegistryError(f"{path}: {error.strerror or error}{where}") from None
