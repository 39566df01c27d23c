import hashlib
import io
import json
import math
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from backends import Gaussian
from solvers import EPDTable, Predictor, integrate, load_predictor
from stages.import_epd import BACKBONES, app, imported

from .published import PARAMETERS, PLACEHOLDER, SETTINGS, Persistent, dumps, inside, model, parameters

EDM: dict[str, Any] = {"guidance_type": None, "guidance_rate": 0.0, "schedule_type": "time_uniform"}
LDM: dict[str, Any] = {
    "dataset_name": "lsun_bedroom_ldm",
    "img_resolution": 64,
    "guidance_type": "uncond",
    "guidance_rate": 1.0,
}
PLUGIN: dict[str, Any] = {"sampler_stu": "ipndm", "sampler_tea": "dpm", "scale_time": 0.2}
RDPO: dict[str, Any] = {
    "dataset_name": "ms_coco",
    "afs": False,
    "scale_dir": 0.0,
    "scale_time": 0.0,
    "guidance_type": "cfg",
    "sampler_tea": "dpm",
}
SD15 = RDPO | {"img_resolution": 1024, "schedule_type": "discrete", "guidance_rate": 7.5, "backend": "ldm"}
SD15 |= {"backend_config": {"resolution": 1024}}
SD3 = RDPO | {"schedule_type": "flowmatch", "guidance_rate": 4.5, "backend": "sd3", "flowmatch_mu": None}
FLUX = RDPO | {
    "img_resolution": 1024,
    "schedule_type": "flowmatch",
    "guidance_rate": 3.5,
    "backend": "flux",
    "flowmatch_mu": 1.15,
}


def time_uniform(low: float, high: float) -> Callable[[int], list[float]]:
    def levels(num_steps: int) -> list[float]:
        first = 1e-3
        beta_d = 2 * (math.log(low**2 + 1) / first - math.log(high**2 + 1)) / (first - 1)
        beta_min = math.log(high**2 + 1) - beta_d / 2
        times = [1 + i / (num_steps - 1) * (first - 1) for i in range(num_steps)]
        return [math.sqrt(math.exp(beta_d * t * t / 2 + beta_min * t) - 1) for t in times]

    return levels


def alphas(first: float, last: float) -> list[float]:
    kept, product = [], 1.0
    for i in range(1000):
        product *= 1 - (math.sqrt(first) + i / 999 * (math.sqrt(last) - math.sqrt(first))) ** 2
        kept.append(product)
    return kept


def sigma(alpha: float) -> float:
    return math.sqrt((1 - alpha) / alpha)


def stable_diffusion(num_steps: int) -> list[float]:
    """At evenly spaced times between 1 and 1 / 1000, log alpha between two entries of the table linear in time."""
    kept = alphas(0.00085, 0.012)
    times = [1 + i / (num_steps - 1) * (1 / 1000 - 1) for i in range(num_steps)]
    logs = np.interp(times, [(i + 1) / 1000 for i in range(1000)], [math.log(alpha) for alpha in kept])
    return [sigma(math.exp(log)) for log in logs]


def shifted(shift: float, level: float) -> float:
    return shift * level / (1 + (shift - 1) * level)


def stable_diffusion_3(num_steps: int) -> list[float]:
    """Evenly spaced between 1 and the lowest level of the shifted training grid, then shifted."""
    low = shifted(3, 0.001)
    return [shifted(3, 1 + i / (num_steps - 1) * (low - 1)) for i in range(num_steps)]


def flux(num_steps: int) -> list[float]:
    return [shifted(math.exp(1.15), 1 + i / (num_steps - 1) * (0.001 - 1)) for i in range(num_steps)]


EDM_GRID = time_uniform(0.002, 80)
LDM_ALPHAS = alphas(0.0015, 0.0195)
LDM_GRID = time_uniform(sigma(LDM_ALPHAS[0]), sigma(LDM_ALPHAS[-1]))

