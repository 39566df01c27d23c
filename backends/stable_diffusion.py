"""Stable Diffusion 1.5: a U-Net over latents, in noise levels sigma = sqrt((1 - alphas_cumprod) / alphas_cumprod)."""

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from backends.pipeline import Embeddings, PipelineBackend, latent_size
from backends.preconditioning import Preconditioning


class StableDiffusion(PipelineBackend):
    """The frozen model of a StableDiffusionPipeline, as a Backend.

    Args:
        pipe: with its weights where it is to run.
        height, width: of the images, in pixels; None: the model's own.
    """

    def __init__(self, pipe: StableDiffusionPipeline, height: int | None = None, width: int | None = None) -> None:
        if pipe.unet.config.time_cond_proj_dim is not None:
            raise ValueError("time_cond_proj_dim: a U-Net that is shown the guidance scale; valid: one that is not")
        size = pipe.unet.config.sample_size
        shape = latent_size(height, width, (size, size) if isinstance(size, int) else size, pipe.vae_scale_factor)
        super().__init__(pipe, Preconditioning.of(pipe.scheduler.config), (pipe.unet.config.in_channels, *shape))

    def _encode(self, prompt: str) -> Embeddings:
        embeds, _ = self.pipe.encode_prompt([prompt], self.spec.device, 1, False)
        return (embeds,)

    def _network(self, x: Tensor, timestep: Tensor, *conditions: Tensor) -> Tensor:
        (embeds,) = conditions
        return self.pipe.unet(x, timestep, encoder_hidden_states=embeds, return_dict=False)[0]

    def decode(self, x: Tensor) -> Tensor:
        """Latents (B, 4, h, w) -> images (B, 3, H, W) in [0, 1], black where a safety checker says so."""
        images = super().decode(x)
        _, flags = self.pipe.run_safety_checker(2 * images - 1, images.device, images.dtype)
        if flags is not None:
            images = images * torch.tensor([not flag for flag in flags]).to(images).view(-1, 1, 1, 1)
        return images
