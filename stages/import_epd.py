"""A published EPD file as a predictor, with nothing of it executed: python -m stages.import_epd FILE --out DIR."""

import hashlib
import io
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from solvers import (
    Backbone,
    EPDTable,
    Predictor,
    discrete,
    dynamic_shift,
    flowmatch,
    logsnr,
    polynomial,
    save_predictor,
    time_uniform,
)
from solvers.epd import check_scales, within
from stages.files import atomic
from unpickle import LARGEST_FILE, Inert, RefusedError, described, read_pickle

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Published:
    """What a published file's backbone is, of which the file itself says little, or something wrong.

    Attributes:
        backbone: the frozen model.
        resolution: of its images.
        sigmas: noise levels that the backbone was trained for, increasing: all of them, or both ends.
        guidance_scale: that the published tables were made with.
        schedule: that they were made on, and its shift for a flow model.
    """

    backbone: Backbone
    resolution: int
    sigmas: Tensor
    guidance_scale: float = 1.0
    schedule: str = "time_uniform"
    shift: float = 1.0


def variance_preserving(first: float, last: float) -> Tensor:
    """The noise levels of 1,000 steps with betas whose square roots are evenly spaced, as latent diffusion has them."""
    betas = torch.linspace(math.sqrt(first), math.sqrt(last), 1000, dtype=torch.float64).square()
    kept = (1 - betas).cumprod(0)
    return ((1 - kept) / kept).sqrt()


def flow(shift: float) -> Tensor:
    """Both ends of diffusers' flow-matching grid: its lowest level is s = 0.001, shifted."""
    return torch.tensor([shift * 0.001 / (1 + (shift - 1) * 0.001), 1.0], dtype=torch.float64)


def edm(name: str, resolution: int) -> Published:
    """A model of Karras et al. 2022."""
    ends = torch.tensor([0.002, 80.0], dtype=torch.float64)
    return Published(Backbone(name, None, "CC BY-NC-SA 4.0"), resolution, ends)


def sd3(resolution: int) -> Published:
    """Stable Diffusion 3 Medium. Its scheduler shifts the lowest level once when it is made, and again with the whole grid."""
    backbone = Backbone(
        "stabilityai/stable-diffusion-3-medium-diffusers", None, "Stability AI Community License", "StableDiffusion3Pipeline"
    )
    once = flow(3.0)
    return Published(backbone, resolution, 3 * once / (1 + 2 * once), guidance_scale=4.5, schedule="flowmatch", shift=3.0)


SHIFT_AT_1024 = dynamic_shift(64 * 64)

BACKBONES = {
    "cifar10": edm("edm-cifar10-32x32-uncond-vp", 32),
    "ffhq": edm("edm-ffhq-64x64-uncond-vp", 64),
    "afhqv2": edm("edm-afhqv2-64x64-uncond-vp", 64),
    "imagenet64": edm("edm-imagenet-64x64-cond-adm", 64),
    "lsun_bedroom_ldm": Published(
        Backbone("latent-diffusion/lsun_bedrooms", None, "MIT"), 256, variance_preserving(0.0015, 0.0195)
    ),
    "sd15": Published(
        Backbone("stable-diffusion-v1-5/stable-diffusion-v1-5", None, "CreativeML OpenRAIL-M", "StableDiffusionPipeline"),
        512,
        variance_preserving(0.00085, 0.012),
        guidance_scale=7.5,
        schedule="discrete",
    ),
    "sd3-512": sd3(512),
    "sd3-1024": sd3(1024),
    "flux": Published(
        Backbone("black-forest-labs/FLUX.1-dev", None, "FLUX.1 [dev] Non-Commercial License", "FluxPipeline"),
        1024,
        flow(SHIFT_AT_1024),
        guidance_scale=3.5,
        schedule="flowmatch",
        shift=SHIFT_AT_1024,
    ),
}


