"""Reads foreign pickles as data: a machine of its own over their opcodes. It imports nothing and calls only what is listed."""

import io
import math
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

LARGEST_FILE = 16 * 2**20
"""Bytes of a pickle. The largest published predictor has 0.4 MiB; its storages together can hold no more than the file."""
MOST_OPCODES = 1_000_000
MOST_OPCODES_OF_A_STORAGE = 100
"""In each of the streams before its numbers; torch writes fewer than 40."""
MOST_NAMES = 100_000
"""Of modules, parameters and buffers in a module; the largest published one, MPS, has 2,556."""
LONGEST_NAME = 1000
"""Of a parameter, with those of the modules around it: one that contains itself has no longest."""

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
    """What a pickle says of a storage that lies outside of it."""

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
    return _whole(data, PREDICTOR)


def read_module(file: Path) -> dict[str, Tensor]:
    """The state dict of a whole nn.Module, as torch.save wrote it since version 1.6: the names and tensors of its state_dict().

    The module's classes need not exist. What `get_extra_state` or hooks add is not in it.

    Raises:
        OSError: the file cannot be read.
        RefusedError: it holds anything else, or is damaged; with the position, what was found, and what would be valid.
    """
    with file.open("rb") as opened:
        try:
            archive = _Archive(opened)
            return _state_dict(_whole(archive.pickle(), MODULE, archive.storage))
        except RefusedError as error:
            raise RefusedError(f"{file}: {error}") from None


@dataclass(frozen=True)
class _Lists:
    """What a kind of pickle may name. Nothing else is.

    Attributes:
        functions: may be called, and what is done instead.
        classes: objects of these become `Inert`.
        names: may only be named.
        packages: whose functions and classes may be named, and the latter's objects become `Inert`.
        small_numbers: whether dictionaries and sets may have them as keys.
    """

    functions: Mapping[str, Callable[..., Any]]
    classes: Set[str]
    names: Set[str]
    packages: tuple[str, ...] = ()
    small_numbers: bool = False

    def listed(self, module: Any, name: Any) -> Name:
        """What a pickle names, if it may."""
        path = f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else ""
        if path not in self.functions and path not in self.names and not self.makes(path):
            found = f"{path[:200]!a}" if path else f"{described(module)}, {described(name)}"
            valid = [*sorted({*self.functions, *self.classes, *self.names}), *(f"{package}.*" for package in self.packages)]
            raise RefusedError(f"{found}; valid: {', '.join(valid)}")
        return Name(path)

    def makes(self, path: str) -> bool:
        """Whether objects may be made of it."""
        plain = len(path) <= 200 and path.isascii() and all(part.isidentifier() for part in path.split("."))
        return path in self.classes or (plain and any(path.startswith(f"{package}.") for package in self.packages))

    def made(self) -> str:
        """What objects may be made of, for messages."""
        return ", ".join([*sorted(self.classes), *(f"{package}.*" for package in self.packages)])


def _whole(data: bytes, lists: _Lists, reference: Callable[[StorageReference], Any] | None = None) -> Any:
    """The contents of a pickle and nothing after it."""
    if len(data) > LARGEST_FILE:
        raise RefusedError(f"{len(data)} bytes; valid: at most {LARGEST_FILE}")
    stream = io.BytesIO(data)
    value = _Machine(stream, lists, reference, storage_bytes=len(data)).run()
    if rest := len(data) - stream.tell():
        raise RefusedError(f"{rest} bytes after the end of the pickle; valid: none")
    return value


