import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

with warnings.catch_warnings():  # of diffusers' and transformers' own imports
    warnings.simplefilter("ignore")
    from diffusers import (
        DiffusionPipeline,
        EulerDiscreteScheduler,
        FluxImg2ImgPipeline,
        StableDiffusion3Img2ImgPipeline,
        StableDiffusionImg2ImgPipeline,
        StableDiffusionInpaintPipeline,
    )

    from backends.sample import sample
    from backends.scheduler import PredictorScheduler

from solvers import (
    AMED,
    Backbone,
    EPDTable,
    Predictor,
    load_predictor,
    logsnr,
)

from .conftest import FAMILIES, FLOW, PROMPTS, SIZE, STEPS, VP, calls, generator, network_of, per_image, predictor, scheduled

IMAGE_TO_IMAGE = {
    "sd15": StableDiffusionImg2ImgPipeline,
    "sd3": StableDiffusion3Img2ImgPipeline,
    "flux": FluxImg2ImgPipeline,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_callbacks_see_and_change_the_state(name: str, pipes: Callable[[str], Any]) -> None:
    """A change of the latents at any evaluation changes the state by as much, and the end where the network says nothing."""
    made = predictor("epd2", name)
    pipe = scheduled(pipes(name), made)
    seen: list[int] = []
    common = {"num_inference_steps": STEPS, "output_type": "latent", **SIZE}

    def run(change_at: int | None) -> Tensor:
        def callback(pipe: Any, index: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            seen.append(index)
            assert float(timestep) == float(pipe.scheduler.timesteps[index])
            if index == change_at == 2:
                tensors["latents"] += 0.5  # in place
            return {"latents": tensors["latents"] + 0.5} if index == change_at != 2 else {}

        return pipe("a boat", generator=generator(), callback_on_step_end=callback, **common).images

    network_of(pipe).register_forward_hook(lambda module, arguments, output: (torch.zeros_like(output[0]),))
    plain = run(None)
    assert seen == list(range(made.total_evaluations))
    for change_at in (0, 1, 2, 7, 11):
        assert torch.allclose(run(change_at), plain + 0.5, atol=1e-5)


@pytest.mark.parametrize("table", ["epd2", "plugin2", "multistep1", "multistep2"])
@pytest.mark.parametrize("name", FAMILIES)
def test_image_to_image_takes_any_strength(
    name: str, table: str, folders: dict[str, Path], pipes: Callable[[str], Any]
) -> None:
    made = predictor(table, name)
    pipe = scheduled(pipes(name), made)
    pipe = IMAGE_TO_IMAGE[name](**pipe.components)
    pipe.set_progress_bar_config(disable=True)
    picture = torch.rand(1, 3, 16, 16, generator=generator())
    common = {"image": picture, "num_inference_steps": STEPS, "generator": generator(), "output_type": "latent", **SIZE}
    if name == "sd15":
        del common["height"], common["width"]
    for strength in (0.25, 0.3, 0.5, 0.75, 0.9, 1.0):
        with calls(pipe) as rows:
            latents = pipe("a boat", strength=strength, **common).images
        assert bool(latents.isfinite().all())
        steps = len(pipe.scheduler.timesteps) - pipe.scheduler.begin_index
        assert len(rows) == steps
        assert abs(len(rows) / made.total_evaluations - strength) < 0.3


@pytest.mark.parametrize(
    ("table", "begin", "idle"), [("epd2", 7, 1), ("epd2", 11, 0), ("multistep2", 2, 0), ("epd2-afs", 3, 1)]
)
def test_a_start_inside_a_step_leads_to_the_next_by_euler(
    table: str, begin: int, idle: int, pipes: Callable[[str], Any]
) -> None:
    made = predictor(table, "sd15")
    inside, after = (PredictorScheduler.from_predictor(made, pipes("sd15").scheduler) for _ in range(2))
    inside.set_begin_index(begin)
    first = inside._evaluations[begin]
    sigma, shown, end = first.sigma, first.shown, float(first.table.sigma_next)
    x0, noise = torch.randn(2, 1, 4, 8, 8, generator=generator(), dtype=torch.float64)
    x = inside.add_noise(x0, noise, inside.timesteps[begin : begin + 1])
    assert torch.allclose(x, x0 + sigma * noise)
    output = torch.tanh(x)
    expected = x + (end - sigma) * (shown * output) / sigma  # D = x - shown output, d = (x - D) / sigma
    timesteps = inside.timesteps[begin:]
    x = inside.step(output, timesteps[0], x, return_dict=False)[0]
    for timestep in timesteps[1 : 1 + idle]:
        x = inside.step(torch.ones_like(x), timestep, x, return_dict=False)[0]
    assert torch.allclose(x, expected, rtol=1e-12)
    after.set_begin_index(begin + 1 + idle) if begin + 1 + idle < len(after.timesteps) else None
    y = x
    for timestep in timesteps[1 + idle :]:
        assert torch.equal(inside.scale_model_input(x, timestep), after.scale_model_input(y, timestep))
        x, y = (s.step(torch.tanh(z), timestep, z, return_dict=False)[0] for s, z in ((inside, x), (after, y)))
        assert torch.equal(x, y)
    with pytest.raises(ValueError, match=rf"begin index: 99; valid: 0 to {made.total_evaluations - 1}"):
        inside.set_begin_index(99)


def test_a_start_in_the_middle_is_the_rest_of_the_way(pipes: Callable[[str], Any]) -> None:
    """EPD has no memory: from a step's node on, it is a shorter table."""
    made = predictor("epd2", "sd15")
    table, rest = made.table, slice(2, None)
    assert isinstance(table, EPDTable)
    parts = (table.position, table.weight, table.direction_scale, table.time_scale)
    r, w, o, a = (part[rest] for part in parts)
    short = Predictor(EPDTable(r, w, o, a), VP[2:], False, made.backbone, 3.0, {})
    own = pipes("sd15").scheduler
    whole, alone = (PredictorScheduler.from_predictor(p, own, allow=["sigmas"]) for p in (made, short))
    whole.set_begin_index(6)
    assert torch.equal(whole.timesteps[6:], alone.timesteps)
    x0, noise = torch.randn(2, 1, 4, 8, 8, generator=generator(), dtype=torch.float64)
    x = whole.add_noise(x0, noise, whole.timesteps[6:7])
    assert torch.allclose(x, x0 + VP[2] * noise)
    y = x
    for timestep in alone.timesteps:
        assert torch.equal(whole.scale_model_input(x, timestep), alone.scale_model_input(y, timestep))
        x, y = (s.step(torch.tanh(z), timestep, z, return_dict=False)[0] for s, z in ((whole, x), (alone, y)))
        assert torch.equal(x, y)


@pytest.mark.parametrize("table", ["multistep1", "multistep2", "plugin2"])
def test_a_constant_direction_is_followed_exactly_from_the_middle_too(table: str, pipes: Callable[[str], Any]) -> None:
    """The outputs that a multistep table lacks there are taken to be as the first one, so that a constant one is integrated."""
    made = predictor(table, "sd15")
    scheduler = PredictorScheduler.from_predictor(made, pipes("sd15").scheduler)
    start = next(i for i, e in enumerate(scheduler._evaluations) if float(e.table.sigma) == made.sigmas[2].item() and e.first)
    scheduler.set_begin_index(start)
    x = torch.randn(1, 4, 8, 8, generator=generator(), dtype=torch.float64)
    expected, scale = x.clone(), torch.ones((), dtype=torch.float64)
    for step in (2, 3):
        row = made(step, made.sigmas).update
        expected += (made.sigmas[step + 1] - made.sigmas[step]) * row.sum() * scale
    for evaluation in scheduler._evaluations[start:]:
        # the network's output for which d = (y - D) / node is 1
        output = torch.full_like(x, float(evaluation.table.node_levels[evaluation.i]) / evaluation.shown)
        x = scheduler.step(output, scheduler.timesteps[start], x, return_dict=False)[0]
    assert torch.allclose(x, expected, atol=1e-9)


def test_inpainting_keeps_what_is_not_masked(pipes: Callable[[str], Any]) -> None:
    made = predictor("epd2", "sd15")
    pipe = StableDiffusionInpaintPipeline(**scheduled(pipes("sd15"), made).components)
    pipe.set_progress_bar_config(disable=True)
    picture, mask = torch.rand(1, 3, 16, 16, generator=generator()), torch.zeros(1, 1, 16, 16)
    mask[..., :8] = 1
    latents: Any = pipe(
        "a boat", picture, mask, height=16, width=16, num_inference_steps=STEPS, generator=generator(), output_type="latent"
    )
    encoded = pipe.vae.encode(2 * picture - 1).latent_dist.mean.detach() * pipe.vae.config.scaling_factor
    changed, kept = ((latents.images - encoded)[..., part].abs().mean() for part in (slice(0, 4), slice(4, 8)))
    assert float(kept) < 0.1 * float(changed)


def test_the_state_keeps_single_precision_beside_a_half_precision_network(pipes: Callable[[str], Any]) -> None:
    made = predictor("epd2", "sd15")
    pipe = pipes("sd15").to(torch.bfloat16)
    expected = sample(pipe, made, PROMPTS, generator(), output_type="latent")
    assert expected.dtype == torch.bfloat16
    common = {"guidance_scale": 3.0, "generator": generator(), "output_type": "latent"}
    latents = scheduled(pipe, made)(PROMPTS, num_inference_steps=STEPS, **common)
    assert latents.images.dtype == torch.bfloat16
    # the network's rounding alone, some 8 bits
    assert float((latents.images - expected).abs().mean()) < 0.03 * float(expected.abs().mean())


@pytest.mark.parametrize("table", ["epd2", "multistep2"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_pipeline_is_the_same_pipeline(name: str, table: str, pipes: Callable[[str], Any], tmp_path: Path) -> None:
    pipe = scheduled(pipes(name), predictor(table, name))
    pipe.save_pretrained(tmp_path / "pipe")
    names = {file.name for file in (tmp_path / "pipe/scheduler").iterdir()}
    assert names == {"scheduler_config.json", "predictor.json", "predictor.safetensors", "README.md"}
    index = json.loads((tmp_path / "pipe/model_index.json").read_text())
    assert index["scheduler"] == ["backends.scheduler", "PredictorScheduler"]
    again: Any = DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    again.set_progress_bar_config(disable=True)
    common = {"num_inference_steps": STEPS, "output_type": "pt", **SIZE}
    first, second = (p("a boat", generator=generator(), **common).images for p in (pipe, again))
    assert torch.equal(first, second)
    alone = PredictorScheduler.from_pretrained(tmp_path / "pipe", subfolder="scheduler")
    assert torch.equal(alone.timesteps, pipe.scheduler.timesteps)
    assert torch.equal(load_predictor(tmp_path / "pipe/scheduler").sigmas, alone.predictor.sigmas)


def test_other_schedulers_take_its_configuration_and_the_other_way_round(pipes: Callable[[str], Any]) -> None:
    pipe, made = pipes("sd15"), predictor("epd2", "sd15")
    scheduler = PredictorScheduler.from_config(pipe.scheduler.config, predictor=made)
    assert torch.equal(scheduler.timesteps, PredictorScheduler.from_predictor(made, pipe.scheduler).timesteps)
    other: Any = EulerDiscreteScheduler.from_config(scheduler.config)
    assert other.config.beta_start == 0.00085
    for name in FAMILIES:
        own = pipes(name).scheduler
        back = type(own).from_config(PredictorScheduler.from_predictor(predictor("epd2", name), own).config)
        kept = {key: value for key, value in own.config.items() if not key.startswith("_")}
        assert kept == {key: back.config[key] for key in kept}
    turned = PredictorScheduler.from_config(pipe.scheduler.config, predictor=made, prediction_type="v_prediction")
    assert turned.preconditioning.prediction == turned.config.prediction_type == "v_prediction"
    with pytest.raises(ValueError, match=r"allow: \['sigma'\]; valid: backbone, guidance_scale, sigmas"):
        PredictorScheduler.from_predictor(made, pipe.scheduler, allow=["sigma"])  # type: ignore[list-item]
    assert torch.equal(PredictorScheduler.from_predictor(made, scheduler).timesteps, scheduler.timesteps)
    with pytest.raises(ValueError, match=r"predictor: none, .*; valid: from_config\(config, predictor=...\)"):
        PredictorScheduler.from_config(pipe.scheduler.config)


def test_what_is_pushed_to_the_hub_is_what_is_loaded_from_it(
    pipes: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the hub's two calls in place of the hub."""
    hub: dict[str, bytes] = {}

    def upload(self: Any, folder: str, repo_id: str, **named: Any) -> str:
        hub.update({f"{repo_id}/{file.name}": file.read_bytes() for file in Path(folder).iterdir()})
        return repo_id

    def download(repo_id: str, filename: str, subfolder: str | None = None, **named: Any) -> str:
        file = tmp_path / "cache" / filename
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(hub[f"{repo_id}/{filename}"])
        return str(file)

    class Created:
        repo_id = "user/predictor"

    scheduler = scheduled(pipes("sd3"), predictor("multistep2", "sd3")).scheduler
    monkeypatch.setattr("backends.scheduler.create_repo", lambda *arguments, **named: Created)
    monkeypatch.setattr(PredictorScheduler, "_upload_folder", upload)
    scheduler.push_to_hub("predictor")
    card = hub["user/predictor/README.md"].decode()
    assert card.startswith("# predictor\n")
    assert 'PredictorScheduler.from_pretrained("user/predictor")' in card
    monkeypatch.setattr("backends.scheduler.hf_hub_download", download)
    config = json.loads(hub["user/predictor/scheduler_config.json"])
    monkeypatch.setattr(PredictorScheduler, "load_config", classmethod(lambda *arguments, **named: (config, {}, None)))
    found = PredictorScheduler.from_pretrained("user/predictor", revision="main")
    assert torch.equal(found.timesteps, scheduler.timesteps)


@pytest.mark.parametrize("name", FAMILIES)
def test_another_number_of_steps_is_refused_before_anything_runs(name: str, pipes: Callable[[str], Any]) -> None:
    pipe = scheduled(pipes(name), predictor("epd2", name))
    with calls(pipe) as rows, pytest.raises(ValueError, match="num_inference_steps: 20; valid: 4, the steps of"):
        pipe("a boat", num_inference_steps=20, **SIZE)
    assert not rows


def test_other_noise_levels_are_refused(pipes: Callable[[str], Any]) -> None:
    scheduler = PredictorScheduler.from_predictor(predictor("epd2", "flux"), pipes("flux").scheduler)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.7)  # what FLUX's pipelines give
    scheduler.set_timesteps(sigmas=FLOW[:-1].tolist())
    with pytest.raises(ValueError, match=r"sigmas: .*; valid: the grid that the table was made for"):
        scheduler.set_timesteps(sigmas=[1.0, 0.8, 0.6, 0.1])


def test_more_evaluations_than_the_table_has_are_refused(pipes: Callable[[str], Any]) -> None:
    scheduler = PredictorScheduler.from_predictor(predictor("multistep1", "sd15"), pipes("sd15").scheduler)
    x = torch.zeros(1, 4, 8, 8)
    for timestep in scheduler.timesteps:
        x = scheduler.step(x, timestep, x, return_dict=False)[0]
    with pytest.raises(ValueError, match="step: more than 4 evaluations; valid: set_timesteps before another image"):
        scheduler.step(x, scheduler.timesteps[-1], x)
    scheduler.set_timesteps(STEPS)
    with pytest.raises(ValueError, match=r"timestep: 3.0; valid: \[998"):
        scheduler.step(x, 3.0, x)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sd3", {"sigmas": VP}, "sigmas: from 14.6 on; valid: from 1 on, a flow network's noise"),
        ("sd15", {"sigmas": logsnr(STEPS + 1, 0.002, 80.0)}, "sigmas: from 80.0 on; valid: from about 14.6"),
        ("sd15", {"sigmas": FLOW}, "sigmas: from 1.0 on; valid: from about 14.6"),
        (
            "sd15",
            {"backbone": Backbone("f", None, "", "FluxPipeline")},
            "backbone: a variance-preserving network; valid: that of a Flux",
        ),
        ("sd15", {"table": per_image()}, "table: one for each of 5 images; valid: one for all"),
        ("sd3", {"afs": True}, "afs: True; valid: False, since a flow pipeline"),
        ("sd15", {"table": AMED(STEPS + 1, 4, 0.0, 0.0)}, "family: amed, .*; valid: epd or multistep"),
    ],
)
def test_a_predictor_that_does_not_fit_is_refused(
    name: str, change: dict[str, Any], message: str, pipes: Callable[[str], Any]
) -> None:
    made = Predictor(**{**vars(predictor("epd2", name)), **change})
    with pytest.raises(ValueError, match=message):
        PredictorScheduler.from_predictor(made, pipes(name).scheduler)
    if "about" in message:
        PredictorScheduler.from_predictor(made, pipes(name).scheduler, allow=["sigmas"])


def test_no_image_is_kept_when_it_is_done(pipes: Callable[[str], Any]) -> None:
    pipe = scheduled(pipes("sd15"), predictor("plugin2", "sd15"))
    pipe("a boat", num_inference_steps=STEPS)
    kept = vars(pipe.scheduler)
    assert not any(kept[name] for name in ("_outputs", "_earlier"))
    assert all(kept[name] is None for name in ("_x", "_state", "_returned"))
    assert pipe.scheduler.sigmas[-1] == VP[-1].float()
    assert len(pipe.scheduler.sigmas) == len(pipe.scheduler.timesteps) + 1
