import builtins
import importlib
import io
import pickle
import random
import re
import struct
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from copy import copy
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import unpickle
from unpickle import Inert, Name, RefusedError, read_module, read_pickle

from .stages.published import PARAMETERS, SETTINGS, dumps, look_alike, loss, model, parameters, with_inside

PROTOCOLS = range(6)
MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
SYSTEM = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}

Refuses = Callable[..., None]
Reads = Callable[[bytes], dict[str, Tensor]]


def put(value: Any) -> bytes:
    """The opcodes of a plain value, for any protocol."""
    return b"(" + b"".join(map(put, value)) + b"t" if isinstance(value, tuple) else pickle.dumps(value, 3)[2:-1]


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def name(module: str, attribute: str, protocol: int = 4) -> bytes:
    """The opcodes that name something as that protocol does."""
    return text(module) + text(attribute) + b"\x93" if protocol >= 4 else f"c{module}\n{attribute}\n".encode()


def whole(payload: bytes, protocol: int = 4) -> bytes:
    """A pickle of the opcodes that make one value."""
    return (b"\x80%c" % protocol if protocol >= 2 else b"") + payload + b"."


def storage(
    values: bytes = bytes(24),
    system: bytes | None = None,
    reference: bytes | None = None,
    keys: bytes | None = None,
    magic: bytes = MAGIC,
    count: int = 6,
    kind: bytes = b"ctorch\nFloatStorage\n",
    elements: int = 6,
) -> bytes:
    """The bytes of a storage as torch writes them; each part may be another."""
    reference = reference or b"(" + text("storage") + kind + put("7") + put("cuda:0") + put(elements) + b"NtQ"
    parts = [put(SYSTEM) if system is None else system, reference, keys or put(["7"])]
    return magic + b"".join(b"\x80\x02" + part + b"." for part in parts) + struct.pack("<q", count) + values


def loaded(data: bytes) -> bytes:
    """The opcodes that make a storage of its bytes."""
    return name("torch.storage", "_load_from_bytes") + b"B" + struct.pack("<I", len(data)) + data + b"\x85R"


def tensor(size: Any = (3, 2), stride: Any = (2, 1), offset: Any = 0, of: bytes = b"") -> bytes:
    arguments = (of or loaded(storage())) + put(offset) + put(size) + put(stride) + b"\x89)"
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"tR"


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file that an attack makes if it works."""
    return tmp_path / "canary"


@pytest.fixture
def refuses(canary: Path, monkeypatch: pytest.MonkeyPatch) -> Refuses:
    """Assert that a pickle is refused with a message, and that nothing is imported or made of it, within a second or two."""

    def refuse(data: bytes, message: str, read: Callable[[bytes], Any] = read_pickle) -> None:
        imported: list[str] = []
        for codec in ("ascii", "latin-1", "utf-8", "raw-unicode-escape", "cp437"):
            "".encode(codec)  # imports it
        importer, by_name = builtins.__import__, importlib.import_module
        known, started = set(sys.modules), time.process_time()
        with monkeypatch.context() as patch:
            patch.setattr(importlib, "import_module", lambda name, *a: (imported.append(name), by_name(name, *a))[1])
            patch.setattr(builtins, "__import__", lambda name, *a, **k: (imported.append(name), importer(name, *a, **k))[1])
            try:
                error = read(data)
            except RefusedError as refused:
                error = refused
        assert isinstance(error, RefusedError)
        assert re.search(message, str(error)), error
        assert imported == []
        assert set(sys.modules) == known
        assert time.process_time() - started < 10
        assert str(error).isprintable()
        assert len(str(error)) < 3000
        assert "valid: " in str(error)
        assert not canary.exists()

    return refuse


CALLS: list[tuple[str, str, tuple[Any, ...]]] = [
    *((module, "system", ("touch CANARY",)) for module in ("os", "posix", "nt", "torch.os", "solvers.os", "torch_utils.os")),
    *((module, "popen", ("touch CANARY",)) for module in ("os", "platform")),
    *((module, "eval", ("open('CANARY', 'w')",)) for module in ("builtins", "__builtin__", "__builtins__")),
    *((module, "exec", ("open('CANARY', 'w')",)) for module in ("builtins", "__builtin__", "torch_utils.persistence")),
    *((module, "__import__", ("os",)) for module in ("builtins", "__builtin__", "importlib", "torch_utils.persistence")),
    *(("builtins", function, ("CANARY", "w")) for function in ("open", "compile", "getattr", "map", "type", "breakpoint")),
    ("operator", "attrgetter", ("system",)),
    ("operator", "methodcaller", ("system", "touch CANARY")),
    ("functools", "partial", ("touch CANARY",)),
    ("functools", "reduce", ("touch CANARY",)),
    *(("subprocess", function, (("touch", "CANARY"),)) for function in ("Popen", "check_output", "getoutput")),
    ("runpy", "run_path", ("CANARY",)),
    ("runpy", "_run_code", ("open('CANARY', 'w')", {})),
    ("ctypes", "CDLL", ("CANARY",)),
    ("_ctypes", "dlopen", ("CANARY", 2)),
    ("importlib", "import_module", ("os",)),
    ("importlib.machinery", "SourceFileLoader", ("x", "CANARY")),
    *(
        (module, "loads", (b"cos\nsystem\n(Vtouch CANARY\ntR.",))
        for module in ("pickle", "_pickle", "cPickle", "dill", "joblib")
    ),
    *(
        (module, "load", ("CANARY",))
        for module in ("torch", "torch.serialization", "torch.hub", "torch.jit", "numpy", "joblib")
    ),
    ("torch", "Tensor", ()),
    ("torch._utils", "_rebuild_tensor", ()),
    ("torch._utils", "_import_dotted_name", ("os.system",)),
    ("torch.fx.graph_module", "reduce_graph_module", ({}, "open('CANARY', 'w')")),
    ("torch._inductor.codecache", "PyCodeCache.load", ("open('CANARY', 'w')",)),
    ("torch.distributed.rpc.internal", "_run_function", ()),
    ("numpy", "fromfile", ("CANARY",)),
    ("numpy.core.multiarray", "_reconstruct", ()),
    ("numpy.testing._private.utils", "runstring", ("open('CANARY', 'w')", {})),
    ("types", "CodeType", (0,)),
    ("types", "FunctionType", (0,)),
    ("marshal", "loads", (b"c",)),
    ("webbrowser", "open", ("CANARY",)),
    ("pathlib", "Path.touch", ("CANARY",)),
    ("pathlib", "PosixPath", ("CANARY",)),
    ("shutil", "rmtree", ("CANARY",)),
    ("pty", "spawn", ("touch CANARY",)),
    ("timeit", "timeit", ("open('CANARY', 'w')",)),
    ("code", "InteractiveInterpreter.runcode", ("open('CANARY', 'w')",)),
    ("pdb", "run", ("open('CANARY', 'w')",)),
    ("cProfile", "run", ("open('CANARY', 'w')",)),
    ("codecs", "decode", (b"x", "hex")),
    ("_codecs", "encode", ("x", "latin1")),
    ("sys", "modules", ()),
    ("copyreg", "_reconstructor", ()),
    ("copyreg", "__newobj__", ()),
    ("collections", "defaultdict", ()),
    ("collections", "namedtuple", ("x", "y")),
    ("collections", "OrderedDict.fromkeys", ((),)),
    ("collections.OrderedDict", "__init__.__globals__", ()),
    ("torch.nn.modules.activation", "Sigmoid.__init__.__globals__", ()),
    ("torch.nn.modules.activation", "Sigmoid.forward", ()),
    ("torch.nn.modules.activation", "torch.os.system", ("touch CANARY",)),
    ("torch.nn.modules.activation", "ReLU", ()),
    ("torch.nn.modules.activation", "sigmoid", ()),
    ("torch_utils.persistence", "_reconstruct_persistent_obj.__globals__", ()),
    ("torch_utils.persistence", "import_hook", ("CANARY",)),
    ("solvers", "load_predictor", ("CANARY",)),
    ("solvers", "epd_sampler.__globals__", ()),
    ("unpickle", "FUNCTIONS", ()),
    ("", "", ()),
    ("torch", "", ()),
    (".collections", "OrderedDict", ()),
    ("collections.", "OrderedDict", ()),
]


def placed(value: Any, canary: Path) -> Any:
    if isinstance(value, tuple):
        return tuple(placed(item, canary) for item in value)
    if isinstance(value, bytes):
        return value.replace(b"CANARY", str(canary).encode())
    return value.replace("CANARY", str(canary)) if isinstance(value, str) else value


def everywhere(payload: bytes, protocol: int = 4) -> list[bytes]:
    """The pickles that have opcodes alone, in a published file, among a list, and in a storage's own stream."""
    nested = storage(system=payload)
    return [whole(payload, protocol), with_inside(payload), whole(b"](" + payload + b"e"), whole(loaded(nested))]


