"""Distances of distributions of images, in features, by torch-fidelity: Frechet, kernel, precision and recall.

Compare only numbers of the same extractor, reference and n: all of them depend on n.
"""

import json
import zlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, is_zipfile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from metrics.state import reading, require

TOOL = f"torch-fidelity {version('torch-fidelity')}"

ENOUGH = 50_000
"""Images of what is called FID without more: fewer have a larger one."""

KEPT = 10_000
"""Features that are kept beside their statistics, and compared row by row."""

SUBSETS, SUBSET = 100, 1000
"""Of the kernel distance (Bińkowski et al. 2018), and how many features each has at most."""

NEIGHBOURS = 3
"""Of precision and recall (Kynkäänniemi et al. 2019)."""

VALID = "an npz with mu (F,) and sigma (F, F), as EDM's"

Statistics = dict[str, NDArray[np.float64]]
"""`mu` (F,) and `sigma` (F, F), as in EDM's npz files."""


def label(name: str, n: int) -> str:
    """What a distance of n images is called: "FID", "FID-10k" or "FID-4096"."""
    if n >= ENOUGH:
        return name
    return f"{name}-{n // 1000}k" if n and n % 1000 == 0 else f"{name}-{n}"


def require_images(n: int, width: int) -> None:
    """Raise ValueError unless n images are enough for the covariance of so many features."""
    if n < width:
        raise ValueError(f"images: {n} for {width} features; valid: at least {width}, or the covariance says nothing")


def statistics(features: Tensor) -> Statistics:
    """Features (n, F) -> their mean and covariance, float64.

    Raises:
        ValueError: n is below F.
    """
    require_images(*features.shape)
    return fid_features_to_statistics(features.detach().cpu().double())


def save_statistics(
    file: Path, found: Statistics, features: Tensor | None = None, record: dict[str, Any] | None = None
) -> None:
    """Write an npz of mu and sigma, the first KEPT features (float32) and what they are of (JSON).

    The same input makes the same bytes.
    """
    more = {} if record is None else {"record": np.array(json.dumps(record, allow_nan=False))}
    if features is not None:
        more["features"] = features[:KEPT].detach().cpu().float().numpy()
    with file.open("wb") as opened:  # by its name numpy would add a suffix
        np.savez(opened, allow_pickle=False, mu=found["mu"], sigma=found["sigma"], **more)


def load_statistics(file: Path, width: int | None = None) -> Statistics:
    """Read an npz of mu and sigma, ours, EDM's or others', as float64; whatever else it has is ignored.

    Args:
        file: which.
        width: F of the features that they are to be compared with; None: any.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is damaged, of other shapes or another width, not finite, or has pickles, which are not executed.
    """
    found = _numbers(file, ["mu", "sigma"])
    for name in ("mu", "sigma"):
        if name not in found:
            raise ValueError(f"{file}: found no {name}; valid: {VALID}")
    mu, sigma = found["mu"], found["sigma"]
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)) or not len(mu):
        raise ValueError(f"{file}: found mu {mu.shape}, sigma {sigma.shape}; valid: {VALID}")
    if not np.allclose(sigma, sigma.T, atol=1e-6 * float(np.abs(sigma).max())) or sigma.diagonal().min() < 0:
        raise ValueError(f"{file}: found a sigma that is no covariance; valid: {VALID}")
    if width is not None and len(mu) != width:
        raise ValueError(f"{file}: found statistics of {len(mu)} features; valid: {width}, as the extractor has")
    return found


def load_features(file: Path) -> Tensor | None:
    """The features (at most KEPT, F) beside the statistics in an npz, float64; None: it has none, as others' have not.

    Raises:
        FileNotFoundError, ValueError: as load_statistics.
    """
    width = len(load_statistics(file)["mu"])
    found = _numbers(file, ["features"])
    if not found:
        return None
    features = torch.from_numpy(found["features"])
    if features.ndim != 2 or features.shape[1] != width:
        raise ValueError(f"{file}: found features {tuple(features.shape)}; valid: (n, {width}), as mu")
    return features


def load_record(file: Path) -> dict[str, Any]:
    """What was said of the statistics in an npz; nothing, where they are others'.

    Raises:
        FileNotFoundError, ValueError: as load_statistics, or what it says is no JSON.
    """
    found = _arrays(file, ["record"])
    with reading(f"{file}: record"):
        record = json.loads(str(found["record"])) if found else {}
        if not isinstance(record, dict):
            raise ValueError(f"found a {type(record).__name__}; valid: what save_statistics writes")
    return record


