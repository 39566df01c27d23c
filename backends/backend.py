"""What every family of backbones offers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from solvers import Counter, Denoiser, Guided


@dataclass(frozen=True)
class Spec:
    """What a sampler needs to know of a backbone.

    Attributes:
        shape: of one state x, without the batch.
        sigma_min, sigma_max: noise levels that the network was trained for. The state at the first node is sigmas[0] times
            unit noise, for variance-exploding models (sigma_max) as for flow models (1).
        features: numbers in the feature that the denoiser gives (`FeatureDenoiser`); 0: it gives none.
    """

    shape: tuple[int, ...]
    sigma_min: float
    sigma_max: float
    features: int = 0


class Backend(Protocol):
    """A frozen diffusion model of prompts; the empty prompt is the unconditional model."""

    @property
    def spec(self) -> Spec: ...

    def denoiser(self, prompts: Sequence[str]) -> Denoiser:
        """The denoiser of B prompts: row i has prompt i mod B."""
        ...

    def decode(self, x: Tensor) -> Tensor:
        """States (B, ...) -> images (B, C, H, W) in [0, 1]."""
        ...


def counted_denoiser(
    backend: Backend, prompts: Sequence[str], guidance_scale: float, negative: Sequence[str] | None = None
) -> tuple[Denoiser, Counter]:
    """The guided denoiser of B prompts, and the counter of what it costs the network (twice the rows where it is guided).

    Guidance leads away from the B negative prompts; from the unconditional model where there are none.
    """
    if guidance_scale == 1:
        counter = Counter(backend.denoiser(prompts))
        return counter, counter
    counter = Counter(backend.denoiser([*prompts, *(negative or [""] * len(prompts))]))
    return Guided(counter, guidance_scale, len(prompts)), counter
