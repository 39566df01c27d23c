"""Work that is done sample by sample: in parts, by any number of processes, kept until all of it is there."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from stages.checkpoint import Work
from stages.command import progress
from stages.files import PARTS, StageError, read_tensors, write_json, write_tensors
from stages.noise import batches
from stages.ranks import Ranks

WORK = "work.json"

Make = Callable[[range], Mapping[str, Tensor]]
"""What is computed of a batch of items: tensors whose rows are the items'."""


def by_parts(name: str, work: Work, ranks: Ranks, items: int, batch_size: int, make: Make) -> dict[str, Tensor] | None:
    """The rows of all items, (items, ...) each; None on all ranks but the first.

    Each rank makes its share of the batches and writes each as a file; where there are some from an earlier run of the same
    work, of whatever batch size and by however many ranks, it goes on from them. `forget` removes them when what they were for
    is written.

    Args:
        name: of the work, for its folder in data/parts.
        work: what decides what is computed.
        ranks: of one folder, all of them.
        items, batch_size: how many, and how many at a time.
        make: computes a batch.

    Raises:
        CheckpointError: there are parts of other work.
        StageError: a part is damaged, or another rank's are not there.
    """
    folder = PARTS / name
    if ranks.first and not _parts(folder):  # what failed before its first part is no work
        write_json(folder / WORK, work.identity)
    ranks.wait()
    if not (folder / WORK).exists():
        raise StageError(f"{folder / WORK}: missing on rank {ranks.rank}; valid: one folder for all ranks")
    work.check(folder, json.loads((folder / WORK).read_text(encoding="utf-8")))
    done = _parts(folder)
    todo = _missing(list(done), items, batch_size)
    ranks.wait()  # until all know what is to be done
    mine = todo[ranks.share(len(todo))]
    for batch in progress(mine, name, "batch", len(done)):
        rows = {key: tensor.cpu() for key, tensor in make(batch).items()}
        write_tensors(folder / f"{batch.start:08d}-{batch.stop:08d}.safetensors", rows)
    ranks.wait()
    if not ranks.first:
        return None
    done = _parts(folder)
    if sum(map(len, done)) > items:
        raise StageError(f"{folder}: parts overlap: {sorted(file.stem for file in done.values())}; valid: none, to start anew")
    if lacking := _missing(list(done), items, items):
        first, last = lacking[0].start, lacking[0].stop - 1
        raise StageError(f"{folder}: nothing of items {first} to {last}; valid: one folder for all ranks")
    read = [_read(done[batch]) for batch in sorted(done, key=lambda batch: batch.start)]
    return {key: torch.cat([part[key] for part in read]) for key in read[0]}


def forget(name: str) -> None:
    """Remove the parts of finished work."""
    shutil.rmtree(PARTS / name, ignore_errors=True)


def _parts(folder: Path) -> dict[range, Path]:
    """The items of each file."""
    files = {file: file.stem.split("-") for file in sorted(folder.glob("[0-9]*.safetensors"))}
    return {range(int(start), int(stop)): file for file, (start, stop) in files.items()}


def _missing(done: list[range], items: int, batch_size: int) -> list[range]:
    """Batches of what is not done."""
    todo, cursor = list[range](), 0
    for there in [*sorted(done, key=lambda batch: batch.start), range(items, items)]:
        gap = batches(there.start - cursor, batch_size)
        todo += [range(cursor + batch.start, cursor + batch.stop) for batch in gap]
        cursor = there.stop
    return todo


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return read_tensors(file)[0]
    except SafetensorError as error:
        raise StageError(f"{file}: damaged ({error}); valid: a whole one, or no such file, to make it again") from error