def distance(one: Statistics, other: Statistics) -> float:
    """|mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)) (Heusel et al. 2017).

    Raises:
        ValueError: they are not of as many features.
    """
    if len(one["mu"]) != len(other["mu"]):
        raise ValueError(f"statistics: of {len(one['mu'])} and {len(other['mu'])} features; valid: as many of both")
    return fid_statistics_to_metric(one, other, verbose=False)[KEY_METRIC_FID]


def ranges_of(n: int, ranges: int) -> list[slice]:
    """Consecutive ranges of n rows, equally long, as EDM's 150,000 images are three times 50,000.

    Raises:
        ValueError: n is no multiple.
    """
    if ranges < 1 or n % ranges:
        raise ValueError(f"ranges: {ranges} of {n} images; valid: a number that divides it")
    size = n // ranges
    return [slice(first * size, (first + 1) * size) for first in range(ranges)]


@dataclass(frozen=True)
class Lowest:
    """The lowest of the distances of ranges of images.

    Attributes:
        value: it.
        each: the distance of every range.
        influence: of each image on the value, (n,): see `influence`. The standard error of their mean is the value's, and
            that of the mean of their differences is the difference's.
    """

    value: float
    each: list[float]
    influence: Tensor


def lowest(features: Tensor, other: Statistics | Tensor, ranges: int = 1) -> Lowest:
    """The lowest of the ranges' distances, which EDM reports of three.

    Args:
        features: (n, F).
        other: fixed statistics, or features (n, F) of the same n samples, range by range.
        ranges: how many.
    """
    parts = ranges_of(len(features), ranges)
    pairs = [(features[rows], other[rows] if isinstance(other, Tensor) else other) for rows in parts]
    each = [distance(statistics(x), statistics(y) if isinstance(y, Tensor) else y) for x, y in pairs]
    best = min(range(ranges), key=each.__getitem__)
    found = torch.zeros(len(features), dtype=torch.float64)
    found[parts[best]] = ranges * influence(*pairs[best])  # images of other ranges have none
    return Lowest(each[best], each, found)


def influence(features: Tensor, other: Statistics | Tensor) -> Tensor:
    """By how much each of features (n, F) moves the distance to others, to first order and times n: (n,), of mean 0.

    To fixed statistics, or to features (n, F) of the same n samples, which move with them. This is the distance's influence
    function, by which its standard error comes from one decomposition, where resampling takes hundreds, and is far too large
    where n is not many times F: a resample has only 63 % of the images.
    """
    one = statistics(features)
    if isinstance(other, Tensor):
        two = statistics(other)
        return _influence(features, one, two) + _influence(other, two, one)
    return _influence(features, one, other)


def _influence(features: Tensor, own: Statistics, other: Statistics) -> Tensor:
    """Of one of the two: the derivative of tr((R^1/2 S R^1/2)^1/2) by S is T/2, where T carries N(0, S) over to N(0, R)."""
    root = _power(other["sigma"], 0.5)
    carry = root @ _power(root @ own["sigma"] @ root, -0.5) @ root
    centred = features.detach().cpu().double().numpy() - own["mu"]
    of_sigma = ((centred - centred @ carry) * centred).sum(1)
    return torch.from_numpy(2 * centred @ (own["mu"] - other["mu"]) + of_sigma - of_sigma.mean())


def _power(matrix: NDArray[np.float64], exponent: float) -> NDArray[np.float64]:
    """Of a symmetric matrix with eigenvalues of 0 and above; of those that are 0 but for rounding, 0."""
    values, vectors = np.linalg.eigh(matrix)
    positive = values > values.max() * len(values) * np.finfo(np.float64).eps
    powers = np.where(positive, np.where(positive, values, 1.0) ** exponent, 0.0)
    return (vectors * powers) @ vectors.T