@pytest.mark.parametrize(("module", "attribute", "arguments"), CALLS, ids=[f"{m}.{a}" for m, a, _ in CALLS])
def test_a_call_of_anything_unlisted_is_refused_by_its_name(
    module: str, attribute: str, arguments: tuple[Any, ...], canary: Path, refuses: Refuses
) -> None:
    given = put(placed(arguments, canary))
    for protocol in PROTOCOLS:
        for data in everywhere(name(module, attribute, protocol) + given + b"R", protocol):
            refuses(data, rf"GLOBAL: '{re.escape(module)}\.{re.escape(attribute)}'; valid: collections.OrderedDict, ")
    inst = b"(" + b"".join(map(put, arguments)) + f"i{module}\n{attribute}\n".encode()
    for data in everywhere(inst):
        refuses(data, "opcode INST; valid")


class Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.reduced


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (lambda f: Call(__import__("os").system, f"touch {f}"), "'posix.system'"),
        (lambda f: Call(eval, f"open({str(f)!r}, 'w').close()"), r"'(__builtin__|builtins)\.eval'"),
        (lambda f: Call(exec, f"open({str(f)!r}, 'w').close()"), r"'(__builtin__|builtins)\.exec'"),
        (lambda f: Call(f.touch), r"'(__builtin__|builtins)\.getattr'"),
        (lambda f: Call(type(f).touch, f), r"'(__builtin__\.getattr|builtins\.getattr|pathlib\.Path\.touch)'"),
        (lambda f: Call(pickle.loads, pickle.dumps(Call(eval, f"open({str(f)!r}, 'w').close()"))), r"'_?pickle\.loads'"),
    ],
    ids=["system", "eval", "exec", "bound method", "method", "loads"],
)
def test_what_the_standard_unpickler_executes_is_refused(
    attack: Callable[[Path], Call], message: str, protocol: int, canary: Path, refuses: Refuses
) -> None:
    for value in (attack(canary), {"model": attack(canary)}, model({"r_params": attack(canary)})):  # type: ignore[dict-item]
        refuses(dumps(value, protocol), message)
    # the standard unpickler, on what this test itself wrote: only so is it known that the canary would have been touched
    pickle.loads(pickle.dumps(attack(canary), protocol))
    assert canary.exists()


SIGMOID, ORDERED = name("torch.nn.modules.activation", "Sigmoid"), name("collections", "OrderedDict")
REBUILD, PARAMETER = name("torch._utils", "_rebuild_tensor_v2"), name("torch._utils", "_rebuild_parameter")
LOAD, EPD = name("torch.storage", "_load_from_bytes"), name("solvers", "epd_sampler")
PERSISTENT = name("torch_utils.persistence", "_reconstruct_persistent_obj")
INERT = SIGMOID + b")\x81"
KEY = text("k")


def record(**changes: Any) -> dict[str, Any]:
    return {"type": "class", "version": 6, "module_src": "", "class_name": "EPD_predictor", "state": {}, **changes}


