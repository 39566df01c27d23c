import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity import calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from metrics import extractors, frechet
from metrics.classifier import Classifier
from metrics.extractors import FILE, INCEPTION, ROWS, Registered, inception, judge
from metrics.frechet import (
    TOOL,
    Statistics,
    distance,
    influence,
    kernel_distance,
    label,
    load_features,
    load_record,
    load_statistics,
    lowest,
    precision_recall,
    ranges_of,
    require_images,
    save_statistics,
    statistics,
)
from metrics.judge_features import LAYER
from stages.statistics import mean_error

FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inception as torch-fidelity has it, with random weights, and a random judge."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        module = "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url"
        patch.setattr(module, lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.save(FeatureExtractorInceptionV3(INCEPTION, ["64"]).state_dict(), folder / FILE)
    Classifier().save(folder / "judge.safetensors")
    return folder


class Images(Dataset[Tensor]):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def pictures(count: int, channels: int, size: int, seed: int, brightest: int = 256) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, brightest, (count, channels, size, size), generator=generator, dtype=torch.uint8)


def normal(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fidelity(one: Tensor, other: Tensor, extractor: str, layer: str, weights: Path) -> dict[str, float]:
    return calculate_metrics(
        input1=Images(one),
        input2=Images(other),
        fid=True,
        feature_extractor=extractor,
        feature_layer_fid=layer,
        feature_extractor_weights_path=str(weights),
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )


# ---- extractors


def test_inceptions_distance_is_torch_fidelitys(folder: Path) -> None:
    """On its own copies of the same images, to the single precision in which it takes their mean."""
    extractor = Registered(INCEPTION, "64", 64, "", folder / FILE)
    one, other = pictures(64, 3, 16, 0), pictures(64, 3, 16, 1, 200)
    found = distance(statistics(extractor(one)), statistics(extractor(other)))
    assert found == pytest.approx(fidelity(one, other, INCEPTION, "64", folder / FILE)[KEY_METRIC_FID], rel=1e-6)


def test_the_judges_distance_is_torch_fidelitys(folder: Path) -> None:
    weights = folder / "judge.safetensors"
    one, other = pictures(300, 1, 8, 0), pictures(300, 1, 8, 1, 200)
    found = distance(statistics(judge(weights)(one)), statistics(judge(weights)(other)))
    assert found == pytest.approx(fidelity(one, other, judge(weights).name, LAYER, weights)[KEY_METRIC_FID], rel=1e-6)


def test_features_are_the_judges_on_eight_bits(folder: Path) -> None:
    images = torch.rand(2 * ROWS + 5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    extractor = judge(folder / "judge.safetensors")
    expected = Classifier.load(folder / "judge.safetensors").features((images * 255).round() / 255)
    found = extractor(images)
    assert found.dtype == torch.float64
    assert found.shape[1] == extractor.width
    assert not found.requires_grad
    assert torch.allclose(found, expected.double(), atol=1e-6)
    assert torch.equal(extractor((images * 255).round().to(torch.uint8)), found)
    assert torch.equal(extractor(images * 1.0005), extractor((images * 1.0005).clamp(0, 1)))


def test_features_are_independent_of_their_batch(folder: Path) -> None:
    """And so the same in however many ranks."""
    images, extractor = pictures(150, 1, 8, 0), judge(folder / "judge.safetensors")
    together = extractor(images)
    for size in (1, 7, 64, 100):
        assert torch.allclose(torch.cat([extractor(part) for part in images.split(size)]), together, rtol=0, atol=1e-6)
    shards = torch.cat([extractor(images[:ROWS]), extractor(images[ROWS:])])  # the same chunks
    assert statistics(shards)["sigma"].tobytes() == statistics(together)["sigma"].tobytes()


def test_statistics_of_what_ranks_have_are_those_of_all(tmp_path: Path) -> None:
    features = normal(200, 8)
    save_statistics(tmp_path / "one.npz", statistics(features), features)
    shards = torch.cat([features[:90], features[90:]])
    save_statistics(tmp_path / "two.npz", statistics(shards), shards)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    naive = {"mu": features.mean(0).numpy(), "sigma": features.T.cov().numpy()}
    assert all(np.allclose(statistics(features)[key], naive[key], rtol=0, atol=1e-12) for key in naive)


def test_inception_is_fids(folder: Path) -> None:
    extractor = inception(folder)
    assert (extractor.name, extractor.layer, extractor.width) == (INCEPTION, "2048", 2048)
    assert extractor(pictures(1, 3, 32, 0)).shape == (1, 2048)
    assert TOOL == "torch-fidelity 0.4.0"


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 8, 8), r"\(1, 8, 8\); valid: \(B, C, H, W\)"),
        (torch.zeros(0, 1, 8, 8), r"\(0, 1, 8, 8\); valid"),
        (torch.full((1, 1, 8, 8), 1.1), "from 1.1 to 1.1; valid: from 0 to 1"),
        (torch.full((1, 1, 8, 8), torch.nan), "from nan to nan"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(folder: Path, images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge(folder / "judge.safetensors")(images)


class Hostile:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_in_inceptions_place_is_not_executed(tmp_path: Path, zipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FORCED, raising=False)
    torch.save({"fc.bias": Hostile(tmp_path / "executed")}, tmp_path / FILE, _use_new_zipfile_serialization=zipped)
    extractor = inception(tmp_path)
    with pytest.raises(ValueError, match=f"{FILE}: refused"):
        extractor.load()
    assert not (tmp_path / "executed").exists()
    assert FORCED not in os.environ
    # what this test itself wrote: only so is it known that it would have been executed
    torch.load(tmp_path / FILE, weights_only=False)
    assert (tmp_path / "executed").exists()


def test_the_variable_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORCED, "0")
    torch.save([], tmp_path / FILE)
    with pytest.raises(ValueError, match=FILE):
        inception(tmp_path).load()
    assert os.environ[FORCED] == "0"


def test_an_extractor_that_is_ready_first_does_not_uncover_another(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """The variable holds until the last of two threads has created its own."""
    monkeypatch.delenv(FORCED, raising=False)
    seen: list[str | None] = []
    waits = iter([0.0, 0.2])

    def created(*_: object, **__: object) -> torch.nn.Module:
        time.sleep(next(waits))
        seen.append(os.environ.get(FORCED))
        return torch.nn.Identity()

    monkeypatch.setattr(extractors, "create_feature_extractor", created)
    threads = [threading.Thread(target=inception(folder).load) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == ["1", "1"]
    assert FORCED not in os.environ


def test_a_damaged_or_other_file_is_named(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / FILE
    with pytest.raises(FileNotFoundError) as missing:
        inception(tmp_path)
    assert missing.value.filename == str(file)
    file.write_bytes((folder / FILE).read_bytes()[:1_000_000])
    with pytest.raises(ValueError, match=FILE):
        inception(tmp_path).load()
    weights = torch.load(folder / FILE, weights_only=True)
    del weights["fc.bias"]
    torch.save(weights | {"head.bias": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=rf'(?s){FILE}: .*Missing key.*"fc.bias".*Unexpected key.*"head.bias"'):
        inception(tmp_path).load()
    with pytest.raises(ValueError, match=r"judge\.safetensors"):
        Registered(INCEPTION, "2048", 2048, "", folder / "judge.safetensors").load()
    with pytest.raises(ValueError, match=FILE):
        judge(folder / FILE).load()
    with pytest.raises(ValueError, match=r"extractor: found 'v4'; valid: .*digits-judge.*inception-v3-compat"):
        Registered("v4", "", 1, "", folder / FILE)


# ---- statistics and their files


def test_the_distance_of_gaussians_is_the_closed_form() -> None:
    """With diagonal covariances: |mu1 - mu2|^2 + sum (std1 - std2)^2; with ones that commute, in their common axes."""
    mean, std, axes = np.array([1.0, -2.0, 0.5]), np.array([1.0, 2.0, 0.1]), np.linalg.qr(normal(3, 3).numpy())[0]
    expected = (mean**2).sum() + ((std - [1, 3, 2]) ** 2).sum()
    for turn in (np.eye(3), axes):
        one = {"mu": np.zeros(3), "sigma": turn @ np.diag([1.0, 9.0, 4.0]) @ turn.T}
        other = {"mu": turn @ mean, "sigma": turn @ np.diag(std**2) @ turn.T}
        assert distance(one, other) == pytest.approx(expected)
        assert distance(other, other) == pytest.approx(0, abs=1e-9)


def test_the_distance_of_samples_converges_to_the_gaussians() -> None:
    std = torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=torch.float64)
    other: Statistics = {"mu": np.ones(4), "sigma": np.eye(4)}
    expected = 4 + ((std - 1) ** 2).sum().item()
    errors = [abs(distance(statistics(normal(n, 4) * std), other) - expected) for n in (100, 100_000)]
    assert errors[1] < 0.05 < errors[0] * 5


def test_widths_that_differ_are_told() -> None:
    with pytest.raises(ValueError, match="of 2 and 3 features; valid: as many"):
        distance({"mu": np.zeros(2), "sigma": np.eye(2)}, {"mu": np.zeros(3), "sigma": np.eye(3)})


def test_too_few_images_are_told() -> None:
    with pytest.raises(ValueError, match=r"images: 31 for 32 features; valid: at least 32, or the covariance says nothing"):
        statistics(normal(31, 32))
    with pytest.raises(ValueError, match="images: 2047 for 2048 features"):
        require_images(2047, 2048)
    assert statistics(normal(32, 32))["sigma"].shape == (32, 32)


def test_statistics_are_float64() -> None:
    found = statistics(normal(50, 4).float())
    assert found["mu"].dtype == found["sigma"].dtype == np.float64
    assert np.array_equal(found["mu"], statistics(normal(50, 4).float().double())["mu"])


def test_others_read_our_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frechet, "KEPT", 60)
    features, found = normal(100, 4), statistics(normal(100, 4))
    save_statistics(tmp_path / "refs.npz", found, features)
    with np.load(tmp_path / "refs.npz", allow_pickle=False) as read:
        assert set(read) == {"mu", "sigma", "features"}
        assert read["mu"].dtype == read["sigma"].dtype == np.float64
        other = statistics(normal(100, 4, 1))
        theirs = fid_statistics_to_metric({"mu": read["mu"], "sigma": read["sigma"]}, other, verbose=False)
        assert theirs[KEY_METRIC_FID] == distance(found, other)
    loaded = load_statistics(tmp_path / "refs.npz", width=4)
    assert all(np.array_equal(loaded[key], found[key]) for key in ("mu", "sigma"))
    kept = load_features(tmp_path / "refs.npz")
    assert kept is not None
    assert torch.equal(kept, features[:60].float().double())


def test_the_same_statistics_make_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = statistics(normal(100, 4))
    save_statistics(tmp_path / "one", found, normal(100, 4))
    monkeypatch.setattr(time, "time", lambda: 1e9)
    monkeypatch.setattr(time, "localtime", lambda *_: time.gmtime(1e9))
    save_statistics(tmp_path / "two", found, normal(100, 4))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_what_statistics_are_of_is_kept(tmp_path: Path) -> None:
    file, record = tmp_path / "refs.npz", {"path": "Fotos/ä", "images": 7, "sha256": None}
    save_statistics(file, statistics(normal(9, 4)), None, record)
    assert load_record(file) == record
    assert set(load_statistics(file)) == {"mu", "sigma"}
    assert load_features(file) is None
    save_statistics(file, statistics(normal(9, 4)))
    assert load_record(file) == {}
    for other in ("no JSON", "[1]"):
        np.savez(file, mu=np.zeros(2), sigma=np.eye(2), record=np.array(other))
        with pytest.raises(ValueError, match=r"refs\.npz: record: "):
            load_record(file)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_edms_files_are_read(tmp_path: Path, dtype: type, save: Callable[..., None]) -> None:
    found = statistics(normal(100, 4))
    save(tmp_path / "edm.npz", mu=found["mu"].astype(dtype), sigma=found["sigma"].astype(dtype), more=np.arange(3))
    loaded = load_statistics(tmp_path / "edm.npz")
    assert set(loaded) == {"mu", "sigma"}
    assert all(array.dtype == np.float64 for array in loaded.values())
    assert distance(loaded, found) == pytest.approx(0, abs=1e-6)
    assert load_features(tmp_path / "edm.npz") is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.array([object()]), "sigma": np.eye(1)}, "allow_pickle=False"),
        ({"mu": np.zeros(2)}, "found no sigma; valid: an npz with mu"),
        ({"sigma": np.eye(2)}, "found no mu"),
        ({"mu": np.zeros((1, 2)), "sigma": np.eye(2)}, r"found mu \(1, 2\), sigma \(2, 2\); valid"),
        ({"mu": np.zeros(2), "sigma": np.eye(3)}, r"found mu \(2,\), sigma \(3, 3\)"),
        ({"mu": np.zeros(2), "sigma": np.ones((2, 3))}, r"sigma \(2, 3\)"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, r"mu \(0,\)"),
        ({"mu": np.array([0, np.nan]), "sigma": np.eye(2)}, "mu: found float64 that is not all finite"),
        ({"mu": np.zeros(2), "sigma": np.full((2, 2), np.inf)}, "sigma: found float64 that"),
        ({"mu": np.array(["a", "b"]), "sigma": np.eye(2)}, "mu: found <U1"),
        ({"mu": np.zeros(2), "sigma": np.eye(2)}, "found statistics of 2 features; valid: 2048"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "features": np.zeros((5, 3))}, r"found features \(5, 3\); valid: \(n, 2\)"),
        ({"mu": np.zeros(2), "sigma": np.eye(2), "features": np.full((5, 2), np.nan)}, "features: found float64 that"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "refs.npz", **arrays)
    with pytest.raises(ValueError, match=f"refs.npz: {message}|refs.npz: .*{message}"):
        load_features(tmp_path / "refs.npz") if "features" in arrays else load_statistics(tmp_path / "refs.npz", 2048)


