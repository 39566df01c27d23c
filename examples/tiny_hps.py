"""A tiny model of HPSv2.1's class with random weights, CLIP's own vocabulary: 3 MB, made in a second."""

import backends as backends  # before open_clip, which imports torchvision

# isort: split

import json
from pathlib import Path

import torch
from open_clip import CLIP

from metrics.hps import CONFIG, FILE

IMAGE = 32
"""Height and width of the images that the model sees."""

ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": IMAGE, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


def tiny_hps(seed: int) -> CLIP:
    """open_clip's class: 32x32 images in patches of 8x8, 16 features. The seed draws the weights."""
    torch.manual_seed(seed)
    return CLIP(**ARCHITECTURE).eval()


def saved_hps(folder: Path, seed: int) -> Path:
    """Write a tiny model as metrics.hps reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": tiny_hps(seed).state_dict()}, folder / FILE)
    (folder / CONFIG).write_text(json.dumps({"model_cfg": ARCHITECTURE}))
    return folder