OPCODES: dict[str, tuple[bytes, str]] = {
    # names
    "spaces before the name": (b"ccollections\n OrderedDict\n", r"'collections\. OrderedDict'"),
    "spaces after the module": (b"ccollections \nOrderedDict\n", r"'collections\. OrderedDict'"),
    "a third word": (b"ccollections\nOrderedDict os.system\n", r"'collections\.OrderedDict os\.system'"),
    "a whole name in the module": (b"cos system\n\n", r"'os\.system '"),
    "carriage return": (b"cos\r\nsystem\n", r"'os\\r\.system'"),
    "escapes": (b"cos\n\\x73ystem\n", r"'os\.system'"),
    "a bad escape": (b"cos\n\\d\n", "not a whole pickle"),
    "no ASCII": ("ctorch.nn.modules.activation\nЅigmoid\n".encode(), "not a whole pickle"),
    "a look-alike letter": (name("torch.nn.modules.activation", "Ѕigmoid"), r"'torch\.nn\.modules\.activation\.\\u0405igmoid'"),
    "full width": (name("torch.ｎｎ.modules.activation", "Sigmoid"), r"'torch\.\\uff4e\\uff4e\.modules"),
    "a surrogate": (name("collections", "OrderedDict\ud800"), r"'collections\.OrderedDict\\ud800'"),
    "an escape sequence of the terminal": (name("os\x1b[2J", "system\n"), r"'os\\x1b\[2J\.system\\n'"),
    "an endless name": (name("o" * 10**6, "s" * 10**6), "'o{200}'; valid"),
    "strings of the memo": (put("posix") + b"q\x010" + put("system") + b"q\x02h\x01h\x02\x93", "opcode POP"),
    "strings of a list's memo": (b"]" + put("posix") + b"q\x01a" + put("system") + b"q\x02ah\x01h\x02\x93", "'posix.system'"),
    "a name of bytes": (b"C\x02osC\x06system\x93", r"bytes b'os', bytes b'system'"),
    "a name of a number and a list": (b"K\x01]\x93", "int 1, list"),
    "a name of names": (ORDERED + ORDERED + b"\x93", "collections.OrderedDict, collections.OrderedDict; valid"),
    # other ways to make objects
    "OBJ": (b"(" + SIGMOID + put("x") + b"o", "opcode OBJ"),
    "NEWOBJ of a function": (ORDERED + b")\x81", "an object of collections.OrderedDict"),
    "NEWOBJ of a string": (put("os.system") + b")\x81", "an object of str 'os.system'"),
    "NEWOBJ with arguments": (SIGMOID + put((1,)) + b"\x81", "an object of torch.nn.modules.activation.Sigmoid"),
    "NEWOBJ_EX": (SIGMOID + b")}\x92", "opcode NEWOBJ_EX"),
    "EXT1": (b"\x82\x01", "opcode EXT1"),
    "EXT2": (b"\x83\x01\x01", "opcode EXT2"),
    "EXT4": (b"\x84\x01\x01\x01\x01", "opcode EXT4"),
    "PERSID": (b"Pos.system\n", "opcode PERSID"),
    "BUILD of a list": (b"]}b", "a state dict for list"),
    "BUILD of an OrderedDict": (ORDERED + b")R}b", "a state .* for"),
    "BUILD of a function": (ORDERED + put({"__code__": 1}) + b"b", "a state dict for collections.OrderedDict"),
    "BUILD with slots": (INERT + b"N" + put({"x": 1}) + b"\x86b", "a state tuple for torch.nn.modules.activation.Sigmoid"),
    "BUILD twice": (INERT + put({"x": 1}) + b"b}b", "a state dict for torch.nn.modules.activation.Sigmoid"),
    "SETITEM of an object": (INERT + put("x") + b"K\x01s", "Sigmoid; valid: a dict"),
    "APPEND to a tuple": (b")K\x01a", "tuple; valid: a list"),
    "ADDITEMS to a list": (b"](K\x01\x90", "list; valid: a set"),
    **{
        f"opcode {opcode}": (before + code, f"opcode {opcode}; valid")
        for opcode, before, code in [
            ("DUP", b"]", b"2"),
            ("POP", b"]]", b"0"),
            ("POP_MARK", b"](]", b"1"),
            ("FROZENSET", b"(", b"\x91"),
            ("BYTEARRAY8", b"", b"\x96" + struct.pack("<Q", 1) + b"x"),
            ("NEXT_BUFFER", b"", b"\x97"),
            ("READONLY_BUFFER", b"]", b"\x98"),
        ]
    },
    # calls of what is listed
    "a call of a class": (SIGMOID + b")R", "a call of torch.nn.modules.activation.Sigmoid"),
    "a call of what may only be named": (EPD + b")R", "a call of (solvers.epd_sampler)"),
    "a call of a string": (put("os.system") + b")R", "a call of str 'os.system'"),
    "a call of a number": (b"K\x07)R", "a call of int 7"),
    "a call of an object": (INERT + b")R", "a call of torch.nn.modules.activation.Sigmoid"),
    "a call without a tuple": (ORDERED + b"]R", "OrderedDict of list; valid: a tuple"),
    "OrderedDict of a list": (ORDERED + b"]\x85R", "_ordered_dict"),
    "OrderedDict of a number": (ORDERED + put((1, 2)) + b"R", "_ordered_dict"),
    "a parameter of a list": (PARAMETER + b"]\x85R", "a parameter of list"),
    "a parameter of nothing": (PARAMETER + b")R", "_parameter"),
    "a tensor of a list": (REBUILD + put(([], 0, (), ())) + b"R", "a tensor of list"),
    "a tensor of nothing": (REBUILD + b")R", "_tensor"),
    "a storage of a string": (LOAD + put(("x",)) + b"R", "a storage of str 'x'"),
    "a storage of nothing": (LOAD + b")R", "_storage"),
    "a storage of two": (LOAD + b"C\0C\0\x86R", "_storage"),
    "a persistent object of a list": (PERSISTENT + b"]\x85R", "a persistent object of list"),
    "a persistent object without a state": (PERSISTENT + b"}\x85R", "a persistent object of dict"),
    "a persistent object's state": (PERSISTENT + put((record(state=[1]),)) + b"R", "a persistent object of dict"),
    "a class name of a list": (PERSISTENT + put((record(class_name=[1]),)) + b"R", "class name list"),
    "an endless class name": (PERSISTENT + put((record(class_name="x" * 10**6),)) + b"R", "class name str 'x{100}'"),
    "a class name with an escape": (PERSISTENT + put((record(class_name="\x1b[2J"),)) + b"R", r"class name str '\\x1b"),
    "an odd dictionary": (b"(K\x01d", "a key without a value"),
    "odd items": (b"}(" + put("x") + b"u", "a key without a value"),
    "an unknown opcode": (b"\xff", "opcode b.*xff.* unknown"),
    # keys
    "a key of a tuple": (b"})Ns", "a key that is tuple"),
    "a key of a number": (b"}K\x01Ns", "a key that is int 1"),
    "a key of a huge number": (b"}\x8b" + struct.pack("<I", 1000) + b"\x01" * 1000 + b"Ns", "a key that is int of 7993 bits"),
    "a key of a float": (b"}G\x7f\xf8\0\0\0\0\0\0Ns", "a key that is float nan"),
    "a key of a name": (b"}" + EPD + b"Ns", "a key that is solvers.epd_sampler"),
    "an endless key": (b"}" + put("k" * 1001) + b"Ns", "a key that is str 'k{100}'"),
    "a list in a set": (b"\x8f(]\x90", "a key that is list"),
    # lengths that nothing has
    **{
        f"a gigantic {opcode}": (code + struct.pack("<Q", 2**60)[: 8 if wide else 4] + b"x", "not a whole pickle|valid")
        for opcode, code, wide in [
            ("BINUNICODE8", b"\x8d", True),
            ("BINBYTES8", b"\x8e", True),
            ("BYTEARRAY8", b"\x96", True),
        ]
    },
    "a negative LONG4": (b"\x8b\xff\xff\xff\xff", "not a whole pickle"),
    "a gigantic LONG4": (b"\x8b\xff\xff\xff\x7fx", "not a whole pickle"),
    "a gigantic BINBYTES": (b"B\xff\xff\xff\xffx", "not a whole pickle"),
    "a negative BINSTRING": (b"T\xff\xff\xff\xffx", "not a whole pickle"),
    "a million digits": (b"I" + b"9" * 10**6 + b"\n", "not a whole pickle .ValueError: 'Exceeds the limit"),
    "a million digits of a long": (b"L" + b"9" * 10**6 + b"L\n", "not a whole pickle .ValueError: 'Exceeds the limit"),
    "a float of words": (b"Fx\n", "not a whole pickle"),
    "text that is none": (b"X\x01\0\0\0\xff", "not a whole pickle"),
}  # fmt: skip


ALONE: dict[str, tuple[bytes, str]] = {
    "no end of line": (b"ccollections\nOrderedDict", "no newline found"),
    "a negative PUT": (b"]p-1\nh\x05", "KeyError: '5'"),
    "names from MEMOIZE": (b"](" + text("posix") + b"\x94" + text("system") + b"\x94h\0h\1\x93", "'posix.system'"),
    "nothing on the stack": (b"\x85", "too few values"),
    "a tuple below the mark": (b"]]](\x87", "too few values"),
    "a call below the mark": (ORDERED + b")(R", "too few values"),
    "an item below the mark": (b"}" + put("x") + b"(K\x01s", "too few values"),
    "appended below the mark": (b"](a", "too few values"),
    "a memo below the mark": (b"](q\x01", "too few values"),
    "a mark left": (b"(]", "1 marks at the end"),
    "no mark": (b"]e", "not a whole pickle"),
    "two values": (b"]]", "2 values and 0 marks at the end"),
    "no value": (b"", "0 values and 0 marks at the end"),
    "an unknown memo": (b"h\x63", "not a whole pickle .KeyError: '99'"),
    "a gigantic FRAME": (b"\x95" + struct.pack("<Q", 2**60), "not a whole pickle|0 values"),
}
"""What matters only where nothing lies below it on the stack."""


@pytest.mark.parametrize("case", [*OPCODES, *ALONE])
def test_opcodes_that_build_no_plain_data_are_refused(case: str, refuses: Refuses) -> None:
    payload, message = {**OPCODES, **ALONE}[case]
    for protocol in PROTOCOLS:
        refuses(whole(payload, protocol), message)
    refuses(whole(loaded(storage(system=payload))), "in a storage: (at|after) byte")
    if case in OPCODES:
        refuses(with_inside(payload), message)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "exhausted|no STOP"),
        (b"\x80\x04", "exhausted|no STOP"),
        (b"N", "exhausted|no STOP"),
        (b"N.N.", "2 bytes after the end of the pickle"),
        (b"N." + whole(name("os", "system")), r"\d+ bytes after the end"),
        (look_alike() + b".", "1 bytes after the end of the pickle"),
        (b"PK\x03\x04", "opcode PERSID|not a whole pickle"),
        (b"." + bytes(unpickle.LARGEST_FILE), f"{unpickle.LARGEST_FILE + 1} bytes; valid: at most"),
        (whole(b"\x80\x63" + name("os", "system"), 99), "'os.system'"),
        (b"\x80\x04Q.", "opcode BINPERSID"),
        (whole(put("7") + b"Q"), "opcode BINPERSID"),
    ],
)
def test_what_is_no_single_pickle_is_refused(data: bytes, message: str, refuses: Refuses) -> None:
    refuses(data, message)


