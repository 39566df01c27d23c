"""Images as metrics' models see them: checked, rounded to 8 bits as files hold them, resized, normalised; with a gradient.

Rounding has no gradient of its own: it is passed through as if nothing were rounded.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

ROUNDING = 1e-3
"""How far outside [0, 1] images may lie."""

UNIT = 2.0**22
"""Of PIL's fixed-point weights."""


def check(images: Tensor, prompts: Sequence[str]) -> None:
    """Raise ValueError unless these are images (B, 3, H, W) in [0, 1], or of 8 bits (uint8), and a prompt for each."""
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"images: {tuple(images.shape)}; valid: (B, 3, H, W), none of them 0")
    if len(prompts) != len(images):
        raise ValueError(f"prompts: {len(prompts)} for images {tuple(images.shape)}; valid: one for each image")
    if images.dtype == torch.uint8:
        return
    low, high = images.detach().aminmax()
    if not bool(low.isfinite() & high.isfinite()):  # NaN is both of them where there is one
        raise ValueError("images: NaN or infinite pixels; valid: finite ones")
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise ValueError(f"images: from {low:.4g} to {high:.4g}; valid: from 0 to 1")


def levels(images: Tensor) -> Tensor:
    """Images in [0, 1], or uint8 -> the whole numbers from 0 to 255 that a file would hold, float64."""
    if images.dtype == torch.uint8:
        return images.double()
    return rounded(255 * images.double().clamp(0, 1))


def cropped(images: Tensor, size: int) -> Tensor:
    """Images (B, C, H, W) in [0, 1] -> levels of their centre (B, C, size, size), the shorter side resized to `size`.

    Bit for bit what PIL's bicubic and transformers' CLIPImageProcessorPil make of them; see `resized` for very tall ones.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    tall, wide = size * height // short, size * width // short
    top, left = (tall - size) // 2, (wide - size) // 2
    return resized(levels(images), tall, wide)[..., top : top + size, left : left + size]


def padded(images: Tensor, size: int) -> Tensor:
    """Images (B, C, H, W) in [0, 1] -> (B, C, size, size), their longer side resized to `size`, the rest 0 around it.

    As hpsv2: bicubic with antialias of floating-point numbers, which may overshoot [0, 1].
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    tall, wide = max(round(height * scale), 1), max(round(width * scale), 1)
    images = levels(images).float() / 255
    if (tall, wide) != (height, width):
        images = interpolate(images, (tall, wide), mode="bicubic", antialias=True)
    top, left = (size - tall) // 2, (size - wide) // 2
    return pad(images, (left, size - wide - left, top, size - tall - top))


def normalised(images: Tensor) -> Tensor:
    """Images in [0, 1] less OpenAI's mean, over their standard deviation, of each channel."""
    mean, std = (images.new_tensor(numbers).view(3, 1, 1) for numbers in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (images - mean) / std


def resized(images: Tensor, height: int, width: int) -> Tensor:
    """Levels (B, C, H, W) -> levels (B, C, height, width), as PIL's bicubic: first along the rows, then along the columns.

    PIL 13 goes along the columns first where the height shrinks by more than twice what the width does: at a constant ratio,
    where an image is shrunk that is more than twice as tall as wide. Older ones, with which metrics were published, never do.
    """
    if images.shape[-1] != width:
        images = _rounded_and_clipped(images @ _weights(images.shape[-1], width).to(images).T)
    if images.shape[-2] != height:
        images = _rounded_and_clipped(_weights(images.shape[-2], height).to(images) @ images)
    return images


def rounded(x: Tensor) -> Tensor:
    """To the nearest whole number, half to even; its gradient is x's."""
    return x + (x.round() - x).detach()


def _rounded_and_clipped(sums: Tensor) -> Tensor:
    """PIL's: sums of levels and fixed-point weights, exact in float64, half a unit added and the fraction cut off."""
    x = sums / UNIT
    return (x + ((x + 0.5).floor() - x).detach()).clamp(0, 255)


@lru_cache(maxsize=64)
def _weights(of: int, to: int) -> Tensor:
    """PIL's bicubic, antialiased where it shrinks: fixed-point weights (to, of), whole numbers in float64."""
    scale = of / to
    stretch = max(scale, 1.0)
    weights = torch.zeros(to, of, dtype=torch.float64)
    for row in range(to):
        centre = (row + 0.5) * scale
        first, last = max(int(centre - 2 * stretch + 0.5), 0), min(int(centre + 2 * stretch + 0.5), of)
        found = [_bicubic((column - centre + 0.5) / stretch) for column in range(first, last)]
        total = sum(found)
        weights[row, first:last] = torch.tensor([_half_away(weight / total * UNIT) for weight in found], dtype=torch.float64)
    return weights


def _bicubic(x: float) -> float:
    """Keys' kernel with a = -1/2 (Keys 1981, equation 15)."""
    x = abs(x)
    if x < 1:
        return (1.5 * x - 2.5) * x * x + 1
    return ((2.5 - 0.5 * x) * x - 4) * x + 2 if x < 2 else 0.0


def _half_away(x: float) -> float:
    return math.copysign(math.floor(abs(x) + 0.5), x)
