"""HPSv2.1: open_clip's ViT-H/14, tuned on which of two images people prefer for a prompt."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from open_clip import CLIP, get_model_config, tokenize
from torch import Tensor
from torch.nn.functional import cosine_similarity

from metrics import Card
from metrics.images import check, normalised, padded
from metrics.state import load_exactly, read_state, reading, require
from metrics.texts import Texts

FILE = "HPS_v2.1_compressed.pt"
CONFIG = "open_clip_config.json"
ARCHITECTURE = "ViT-H-14"
ROWS = 64
"""Images that the model sees at once, whatever the batch."""

VOCABULARY = 49408
"""Tokens of CLIP's own vocabulary, which open_clip holds."""


class HPS:
    """A Metric: the cosine of image and prompt. Differentiable.

    Args:
        folder: with FILE, as published (a checkpoint with key state_dict), and open_clip's CONFIG if it is not of ARCHITECTURE.
        device: None: the CPU.
        dtype: of the weights.

    Raises:
        FileNotFoundError: the checkpoint is missing.
        ValueError: CONFIG cannot be read, or has towers of other libraries. When first used: nor can the checkpoint, or its
            weights are not those of the architecture.
    """

    card: ClassVar[Card] = Card(
        scale="cosine, not scaled: the benchmark prints 100 times it",
        range="0.1 to 0.35",
        preprocessing=(
            "8 bits; longer side to the model's (224) by torch's bicubic with antialias, in floating point; black around it; "
            "OpenAI's mean and standard deviation"
        ),
        source="Wu et al. 2023, HPSv2.1",
    )

    def __init__(self, folder: Path, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> None:
        self.folder, self.device, self.dtype = folder, device or torch.device("cpu"), dtype
        require(folder / FILE)
        self.config = _config(folder / CONFIG)
        self.size: int = self.config["vision_cfg"]["image_size"]
        self.texts = Texts(self._encoded)

    @cached_property
    def model(self) -> CLIP:
        with reading(self.folder / CONFIG):
            model = CLIP(**self.config)
        load_exactly(model, read_state(self.folder / FILE, "state_dict"), self.folder / FILE)
        return model.to(self.device, self.dtype).eval().requires_grad_(False)

    def load(self) -> None:
        _ = self.model

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        check(images, prompts)
        features = torch.cat([self._seen(part.to(self.device)) for part in images.split(ROWS)])
        return cosine_similarity(features.double(), self.texts(prompts).double())

    def _seen(self, images: Tensor) -> Tensor:
        return self.model.encode_image(normalised(padded(images, self.size)).to(self.dtype))

    def _encoded(self, prompt: str) -> Tensor:
        return self.model.encode_text(tokenize([prompt], self.model.context_length).to(self.device))


def _config(file: Path) -> dict[str, Any]:
    """The arguments of open_clip's CLIP in a file; ARCHITECTURE's if there is none."""
    if not file.exists():
        return cast(dict[str, Any], get_model_config(ARCHITECTURE))
    with reading(file):
        config = json.loads(file.read_text(encoding="utf-8"))["model_cfg"]
        vision, text = config["vision_cfg"], config["text_cfg"]
        foreign = [name for name in [*vision, *text] if name.startswith(("hf_", "timm_"))]  # may be downloaded
        size, tokens = vision["image_size"], text.get("vocab_size", VOCABULARY)
        if foreign or not isinstance(size, int) or tokens != VOCABULARY:
            raise ValueError(
                f"{', '.join(foreign) or 'towers of open_clip'}, image_size {size}, vocab_size {tokens}; "
                f"valid: towers of open_clip, one number, and {VOCABULARY}"
            )
    return config