class _Machine:
    """A stack, a memo and a loop over the opcodes.

    Args:
        stream: read up to and with the STOP opcode.
        lists: what it may name.
        reference: what a reference to a storage outside of the stream is; None: there may be none.
        storage_bytes: what all storages may hold together: a storage that is made twice of the same bytes is a bomb.
        nested: whether it is a storage's own stream: short, and without any call.
    """

    def __init__(
        self,
        stream: io.BytesIO,
        lists: _Lists,
        reference: Callable[[StorageReference], Any] | None,
        storage_bytes: int = 0,
        nested: bool = False,
    ) -> None:
        self.stream = stream
        self.lists = lists
        self.reference = reference
        self.storage_bytes = storage_bytes
        self.members = MOST_OPCODES
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
                self.stack.append(self.put({}, self.marked()))
            case "APPEND" | "APPENDS":
                values = self.popped(1) if name == "APPEND" else self.marked()
                self.top(list).extend(values)
            case "SETITEM" | "SETITEMS":
                values = self.popped(2) if name == "SETITEM" else self.marked()
                self.put(self.top(dict), values)
            case "ADDITEMS":
                values = self.marked()
                self.top(set).update(map(self.key, values))
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.top(object)
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.top(object)
            case "GET" | "BINGET" | "LONG_BINGET":
                self.stack.append(self.memo[argument])
            case "GLOBAL":
                module, _, attribute = argument.partition(" ")
                self.stack.append(self.lists.listed(module, attribute))
            case "STACK_GLOBAL":
                self.stack.append(self.lists.listed(*self.popped(2)))
            case "REDUCE" | "NEWOBJ" | "BUILD":
                function, given = self.popped(2)
                self.stack.append({"REDUCE": self.call, "NEWOBJ": self.new, "BUILD": self.build}[name](function, given))
            case "BINPERSID" if self.reference:
                self.stack.append(self.reference(_reference(*self.popped(1))))
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
        functions = self.lists.functions
        if self.nested or not isinstance(function, Name) or function.path not in functions:
            valid = "none in a storage" if self.nested else ", ".join(functions)
            raise RefusedError(f"a call of {described(function)}; valid: {valid}")
        if not isinstance(given, tuple):
            raise RefusedError(f"{function.path} of {described(given)}; valid: a tuple of arguments")
        if functions[function.path] is _storage:
            self.storage_bytes -= sum(len(data) for data in given if isinstance(data, bytes))
            if self.storage_bytes < 0:
                raise RefusedError("storages of more bytes than the file has; valid: each storage once")
        if functions[function.path] is _members:
            self.members -= sum(len(values) for values in given if isinstance(values, list))
            if self.members < 0:
                raise RefusedError(f"sets of more than {MOST_OPCODES} members; valid: fewer")
            return set(map(self.key, _members(*given)))
        return functions[function.path](*given)

    def new(self, kind: Any, given: Any) -> Inert:
        """An object of a listed class."""
        if not isinstance(kind, Name) or not self.lists.makes(kind.path) or given != ():
            raise RefusedError(f"an object of {described(kind)}; valid: {self.lists.made()}, without arguments")
        return Inert(kind.path)

    def build(self, value: Any, state: Any) -> Inert:
        """An object with its state."""
        if not isinstance(value, Inert) or not isinstance(state, dict) or value.state:
            found = f"a state {described(state)} for {described(value)}"
            raise RefusedError(f"{found}; valid: one dictionary for an object of {self.lists.made()}")
        value.state = state
        return value

    def put(self, target: dict[Any, Any], values: list[Any]) -> dict[Any, Any]:
        """Keys and values in turns into a dictionary."""
        if len(values) % 2:
            raise RefusedError("a key without a value; valid: pairs")
        target.update(zip(map(self.key, values[::2]), values[1::2], strict=True))
        return target

    def key(self, value: Any) -> Any:
        """Short strings or small numbers: nested tuples take exponential time to hash, huge numbers long; chosen ones clash."""
        if self.lists.small_numbers and type(value) is int and 0 <= value < 2**31:
            return value
        if not isinstance(value, str) or len(value) > 1000:
            numbers = ", or a whole number below 2^31" if self.lists.small_numbers else ""
            raise RefusedError(f"a key that is {described(value)}; valid: a string of at most 1000 characters{numbers}")
        return value


def _ordered_dict() -> OrderedDict[Any, Any]:
    """An empty one: what it holds is put into it afterwards."""
    return OrderedDict()