@app.command()
def import_epd(
    file: Annotated[Path, typer.Argument(help="a published .pkl, or an .npz of r, weight, scale_dir, scale_time")],
    out: Annotated[Path, typer.Option(help="the predictor's folder, which must not exist yet")],
    sort: Annotated[bool, typer.Option("--sort", help="sort the points within each step, as RDPO needs them")] = False,
    sha256: Annotated[str | None, typer.Option(help="of the file, if it is to be that very one")] = None,
    backbone: Annotated[str | None, typer.Option(help=f"where the file does not say: {', '.join(BACKBONES)}")] = None,
) -> None:
    """Write a published EPD table as a predictor."""
    try:
        if out.exists():
            raise ValueError(f"{out}: it exists; valid: a folder that does not")
        predictor, warnings = imported(file, sort, sha256, backbone)
        for warning in warnings:
            typer.echo(f"warning: {file}: {warning}", err=True)
        with atomic(out) as folder:
            folder.mkdir()
            save_predictor(predictor, folder, out.name)
    except (ValueError, OSError) as error:
        typer.echo(f"import_epd: {error}", err=True)
        raise typer.Exit(1) from None
    cost = f"{predictor.serial_evaluations} serial and {predictor.total_evaluations} total evaluations"
    steps = f"{predictor.table.num_steps - 1} steps of {predictor.table.num_points} points"
    typer.echo(f"{out}: {predictor.backbone.name}, {steps}, {cost}, guidance scale {predictor.guidance_scale:g}")


def imported(
    file: Path, sort: bool = False, sha256: str | None = None, backbone: str | None = None
) -> tuple[Predictor, list[str]]:
    """The predictor of a published file, and what of its metadata was wrong.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a published file, or not that one; with the file, what was found and what would be valid.
    """
    if file.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{file}: {file.stat().st_size} bytes; valid: at most {LARGEST_FILE}")
    data = file.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if sha256 not in (None, found):
        raise ValueError(f"{file}: sha256 {found}; valid: {sha256}")
    try:
        table, settings = from_npz(data) if data.startswith(b"PK") else from_pickle(data)
        named = recognised(settings)
        key = backbone or named
        if key not in BACKBONES:
            raise ValueError(f"backbone: {key!a}; valid: --backbone, one of {', '.join(BACKBONES)}")
        published = BACKBONES[key]
        sigmas = grid(settings, table.num_steps, published)
        corrections = corrected(settings, published, sigmas[-1].item())
        if named not in (None, key):
            corrections.append(f"made for {named!a}, taken for {key} as asked")
        afs, scale = flag(settings, "afs"), guidance(settings, published)
    except (RefusedError, ValueError, OverflowError) as error:
        raise ValueError(f"{file}: {error}") from None
    provenance = {
        "stage": "import_epd",
        "file": file.name,
        "sha256": found,
        "parameters": settings,
        "corrections": corrections,
        "sorted": sort,
    }
    table = table.sorted() if sort else table
    return Predictor(table, sigmas, afs, published.backbone, scale, provenance), corrections


def from_pickle(data: bytes) -> tuple[EPDTable, dict[str, Any]]:
    """The table of a pickled EPD_predictor and its plain attributes; formulas of Zhu et al. 2025, section 3."""
    contents = read_pickle(data)
    model = contents.get("model") if isinstance(contents, dict) else contents
    if not isinstance(model, Inert) or not isinstance(model.state.get("_parameters"), dict):
        raise ValueError(f"no module{' at model' if isinstance(contents, dict) else ''}; valid: a pickled EPD_predictor")
    state = model.state
    if others := sorted(map(str, set(state["_parameters"]) - set(PARAMETERS))):
        raise ValueError(f"parameters {', '.join(others)[:200]!a}; valid: {', '.join(PARAMETERS)} alone")
    r, o, a, w = (parameter(state["_parameters"], name) for name in PARAMETERS)
    settings = plain_ones({key: value for key, value in state.items() if not key.startswith("_") and key != "training"})
    scale_dir, scale_time = (number(settings, name, 0.0) for name in ("scale_dir", "scale_time"))
    check_scales(scale_dir=scale_dir, scale_time=scale_time)
    direction, time = within(scale_dir, o), within(scale_time, a)
    return made(r.sigmoid(), w.softmax(-1), direction, time, settings), settings


MOST_NUMBERS = 1000
"""In each array of a table: N times K. A published one has 20."""

PARAMETERS = ("r_params", "scale_dir_params", "scale_time_params", "weight_s")


