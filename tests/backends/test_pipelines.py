"""Pipelines as backends: their latents, their networks' formulas, what each call costs, and what prompts do."""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

with warnings.catch_warnings():  # of diffusers' and transformers' own imports
    warnings.simplefilter("ignore")
    from diffusers import EulerDiscreteScheduler
    from tiny import tiny_sd15

    from backends import pipeline as module
    from backends.flux import packed, unpacked
    from backends.pipeline import DECODED, KNOWN, PipelineBackend, Texts, scale_gradient
    from backends.sample import backend_of

from backends import counted_denoiser
from solvers import SOLVERS, flowmatch, integrate, parallel_integrate
from stages.grid import grid
from stages.params import Discrete, FlowMatch

from .conftest import FAMILIES, FLOW, PROMPTS, VP, calls, epd, network_of

Pipes = Callable[[str], Any]

SCALES = {"sd15": 7.5, "sd3": 4.5, "flux": 3.5}
GUIDED = ["sd15", "sd3"]
NUMPY = "ignore:__array__ implementation:DeprecationWarning"  # EulerDiscreteScheduler's way with tensors
TWELVE = [f"{count} boats" for count in range(12)]


def backend_for(name: str, pipe: Any, height: int = 16, width: int = 16) -> PipelineBackend:
    return backend_of(pipe, height, width, SCALES[name])