def _storage(data: Any) -> Storage:
    """A storage from the bytes of its own stream, wherever it lay when it was saved: five pickles, a count, the numbers."""
    if not isinstance(data, bytes):
        raise RefusedError(f"a storage of {described(data)}; valid: bytes")
    stream = io.BytesIO(data)
    try:
        magic, protocol, system, reference, keys = (
            _Machine(stream, PREDICTOR, lambda found: found, nested=True).run() for _ in range(5)
        )
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
    return Storage(_values(values, dtype))


def _values(data: bytes, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


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


def _members(values: Any) -> list[Any]:
    """What a set is made of."""
    if not isinstance(values, list):
        raise RefusedError(f"a set of {described(values)}; valid: of a list")
    return values


def _typed(function: Any, kind: Any, given: Any, *_: Any) -> Tensor:
    """A tensor that had attributes, which are dropped."""
    if function != Name("torch._utils._rebuild_tensor_v2") or kind != Name("torch.Tensor") or not isinstance(given, tuple):
        raise RefusedError(f"a {described(kind)} by {described(function)}; valid: a torch.Tensor by _rebuild_tensor_v2")
    return _tensor(*given)


class _Archive:
    """The zip archive that torch.save writes: FOLDER/data.pkl, and the numbers of storage KEY in FOLDER/data/KEY, as they are.

    None of its entries is compressed, and together they have no more bytes than the file: they cannot unpack to more.
    """

    def __init__(self, opened: BinaryIO) -> None:
        size = opened.seek(0, io.SEEK_END)
        try:
            self.zip = zipfile.ZipFile(opened)
        except Exception as error:  # whatever damaged bytes lead to
            raise RefusedError(
                f"not a whole zip archive ({type(error).__name__}: {str(error)[:200]!a}); "
                "valid: what torch.save writes since version 1.6, which begins with PK and ends with the list of its entries"
            ) from None
        entries = self.zip.infolist()
        self.sizes = {entry.filename: entry.file_size for entry in entries}
        if len(self.sizes) != len(entries):
            raise RefusedError("entries of the same name; valid: each once")
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
                raise RefusedError(f"{entry.filename[:200]!a}: compressed or encrypted; valid: stored as it is")
        if (total := sum(self.sizes.values())) > size:
            raise RefusedError(f"entries of {total} bytes in {size}; valid: no more than the file has")
        folders = [name.removesuffix("/data.pkl") for name in self.sizes if name.endswith("/data.pkl")]
        if len(folders) != 1:
            raise RefusedError(f"{len(folders)} entries data.pkl; valid: one, in a folder, as torch.save writes it")
        self.folder = folders[0]
        if f"{self.folder}/byteorder" in self.sizes and (order := self.read("byteorder", 10)) != b"little":
            raise RefusedError(f"byteorder {order!a}; valid: little")
        self.storages: dict[str, Storage] = {}

    def read(self, name: str, most: int) -> bytes:
        """An entry of the folder, which must not be damaged."""
        size = self.sizes.get(f"{self.folder}/{name}")
        if size is None or size > most:
            raise RefusedError(f"{name[:200]!a}: {'missing' if size is None else f'{size} bytes'}; valid: at most {most}")
        try:
            return self.zip.read(f"{self.folder}/{name}")  # checks their CRC
        except Exception as error:  # whatever damaged bytes lead to
            raise RefusedError(f"{name!a}: {type(error).__name__}: {str(error)[:200]!a}; valid: an undamaged file") from None

    def pickle(self) -> bytes:
        """What is to be read with `storage`."""
        return self.read("data.pkl", LARGEST_FILE)

    def storage(self, reference: StorageReference) -> Storage:
        """What a reference means, read once."""
        dtype = MODULE_STORAGES.get(reference.kind)
        if dtype is None:
            raise RefusedError(f"a storage that holds {reference.kind}; valid: {', '.join(MODULE_STORAGES)}")
        name = f"data/{reference.key}"
        if reference.key not in self.storages:
            size = self.sizes.get(f"{self.folder}/{name}")
            if size is None or size != reference.elements * dtype.itemsize:
                found = f"{described(reference.elements)} elements in {'no' if size is None else size} bytes"
                raise RefusedError(f"a storage of {found}; valid: {dtype.itemsize} bytes for each element")
            self.storages[reference.key] = Storage(_values(self.read(name, size), dtype))
        found = self.storages[reference.key]
        if found.values.dtype != dtype or len(found.values) != reference.elements:
            raise RefusedError(f"storage {reference.key[:200]!a} twice, and different; valid: the same")
        return found


def _state_dict(module: Any) -> dict[str, Tensor]:
    """What nn.Module.state_dict makes of a module: first its parameters and buffers, then those of the modules in it."""
    found: dict[str, Tensor] = {}
    waiting, names = [("", module)], 0
    while waiting:
        prefix, value = waiting.pop()
        parameters, buffers, modules = (_part(value, part, prefix) for part in ("_parameters", "_buffers", "_modules"))
        names += 1 + len(parameters) + len(buffers) + len(modules)
        if names > MOST_NAMES or len(prefix) > LONGEST_NAME:
            valid = f"at most {MOST_NAMES}, the longest of {LONGEST_NAME} characters"
            raise RefusedError(f"module {prefix[:200]!a}: names that do not end; valid: {valid}")
        dropped = value.state.get("_non_persistent_buffers_set", set())
        if not isinstance(dropped, set):
            raise RefusedError(f"module {prefix[:200]!a}: _non_persistent_buffers_set {described(dropped)}; valid: a set")
        kept = {name: tensor for name, tensor in buffers.items() if name not in dropped}
        for name, tensor in [*parameters.items(), *kept.items()]:
            if prefix + name in found or not isinstance(tensor, Tensor | None):
                raise RefusedError(f"{(prefix + name)[:200]!a}: {described(tensor)}; valid: one tensor, or none")
            if tensor is not None:
                found[prefix + name] = tensor
        waiting += [(f"{prefix}{name}.", inner) for name, inner in reversed(modules.items()) if inner is not None]
    return found


def _part(value: Any, part: str, prefix: str) -> dict[str, Any]:
    """A module's parameters, buffers or modules by their names."""
    found = value.state.get(part) if isinstance(value, Inert) else None
    if not isinstance(found, dict):
        raise RefusedError(f"module {prefix[:200]!a}: {described(value)} without {part}; valid: a whole nn.Module")
    for name in found:
        if not isinstance(name, str) or not name or "." in name:
            raise RefusedError(f"module {prefix[:200]!a}: a name {described(name)}; valid: a string without points")
    return found


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch.storage._load_from_bytes": _storage,
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
}
"""What a predictor's file may call, and what is done instead."""

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

