"""A learned table as an artifact: its numbers, their record, a model card. Data only, nothing in it is ever executed."""

import hashlib
import json
import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from solvers.afs import AFS
from solvers.card import model_card
from solvers.families import RECORD, SETTINGS, TENSORS, Table, put_together, require, taken_apart
from solvers.integrate import check_grid
from solvers.table import Solver, StepTable

FORMAT_VERSION = 1
LARGEST_NUMBER = 10**15
CARD = "README.md"
FILES = (TENSORS, RECORD, CARD)
"""What a predictor's folder holds."""

Difference = Literal["backbone", "guidance_scale", "sigmas"]
"""What a predictor may be used for that it was not made for, if the caller names it."""


@dataclass(frozen=True)
class Backbone:
    """The frozen model that a predictor was learned for.

    Attributes:
        name: its id on the hub, or a name of one's own.
        revision: what pins its weights: a commit of the hub's repository, or the sha256 of a file; null where it is not known.
        licence: of its weights.
        pipeline: the diffusers pipeline that runs it; null where there is none.
    """

    name: str
    revision: str | None
    licence: str
    pipeline: str | None = None


@dataclass(frozen=True)
class Metric:
    """A figure that was measured with a predictor.

    Attributes:
        name: what was measured.
        value: the mean, or an estimate of the whole.
        interval: half of its 95 % interval.
        n: images.
        data: on which noise and prompts.
    """

    name: str
    value: float
    interval: float
    n: int
    data: str


@dataclass(frozen=True)
class Predictor:
    """A learned table with what it was learned for; a Solver on the grid `sigmas`.

    Attributes:
        table: its numbers.
        sigmas: the grid it was learned on, or with, float64 (num_steps,).
        afs: whether its first evaluation is the analytical one.
        backbone: the frozen model.
        guidance_scale: guidance it was learned with.
        provenance: where it comes from, as plain JSON: stage, parameters, seed, teacher or sha256 of the parent's tensors.
        metrics: what was measured with it, of data that it was not learned from.
    """

    table: Table
    sigmas: Tensor
    afs: bool
    backbone: Backbone
    guidance_scale: float
    provenance: dict[str, Any]
    metrics: tuple[Metric, ...] = ()

    def __call__(self, step: int, sigmas: Tensor) -> StepTable:
        if sigmas is not self.sigmas:
            self.check_sigmas(sigmas)
        solver: Solver = AFS(self.table) if self.afs else self.table
        return solver(step, sigmas)

    def check_sigmas(self, sigmas: Tensor) -> None:
        """Raise ValueError unless a grid is the predictor's own, to 1e-6 of each noise level."""
        if len(sigmas) != len(self.sigmas):
            raise ValueError(f"sigmas: {len(sigmas)} nodes; valid: {len(self.sigmas)}, as many as the table was made for")
        if not torch.allclose(sigmas.to(self.sigmas), self.sigmas, rtol=1e-6, atol=0):
            raise ValueError(
                f"sigmas: {sigmas.tolist()}; valid: the grid that the table was made for, {self.sigmas.tolist()}, "
                'or allow=["sigmas"] when it is loaded'
            )

    @property
    def serial_evaluations(self) -> int:
        """Of the network, one after the other."""
        return sum(len(self(step, self.sigmas).levels) for step in range(len(self.sigmas) - 1))

    @property
    def total_evaluations(self) -> int:
        """Of the network, rows per image; guidance in two rows doubles them."""
        tables = (self(step, self.sigmas) for step in range(len(self.sigmas) - 1))
        return sum(len(level) for table in tables for level in table.levels)

    def used_for(
        self,
        backbone: str | None = None,
        revision: str | None = None,
        guidance_scale: float | None = None,
        sigmas: Tensor | None = None,
        allow: Collection[Difference] = (),
    ) -> "Predictor":
        """The predictor as it is used, where that is what it was made for; what is None is not checked.

        Args:
            backbone: name of the model that it is used with.
            revision: of that model, compared where both are known.
            guidance_scale: that it is used with.
            sigmas: the grid that it is used on, (num_steps,).
            allow: what may differ nevertheless.

        Raises:
            ValueError: it was made for something else, and that is not allowed.
        """
        if unknown := set(allow) - set(get_args(Difference)):
            raise ValueError(f"allow: {sorted(unknown)}; valid: {', '.join(get_args(Difference))}")
        known = revision if self.backbone.revision else None
        pairs: list[tuple[Difference, object, object]] = [
            ("backbone", backbone, self.backbone.name),
            ("backbone", known, self.backbone.revision),
            ("guidance_scale", guidance_scale, self.guidance_scale),
        ]
        for what, found, valid in pairs:
            if what not in allow and found is not None and found != valid:
                raise ValueError(f'{what}: {found}; valid: {valid}, which the predictor was made for, or allow=["{what}"]')
        if sigmas is None:
            return self
        check_grid(sigmas)
        if "sigmas" not in allow or len(sigmas) != len(self.sigmas):
            self.check_sigmas(sigmas)
        return replace(self, sigmas=sigmas)