def from_npz(data: bytes) -> tuple[EPDTable, dict[str, Any]]:
    """The table of an .npz with r, weight (N, K) and possibly scale_dir, scale_time (N, K), and its scalars."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if (size := sum(entry.file_size for entry in archive.infolist())) > LARGEST_FILE:
                raise ValueError(f"{size} bytes unpacked; valid: at most {LARGEST_FILE}")
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            found = {name: np.asarray(arrays[name]) for name in arrays.files}
    except Exception as error:  # whatever numpy and zipfile make of damaged bytes, none of which they execute
        raise ValueError(f"not an archive of arrays ({str(error)[:200]}); valid: an undamaged .npz") from None
    missing = {"r", "weight"} - set(found)
    if missing:
        raise ValueError(f"no {', '.join(sorted(missing))} among {sorted(found)}; valid: r and weight, (N, K)")
    tables = {name: found.pop(name) for name in ("r", "weight", "scale_dir", "scale_time") if name in found}
    settings = plain_ones({name: value.item() for name, value in found.items() if value.ndim == 0})
    tensors = {name: torch.from_numpy(value.astype(np.float64)) for name, value in tables.items() if value.dtype.kind == "f"}
    if set(tensors) != set(tables):
        raise ValueError(f"arrays of {', '.join(str(value.dtype) for value in tables.values())}; valid: floating-point numbers")
    r, weight = tensors["r"], tensors["weight"]
    if weight.ndim != 2 or weight.numel() > MOST_NUMBERS:
        raise ValueError(f"weight: shape {tuple(weight.shape)}; valid: (N, K), at most {MOST_NUMBERS} numbers")
    total = weight.sum(-1, keepdim=True)
    rounding = 1e-4 if tables["weight"].dtype.itemsize > 2 else 1e-2
    if not torch.allclose(total, torch.ones_like(total), rtol=0, atol=rounding):
        raise ValueError(f"weight: sums {total.flatten().tolist()}; valid: 1 for each step")
    direction, time = (tensors.get(name, torch.ones_like(r)) for name in ("scale_dir", "scale_time"))
    return made(r, weight / total, direction, time, {"sampler_stu": "epd", **settings}), settings


def made(r: Tensor, w: Tensor, o: Tensor, a: Tensor, settings: dict[str, Any]) -> EPDTable:
    """The table of a student, checked against the numbers of steps and points that the file says it has."""
    for name, value, high in (("r", r, 1.0), ("weight", w, None), ("scale_dir", o, math.inf), ("scale_time", a, math.inf)):
        if value.numel() > MOST_NUMBERS or value.ndim != 2:
            raise ValueError(f"{name}: shape {tuple(value.shape)}; valid: (N, K), at most {MOST_NUMBERS} numbers")
        if not bool(value.isfinite().all()):
            raise ValueError(f"{name}: a number that is not finite; valid: finite numbers")
        if high is not None and not bool(((value > 0) & (value < high)).all()):
            raise ValueError(f"{name}: {value.tolist()}; valid: numbers between 0 and {high:g}")
    if flag(settings, "fcn"):
        o = torch.cat([o[:-1], torch.ones_like(o[-1:])])
    table = EPDTable(r, w, o, a, order_of(settings))
    for name, found in (("num_steps", table.num_steps), ("num_points", table.num_points)):
        if settings.get(name, found) != found:
            raise ValueError(f"{name}: {settings[name]!a}, and arrays of shape {tuple(r.shape)}; valid: {found}")
    return table


def order_of(settings: dict[str, Any]) -> int:
    """How many directions the student looks back on, its own included: 1 for EPD-Solver."""
    match settings.get("sampler_stu"):
        case "epd":
            return 1
        case "ipndm":
            order = number(settings, "max_order", 4)
            if order != int(order):
                raise ValueError(f"max_order: {order}; valid: a whole number")
            return int(order)
        case other:
            raise ValueError(f"sampler_stu: {other!a}; valid: epd or ipndm")


def parameter(parameters: dict[str, Any], name: str) -> Tensor:
    """A parameter in double precision, (N, K)."""
    value = parameters.get(name)
    if not isinstance(value, Tensor) or value.ndim != 2 or not value.is_floating_point():
        found = f"{value.dtype}, {tuple(value.shape)}" if isinstance(value, Tensor) else "missing"
        raise ValueError(f"{name}: {found}; valid: (N, K) floats")
    return value.double()


def recognised(settings: dict[str, Any]) -> str | None:
    """The key in BACKBONES that the file's metadata name; None where they name none."""
    match settings:
        case {"dataset_name": "ms_coco" | None, "backend": "sd3"}:
            return f"sd3-{number(settings, 'img_resolution', 1024):g}"
        case {"backend": "flux"}:
            return "flux"
        case {"dataset_name": "ms_coco"}:
            return "sd15"
        case {"dataset_name": str(name)}:
            return name
    return None


