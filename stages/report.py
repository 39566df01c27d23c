"""Stage report: the samplers compared on the same prompts and noise, in markdown and as one HTML page."""

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader
from PIL import Image as Picture
from torch import Tensor
from torch.nn.functional import interpolate

from stages.command import command
from stages.curves import Cost, Image, changes, curves, data_url
from stages.files import RESULTS, TIMES, atomic, reading, sha256
from stages.legend import PAIRED, legend, origin, unseen, words
from stages.params import Metrics, Refs, Report, Sampler
from stages.results import WATCHED, Quantity, Result, read
from stages.statistics import Paired, half_interval, paired

MARKDOWN, PAGE = RESULTS / "report.md", RESULTS / "report.html"
HELD_OUT = RESULTS / "held_out.json"
LEARNED, TUNED = "distilled", "rdpo"
SHOWN, MAGNIFIED = 192, 48
"""Pixels to a side of the page's pictures, at most, and of those that are smaller than that and magnified, about."""


def report(*, samplers: dict[str, Sampler], metrics: Metrics, refs: Refs, report: Report) -> None:
    """Write results/report.md, and results/report.html, which also holds pictures, curves and the stages' times.

    The page is not an output for DVC to keep: times differ from run to run.
    """
    results, base = read(list(samplers), metrics), report.base
    learned = results[LEARNED]
    with reading(HELD_OUT) as file:
        others = held_out(json.loads(file.read_text()), results, refs)
    classical = [name for name, sampler in samplers.items() if sampler.solver != "predictor" and name != "reference"]
    findings = [*distilled_against(results, classical), tuned_against(results), *others]
    shown = [quantity for quantity in learned.quantities if quantity.key not in constant(results)]
    columns = ["sampler", "serial", "total", *(quantity.name for quantity in shown)]
    rows = [row(name, result, shown) for name, result in results.items()]
    terms, tables = legend(learned, refs), compared(results, base)
    head = ["sampler", "mean", f"less {base}", "standard error", "95 % interval", "wins"]
    pairs = [[name, *line] for name, lines in tables.items() for line in lines]
    meanings = bullets(f"{term}: {meaning}." for term, meaning in terms)
    summary = "\n\n".join([markdown_table(columns, rows), bullets(findings), "Where:", meanings])
    against = "\n\n".join([f"## Against {base}", PAIRED.format(base=base), markdown_table(["metric", *head], pairs)])
    with atomic(MARKDOWN) as temporary:
        temporary.write_text(f"{summary}\n\n{against}\n", encoding="utf-8")
    times = stage_times(samplers)
    page = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True).get_template("report.html")
    html = page.render(
        report=sha256(MARKDOWN),
        columns=columns,
        rows=rows,
        findings=findings,
        terms=terms,
        base=base,
        paired=PAIRED.format(base=base),
        head=head,
        tables=tables,
        prompts=learned.prompts[: len(learned.pictures)],
        pictures={name: pictures(name, result) for name, result in results.items()},
        size=size(learned.pictures),
        tiny=max(learned.pictures.shape[2:]) < MAGNIFIED,
        curves=curves([cost(name, result) for name, result in results.items()], learned.label, origin(refs)),
        changes=changes([*(record["name"] for record in learned.metrics), *WATCHED]),
        times=times,
        records={record["label"]: record for record in learned.protocol} | {r["name"]: r for r in learned.metrics},
        words=words,
    )
    with atomic(PAGE) as temporary:
        temporary.write_text(html, encoding="utf-8")
    print(summary)
    print(f"\n{markdown_table(['stage', 'seconds', 'peak memory (MB)'], times)}")
    print(f"\nEvery metric paired with {base}: {MARKDOWN}; with pictures and curves: {PAGE}")


def constant(results: dict[str, Result]) -> set[str]:
    """Scores that are one number for all images, as the digits' saturation is."""
    scores = {key: torch.cat([result.scores[key] for result in results.values()]) for key in results[LEARNED].scored}
    return {key for key, values in scores.items() if len(values.unique()) == 1}


def row(name: str, result: Result, shown: list[Quantity]) -> list[str]:
    """One line of the table."""
    own = ("distance_to_reference", "rmse") if name == "reference" else ()
    cells = ["0" if quantity.key in own else cell(quantity, *result.found[quantity.key]) for quantity in shown]
    return [name, str(result.serial), f"{result.total:g}", *cells]


def cell(quantity: Quantity, value: float, error: float) -> str:
    """A value and half its 95 % interval."""
    return f"{value:.{quantity.digits}f} ± {1.96 * error:.{quantity.digits}f}"


def compared(results: dict[str, Result], base: str) -> dict[str, list[list[str]]]:
    """For each score, unless it is one number for all images: a line for each sampler but the base."""
    tables = {}
    for key, name in results[base].scored.items():
        scores = {sampler: result.scores[key] for sampler, result in results.items()}
        if key not in constant(results):
            others = [sampler for sampler in results if sampler != base]
            tables[name] = [[sampler, *comparison(paired(scores[sampler], scores[base]))] for sampler in others]
    return tables


def comparison(found: Paired) -> list[str]:
    """Mean, difference, its standard error and 95 % interval, and wins."""
    low, high = (f"{found.difference + sign * found.half:+.4f}" for sign in (-1, 1))
    wins = f"{100 * found.wins:.1f} % [{', '.join(f'{100 * end:.1f}' for end in found.wins_95)}]"
    return [f"{found.mean:.4f}", f"{found.difference:+.4f}", f"{found.error:.4f}", f"[{low}, {high}]", wins]


