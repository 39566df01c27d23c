"""A model's files from the hub, at a pinned revision, by way of its cache on this machine."""

import errno
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from huggingface_hub import HfApi, constants, get_cached_repo_tree, hf_hub_url, is_offline_mode
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import http_get, repo_folder_name
from huggingface_hub.utils import WeakFileLock, build_hf_headers, validate_repo_id

from stages.command import progress
from stages.fetch import DOWNLOADS, FetchError, Folder, hash_like, put, short, shown, target_of
from stages.files import TemporaryError, write_json

T = TypeVar("T")

WAIT = 2.5
"""Seconds for the hub's first answer, the look-up of its name included."""

HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class UnreachableError(FetchError):
    """The hub does not answer, or is not to be asked."""


class NoAnswerError(UnreachableError, TemporaryError):
    """The hub cannot be reached, or answers that it cannot answer now."""


class _Entry(NamedTuple):
    """What the hub says of a file; the hash is SHA-256, or for small files git's, and names the cache's blob."""

    size: int
    hash: str


class Hub:
    """A model's repository at one commit, through the hub's cache on this machine; what that holds needs no network."""

    def __init__(self, id: str | None, revision: str | None) -> None:  # noqa: A002
        try:
            validate_repo_id(id)
        except ValueError:
            id = None  # noqa: A001
        if not id:
            raise FetchError("source hub: found no id of a model; valid: OWNER/NAME")
        if not revision or not re.fullmatch("[0-9a-f]{40}", revision):
            raise FetchError(
                f"{id}: found revision {revision!r}, which is not pinned; valid: the 40 hexadecimal digits of a commit, "
                "since a branch moves"
            )
        self.id, self.revision = id, revision
        self.place = f"{id} at {revision} on the hub"
        self._cache = Path(constants.HF_HUB_CACHE)
        self._storage = self._cache / repo_folder_name(repo_id=id, repo_type="model")
        self._snapshot = self._storage / "snapshots" / revision
        self._said = DOWNLOADS / f"{short(f'{id} {revision}')}.json"

    def files(self) -> dict[str, int]:
        try:
            entries = self._known() or self._ask([])
        except UnreachableError:
            cached = Folder(self._snapshot)
            if not self._snapshot.is_dir():
                raise
            self.place = f"{self.id} at {self.revision} in the hub's cache {self._cache} (and no network)"
            return cached.files()
        return {path: entry.size for path, entry in entries.items()}

    def get(self, paths: Sequence[str], folder: Path) -> None:
        targets = {path: target_of(folder, path) for path in paths}
        known = self._known()
        faults = {path: self._fault(path, known) for path in progress(paths, "hub's cache", "file")}
        if missing := [path for path in paths if faults[path] is not None]:
            entries = self._ask([path + (faults[path] or "") for path in missing])
            if strange := [path for path in missing if path not in entries]:
                raise FetchError(f"{self.place}: found no {', '.join(strange)}; valid: {shown(entries)}")
            for path in missing:
                self._download(path, entries[path])
        for path, target in targets.items():
            put(self._snapshot / path, target, link=True)

    def _known(self) -> dict[str, _Entry]:
        """What the hub said of this commit to the client or to this module; nothing if neither asked. It cannot change."""
        with suppress(CachedRepoTreeNotFoundError, ValueError):
            tree = get_cached_repo_tree(self.id, revision=self.revision)
            return {f.path: _Entry(f.lfs.size, f.lfs.sha256) if f.lfs else _Entry(f.size, f.blob_id) for f in tree}
        with suppress(FileNotFoundError, ValueError, TypeError):
            return {path: _Entry(*entry) for path, entry in json.loads(self._said.read_bytes()).items()}
        return {}

    def _fault(self, path: str, known: dict[str, _Entry]) -> str | None:
        """What is wrong with a cached file: "" if it is not there, None if nothing is."""
        file = self._snapshot / path
        if not file.is_file():
            return ""
        # a link's own target: what that links to, where revisions share blobs, has another name. Without links, and before
        # the hub was asked, there is nothing to compare with
        expected = known[path].hash if path in known else file.readlink().name if file.is_symlink() else ""
        found = hash_like(file, expected) if HASH.fullmatch(expected) else expected
        return None if found == expected else f" (corrupt: found hash {found}; valid: {expected})"

    def _ask(self, missing: Sequence[str]) -> dict[str, _Entry]:
        """What the hub says of the commit's files, in one request; UnreachableError, which names the missing ones, soon."""
        if is_offline_mode():
            name = "HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else "TRANSFORMERS_OFFLINE"
            raise UnreachableError(self._absent(f"{name} is set", missing))
        api = HfApi()
        try:
            with self._told():
                info = _within(WAIT, lambda: api.model_info(self.id, revision=self.revision, timeout=2, files_metadata=True))
                entries = {file.rfilename: _entry(file) for file in info.siblings or []}
        except NoAnswerError as error:
            raise NoAnswerError(self._absent(str(error), missing)) from None
        write_json(self._said, entries)
        return entries

    def _absent(self, reason: str, missing: Sequence[str]) -> str:
        return (
            f"{self.place}: {reason}, and the cache {self._cache} lacks {', '.join(missing) or 'all of its files'}; valid: "
            f"that cache, as `hf download {self.id} --revision {self.revision}` fills it on a machine with network, or the "
            "files in a folder, backbone.source=FOLDER, or at S3, backbone.source=s3://BUCKET/PREFIX"
        )

    def _download(self, path: str, entry: _Entry) -> None:
        """Have the cache hold a file. The client would begin anew after a kill: here the part stays, and is continued."""
        blob = self._storage / "blobs" / entry.hash
        part = blob.with_name(f"{entry.hash}.incomplete")
        lock = self._cache / ".locks" / self._storage.name / f"{entry.hash}.lock"  # the client's own
        with self._told(part):
            for file in (blob, lock):
                file.parent.mkdir(parents=True, exist_ok=True)
            with WeakFileLock(lock):
                found = hash_like(blob, entry.hash) if blob.is_file() else ""  # another revision's
                for _ in range(2):
                    if found != entry.hash:
                        found = self._receive(path, entry, part, blob)
                if found != entry.hash:
                    raise FetchError(
                        f"{path} of {self.place}: came twice, found hash {found}; valid: {entry.hash}; a proxy may change "
                        "what passes it: try another network"
                    )
            pointer = self._snapshot / path
            pointer.parent.mkdir(parents=True, exist_ok=True)
            pointer.unlink(missing_ok=True)
            try:
                pointer.symlink_to(os.path.relpath(blob, pointer.parent))
            except OSError:  # a file system without
                put(blob, pointer, link=True)

    def _receive(self, path: str, entry: _Entry, part: Path, blob: Path) -> str:
        """The hash of what came, which replaces the blob if it is right, and else is gone."""
        if part.is_file() and part.stat().st_size > entry.size:
            part.unlink()
        url = hf_hub_url(self.id, path, revision=self.revision)
        headers = build_hf_headers() | {"Accept-Encoding": "identity"}  # else ranges would be of compressed bytes
        with part.open("ab") as file:
            size = file.tell()
            http_get(url, file, resume_size=size, headers=headers, expected_size=entry.size, displayed_filename=path)
        found = hash_like(part, entry.hash)
        if found == entry.hash:
            part.replace(blob)
        else:
            part.unlink()
        return found

    @contextmanager
    def _told(self, part: Path | None = None) -> Iterator[None]:
        """Turn what the client raises into FetchErrors; a full disk stays one, of the part."""
        kept = f"; what came is kept in {part}, the same command goes on" if part else ""
        try:
            yield
        except GatedRepoError:
            raise FetchError(
                f"{self.place}: access denied, it is gated; accept the licence on the model's page, "
                f"{constants.ENDPOINT}/{self.id}, while logged in, and set HF_TOKEN to a token of that account"
            ) from None
        except RevisionNotFoundError:
            raise FetchError(f"{self.id}: found no revision {self.revision} on the hub; valid: one of its commits") from None
        except RepositoryNotFoundError:
            raise FetchError(
                f"{self.id}: found no such model at {constants.ENDPOINT}; valid: OWNER/NAME of one, and if it is private, an "
                "HF_TOKEN that may read it"
            ) from None
        except HfHubHTTPError as error:
            status, said = error.response.status_code, error.server_message or error
            if status in (401, 403):
                raise FetchError(
                    f"{self.place}: refused, {status} ({said}); valid: no HF_TOKEN, or one that holds and may read this model"
                ) from None
            kind = NoAnswerError if status == 429 or status >= 500 else FetchError
            raise kind(f"{constants.ENDPOINT} answered {status} ({said}){kept}") from None
        except (HTTPError, TimeoutError) as error:
            why = f"{type(error).__name__}: {error}".removesuffix(": ")
            raise NoAnswerError(f"{constants.ENDPOINT} cannot be reached ({why}){kept}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise FetchError(f"{constants.ENDPOINT}: found no hub there ({error}); check HF_ENDPOINT and the network") from None
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise OSError(errno.ENOSPC, "no space left", str(error.filename or part)) from error
            if error.errno is None:  # less came than the hub said would
                raise NoAnswerError(f"{part}: {error}{kept}") from None
            raise FetchError(
                f"{error.filename or part}: {error.strerror}; valid: HF_HOME in a folder that may be written"
            ) from None


def _entry(file: Any) -> _Entry:
    """ValueError unless the hub told a file's size and hash: that becomes a file's name."""
    entry = _Entry(file.lfs.size, file.lfs.sha256) if file.lfs else _Entry(file.size, file.blob_id)
    if type(entry.size) is not int or not HASH.fullmatch(entry.hash or ""):
        raise ValueError(f"{file.rfilename}: size {entry.size}, hash {entry.hash}")
    return entry


def _within(seconds: float, call: Callable[[], T]) -> T:
    """What a call returns; TimeoutError if that takes longer. A look-up of names cannot be interrupted, but left behind."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
