import base64
import contextlib
import hashlib
import io
import json
import math
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from stages.files import InputError, write_csv, write_json, write_tensors
from stages.legend import origin, unseen
from stages.params import Classical, Learned, LogSNR, Metrics, OtherImages, RealImages, Refs, Report, Sampler, Weights
from stages.report import markdown_table, report
from stages.statistics import paired

from .browser import Browser
from .browser import browser as browser

PROMPTS = [
    "a cat",
    '<script>document.title = "spoilt"</script> & "two" | three',
    *(f"prompt {i}, of a picture in which there is much to be seen" for i in range(2, 12)),
]
N, PICTURES = len(PROMPTS), 5
SAMPLES = [*range(7, 7 + N)]
SCORES = ["hps", "pick_score", "clip_score", "aesthetic", "reward", "brightness", "saturation"]
BETTER = {"reference": 0.2, "euler": 0.0, "distilled": 0.1, "rdpo": 0.4}
SERIAL = {"reference": 40, "euler": 5, "distilled": 5, "rdpo": 5}
CLASSICAL = Classical(solver="euler", model="models/backbone", schedule=LogSNR(name="logsnr"), afs=None, num_steps=None)
SAMPLERS: dict[str, Sampler] = {
    "reference": CLASSICAL,
    "euler": CLASSICAL,
    "distilled": Learned(solver="predictor", model="models/distilled"),
    "rdpo": Learned(solver="predictor", model="models/rdpo"),
}
METRICS = Metrics(
    reward={"hps": 1.0, "pick_score": 0.5},
    judges=["clip_score", "aesthetic"],
    features="clip_l14",
    dtype="float32",
    weights={
        model: Weights(source="here", id=model, revision=None, sha256=None, variant=None)
        for model in ("hps", "pick_score", "clip_l14", "aesthetic")
    },
)
OWN = OtherImages(
    source="reference", path=None, revision=None, split=None, column=None, size=None, images=9, sha256=None, batch_size=1
)
FOLDER = OWN.model_copy(update={"source": "folder", "path": "here"})
OF_DIGITS = {
    "metrics": Metrics(reward={"log_probability": 1.0}, judges=["accuracy"], features="accuracy", dtype="float32", weights={}),
    "refs": RealImages(source="data"),
}


def records(**weights: float) -> list[dict[str, Any]]:
    """Of metrics; those with a weight are in the reward."""
    return [
        {
            "name": name,
            "in_reward": weight > 0,
            "weight": weight,
            "scale": f"scale of {name}, a | b",
            "range": "0.1 to 0.35",
            "preprocessing": "none",
            "source": "https://example.org/paper",
            "divisor": 26.0 if name == "pick_score" else 1.0,
            "models": [{"model": name, "id": f"org/{name}", "revision": None, "sha256": "0" * 64}],
            "dtype": "float32",
        }
        for name, weight in weights.items()
    ]


IMAGES = records(hps=1.0, pick_score=0.5, clip_score=0.0, aesthetic=0.0)


def scores_of(sampler: str, names: list[str]) -> dict[str, list[float]]:
    """Made up; in the fifth and sixth row all samplers have the same."""
    generator = torch.Generator().manual_seed(list(BETTER).index(sampler))
    noise = torch.randn(len(names), N, generator=generator, dtype=torch.float64) / 4 + BETTER[sampler]
    noise[:, 4:6] = 0.5
    return dict(zip(names, noise.tolist(), strict=True)) | {"saturation": [0.0] * N}


def moved_of(sampler: str) -> dict[str, list[float]]:
    """Made up, too: squared errors, and by how much each image moves the distances."""
    draw = random.Random(sampler)
    names = ("squared_error", "frechet_distance_influence", "distance_to_reference_influence")
    return {name: [draw.random() for _ in range(N)] for name in names}


def write_scores(sampler: str, samples: list[int], prompts: list[str], scores: dict[str, list[float]]) -> None:
    columns = {"sample": pyarrow.array(samples, pyarrow.int64()), "prompt": prompts}
    moved = {name: values[: len(prompts)] for name, values in moved_of(sampler).items()}
    pyarrow.parquet.write_table(pyarrow.table(columns | moved | scores), f"data/scores/{sampler}.parquet")


