import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

with warnings.catch_warnings():  # of transformers' own imports
    warnings.simplefilter("ignore")
    from PIL import Image
    from tiny_clip import IMAGE, PROJECTION, saved_clip, tiny_clip
    from transformers import CLIPImageProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from metrics import images as pixels
    from metrics.clip import ROWS, Clip, ClipScore, PickScore

PROMPTS = ["a lighthouse at dusk", "a boat", "a lighthouse at dusk", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_clip(tmp_path_factory.mktemp("clip"), seed=0)


@pytest.fixture(scope="module")
def clip(folder: Path) -> Clip:
    return Clip(folder)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def pictures(count: int, height: int = IMAGE, width: int = IMAGE) -> Tensor:
    """Of 8 bits; every other one is black and white, where bicubic overshoots."""
    images = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))
    images[1::2] = images[1::2].round()
    return (images * 255).round() / 255


def processed(processor: type, images: Tensor) -> Tensor:
    """What transformers makes of images of 8 bits: pixels (B, 3, 32, 32), normalised."""
    files = [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]
    processor = processor(size={"shortest_edge": IMAGE}, crop_size={"height": IMAGE, "width": IMAGE})
    return processor(files, return_tensors="pt")["pixel_values"]  # type: ignore[operator]


@pytest.mark.parametrize("shape", [(IMAGE, IMAGE), (IMAGE, 47), (45, IMAGE), (64, 64), (20, 20), (37, 90), (101, 51), (1, 7)])
def test_scores_are_transformers(clip: Clip, shape: tuple[int, int]) -> None:
    """The diagonal of CLIPModel's own logits, padded no further than the longest prompt; only PickScore has the scale."""
    images = pictures(4, *shape)
    tokens = clip.tokenizer(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = (
            tiny_clip(0)(**tokens, pixel_values=processed(CLIPImageProcessorPil, images)).logits_per_image.diag().double()
        )
    scale = clip.model.logit_scale.double().exp()
    assert scale > 10
    assert expected.std() > 0.1
    pick, cosine = PickScore(clip)(images, PROMPTS), ClipScore(clip)(images, PROMPTS)
    assert pick.dtype == cosine.dtype == torch.float64
    assert torch.allclose(pick, expected, rtol=0, atol=1e-5)
    assert torch.allclose(cosine, expected / scale, rtol=0, atol=1e-6)
    assert torch.allclose(clip.similarity(images, PROMPTS), cosine, rtol=0, atol=1e-12)


def test_the_scale_is_a_weight(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors") | {"logit_scale": torch.tensor(0.5)}
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    clip, images = Clip(copy), pictures(4)
    assert torch.allclose(PickScore(clip)(images, PROMPTS), ClipScore(clip)(images, PROMPTS) * torch.tensor(0.5).exp().double())


@pytest.mark.parametrize("shape", [(IMAGE, IMAGE), (IMAGE, 47), (64, 64), (20, 20), (37, 90), (101, 51), (256, 256), (1, 7)])
def test_features_are_transformers(clip: Clip, shape: tuple[int, int]) -> None:
    """Those of its processor that resizes by PIL; by the other one, which rounds otherwise, they turn by a small angle."""
    images = pictures(6, *shape)
    found = clip.image_features(images)
    pil, other = (seen(clip, processed(processor, images)) for processor in (CLIPImageProcessorPil, CLIPImageProcessor))
    assert torch.allclose(found, pil, rtol=0, atol=1e-6 * pil.norm(dim=-1).max().item())
    assert bool((torch.cosine_similarity(found.double(), other.double()) > 1 - 2e-5).all())


def seen(clip: Clip, pixels: Tensor) -> Tensor:
    """The model's features of pixels that a processor made."""
    found: Any = clip.model.get_image_features(pixels)
    return found.pooler_output


@pytest.mark.parametrize("count", [7, ROWS + 3])
def test_a_score_is_independent_of_its_batch(clip: Clip, count: int) -> None:
    images, prompts = pictures(count, 40, 50), [f"{i} boats" * (1 + i % 7) for i in range(count)]
    for scorer in (ClipScore(clip), PickScore(clip)):
        together = scorer(images, prompts)
        alone = torch.cat([scorer(images[i : i + 1], prompts[i : i + 1]) for i in range(count)])
        assert torch.allclose(together, alone, rtol=1e-6, atol=1e-6)
        backwards = scorer(images.flip(0), prompts[::-1]).flip(0)
        assert torch.allclose(together, backwards, rtol=1e-6, atol=1e-6)


def test_long_prompts_are_cut(clip: Clip) -> None:
    """To 77 tokens, the first and the last of them the tokenizer's own; words of one letter have one token each."""
    words = list("abcdefghij" * 20)
    found = clip.text_features([" ".join(words[:length]) for length in (200, 75, 74)])
    assert torch.allclose(found[0], found[1], rtol=0, atol=1e-6)
    assert not torch.allclose(found[0], found[2], atol=1e-3)


def test_a_prompt_is_encoded_once(folder: Path) -> None:
    clip, rows = Clip(folder), list[int]()
    clip.model.text_model.register_forward_hook(lambda module, arguments, output: rows.append(len(output.pooler_output)))
    found = clip.text_features(PROMPTS)
    assert rows == [1, 1, 1]
    assert found.shape == (4, PROJECTION)
    assert torch.equal(found[0], found[2])
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    assert torch.equal(clip.text_features([*PROMPTS, "a ship"])[:4], found)
    assert rows == [1, 1, 1, 1]


def test_metrics_share_a_pass_over_the_same_images(folder: Path) -> None:
    clip, rows = Clip(folder), list[int]()
    clip.model.vision_model.register_forward_hook(lambda module, arguments, output: rows.append(len(output.pooler_output)))
    pick, score, images = PickScore(clip), ClipScore(clip), pictures(4)
    scale = clip.model.logit_scale.double().exp()
    assert torch.equal(pick(images, PROMPTS), scale * score(images, PROMPTS))
    assert rows == [4]
    before = score(images, PROMPTS)
    images.mul_(0.5)
    assert not torch.allclose(score(images, PROMPTS), before, atol=1e-3)
    assert rows == [4, 4]


def test_the_model_sees_few_images_at_once(folder: Path) -> None:
    clip, rows = Clip(folder), list[int]()
    clip.model.vision_model.register_forward_hook(lambda module, arguments, output: rows.append(len(output.pooler_output)))
    clip.image_features(pictures(2 * ROWS + 3, 8, 8))
    assert rows == [ROWS, ROWS, 3]


@pytest.mark.parametrize("scorer", [ClipScore, PickScore])
@pytest.mark.parametrize("shape", [(IMAGE, IMAGE), (24, 41), (70, 64)])
def test_the_gradient_is_the_scores(
    folder: Path, scorer: Callable[[Clip], Any], shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, where nothing is rounded: the derivative along a random direction is the central difference."""
    monkeypatch.setattr(pixels, "rounded", lambda x: x)
    monkeypatch.setattr(pixels, "_rounded_and_clipped", lambda sums: (sums / pixels.UNIT).clamp(0, 255))
    score = scorer(Clip(folder, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    images = 0.2 + 0.6 * torch.rand(2, 3, *shape, generator=generator, dtype=torch.float64)
    direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(score(images.requires_grad_(), ["a", "boat"]).sum(), images)
    step = 1e-5
    with torch.no_grad():
        up, down = (score(images + sign * step * direction, ["a", "boat"]).sum() for sign in (1, -1))
    assert (gradient * direction).sum().item() == pytest.approx(((up - down) / (2 * step)).item(), rel=1e-6, abs=1e-9)
    assert bool((gradient.abs().sum((1, 2, 3)) > 0).all())


@pytest.mark.parametrize("shape", [(IMAGE, IMAGE), (70, 64)])
def test_rounding_does_not_stop_gradients(clip: Clip, shape: tuple[int, int]) -> None:
    """A step along them raises the score of images of 8 bits."""
    images, score = (0.3 + 0.4 * pictures(2, *shape)).requires_grad_(), ClipScore(clip)
    before = score(images, ["a", "boat"])
    (gradient,) = torch.autograd.grad(before.sum(), images)
    after = score(images + 0.02 * gradient / gradient.abs().amax((1, 2, 3), keepdim=True), ["a", "boat"])
    assert bool((after > before).all())


def test_the_model_is_frozen(clip: Clip) -> None:
    assert not clip.model.training
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())
    assert not clip.similarity(pictures(1), ["a boat"]).requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.uint8])
def test_images_of_any_type_are_scored_alike(clip: Clip, dtype: torch.dtype) -> None:
    images = pictures(2, 40, 50)
    same = (255 * images).round().byte() if dtype == torch.uint8 else images.to(dtype)
    assert torch.equal(clip.image_features(same), clip.image_features(images))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_weights_have_the_dtype_that_is_asked_for(folder: Path, clip: Clip, dtype: torch.dtype, tolerance: float) -> None:
    other, images = Clip(folder, torch.device("cpu"), dtype), pictures(4)
    found = other.similarity(images, PROMPTS)
    assert {name: p.dtype for name, p in other.model.named_parameters() if p.dtype != dtype} == (
        {} if dtype == torch.float32 else {"logit_scale": torch.float32}
    )
    assert found.dtype == torch.float64
    assert torch.allclose(found, clip.similarity(images, PROMPTS), rtol=0, atol=tolerance)


def test_half_weights_are_raised_to_float32(copy: Path) -> None:
    weights = {name: value.half() for name, value in load_file(copy / "model.safetensors").items()}
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    change(copy / "config.json", dtype="float16")
    assert all(parameter.dtype == torch.float32 for parameter in Clip(copy).model.parameters())


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 1, IMAGE, IMAGE), r"\(2, 1, 32, 32\); valid: \(B, 3, H, W\)"),
        (torch.zeros(3, IMAGE, IMAGE), r"\(3, 32, 32\); valid"),
        (torch.zeros(2, IMAGE, IMAGE, 3), r"\(2, 32, 32, 3\); valid"),
        (torch.zeros(0, 3, IMAGE, IMAGE), r"\(0, 3, 32, 32\); valid"),
        (torch.zeros(2, 3, 0, IMAGE), r"\(2, 3, 0, 32\); valid"),
        (torch.full((2, 3, IMAGE, IMAGE), torch.nan), "NaN or infinite"),
        (torch.full((2, 3, IMAGE, IMAGE), torch.inf), "NaN or infinite"),
        (torch.full((2, 3, IMAGE, IMAGE), 1.002), "from 1.002 to 1.002; valid: from 0 to 1"),
        (torch.full((2, 3, IMAGE, IMAGE), -0.002), "from -0.002 to -0.002; valid: from 0 to 1"),
        (torch.full((2, 3, IMAGE, IMAGE), 255), "valid: from 0 to 1"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(clip: Clip, images: Tensor, message: str) -> None:
    for call in (clip.image_features, lambda images: clip.similarity(images, ["a boat"] * len(images))):
        with pytest.raises(ValueError, match=message):
            call(images)


def test_rounding_outside_the_range_is_not_refused(clip: Clip) -> None:
    images = pictures(2)
    assert torch.equal(clip.image_features(images * 1.001 - 0.0005), clip.image_features(images))


@pytest.mark.parametrize("scorer", [ClipScore, PickScore])
def test_prompts_have_to_be_as_many_as_images(clip: Clip, scorer: Callable[[Clip], Any]) -> None:
    for prompts in ([], ["a boat"], ["a boat"] * 3):
        with pytest.raises(ValueError, match=rf"prompts: {len(prompts)} for images \(2, 3, 32, 32\)"):
            scorer(clip)(pictures(2), prompts)


def test_no_prompt_is_refused(clip: Clip) -> None:
    with pytest.raises(ValueError, match="prompts: none"):
        clip.text_features([])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda weights: weights.pop("logit_scale"), r"missing_keys: logit_scale; valid"),
        (lambda weights: weights.pop("visual_projection.weight"), r"missing_keys: visual_projection.weight; valid"),
        (lambda weights: weights.update({"head.weight": torch.ones(2)}), r"unexpected_keys: head.weight; valid"),
        (lambda weights: weights.update({"logit_scale": torch.ones(2)}), r"mismatched_keys.*logit_scale.*\[2\]"),
    ],
)
def test_weights_of_another_model_are_refused(copy: Path, edit: Callable[[dict[str, Tensor]], None], message: str) -> None:
    weights = load_file(copy / "model.safetensors")
    edit(weights)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    clip = Clip(copy)
    for use in (clip.load, ClipScore(clip).load, PickScore(clip).load, lambda: clip.similarity(pictures(1), [""])):
        with pytest.raises(ValueError, match=rf"model.safetensors: .*{message}"):
            use()


def test_position_ids_of_old_versions_are_ignored(copy: Path, clip: Clip) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    weights["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert torch.equal(Clip(copy).similarity(pictures(4), PROMPTS), clip.similarity(pictures(4), PROMPTS))


def test_old_configurations_end_prompts_with_the_largest_token(copy: Path, clip: Clip) -> None:
    change(copy / "config.json", "text_config", eos_token_id=2)
    assert torch.equal(Clip(copy).text_features(PROMPTS), clip.text_features(PROMPTS))


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("text_config", {"eos_token_id": 511}, "tokenizer: prompts end with token 513; valid: the model's 511"),
        ("text_config", {"vocab_size": 500}, "tokenizer: 514 tokens; valid: at most the model's 500"),
        ("vision_config", {"hidden_size": 33}, "config.json: .*33"),
        ("vision_config", {"num_channels": 1}, "config.json: image_size 32, num_channels 1"),
        ("vision_config", {"image_size": [32, 16]}, r"config.json: image_size \[32, 16\]"),
        ("text_config", {"hidden_size": 64}, "model.safetensors: .*mismatched_keys.*position_embedding.weight"),
        ("vision_config", {"num_hidden_layers": 3}, "model.safetensors: .*missing_keys.*layers.2"),
        (None, {"model_type": "siglip"}, "config.json: model_type siglip; valid: clip"),
    ],
)
def test_another_configuration_is_refused(copy: Path, section: str | None, values: dict[str, Any], message: str) -> None:
    change(copy / "config.json", section, **values)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        Clip(copy).load()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.9])
def test_a_truncated_file_is_refused(copy: Path, name: str, kept: float) -> None:
    whole = (copy / name).read_bytes()
    (copy / name).write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ValueError, match=str(copy)):
        Clip(copy).load()


def test_weights_are_read_when_needed(copy: Path, clip: Clip) -> None:
    late = ClipScore(Clip(copy))
    assert not {"model", "tokenizer"} & vars(late.clip).keys()
    late.load()
    for file in copy.iterdir():
        file.unlink()
    assert torch.equal(late(pictures(4), PROMPTS), ClipScore(clip)(pictures(4), PROMPTS))


@pytest.mark.parametrize(
    ("name", "named"),
    [("model.safetensors", "model.safetensors"), ("config.json", "config.json"), ("tokenizer.json", "vocab.json")],
)
def test_a_missing_file_is_named(copy: Path, name: str, named: str) -> None:
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"missing; valid: .*/{named}'") as caught:
        Clip(copy)
    assert caught.value.filename == str(copy / named)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Clip(tmp_path / "nowhere")


def test_pickled_weights_are_refused(copy: Path) -> None:
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"missing; valid: .*'.*/model\.safetensors'"):
        Clip(copy)


def test_a_vocabulary_and_merges_are_a_tokenizer(copy: Path, clip: Clip) -> None:
    """As old folders have them."""
    clip.tokenizer.backend_tokenizer.model.save(str(copy))
    (copy / "tokenizer.json").unlink()
    assert torch.equal(Clip(copy).text_features(PROMPTS), clip.text_features(PROMPTS))
    (copy / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"merges\.txt'"):
        Clip(copy)


def test_the_tiny_model_is_small_and_its_seeds(folder: Path, tmp_path: Path, clip: Clip) -> None:
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1e6
    again, other = Clip(saved_clip(tmp_path / "again", 0)), Clip(saved_clip(tmp_path / "other", 1))
    found = clip.similarity(pictures(4), PROMPTS)
    assert torch.equal(again.similarity(pictures(4), PROMPTS), found)
    assert not torch.allclose(other.similarity(pictures(4), PROMPTS), found, atol=1e-2)


def change(file: Path, section: str | None = None, **values: Any) -> None:
    """Edit a configuration, or a section of it."""
    config = json.loads(file.read_text())
    (config[section] if section else config).update(values)
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_scale_is_not_rounded(copy: Path, dtype: torch.dtype) -> None:
    """In bfloat16 exp(4.6052) would be 98.9, and every score 1.1 % too low."""
    weights = load_file(copy / "model.safetensors") | {"logit_scale": torch.tensor(100.0).log()}
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    half = Clip(copy, dtype=dtype)
    assert half.model.visual_projection.weight.dtype == dtype
    images = pictures(4)
    assert torch.allclose(PickScore(half)(images, PROMPTS) / ClipScore(half)(images, PROMPTS), torch.tensor(100.0).double())
