"""A predictor in a diffusers pipeline, in both ways.

    python examples/use_in_diffusers.py                                     # tiny models with random weights, made on the spot
    python examples/use_in_diffusers.py --family sd3
    python examples/use_in_diffusers.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --predictor sd15 --device cuda

With --model, a predictor is needed: one that `stages.pull` or `stages.import_epd` wrote.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import backends as backends  # before diffusers

# isort: split

import torch
import typer
from diffusers import DiffusionPipeline
from tiny import TINY, saved

from backends.sample import sample
from backends.scheduler import PredictorScheduler
from solvers import EPD, Backbone, Predictor, flowmatch, load_predictor, logsnr, save_predictor


def main(
    model: Annotated[str | None, typer.Option(help="a hub's id, or a folder; none: a tiny model")] = None,
    predictor: Annotated[Path | None, typer.Option(help="a predictor's folder; needed with --model")] = None,
    family: Annotated[str, typer.Option(help=f"of the tiny model: {', '.join(TINY)}")] = "sd15",
    prompt: str = "a lighthouse at dusk",
    device: str = "cpu",
    out: Annotated[Path, typer.Option(help="where the picture goes")] = Path("lighthouse.png"),
) -> None:
    """Sample one image by a pipeline with the predictor as its scheduler, and by the batched form; compare them."""
    if model is not None and predictor is None:
        raise typer.BadParameter("none; valid: a predictor's folder, with --model", param_hint="--predictor")
    if family not in TINY:
        raise typer.BadParameter(f"{family}; valid: {', '.join(TINY)}", param_hint="--family")
    with TemporaryDirectory() as folder:
        if model is None:
            model = str(saved(TINY[family](), Path(folder, family)))
            predictor = predictor or untrained(Path(folder), model, family)
        size: dict[str, Any] = {"height": 16, "width": 16} if Path(model).parent == Path(folder) else {}
        dtype = torch.float16 if device == "cuda" else torch.float32
        pipe: Any = DiffusionPipeline.from_pretrained(model, dtype=dtype).to(device)
        table = load_predictor(predictor or "")

        images = sample(pipe, table, prompt, torch.Generator().manual_seed(0), **size)
        print(f"batched: {table.serial_evaluations} calls of the network")

        pipe.scheduler = PredictorScheduler.from_predictor(table, pipe)
        arguments = {"num_inference_steps": table.table.num_steps - 1, "guidance_scale": table.guidance_scale, **size}
        successive = pipe(prompt, generator=torch.Generator().manual_seed(0), **arguments).images
        print(f"successive: {table.total_evaluations} calls of the network")

    difference = max(abs(a - b) for a, b in zip(images[0].tobytes(), successive[0].tobytes(), strict=True))
    print(f"largest difference of a pixel: {difference} of 255")
    images[0].save(out)
    print(out)


def untrained(folder: Path, model: str, family: str) -> Path:
    """A predictor as distillation starts from: EPD's evenly spread points."""
    sigmas = logsnr(6, 0.03, 14.6) if family == "sd15" else flowmatch(6, 0.01, 1.0, 3.0)
    table = EPD(6, 2, 0.0, 0.0).requires_grad_(False).table()
    (folder / "predictor").mkdir()
    save_predictor(Predictor(table, sigmas, False, Backbone(model, None, "none"), 3.0, {}), folder / "predictor")
    return folder / "predictor"


if __name__ == "__main__":
    typer.run(main)
