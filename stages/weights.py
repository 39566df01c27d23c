"""Where this machine keeps the files of frozen models: each set once, by the sha256 of its list, outside of any workspace."""

import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import typer
from huggingface_hub import constants

from stages.fetch import LARGE, FetchError, Folder, Origin, check_weights, checksums, short
from stages.params import Weights

VARIABLE = "PARASOL_WEIGHTS"
STORE = Path(os.environ.get(VARIABLE) or Path(constants.HF_HUB_CACHE).parent / "parasol")
"""Unless told otherwise, on the file system of the hub's cache, so that its files are linked, not copied."""

Choice = Callable[[Collection[str], str], list[str]]
"""Which files of those that there are are needed; the text names the place in errors."""


def origin(source: str, id: str | None, revision: str | None) -> Origin:  # noqa: A002
    """What a source names: hub, which needs a model's id and its revision, s3://BUCKET/PREFIX, or a folder."""
    if source == "hub":
        from stages.hub import Hub  # what each takes to import, the others need not wait for

        return Hub(id, revision)
    if source.startswith("s3://"):
        from stages.bucket import S3

        return S3(source)
    if not source or "://" in source:
        shown = "a URL with credentials or a query in it" if re.search("[@?]", source) else repr(source)
        raise FetchError(f"source: found {shown}; valid: hub, s3://BUCKET/PREFIX, or a folder's path")
    return Folder(Path(source).expanduser())


def weights_folder(weights: Weights, choose: Choice, check: Callable[[Path], None] | None = None) -> tuple[Path, str]:
    """The folder of a model's files, fetched where this machine has not got them, and the sha256 of their list.

    Args:
        weights: where they come from. With a sha256, files that are here need neither network nor source.
        choose: which files.
        check: of a folder that has all of them but the weights, before gigabytes follow; raises ValueError. Where it is given,
            what is here is read through again, too, and fetched anew if it is damaged.

    Raises:
        FetchError: they cannot be had, are damaged, or not those that were asked for.
    """
    kept, asked = STORE / (weights.sha256 or ""), weights.sha256
    if check is None and asked is not None and kept.is_dir():  # where nothing may be written, too
        return kept, asked
    with _alone(weights):
        if asked is not None and kept.is_dir():
            if listed(kept) == asked:
                _checked(kept, str(kept), check or (lambda _: None))
                return kept, asked
            shutil.rmtree(kept)
        return _fetched(weights, choose, check or (lambda _: None))


def _fetched(weights: Weights, choose: Choice, check: Callable[[Path], None]) -> tuple[Path, str]:
    source = origin(weights.source, weights.id, weights.revision)
    files = choose(source.files(), source.place)
    large = [file for file in files if file.endswith(LARGE)]
    with TemporaryDirectory(prefix=f".{_key(weights)}-", dir=STORE) as work:
        folder = Path(work) / "files"
        source.get([file for file in files if file not in large], folder)
        _checked(folder, source.place, check)
        source.get(large, folder)
        _checked(folder, source.place, check_weights)
        found = listed(folder)
        if weights.sha256 not in (None, found):
            raise FetchError(f"{source.place}: sha256 of the files' list {found}; valid: {weights.sha256}, as asked for")
        if (STORE / found).is_dir():
            shutil.rmtree(STORE / found)  # which may be damaged by now
        folder.rename(STORE / found)
    typer.echo(f"{source.place}: {len(files)} files, sha256 of their list {found}", err=True)
    return STORE / found, found


@contextmanager
def _alone(weights: Weights) -> Iterator[None]:
    """Wait until no other process of this machine fetches the same, and clear away what one that was killed left."""
    try:
        STORE.mkdir(parents=True, exist_ok=True)
        with (STORE / f".{_key(weights)}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            for left in STORE.glob(f".{_key(weights)}-*"):
                shutil.rmtree(left)
            yield
    except PermissionError as error:
        raise FetchError(f"{error.filename}: {error.strerror}; valid: {VARIABLE}, a folder that may be written") from None


def _key(weights: Weights) -> str:
    """Of a source."""
    return short(f"{weights.source} {weights.id} {weights.revision} {weights.variant}")


def _checked(folder: Path, place: str, check: Callable[[Path], None]) -> None:
    try:
        check(folder)
    except (ValueError, FetchError) as error:
        raise FetchError(f"{place}: {str(error).replace(f'{folder}/', '')}") from error


def listed(folder: Path) -> str:
    """The sha256 of the list that sha256sum makes of a folder's files, sorted by their paths."""
    lines = "".join(f"{digest}  {path}\n" for path, digest in checksums(folder).items())
    return hashlib.sha256(lines.encode()).hexdigest()