def test_a_million_opcodes_are_the_most(monkeypatch: pytest.MonkeyPatch, refuses: Refuses) -> None:
    assert unpickle.MOST_OPCODES == 10**6
    monkeypatch.setattr(unpickle, "MOST_OPCODES", 1000)
    assert read_pickle(b"](" + b"]" * 996 + b"e.") == [[]] * 996
    refuses(b"](" + b"]" * 997 + b"e.", "STOP: more than 1000 opcodes; valid: fewer")
    refuses(b"]" * 10**6, "EMPTY_LIST: more than 1000 opcodes; valid: fewer")


FLOATS = b"ctorch\nFloatStorage\n"

STORAGES: dict[str, tuple[bytes, str]] = {
    "2^60 elements": (storage(elements=2**60), "a storage of int 1152921504606846976 and 6 elements"),
    "2^60 elements twice": (storage(elements=2**60, count=2**60), "a storage of int 1152921504606846976"),
    "negative elements": (storage(elements=-6, count=-6), "a storage of int -6 and -6 elements in 24 bytes"),
    "elements of a huge number": (storage(elements=1 << 10**5), "a storage of int of 100001 bits"),
    "more elements than bytes": (storage(elements=7, count=7), "a storage of int 7 and 7 elements in 24 bytes"),
    "fewer elements than bytes": (storage(elements=5, count=5), "a storage of int 5 and 5 elements in 24 bytes"),
    "two counts": (storage(count=5), "a storage of int 6 and 5 elements"),
    "no count": (storage()[:-25], "a storage of int 6 and"),
    "another dtype": (storage(kind=b"ctorch\nDoubleStorage\n"), "valid: 8 bytes for each element"),
    "an unlisted dtype": (storage(kind=b"ctorch\nCharStorage\n"), r"'torch\.CharStorage'"),
    "a function as dtype": (storage(kind=b"ccollections\nOrderedDict\n"), "a storage that holds collections.OrderedDict"),
    "a string as dtype": (storage(kind=put("FloatStorage")), "a reference to tuple; valid: to a storage"),
    "os.system as dtype": (storage(kind=b"cos\nsystem\n"), r"'os\.system'"),
    "another key": (storage(keys=put(["8"])), "a storage that holds torch.FloatStorage; valid: .*under its own key"),
    "two keys": (storage(keys=put(["7", "8"])), "valid: .*under its own key"),
    "no keys": (storage(keys=b"]"), "valid: .*under its own key"),
    "deep keys": (storage(keys=b"]" * 40 + b"a" * 39), "valid: .*under its own key"),
    "keys with a call": (storage(keys=b"cos\nsystem\n" + put(("true",)) + b"R"), r"'os\.system'"),
    "keys that explode": (storage(keys=b"})" + b"q\x01h\x01\x86" * 30 + b"Ns"), "more than 100 opcodes|a key that is tuple"),
    "big-endian": (storage(system=put(SYSTEM | {"little_endian": False})), "not little-endian"),
    "no endianness": (storage(system=b"}"), "not little-endian"),
    "endianness of a number": (storage(system=put({"little_endian": 1})), "not little-endian"),
    "a wrong magic": (storage(magic=pickle.dumps(7, 2) + pickle.dumps(1001, 2)), "unknown format"),
    "a wrong protocol": (storage(magic=MAGIC[:-4] + pickle.dumps(1002, 2)[-4:]), "unknown format"),
    "a magic that calls": (b"cos\nsystem\n(Vtrue\ntR.", r"in a storage: .*'os\.system'"),
    "a call of what is listed": (storage(system=ORDERED + b")R"), "a call of collections.OrderedDict; valid: none in a"),
    "a storage in a storage": (storage(system=loaded(storage())), "a call of torch.storage._load_from_bytes; valid: none"),
    "a reference to a module": (storage(reference=put(("module", "os", "system")) + b"Q"), "a reference to tuple"),
    "a view": (storage(reference=b"(" + text("storage") + FLOATS + KEY + KEY + b"K\x06)tQ"), "a reference to tuple"),
    "a reference by number": (storage(reference=b"K\x07Q"), "a reference to int 7"),
    "no reference": (storage(reference=b"N"), "a storage that holds NoneType"),
    "many opcodes": (storage(system=b"]" * 200), "more than 100 opcodes"),
    "nothing": (b"", "exhausted|no STOP"),
    "no pickle": (b"\0" * 100, "unknown"),
    "tar": (b"storages\0" * 100, "in a storage"),
}  # fmt: skip


@pytest.mark.parametrize("case", STORAGES)
def test_a_storage_that_torch_did_not_write_is_refused(case: str, refuses: Refuses) -> None:
    data, message = STORAGES[case]
    for payload in (loaded(data), tensor(of=loaded(data))):
        refuses(whole(payload), message)
        refuses(with_inside(payload), message)


def test_a_zip_within_a_storage_is_refused(canary: Path, refuses: Refuses) -> None:
    stream = io.BytesIO()
    torch.save({"x": Call(eval, f"open({str(canary)!r}, 'w').close()")}, stream)
    refuses(whole(loaded(stream.getvalue())), "in a storage: .*(opcode PERSID|not a whole pickle)")
    stream = io.BytesIO()
    torch.save(Call(eval, f"open({str(canary)!r}, 'w').close()"), stream, _use_new_zipfile_serialization=False)
    refuses(whole(loaded(stream.getvalue())), r"in a storage: .*'__builtin__\.eval'")


@pytest.mark.parametrize(
    ("size", "stride", "offset", "message"),
    [
        ((4, 2), (2, 1), 0, "8 elements from 0 on; valid: within the storage's 6"),
        ((3, 2), (2, 1), 1, "6 elements from 1 on"),
        ((3, 2), (3, 1), 0, "6 elements from 0 on"),
        ((1,), (1,), 6, "1 elements from 6 on"),
        ((0,), (1,), 7, "0 elements from 7 on"),
        ((10**6, 10**6), (0, 0), 0, "1000000000000 elements from 0 on"),
        ((7,), (0,), 0, "7 elements from 0 on"),
        ((2**31,), (0,), 0, "of int 2147483648; valid: whole numbers below 2"),
        ((1 << 10**6,), (0,), 0, "of int of 1000001 bits"),
        ((2**30,) * 8, (1,) * 8, 0, "elements from 0 on"),
        ((1,) * 9, (1,) * 9, 0, "valid: at most 8 numbers"),
        ((0, 1), (2**62, 1), 0, "valid: whole numbers below 2"),
        ((3, 2), (-2, 1), 5, "of int -2"),
        ((-3, 2), (2, 1), 0, "of int -3"),
        ((3, 2), (2, 1), -1, "of int -1"),
        ((3, 2), (2, 1), 2**64, "of int of 65 bits"),
        ((3, 2), (2, 1), 0.0, "of float 0.0"),
        ((3, 2.0), (2, 1), 0, "of float 2.0"),
        ((3, True), (2, 1), 0, "of bool True"),
        ((3, 2), ("2", 1), 0, "of str '2'"),
        ((3, 2), (2,), 0, "as many strides"),
        ([3, 2], (2, 1), 0, "a tensor of size list"),
        (6, 1, 0, "a tensor of size int 6"),
        (None, None, None, "a tensor of size NoneType"),
        ((None, 1), (1, 1), 0, "of NoneType"),
    ],
)
def test_a_tensor_that_reaches_out_of_its_storage_is_refused(
    size: Any, stride: Any, offset: Any, message: str, refuses: Refuses
) -> None:
    refuses(whole(tensor(size, stride, offset)), message)
    refuses(with_inside(tensor(size, stride, offset)), message)


