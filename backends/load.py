"""A pipeline of a known family from a folder: checked before anything is loaded, and loaded with no weight missing."""

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5EncoderModel,
    T5TokenizerFast,  # type: ignore[attr-defined]
)

from backends.pipeline import PipelineBackend, decoded, latent_size
from backends.preconditioning import Preconditioning
from backends.sample import backend_of


@dataclass(frozen=True)
class Family:
    """What a family's pipeline is made of, by the names of its folders; safety checkers and the like are left out.

    Attributes:
        pipeline: its class.
        weights: classes of what has weights.
        tokenizers: their classes, and how many tokens of a prompt the pipeline has of each.
        unused: components that it is made without.
        patch: latents to a side of the network's patches, where the network's configuration does not say.
    """

    pipeline: type[Any]
    weights: dict[str, type[Any]]
    tokenizers: dict[str, tuple[type[Any], int]]
    unused: dict[str, Any]
    patch: int | None = None

    @property
    def components(self) -> list[str]:
        """All folders that are needed."""
        return ["scheduler", *self.tokenizers, *self.weights]


SCHEDULERS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        DDIMScheduler,
        DDPMScheduler,
        DPMSolverMultistepScheduler,
        EulerAncestralDiscreteScheduler,
        EulerDiscreteScheduler,
        FlowMatchEulerDiscreteScheduler,
        HeunDiscreteScheduler,
        LMSDiscreteScheduler,
        PNDMScheduler,
        UniPCMultistepScheduler,
    )
}
"""What a folder's scheduler may be: only how the network was trained is read from it."""

VOCABULARIES = ({"tokenizer.json"}, {"vocab.json", "merges.txt"}, {"spiece.model"})
"""Files, one set of which a tokenizer has."""

WITHOUT = {"feature_extractor": None, "image_encoder": None}

FAMILIES = {
    "sd15": Family(
        StableDiffusionPipeline,
        {"text_encoder": CLIPTextModel, "unet": UNet2DConditionModel, "vae": AutoencoderKL},
        {"tokenizer": (CLIPTokenizer, 77)},
        {**WITHOUT, "safety_checker": None, "requires_safety_checker": False},
        patch=1,
    ),
    "sd3": Family(
        StableDiffusion3Pipeline,
        {
            "text_encoder": CLIPTextModelWithProjection,
            "text_encoder_2": CLIPTextModelWithProjection,
            "text_encoder_3": T5EncoderModel,
            "transformer": SD3Transformer2DModel,
            "vae": AutoencoderKL,
        },
        {"tokenizer": (CLIPTokenizer, 77), "tokenizer_2": (CLIPTokenizer, 77), "tokenizer_3": (T5TokenizerFast, 256)},
        WITHOUT,
    ),
    "flux": Family(
        FluxPipeline,
        {
            "text_encoder": CLIPTextModel,
            "text_encoder_2": T5EncoderModel,
            "transformer": FluxTransformer2DModel,
            "vae": AutoencoderKL,
        },
        {"tokenizer": (CLIPTokenizer, 77), "tokenizer_2": (T5TokenizerFast, 512)},
        WITHOUT,
        patch=2,
    ),
}


def check_folder(name: str, folder: Path, height: int, width: int) -> None:
    """Raise ValueError unless a folder says that it is a pipeline of that family, for images of that size; reads no weights.

    No class but the family's own is ever taken from a folder: one that names others could have code of its own run.
    """
    family, index = FAMILIES[name], folder / "model_index.json"
    found = _json(index)
    if found.get("_class_name") != family.pipeline.__name__:
        raise ValueError(f"{index}: _class_name {found.get('_class_name')!r}; valid: {family.pipeline.__name__}, for {name}")
    tokenizers = {component: kind for component, (kind, _) in family.tokenizers.items()}
    for component, kind in {**tokenizers, **family.weights}.items():
        # tokenizers have had two classes each, which are one today
        names, entry = [_library(kind), kind.__name__.removesuffix("Fast")], found.get(component)
        if not isinstance(entry, list) or [str(part).removesuffix("Fast") for part in entry] != names:
            raise ValueError(f"{index}: {component} {entry}; valid: {[_library(kind), kind.__name__]}")
    _check_scheduler(name, found.get("scheduler"), folder)
    for component in tokenizers:
        there = {file.name for file in (folder / component).glob("*")}
        if not any(needed <= there for needed in VOCABULARIES):  # loaders would make an empty one
            valid = " or ".join(" and ".join(sorted(needed)) for needed in VOCABULARIES)
            raise ValueError(f"{folder / component}: found no vocabulary among {sorted(there)}; valid: {valid}")
    configs = {component: _json(folder / component / "config.json") for component in family.weights}
    network, vae = folder / "transformer/config.json", folder / "vae/config.json"
    match configs["vae"].get("block_out_channels"):
        case [_, *more]:
            factor = 2 ** len(more)
        case entry:
            raise ValueError(f"{vae}: block_out_channels {entry!r}; valid: a list of channels")
    if family.patch is not None:
        latent_size(height, width, (0, 0), factor, family.patch)
        return
    match configs["transformer"]:
        case {"patch_size": int(patch), "pos_embed_max_size": int(patches)} if patch > 0 and patches > 0:
            latent_size(height, width, (0, 0), factor, patch)
            if max(height, width) > factor * patch * patches:
                raise ValueError(f"height, width: {height}, {width}; valid: at most {factor * patch * patches}")
        case config:
            entries = {key: config.get(key) for key in ("patch_size", "pos_embed_max_size")}
            raise ValueError(f"{network}: {entries}; valid: positive whole numbers")


