"""Where a stage that runs long goes on from after it was killed."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, optim

from stages.files import CHECKPOINTS, CheckpointError, read_tensors, sha256, write_tensors
from stages.params import Section

PACKAGES = ("backends", "metrics", "solvers", "stages")
SHOWN = 5
"""Differences that are told, at most."""


class Work:
    """What decides what is computed: parameters, inputs, code.

    Args:
        params: the parameters that do.
        inputs: files that are read.
        untied: names of parameters in a section that do not matter.
    """

    def __init__(
        self, params: Mapping[str, Section | int | float | str | bool], inputs: Sequence[Path], untied: Collection[str] = ()
    ) -> None:
        plain = {k: v.model_dump(exclude=set(untied)) if isinstance(v, Section) else {"": v} for k, v in params.items()}
        root = Path(__file__).parents[1]
        code = sorted([root / "unpickle.py", *(file for package in PACKAGES for file in root.glob(f"{package}/*.py"))])
        files = {str(file): file for file in inputs} | {str(file.relative_to(root)): file for file in code}
        self.identity = {".".join(filter(None, (k, name))): v for k, named in plain.items() for name, v in named.items()}
        self.identity |= {name: sha256(file) for name, file in files.items()}

    def check(self, path: Path, made_by: dict[str, Any]) -> None:
        """Raise CheckpointError where what lies at a path was made by other work, with what differs."""
        names = sorted(self.identity.keys() | made_by.keys(), key=lambda name: ("/" in name, name))  # parameters first
        pairs = [(name, _shown(name, made_by), _shown(name, self.identity)) for name in names]
        differ = [f"{name} was {then}, is {now}" for name, then, now in pairs if then != now]
        if differ:
            more = f" and {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
            raise CheckpointError(
                f"{path}: of an unfinished run of other work: {'; '.join(differ[:SHOWN])}{more}; "
                "valid: the same, to go on with it, or no such file, to start anew"
            )


class Checkpoint:
    """A file of tensors and JSON, used only by the very same work.

    Args:
        stage: its name.
        params, inputs, untied: as of `Work`.
    """

    def __init__(
        self, stage: str, params: Mapping[str, Section | int | float], inputs: Sequence[Path], untied: Collection[str] = ()
    ) -> None:
        self.path = CHECKPOINTS / f"{stage}.safetensors"
        self.work = Work(params, inputs, untied)

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and the values saved last, or None where there is nothing to go on from.

        Raises:
            CheckpointError: they are damaged, or of other work, with what differs.
        """
        try:
            tensors, saved = read_tensors(self.path)
        except FileNotFoundError:
            return None
        except SafetensorError as error:
            raise CheckpointError(
                f"{self.path}: damaged ({error}); valid: a whole one, or no such file, to start anew"
            ) from error
        self.work.check(self.path, saved.get("identity", {}))
        return tensors, saved["values"]

    def save(self, parts: Mapping[str, Mapping[str, Tensor]], values: dict[str, Any]) -> None:
        """Replace the checkpoint, atomically; tensor t of part p is loaded as `p.t`."""
        tensors = {f"{part}.{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
        write_tensors(self.path, tensors, {"identity": self.work.identity, "values": values})

    def remove(self) -> None:
        """Forget it: the work is done."""
        self.path.unlink(missing_ok=True)


def _shown(name: str, identity: dict[str, Any]) -> str:
    """A parameter's value, or enough of a file's hash."""
    value = identity.get(name, "absent")
    return value[:12] if "/" in name else repr(value)


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