def test_a_tensor_within_its_storage_is_read() -> None:
    values = torch.arange(6.0)
    of = loaded(storage(values.numpy().tobytes()))
    assert torch.equal(read_pickle(whole(tensor((2, 3), (1, 2), 0, of))), values.view(3, 2).T)
    assert torch.equal(read_pickle(whole(tensor((2,), (0,), 5, of))), torch.tensor([5.0, 5.0]))
    assert read_pickle(whole(tensor((), (), 3, of))).item() == 3
    assert read_pickle(whole(tensor((0, 5), (5, 1), 0, loaded(storage(b"", count=0, elements=0))))).shape == (0, 5)


def called(function: bytes, argument: bytes, times: int) -> bytes:
    """A function of the same argument many times."""
    return function + b"q\1" + argument + b"\x85q\2R" + b"h\1h\2R" * times


DOUBLED = b")" + b"q\1h\1\x86" * 200
EMPTY = storage(b"", count=0, elements=0)

BOMBS: dict[str, tuple[bytes, str]] = {
    "called": (DOUBLED + b")R", "a call of tuple"),
    "a class name": (
        PERSISTENT + b"}(" + text("state") + b"}" + text("class_name") + DOUBLED + b"u\x85R",
        "class name tuple",
    ),
    "hashed as a key": (b"}" + DOUBLED + b"Ns", "a key that is tuple"),
    "hashed in a set": (b"\x8f(" + DOUBLED + b"\x90", "a key that is tuple"),
    "a storage of it": (LOAD + DOUBLED + b"\x85R", "a storage of tuple"),
    "a tensor's size": (tensor().replace(put((3, 2)), DOUBLED, 1), "of tuple"),
    "numbers that collide": (b"}(" + b"".join(put(k * (2**61 - 1)) + b"N" for k in range(2, 9999)) + b"u", "a key that is int"),
    "a storage many times": (called(LOAD, loaded(storage())[len(LOAD) : -2], 10**5), "each storage once"),
    "an empty storage many times": (called(LOAD, loaded(EMPTY)[len(LOAD) : -2], 10**5), "each storage once"),
    "a long list read many times": (called(ORDERED, b"](" + b"N" * 10**5 + b"e", 10**4), "_ordered_dict.. takes 0"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_a_bomb_is_refused_soon(case: str, refuses: Refuses) -> None:
    payload, message = BOMBS[case]
    refuses(whole(payload), message)


def test_what_is_shared_takes_no_memory() -> None:
    """A large tensor or state that is used a thousand times is the same one."""
    size = 10**6
    data = loaded(storage(bytes(4 * size), count=size, elements=size))
    of = data + b"q\1K\0" + put((size,)) + put((1,)) + b"\x89)"
    tensors = read_pickle(whole(b"](" + REBUILD + b"q\0(" + of + b"tq\2R" + b"h\0h\2R" * 1000 + b"e"))
    assert len({value.data_ptr() for value in tensors}) == 1
    state = put({str(number): number for number in range(1000)})
    objects = read_pickle(whole(b"](" + INERT + state + b"r\xff\0\0\0b" + (INERT + b"j\xff\0\0\0b") * 1000 + b"e"))
    assert len({id(value.state) for value in objects}) == 1


def deep(first: bytes, again: bytes, close: bytes, depth: int) -> bytes:
    """A value within one of its kind, and so on; `again` opens one as `first` does, with the memo."""
    return first + again * (depth - 1) + b"N" + close * depth


NAMED = text("class_name") + text("x") + b"s" + text("state") + b"}" + KEY

DEEP: dict[str, bytes] = {
    "lists": deep(b"]", b"]", b"a", 50_000),
    "tuples": b")" + b"\x85" * 50_000,
    "dictionaries": deep(b"}" + KEY, b"}" + KEY, b"s", 30_000),
    "OrderedDicts": deep(ORDERED + b"q\0)R" + KEY, b"h\0)R" + KEY, b"s", 20_000),
    "objects": deep(SIGMOID + b"q\0)\x81}" + KEY, b"h\0)\x81}" + KEY, b"sb", 15_000),
    "persistent objects": deep(PERSISTENT + b"q\0}" + NAMED, b"h\0}" + NAMED, b"ss\x85R", 10_000),
}


@pytest.mark.parametrize("case", DEEP)
def test_deep_nesting_is_read_and_freed(case: str, refuses: Refuses) -> None:
    value = read_pickle(whole(DEEP[case]))
    del value
    refuses(whole(DEEP[case] + b")R"), "a call of")
    refuses(whole(b"}" + DEEP[case] + b"Ns"), "a key that is")
    refuses(with_inside(DEEP[case] + b"\x93"), "GLOBAL")


@pytest.mark.parametrize("state", [{"__setstate__": 1}, {"__class__": "os.system"}, {"__reduce__": None, "__dict__": {}}])
def test_a_state_is_data_whatever_its_keys(state: dict[str, Any]) -> None:
    value = read_pickle(whole(INERT + put(state) + b"b"))
    assert type(value) is Inert
    assert value == Inert("torch.nn.modules.activation.Sigmoid", state)


SMALL = dumps({"model": model({"r_params": parameters()["r_params"]})})


def outcome(data: bytes) -> bool:
    """Whether it is read; anything but a value or a refusal is an error."""
    try:
        read_pickle(data)
    except RefusedError as error:
        message = str(error)
    else:
        return True
    assert "valid: " in message
    assert message.isprintable()
    return False


def test_a_truncated_file_is_refused_wherever_it_ends() -> None:
    assert outcome(SMALL)
    assert not any(outcome(SMALL[:end]) for end in range(len(SMALL)))


@pytest.mark.parametrize("flips", [1, 3, 20])
def test_damaged_bytes_are_read_or_refused(flips: int) -> None:
    generator = random.Random(flips)
    for _ in range(1000):
        data = bytearray(SMALL)
        for _ in range(flips):
            data[generator.randrange(len(data))] = generator.randrange(256)
        outcome(bytes(data))


def test_random_opcodes_are_read_or_refused() -> None:
    pieces = [payload for payload, _ in OPCODES.values() if len(payload) < 1000]
    pieces += [bytes([code]) for code in range(256)] + [tensor(), INERT, b"}", b"]", b"(", put("k"), b"q\1", b"h\1"] * 20
    generator = random.Random(0)
    for _ in range(3000):
        outcome(whole(b"".join(generator.choices(pieces, k=generator.randrange(1, 12)))))


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize("cuda", [True, False])
def test_a_published_file_is_read_exactly(protocol: int, cuda: bool) -> None:
    values = parameters()
    found = read_pickle(dumps({"model": model(values), "loss_fn": loss()}, protocol, cuda))
    assert list(found) == ["model", "loss_fn"]
    state = found["model"].state
    assert found["model"].kind == "persistent:EPD_predictor"
    assert list(state["_parameters"]) == list(PARAMETERS)
    for name, value in values.items():
        assert state["_parameters"][name].dtype == torch.float32
        assert torch.equal(state["_parameters"][name], value)
    assert {name: state[name] for name in SETTINGS} == SETTINGS
    assert [type(state[name]) for name in SETTINGS] == [type(value) for value in SETTINGS.values()]
    assert state["_modules"]["softmax"].kind == "torch.nn.modules.activation.Softmax"
    assert state["_modules"]["softmax"].state["dim"] == -1
    assert state["_non_persistent_buffers_set"] == set()
    assert found["loss_fn"].kind == "persistent:EPD_loss"
    assert found["loss_fn"].state["solver_stu"] == Name("solvers.epd_sampler")
    assert found["loss_fn"].state["tea_slice"] == [4, 8]
    assert torch.equal(found["loss_fn"].state["t_steps"], torch.linspace(80, 0.002, 4))


@pytest.mark.parametrize("protocol", range(4))
def test_protocols_that_no_published_file_has_are_refused_by_what_they_call(protocol: int, refuses: Refuses) -> None:
    refuses(look_alike(protocol), r"'(_codecs\.encode|builtins\.set|__builtin__\.set|copy_reg\._reconstructor)'")


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32], ids=str
)
def test_tensors_of_every_listed_type_are_read_exactly(dtype: torch.dtype) -> None:
    value = (100 * torch.randn(5, 4, generator=torch.Generator().manual_seed(0))).to(dtype)
    for tensor in (value, value.T, value[1:4, ::2], value[0, 0], value[:0]):
        found = read_pickle(dumps(tensor))
        assert found.dtype == dtype
        assert torch.equal(found, tensor)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_values_are_read_as_the_standard_unpickler_reads_them(protocol: int) -> None:
    text = ["", "x", "é\n\\", "\ud800", "y" * 300]
    numbers = [0, -1, 255, 65536, 2**31, -(2**63), 2**100, -(2**2100), 1.5, -0.0, float("inf"), True, False, None]
    value = {"a": text, "b": numbers, "c": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)), "d": {"e": {}}, "f": list(range(2000))}
    data = pickle.dumps(value, protocol)
    found = read_pickle(data)
    assert found == pickle.loads(data)  # of this test's own plain values: the reference that is compared with
    assert repr(found) == repr(value)


