"""The digits: their data, their diffusion model, and the two classifiers, reward and judge, trained."""

from functools import partial
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

from backends.digits import UNCONDITIONAL, Digits, UNet
from metrics.classifier import Classifier
from stages.checkpoint import Checkpoint, adam_state, load_adam_state, under
from stages.command import progress
from stages.files import write_tensors
from stages.frozen import DATA, UNET
from stages.params import Digits as Parameters
from stages.training import cosine, descend, generator, seeded


def trained(seed: int, params: Parameters, folder: Path) -> None:
    """Split the digits, train the diffusion model and two classifiers on disjoint halves of the training split; write all."""
    data = split_digits(seed, params.held_out)
    images, labels = data["train_images"], data["train_labels"]
    checkpoint = Checkpoint("backbone", {"seed": seed, "backbone": params}, [])
    network = train_network(seed, params, images, labels, checkpoint)
    half = len(images) // 2
    reward = train_classifier(seed, "reward", params, images[:half], labels[:half])
    judge = train_classifier(seed, "judge", params, images[half:], labels[half:])
    Digits(network).save(folder / UNET)
    reward.save(folder / "reward.safetensors")
    judge.save(folder / "judge.safetensors")
    write_tensors(folder / DATA, data)


def split_digits(seed: int, held_out: int) -> dict[str, Tensor]:
    """scikit-learn's digits as images (n, 1, 8, 8) in [0, 1] and labels (n,), split at random."""
    pixels, targets = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels).float().view(-1, 1, 8, 8) / 16, torch.tensor(targets)
    order = torch.randperm(len(images), generator=generator(seed, "split"))
    train, rest = order[held_out:], order[:held_out]
    return {
        "train_images": images[train],
        "train_labels": labels[train],
        "held_out_images": images[rest],
        "held_out_labels": labels[rest],
    }


def train_network(seed: int, params: Parameters, images: Tensor, labels: Tensor, checkpoint: Checkpoint) -> UNet:
    """EDM's denoising loss (Karras et al. 2022, table 1); returns the moving average. Goes on from its checkpoint."""
    data = Digits.encode(images)
    build = partial(UNet, params.channels, data.std().item())
    network, average = seeded(seed, "backbone", build), seeded(seed, "backbone", build)
    optimizer = torch.optim.Adam(network.parameters(), lr=params.learning_rate)
    start = 0
    if (saved := checkpoint.load()) is not None:
        tensors, values = saved
        start = values["iteration"]
        network.load_state_dict(under("network", tensors))
        average.load_state_dict(under("average", tensors))
        load_adam_state(optimizer, under("adam", tensors))
    bar = progress(range(start, params.iterations), "backbone", "iteration", start)
    for iteration in bar:
        rng = generator(seed, "backbone", iteration)
        rows = torch.randint(len(data), (params.batch_size,), generator=rng)
        x0, batch_labels = data[rows], labels[rows].clone()
        dropped = torch.rand(len(rows), generator=rng) < params.label_dropout
        batch_labels[dropped] = UNCONDITIONAL
        sigma = (1.2 * torch.randn(len(rows), generator=rng) - 1.2).exp()
        x = x0 + sigma.view(-1, 1, 1, 1) * torch.randn(x0.shape, generator=rng)
        weight = (sigma**2 + network.sigma_data**2) / (sigma * network.sigma_data) ** 2
        loss = (weight.view(-1, 1, 1, 1) * (network(x, sigma, batch_labels) - x0).square()).mean()
        descend(optimizer, loss, cosine(iteration, params.iterations))
        decay = min(params.ema_decay, (iteration + 1) / (iteration + 10))  # short at first: the start is soon forgotten
        with torch.no_grad():
            for a, p in zip(average.parameters(), network.parameters(), strict=True):
                a.lerp_(p, 1 - decay)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if (iteration + 1) % params.checkpoint_every == 0:
            parts = {"network": network.state_dict(), "average": average.state_dict(), "adam": adam_state(optimizer)}
            checkpoint.save(parts, {"iteration": iteration + 1})
    return average


def train_classifier(seed: int, name: str, params: Parameters, images: Tensor, labels: Tensor) -> Classifier:
    """Cross-entropy on slightly moved, noisy digits."""
    classifier = seeded(seed, name, Classifier)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=params.learning_rate)
    for iteration in progress(range(params.classifier_iterations), name, "iteration"):
        rng = generator(seed, name, iteration)
        rows = torch.randint(len(images), (64,), generator=rng)
        x = moved(images[rows], rng)
        loss = cross_entropy(classifier(x), labels[rows], label_smoothing=params.label_smoothing)
        descend(optimizer, loss, cosine(iteration, params.classifier_iterations))
    return classifier.eval()


def moved(images: Tensor, rng: torch.Generator) -> Tensor:
    """Images (B, 1, 8, 8) shifted by up to 0.6 pixels, stretched and sheared by up to 15 %, with noise of up to 0.1."""
    affine = torch.eye(2, 3).repeat(len(images), 1, 1)
    affine += 0.15 * (2 * torch.rand(affine.shape, generator=rng) - 1)
    grid = affine_grid(affine, list(images.shape), align_corners=False)
    level = 0.1 * torch.rand(len(images), 1, 1, 1, generator=rng)
    return grid_sample(images, grid, align_corners=False) + level * torch.randn(images.shape, generator=rng)