def _check_scheduler(name: str, entry: Any, folder: Path) -> None:
    """Raise ValueError unless a folder's scheduler is of diffusers, and for a network as the family's is."""
    index, file = folder / "model_index.json", folder / "scheduler/scheduler_config.json"
    match entry:
        case ["diffusers", str(kind)] if kind in SCHEDULERS:
            given = _json(file)
        case _:
            raise ValueError(f"{index}: scheduler {entry}; valid: one of diffusers, {', '.join(SCHEDULERS)}")
    trained = ("shift",) if name != "sd15" else ("beta_schedule", "trained_betas")
    if given.get("num_train_timesteps") is None or all(given.get(key) is None for key in trained):
        raise ValueError(f"{file}: {given}; valid: with num_train_timesteps and {' or '.join(trained)}, for {name}")
    try:
        found = Preconditioning.of(SCHEDULERS[kind].from_config(given).config)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ValueError(f"{file}: {error}; valid: as save_pretrained writes it") from error
    if found.is_flow != (name != "sd15"):
        kind = "a flow network" if found.is_flow else "a variance-preserving one"
        raise ValueError(f"{file}: of {kind}; valid: {'a variance-preserving one' if found.is_flow else 'a flow network'}")


def truncated(name: str, folder: Path, prompts: Sequence[str]) -> dict[str, tuple[int, int]]:
    """How many prompts are longer than a tokenizer of the pipeline sees, and how many tokens that is; of those with any."""
    found = {}
    for component, (kind, length) in FAMILIES[name].tokenizers.items():
        try:
            tokenizer = kind.from_pretrained(folder / component, local_files_only=True)
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(
                f"{folder / component}: cannot be loaded ({error}); valid: as save_pretrained writes it"
            ) from error
        # it would warn of each
        encoded = tokenizer([*prompts], truncation=True, max_length=length + 1).input_ids
        if count := sum(len(tokens) > length for tokens in encoded):
            found[component] = (count, length)
    return found


def load_backend(
    name: str,
    folder: Path,
    height: int,
    width: int,
    dtype: torch.dtype,
    variant: str | None,
    guidance_scale: float,
    device: torch.device,
    offload: bool = False,
    slicing: bool = False,
) -> PipelineBackend:
    """The frozen model in a folder.

    Args:
        name: of the family.
        folder: as `save_pretrained` writes it.
        height, width: of the images, in pixels.
        dtype: of the weights; states have their own.
        variant: of the weights' files, as fp16.
        guidance_scale: that the network is shown, if it is shown one.
        device: where it runs.
        offload: keep on the device only the part that runs (text encoder, network, decoder).
        slicing: attention and decoding in slices: less memory, more time.

    Raises:
        ValueError: the folder is not of that family, or lacks weights.
    """
    check_folder(name, folder, height, width)
    family = FAMILIES[name]
    weights = {component: _weights(kind, folder / component, dtype, variant) for component, kind in family.weights.items()}
    pipe = family.pipeline.from_pretrained(folder, local_files_only=True, **weights, **family.unused)
    pipe.set_progress_bar_config(disable=True)
    if slicing:
        pipe.enable_attention_slicing()
        pipe.vae.enable_slicing()
    if offload:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    return backend_of(pipe, height, width, guidance_scale)


def load_decoder(
    folder: Path, dtype: torch.dtype, variant: str | None, device: torch.device, slicing: bool = False
) -> Callable[[Tensor], Tensor]:
    """Of a pipeline's folder the decoder alone: latents (B, C, h, w) -> images (B, 3, H, W) in [0, 1]."""
    vae = _weights(AutoencoderKL, folder / "vae", dtype, variant).to(device)
    if slicing:
        vae.enable_slicing()
    return lambda x: decoded(vae, x.to(device))


def _weights(kind: type[Any], folder: Path, dtype: torch.dtype, variant: str | None) -> Any:
    """A component, frozen, with every weight from its file: loaders fill in random numbers for those that are missing."""
    if not any(folder.glob("*.safetensors")):
        there = sorted(file.name for file in folder.glob("*"))
        raise ValueError(f"{folder}: {there}; valid: *.safetensors (pickles are refused: reading one can execute code)")
    options = {"torch_dtype" if _library(kind) == "diffusers" else "dtype": dtype, "use_safetensors": True}
    options |= {"ignore_mismatched_sizes": True, "low_cpu_mem_usage": True} if _library(kind) == "transformers" else {}
    try:
        model, info = kind.from_pretrained(folder, variant=variant, local_files_only=True, output_loading_info=True, **options)
    except torch.OutOfMemoryError:
        raise
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder}: cannot be loaded ({error}); valid: as save_pretrained writes it") from error
    wrong: Collection[Any] = [*info["missing_keys"], *info["mismatched_keys"]]
    if wrong:
        raise ValueError(
            f"{folder}: {len(wrong)} weights missing or of another shape: {sorted(map(str, wrong))[:4]}; valid: all"
        )
    return model.eval().requires_grad_(False)


def _library(kind: type[Any]) -> str:
    return kind.__module__.partition(".")[0]


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file}: missing; valid: a pipeline's folder, as save_pretrained writes it") from None
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}); valid: as save_pretrained writes it") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: {type(found).__name__}; valid: an object, as save_pretrained writes it")
    return found
