import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

with warnings.catch_warnings():  # of transformers' own imports
    warnings.simplefilter("ignore")
    from metrics import images as module
    from metrics.images import ROUNDING, check, cropped, levels, normalised, padded, resized, rounded

    # isort: split
    from PIL import Image
    from torchvision.transforms import functional
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


def noise(generator: np.random.Generator, height: int, width: int, black_and_white: bool) -> Tensor:
    """Levels (1, 3, height, width), uint8; bicubic overshoots where they are black and white."""
    found = generator.integers(0, 256, (1, 3, height, width), dtype=np.uint8)
    return torch.from_numpy((found > 127).astype(np.uint8) * np.uint8(255) if black_and_white else found)


def picture(image: Tensor) -> Image.Image:
    """Levels (3, H, W), uint8."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def shapes(count: int, longest: int) -> Iterator[tuple[np.random.Generator, int, int]]:
    """Random heights and widths, half of them below 12: up and down, 1 pixel too."""
    generator = np.random.default_rng(0)
    for _ in range(count):
        height, width = (int(generator.integers(1, side)) for side in generator.choice([12, longest], 2))
        yield generator, height, width


def test_resized_is_pils() -> None:
    """Bit for bit, to any size. PIL is told the order of the passes, which is not the same in all its versions."""
    for i, (generator, height, width) in enumerate(shapes(400, 150)):
        tall, wide = (int(side) for side in generator.integers(1, 80, 2))
        image = noise(generator, height, width, bool(i % 2))
        rows = picture(image[0]).resize((wide, height), Image.Resampling.BICUBIC)
        expected = np.array(rows.resize((wide, tall), Image.Resampling.BICUBIC))
        found = resized(levels(image), tall, wide)[0].permute(1, 2, 0).numpy()
        assert np.array_equal(found, expected), (height, width, tall, wide)


@pytest.mark.parametrize("size", [1, 7, 32, 224])
def test_cropped_is_transformers(size: int) -> None:
    """Bit for bit what CLIP's processor makes of files up to twice as tall as wide, before it divides by 255."""
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}, do_rescale=False, do_normalize=False
    )
    for i, (generator, height, width) in enumerate(shapes(60 if size < 100 else 12, 150 if size < 100 else 512)):
        if height > 2 * width:
            height, width = width, height
        image = noise(generator, height, width, bool(i % 2))
        expected = np.array(processor([picture(image[0])])["pixel_values"])[0]
        assert np.array_equal(cropped(image, size)[0].numpy(), expected), (height, width)


def test_images_of_the_size_are_not_changed() -> None:
    image = noise(np.random.default_rng(0), 32, 32, False)
    assert torch.equal(cropped(image, 32), image.double())
    assert torch.equal(padded(image, 32), image.float() / 255)


def test_images_are_resized_each_by_itself() -> None:
    generator = np.random.default_rng(0)
    together = torch.cat([noise(generator, 50, 70, bool(i % 2)) for i in range(5)])
    for function in (cropped, padded):
        assert torch.equal(function(together, 32), torch.cat([function(image[None], 32) for image in together]))


@pytest.mark.parametrize("size", [32, 224])
def test_padded_is_torchvisions(size: int) -> None:
    """ToTensor, resize with antialias, pad: to the bit; the larger half of an odd padding is on the right, and below."""
    for i, (generator, height, width) in enumerate(shapes(40, 300)):
        image = noise(generator, height, width, bool(i % 2))
        scale = size / max(height, width)
        tall, wide = max(round(scale * height), 1), max(round(scale * width), 1)
        expected = functional.to_tensor(picture(image[0]))
        if scale != 1:
            bicubic = functional.InterpolationMode.BICUBIC
            expected = functional.resize(expected, [tall, wide], bicubic, antialias=True)
        top, left = (size - tall) // 2, (size - wide) // 2
        expected = functional.pad(expected, [left, top, size - wide - left, size - tall - top])
        assert torch.equal(padded(image, size)[0], expected), (height, width)


