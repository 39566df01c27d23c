"""Sets of real images, from a zip file, a folder or a data set of the `datasets` library, as batches of uint8 tensors."""

import hashlib
import os
import re
import struct
import zlib
from collections.abc import Iterator
from io import BytesIO
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Protocol, TypeVar
from zipfile import BadZipFile, ZipFile

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from stages.files import InputError

Kind = Literal["zip", "folder", "dataset"]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")

WORKERS = 8
"""Processes at most that read and decode ahead."""

FEW = 256
"""Images for which none is worth starting."""

DAMAGED = (OSError, EOFError, RuntimeError, SyntaxError, ValueError, struct.error, zlib.error, BadZipFile)
"""What reading and decoding raise; PIL's errors about size are apart."""

T = TypeVar("T")


class Source(Protocol):
    """Files of images, in order.

    Attributes:
        place: where they are, for messages.
        names: of the files, there.
    """

    place: str
    names: list[str]

    def read(self, index: int) -> bytes: ...


class ImageSet(Dataset[Tensor]):
    """Index -> image (3, H, W), uint8: all of one size.

    Args:
        source: of the files.
        size: that images are resized and cropped to, see `rule`; None: they are as they are.

    Raises:
        InputError: when it is asked for a file that is no image, or with size None one of another size than the first.
    """

    def __init__(self, source: Source, size: int | None) -> None:
        self.source, self.size = source, size
        self._first: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.source.names)

    def __getitem__(self, index: int) -> Tensor:
        image = self._decoded(index)
        if self.size is not None:
            image = _cropped(image, self.size)
        elif index and image.size != self._first_size():
            (width, height), (wide, tall) = image.size, self._first_size()
            raise InputError(
                f"{self.source.place}: {self.source.names[0]} has {wide} x {tall} pixels, {self.source.names[index]} "
                f"{width} x {height}; valid: images of one size, or a size to resize them to"
            )
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def _first_size(self) -> tuple[int, int]:
        if self._first is None:
            self._first = self._decoded(0).size
        return self._first

    def _decoded(self, index: int) -> Image.Image:
        try:
            with Image.open(BytesIO(self.source.read(index)), formats=FORMATS) as image:
                return _rgb(image)
        except (*DAMAGED, Image.DecompressionBombError) as error:
            reason = re.sub(" <_io[^>]*>", "", str(error))
            raise InputError(
                f"{self.source.place}: {self.source.names[index]}: found no image that can be read ({reason}); "
                f"valid: {', '.join(FORMATS)}, of 8 bits"
            ) from error


def image_set(
    kind: Kind,
    path_or_id: str,
    size: int | None,
    revision: str | None = None,
    split: str | None = None,
    column: str | None = None,
    limit: int | None = None,
) -> ImageSet:
    """Images by the order of their paths, or of their data set.

    Args:
        kind: what they are in. Folders are searched with their sub-folders; hidden files are left out.
        path_or_id: the file or folder; for a data set the folder that save_to_disk wrote, or its id on the hub.
        size: see ImageSet.
        revision: of a data set on the hub, the commit.
        split, column: of a data set; None: the only one it has.
        limit: the first so many; None: all.

    Raises:
        InputError: there is no such thing, it is damaged, or has no images or fewer than asked for.
    """
    match kind:
        case "zip":
            source = _Zip(path_or_id, limit)
        case "folder":
            source = _Folder(path_or_id, limit)
        case "dataset":
            source = _Rows(path_or_id, revision, split, column, limit)
    if not source.names:
        raise InputError(f"{source.place}: found no images; valid: at least one of {', '.join(SUFFIXES)}")
    if limit is not None and len(source.names) < limit:
        raise InputError(f"{source.place}: found {len(source.names)} images; valid: at least the {limit} asked for")
    return ImageSet(source, size)


def rule(size: int | None) -> str:
    """How an ImageSet brings images to a size, for records."""
    return "as they are" if size is None else f"shorter side to {size} pixels by PIL's bicubic, centre"


def batches(
    images: ImageSet, batch_size: int, pinned: bool = False, part: range | None = None, workers: int | None = None
) -> Iterator[Tensor]:
    """Batches (B, 3, H, W), uint8, in order; the next ones are decoded meanwhile.

    Args:
        images: which.
        batch_size: the last one may be smaller.
        pinned: in page-locked memory, from which a GPU copies faster.
        part: their numbers; None: all.
        workers: processes that decode; None: as many as there are cores but one, and WORKERS at most.
    """
    part = range(len(images)) if part is None else part
    if workers is None:
        workers = 0 if len(part) < FEW else min(WORKERS, len(os.sched_getaffinity(0)) - 1)
    loader = DataLoader(_Told(images), batch_size, sampler=part, num_workers=workers, pin_memory=pinned, collate_fn=_stacked)
    for batch in loader:
        if isinstance(batch, str):
            raise InputError(batch)
        yield batch