def test_the_bytes_of_a_storage_are_those_that_torch_writes() -> None:
    stream = io.BytesIO()
    value = torch.arange(6.0)
    torch.save(value, stream, _use_new_zipfile_serialization=False)
    data = stream.getvalue()
    assert data.startswith(MAGIC)
    assert data.endswith(struct.pack("<q", 6) + value.numpy().tobytes())


@pytest.fixture
def read(tmp_path: Path) -> Reads:
    """The state dict of the module in a file's bytes."""

    def read(data: bytes) -> dict[str, Tensor]:
        (tmp_path / "module.pth").write_bytes(data)
        return read_module(tmp_path / "module.pth")

    return read


def saved(value: Any, protocol: int = 2, **modules: dict[str, Any]) -> bytes:
    """What torch.save writes; classes are found in modules (their points written __) that exist only meanwhile."""
    made = {name.replace("__", "."): ModuleType(name) for name in modules}
    for module, contents in zip(made.values(), modules.values(), strict=True):
        vars(module).update(contents)
    stream = io.BytesIO()
    with patch.dict(sys.modules, made):
        torch.save(value, stream, pickle_protocol=protocol)
    return stream.getvalue()


def kind(module: str, attribute: str, base: type = object) -> type:
    """A class that a pickle writes as module.attribute."""
    return type(attribute, (base,), {"__module__": module})


def made(of: type, **attributes: Any) -> Any:
    value = of()
    vars(value).update(attributes)
    return value


class Tower(nn.Module):
    """Whatever a state dict may and may not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.GELU()), nn.Linear(4, 4, bias=False)]
        )
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.body[1].weight  # type: ignore[assignment]
        self.scale = nn.Parameter(torch.tensor(2.5))
        self.turned = nn.Parameter(torch.randn(5, 3).T)
        self.part = nn.Parameter(torch.randn(6, 6)[1:4, ::2])
        self.none = nn.Parameter(torch.empty(0, 3))
        self.absent = None
        self.register_parameter("nothing", None)
        self.register_buffer("missing", None)
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("levels", torch.arange(256, dtype=torch.uint8))
        self.register_buffer("brain", torch.randn(3, dtype=torch.bfloat16))
        self.register_buffer("forgotten", torch.ones(3), persistent=False)
        self.register_module("gone", None)
        self.other = torch.ones(3)


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert type(found[name]) is Tensor
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_a_module_is_read_as_its_state_dict(protocol: int, dtype: torch.dtype, read: Reads) -> None:
    torch.manual_seed(0)
    top = kind("trainer.models.clip_model", "Tower", Tower)
    tower = top().to(dtype)
    tower.scale.note = "kept with the parameter"  # type: ignore[attr-defined]
    tower.mask.note = "kept with the tensor"  # type: ignore[attr-defined]
    data = saved(tower, protocol, trainer={}, trainer__models={}, trainer__models__clip_model={"Tower": top})
    assert "trainer" not in sys.modules
    found = read(data)
    assert "trainer" not in sys.modules
    equal(found, tower.state_dict())
    assert found["tied.weight"].data_ptr() == found["body.1.weight"].data_ptr()
    found["scale"].zero_()  # nothing of the file, nor of the module
    equal(read(data), tower.state_dict())


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_old_transformers_put_into_a_module_is_passed_over(protocol: int, read: Reads) -> None:
    clip, activations = "transformers.models.clip.configuration_clip", "transformers.activations"
    generation = "transformers.generation.configuration_utils"
    configs = {name: kind(clip, name) for name in ("CLIPConfig", "CLIPTextConfig", "CLIPVisionConfig")}
    functions = {name: kind(activations, name, nn.Module) for name in ("QuickGELUActivation", "GELUActivation")}
    later = {"GenerationConfig": kind(generation, "GenerationConfig")}
    tops = {name: kind("trainer.models.clip_model", name, nn.Module) for name in ("CLIPModel", "XCLIPModel")}
    plain = {
        "return_dict": True,
        "torch_dtype": torch.float16,
        "pruned_heads": {},
        "id2label": {0: "LABEL_0", 1: "LABEL_1"},
        "label2id": {"LABEL_0": 0},
        "architectures": ["CLIPModel"],
        "problem_type": None,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "_commit_hash": None,
        "transformers_version": "4.27.3",
    }
    text, vision = (made(configs[name], **plain) for name in ("CLIPTextConfig", "CLIPVisionConfig"))
    model, inner = tops["CLIPModel"](), tops["XCLIPModel"]()
    model.model = inner
    inner.config = made(configs["CLIPConfig"], **plain, text_config=text, vision_config=vision, projection_dim=4)
    inner.generation_config = made(later["GenerationConfig"], max_length=20, _from_model_config=True, dtype=torch.bfloat16)
    inner.warnings_issued, inner.kept, inner.turns = {}, {"a", "b"}, {1, 2}
    inner.act, inner.quick = (functions[name]() for name in ("GELUActivation", "QuickGELUActivation"))
    inner.act.act, inner.silu = nn.functional.gelu, nn.functional.silu
    inner.linear = nn.Linear(3, 4).half()
    inner.register_buffer("position_ids", torch.arange(7)[None])
    data = saved(
        model,
        protocol,
        trainer={},
        trainer__models={},
        trainer__models__clip_model=tops,
        transformers={},
        transformers__activations=functions,
        transformers__models={},
        transformers__models__clip={},
        transformers__models__clip__configuration_clip=configs,
        transformers__generation={},
        transformers__generation__configuration_utils=later,
    )
    equal(read(data), model.state_dict())


def archive(pickled: bytes, folder: str = "archive", **entries: bytes) -> bytes:
    """A file as torch.save writes it, by hand: its pickle, and its other entries (points written __)."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as opened:
        opened.writestr(f"{folder}/data.pkl", pickled)
        for entry, data in entries.items():
            opened.writestr(f"{folder}/{entry.replace('__', '/')}", data)
        opened.writestr(f"{folder}/version", b"3\n")
    return stream.getvalue()


def module(parameters: bytes = b"}", buffers: bytes = b"}", modules: bytes = b"}", extra: bytes = b"N") -> bytes:
    """The opcodes of a module, and of one attribute of it."""
    parts = {"_parameters": parameters, "_buffers": buffers, "_modules": modules, "extra": extra}
    state = b"".join(text(part) + code for part, code in parts.items())
    return name("trainer.models.clip_model", "CLIPModel") + b")\x81}(" + state + b"ub"


