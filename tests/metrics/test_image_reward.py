import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

with warnings.catch_warnings():  # of transformers' own imports
    warnings.simplefilter("ignore")
    import metrics as metrics  # before torchvision

    # isort: split

    from PIL import Image
    from tiny_image_reward import (
        HIDDEN,
        IMAGE,
        LAYERS,
        PATCH,
        VOCABULARY,
        WIDTH,
        image_reward_state,
        saved_bert,
        saved_image_reward,
    )
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    from bench.packages import Sizes, image_reward
    from metrics.image_reward import MEAN, STD, ImageReward, centred
    from metrics.images import cropped, normalised

PROMPTS = ["a lighthouse at dusk", "A Boat, by [ENC] café [DEC]", "the same sea " * 9, ""]
GOLDEN_PROMPT = "a painting of an ocean with clouds and birds, day time, low depth field effect"
GOLDENS = [0.5811622738838196, 0.2745276093482971, -1.4131819009780884, -2.029569625854492]
"""What the image-reward package's authors print for the images 1.webp to 4.webp of their repository."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_image_reward(tmp_path_factory.mktemp("image_reward"), seed=0)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_bert(tmp_path_factory.mktemp("tokenizer") / "bert-base-uncased")


@pytest.fixture(scope="module")
def metric(folder: Path, bert: Path) -> ImageReward:
    return ImageReward(folder, bert)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def pictures(count: int, height: int = IMAGE, width: int = IMAGE) -> Tensor:
    """Of 8 bits; every other one is black and white, where bicubic overshoots."""
    images = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))
    images[1::2] = images[1::2].round()
    return (images * 255).round() / 255


def files(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]


@pytest.fixture(scope="module")
def package(folder: Path, bert: Path) -> Any:
    """The image-reward package's own ImageReward, in small, with the same weights."""
    sizes = Sizes(image=IMAGE, patch=PATCH, width=WIDTH, hidden=HIDDEN, layers=LAYERS)
    model = image_reward(folder / "med_config.json", bert, sizes=sizes)
    model.load_state_dict(torch.load(folder / "ImageReward.pt", weights_only=True), strict=True)
    return model


@pytest.mark.parametrize("shape", [(IMAGE, IMAGE), (20, 20), (51, 37), (40, 96), (IMAGE, 39), (101, 99)])
def test_scores_are_the_packages(package: Any, metric: ImageReward, shape: tuple[int, int]) -> None:
    images = pictures(4, *shape)
    found = metric(images, PROMPTS)
    expected = torch.tensor([package.score(prompt, file) for prompt, file in zip(PROMPTS, files(images), strict=True)])
    assert found.shape == (4,)
    assert found.dtype == torch.float64
    assert expected.std() > 0.1
    assert torch.allclose(found, expected.double(), rtol=0, atol=1e-5)


def test_images_are_ranked_as_by_the_package(package: Any, metric: ImageReward) -> None:
    images = pictures(6, 48, 40)
    ranks, rewards = package.inference_rank(PROMPTS[0], files(images))
    found = metric(images, [PROMPTS[0]] * 6)
    assert torch.allclose(found, torch.tensor(rewards).double(), rtol=0, atol=1e-5)
    assert (1 + found.argsort(descending=True).argsort()).tolist() == ranks


