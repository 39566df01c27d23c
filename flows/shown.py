"""What people see of a run: tables, pictures and links, as Prefect artifacts."""

import base64
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
from PIL import Image
from prefect.artifacts import create_image_artifact, create_markdown_artifact, create_table_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from safetensors.numpy import load_file

from flows.runs import slug

WIDTH, COLUMNS, MOST = 960, 10, 20
"""Pixels of a picture's width, pictures in a row of a grid, and in all of it, at most."""
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


def show_numbers(results: dict[str, dict[str, Any]], experiment: str) -> None:
    """What there is of each sampler; `read_numbers` has it again, on any machine."""
    rows = [{"sampler": sampler, **values, "experiment": experiment} for sampler, values in results.items()]
    create_table_artifact(rows, "numbers", "Each sampler's numbers")


def read_numbers(run: UUID) -> list[dict[str, Any]]:
    """Of a run that has ended, what `show_numbers` was given."""
    wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run]), key=ArtifactFilterKey(any_=["numbers"]))
    with get_client(sync_client=True) as client:
        return [row for artifact in client.read_artifacts(artifact_filter=wanted) for row in json.loads(str(artifact.data))]


def show_pictures(folder: Path) -> None:
    """A grid of images of each sampler, on the same prompts and noise."""
    for file in sorted((folder / "data/scores").glob("*.safetensors")):
        pictures = load_file(file)["pictures"][:MOST].transpose(0, 2, 3, 1)
        rows = [np.concatenate(list(pictures[first : first + COLUMNS]), axis=1) for first in range(0, len(pictures), COLUMNS)]
        grid = np.zeros((len(rows) * pictures.shape[1], *rows[0].shape[1:]), np.uint8)
        for index, row in enumerate(rows):  # the last may be shorter
            grid[index * pictures.shape[1] : (index + 1) * pictures.shape[1], : row.shape[1]] = row
        show_image(file.stem, Image.fromarray(grid.squeeze()), f"{file.stem}: the first {len(pictures)} images")


def show_image(name: str, image: Image.Image, description: str) -> None:
    """A picture, small ones magnified and large ones shrunk, inside of the artifact itself: workers share no file server."""
    times = WIDTH // image.width
    size = (image.width * times, image.height * times) if times else (WIDTH, round(image.height * WIDTH / image.width))
    shown = image.convert("RGB").resize(size, Image.Resampling.NEAREST if times else Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    shown.save(buffer, "WEBP", quality=90)
    data = base64.b64encode(buffer.getvalue()).decode()
    create_image_artifact(f"data:image/webp;base64,{data}", f"pictures-{slug(name)}", description)


def read_results(folder: Path, made: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Of each sampler, its numbers, in those files of results/ that were made; the commit may have others, of other runs."""
    found = {}
    for file in sorted(Path(name) for name in made if Path(name).match("results/*.json")):
        values: dict[str, Any] = json.loads((folder / file).read_text(encoding="utf-8"))
        found[file.stem] = {key: value for key, value in values.items() if isinstance(value, (int, float))}
    return found