def distilled_against(results: dict[str, Result], classical: list[str]) -> list[str]:
    """The distilled table against the classical sampler of the least RMSE at its serial evaluations, if there is one."""
    learned = results[LEARNED]
    rivals = [name for name in classical if results[name].serial == learned.serial]
    if not rivals:
        return []
    name = min(rivals, key=lambda name: results[name].found["rmse"])
    rival = results[name]
    ratio = learned.found["rmse"][0] / rival.found["rmse"][0]
    moved = [result.influences["rmse"] / result.found["rmse"][0] for result in (learned, rival)]
    spread = ratio * half_interval(moved[0] - moved[1])
    return [
        f"{LEARNED} has {ratio:.2f} ± {spread:.2f} times the RMSE of {name}, the best in that of these classical samplers, "
        f"at {learned.serial} serial evaluations each (total: {learned.total:g} against {rival.total:g}). "
        "Other schedules, better ones among them: bench/solvers.md."
    ]


def tuned_against(results: dict[str, Result]) -> str:
    """What fine-tuning for the reward has changed."""
    tuned, learned = results[TUNED], results[LEARNED]

    def gain(key: str) -> str:
        found = paired(tuned.scores[key], learned.scores[key])
        return interval(found.difference, found.half, 4)

    change = tuned.found["frechet_distance"][0] - learned.found["frechet_distance"][0]
    half = half_interval(tuned.influences["frechet_distance"] - learned.influences["frechet_distance"])
    rewards = [f"{name} {gain(key)}" for key, name in tuned.scored.items() if key not in (*tuned.judges, *WATCHED)]
    judged = [f"{judge} by the judge {gain(judge)}" for judge in tuned.judges]
    return f"{TUNED} less {LEARNED}, paired: {', '.join([*rewards, f'{tuned.label} {interval(change, half, 3)}', *judged])}."


def held_out(found: dict[str, Any], results: dict[str, Result], refs: Refs) -> list[str]:
    """What images that no network has seen score, as a measure for the samplers' scores, as far as there are any."""
    scored = results[LEARNED].scored
    every = [*(Quantity(key, name, 4) for key, name in scored.items()), Quantity("frechet_distance", "FD", 2)]
    shown = {quantity.key: quantity for quantity in every if quantity.key in found.keys() - constant(results)}
    if not shown:
        return []
    cells = [f"{quantity.name} {cell(quantity, found[key], found[f'{key}_se'])}" for key, quantity in shown.items()]
    other = "frechet_distance" in shown and found["n"] != len(results[LEARNED].prompts)
    note = " (not to be compared with the table's: a distance is larger for a smaller n)" if other else ""
    return [f"{unseen(refs)} (n = {found['n']}): {', '.join(cells)}{note}."]


def cost(name: str, result: Result) -> Cost:
    """A sampler's point in the curves."""
    value, error = result.found["frechet_distance"]
    return Cost(name, value, 1.96 * error, result.serial, result.total)


def interval(middle: float, half: float, digits: int) -> str:
    """A 95 % interval in words."""
    return f"{middle:+.{digits}f} [{middle - half:+.{digits}f}, {middle + half:+.{digits}f}]"


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    """A table in markdown, its columns aligned."""
    table = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in [columns, *rows]]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    lines = [table[0], ["-" * width for width in widths], *table[1:]]
    return "\n".join("| " + " | ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def bullets(lines: Iterable[str]) -> str:
    """A list in markdown."""
    return "\n".join(f"- {line}" for line in lines)


def stage_times(samplers: Iterable[str]) -> list[list[str]]:
    """Seconds and peak memory of the stages before this one, as measured when each last ran here; the longest first."""
    names = ["backbone", "metrics", "refs", "teacher", "distill", "rdpo"]
    names += [f"{stage}@{sampler}" for stage in ("sample", "evaluate") for sampler in samplers]
    files = {name: TIMES / f"{name}.json" for name in names}
    found = [(name, json.loads(file.read_text())) for name, file in files.items() if file.exists()]
    found.sort(key=lambda item: -item[1]["seconds"])
    missing = [[name, "not run here", ""] for name, file in files.items() if not file.exists()]
    lines = [[name, f"{time['seconds']:.1f}", f"{time['peak_memory_mb']}"] for name, time in found]
    return [*lines, *missing, ["total", f"{sum(time['seconds'] for _, time in found):.1f}", ""]]


def pictures(name: str, result: Result) -> list[Image]:
    """A sampler's first images, with as many pixels as are shown."""
    images = result.pictures
    if max(images.shape[2:]) > SHOWN:
        height, width = size(images)
        images = interpolate(images.float(), size=(height, width), mode="area").round().to(torch.uint8)
    return [Image(png(image), f"{name}: {prompt}") for image, prompt in zip(images, result.prompts, strict=False)]


def size(images: Tensor) -> tuple[int, int]:
    """Height and width of pictures in the page: tiny ones are magnified by a whole number."""
    side = max(images.shape[2:])
    times = max(1, MAGNIFIED // side) if side <= SHOWN else SHOWN / side
    height, width = (max(1, round(times * length)) for length in images.shape[2:])
    return height, width


def png(image: Tensor) -> str:
    """An image, uint8 (C, H, W), of one channel or three."""
    buffer = io.BytesIO()
    Picture.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(buffer, "png")
    return data_url(buffer.getvalue(), "image/png")


if __name__ == "__main__":
    command(report)
