import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

with warnings.catch_warnings():  # of transformers' own imports
    warnings.simplefilter("ignore")
    from tiny_hps import ARCHITECTURE, IMAGE, saved_hps, tiny_hps

    # isort: split
    import open_clip
    from PIL import Image

    from bench.packages import hpsv2_scoring
    from metrics.hps import CONFIG, FILE, HPS, ROWS
    from metrics.images import levels, normalised, padded

PROMPTS = [
    "a lighthouse at dusk",
    "cat with horn",
    "",
    "  A   BOAT,\n\tit's &amp;amp; 12 caf&eacute;s &lt;b&gt; ",
    "naïve Ünïcödé ﬁne “quotes” … 東京 👩‍🚀 ½ Ⅷ \u200b\u00a0 Ã©",
    "<start_of_text> a <end_of_text> b",
    "word " * 100,
    "supercalifragilisticexpialidocious" * 30,
]
SHAPES = [(IMAGE, IMAGE), (16, 16), (80, 80), (40, 100), (100, 40), (11, 27), (27, 11), (33, 31), (512, 384)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_hps(tmp_path_factory.mktemp("hps"), seed=0)


@pytest.fixture(scope="module")
def hps(folder: Path) -> HPS:
    return HPS(folder)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.fixture(scope="module")
def hpsv2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """hpsv2.img_score, with a tiny model instead of its own."""
    with hpsv2_scoring(tmp_path_factory.mktemp("site"), architecture=ARCHITECTURE) as scoring:
        yield scoring


def reference(hpsv2: ModuleType, folder: Path, images: Tensor, prompt: str) -> Tensor:
    """hpsv2's own scores of images of 8 bits."""
    files = [Image.fromarray(image.permute(1, 2, 0).byte().numpy()) for image in levels(images)]
    with warnings.catch_warnings():  # torch.cuda.amp.autocast
        warnings.simplefilter("ignore")
        return torch.tensor(np.array(hpsv2.score(files, prompt, cp=str(folder / FILE))), dtype=torch.float64)


def pictures(count: int, height: int = IMAGE, width: int = IMAGE) -> Tensor:
    """Of 8 bits; every other one is black and white, where bicubic overshoots."""
    images = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))
    images[1::2] = images[1::2].round()
    return (images * 255).round() / 255


@pytest.mark.parametrize("shape", SHAPES)
def test_images_are_scored_as_by_hpsv2(hpsv2: ModuleType, folder: Path, hps: HPS, shape: tuple[int, int]) -> None:
    images = pictures(4, *shape)
    expected, found = reference(hpsv2, folder, images, PROMPTS[0]), hps(images, PROMPTS[:1] * 4)
    assert found.dtype == torch.float64
    assert expected.std() > 1e-3
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [*SHAPES, (1000, 999)])
@pytest.mark.parametrize("size", [IMAGE, 224])
def test_hpsv2_sees_the_same_pixels(hpsv2: ModuleType, shape: tuple[int, int], size: int) -> None:
    """To the bit. (Images whose longer side has the size already it does not pad, and its model fails.)"""
    images = pictures(2, *shape)
    own = sys.modules["hpsv2.src.open_clip"].image_transform(size, is_train=False, resize_longest_max=True)
    files = [Image.fromarray(image.permute(1, 2, 0).byte().numpy()) for image in levels(images)]
    expected = torch.stack([own(file) for file in files])
    assert torch.equal(normalised(padded(images, size)), expected)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompts_are_read_as_by_hpsv2(hpsv2: ModuleType, folder: Path, hps: HPS, prompt: str) -> None:
    images = pictures(2)
    assert torch.allclose(hps(images, [prompt] * 2), reference(hpsv2, folder, images, prompt), rtol=0, atol=1e-6)


def test_prompts_differ(hps: HPS) -> None:
    """So that the tests above compare something. The first 75 tokens of a prompt count."""
    image = pictures(1).expand(len(PROMPTS), 3, IMAGE, IMAGE)
    found = hps(image, PROMPTS)
    assert len({round(score, 4) for score in found.tolist()}) == len(PROMPTS)
    long = [" ".join(["word"] * count) for count in (74, 75, 76, 200)]
    found = hps(image[:4], long)
    assert abs(found[0] - found[1]) > 1e-4
    assert torch.allclose(found[1:], found[1], rtol=0, atol=1e-6)


