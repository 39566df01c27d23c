"""What a model is asked for: prompts as files hold them, their splits, and which sample has which prompt."""

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from stages.files import InputError, write_json
from stages.noise import SPLITS
from stages.seeds import short
from stages.training import rng

COLUMNS = ("text", "texts", "prompt", "prompts", "caption", "captions")
FILES = "a .txt, .csv, .tsv or .json file of prompts, or a folder of such files"
JSON = 'a list of prompts, {style: [prompt, ...]}, or {"annotations": [{"image_id", "id", "caption"}, ...]}'
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f\ud800-\udfff]")  # and halves of characters, which no encoding has


def read_prompts(path: Path) -> list[str]:
    """Distinct prompts of a file, in its order; of a folder: of all its files in the order of their names.

    Files are UTF-8: lines (.txt), a table with a column text, prompt or caption (.csv, .tsv), or JSON: a list, lists by style,
    or MS-COCO's captions, one for each image, since captions of one image must not get into different splits. White space
    around prompts is taken off. Hidden files and folders inside of a folder are left alone.

    Raises:
        InputError: the file is missing, has no prompts, is not of such a form, or has control characters.
    """
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if not file.is_dir() and not file.name.startswith("."))
    if not files:
        raise InputError(f"{path}: found a folder without files; valid: {FILES}")
    return list(dict.fromkeys(prompt for file in files for prompt in _of_file(file)))


def split_prompts(texts: Sequence[str], seed: int, validation: int | None, test: int | None) -> dict[str, list[str]]:
    """Disjoint prompts to learn from, to choose by and to report on, drawn by seed.

    Args:
        texts: distinct prompts.
        seed: of the drawing; nothing else than it and the prompts decides.
        validation: prompts to choose by. How many there are leaves those to report on as they are.
        test: prompts to report on. Where both are None every split has all prompts in their order, as classes do.

    Raises:
        InputError: there are too few prompts to leave one to learn from.
        ValueError: only one of the numbers is None, one is below 1, or a prompt is there twice.
    """
    if validation is None and test is None:
        return {split: list(texts) for split in SPLITS}
    if validation is None or test is None or min(validation, test) < 1:
        raise ValueError(f"prompts: found validation {validation} and test {test}; valid: both None, or both 1 or more")
    if again := len(texts) - len(set(texts)):
        raise ValueError(f"prompts: found {again} of them again; valid: distinct ones")
    if len(texts) < validation + test + 1:
        needed = f"{validation + test + 1} or more, {test} for test, {validation} for validation and one to learn from"
        raise InputError(f"prompts: found {len(texts)}; valid: {needed}")
    order: list[int] = rng(seed, "prompts").permutation(len(texts)).tolist()
    drawn = [texts[index] for index in order]
    return {"train": drawn[test + validation :], "validation": drawn[test : test + validation], "test": drawn[:test]}


class Prompts:
    """What a model is asked for, sample by sample: written by one stage, read by all others.

    Attributes:
        negative: what all samples are guided away from.
    """

    def __init__(self, splits: dict[str, list[str]], negative: str) -> None:
        if not splits or not all(splits.values()):
            counts = {split: len(texts) for split, texts in splits.items()}
            raise ValueError(f"prompts: found {counts}; valid: one or more in every split")
        self.negative = negative
        self._splits = splits

    @classmethod
    def load(cls, file: Path) -> "Prompts":
        """ValueError where the file is not what `save` writes."""
        match _parsed(file, file.read_text(encoding="utf-8")):
            case {"negative": str(negative), "splits": dict(splits), **more} if not more and _are_texts(*splits.values()):
                return cls(splits, negative)
        raise ValueError(f'{file}: found another form; valid: {{"negative": text, "splits": {{split: [prompt, ...]}}}}')

    @property
    def counts(self) -> dict[str, int]:
        """How many there are in each split."""
        return {split: len(texts) for split, texts in self._splits.items()}

    def save(self, file: Path) -> None:
        write_json(file, {"negative": self.negative, "splits": self._splits})

    def __call__(self, split: str, samples: Iterable[int]) -> list[str]:
        """The prompt of sample i is the (i mod n)-th of the n of its split."""
        if split not in self._splits:
            raise ValueError(f"split: found {split!r}; valid: {', '.join(self._splits)}")
        texts = self._splits[split]
        return [texts[sample % len(texts)] for sample in samples]


