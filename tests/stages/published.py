"""Look-alikes of published EPD files: the same structure, opcode by opcode, with other numbers and no source in them."""

import io
import pickle
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

PLACEHOLDER = "PLACEHOLDER"
PARAMETERS = ("r_params", "scale_dir_params", "scale_time_params", "weight_s")

SETTINGS: dict[str, Any] = {
    "dataset_name": "cifar10",
    "img_resolution": 32,
    "num_steps": 4,
    "sampler_stu": "epd",
    "sampler_tea": "heun",
    "M": 3,
    "guidance_type": None,
    "guidance_rate": 0.0,
    "schedule_type": "time_uniform",
    "schedule_rho": 1.0,
    "afs": True,
    "scale_dir": 0.05,
    "scale_time": 0.05,
    "max_order": 3,
    "predict_x0": True,
    "lower_order_final": True,
    "num_points": 2,
    "fcn": False,
    "alpha": 10.0,
}
"""The attributes of the ICCV branch's files, in their order."""


def named(module: str, name: str) -> Callable[..., Any]:
    """A function that pickles write as module.name."""

    def function(*_: Any) -> object:
        raise AssertionError

    function.__module__, function.__name__, function.__qualname__ = module, name, name
    return function


FAKES = {
    "torch_utils.persistence": {"_reconstruct_persistent_obj": named("torch_utils.persistence", "_reconstruct_persistent_obj")},
    "solvers": {name: named("solvers", name) for name in ("epd_sampler", "heun_sampler")},
}


class Persistent:
    """What a pickle holds as a persistent object."""

    def __init__(self, class_name: str, state: dict[str, Any]) -> None:
        self.record = {"type": "class", "version": 6, "module_src": "raise SystemExit('executed')\n"}
        self.record |= {"class_name": class_name, "state": state}

    def __reduce__(self) -> tuple[Any, ...]:
        return FAKES["torch_utils.persistence"]["_reconstruct_persistent_obj"], (self.record,)


class Pickler(pickle.Pickler):
    """The standard one, with storages as if they lay on CUDA."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, torch.storage.TypedStorage):
            return NotImplemented
        function, (data,) = obj.__reduce__()
        assert data.count(b"X\x03\0\0\0cpu") == 1
        return function, (data.replace(b"X\x03\0\0\0cpu", b"X\x06\0\0\0cuda:0"),)


def dumps(value: Any, protocol: int = 4, cuda: bool = True) -> bytes:
    """The pickle of a value, as the published code wrote it."""
    modules: dict[str, ModuleType] = {"torch_utils": ModuleType("torch_utils")}
    for name, functions in FAKES.items():
        modules[name] = ModuleType(name)
        vars(modules[name]).update(functions)
    stream = io.BytesIO()
    with patch.dict(sys.modules, modules):
        (Pickler if cuda else pickle.Pickler)(stream, protocol).dump(value)
    return stream.getvalue()


def parameters(num_steps: int = 4, num_points: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    """The arrays of a predictor, standard normal."""
    generator = torch.Generator().manual_seed(num_steps)
    values = {name: torch.randn(num_steps - 1, num_points, generator=generator).to(dtype) for name in PARAMETERS}
    return {name: nn.Parameter(value, requires_grad=False) for name, value in values.items()}


def model(values: dict[str, Any], **settings: Any) -> Persistent:
    """The EPD_predictor of these parameters; a setting that is `...` is left out."""
    module = nn.Module()
    module.eval()
    state: dict[str, Any] = dict(vars(module)) | {"_parameters": values}
    state["_modules"] = {"sigmoid": nn.Sigmoid().eval(), "softmax": nn.Softmax(dim=-1).eval()}
    kept = {name: value for name, value in {**SETTINGS, **settings}.items() if value is not ...}
    return Persistent("EPD_predictor", state | kept | {"_init_args": (), "_init_kwargs": kept})


def loss(num_steps: int = 4) -> Persistent:
    """The EPD_loss that lies beside the model."""
    solvers = FAKES["solvers"]
    state = {"num_steps": num_steps, "solver_stu": solvers["epd_sampler"], "solver_tea": solvers["heun_sampler"]}
    state |= {"tea_slice": [4, 8], "t_steps": torch.linspace(80, 0.002, num_steps), "buffer_model": [], "lpips": None}
    return Persistent("EPD_loss", state)


def look_alike(protocol: int = 4, cuda: bool = True, **settings: Any) -> bytes:
    """A whole file with random parameters."""
    steps, points = (settings.get(name, SETTINGS[name]) for name in ("num_steps", "num_points"))
    return dumps({"model": model(parameters(steps, points), **settings), "loss_fn": loss(steps)}, protocol, cuda)


def inside(data: bytes, payload: bytes) -> bytes:
    """A pickle with opcodes that make one value in the place of PLACEHOLDER."""
    found = b"\x8c%c%b" % (len(PLACEHOLDER), PLACEHOLDER.encode())
    assert data.count(found) == 1
    return data.replace(found, payload)


def with_inside(payload: bytes) -> bytes:
    """A whole file with opcodes that make one value, in the place of an attribute's."""
    return inside(TEMPLATE, payload)


TEMPLATE = look_alike(comment=PLACEHOLDER)