def test_a_file_that_is_no_npz_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "refs.npz"
    with pytest.raises(FileNotFoundError):
        load_statistics(file)
    np.savez_compressed(file, mu=np.zeros(40), sigma=normal(40, 40).numpy())
    whole = file.read_bytes()
    for contents in (b"", b"\x80\x04K\x01.", whole[:-30], whole[: len(whole) // 2]):
        file.write_bytes(contents)
        with pytest.raises(ValueError, match=r"refs\.npz: found no npz, or one cut off; valid: an npz"):
            load_statistics(file)
    for at in (len(whole) // 2, len(whole) // 3):
        file.write_bytes(whole[:at] + bytes(20) + whole[at + 20 :])
        with pytest.raises(ValueError, match=r"refs\.npz: found a damaged npz"):
            load_statistics(file)


# ---- ranges and standard errors


@pytest.mark.parametrize(("width", "n"), [(2, 500), (24, 60), (24, 200)])
@pytest.mark.parametrize("moving", [False, True])
def test_influences_give_the_standard_error(width: int, n: int, moving: bool) -> None:
    """Distances of 150 independent sets of n images spread as the influences in one of them say, with few images, too."""
    rng = np.random.default_rng(0)
    scales, spread, errors = np.linspace(0.5, 2, width), list[float](), list[float]()
    for _ in range(150):
        noise = rng.standard_normal((n, width))
        features = torch.from_numpy(noise * scales + 0.2)
        of_same_noise = torch.from_numpy(noise + 0.3 * rng.standard_normal((n, width)))
        found = lowest(features, of_same_noise if moving else {"mu": np.zeros(width), "sigma": np.eye(width)})
        spread.append(found.value)
        errors.append(mean_error(found.influence))
    assert float(np.mean(errors)) == pytest.approx(float(np.std(spread)), rel=0.25)


def test_influences_are_derivatives() -> None:
    """Of the distance by the weight of an image, in which all others lose theirs."""
    features, other = normal(40, 3), {"mu": np.ones(3), "sigma": np.diag([1.0, 2.0, 0.5])}
    step, found = 1e-5, influence(features, other)
    assert found.mean().item() == pytest.approx(0, abs=1e-12)

    def weighted(image: int, weight: float) -> float:
        weights = np.full(40, (1 - weight) / 40)
        weights[image] += weight
        mu = weights @ features.numpy()
        centred = features.numpy() - mu
        return distance({"mu": mu, "sigma": (centred * weights[:, None]).T @ centred}, other)

    for image in range(0, 40, 7):
        slope = (weighted(image, step) - weighted(image, -step)) / (2 * step)
        assert found[image].item() == pytest.approx(slope, rel=0.05, abs=0.05)  # of the sum over n, not n - 1


def test_influences_are_paired() -> None:
    """Those of nearly the same images nearly cancel; an image moves a distance to itself nowhere."""
    features, other = normal(500, 2), {"mu": np.ones(2), "sigma": np.eye(2)}
    assert influence(features, features).abs().max() < 1e-9
    change = influence(features + 1e-3, other) - influence(features, other)
    assert mean_error(change) < 0.01 * mean_error(influence(features, other))


def test_influences_of_as_many_images_as_features_are_finite() -> None:
    assert bool(influence(normal(8, 8), {"mu": np.zeros(8), "sigma": np.eye(8)}).isfinite().all())


def test_ranges_are_consecutive() -> None:
    assert ranges_of(6, 3) == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert ranges_of(5, 1) == [slice(0, 5)]
    for ranges in (0, 4):
        with pytest.raises(ValueError, match=f"ranges: {ranges} of 6 images; valid: a number that divides it"):
            ranges_of(6, ranges)


def test_the_lowest_of_three_is_edms() -> None:
    features, other = normal(300, 2), {"mu": np.ones(2), "sigma": np.eye(2)}
    features[:100] += 0.5
    found = lowest(features, other, 3)
    assert found.each == [distance(statistics(part), other) for part in features.split(100)]
    assert found.value == min(found.each) == found.each[0]
    assert lowest(features, other).each == [distance(statistics(features), other)]
    assert lowest(features, features, 3).value == pytest.approx(0, abs=1e-9)


def test_only_the_lowest_range_moves_the_lowest_distance() -> None:
    features, other = normal(300, 2), {"mu": np.ones(2), "sigma": np.eye(2)}
    features[:100] += 0.5
    found = lowest(features, other, 3).influence
    assert not found[100:].any()
    alone = influence(features[:100], other)
    assert torch.allclose(found[:100], 3 * alone)
    assert mean_error(found) == pytest.approx(mean_error(alone), rel=0.01)


@pytest.mark.parametrize(
    ("n", "expected"),
    [(50_000, "FID"), (150_000, "FID"), (49_999, "FID-49999"), (10_000, "FID-10k"), (4096, "FID-4096"), (500, "FID-500")],
)
def test_fewer_images_are_in_the_name(n: int, expected: str) -> None:
    assert label("FID", n) == expected
    assert label("FD", n) == expected.replace("FID", "FD")


# ---- kernel distance, precision and recall


def test_the_kernel_distance_is_torch_fidelitys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frechet, "SUBSET", 50)
    features, reference = normal(120, 8), normal(90, 8, 1) + 0.3
    theirs = kid_features_to_metric(features, reference, kid_subset_size=50, verbose=False)
    found, error = kernel_distance(features, reference)
    assert found == theirs["kernel_inception_distance_mean"]
    assert error > 0


def test_the_kernel_distance_of_one_subset_is_the_naive_one() -> None:
    """As many features as a subset has: the statistic of all of them, with an error though nothing is drawn."""
    x, y = normal(30, 4), normal(30, 4, 1) + 0.5
    kernel: Callable[[Tensor, Tensor], float] = lambda a, b: float((a @ b / 4 + 1) ** 3)  # noqa: E731
    within = [sum(kernel(a[i], a[j]) for i in range(30) for j in range(30) if i != j) / (30 * 29) for a in (x, y)]
    across = sum(kernel(a, b) for a in x for b in y) / 900
    found, error = kernel_distance(x, y)
    assert found == pytest.approx(sum(within) - 2 * across)

    def without(a: Tensor, b: Tensor) -> Tensor:
        """The distance, but for what only b has, without each of a."""
        left = [torch.cat([a[:i], a[i + 1 :]]) for i in range(30)]
        means = [
            (((rest @ rest.T / 4 + 1) ** 3).sum() - ((rest.square().sum(1) / 4 + 1) ** 3).sum()) / (29 * 28)
            - 2 * ((rest @ b.T / 4 + 1) ** 3).mean()
            for rest in left
        ]
        return torch.stack(means)

    variance = sum(29 / 30 * (values - values.mean()).square().sum().item() for values in (without(x, y), without(y, x)))
    assert error == pytest.approx(variance**0.5)


@pytest.mark.parametrize(("n", "m", "shift"), [(60, 60, 0.0), (60, 60, 0.5), (200, 100, 0.5), (100, 200, 0.0)])
def test_the_kernel_distances_error_is_its_spread(monkeypatch: pytest.MonkeyPatch, n: int, m: int, shift: float) -> None:
    """Over 80 samples, of which the standard deviation is known to 8 %; too large where the distributions are one."""
    monkeypatch.setattr(frechet, "SUBSET", 60)
    monkeypatch.setattr(frechet, "SUBSETS", 30)
    found = [kernel_distance(normal(n, 8, seed), normal(m, 8, 1000 + seed) + shift) for seed in range(80)]
    spread, error = np.std([value for value, _ in found]), np.mean([error**2 for _, error in found]) ** 0.5
    assert 0.75 * spread < error < (1.35 if shift else 1.75) * spread


def test_the_error_of_more_than_is_kept_is_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = normal(3000, 4), normal(3000, 4, 1) + 1
    monkeypatch.setattr(frechet, "SUBSETS", 20)
    whole = kernel_distance(x, y)
    monkeypatch.setattr(frechet, "KEPT", 1000)
    part = kernel_distance(x, y)
    assert part[0] == whole[0]
    assert part[1] == pytest.approx(whole[1], rel=0.1)


def test_identical_sets_have_all_precision_and_recall() -> None:
    features = normal(100, 4)
    found = precision_recall(features, features)
    assert (found["precision"], found["recall"]) == (1, 1)
    far = precision_recall(features, features + 1000)
    assert (far["precision"], far["recall"]) == (0, 0)
    assert far["precision_se"] == pytest.approx(found["precision_se"])
    assert found["precision_se"] > 0, "none is certain"


def test_precision_and_recall_are_torch_fidelitys() -> None:
    """A narrow sample of a wide set: all of it is precise, and little is recalled."""
    features, reference = 0.5 * normal(200, 3), normal(300, 3, 1)
    found = precision_recall(features, reference)
    theirs = prc_features_to_metric(features, reference, verbose=False)
    assert {name: found[name] for name in ("precision", "recall")} == {name: theirs[name] for name in ("precision", "recall")}
    assert found["precision"] > 0.9 > 0.6 > found["recall"] > 0
    for name, n in (("precision", 200), ("recall", 300)):
        middle = (found[name] * n + 2) / (n + 4)
        assert found[f"{name}_se"] == pytest.approx((middle * (1 - middle) / (n + 4)) ** 0.5)


def test_precision_and_recall_see_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    features, reference = 0.5 * normal(200, 3), normal(300, 3, 1)
    monkeypatch.setattr(frechet, "KEPT", 80)
    assert precision_recall(features, reference) == precision_recall(features[:80], reference[:80])


def test_features_that_cannot_be_compared_are_refused() -> None:
    for compare in (kernel_distance, precision_recall):
        with pytest.raises(ValueError, match=r"features: \(9, 2\) and \(9, 3\); valid: as wide"):
            compare(normal(9, 2), normal(9, 3))
        with pytest.raises(ValueError, match=r"features: \(9, 2\) and \(2, 2\); valid: .* at least [34] of each"):
            compare(normal(9, 2), normal(2, 2))