def _of_file(file: Path) -> list[str]:
    """One file's prompts without white space around them, none of them empty."""
    if not file.exists():
        raise InputError(f"{file}: missing; valid: {FILES}: put it there, or name another")
    if file.suffix.lower() not in READERS:
        raise InputError(f"{file}: found suffix {file.suffix!r}; valid: {', '.join(READERS)}")
    prompts = [text.strip() for text in READERS[file.suffix.lower()](file) if text.strip()]
    if not prompts:
        raise InputError(f"{file}: found no prompts; valid: one or more")
    for prompt in prompts:
        if found := CONTROL.search(prompt):
            raise InputError(f"{file}: found {found[0]!r} in {short(prompt)}; valid: prompts without control characters")
    return prompts


def _text(file: Path) -> str:
    """A file's text, with or without a byte order mark, each of its lines ended by a line feed."""
    data = file.read_bytes().removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{file}: line {line}: found byte {data[error.start]:#04x}; valid: UTF-8") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _of_table(file: Path) -> list[str]:
    """The fields of the first of COLUMNS that the header has."""
    rows = _rows(file, "\t" if file.suffix.lower() == ".tsv" else ",")
    header = [name.strip().lower() for name in rows[0][1]] if rows else list(COLUMNS)
    column = next((header.index(name) for name in COLUMNS if name in header), None)
    if column is None:
        raise InputError(f"{file}: found columns {short(header)}; valid: one of {', '.join(COLUMNS)}")
    for line, row in rows:
        # more fields than names: a prompt with a comma and no quotes, of which only the beginning would be read
        if len(row) <= column or any(row[len(header) :]):
            valid = f"{column + 1} to {len(header)}, a field with commas or line breaks in quotes"
            raise InputError(f"{file}: line {line}: found {len(row)} fields; valid: {valid}")
    return [row[column] for _, row in rows[1:]]


def _rows(file: Path, delimiter: str) -> list[tuple[int, list[str]]]:
    """The rows that are not blank, each with the number of its last line."""
    csv.field_size_limit(2**31 - 1)  # by default 2**17
    text = _text(file)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        return [(reader.line_num, row) for row in reader if any(map(str.strip, row))]
    except csv.Error as error:
        if delimiter == "\t":  # nothing is quoted: a prompt of PartiPrompts begins with a quote of its own
            rows = enumerate((line.split("\t") for line in text.split("\n")), 1)
            return [(number, row) for number, row in rows if any(map(str.strip, row))]
        raise InputError(f"{file}: line {reader.line_num}: found broken quotes ({error}); valid: as in RFC 4180") from error


def _of_json(file: Path) -> list[str]:
    try:
        value = _parsed(file, _text(file))
    except ValueError as error:
        raise InputError(f"{error}; valid: {JSON}") from error
    match value:
        case {"annotations": list(annotations)}:
            return _captions(file, annotations)
        case list() if _are_texts(value):
            return value
        case dict() if _are_texts(*value.values()):
            return [text for texts in value.values() for text in texts]
    raise InputError(f"{file}: found {short(value)}; valid: {JSON}")


def _captions(file: Path, annotations: list[Any]) -> list[str]:
    """For each image, in the order of their first captions in the file, the caption of the lowest id."""
    chosen: dict[int | str, tuple[int, str]] = {}
    for annotation in annotations:
        match annotation:
            case {"image_id": int(image) | str(image), "id": int(number), "caption": str(caption)}:
                chosen[image] = min(chosen.get(image, (number, caption)), (number, caption))
            case _:
                raise InputError(f"{file}: found annotation {short(annotation)}; valid: {JSON}")
    return [caption for _, caption in chosen.values()]


def _parsed(file: Path, text: str) -> Any:
    """The value of JSON; ValueError where it is broken, too deep, or an object has a key twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"a key twice among {short([key for key, _ in pairs])}")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: found broken JSON ({error})") from error


def _are_texts(*values: object) -> bool:
    return all(isinstance(value, list) and all(isinstance(text, str) for text in value) for value in values)


READERS: dict[str, Callable[[Path], list[str]]] = {
    ".txt": lambda file: _text(file).split("\n"),  # splitlines would split at rarer characters as well
    ".csv": _of_table,
    ".tsv": _of_table,
    ".json": _of_json,
}