def test_the_published_architecture_is_hpsv2s(hpsv2: ModuleType, folder: Path, tmp_path: Path) -> None:
    """Where there is no CONFIG: the same names and shapes of weights, and of images."""
    shutil.copy(folder / FILE, tmp_path)
    found = HPS(tmp_path)
    own = sys.modules["hpsv2.src.open_clip"]
    with torch.device("meta"):
        expected, model = own.CLIP(**own.get_model_config("ViT-H-14")), open_clip.CLIP(**found.config)
    shapes, others = ({name: value.shape for name, value in made.state_dict().items()} for made in (expected, model))
    assert shapes == others
    assert expected.visual.image_size == (found.size, found.size)


def test_the_score_is_open_clips(folder: Path, hps: HPS) -> None:
    """The cosine of its features; the temperature is a weight of the model, and does not matter."""
    images, model = pictures(len(PROMPTS), 40, 50), tiny_hps(0)
    with torch.no_grad():
        image = model.encode_image(normalised(padded(images, IMAGE)), normalize=True)
        text = model.encode_text(open_clip.tokenize(PROMPTS), normalize=True)
    assert torch.allclose(hps(images, PROMPTS), (image * text).sum(1).double(), rtol=0, atol=1e-6)
    assert model.logit_scale.exp() > 10


def test_nothing_is_cropped(hps: HPS) -> None:
    """The far ends of a wide image matter, and its middle alone has another score; so for a tall one."""
    wide = pictures(1, 40, 120)
    ends = wide.clone()
    ends[..., :20] = 0
    middle = wide[..., 40:80]
    for turn in (lambda images: images, lambda images: images.mT):
        whole, changed, cropped = (hps(turn(images), PROMPTS[:1]) for images in (wide, ends, middle))
        assert abs(whole - changed) > 1e-3
        assert abs(whole - cropped) > 1e-3


def test_a_score_is_independent_of_its_batch(hps: HPS) -> None:
    count = ROWS + 3  # more than the model sees at once
    images, prompts = pictures(count, 20, 24), [f"{i % 7} boats" * (1 + i % 5) for i in range(count)]
    together = hps(images, prompts)
    alone = torch.cat([hps(images[i : i + 1], prompts[i : i + 1]) for i in range(count)])
    assert torch.allclose(together, alone, rtol=0, atol=1e-6)
    assert torch.allclose(together, hps(images.flip(0), prompts[::-1]).flip(0), rtol=0, atol=1e-6)


def test_the_model_sees_few_images_at_once(hps: HPS) -> None:
    rows: list[int] = []
    hook = hps.model.visual.register_forward_hook(lambda module, arguments, output: rows.append(len(output)))
    hps(pictures(2 * ROWS + 3, 8, 8), [""] * (2 * ROWS + 3))
    hook.remove()
    assert rows == [ROWS, ROWS, 3]


def test_a_prompt_is_encoded_once(folder: Path) -> None:
    hps, rows = HPS(folder), list[int]()
    hps.model.transformer.register_forward_hook(lambda module, arguments, output: rows.append(len(output)))
    first = hps(pictures(4), ["a", "boat", "a", "a"])
    assert rows == [1, 1]
    assert torch.equal(hps(pictures(4), ["boat", "boat", "a", "ship"])[2], first[2])
    assert rows == [1, 1, 1]


