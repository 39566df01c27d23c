import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

with warnings.catch_warnings():  # of diffusers' and transformers' own imports
    warnings.simplefilter("ignore")
    from diffusers import (
        StableDiffusionImg2ImgPipeline,
        StableDiffusionInpaintPipeline,
    )
    from tiny import tiny_sd15

    from backends.sample import sample
    from backends.scheduler import PredictorScheduler

from solvers import (
    Backbone,
    EPDTable,
    Predictor,
    save_predictor,
)

from .conftest import FAMILIES, PROMPTS, SIZE, STEPS, VP, calls, generator, predictor, scheduled

BOTH = ["epd2", "epd1", "epd3", "plugin2", "multistep1", "multistep2"]


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize(
    ("name", "table"),
    [
        *((name, table) for name in FAMILIES for table in BOTH),
        *(("sd15", table) for table in ("epd2-afs", "multistep1-afs", "multistep2-afs")),
    ],
)
def test_the_unchanged_pipeline_makes_the_batched_form_s_images(
    name: str, table: str, guidance_scale: float, pipes: Callable[[str], Any]
) -> None:
    pipe, made = pipes(name), predictor(table, name, guidance_scale)
    rows = len(PROMPTS) * (1 if guidance_scale == 1 or name == "flux" else 2)
    with calls(pipe) as batched:
        expected = sample(pipe, made, PROMPTS, generator(), **SIZE, output_type="pt")
    assert (len(batched), sum(batched)) == (made.serial_evaluations, rows * made.total_evaluations)
    with calls(scheduled(pipe, made)) as successive:
        images = pipe(
            PROMPTS, **SIZE, num_inference_steps=STEPS, guidance_scale=guidance_scale, generator=generator(), output_type="pt"
        ).images
    assert successive == [rows] * made.total_evaluations
    assert float((images - expected).abs().max()) < 3e-6
    assert float((images[0] - images[1]).abs().max()) > 1e-2  # another prompt, another noise


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_stable_diffusion_s_images_are_those_of_the_formulas(prediction: Any) -> None:
    """EPD-Solver written naively over the U-Net itself: noise levels, scaling, times and guidance spelled out."""
    pipe = tiny_sd15(prediction)
    pipe.set_progress_bar_config(disable=True)
    made = predictor("epd2", "sd15")
    levels = ((1 - pipe.scheduler.alphas_cumprod) / pipe.scheduler.alphas_cumprod).sqrt().double()
    embeds, negative = pipe.encode_prompt("a boat", torch.device("cpu"), 1, True)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        position = (torch.log1p(levels**2) < torch.log1p(sigma**2)).sum().clamp(1, 999)
        low, high = torch.log1p(levels[position - 1] ** 2), torch.log1p(levels[position] ** 2)
        time = (position - 1 + (torch.log1p(sigma**2) - low) / (high - low)).clamp(0, 999).float()
        scaled = (x / (1 + sigma**2).sqrt()).float()
        outputs = [pipe.unet(scaled, time, encoder_hidden_states=e).sample.double() for e in (negative, embeds)]
        output = outputs[0] + 3.0 * (outputs[1] - outputs[0])
        if prediction == "epsilon":
            return x - sigma * output
        alpha, std = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
        return alpha * (alpha * x) - std * output

    table = made.table
    assert isinstance(table, EPDTable)
    with torch.no_grad():
        x = VP[0] * torch.randn(1, 4, 8, 8, generator=generator()).double()
        for n in range(STEPS):
            sigma, after = VP[n], VP[n + 1]
            d = (x - denoise(x, sigma)) / sigma
            step = torch.zeros_like(x)
            for k in range(2):
                r, w, o, a = (part[n, k] for part in (table.position, table.weight, table.direction_scale, table.time_scale))
                tau = after**r * sigma ** (1 - r)
                y = x + (tau - sigma) * d
                step += w * o * (y - denoise(y, a * tau)) / tau
            x = x + (after - sigma) * step
    scheduled(pipe, made)
    latents: Any = pipe("a boat", num_inference_steps=STEPS, guidance_scale=3.0, generator=generator(), output_type="latent")
    assert float((latents.images - x).abs().max()) < 2e-5 * float(x.abs().max())


