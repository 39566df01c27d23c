"""The families of learned tables as named tensors and settings, and back, checked."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from solvers.amed import AMED
from solvers.epd import EPDTable
from solvers.multistep import MultistepTable
from solvers.table import Form

TENSORS, RECORD = "predictor.safetensors", "predictor.json"

Table = EPDTable | MultistepTable | AMED
"""What a predictor may hold; the families of its record are "epd", "multistep" and "amed"."""

SETTINGS: dict[str, dict[str, type]] = {
    "epd": {"max_order": int},
    "multistep": {"form": str},
    "amed": {"features": int, "scale_dir": float, "scale_time": float},
}
"""What the record of each family says besides."""


def taken_apart(table: Table) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """The family, settings and tensors that a table is written as."""
    match table:
        case EPDTable():
            names = EPD_TENSORS
            return "epd", {"max_order": table.max_order}, {name: getattr(table, name) for name in names}
        case MultistepTable():
            return "multistep", {"form": table.form}, {name: getattr(table, name) for name in MULTISTEP_TENSORS}
        case AMED():
            names = ("features", "scale_dir", "scale_time")
            return "amed", {name: getattr(table, name) for name in names}, dict(table.state_dict())


def put_together(record: dict[str, Any], tensors: dict[str, Tensor], sigmas: Tensor, folder: Path) -> Table:
    """The table of a record (its keys checked), its tensors and its grid (num_steps,).

    Raises:
        ValueError: names, shapes or values are not those of the family, with the place, what was found, what would be valid.
    """
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
    require(order in (1, 2, 3, 4), folder / RECORD, f"settings.max_order: {order}", "1 to 4")
    table = EPDTable(**tensors, max_order=order)
    inside = bool(((table.position > 0) & (table.position < 1)).all())
    require(inside, folder / TENSORS / "position", f"{table.position.tolist()}", "numbers between 0 and 1")
    _require_positive(tensors, ("direction_scale", "time_scale"), folder)
    total = table.weight.sum(-1)
    sums_to_one = torch.allclose(total, torch.ones_like(total), rtol=0, atol=1e-6)
    require(sums_to_one, folder / TENSORS / "weight", f"sums {total.tolist()}", "1 for each interval")
    return table


def _multistep(record: dict[str, Any], tensors: dict[str, Tensor], sigmas: Tensor, folder: Path) -> MultistepTable:
    steps, points, form = record["num_steps"] - 1, record["num_points"], record["settings"]["form"]
    require(
        sorted(tensors) == sorted(MULTISTEP_TENSORS), folder / TENSORS, f"tensors {sorted(tensors)}", f"{MULTISTEP_TENSORS}"
    )
    found = tuple(tensors["update"].shape)
    whole = len(found) == 2 and found[1] >= points and found[1] % points == 0
    require(whole, folder / TENSORS / "update", f"shape {found}", f"({steps}, W) with W a multiple of num_points, {points}")
    width = found[1]
    shapes = {
        "nodes": (steps, points),
        "stage": (steps, points, width),
        "update": (steps, width),
        "time_scale": (steps, points),
    }
    _require_shapes(tensors, shapes, folder)
    require(form in get_args(Form), folder / RECORD, f"settings.form: {form!r}", " or ".join(get_args(Form)))
    _require_positive(tensors, ("nodes", "time_scale"), folder)
    table = MultistepTable(form, **tensors)
    main = torch.allclose(table.nodes[:, 0], sigmas[:-1], rtol=1e-12)
    require(main, folder / TENSORS / "nodes", f"first points {table.nodes[:, 0].tolist()}", "the record's sigmas but the last")
    inside = bool(((table.nodes >= sigmas[-1] * (1 - 1e-9)) & (table.nodes <= sigmas[0] * (1 + 1e-9))).all())
    require(inside, folder / TENSORS / "nodes", f"{table.nodes.tolist()}", "noise levels within the record's sigmas")
    explicit = not bool(table.stage[:, 0].any()) and not bool(table.stage[..., -points:].any())
    require(explicit, folder / TENSORS / "stage", "coefficients of the main point or of the step's own outputs", "0 there")
    return table


def _amed(record: dict[str, Any], tensors: dict[str, Tensor], folder: Path) -> AMED:
    require(record["num_points"] == 1, folder / RECORD, f"num_points: {record['num_points']}", "1 for amed")
    features = record["settings"]["features"]
    require(features > 0, folder / RECORD, f"settings.features: {features}", "1 or more")
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
        require(found == shape, folder / TENSORS / name, f"shape {found}", f"{shape}, as its record says")


def _require_names(tensors: dict[str, Tensor], names: Iterable[str], folder: Path) -> None:
    require(sorted(tensors) == sorted(names), folder / TENSORS, f"tensors {sorted(tensors)}", f"{sorted(names)}")


def _require_positive(tensors: dict[str, Tensor], names: tuple[str, ...], folder: Path) -> None:
    for name in names:
        require(bool((tensors[name] > 0).all()), folder / TENSORS / name, f"{tensors[name].tolist()}", "positive numbers")


def require(holds: bool, place: Path, found: str, valid: str) -> None:
    """Raise ValueError, with the place, what was found and what would be valid, unless a condition holds."""
    if not holds:
        raise ValueError(f"{place}: {found}; valid: {valid}")
