"""CLIP's scores of images and prompts, and its features of images: any CLIPModel of transformers, from a folder."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.utils import logging

from metrics import Card
from metrics.images import check, cropped, normalised
from metrics.state import cast, check_tokenizer, reading, require, shown
from metrics.texts import Texts

ROWS = 64
"""Images that the model sees at once, whatever the batch: 512 would take ViT-L/14 several GB."""

OLD_EOS = 2
"""Of configurations older than transformers' #24773, in which the end of a prompt is its largest token."""

PREPROCESSING = "8 bits; shorter side to the model's (224) by PIL's bicubic; centre; OpenAI's mean and standard deviation"


class Clip:
    """A frozen CLIP model in eval mode, read when it is first needed. What it is given is moved to its device and dtype.

    Metrics that are given the same one share its passes: the features of the last images, and of the last prompts, are kept.

    Args:
        folder: with config.json, model.safetensors and the tokenizer's files, as save_pretrained writes them.
        device: None: the CPU.
        dtype: of the weights.

    Raises:
        FileNotFoundError: a file is missing; pickled weights do not count as one.
        ValueError: the configuration cannot be read. When the model is first used: nor can another file, or the weights are
            not those of the configuration.
    """

    def __init__(self, folder: Path, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> None:
        check_files(folder)
        self.folder, self.device, self.dtype = folder, device or torch.device("cpu"), dtype
        self.config = clip_config(folder)
        vision: Any = self.config.vision_config
        text: Any = self.config.text_config
        self.size: int = vision.image_size
        self.length: int = text.max_position_embeddings
        self.width: int = self.config.projection_dim  # type: ignore[assignment]
        self.texts = Texts(self._encoded)
        self._last: tuple[Tensor, int, Tensor] | None = None

    @cached_property
    def model(self) -> CLIPModel:
        model = _model(self.folder, self.config)
        cast(model, self.dtype)
        return model.to(self.device)  # type: ignore[arg-type]

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        return clip_tokenizer(self.folder, self.config)

    def load(self) -> None:
        """Read the files now."""
        _ = self.tokenizer, self.model

    def image_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> features (B, F), not normalised. Differentiable in the images.

        Asked again for the same tensor, it answers from memory, but where gradients are asked for.
        """
        check(images, [""] * len(images))
        if (torch.is_grad_enabled() and images.requires_grad) or images.is_inference():  # which count no versions
            return self._seen(images)
        last = self._last  # one read: another thread may write it meanwhile
        if last is None or last[0] is not images or last[1] != images._version:
            self._last = last = (images, images._version, self._seen(images))
        return last[2]

    def _seen(self, images: Tensor) -> Tensor:
        found = []
        for part in images.split(ROWS):
            pixels = normalised(cropped(part.to(self.device), self.size) / 255).to(self.dtype)
            found.append(self.model.get_image_features(pixels).pooler_output)  # type: ignore[union-attr]
        return torch.cat(found)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> features (B, F), not normalised. Each is padded or cut to the model's length, and encoded once.

        Raises:
            ValueError: there is no prompt.
        """
        return self.texts(prompts)

    def _encoded(self, prompt: str) -> Tensor:
        tokens = self.tokenizer([prompt], padding="max_length", truncation=True, max_length=self.length, return_tensors="pt")
        return self.model.get_text_features(**tokens.to(self.device)).pooler_output  # type: ignore[union-attr, return-value]

    def similarity(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] and their B prompts -> cosines of their features (B,), float64, on the model's device.

        Raises:
            ValueError: the images are not that, or the prompts not as many.
        """
        check(images, prompts)
        return cosine_similarity(self.image_features(images).double(), self.text_features(prompts).double())


class ClipScore:
    """A Metric: the cosine of image and prompt, for ViT-L/14 of OpenAI. Differentiable."""

    card: ClassVar[Card] = Card(
        scale="cosine, not scaled: other programs print 100 times it",
        range="0.26 to 0.29",
        preprocessing=PREPROCESSING,
        source="Radford et al. 2021",
    )

    def __init__(self, clip: Clip) -> None:
        self.clip = clip

    def load(self) -> None:
        self.clip.load()

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.clip.similarity(images, prompts)


class PickScore:
    """A Metric: exp(logit_scale) cos(image, prompt), for PickScore_v1, a ViT-H/14 tuned on preferences. Differentiable.

    logit_scale is a weight of the model.
    """

    card: ClassVar[Card] = Card(
        scale="cosine times the model's exp(logit_scale), about 100",
        range="20 to 23",
        preprocessing=PREPROCESSING,
        source="Kirstain et al. 2023, PickScore_v1",
        divisor=26.0,
    )

    def __init__(self, clip: Clip) -> None:
        self.clip = clip

    def load(self) -> None:
        self.clip.load()

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.clip.model.logit_scale.double().exp() * self.clip.similarity(images, prompts)


class ClipFeatures:
    """A Clip's image features as an extractor, for distances of distributions: images (B, 3, H, W) -> (B, width), float64."""

    def __init__(self, clip: Clip, name: str) -> None:
        self.clip, self.name, self.width = clip, name, clip.width
        self.resize = f"{PREPROCESSING}; {clip.size} pixels"

    def load(self) -> None:
        self.clip.load()

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        return self.clip.image_features(images).double().cpu()


def check_files(folder: Path, weights: bool = True) -> None:
    """Raise FileNotFoundError unless a folder has the files of a CLIP model, `weights` among them."""
    tokenizer = ["tokenizer.json"] if (folder / "tokenizer.json").exists() else ["vocab.json", "merges.txt"]
    # transformers would take pickled weights, or an empty vocabulary, instead
    needed = ["config.json", *(["model.safetensors"] if weights else []), *tokenizer]
    for name in needed:
        others = f"{', '.join(needed[: -len(tokenizer)])} and tokenizer.json (or vocab.json and merges.txt)"
        require(folder / name, f"a folder with {others}")


def clip_config(folder: Path) -> CLIPConfig:
    """A folder's config.json."""
    with reading(folder / "config.json"):
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind != "clip":
            raise ValueError(f"model_type {kind}; valid: clip")
        config = CLIPConfig.from_pretrained(folder, local_files_only=True)
        vision: Any = config.vision_config
        if not isinstance(vision.image_size, int) or vision.num_channels != 3:
            raise ValueError(f"image_size {vision.image_size}, num_channels {vision.num_channels}; valid: one number, and 3")
    return config


def clip_tokenizer(folder: Path, config: CLIPConfig) -> CLIPTokenizer:
    """A folder's tokenizer, which fits a configuration."""
    text: Any = config.text_config
    check_tokenizer(folder)
    with reading(f"{folder}: tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        if len(tokenizer) > text.vocab_size:
            raise ValueError(f"{len(tokenizer)} tokens; valid: at most the model's {text.vocab_size}")
        end = tokenizer.eos_token_id
        if text.eos_token_id not in (OLD_EOS, end):  # else all prompts would have the features of their first token
            raise ValueError(f"prompts end with token {end}; valid: the model's {text.eos_token_id}")
    return tokenizer


def _model(folder: Path, config: CLIPConfig) -> CLIPModel:
    with reading(folder / "model.safetensors"), _quiet():
        loaded: Any = CLIPModel.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to be named below, with the others
        )
        model, found = loaded
        # transformers draws at random what a file lacks. It leaves out the position_ids that its old versions wrote.
        wrong = [f"{what}: {shown(sorted(map(str, names)))}" for what, names in found.items() if names]
        if wrong:
            raise ValueError(f"{'; '.join(wrong)}; valid: exactly the weights of config.json")
    return model.eval().requires_grad_(False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own report of what did not fit, of a line for each weight."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
