import json
import math
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

with warnings.catch_warnings():  # of transformers' own imports
    warnings.simplefilter("ignore")
    from PIL import Image
    from tiny_clip import IMAGE, tiny_clip
    from tiny_mps import HEADS, LAYERS, saved_clip_h14, saved_mps, tiny_mps, tiny_mps_config

    from metrics import mps
    from metrics.clip import clip_tokenizer
    from metrics.images import cropped, normalised
    from metrics.mps import CONDITION, FILE, MPS

PROMPTS = ["a boat", "a lighthouse at dusk", "", "cats with horns on their heads", "a boat"]

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_mps(tmp_path_factory.mktemp("mps"), 0)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_clip_h14(tmp_path_factory.mktemp("clip_h14"))


@pytest.fixture(scope="module")
def scorer(folder: Path, clip: Path) -> MPS:
    return MPS(folder, clip)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "copy")


def pictures(count: int, height: int = 40, width: int = 50) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


class Published:
    """The published formulas, a vector and a head at a time, in float64.

    `nearest` is what similarities are divided by; None: the greatest of them.
    """

    def __init__(self, clip: Path) -> None:
        model = tiny_mps(0)
        self.inverse = model.state_dict()["cross_model.layers.0.1.fn.rotary_emb.inv_freq"]
        self.clip = model.model.double().requires_grad_(False)
        self.weights = {name.removeprefix("cross_model."): value.double() for name, value in model.state_dict().items()}
        self.tokenizer = clip_tokenizer(clip, tiny_mps_config())

    def texts(self, prompt: str) -> tuple[Tensor, Tensor]:
        """The features of 77 tokens, and of the end."""
        tokens = self.tokenizer(prompt, max_length=77, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
        found: Any = self.clip.text_model(tokens)
        features = self.clip.text_projection(found[0])[0]
        end = tokens[0].tolist().index(self.tokenizer.eos_token_id)
        assert torch.allclose(self.clip.text_projection(found[1])[0], features[end])
        return features, features[end]

    def patches(self, image: Tensor) -> Tensor:
        """The features of the class token and 16 patches."""
        hidden: list[Tensor] = []
        hook = self.clip.vision_model.encoder.layers[-1].register_forward_hook(lambda *found: hidden.append(found[-1]))
        self.clip.vision_model(normalised(cropped(image[None], IMAGE).float() / 255).double())
        hook.remove()
        return self.clip.visual_projection(hidden[0])[0]

    def similarities(self, prompt: str) -> list[float]:
        """Of each token to its nearest one of the condition."""
        condition = self.texts(CONDITION)[0]
        return [max(float(token @ other) for other in condition) for token in self.texts(prompt)[0]]

    @torch.no_grad()
    def score(self, image: Tensor, prompt: str, threshold: float = 0.3, nearest: float | None = None) -> float:
        similarities = self.similarities(prompt)
        nearest = nearest or max(similarities)
        mask = torch.tensor([0.0 if s / nearest > threshold else -math.inf for s in similarities], dtype=torch.float64)
        tokens, end = self.texts(prompt)
        x = self.patches(image)
        for layer in range(LAYERS):
            x = x + self.cross(f"layers.{layer}.0.fn.", x, tokens, mask)
            x = x + self.own(f"layers.{layer}.1.fn.", x)
        first = x[0]
        cosine = (first @ end) / first.norm() / end.norm()
        return float(self.clip.logit_scale.exp() * cosine)

    def cross(self, at: str, x: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        w = self.weights
        x = functional.layer_norm(x, x.shape[-1:], w[f"{at}norm.weight"], w[f"{at}norm.bias"])
        both = tokens @ w[f"{at}to_kv.weight"].T
        found = self.attention(x @ w[f"{at}to_q.weight"].T, both[:, :64], both[:, 64:], mask)
        return found @ w[f"{at}to_out.weight"].T + self.gated(x @ w[f"{at}ff.0.weight"].T) @ w[f"{at}ff.2.weight"].T

    def own(self, at: str, x: Tensor) -> Tensor:
        w = self.weights
        x = functional.layer_norm(x, x.shape[-1:], w[f"{at}norm.weight"], w[f"{at}norm.bias"])
        fused, inner = x @ w[f"{at}fused_attn_ff_proj.weight"].T, HEADS * 64
        queries = torch.cat([self.turned(fused[:, 64 * head : 64 * head + 64]) for head in range(HEADS)], 1)
        keys, values, rest = (
            self.turned(fused[:, inner : inner + 64]),
            fused[:, inner + 64 : inner + 128],
            fused[:, inner + 128 :],
        )
        found = self.attention(queries, keys, values, torch.zeros(len(x), dtype=torch.float64))
        return found @ w[f"{at}attn_out.weight"].T + self.gated(rest) @ w[f"{at}ff_out.1.weight"].T

    def turned(self, x: Tensor) -> Tensor:
        """The complex numbers x[j] + i x[j + 32] times exp(i angle)."""
        angles = torch.stack([self.inverse.double() * n for n in range(len(x))])
        numbers = torch.complex(x[:, :32], x[:, 32:]) * torch.exp(1j * angles)
        return torch.cat([numbers.real, numbers.imag], 1)

    @staticmethod
    def attention(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        heads = []
        for head in range(HEADS):
            rows = [torch.softmax(query @ keys.T / 8 + mask, 0) @ values for query in queries[:, 64 * head : 64 * head + 64]]
            heads.append(torch.stack(rows))
        return torch.cat(heads, 1)

    @staticmethod
    def gated(x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        return x[:, :half] * x[:, half:] * torch.sigmoid(x[:, half:])


@pytest.fixture(scope="module")
def published(clip: Path) -> Published:
    return Published(clip)


@pytest.mark.parametrize("threshold", [0.3, 0.01, 0.6])
def test_scores_are_the_published_formulas(threshold: float, folder: Path, clip: Path, published: Published) -> None:
    images = pictures(5)
    expected = torch.tensor([published.score(*pair, threshold) for pair in zip(images, PROMPTS, strict=True)]).double()
    found = MPS(folder, clip, threshold=threshold)(images, PROMPTS)
    assert found.dtype == torch.float64
    assert found.std() > 0.3
    assert torch.allclose(found, expected, rtol=0, atol=1e-5)
    found = MPS(folder, clip, dtype=torch.float64, threshold=threshold)(images, PROMPTS)
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)  # which are float32


def test_the_threshold_masks_some_tokens(folder: Path, clip: Path) -> None:
    """Else the test above would say nothing of it."""
    kept = []
    for threshold in (0.3, 0.01, 0.6):
        scorer = MPS(folder, clip, threshold=threshold)
        kept.append(int(scorer._near(scorer.texts(PROMPTS)[:, :-1]).sum()))
    assert 5 <= kept[2] < kept[0] < kept[1] <= 5 * 77
    assert MPS(folder, clip).threshold == 0.3


def test_a_score_is_independent_of_its_batch(scorer: MPS, published: Published) -> None:
    """The published one is not where the other prompt's similarities are much larger."""
    greatest = {prompt: max(published.similarities(prompt)) for prompt in [*PROMPTS, "ooo", "a tower", "zebras"]}
    small, large = min(greatest, key=greatest.__getitem__), max(greatest, key=greatest.__getitem__)
    images = pictures(2)
    alone = scorer(images[:1], [small])
    assert abs(published.score(images[0], small, nearest=greatest[large]) - alone.item()) > 1e-3
    assert torch.allclose(scorer(images, [small, large])[:1], alone, rtol=0, atol=1e-5)
    assert torch.allclose(scorer(images.flip(0), [large, small])[1:], alone, rtol=0, atol=1e-5)


def test_images_and_prompts_keep_their_order(scorer: MPS, monkeypatch: pytest.MonkeyPatch) -> None:
    images = pictures(5)
    together = scorer(images, PROMPTS)
    assert torch.allclose(scorer(images.flip(0), PROMPTS[::-1]).flip(0), together, rtol=0, atol=1e-5)
    monkeypatch.setattr(mps, "ROWS", 2)
    assert torch.allclose(scorer(images, PROMPTS), together, rtol=0, atol=1e-5)
    assert together[0] != together[4]


def test_a_prompt_and_the_condition_are_encoded_once(folder: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, rows = MPS(folder, clip), []
    scorer.model.model.text_model.register_forward_hook(lambda module, given, found: rows.append(len(found.pooler_output)))
    monkeypatch.setattr(mps, "ROWS", 2)
    first = scorer(pictures(5), PROMPTS)
    assert sum(rows) == 4 + 1
    assert torch.equal(scorer(pictures(5), PROMPTS), first)
    assert sum(rows) == 4 + 1


@pytest.mark.parametrize("shape", [(IMAGE, IMAGE), (24, 41), (70, 64)])
def test_the_gradient_is_finite_and_not_zero(scorer: MPS, shape: tuple[int, int]) -> None:
    images = pictures(2, *shape).requires_grad_()
    (gradient,) = torch.autograd.grad(scorer(images, ["a", "boat"]).sum(), images)
    assert bool(gradient.isfinite().all())
    assert bool((gradient.abs().sum((1, 2, 3)) > 0).all())
    assert not any(parameter.requires_grad for parameter in scorer.model.parameters())
    assert not scorer.model.training


def test_the_gradient_is_the_scores(folder: Path, clip: Path) -> None:
    """In float64 from the pixels on: along a random direction it is the central difference."""
    model = MPS(folder, clip, dtype=torch.float64)
    tokens = model.texts(["a boat"])
    pixels, direction = torch.randn(2, 1, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def score(pixels: Tensor) -> Tensor:
        seen = model.model.image_features(pixels)
        crossed = model.model.cross_model(seen, tokens[:, :-1], model._near(tokens[:, :-1]))
        return functional.cosine_similarity(crossed[:, 0], tokens[:, -1])

    (gradient,) = torch.autograd.grad(score(pixels.requires_grad_()), pixels)
    step = 1e-5
    with torch.no_grad():
        slope = (score(pixels + step * direction) - score(pixels - step * direction)) / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-6)


def weights() -> State:
    return {name: value.clone() for name, value in tiny_mps(0).state_dict().items()}


@pytest.fixture
def holding(folder: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[State], MPS]:
    """The metric of a checkpoint that holds these weights."""

    def make(state: State) -> MPS:
        monkeypatch.setattr(mps, "read_module", lambda file: state)
        return MPS(folder, clip)

    return make


def test_position_ids_of_old_versions_are_ignored(scorer: MPS, holding: Callable[[State], MPS]) -> None:
    old = {f"model.{part}_model.embeddings.position_ids": torch.arange(n)[None] for part, n in [("text", 77), ("vision", 17)]}
    assert torch.equal(holding(weights() | old)(pictures(5), PROMPTS), scorer(pictures(5), PROMPTS))


def test_the_scale_is_not_rounded(holding: Callable[[State], MPS]) -> None:
    """In bfloat16 exp(4.6052) would be 98.9."""
    found = holding(weights() | {"model.logit_scale": torch.tensor(100.0).log()})
    found.dtype = torch.bfloat16
    assert found.model.model.logit_scale.exp().item() == pytest.approx(100, rel=1e-5)


def test_the_scale_is_a_weight(scorer: MPS, holding: Callable[[State], MPS]) -> None:
    state = weights()
    ratio = (0.5 - state["model.logit_scale"].double()).exp()
    found = holding(state | {"model.logit_scale": torch.tensor(0.5)})
    assert torch.allclose(found(pictures(5), PROMPTS), ratio * scorer(pictures(5), PROMPTS))


def test_only_negative_similarities_keep_all_tokens(folder: Path, clip: Path) -> None:
    """Divided by the greatest of them, they are 1 or more, as published."""
    scorer = MPS(folder, clip)
    tokens = scorer.texts(["a boat"])[:, :-1]
    scorer.condition = -tokens[0, :1]  # one token, to which the first is opposite
    nearest = (tokens @ scorer.condition.T).amax(-1)
    negative = tokens[:, nearest[0] < 0]
    assert negative.shape[1] > 1
    assert bool(scorer._near(negative).all())


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_similarities_that_say_nothing_are_refused(folder: Path, clip: Path, value: float) -> None:
    scorer = MPS(folder, clip)
    scorer.condition = torch.full_like(scorer.condition, value)
    with pytest.raises(ValueError, match="prompt 'a boat': similarities to the condition all 0, or not finite; valid"):
        scorer(pictures(2), ["a boat", "a boat"])


@pytest.mark.parametrize("threshold", [1.0, 30, math.nan, math.inf])
def test_a_threshold_that_masks_everything_is_refused(folder: Path, clip: Path, threshold: float) -> None:
    with pytest.raises(ValueError, match=f"threshold: {threshold}; valid: below 1"):
        MPS(folder, clip, threshold=threshold)


def test_nothing_is_read_before_it_is_needed(copy: Path, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    reader = mps.read_module
    monkeypatch.setattr(mps, "read_module", lambda file: (read.append(file), reader(file))[1])
    scorer = MPS(copy, clip)
    assert read == []
    scorer.load()
    (copy / FILE).unlink()
    scorer(pictures(1), ["a boat"])
    assert read == [copy / FILE]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_weights_are_raised_and_angles_are_never_rounded(dtype: torch.dtype, folder: Path, clip: Path) -> None:
    model = MPS(folder, clip, dtype=dtype).model
    assert all(weight.dtype == dtype for weight in model.parameters() if weight.ndim)
    rotation: Any = model.cross_model.layers[0][1].fn.rotary_emb  # type: ignore[index]
    x = torch.zeros(1, 258, 1, 64)
    x[..., :32] = 1
    inverse = weights()["cross_model.layers.0.1.fn.rotary_emb.inv_freq"]
    assert inverse.dtype == torch.float16
    angles = torch.arange(258)[:, None] * inverse.double()
    assert torch.allclose(rotation(x)[0, :, 0], torch.cat([angles.double().cos(), angles.double().sin()], 1).float(), atol=1e-6)
    assert torch.allclose(inverse.double(), 10000 ** (-torch.arange(32).double() / 32), rtol=1e-3)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_checkpoint_is_refused(copy: Path, clip: Path, kept: float) -> None:
    whole = (copy / FILE).read_bytes()
    (copy / FILE).write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(ValueError, match=f"{re.escape(str(copy / FILE))}: .*; valid: "):
        MPS(copy, clip).load()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda state: state.pop("model.logit_scale"), "missing: model.logit_scale; valid: exactly"),
        (
            lambda state: state.pop("cross_model.layers.1.1.fn.ff_out.1.weight"),
            r"missing: cross_model\.layers\.1\.1\.fn\.ff_out",
        ),
        (lambda state: state.update(head=torch.ones(2)), "unexpected: head"),
        (lambda state: state.update({"model.logit_scale": torch.ones(2)}), r"other shapes: model.logit_scale \(2,\), not \(\)"),
        (
            lambda state: state.update({"cross_model.layers.2.0.fn.to_q.weight": torch.ones(128, 64)}),
            "missing: cross_model.layers.2",
        ),
        (
            lambda state: state.update({"cross_model.layers.0.0.fn.to_q.weight": torch.ones(64, 64)}),
            "other shapes: cross_model",
        ),
        (lambda state: state.update({"cross_model.layers.0.0.fn.to_q.weight": torch.tensor(1.0)}), "other shapes: cross_model"),
    ],
)
def test_weights_of_another_model_are_refused(
    holding: Callable[[State], MPS], edit: Callable[[State], Any], message: str
) -> None:
    state = weights()
    edit(state)
    with pytest.raises(ValueError, match=rf"{FILE}: .*{message}"):
        holding(state).load()


def test_a_whole_module_of_another_kind_is_refused(clip: Path, tmp_path: Path) -> None:
    torch.save(tiny_clip(0), tmp_path / FILE)
    with pytest.raises(ValueError, match=f"{FILE}: missing: model.logit_scale, .* unexpected: logit_scale, .*; valid: exactly"):
        MPS(tmp_path, clip).load()
    torch.save(weights(), tmp_path / FILE)
    with pytest.raises(ValueError, match=r"valid: a whole nn\.Module"):
        MPS(tmp_path, clip).load()


def test_another_configuration_is_refused(folder: Path, clip: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(clip, tmp_path / "clip")
    config = json.loads((copy / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 3
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"missing: model\.vision_model\.encoder\.layers\.2"):
        MPS(folder, copy).load()


class Attack:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def test_a_hostile_checkpoint_is_not_executed(clip: Path, tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    model.attack = Attack(tmp_path / "canary")  # type: ignore[assignment]
    torch.save(model, tmp_path / FILE)
    with pytest.raises(ValueError, match=f"{FILE}: at byte .*'posix.system'; valid"):
        MPS(tmp_path, clip).load()
    assert not (tmp_path / "canary").exists()


def test_the_published_classes_do_not_exist(scorer: MPS) -> None:
    scorer.load()
    assert not any(name.partition(".")[0] == "trainer" for name in sys.modules)


def test_missing_files_are_named(folder: Path, clip: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"missing; valid: a file: '.*{FILE}'"):
        MPS(tmp_path, clip)
    for name in ("config.json", "tokenizer.json"):
        copy = shutil.copytree(clip, tmp_path / name)
        (copy / name).unlink()
        with pytest.raises(FileNotFoundError, match=r"missing; valid: a folder with config.json and tokenizer.json"):
            MPS(folder, copy)


@pytest.mark.parametrize(
    ("images", "prompts", "message"),
    [
        (torch.full((2, 3, IMAGE, IMAGE), torch.nan), ["a"] * 2, "NaN or infinite"),
        (torch.zeros(2, 1, IMAGE, IMAGE), ["a"] * 2, r"\(2, 1, 32, 32\); valid"),
        (torch.full((2, 3, IMAGE, IMAGE), 2.0), ["a"] * 2, "from 2 to 2; valid"),
        (torch.zeros(2, 3, IMAGE, IMAGE), ["a"], r"prompts: 1 for images \(2, 3, 32, 32\)"),
    ],
)
def test_what_is_no_batch_is_refused(scorer: MPS, images: Tensor, prompts: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scorer(images, prompts)


def test_the_card_says_what_the_number_is() -> None:
    assert MPS.card.divisor == 15
    assert "224" in MPS.card.preprocessing


def test_the_tiny_model_is_small_and_its_seeds(folder: Path, clip: Path, tmp_path: Path, scorer: MPS) -> None:
    assert sum(file.stat().st_size for place in (folder, clip) for file in place.iterdir()) < 1e6
    images = pictures(5)
    assert torch.equal(MPS(saved_mps(tmp_path / "again", 0), clip)(images, PROMPTS), scorer(images, PROMPTS))
    assert not torch.allclose(MPS(saved_mps(tmp_path / "other", 1), clip)(images, PROMPTS), scorer(images, PROMPTS), atol=0.1)


def test_the_published_weights_score_the_published_image() -> None:
    """Of HPSv2's demonstration image; published images score 10 to 12."""
    found = os.environ.get("PARASOL_GOLDENS")
    if found is None:
        pytest.skip("PARASOL_GOLDENS names no folder with mps/, clip_h14/ and images/hps/demo_image.jpg")
    folder = Path(found)
    with Image.open(folder / "images/hps/demo_image.jpg") as opened:
        levels = torch.frombuffer(bytearray(opened.convert("RGB").tobytes()), dtype=torch.uint8)
        image = levels.view(1, opened.height, opened.width, 3).permute(0, 3, 1, 2) / 255
    assert 5 < MPS(folder / "mps", folder / "clip_h14")(image, ["A cat with two horns on its head"]).item() < 18
