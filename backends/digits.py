"""Handwritten 8x8 digits: a small class-conditional U-Net with EDM's preconditioning. A prompt is "0" to "9"."""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import interpolate, silu

from backends.backend import Spec
from solvers import Backbone, Conditioned

CLASSES = 10
UNCONDITIONAL = CLASSES
ROWS = 64
"""Rows of every call of the network, the last one padded: kernels choose their order of summation by the batch's size, so only
equal sizes make a row's result independent of how many others it came with."""


class Digits:
    """The frozen digits model.

    Args:
        network: in eval mode.
    """

    spec = Spec(shape=(1, 8, 8), sigma_min=0.002, sigma_max=80.0, features=16)

    def __init__(self, network: "UNet") -> None:
        self.network = network.eval().requires_grad_(False)

    @classmethod
    def load(cls, file: Path) -> "Digits":
        """Read what `save` wrote."""
        with safe_open(file, framework="pt") as tensors:
            metadata = tensors.metadata() or {}
        if "unet" not in metadata:
            raise ValueError(f"{file}: header {metadata}; valid: one that `Digits.save` writes")
        shape = json.loads(metadata["unet"])
        network = UNet(channels=shape["channels"], sigma_data=shape["sigma_data"])
        network.load_state_dict(load_file(file))
        return cls(network)

    @staticmethod
    def identity(file: Path) -> Backbone:
        """Which model a file holds."""
        return Backbone("digits", hashlib.sha256(file.read_bytes()).hexdigest(), "CC BY 4.0, that of the digits")

    def save(self, file: Path) -> None:
        """Write the network's weights and shape (safetensors)."""
        shape = {"channels": self.network.channels, "sigma_data": self.network.sigma_data}
        weights = {name: value.contiguous() for name, value in self.network.state_dict().items()}
        file.write_bytes(save(weights, {"unet": json.dumps(shape)}))  # one entry: the format orders several at random

    def denoiser(self, prompts: Sequence[str]) -> "_Denoiser":
        return _Denoiser(self.network, labels_of(prompts))

    @staticmethod
    def decode(x: Tensor) -> Tensor:
        """States (B, 1, 8, 8) -> images in [0, 1]."""
        return ((x + 1) / 2).clamp(0, 1)

    @staticmethod
    def encode(images: Tensor) -> Tensor:
        """Images (B, 1, 8, 8) in [0, 1] -> data x0, the inverse of `decode`."""
        return 2 * images - 1


class _Denoiser(Conditioned):
    """The network for given labels, (B,)."""

    def __init__(self, network: "UNet", labels: Tensor) -> None:
        super().__init__(lambda x, sigma, rows: self._padded(x, sigma, labels[rows])[0], len(labels))
        self.network = network
        self.labels = labels

    def with_feature(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return self._padded(x, sigma, self.labels[torch.arange(len(x)) % len(self.labels)])

    def _padded(self, x: Tensor, sigma: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.arange(len(x) + -len(x) % ROWS).clamp_max(len(x) - 1)  # the last row again, up to a full call
        parts = (x[rows], sigma[rows], labels[rows])
        chunks = zip(*(part.split(ROWS) for part in parts), strict=True)
        denoised, features = zip(*(self.network.with_feature(*chunk) for chunk in chunks), strict=True)
        return torch.cat(denoised)[: len(x)], torch.cat(features)[: len(x)].detach()


def labels_of(prompts: Sequence[str]) -> Tensor:
    """Prompts "0" to "9", or "" for the unconditional model -> labels 0 to 10, (B,)."""
    names = {str(digit): digit for digit in range(CLASSES)} | {"": UNCONDITIONAL}
    unknown = sorted(set(prompts) - set(names))
    if unknown:
        raise ValueError(f"prompts: {unknown}; valid: {list(names)}")
    return torch.tensor([names[prompt] for prompt in prompts])


class UNet(nn.Module):
    """D(x, sigma, label) with the preconditioning of Karras et al. 2022 (EDM, table 1, last column).

    Args:
        channels: at 8x8; twice as many at 4x4.
        sigma_data: standard deviation of the data.
    """

    def __init__(self, channels: int, sigma_data: float) -> None:
        super().__init__()
        self.channels = channels
        self.sigma_data = sigma_data
        width = 2 * channels
        self.noise_embedding = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width))
        self.label_embedding = nn.Embedding(CLASSES + 1, width)
        self.first = nn.Conv2d(1, channels, 3, padding=1)
        self.down_block = _Block(channels, channels, width)
        self.down = nn.Conv2d(channels, width, 3, stride=2, padding=1)
        self.middle = nn.ModuleList(_Block(width, width, width) for _ in range(2))
        self.up = nn.Conv2d(width, channels, 3, padding=1)
        self.up_block = _Block(2 * channels, channels, width)
        self.last_norm = nn.GroupNorm(8, channels)
        self.last = _zero(nn.Conv2d(channels, 1, 3, padding=1))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """States (B, 1, 8, 8) at sigma (B,) with labels (B,) -> D, in the state's dtype; the network computes in float32."""
        return self.with_feature(x, sigma, labels)[0]

    def with_feature(self, x: Tensor, sigma: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """D, and the bottleneck's mean over its channels (B, 16)."""
        level = sigma.view(-1, 1, 1, 1)
        total = level**2 + self.sigma_data**2
        c_skip = self.sigma_data**2 / total
        c_out = level * self.sigma_data / total.sqrt()
        out, feature = self._network((x / total.sqrt()).float(), (sigma.log() / 4).float(), labels)
        return c_skip * x + c_out * out.to(x.dtype), feature.to(x.dtype)

    def _network(self, x: Tensor, noise: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        frequencies = math.pi * 2.0 ** torch.linspace(-3, 3, self.channels // 2)
        angles = noise[:, None] * frequencies
        embedding = self.noise_embedding(torch.cat([angles.sin(), angles.cos()], 1))
        embedding = silu(embedding + self.label_embedding(labels))
        fine = self.down_block(self.first(x), embedding)  # (B, C, 8, 8)
        h = self.down(fine)  # (B, 2C, 4, 4)
        for block in self.middle:
            h = block(h, embedding)
        feature = h.mean(1).flatten(1)  # (B, 16)
        h = self.up(interpolate(h, scale_factor=2))
        h = self.up_block(torch.cat([h, fine], 1), embedding)
        return self.last(silu(self.last_norm(h))), feature


class _Block(nn.Module):
    """Two convolutions around a shift by the embedding, beside a skip."""

    def __init__(self, channels_in: int, channels_out: int, width: int) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(8, channels_in)
        self.conv_in = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.shift = nn.Linear(width, channels_out)
        self.norm_out = nn.GroupNorm(8, channels_out)
        self.conv_out = _zero(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        same = channels_in == channels_out
        self.skip = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv_in(silu(self.norm_in(x))) + self.shift(embedding)[..., None, None]
        return self.skip(x) + self.conv_out(silu(self.norm_out(h)))


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer
