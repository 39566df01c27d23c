"""What every family of backbones offers."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from solvers import Conditioned, Counter, Denoiser, Guided, Sharded

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Spec:
    """What a sampler needs to know of a backbone.

    Attributes:
        shape: of one state x, without the batch.
        sigma_min, sigma_max: the ends of its grids. The state at the first node is sigmas[0] times unit noise, for
            variance-exploding models (sigma_max) as for flow models (1).
        features: numbers in the feature that the denoiser gives (`FeatureDenoiser`); 0: it gives none.
        table: noise levels that a variance-preserving network was trained at, increasing, float64 (T,), for `discrete` grids.
        shift: a flow model's time shift, for `flowmatch` grids.
        guidance: the guidance scale that the network itself is shown, which is then the only one that it has.
        device: where its states live.
    """

    shape: tuple[int, ...]
    sigma_min: float
    sigma_max: float
    features: int = 0
    table: Tensor | None = field(default=None, compare=False, repr=False)
    shift: float | None = None
    guidance: float | None = None
    device: torch.device = CPU

    @property
    def dtype(self) -> torch.dtype:
        """The precision of states: double on the CPU, single on other devices, whatever the network's is."""
        return torch.float64 if self.device.type == "cpu" else torch.float32

    def state(self, x: Tensor) -> Tensor:
        """A tensor as a state."""
        return x.to(self.device, self.dtype)


class Backend(Protocol):
    """A frozen diffusion model of prompts; the empty prompt is the unconditional model."""

    @property
    def spec(self) -> Spec: ...

    def denoiser(self, prompts: Sequence[str]) -> Conditioned:
        """The denoiser of B prompts: row i has prompt i mod B."""
        ...

    def decode(self, x: Tensor) -> Tensor:
        """States (B, ...) -> images (B, C, H, W) in [0, 1]."""
        ...


def counted_denoiser(
    backend: Backend,
    prompts: Sequence[str],
    guidance_scale: float,
    negative: Sequence[str] | None = None,
    group: dist.ProcessGroup | None = None,
) -> tuple[Denoiser, Counter]:
    """The guided denoiser of B prompts, and the counter of what it costs the network (twice the rows where it is guided).

    Guidance leads away from the B negative prompts; from the unconditional model where there are none. The rows of each call
    are spread over the processes of a group where there is one.

    Raises:
        ValueError: the network is shown a guidance scale, and it is another; or negative prompts, which it cannot be shown.
    """
    embedded = backend.spec.guidance
    if embedded is not None and guidance_scale != embedded:
        raise ValueError(f"guidance_scale: {guidance_scale}; valid: {embedded}, which the network is shown")
    if embedded is not None and any(negative or []):
        shown = next(filter(None, negative or []))
        raise ValueError(f"negative: {shown!r}; valid: none, for a network that is shown the guidance scale")
    guided = embedded is None and guidance_scale != 1
    denoise = backend.denoiser([*prompts, *(negative or [""] * len(prompts))] if guided else prompts)
    counter = Counter(denoise if group is None else Sharded(denoise, group))
    return (Guided(counter, guidance_scale, len(prompts)) if guided else counter), counter
