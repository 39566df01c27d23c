"""Images of given prompts by a predictor, on the digits and on a tiny pipeline."""

import json
import os
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner, Result

with warnings.catch_warnings():  # of diffusers' and transformers' own imports
    warnings.simplefilter("ignore")
    from tiny import TINY, saved
    from tiny_clip import saved_clip
    from tiny_hps import saved_hps

from backends.pipeline import Texts
from metrics.accuracy import Accuracy
from metrics.log_probability import LogProbability
from solvers import EPD, Predictor, flowmatch, load_predictor, save_predictor
from solvers.predictor import FILES
from stages import weights
from stages.files import StageError, TemporaryError
from stages.frozen import Record, load_decoder
from stages.generate import app
from stages.params import load_params
from stages.prompts import Prompts
from stages.sampling import Run
from stages.scorers import load_scorers
from stages.sheet import MAGNIFIED, WIDTH, Sheet

from .conftest import run, small
from .test_text_to_image import params_of, write

DIGITS, OUT = "0123456789", Path("pictures")


@pytest.fixture(autouse=True)
def as_before(tmp_path: Path) -> Iterator[None]:
    """This process' own handler again, and nothing left beside the folder."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith(f".{OUT}")]


@pytest.fixture
def here(upstream: Path) -> Path:
    """A copy of the finished pipeline of digits, with a file of the prompts that its samples have."""
    (upstream / "prompts.txt").write_text("\n".join(DIGITS))
    return upstream


def started(*more: str, folder: str = "models/rdpo", prompts: str = "prompts.txt") -> Result:
    """How the command ends, in this process."""
    return CliRunner().invoke(app, [folder, "--prompts", prompts, "--out", str(OUT), *more], catch_exceptions=False)


def generate(*more: str, **given: str) -> dict[str, Any]:
    """The record of a run that goes well."""
    done = started(*more, **given)
    assert done.exit_code == 0, done.stderr

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads((OUT / "images.json").read_text(), parse_constant=refuse)


def refused(*more: str, status: int = 1, **given: str) -> str:
    """What a run says that does not go well."""
    done = started(*more, **given)
    assert done.exit_code == status, done.output
    line = done.stderr.splitlines()[-1]
    assert line.startswith("generate: ")
    return line.removeprefix("generate: ")


def pixels(record: dict[str, Any]) -> Tensor:
    """All images as they are in their files, (n, 8, 8)."""
    images = [Image.open(OUT / each["file"]) for each in record["images"]]
    assert {(image.mode, image.size, image.format) for image in images} == {("L", (8, 8), "PNG")}
    return torch.stack([torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(8, 8) for image in images])


def states_of(record: dict[str, Any]) -> Tensor:
    """What stage sample made of the same samples."""
    found = load_file("data/samples/rdpo.safetensors")
    assert found["samples"].tolist() == list(range(100))
    return found["states"][[each["sample"] for each in record["images"]]]


def test_images_are_those_of_stage_sample(here: Path) -> None:
    record = generate("--images", "3")
    assert [each["file"] for each in record["images"]] == [f"{index:04d}.png" for index in range(30)]
    assert "".join(each["prompt"] for each in record["images"]) == "".join(3 * digit for digit in DIGITS)
    assert [each["sample"] for each in record["images"]][:4] == [0, 10, 20, 1]
    levels = ((states_of(record) + 1) / 2).clamp(0, 1).float() * 255
    assert torch.equal(pixels(record), levels.round().to(torch.uint8)[:, 0])
    names = [each["file"] for each in record["images"]]
    assert sorted(file.name for file in OUT.iterdir()) == sorted([*names, "grid.png", "images.json"])


def test_the_record_says_what_made_the_images_and_what_they_cost(here: Path) -> None:
    record, made_by = generate(), json.loads(Path("models/rdpo/predictor.json").read_text())
    assert record["predictor"] == {"folder": "models/rdpo", "sha256": made_by["sha256"]}
    assert record["backbone"] == made_by["backbone"]
    expected = {"guidance_scale": 1.0, "negative": "", "seed": 0, "n": 10, "serial_evaluations": 5, "total_evaluations": 8}
    assert {name: record[name] for name in expected} == expected
    assert 0 < record["seconds"] < 60


def test_scores_are_the_metrics_own(here: Path) -> None:
    record = generate("--images", "3")
    images = ((states_of(record) + 1) / 2).clamp(0, 1)
    metrics = {"log_probability": LogProbability(Path("models/backbone/reward.safetensors"))}
    metrics |= {"accuracy": Accuracy(Path("models/backbone/judge.safetensors"))}
    assert [each["name"] for each in record["metrics"]] == list(metrics)
    for each in record["metrics"]:
        values = metrics[each["name"]](images, [image["prompt"] for image in record["images"]])
        assert [image["scores"][each["name"]] for image in record["images"]] == pytest.approx(values.tolist(), abs=1e-9)
        assert each["mean"] == pytest.approx(values.mean().item())
        assert each["se"] == pytest.approx((values.var() / 30).sqrt().item())
    assert all(image["scores"].keys() == metrics.keys() for image in record["images"])


def test_no_statistics_of_references_are_needed(here: Path) -> None:
    for name in ("data", "results", "models/distilled"):
        shutil.rmtree(name)
    assert generate()["n"] == 10


def test_one_image_has_no_standard_error(here: Path) -> None:
    Path("prompts.txt").write_text("7")
    record = generate()
    assert [each["se"] for each in record["metrics"]] == [None, None]
    assert record["metrics"][0]["mean"] == record["images"][0]["scores"]["log_probability"]


@pytest.mark.parametrize("batch_size", [1, 7])
def test_nothing_depends_on_the_batch_size(batch_size: int, here: Path) -> None:
    def made() -> tuple[dict[str, bytes], dict[str, Any]]:
        record = generate("--images", "2")
        return {file.name: file.read_bytes() for file in OUT.glob("*.png")}, {**record, "seconds": None}

    before, params = made(), small()
    params["sample"]["batch_size"] = batch_size
    write(params)
    assert made() == before


def test_more_images_leave_the_first_ones(here: Path) -> None:
    few, many = (generate("--images", images) for images in ("1", "3"))
    one, three = (sorted(each["images"], key=lambda image: image["sample"]) for each in (few, many))
    kept = [{**image, "file": ""} for image in one]
    for found, expected in zip([{**image, "file": ""} for image in three[:10]], kept, strict=True):
        assert found["scores"].pop("log_probability") == pytest.approx(expected["scores"].pop("log_probability"))
        assert found == expected


def test_the_seed_is_that_of_params_or_given(here: Path) -> None:
    params = small()
    first = pixels(generate())
    assert torch.equal(pixels(generate("--seed", "0")), first)
    given = generate("--seed", "3")
    assert given["seed"] == 3
    assert not torch.equal(pixels(given), first)
    write({**params, "seed": 3})
    assert torch.equal(pixels(generate()), pixels(given))


def test_prompts_are_read_in_any_form(here: Path) -> None:
    Path("prompts.json").write_text('{"even": ["2", "0"], "odd": ["1", "2"]}')
    assert [each["prompt"] for each in generate(prompts="prompts.json")["images"]] == ["2", "0", "1"]


# --- the folder


def test_what_it_wrote_is_replaced(here: Path) -> None:
    generate("--images", "2")
    record = generate()
    assert len(list(OUT.iterdir())) == 12
    assert record["n"] == 10


def test_an_empty_folder_is_taken_and_parents_are_made(here: Path) -> None:
    OUT.mkdir()
    generate()
    generate("--out", "new/of/pictures")
    assert Path("new/of/pictures/0009.png").exists()


VALID = "valid: a new folder, an empty one, or what this command wrote, to replace it"


def test_anything_else_is_left_alone(here: Path) -> None:
    generate()
    for spoil, found in [
        (lambda: (OUT / "note.txt").write_text("mine"), "a folder with 'note.txt'"),
        (lambda: (OUT / "note.txt").rename(OUT / "0010.png"), "a folder with '0010.png'"),
        (lambda: (OUT / "images.json").write_text("{}"), "a folder with '0000.png'"),
        (lambda: (OUT / "images.json").unlink(), "a folder with '0000.png'"),
        (lambda: OUT.rename("moved") and OUT.symlink_to("moved"), "what is no folder"),
        (lambda: OUT.unlink() or OUT.write_text("mine"), "what is no folder"),
    ]:
        spoil()
        assert refused() == f"{OUT}: found {found}; {VALID}"
    assert OUT.read_text() == "mine"
    assert Path("moved/0010.png").read_text() == "mine"


def test_what_others_wrote_in_the_meantime_is_left_alone(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate()
    states = Run.states

    def beside(self: Run, *arguments: Any) -> Any:
        (OUT / "note.txt").write_text("mine")
        return states(self, *arguments)

    monkeypatch.setattr(Run, "states", beside)
    assert refused().startswith(f"{OUT}: found a folder with 'note.txt'; ")
    assert (OUT / "note.txt").read_text() == "mine"
    assert (OUT / "0000.png").exists()


# --- what is wrong


def remade(**changes: Any) -> None:
    """The predictor, made for something else."""
    save_predictor(replace(load_predictor("models/rdpo"), **changes), Path("models/rdpo"))


WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "no backbone": (
        lambda: shutil.rmtree("models/backbone"),
        "models/backbone/backbone.json: missing; stage backbone makes it: dvc repro backbone",
    ),
    "no metrics": (
        lambda: Path("models/metrics.json").unlink(),
        "models/metrics.json: missing; stage metrics makes it: dvc repro metrics",
    ),
    "no predictor": (
        lambda: shutil.rmtree("models/rdpo"),
        f"models/rdpo/predictor.json: missing; valid: a predictor's folder, with {', '.join(FILES)}",
    ),
    "another backbone": (
        lambda: remade(backbone=replace(load_predictor("models/rdpo").backbone, name="tiny/sd3")),
        "models/rdpo: backbone: digits; valid: tiny/sd3, which the predictor was made for",
    ),
    "another guidance scale": (
        lambda: remade(guidance_scale=2.0),
        "models/rdpo: guidance_scale: 1.0; valid: 2.0, which the predictor was made for",
    ),
    "a damaged predictor": (
        lambda: Path("models/rdpo/predictor.json").write_text("{}"),
        "models/rdpo/predictor.json: format_version None; valid: 1",
    ),
    "no prompts": (lambda: Path("prompts.txt").write_text("\n"), "prompts.txt: found no prompts; valid: one or more"),
    "prompts of another model": (
        lambda: Path("prompts.txt").write_text("1\na lighthouse\n"),
        "prompts.txt: prompts: ['a lighthouse']; valid: ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', '']",
    ),
    "wrong parameters": (
        lambda: write({**small(), "seed": "one"}),
        "params.yaml: seed: found 'one'; valid: a valid integer",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_in_a_line_and_nothing_is_written(case: str, here: Path) -> None:
    spoil, told = WRONG[case]
    spoil()
    assert refused() == told
    assert not OUT.exists()


def test_no_file_of_prompts(here: Path) -> None:
    assert refused(prompts="none.csv").startswith("none.csv: missing; valid: a .txt, .csv, .tsv or .json file of prompts")


def test_another_revision_of_the_backbone(here: Path) -> None:
    made_for = load_predictor("models/rdpo").backbone
    remade(backbone=replace(made_for, revision="0" * 64))
    assert refused() == f"models/rdpo: backbone: {made_for.revision}; valid: {'0' * 64}, which the predictor was made for"


def test_several_processes(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stages.generate.SIZE", 2)
    assert refused() == "runs as one process; valid: python -m, without torchrun"


def test_what_may_pass_has_a_status_of_its_own(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoAnswerError(StageError, TemporaryError): ...

    def unanswered(compute: Any) -> None:
        raise NoAnswerError("the hub does not answer")

    monkeypatch.setattr("stages.generate.load_scorers", unanswered)
    assert refused(status=os.EX_TEMPFAIL) == "the hub does not answer"


def test_a_place_that_cannot_be_written_to(here: Path) -> None:
    Path("file").write_text("")
    assert refused("--out", "file/pictures") == "file: File exists"


def test_a_score_that_is_not_finite(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LogProbability, "__call__", lambda self, images, prompts: torch.full((len(images),), torch.nan))
    assert refused().startswith("log_probability: not finite for 10 of 10 images")
    assert not OUT.exists()


def ending(monkeypatch: pytest.MonkeyPatch, how: Callable[[], Any]) -> None:
    """Have the second batch end so."""
    states, batches = Run.states, list[Any]()

    def ended(self: Run, frozen: Any, split: str, samples: Sequence[int]) -> Any:
        batches.append(samples)
        if len(batches) == 2:
            how()
        return states(self, frozen, split, samples)

    params = small()
    params["sample"]["batch_size"] = 4
    write(params)
    monkeypatch.setattr(Run, "states", ended)


def test_sigterm_ends_it_with_nothing_written(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate()
    before = (OUT / "images.json").read_bytes()
    ending(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert refused("--images", "2", status=143) == "terminated; nothing is written"
    assert (OUT / "images.json").read_bytes() == before
    assert len(list(OUT.iterdir())) == 12


def test_out_of_memory_says_what_to_lower(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    ending(monkeypatch, full)
    told = refused()
    assert told.startswith("out of memory (CUDA out of memory. Tried to allocate 2 GiB); lower sample.batch_size")
    assert not OUT.exists()


# --- a pipeline


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder in which the stages backbone and metrics have run on the tiny SD3, with a predictor for it, and parameters."""
    folder, models = tmp_path_factory.mktemp("workspace"), tmp_path_factory.mktemp("models")
    saved(TINY["sd3"](), models / "sd3")
    saved_hps(models / "hps", 0)
    saved_clip(models / "clip_l14", 1)
    params = params_of("sd3", models)
    params["prompts"] |= {"validation": 3, "test": 4}
    params["metrics"] |= {"reward": {"hps": 1.0}, "judges": ["clip_score"]}
    params["sample"] |= {"seeds": "0-7", "batch_size": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "STORE", tmp_path_factory.mktemp("home") / "parasol")
        patch.chdir(folder)
        write(params)
        for stage in ("backbone", "metrics"):
            run(stage, [])
        table = EPD(4, 2, 0.0, 0.0).requires_grad_(False).table()
        Path("models/distilled").mkdir()
        predictor = Predictor(table, flowmatch(4, 0.01, 1.0, 3.0), False, Record.load().identity, 4.5, {})
        save_predictor(predictor, Path("models/distilled"))
        yield folder, params