def kernel_distance(features: Tensor, reference: Tensor) -> tuple[float, float]:
    """KID of features (n, F) and reference features (m, F), as torch-fidelity: MMD^2 under k(x, y) = (x y / F + 1)^3.

    It is the mean over SUBSETS subsets of at most SUBSET features of each, drawn always alike. The subsets' standard deviation
    is no error of it: they overlap, and of 1000 features there is but one. The standard error here has two parts. One is of
    the features being these n and m: the jackknife's, of the first KEPT of each, scaled to all. The other is of the subsets
    being so few. With Gaussians it is 0.85 to 1.2 times the distance's spread where their means differ, and up to 1.5 times
    where little differs: there the statistic degenerates, and the jackknife doubles its variance.

    Returns:
        The distance, which is unbiased and so may be below 0, and its standard error.
    """
    _require_rows(features, reference, 3)
    size = min(SUBSET, len(features), len(reference))
    found = kid_features_to_metric(
        features.double(),
        reference.double(),
        kid_subsets=SUBSETS,
        kid_subset_size=size,
        kid_kernel="poly",
        kid_kernel_poly_degree=3,
        rng_seed=2020,
        verbose=False,
    )
    variance = found[KEY_METRIC_KID_STD] ** 2 / SUBSETS
    for rows, others in ((features, reference), (reference, features)):
        variance += _jackknife(rows[:KEPT].double(), others[:KEPT].double()) * min(len(rows), KEPT) / len(rows)
    return found[KEY_METRIC_KID_MEAN], variance**0.5


def precision_recall(features: Tensor, reference: Tensor) -> dict[str, float]:
    """Shares of features (n, F) in the reference's manifold, and of reference features (m, F) in theirs; of the first KEPT.

    A manifold is what lies no farther from one of its features than NEIGHBOURS others do (Kynkäänniemi et al. 2019). The
    standard errors ("_se") are of the share of so many points in a manifold that is what it is, with two more points inside and
    two outside (Agresti and Coull 1998): a share of 0 or 1 is not certain.
    """
    _require_rows(features, reference, NEIGHBOURS + 1)
    found = prc_features_to_metric(
        features[:KEPT].double(),
        reference[:KEPT].double(),
        prc_neighborhood=NEIGHBOURS,
        prc_batch_size=1000,  # by which its memory goes, not its result
        save_cpu_ram=True,
        verbose=False,
    )
    shares = {"precision": (found[KEY_METRIC_PRECISION], features), "recall": (found[KEY_METRIC_RECALL], reference)}
    errors = {}
    for name, (share, of) in shares.items():
        n = min(len(of), KEPT)
        middle = (share * n + 2) / (n + 4)
        errors[f"{name}_se"] = (middle * (1 - middle) / (n + 4)) ** 0.5
    return {name: share for name, (share, _) in shares.items()} | errors


def _jackknife(x: Tensor, y: Tensor) -> float:
    """The part that x (n, F) has in the variance of the kernel distance of all x and y (m, F)."""
    n, m = len(x), len(y)
    within = _kernel_sums(x, x) - (x.square().mean(1) + 1) ** 3
    left_out = 2 * (_kernel_sums(x, y) / m - within / (n - 2)) / (n - 1)  # of the distances without a row, what differs
    return (n - 1) * left_out.var(unbiased=False).item()


def _kernel_sums(x: Tensor, y: Tensor) -> Tensor:
    """Of each x (n, F), over all y."""
    return torch.cat([((part @ y.T / x.shape[1] + 1) ** 3).sum(1) for part in x.split(SUBSET)])


def _require_rows(features: Tensor, reference: Tensor, least: int) -> None:
    if features.shape[1:] != reference.shape[1:] or min(len(features), len(reference)) < least:
        raise ValueError(
            f"features: {tuple(features.shape)} and {tuple(reference.shape)}; valid: as wide, and at least {least} of each"
        )


def _numbers(file: Path, names: list[str]) -> dict[str, NDArray[np.float64]]:
    """Those of an npz's arrays that it has, float64 and finite."""
    found = _arrays(file, names)
    for name, array in found.items():
        if not np.issubdtype(array.dtype, np.floating) or not np.isfinite(array).all():
            raise ValueError(f"{file}: {name}: found {array.dtype} that is not all finite numbers; valid: {VALID}")
    return {name: array.astype(np.float64) for name, array in found.items()}


def _arrays(file: Path, names: list[str]) -> dict[str, NDArray[Any]]:
    """Those of an npz's arrays that it has."""
    require(file, VALID)
    with reading(file):
        if not is_zipfile(file):
            raise ValueError(f"found no npz, or one cut off; valid: {VALID}")
        try:
            with np.load(file, allow_pickle=False) as stored:
                return {name: stored[name] for name in names if name in stored}
        except (BadZipFile, zlib.error) as error:
            raise ValueError(f"found a damaged npz ({error}); valid: {VALID}") from error