def save_predictor(predictor: Predictor, folder: Path, name: str | None = None) -> None:
    """Write the three files of a predictor into an existing folder; the same predictor gives the same bytes.

    Args:
        predictor: what is written.
        folder: an existing one.
        name: of the folder in the card, where it is to be renamed.

    Raises:
        ValueError: the predictor is not what `load_predictor` would read.
    """
    family, settings, tensors = taken_apart(predictor.table)
    data = save({name: value.detach().contiguous() for name, value in tensors.items()})
    record = {
        "format_version": FORMAT_VERSION,
        "family": family,
        "num_steps": predictor.table.num_steps,
        "num_points": predictor.table.num_points,
        "settings": settings,
        "afs": predictor.afs,
        "sigmas": predictor.sigmas.tolist(),
        "backbone": asdict(predictor.backbone),
        "guidance_scale": predictor.guidance_scale,
        "provenance": predictor.provenance,
        "metrics": [asdict(metric) for metric in predictor.metrics],
        "sha256": hashlib.sha256(data).hexdigest(),
    }
    (folder / TENSORS).write_bytes(data)
    (folder / RECORD).write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    load_predictor(folder)  # whatever is written can be read
    (folder / CARD).write_text(model_card(predictor, name or folder.name), encoding="utf-8")


def load_predictor(
    folder: Path | str,
    *,
    backbone: str | None = None,
    revision: str | None = None,
    guidance_scale: float | None = None,
    sigmas: Tensor | None = None,
    allow: Collection[Difference] = (),
) -> Predictor:
    """Read a predictor's folder and check it, and that it is what the caller needs (see `Predictor.used_for`).

    The weights of EPD's points have to sum to 1; the coefficients of a learned multistep solver need not. The card is not read.

    Raises:
        FileNotFoundError: the tensors or the record are missing.
        ValueError: a file is not what `save_predictor` writes, with the file, what was found and what would be valid; or the
            predictor was made for something else.
    """
    folder = Path(folder)
    record = _read_record(folder / RECORD)
    data = (folder / TENSORS).read_bytes()
    found = hashlib.sha256(data).hexdigest()
    require(found == record["sha256"], folder / TENSORS, f"sha256 {found}", f"{record['sha256']}, as its record says")
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ValueError(f"{folder / TENSORS}: {error}; valid: a safetensors file") from error
    numbers = all(type(sigma) is float for sigma in record["sigmas"])
    require(numbers, folder / RECORD, f"sigmas: {record['sigmas']}", "a list of floating-point numbers")
    grid = torch.tensor(record["sigmas"], dtype=torch.float64)
    try:
        check_grid(grid)
    except ValueError as error:
        raise ValueError(f"{folder / RECORD}: {error}") from error
    require(bool(grid[-1] > 0), folder / RECORD, f"sigmas: {record['sigmas']}", "positive noise levels")
    require(len(grid) == record["num_steps"], folder / RECORD, f"{len(grid)} sigmas", f"{record['num_steps']}")
    for name, value in tensors.items():
        place = folder / TENSORS / name
        require(value.dtype == torch.float64, place, f"{value.dtype}", "torch.float64")
        require(bool(value.isfinite().all()), place, "a number that is not finite", "finite numbers")
    predictor = Predictor(
        table=put_together(record, tensors, grid, folder),
        sigmas=grid,
        afs=record["afs"],
        backbone=Backbone(**record["backbone"]),
        guidance_scale=record["guidance_scale"],
        provenance=record["provenance"],
        metrics=tuple(Metric(**metric) for metric in record["metrics"]),
    )
    return predictor.used_for(backbone, revision, guidance_scale, sigmas, allow)


RECORD_TYPES: dict[str, Any] = {
    "format_version": int,
    "family": str,
    "num_steps": int,
    "num_points": int,
    "settings": dict,
    "afs": bool,
    "sigmas": list,
    "backbone": dict,
    "guidance_scale": float,
    "provenance": dict,
    "metrics": list,
    "sha256": str,
}


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); valid: a predictor's record") from error
    require(isinstance(record, dict), path, type(record).__name__, "an object")
    version = record.get("format_version")  # first: another version may have other keys
    require(type(version) is int and version == FORMAT_VERSION, path, f"format_version {version!r}", f"{FORMAT_VERSION}")
    _require_types(record, RECORD_TYPES, path)
    for key, least in (("num_steps", 2), ("num_points", 1), ("guidance_scale", 0)):
        found = record[key]
        require(math.isfinite(found) and found >= least, path, f"{key}: {found}", f"{least} or more, finite")
    _require_types(record["backbone"], get_type_hints(Backbone), path / "backbone")
    for index, metric in enumerate(record["metrics"]):
        place = path / f"metrics.{index}"
        require(isinstance(metric, dict), place, type(metric).__name__, "an object")
        _require_types(metric, get_type_hints(Metric), place)
        finite = math.isfinite(metric["value"]) and 0 <= metric["interval"] < math.inf and metric["n"] > 0
        require(finite, place, f"{metric}", "finite numbers, of one image or more")
    family = record["family"]
    require(family in SETTINGS, path, f"family {family!r}", ", ".join(SETTINGS))
    _require_types(record["settings"], SETTINGS[family], path / "settings")
    return record


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key twice among {', '.join(sorted(key for key, _ in pairs))[:200]}")
    return found


def _require_types(values: dict[str, Any], types: dict[str, Any], path: Path) -> None:
    require(set(values) == set(types), path, f"keys {sorted(values)}", f"{sorted(types)}")
    for key, kind in types.items():
        kinds = get_args(kind) or (kind,)
        valid = " or ".join(possible.__name__ for possible in kinds)
        require(type(values[key]) in kinds, path, f"{key}: {values[key]!r}", f"{key} of type {valid}")
        if type(values[key]) is int:  # the record may say any number, for which something would be made
            require(abs(values[key]) <= LARGEST_NUMBER, path, f"{key}: a number beyond {LARGEST_NUMBER}", "a smaller one")
