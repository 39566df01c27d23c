"""A learned table as an artifact: its numbers, their record, a model card. Data only, nothing in it is ever executed."""

import hashlib
import json
import math
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from solvers.afs import AFS
from solvers.amed import AMED
from solvers.card import model_card
from solvers.epd import EPDTable
from solvers.integrate import check_grid
from solvers.multistep import MultistepTable
from solvers.table import Form, Solver, StepTable

FORMAT_VERSION = 1
LARGEST_NUMBER = 10**15
TENSORS, RECORD, CARD = "predictor.safetensors", "predictor.json", "README.md"

FILES = (TENSORS, RECORD, CARD)
"""What a predictor's folder holds."""

Table = EPDTable | MultistepTable | AMED
"""What a predictor may hold; the families of its record are "epd", "multistep" and "amed"."""

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
    family, settings, tensors = _taken_apart(predictor.table)
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
    _require(found == record["sha256"], folder / TENSORS, f"sha256 {found}", f"{record['sha256']}, as its record says")
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise ValueError(f"{folder / TENSORS}: {error}; valid: a safetensors file") from error
    numbers = all(type(sigma) is float for sigma in record["sigmas"])
    _require(numbers, folder / RECORD, f"sigmas: {record['sigmas']}", "a list of floating-point numbers")
    grid = torch.tensor(record["sigmas"], dtype=torch.float64)
    try:
        check_grid(grid)
    except ValueError as error:
        raise ValueError(f"{folder / RECORD}: {error}") from error
    _require(bool(grid[-1] > 0), folder / RECORD, f"sigmas: {record['sigmas']}", "positive noise levels")
    _require(len(grid) == record["num_steps"], folder / RECORD, f"{len(grid)} sigmas", f"{record['num_steps']}")
    for name, value in tensors.items():
        place = folder / TENSORS / name
        _require(value.dtype == torch.float64, place, f"{value.dtype}", "torch.float64")
        _require(bool(value.isfinite().all()), place, "a number that is not finite", "finite numbers")
    predictor = Predictor(
        table=_put_together(record, tensors, grid, folder),
        sigmas=grid,
        afs=record["afs"],
        backbone=Backbone(**record["backbone"]),
        guidance_scale=record["guidance_scale"],
        provenance=record["provenance"],
        metrics=tuple(Metric(**metric) for metric in record["metrics"]),
    )
    return predictor.used_for(backbone, revision, guidance_scale, sigmas, allow)


def _taken_apart(table: Table) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """Family, settings and tensors."""
    match table:
        case EPDTable():
            names = EPD_TENSORS
            return "epd", {"max_order": table.max_order}, {name: getattr(table, name) for name in names}
        case MultistepTable():
            return "multistep", {"form": table.form}, {name: getattr(table, name) for name in MULTISTEP_TENSORS}
        case AMED():
            names = ("features", "scale_dir", "scale_time")
            return "amed", {name: getattr(table, name) for name in names}, dict(table.state_dict())


def _put_together(record: dict[str, Any], tensors: dict[str, Tensor], sigmas: Tensor, folder: Path) -> Table:
    """The table of a record and its tensors, checked."""
    match record["family"]:
        case "epd":
            return _epd(record, tensors, folder)
        case "multistep":
            return _multistep(record, tensors, sigmas, folder)
        case _:
            return _amed(record, tensors, folder)


EPD_TENSORS = ("position", "weight", "direction_scale", "time_scale")
MULTISTEP_TENSORS = ("nodes", "stage", "update", "time_scale")


