"""The report's curves, as images for an HTML page."""

import base64
import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stages.files import RESULTS, reading, require

DISTILL, RDPO = RESULTS / "distill.csv", RESULTS / "rdpo.csv"
WIDE, SMALL = (5.5, 3.6), (3.6, 2.7)
"""Inches."""
SLOTS = 28
"""Labels that have room beside each other."""

Points = list[dict[str, float]]


@dataclass(frozen=True)
class Image:
    """An image inside a page: a data URL, and what it shows in words."""

    source: str
    words: str


@dataclass(frozen=True)
class Cost:
    """A sampler's Frechet distance, half its 95 % interval, and what its images cost."""

    sampler: str
    distance: float
    half: float
    serial: float
    total: float


def curves(costs: Sequence[Cost], label: str, origin: str) -> list[Image]:
    """Frechet distance (by that label, to that origin) against cost, and how the tables were learned."""
    distill, rdpo = read_csv(DISTILL), read_csv(RDPO)
    with reading(RDPO):
        require(RDPO, "deployed rows", sum(point["deployed"] for point in rdpo), 1)
    return [
        cost_curve(costs, label, "serial"),
        cost_curve(costs, label, "total"),
        distillation_curve(distill),
        reward_curve(rdpo),
        trade_curve(rdpo, f"FD to {origin}"),
    ]


def changes(metrics: Sequence[str]) -> list[Image]:
    """The change of each of these during RDPO, of those that were followed and moved."""
    points = read_csv(RDPO)
    return [change_curve(points, name) for name in metrics if any(point.get(f"{name}_change") for point in points)]


def cost_curve(costs: Sequence[Cost], label: str, kind: str) -> Image:
    """Frechet distance against serial or total evaluations. Samplers of the same cost are drawn side by side."""
    spent = [cost.serial if kind == "serial" else cost.total for cost in costs]
    low, high = min(spent) / 1.6, max(spent) * 1.6
    figure, axes = plot(WIDE, f"Distance against {kind} evaluations", f"{kind} evaluations", label)
    for here in sorted(set(spent)):
        group = sorted((cost for cost, x in zip(costs, spent, strict=True) if x == here), key=lambda cost: cost.distance)
        for position, cost in enumerate(group):
            x = here * (high / low) ** ((position - (len(group) - 1) / 2) / SLOTS)
            axes.errorbar(x, cost.distance, cost.half, marker="o", markersize=4, color=f"C{costs.index(cost) % 10}")
            place = {"xytext": (0, 4), "textcoords": "offset points", "rotation": 90, "ha": "center", "va": "bottom"}
            axes.annotate(cost.sampler, (x, cost.distance + cost.half), fontsize=8, **place)
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_xticks(sorted(set(spent)), [f"{x:g}" for x in sorted(set(spent))])
    axes.minorticks_off()
    least, most = min(cost.distance for cost in costs), max(cost.distance + cost.half for cost in costs)
    if least > 0:  # the labels stand above, in a third of the height
        axes.set_yscale("log", nonpositive="clip")
        bottom = min([least / 2, *(cost.distance - cost.half for cost in costs if cost.half < cost.distance)])
        bottom = max(bottom / 1.2, least / 4)
        axes.set_ylim(bottom, most * (most / bottom) ** 0.45)
        axes.set_yticks(ticks(bottom, most), [f"{tick:g}" for tick in ticks(bottom, most)])
        axes.minorticks_off()
    else:
        axes.set_ylim(0, 1.5 * (most or 1))
    return svg(figure, f"{label} against {kind} evaluations, with 95 % intervals, a point for each sampler")


def ticks(bottom: float, top: float) -> list[float]:
    """1, 2, 5, 10 and so on, of those between."""
    decades = range(math.floor(math.log10(bottom)), math.ceil(math.log10(top)) + 1)
    return [tick for decade in decades for tick in (10.0**decade, 2 * 10.0**decade, 5 * 10.0**decade) if bottom <= tick <= top]


