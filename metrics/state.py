"""Weights of frozen models: read without executing anything, and loaded whole or not at all."""

import errno
import json
import pickle
import struct
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

SHOWN = 5

DAMAGED = (
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    RuntimeError,
    AssertionError,  # this and the next: torch's, of its format before 1.6
    struct.error,
    SafetensorError,
    StrictDataclassError,
)
"""What readers raise."""


def read_state(file: Path, key: str | None = None) -> dict[str, Tensor]:
    """A file's tensors by name: safetensors, or what torch.save made of a dictionary of tensors (`key`: of one under that key).

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is damaged, holds something else, or a pickle of anything but plain data, which is not executed.
    """
    require(file)
    with reading(file):
        if file.suffix == ".safetensors":
            return load_file(file)
        found: Any = torch.load(file, map_location="cpu", weights_only=True)
        if key is not None:
            if not isinstance(found, Mapping) or key not in found:
                raise ValueError(f"found no {key!r}; valid: a checkpoint that has it")
            found = found[key]
        if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
            raise ValueError(f"found a {type(found).__name__} that is no dictionary of tensors; valid: a state dict")
        return dict(found)


def load_exactly(module: nn.Module, state: Mapping[str, Tensor], file: Path, ignored: Collection[str] = ()) -> None:
    """Load all of a module's weights; `ignored` may be there, and have no place.

    Raises:
        ValueError: names what is missing, unexpected, or of another shape.
    """
    own = module.state_dict()
    given = {name: value for name, value in state.items() if name not in ignored or name in own}
    shapes = {name: (tuple(given[name].shape), tuple(own[name].shape)) for name in own.keys() & given.keys()}
    wrong = {
        "missing": [name for name in own if name not in given],
        "unexpected": [name for name in given if name not in own],
        "other shapes": [
            f"{name} {found}, not {wanted}" for name, (found, wanted) in sorted(shapes.items()) if found != wanted
        ],
    }
    if any(wrong.values()):
        told = "; ".join(f"{what}: {shown(names)}" for what, names in wrong.items() if names)
        raise ValueError(f"{file}: {told}; valid: exactly the weights of {type(module).__name__}")
    module.load_state_dict(given)


def cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Have a module's weights in a dtype; not its buffers, and not its single numbers, by which scores are scaled."""
    for weight in module.parameters():
        if weight.ndim:
            weight.data = weight.data.to(dtype)


def require(file: Path, valid: str = "a file") -> None:
    """Raise FileNotFoundError, with the file's name, unless it is there."""
    if not file.is_file():
        raise FileNotFoundError(errno.ENOENT, f"missing; valid: {valid}", str(file))


def check_tokenizer(folder: Path) -> None:
    """Raise ValueError unless a tokenizer's files are text, and JSON where they say so: tokenizers raises a bare Exception."""
    for name in ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt"):
        file = folder / name
        if file.is_file():
            with reading(file):
                text = file.read_text(encoding="utf-8")
                if file.suffix == ".json" and not isinstance(json.loads(text), dict):
                    raise ValueError("found no dictionary; valid: a tokenizer's file")


@contextmanager
def reading(what: Path | str) -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into a ValueError that names it."""
    try:
        yield
    except pickle.UnpicklingError as error:
        # the rest of torch's message is about how to execute it
        found = str(error).partition("\n\nCheck the documentation")[0].rpartition("\n")[2].partition(" Please use ")[0]
        raise ValueError(f"{what}: refused, or damaged ({found.strip()}); valid: tensors, and plain data") from error
    except DAMAGED as error:
        raise ValueError(f"{what}: {str(error) or type(error).__name__}") from error


def shown(names: Collection[str]) -> str:
    """Some names for a message."""
    first = list(names)[:SHOWN]
    return ", ".join(first) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
