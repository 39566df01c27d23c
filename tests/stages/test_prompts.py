import csv
import io
import json
import random
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from stages.files import InputError
from stages.noise import SPLITS
from stages.prompts import Prompts, read_prompts, split_prompts

CONF = Path(__file__).parents[2] / "conf/prompts"
QUOTED = ['a cat, a dog and "a fox"', "two\nlines", '"quoted" at its beginning', "plain", "café, 猫"]

Write = Callable[[str, str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a file exactly as given."""

    def written(name: str, content: str | bytes) -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return file

    return written


def texts(count: int) -> list[str]:
    return [f"prompt {index}" for index in range(count)]


def table(header: list[str], rows: list[list[str]], **options: Any) -> str:
    file = io.StringIO()
    csv.writer(file, **options).writerows([header, *rows])
    return file.getvalue()


def caption(image: int | str, number: int, text: str) -> dict[str, Any]:
    return {"image_id": image, "id": number, "caption": text}


def coco(*annotations: Any) -> str:
    return json.dumps({"info": {}, "images": [], "annotations": annotations})


def refuses(file: Path, *parts: str) -> None:
    """One line that names the file, what was found and what is valid."""
    with pytest.raises(InputError) as error:
        read_prompts(file)
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    for part in (*parts, "; valid: "):
        assert part in str(error.value)


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_lines_without_white_space_around_them_empty_ones_and_repetitions(ending: str, mark: bytes, write: Write) -> None:
    lines = ["a cat", "", "  a dog\t", "   ", "a cat ", "A cat", "café, 猫"]
    expected = ["a cat", "a dog", "A cat", "café, 猫"]
    assert read_prompts(write("some.txt", mark + ending.join(lines).encode())) == expected
    assert read_prompts(write("some.TXT", mark + (ending.join(lines) + ending).encode())) == expected


def test_only_line_ends_end_lines(write: Write) -> None:
    line = "one\u2028two\x0cthree\x85four\u00a0five"
    assert read_prompts(write("some.txt", f"{line}\nsix")) == [line, "six"]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize(("name", "delimiter"), [("some.csv", ","), ("some.tsv", "\t"), ("some.CSV", ",")])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_quoted_fields(mark: str, quoting: Any, name: str, delimiter: str, ending: str, write: Write) -> None:
    rows = [["1", text, "a category, of these"] for text in QUOTED]
    content = table(["id", "prompt", "category"], rows, delimiter=delimiter, quoting=quoting, lineterminator=ending)
    assert read_prompts(write(name, mark + content)) == QUOTED


@pytest.mark.parametrize("name", ["text", "prompt", "caption", "Prompt", "Prompts", "CAPTIONS", " texts "])
def test_names_of_the_column(name: str, write: Write) -> None:
    assert read_prompts(write("some.csv", table(["id", name], [["1", "a"], ["2", "b"]]))) == ["a", "b"]


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_of_several_columns_text_comes_before_prompt_and_prompt_before_caption(order: list[int], write: Write) -> None:
    for kept in (["text", "Prompts", "caption"], ["prompt", "captions"], ["caption"]):
        names = [kept[index] for index in order if index < len(kept)]
        assert read_prompts(write("some.csv", table(names, [[f"of {name}" for name in names]]))) == [f"of {kept[0]}"]


def test_rows_without_a_prompt_are_skipped_and_fields_after_it_may_be_missing(write: Write) -> None:
    content = "\nprompt,category,note\n\na,x,y\n,x,y\n  ,,\nb,x\nc\nd,x,y,,\n"
    assert read_prompts(write("some.csv", content)) == ["a", "b", "c", "d"]


def test_a_large_field(write: Write) -> None:
    long = "a very " * 100_000 + "large cat"
    assert read_prompts(write("some.csv", f"prompt\n{long}\n")) == [long]


def test_tabs_separate_prompts_whose_quotes_are_their_own(write: Write) -> None:
    """As PartiPrompts has them."""
    content = 'Prompt\tCategory\tNote\n"G R I N" on a wall\tArt\t\na sign "Go"\tArt\tthe word "Go"\n\nplain\tArt\n'
    assert read_prompts(write("some.tsv", content)) == ['"G R I N" on a wall', 'a sign "Go"', "plain"]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("escaped", [True, False])
def test_lists_and_styles(mark: str, escaped: bool, write: Write) -> None:
    listed = mark + json.dumps([*QUOTED, " plain ", "  "], ensure_ascii=escaped)
    assert read_prompts(write("list.json", listed)) == QUOTED
    styled = mark + json.dumps({"photo": QUOTED[:2], "anime": QUOTED[1:], "none": []}, ensure_ascii=escaped)
    assert read_prompts(write("styles.json", styled)) == QUOTED


@pytest.mark.parametrize("seed", range(5))
def test_one_caption_of_each_image_whatever_the_order_of_an_images_captions(seed: int, write: Write) -> None:
    draw = random.Random(seed)
    numbers = draw.sample(range(1000), 100)
    annotations = [
        caption(f"image {i}" if i % 7 == 0 else i, numbers[5 * i + j], f"{i} {j}\n") for i in range(20) for j in range(5)
    ]
    draw.shuffle(annotations)
    lowest = {i: min(range(5), key=lambda j, i=i: numbers[5 * i + j]) for i in range(20)}
    read = read_prompts(write("captions_val2014.json", coco(*annotations)))
    assert sorted(read) == sorted(f"{i} {j}" for i, j in lowest.items())
    first = dict.fromkeys(annotation["caption"].split()[0] for annotation in annotations)
    assert [text.split()[0] for text in read] == list(first)


def test_a_folder_is_its_files_in_the_order_of_their_names(tmp_path: Path, write: Write) -> None:
    write("some/photo.json", '["a photo", "both"]')
    write("some/anime.json", '["anime", "both"]')
    write("some/more.txt", "more\n")
    write("some/table.csv", "prompt\nof a table\nanime\n")
    write("some/.gitignore", "/large")
    write("some/images/0.png", b"\x89")
    assert read_prompts(tmp_path / "some") == ["anime", "both", "more", "a photo", "of a table"]


def test_prompts_that_come_with_it() -> None:
    assert read_prompts(CONF / "digits.txt") == list("0123456789")
    demo = read_prompts(CONF / "demo.txt")
    assert demo == (CONF / "demo.txt").read_text(encoding="ascii").splitlines()
    assert len({text.lower() for text in demo}) == 160


def test_what_is_missing(tmp_path: Path) -> None:
    for name in ("some.txt", "some", "some.png"):
        refuses(tmp_path / name, "missing", ".json", "folder", "put it there")
    (tmp_path / "some").mkdir()
    refuses(tmp_path / "some", "found a folder without files")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *[(f"some{suffix}", "") for suffix in (".txt", ".csv", ".tsv")],
        *[(f"some{suffix}", "\ufeff \r\n\n\t") for suffix in (".txt", ".csv", ".tsv")],
        *[("some.csv", "prompt"), ("some.tsv", "id\tprompt\n1\t\n"), ("some.csv", "prompt\n\n  \n")],
        *[("some.json", content) for content in ("[]", "{}", '["", " "]', '{"photo": []}', coco(), coco(caption(1, 1, " ")))],
    ],
)
def test_no_prompts(name: str, content: str, write: Write) -> None:
    refuses(write(name, content), "found no prompts")


@pytest.mark.parametrize("name", ["some.png", "some", "some.jsonl", "some.txt.gz"])
def test_another_suffix(name: str, write: Write) -> None:
    refuses(write(name, "a cat"), f"found suffix '{Path(name).suffix}'", ".txt, .csv, .tsv, .json")


def test_another_file_in_a_folder(tmp_path: Path, write: Write) -> None:
    write("some/a.txt", "a cat")
    for name, content in {"b.md": "a dog", "b.txt": "\n"}.items():
        file = write(f"some/{name}", content)
        with pytest.raises(InputError, match=re.escape(f"{file}: found ")):
            read_prompts(tmp_path / "some")
        file.unlink()


@pytest.mark.parametrize("name", ["some.txt", "some.csv", "some.tsv", "some.json"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_another_encoding(mark: bytes, name: str, write: Write) -> None:
    refuses(write(name, mark + "prompt\ncat\ncafé\n".encode("latin-1")), "line 3: found byte 0xe9; valid: UTF-8")
    refuses(write(name, "prompt\n".encode("utf-16")), "line 1: found byte 0x")


@pytest.mark.parametrize("control", ["\0", "\x01", "\x08", "\x1b", "\x7f"])
@pytest.mark.parametrize("name", ["some.txt", "some.csv", "some.tsv", "some.json"])
def test_control_characters(name: str, control: str, write: Write) -> None:
    lines = ["prompt", "a cat", f"a {control} dog"]
    content = json.dumps(lines) if name == "some.json" else "\n".join(lines)
    refuses(write(name, content), f"found {control!r} in 'a {repr(control)[1:-1]} dog'")


def test_half_a_character(write: Write) -> None:
    refuses(write("some.json", r'["a cat", "a \ud83d dog"]'), "found '\\ud83d'")
    assert read_prompts(write("some.json", r'["a \ud83d\ude00 dog"]')) == ["a \U0001f600 dog"]


@pytest.mark.parametrize("name", ["some.csv", "some.tsv"])
def test_no_column(name: str, write: Write) -> None:
    content = table(["id", "description"], [["1", "a cat"]], delimiter="\t" if name == "some.tsv" else ",")
    refuses(write(name, content), "found columns ['id', 'description']", "text, texts, prompt, prompts, caption, captions")
    refuses(write("some.csv", "a" * 100_000 + "\nb"), "found columns ['aaa")


@pytest.mark.parametrize("name", ["some.csv", "some.tsv"])
def test_too_few_and_too_many_fields(name: str, write: Write) -> None:
    for rows, line, fields in [("1,a\n2\n", 3, 1), ("1,a\n\n2,a cat, a dog\n", 4, 3), ('1,"a\n\nb"\n2\n', 5, 1)]:
        content = f"id,prompt\n{rows}"
        if name == "some.tsv":
            content = content.replace(",", "\t")
        refuses(write(name, content), f"line {line}: found {fields} fields; valid: 2 to 2")


def test_broken_quotes(write: Write) -> None:
    refuses(write("some.csv", 'prompt\na\n"a cat\na dog\n'), "line 4: found broken quotes")
    refuses(write("some.csv", 'prompt\na\n"a" cat\n'), "line 3: found broken quotes")


@pytest.mark.parametrize("content", ["", "[", "a cat", '["a"] b', "{'a': []}", "[" * 100_000, '{"a": ["x"], "a": ["y"]}'])
def test_broken_json(content: str, write: Write) -> None:
    refuses(write("some.json", content), "found broken JSON (", "annotations")


@pytest.mark.parametrize(
    "value",
    [
        *[1, "a cat", None, ["a", 1], [["a"]], [{"prompt": "a"}], {"photo": "a"}, {"photo": ["a", None]}, {"a": {"b": ["c"]}}],
        *[{"negative": "", "splits": {"test": ["a"]}}, {"annotations": {}}, ["a", *range(1000)]],
    ],
)
def test_json_of_another_form(value: Any, write: Write) -> None:
    refuses(write("some.json", json.dumps(value)), "found ", "annotations")


@pytest.mark.parametrize(
    "annotation", [1, {}, caption(1, 1, "a") | {"id": "1"}, {"image_id": 1, "id": 1}, caption(1, 1, "a") | {"caption": None}]
)
def test_captions_of_another_form(annotation: Any, write: Write) -> None:
    refuses(write("some.json", coco(caption(1, 1, "a cat"), annotation)), "found annotation ", "image_id")


@pytest.mark.parametrize("seed", range(20))
def test_splits_are_disjoint_and_are_all_prompts(seed: int) -> None:
    draw = random.Random(seed)
    validation, test, train = (draw.randint(1, 30) for _ in range(3))
    given = texts(validation + test + train)
    splits = split_prompts(given, seed, validation, test)
    assert set(splits) == set(SPLITS)
    assert [len(splits[split]) for split in ("train", "validation", "test")] == [train, validation, test]
    assert sorted(text for split in splits.values() for text in split) == sorted(given)


def test_splits_depend_on_the_seed_and_the_prompts_alone() -> None:
    given = texts(50)
    drawn = [split_prompts(given, seed, 10, 10) for seed in range(20)]
    assert drawn == [split_prompts(tuple(given), seed, 10, 10) for seed in range(20)]
    for split in SPLITS:
        assert len({tuple(splits[split]) for splits in drawn}) == 20
    assert given == texts(50)
    reported_on = {text for seed in range(200) for text in split_prompts(given, seed, 10, 10)["test"]}
    assert reported_on == set(given)  # none of them has a place of its own


@pytest.mark.parametrize("seed", range(5))
def test_a_larger_validation_set_leaves_the_test_set(seed: int) -> None:
    drawn = [split_prompts(texts(50), seed, validation, 10) for validation in range(1, 40)]
    for smaller, larger in pairwise(drawn):
        assert larger["test"] == smaller["test"]
        assert larger["validation"][:-1] == smaller["validation"]
        assert larger["train"] == smaller["train"][1:]


def test_classes_are_in_every_split_in_their_order() -> None:
    given = list("0123456789")
    splits = split_prompts(given, 0, None, None)
    assert splits == dict.fromkeys(SPLITS, given)
    splits["train"].clear()
    assert splits["test"] == given == list("0123456789")


def test_too_few_prompts_to_split() -> None:
    assert split_prompts(texts(10), 0, 4, 5)["train"]
    with pytest.raises(
        InputError, match="prompts: found 9; valid: 10 or more, 5 for test, 4 for validation and one to learn from"
    ):
        split_prompts(texts(9), 0, 4, 5)


@pytest.mark.parametrize(("validation", "test"), [(None, 1), (1, None), (0, 1), (1, 0), (-1, 5)])
def test_numbers_that_split_nothing(validation: int | None, test: int | None) -> None:
    found = f"prompts: found validation {validation} and test {test}; valid: both None, or both 1 or more"
    with pytest.raises(ValueError, match=found):
        split_prompts(texts(10), 0, validation, test)


def test_repeated_prompts_are_not_split() -> None:
    with pytest.raises(ValueError, match="prompts: found 2 of them again; valid: distinct ones"):
        split_prompts([*texts(10), *texts(2)], 0, 1, 1)


@pytest.fixture
def prompts() -> Prompts:
    return Prompts({"train": texts(7), "validation": QUOTED, "test": ["one"]}, "blurry, 猫")


@pytest.mark.parametrize("seed", range(5))
def test_a_samples_prompt_depends_on_its_number_alone(seed: int, prompts: Prompts) -> None:
    samples = random.Random(seed).sample(range(2**40), 50) + list(range(20))
    for split, length in {"train": 7, "validation": 5, "test": 1}.items():
        cycle = prompts(split, range(length))
        assert prompts(split, samples) == [cycle[sample % length] for sample in samples]
        assert [prompts(split, [sample])[0] for sample in reversed(samples)] == prompts(split, samples)[::-1]
    assert prompts("train", range(7)) == texts(7)
    assert prompts("train", iter([])) == []


def test_saved_prompts_are_loaded_as_they_were(prompts: Prompts, tmp_path: Path) -> None:
    file = tmp_path / "data/prompts.json"
    prompts.save(file)
    loaded = Prompts.load(file)
    assert loaded.negative == prompts.negative
    for split in SPLITS:
        assert loaded(split, range(20)) == prompts(split, range(20))
    written = file.read_bytes()
    loaded.save(file)
    assert file.read_bytes() == written
    assert json.loads(written) == {
        "negative": "blurry, 猫",
        "splits": {"train": texts(7), "validation": QUOTED, "test": ["one"]},
    }


def test_a_split_that_is_not_there(prompts: Prompts) -> None:
    with pytest.raises(ValueError, match="split: found 'tset'; valid: train, validation, test"):
        prompts("tset", [0])


@pytest.mark.parametrize("splits", [{}, {"train": []}, {"train": ["a"], "test": []}])
def test_splits_without_prompts(splits: dict[str, list[str]], write: Write) -> None:
    message = re.escape(
        f"prompts: found { {split: len(of) for split, of in splits.items()} }; valid: one or more in every split"
    )
    with pytest.raises(ValueError, match=message):
        Prompts(splits, "")
    with pytest.raises(ValueError, match=message):
        Prompts.load(write("prompts.json", json.dumps({"negative": "", "splits": splits})))


VALID: dict[str, Any] = {"negative": "", "splits": {"test": ["a"]}}


@pytest.mark.parametrize(
    "value",
    [
        *[1, [], {}, ["a"], {"splits": VALID["splits"]}, {"negative": ""}, VALID | {"more": 1}, VALID | {"negative": None}],
        *[VALID | {"splits": splits} for splits in (["a"], {"test": "a"}, {"test": [1]}, {"test": {"0": "a"}}, {"test": None})],
    ],
)
def test_files_that_are_not_saved_prompts(value: Any, write: Write) -> None:
    file = write("prompts.json", json.dumps(value))
    with pytest.raises(ValueError, match=re.escape(f"{file}: found another form; valid: ")):
        Prompts.load(file)


@pytest.mark.parametrize("content", ["", "{", '{"negative": "", "splits": {"a": ["b"], "a": ["c"]}}', "[" * 100_000, b"\xff"])
def test_files_that_are_no_json(content: str | bytes, write: Write) -> None:
    file = write("prompts.json", content)
    with pytest.raises(ValueError, match=r"found broken JSON|utf-8"):
        Prompts.load(file)


def test_no_file_of_prompts(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Prompts.load(tmp_path / "prompts.json")
