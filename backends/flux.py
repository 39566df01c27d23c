"""FLUX.1: a transformer over latents packed into 2x2 patches, trained as a rectified flow; guidance is one of its inputs."""

import torch
from diffusers import FluxPipeline
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from backends.pipeline import Embeddings, PipelineBackend, latent_size
from backends.preconditioning import Preconditioning, flow_grid


class Flux(PipelineBackend):
    """The frozen model of a FluxPipeline, as a Backend. Its states are latents that are not packed.

    Args:
        pipe: with its weights where it is to run.
        height, width: of the images, in pixels; None: the model's own.
        guidance_scale: that the network is shown, where it is distilled for guidance (FLUX.1-dev, not FLUX.1-schnell).
    """

    def __init__(
        self, pipe: FluxPipeline, height: int | None = None, width: int | None = None, guidance_scale: float = 1.0
    ) -> None:
        own = (pipe.default_sample_size, pipe.default_sample_size)
        rows, columns = latent_size(height, width, own, pipe.vae_scale_factor, patch=2)
        config = pipe.scheduler.config
        shift, sigma_min = flow_grid(config, rows * columns // 4)
        shape = (pipe.transformer.config.in_channels // 4, rows, columns)
        super().__init__(pipe, Preconditioning.of(config), shape, sigma_min, shift, guidance_scale)

    def _encode(self, prompt: str) -> Embeddings:
        embeds, pooled, _ = self.pipe.encode_prompt([prompt], device=self.spec.device)
        return embeds, pooled

    def _network(self, x: Tensor, timestep: Tensor, *conditions: Tensor) -> Tensor:
        embeds, pooled = conditions
        transformer, (height, width) = self.pipe.transformer, (size // 2 for size in self.spec.shape[1:])
        guidance = torch.full((len(x),), self.spec.guidance or 1.0, device=x.device)
        velocity = transformer(
            hidden_states=packed(x),
            timestep=timestep.to(x.dtype) / self.preconditioning.times,
            guidance=guidance if transformer.config.guidance_embeds else None,
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=embeds.new_zeros(embeds.shape[1], 3),  # text has no place in the image
            img_ids=self.pipe._prepare_latent_image_ids(1, height, width, x.device, x.dtype),
            return_dict=False,
        )[0]
        return unpacked(velocity, height)


def packed(x: Tensor) -> Tensor:
    """Latents (B, C, 2h, 2w) -> tokens of 2x2 patches, (B, h w, 4 C)."""
    return pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def unpacked(tokens: Tensor, height: int) -> Tensor:
    """The inverse of `packed`, with h = height."""
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, -1)), 2)
