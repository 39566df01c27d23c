"""What the stage `backbone` made, as the others use it: the frozen model and its prompts."""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backends import Backend, Digits, counted_denoiser
from solvers import Backbone, Counter, Denoiser
from stages.device import device_of
from stages.files import BACKBONE, InputError, reading, write_json
from stages.params import Compute, Weights
from stages.prompts import Prompts

RECORD, PROMPTS = BACKBONE / "backbone.json", BACKBONE / "prompts.json"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
UNET, DATA = "unet.safetensors", "digits.safetensors"


@dataclass(frozen=True)
class Record:
    """What lies in models/backbone.

    Attributes:
        name: the family of the model.
        identity: which model it is.
        settings: of a pipeline: what else it is loaded with.
        weights: of the pipeline: where they came from, and their sha256.
        sha256: of the list of the other files.
    """

    name: str
    identity: Backbone
    settings: dict[str, Any]
    weights: dict[str, dict[str, Any]]
    sha256: str

    @classmethod
    def load(cls) -> "Record":
        """ValueError where it is not what `save` writes."""
        found = json.loads(RECORD.read_text(encoding="utf-8"))
        try:
            return cls(**{**found, "identity": Backbone(**found["identity"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"{RECORD}: {error}; valid: what stage backbone writes") from error

    def save(self, file: Path) -> None:
        write_json(file, asdict(self))


@dataclass(frozen=True)
class Frozen:
    """A model, what it is asked for, and which one it is."""

    backend: Backend
    prompts: Prompts
    identity: Backbone

    def denoiser(self, split: str, samples: Iterable[int], guidance_scale: float) -> tuple[Denoiser, Counter]:
        """The guided denoiser of the prompts of given samples of a split, and the counter of what it costs."""
        wanted = self.prompts(split, samples)
        return counted_denoiser(self.backend, wanted, guidance_scale, [self.prompts.negative] * len(wanted))


def load_frozen(guidance_scale: float, compute: Compute, samples: Mapping[str, Iterable[int]]) -> Frozen:
    """The frozen model, ready to sample.

    Args:
        guidance_scale: that it is shown, if it is a model that is shown one.
        compute: where and how it runs.
        samples: by split, all that will be asked for: their prompts are encoded first where encoders are then dropped.

    Raises:
        InputError: it is missing, or not what stage backbone writes.
    """
    device = device_of(compute)
    with reading(BACKBONE):
        record, prompts = Record.load(), Prompts.load(PROMPTS)
        if record.name == "digits":
            return Frozen(Digits.load(BACKBONE / UNET), prompts, record.identity)
    from diffusers.utils import logging  # which takes seconds, which digits need not wait for

    from backends.load import load_backend

    logging.set_verbosity_error()  # of long prompts, stage backbone has told
    folder, variant = pipeline_of(record)
    with loading():
        backend = load_backend(
            record.name,
            folder,
            record.settings["height"],
            record.settings["width"],
            DTYPES[record.settings["dtype"]],
            variant,
            guidance_scale,
            device,
            compute.offload,
            compute.slicing,
        )
    if compute.drop_text_encoders:
        wanted = [prompt for split, indices in samples.items() for prompt in prompts(split, indices)]
        backend.keep_texts([*wanted, prompts.negative])
    return Frozen(backend, prompts, record.identity)


def load_decoder(compute: Compute) -> Callable[[Tensor], Tensor]:
    """The frozen model's decoder alone: states (B, ...) -> images (B, C, H, W) in [0, 1]."""
    device = device_of(compute)
    with reading(BACKBONE):
        record = Record.load()
    if record.name == "digits":
        return Digits.decode
    from backends import load

    folder, variant = pipeline_of(record)
    with loading():
        return load.load_decoder(folder, DTYPES[record.settings["dtype"]], variant, device, compute.slicing)


@contextmanager
def loading() -> Iterator[None]:
    """Turn what is wrong with a model's files, which is not the stage's fault, into an InputError; it names the file."""
    try:
        yield
    except FileNotFoundError as error:
        told = error.strerror if error.strerror and error.strerror.startswith("missing") else "missing; valid: all of its files"
        raise InputError(f"{error.filename}: {told}") from error
    except ValueError as error:
        raise InputError(str(error)) from error


def files_of(name: str, variant: str | None) -> Callable[[Collection[str], str], list[str]]:
    """Which files a pipeline of a family reads."""

    def choose(files: Collection[str], place: str) -> list[str]:
        from backends.load import FAMILIES
        from stages.fetch import pipeline_files

        return pipeline_files(files, FAMILIES[name].components, variant, place)

    return choose


def pipeline_of(record: Record) -> tuple[Path, str | None]:
    """The folder of the pipeline, fetched again where this machine has not got it, and the variant of its files."""
    from stages.weights import weights_folder  # what it takes to fetch, too

    weights = Weights(**record.weights["pipeline"])
    return weights_folder(weights, files_of(record.name, weights.variant))[0], weights.variant
