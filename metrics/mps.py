"""MPS, the multi-dimensional preference score: how an image looks, and how well it shows what a prompt asks for."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention, silu
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.initialization import no_init_weights

from metrics import Card
from metrics.clip import PREPROCESSING, check_files, clip_config, clip_tokenizer
from metrics.images import check, cropped, normalised
from metrics.state import cast, load_exactly, require
from metrics.texts import Texts
from unpickle import read_module

FILE = "MPS_overall_checkpoint.pth"
ROWS = 64
"""Images that the model sees at once, whatever the batch."""

HEAD = 64
"""Features of a head of attention."""

CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, texture, "
    "quantity, attributes, position, number, location, word, things."
)
"""What the overall score is about; words of a prompt that are far from all of these are not looked at."""

POSITIONS = [f"model.{part}_model.embeddings.position_ids" for part in ("text", "vision")]
"""Which transformers wrote until version 4.31; they count from 0."""


class MPS:
    """A Metric: exp(logit_scale) cos(prompt, image after looking at the prompt), by a ViT-H/14 with a cross model on top.

    Tokens of a prompt are kept if their greatest similarity to a token of CONDITION, divided by that of the prompt's nearest
    token, is above the threshold. The published code divides by the nearest token of the batch; for one image at a time, as it
    scores them, that is the same. The nearest token has quotient 1 and is always kept. Where even its similarity is negative,
    all quotients are 1 or more, and all tokens are kept. Differentiable in the images.

    Args:
        folder: with FILE, as published: a whole pickled module, of which nothing is executed.
        clip: a folder with config.json and tokenizer of laion/CLIP-ViT-H-14-laion2B-s32B-b79K; its weights are not read.
        device: None: the CPU.
        dtype: of the weights.
        threshold: below 1; 0.3 is the published scoring's, 0.01 the training's.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the configuration cannot be read, or the threshold is 1 or more. When first used: nor can another file, or
            the weights are not those of the configuration. When a prompt is scored: no token of it is nearest, which is where
            all similarities are 0 or one is not finite.
    """

    card: ClassVar[Card] = Card(
        scale="cosine times the model's exp(logit_scale), about 100",
        range="10 to 12",
        preprocessing=PREPROCESSING,
        source="Zhang et al. 2024, MPS (overall)",
        divisor=15.0,
    )

    def __init__(
        self,
        folder: Path,
        clip: Path,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        threshold: float = 0.3,
    ) -> None:
        if not threshold < 1:
            raise ValueError(f"threshold: {threshold}; valid: below 1")
        self.file = folder / FILE
        require(self.file)
        check_files(clip, weights=False)
        self.clip, self.device, self.dtype, self.threshold = clip, device or torch.device("cpu"), dtype, threshold
        self.config = clip_config(clip)
        vision: Any = self.config.vision_config
        text: Any = self.config.text_config
        self.size: int = vision.image_size
        self.length: int = text.max_position_embeddings
        self.texts = Texts(self._encoded, entries=256)  # of 78 times 1024 numbers

    @cached_property
    def model(self) -> "CrossedCLIP":
        state = read_module(self.file)
        with no_init_weights():  # all are read below: to draw a billion at random first takes half a minute
            model = CrossedCLIP(self.config, state)
        load_exactly(model, state, self.file, POSITIONS)
        cast(model, self.dtype)
        return model.to(self.device).eval().requires_grad_(False)

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        return clip_tokenizer(self.clip, self.config)

    @cached_property
    def condition(self) -> Tensor:
        """The features of CONDITION's tokens, (length, F)."""
        return self._encoded(CONDITION)[0, :-1]

    def load(self) -> None:
        _ = self.model, self.tokenizer, self.condition

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        check(images, prompts)
        parts = [self._cosines(images[i : i + ROWS], prompts[i : i + ROWS]) for i in range(0, len(images), ROWS)]
        return self.model.model.logit_scale.double().exp() * torch.cat(parts)

    def _cosines(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        texts = self.texts(prompts)
        tokens, ends = texts[:, :-1], texts[:, -1]
        kept = self._near(tokens)
        if not bool((some := kept.any(-1)).all()):
            prompt = prompts[int(some.int().argmin())]
            raise ValueError(f"prompt {prompt[:100]!r}: similarities to the condition all 0, or not finite; valid: others")
        pixels = normalised(cropped(images.to(self.device), self.size).float() / 255)
        crossed = self.model.cross_model(self.model.image_features(pixels.to(self.dtype)), tokens, kept)
        return cosine_similarity(crossed[:, 0].double(), ends.double())

    def _near(self, tokens: Tensor) -> Tensor:
        """Prompts' tokens (B, length, F) -> which of them are kept (B, length)."""
        nearest = (tokens @ self.condition.T).amax(-1)
        return nearest / nearest.amax(-1, keepdim=True) > self.threshold

    def _encoded(self, prompt: str) -> Tensor:
        """The features of all tokens of a prompt, then those of its end (1, length + 1, F)."""
        tokens = self.tokenizer([prompt], padding="max_length", truncation=True, max_length=self.length, return_tensors="pt")
        return self.model.text_features(tokens["input_ids"].to(self.device))  # type: ignore[union-attr]


class CrossedCLIP(nn.Module):
    """A CLIP model, and a model in which patches look at tokens; with the published names of weights.

    Args:
        config: of the CLIP model.
        state: the weights that it will be given, of which the cross model's sizes are read.
    """

    def __init__(self, config: CLIPConfig, state: Mapping[str, Tensor]) -> None:
        super().__init__()
        queries = [value for name, value in state.items() if name.endswith(".0.fn.to_q.weight")]
        width: int = config.projection_dim  # type: ignore[assignment]
        heads = max(len(queries[0]) // HEAD, 1) if queries and queries[0].ndim else 1
        self.model = CLIPModel(config)
        self.cross_model = CrossModel(width, max(len(queries), 1), heads)

    def image_features(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) -> features of the class token, then of all patches (B, patches + 1, F)."""
        return self.model.visual_projection(self.model.vision_model(pixel_values=pixels).last_hidden_state)

    def text_features(self, tokens: Tensor) -> Tensor:
        """Tokens (n, length) -> features of all of them, then of the prompts' ends (n, length + 1, F).

        What fills prompts up is not masked: only so have its tokens the published features.
        """
        found = self.model.text_model(input_ids=tokens)
        return self.model.text_projection(torch.cat([found.last_hidden_state, found.pooler_output[:, None]], 1))


class CrossModel(nn.Module):
    """Patches (B, n, width), tokens (B, length, width), which to keep (B, length) -> patches that have looked at those tokens.

    Args:
        width: of patches and tokens.
        layers: each of attention to the tokens, then of attention among patches.
        heads: of either.
    """

    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([Residual(CrossAttention(width, heads)), Residual(SelfAttention(width, heads))])
            for _ in range(layers)
        )

    def forward(self, patches: Tensor, tokens: Tensor, kept: Tensor) -> Tensor:
        for layer in self.layers:
            cross, own = layer  # type: ignore[misc]
            patches = own(cross(patches, tokens, kept))
        return patches


class Residual(nn.Module):
    """x -> x + fn(x)."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return x + self.fn(x, *others)


class CrossAttention(nn.Module):
    """Attention of patches to the tokens that are kept, plus a feed-forward network beside it.

    All heads share keys and values (Shazeer 2019).
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * HEAD, bias=False)
        self.to_kv = nn.Linear(width, 2 * HEAD, bias=False)
        self.to_out = nn.Linear(heads * HEAD, width, bias=False)
        self.ff = nn.Sequential(nn.Linear(width, 8 * width, bias=False), SwiGLU(), nn.Linear(4 * width, width, bias=False))

    def forward(self, patches: Tensor, tokens: Tensor, kept: Tensor) -> Tensor:
        x = self.norm(patches)
        keys, values = self.to_kv(tokens).chunk(2, -1)
        queries = self.to_q(x).unflatten(-1, (-1, HEAD))
        return self.to_out(shared_attention(queries, keys, values, kept)) + self.ff(x)


class SelfAttention(nn.Module):
    """Attention among patches, whose order is told by rotations, plus a feed-forward network beside it.

    All heads share keys and values; one matrix makes queries, keys, values and what the network is given.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.sizes = [heads * HEAD, HEAD, HEAD, 8 * width]
        self.norm = nn.LayerNorm(width)
        self.rotary_emb = Rotation()
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.sizes), bias=False)
        self.attn_out = nn.Linear(heads * HEAD, width, bias=False)
        self.ff_out = nn.Sequential(SwiGLU(), nn.Linear(4 * width, width, bias=False))

    def forward(self, patches: Tensor) -> Tensor:
        queries, keys, values, inner = self.fused_attn_ff_proj(self.norm(patches)).split(self.sizes, -1)
        queries = self.rotary_emb(queries.unflatten(-1, (-1, HEAD)))
        keys = self.rotary_emb(keys.unsqueeze(2)).squeeze(2)
        return self.attn_out(shared_attention(queries, keys, values)) + self.ff_out(inner)


class Rotation(nn.Module):
    """Heads (B, n, heads, HEAD) -> the same, features i and i + HEAD/2 turned by n 10000^(-2i/HEAD) (Su et al. 2021)."""

    inv_freq: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 10000 ** -(torch.arange(0, HEAD, 2) / HEAD))

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1], dtype=torch.float64, device=x.device)
        angles = torch.outer(positions, self.inv_freq.double())[:, None]
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class SwiGLU(nn.Module):
    """Values and gates (..., 2n) -> values times silu(gates) (..., n) (Shazeer 2020)."""

    def forward(self, x: Tensor) -> Tensor:
        values, gates = x.chunk(2, -1)
        return values * silu(gates)


def shared_attention(queries: Tensor, keys: Tensor, values: Tensor, kept: Tensor | None = None) -> Tensor:
    """Queries (B, n, heads, HEAD), and keys and values (B, m, HEAD) that all heads share -> (B, n, heads * HEAD).

    Those that are not kept (B, m) have weight 0. Heads are further queries, nothing else.
    """
    mask = None if kept is None else kept[:, None]
    return scaled_dot_product_attention(queries.flatten(1, 2), keys, values, mask).view(*queries.shape[:2], -1)
