"""Stable Diffusion 3: a transformer over latents, trained as a rectified flow."""

from collections.abc import Sequence

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from backends.backend import Spec
from backends.latents import decoded, distinct, latent_size
from backends.preconditioning import Preconditioning
from solvers import Denoiser


class StableDiffusion3:
    """The frozen model of a StableDiffusion3Pipeline, as a Backend.

    Args:
        pipe: with its weights where it is to run.
        height, width: of the images, in pixels; None: the model's own.
    """

    def __init__(self, pipe: StableDiffusion3Pipeline, height: int | None = None, width: int | None = None) -> None:
        self.pipe = pipe
        self.preconditioning = Preconditioning.of(pipe.scheduler.config)
        own = (pipe.default_sample_size, pipe.default_sample_size)
        shape = latent_size(height, width, own, pipe.vae_scale_factor, pipe.transformer.config.patch_size)
        self.spec = Spec(
            (pipe.transformer.config.in_channels, *shape), self.preconditioning.sigma_min, self.preconditioning.sigma_max
        )

    def denoiser(self, prompts: Sequence[str]) -> Denoiser:
        unique, rows = distinct(prompts)
        device: torch.device = self.pipe._execution_device
        embeds, _, pooled, _ = self.pipe.encode_prompt(unique, unique, unique, device, do_classifier_free_guidance=False)
        embeds, pooled = embeds[rows], pooled[rows]  # type: ignore[index]
        transformer, preconditioning = self.pipe.transformer, self.preconditioning

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            times = len(x) // len(embeds)
            velocity = transformer(
                hidden_states=x.to(embeds.dtype),
                timestep=preconditioning.timestep(sigma),
                encoder_hidden_states=embeds.repeat(times, 1, 1),
                pooled_projections=pooled.repeat(times, 1),
                return_dict=False,
            )[0]
            return preconditioning.denoised(x, velocity.to(x.dtype), sigma.view(-1, 1, 1, 1))

        return denoise

    def decode(self, x: Tensor) -> Tensor:
        """Latents (B, 16, h, w) -> images (B, 3, H, W) in [0, 1]."""
        return decoded(self.pipe.vae, x)