def _epd(record: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> EPDTable:
    shape = (record["num_steps"] - 1, record["num_points"])
    _require_shapes(tensors, dict.fromkeys(EPD_TENSORS, shape), folder)
    order = record["settings"]["max_order"]
    _require(order in (1, 2, 3, 4), folder / RECORD, f"settings.max_order: {order}", "1 to 4")
    table = EPDTable(**tensors, max_order=order)
    inside = bool(((table.position > 0) & (table.position < 1)).all())
    _require(inside, folder / TENSORS / "position", f"{table.position.tolist()}", "numbers between 0 and 1")
    _require_positive(tensors, ("direction_scale", "time_scale"), folder)
    total = table.weight.sum(-1)
    sums_to_one = torch.allclose(total, torch.ones_like(total), rtol=0, atol=1e-6)
    _require(sums_to_one, folder / TENSORS / "weight", f"sums {total.tolist()}", "1 for each interval")
    return table


def _multistep(record: dict[str, Any], tensors: dict[str, Tensor], sigmas: Tensor, folder: Path) -> MultistepTable:
    steps, points, form = record["num_steps"] - 1, record["num_points"], record["settings"]["form"]
    _require(
        sorted(tensors) == sorted(MULTISTEP_TENSORS), folder / TENSORS, f"tensors {sorted(tensors)}", f"{MULTISTEP_TENSORS}"
    )
    found = tuple(tensors["update"].shape)
    whole = len(found) == 2 and found[1] >= points and found[1] % points == 0
    _require(whole, folder / TENSORS / "update", f"shape {found}", f"({steps}, W) with W a multiple of num_points, {points}")
    width = found[1]
    shapes = {
        "nodes": (steps, points),
        "stage": (steps, points, width),
        "update": (steps, width),
        "time_scale": (steps, points),
    }
    _require_shapes(tensors, shapes, folder)
    _require(form in get_args(Form), folder / RECORD, f"settings.form: {form!r}", " or ".join(get_args(Form)))
    _require_positive(tensors, ("nodes", "time_scale"), folder)
    table = MultistepTable(form, **tensors)
    main = torch.allclose(table.nodes[:, 0], sigmas[:-1], rtol=1e-12)
    _require(main, folder / TENSORS / "nodes", f"first points {table.nodes[:, 0].tolist()}", "the record's sigmas but the last")
    inside = bool(((table.nodes >= sigmas[-1] * (1 - 1e-9)) & (table.nodes <= sigmas[0] * (1 + 1e-9))).all())
    _require(inside, folder / TENSORS / "nodes", f"{table.nodes.tolist()}", "noise levels within the record's sigmas")
    explicit = not bool(table.stage[:, 0].any()) and not bool(table.stage[..., -points:].any())
    _require(explicit, folder / TENSORS / "stage", "coefficients of the main point or of the step's own outputs", "0 there")
    return table


def _amed(record: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> AMED:
    _require(record["num_points"] == 1, folder / RECORD, f"num_points: {record['num_points']}", "1 for amed")
    features = record["settings"]["features"]
    _require(features > 0, folder / RECORD, f"settings.features: {features}", "1 or more")
    try:
        with torch.device("meta"):  # shapes alone, however large the record says they are
            table = AMED(record["num_steps"], **record["settings"])
    except ValueError as error:
        raise ValueError(f"{folder / RECORD}: settings.{error}") from error
    _require_shapes(tensors, {name: tuple(value.shape) for name, value in table.state_dict().items()}, folder)
    table.load_state_dict(tensors, assign=True)
    return table.requires_grad_(False)


def _require_shapes(tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    _require_names(tensors, shapes, folder)
    for name, shape in shapes.items():
        found = tuple(tensors[name].shape)
        _require(found == shape, folder / TENSORS / name, f"shape {found}", f"{shape}, as its record says")


def _require_names(tensors: dict[str, Tensor], names: Iterable[str], folder: Path) -> None:
    _require(sorted(tensors) == sorted(names), folder / TENSORS, f"tensors {sorted(tensors)}", f"{sorted(names)}")


def _require_positive(tensors: dict[str, Tensor], names: tuple[str, ...], folder: Path) -> None:
    for name in names:
        _require(bool((tensors[name] > 0).all()), folder / TENSORS / name, f"{tensors[name].tolist()}", "positive numbers")


SETTINGS: dict[str, dict[str, type]] = {
    "epd": {"max_order": int},
    "multistep": {"form": str},
    "amed": {"features": int, "scale_dir": float, "scale_time": float},
}
"""What the record of each family says besides."""

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
    _require(isinstance(record, dict), path, type(record).__name__, "an object")
    version = record.get("format_version")  # first: another version may have other keys
    _require(type(version) is int and version == FORMAT_VERSION, path, f"format_version {version!r}", f"{FORMAT_VERSION}")
    _require_types(record, RECORD_TYPES, path)
    for key, least in (("num_steps", 2), ("num_points", 1), ("guidance_scale", 0)):
        found = record[key]
        _require(math.isfinite(found) and found >= least, path, f"{key}: {found}", f"{least} or more, finite")
    _require_types(record["backbone"], get_type_hints(Backbone), path / "backbone")
    for index, metric in enumerate(record["metrics"]):
        place = path / f"metrics.{index}"
        _require(isinstance(metric, dict), place, type(metric).__name__, "an object")
        _require_types(metric, get_type_hints(Metric), place)
        finite = math.isfinite(metric["value"]) and 0 <= metric["interval"] < math.inf and metric["n"] > 0
        _require(finite, place, f"{metric}", "finite numbers, of one image or more")
    family = record["family"]
    _require(family in SETTINGS, path, f"family {family!r}", ", ".join(SETTINGS))
    _require_types(record["settings"], SETTINGS[family], path / "settings")
    return record


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError(f"a key twice among {', '.join(sorted(key for key, _ in pairs))[:200]}")
    return found


def _require_types(values: dict[str, Any], types: dict[str, Any], path: Path) -> None:
    _require(set(values) == set(types), path, f"keys {sorted(values)}", f"{sorted(types)}")
    for key, kind in types.items():
        kinds = get_args(kind) or (kind,)
        valid = " or ".join(possible.__name__ for possible in kinds)
        _require(type(values[key]) in kinds, path, f"{key}: {values[key]!r}", f"{key} of type {valid}")
        if type(values[key]) is int:  # the record may say any number, for which something would be made
            _require(abs(values[key]) <= LARGEST_NUMBER, path, f"{key}: a number beyond {LARGEST_NUMBER}", "a smaller one")


def _require(holds: bool, place: Path, found: str, valid: str) -> None:
    if not holds:
        raise ValueError(f"{place}: {found}; valid: {valid}")
