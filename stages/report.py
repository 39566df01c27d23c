"""Stage report: the samplers compared on the same prompts and noise, as a markdown table and one HTML page."""

import base64
import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

from stages.command import command
from stages.files import RESULTS, SCORES, TIMES, atomic, read_tensors, reading, require, sha256
from stages.params import Metrics, RealImages, Refs, Sampler

MARKDOWN, PAGE = RESULTS / "report.md", RESULTS / "report.html"
HELD_OUT = RESULTS / "held_out.json"
BASE = "distilled"
SHOWN = 192
"""Pixels to a side of the page's images, at most."""
COST = """\
n = {n} test samples, the same prompts and noise for every sampler; ± is 1.96 standard errors (of FD and RMSE by bootstrap).
serial, total: evaluations of the network one after the other, and rows per image. """
DIGITS = """\
FD: Frechet distance to the training
digits in the judge's features; FD to reference: to the reference's images. RMSE: root mean squared difference to the
reference on the same noise, of states in [-1, 1]. accuracy: by the judge, which is never a reward. reward: log-probability of
the wanted digit by another classifier; last column: paired difference with its 95 % interval."""
IMAGES = """\
FD: Frechet distance to other
images of the reference, in the features of {features}; FD to reference: to its images of the same noise. RMSE: root mean
squared difference to the reference on the same noise, of latents. {judges}: by judges, which are never the reward. reward:
{reward}; last column: paired difference with its 95 % interval."""


def report(*, samplers: dict[str, Sampler], metrics: Metrics, refs: Refs) -> None:
    """Write results/report.md, and results/report.html, which also holds pictures, curves and the stages' times.

    The page is not an output for DVC to keep: times differ from run to run.
    """
    results, scores, values = {}, {}, dict[str, Any]()
    for name in samplers:
        with reading(SCORES / f"{name}.safetensors") as file:
            scores[name], values = read_tensors(file)
        with reading(RESULTS / f"{name}.json") as file:
            results[name] = json.loads(file.read_text())
            require(file, "n", results[name]["n"], len(scores[next(iter(samplers))]["reward"]))
    with reading(HELD_OUT) as file:
        held_out = json.loads(file.read_text())
    real, columns = isinstance(refs, RealImages), columns_of(metrics.judges)
    names = {"features": metrics.features, "judges": ", ".join(metrics.judges), "reward": metrics.reward}
    rows = [row(name, results[name], scores[name], scores[BASE], metrics.judges) for name in samplers]
    legend = COST.format(n=results[BASE]["n"]) + (DIGITS if real else IMAGES.format(**names))
    classical = [name for name, sampler in samplers.items() if sampler.solver != "predictor" and name != "reference"]
    findings = [*compare(results, scores, classical, metrics.judges), unseen(held_out, metrics.judges, real)]
    text = "\n".join([markdown_table(columns, rows), "", legend, "", *(f"- {finding}" for finding in findings), ""])
    with atomic(MARKDOWN) as temporary:
        temporary.write_text(text, encoding="utf-8")
    times = stage_times(samplers)
    page = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True).get_template("report.html")
    html = page.render(
        report=sha256(MARKDOWN),
        columns=columns,
        rows=rows,
        legend=legend,
        findings=findings,
        pictures={name: picture(scores[name]["pictures"]) for name in samplers},
        height=min(SHOWN, scores[BASE]["pictures"].shape[2]),
        prompts=values["prompts"],
        curves=[distillation_curve(), rdpo_curve("the real digits" if real else "other images of the reference")],
        times=times,
    )
    with atomic(PAGE) as temporary:
        temporary.write_text(html, encoding="utf-8")
    print(text)
    print(markdown_table(["stage", "seconds", "peak memory (MB)"], times))
    print(f"\n{PAGE}")


def columns_of(judges: Sequence[str]) -> list[str]:
    """The table's head."""
    return ["sampler", "serial", "total", "FD", "FD to reference", "RMSE", *judges, "reward", f"reward - {BASE}"]


def row(
    name: str, result: dict[str, Any], scores: dict[str, Tensor], base: dict[str, Tensor], judges: Sequence[str]
) -> list[str]:
    """One line of the table."""

    def cell(key: str, digits: int) -> str:
        return f"{result[key]:.{digits}f} ± {1.96 * result[f'{key}_se']:.{digits}f}"

    reference = name == "reference"
    return [
        name,
        str(result["serial_evaluations"]),
        f"{result['total_evaluations']:g}",
        cell("frechet_distance", 2),
        "0" if reference else cell("distance_to_reference", 3),
        "0" if reference else cell("rmse", 4),
        *(cell(judge, 4) for judge in judges),
        cell("reward", 4),
        "0" if name == BASE else interval(*paired(scores["reward"], base["reward"]), 4),
    ]


