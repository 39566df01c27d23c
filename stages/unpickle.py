"""Reads foreign pickles as data: a machine of its own over their opcodes. It imports nothing and calls only what is listed."""

import io
import math
import pickletools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LARGEST_FILE = 16 * 2**20
"""Bytes. The largest published file has 0.4 MiB; its storages together can hold no more than the file."""
MOST_OPCODES = 1_000_000

LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""What torch's storages within a pickle begin with."""


class RefusedError(ValueError):
    """A pickle holds something that is not on the list, or is damaged."""


@dataclass(frozen=True)
class Name:
    """Something that a pickle names, by its dotted path; never imported."""

    path: str


@dataclass(frozen=True)
class Inert:
    """An object that a pickle would have made of a class: what it was given, as data."""

    kind: str
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StorageReference:
    """What a nested pickle says of its storage."""

    elements: int


@dataclass(frozen=True)
class Storage:
    """The numbers that tensors are views of, (elements,)."""

    values: Tensor


def read_pickle(data: bytes) -> Any:
    """The contents of a pickle of plain containers, numbers, strings, tensors, and objects of the listed classes as `Inert`.

    Raises:
        RefusedError: it holds anything else, or is damaged; with the position, what was found, and what would be valid.
    """
    if len(data) > LARGEST_FILE:
        raise RefusedError(f"{len(data)} bytes; valid: at most {LARGEST_FILE}")
    stream = io.BytesIO(data)
    value = _Machine(stream, storage_bytes=len(data)).run()
    if rest := len(data) - stream.tell():
        raise RefusedError(f"{rest} bytes after the end of the pickle; valid: none")
    return value