def test_gradients_are_the_packages(package: Any, metric: ImageReward) -> None:
    """At images that need no resizing, whose levels are passed through."""
    images = pictures(4).requires_grad_()
    (found,) = torch.autograd.grad(metric(images, PROMPTS).sum(), images)
    tokens = metric.tokens(PROMPTS)
    score = package.score_gard(tokens["input_ids"], tokens["attention_mask"], normalised(images))
    (expected,) = torch.autograd.grad(score.sum(), images)
    assert expected.abs().mean() > 1e-3
    assert torch.allclose(found, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(
    "prompt", [*PROMPTS, "it's 2-fold: “漢字” [unused3] [MASK]", "x" * 150, "A\tB\n\x00 Ünïcode", "e " * 99]
)
def test_tokens_are_the_packages(package: Any, metric: ImageReward, prompt: str) -> None:
    expected = package.blip.tokenizer(prompt, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    found = metric.tokens([prompt])
    assert torch.equal(found["input_ids"], expected.input_ids)
    assert torch.equal(found["attention_mask"], expected.attention_mask)
    assert len(package.blip.tokenizer) == len(metric.tokenizer) == len(VOCABULARY) + 2


@pytest.mark.parametrize("excess", range(9))
def test_images_are_cropped_as_by_torchvision(excess: int) -> None:
    """Whichever side is the longer one, and however much of it is too much."""
    processed = Compose(
        [
            Resize(IMAGE, interpolation=InterpolationMode.BICUBIC),
            CenterCrop(IMAGE),
            ToTensor(),
            Normalize(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
        ]
    )
    for shape in ((IMAGE, IMAGE + excess), (IMAGE + excess, IMAGE), (20, 20 + 5 * excess), (90 + 7 * excess, 90)):
        images = pictures(2, *shape)
        found = normalised(centred(images, IMAGE).float() / 255)
        expected = torch.stack([processed(file) for file in files(images)])  # type: ignore[arg-type]
        assert torch.allclose(found, expected, rtol=0, atol=1e-6)


def test_even_excess_is_cropped_as_elsewhere() -> None:
    images = pictures(2, 40, IMAGE)
    assert torch.equal(centred(images, IMAGE), cropped(images, IMAGE))


def test_a_score_is_the_reward_standardised(copy: Path, bert: Path) -> None:
    """And nothing is added to it: a network whose rewards are all the mean scores 0, a standard deviation more 1."""
    for reward, score in ((MEAN, 0.0), (MEAN + STD, 1.0), (0.0, -MEAN / STD)):
        last = {"mlp.layers.7.weight": torch.zeros(1, 16), "mlp.layers.7.bias": torch.tensor([reward])}
        torch.save(image_reward_state(0) | last, copy / "ImageReward.pt")
        found = ImageReward(copy, bert)(pictures(2), PROMPTS[:2])
        assert found.tolist() == pytest.approx([score] * 2, abs=1e-6)


def test_scores_depend_on_images_and_prompts(metric: ImageReward) -> None:
    images = pictures(4)
    assert metric(images, ["a boat"] * 4).std() > 0.1
    assert metric(images[:1].expand(4, -1, -1, -1), PROMPTS).std() > 0.1


def test_a_score_is_independent_of_its_batch(metric: ImageReward, monkeypatch: pytest.MonkeyPatch) -> None:
    images, prompts = pictures(7, 40, 50), [f"{i} boats " * (1 + i) for i in range(7)]
    together = metric(images, prompts)
    alone = torch.cat([metric(images[i : i + 1], prompts[i : i + 1]) for i in range(7)])
    assert torch.allclose(together, alone, rtol=0, atol=1e-5)
    backwards = metric(images.flip(0), prompts[::-1]).flip(0)
    assert torch.allclose(together, backwards, rtol=0, atol=1e-5)
    monkeypatch.setattr("metrics.image_reward.ROWS", 3)
    assert torch.allclose(metric(images, prompts), together, rtol=0, atol=1e-5)


def test_long_prompts_are_cut(metric: ImageReward) -> None:
    """To 35 tokens, the first and the last of them the tokenizer's own; words of one letter have one token each."""
    words = list("abcdefghij" * 20)
    images = pictures(1).expand(3, -1, -1, -1)
    found = metric(images, [" ".join(words[:length]) for length in (200, 33, 32)])
    assert found[0] == pytest.approx(found[1].item(), abs=1e-6)
    assert found[0] != pytest.approx(found[2].item(), abs=1e-3)


def test_padding_is_not_attended_to(metric: ImageReward) -> None:
    """A prompt's score is that of its own tokens alone, to which no other is appended."""
    images = normalised(pictures(1))
    tokens = metric.tokens(["a boat"])
    own = {name: value[:, : int(tokens["attention_mask"].sum())] for name, value in tokens.items()}
    assert own["input_ids"].shape == (1, 7)
    with torch.no_grad():
        assert torch.allclose(metric.network(images, **own), metric.network(images, **tokens), rtol=0, atol=1e-6)


def test_scores_are_differentiable(metric: ImageReward) -> None:
    """Through resizing too."""
    images = pictures(3, 50, 41).requires_grad_()
    (gradient,) = torch.autograd.grad(metric(images, PROMPTS[:3]).sum(), images)
    assert bool(gradient.isfinite().all())
    assert bool((gradient.abs().sum((1, 2, 3)) > 0).all())


def test_the_model_is_frozen(metric: ImageReward) -> None:
    assert not metric.network.training
    assert not any(parameter.requires_grad for parameter in metric.network.parameters())
    assert not metric(pictures(1), ["a boat"]).requires_grad


def test_half_weights_score_nearly_the_same(folder: Path, bert: Path, metric: ImageReward) -> None:
    half = ImageReward(folder, bert, torch.device("cpu"), torch.bfloat16)
    found, expected = half(pictures(4), PROMPTS), metric(pictures(4), PROMPTS)
    assert half.network.blip["visual_encoder"].dtype == torch.bfloat16
    assert found.dtype == torch.float64
    assert torch.allclose(found, expected, rtol=0, atol=0.1)
    assert not torch.equal(found, expected)


def test_images_of_eight_bits_are_taken(metric: ImageReward) -> None:
    images = pictures(2)
    assert torch.equal(metric((images * 255).round().byte(), PROMPTS[:2]), metric(images, PROMPTS[:2]))


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (torch.zeros(2, 1, IMAGE, IMAGE), 2, r"\(2, 1, 32, 32\); valid: \(B, 3, H, W\)"),
        (torch.full((2, 3, IMAGE, IMAGE), torch.nan), 2, "NaN or infinite"),
        (torch.full((2, 3, IMAGE, IMAGE), 255.0), 2, "valid: from 0 to 1"),
        (torch.zeros(2, 3, IMAGE, IMAGE), 1, r"prompts: 1 for images \(2, 3, 32, 32\)"),
    ],
)
def test_what_cannot_be_scored_is_refused(metric: ImageReward, images: Tensor, prompts: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metric(images, ["a boat"] * prompts)


def test_weights_are_read_when_they_are_needed(copy: Path, bert: Path) -> None:
    (copy / "ImageReward.pt").write_bytes(b"")
    metric = ImageReward(copy, bert)
    saved_image_reward(copy, seed=0)
    metric.load()
    (copy / "ImageReward.pt").unlink()
    assert metric(pictures(1), ["a boat"]).shape == (1,)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.99])