def compare(
    results: dict[str, Any], scores: dict[str, dict[str, Tensor]], classical: list[str], judges: Sequence[str]
) -> list[str]:
    """The two comparisons that the table is made for."""
    findings = []
    serial = results[BASE]["serial_evaluations"]
    rivals = [name for name in classical if results[name]["serial_evaluations"] == serial]
    if rivals:
        rival = min(rivals, key=lambda name: results[name]["rmse"])
        ratio = results[BASE]["rmse"] / results[rival]["rmse"]
        spread = 1.96 * (scores[BASE]["rmse_bootstrap"] / scores[rival]["rmse_bootstrap"]).std().item()
        findings.append(
            f"{BASE} has {ratio:.2f} ± {spread:.2f} times the RMSE of {rival}, the best in that of these classical samplers, "
            f"at {serial} serial evaluations each (total: {results[BASE]['total_evaluations']:g} against "
            f"{results[rival]['total_evaluations']:g}). Other schedules, better ones among them: bench/solvers.md."
        )
    distances = [scores[name]["frechet_distance_bootstrap"] for name in ("rdpo", BASE)]
    change = results["rdpo"]["frechet_distance"] - results[BASE]["frechet_distance"]
    half = 1.96 * (distances[0] - distances[1]).std().item()
    gain = interval(*paired(scores["rdpo"]["reward"], scores[BASE]["reward"]), 4)
    judged = [f"{judge} by the judge {interval(*paired(scores['rdpo'][judge], scores[BASE][judge]), 4)}" for judge in judges]
    findings.append(f"rdpo less {BASE}, paired: reward {gain}, FD {interval(change, half, 3)}, {', '.join(judged)}.")
    return findings


def unseen(held_out: dict[str, Any], judges: Sequence[str], real: bool) -> str:
    """What images that no network has seen score, as a measure for the samplers' scores."""
    names = {**{judge: judge for judge in judges}, "reward": "reward", "frechet_distance": "FD"}
    found = [
        f"{name} {held_out[key]:.{digits}f} ± {1.96 * held_out[f'{key}_se']:.{digits}f}"
        for (key, name), digits in zip(names.items(), [4] * (len(names) - 1) + [2], strict=True)
    ]
    return (
        f"{'Held-out real digits' if real else 'Other images of the reference'} (n = {held_out['n']}): {', '.join(found)} "
        "(not to be compared with the table's: a distance is larger for a smaller n)."
    )


def paired(values: Tensor, base: Tensor) -> tuple[float, float]:
    """Mean of the differences (n,) and half its 95 % interval."""
    difference = values - base
    return difference.mean().item(), 1.96 * difference.std().item() / len(difference) ** 0.5


def interval(middle: float, half: float, digits: int) -> str:
    """A 95 % interval in words."""
    return f"{middle:+.{digits}f} [{middle - half:+.{digits}f}, {middle + half:+.{digits}f}]"


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    """A table in markdown, its columns aligned."""
    widths = [max(len(line[i]) for line in [columns, *rows]) for i in range(len(columns))]
    lines = [columns, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def stage_times(samplers: Iterable[str]) -> list[list[str]]:
    """Seconds and peak memory of the stages before this one, as measured when each last ran here; the longest first."""
    names = ["backbone", "refs", "teacher", "distill", "rdpo"]
    names += [f"{stage}@{sampler}" for stage in ("sample", "evaluate") for sampler in samplers]
    files = {name: TIMES / f"{name}.json" for name in names}
    found = [(name, json.loads(file.read_text())) for name, file in files.items() if file.exists()]
    found.sort(key=lambda item: -item[1]["seconds"])
    missing = [[name, "not run here", ""] for name, file in files.items() if not file.exists()]
    lines = [[name, f"{time['seconds']:.1f}", f"{time['peak_memory_mb']}"] for name, time in found]
    return [*lines, *missing, ["total", f"{sum(time['seconds'] for _, time in found):.1f}", ""]]


def picture(images: Tensor) -> str:
    """One sampler's first images, uint8 (n, C, H, W), side by side with a white gap."""
    if images.shape[2] > SHOWN:
        images = interpolate(images.float(), scale_factor=SHOWN / images.shape[2], mode="area").round().to(torch.uint8)
    strip = torch.cat([pad(image, (0, 1), value=255) for image in images], 2)  # (C, H, n (W + 1))
    buffer = io.BytesIO()
    Image.fromarray(strip.permute(1, 2, 0).squeeze(2).numpy()).save(buffer, "png")
    return embedded(buffer.getvalue(), "image/png")


def distillation_curve() -> str:
    """Training and validation error by iteration."""
    points = read_csv(RESULTS / "distill.csv")
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.add_subplot(title="Distillation", xlabel="iteration", ylabel="RMSE to the teacher")
    for key, label in (("train_rmse", "training noise"), ("validation_rmse", "validation noise")):
        axes.plot([p["iteration"] for p in points], [p[key] for p in points], marker=".", label=label)
    axes.set_yscale("log")
    axes.legend()
    return svg(figure)


def rdpo_curve(others: str) -> str:
    """Reward against Frechet distance on validation noise, the deployed table marked."""
    points = read_csv(RESULTS / "rdpo.csv")
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.add_subplot(title="RDPO, validation", xlabel=f"FD to {others}", ylabel="mean reward")
    axes.errorbar(
        [p["frechet_distance"] for p in points], [p["reward"] for p in points], [p["gain_95"] for p in points], marker="."
    )
    axes.axvline(points[0]["frechet_distance"], color="grey", linestyle=":", label="FD of the distilled table")
    (deployed,) = (p for p in points if p["deployed"])
    axes.plot(deployed["frechet_distance"], deployed["reward"], "o", label=f"deployed: iteration {deployed['iteration']:g}")
    axes.legend()
    return svg(figure)


def read_csv(path: Path) -> list[dict[str, float]]:
    """The rows of a curve."""
    with reading(path), path.open(encoding="utf-8") as file:
        return [{key: float(value) for key, value in line.items()} for line in csv.DictReader(file, restval="")]


def svg(figure: Figure) -> str:
    """A figure as an image for an HTML page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return embedded(buffer.getvalue(), "image/svg+xml")


def embedded(data: bytes, kind: str) -> str:
    """A data URL."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


if __name__ == "__main__":
    command(report)