def entries(**values: bytes) -> bytes:
    """The opcodes of a dictionary."""
    return b"}(" + b"".join(text(key) + code for key, code in values.items()) + b"u"


def stored(key: Any = "0", kind: bytes = b"ctorch\nFloatStorage\n", elements: Any = 6, view: bytes = b"") -> bytes:
    """The opcodes of a reference to a storage."""
    return b"(" + text("storage") + kind + put(key) + put("cuda:0") + put(elements) + view + b"tQ"


SIX = torch.arange(6.0).numpy().tobytes()
WEIGHT = entries(weight=tensor(of=stored()))


def test_a_module_by_hand_is_read(read: Reads) -> None:
    inner = module(WEIGHT, entries(state=tensor((2,), (1,), 4, of=stored())))
    data = archive(whole(module(WEIGHT, modules=entries(a=inner, b=b"N"))), data__0=SIX, byteorder=b"little")
    found = read(data)
    expected = torch.arange(6.0).view(3, 2)
    equal(found, {"weight": expected, "a.weight": expected, "a.state": torch.tensor([4.0, 5.0])})


@pytest.mark.parametrize(("module_of", "attribute", "arguments"), CALLS, ids=[f"{m}.{a}" for m, a, _ in CALLS])
def test_a_module_calls_nothing_unlisted(
    module_of: str, attribute: str, arguments: tuple[Any, ...], canary: Path, refuses: Refuses, read: Reads
) -> None:
    """What lies in a package that may be named is named, and no more."""
    for protocol in (2, 4):
        payload = name(module_of, attribute, protocol) + put(placed(arguments, canary)) + b"R"
        path = re.escape(f"{module_of}.{attribute}")
        for pickled in inside_a_module(payload):
            refuses(archive(pickled, data__0=SIX), f"('{path}'|a call of {path}); valid: ", read)


def inside_a_module(payload: bytes) -> list[bytes]:
    """The pickles that have opcodes alone, as a module's attribute, and as its parameter."""
    return [whole(payload), whole(module(WEIGHT, extra=payload)), whole(module(entries(weight=payload)))]


SET = name("builtins", "set")

HOSTILE: dict[str, tuple[bytes, str]] = {
    "GLOBAL": (b"cposix\nsystem\n" + put(("true",)) + b"R", "GLOBAL: 'posix.system'"),
    "INST": (b"(" + put("true") + b"ios\nsystem\n", "opcode INST"),
    "INST of a class": (b"(itorch.nn\nLinear\n", "opcode INST"),
    "OBJ": (b"(" + name("torch.nn", "Linear") + put("true") + b"o", "opcode OBJ"),
    "EXT1": (b"\x82\x01", "opcode EXT1"),
    "NEWOBJ_EX": (name("torch.nn", "Linear") + b")}\x92", "opcode NEWOBJ_EX"),
    "a call of a class": (name("torch.nn", "Linear") + b")R", "a call of torch.nn.Linear; valid: collections.OrderedDict"),
    "a call of a function": (name("torch.nn.functional", "gelu") + b")R", "a call of torch.nn.functional.gelu"),
    "a call of a package's package": (name("transformers.os", "system") + b")R", "a call of transformers.os.system"),
    "a call of a dtype": (name("torch", "float16") + b")R", "a call of torch.float16"),
    "a call of an object": (name("torch.nn", "A") + b")\x81)R", "a call of torch.nn.A"),
    "an object with arguments": (name("torch.nn", "Linear") + put((1,)) + b"\x81", "without arguments"),
    "an object of a function": (name("collections", "OrderedDict") + b")\x81", "an object of collections.OrderedDict"),
    "BUILD of a function": (name("torch._C._nn", "gelu") + b"}b", "a state dict for torch._C._nn.gelu"),
    "BUILD with slots": (name("torch.nn", "A") + b")\x81N}\x86b", "a state tuple for torch.nn.A"),
    "a package itself": (name("torch", "nn"), r"'torch\.nn'; valid"),
    "a package's namesake": (name("torch.nnx", "Linear"), r"'torch\.nnx\.Linear'"),
    "points for nothing": (name("torch.nn.", "Linear"), r"'torch\.nn\.\.Linear'"),
    "a space": (name("torch.nn", "Linear x"), "'torch.nn.Linear x'"),
    "an escape sequence": (name("transformers", "\x1b[2J"), r"'transformers\.\\x1b"),
    "a look-alike letter": (name("transformers", "ЅLIP"), r"'transformers\.\\u0405LIP'"),
    "an endless name": (name("transformers", "x" * 10**6), "'transformers.x{187}'; valid"),
    "PERSID": (b"Pos.system\n", "opcode PERSID"),
    "another reference": (put(("module", "os", "system")) + b"Q", "a reference to tuple; valid: to a storage"),
    "a reference by a number": (b"K\x07Q", "a reference to int 7"),
    "a reference of os.system": (stored(kind=b"cos\nsystem\n"), "'os.system'"),
    "a reference of a function": (stored(kind=b"ccollections\nOrderedDict\n"), "holds collections.OrderedDict; valid"),
    "a reference of a class": (stored(kind=b"ctorch.nn\nLinear\n"), "holds torch.nn.Linear"),
    "a view": (stored(view=put(("0", 0, 6))), "a reference to tuple"),
    "a key of a list": (stored(key=["0"]), "a reference to tuple"),
    "a path": (stored(key="../data.pkl"), "6 elements in no bytes"),
    "no storage": (stored(key="1"), "6 elements in no bytes"),
    "more elements": (stored(elements=7), "int 7 elements in 24 bytes; valid: 4 bytes|'0' twice"),
    "fewer elements": (stored(elements=5), "int 5 elements in 24 bytes|'0' twice"),
    "2^60 elements": (stored(elements=2**60), "elements in 24 bytes|'0' twice"),
    "negative elements": (stored(elements=-6), "int -6 elements in 24 bytes|'0' twice"),
    "a storage of two kinds": (b"](" + stored() + stored(kind=b"ctorch\nIntStorage\n") + b"e", "storage '0' twice, and diff"),
    "outside its storage": (tensor(offset=1, of=stored()), "6 elements from 1 on"),
    "a tensor of nothing": (tensor(of=b"N"), "a tensor of NoneType; valid: of a storage"),
    "a tensor of another function": (
        name("torch._tensor", "_rebuild_from_type_v2") + b"(" + name("torch.nn", "A") + name("torch", "Tensor") + b"))tR",
        "a torch.Tensor by torch.nn.A; valid",
    ),
    "a set of a number": (SET + put((7,)) + b"R", "a set of int 7; valid: of a list"),
    "a set of tuples": (SET + b"](" + put((1,)) + b"e\x85R", "a key that is tuple"),
    "a set of a list many times": (called(SET, b"](" + b"K\x01" * 10**5 + b"e", 10**4), "sets of more than 1000000 members"),
    "a key of a large number": (b"}" + put(2**31) + b"Ns", "a key that is int 2147483648; valid: .*, or a whole"),
    "a key of a negative number": (b"}" + put(-1) + b"Ns", "a key that is int -1"),
    "a key of a bool": (b"}\x88Ns", "a key that is bool True"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_module_is_refused(case: str, refuses: Refuses, read: Reads) -> None:
    payload, message = HOSTILE[case]
    for pickled in inside_a_module(payload):
        refuses(archive(pickled, data__0=SIX), message, read)


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_torch_would_execute_is_refused(protocol: int, canary: Path, refuses: Refuses, read: Reads) -> None:
    linear = nn.Linear(2, 2)
    linear.extra = Call(eval, f"open({str(canary)!r}, 'w').close()")  # type: ignore[assignment]
    data = saved(linear, protocol)
    refuses(data, r"'(__builtin__|builtins)\.eval'", read)
    # what this test itself wrote: only so is it known that the canary would be touched
    torch.load(io.BytesIO(data), weights_only=False)
    assert canary.exists()


@pytest.mark.parametrize("key", ["__setstate__", "__class__", "__reduce__", "__dict__"])
def test_a_modules_state_is_data_whatever_its_keys(key: str, read: Reads) -> None:
    payload = module(WEIGHT).replace(text("extra"), text(key))
    assert list(read(archive(whole(payload), data__0=SIX))) == ["weight"]


def itself(modules: bytes) -> bytes:
    """A module that holds itself, which is number 200 of the memo."""
    parts = text("_parameters") + b"}" + text("_buffers") + b"}" + text("_modules") + modules
    return name("torch.nn", "A") + b")\x81q\xc8}(" + parts + b"ub"


def doubled(depth: int) -> bytes:
    """A module that holds the same one twice, and so on."""
    payload = module()
    for _ in range(depth):
        payload = module(modules=entries(a=payload + b"q\x01", b=b"h\x01"))
    return payload


ODD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"N", "module '': NoneType without _parameters; valid: a whole nn.Module"),
    "a dictionary": (WEIGHT, "module '': dict without _parameters"),
    "a tensor": (tensor(of=stored()), "module '': Tensor without _parameters"),
    "an object": (name("transformers", "CLIPConfig") + b")\x81", "module '': transformers.CLIPConfig without _parameters"),
    "an object in a module": (module(modules=entries(a=name("torch.nn", "X") + b")\x81")), "module 'a.': torch.nn.X without"),
    "a list of parameters": (module(b"]"), "without _parameters"),
    "a list of buffers": (module(buffers=b"]"), "without _buffers"),
    "a number": (module(entries(weight=b"K\x07")), "'weight': int 7; valid: one tensor, or none"),
    "a name with a point": (module(modules=put({"a.b": None})), "a name str 'a.b'; valid"),
    "no name": (module(modules=put({"": None})), "a name str ''"),
    "a name of a number": (module(modules=put({0: None})), "a name int 0"),
    "a name twice": (module(WEIGHT, WEIGHT), "'weight': Tensor; valid: one tensor"),
    "a list of what is not kept": (module().replace(text("extra"), text("_non_persistent_buffers_set")), "set NoneType; valid"),
    "itself": (itself(entries(a=b"h\xc8")), "names that do not end; valid: at most 100000"),
    "itself under a long name": (itself(b"}(" + text("a" * 1000) + b"h\xc8u"), "names that do not end"),
    "itself twice": (itself(entries(a=b"h\xc8", b=b"h\xc8")), "names that do not end"),
    "2^40 of the same": (doubled(40), "names that do not end"),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_what_is_no_module_is_refused(case: str, refuses: Refuses, read: Reads) -> None:
    payload, message = ODD[case]
    refuses(archive(whole(payload), data__0=SIX), message, read)


PLAIN = archive(whole(module(WEIGHT)), data__0=SIX)


def changed(change: Callable[[zipfile.ZipFile], None], data: bytes = PLAIN) -> bytes:
    """An archive with something more in it."""
    stream = io.BytesIO(data)
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "a") as opened:
        warnings.simplefilter("ignore")  # of names that are there
        change(opened)
    return stream.getvalue()


