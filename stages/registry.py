"""Published predictors in a bucket or a folder, for machines without a git checkout. What comes from there is not trusted.

Below the remote's URL, each file is whole whenever it is there:
    NAME/objects/SHA256          the files' contents: publishers of different ones never meet
    NAME/versions/v1.0.0.json    the record of a version: written last, once, and never changed
    NAME/stages/prod.json        the version that a stage stands for
"""

import fcntl
import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

from semver import Version

from solvers import load_predictor
from solvers.predictor import CARD, FILES
from stages.remote import RegistryError, Remote, connect, plainly, told, write

MAX_BYTES = 16 * 2**20
"""Of a file of a predictor; they have some kilobytes."""

RECORD_BYTES = 4096
"""More than a version's record has."""

NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
VERSION_LIKE = re.compile(r"[vV]?\d")
SHA256 = re.compile(r"[0-9a-f]{64}")
FETCH = re.compile(r"(?:(?<=\n## Use\n)|\n## Fetch\n)\n```sh\npython -m stages\.pull .*\n```\n")

TITLE = re.compile(r"# (\w[^/\n]*)\n")

Contents = dict[str, bytes]  # of each of FILES


class Registry:
    """The predictors published at a remote.

    Args:
        url: s3://BUCKET/PREFIX or file:///FOLDER.
        anonymous: read a public bucket without credentials.

    Raises:
        RegistryError: here and in every method: what is wrong in one line, without credentials. Whatever can be known to be
            wrong without the network is told before it is used.
    """

    def __init__(self, url: str, anonymous: bool = False) -> None:
        self.remote: Remote = connect(url, anonymous)

    def publish(self, folder: Path | str, name: str, version: str, stage: str | None = None) -> str:
        """Publish a predictor's folder, and let `stage` stand for it; returns the sha256 of the version's record.

        The same content may be published again, which mends it; other content under a version that exists is refused.
        """
        check_name(name)
        if _semantic(version) is None:
            raise RegistryError(f"version: found {version!r}; valid: as v1.0.0 or v1.0.0-rc.1")
        if stage is not None:
            check_stage(stage)
        contents = self._contents(Path(folder), name, version)
        record = encode(name, version, contents)
        place = f"{name}/versions/{version}.json"
        held = self._holds(place, record)
        for data in contents.values():  # again where the version is held: one may have been damaged since
            self.remote.write(f"{name}/objects/{sha256(data)}", data)
        if held:
            told(f"{name}@{version}: published already with the same content")
        else:
            try:
                self.remote.create(place, record)
            except FileExistsError:  # by another publisher in the meantime, or by a try whose answer was lost
                if not self._holds(place, record):
                    raise RegistryError(f"{self.remote.url}/{place}: made and removed by others; publish again") from None
        if stage is not None:
            self.remote.write(f"{name}/stages/{stage}.json", json.dumps({"version": version}).encode())
        return sha256(record)

    def resolve(self, name: str, version: str) -> str:
        """The version meant: v1.0.0 itself, the "latest" (a pre-release only where there is nothing else), or a stage's."""
        check_name(name)
        if _semantic(version) is not None:
            return version
        if version == "latest":
            versions = self._versions(name)
            if not versions:
                raise self._unknown(name, version)
            return max(versions, key=lambda found: (versions[found].prerelease is None, versions[found]))
        if VERSION_LIKE.match(version):
            raise RegistryError(f"version: found {version!r}; valid: as v1.0.0 or v1.0.0-rc.1, latest, or a stage's name")
        check_stage(version)
        try:
            data = self.remote.read(f"{name}/stages/{version}.json", RECORD_BYTES)
        except FileNotFoundError:
            raise self._unknown(name, version) from None
        found = re.fullmatch(rb'\{"version": "([^"]*)"\}', data)
        if not found or _semantic(found[1].decode("ascii", "replace")) is None:
            raise RegistryError(f'{name}/stages/{version}.json: found {data[:100]!r}; valid: {{"version": "v1.0.0"}}')
        return found[1].decode()

    def pull(self, name: str, version: str, out: Path | str, sha256: str | None = None) -> str:
        """Put a published predictor into a folder that is new, empty or holds one; returns the version that it is.

        What is there is replaced when all is checked, and never half: several may pull to the same folder at once.

        Args:
            name: of the predictor.
            version: what `resolve` takes.
            out: the folder.
            sha256: of the version's record, as `publish` returned it: whoever may write to the remote cannot forge that.
        """
        check_name(name)
        if sha256 is not None and not SHA256.fullmatch(sha256):
            raise RegistryError(f"sha256: found {sha256!r}; valid: 64 hexadecimal digits, as publishing printed them")
        out = Path(os.path.abspath(out))  # noqa: PTH100, no links are followed
        _check_replaceable(out)
        version = self.resolve(name, version)
        contents = self._download(name, version, sha256)
        with plainly(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as work:
                new = Path(work) / "new"
                _unpack(contents, new, f"{name}@{version}")
                _replace(out, new, Path(work) / "old")
        return version

    def _contents(self, folder: Path, name: str, version: str) -> Contents:
        """The files as they are published: a copy of the folder, checked, and its card with the line that fetches it."""
        contents = {}
        for file in FILES:
            try:
                with plainly(folder / file, FileNotFoundError), (folder / file).open("rb") as handle:
                    contents[file] = handle.read(MAX_BYTES + 1)
            except FileNotFoundError:
                raise RegistryError(f"{folder / file}: missing; valid: a predictor's folder, with {', '.join(FILES)}") from None
            if len(contents[file]) > MAX_BYTES:
                raise RegistryError(f"{folder / file}: more than {MAX_BYTES} bytes; valid: at most as many")
        with plainly(Path(gettempdir())), TemporaryDirectory() as work:
            _unpack(contents, Path(work) / "new", str(folder))
        try:
            card = FETCH.sub("", contents[CARD].decode("utf-8"))  # of a predictor that was pulled
        except UnicodeDecodeError as error:
            raise RegistryError(f"{folder / CARD}: {error}; valid: a text in UTF-8") from None
        title = TITLE.match(card)  # the folder that the lines below it read from
        out, remote = shlex.quote(title[1] if title else name), shlex.quote(self.remote.url)
        line = f"python -m stages.pull {name}@{version} --remote {remote} --out {out}"
        return contents | {CARD: _with_line(card, line).encode()}

    def _holds(self, place: str, record: bytes) -> bool:
        """Whether a version is published already; raises if it is with other content."""
        try:
            found = self.remote.read(place, RECORD_BYTES)
        except FileNotFoundError:
            return False
        if found != record:
            raise RegistryError(
                f"{self.remote.url}/{place}: published already with other content, record sha256 {sha256(found)}; this one has "
                f"{sha256(record)}; valid: a version that is not published yet, since none ever changes"
            )
        return True

    def _download(self, name: str, version: str, pin: str | None) -> Contents:
        """The files of a version, as its record says they are."""
        place = f"{name}/versions/{version}.json"
        try:
            record = self.remote.read(place, RECORD_BYTES)
        except FileNotFoundError:
            raise self._unknown(name, version) from None
        if pin is not None and sha256(record) != pin:
            raise RegistryError(f"{self.remote.url}/{place}: sha256 {sha256(record)}; valid: {pin}, as asked for")
        contents = {}
        for file, (expected, size) in decode(record, name, version, f"{self.remote.url}/{place}").items():
            source = f"{self.remote.url}/{name}/objects/{expected}"
            try:
                data = self.remote.read(f"{name}/objects/{expected}", size)
            except FileNotFoundError:
                raise RegistryError(f"{source}: missing, though {place} names it as its {file}") from None
            if len(data) != size or sha256(data) != expected:
                found = f"more than {size}" if len(data) > size else len(data)
                raise RegistryError(
                    f"{source}: {found} bytes, sha256 {sha256(data)}; valid: {size} bytes with that of its name"
                )
            contents[file] = data
        return contents

    def _versions(self, name: str) -> dict[str, Version]:
        found = [file.removesuffix(".json") for file in self.remote.names(f"{name}/versions") if file.endswith(".json")]
        return {version: number for version in found if (number := _semantic(version))}

    def _unknown(self, name: str, version: str) -> RegistryError:
        """An error that lists what there is."""
        try:
            versions = self._versions(name)
            stages = [file.removesuffix(".json") for file in self.remote.names(f"{name}/stages")]
            there = [*sorted(versions, key=versions.__getitem__), *sorted(filter(NAME.fullmatch, stages))]
            others = sorted(other for other in self.remote.names("") if NAME.fullmatch(other) and other != name)
        except RegistryError as error:  # a reader need not be allowed to list
            return RegistryError(f"{name}@{version}: found nothing of that name; what there is cannot be listed: {error}")
        if there:
            return RegistryError(f"{self.remote.url}: found no {name}@{version}; valid: {', '.join(there)}")
        return RegistryError(f"{self.remote.url}: found no {name}; valid: {', '.join(others) or 'none yet, publish one'}")


def parse(spec: str) -> tuple[str, str]:
    """Name and version of NAME@v1.0.0, NAME@latest, NAME@STAGE or, as gto writes it, NAME#STAGE."""
    found = re.fullmatch(r"([^@#]+)(?:@([^@#]+)|#([a-z0-9-]+))", spec)
    if not found or found[3] == "latest":
        raise RegistryError(f"predictor: found {spec!r}; valid: NAME@v1.0.0, NAME@latest, NAME@STAGE or NAME#STAGE")
    return found[1], found[2] or found[3]


def check_name(name: str) -> None:
    """Raise unless it may name a predictor."""
    if not NAME.fullmatch(name):
        raise RegistryError(f"name: found {name!r}; valid: a to z, 0 to 9 and, between them, '-'")


def check_stage(stage: str) -> None:
    """Raise unless it may name a stage."""
    if not NAME.fullmatch(stage) or stage == "latest" or VERSION_LIKE.match(stage):
        valid = "a to z, 0 to 9 and, between them, '-'; not 'latest', and nothing like a version"
        raise RegistryError(f"stage: found {stage!r}; valid: {valid}")


def sha256(data: bytes) -> str:
    """In hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def encode(name: str, version: str, contents: Contents) -> bytes:
    """The record of a version; of the same contents, the same bytes."""
    return _record(name, version, {file: (sha256(data), len(data)) for file, data in contents.items()})


def decode(record: bytes, name: str, version: str, place: str) -> dict[str, tuple[str, int]]:
    """Hash and size of each file in the record of this version; any other bytes than `encode` makes are refused."""
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        files = {file: (entry["sha256"], entry["size"]) for file, entry in json.loads(record)["files"].items()}
        valid = set(files) == set(FILES) and all(
            type(hashed) is str and SHA256.fullmatch(hashed) and type(size) is int and 0 <= size <= MAX_BYTES
            for hashed, size in files.values()
        )
        if valid and record == _record(name, version, files):
            return files
    raise RegistryError(
        f"{place}: found {record[:200]!r}; valid: the record of {name}@{version}, with sha256 and size (at most {MAX_BYTES}) "
        f"of {', '.join(FILES)}, as publishing writes it"
    )


def _record(name: str, version: str, files: dict[str, tuple[str, int]]) -> bytes:
    entries = {file: {"sha256": files[file][0], "size": files[file][1]} for file in FILES}
    record = {"format_version": 1, "name": name, "version": version, "files": entries}
    return (json.dumps(record, indent=2) + "\n").encode()


def _semantic(version: str) -> Version | None:
    """The version if it is one, written as gto does: with a v, and without build metadata."""
    with suppress(ValueError):
        if version.startswith("v") and version.isascii() and "+" not in version:
            return Version.parse(version[1:])
    return None


def _with_line(card: str, line: str) -> str:
    block = f"\n```sh\n{line}\n```\n"
    head, use, tail = card.partition("\n## Use\n")
    return head + use + block + tail if use else f"{card.rstrip()}\n\n## Fetch\n{block}"


def _unpack(contents: Contents, folder: Path, place: str) -> None:
    """Write the files into a new folder and check them as a predictor; errors name the place that they are from."""
    folder.mkdir()
    for file, data in contents.items():
        write(folder / file, data)
    try:
        load_predictor(folder)
    except (ValueError, TypeError, ArithmeticError) as error:
        message = str(error).replace(str(folder), place)
        raise RegistryError(message if message.startswith(place) else f"{place}: {message}") from None


def _check_replaceable(out: Path) -> None:
    """Raise unless nothing but a predictor would be lost with it."""
    found = "the working directory" if out == Path.cwd() else "a link" if out.is_symlink() else ""
    try:
        with plainly(out, FileNotFoundError, NotADirectoryError), os.scandir(out) as entries:
            others = sorted(e.name for e in entries if e.name not in FILES or not e.is_file(follow_symlinks=False))
    except FileNotFoundError:
        others = []
    except NotADirectoryError:
        found, others = "what is no folder", []
    if found or others:
        found = found or f"a folder with {others[0]!r}"
        raise RegistryError(f"{out}: found {found}; valid: a new folder, an empty one, or a predictor's, which is replaced")


def _replace(out: Path, new: Path, old: Path) -> None:
    """Rename `new` to `out`, and what was there to `old`."""
    with _alone(out.parent):
        _check_replaceable(out)
        if out.exists():
            out.rename(old)
        try:
            new.rename(out)
        finally:
            if old.exists() and not out.exists():
                old.rename(out)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process is at this point with the folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # of file systems without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
