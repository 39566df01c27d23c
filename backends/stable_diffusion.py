"""Stable Diffusion 1.5: a U-Net over latents, in noise levels sigma = sqrt((1 - alphas_cumprod) / alphas_cumprod)."""

from collections.abc import Sequence

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from backends.backend import Spec
from backends.latents import decoded, distinct, latent_size
from backends.preconditioning import Preconditioning
from solvers import Denoiser


class StableDiffusion:
    """The frozen model of a StableDiffusionPipeline, as a Backend.

    Args:
        pipe: with its weights where it is to run.
        height, width: of the images, in pixels; None: the model's own.
    """

    def __init__(self, pipe: StableDiffusionPipeline, height: int | None = None, width: int | None = None) -> None:
        if pipe.unet.config.time_cond_proj_dim is not None:
            raise ValueError("time_cond_proj_dim: a U-Net that is shown the guidance scale; valid: one that is not")
        self.pipe = pipe
        self.preconditioning = Preconditioning.of(pipe.scheduler.config)
        size = pipe.unet.config.sample_size
        shape = latent_size(height, width, (size, size) if isinstance(size, int) else size, pipe.vae_scale_factor)
        self.spec = Spec((pipe.unet.config.in_channels, *shape), self.preconditioning.sigma_min, self.preconditioning.sigma_max)

    def denoiser(self, prompts: Sequence[str]) -> Denoiser:
        unique, rows = distinct(prompts)
        embeds, _ = self.pipe.encode_prompt(unique, self.pipe._execution_device, 1, False)
        embeds, unet, preconditioning = embeds[rows], self.pipe.unet, self.preconditioning

        def denoise(x: Tensor, sigma: Tensor) -> Tensor:
            level = sigma.view(-1, 1, 1, 1)
            output = unet(
                preconditioning.network_input(x, level).to(embeds.dtype),
                preconditioning.timestep(sigma),
                encoder_hidden_states=embeds.repeat(len(x) // len(embeds), 1, 1),
                return_dict=False,
            )[0]
            return preconditioning.denoised(x, output.to(x.dtype), level)

        return denoise

    def decode(self, x: Tensor) -> Tensor:
        """Latents (B, 4, h, w) -> images (B, 3, H, W) in [0, 1], black where a safety checker says so."""
        images = decoded(self.pipe.vae, x)
        _, flags = self.pipe.run_safety_checker(2 * images - 1, images.device, images.dtype)
        if flags is not None:
            images = images * torch.tensor([not flag for flag in flags]).to(images).view(-1, 1, 1, 1)
        return images
