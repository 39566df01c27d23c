import hashlib
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from backends import Gaussian
from solvers import (
    AFS,
    AMED,
    EPD,
    SOLVERS,
    Backbone,
    EPDTable,
    Metric,
    Multistep,
    Predictor,
    integrate,
    load_predictor,
    polynomial,
    save_predictor,
)  # fmt: skip
from solvers.predictor import Difference


@pytest.fixture
def predictor() -> Predictor:
    table = EPD(4, 2, scale_dir=0.05, scale_time=0.05).table()
    return Predictor(
        table=EPDTable(
            table.position.detach(), table.weight.detach(), table.direction_scale.detach(), table.time_scale.detach()
        ),
        sigmas=polynomial(4, 0.002, 80.0),
        afs=True,
        backbone=Backbone("digits", "0" * 64, "none"),
        guidance_scale=1.5,
        provenance={"stage": "distill", "seed": 3},
        metrics=(Metric("RMSE to the teacher", 0.03142, 0.00081, 512, "validation noise"),),
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


def multistep() -> Predictor:
    student = Multistep(SOLVERS["ipndm_2"], polynomial(6, 0.002, 80.0), 2, 2, 0.2)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)).double()
    return Predictor(student.table(), student.sigmas(), False, Backbone("digits", "0" * 64, "none"), 1.0, {})


def amed() -> Predictor:
    torch.manual_seed(0)
    return Predictor(AMED(4, 4, 0.05, 0.1), polynomial(4, 0.002, 80.0), True, Backbone("digits", "0" * 64, "none"), 1.0, {})