KINDS: dict[str, tuple[dict[str, Any], str, Callable[[int], list[float]], float]] = {
    "cifar10 epd": (EDM, "cifar10", EDM_GRID, 1.0),
    "cifar10 ipndm": (EDM | PLUGIN, "cifar10", EDM_GRID, 1.0),
    "ffhq epd": (EDM | {"dataset_name": "ffhq", "img_resolution": 64}, "ffhq", EDM_GRID, 1.0),
    "afhqv2 ipndm": (EDM | PLUGIN | {"dataset_name": "afhqv2", "img_resolution": 64}, "afhqv2", EDM_GRID, 1.0),
    "imagenet64 epd": (EDM | {"dataset_name": "imagenet64", "scale_time": 0.1}, "imagenet64", EDM_GRID, 1.0),
    "imagenet64 ipndm": (EDM | PLUGIN | {"dataset_name": "imagenet64", "scale_dir": 0.1}, "imagenet64", EDM_GRID, 1.0),
    "lsun epd": (LDM | {"scale_time": 0.0}, "lsun_bedroom_ldm", LDM_GRID, 1.0),
    "lsun ipndm": (LDM | PLUGIN | {"scale_time": 0.02}, "lsun_bedroom_ldm", LDM_GRID, 1.0),
    "sd15": (SD15, "sd15", stable_diffusion, 7.5),
    "sd3-512": (SD3 | {"img_resolution": 512}, "sd3-512", stable_diffusion_3, 4.5),
    "sd3-1024": (SD3 | {"img_resolution": 1024}, "sd3-1024", stable_diffusion_3, 4.5),
    "flux": (FLUX, "flux", flux, 3.5),
}


DEEP = b"]" * 50_000 + b"a" * 49_999
"""Lists in lists, in the place of PLACEHOLDER."""


def write(folder: Path, num_steps: int = 4, num_points: int = 2, values: dict[str, Any] | None = None, **settings: Any) -> Path:
    """A look-alike in a file."""
    values = parameters(num_steps, num_points) if values is None else values
    file = folder / "network-snapshot.pkl"
    data = dumps({"model": model(values, num_steps=num_steps, num_points=num_points, **settings)})
    file.write_bytes(inside(data, DEEP) if PLACEHOLDER in settings.values() else data)
    return file


def table_of(predictor: Predictor) -> EPDTable:
    assert isinstance(predictor.table, EPDTable)
    return predictor.table


def arrays(table: EPDTable) -> list[list[list[float]]]:
    return [value.tolist() for value in (table.position, table.direction_scale, table.time_scale, table.weight)]


