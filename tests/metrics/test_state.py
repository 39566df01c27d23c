import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from metrics.state import SHOWN, load_exactly, read_state, reading, require


def state() -> dict[str, Tensor]:
    """Of a Linear(3, 2)."""
    return {"weight": torch.arange(6.0).view(2, 3), "bias": torch.tensor([0.5, -0.5])}


def as_safetensors(file: Path) -> None:
    save_file(state(), file)


def as_zip(file: Path) -> None:
    torch.save(state(), file)


def as_old_format(file: Path) -> None:
    """Torch's own before 1.6, in which older weights are published."""
    torch.save(state(), file, _use_new_zipfile_serialization=False)


FORMATS: list[tuple[str, Callable[[Path], None]]] = [
    ("weights.safetensors", as_safetensors),
    ("weights.pt", as_zip),
    ("weights.pth", as_old_format),
]


@pytest.mark.parametrize(("name", "write"), FORMATS)
def test_state_is_read(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    write(tmp_path / name)
    found = read_state(tmp_path / name)
    assert found.keys() == state().keys()
    assert all(torch.equal(found[key], value) for key, value in state().items())


@pytest.mark.parametrize("old", [False, True])
def test_state_is_read_from_under_a_key(tmp_path: Path, old: bool) -> None:
    """Whatever plain data lies beside it, and if it is an OrderedDict."""
    file = tmp_path / "weights.pt"
    checkpoint = {"epoch": 3, "args": {"lr": 0.1, "name": "a"}, "state_dict": nn.Linear(3, 2).state_dict()}
    torch.save(checkpoint, file, _use_new_zipfile_serialization=not old)
    assert read_state(file, "state_dict").keys() == {"weight", "bias"}
    with pytest.raises(ValueError, match=r"weights\.pt: found no 'model'; valid: a checkpoint that has it"):
        read_state(file, "model")
    with pytest.raises(ValueError, match=r"weights\.pt: found a dict that is no dictionary of tensors; valid: a state dict"):
        read_state(file)


@pytest.mark.parametrize(
    ("content", "kind"), [([1, 2], "list"), (torch.ones(2), "Tensor"), ({"a": 1}, "dict"), (3, "int"), (None, "NoneType")]
)
def test_what_is_no_state_is_refused(tmp_path: Path, content: Any, kind: str) -> None:
    file = tmp_path / "weights.pt"
    torch.save(content, file)
    with pytest.raises(ValueError, match=rf"weights\.pt: found a {kind} that is no dictionary of tensors"):
        read_state(file)
    with pytest.raises(ValueError, match=r"weights\.pt: found no 'state_dict'"):
        read_state(file, "state_dict")
    torch.save({"state_dict": content}, file)
    with pytest.raises(ValueError, match=rf"weights\.pt: found a {kind} that is no dictionary of tensors"):
        read_state(file, "state_dict")


@pytest.mark.parametrize(("name", "write"), FORMATS)
def test_a_truncated_file_is_refused(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    """Wherever it ends."""
    file = tmp_path / name
    write(file)
    whole = file.read_bytes()
    for kept in range(0, len(whole), 1 if len(whole) < 1000 else 7):
        file.write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=rf"{name}: \S"):
            read_state(file)


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
@pytest.mark.parametrize(
    "content", [b"<html>not found</html>", b"version 1\noid sha256:0\nsize 3\n", bytes(100), b"\x80\x02K\x01."]
)
def test_another_file_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        read_state(tmp_path / name)


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("write", ["zip", "old format", "pickle"])
def test_a_pickle_is_not_executed(tmp_path: Path, write: str) -> None:
    file, made = tmp_path / "weights.pt", tmp_path / "made"
    content = {"state_dict": {"hostile": Hostile(made), **state()}}
    if write == "pickle":
        file.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=write == "zip")
    for key in (None, "state_dict"):
        with pytest.raises(
            ValueError, match=r"weights\.pt: refused, or damaged \(.*mkdir.*\); valid: tensors, and plain data$"
        ):
            read_state(file, key)
    assert not made.exists()


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 2), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights\.pt: refused, or damaged \(.*linear\.Linear was not .*\); valid: [^;]*$"):
        read_state(tmp_path / "weights.pt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for call in (lambda: read_state(tmp_path / "weights.pt"), lambda: require(tmp_path / "weights.pt")):
        with pytest.raises(FileNotFoundError, match="missing; valid: a file") as caught:
            call()
        assert caught.value.filename == str(tmp_path / "weights.pt")
    with pytest.raises(FileNotFoundError, match="missing; valid: a folder with it"):
        require(tmp_path / "weights.pt", "a folder with it")
    with pytest.raises(FileNotFoundError):
        require(tmp_path)
    as_zip(tmp_path / "weights.pt")
    require(tmp_path / "weights.pt")


def test_weights_are_loaded() -> None:
    module = nn.Linear(3, 2)
    load_exactly(module, state(), Path("weights.pt"))
    assert torch.equal(module.weight, state()["weight"])
    assert torch.equal(module.bias, state()["bias"])


def test_weights_are_loaded_in_the_modules_dtype() -> None:
    module = nn.Linear(3, 2)
    load_exactly(module, {name: value.half() for name, value in state().items()}, Path("weights.pt"))
    assert module.weight.dtype == torch.float32
    assert torch.equal(module.weight, state()["weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": None}, "missing: bias"),
        ({"head": torch.ones(1)}, "unexpected: head"),
        ({"weight": torch.ones(3, 2)}, r"other shapes: weight \(3, 2\), not \(2, 3\)"),
        (
            {"weight": torch.ones(2), "bias": None, "a": torch.ones(1), "b": torch.ones(1)},
            r"missing: bias; unexpected: a, b; other shapes: weight \(2,\), not \(2, 3\)",
        ),
        ({str(i): torch.ones(1) for i in range(SHOWN + 2)}, "unexpected: 0, 1, 2, 3, 4 and 2 more"),
    ],
)
def test_weights_of_another_module_are_refused(change: dict[str, Tensor | None], message: str) -> None:
    """And nothing of them is loaded."""
    module = nn.Linear(3, 2)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    given = {name: value for name, value in {**state(), **change}.items() if value is not None}
    with pytest.raises(ValueError, match=rf"^weights\.pt: {message}; valid: exactly the weights of Linear$"):
        load_exactly(module, given, Path("weights.pt"))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_what_has_no_place_may_be_ignored() -> None:
    module = nn.Linear(3, 2)
    load_exactly(module, {**state(), "position_ids": torch.ones(1)}, Path("weights.pt"), ignored={"position_ids", "absent"})
    assert torch.equal(module.bias, state()["bias"])


def test_what_has_a_place_is_loaded_though_ignored() -> None:
    module = nn.Linear(3, 2)
    load_exactly(module, state(), Path("weights.pt"), ignored={"bias"})
    assert torch.equal(module.bias, state()["bias"])
    with pytest.raises(ValueError, match="missing: bias"):
        load_exactly(module, {"weight": state()["weight"]}, Path("weights.pt"), ignored={"bias"})


@pytest.mark.parametrize("error", [OSError("no"), ValueError("no"), KeyError("no"), TypeError("no"), EOFError("no")])
def test_errors_of_reading_name_the_file(error: Exception) -> None:
    with pytest.raises(ValueError, match=r"config\.json: .*no") as caught, reading(Path("config.json")):
        raise error
    assert caught.value.__cause__ is error


def test_what_is_no_error_of_reading_is_passed_on() -> None:
    with pytest.raises(KeyboardInterrupt), reading("config.json"):
        raise KeyboardInterrupt
