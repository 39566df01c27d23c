"""A learned table as an artifact: predictor.safetensors beside predictor.json. Data only, nothing in it is ever executed."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from solvers.afs import AFS
from solvers.epd import EPDTable
from solvers.integrate import check_grid
from solvers.table import Solver, StepTable

FORMAT_VERSION = 1
TENSORS, RECORD = "predictor.safetensors", "predictor.json"


@dataclass(frozen=True)
class Predictor:
    """A learned table with what it was learned for; a Solver on the grid `sigmas`.

    Attributes:
        table: its numbers.
        sigmas: the grid it was learned on, float64 (num_steps,).
        afs: whether its first evaluation is the analytical one.
        backbone: name of the frozen model and sha256 of its weights.
        guidance_scale: guidance it was learned with.
        provenance: where it comes from, as plain JSON: stage, parameters, seed, teacher or sha256 of the parent's tensors, and
            metrics.
    """

    table: EPDTable
    sigmas: Tensor
    afs: bool
    backbone: dict[str, str]
    guidance_scale: float
    provenance: dict[str, Any]

    def __call__(self, step: int, sigmas: Tensor) -> StepTable:
        solver: Solver = AFS(self.table) if self.afs else self.table
        return solver(step, sigmas)


def save_predictor(predictor: Predictor, folder: Path) -> None:
    """Write the two files of a predictor into an existing folder; the same predictor gives the same bytes."""
    fields = dataclasses.fields(predictor.table)
    tensors = save({f.name: getattr(predictor.table, f.name).detach().contiguous() for f in fields})
    record = {
        "format_version": FORMAT_VERSION,
        "family": "epd",
        "num_steps": predictor.table.num_steps,
        "num_points": predictor.table.num_points,
        "afs": predictor.afs,
        "sigmas": predictor.sigmas.tolist(),
        "backbone": predictor.backbone,
        "guidance_scale": predictor.guidance_scale,
        "provenance": predictor.provenance,
        "sha256": hashlib.sha256(tensors).hexdigest(),
    }
    (folder / TENSORS).write_bytes(tensors)
    (folder / RECORD).write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")


def load_predictor(folder: Path | str) -> Predictor:
    """Read a predictor's folder and check it.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not what `save_predictor` writes, with the file, what was found and what would be valid.
    """
    folder = Path(folder)
    record = _read_record(folder / RECORD)
    data = (folder / TENSORS).read_bytes()
    found = hashlib.sha256(data).hexdigest()
    _require(found == record["sha256"], folder / TENSORS, f"sha256 {found}", f"{record['sha256']}, as its record says")
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ValueError(f"{folder / TENSORS}: {error}; valid: a safetensors file") from error
    names = [f.name for f in dataclasses.fields(EPDTable)]
    _require(sorted(tensors) == sorted(names), folder / TENSORS, f"tensors {sorted(tensors)}", f"{sorted(names)}")
    shape = (record["num_steps"] - 1, record["num_points"])
    for name, value in tensors.items():
        place = folder / TENSORS / name
        _require(tuple(value.shape) == shape, place, f"shape {tuple(value.shape)}", f"{shape}, as its record says")
        _require(value.dtype == torch.float64, place, f"{value.dtype}", "torch.float64")
        _require(bool(value.isfinite().all()), place, "a number that is not finite", "finite numbers")
    table = EPDTable(**tensors)
    inside = bool(((table.position > 0) & (table.position < 1)).all())
    _require(inside, folder / TENSORS / "position", f"{table.position.tolist()}", "numbers between 0 and 1")
    for name in ("direction_scale", "time_scale"):
        value = tensors[name]
        _require(bool((value > 0).all()), folder / TENSORS / name, f"{value.tolist()}", "positive numbers")
    total = table.weight.sum(-1)
    sums_to_one = torch.allclose(total, torch.ones_like(total), rtol=0, atol=1e-6)
    _require(sums_to_one, folder / TENSORS / "weight", f"sums {total.tolist()}", "1 for each interval")
    numbers = all(type(sigma) is float for sigma in record["sigmas"])
    _require(numbers, folder / RECORD, f"sigmas: {record['sigmas']}", "a list of floating-point numbers")
    sigmas = torch.tensor(record["sigmas"], dtype=torch.float64)
    check_grid(sigmas)
    _require(len(sigmas) == record["num_steps"], folder / RECORD, f"{len(sigmas)} sigmas", f"{record['num_steps']}")
    return Predictor(
        table=table,
        sigmas=sigmas,
        afs=record["afs"],
        backbone=record["backbone"],
        guidance_scale=record["guidance_scale"],
        provenance=record["provenance"],
    )


RECORD_TYPES: dict[str, type] = {
    "format_version": int,
    "family": str,
    "num_steps": int,
    "num_points": int,
    "afs": bool,
    "sigmas": list,
    "backbone": dict,
    "guidance_scale": float,
    "provenance": dict,
    "sha256": str,
}


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); valid: a predictor's record") from error
    _require(isinstance(record, dict), path, type(record).__name__, "an object")
    _require(set(record) == set(RECORD_TYPES), path, f"keys {sorted(record)}", f"{sorted(RECORD_TYPES)}")
    for key, kind in RECORD_TYPES.items():
        _require(type(record[key]) is kind, path, f"{key}: {record[key]!r}", f"{key} of type {kind.__name__}")
    version, family = record["format_version"], record["family"]
    _require(version == FORMAT_VERSION, path, f"format_version {version}", f"{FORMAT_VERSION}")
    _require(family == "epd", path, f"family {family!r}", "'epd'")
    return record


def _require(holds: bool, place: Path, found: str, valid: str) -> None:
    if not holds:
        raise ValueError(f"{place}: {found}; valid: {valid}")
