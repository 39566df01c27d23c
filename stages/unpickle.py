"""Reads foreign pickles as data: a machine of its own over their opcodes. It imports nothing and calls only what is listed."""

import io
import math
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LARGEST_FILE = 16 * 2**20
"""Bytes. The largest published file has 0.4 MiB; its storages together can hold no more than the file."""
MOST_OPCODES = 1_000_000
MOST_OPCODES_OF_A_STORAGE = 100
"""In each of the streams before its numbers; torch writes fewer than 40."""

LEGACY_MAGIC, LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
"""What torch's storages within a pickle begin with."""


class RefusedError(ValueError):
    """A pickle holds something that is not on the list, or is damaged."""


@dataclass(frozen=True)
class Name:
    """Something that a pickle names, by its dotted path; never imported."""

    path: str


@dataclass
class Inert:
    """An object that a pickle would have made of a class: what it was given, as data."""

    kind: str
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StorageReference:
    """What a nested pickle says of its storage."""

    kind: str
    key: str
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
        nested: whether it is a storage's own stream: short, with references to storages, and without any call.
    """

    def __init__(self, stream: io.BytesIO, storage_bytes: int = 0, nested: bool = False) -> None:
        self.stream = stream
        self.storage_bytes = storage_bytes
        self.nested = nested
        self.most_opcodes = MOST_OPCODES_OF_A_STORAGE if nested else MOST_OPCODES
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        name, position = "nothing", 0
        try:
            for count, (opcode, argument, at) in enumerate(pickletools.genops(self.stream)):
                name, position = opcode.name, at or 0
                if count >= self.most_opcodes:
                    raise RefusedError(f"more than {self.most_opcodes} opcodes; valid: fewer")
                if name == "STOP":
                    if len(self.stack) != 1 or self.marks:
                        found = f"{len(self.stack)} values and {len(self.marks)} marks"
                        raise RefusedError(f"{found} at the end; valid: one value")
                    return self.stack[0]
                self.step(name, argument)
        except RefusedError as error:
            raise RefusedError(f"at byte {position}, {name}: {error}") from None
        except Exception as error:  # whatever damaged bytes lead to
            raise RefusedError(
                f"after byte {position}, {name}: not a whole pickle ({type(error).__name__}: {str(error)[:200]!a}); "
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
                module, _, attribute = argument.partition(" ")
                self.stack.append(_listed(module, attribute))
            case "STACK_GLOBAL":
                self.stack.append(_listed(*self.popped(2)))
            case "REDUCE" | "NEWOBJ" | "BUILD":
                function, given = self.popped(2)
                self.stack.append({"REDUCE": self.call, "NEWOBJ": _new, "BUILD": _build}[name](function, given))
            case "BINPERSID" if self.nested:
                self.stack.append(_reference(*self.popped(1)))
            case _:
                raise RefusedError(f"opcode {name}; valid: those that build plain data")

    def popped(self, count: int) -> list[Any]:
        """The last values, taken off; none from below the last mark."""
        self.require(count)
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return values

    def require(self, count: int) -> None:
        """Raise RefusedError unless there are that many values since the last mark."""
        if len(self.stack) - count < (self.marks[-1] if self.marks else 0):
            raise RefusedError("too few values on the stack; valid: a whole pickle")

    def marked(self) -> list[Any]:
        """The values since the last mark, taken off with it."""
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def top(self, kind: type) -> Any:
        """The last value, which must be of a kind."""
        self.require(1)
        value = self.stack[-1]
        if not isinstance(value, kind):
            raise RefusedError(f"{described(value)}; valid: a {kind.__name__}")
        return value

    def call(self, function: Any, given: Any) -> Any:
        """What a listed function makes of its arguments."""
        if self.nested or not isinstance(function, Name) or function.path not in FUNCTIONS:
            valid = "none in a storage" if self.nested else ", ".join(FUNCTIONS)
            raise RefusedError(f"a call of {described(function)}; valid: {valid}")
        if not isinstance(given, tuple):
            raise RefusedError(f"{function.path} of {described(given)}; valid: a tuple of arguments")
        if FUNCTIONS[function.path] is _storage:
            self.storage_bytes -= sum(len(data) for data in given if isinstance(data, bytes))
            if self.storage_bytes < 0:
                raise RefusedError("storages of more bytes than the file has; valid: each storage once")
        return FUNCTIONS[function.path](*given)


def _ordered_dict() -> OrderedDict[Any, Any]:
    """An empty one: what it holds is put into it afterwards."""
    return OrderedDict()


def _storage(data: Any) -> Storage:
    """A storage from the bytes of its own stream, wherever it lay when it was saved: five pickles, a count, the numbers."""
    if not isinstance(data, bytes):
        raise RefusedError(f"a storage of {described(data)}; valid: bytes")
    stream = io.BytesIO(data)
    try:
        magic, protocol, system, reference, keys = (_Machine(stream, nested=True).run() for _ in range(5))
    except RefusedError as error:
        raise RefusedError(f"in a storage: {error}") from None
    if (magic, protocol) != (LEGACY_MAGIC, LEGACY_PROTOCOL):
        raise RefusedError("a storage of an unknown format; valid: torch's legacy one")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise RefusedError("a storage that is not little-endian; valid: one that is")
    if not isinstance(reference, StorageReference) or reference.kind not in STORAGES or keys != [reference.key]:
        found = reference.kind if isinstance(reference, StorageReference) else described(reference)
        raise RefusedError(f"a storage that holds {found}; valid: {', '.join(STORAGES)}, under its own key")
    dtype, elements = STORAGES[reference.kind], int.from_bytes(stream.read(8), "little", signed=True)
    values = stream.read()
    if elements != reference.elements or elements * dtype.itemsize != len(values):
        found = f"{described(reference.elements)} and {elements} elements in {len(values)} bytes"
        raise RefusedError(f"a storage of {found}; valid: {dtype.itemsize} bytes for each element")
    return Storage(torch.frombuffer(bytearray(values), dtype=dtype) if values else torch.empty(0, dtype=dtype))


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """A view of a storage, of no more elements than that has."""
    if not isinstance(storage, Storage):
        raise RefusedError(f"a tensor of {described(storage)}; valid: of a storage")
    if not isinstance(size, tuple) or not isinstance(stride, tuple) or len(size) != len(stride) or len(size) > 8:
        raise RefusedError(f"a tensor of size {described(size)}; valid: at most 8 numbers, and as many strides")
    for n in (offset, *size, *stride):
        if type(n) is not int or not 0 <= n < 2**31:
            raise RefusedError(f"a tensor's size, stride or offset of {described(n)}; valid: whole numbers below 2^31")
    elements, available = math.prod(size), len(storage.values)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if elements else offset
    if elements > available or last >= max(available, 1):
        raise RefusedError(f"a tensor of {elements} elements from {offset} on; valid: within the storage's {available}")
    return storage.values.as_strided(size, stride, offset)


def _parameter(tensor: Any, *_: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise RefusedError(f"a parameter of {described(tensor)}; valid: of a tensor")
    return tensor


def _persistent(record: Any) -> Inert:
    """An object whose class comes as source text with it: the text is dropped, the state kept."""
    if not isinstance(record, dict) or not isinstance(record.get("state"), dict):
        raise RefusedError(f"a persistent object of {described(record)}; valid: a dictionary with a state")
    name = record.get("class_name")
    if not isinstance(name, str) or not name.isidentifier() or len(name) > 100:
        raise RefusedError(f"a persistent object's class name {described(name)}; valid: a short identifier")
    return Inert(f"persistent:{name}", record["state"])


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

STORAGES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
}
"""What a storage may hold."""

NAMES = {
    *STORAGES,
    *(f"solvers.{name}_sampler" for name in ("epd", "epd_parallel", "ipndm", "heun", "dpm", "dpm2", "dpmpp", "euler")),
}
"""What may only be named."""


def _listed(module: Any, name: Any) -> Name:
    path = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else ""
    if path not in FUNCTIONS and path not in CLASSES and path not in NAMES:
        found = f"{path[:200]!a}" if path else f"{described(module)}, {described(name)}"
        raise RefusedError(f"{found}; valid: {', '.join(sorted({*FUNCTIONS, *CLASSES, *NAMES}))}")
    return Name(path)


def _new(kind: Any, given: Any) -> Inert:
    if not isinstance(kind, Name) or kind.path not in CLASSES or given != ():
        raise RefusedError(f"an object of {described(kind)}; valid: {', '.join(sorted(CLASSES))}")
    return Inert(kind.path)


def _build(value: Any, state: Any) -> Inert:
    if not isinstance(value, Inert) or not isinstance(state, dict) or value.state:
        found = f"a state {described(state)} for {described(value)}"
        raise RefusedError(f"{found}; valid: one dictionary for an object of {', '.join(sorted(CLASSES))}")
    value.state = state
    return value


def _reference(identity: Any) -> StorageReference:
    """A persistent reference as torch writes it: ("storage", class, key, location, elements, view)."""
    match identity:
        case ("storage", Name(kind), str(key), str(), int(elements), None):
            return StorageReference(kind, key, elements)
    raise RefusedError(f"a reference to {described(identity)}; valid: to a storage")


def _put(target: dict[Any, Any], values: list[Any]) -> dict[Any, Any]:
    """Keys and values in turns into a dictionary."""
    if len(values) % 2:
        raise RefusedError("a key without a value; valid: pairs")
    target.update(zip(map(_key, values[::2]), values[1::2], strict=True))
    return target


def _key(value: Any) -> Any:
    """Short strings alone: nested tuples take exponential time to hash, huge numbers long, and chosen ones collide."""
    if not isinstance(value, str) or len(value) > 1000:
        raise RefusedError(f"a key that is {described(value)}; valid: a string of at most 1000 characters")
    return value


def described(value: Any) -> str:
    """A short name for what was found, whose own representation may be endless."""
    match value:
        case Name(path=found) | Inert(kind=found):
            return found
        case int() if value.bit_length() > 64:
            return f"int of {value.bit_length()} bits"
        case str() | bytes():
            return f"{type(value).__name__} {value[:100]!a}"
        case bool() | int() | float():
            return f"{type(value).__name__} {value}"
    return type(value).__name__