class _Machine:
    """A stack, a memo and a loop over the opcodes.

    Args:
        stream: read up to and with the STOP opcode.
        storage_bytes: what all storages may hold together: a storage that is made twice of the same bytes is a bomb.
        references: whether persistent references to storages are allowed, as in a storage's own stream.
    """

    def __init__(self, stream: io.BytesIO, storage_bytes: int, references: bool = False) -> None:
        self.stream = stream
        self.storage_bytes = storage_bytes
        self.references = references
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        name, position = "nothing", 0
        try:
            for count, (opcode, argument, at) in enumerate(pickletools.genops(self.stream)):
                name, position = opcode.name, at or 0
                if count >= MOST_OPCODES:
                    raise RefusedError(f"more than {MOST_OPCODES} opcodes; valid: fewer")
                if name == "STOP":
                    if len(self.stack) != 1:
                        raise RefusedError(f"{len(self.stack)} values at the end; valid: one")
                    return self.stack[0]
                self.step(name, argument)
        except RefusedError as error:
            raise RefusedError(f"at byte {position}, {name}: {error}") from None
        except (IndexError, KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise RefusedError(
                f"after byte {position}, {name}: not a whole pickle ({type(error).__name__}: {str(error)[:200]}); "
                "valid: an undamaged file"
            ) from None
        raise RefusedError("no STOP; valid: a whole pickle")

    def step(self, name: str, argument: Any) -> None:
        """Execute one opcode."""
        match name:
            case "PROTO" | "FRAME":
                pass
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                self.stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case (
                "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "LONG4" | "FLOAT" | "BINFLOAT"
                | "STRING" | "BINSTRING" | "SHORT_BINSTRING" | "UNICODE" | "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8"
                | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8"
            ):  # fmt: skip
                self.stack.append(argument)
            case "MARK":
                self.marks.append(len(self.stack))
            case "EMPTY_TUPLE" | "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET":
                self.stack.append({"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}[name]())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                self.stack.append(tuple(self.popped(int(name[-1]))))
            case "TUPLE" | "LIST":
                self.stack.append((tuple if name == "TUPLE" else list)(self.marked()))
            case "DICT":
                self.stack.append(_put({}, self.marked()))
            case "APPEND" | "APPENDS":
                values = self.popped(1) if name == "APPEND" else self.marked()
                self.top(list).extend(values)
            case "SETITEM" | "SETITEMS":
                values = self.popped(2) if name == "SETITEM" else self.marked()
                _put(self.top(dict), values)
            case "ADDITEMS":
                values = self.marked()
                self.top(set).update(map(_key, values))
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.top(object)
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.top(object)
            case "GET" | "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "GLOBAL":
                self.stack.append(_listed(*argument.split(" ")))
            case "STACK_GLOBAL":
                self.stack.append(_listed(*self.popped(2)))
            case "REDUCE" | "NEWOBJ" | "BUILD":
                function, given = self.popped(2)
                self.stack.append({"REDUCE": self.call, "NEWOBJ": _new, "BUILD": _build}[name](function, given))
            case "BINPERSID" if self.references:
                self.stack.append(_reference(*self.popped(1)))
            case _:
                raise RefusedError(f"opcode {name}; valid: those that build plain data")

    def popped(self, count: int) -> list[Any]:
        """The last values, taken off; none from below the last mark."""
        if len(self.stack) - count < (self.marks[-1] if self.marks else 0):
            raise RefusedError("too few values on the stack; valid: a whole pickle")
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return values

    def marked(self) -> list[Any]:
        """The values since the last mark, taken off with it."""
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def top(self, kind: type) -> Any:
        """The last value, which must be of a kind."""
        value = self.stack[-1]
        if not isinstance(value, kind):
            raise RefusedError(f"{_described(value)}; valid: a {kind.__name__}")
        return value

    def call(self, function: Any, given: Any) -> Any:
        """What a listed function makes of its arguments."""
        if not isinstance(function, Name) or function.path not in FUNCTIONS:
            raise RefusedError(f"a call of {_described(function)}; valid: {', '.join(FUNCTIONS)}")
        if not isinstance(given, tuple):
            raise RefusedError(f"{function.path} of {_described(given)}; valid: a tuple of arguments")
        value = FUNCTIONS[function.path](*given)
        if isinstance(value, Storage):
            self.storage_bytes -= value.values.nbytes
            if self.storage_bytes < 0:
                raise RefusedError("storages of more bytes than the file has; valid: each storage once")
        return value


def _ordered_dict(pairs: Iterable[Any] = ()) -> OrderedDict[Any, Any]:
    return OrderedDict((_key(key), value) for key, value in pairs)


def _storage(data: Any) -> Storage:
    """A storage from the bytes of its own stream, wherever it lay when it was saved."""
    if not isinstance(data, bytes):
        raise RefusedError(f"a storage of {_described(data)}; valid: bytes")
    stream = io.BytesIO(data)
    try:
        magic, protocol, system, reference = (_Machine(stream, 0, references=True).run() for _ in range(4))
    except RefusedError as error:
        raise RefusedError(f"in a storage: {error}") from None
    if (magic, protocol) != (LEGACY_MAGIC, LEGACY_PROTOCOL):
        raise RefusedError("a storage of an unknown format; valid: torch's legacy one")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise RefusedError("a storage that is not little-endian; valid: one that is")
    if not isinstance(reference, StorageReference) or not 0 <= reference.elements <= len(data):
        raise RefusedError(f"in a storage: {_described(reference)}; valid: as many elements as it has bytes, or fewer")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TypedStorage is deprecated")  # these files are older than that
        try:
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            return Storage(torch.empty(0, dtype=found.dtype).set_(found.untyped()))
        except Exception as error:  # whatever torch makes of damaged bytes, none of which it executes
            raise RefusedError(f"a damaged storage ({str(error)[:200]}); valid: one that torch saved") from None


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """A view of a storage, of no more elements than that has."""
    if not isinstance(storage, Storage):
        raise RefusedError(f"a tensor of {_described(storage)}; valid: of a storage")
    whole = all(isinstance(values, tuple) and all(type(n) is int and n >= 0 for n in values) for values in (size, stride))
    if not whole or type(offset) is not int or len(size) != len(stride) or len(size) > 8:
        raise RefusedError(f"a tensor of size {_described(size)}; valid: whole numbers, and as many strides")
    elements, available = math.prod(size), len(storage.values)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if elements else 0
    if offset < 0 or elements > available or last >= max(available, 1):
        raise RefusedError(f"a tensor of {elements} elements from {offset} on; valid: within the storage's {available}")
    return storage.values.as_strided(size, stride, offset).clone()


def _parameter(tensor: Any, *_: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise RefusedError(f"a parameter of {_described(tensor)}; valid: of a tensor")
    return tensor


def _persistent(record: Any) -> Inert:
    """An object whose class comes as source text with it: the text is dropped, the state kept."""
    if not isinstance(record, dict) or not isinstance(record.get("state"), dict):
        raise RefusedError(f"a persistent object of {_described(record)}; valid: a dictionary with a state")
    return Inert(f"persistent:{record.get('class_name')}", record["state"])


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.storage._load_from_bytes": _storage,
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
}
"""What may be called, and what is done instead."""

CLASSES = {f"torch.nn.modules.activation.{name}" for name in ("Sigmoid", "Softmax")}
"""Objects of these become `Inert`."""

NAMES = {
    *(f"torch.{kind}Storage" for kind in ("Float", "Double", "Half", "BFloat16", "Long", "Int")),
    *(f"solvers.{name}_sampler" for name in ("epd", "epd_parallel", "ipndm", "heun", "dpm", "dpm2", "dpmpp", "euler")),
}
"""What may only be named."""


def _listed(module: Any, name: Any) -> Name:
    path = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else ""
    if path not in FUNCTIONS and path not in CLASSES and path not in NAMES:
        found = path[:200] or f"{_described(module)}, {_described(name)}"
        raise RefusedError(f"{found}; valid: {', '.join(sorted({*FUNCTIONS, *CLASSES, *NAMES}))}")
    return Name(path)


def _new(kind: Any, given: Any) -> Inert:
    if not isinstance(kind, Name) or kind.path not in CLASSES or given != ():
        raise RefusedError(f"an object of {_described(kind)}; valid: {', '.join(sorted(CLASSES))}")
    return Inert(kind.path)


def _build(value: Any, state: Any) -> Inert:
    if not isinstance(value, Inert) or not isinstance(state, dict):
        raise RefusedError(f"a state for {_described(value)}; valid: for an object of {', '.join(sorted(CLASSES))}")
    value.state.update(state)
    return value


def _reference(identity: Any) -> StorageReference:
    """A persistent reference as torch writes it: ("storage", class, key, location, elements, view)."""
    match identity:
        case ("storage", Name(), str(), str(), int(elements), None):
            return StorageReference(elements)
    raise RefusedError(f"a reference to {_described(identity)}; valid: to a storage")


def _put(target: dict[Any, Any], values: list[Any]) -> dict[Any, Any]:
    """Keys and values in turns into a dictionary."""
    if len(values) % 2:
        raise RefusedError("a key without a value; valid: pairs")
    target.update(zip(map(_key, values[::2]), values[1::2], strict=True))
    return target


def _key(value: Any) -> Any:
    """Plain values alone: hashing nested tuples that share their parts takes exponential time."""
    if not isinstance(value, str | int | float | bytes | None):
        raise RefusedError(f"a key that is {_described(value)}; valid: a string or a number")
    return value


def _described(value: Any) -> str:
    """A short name for what was found, whose own representation may be endless."""
    match value:
        case Name(path=path):
            return path
        case Inert(kind=kind):
            return kind[:100]
        case str() | int() | float() | bytes():
            return f"{type(value).__name__} {str(value)[:100]!r}"
    return type(value).__name__
