import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from backends import Gaussian
from solvers import AFS, EPD, EPDTable, Predictor, integrate, load_predictor, polynomial, save_predictor


@pytest.fixture
def predictor() -> Predictor:
    table = EPD(4, 2, scale_dir=0.05, scale_time=0.05).table()
    return Predictor(
        table=EPDTable(
            table.position.detach(), table.weight.detach(), table.direction_scale.detach(), table.time_scale.detach()
        ),
        sigmas=polynomial(4, 0.002, 80.0),
        afs=True,
        backbone={"name": "digits", "sha256": "0" * 64},
        guidance_scale=1.5,
        provenance={"stage": "distill", "seed": 3},
    )


@pytest.fixture
def folder(predictor: Predictor, tmp_path: Path) -> Path:
    save_predictor(predictor, tmp_path)
    return tmp_path


def test_round_trip(predictor: Predictor, folder: Path, mixture: Gaussian, start: Tensor) -> None:
    found = load_predictor(folder)
    assert torch.equal(found.sigmas, predictor.sigmas)
    assert (found.afs, found.backbone, found.guidance_scale) == (True, predictor.backbone, 1.5)
    assert found.provenance == predictor.provenance
    expected = integrate(mixture.denoiser([]), AFS(predictor.table), 80 * start, predictor.sigmas)
    assert torch.equal(integrate(mixture.denoiser([]), found, 80 * start, found.sigmas), expected)


def test_the_same_predictor_gives_the_same_bytes(predictor: Predictor, folder: Path) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    save_predictor(predictor, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert set(before) == {"predictor.safetensors", "predictor.json"}


def edit_record(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "predictor.json"
        record = json.loads(file.read_text()) | changes
        file.write_text(json.dumps({key: value for key, value in record.items() if value is not None}))

    return edit


def edit_tensor(name: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[Path], None]:
    """Change a tensor, and the record's hash with it: the contents themselves must be refused."""

    def edit(folder: Path) -> None:
        file = folder / "predictor.safetensors"
        tensors = load_file(file)
        changed = change(tensors.pop(name))
        save_file(tensors if changed is None else {**tensors, name: changed}, file)
        edit_record(sha256=hashlib.sha256(file.read_bytes()).hexdigest())(folder)

    return edit


def tamper(folder: Path) -> None:
    file = folder / "predictor.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (tamper, "predictor.safetensors: sha256 .*; valid: .*, as its record says"),
        (edit_tensor("weight", lambda w: 2 * w), r"weight: sums .*; valid: 1 for each interval"),
        (edit_tensor("weight", lambda w: w * torch.nan), "weight: a number that is not finite"),
        (edit_tensor("position", lambda r: r + 1), r"position: .*; valid: numbers between 0 and 1"),
        (edit_tensor("position", lambda r: r[:, :1].contiguous()), r"position: shape \(3, 1\); valid: \(3, 2\)"),
        (edit_tensor("position", lambda r: r.float()), "position: torch.float32; valid: torch.float64"),
        (edit_tensor("time_scale", lambda a: None), "tensors .*; valid: .*time_scale"),
        (edit_record(format_version=2), "format_version 2; valid: 1"),
        (edit_record(family="amed"), "family 'amed'; valid: 'epd'"),
        (edit_record(num_steps="4"), "num_steps: '4'; valid: num_steps of type int"),
        (edit_record(afs=None), "keys .*; valid: .*afs"),
        (edit_record(surprise=1), "keys .*surprise"),
        (edit_record(sigmas=[80.0, 9.0, 10.0, 0.1]), "strictly decreasing"),
        (edit_record(sigmas=[80.0, 0.1]), "2 sigmas; valid: 4"),
        (edit_record(sigmas=[80.0, None, 1.0, 0.1]), "a list of floating-point numbers"),
        (edit_tensor("time_scale", lambda a: -a), "time_scale: .*; valid: positive numbers"),
        (lambda folder: (folder / "predictor.json").write_text("{"), "predictor.json: not JSON"),
        (lambda folder: (folder / "predictor.json").write_text("[]"), "predictor.json: list; valid: an object"),
    ],
)
def test_a_damaged_folder_is_refused(damage: Callable[[Path], None], message: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load_predictor(folder)


def test_a_pickle_is_never_executed(folder: Path, tmp_path: Path) -> None:
    class Canary:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "canary",)

    data = pickle.dumps(Canary())
    (folder / "predictor.safetensors").write_bytes(data)
    edit_record(sha256=hashlib.sha256(data).hexdigest())(folder)
    with pytest.raises(ValueError, match="a safetensors file"):
        load_predictor(folder)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("name", ["predictor.json", "predictor.safetensors"])
def test_a_missing_file_is_named(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_predictor(folder)
