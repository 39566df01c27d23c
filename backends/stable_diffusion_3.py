"""Stable Diffusion 3: a transformer over latents, trained as a rectified flow."""

from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from backends.pipeline import Embeddings, PipelineBackend, latent_size
from backends.preconditioning import Preconditioning, flow_grid


class StableDiffusion3(PipelineBackend):
    """The frozen model of a StableDiffusion3Pipeline, as a Backend.

    Args:
        pipe: with its weights where it is to run.
        height, width: of the images, in pixels; None: the model's own.
    """

    def __init__(self, pipe: StableDiffusion3Pipeline, height: int | None = None, width: int | None = None) -> None:
        own = (pipe.default_sample_size, pipe.default_sample_size)
        patch = pipe.transformer.config.patch_size
        rows, columns = latent_size(height, width, own, pipe.vae_scale_factor, patch)
        config = pipe.scheduler.config
        shift, sigma_min = flow_grid(config, rows * columns // patch**2)
        shape = (pipe.transformer.config.in_channels, rows, columns)
        super().__init__(pipe, Preconditioning.of(config), shape, sigma_min, shift)

    def _encode(self, prompt: str) -> Embeddings:
        once, device = [prompt], self.spec.device
        embeds, _, pooled, _ = self.pipe.encode_prompt(once, once, once, device, do_classifier_free_guidance=False)
        return embeds, pooled

    def _network(self, x: Tensor, timestep: Tensor, *conditions: Tensor) -> Tensor:
        embeds, pooled = conditions
        return self.pipe.transformer(
            hidden_states=x, timestep=timestep, encoder_hidden_states=embeds, pooled_projections=pooled, return_dict=False
        )[0]