def distillation_curve(points: Points) -> Image:
    """Training and validation error by iteration."""
    figure, axes = plot(WIDE, "Distillation", "iteration", "RMSE to the teacher")
    for key, label in (("train_rmse", "training noise"), ("validation_rmse", "validation noise")):
        axes.plot(column(points, "iteration"), column(points, key), marker=".", label=label)
    axes.set_yscale("log")
    axes.legend()
    return svg(figure, "RMSE to the teacher by iteration of the distillation, on training and on validation noise")


def reward_curve(points: Points) -> Image:
    """Mean reward by iteration, the deployed table marked."""
    figure, axes = plot(WIDE, "RDPO, validation: reward by iteration", "iteration", "mean reward")
    x, y, half = (column(points, key) for key in ("iteration", "reward", "gain_95"))
    axes.errorbar(x, y, half, color="C0", marker=".", capsize=2, label="95 % interval of the paired change since iteration 0")
    mark(axes, points, "iteration")
    axes.legend(fontsize=8, loc="lower right")
    return svg(figure, "Mean reward on validation noise by iteration of RDPO, with 95 % intervals, the deployed table marked")


def trade_curve(points: Points, label: str) -> Image:
    """Reward against Frechet distance, the deployed table marked."""
    figure, axes = plot(WIDE, "RDPO, validation: reward against distance", label, "mean reward")
    x, y, half = (column(points, key) for key in ("frechet_distance", "reward", "gain_95"))
    axes.errorbar(x, y, half, color="C0", marker=".")
    axes.axvline(points[0]["frechet_distance"], color="grey", linestyle=":", label="of the distilled table")
    mark(axes, points, "frechet_distance")
    axes.legend(fontsize=8, loc="lower right")
    return svg(figure, f"Mean reward against {label} during RDPO, on validation noise, the deployed table marked")


def change_curve(points: Points, name: str) -> Image:
    """A metric's paired change since the first iteration, with its 95 % band."""
    figure, axes = plot(SMALL, name, "iteration", "change since iteration 0")
    x, y, half = (column(points, key) for key in ("iteration", f"{name}_change", f"{name}_change_95"))
    low, high = ([middle + sign * wide for middle, wide in zip(y, half, strict=True)] for sign in (-1, 1))
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.plot(x, y, marker=".")
    axes.fill_between(x, low, high, alpha=0.25, linewidth=0)
    axes.axvline(deployed(points)["iteration"], color="C1", linestyle=":")
    return svg(figure, f"Change of {name} on validation noise by iteration of RDPO, with its 95 % band")


def mark(axes: Axes, points: Points, x: str) -> None:
    """Mark the deployed table."""
    point = deployed(points)
    axes.plot(point[x], point["reward"], "o", color="C1", label=f"deployed: iteration {point['iteration']:g}", zorder=3)


def deployed(points: Points) -> dict[str, float]:
    """The point of the deployed table."""
    return next(point for point in points if point["deployed"])


def column(points: Points, key: str) -> list[float]:
    """One quantity of all points."""
    return [point[key] for point in points]


def plot(size: tuple[float, float], title: str, x: str, y: str) -> tuple[Figure, Axes]:
    """An empty figure."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot(xlabel=x, ylabel=y)
    axes.set_title(title, fontsize=11)
    axes.grid(alpha=0.25)
    return figure, axes


def read_csv(path: Path) -> Points:
    """The rows of a curve."""
    with reading(path), path.open(encoding="utf-8") as file:
        return [{key: float(value) for key, value in line.items()} for line in csv.DictReader(file, restval="")]


def svg(figure: Figure, words: str) -> Image:
    """A figure as an image for an HTML page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return Image(data_url(buffer.getvalue(), "image/svg+xml"), words)


def data_url(data: bytes, kind: str) -> str:
    """What needs no file or network."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
