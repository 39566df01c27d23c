"""What the backbones in diffusers pipelines share: prompts encoded once, the network in its precision, decoding in parts."""

import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import Tensor

from backends.backend import Spec
from backends.preconditioning import Preconditioning
from solvers import Conditioned, Predictor
from solvers.predictor import Difference

KNOWN = 512
"""Prompts whose embeddings are kept, at most, while there are encoders to make them again: SD3 has 3 MB for each."""

DECODED = 8
"""Images that are decoded at a time: a decoder needs more memory for one than the network does."""

Embeddings = tuple[Tensor, ...]


class PipelineBackend(ABC):
    """The frozen model of a diffusers pipeline, as a Backend. A family says how its networks and text encoders are called.

    Args:
        pipe: with its weights where it is to run.
        shape: of a state.
        shift, guidance: as of `Spec`.
        sigma_min: the lowest noise level of its grids; None: the lowest that the network was trained for.
    """

    def __init__(
        self,
        pipe: Any,
        preconditioning: Preconditioning,
        shape: tuple[int, ...],
        sigma_min: float | None = None,
        shift: float | None = None,
        guidance: float | None = None,
    ) -> None:
        self.pipe = pipe
        self.preconditioning = preconditioning
        self.spec = Spec(
            shape,
            preconditioning.sigma_min if sigma_min is None else sigma_min,
            preconditioning.sigma_max,
            table=preconditioning.table,
            shift=shift,
            guidance=guidance,
            device=pipe._execution_device,
        )
        self.texts = Texts(self._encode_alone)

    def denoiser(self, prompts: Sequence[str]) -> Conditioned:
        conditions = self.texts(prompts, self.spec.device)
        preconditioning = self.preconditioning

        def evaluate(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
            level = sigma.view(-1, 1, 1, 1)
            shown, time = preconditioning.network_input(x, level).clone(), preconditioning.timestep(sigma)
            embeddings = (condition[rows] for condition in conditions)
            output = self._network(shown.to(conditions[0].dtype), time, *embeddings).to(x.dtype)
            if conditions[0].dtype == torch.float16 and output.requires_grad:
                scale_gradient([shown, time], output)
            return preconditioning.denoised(x, output, level)

        return Conditioned(evaluate, len(prompts))

    def decode(self, x: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) in [0, 1]."""
        return decoded(self.pipe.vae, x)

    def keep_texts(self, prompts: Sequence[str]) -> None:
        """Encode all prompts that will ever be asked for, and drop the text encoders, which may be larger than the network."""
        self.texts.keep(prompts)
        names = [name for name in self.pipe.components if name.startswith("text_encoder")]
        self.pipe.register_modules(**dict.fromkeys(names))
        self.pipe.maybe_free_model_hooks()  # which hold them, too, where the pipeline is offloaded

    def _encode_alone(self, prompt: str) -> Embeddings:
        self.pipe.maybe_free_model_hooks()  # of an offloaded pipeline, the network leaves the device first
        return self._encode(prompt)

    @abstractmethod
    def _encode(self, prompt: str) -> Embeddings:
        """A prompt's embeddings, (1, ...) each; the first has the network's dtype."""

    @abstractmethod
    def _network(self, x: Tensor, timestep: Tensor, *conditions: Tensor) -> Tensor:
        """The network's output for its inputs, (R, ...) each."""


class Texts:
    """What text encoders make of prompts.

    Each prompt goes through them once, and alone: its numbers are the same whatever it comes with. What they make is kept in
    the machine's memory, not on the accelerator.

    Args:
        encode: maps a prompt to its embeddings, (1, ...) each.
    """

    def __init__(self, encode: Callable[[str], Embeddings]) -> None:
        self.encode = encode
        self.known: OrderedDict[str, Embeddings] = OrderedDict()
        self.complete = False

    def __call__(self, prompts: Sequence[str], device: torch.device) -> Embeddings:
        """The prompts' embeddings on a device, (B, ...) each."""
        each = [self._of(prompt) for prompt in prompts]
        while len(self.known) > KNOWN and not self.complete:
            self.known.popitem(last=False)
        return tuple(torch.cat(parts).to(device) for parts in zip(*each, strict=True))

    def keep(self, prompts: Sequence[str]) -> None:
        """Encode these; from now on no others are known."""
        for prompt in dict.fromkeys(prompts):
            self._of(prompt)
        self.complete = True

    @torch.no_grad()
    def _of(self, prompt: str) -> Embeddings:
        if prompt not in self.known:
            if self.complete:
                raise ValueError(f"prompt: {prompt!r}, and the text encoders are dropped; valid: one of those kept")
            self.known[prompt] = tuple(embedding.cpu() for embedding in self.encode(prompt))
        self.known.move_to_end(prompt)
        return self.known[prompt]


def scale_gradient(inputs: Sequence[Tensor], output: Tensor) -> None:
    """Have the gradient pass a network in float16 at a scale at which it does not vanish there: its largest number near 1.

    Args:
        inputs: what the network is called with, before the cast to half precision, used for nothing else.
        output: what it gives, after the cast back.
    """
    scale = 1.0

    def up(gradient: Tensor) -> Tensor:
        nonlocal scale
        largest = gradient.abs().max().item()
        scale = 2.0 ** -math.frexp(largest)[1] if 0 < largest < math.inf else 1.0
        return gradient * scale

    output.register_hook(up)
    for tensor in inputs:
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: gradient / scale)


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


def decoded(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """Latents (B, C, h, w) -> images (B, 3, H, W) in [0, 1], some at a time."""
    config: Any = vae.config
    parts = (x.to(vae.dtype) / config.scaling_factor + (config.shift_factor or 0.0)).split(DECODED)
    images = torch.cat([vae.decode(part, return_dict=False)[0] for part in parts])  # type: ignore[arg-type]
    return (images / 2 + 0.5).clamp(0, 1)


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