def change_result(sampler: str, **values: Any) -> None:
    file = Path(f"results/{sampler}.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def write(names: list[str], metrics: list[dict[str, Any]], shape: tuple[int, int, int]) -> None:
    """The files of all stages that report reads, in the working directory."""
    Path("data/scores").mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for i, sampler in enumerate(SAMPLERS):
        scores = scores_of(sampler, names)
        write_scores(sampler, SAMPLES, PROMPTS, scores)
        pictures = torch.randint(0, 256, (PICTURES, *shape), generator=generator, dtype=torch.uint8)
        write_tensors(Path(f"data/scores/{sampler}.safetensors"), {"pictures": pictures})
        distances = {"frechet_distance": 1.5 + i, "distance_to_reference": 0.25 * i, "rmse": 0.125 * i}
        cost = {"serial_evaluations": SERIAL[sampler], "total_evaluations": 1.5 * SERIAL[sampler]}
        protocol = {
            "name": "frechet_distance",
            "label": f"FD-{N}",
            "distances": [1.5 + i],
            "tool": "a tool",
            "extractor": "features",
            "weights": "w",
            "resize": "none",
            "n": N,
        }
        protocol |= {"seeds": f"7-{6 + N}", "ranges": 1, "reference": {"source": "a set", "n": 9, "sha256": "1" * 64}}
        result = {"n": N, **cost, **distances, **{name: statistics.mean(values) for name, values in scores.items()}}
        result |= {f"{name}_se": 0.01 for name in distances}
        result |= {f"{name}_se": statistics.stdev(values) / N**0.5 for name, values in scores.items()}
        write_json(Path(f"results/{sampler}.json"), {**result, "protocol": [protocol], "metrics": metrics})
    held_out = dict.fromkeys([*names, "frechet_distance"], 0.25)
    write_json(Path("results/held_out.json"), {"n": 9} | held_out | {f"{name}_se": 0.01 for name in held_out})
    write_csv(
        Path("results/distill.csv"),
        [{"iteration": i, "train_rmse": 1 / (i + 1), "validation_rmse": 2 / (i + 1)} for i in range(4)],
    )
    points = []
    for i in range(4):
        point = {
            "iteration": i,
            "reward": i / 9,
            "reward_95": 0.1,
            "gain": i / 9,
            "gain_95": 0.05,
            "frechet_distance": 2 - i / 9,
        }
        for name in set(names) - {"reward"}:
            point |= {name: 0.5, f"{name}_change": 0.0 if name == "saturation" else i / 99, f"{name}_change_95": 0.02}
        points.append({**point, "kl": 0.1, "deployed": int(i == 2)})
    write_csv(Path("results/rdpo.csv"), points)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that report reads: pictures of 16 × 16, a reward of two metrics."""
    monkeypatch.chdir(tmp_path)
    write(SCORES, IMAGES, (3, 16, 16))
    return tmp_path


def run(base: str = "distilled", metrics: Metrics = METRICS, refs: Refs = OWN) -> tuple[str, "Page"]:
    """The report in markdown, and its page."""
    report(samplers=SAMPLERS, metrics=metrics, refs=refs, report=Report(base=base))
    return Path("results/report.md").read_text(), Page(Path("results/report.html").read_text())


@dataclass(frozen=True)
class Done:
    folder: Path
    markdown: str
    page: "Page"
    printed: str

    def tensors(self, sampler: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / f"data/scores/{sampler}.safetensors")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """The same, and its report, to look at."""
    folder, printed = tmp_path_factory.mktemp("done"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(folder)
        write(SCORES, IMAGES, (3, 16, 16))
        return Done(folder, *run(), printed.getvalue())


def table(lines: list[str]) -> list[list[str]]:
    """The cells of a table in markdown, without its second line."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [rows[0], *rows[2:]]


def tables(markdown: str) -> list[list[list[str]]]:
    """All of them."""
    blocks = [block.splitlines() for block in markdown.split("\n\n")]
    return [table(block) for block in blocks if block[0].startswith("|")]


class Page(HTMLParser):
    """What is in a page: tables as (class, rows of cells), attributes of images, and all attributes that name an address."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.tables: list[tuple[str | None, list[list[str]]]] = []
        self.images: list[dict[str, str | None]] = []
        self.addresses: list[str | None] = []
        self.tags: list[str] = []
        self.meta: dict[str | None, str | None] = {}
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        match tag:
            case "table":
                self.tables.append((given.get("class"), []))
            case "tr":
                self.tables[-1][1].append([])
            case "th" | "td":
                self.tables[-1][1][-1].append("")
                self._cell = True
            case "img":
                self.images.append(given)
            case "meta":
                self.meta[given.get("name")] = given.get("content")

    def handle_endtag(self, tag: str) -> None:
        self._cell = self._cell and tag not in ("th", "td")

    def handle_data(self, data: str) -> None:
        if self._cell:
            self.tables[-1][1][-1][-1] += data

    def of(self, kind: str) -> list[list[list[str]]]:
        """The tables of a class, with single spaces in their cells."""
        return [[[" ".join(cell.split()) for cell in row] for row in rows] for name, rows in self.tables if name == kind]


def differences(key: str, sampler: str, base: str) -> list[float]:
    return [a - b for a, b in zip(scores_of(sampler, SCORES)[key], scores_of(base, SCORES)[key], strict=True)]


def half(values: list[float]) -> float:
    return 1.96 * statistics.stdev(values) / math.sqrt(len(values))


def comparison(key: str, sampler: str, base: str) -> list[str]:
    """A line of the paired table, computed naively."""
    pairs = differences(key, sampler, base)
    middle, wide = statistics.mean(pairs), half(pairs)
    won = [1.0 if pair > 0 else 0.5 if pair == 0 else 0.0 for pair in pairs]
    more = [*won, 1.0, 1.0, 0.0, 0.0]
    low, high = (statistics.mean(more) + sign * half(more) for sign in (-1, 1))
    return [
        f"{statistics.mean(scores_of(sampler, SCORES)[key]):.4f}",
        f"{middle:+.4f}",
        f"{wide / 1.96:.4f}",
        f"[{middle - wide:+.4f}, {middle + wide:+.4f}]",
        f"{100 * statistics.mean(won):.1f} % [{100 * max(low, 0):.1f}, {100 * min(high, 1):.1f}]",
    ]


def test_pairs_with_ties() -> None:
    found = paired(torch.tensor([1.0, 2.0, 3.0, 4.0, 9.0]), torch.tensor([1.0, 1.0, 5.0, 3.0, 9.0]))
    won = [0.5, 1.0, 0.0, 1.0, 0.5]
    assert found.mean == pytest.approx(19 / 5)
    assert found.difference == pytest.approx(0)
    assert found.error == pytest.approx(statistics.stdev([0, 1, -2, 1, 0]) / math.sqrt(5))
    assert found.half == pytest.approx(1.96 * found.error)
    assert found.wins == pytest.approx(statistics.mean(won))
    more = [*won, 1.0, 1.0, 0.0, 0.0]
    assert found.wins_95 == pytest.approx([statistics.mean(more) - half(more), statistics.mean(more) + half(more)])


def test_wins_are_uncertain_even_where_all_are_won() -> None:
    for n in (2, 12, 1000, 30_000):
        won = paired(torch.ones(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64))
        lost = paired(torch.zeros(n, dtype=torch.float64), torch.ones(n, dtype=torch.float64))
        assert won.wins == 1
        assert lost.wins == 0
        assert won.wins_95[1] == 1
        assert 1 - 6 / n < won.wins_95[0] < 1 - 1 / n
        assert lost.wins_95 == pytest.approx([0, 1 - won.wins_95[0]])


def test_the_table_has_every_quantity_of_every_sampler(done: Done) -> None:
    head, *rows = tables(done.markdown)[0]
    quantities = [
        f"FD-{N}",
        "FD to reference",
        "RMSE",
        "hps (reward)",
        "pick_score (reward)",
        "clip_score",
        "aesthetic",
        "reward",
    ]
    assert head == ["sampler", "serial", "total", *quantities, "brightness"], "saturation is one number for all"
    assert [row[0] for row in rows] == list(SAMPLERS)
    for i, row in enumerate(rows):
        cells = dict(zip(head, row, strict=True))
        values = scores_of(row[0], SCORES)
        assert (int(cells["serial"]), float(cells["total"])) == (SERIAL[row[0]], 1.5 * SERIAL[row[0]])
        assert cells[f"FD-{N}"] == f"{1.5 + i:.2f} ± {1.96 * 0.01:.2f}"
        assert cells["FD to reference"] == (f"{0.25 * i:.3f} ± {1.96 * 0.01:.3f}" if i else "0")
        assert cells["RMSE"] == (f"{0.125 * i:.4f} ± {1.96 * 0.01:.4f}" if i else "0")
        for key in (key for key in SCORES if key != "saturation"):
            name = f"{key} (reward)" if key in METRICS.reward else key
            assert cells[name] == f"{statistics.mean(values[key]):.4f} ± {half(values[key]):.4f}"
    assert done.page.of("results") == [[head, *rows]]


def test_what_needs_features_of_the_reference_set_is_shown_where_it_is_known(here: Path) -> None:
    for sampler in SAMPLERS:
        change_result(sampler, kernel_distance=0.00123, precision=0.75, recall=0.5)
        change_result(sampler, kernel_distance_se=0.0001, precision_se=0.01, recall_se=0.02)
    head, row, *_ = tables(run()[0])[0]
    assert head[5:8] == ["KID", "precision", "recall"]
    assert row[5:8] == [f"0.0012 ± {1.96 * 0.0001:.4f}", f"0.750 ± {1.96 * 0.01:.3f}", f"0.500 ± {1.96 * 0.02:.3f}"]


@pytest.mark.parametrize("base", ["distilled", "euler"])
def test_samplers_are_paired_with_the_base(here: Path, base: str) -> None:
    markdown, page = run(base)
    assert f"## Against {base}" in markdown
    head, *rows = tables(markdown)[1]
    assert head == ["metric", "sampler", "mean", f"less {base}", "standard error", "95 % interval", "wins"]
    names = {key: f"{key} (reward)" if key in METRICS.reward else key for key in SCORES if key != "saturation"}
    others = [sampler for sampler in SAMPLERS if sampler != base]
    assert rows == [[names[key], other, *comparison(key, other, base)] for key in names for other in others]
    assert page.of("pair") == [[head[1:], *([other, *comparison(key, other, base)] for other in others)] for key in names], (
        "a table for each metric, but none for saturation, which is 0"
    )


def test_findings_compare_the_learned_samplers(done: Done) -> None:
    markdown = done.markdown
    rmse, moved = {"distilled": 0.25, "euler": 0.125}, {name: moved_of(name) for name in SAMPLERS}
    # to first order: the RMSE r of squared errors e moves by e / 2 r, and a ratio by the difference of relative moves
    relative = [
        [e / (2 * statistics.mean(moved[name]["squared_error"]) ** 0.5 * rmse[name]) for e in moved[name]["squared_error"]]
        for name in rmse
    ]
    wide = 1.96 * 2 * statistics.stdev([one - other for one, other in zip(*relative, strict=True)]) / N**0.5
    assert f"distilled has 2.00 ± {wide:.2f} times the RMSE of euler" in markdown
    assert "at 5 serial evaluations each (total: 7.5 against 7.5)" in markdown
    frechet = [moved[name]["frechet_distance_influence"] for name in ("rdpo", "distilled")]
    wide = 1.96 * statistics.stdev([one - other for one, other in zip(*frechet, strict=True)]) / N**0.5
    assert f"FD-{N} +1.000 [{1 - wide:+.3f}, {1 + wide:+.3f}]" in markdown
    for name, key in {"hps (reward)": "hps", "reward": "reward", "aesthetic by the judge": "aesthetic"}.items():
        assert f"{name} {' '.join(comparison(key, 'rdpo', 'distilled')[i] for i in (1, 3))}" in markdown
    assert f"Other images of the reference (n = 9): hps (reward) 0.2500 ± {1.96 * 0.01:.4f}" in markdown


def test_the_legend_says_what_the_numbers_are(done: Done) -> None:
    markdown, page = done.markdown, done.page
    assert f"n: {N} test samples" in markdown
    assert f"FD-{N}: Frechet distance to other images of the reference" in markdown
    assert "±: 1.96 standard errors" in markdown
    assert f"extractor: features; weights: w; resize: none; n: {N}; seeds: 7-{6 + N}; ranges: 1" in markdown
    assert f"reference: source a set, n 9, sha256 {'1' * 64}" in markdown
    assert "The lowest of" not in markdown
    assert "(1 × hps + 0.5 × pick_score / 26) / 1.5" in markdown
    assert "judges: clip_score, aesthetic: never in the reward" in markdown
    assert "aesthetic: scale of aesthetic, a | b; usual: 0.1 to 0.35" in markdown
    assert [name for name, _ in page.tables].count("record") == 5
    assert ["models", f"model hps, id org/hps, sha256 {'0' * 64}"] in page.of("record")[1]


def test_what_is_known_of_held_out_images_is_told(here: Path) -> None:
    write_json(Path("results/held_out.json"), {"n": 9, "brightness": 0.5, "brightness_se": 0.1})
    assert f"- Images of the reference set (n = 9): brightness 0.5000 ± {1.96 * 0.1:.4f}.\n" in run(refs=FOLDER)[0]
    write_json(Path("results/held_out.json"), {"n": 0})
    assert "Images of the reference set (" not in run(refs=FOLDER)[0]


def test_the_lowest_of_several_distances_is_told_as_such(here: Path) -> None:
    for i, sampler in enumerate(SAMPLERS):
        record = {"label": "FD-4", "ranges": 3, "distances": [1.5 + i, 2.5 + i, 3.5 + i]}
        change_result(sampler, protocol=[record])
    assert (
        "FD-4: Frechet distance to the reference set; less is better. Below 50,000 images its label says how many. "
        + ("The lowest of 3 ranges of samples.\n")
        in run(refs=FOLDER)[0]
    )


def test_digits_have_one_metric_as_their_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(["log_probability", "accuracy", *SCORES[4:]], records(log_probability=1.0, accuracy=0.0), (1, 8, 8))
    markdown, page = run(**OF_DIGITS)
    head = tables(markdown)[0][0]
    assert head[6:] == ["log_probability (reward)", "accuracy", "brightness"]
    assert "Frechet distance to the training digits" in markdown
    assert "Held-out real digits (n = 9): log_probability (reward) 0.2500" in markdown
    assert "of states in [-1, 1]" in markdown
    assert {(image["width"], image["height"]) for image in page.images if "width" in image} == {("48", "48")}
    assert "reward: what rdpo was trained for: log_probability." in markdown


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("folder", ("the reference set", "Images of the reference set")),
        ("reference", ("other images of the reference", "Other images of the reference")),
    ],
)
def test_the_reference_set_is_named(source: str, words: tuple[str, str]) -> None:
    refs = OWN.model_copy(update={"source": source})
    assert (origin(refs), unseen(refs)) == words


def test_a_table_in_markdown_keeps_its_columns() -> None:
    found = markdown_table(["a | b", "c"], [["x\ny", "1"], ["", "2 | 3"]])
    assert found.splitlines() == [
        r"| a \| b | c      |",
        "| ------ | ------ |",
        "| x y    | 1      |",
        r"|        | 2 \| 3 |",
    ]


def test_the_page_has_every_picture_under_its_prompt(done: Done) -> None:
    (grid,) = done.page.of("pictures")
    assert grid[0] == ["sampler", *PROMPTS[:PICTURES]]
    assert [row[0] for row in grid[1:]] == list(SAMPLERS)
    pictures = [image for image in done.page.images if (image["src"] or "").startswith("data:image/png;base64,")]
    assert [image["alt"] for image in pictures] == [f"{name}: {prompt}" for name in SAMPLERS for prompt in PROMPTS[:PICTURES]]
    data = [base64.b64decode((image["src"] or "").partition(",")[2]) for image in pictures]
    written = torch.cat([done.tensors(name)["pictures"] for name in SAMPLERS])
    for image, expected in zip(data, written, strict=True):
        assert torch.equal(torch.from_numpy(numpy.array(Image.open(io.BytesIO(image)))).permute(2, 0, 1), expected)


def test_large_pictures_are_made_smaller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(SCORES, IMAGES, (3, 256, 384))
    _, page = run()
    pictures = [image for image in page.images if "width" in image]
    assert {(image["width"], image["height"]) for image in pictures} == {("192", "128")}
    data = base64.b64decode((pictures[0]["src"] or "").partition(",")[2])
    assert Image.open(io.BytesIO(data)).size == (192, 128)
    assert "pixelated" not in page.text


def test_the_page_asks_for_nothing_and_runs_nothing(done: Done) -> None:
    page = done.page
    assert len(page.addresses) == len(page.images)
    assert all((address or "").startswith("data:image/") for address in page.addresses)
    assert all(image["alt"] for image in page.images)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert "url(" not in page.text
    assert "@import" not in page.text
    assert page.meta["report"] == hashlib.sha256((done.folder / "results/report.md").read_bytes()).hexdigest()


def test_the_terminal_shows_table_findings_and_where_the_rest_is(done: Done) -> None:
    shown = done.printed
    assert shown.startswith(done.markdown.partition("## Against")[0].rstrip())
    assert "| evaluate@rdpo" in shown
    assert "results/report.md" in shown
    assert "results/report.html" in shown
    assert "## Against" not in shown


def spoil_prompt(scores: dict[str, list[float]]) -> None:
    write_scores("euler", SAMPLES, [*PROMPTS[:-1], "another"], scores)


def spoil_sample(scores: dict[str, list[float]]) -> None:
    write_scores("euler", [*SAMPLES[:-1], 99], PROMPTS, scores)


def spoil_order(scores: dict[str, list[float]]) -> None:
    write_scores("euler", SAMPLES[::-1], PROMPTS[::-1], scores)


def spoil_number(scores: dict[str, list[float]]) -> None:
    write_scores("euler", SAMPLES[1:], PROMPTS[1:], {name: values[1:] for name, values in scores.items()})
    change_result("euler", n=N - 1)


def spoil_metrics(scores: dict[str, list[float]]) -> None:
    change_result("euler", metrics=records(hps=1.0, pick_score=0.25, clip_score=0.0, aesthetic=0.0))


def spoil_protocol(scores: dict[str, list[float]]) -> None:
    change_result("euler", protocol=[{"label": "FD-3"}])


def spoil_scores(scores: dict[str, list[float]]) -> None:
    write_scores("euler", SAMPLES, PROMPTS, {name: values for name, values in scores.items() if name != "aesthetic"})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_prompt, f"row {N - 1} .*another.*; valid: .*prompt 11"),
        (spoil_sample, f"row {N - 1} .*99.*; valid: .*{6 + N}"),
        (spoil_order, "row 0 .*valid: .*a cat"),
        (spoil_number, f"prompts {N - 1}; valid: {N}"),
        (spoil_metrics, "weights .*0.25.*; valid: .*0.5"),
        (spoil_protocol, "protocol or metrics others than in reference.json; valid: the same"),
        (spoil_scores, "aesthetic"),
    ],
)
def test_results_of_something_else_are_refused(
    here: Path, spoil: Callable[[dict[str, list[float]]], None], message: str
) -> None:
    spoil(scores_of("euler", SCORES))
    with pytest.raises(InputError, match=rf"(?s)euler.*not what stage evaluate@euler writes.*{message}.*dvc repro"):
        run()
    assert not Path("results/report.md").exists()


@pytest.mark.parametrize(
    ("file", "stage"),
    [
        ("data/scores/euler.parquet", "evaluate@euler"),
        ("data/scores/rdpo.safetensors", "evaluate@rdpo"),
        ("results/reference.json", "evaluate@reference"),
        ("results/held_out.json", "refs"),
        ("results/distill.csv", "distill"),
        ("results/rdpo.csv", "rdpo"),
    ],
)
@pytest.mark.parametrize("damage", ["missing", "other"])
def test_a_missing_or_spoilt_file_names_its_stage(here: Path, file: str, stage: str, damage: str) -> None:
    if damage == "missing":
        Path(file).unlink()
    else:
        Path(file).write_bytes(b"\x80\x04something else")
    with pytest.raises(InputError, match=rf"stage {stage} (makes it|writes).*: dvc repro .*{stage}"):
        run()


def test_a_browser_shows_the_page(done: Done, browser: Browser) -> None:
    """Every image is seen, and the page itself is no wider than its window, which tables scroll in."""
    for width in (1300, 500):
        found = browser.ask(done.folder / "results/report.html", LOOK, width)
        assert found["title"] == "Parasol report"
        pictures, curves = found["images"][: 4 * PICTURES], found["images"][4 * PICTURES :]
        assert len(curves) == 5 + len([name for name in SCORES if name not in ("reward", "saturation")])
        for image in [*pictures, *curves]:
            assert min(image["natural"], image["width"], image["height"]) > 0, image["alt"]
        assert {(image["width"], image["height"]) for image in pictures} == {(48, 48)}
        assert found["rows"] == {
            "results": [5],
            "pair": [4] * 6,
            "pictures": [5],
            "stages": [16],
            "record": [10] * 5,
        }
        assert found["page"] <= found["window"]
        assert found["window"] <= width


LOOK = """() => {
  const rows = {};
  for (const table of document.querySelectorAll("table")) (rows[table.className] ??= []).push(table.rows.length);
  const images = [...document.images].map((image) => {
    const { width, height } = image.getBoundingClientRect();
    return { alt: image.alt, natural: image.naturalWidth, width, height };
  });
  return { title: document.title, rows, images, page: document.documentElement.scrollWidth, window: window.innerWidth };
}"""
"""What a page shows."""
