"""A model's files: which of them are needed, whether they are whole, and where they may come from; a folder for one."""

import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Protocol

from huggingface_hub import constants
from safetensors import SafetensorError, safe_open

from stages.command import progress
from stages.files import StageError, atomic
from stages.scrub import SHORTEST_SECRET, scrubbed

DOWNLOADS = Path("data/downloads")
"""Parts of files from S3, and what the hub said of revisions; no output."""

WEIGHTLESS = ("scheduler", "tokenizer", "feature_extractor")
PLAIN = (".json", ".txt", ".model")
STEM, SHARD, VARIANT = r"(?:model|diffusion_pytorch_model)", r"(?:-\d{5}-of-\d{5})?", r"(?:\.([^.]+?))?"
WEIGHTS = re.compile(STEM + VARIANT + SHARD + VARIANT + r"\.safetensors")
INDEX = re.compile(STEM + r"\.safetensors\.index" + VARIANT + r"\.json")


ONE_FILE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "hps": (("HPS_v2.1_compressed.pt",), ("open_clip_config.json",)),
    "image_reward": (("ImageReward.pt", "med_config.json"), ()),
    "aesthetic": (("sac+logos+ava1-l14-linearMSE.pth",), ()),
    "mps": (("MPS_overall_checkpoint.pth",), ()),
    "inception": (("weights-inception-2015-12-05-6726825d.pth",), ()),
}
"""Metrics' models that are not published in transformers' layout: files that are needed, and that may be there."""

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
WEIGHTLESS_MODELS = {
    "bert": ("config.json", "vocab.txt", *TOKENIZER),
    "clip_h14": ("config.json", "vocab.json", "merges.txt", *TOKENIZER),
}
"""Models that only a tokenizer and a configuration are taken of."""

LARGE = (".safetensors", ".pt", ".pth")


class FetchError(StageError):
    """What is wrong with a model's files, or with the way to them: one line without credentials."""

    def __init__(self, message: str) -> None:
        for token in filter(lambda token: len(token) >= SHORTEST_SECRET, _tokens()):
            message = message.replace(token, "[HF_TOKEN]")
        super().__init__(scrubbed(message))


def _tokens() -> Iterator[str]:
    """Those that the client may send."""
    yield from (os.environ.get(name, "").strip() for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))
    with suppress(OSError, ValueError):
        yield Path(constants.HF_TOKEN_PATH).read_text(encoding="utf-8").strip()


class Origin(Protocol):
    """Where a model's files come from; `place` names it in messages.

    Raises:
        FetchError: whatever is wrong, but for a full disk.
    """

    place: str

    def files(self) -> dict[str, int]:
        """Every file's size in bytes, by its path."""
        ...

    def get(self, paths: Sequence[str], folder: Path) -> None:
        """Put these files, whole and verified, into a folder, at the same paths."""
        ...


def pipeline_files(files: Collection[str], components: Sequence[str], variant: str | None, place: str) -> list[str]:
    """What a diffusers pipeline of these components reads, of one variant of the weights; FetchError if something lacks."""
    if "model_index.json" not in files:
        raise FetchError(f"{place}: found no model_index.json among {shown(files)}; valid: a pipeline in diffusers' layout")
    folders = sorted({path.split("/")[0] for path in files if "/" in path})
    if lacking := [component for component in components if component not in folders]:
        raise FetchError(f"{place}: found no {', '.join(lacking)} but {shown(folders)}; valid: {', '.join(components)}")
    return sorted({"model_index.json", *(path for component in components for path in _of(files, component, variant, place))})


def model_files(files: Collection[str], variant: str | None, place: str) -> list[str]:
    """What a transformers model at the top level reads, of one variant of its weights; FetchError if something lacks."""
    if "config.json" not in files:
        raise FetchError(f"{place}: found no config.json among {shown(files)}; valid: a model in transformers' layout")
    return sorted(_of(files, "", variant, place))


def metric_files(model: str, files: Collection[str], variant: str | None, place: str) -> list[str]:
    """What a model of a metric reads, of those that there are; FetchError if something lacks."""
    if model in ONE_FILE:
        needed, possible = ONE_FILE[model]
        if lacking := [name for name in needed if name not in files]:
            raise FetchError(f"{place}: found no {', '.join(lacking)} among {shown(files)}; valid: {model}'s as published")
        return sorted([*needed, *(name for name in possible if name in files)])
    if model in WEIGHTLESS_MODELS:
        chosen = sorted(name for name in files if "/" not in name and name in WEIGHTLESS_MODELS[model])
        if not any(name in chosen for name in ("tokenizer.json", "vocab.json", "vocab.txt")):
            raise FetchError(f"{place}: found no tokenizer among {shown(files)}; valid: {', '.join(WEIGHTLESS_MODELS[model])}")
        return chosen
    return model_files(files, variant, place)


def _of(files: Collection[str], component: str, variant: str | None, place: str) -> list[str]:
    """A component's files: those that are not weights, and the weights unless it has none."""
    prefix = f"{component}/" if component else ""
    names = sorted(path.removeprefix(prefix) for path in files if path.rpartition("/")[0] == component)
    chosen = [name for name in names if name.endswith(PLAIN) and ".index." not in name]
    if not component.startswith(WEIGHTLESS):
        variants = _variants(WEIGHTS, names)
        if variant not in variants.values():
            raise FetchError(f"{place}: {_without_weights(component or 'the model', names, set(variants.values()), variant)}")
        chosen += [name for name, of in (variants | _variants(INDEX, names)).items() if of == variant]
    return [prefix + name for name in chosen]