def grid(settings: dict[str, Any], num_steps: int, published: Published) -> Tensor:
    """The noise levels that the table was learned on, (num_steps,)."""
    low, high = published.sigmas[0].item(), published.sigmas[-1].item()
    rho = number(settings, "schedule_rho", 1.0)
    match settings.get("schedule_type") or published.schedule:
        case "polynomial":
            return polynomial(num_steps, low, high, rho)
        case "logsnr":
            return logsnr(num_steps, low, high)
        case "time_uniform":
            return time_uniform(num_steps, low, high, rho)
        case "discrete":
            return discrete(num_steps, low, high, published.sigmas, rho)
        case "flowmatch":
            return flowmatch(num_steps, low, high, published.shift)
        case other:
            raise ValueError(f"schedule_type: {other!a}; valid: polynomial, logsnr, time_uniform, discrete, flowmatch")


def corrected(settings: dict[str, Any], published: Published, last: float) -> list[str]:
    """Set the settings right where they are known to be wrong, and say what was, or is otherwise than it seems."""
    found, config = number(settings, "img_resolution", published.resolution), settings.get("backend_config")
    if published.backbone.pipeline is None:
        return []
    config = config if isinstance(config, dict) else {}
    notes = []
    if found != published.resolution:
        settings["img_resolution"] = published.resolution
        if "resolution" in config:
            settings["backend_config"] = {**config, "resolution": published.resolution}
        notes.append(f"img_resolution {found:g}, corrected to {published.resolution}, that of {published.backbone.name}")
    lowest = number({**config, **{k: v for k, v in settings.items() if v is not None}}, "sigma_min", last)
    if abs(lowest - last) > 1e-3 * last:
        notes.append(f"sigma_min {lowest:.6g}, before the schedule's shift: the grid ends at {last:.6g}")
    return notes


def guidance(settings: dict[str, Any], published: Published) -> float:
    """Guidance scale of the file; 1 where it has none."""
    if settings.get("guidance_type", "") is None:
        return 1.0
    scale = number(settings, "guidance_rate", published.guidance_scale)
    if scale < 0:
        raise ValueError(f"guidance_rate: {scale}; valid: 0 or more")
    return scale


def number(settings: dict[str, Any], name: str, default: float) -> float:
    """A setting that is a number; the default where there is none."""
    value = settings.get(name)
    if value is None:
        return float(default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: {value!a}; valid: a finite number")
    return float(value)


def flag(settings: dict[str, Any], name: str) -> bool:
    """A setting that is true or false; false where there is none."""
    value = settings.get(name)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"{name}: {value!a}; valid: true or false")
    return bool(value)


READ = {
    *("dataset_name", "backend", "img_resolution", "num_steps", "num_points", "sampler_stu", "max_order", "scale_dir"),
    *("scale_time", "fcn", "afs", "schedule_type", "schedule_rho", "guidance_type", "guidance_rate"),
}
"""Settings that decide what a file's numbers mean."""


def plain_ones(settings: dict[str, Any]) -> dict[str, Any]:
    """Those settings that are small values of JSON, or flat dictionaries of such; the others are not read."""
    if len(settings) > 100:
        raise ValueError(f"{len(settings)} settings; valid: at most 100")
    kept = {name: value for name, value in settings.items() if plain(value) or flat(value)}
    for name in sorted(READ & set(settings)):
        if not plain(settings[name]):
            raise ValueError(f"{name}: {described(settings[name])}; valid: a finite number, a short string, true or false")
    return kept


def flat(value: Any) -> bool:
    """Whether a value is a small dictionary of plain ones: a nested one may be endless."""
    return isinstance(value, dict) and len(value) <= 100 and all(plain(item) for item in value.values())


def plain(value: Any) -> bool:
    """Whether a value is what JSON holds, and small."""
    match value:
        case int():
            return abs(value) < 2**63
        case float():
            return math.isfinite(value)
        case str():
            return len(value) <= 1000
    return value is None


if __name__ == "__main__":
    app()