def naive(values: dict[str, nn.Parameter], scale_dir: float, scale_time: float, fcn: bool = False) -> list[list[list[float]]]:
    """The formulas of the paper, number by number."""

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    r, o, a, w = (values[name].tolist() for name in PARAMETERS)
    o = [[2 * scale_dir * sigmoid(x / 2) + 1 - scale_dir for x in row] for row in o]
    if fcn:
        o[-1] = [1.0 for _ in o[-1]]
    return [
        [[sigmoid(x) for x in row] for row in r],
        o,
        [[2 * scale_time * sigmoid(x / 2) + 1 - scale_time for x in row] for row in a],
        [[math.exp(x) / sum(map(math.exp, row)) for x in row] for row in w],
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_steps", "num_points"), [(2, 1), (3, 2), (4, 2), (5, 3), (6, 2), (9, 2), (11, 2)])
def test_a_published_file_has_the_papers_numbers(kind: str, num_steps: int, num_points: int, tmp_path: Path) -> None:
    settings, key, grid, guidance = KINDS[kind]
    values = parameters(num_steps, num_points)
    file = write(tmp_path, num_steps, num_points, values, **settings)
    predictor, warnings = imported(file)
    table = table_of(predictor)
    expected = naive(values, settings.get("scale_dir", 0.05), settings.get("scale_time", 0.05))
    for found, valid in zip(arrays(table), expected, strict=True):
        np.testing.assert_allclose(found, valid, rtol=0, atol=1e-12)
    np.testing.assert_allclose(predictor.sigmas, grid(num_steps), rtol=1e-9)
    assert predictor.sigmas.dtype == table.position.dtype == torch.float64
    assert predictor.afs is settings.get("afs", True)
    assert table.max_order == (3 if "ipndm" in kind else 1)
    assert predictor.backbone == BACKBONES[key].backbone
    assert predictor.guidance_scale == guidance
    assert predictor.serial_evaluations == 2 * (num_steps - 1) - predictor.afs
    assert predictor.total_evaluations == (1 + num_points) * (num_steps - 1) - predictor.afs
    assert bool(warnings) == (kind == "sd15")
    provenance = predictor.provenance
    assert (provenance["stage"], provenance["file"], provenance["sorted"]) == ("import_epd", file.name, False)
    assert provenance["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    valid = {**SETTINGS, **settings, "num_steps": num_steps, "num_points": num_points}
    valid |= {"img_resolution": 512, "backend_config": {"resolution": 512}} if kind == "sd15" else {}
    assert provenance["parameters"] == valid


@pytest.mark.parametrize("num_steps", range(2, 12))
def test_grids_of_pipelines_are_those_of_diffusers(num_steps: int, tmp_path: Path) -> None:
    from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(num_steps)
    found, _ = imported(write(tmp_path, num_steps, **SD3, img_resolution=512))
    np.testing.assert_allclose(found.sigmas, np.asarray(scheduler.sigmas)[:-1], rtol=2e-6)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(num_steps, mu=1.15)
    found, _ = imported(write(tmp_path, num_steps, **FLUX))
    np.testing.assert_allclose(found.sigmas, np.asarray(scheduler.sigmas)[:-1], rtol=2e-6)
    kept = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod.double()
    levels = ((1 - kept) / kept).sqrt()
    found, _ = imported(write(tmp_path, num_steps, **SD15))
    np.testing.assert_allclose(found.sigmas[[0, -1]], levels[[-1, 0]], rtol=1e-4)
    times = torch.linspace(999, 0, num_steps, dtype=torch.float64)
    np.testing.assert_allclose(found.sigmas, np.interp(times, np.arange(1000), levels), rtol=1e-3)


def test_a_wrong_resolution_is_set_right_with_a_warning(tmp_path: Path) -> None:
    predictor, warnings = imported(write(tmp_path, **SD15))
    assert warnings == ["img_resolution 1024, corrected to 512, that of stable-diffusion-v1-5/stable-diffusion-v1-5"]
    assert predictor.provenance["corrections"] == warnings
    assert predictor.provenance["parameters"]["img_resolution"] == 512
    assert predictor.provenance["parameters"]["backend_config"] == {"resolution": 512}
    right: dict[str, Any] = SD15 | {"img_resolution": 512}
    assert imported(write(tmp_path, **right))[1] == []
    _, warnings = imported(write(tmp_path, **SD3, img_resolution=1024), backbone="sd3-512")
    assert [warning.split(",")[0] for warning in warnings] == ["img_resolution 1024", "made for 'sd3-1024'"]


def test_fcn_leaves_the_last_steps_directions_as_they_are(tmp_path: Path) -> None:
    values = parameters()
    found = arrays(table_of(imported(write(tmp_path, values=values, fcn=True))[0]))
    np.testing.assert_allclose(found[1], naive(values, 0.05, 0.05, fcn=True)[1], rtol=0, atol=1e-12)
    assert found[1][-1] == [1, 1]


@pytest.mark.parametrize("num_points", [1, 2, 3])
@pytest.mark.parametrize("student", ["epd", "ipndm"])
def test_sorting_keeps_the_sampler(student: str, num_points: int, tmp_path: Path, mixture: Gaussian, start: Tensor) -> None:
    file = write(tmp_path, 6, num_points, sampler_stu=student, scale_dir=0.3, scale_time=0.3)
    plain, ordered = (imported(file, sort=sort)[0] for sort in (False, True))
    assert ordered.provenance["sorted"] is True
    rows = [sorted(zip(*step, strict=True)) for step in zip(*arrays(table_of(plain)), strict=True)]
    assert rows == [list(zip(*step, strict=True)) for step in zip(*arrays(table_of(ordered)), strict=True)]
    if num_points > 1:
        assert arrays(table_of(ordered)) != arrays(table_of(plain))
    samples = [integrate(mixture.denoiser([]), p, 80 * start, p.sigmas) for p in (plain, ordered)]
    assert torch.allclose(*samples, rtol=1e-9)


def test_double_and_half_precision_are_read_exactly(tmp_path: Path) -> None:
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        values = parameters(dtype=dtype)
        found = arrays(table_of(imported(write(tmp_path, values=values))[0]))
        np.testing.assert_allclose(found[0], naive(values, 0.05, 0.05)[0], rtol=0, atol=1e-12)


WIDE: Any = {"x": 0}
for _ in range(60):
    WIDE = {"x": WIDE, "y": WIDE}

HOSTILE: list[tuple[dict[str, Any], str]] = [
    ({"scale_dir": {"x": 1}}, "scale_dir: dict; valid: a finite number"),
    ({"scale_time": [0.05]}, "scale_time: list; valid: a finite number"),
    ({"scale_time": PLACEHOLDER}, "scale_time: list; valid: a finite number"),
    ({"scale_time": WIDE}, "scale_time: dict; valid: a finite number"),
    ({"scale_dir": "0.05"}, "scale_dir: '0.05'; valid: a finite number"),
    ({"scale_dir": True}, "scale_dir: True; valid: a finite number"),
    ({"scale_dir": math.nan}, "scale_dir: float nan; valid: a finite number"),
    ({"scale_dir": -math.inf}, "scale_dir: float -inf; valid: a finite number"),
    ({"scale_dir": 10**400}, "scale_dir: int of 1329 bits; valid: a finite number"),
    ({"scale_dir": 1.5}, "scale_dir: 1.5; valid: at least 0, below 1"),
    ({"scale_time": 1e308}, "scale_time: 1e.308; valid: at least 0, below 1"),
    ({"scale_time": -0.05}, "scale_time: -0.05; valid: at least 0, below 1"),
    ({"guidance_type": "cfg", "guidance_rate": math.nan}, "guidance_rate: float nan"),
    ({"guidance_type": "cfg", "guidance_rate": -1.0}, "guidance_rate: -1.0; valid: 0 or more"),
    ({"guidance_type": "cfg", "guidance_rate": 10**400}, "guidance_rate: int of 1329 bits"),
    ({"guidance_type": "cfg", "guidance_rate": "7.5"}, "guidance_rate: '7.5'"),
    ({"guidance_type": {}}, "guidance_type: dict"),
    ({"img_resolution": WIDE}, "img_resolution: dict"),
    ({"img_resolution": "x"}, "img_resolution: 'x'"),
    ({"num_points": 3}, r"num_points: 3, and arrays of shape \(3, 2\); valid: 2"),
    ({"num_steps": 3}, r"num_steps: 3, and arrays of shape \(3, 2\); valid: 4"),
    ({"num_steps": 2**62}, r"num_steps: 4611686018427387904, and arrays"),
    ({"num_steps": 2**64}, r"num_steps: int of 65 bits"),
    ({"num_steps": "4"}, r"num_steps: '4', and arrays"),
    ({"afs": "False"}, "afs: 'False'; valid: true or false"),
    ({"afs": 1}, "afs: 1; valid: true or false"),
    ({"fcn": [0]}, "fcn: list"),
    ({"sampler_stu": "heun"}, "sampler_stu: 'heun'; valid: epd or ipndm"),
    ({"sampler_stu": ...}, "sampler_stu: None; valid: epd or ipndm"),
    ({"sampler_stu": "\x1b[2J"}, r"sampler_stu: '\\x1b\[2J'"),
    ({"sampler_stu": "x" * 10**6}, "sampler_stu: str 'x{100}'"),
    ({"sampler_stu": "ipndm", "max_order": 5}, "max_order: 5; valid: 1 to 4"),
    ({"sampler_stu": "ipndm", "max_order": 0}, "max_order: 0; valid: 1 to 4"),
    ({"sampler_stu": "ipndm", "max_order": 2.5}, "max_order: 2.5; valid: a whole number"),
    ({"sampler_stu": "ipndm", "max_order": 1e300}, "max_order: 1.*; valid: 1 to 4"),
    ({"sampler_stu": "ipndm", "max_order": None, "num_steps": 5}, "num_steps: 5"),
    ({"schedule_type": "cosine"}, "schedule_type: 'cosine'; valid: polynomial"),
    ({"schedule_type": "flowmatch"}, "sigma_max: 80.0; valid: at most 1"),
    ({"schedule_type": PLACEHOLDER}, "schedule_type: list"),
    ({"schedule_rho": 0.0}, "schedule_rho: 0.0; valid|rho: 0.0; valid"),
    ({"schedule_rho": -1.0}, "rho: -1.0; valid"),
    ({"schedule_rho": 1e-300}, ""),
    ({"schedule_type": "polynomial", "schedule_rho": 1e-300}, ""),
    ({"schedule_type": "polynomial", "schedule_rho": 1e300}, "valid"),
    ({"dataset_name": "imagenet256"}, "backbone: 'imagenet256'; valid: --backbone, one of cifar10"),
    ({"dataset_name": ...}, "backbone: None; valid: --backbone"),
    ({"dataset_name": 7}, "backbone: None; valid: --backbone"),
    ({"dataset_name": ["cifar10"]}, "dataset_name: list"),
    ({"dataset_name": "\x1b[2J"}, r"backbone: '\\x1b\[2J'"),
    ({"backend": "sd3", "dataset_name": "ms_coco", "img_resolution": 768}, "backbone: 'sd3-768'"),
    ({f"setting{number}": 0 for number in range(100)}, "[0-9]+ settings; valid: at most 100"),
]


@pytest.mark.parametrize(("settings", "message"), HOSTILE)
def test_settings_of_another_kind_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = write(tmp_path, values=parameters(), **settings)
    with pytest.raises(ValueError, match=f"(?s)^{file}: .*{message}") as caught:
        imported(file)
    assert len(str(caught.value)) < 3000
    assert str(caught.value).isprintable()


def replaced(**changes: Any) -> Any:
    values: dict[str, Any] = {**parameters(), **changes}
    return {name: value for name, value in values.items() if value is not None}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (replaced(r_params=None), r"r_params: missing; valid: \(N, K\) floats"),
        (replaced(weight_s="x"), "weight_s: missing"),
        (replaced(weight_s=torch.ones(3, 2, dtype=torch.int64)), r"weight_s: torch.int64, \(3, 2\); valid: \(N, K\) floats"),
        (replaced(r_params=torch.ones(6)), r"r_params: torch.float32, \(6,\)"),
        (replaced(r_params=torch.ones(1, 3, 2)), r"r_params: torch.float32, \(1, 3, 2\)"),
        (replaced(r_params=torch.ones(3, 3)), r"one shape, \(N, K\)"),
        (replaced(weight_s=torch.ones(3, 1)), r"one shape, \(N, K\)"),
        (replaced(**{name: torch.ones(4, 2) for name in PARAMETERS}), r"num_steps: 4, and arrays of shape \(4, 2\); valid: 5"),
        (replaced(**{name: torch.ones(0, 2) for name in PARAMETERS}), r"one shape, \(N, K\)"),
        (replaced(**{name: torch.ones(3, 0) for name in PARAMETERS}), r"one shape, \(N, K\)"),
        (replaced(**{name: torch.ones(3, 500) for name in PARAMETERS}), "at most 1000 numbers"),
        (replaced(r_params=torch.full((3, 2), math.nan)), "r: a number that is not finite"),
        (replaced(r_params=torch.full((3, 2), math.inf)), "r: .*; valid: numbers between 0 and 1"),
        (replaced(r_params=torch.full((3, 2), -1e4)), "r: .*; valid: numbers between 0 and 1"),
        (replaced(weight_s=torch.full((3, 2), math.inf)), "weight: a number that is not finite"),
        (replaced(weight_s=torch.tensor([[0, math.nan]] * 3)), "weight: a number that is not finite"),
        (replaced(scale_dir_params=torch.full((3, 2), math.nan)), "scale_dir: a number that is not finite"),
        (replaced(scale_time_params=torch.full((3, 2), math.nan)), "scale_time: a number that is not finite"),
        ([], "no module at model; valid: a pickled EPD_predictor"),
    ],
)
def test_parameters_that_are_no_table_are_refused(values: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.pkl"
    file.write_bytes(dumps({"model": model(values)}))
    with pytest.raises(ValueError, match=message):
        imported(file)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({}, "no module at model"),
        ({"ema": 0}, "no module at model"),
        ({"model": {"_parameters": parameters()}}, "no module at model"),
        ([], "no module; valid: a pickled EPD_predictor"),
        (7, "no module; valid"),
        (nn.Sigmoid(), "sampler_stu|r_params: missing"),
        (Persistent("EPD_predictor", {}), "no module; valid"),
    ],
)
def test_what_is_no_predictor_is_refused(contents: object, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.pkl"
    file.write_bytes(dumps(contents))
    with pytest.raises(ValueError, match=message):
        imported(file)


def test_a_model_alone_is_read_too(tmp_path: Path) -> None:
    file = write(tmp_path)
    expected = imported(file)[0].table
    file.write_bytes(dumps(model(parameters())))
    assert arrays(table_of(imported(file)[0])) == arrays(expected)  # type: ignore[arg-type]


def test_values_that_are_not_plain_do_not_reach_the_record(tmp_path: Path) -> None:
    extra = {"deep": PLACEHOLDER, "wide": WIDE, "huge": 10**4000, "nan": math.nan, "long": "x" * 10**6, "layer": nn.Softmax()}
    predictor, _ = imported(write(tmp_path, **extra, note="kept", config={"a": 1, "b": "c"}))
    kept = predictor.provenance["parameters"]
    assert not set(extra) & set(kept)
    assert (kept["note"], kept["config"]) == ("kept", {"a": 1, "b": "c"})
    assert len(json.dumps(predictor.provenance)) < 3000


def npz(folder: Path, **values: Any) -> Path:
    file = folder / "table.npz"
    given: dict[str, Any] = {"r": R, "weight": W, "dataset_name": "cifar10", "schedule_type": "time_uniform", **values}
    np.savez(file, allow_pickle=True, **{name: value for name, value in given.items() if value is not None})
    return file


R = np.array([[0.7, 0.2], [0.4, 0.6], [0.1, 0.9]])
W = np.array([[0.25, 0.75], [0.5, 0.5], [0.9, 0.1]])


@pytest.mark.parametrize("dtype", ["f4", "f8", ">f8"])
def test_a_table_of_arrays_is_read(dtype: str, tmp_path: Path) -> None:
    r, weight = R.astype(dtype), W.astype(dtype)
    file = npz(
        tmp_path, r=r, weight=weight, scale_dir=1.1 * r / r, afs=True, num_steps=4, guidance_rate=1.5, order=np.arange(3)
    )
    predictor, warnings = imported(file)
    table = table_of(predictor)
    np.testing.assert_array_equal(table.position, r.astype("f8"))
    np.testing.assert_allclose(table.weight, weight, atol=1e-3)
    np.testing.assert_allclose(table.weight.sum(-1), 1, rtol=1e-15)
    np.testing.assert_allclose(table.direction_scale, 1.1, rtol=1e-3)
    assert table.time_scale.tolist() == np.ones((3, 2)).tolist()
    np.testing.assert_allclose(predictor.sigmas, EDM_GRID(4), rtol=1e-9)
    assert (predictor.afs, predictor.guidance_scale, warnings, table.max_order) == (True, 1.5, [], 1)
    assert predictor.provenance["parameters"]["dataset_name"] == "cifar10"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": None}, r"no r among \['weight'\]; valid: r and weight, \(N, K\)|no r among"),
        ({"r": None, "weight": None}, "no r, weight among"),
        ({"weight": W / 2}, r"weight: sums \[0.5, 0.5, 0.5\]; valid: 1 for each step"),
        ({"weight": W * np.nan}, "weight: sums .*nan"),
        ({"weight": W[0]}, r"weight: shape \(2,\); valid: \(N, K\)"),
        ({"weight": W[None], "r": R[None]}, r"weight: shape \(1, 3, 2\); valid: \(N, K\)"),
        ({"weight": np.ones((2000, 1)), "r": R}, "weight: shape .*; valid: .* at most 1000 numbers"),
        ({"weight": np.float64(1)}, r"weight: shape \(\)"),
        ({"r": R[:2]}, r"one shape, \(N, K\)"),
        ({"r": R + 0.2}, "r: .*; valid: numbers between 0 and 1"),
        ({"r": -R}, "r: .*; valid: numbers between 0 and 1"),
        ({"r": R * np.nan}, "r: a number that is not finite"),
        ({"scale_time": 0 * R}, "scale_time: .*; valid: numbers between 0 and inf"),
        ({"scale_dir": R * np.inf}, "scale_dir: a number that is not finite"),
        ({"r": (10 * R).astype(int)}, "arrays of int64, float64; valid: floating-point numbers"),
        ({"r": R.astype(complex)}, "arrays of complex128, float64"),
        ({"r": np.array("x")}, "arrays of <U1, float64"),
        ({"r": np.array([{"x": 1}], dtype=object)}, "allow_pickle=False"),
        ({"extra": np.array({"x": 1}, dtype=object)}, "allow_pickle=False"),
        ({"afs": 2.5}, "afs: 2.5; valid: true or false"),
        ({"guidance_rate": np.nan}, "guidance_rate: float nan"),
        ({"guidance_rate": 1j}, "guidance_rate: complex; valid: a finite number"),
        ({"guidance_rate": np.datetime64("2025-01-01")}, "guidance_rate: date"),
        ({"num_steps": 5}, r"num_steps: 5, and arrays of shape \(3, 2\); valid: 4"),
        ({"dataset_name": None}, "backbone: None; valid: --backbone"),
        ({"dataset_name": "x" * 2000}, "dataset_name: str"),
    ],
)
def test_arrays_that_are_no_table_are_refused(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = npz(tmp_path, **values)
    with pytest.raises(ValueError, match=f"^{file}: .*{message}"):
        imported(file)


def test_arrays_of_other_kinds_that_nothing_reads_are_left_out(tmp_path: Path) -> None:
    extra = {"a": 1j, "b": np.datetime64("2025-01-01"), "c": np.bytes_(b"x"), "d": np.nan, "e": np.zeros((), "i4,f8")}
    predictor, _ = imported(npz(tmp_path, **extra, note="kept"))
    assert set(predictor.provenance["parameters"]) == {"dataset_name", "schedule_type", "note"}


def zipped(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return stream.getvalue()


def npy(shape: str, data: bytes = b"", descr: str = "'<f8'") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(200) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def encrypted(data: bytes) -> bytes:
    """The same archive, said to be encrypted."""
    return data.replace(b"PK\x03\x04\x14\0\0\0", b"PK\x03\x04\x14\0\1\0").replace(
        b"PK\1\2\x14\3\x14\0\0\0", b"PK\1\2\x14\3\x14\0\1\0"
    )


def unknown_method(data: bytes) -> bytes:
    return data.replace(b"PK\x03\x04\x14\0\0\0\0\0", b"PK\x03\x04\x14\0\0\0\x63\0").replace(
        b"PK\1\2\x14\3\x14\0\0\0\0\0", b"PK\1\2\x14\3\x14\0\0\0\x63\0"
    )


GOOD = {"r.npy": npy("(3, 2)", R.tobytes()), "weight.npy": npy("(3, 2)", W.tobytes())}
DEFLATED = zipped(GOOD, zipfile.ZIP_DEFLATED)

ARCHIVES: dict[str, tuple[bytes, str]] = {
    "a zip bomb": (zipped({"r.npy": bytes(10**8)}, zipfile.ZIP_DEFLATED), "100000000 bytes unpacked; valid: at most"),
    "many bombs": (zipped({f"{i}.npy": bytes(10**6) for i in range(20)}, zipfile.ZIP_DEFLATED), "20000000 bytes unpacked"),
    "only a signature": (b"PK\x03\x04", "not an archive of arrays"),
    "no zip": (b"PK" + bytes(1000), "not an archive of arrays"),
    "half": (zipped(GOOD)[:300], "not an archive of arrays"),
    "damaged deflate": (DEFLATED.replace(DEFLATED[60:90], bytes(30), 1), "not an archive of arrays"),
    "encrypted": (encrypted(zipped(GOOD)), "not an archive of arrays .*encrypted"),
    "an unknown compression": (unknown_method(zipped(GOOD)), "not an archive of arrays .*compression method"),
    "no arrays": (zipped({"r.npy": b"x", "weight.npy": b"y"}), "arrays of|not an archive"),
    "no entries": (zipped({}), "no r, weight among|not an archive"),
    "10^13 elements": (zipped(GOOD | {"r.npy": npy("(10000000000000,)")}), "not an archive of arrays"),
    "2^70 elements": (zipped(GOOD | {"r.npy": npy(f"({2**70},)")}), "not an archive of arrays"),
    "elements that overflow": (zipped(GOOD | {"r.npy": npy(f"({2**62}, 4)")}), "not an archive of arrays"),
    "negative elements": (zipped(GOOD | {"r.npy": npy("(-1, 2)")}), "not an archive of arrays"),
    "too few bytes": (zipped(GOOD | {"r.npy": npy("(3, 2)", bytes(8))}), "not an archive of arrays"),
    "an object array": (zipped(GOOD | {"r.npy": npy("(1,)", b"cos\nsystem\n(Vtrue\ntR.", "'|O'")}), "allow_pickle=False"),
    "an object in a structure": (zipped(GOOD | {"r.npy": npy("(1,)", bytes(8), "[('x', '|O')]")}), "allow_pickle=False"),
    "a pickle": (zipped(GOOD | {"r.npy": b"\x80\x04cos\nsystem\n(Vtrue\ntR."}), "arrays of|allow_pickle=False"),
    "code as header": (zipped(GOOD | {"r.npy": npy("__import__('os').system('true')")}), "not an archive of arrays"),
    "a deep header": (zipped(GOOD | {"r.npy": npy("-" * 9000 + "1")}), "not an archive of arrays"),
    "a header of brackets": (zipped(GOOD | {"r.npy": npy("(" * 9000)}), "not an archive of arrays"),
    "a huge header": (zipped(GOOD | {"r.npy": npy(" " * 20000 + "(3, 2)")}), "not an archive of arrays"),
    "a version of the future": (zipped(GOOD | {"r.npy": b"\x93NUMPY\x09\x00" + bytes(9)}), "not an archive of arrays"),
    "torch's file": (zipped({"archive/data.pkl": b"cos\nsystem\n(Vtrue\ntR.", "archive/version": b"3"}), "no r, weight among"),
}  # fmt: skip


@pytest.mark.parametrize("backbone", BACKBONES)
def test_two_arrays_are_enough_where_the_backbone_is_said(backbone: str, tmp_path: Path) -> None:
    """On the schedule, and with the guidance, of the backbone's published tables."""
    np.savez(tmp_path / "x.npz", r=R.astype(np.float16), weight=W.astype(np.float16))
    predictor, _ = imported(tmp_path / "x.npz", backbone=backbone)
    assert isinstance(predictor.table, EPDTable)
    assert torch.allclose(predictor.table.position, torch.from_numpy(R), atol=1e-3)
    assert torch.allclose(predictor.table.weight.sum(-1), torch.ones(len(W)).double())
    assert predictor.guidance_scale == BACKBONES[backbone].guidance_scale
    assert predictor.sigmas[0] == BACKBONES[backbone].sigmas[-1]


def test_arrays_say_which_student_they_are_of(tmp_path: Path) -> None:
    scale = np.full_like(R, 0.97)
    np.savez(tmp_path / "x.npz", r=R, weight=W, scale_dir=scale, sampler_stu="ipndm", max_order=3, fcn=True, afs=True)
    predictor, _ = imported(tmp_path / "x.npz", backbone="cifar10")
    assert isinstance(predictor.table, EPDTable)
    assert (predictor.table.max_order, predictor.afs) == (3, True)
    assert bool((predictor.table.direction_scale[-1] == 1).all())
    assert bool((predictor.table.direction_scale[:-1] == 0.97).all())


def test_where_a_schedule_s_shift_moves_the_lowest_level_it_is_told(tmp_path: Path) -> None:
    _, warnings = imported(write(tmp_path, **SD3, img_resolution=512, sigma_min=0.002994011976))
    assert warnings == ["sigma_min 0.00299401, before the schedule's shift: the grid ends at 0.00892857"]


@pytest.mark.parametrize("case", ARCHIVES)
def test_a_hostile_archive_is_refused(case: str, tmp_path: Path) -> None:
    data, message = ARCHIVES[case]
    file = tmp_path / "table.npz"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"(?s)^{file}: .*({message}).*; valid: "):
        imported(file)


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the command, in a process of its own."""
    command = [sys.executable, "-m", "stages.import_epd", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2])
    return done.returncode, done.stdout, done.stderr


def call(*arguments: object) -> tuple[int, str, str]:
    """The same in this process."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return done.exit_code, done.stdout, done.stderr


def test_the_command_writes_a_predictor(tmp_path: Path) -> None:
    file, out = write(tmp_path, 11, **SD15), tmp_path / "models" / "sd15"
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    code, output, errors = run(file, "--out", out, "--sort", "--sha256", sha256)
    assert code == 0, errors
    name = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert errors == f"warning: {file}: img_resolution 1024, corrected to 512, that of {name}\n"
    assert output == f"{out}: {name}, 10 steps of 2 points, 20 serial and 30 total evaluations, guidance scale 7.5\n"
    found, expected = load_predictor(out), imported(file, sort=True)[0]
    assert arrays(table_of(found)) == arrays(table_of(expected))
    assert found.sigmas.tolist() == expected.sigmas.tolist()
    assert (found.backbone, found.provenance) == (expected.backbone, expected.provenance)
    assert bool((table_of(found).position.diff() > 0).all())
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert call(file, "--out", out) == (1, "", f"import_epd: {out}: it exists; valid: a folder that does not\n")
    assert {path: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_imported_is_written_and_read(kind: str, tmp_path: Path) -> None:
    file, out = write(tmp_path, 5, **KINDS[kind][0]), tmp_path / "out"
    code, output, _ = call(file, "--out", out)
    assert code == 0
    assert output.startswith(f"{out}: {BACKBONES[KINDS[kind][1]].backbone.name}, 4 steps of 2 points, ")
    found, expected = load_predictor(out), imported(file)[0]
    assert arrays(table_of(found)) == arrays(table_of(expected))
    assert found.provenance == expected.provenance


@pytest.mark.parametrize(
    ("start", "damage", "arguments", "message"),
    [
        (run, lambda data: b"cos\nsystem\n(Vtouch canary\ntR.", [], "at byte 0, GLOBAL: 'os.system'; valid: "),
        (call, lambda data: data + b".", [], "1 bytes after the end of the pickle"),
        (call, lambda data: data, ["--sha256", "0" * 64], f"; valid: {'0' * 64}"),
        (call, lambda data: data, ["--backbone", "sd2"], "backbone: 'sd2'; valid: --backbone, one of cifar10"),
    ],
    ids=["a call", "bytes after the end", "another sha256", "an unknown backbone"],
)
def test_the_command_writes_nothing_of_what_it_refuses(
    start: Callable[..., tuple[int, str, str]],
    damage: Callable[[bytes], bytes],
    arguments: list[str],
    message: str,
    tmp_path: Path,
) -> None:
    file = write(tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    code, output, errors = start(file, "--out", tmp_path / "models" / "x", *arguments)
    assert (code, output) == (1, "")
    assert re.match(f"import_epd: {file}: .*({message})", errors)
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_is_too_large_or_missing_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.pkl"
    with pytest.raises(FileNotFoundError):
        imported(file)
    with file.open("wb") as stream:
        stream.truncate(10**12)
    with pytest.raises(ValueError, match=r"x\.pkl: 1000000000000 bytes; valid: at most 16777216"):
        imported(file)
