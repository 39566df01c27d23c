"""FLUX.1: a transformer over latents packed into 2x2 patches, trained as a rectified flow; guidance is one of its inputs."""

from collections.abc import Sequence

import torch
from diffusers import FluxPipeline
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from backends.backend import Spec
from backends.latents import decoded, distinct, latent_size
from backends.preconditioning import Preconditioning
from solvers import Denoiser


class Flux:
    """The frozen model of a FluxPipeline, as a Backend. Its states are latents that are not packed.

    Args:
        pipe: with its weights where it is to run.
        height, width: of the images, in pixels; None: the model's own.
        guidance_scale: that the network is shown, where it is distilled for guidance (FLUX.1-dev).
    """

    def __init__(
        self, pipe: FluxPipeline, height: int | None = None, width: int | None = None, guidance_scale: float = 1.0
    ) -> None:
        self.pipe = pipe
        self.guidance_scale = guidance_scale
        self.preconditioning = Preconditioning.of(pipe.scheduler.config)
        own = (pipe.default_sample_size, pipe.default_sample_size)
        shape = latent_size(height, width, own, pipe.vae_scale_factor, patch=2)
        self.spec = Spec(
            (pipe.transformer.config.in_channels // 4, *shape),
            self.preconditioning.sigma_min,
            self.preconditioning.sigma_max,
        )

    def denoiser(self, prompts: Sequence[str]) -> Denoiser:
        unique, rows = distinct(prompts)
        embeds, pooled, text_ids = self.pipe.encode_prompt(unique, device=self.pipe._execution_device)
        embeds, pooled = embeds[rows], pooled[rows]  # type: ignore[index]
        transformer, preconditioning = self.pipe.transformer, self.preconditioning
        height, width = (size // 2 for size in self.spec.shape[1:])
        image_ids = self.pipe._prepare_latent_image_ids(1, height, width, embeds.device, embeds.dtype)

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            times = len(x) // len(embeds)
            guidance = torch.full((len(x),), self.guidance_scale, device=x.device)
            velocity = transformer(
                hidden_states=packed(x).to(embeds.dtype),
                timestep=preconditioning.timestep(sigma).to(embeds.dtype) / preconditioning.times,
                guidance=guidance if transformer.config.guidance_embeds else None,
                pooled_projections=pooled.repeat(times, 1),
                encoder_hidden_states=embeds.repeat(times, 1, 1),
                txt_ids=text_ids,
                img_ids=image_ids,
                return_dict=False,
            )[0]
            return preconditioning.denoised(x, unpacked(velocity, height).to(x.dtype), sigma.view(-1, 1, 1, 1))

        return denoise

    def decode(self, x: Tensor) -> Tensor:
        """Latents (B, C, h, w) -> images (B, 3, H, W) in [0, 1]."""
        return decoded(self.pipe.vae, x)


def packed(x: Tensor) -> Tensor:
    """Latents (B, C, 2h, 2w) -> tokens of 2x2 patches, (B, h w, 4 C)."""
    return pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def unpacked(tokens: Tensor, height: int) -> Tensor:
    """The inverse of `packed`, with h = height."""
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, -1)), 2)
