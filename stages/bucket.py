"""A model's files from S3."""

import errno
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from stages.command import progress
from stages.fetch import DOWNLOADS, FetchError, digest, short, shown, target_of
from stages.files import atomic
from stages.remote import BUCKET, Bucket, RegistryError
from stages.scrub import SECRETS

BLOCK = 2**25
"""Bytes that are asked of S3 at once."""


class S3:
    """The objects below a prefix, with the environment's credentials, or anonymously where there are none."""

    def __init__(self, url: str) -> None:
        if not (found := BUCKET.fullmatch(url)):
            shown = "a URL with credentials or a query in it" if re.search("[@?]", url) else repr(url)
            raise FetchError(f"source: found {shown}; valid: hub, s3://BUCKET/PREFIX, or a folder's path")
        root = found[1]
        key, secret, _ = (os.environ.get(name) for name in SECRETS)
        self.place = f"s3://{root}"
        with self._told():
            self._bucket = _Objects(root, anonymous=not (key and secret))

    def files(self) -> dict[str, int]:
        return {path: size for path, (size, _) in self._listed().items()}

    def get(self, paths: Sequence[str], folder: Path) -> None:
        targets = {path: target_of(folder, path) for path in paths}
        listed = self._listed()
        if lacking := sorted(set(paths) - set(listed)):
            raise FetchError(f"{self.place}: found no {', '.join(lacking)}; valid: {shown(listed)}")
        with self._told():
            parts = {path: self._whole(path, *listed[path]) for path in paths}  # all, before a kill can lose what was moved
        now = self._listed()
        if changed := [path for path in parts if now.get(path) != listed[path]]:
            for path in changed:
                shutil.rmtree(parts[path].parent)
            raise FetchError(
                f"{self.place}: found {shown(changed)} changed by now; valid: objects that stay as they are; try again"
            )
        for path, target in targets.items():
            with atomic(target) as temporary:
                shutil.move(parts[path], temporary)
            shutil.rmtree(parts[path].parent)

    def _listed(self) -> dict[str, tuple[int, str]]:
        """Sizes and ETags."""
        with self._told():
            if found := self._bucket.objects():
                return found
        raise FetchError(f"{self.place}: found no files; valid: a prefix below which a model's files lie")

    def _whole(self, path: str, size: int, etag: str) -> Path:
        """The complete part of a file, compared with its ETag where that is the contents' MD5."""
        part = DOWNLOADS / short(f"{self.place}/{path} {etag}") / f"{PurePosixPath(path).name}.part"
        part.parent.mkdir(parents=True, exist_ok=True)
        found = ""
        for _ in range(2):
            self._receive(path, size, part)
            found = digest(part, "md5") if re.fullmatch("[0-9a-f]{32}", etag) else etag
            if found == etag or self._bucket.is_encrypted(path):
                return part
            part.unlink()
        raise FetchError(f"{self.place}/{path}: came twice, found MD5 {found}; valid: {etag}, its ETag; try again")

    def _receive(self, path: str, size: int, part: Path) -> None:
        """Continue a part, block by block, to its size."""
        try:
            with part.open("ab") as file:
                if (done := file.tell()) > size:
                    file.truncate(done := 0)
                for start in progress(range(done, size, BLOCK), path, "block", done // BLOCK):
                    file.write(self._bucket.block(path, start, min(start + BLOCK, size)))
                    file.flush()
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise OSError(errno.ENOSPC, "no space left", str(part)) from error
            raise

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except RegistryError as error:
            raise FetchError(str(error)) from error  # which may be known to pass
        except FileNotFoundError as error:
            raise FetchError(f"{self.place}: gone while it was read ({error}); valid: objects that stay") from None


class _Objects(Bucket):
    """A bucket's objects and pieces of them; FileNotFoundError for those that are not there."""

    def objects(self) -> dict[str, tuple[int, str]]:
        """Their sizes and ETags."""
        found = self._tried("listing", lambda: self.fs.find(self.root, detail=True), FileNotFoundError)
        names = [name for name in found if not name.endswith("/")]  # those stand for folders
        return {name.removeprefix(f"{self.root}/"): (found[name]["size"], found[name]["ETag"].strip('"')) for name in names}

    def is_encrypted(self, path: str) -> bool:
        """Whether its ETag is something else than MD5, since the key is the owner's."""
        bucket, key, _ = self.fs.split_path(f"{self.root}/{path}")
        read = lambda: self.fs.call_s3("head_object", Bucket=bucket, Key=key)  # noqa: E731
        head = self._tried(f"reading {path}", read, FileNotFoundError)
        return head.get("ServerSideEncryption", "AES256") != "AES256" or "SSECustomerAlgorithm" in head

    def block(self, path: str, start: int, end: int) -> bytes:
        def read() -> bytes:
            data = self.fs.cat_file(f"{self.root}/{path}", start=start, end=end)
            if len(data) != end - start:
                raise OSError(f"{len(data)} bytes of {end - start}")
            return data

        return self._tried(f"reading {path}", read, FileNotFoundError)
