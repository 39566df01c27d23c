"""What people see of a run: tables, pictures and links, as Prefect artifacts."""

import base64
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact
from safetensors.numpy import load_file

from flows.runs import slug

SIDE, MOST = 96, 20
"""Pixels to a side of a picture in a grid, about, and pictures in it, at most."""
REPORT, PAGE = Path("results/report.md"), Path("results/report.html")


def show_times(rows: Sequence[dict[str, Any]]) -> None:
    """How each stage came about, and how long it took."""
    create_table_artifact([dict(row) for row in rows], "stages", "How each stage came about, and its time in seconds")


def show_report(folder: Path, links: dict[str, str]) -> str:
    """The results' table, the paired differences, and where the rest is; the text of the report."""
    report = (folder / REPORT).read_text(encoding="utf-8")
    linked = "\n".join(f"- {name}: {link}" for name, link in links.items())
    create_markdown_artifact(f"{report}\n## Where it is\n\n{linked}\n", "results", "Samplers compared, and paired differences")
    return report


def show_pictures(folder: Path) -> None:
    """A grid of images of each sampler, on the same prompts and noise."""
    for file in sorted((folder / "data/scores").glob("*.safetensors")):
        pictures = [Image.fromarray(each.transpose(1, 2, 0).squeeze()) for each in load_file(file)["pictures"][:MOST]]
        show_grid(file.stem, pictures)


def show_grid(name: str, pictures: Sequence[Image.Image]) -> None:
    """Pictures beside one another."""
    side = max(1, SIDE // max(pictures[0].size)) * max(pictures[0].size) if max(pictures[0].size) < SIDE else SIDE
    columns = min(10, len(pictures))
    grid = Image.new("RGB", (columns * side, math.ceil(len(pictures) / columns) * side))
    for index, picture in enumerate(pictures):
        resampling = Image.Resampling.NEAREST if max(picture.size) < side else Image.Resampling.LANCZOS
        grid.paste(picture.convert("RGB").resize((side, side), resampling), (index % columns * side, index // columns * side))
    buffer = io.BytesIO()
    grid.save(buffer, "WEBP", quality=90)
    data = base64.b64encode(buffer.getvalue()).decode()
    create_image_artifact(
        f"data:image/webp;base64,{data}", f"pictures-{slug(name)}", f"{name}: the first {len(pictures)} images"
    )


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Of each sampler, its numbers."""
    found = {}
    for file in sorted((folder / "results").glob("*.json")):
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        found[file.stem] = {key: value for key, value in values.items() if isinstance(value, (int, float))}
    return found
