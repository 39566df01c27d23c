"""A tiny MPS with random weights: a CLIP model with a cross model on top, 1 MB, made in a second."""

import backends as backends  # before transformers, which imports torchvision

# isort: split

import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
from tiny import HIDDEN, clip_config, clip_tokenizer
from tiny_clip import IMAGE
from torch import nn
from transformers import CLIPConfig, CLIPModel

from metrics.mps import FILE, CrossAttention, CrossedCLIP, CrossModel, Residual, Rotation, SelfAttention, SwiGLU

PROJECTION = 64
"""Features of images and texts."""

HEADS = 2
LAYERS = 2

PUBLISHED: dict[type[nn.Module], tuple[str, str]] = {
    CrossedCLIP: ("trainer.models.clip_model", "CLIPModel"),
    CLIPModel: ("trainer.models.clip_model", "XCLIPModel"),
    CrossModel: ("trainer.models.cross_modeling", "Cross_model"),
    Residual: ("trainer.models.cross_modeling", "Residual"),
    CrossAttention: ("trainer.models.cross_modeling", "CrossAttention"),
    SelfAttention: ("trainer.models.cross_modeling", "ParallelTransformerBlock"),
    Rotation: ("trainer.models.cross_modeling", "RotaryEmbedding"),
    SwiGLU: ("trainer.models.cross_modeling", "SwiGLU"),
}
"""What the published checkpoint calls each class, and the module that it was in."""


def tiny_mps_config() -> CLIPConfig:
    """32x32 images in patches of 8x8, 64 features."""
    vision = {
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": IMAGE,
        "patch_size": 8,
        "hidden_act": "gelu",
    }
    text = {**clip_config().to_dict(), "hidden_act": "gelu"}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=PROJECTION)


def tiny_mps(seed: int) -> CrossedCLIP:
    """In half precision, as published. The seed draws the weights."""
    sizes = {f"cross_model.layers.{layer}.0.fn.to_q.weight": torch.empty(HEADS * 64, PROJECTION) for layer in range(LAYERS)}
    torch.manual_seed(seed)
    model = CrossedCLIP(tiny_mps_config(), sizes)
    with torch.no_grad():
        model.model.text_model.embeddings.token_embedding.weight.mul_(50)
        model.model.text_projection.weight[:, 2:] = 0  # else all tokens are similar, and all are kept
        for name, weight in model.cross_model.named_parameters():
            if name.endswith(("to_q.weight", "to_kv.weight", "fused_attn_ff_proj.weight")):
                weight.mul_(4)  # else all tokens have the same attention
    return model.half().eval()


def saved_mps(folder: Path, seed: int) -> Path:
    """Write a tiny model as it is published, which alone is why it is a pickle of a whole module.

    The published classes exist only while it is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_mps(seed)
    modules = {name: ModuleType(name) for name in ("trainer", "trainer.models", *(where for where, _ in PUBLISHED.values()))}
    classes = {kind: type(name, (kind,), {"__module__": where}) for kind, (where, name) in PUBLISHED.items()}
    for made in classes.values():
        setattr(modules[made.__module__], made.__name__, made)
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.register_buffer("pos_emb", torch.zeros(17, 64), persistent=False)  # kept of an earlier call
        module.__class__ = classes.get(type(module), type(module))  # type: ignore[assignment]
    with patch.dict(sys.modules, modules):
        torch.save(model, folder / FILE)
    return folder


def saved_clip_h14(folder: Path) -> Path:
    """Write the configuration of that model's CLIP and a tokenizer."""
    tiny_mps_config().save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    return folder