PREDICTOR = _Lists(FUNCTIONS, CLASSES, NAMES)

MODULE_STORAGES = {**STORAGES, "torch.BoolStorage": torch.bool, "torch.ByteStorage": torch.uint8}

MODULE = _Lists(
    {
        "collections.OrderedDict": _ordered_dict,
        "builtins.set": _members,
        "__builtin__.set": _members,
        "torch._utils._rebuild_parameter": _parameter,
        "torch._utils._rebuild_parameter_with_state": _parameter,
        "torch._utils._rebuild_tensor_v2": _tensor,
        "torch._tensor._rebuild_from_type_v2": _typed,
    },
    frozenset(),
    {
        *MODULE_STORAGES,
        *(f"torch.{name}" for name in ("float16", "bfloat16", "float32", "float64", "int32", "int64", "bool", "uint8")),
        "torch.Tensor",
        *(f"torch._C._nn.{name}" for name in ("gelu", "silu")),
    },
    packages=("torch.nn", "transformers", "trainer.models"),
    small_numbers=True,
)
"""Of a whole module: configurations have numbers as keys, and old protocols make sets by calls."""


def _reference(identity: Any) -> StorageReference:
    """A reference as torch writes it: ("storage", class, key, location, elements), and a view in a pickle of its own."""
    match identity:
        case (
            ("storage", Name(kind), str(key), str(), int(elements))
            | ("storage", Name(kind), str(key), str(), int(elements), None)
        ):  # fmt: skip
            return StorageReference(kind, key, elements)
    raise RefusedError(f"a reference to {described(identity)}; valid: to a storage")


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