def test_truncated_weights_are_refused(copy: Path, bert: Path, kept: float) -> None:
    whole = (copy / "ImageReward.pt").read_bytes()
    (copy / "ImageReward.pt").write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ValueError, match=str(copy / "ImageReward.pt")):
        ImageReward(copy, bert).load()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda state: state.pop("mlp.layers.7.bias"), "missing: mlp.layers.7.bias; valid"),
        (lambda state: state.pop("blip.visual_encoder.cls_token"), "missing: blip.visual_encoder.cls_token; valid"),
        (lambda state: state.pop("blip.visual_encoder.blocks.1.attn.proj.bias"), "missing: .*blocks.1.attn.proj.bias; valid"),
        (lambda state: state.update(head=torch.ones(2)), "unexpected: head; valid"),
        (
            lambda state: state.update({"blip.visual_encoder.post_layernorm.bias": state.pop("blip.visual_encoder.norm.bias")}),
            "missing: blip.visual_encoder.norm.bias; unexpected: blip.visual_encoder.post_layernorm.bias; valid",
        ),
        (
            lambda state: state.update({"blip.visual_encoder.blocks.0.norm2.bias": torch.ones(3)}),
            r"other shapes: blip.visual_encoder.blocks.0.norm2.bias \(3,\), not \(64,\); valid",
        ),
        (
            lambda state: state.pop("blip.visual_encoder.pos_embed"),
            "pos_embed missing; .*patch_embed.proj.weight .64, 3, 16, 16.",
        ),
        (lambda state: state.update({"blip.visual_encoder.pos_embed": torch.ones(1, 5, 60)}), r"pos_embed \(1, 5, 60\); "),
        (
            lambda state: state.update({"blip.visual_encoder.pos_embed": torch.ones(1, 7, 64)}),
            r"pos_embed \(1, 7, 64\), not \(1, 5, 64\)",
        ),
    ],
)
def test_other_weights_are_refused(copy: Path, bert: Path, edit: Callable[[dict[str, Tensor]], object], message: str) -> None:
    state = image_reward_state(0)
    edit(state)
    torch.save(state, copy / "ImageReward.pt")
    with pytest.raises(ValueError, match=rf"ImageReward.pt: .*{message}"):
        ImageReward(copy, bert).load()


def test_another_model_is_refused(copy: Path, bert: Path) -> None:
    torch.save(nn.Sequential(nn.Linear(3, 2)).state_dict(), copy / "ImageReward.pt")
    with pytest.raises(ValueError, match=r"blip.visual_encoder.pos_embed missing; .*2 weights: 0.weight, 0.bias"):
        ImageReward(copy, bert).load()


def test_what_scores_do_not_need_may_be_absent(copy: Path, bert: Path, metric: ImageReward) -> None:
    state = {
        name: value for name, value in image_reward_state(0).items() if "_proj." not in name and "position_ids" not in name
    }
    assert len(state) == len(image_reward_state(0)) - 5
    torch.save(state, copy / "ImageReward.pt")
    assert torch.equal(ImageReward(copy, bert)(pictures(2), PROMPTS[:2]), metric(pictures(2), PROMPTS[:2]))