@pytest.mark.parametrize(("name", "table"), [("sd15", "epd2"), ("sd3", "multistep2"), ("flux", "plugin2")])
def test_arguments_mean_what_they_mean_to_pipelines(name: str, table: str, pipes: Callable[[str], Any]) -> None:
    pipe, made = pipes(name), predictor(table, name)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    negative = {} if name == "flux" else {"negative_prompt": ["grey", "noise"]}
    expected = sample(pipe, made, PROMPTS, generators, **negative, num_images_per_prompt=2, **SIZE, output_type="pt")
    scheduled(pipe, made)

    def images(**arguments: Any) -> Tensor:
        common = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "pt", **SIZE}
        return pipe(**{**common, **arguments}).images

    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    found = images(prompt=PROMPTS, generator=generators, num_images_per_prompt=2, **negative)
    assert float((found - expected).abs().max()) < 3e-6
    alone = {key: value[1] for key, value in negative.items()}
    one = images(prompt=PROMPTS[1], generator=torch.Generator().manual_seed(3), **alone)
    assert float((one[0] - found[3]).abs().max()) < 3e-6
    pictures = sample(pipe, made, PROMPTS, generators, **SIZE, num_images_per_prompt=2)
    assert [picture.size for picture in pictures] == [(16, 16)] * 4


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ({"guidance_scale": 7.5}, r'guidance_scale: 7.5; valid: 3.0, .* or allow=\["guidance_scale"\]'),
        ({"output_type": "jpeg"}, "output_type: 'jpeg'; valid: pil, np, pt, latent"),
        ({"generator": [torch.Generator()]}, "generator: 1 of them; valid: one, or one for each of the 2 images"),
        ({"prompt": []}, "prompt, num_images_per_prompt: 0, 1; valid: one or more, 1 or more"),
        ({"num_images_per_prompt": 0}, "prompt, num_images_per_prompt: 2, 0; valid: one or more"),
        ({"height": 17}, "height, width: 17, None; valid: multiples of 2"),
        ({"negative_prompt": ["one", "two", "three"]}, "negative_prompt: 3; valid: one, or one for each prompt"),
    ],
)
def test_arguments_of_sample_are_checked(use: dict[str, Any], message: str, pipes: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match=message):
        sample(pipes("sd15"), predictor("epd2", "sd15"), **{"prompt": PROMPTS, **use})


@pytest.mark.parametrize("guidance_scale", [0.0, 0.5])
@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_there_is_no_guidance_below_1_as_in_pipelines(name: str, guidance_scale: float, pipes: Callable[[str], Any]) -> None:
    pipe, made = pipes(name), predictor("epd2", name, guidance_scale)
    expected = sample(pipe, made, "a boat", generator(), **SIZE, output_type="latent")
    common = {"num_inference_steps": STEPS, "guidance_scale": guidance_scale, "output_type": "latent", **SIZE}
    assert torch.allclose(scheduled(pipe, made)("a boat", generator=generator(), **common).images, expected, atol=1e-4)


def test_latents_are_those_of_the_pipeline(pipes: Callable[[str], Any]) -> None:
    pipe, made = pipes("flux"), predictor("epd2", "flux")
    found = sample(pipe, made, "a boat", generator(), height=16, width=32, output_type="latent")
    common = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "height": 16, "width": 32, "output_type": "latent"}
    expected = scheduled(pipe, made)("a boat", generator=generator(), **common).images
    assert found.shape == expected.shape == (1, 32, 16)
    assert torch.allclose(found, expected, atol=1e-5)


