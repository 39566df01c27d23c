"""Images by a diffusers pipeline and a predictor, with the points of each step as one batch."""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor

from backends.backend import counted_denoiser
from backends.flux import Flux, packed
from backends.pipeline import PipelineBackend, check_backbone
from backends.stable_diffusion import StableDiffusion
from backends.stable_diffusion_3 import StableDiffusion3
from solvers import Predictor, integrate, load_predictor
from solvers.predictor import Difference


@torch.no_grad()
def sample(
    pipe: DiffusionPipeline,
    predictor: Predictor | Path | str,
    prompt: str | Sequence[str],
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    *,
    negative_prompt: str | Sequence[str] | None = None,
    guidance_scale: float | None = None,
    num_images_per_prompt: int = 1,
    height: int | None = None,
    width: int | None = None,
    output_type: str = "pil",
    allow: Collection[Difference] = (),
    group: dist.ProcessGroup | None = None,
) -> Any:
    """Images of prompts by a predictor, with the points of each step as one batch: `serial_evaluations` calls of the network.

    They are those that the pipeline makes with the predictor's PredictorScheduler, to rounding, for the same generator. A
    pipeline knows its model's name where that came from the hub, but not its revision: pin that where the pipeline is loaded.

    Args:
        pipe: a StableDiffusionPipeline, StableDiffusion3Pipeline or FluxPipeline, with its weights where it is to run.
        predictor: itself, or its folder.
        prompt: one or several.
        generator: of the noise; a list has one for each image.
        negative_prompt: what guidance leads away from, one for all prompts or one for each; not for FLUX.
        guidance_scale: None is the predictor's own.
        num_images_per_prompt: as in the pipeline; images of the same prompt follow one another.
        height, width: in pixels; None: the model's own.
        output_type: "pil", a list; "np", (B, H, W, C); "pt", (B, C, H, W), in [0, 1]; "latent", as the pipeline's.
        allow: what may differ from what the predictor was made for: "backbone", "guidance_scale", "sigmas".
        group: of torch.distributed, among whose processes the rows of each call are spread; all of them call this, with the
            same arguments and generators, and get the same images.

    Raises:
        TypeError: the pipeline is none of these.
        ValueError: the predictor was made for something else; an argument is not as it has to be.
    """
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"output_type: {output_type!r}; valid: pil, np, pt, latent")
    found = predictor if isinstance(predictor, Predictor) else load_predictor(predictor)
    scale = found.guidance_scale if guidance_scale is None else guidance_scale
    backend = backend_of(pipe, height, width, scale)
    check_backbone(found, pipe, allow)
    found.used_for(guidance_scale=scale, allow=allow)
    backend.preconditioning.check(found, allow)
    prompts, negative = batch(prompt, negative_prompt, num_images_per_prompt)
    each = generator if generator is None or isinstance(generator, torch.Generator) else list(generator)
    if isinstance(each, list) and len(each) != len(prompts):
        raise ValueError(f"generator: {len(each)} of them; valid: one, or one for each of the {len(prompts)} images")
    device = pipe._execution_device
    noise = randn_tensor((len(prompts), *backend.spec.shape), each, device, pipe.dtype)
    rows_scale = scale if backend.spec.guidance is not None else max(scale, 1.0)  # below 1 there is none, as in pipelines
    denoise, _ = counted_denoiser(backend, prompts, rows_scale, negative, group)
    start = found.sigmas[0] * backend.spec.state(noise)
    x = integrate(denoise, found, start, found.sigmas)
    latents = packed(x) if isinstance(backend, Flux) else x
    images = latents.to(pipe.dtype) if output_type == "latent" else backend.decode(x)
    pipe.maybe_free_model_hooks()
    if output_type in ("pt", "latent"):
        return images
    arrays = pipe.image_processor.pt_to_numpy(images)  # type: ignore[attr-defined]
    return pipe.image_processor.numpy_to_pil(arrays) if output_type == "pil" else arrays  # type: ignore[attr-defined]


def backend_of(
    pipe: DiffusionPipeline, height: int | None = None, width: int | None = None, guidance_scale: float = 1.0
) -> PipelineBackend:
    """The frozen model of a pipeline, for images of that size; FLUX is shown the guidance scale."""
    match pipe:
        case StableDiffusionPipeline():
            return StableDiffusion(pipe, height, width)
        case StableDiffusion3Pipeline():
            return StableDiffusion3(pipe, height, width)
        case FluxPipeline():
            return Flux(pipe, height, width, guidance_scale)
    valid = "StableDiffusionPipeline, StableDiffusion3Pipeline, FluxPipeline"
    raise TypeError(f"pipe: {type(pipe).__name__}; valid: {valid}")


def batch(prompt: str | Sequence[str], negative: str | Sequence[str] | None, images: int) -> tuple[list[str], list[str] | None]:
    """The prompts and negative prompts of all images, those of the same prompt after one another."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or images < 1:
        raise ValueError(f"prompt, num_images_per_prompt: {len(prompts)}, {images}; valid: one or more, 1 or more")
    if negative is None:
        others = None
    else:
        others = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
        if len(others) != len(prompts):
            raise ValueError(f"negative_prompt: {len(others)}; valid: one, or one for each prompt")
    each, rest = ([text for text in texts for _ in range(images)] for texts in (prompts, others or []))
    return each, rest or None
