"""hpsv2's and image-reward's own code, unmodified, in an environment that is newer than they are.

What their wheels lack, or has gone from transformers since, is put beside them; what they import for nothing is left out.
"""

import metrics as metrics  # before torchvision

# isort: split

import importlib
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, chdir, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import open_clip
import torch
from torch import Tensor, nn
from transformers import modeling_utils, pytorch_utils
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy
from transformers.utils import logging

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
CPU = torch.device("cpu")


@contextmanager
def hpsv2_scoring(site: Path, device: torch.device = CPU, architecture: dict[str, Any] | None = None) -> Iterator[ModuleType]:
    """hpsv2.img_score, of a copy with the vocabulary that its wheel lacks, and a model that it need not download.

    Its `score` still loads a checkpoint on every call. While this lasts, hpsv2 is that copy wherever it is imported.

    Args:
        site: an empty folder, for the copy.
        device: of the model.
        architecture: the arguments of its CLIP; None: the published ones.
    """
    source = _folder("hpsv2") / "src"
    for file in [*source.parent.glob("*.py"), *source.glob("*.py"), *source.glob("open_clip/*.py")]:
        target = site / "hpsv2" / file.relative_to(source.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    own_clip = site / "hpsv2" / "src" / "open_clip"
    shutil.copytree(source / "open_clip" / "model_configs", own_clip / "model_configs")
    shutil.copy(Path(open_clip.__file__).with_name(VOCABULARY), own_clip)
    turtle = ModuleType("turtle")  # imported for nothing, and python may lack its window system
    turtle.forward = None  # type: ignore[attr-defined]
    with _afresh("hpsv2"):
        with (
            warnings.catch_warnings(action="ignore"),
            patch.dict("os.environ", {"HPS_ROOT": str(site / "cache")}),  # it makes that folder
            _instead({"turtle": turtle}),
            patch.object(sys, "path", [str(site), *sys.path]),
        ):
            importlib.invalidate_caches()
            scoring: Any = importlib.import_module("hpsv2.img_score")
            own: Any = sys.modules["hpsv2.src.open_clip"]
            model = own.CLIP(**(architecture or own.get_model_config("ViT-H-14")), output_dict=True)
        scoring.device = str(device)
        scoring.model_dict["model"] = model.to(device)
        size = model.visual.image_size
        transform = own.image_transform(size, is_train=False, resize_longest_max=True)  # as of its create_model_...
        scoring.model_dict["preprocess_val"] = transform
        yield scoring


@dataclass(frozen=True)
class Sizes:
    """Of an ImageReward: image and patch in pixels, features of patches and of tokens, layers of the vision transformer."""

    image: int
    patch: int
    width: int
    hidden: int
    layers: int


def image_reward(config: Path, bert: Path, device: torch.device = CPU, sizes: Sizes | None = None) -> Any:
    """The image-reward package's own ImageReward in eval mode; its weights are to be loaded.

    Args:
        config: its med_config.json.
        bert: a folder of the name bert-base-uncased, which is what the package asks for, with the tokenizer.
        device: of the model.
        sizes: None: the published ones.
    """
    place, verbosity = _folder("ImageReward"), logging.get_verbosity()
    packages = {"ImageReward": place, "ImageReward.models": place / "models"}
    with warnings.catch_warnings(action="ignore"), _afresh("ImageReward"), ExitStack() as patches:
        for name, path in packages.items():  # without their __init__, which import more
            sys.modules[name] = module = ModuleType(name)
            module.__path__ = [str(path)]
        gone = {name: vars(pytorch_utils)[name] for name in ("apply_chunking_to_forward", "prune_linear_layer")}
        gone["find_pruneable_heads_and_indices"] = None  # never called
        for name, value in gone.items():
            patches.enter_context(patch.object(modeling_utils, name, value, create=True))
        reward = importlib.import_module("ImageReward.ImageReward")
        parts = ("blip", "blip_pretrain", "vit", "med")
        blip, pretrain, vit, med = (importlib.import_module(f"ImageReward.models.BLIP.{name}") for name in parts)
        base: Any = med.BertPreTrainedModel
        base.get_head_mask, base.invert_attention_mask = _no_head_mask, _inverted
        base.init_weights = lambda model: None  # they are loaded
        blip.BertTokenizer = _Tokenizer  # type: ignore[attr-defined]
        if sizes is not None:
            _resize(reward, pretrain, vit, sizes)
        with chdir(bert.parent):
            model = reward.ImageReward(config, device)
    logging.set_verbosity(verbosity)
    return model.to(device).eval()


def _resize(reward: Any, pretrain: Any, vit: Any, sizes: Sizes) -> None:
    """Give the package's modules, which are imported afresh each time, other sizes than those that they state."""
    transform, head = reward._transform, reward.MLP
    vision = vit.VisionTransformer(
        sizes.image, sizes.patch, embed_dim=sizes.width, depth=sizes.layers, num_heads=sizes.width // 64
    )
    pretrain.create_vit = lambda *arguments: (vision, sizes.width)
    reward._transform = lambda size: transform(sizes.image)
    reward.MLP = lambda width: head(sizes.hidden)


class _Tokenizer(BertTokenizerLegacy):
    """BERT's in Python, as it was when the package was written; with what has gone from it since."""

    @property
    def additional_special_tokens_ids(self) -> list[Any]:
        return [self.convert_tokens_to_ids("[ENC]")]


def _no_head_mask(model: nn.Module, mask: None, layers: int) -> list[None]:
    return [None] * layers


def _inverted(model: Any, mask: Tensor) -> Tensor:
    return (1 - mask[:, None, None, :].to(model.dtype)) * torch.finfo(model.dtype).min


def _folder(package: str) -> Path:
    """Where a package is installed; it is not imported."""
    found = find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"{package}: not installed; valid: the extra pipeline")
    return Path(found.origin).parent


@contextmanager
def _afresh(package: str) -> Iterator[None]:
    """Within, a package and its modules are as if never imported; afterwards, as before."""

    def own() -> dict[str, ModuleType]:
        return {name: module for name, module in sys.modules.items() if name.split(".")[0] == package}

    before = own()
    _forget(before)
    try:
        yield
    finally:
        _forget(own())
        sys.modules.update(before)


@contextmanager
def _instead(modules: dict[str, ModuleType]) -> Iterator[None]:
    """Within, these are what is imported by their names."""
    before = {name: sys.modules[name] for name in modules if name in sys.modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        _forget(modules)
        sys.modules.update(before)


def _forget(modules: dict[str, ModuleType]) -> None:
    for name in modules:
        sys.modules.pop(name, None)
