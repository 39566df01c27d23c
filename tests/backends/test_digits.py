from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from backends import Digits, counted_denoiser
from backends.digits import UNet
from solvers import AFS, EPD, integrate, polynomial

SIGMAS = polynomial(4, 0.002, 80.0)


@pytest.fixture(scope="module")
def digits() -> Digits:
    """An untrained network in which every weight counts."""
    torch.manual_seed(0)
    network = UNet(channels=16, sigma_data=0.75)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    return Digits(network)


@pytest.fixture(scope="module")
def noise() -> Tensor:
    return torch.randn(70, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def sampled(digits: Digits, noise: Tensor, batch_size: int, guidance_scale: float) -> Tensor:
    out = []
    for first in range(0, len(noise), batch_size):
        start = noise[first : first + batch_size]
        denoise, _ = counted_denoiser(digits, [str((first + i) % 10) for i in range(len(start))], guidance_scale)
        out.append(integrate(denoise, AFS(EPD(4, 2, 0.05, 0.05).table()), SIGMAS[0] * start, SIGMAS))
    return torch.cat(out)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_an_image_is_the_same_bits_for_every_batch_size(
    guidance_scale: float, threads: int, digits: Digits, noise: Tensor
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        expected = sampled(digits, noise, 64, guidance_scale)
        assert bool(expected.isfinite().all())
        for batch_size in (1, 7):
            assert torch.equal(sampled(digits, noise, batch_size, guidance_scale), expected), batch_size
    finally:
        torch.set_num_threads(before)


def test_rows_repeat_the_prompts(digits: Digits, noise: Tensor) -> None:
    x, sigma = noise[:6], torch.full((6,), 3.0, dtype=torch.float64)
    found = digits.denoiser(["1", "7", "4"])(x, sigma)
    assert torch.equal(found, digits.denoiser(["1", "7", "4", "1", "7", "4"])(x, sigma))
    assert not torch.equal(found, digits.denoiser(["7", "1", "4"])(x, sigma))


def test_guidance_costs_twice_the_rows(digits: Digits, noise: Tensor) -> None:
    for scale, rows in ((1.0, 2), (2.0, 4)):
        denoise, counter = counted_denoiser(digits, ["1", "7"], scale)
        denoise(noise[:2], torch.ones(2).double())
        assert (counter.depth, counter.rows) == (1, rows)


def test_guidance_leads_away_from_the_unconditional_model(digits: Digits, noise: Tensor) -> None:
    x, sigma = noise[:2], torch.ones(2).double()
    wanted, other = digits.denoiser(["1", "7"])(x, sigma), digits.denoiser(["", ""])(x, sigma)
    denoise, _ = counted_denoiser(digits, ["1", "7"], 3.0)
    assert torch.allclose(denoise(x, sigma), other + 3 * (wanted - other), atol=1e-5)


def test_the_state_is_returned_where_there_is_no_noise(digits: Digits, noise: Tensor) -> None:
    found = digits.denoiser(["3"] * 70)(noise, torch.full((70,), 1e-6, dtype=torch.float64))
    assert torch.allclose(found, noise, atol=1e-4)


def test_save_and_load(digits: Digits, noise: Tensor, tmp_path: Path) -> None:
    digits.save(tmp_path / "unet.safetensors")
    loaded = Digits.load(tmp_path / "unet.safetensors")
    x, sigma = noise[:5], torch.ones(5).double()
    assert torch.equal(loaded.denoiser(["0"] * 5)(x, sigma), digits.denoiser(["0"] * 5)(x, sigma))


def test_weights_without_their_shape_are_refused(digits: Digits, tmp_path: Path) -> None:
    save_file({"x": torch.ones(1)}, tmp_path / "unet.safetensors")
    with pytest.raises(ValueError, match=r"unet\.safetensors: header"):
        Digits.load(tmp_path / "unet.safetensors")


def test_an_unknown_prompt_is_refused(digits: Digits) -> None:
    with pytest.raises(ValueError, match=r"\['10', 'x'\]; valid: \['0', .*'9', ''\]"):
        digits.denoiser(["3", "10", "x"])


def test_encode_and_decode_are_inverse() -> None:
    images = torch.rand(2, 1, 8, 8)
    assert torch.allclose(Digits.decode(Digits.encode(images)), images, atol=1e-6)