def _variants(pattern: re.Pattern[str], names: Sequence[str]) -> dict[str, str | None]:
    """Of the names that a pattern matches; None for those without."""
    return {name: ".".join(filter(None, found.groups())) or None for name in names if (found := pattern.fullmatch(name))}


def _without_weights(component: str, names: Sequence[str], variants: Collection[str | None], variant: str | None) -> str:
    if variants:
        others = ", ".join(sorted(str(found or "null, for none") for found in variants))
        return f"{component}: found no weights of variant {variant or 'null'}; valid: {others}"
    if pickles := [name for name in names if name.endswith((".bin", ".ckpt", ".pt", ".pth"))]:
        return (
            f"{component}: found {', '.join(pickles)} and no safetensors: pickles are refused, since reading one can execute "
            "code; valid: a repository or a revision with *.safetensors"
        )
    return f"{component}: found no weights among {shown(names)}; valid: (diffusion_pytorch_)model*.safetensors"


def shown(names: Collection[str]) -> str:
    """Some names for a message."""
    first = sorted(names)[:20]
    return ", ".join(first) + (f" and {len(names) - len(first)} more" if len(names) > len(first) else "") or "nothing"


def checksums(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file in a folder, by its path."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {path: digest(files[path], "sha256") for path in sorted(files)}


def check_weights(folder: Path) -> None:
    """Raise FetchError unless every safetensors file is as long as its header says, no index names a missing shard, and torch's
    files have their ends, where they say what is in them. Pickles are not read.
    """
    for file in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError, ValueError) as error:
            raise FetchError(f"{file}: found {file.stat().st_size} bytes, damaged ({error}); valid: safetensors") from None
    for file in sorted([*folder.rglob("*.pt"), *folder.rglob("*.pth")]):
        with file.open("rb") as opened:
            start = opened.read(4)
        if not start.startswith((b"PK\x03\x04", b"\x80")) or (start[:2] == b"PK" and not zipfile.is_zipfile(file)):
            raise FetchError(f"{file}: found {file.stat().st_size} bytes, damaged; valid: what torch.save writes")
    for file in sorted(folder.rglob("*.safetensors.index*.json")):
        try:
            shards = set(json.loads(file.read_bytes())["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FetchError(f"{file}: found no index ({error!r}); valid: JSON with a weight_map") from None
        if lacking := sorted(str(shard) for shard in shards if not (file.parent / str(shard)).is_file()):
            raise FetchError(f"{file}: found no {', '.join(lacking)} beside it; valid: every shard that it names")


class Folder:
    """A folder on this machine; links in it are followed."""

    def __init__(self, root: Path) -> None:
        self.place = str(root)
        self._root = root

    def files(self) -> dict[str, int]:
        if not self._root.is_dir():
            what = "a file" if self._root.exists() else "nothing"
            raise FetchError(f"{self.place}: found {what}; valid: a folder with a model's files, hub, or s3://BUCKET/PREFIX")
        found: dict[str, int] = {}
        for folder, folders, names in os.walk(self._root, followlinks=True):
            here = Path(folder)
            folders[:] = [name for name in folders if not here.resolve().is_relative_to((here / name).resolve())]  # no circles
            for file in (here / name for name in names):
                if not file.exists():
                    raise FetchError(f"{file}: found a link to {file.readlink()}, which is not there; valid: files")
                found[file.relative_to(self._root).as_posix()] = file.stat().st_size
        return found

    def get(self, paths: Sequence[str], folder: Path) -> None:
        targets = {path: target_of(folder, path) for path in paths}
        for path in progress(paths, f"from {self.place}", "file"):
            if not (self._root / path).is_file():
                raise FetchError(f"{self._root / path}: found no file; valid: {shown(self.files())}")
            put(self._root / path, targets[path], link=False)  # what is written there later must not change these


def target_of(folder: Path, path: str) -> Path:
    """Where a file belongs; FetchError if that is outside the folder."""
    parts = PurePosixPath(path).parts
    if not parts or ".." in parts or parts[0] == "/":
        raise FetchError(f"{folder}: found the path {path!r} for a file; valid: ones inside the folder")
    return folder / path


def put(source: Path, target: Path, link: bool) -> None:
    """A file at another path, too: the same one if it may be and the file system can, else a copy."""
    with atomic(target) as temporary:
        if link:
            with suppress(OSError):  # another file system, or one without links
                os.link(source.resolve(), temporary)
                return
        try:
            shutil.copyfile(source, temporary)
        except PermissionError as error:
            raise FetchError(f"{error.filename}: {error.strerror}; valid: a file that may be read") from None


def short(text: str) -> str:
    """Enough of a text's SHA-256 to name a file by."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_like(file: Path, like: str) -> str:
    """A file's SHA-256, or git's hash of it, whichever the other one is."""
    return digest(file, "sha256") if len(like) == 64 else digest(file, "sha1", f"blob {file.stat().st_size}\0".encode())


def digest(file: Path, algorithm: str, before: bytes = b"") -> str:
    """Of bytes and a file's contents, read in pieces."""
    digest = hashlib.new(algorithm, before, usedforsecurity=False)
    with file.open("rb") as handle:
        while block := handle.read(2**22):
            digest.update(block)
    return digest.hexdigest()