def unit_noise(backend: PipelineBackend, count: int, seed: int = 0) -> Tensor:
    shape = (count, *backend.spec.shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def levels_of(backend: PipelineBackend, count: int) -> Tensor:
    """Noise levels of a call's rows, each another."""
    return torch.linspace(0.9, 0.2, count).double() * backend.spec.sigma_max


def sampled(
    name: str, backend: PipelineBackend, prompts: list[str], noise: Tensor, negative: list[str] | None = None
) -> Tensor:
    denoise, _ = counted_denoiser(backend, prompts, SCALES[name], negative)
    sigmas = VP if name == "sd15" else FLOW
    return integrate(denoise, SOLVERS["euler"], sigmas[0] * noise, sigmas)


def distance(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest number."""
    return float((found - expected).abs().max() / expected.abs().max())


@contextmanager
def encoded(pipe: Any) -> Iterator[Counter[str]]:
    """How often each text encoder is called."""
    found: Counter[str] = Counter()
    names = [name for name in pipe.components if name.startswith("text_encoder")]
    hooks = [getattr(pipe, name).register_forward_hook(lambda *_, name=name: found.update([name])) for name in names]
    yield found
    for hook in hooks:
        hook.remove()


def euler_discrete(pipe: Any, spacing: str) -> Any:
    return EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing=spacing)


def native(name: str, backend: PipelineBackend, steps: int) -> Tensor:
    """The noise levels of a family's own schedule, but for the last, 0."""
    shift = backend.spec.shift
    match name:
        case "sd15":
            return backend.pipe.scheduler.sigmas[:-1].double()
        case "sd3":
            assert shift is not None
            return flowmatch(steps, backend.spec.sigma_min, 1.0, shift)
    assert shift is not None
    even = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
    return shift * even / (1 + (shift - 1) * even)


@pytest.mark.filterwarnings(NUMPY)
@pytest.mark.parametrize("steps", [4, 7])  # 999 is a multiple of 3, and not of 6
@pytest.mark.parametrize("size", [(16, 16), (32, 16)])
@pytest.mark.parametrize(
    ("name", "spacing"), [("sd15", "linspace"), ("sd15", "trailing"), ("sd3", None), ("flux", None)], ids=str
)
@torch.no_grad()
def test_euler_s_method_gives_the_pipeline_s_own_latents(
    name: str, spacing: str | None, size: tuple[int, int], steps: int, pipes: Pipes
) -> None:
    pipe, (height, width) = pipes(name), size
    if spacing is not None:
        pipe.scheduler = euler_discrete(pipe, spacing)
    backend = backend_for(name, pipe, height, width)
    negative = ["grey", "noise"] if name in GUIDED else None
    noise = unit_noise(backend, 2).float()
    expected = pipe(
        PROMPTS,
        **({"negative_prompt": negative} if negative else {}),
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=SCALES[name],
        latents=packed(noise) if name == "flux" else noise,
        output_type="latent",
    ).images
    if spacing == "linspace":
        assert bool((pipe.scheduler.timesteps.frac() != 0).any()) == (steps == 7)
    sigmas = torch.cat([native(name, backend, steps), torch.zeros(1).double()])
    assert torch.allclose(sigmas, pipe.scheduler.sigmas.double(), atol=1e-6)
    denoise, counter = counted_denoiser(backend, PROMPTS, SCALES[name], negative)
    found = integrate(denoise, SOLVERS["euler"], sigmas[0] * backend.spec.state(noise), sigmas)
    assert distance(packed(found) if name == "flux" else found, expected) < 1e-4
    assert (counter.depth, counter.rows) == (steps, steps * (4 if negative else 2))


@pytest.mark.parametrize("steps", [2, 4, 7, 30])
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_the_grid_of_a_flow_is_its_scheduler_s(name: str, steps: int, pipes: Pipes) -> None:
    pipe = pipes(name)
    spec = backend_for(name, pipe, 32, 16).spec
    assert spec.shift is not None
    pipe.scheduler.set_timesteps(steps, **({"mu": math.log(spec.shift)} if name == "flux" else {}))
    found = grid(FlowMatch(name="flowmatch"), steps, spec)
    assert torch.allclose(found, pipe.scheduler.sigmas[:-1].double(), atol=1e-6)


@pytest.mark.filterwarnings(NUMPY)
@pytest.mark.parametrize("steps", [2, 4, 7, 1000])
def test_the_grid_of_stable_diffusion_is_even_in_its_time(steps: int, pipes: Pipes) -> None:
    """Between training times log alphas_cumprod = -log(1 + sigma^2) is linear."""
    pipe = pipes("sd15")
    backend = backend_for("sd15", pipe)
    found = grid(Discrete(name="discrete", rho=1.0), steps, backend.spec)
    times = torch.linspace(999, 0, steps, dtype=torch.float64)
    kept = pipe.scheduler.alphas_cumprod.double().log()
    below = times.floor().long().clamp_max(998)
    expected = torch.expm1(-torch.lerp(kept[below], kept[below + 1], times - below)).sqrt()
    assert torch.allclose(found, expected, rtol=1e-4)  # alphas_cumprod is float32
    assert torch.allclose(backend.preconditioning.timestep(found).double(), times, atol=1e-3)
    scheduler = euler_discrete(pipe, "linspace")
    scheduler.set_timesteps(steps)
    assert torch.allclose(found, scheduler.sigmas[:-1].double(), rtol=1e-4)  # there sigma itself is linear


def test_d_is_the_same_for_both_predictions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a U-Net and of the same one whose output is converted: v = sqrt(abar) eps - sqrt(1 - abar) x0."""
    pipes = {prediction: tiny_sd15(prediction) for prediction in ("epsilon", "v_prediction")}
    backends = {prediction: backend_of(pipe) for prediction, pipe in pipes.items()}
    unet, converted = pipes["epsilon"].unet, pipes["v_prediction"].unet
    betas: Any = pipes["epsilon"].scheduler.betas
    kept = (1 - betas.double()).log().cumsum(0)

    def velocity(x: Tensor, timestep: Tensor, **conditions: Any) -> tuple[Tensor]:
        below = timestep.floor().long().clamp_max(998)
        abar = torch.lerp(kept[below], kept[below + 1], timestep.double() - below).exp().view(-1, 1, 1, 1)
        noise = unet(x, timestep, **conditions)[0].double()
        x0 = (x.double() - (1 - abar).sqrt() * noise) / abar.sqrt()
        return (abar.sqrt() * noise - (1 - abar).sqrt() * x0,)

    monkeypatch.setattr(converted, "forward", velocity)
    table = backends["epsilon"].spec.table
    assert table is not None
    between = (table[[0, 1, 10, 300, 700, 998]] + table[[1, 2, 11, 301, 701, 999]]) / 2
    sigma = torch.cat([table[[0, 1, 250, 500, 999]], between, torch.linspace(0.05, 14, 9).double()])
    x = (1 + sigma.view(-1, 1, 1, 1) ** 2).sqrt() * unit_noise(backends["epsilon"], len(sigma))
    with torch.no_grad():
        first, second = (backend.denoiser(["a boat"])(x, sigma) for backend in backends.values())
    for row, (found, expected) in enumerate(zip(second, first, strict=True)):
        assert distance(found, expected) < 1e-5, f"sigma {sigma[row]}"
        assert distance(found, x[row]) > 1e-3


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_d_of_a_flow_is_x_minus_sigma_v(name: str, pipes: Pipes) -> None:
    pipe = pipes(name)
    backend, seen = backend_for(name, pipe, 32, 16), []

    def see(network: Any, arguments: Any, named: dict[str, Any], output: Any) -> None:
        seen.append((named["hidden_states"], named["timestep"], output[0]))

    hook = network_of(pipe).register_forward_hook(see, with_kwargs=True)
    x, sigma = unit_noise(backend, 4), torch.tensor([1.0, 0.73, 0.2, 0.01]).double()
    with torch.no_grad():
        found = backend.denoiser(PROMPTS)(x, sigma)
    hook.remove()
    ((shown, time, velocity),) = seen
    if name == "flux":
        shown, velocity, time = unpacked(shown, 8), unpacked(velocity, 8), time * 1000
    assert torch.equal(shown, x.float())
    assert torch.allclose(time.double(), 1000 * sigma, rtol=1e-6)
    assert torch.allclose(found, x - sigma.view(-1, 1, 1, 1) * velocity, atol=1e-12)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_an_image_is_the_same_for_every_batch_size(name: str, pipes: Pipes) -> None:
    backend = backend_for(name, pipes(name))
    noise, prompts = unit_noise(backend, 8), TWELVE[:8]
    latents, images = {}, {}
    for size in (1, 3, 8):
        parts = [slice(first, first + size) for first in range(0, 8, size)]
        states = [sampled(name, backend, prompts[part], noise[part]) for part in parts]
        latents[size], images[size] = torch.cat(states), torch.cat([backend.decode(state) for state in states])
    for size in (1, 3):
        assert distance(latents[size], latents[8]) < 1e-5
        assert float((images[size] - images[8]).abs().max()) < 1e-5
    assert images[8].shape == (8, 3, 16, 16)
    assert float(images[8].min()) >= 0
    assert float(images[8].max()) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_states_are_double_whatever_the_network_is(name: str, dtype: torch.dtype, pipes: Pipes) -> None:
    pipe = pipes(name).to(dtype)
    backend, rows = backend_for(name, pipe), []
    hook = network_of(pipe).register_forward_hook(lambda network, arguments, output: rows.append(output[0].dtype))
    x = sampled(name, backend, PROMPTS, backend.spec.state(unit_noise(backend, 2).float()))
    hook.remove()
    assert (x.dtype, x.device.type, bool(x.isfinite().all())) == (torch.float64, "cpu", True)
    assert set(rows) == {dtype}
    state, sigma = unit_noise(backend, 2), levels_of(backend, 2)
    for precision in (torch.float64, torch.float32):
        found = backend.denoiser(PROMPTS)(state.to(precision), sigma.to(precision))
        assert (found.dtype, bool(found.isfinite().all())) == (precision, True)
    assert bool(backend.decode(x).isfinite().all())


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_prompt_is_encoded_once(name: str, pipes: Pipes) -> None:
    """Over denoisers, halves of guidance, repeated prompts, batches and other networks' rows."""
    pipe = pipes(name)
    backend = backend_for(name, pipe)
    encoders = [part for part in pipe.components if part.startswith("text_encoder")]
    with encoded(pipe) as found:
        for prompts in (["a boat"], ["a boat", "a boat"], PROMPTS, PROMPTS[::-1] * 3):
            for _ in range(2):
                sampled(name, backend, prompts, unit_noise(backend, len(prompts)))
        texts = {"a boat", *PROMPTS, *([""] if name in GUIDED else [])}
        assert found == dict.fromkeys(encoders, len(texts))
        if name in GUIDED:
            sampled(name, backend, PROMPTS, unit_noise(backend, 2), ["grey", "grey"])
            assert found == dict.fromkeys(encoders, len(texts) + 1)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_rows_of_each_call_are_as_designed(name: str, guided: bool, pipes: Pipes) -> None:
    pipe = pipes(name)
    scale = SCALES[name] if guided else 1.0
    backend = backend_of(pipe, 16, 16, scale)
    sigmas, twice = (VP if name == "sd15" else FLOW), 2 if guided and name in GUIDED else 1
    prompts, start = TWELVE[:3], sigmas[0] * unit_noise(backend, 3)

    def denoiser() -> Any:
        return counted_denoiser(backend, prompts, scale)

    with calls(pipe) as rows:
        denoise, counter = denoiser()
        integrate(denoise, SOLVERS["euler"], start, sigmas)
    assert rows == [twice * 3] * 4
    assert (counter.depth, counter.rows) == (4, sum(rows))
    with calls(pipe) as rows:
        denoise, counter = denoiser()
        integrate(denoise, epd(2), start, sigmas)
    assert rows == [twice * 3, 2 * twice * 3] * 4
    assert (counter.depth, counter.rows) == (8, sum(rows))
    with calls(pipe) as rows:
        denoise, counter = denoiser()
        _, taken = parallel_integrate(denoise, SOLVERS["euler"], start, sigmas, 4, 0.0, "copy")
    assert rows[0] == 4 * twice * 3  # a window of 4
    assert taken.total_evaluations == sum(rows) / 3 / twice
    assert (counter.depth, counter.rows) == (len(rows), sum(rows))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_row_i_has_condition_i_mod_b(name: str, pipes: Pipes) -> None:
    backend = backend_for(name, pipes(name))
    x, sigma, prompts = unit_noise(backend, 9), levels_of(backend, 9), TWELVE[:3]
    negative = ["grey", "", "noise"] if name in GUIDED else None
    found = backend.denoiser(prompts)(x, sigma)
    guided = counted_denoiser(backend, prompts, SCALES[name], negative)[0](x, sigma)
    for i in range(9):
        row, which = slice(i, i + 1), slice(i % 3, i % 3 + 1)
        assert distance(found[row], backend.denoiser(prompts[which])(x[row], sigma[row])) < 1e-5
        alone, _ = counted_denoiser(backend, prompts[which], SCALES[name], negative and negative[which])
        assert distance(guided[row], alone(x[row], sigma[row])) < 1e-5
        other = backend.denoiser([prompts[(i + 1) % 3]])(x[row], sigma[row])
        assert distance(found[row], other) > 1e-4


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_some_rows_of_a_call_are_those_of_the_whole(name: str, pipes: Pipes) -> None:
    backend = backend_for(name, pipes(name))
    x, sigma, denoise = unit_noise(backend, 6), levels_of(backend, 6), backend.denoiser(TWELVE[:4])
    whole = denoise(x, sigma)
    for which in (slice(0, 1), slice(2, 6), slice(5, 6)):
        assert distance(denoise.rows(x, sigma, which), whole[which]) < 1e-5


@pytest.mark.parametrize("name", GUIDED)
@torch.no_grad()
def test_guidance_leads_away_from_the_negative_prompt(name: str, pipes: Pipes) -> None:
    backend = backend_for(name, pipes(name))
    x, sigma = unit_noise(backend, 2), levels_of(backend, 2)
    wanted = backend.denoiser(PROMPTS)(x, sigma)
    for negative in (["grey", "noise"], None):
        other = backend.denoiser(negative or ["", ""])(x, sigma)
        denoise, _ = counted_denoiser(backend, PROMPTS, SCALES[name], negative)
        assert distance(denoise(x, sigma), other + SCALES[name] * (wanted - other)) < 1e-5


@pytest.mark.parametrize("name", GUIDED)
@torch.no_grad()
def test_a_negative_prompt_changes_the_image(name: str, pipes: Pipes) -> None:
    backend = backend_for(name, pipes(name))
    noise = unit_noise(backend, 2)
    without, empty, other = (sampled(name, backend, PROMPTS, noise, texts) for texts in (None, ["", ""], ["", "grey"]))
    assert torch.equal(without, empty)
    images, changed = backend.decode(without), backend.decode(other)
    assert float((images[0] - changed[0]).abs().max()) < 1e-5
    assert float((images[1] - changed[1]).abs().max()) > 1e-3


def test_flux_has_the_guidance_that_it_is_shown_and_no_other(pipes: Pipes) -> None:
    pipe = pipes("flux")
    backend = backend_of(pipe, 16, 16, 3.5)
    for scale in (1.0, 7.5):
        with pytest.raises(ValueError, match=rf"guidance_scale: {scale}; valid: 3.5, which the network is shown"):
            counted_denoiser(backend, PROMPTS, scale)
    with pytest.raises(ValueError, match=r"negative: 'grey'; valid: none"):
        counted_denoiser(backend, PROMPTS, 3.5, ["", "grey"])
    x, sigma = unit_noise(backend, 2), levels_of(backend, 2)
    with torch.no_grad():
        found = [counted_denoiser(backend_of(pipe, 16, 16, scale), PROMPTS, scale, ["", ""])[0](x, sigma) for scale in (1, 3.5)]
    assert distance(found[0], found[1]) > 1e-4


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_texts_are_kept_without_their_encoders(name: str, pipes: Pipes) -> None:
    pipe = pipes(name)
    backend = backend_for(name, pipe)
    noise = unit_noise(backend, 2)
    expected = sampled(name, backend, PROMPTS, noise)
    backend = backend_for(name, pipe)
    encoders = [part for part in pipe.components if part.startswith("text_encoder")]
    with encoded(pipe) as found:
        backend.keep_texts([*PROMPTS, "", *PROMPTS])
        assert found == dict.fromkeys(encoders, 3)
    assert pipe.text_encoder is None
    assert all(getattr(pipe, encoder) is None for encoder in encoders)
    assert torch.equal(sampled(name, backend, PROMPTS, noise), expected)
    assert bool(backend.decode(expected).isfinite().all())
    with pytest.raises(ValueError, match=r"prompt: 'a goat', and the text encoders are dropped; valid: one of those kept"):
        backend.denoiser(["a boat", "a goat"])


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_images_decoded_together_are_those_decoded_one_by_one(name: str, pipes: Pipes) -> None:
    pipe = pipes(name)
    backend, rows = backend_for(name, pipe, 32, 16), []
    x = unit_noise(backend, DECODED + 3)
    hook = pipe.vae.decoder.register_forward_hook(lambda decoder, arguments, output: rows.append(len(output)))
    together = backend.decode(x)
    hook.remove()
    assert rows == [DECODED, 3]
    assert together.shape == (DECODED + 3, 3, 32, 16)
    assert float((together - torch.cat([backend.decode(one[None]) for one in x])).abs().max()) < 3e-6


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_images_are_the_pipeline_s_own(name: str, pipes: Pipes) -> None:
    """Of the same latents: scaled, shifted and clamped as there."""
    pipe = pipes(name)
    backend = backend_for(name, pipe)
    noise = unit_noise(backend, 2).float()
    common: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 2, "guidance_scale": SCALES[name]}
    common["latents"] = packed(noise) if name == "flux" else noise
    latents, images = (pipe(PROMPTS, **common, output_type=kind).images for kind in ("latent", "pt"))
    assert float((backend.decode(unpacked(latents, 4) if name == "flux" else latents) - images).abs().max()) < 1e-5


class Encoder:
    """Makes the length of a prompt of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, prompt: str) -> tuple[Tensor, ...]:
        self.asked.append(prompt)
        return torch.full((1, 2), float(len(prompt))), torch.ones(1, 3)


def test_the_texts_used_last_are_known() -> None:
    encoder, cpu = Encoder(), torch.device("cpu")
    texts, prompts = Texts(encoder), [f"{i}" for i in range(KNOWN)]
    texts(prompts, cpu)
    texts(["0"], cpu)
    texts(["another", "0"], cpu)
    assert len(texts.known) == KNOWN
    assert encoder.asked == [*prompts, "another"]
    texts(["0", "2", "another"], cpu)
    assert encoder.asked == [*prompts, "another"]
    texts(["1"], cpu)  # was used the longest ago
    assert encoder.asked == [*prompts, "another", "1"]
    assert len(texts.known) == KNOWN


def test_no_more_texts_are_known_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KNOWN", 3)
    encoder, cpu = Encoder(), torch.device("cpu")
    texts = Texts(encoder)
    lengths, ones = texts(["a" * count for count in (1, 2, 3, 4, 5, 1)], cpu)  # one batch may have more
    assert lengths[:, 0].tolist() == [1, 2, 3, 4, 5, 1]
    assert ones.shape == (6, 3)
    assert len(encoder.asked) == 5
    assert list(texts.known) == ["aaaa", "aaaaa", "a"]
    texts.keep(["b" * count for count in range(5)])
    assert texts(["bbb"], cpu)[0].tolist() == [[3, 3]]
    assert {"b" * count for count in range(5)} <= set(texts.known)  # those kept stay, however many they are


@pytest.mark.parametrize(("name", "multiple"), [("sd15", 2), ("sd3", 2), ("flux", 4)])
def test_sizes_that_do_not_come_out_even_are_refused(name: str, multiple: int, pipes: Pipes) -> None:
    pipe = pipes(name)
    for height, width in ((17, 16), (16, 16 + multiple // 2), (0, 16), (16, -16)):
        with pytest.raises(ValueError, match=rf"height, width: {height}, {width}; valid: multiples of {multiple}"):
            backend_of(pipe, height, width)
    assert backend_of(pipe, 16 + multiple, 16).spec.shape[1:] == (8 + multiple // 2, 8)
    assert backend_of(pipe, None, 32).spec.shape[2] == 16


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e-12])
def test_a_small_gradient_passes_a_network_in_half_precision(size: float) -> None:
    """Alone it would be rounded to a few bits of float16, or to 0."""

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        x, time = torch.linspace(-1, 1, 8, requires_grad=True), torch.full((8,), 0.5, requires_grad=True)
        shown, level = x * 2, time * 3
        output = (shown.to(dtype).sin() * level.to(dtype)).float()
        if dtype == torch.float16:
            scale_gradient([shown, level], output)
        return list(torch.autograd.grad((size * output * torch.arange(1, 9)).sum(), [x, time]))

    for found, expected in zip(gradients(torch.float16), gradients(torch.float32), strict=True):
        assert torch.allclose(found, expected, rtol=3e-3, atol=3e-3 * float(expected.abs().max()))
