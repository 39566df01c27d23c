"""Where a stage that runs long goes on from after it was killed."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, optim

from stages.files import CHECKPOINTS, read_tensors, sha256, write_tensors
from stages.params import Section

PACKAGES = ("backends", "metrics", "solvers", "stages")


class Checkpoint:
    """A file of tensors and JSON, used only by the very same work: same parameters, same inputs, same code.

    Args:
        stage: its name.
        params: the parameters that decide what the work computes.
        inputs: files that it reads.
    """

    def __init__(self, stage: str, params: dict[str, Section | int | float | bool], inputs: list[Path]) -> None:
        self.path = CHECKPOINTS / f"{stage}.safetensors"
        plain = {k: v.model_dump() if isinstance(v, Section) else v for k, v in params.items()}
        code = sorted(file for package in PACKAGES for file in Path(__file__).parents[1].glob(f"{package}/*.py"))
        identity = [json.dumps(plain, sort_keys=True), *(sha256(file) for file in [*inputs, *code])]
        self.fingerprint = hashlib.sha256("".join(identity).encode()).hexdigest()

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and the values saved last, or None where there is nothing to go on from."""
        try:
            tensors, saved = read_tensors(self.path)
        except (FileNotFoundError, SafetensorError):
            return None
        return (tensors, saved["values"]) if saved.get("fingerprint") == self.fingerprint else None

    def save(self, parts: Mapping[str, Mapping[str, Tensor]], values: dict[str, Any]) -> None:
        """Replace the checkpoint, atomically; tensor t of part p is loaded as `p.t`."""
        tensors = {f"{part}.{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
        write_tensors(self.path, tensors, {"fingerprint": self.fingerprint, "values": values})

    def remove(self) -> None:
        """Forget it: the work is done."""
        self.path.unlink(missing_ok=True)


def under(part: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one part, by the names they were saved under."""
    return {name.removeprefix(f"{part}."): tensor for name, tensor in tensors.items() if name.startswith(f"{part}.")}


def adam_state(optimizer: optim.Optimizer) -> dict[str, Tensor]:
    """Adam's running averages and counts by name."""
    states = optimizer.state_dict()["state"]
    return {f"{index}.{key}": value for index, state in states.items() for key, value in state.items()}


def load_adam_state(optimizer: optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `adam_state` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
