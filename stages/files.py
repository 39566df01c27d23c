"""Reading what another stage made, and writing so that nothing half-written is ever seen."""

import csv
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

BACKBONE = Path("models/backbone")
DISTILLED = Path("models/distilled")
RDPO = Path("models/rdpo")
METRICS = Path("models/metrics.json")
REFS = Path("data/refs.npz")
TEACHER = Path("data/teacher.safetensors")
SAMPLES = Path("data/samples")
SCORES = Path("data/scores")
RESULTS = Path("results")
LIVE = Path("data/live/rdpo")
CHECKPOINTS = Path("data/checkpoints")  # none of these
FAILED = Path("data/failed")
PARTS = Path("data/parts")
LOGS = Path("data/logs")
LOCKS = Path("data/locks")  # is an output:
TIMES = Path("data/times")  # what they hold differs from run to run

MADE_BY = {
    BACKBONE: "backbone",
    METRICS: "metrics",
    REFS: "refs",
    TEACHER: "teacher",
    DISTILLED: "distill",
    RDPO: "rdpo",
    SAMPLES: "sample",
    SCORES: "evaluate",
    RESULTS / "held_out.json": "refs",
    RESULTS / "distill.csv": "distill",
    RESULTS / "rdpo.csv": "rdpo",
    RESULTS: "evaluate",  # the rest of them
}


NO_SPACE = "no space left"


class StageError(Exception):
    """A stage cannot go on, for a reason that its message tells in full."""


class TemporaryError(Exception):
    """What may pass by itself: the same command may succeed later. Errors that are known to be so are this, too."""


class RolloutError(StageError):
    """Images, their rewards, or what was to be learned from them are not what they have to be."""


class CheckpointError(StageError):
    """There is a checkpoint of other work."""


class InputError(StageError):
    """An upstream file is missing or not what its stage writes."""


@contextmanager
def reading(path: Path) -> Iterator[Path]:
    """Turn what goes wrong while an upstream file or folder is read into an InputError that names the stage that makes it."""
    stage = next(stage for made, stage in MADE_BY.items() if made == path or made in path.parents)
    name = f"{stage}@{path.stem}" if stage in ("sample", "evaluate") else stage
    try:
        yield path
    except torch.OutOfMemoryError:  # a RuntimeError, but not the file's fault
        raise
    except FileNotFoundError as error:
        raise InputError(f"{error.filename or path}: missing; stage {name} makes it: dvc repro {name}") from error
    except (ValueError, KeyError, RuntimeError, EOFError, BadZipFile, SafetensorError) as error:
        raise InputError(
            f"{path}: not what stage {name} writes ({error}); make it again: dvc repro --force --single-item {name}"
        ) from error


def require(path: Path, what: str, found: object, valid: object) -> None:
    """Raise ValueError unless what was found in a file is what this run needs; for use inside `reading`."""
    if found != valid:
        raise ValueError(f"{path}: {what} {found}; valid: {valid}")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path` to write a file or a folder to, and rename it to `path` if all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    _remove(temporary)
    try:
        yield temporary
        _sync(temporary)
        if path.is_dir():  # a file is replaced by the rename itself
            old = path.with_name(f".{path.name}.old")
            _remove(old)
            path.rename(old)
            temporary.rename(path)
            _remove(old)
        else:
            temporary.replace(path)
    except OSError as error:
        if error.errno == errno.ENOSPC and error.strerror != NO_SPACE:  # what was written inside has said so for itself
            raise OSError(errno.ENOSPC, NO_SPACE, str(path)) from error
        raise
    finally:
        _remove(temporary)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a safetensors file, and the values written with them."""
    with safe_open(path, framework="pt") as file:
        values = json.loads((file.metadata() or {}).get("values", "{}"))
        return {name: file.get_tensor(name) for name in file.keys()}, values  # noqa: SIM118


def write_tensors(path: Path, tensors: dict[str, Tensor], values: dict[str, Any] | None = None) -> None:
    """Write a safetensors file atomically, with JSON values in its header: in one entry, since it orders entries at random."""
    with atomic(path) as temporary:
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        temporary.write_bytes(save(contiguous, {"values": json.dumps(values or {})}))


def write_json(path: Path, value: Any) -> None:
    """Write JSON that strict parsers read, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one or more rows with the same keys, atomically."""
    with atomic(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def sha256(file: Path) -> str:
    """Of a file's contents."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Have the disk hold what was written, before the rename makes it visible."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
