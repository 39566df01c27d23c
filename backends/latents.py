"""What the backbones in diffusers pipelines share: which model it is, sizes of latents, prompts encoded once, decoding."""

from collections.abc import Collection, Sequence
from pathlib import Path

from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor

from solvers import Predictor
from solvers.predictor import Difference


def latent_size(height: int | None, width: int | None, own: tuple[int, int], factor: int, patch: int = 1) -> tuple[int, int]:
    """Height and width of the latents of images in pixels, `factor` times smaller; the model's own where there are none.

    Raises:
        ValueError: the pixels do not come out even, in patches of so many latents.
    """
    given = (height, width)
    if any(pixels is not None and (pixels <= 0 or pixels % (factor * patch)) for pixels in given):
        raise ValueError(f"height, width: {height}, {width}; valid: multiples of {factor * patch}")
    rows, columns = (size if pixels is None else pixels // factor for pixels, size in zip(given, own, strict=True))
    return rows, columns


def distinct(prompts: Sequence[str]) -> tuple[list[str], list[int]]:
    """Each prompt once, and where among them those of all rows are."""
    once = list(dict.fromkeys(prompts))
    return once, [once.index(prompt) for prompt in prompts]


def decoded(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """Latents (B, C, h, w) -> images (B, 3, H, W) in [0, 1]."""
    latents = x.to(vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)  # type: ignore[attr-defined]
    return (vae.decode(latents, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)  # type: ignore[union-attr]


def check_backbone(predictor: Predictor, pipe: DiffusionPipeline, allow: Collection[Difference]) -> None:
    """Raise ValueError where a predictor was made for a pipeline of another family, or for another model of the hub.

    A pipeline from a local folder has no id of the hub to compare, and none knows its revision.
    """
    made_for, found = predictor.backbone.pipeline, type(pipe).__name__
    for task in ("ControlNet", "Img2Img", "Inpaint"):
        found = found.replace(task, "")
    if made_for not in (None, found) and "backbone" not in allow:
        raise ValueError(f'backbone: a {found}; valid: a {made_for}, which the predictor was made for, or allow=["backbone"]')
    name = pipe.name_or_path
    predictor.used_for(None if not name or Path(name).exists() else name, allow=allow)
