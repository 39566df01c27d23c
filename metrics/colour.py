"""Brightness and saturation: not judges, but what a reward is easily raised by. Both range from 0 to 1."""

from collections.abc import Sequence

from torch import Tensor


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A Scorer: the mean over an image of HSV's value, the largest channel."""
    return images.double().amax(1).flatten(1).mean(1)


def saturation(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A Scorer: the mean over an image of HSV's saturation, (largest - smallest) / largest channel; 0 in black and grey."""
    largest, smallest = images.double().amax(1), images.double().amin(1)
    return ((largest - smallest) / largest.clamp_min(1e-12)).flatten(1).mean(1)
