"""CLIP's scores of images and prompts, and its features of images: any CLIPModel of transformers, from a folder."""

import errno
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import cosine_similarity, interpolate
from torch_fidelity import FeatureExtractorBase, register_feature_extractor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

CLIP = "clip-images"
ROWS = 64
"""Images that the extractor shows the model at once: the 512 of torch-fidelity's batches would take ViT-L/14 several GB."""

ROUNDING = 1e-3
"""How far outside [0, 1] images may lie."""

OLD_EOS = 2
"""Of configurations older than transformers' #24773, in which the end of a prompt is its largest token."""


class Clip:
    """A frozen CLIP model, in float32 and eval mode. Whatever it is given is moved to the model's device and dtype.

    Args:
        folder: with config.json, model.safetensors and the tokenizer's files, as save_pretrained writes them.
        device: None: the CPU.

    Raises:
        FileNotFoundError: a file is missing; pickled weights do not count as one.
        ValueError: a file cannot be read, or the weights are not those of the configuration.
    """

    def __init__(self, folder: Path, device: torch.device | None = None) -> None:
        _check_files(folder)
        config = _config(folder)
        vision, text = cast(Any, config.vision_config), cast(Any, config.text_config)
        self.tokenizer = _tokenizer(folder, text)
        self.size: int = vision.image_size
        self.length: int = text.max_position_embeddings
        self.model = _model(folder, config).to(device or torch.device("cpu"))  # type: ignore[arg-type]

    def image_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] -> features (B, F), not normalised. Differentiable in the images."""
        _check_images(images)
        pixels = _normalised(cropped(images.to(self.model.device, self.model.dtype), self.size))
        return self.model.get_image_features(pixels).pooler_output  # type: ignore[union-attr, return-value]

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> features (B, F), not normalised. Each is padded or cut to the model's length, and encoded once.

        Raises:
            ValueError: there is no prompt.
        """
        if not prompts:
            raise ValueError("prompts: none; valid: at least one")
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        tokens = self.tokenizer(list(rows), padding="max_length", truncation=True, max_length=self.length, return_tensors="pt")
        found = self.model.get_text_features(**tokens.to(self.model.device)).pooler_output  # type: ignore[union-attr]
        return found[[rows[prompt] for prompt in prompts]]  # type: ignore[index]

    def similarity(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] and their B prompts -> cosines of their features (B,), float64, on the model's device.

        Raises:
            ValueError: the images are not that, or the prompts not as many.
        """
        if (len(prompts),) != images.shape[:1]:
            raise ValueError(f"prompts: {len(prompts)} for images {tuple(images.shape)}; valid: one for each image")
        return cosine_similarity(self.image_features(images).double(), self.text_features(prompts).double())


class ClipScore:
    """A Scorer: the cosine of image and prompt, for ViT-L/14 of OpenAI. Differentiable.

    Not scaled: good images have .26 to .29, where other programs print 26 to 29.
    """

    def __init__(self, folder: Path, device: torch.device | None = None) -> None:
        self.clip = Clip(folder, device)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.clip.similarity(images, prompts)


class PickScore:
    """A Scorer: exp(logit_scale) cos(image, prompt), for PickScore_v1, a ViT-H/14 tuned on preferences. Differentiable.

    About 20 to 23. logit_scale is a weight of the model. (Kirstain et al. 2023.)
    """

    def __init__(self, folder: Path, device: torch.device | None = None) -> None:
        self.clip = Clip(folder, device)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.clip.model.logit_scale.double().exp() * self.clip.similarity(images, prompts)


class ClipFeatures(FeatureExtractorBase):
    """torch-fidelity's extractor of a CLIP folder: uint8 images (B, 3, H, W) -> image features (B, F), float64."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str, verbose: bool = False) -> None:
        super().__init__(name, features_list)
        self.clip = Clip(Path(feature_extractor_weights_path))
        self.model = self.clip.model  # so that torch-fidelity's .cuda() moves it

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return ("hidden",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "hidden"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> None:
        return None

    def forward(self, input: Tensor) -> tuple[Tensor]:  # noqa: A002  torch-fidelity's name
        found = [self.clip.image_features(images.float() / 255) for images in input.split(ROWS)]
        return (torch.cat(found).double(),)


register_feature_extractor(CLIP, ClipFeatures)


def cropped(images: Tensor, size: int) -> Tensor:
    """Images (B, C, H, W) in [0, 1] -> their centre (B, C, size, size), after the shorter side is resized to `size`.

    Bicubic with antialias, as PIL has it: first along the rows, then along the columns, the overshoot of each clipped. PIL also
    rounds each to 8 bits, which has no gradient: half a level (1/255) that the second pass, whose weights' absolute values sum
    to 1.27 at most, raises to .64, and another half. So no pixel is further than 1.14 levels from PIL's; .3 on average. Images
    whose shorter side is `size` already are only cropped.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    to_height, to_width = size * height // short, size * width // short
    if short != size:
        images = _resized(_resized(images, (height, to_width)), (to_height, to_width))
    top, left = (to_height - size) // 2, (to_width - size) // 2
    return images[..., top : top + size, left : left + size]


def _resized(images: Tensor, shape: tuple[int, int]) -> Tensor:
    return interpolate(images, shape, mode="bicubic", antialias=True).clamp(0, 1)


def _normalised(images: Tensor) -> Tensor:
    mean, std = (images.new_tensor(numbers).view(3, 1, 1) for numbers in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (images - mean) / std


def _check_images(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape:
        raise ValueError(f"images: {tuple(images.shape)}; valid: (B, 3, H, W), none of them 0")
    low, high = images.detach().aminmax()
    if not bool(low.isfinite() & high.isfinite()):  # NaN is both of them where there is one
        raise ValueError("images: NaN or infinite pixels; valid: finite ones")
    if low < -ROUNDING or high > 1 + ROUNDING:
        raise ValueError(f"images: from {low:.4g} to {high:.4g}; valid: from 0 to 1")


def _check_files(folder: Path) -> None:
    tokenizer = ["tokenizer.json"] if (folder / "tokenizer.json").exists() else ["vocab.json", "merges.txt"]
    for name in ("config.json", "model.safetensors", *tokenizer):
        if not (folder / name).is_file():  # transformers would take pickled weights, or an empty vocabulary, instead
            valid = "a folder with config.json, model.safetensors and tokenizer.json (or vocab.json and merges.txt)"
            raise FileNotFoundError(errno.ENOENT, f"missing; valid: {valid}", str(folder / name))


def _config(folder: Path) -> CLIPConfig:
    with _reading(folder / "config.json"):
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
        if kind != "clip":
            raise ValueError(f"model_type {kind}; valid: clip")
        config = CLIPConfig.from_pretrained(folder, local_files_only=True)
        vision: Any = config.vision_config
        if not isinstance(vision.image_size, int) or vision.num_channels != 3:
            raise ValueError(f"image_size {vision.image_size}, num_channels {vision.num_channels}; valid: one number, and 3")
    return config


def _model(folder: Path, config: CLIPConfig) -> CLIPModel:
    with _reading(folder / "model.safetensors"):
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
        wrong = {what: sorted(map(str, names)) for what, names in found.items() if names}
        if wrong:
            raise ValueError(f"{wrong}; valid: exactly the weights of config.json")
    return model.eval().requires_grad_(False)


def _tokenizer(folder: Path, text: Any) -> CLIPTokenizer:
    with _reading(f"{folder}: tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        if len(tokenizer) > text.vocab_size:
            raise ValueError(f"{len(tokenizer)} tokens; valid: at most the model's {text.vocab_size}")
        end = tokenizer.eos_token_id
        if text.eos_token_id not in (OLD_EOS, end):  # else all prompts would have the features of their first token
            raise ValueError(f"prompts end with token {end}; valid: the model's {text.eos_token_id}")
    return tokenizer


@contextmanager
def _reading(what: Path | str) -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into a ValueError that names it."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        raise ValueError(f"{what}: {error}") from error