def test_what_the_safety_checker_flags_is_black(pipes: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipes("sd15")
    monkeypatch.setattr(pipe, "run_safety_checker", lambda images, device, dtype: (images, [False, True]))
    images = sample(pipe, predictor("epd2", "sd15"), PROMPTS, output_type="pt")
    assert [float(image.max()) > 0 for image in images] == [True, False]


def test_a_network_that_is_shown_the_guidance_scale_is_refused(pipes: Callable[[str], Any]) -> None:
    pipe = pipes("sd15")
    pipe.unet.register_to_config(time_cond_proj_dim=256)
    with pytest.raises(ValueError, match=r"time_cond_proj_dim: .*; valid: "):
        sample(pipe, predictor("epd2", "sd15"), "a boat")


def test_a_pipeline_of_no_known_family_is_refused(pipes: Callable[[str], Any]) -> None:
    pipe = StableDiffusionImg2ImgPipeline(**pipes("sd15").components)
    with pytest.raises(TypeError, match="pipe: StableDiffusionImg2ImgPipeline; valid: StableDiffusionPipeline, "):
        sample(pipe, predictor("epd2", "sd15"), "a boat")


def test_a_predictor_s_folder_is_as_good_as_the_predictor(pipes: Callable[[str], Any], tmp_path: Path) -> None:
    pipe, made = pipes("sd3"), predictor("epd2", "sd3")
    save_predictor(made, tmp_path)
    first, second = (sample(pipe, p, "a boat", generator(), **SIZE, output_type="np") for p in (made, str(tmp_path)))
    assert (first == second).all()
    assert first.shape == (1, 16, 16, 3)


def test_a_backbone_is_compared_where_it_can_be(pipes: Callable[[str], Any]) -> None:
    pipe, made = pipes("sd15"), predictor("epd2", "sd15")
    other = Predictor(**{**vars(made), "backbone": Backbone("tiny", None, "none", "FluxPipeline")})
    with pytest.raises(ValueError, match=r'backbone: a StableDiffusionPipeline; valid: a FluxPipeline, .*allow=\["backbone"\]'):
        sample(pipe, other, "a boat")
    with pytest.raises(ValueError, match=r"backbone: a StableDiffusionPipeline; valid: a FluxPipeline"):
        PredictorScheduler.from_predictor(other, pipe)
    same = Predictor(**{**vars(made), "backbone": Backbone("tiny", None, "none", "StableDiffusionPipeline")})
    for family in (pipe, StableDiffusionImg2ImgPipeline(**pipe.components), StableDiffusionInpaintPipeline(**pipe.components)):
        PredictorScheduler.from_predictor(same, family)
    pipe.register_to_config(_name_or_path="someone/else")
    with pytest.raises(ValueError, match=r'backbone: someone/else; valid: tiny, .*allow=\["backbone"\]'):
        PredictorScheduler.from_predictor(made, pipe)
    assert PredictorScheduler.from_predictor(made, pipe, allow=["backbone"]).preconditioning.prediction == "epsilon"
    with pytest.raises(ValueError, match=r'backbone: someone/else; valid: tiny, .*allow=\["backbone"\]'):
        sample(pipe, made, "a boat")
    sample(pipe, made, "a boat", guidance_scale=1.0, allow=["backbone", "guidance_scale"])


def test_a_group_shares_the_rows_of_each_call(
    pipes: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of this process alone; tests/solvers/test_sharded.py has several."""
    pipe, made = pipes("sd3"), predictor("epd2", "sd3")
    expected = sample(pipe, made, PROMPTS, generator(), **SIZE, output_type="pt")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    gather, gathered = dist.all_gather, list[int]()
    monkeypatch.setattr(dist, "all_gather", lambda every, mine, group: gathered.append(len(mine)) or gather(every, mine, group))
    try:
        found = sample(pipe, made, PROMPTS, generator(), **SIZE, output_type="pt", group=dist.group.WORLD)
    finally:
        dist.destroy_process_group()
    assert torch.equal(found, expected)
    assert gathered == [2 * len(PROMPTS), 4 * len(PROMPTS)] * STEPS, "both halves of guidance, and of a step's two points"