@pytest.mark.parametrize("make", [multistep, amed])
def test_round_trip_of_every_family(make: Callable[[], Predictor], tmp_path: Path, mixture: Gaussian, start: Tensor) -> None:
    class WithFeature:
        def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
            return mixture.denoiser([])(x, sigma)

        def with_feature(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
            return self(x, sigma), x.flatten(1) / sigma[:, None]

    predictor = make()
    save_predictor(predictor, tmp_path)
    found = load_predictor(tmp_path)
    assert type(found.table) is type(predictor.table)
    with torch.no_grad():
        expected = integrate(WithFeature(), predictor, 80 * start, predictor.sigmas)
        assert torch.allclose(integrate(WithFeature(), found, 80 * start, found.sigmas), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "name", "change", "message"),
    [
        (multistep, "update", lambda c: c[:, :3].contiguous(), r"update: shape \(5, 3\); valid: \(5, W\) with W a multiple of"),
        (multistep, "stage", lambda c: c + 1, "stage: coefficients of the main point or of the step's own outputs; valid: 0"),
        (multistep, "update", lambda c: c[0].contiguous(), r"update: shape \(6,\); valid: \(5, W\)"),
        (
            multistep,
            "nodes",
            lambda s: torch.cat([s[:, :1], s[:, 1:] + 500], 1),
            "nodes: .*; valid: noise levels within",
        ),
        (multistep, "nodes", lambda s: -s, "nodes: .*; valid: positive numbers"),
        (multistep, "nodes", lambda s: 2 * s, "nodes: first points .*; valid: the record's sigmas but the last"),
        (multistep, "update", lambda c: None, "tensors .*; valid: .*update"),
        (amed, "heads.bias", lambda b: b[:2].contiguous(), r"heads.bias: shape \(2,\); valid: \(3,\)"),
        (amed, "heads.bias", lambda b: None, "tensors .*; valid: .*heads.bias"),
        (amed, "heads.bias", lambda b: b * torch.inf, "heads.bias: a number that is not finite"),
    ],
)
def test_a_damaged_folder_of_any_family_is_refused(
    make: Callable[[], Predictor], name: str, change: Callable[[Tensor], Tensor | None], message: str, tmp_path: Path
) -> None:
    save_predictor(make(), tmp_path)
    edit_tensor(name, change)(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_predictor(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": -1, "scale_dir": 0.0, "scale_time": 0.0}, "settings.features: -1; valid: 1 or more"),
        ({"features": 10**13, "scale_dir": 0.0, "scale_time": 0.0}, r"bottleneck.0.weight: shape \(128, 4\); valid: \(128, 10"),
        ({"features": 4, "scale_dir": float("nan"), "scale_time": 0.0}, "settings.scale_dir: nan; valid: at least 0, below 1"),
        ({"features": 4, "scale_dir": 0.0, "scale_time": 7.0}, "settings.scale_time: 7.0; valid: at least 0, below 1"),
    ],
)
def test_bad_settings_of_amed_are_refused_before_anything_is_built(
    settings: dict[str, object], message: str, tmp_path: Path
) -> None:
    save_predictor(amed(), tmp_path)
    edit_record(settings=settings)(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_predictor(tmp_path)


def test_what_could_not_be_read_is_not_written_silently(predictor: Predictor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"4 sigmas; valid: 5|5 sigmas; valid: 4"):
        save_predictor(replace(predictor, sigmas=polynomial(5, 0.002, 80.0)), tmp_path)


def test_the_same_predictor_gives_the_same_bytes(predictor: Predictor, folder: Path) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    save_predictor(predictor, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert set(before) == {"predictor.safetensors", "predictor.json", "README.md"}


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


def swap_bytes(folder: Path) -> None:
    """The numbers as a machine of the other byte order would have written them."""
    for name in ("position", "weight", "direction_scale", "time_scale"):
        edit_tensor(name, lambda t: torch.from_numpy(t.numpy().byteswap()))(folder)


def swap_tensors(folder: Path) -> None:
    """The tensors of another predictor of the same shape."""
    other = folder / "other"
    other.mkdir()
    predictor = load_predictor(folder)
    assert isinstance(predictor.table, EPDTable)
    save_predictor(replace(predictor, table=replace(predictor.table, position=predictor.table.position.flip(-1))), other)
    (folder / "predictor.safetensors").write_bytes((other / "predictor.safetensors").read_bytes())


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
        (edit_record(family="rnn"), "family 'rnn'; valid: epd, multistep, amed"),
        (edit_record(format_version="1"), "format_version '1'; valid: 1"),
        (edit_record(metrics=[{"name": "FID"}]), r"metrics.0: keys \['name'\]; valid: "),
        (edit_record(metrics=["FID 3"]), "metrics.0: str; valid: an object"),
        (
            edit_record(metrics=[{"name": "FID", "value": 3.0, "interval": float("nan"), "n": 9, "data": "test"}]),
            "metrics.0: .*; valid: finite numbers",
        ),
        (edit_record(backbone={"name": "d", "revision": 3, "licence": "", "pipeline": None}), "type str or NoneType"),
        (
            lambda folder: (folder / "predictor.json").write_text('{"afs": true, "afs": false}'),
            "predictor.json: not JSON .a key twice among afs, afs",
        ),
        (swap_bytes, "predictor.safetensors/.*: .*; valid: "),
        (lambda folder: (folder / "predictor.safetensors").write_bytes(b""), "sha256 e3b0c442.*; valid: "),
        (lambda folder: (folder / "predictor.json").write_bytes(b""), "predictor.json: not JSON"),
        (lambda folder: (folder / "predictor.json").write_bytes(b"\xff\xfe\x00"), "predictor.json: not JSON"),
        (lambda folder: (folder / "predictor.json").write_text("[" * 100_000), "predictor.json: not JSON"),
        (swap_tensors, "predictor.safetensors: sha256 .*; valid: .*, as its record says"),
        (edit_record(settings={}), r"settings: keys \[\]; valid: \['max_order'\]"),
        (edit_record(settings={"max_order": 7}), r"settings.max_order: 7; valid: 1 to 4"),
        (edit_record(settings={"max_order": True}), "max_order: True; valid: max_order of type int"),
        (edit_record(num_steps=10**400), "num_steps: a number beyond"),
        (edit_record(num_points=0), "num_points: 0; valid: 1 or more"),
        (edit_record(guidance_scale=-5.0), "guidance_scale: -5.0; valid: 0 or more, finite"),
        (edit_record(guidance_scale=float("nan")), "guidance_scale: nan; valid: 0 or more, finite"),
        (edit_record(backbone={}), r"backbone: keys \[\]; valid: .*'revision'"),
        (edit_record(sigmas=[80.0, 9.0, 1.0, 0.0]), "predictor.json: sigmas: .*; valid: positive noise levels"),
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


def test_a_predictor_is_used_for_what_it_was_made_for(folder: Path, mixture: Gaussian, start: Tensor) -> None:
    found = load_predictor(folder, backbone="digits", revision="0" * 64, guidance_scale=1.5, sigmas=polynomial(4, 0.002, 80.0))
    assert torch.equal(found.sigmas, polynomial(4, 0.002, 80.0))
    with pytest.raises(ValueError, match=r"sigmas: 5 nodes; valid: 4"):
        integrate(mixture.denoiser([]), found, 80 * start, polynomial(5, 0.002, 80.0))
    with pytest.raises(ValueError, match=r"sigmas: \[80.0, .*; valid: the grid that the table was made for"):
        integrate(mixture.denoiser([]), found, 80 * start, polynomial(4, 0.002, 80.0, rho=5))


@pytest.mark.parametrize(
    ("difference", "use", "message"),
    [
        ("backbone", {"backbone": "faces"}, "backbone: faces; valid: digits, which the predictor was made for"),
        ("backbone", {"revision": "1" * 64}, "backbone: 1{64}; valid: 0{64}, "),
        ("guidance_scale", {"guidance_scale": 7.5}, "guidance_scale: 7.5; valid: 1.5, "),
        ("sigmas", {"sigmas": polynomial(4, 0.01, 50.0)}, "sigmas: .*; valid: the grid "),
    ],
)
def test_another_use_is_refused_unless_it_is_named(
    difference: Difference, use: dict[str, Any], message: str, folder: Path
) -> None:
    others: tuple[Difference, ...] = get_args(Difference)
    most: list[Difference] = [other for other in others if other != difference]
    for allow in ([], most):
        with pytest.raises(ValueError, match=rf'{message}.*allow=\["{difference}"\]'):
            load_predictor(folder, **use, allow=allow)
    found = load_predictor(folder, **use, allow=[difference])
    assert torch.equal(found.sigmas, use.get("sigmas", polynomial(4, 0.002, 80.0)))


def test_an_unknown_exception_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"allow: \['all'\]; valid: backbone, guidance_scale, sigmas"):
        load_predictor(folder, allow=["all"])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        (polynomial(5, 0.002, 80.0), "5 nodes; valid: 4"),
        (polynomial(4, 0.002, 80.0).flip(0), "strictly decreasing"),
        (polynomial(4, 0.002, 80.0) * torch.nan, "strictly decreasing"),
    ],
)
def test_no_exception_makes_what_is_no_such_grid_fit(sigmas: Tensor, message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_predictor(folder, sigmas=sigmas, allow=["sigmas"])


def test_the_card_says_what_it_costs_and_how_well_it_does(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert "| RMSE to the teacher | 0.03142 ± 0.00081 | 512 | validation noise | 5 | 8 |" in card
    assert "| licence of the backbone | none |" in card
    assert "EPD-Solver" in card
    assert '"stage": "distill"' in card
    assert f'load_predictor("{folder.name}")' in card


@pytest.mark.parametrize("make", [multistep, amed])
def test_cards_of_every_family(make: Callable[[], Predictor], tmp_path: Path) -> None:
    save_predictor(make(), tmp_path, "name")
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("# name\n")
    assert "None were measured with this file." in card
    assert "| serial evaluations | 5 |" in card


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