def overlapping(opened: zipfile.ZipFile) -> None:
    """Ten entries of the same bytes."""
    for number in range(10):
        entry = copy(opened.getinfo("archive/data/0"))
        entry.filename = f"archive/data/{number + 1}"
        opened.filelist.append(entry)
    opened._didModify = True  # type: ignore[attr-defined]


def encrypted(opened: zipfile.ZipFile) -> None:
    opened.getinfo("archive/data/0").flag_bits |= 1
    opened._didModify = True  # type: ignore[attr-defined]


ARCHIVES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "not a whole zip archive .BadZipFile: .*; valid: what torch.save writes since version 1.6, which begins"),
    "a pickle": (pickle.dumps({}), "not a whole zip archive"),
    "an old file": (MAGIC + pickle.dumps({}), "not a whole zip archive"),
    "compressed": (
        changed(lambda opened: opened.writestr("archive/data/1", bytes(10**8), zipfile.ZIP_DEFLATED)),
        "'archive/data/1': compressed or encrypted; valid: stored",
    ),
    "encrypted": (changed(encrypted), "'archive/data/0': compressed or encrypted"),
    "a name twice": (changed(lambda opened: opened.writestr("archive/data/0", SIX)), "entries of the same name"),
    "more than the file": (
        changed(overlapping, archive(b"", data__0=bytes(10**4))),
        r"entries of 110002 bytes in \d+; valid: no more than the file has",
    ),
    "no pickle": (changed(lambda _: None, archive(b"").replace(b"data.pkl", b"data.pkx")), "0 entries data.pkl; valid: one"),
    "no folder": (archive(b"").replace(b"archive/data.pkl", b"archivexdata.pkl"), "0 entries data.pkl"),
    "two pickles": (changed(lambda opened: opened.writestr("other/data.pkl", b"N.")), "2 entries data.pkl"),
    "big-endian": (archive(whole(module()), byteorder=b"big"), "byteorder b'big'; valid: little"),
    "an endless byteorder": (archive(whole(module()), byteorder=b"little" * 9), "'byteorder': 54 bytes; valid: at most 10"),
    "a large pickle": (archive(bytes(unpickle.LARGEST_FILE + 1)), f"data.pkl': {unpickle.LARGEST_FILE + 1} bytes; valid"),
    "more after the pickle": (archive(whole(module()) + b"N."), "2 bytes after the end of the pickle"),
    "another name within": (PLAIN.replace(b"archive/data/0", b"archive/data/9", 1), "'data/0': BadZipFile: .*; valid: an"),
    "a damaged storage": (PLAIN.replace(SIX, SIX[:-1] + b"\x01"), "'data/0': BadZipFile: .*CRC"),
    "a damaged pickle": (PLAIN.replace(b"CLIPModel", b"CLIPMadel"), "'data.pkl': BadZipFile: .*CRC"),
}  # fmt: skip


@pytest.mark.parametrize("case", ARCHIVES)
def test_an_archive_that_torch_did_not_write_is_refused(case: str, refuses: Refuses, read: Reads) -> None:
    data, message = ARCHIVES[case]
    refuses(data, message, read)


def test_an_old_file_of_torch_is_refused(canary: Path, refuses: Refuses, read: Reads) -> None:
    stream = io.BytesIO()
    torch.save(Call(eval, f"open({str(canary)!r}, 'w').close()"), stream, _use_new_zipfile_serialization=False)
    refuses(stream.getvalue(), "not a whole zip archive .*; valid: what torch.save writes since version 1.6", read)


def test_a_refusal_names_the_file_and_a_missing_one_is_an_oserror(read: Reads, tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match=re.escape(f"{tmp_path / 'module.pth'}: not a whole zip")):
        read(b"")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_module(tmp_path / "nowhere.pth")


def test_a_truncated_or_damaged_module_is_read_or_refused(read: Reads) -> None:
    def outcome(data: bytes) -> bool:
        try:
            read(data)
        except RefusedError as error:
            message = str(error)
        else:
            return True
        assert "valid: " in message
        assert message.isprintable()
        return False

    data = saved(nn.Linear(2, 2))
    assert outcome(data)
    assert not any(outcome(data[:end]) for end in range(0, len(data), 7))
    generator = random.Random(0)
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(generator.choice([1, 3, 20])):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        outcome(bytes(damaged))