def digest(images: ImageSet) -> str:
    """The sha256 of the list of the files' sha256 and names, as sha256sum writes it: a zip file's is that of its folder."""
    found = hashlib.sha256()
    for index, name in enumerate(images.source.names):
        try:
            contents = hashlib.sha256(images.source.read(index)).hexdigest()
        except DAMAGED as error:
            raise InputError(f"{images.source.place}: {name}: cannot be read ({error})") from error
        found.update(f"{contents}  {name}\n".encode())
    return found.hexdigest()


class _Told(Dataset[Tensor | str]):
    """Images, or what is wrong with them: an error that a worker raised would be its whole traceback here."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            return self.images[index]
        except InputError as error:
            return str(error)


def _stacked(found: list[Tensor | str]) -> Tensor | str:
    return next((each for each in found if isinstance(each, str)), None) or default_collate(found)


class _Folder:
    def __init__(self, place: str, limit: int | None) -> None:
        self.place, self.folder = place, Path(place)
        if not self.folder.is_dir():
            raise InputError(f"{place}: missing, or no folder; valid: a folder of images")
        files = (file.relative_to(self.folder).as_posix() for file in self.folder.rglob("*") if file.is_file())
        self.names = sorted(filter(_is_image, files))[:limit]

    def read(self, index: int) -> bytes:
        return (self.folder / self.names[index]).read_bytes()


class _Zip:
    """Its members; each process has a handle of its own, since a shared one has one position."""

    def __init__(self, place: str, limit: int | None) -> None:
        self.place = place
        try:
            with ZipFile(place) as opened:
                self.names = sorted({name for name in opened.namelist() if _is_image(name)})[:limit]
        except FileNotFoundError as error:
            raise InputError(f"{place}: missing; valid: a zip file of images") from error
        except DAMAGED as error:
            raise InputError(f"{place}: {error}; valid: a zip file of images") from error
        self._opened: tuple[int, ZipFile] | None = None

    def read(self, index: int) -> bytes:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), ZipFile(self.place)
        return self._opened[1].read(self.names[index])


class _Rows:
    """Of a data set; what it stores is read, and not decoded by it."""

    def __init__(self, place: str, revision: str | None, split: str | None, column: str | None, limit: int | None) -> None:
        from datasets import Image as Images  # takes seconds, which files do not need

        self.place = place if revision is None else f"{place} at {revision}"
        found = _chosen(_splits(place, revision, split), self.place, "split", split)
        columns = {name: name for name, feature in found.features.items() if isinstance(feature, Images)}
        self.column = _chosen(columns, self.place, "column of images", column)
        self.rows = found.select_columns([self.column]).cast_column(self.column, Images(decode=False))
        self.names = [f"{self.column} {row}" for row in islice(range(len(self.rows)), limit)]

    def read(self, index: int) -> bytes:
        stored = self.rows[index][self.column]
        if stored is None:
            raise ValueError("nothing")
        return stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes()


def _splits(place: str, revision: str | None, split: str | None) -> dict[str, Any]:
    """A data set's splits by name, where it is the hub's only the one that is named; a data set without any is one itself."""
    from datasets import DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetsError

    here = Path(place).is_dir()
    if not here and (revision is None or not re.fullmatch("[0-9a-f]{40}", revision)):
        raise InputError(
            f"{place}: found no such folder, and revision {revision!r}; valid: a folder that save_to_disk wrote, or an "
            "id on the hub and the 40 hexadecimal digits of its commit, since a branch moves"
        )
    try:
        found = load_from_disk(place) if here else load_dataset(place, split=split, revision=revision)
    except (*DAMAGED, LookupError, TypeError, DatasetsError) as error:
        valid = "what save_to_disk writes" if here else "a data set on the hub that this machine may read"
        raise InputError(f"{place}: {error}; valid: {valid}") from error
    if isinstance(found, DatasetDict):
        return {str(name): part for name, part in found.items()}
    return {"" if here or split is None else split: found}


def _chosen(found: dict[str, T], place: str, what: str, name: str | None) -> T:
    """The one that is named, or with None the only one."""
    if name is None and len(found) == 1:
        return next(iter(found.values()))
    if name is None or name not in found:
        there = ", ".join(filter(None, found)) or "none"
        raise InputError(f"{place}: found {what} {name!r}; valid: {there}")
    return found[name]


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")  # as macOS has them beside each


def _rgb(image: Image.Image) -> Image.Image:
    """Three channels of 8 bits; transparency is left out, as torch-fidelity does."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"mode {image.mode}, of more than 8 bits")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # the same colours, without PIL's warning
    return image.convert("RGB")


def _cropped(image: Image.Image, size: int) -> Image.Image:
    """The centre, (size, size), of an image whose shorter side is resized to `size`, by PIL itself."""
    short = min(image.size)
    wide, tall = (size * side // short for side in image.size)
    left, top = (wide - size) // 2, (tall - size) // 2
    return image.resize((wide, tall), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