@pytest.mark.parametrize("shape", [(IMAGE, IMAGE), (24, 41), (70, 64)])
def test_the_gradient_is_the_scores(folder: Path, hps: HPS, shape: tuple[int, int]) -> None:
    """That of the same map without rounding, in float64, where all pixels are of 8 bits already."""
    images, prompts, model = (0.2 + 0.6 * pictures(2, *shape)).mul(255).round() / 255, ["a", "boat"], tiny_hps(0).double()
    tall, wide = (round(side * (IMAGE / max(shape))) for side in shape)
    text = model.encode_text(open_clip.tokenize(prompts), normalize=True).detach()

    def plain(images: Tensor) -> Tensor:
        resized = interpolate(images, (tall, wide), mode="bicubic", antialias=True)
        top, left = (IMAGE - tall) // 2, (IMAGE - wide) // 2
        pixels = normalised(pad(resized, (left, IMAGE - wide - left, top, IMAGE - tall - top)))
        return (model.encode_image(pixels, normalize=True) * text).sum(1)

    exact, images = images.double().requires_grad_(), images.requires_grad_()
    score = hps(images, prompts)
    (found,) = torch.autograd.grad(score.sum(), images)
    (expected,) = torch.autograd.grad(plain(exact).sum(), exact)
    assert torch.allclose(score, plain(exact), rtol=0, atol=1e-6)
    assert bool((expected.abs().sum((1, 2, 3)) > 1e-3).all())
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_a_step_along_the_gradient_raises_the_score(hps: HPS) -> None:
    """By about its squared length times the step: rounding to 8 bits does not stop it."""
    images = (0.3 + 0.4 * pictures(2, 50, 40)).requires_grad_()
    before = hps(images, ["a", "boat"])
    (gradient,) = torch.autograd.grad(before.sum(), images)
    after = hps(images + 0.02 * gradient / gradient.abs().amax((1, 2, 3), keepdim=True), ["a", "boat"])
    assert bool((after > before).all())


def test_the_model_is_frozen(hps: HPS) -> None:
    assert not hps.model.training
    assert not any(parameter.requires_grad for parameter in hps.model.parameters())
    assert not hps(pictures(1), ["a boat"]).requires_grad


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_weights_have_the_dtype_that_is_asked_for(folder: Path, hps: HPS, dtype: torch.dtype, tolerance: float) -> None:
    other, images = HPS(folder, torch.device("cpu"), dtype), pictures(4)
    found = other(images, ["a boat"] * 4)
    assert {value.dtype for value in other.model.state_dict().values()} == {dtype}
    assert found.dtype == torch.float64
    assert torch.allclose(found, hps(images, ["a boat"] * 4), rtol=0, atol=tolerance)


def test_images_of_any_type_are_scored_alike(hps: HPS) -> None:
    images = pictures(2, 40, 50)
    for same in (levels(images).byte(), images.double(), images.half()):
        assert torch.equal(hps(same, ["a", "b"]), hps(images, ["a", "b"]))


def test_weights_are_read_when_needed(copy: Path) -> None:
    hps = HPS(copy)
    assert "model" not in vars(hps)
    hps.load()
    (copy / FILE).unlink()
    assert hps(pictures(1), ["a boat"]).shape == (1,)


@pytest.mark.parametrize("prompts", [[], ["a"], ["a"] * 3])
def test_prompts_have_to_be_as_many_as_images(hps: HPS, prompts: list[str]) -> None:
    with pytest.raises(ValueError, match=rf"prompts: {len(prompts)} for images \(2, 3, 32, 32\)"):
        hps(pictures(2), prompts)


def test_what_is_no_batch_of_images_is_refused(hps: HPS) -> None:
    with pytest.raises(ValueError, match="from 0 to 255; valid: from 0 to 1"):
        hps(pictures(2) * 255, ["a", "b"])


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_checkpoint_is_refused(copy: Path, kept: float) -> None:
    whole = (copy / FILE).read_bytes()
    (copy / FILE).write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ValueError, match=FILE):
        HPS(copy).load()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda state: state.pop("logit_scale"), "missing: logit_scale"),
        (lambda state: state.pop("visual.proj"), r"missing: visual\.proj"),
        (lambda state: state.update({"score_predictor.weight": torch.ones(2)}), r"unexpected: score_predictor\.weight"),
        (lambda state: state.update({"text_projection": torch.ones(16, 8)}), r"text_projection \(16, 8\), not \(16, 16\)"),
    ],
)
def test_weights_of_another_model_are_refused(copy: Path, edit: Callable[[dict[str, Tensor]], None], message: str) -> None:
    state = dict(tiny_hps(0).state_dict())
    edit(state)
    torch.save({"state_dict": state}, copy / FILE)
    with pytest.raises(ValueError, match=rf"{FILE}: .*{message}; valid: exactly the weights of CLIP"):
        HPS(copy).load()


