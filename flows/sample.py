"""Images of prompts by a published predictor."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from prefect import State, flow, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from pydantic import Field

from flows import process
from flows.pipeline import failure, read_graph, select
from flows.rdpo import known_remote
from flows.runs import Backbone, Overrides, begun, run_name, watched
from flows.shown import show_image
from flows.stage import PAUSES, Lines, make, may_pass, slots

PREDICTOR, ASKED, IMAGES = Path("data/predictor"), Path("data/asked.json"), Path("data/images")
"""In the workspace; the images of each run have a folder of their own."""


@flow(name="sample", flow_run_name=run_name, persist_result=True, result_serializer="json")
def sample(
    predictor: str,
    registry: str,
    prompts: Annotated[list[str], Field(min_length=1)],
    images: Annotated[int, Field(ge=1)] = 1,
    seed: Annotated[int, Field(ge=0)] = 0,
    backbone: Backbone = "digits",
    overrides: Overrides = [],  # noqa: B006
    remote: str | None = None,
) -> "dict[str, Any] | State[Any]":
    """Images of prompts by a predictor, with a table of what they cost and how they score.

    Args:
        predictor: NAME@VERSION, as rdpo@v1.0.0, rdpo@latest or rdpo@prod.
        registry: where it was published: s3://BUCKET/PREFIX, or file:///FOLDER of the worker's machine.
        prompts: what the images are to show.
        images: of each prompt.
        seed: of the noise.
        backbone, overrides, remote: as of the flow rdpo.
    """
    return watched(lambda: _sample(predictor, registry, prompts, images, seed, backbone, overrides, remote))


def _sample(
    predictor: str,
    registry: str,
    prompts: list[str],
    images: int,
    seed: int,
    backbone: str,
    overrides: list[str],
    remote: str | None,
) -> dict[str, Any]:
    with begun(["sample", predictor, registry], backbone, overrides) as begin:
        folder = begin.folder
        remote = known_remote(folder, remote, push=False)
        command.with_options(task_run_name="pull")(
            folder, "pull", ["stages.pull", predictor, "--remote", registry, "--out", str(PREDICTOR)]
        )
        make(folder, select(read_graph(folder), ["backbone", "metrics"]), begin.params, remote, None, force=False)
        (folder / ASKED).write_text(json.dumps(prompts), encoding="utf-8")
        out = IMAGES / str(flow_run.id)
        given = ["--prompts", str(ASKED), "--out", str(out), "--images", str(images), "--seed", str(seed)]
        command.with_options(task_run_name="generate", tags=slots())(
            folder, "generate", ["stages.generate", str(PREDICTOR), *given]
        )
        found: dict[str, Any] = json.loads((folder / out / "images.json").read_text(encoding="utf-8"))
        show(folder / out, predictor, found)
        return {"commit": begin.commit, "folder": str(folder / out), **found}


@task(retries=len(PAUSES), retry_delay_seconds=PAUSES, retry_condition_fn=may_pass, cache_policy=NO_CACHE, persist_result=False)
def command(folder: Path, name: str, arguments: list[str]) -> None:
    """Run one of Parasol's commands in a workspace; StageError where it fails."""
    lines, tell = list[str](), Lines(name)
    if status := process.run([sys.executable, "-m", *arguments], folder, lambda line: (lines.append(line), tell(line))):
        raise failure(folder, name, lines, status)


def show(folder: Path, predictor: str, found: dict[str, Any]) -> None:
    """Images and table as artifacts."""
    show_image(predictor, Image.open(folder / "grid.png"), f"{found['n']} images, prompt by prompt")
    rows = [{**{k: v for k, v in each.items() if k != "scores"}, **each["scores"]} for each in found["images"]]
    create_table_artifact(rows, "images", "Each image, its prompt and its scores")
    errors = {m["name"]: "" if m["se"] is None else f"{m['se']:.2g}" for m in found["metrics"]}
    means = "\n".join(f"| {m['name']} | {m['mean']:.4g} | {errors[m['name']]} |" for m in found["metrics"])
    create_markdown_artifact(
        f"{found['n']} images by {predictor}, {found['serial_evaluations']} serial and {found['total_evaluations']:g} total "
        f"evaluations each.\n\n| metric | mean | standard error |\n| --- | --- | --- |\n{means}\n\nThey are in `{folder}`.\n",
        "samples",
        "What the images cost, and their scores",
    )