def test_padding_is_black_and_the_rest_is_whole() -> None:
    """Nothing of an image is lost, however long it is."""
    image = torch.ones(1, 3, 1, 100)
    found = padded(image, 32)
    assert found.shape == (1, 3, 32, 32)
    assert torch.allclose(found.sum((0, 1, 3)), 3 * torch.eye(32)[15] * 32, atol=1e-4)
    assert padded(torch.ones(1, 3, 64, 32), 32).sum().item() == pytest.approx(3 * 32 * 16, rel=1e-5)
    assert torch.equal(padded(torch.ones(1, 3, 32, 16), 32)[..., 8:24], torch.ones(1, 3, 32, 16))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_floats_are_the_levels_they_stand_for(dtype: torch.dtype) -> None:
    whole = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    floats = (whole.double() / 255).to(dtype)
    for images in (whole, floats):
        assert levels(images).dtype == torch.float64
        assert torch.equal(levels(images), whole.double())
        assert torch.equal(cropped(images, 7), cropped(whole, 7))
        assert torch.equal(padded(images, 7), padded(whole, 7))


def test_levels_are_the_nearest() -> None:
    """Half to even, as torch and numpy round; what lies outside is clipped first."""
    x = torch.tensor([-0.1, 0.0, 0.4999 / 255, 0.5 / 255, 0.5001 / 255, 1.5 / 255, 100.3 / 255, 1.0, 1.1], dtype=torch.float64)
    assert levels(x).tolist() == [0, 0, 0, 0, 1, 2, 100, 255, 255]


