"""Tiny pipelines, and predictors for them."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

with warnings.catch_warnings():  # of diffusers' and transformers' own imports
    warnings.simplefilter("ignore")
    from diffusers import (
        DiffusionPipeline,
    )
    from tiny import TINY, saved

    from backends.scheduler import PredictorScheduler

from solvers import (
    SOLVERS,
    Backbone,
    EPDTable,
    Multistep,
    Predictor,
    flowmatch,
    logsnr,
)

STEPS = 4
PROMPTS = ["a lighthouse at dusk", "a boat"]
SIZE: dict[str, Any] = {"height": 16, "width": 16}
VP, FLOW = logsnr(STEPS + 1, 0.03, 14.6), flowmatch(STEPS + 1, 0.01, 1.0, 3.0)
FAMILIES = list(TINY)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny pipeline of each family, on the disk."""
    return {name: saved(make(), tmp_path_factory.mktemp(name)) for name, make in TINY.items()}


@pytest.fixture
def pipes(folders: dict[str, Path]) -> Callable[[str], Any]:
    def load(name: str) -> Any:
        pipe = DiffusionPipeline.from_pretrained(folders[name])
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


def numbers(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.8 + 0.1


def epd(points: int, order: int = 1) -> EPDTable:
    r, w, o, a = numbers(4, STEPS, points)
    return EPDTable(r, w / w.sum(-1, keepdim=True), 0.9 + o / 5, 0.9 + a / 5, order)


def per_image() -> EPDTable:
    """A table of its own for each of five images."""
    r, w, o, a = numbers(4, 5, STEPS, 2)
    return EPDTable(r, w / w.sum(-1, keepdim=True), o, a)


def predictor(table: str, name: str, guidance_scale: float = 3.0) -> Predictor:
    """epd2, plugin2, multistep1, ... with as many points, and -afs."""
    kind, afs = table.partition("-")[0], table.endswith("afs")
    points, sigmas = int(kind[-1]), VP if name == "sd15" else FLOW
    if kind.startswith("multistep"):
        student = Multistep(SOLVERS["ipndm_2"], sigmas, points, 2, 0.1).requires_grad_(False)
        for parameter in student.parameters():
            parameter += 0.1 * (numbers(*parameter.shape) - 0.5)
        made, sigmas = student.table(), student.sigmas()
    else:
        made = epd(points, 3 if kind.startswith("plugin") else 1)
    return Predictor(made, sigmas, afs, Backbone("tiny", None, "none"), guidance_scale, {})


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def network_of(pipe: Any) -> Any:
    """The U-Net of a Stable Diffusion pipeline, the transformer of the others."""
    return pipe.components.get("unet", pipe.components.get("transformer"))


@contextmanager
def calls(pipe: Any) -> Iterator[list[int]]:
    """The rows of each call of a pipeline's network."""
    rows: list[int] = []

    def count(module: Any, arguments: Any, named: dict[str, Any], output: Any) -> None:
        rows.append(len(output[0]))

    hook = network_of(pipe).register_forward_hook(count, with_kwargs=True)
    yield rows
    hook.remove()


def scheduled(pipe: Any, made: Predictor) -> Any:
    pipe.scheduler = PredictorScheduler.from_predictor(made, pipe.scheduler)
    return pipe
