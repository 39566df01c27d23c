"""A small classifier of 8x8 digits: the network behind the reward, the judge and the judge's features."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

CLASSES = 10
FEATURES = 32


class Classifier(nn.Module):
    """Images (B, 1, 8, 8) in [0, 1] -> logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(256, FEATURES),
            nn.ReLU(),
        )
        self.head = nn.Linear(FEATURES, CLASSES)

    @classmethod
    def load(cls, file: Path) -> "Classifier":
        """Read what `save` wrote."""
        classifier = cls()
        classifier.load_state_dict(load_file(file))
        return classifier.eval().requires_grad_(False)

    def save(self, file: Path) -> None:
        """Write the weights (safetensors)."""
        file.write_bytes(save(self.state_dict()))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 1, 8, 8) in [0, 1] -> the last hidden layer (B, 32)."""
        return self.body(2 * images - 1)


def labels_of(prompts: Sequence[str]) -> Tensor:
    """Prompts "0" to "9" -> labels (B,)."""
    return torch.tensor([int(prompt) for prompt in prompts])
