import hashlib
import os
import warnings
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of their own imports
    import datasets
    from datasets import Dataset, DatasetDict, Features, Value
    from datasets import Image as Images

    from metrics.images import cropped

from stages.files import InputError
from stages.imagesets import ImageSet, batches, digest, image_set, rule

PATHS = ["a.png", "b/a.png", "b/c/a.png", "b/d.png", "c.png", "d.png", "e.png"]
"""By their order."""

CORES = len(os.sched_getaffinity(0))


def encoded(image: Tensor, kind: str = "PNG") -> bytes:
    """uint8 (3, H, W) -> a file."""
    file = BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, kind)
    return file.getvalue()


def pictures(count: int = len(PATHS), height: int = 12, width: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def put(file: Path, contents: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(contents)


def zipped(folder: Path, compression: int = zipfile.ZIP_STORED) -> Path:
    """In no order."""
    file = folder.with_suffix(".zip")
    with zipfile.ZipFile(file, "w", compression) as opened:
        for path in sorted(folder.rglob("*"), key=lambda path: hashlib.sha256(path.name.encode()).digest()):
            opened.write(path, path.relative_to(folder).as_posix())
    return file


def saved(folder: Path, files: list[bytes]) -> Path:
    rows = Dataset.from_dict(
        {"picture": [{"bytes": file, "path": None} for file in files], "text": ["" for _ in files]},
        features=Features({"picture": Images(), "text": Value("string")}),
    )
    rows.save_to_disk(folder)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for path, image in zip(PATHS, pictures(), strict=True):
        put(tmp_path / "set" / path, encoded(image))
    put(tmp_path / "set/b/notes.txt", b"no image")
    put(tmp_path / "set/b/._d.png", b"what macOS writes")
    return tmp_path / "set"


def read(images: ImageSet, batch_size: int = 3, workers: int = 0) -> Tensor:
    return torch.cat(list(batches(images, batch_size, workers=workers)))


def test_every_kind_gives_the_same_images(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sets = [
        image_set("folder", str(folder), None),
        image_set("zip", str(zipped(folder)), None),
        image_set("zip", str(zipped(folder, zipfile.ZIP_DEFLATED)), None),
        image_set("dataset", str(saved(tmp_path / "rows", [(folder / path).read_bytes() for path in PATHS])), None),
    ]
    for images in sets:
        assert len(images) == len(PATHS)
        found = read(images)
        assert found.dtype == torch.uint8
        assert torch.equal(found, pictures())
    assert sets[0].source.names == PATHS


@pytest.mark.parametrize("kind", ["folder", "zip", "dataset"])
def test_batches_are_independent_of_their_size_and_workers(
    folder: Path, tmp_path: Path, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers after a read by this process, whose zip file's position they must not share."""
    rows = saved(tmp_path / "rows", [(folder / path).read_bytes() for path in PATHS])
    images = image_set(kind, str({"folder": folder, "zip": zipped(folder), "dataset": rows}[kind]), None)
    for size in (1, 2, 100):
        found = list(batches(images, size))
        assert [len(batch) for batch in found] == [len(part) for part in pictures().split(size)]
        assert torch.equal(torch.cat(found), pictures())
    assert torch.equal(read(images, 2, workers=min(2, CORES)), pictures())
    assert [len(batch) for batch in batches(images, 2, part=range(1, 6))] == [2, 2, 1]
    assert torch.equal(torch.cat(list(batches(images, 2, part=range(1, 6)))), pictures()[1:6])
    monkeypatch.setattr("stages.imagesets.FEW", 1)
    assert torch.equal(torch.cat(list(batches(images, 2))), pictures())


@pytest.mark.parametrize("shape", [(12, 9), (9, 12), (40, 33), (16, 16), (5, 7)])
def test_images_are_resized_as_pil_does(tmp_path: Path, shape: tuple[int, int]) -> None:
    images = pictures(3, *shape)
    for index, image in enumerate(images):
        put(tmp_path / f"{index}.png", encoded(image))
    found = read(image_set("folder", str(tmp_path), 16))
    assert found.shape == (3, 3, 16, 16)
    assert torch.equal(found.double(), cropped(images, 16))


def test_the_rule_is_told() -> None:
    assert rule(None) == "as they are"
    assert rule(256) == "shorter side to 256 pixels by PIL's bicubic, centre"


def test_sizes_that_differ_are_told(folder: Path) -> None:
    put(folder / "d.png", encoded(pictures(1, 12, 10)[0]))
    images = image_set("folder", str(folder), None)
    message = r"set: a\.png has 9 x 12 pixels, d\.png 10 x 12; valid: images of one size, or a size to resize them to"
    with pytest.raises(InputError, match=message):
        read(images)
    with pytest.raises(InputError, match=message):
        _ = images[5]
    assert read(image_set("folder", str(folder), 8)).shape == (7, 3, 8, 8)


@pytest.mark.parametrize(
    ("name", "kind", "tolerance"),
    [("x.PNG", "PNG", 0), ("x.bmp", "BMP", 0), ("x.webp", "WEBP", 60), ("x.jpg", "JPEG", 60), ("x.JPEG", "JPEG", 60)],
)
def test_these_files_are_images(tmp_path: Path, name: str, kind: str, tolerance: int) -> None:
    image = torch.arange(0, 240, 15, dtype=torch.uint8).expand(3, 16, 16)  # a ramp, which compression changes little
    put(tmp_path / name, encoded(image, kind))
    found = image_set("folder", str(tmp_path), None)[0]
    assert (found.int() - image.int()).abs().max() <= tolerance


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_every_mode_becomes_three_channels(tmp_path: Path, mode: str) -> None:
    """Without its transparency: the colours beneath are what torch-fidelity sees."""
    image = Image.fromarray(pictures(1)[0].permute(1, 2, 0).numpy()).convert(mode)
    options: dict[str, Any] = {"transparency": bytes(range(256))} if mode == "P" else {}
    file = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    image.save(file, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's, of palettes with transparency
        expected = np.asarray(Image.open(file).convert("RGB"))
    assert np.array_equal(image_set("folder", str(tmp_path), None)[0].permute(1, 2, 0).numpy(), expected)


def test_more_than_eight_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(tmp_path / "x.png")
    with pytest.raises(InputError, match=r"x\.png: found no image that can be read \(mode I;16, of more than 8 bits\)"):
        _ = image_set("folder", str(tmp_path), None)[0]


def gif() -> bytes:
    return encoded(pictures(1)[0], "GIF")


def broken() -> bytes:
    whole = encoded(pictures(1)[0])
    return whole[:60] + bytes(20) + whole[80:]


@pytest.mark.parametrize("contents", [lambda: b"", lambda: b"no image", lambda: encoded(pictures(1)[0])[:-60], broken, gif])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_is_no_image_is_named(folder: Path, contents: Callable[[], bytes], workers: int) -> None:
    put(folder / "c.png", contents())
    for source in (image_set("folder", str(folder), None), image_set("zip", str(zipped(folder)), None)):
        with pytest.raises(InputError, match=r"^[^\n]*set(\.zip)?: c\.png: found no image that can be read"):
            read(source, workers=workers)


def test_too_large_an_image_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(InputError, match=r"a\.png: found no image that can be read \(Image size \(108 pixels\) exceeds"):
        _ = image_set("folder", str(folder), None)[0]


@pytest.mark.parametrize("kind", ["folder", "zip", "dataset"])
def test_a_limit_takes_the_first(folder: Path, tmp_path: Path, kind: Any) -> None:
    rows = saved(tmp_path / "rows", [(folder / path).read_bytes() for path in PATHS])
    place = str({"folder": folder, "zip": zipped(folder), "dataset": rows}[kind])
    first = image_set(kind, place, None, limit=3)
    assert torch.equal(read(first), pictures()[:3])
    assert digest(first) != digest(image_set(kind, place, None))
    with pytest.raises(InputError, match="found 7 images; valid: at least the 8 asked for"):
        image_set(kind, place, None, limit=8)


def test_the_digest_is_sha256sums(folder: Path) -> None:
    lines = [f"{hashlib.sha256((folder / path).read_bytes()).hexdigest()}  {path}\n" for path in PATHS]
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert digest(image_set("folder", str(folder), None)) == expected
    assert digest(image_set("zip", str(zipped(folder)), None)) == expected
    (folder / "a.png").rename(folder / "a0.png")
    assert digest(image_set("folder", str(folder), None)) != expected
    (folder / "a0.png").rename(folder / "a.png")
    put(folder / "a.png", encoded(pictures(1)[0].flip(0)))
    assert digest(image_set("folder", str(folder), None)) != expected


def test_the_digest_of_a_data_set_is_its_contents(folder: Path, tmp_path: Path) -> None:
    files = [(folder / path).read_bytes() for path in PATHS]
    one, same, other = (saved(tmp_path / name, each) for name, each in (("1", files), ("2", files), ("3", files[::-1])))
    found = [digest(image_set("dataset", str(rows), None)) for rows in (one, same, other)]
    assert found[0] == found[1] != found[2]


def test_nothing_there_is_told(tmp_path: Path) -> None:
    for kind, message in (("zip", "missing; valid: a zip file"), ("folder", "missing, or no folder; valid: a folder")):
        with pytest.raises(InputError, match=f"nowhere: {message}"):
            image_set(kind, str(tmp_path / "nowhere"), None)  # type: ignore[arg-type]
    (tmp_path / "set").mkdir()
    for kind, place in (("folder", tmp_path / "set"), ("zip", zipped(tmp_path / "set"))):
        with pytest.raises(InputError, match=r"found no images; valid: at least one of \.png, \.jpg"):
            image_set(kind, str(place), None)  # type: ignore[arg-type]


def test_a_damaged_zip_is_told(folder: Path) -> None:
    file = zipped(folder)
    whole = file.read_bytes()
    for contents in (b"", whole[: len(whole) // 2], b"PK" + bytes(100)):
        file.write_bytes(contents)
        with pytest.raises(InputError, match=r"set\.zip: .*; valid: a zip file of images"):
            image_set("zip", str(file), None)
    start = whole.index(encoded(pictures()[2])) + 100
    file.write_bytes(whole[:start] + bytes(5) + whole[start + 5 :])
    images = image_set("zip", str(file), None)
    with pytest.raises(InputError, match=r"set\.zip: b/c/a\.png: found no image that can be read \(Bad CRC"):
        read(images)
    with pytest.raises(InputError, match=r"set\.zip: b/c/a\.png: cannot be read \(Bad CRC"):
        digest(images)


def test_splits_and_columns_are_told(folder: Path, tmp_path: Path) -> None:
    rows = Dataset.load_from_disk(str(saved(tmp_path / "rows", [(folder / path).read_bytes() for path in PATHS])))
    two = rows.map(lambda row: {"mask": row["picture"]}, features=Features({**rows.features, "mask": Images()}))
    DatasetDict({"train": rows, "test": two}).save_to_disk(tmp_path / "splits")
    place = str(tmp_path / "splits")
    assert torch.equal(read(image_set("dataset", place, None, split="train")), pictures())
    assert torch.equal(read(image_set("dataset", place, None, split="test", column="mask")), pictures())
    told: list[tuple[dict[str, Any], str]] = [
        ({}, "splits: found split None; valid: train, test"),
        ({"split": "validation"}, "splits: found split 'validation'; valid: train, test"),
        ({"split": "test"}, "splits: found column of images None; valid: picture, mask"),
        ({"split": "train", "column": "text"}, "splits: found column of images 'text'; valid: picture$"),
    ]
    for options, message in told:
        with pytest.raises(InputError, match=message):
            image_set("dataset", place, None, **options)
    with pytest.raises(InputError, match="found split 'train'; valid: none"):
        image_set("dataset", str(tmp_path / "rows"), None, split="train")


def test_what_is_no_data_set_is_told(folder: Path) -> None:
    with pytest.raises(InputError, match=r"set: .* valid: what save_to_disk writes"):
        image_set("dataset", str(folder), None)


@pytest.mark.parametrize("revision", [None, "main", "0" * 39])
def test_a_data_set_on_the_hub_is_pinned(revision: str | None) -> None:
    with pytest.raises(InputError, match=r"someone/photos: found no such folder, and revision .*; valid: .* 40 hexadecimal"):
        image_set("dataset", "someone/photos", None, revision=revision)


def test_a_data_set_on_the_hub_is_asked_for(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Dataset.load_from_disk(str(saved(tmp_path / "rows", [(folder / path).read_bytes() for path in PATHS])))
    asked: list[Any] = []

    def load_dataset(*arguments: object, **options: object) -> Dataset | DatasetDict:
        asked.append((arguments, options))
        return rows if options["split"] else DatasetDict({"test": rows})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for split in ("test", None):
        images = image_set("dataset", "someone/photos", None, revision="a" * 40, split=split)
        assert asked.pop() == (("someone/photos",), {"revision": "a" * 40, "split": split})
        assert torch.equal(read(images), pictures())
    assert images.source.place == f"someone/photos at {'a' * 40}"


def test_a_row_without_an_image_is_told(folder: Path, tmp_path: Path) -> None:
    rows = Dataset.from_dict({"picture": [str(folder / "a.png"), None]}, features=Features({"picture": Images()}))
    rows.save_to_disk(tmp_path / "rows")
    images = image_set("dataset", str(tmp_path / "rows"), None)
    assert torch.equal(images[0], pictures()[0])
    with pytest.raises(InputError, match=r"rows: picture 1: found no image that can be read \(nothing\)"):
        _ = images[1]
