import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

with warnings.catch_warnings():  # of transformers' own imports
    warnings.simplefilter("ignore")
    from tiny_aesthetic import saved_aesthetic
    from tiny_clip import IMAGE, PROJECTION, saved_clip

    from metrics.aesthetic import FILE, Aesthetic
    from metrics.clip import ROWS, Clip, ClipScore
    from metrics.head import Head
    from metrics.state import load_exactly, read_state


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Clip:
    return Clip(saved_clip(tmp_path_factory.mktemp("clip"), seed=0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_aesthetic(tmp_path_factory.mktemp("aesthetic"), PROJECTION, seed=0)


@pytest.fixture
def passes(clip: Clip) -> Iterator[list[int]]:
    """The images of each pass of the vision model."""
    rows: list[int] = []
    vision = clip.model.vision_model
    hook = vision.register_forward_hook(lambda module, arguments, output: rows.append(len(output.pooler_output)))
    yield rows
    hook.remove()


def pictures(count: int, height: int = IMAGE, width: int = IMAGE) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(0))


def published(folder: Path, features: Tensor) -> Tensor:
    """Features (B, F) -> scores (B,) as the predictor's authors compute them, in float64, with matrix products alone."""
    state = {name: value.double() for name, value in torch.load(folder / FILE, weights_only=True).items()}
    x = features.double()
    for layer in (0, 2, 4, 6, 7):  # between them are dropouts
        x = x @ state[f"layers.{layer}.weight"].T + state[f"layers.{layer}.bias"]
    return x[:, 0]


@pytest.mark.parametrize("shape", [(IMAGE, IMAGE), (40, 100), (20, 24)])
def test_scores_are_the_published(clip: Clip, folder: Path, shape: tuple[int, int]) -> None:
    images = pictures(5, *shape)
    features = clip.image_features(images)
    expected = published(folder, features / features.norm(dim=-1, keepdim=True))
    found = Aesthetic(clip, folder)(images, [""] * 5)
    assert found.dtype == torch.float64
    assert expected.std() > 1e-4
    assert torch.allclose(found, expected, rtol=0, atol=1e-6)


def test_features_are_normalised(clip: Clip, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their length does not matter; if it did, the scores would be others."""
    images = pictures(3)
    features, before = clip.image_features(images), Aesthetic(clip, folder)(images, [""] * 3)
    assert (published(folder, features) - before).abs().min() > 1e-2
    monkeypatch.setattr(clip, "image_features", lambda images: 7 * features)
    assert torch.allclose(Aesthetic(clip, folder)(images, [""] * 3), before, rtol=0, atol=1e-6)


def test_prompts_do_not_matter(clip: Clip, folder: Path) -> None:
    images, aesthetic = pictures(3), Aesthetic(clip, folder)
    assert torch.equal(aesthetic(images, ["a boat", "b", ""]), aesthetic(images, [""] * 3))


def test_a_pass_is_shared_with_clip_score(clip: Clip, folder: Path, passes: list[int]) -> None:
    """While they are asked for the same tensor, and nothing has been written to it."""
    metrics, images = (Aesthetic(clip, folder), ClipScore(clip)), pictures(3)
    first = [metric(images, ["a boat"] * 3) for metric in metrics]
    assert passes == [3]
    images[0] = 0.5
    changed = [metric(images, ["a boat"] * 3) for metric in metrics]
    assert passes == [3, 3]
    for before, after in zip(first, changed, strict=True):
        assert not torch.isclose(before[0], after[0], atol=1e-6)
        assert torch.allclose(before[1:], after[1:], rtol=0, atol=1e-6)
    again = [metric(images.clone(), ["a boat"] * 3) for metric in metrics]
    assert passes == [3, 3, 3, 3]
    assert all(torch.equal(one, other) for one, other in zip(changed, again, strict=True))


def test_gradients_are_not_remembered(clip: Clip, folder: Path, passes: list[int]) -> None:
    """A pass without gradients does not answer for one with them, nor the other way round."""
    aesthetic, images = Aesthetic(clip, folder), pictures(2)
    plain = aesthetic(images, ["", ""])
    images.requires_grad_()
    for _ in range(2):
        (gradient,) = torch.autograd.grad(aesthetic(images, ["", ""]).sum(), images)
        assert bool((gradient.abs().sum((1, 2, 3)) > 0).all())
    with torch.no_grad():
        assert torch.equal(aesthetic(images, ["", ""]), plain)
    assert passes == [2, 2, 2]


def test_the_gradient_is_the_scores(clip: Clip, folder: Path) -> None:
    """That of the published computation."""
    images = pictures(2, 40, 50).requires_grad_()
    features = clip.image_features(images)
    (expected,) = torch.autograd.grad(published(folder, normalize(features, dim=-1)).sum(), images)
    (found,) = torch.autograd.grad(Aesthetic(clip, folder)(images, ["", ""]).sum(), images)
    assert expected.norm() > 0
    assert (found - expected).norm() < 1e-5 * expected.norm()


def test_a_score_is_independent_of_its_batch(clip: Clip, folder: Path) -> None:
    aesthetic, images = Aesthetic(clip, folder), pictures(ROWS + 3, 20, 24)
    alone = torch.cat([aesthetic(images[i : i + 1], [""]) for i in range(len(images))])
    assert torch.allclose(aesthetic(images, [""] * len(images)), alone, rtol=0, atol=1e-6)


def test_dropout_is_off_and_the_head_frozen(clip: Clip, folder: Path) -> None:
    aesthetic = Aesthetic(clip, folder)
    assert torch.equal(aesthetic(pictures(3), [""] * 3), aesthetic(pictures(3), [""] * 3))
    assert not any(parameter.requires_grad for parameter in aesthetic.head.parameters())


def test_a_clip_in_half_precision_is_enough(clip: Clip, folder: Path) -> None:
    half, images = Clip(clip.folder, dtype=torch.float16), pictures(3)
    found, expected = (Aesthetic(model, folder)(images, [""] * 3) for model in (half, clip))
    assert torch.allclose(found, expected, rtol=0, atol=3e-3)


def test_weights_are_read_when_needed(clip: Clip, tmp_path: Path) -> None:
    aesthetic = Aesthetic(clip, saved_aesthetic(tmp_path, PROJECTION, seed=0))
    assert "head" not in vars(aesthetic)
    aesthetic.load()
    (tmp_path / FILE).unlink()
    assert aesthetic(pictures(1), [""]).shape == (1,)


def test_a_head_for_other_features_is_refused(clip: Clip, tmp_path: Path) -> None:
    aesthetic = Aesthetic(clip, saved_aesthetic(tmp_path, 24, seed=0))
    with pytest.raises(ValueError, match=rf"\.pth: other shapes: .*\(1024, 24\), not \(1024, {PROJECTION}\); valid"):
        aesthetic.load()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda state: state.pop("layers.7.bias"), r"missing: layers\.7\.bias"),
        (lambda state: state.update({"layers.8.bias": torch.ones(1)}), r"unexpected: layers\.8\.bias"),
    ],
)
def test_weights_of_another_head_are_refused(
    clip: Clip, tmp_path: Path, edit: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    state = Head(PROJECTION).state_dict()
    edit(state)
    torch.save(state, tmp_path / FILE)
    with pytest.raises(ValueError, match=rf"\.pth: {message}; valid: exactly the weights of Head"):
        Aesthetic(clip, tmp_path).load()


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_is_not_executed(clip: Clip, tmp_path: Path) -> None:
    torch.save({"hostile": Hostile(tmp_path / "made"), **Head(PROJECTION).state_dict()}, tmp_path / FILE)
    with pytest.raises(ValueError, match=r"\.pth: refused, or damaged \(.*mkdir"):
        Aesthetic(clip, tmp_path).load()
    assert not (tmp_path / "made").exists()


def test_a_missing_file_is_named(clip: Clip, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing") as caught:
        Aesthetic(clip, tmp_path)
    assert caught.value.filename == str(tmp_path / FILE)


def test_what_is_no_batch_of_images_is_refused(clip: Clip, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"prompts: 1 for images \(2, 3, 32, 32\)"):
        Aesthetic(clip, folder)(pictures(2), [""])
    with pytest.raises(ValueError, match="valid: from 0 to 1"):
        Aesthetic(clip, folder)(pictures(2) + 1, ["", ""])


def test_the_published_weights_rate_from_1_to_10() -> None:
    """Noise, or features of length 1 in random directions where there is no CLIP."""
    goldens = os.environ.get("PARASOL_GOLDENS")
    if goldens is None:
        pytest.skip(f"PARASOL_GOLDENS names no folder with aesthetic/{FILE}, and clip_l14")
    file, model = Path(goldens, "aesthetic", FILE), Path(goldens, "clip_l14")
    if not file.exists():
        pytest.skip(f"{file} is not there")
    if model.exists():
        found = Aesthetic(Clip(model), file.parent)(pictures(4, 224, 224), [""] * 4)
    else:
        head = Head(768)
        load_exactly(head, read_state(file), file)
        found = head.eval()(normalize(torch.randn(16, 768, generator=torch.Generator().manual_seed(0)), dim=-1))
    assert found.min() > 1
    assert found.max() < 10
