"""A tiny CLIP model with random weights and a tokenizer of single bytes: 0.2 MB, made in a second."""

import backends as backends  # before transformers' image processors, which import torchvision

# isort: split

from pathlib import Path

import torch
from tiny import HIDDEN, clip_config, clip_tokenizer
from transformers import CLIPConfig, CLIPModel

PROJECTION = 8
IMAGE = 32
"""Height and width of the images that the model sees."""


def tiny_clip(seed: int) -> CLIPModel:
    """CLIP's classes: 32x32 images in patches of 8x8, 8 features. The seed draws the weights."""
    vision = {
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": IMAGE,
        "patch_size": 8,
    }
    torch.manual_seed(seed)
    config = CLIPConfig(text_config=clip_config().to_dict(), vision_config=vision, projection_dim=PROJECTION)
    return CLIPModel(config).eval()


def saved_clip(folder: Path, seed: int) -> Path:
    """Write a tiny CLIP model and its tokenizer as metrics.clip reads them."""
    tiny_clip(seed).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    return folder
