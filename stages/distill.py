"""Stage distill: EPD-Solver's table, learned from the teacher's trajectories."""

from collections.abc import Sequence

import torch
from torch import Tensor

from backends import Backend, Digits, counted_denoiser
from solvers import AFS, EPD, Predictor, Solver, save_predictor, trajectory
from stages.command import command, progress
from stages.files import BACKBONE, DISTILLED, RESULTS, TEACHER, atomic, read_tensors, reading, require, sha256, write_csv
from stages.noise import prompts
from stages.params import Distill
from stages.training import cosine, descend, rng

SEEN = 128
"""Training samples by which the curve follows the training error."""


def distill(*, seed: int, num_steps: int, afs: bool, guidance_scale: float, distill: Distill) -> None:
    """Minimise the squared distance to the teacher's states through the whole sampler; keep the best on validation noise."""
    with reading(BACKBONE):
        backend = Digits.load(BACKBONE / "unet.safetensors")
    with reading(TEACHER):
        stored, description = read_tensors(TEACHER)
        sigmas, train, validation = stored["sigmas"], stored["train"], stored["validation"]
        require(TEACHER, "num_steps", len(sigmas), num_steps)
        require(TEACHER, "guidance_scale", description["guidance_scale"], guidance_scale)
    epd = EPD(num_steps, distill.points, distill.scale_dir, distill.scale_time)
    solver: Solver = AFS(epd) if afs else epd
    nodes = slice(1, None) if distill.loss == "nodes" else slice(-1, None)
    optimizer = torch.optim.Adam(epd.parameters())
    best, lowest, curve, chosen = epd.table(), float("inf"), [], {}
    bar = progress(range(distill.iterations + 1), "distill", "iteration")
    for iteration in bar:
        if iteration > 0:
            rows = rng(seed, "distill", iteration).permutation(len(train))[: distill.batch_size].tolist()
            loss = squared_errors(backend, guidance_scale, solver, sigmas, train[rows], rows)[nodes].mean()
            descend(optimizer, loss, distill.learning_rate * cosine(iteration - 1, distill.iterations))
        if iteration % distill.validate_every == 0 or iteration == distill.iterations:
            with torch.no_grad():
                seen = squared_errors(backend, guidance_scale, solver, sigmas, train[:SEEN], range(len(train[:SEEN])))
                errors = squared_errors(backend, guidance_scale, solver, sigmas, validation, range(len(validation)))
            curve.append(
                {"iteration": iteration, "train_rmse": seen[-1].sqrt().item(), "validation_rmse": errors[-1].sqrt().item()}
            )
            bar.set_postfix(validation_rmse=f"{curve[-1]['validation_rmse']:.4f}")
            if errors[nodes].mean().item() < lowest:
                best, lowest, chosen = epd.table(), errors[nodes].mean().item(), curve[-1]
    provenance = {
        "stage": "distill",
        "parameters": distill.model_dump(),
        "seed": seed,
        "teacher": description,
        "metrics": {**chosen, "n": len(validation)},
    }
    write_csv(RESULTS / "distill.csv", curve)
    backbone = {"name": "digits", "sha256": sha256(BACKBONE / "unet.safetensors")}
    with atomic(DISTILLED) as folder:
        folder.mkdir()
        save_predictor(Predictor(best, sigmas, afs, backbone, guidance_scale, provenance), folder)


def squared_errors(
    backend: Backend, guidance_scale: float, solver: Solver, sigmas: Tensor, targets: Tensor, samples: Sequence[int]
) -> Tensor:
    """Mean squared distance to the targets (B, num_steps, C, H, W) of given samples at each node, (num_steps,)."""
    denoise, _ = counted_denoiser(backend, prompts(samples), guidance_scale)
    states = torch.stack(list(trajectory(denoise, solver, targets[:, 0], sigmas)), 1)
    return (states - targets).square().flatten(2).mean((0, 2))


if __name__ == "__main__":
    command(distill)