@pytest.fixture
def pipeline(tiny: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Parameters of a copy of it."""
    shutil.copytree(tiny[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tiny[1]


def coloured(record: dict[str, Any]) -> Tensor:
    """All images as they are in their files, (n, 16, 16, 3)."""
    images = [Image.open(OUT / each["file"]) for each in record["images"]]
    assert {(image.mode, image.size) for image in images} == {("RGB", (16, 16))}
    return torch.stack([torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(16, 16, 3) for image in images])


def test_a_pipeline_s_images_are_those_of_stage_sample(pipeline: dict[str, Any]) -> None:
    run("sample", ["distilled"])
    asked = Prompts.load(Path("models/backbone/prompts.json"))("test", range(4))
    Path("prompts.json").write_text(json.dumps(asked))
    record = generate("--images", "2", folder="models/distilled", prompts="prompts.json")
    assert (record["n"], record["serial_evaluations"], record["total_evaluations"]) == (8, 6, 18)
    samples = [each["sample"] for each in record["images"]]
    assert samples == [0, 4, 1, 5, 2, 6, 3, 7]
    compute = load_params().compute
    images = load_decoder(compute)(load_file("data/samples/distilled.safetensors")["states"][samples])
    levels = coloured(record).permute(0, 3, 1, 2) / 255
    assert torch.allclose(levels, images.float(), atol=0.6 / 255, rtol=0)
    for each in record["metrics"]:
        values = load_scorers(compute).metrics[each["name"]](images, [prompt for prompt in asked for _ in range(2)])
        found = [image["scores"][each["name"]] for image in record["images"]]
        assert found == pytest.approx(values.tolist(), abs=1e-4)
    assert [each["name"] for each in record["metrics"]] == ["hps", "clip_score"]


def test_encoders_may_be_dropped(pipeline: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """For prompts that no stage was told of."""
    Path("prompts.txt").write_text("a lighthouse at dusk\na kettle\n")
    expected, kept, keep = coloured(generate(folder="models/distilled")), list[str](), Texts.keep
    monkeypatch.setattr(Texts, "keep", lambda self, prompts: kept.extend(prompts) or keep(self, prompts))
    write({**pipeline, "compute": pipeline["compute"] | {"drop_text_encoders": True}})
    found = coloured(generate(folder="models/distilled"))
    assert kept == ["a lighthouse at dusk", "a kettle", ""]
    assert (found.int() - expected.int()).abs().max() <= 1
    assert not torch.equal(found[0], found[1])


def test_prompts_that_are_cut_are_told(pipeline: dict[str, Any]) -> None:
    """The tiny tokenizers have a token for each letter."""
    Path("prompts.txt").write_text(f"a kettle\n{'o' * 100}\n")
    told = started(folder="models/distilled").stderr.splitlines()
    assert "1 of 2 prompts are cut to the 77 tokens that tokenizer has" in told
    assert not any("tokenizer_3" in line for line in told)


# --- the page


@pytest.mark.parametrize(
    ("groups", "each", "size", "columns", "rows"),
    [(10, 1, 8, 4, 3), (10, 8, 8, 8, 10), (5, 3, 8, 3, 5), (100, 4, 8, 20, 20), (3, 17, 512, 8, 9), (1, 1, 1024, 1, 1)],
)
def test_the_page_shows_every_picture(groups: int, each: int, size: int, columns: int, rows: int) -> None:
    """Each in its place: those of a group abreast, or in lines of their own."""
    sheet = Sheet(groups, each)
    for index in range(groups * each):
        sheet.add(Image.new("L", (size, size), index % 128))
    page = sheet.page()
    assert (sheet.columns, sheet.rows) == (columns, rows)
    assert page.width <= WIDTH
    step, high = page.width // columns, page.height // rows
    middles = [(column * step + step // 2, row * high + high // 2) for row in range(rows) for column in range(columns)]
    levels: list[Any] = [page.getpixel(middle) for middle in middles]
    if each <= columns and columns % each == 0 and rows * columns == groups * each:
        assert levels == [index % 128 for index in range(groups * each)]
    assert sorted(level for level in levels if level != 128) == sorted(index % 128 for index in range(groups * each))
    if size == 8:
        assert step > MAGNIFIED / 4


def test_small_pictures_are_magnified_pixel_by_pixel(here: Path) -> None:
    record = generate()
    with Image.open(OUT / "grid.png") as page:
        first = page.crop((4, 4, 100, 100)).resize((8, 8), Image.Resampling.NEAREST)
        colours = page.crop((4, 4, 100, 100)).getcolors()
    levels = torch.frombuffer(bytearray(first.tobytes()), dtype=torch.uint8).view(8, 8)
    assert torch.equal(levels, pixels(record)[0])
    assert colours is not None
    assert all(count % 144 == 0 for count, _ in colours), "of squares of 12 x 12"
