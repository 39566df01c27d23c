"""What the backbones in diffusers pipelines share: sizes of latents, prompts that are encoded once, decoding."""

from collections.abc import Sequence

from diffusers import AutoencoderKL
from torch import Tensor


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