class Hostile:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.file}",)


def test_a_pickle_is_not_executed(copy: Path, bert: Path) -> None:
    made = copy / "made"
    with (copy / "ImageReward.pt").open("wb") as file:
        pickle.dump({"mlp.layers.7.bias": Hostile(made)}, file, protocol=2)
    with pytest.raises(ValueError, match=r"ImageReward.pt: refused, or damaged"):
        ImageReward(copy, bert).load()
    torch.save({"mlp.layers.7.bias": Hostile(made)}, copy / "ImageReward.pt")
    with pytest.raises(ValueError, match=r"ImageReward.pt: refused, or damaged .*system"):
        ImageReward(copy, bert).load()
    assert not made.exists()


@pytest.mark.parametrize("name", ["ImageReward.pt", "med_config.json"])
def test_a_missing_file_is_named(copy: Path, bert: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"missing; valid: a folder with ImageReward.pt and med_config.json"):
        ImageReward(copy, bert)


def test_a_missing_vocabulary_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"valid: a folder with vocab.txt or tokenizer.json: '.*/nowhere/vocab.txt'"):
        ImageReward(folder, tmp_path / "nowhere")


def test_a_saved_tokenizer_is_the_same(folder: Path, bert: Path, tmp_path: Path, metric: ImageReward) -> None:
    """Newer folders have tokenizer.json; that of one with [DEC] and [ENC] has them already."""
    metric.tokenizer.save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.txt").exists()
    again = ImageReward(folder, tmp_path)
    assert torch.equal(again.tokens(PROMPTS)["input_ids"], metric.tokens(PROMPTS)["input_ids"])


def test_another_vocabulary_is_refused(folder: Path, tmp_path: Path) -> None:
    bert = saved_bert(tmp_path)
    (bert / "vocab.txt").write_text("\n".join(VOCABULARY[:-9]) + "\n")
    message = (
        rf"tokenizer: {len(VOCABULARY) - 7} tokens with \[DEC\] and \[ENC\]; valid: med_config.json's {len(VOCABULARY) + 2}"
    )
    with pytest.raises(ValueError, match=message):
        ImageReward(folder, bert).load()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_attention_heads": 5}, "med_config.json: .*5"),
        ({"hidden_act": "nothing"}, "med_config.json: .*nothing"),
        ({"hidden_size": "wide"}, "med_config.json: .*hidden_size"),
        ({"hidden_size": 64}, "ImageReward.pt: other shapes: blip.text_encoder"),
        ({"num_hidden_layers": 3}, "ImageReward.pt: missing: blip.text_encoder.encoder.layer.2"),
        ({"num_hidden_layers": 1}, "ImageReward.pt: unexpected: blip.text_encoder.encoder.layer.1"),
    ],
)
def test_another_configuration_is_refused(copy: Path, bert: Path, values: dict[str, Any], message: str) -> None:
    config = json.loads((copy / "med_config.json").read_text())
    (copy / "med_config.json").write_text(json.dumps(config | values))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        ImageReward(copy, bert).load()


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_damaged_configuration_is_refused(copy: Path, bert: Path, text: str) -> None:
    (copy / "med_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"med_config.json: "):
        ImageReward(copy, bert)


def test_the_tiny_model_is_small_and_its_seeds(folder: Path, bert: Path, tmp_path: Path, metric: ImageReward) -> None:
    assert sum(file.stat().st_size for file in [*folder.iterdir(), *bert.iterdir()]) < 5e6
    again, other = (ImageReward(saved_image_reward(tmp_path / str(seed), seed), bert) for seed in (0, 1))
    found = metric(pictures(4), PROMPTS)
    assert torch.equal(again(pictures(4), PROMPTS), found)
    assert not torch.allclose(other(pictures(4), PROMPTS), found, atol=1e-2)


def test_the_published_weights_score_as_published() -> None:
    """Up to the rounding of float32, in which the package computed them on another machine."""
    if "PARASOL_GOLDENS" not in os.environ:
        pytest.skip("PARASOL_GOLDENS names no folder with image_reward/, bert/ and images/image_reward/1.webp .. 4.webp")
    goldens = Path(os.environ["PARASOL_GOLDENS"])
    metric = ImageReward(goldens / "image_reward", goldens / "bert")
    for number, expected in enumerate(GOLDENS, start=1):
        image = Image.open(goldens / f"images/image_reward/{number}.webp").convert("RGB")
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(1, image.height, image.width, 3)
        assert metric(pixels.permute(0, 3, 1, 2), [GOLDEN_PROMPT]).item() == pytest.approx(expected, abs=1e-3)