def test_normalised_is_torchvisions() -> None:
    for dtype in (torch.float32, torch.float64):
        images = torch.rand(2, 3, 8, 8, dtype=dtype)
        expected = functional.normalize(images, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        assert normalised(images).dtype == dtype
        assert torch.allclose(normalised(images), expected, rtol=1e-6, atol=1e-6)


def test_rounding_passes_gradients_through() -> None:
    x = torch.tensor([0.2, 0.5, 1.5, 7.9], dtype=torch.float64, requires_grad=True)
    found = rounded(x)
    assert found.tolist() == [0, 0, 2, 8]
    assert torch.autograd.grad(found.sum(), x)[0].tolist() == [1, 1, 1, 1]


def smooth(height: int, width: int) -> Tensor:
    """An image far from black and from white, float64."""
    return 0.3 + 0.4 * torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def gradient(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Of a fixed linear functional of what the function makes of the images."""
    images = images.clone().requires_grad_()
    found = function(images)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return torch.autograd.grad((found * weights).sum(), images)[0]


@pytest.mark.parametrize("shape", [(32, 32), (40, 50), (9, 20), (100, 33)])
def test_the_gradient_of_cropped_is_that_of_what_it_rounds(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is linear but for the rounding: of bicubic weights, which torch computes too, and the centre."""
    images = smooth(*shape)
    tall, wide = (32 * side // min(shape) for side in shape)

    def unrounded(images: Tensor) -> Tensor:
        found = interpolate(255 * images, (tall, wide), mode="bicubic", antialias=True)
        top, left = (tall - 32) // 2, (wide - 32) // 2
        return found[..., top : top + 32, left : left + 32]

    found = gradient(lambda images: cropped(images, 32), images)
    assert torch.allclose(found, gradient(unrounded, images), rtol=0, atol=1e-3)  # of 255: the weights have 22 bits
    monkeypatch.setattr(module, "rounded", lambda x: x)
    monkeypatch.setattr(module, "_rounded_and_clipped", lambda sums: (sums / module.UNIT).clamp(0, 255))
    assert torch.allclose(found, gradient(lambda images: cropped(images, 32), images), rtol=0, atol=1e-12)
    assert torch.allclose(cropped(images, 32), unrounded(images), rtol=0, atol=1e-3)


def test_the_gradient_of_padded_is_that_of_what_it_rounds() -> None:
    def unrounded(images: Tensor) -> Tensor:
        return functional.pad(interpolate(images, (26, 32), mode="bicubic", antialias=True), [0, 3])

    images = smooth(40, 50)
    assert torch.allclose(gradient(lambda images: padded(images, 32), images), gradient(unrounded, images), rtol=0, atol=1e-5)


def test_clipped_pixels_have_no_gradient() -> None:
    """Of the images, outside [0, 1], and of what bicubic makes of them."""
    images = torch.tensor([-0.0005, 0.5, 1.0005], dtype=torch.float64).view(1, 1, 1, 3).expand(1, 3, 3, 3)
    found = gradient(levels, images)
    assert bool((found[..., ::2] == 0).all())
    assert bool((found[..., 1] != 0).all())
    stripes = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    stripes[..., 4:] = 1  # overshoots on both sides of the edge
    plain = interpolate(stripes, (32, 32), mode="bicubic", antialias=True)
    inside = ((plain > 1e-6) & (plain < 1 - 1e-6)).double()
    expected = gradient(lambda images: 255 * interpolate(images, (32, 32), mode="bicubic", antialias=True) * inside, stripes)
    assert plain.max() > 1.01
    # the first of the two passes, along the rows, clips; each row is the same, so what the second makes of it is not clipped
    assert torch.allclose(gradient(lambda images: cropped(images, 32) * inside, stripes), expected, rtol=0, atol=1e-3)


def replaced(value: float) -> Tensor:
    """Images with one pixel of that value."""
    images = torch.full((2, 3, 4, 4), 0.5)
    images[1, 2, 3, 0] = value
    return images


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 1, 4, 4), r"images: \(2, 1, 4, 4\); valid: \(B, 3, H, W\), none of them 0"),
        (torch.zeros(2, 4, 4, 4), r"images: \(2, 4, 4, 4\); valid"),
        (torch.zeros(3, 4, 4), r"images: \(3, 4, 4\); valid"),
        (torch.zeros(1, 2, 3, 4, 4), r"images: \(1, 2, 3, 4, 4\); valid"),
        (torch.zeros(2, 4, 4, 3), r"images: \(2, 4, 4, 3\); valid"),
        (torch.zeros(0, 3, 4, 4), r"images: \(0, 3, 4, 4\); valid"),
        (torch.zeros(2, 3, 0, 4), r"images: \(2, 3, 0, 4\); valid"),
        (replaced(torch.nan), "images: NaN or infinite pixels; valid: finite ones"),
        (replaced(torch.inf), "images: NaN or infinite"),
        (replaced(-torch.inf), "images: NaN or infinite"),
        (replaced(1 + 2 * ROUNDING), "images: from 0.5 to 1.002; valid: from 0 to 1"),
        (replaced(-2 * ROUNDING), "images: from -0.002 to 0.5; valid: from 0 to 1"),
        (replaced(255.0), "images: from 0.5 to 255; valid: from 0 to 1"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(images, [""] * len(images))


@pytest.mark.parametrize("prompts", [[], ["a boat"], ["a boat"] * 3])
def test_prompts_have_to_be_as_many_as_images(prompts: list[str]) -> None:
    with pytest.raises(ValueError, match=rf"prompts: {len(prompts)} for images \(2, 3, 4, 4\); valid: one for each image"):
        check(torch.zeros(2, 3, 4, 4), prompts)


@pytest.mark.parametrize(
    "images",
    [
        replaced(1 + ROUNDING / 2),
        replaced(-ROUNDING / 2),
        torch.full((2, 3, 4, 4), 255, dtype=torch.uint8),
        torch.zeros(2, 3, 4, 4, dtype=torch.float16),
        torch.zeros(2, 3, 1, 1, requires_grad=True),
    ],
)
def test_images_are_accepted(images: Any) -> None:
    check(images, ["", ""])