def test_a_checkpoint_without_its_key_is_refused(copy: Path) -> None:
    torch.save(tiny_hps(0).state_dict(), copy / FILE)
    with pytest.raises(ValueError, match=f"{FILE}: found no 'state_dict'; valid: a checkpoint that has it"):
        HPS(copy).load()


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_is_not_executed(copy: Path) -> None:
    torch.save({"hostile": Hostile(copy / "made"), "state_dict": tiny_hps(0).state_dict()}, copy / FILE)
    with pytest.raises(ValueError, match=rf"{FILE}: refused, or damaged \(.*mkdir"):
        HPS(copy).load()
    assert not (copy / "made").exists()


def test_a_missing_checkpoint_is_named(copy: Path) -> None:
    (copy / FILE).unlink()
    for folder in (copy, copy / "nowhere"):
        with pytest.raises(FileNotFoundError, match="missing") as caught:
            HPS(folder)
        assert caught.value.filename == str(folder / FILE)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (
            "vision_cfg",
            {"timm_model_name": "vit"},
            "timm_model_name, image_size 32, vocab_size 49408; valid: towers of",
        ),
        ("text_cfg", {"hf_model_name": "roberta"}, "hf_model_name, .*; valid: towers of open_clip"),
        ("vision_cfg", {"image_size": [32, 16]}, r"image_size \[32, 16\], .*; valid: .*one number"),
        ("text_cfg", {"vocab_size": 514}, "vocab_size 514; valid: .* 49408"),
    ],
)
def test_another_configuration_is_refused(copy: Path, section: str, values: dict[str, Any], message: str) -> None:
    config = {**ARCHITECTURE, section: {**ARCHITECTURE[section], **values}}
    (copy / CONFIG).write_text(json.dumps({"model_cfg": config}))
    with pytest.raises(ValueError, match=rf"{CONFIG}: .*{message}"):
        HPS(copy)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model_cfg": {"embed_dim": 16}}', "\x00"])
def test_a_damaged_configuration_is_refused(copy: Path, content: str) -> None:
    (copy / CONFIG).write_text(content)
    with pytest.raises(ValueError, match=CONFIG):
        HPS(copy)


def test_an_unknown_architecture_is_refused(copy: Path) -> None:
    (copy / CONFIG).write_text(json.dumps({"model_cfg": {**ARCHITECTURE, "heads": 3}}))
    with pytest.raises(ValueError, match=f"{CONFIG}: .*heads"):
        HPS(copy).load()


def test_the_card_has_the_preprocessing(hps: HPS) -> None:
    assert "antialias" in hps.card.preprocessing
    assert hps.card.divisor == 1


def test_the_tiny_model_is_small_and_its_seeds(folder: Path, tmp_path: Path, hps: HPS) -> None:
    assert sum(file.stat().st_size for file in folder.iterdir()) < 4e6
    images = pictures(4)
    again, other = HPS(saved_hps(tmp_path / "again", 0)), HPS(saved_hps(tmp_path / "other", 1))
    found = hps(images, PROMPTS[:4])
    assert torch.allclose(again(images, PROMPTS[:4]), found, rtol=0, atol=1e-6)
    assert not torch.allclose(other(images, PROMPTS[:4]), found, atol=1e-2)


def test_the_published_weights_give_the_published_score() -> None:
    """hpsv2's own example for v2.1, printed with three digits, in half precision."""
    goldens = os.environ.get("PARASOL_GOLDENS")
    if goldens is None:
        pytest.skip("PARASOL_GOLDENS names no folder with hps/HPS_v2.1_compressed.pt and images/hps/demo_image.jpg")
    folder, file = Path(goldens, "hps"), Path(goldens, "images", "hps", "demo_image.jpg")
    for needed in (folder / FILE, file):
        if not needed.exists():
            pytest.skip(f"{needed} is not there")
    image = torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)[None]
    assert HPS(folder)(image, ["cat with horn"]).item() == pytest.approx(0.288, abs=0.003)
