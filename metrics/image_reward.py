"""ImageReward: what people prefer of the images that a prompt has, learned from their rankings."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from math import isqrt
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from metrics import Card
from metrics.clip import PREPROCESSING, ROWS
from metrics.head import Head
from metrics.images import check, levels, normalised, resized
from metrics.state import SHOWN, check_tokenizer, load_exactly, read_state, reading, require

FILE, CONFIG = "ImageReward.pt", "med_config.json"

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of rewards, as published: scores have mean 0 and standard deviation 1."""

LENGTH = 35
"""Tokens of a prompt."""

HEAD = 64
"""Width of each attention head of the vision transformer."""

POSITIONS = "blip.visual_encoder.pos_embed"
PATCHES = "blip.visual_encoder.patch_embed.proj.weight"
BLOCKS = "blip.visual_encoder.blocks."

IGNORED = (
    "blip.vision_proj.weight",
    "blip.vision_proj.bias",
    "blip.text_proj.weight",
    "blip.text_proj.bias",
    "blip.text_encoder.embeddings.position_ids",
)
"""Published with the others; scores do not need them."""

RENAMED = (
    ("visual_encoder.cls_token", "visual_encoder.embeddings.class_embedding"),
    ("visual_encoder.pos_embed", "visual_encoder.embeddings.position_embedding"),
    ("visual_encoder.patch_embed.proj.", "visual_encoder.embeddings.patch_embedding."),
    ("visual_encoder.blocks.", "visual_encoder.encoder.layers."),
    ("visual_encoder.norm.", "visual_encoder.post_layernorm."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
)
"""Parts of the weights' names: as published, and in transformers."""


class ImageReward:
    """A Metric: a linear map of what BERT makes of a prompt while it attends to a vision transformer's tokens of the image.

    Differentiable.

    Args:
        folder: with FILE (a state dict) and CONFIG, as published.
        tokenizer: folder with bert-base-uncased's vocab.txt or tokenizer.json.
        device: None: the CPU.
        dtype: of the two transformers' weights.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the configuration cannot be read. When the model is first used: nor can another file, or the weights or
            the vocabulary are not those of the configuration.
    """

    card: ClassVar[Card] = Card(
        scale="standard deviations from the mean reward",
        range="-2 to 2, of 98 % of images",
        preprocessing=PREPROCESSING,
        source="Xu et al. 2023, ImageReward-v1.0",
        divisor=10.0,
    )

    def __init__(
        self, folder: Path, tokenizer: Path, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        self.folder, self.vocabulary, self.device, self.dtype = folder, tokenizer, device or torch.device("cpu"), dtype
        for name in (FILE, CONFIG):
            require(folder / name, f"a folder with {FILE} and {CONFIG}")
        if not (tokenizer / "tokenizer.json").exists():
            require(tokenizer / "vocab.txt", "a folder with vocab.txt or tokenizer.json")
        with reading(folder / CONFIG):
            self.config = BertConfig.from_json_file(folder / CONFIG)

    @cached_property
    def network(self) -> "Network":
        state = read_state(self.folder / FILE)
        vision = _vision_config(state, self.folder / FILE)
        with reading(self.folder / CONFIG):
            network = Network(vision, _text_config(self.config, vision.hidden_size))
        load_exactly(network, state, self.folder / FILE, IGNORED)
        network.blip.to(self.dtype)
        return network.to(self.device).eval().requires_grad_(False)

    @cached_property
    def tokenizer(self) -> BertTokenizer:
        check_tokenizer(self.vocabulary)
        with reading(f"{self.vocabulary}: tokenizer"):
            tokenizer = BertTokenizer.from_pretrained(self.vocabulary, local_files_only=True)
            # no prompt begins with either; but if their names stand in one, they are what it is read as
            tokenizer.add_special_tokens({"bos_token": "[DEC]", "extra_special_tokens": ["[ENC]"]})
            if len(tokenizer) != self.config.vocab_size:
                raise ValueError(f"{len(tokenizer)} tokens with [DEC] and [ENC]; valid: {CONFIG}'s {self.config.vocab_size}")
        return tokenizer

    def load(self) -> None:
        _ = self.network, self.tokenizer

    def tokens(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Prompts (n,) -> input_ids and attention_mask, (n, LENGTH) each. They are padded or cut to it."""
        found = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        return {name: found[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        check(images, prompts)
        found = []
        for first in range(0, len(images), ROWS):
            rows = slice(first, first + ROWS)
            pixels = normalised(centred(images[rows].to(self.device), self.network.size).float() / 255)
            found.append(self.network(pixels.to(self.dtype), **self.tokens(prompts[rows])))
        return (torch.cat(found).double() - MEAN) / STD


class Network(nn.Module):
    """Normalised images (B, 3, size, size) and tokens (B, L) -> rewards (B,), float32.

    Its state dict has the published names.
    """

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig) -> None:
        super().__init__()
        self.size: int = vision.image_size  # type: ignore[assignment]
        models = {"visual_encoder": BlipVisionModel(vision), "text_encoder": BlipTextModel(text, add_pooling_layer=False)}
        self.blip = nn.ModuleDict(models)
        self.mlp = Head(text.hidden_size)
        self.register_state_dict_post_hook(_as_published)
        self.register_load_state_dict_pre_hook(_as_in_transformers)

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        image = self.blip["visual_encoder"](pixels).last_hidden_state
        read = self.blip["text_encoder"](input_ids, attention_mask=attention_mask, encoder_hidden_states=image)
        return self.mlp(read.last_hidden_state[:, 0].float())[:, 0]


def centred(images: Tensor, size: int) -> Tensor:
    """As metrics.images.cropped, but where the centre lies between two pixels, it begins at the even one, as torchvision's."""
    height, width = images.shape[-2:]
    short = min(height, width)
    tall, wide = size * height // short, size * width // short
    top, left = round((tall - size) / 2), round((wide - size) / 2)
    return resized(levels(images), tall, wide)[..., top : top + size, left : left + size]


def _vision_config(state: Mapping[str, Tensor], file: Path) -> BlipVisionConfig:
    """Of the vision transformer whose weights these are: as timm's, its width is all that its layers have to be told."""
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    match shapes.get(POSITIONS), shapes.get(PATCHES):
        case (1, tokens, width), (_, _, patch, _) if tokens * width * patch > 0 and width % HEAD == 0:
            blocks = {name.removeprefix(BLOCKS).split(".")[0] for name in state if name.startswith(BLOCKS)}
            return BlipVisionConfig(
                hidden_size=width,
                intermediate_size=4 * width,
                num_hidden_layers=len(blocks),
                num_attention_heads=width // HEAD,
                image_size=patch * isqrt(tokens - 1),
                patch_size=patch,
                layer_norm_eps=1e-6,
            )
    found = [f"{name} {shapes.get(name, 'missing')}" for name in (POSITIONS, PATCHES)]
    first = ", ".join(list(shapes)[:SHOWN])
    valid = f"(1, tokens, width) and (width, 3, patch, patch), width a multiple of {HEAD}"
    raise ValueError(f"{file}: {'; '.join(found)}, among {len(shapes)} weights: {first} ...; valid: {valid}")


def _text_config(bert: BertConfig, image_width: int) -> BlipTextConfig:
    """Of BERT with cross-attention to tokens of an image. What it reads is not causal all the same."""
    return BlipTextConfig(
        vocab_size=bert.vocab_size,
        hidden_size=bert.hidden_size,
        encoder_hidden_size=image_width,
        intermediate_size=bert.intermediate_size,
        num_hidden_layers=bert.num_hidden_layers,
        num_attention_heads=bert.num_attention_heads,
        max_position_embeddings=bert.max_position_embeddings,
        hidden_act=bert.hidden_act,
        layer_norm_eps=bert.layer_norm_eps,
        pad_token_id=bert.pad_token_id,
        bos_token_id=None,  # transformers warns of one that is beyond the vocabulary
        is_decoder=True,  # which gives it the layers; whether tokens see later ones is forward's is_decoder, False
    )


def _as_published(network: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
    """Rename the weights that a state dict has just been given."""
    for name in list(state):
        renamed = name
        for published, own in RENAMED:
            renamed = renamed.replace(own, published)
        state[renamed] = state.pop(name)


def _as_in_transformers(network: nn.Module, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
    """Rename the weights that are about to be loaded."""
    for name in list(state):
        renamed = name
        for published, own in RENAMED:
            renamed = renamed.replace(published, own)
        state[renamed] = state.pop(name)
