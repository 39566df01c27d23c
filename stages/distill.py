"""Stage distill: EPD-Solver's table, learned from the teacher's trajectories."""

from collections.abc import Sequence

import torch
from torch import Tensor

from backends import Backend, Digits, counted_denoiser
from solvers import AFS, EPD, Predictor, Solver, save_predictor, trajectory
from stages.command import command, progress
from stages.files import BACKBONE, DISTILLED, RESULTS, TEACHER, atomic, read_tensors, reading, sha256, write_csv
from stages.noise import prompts
from stages.params import Distill
from stages.training import cosine, descend, rng


def distill(*, seed: int, num_steps: int, afs: bool, guidance_scale: float, distill: Distill) -> None:
    """Minimise the squared distance to the teacher's states through the whole sampler; keep the best on validation noise."""
    with reading(BACKBONE):
        backend = Digits.load(BACKBONE / "unet.safetensors")
    with reading(TEACHER):
        stored, _ = read_tensors(TEACHER)
        sigmas, train, validation = stored["sigmas"], stored["train"], stored["validation"]
    epd = EPD(num_steps, distill.points, distill.scale_dir, distill.scale_time)
    solver: Solver = AFS(epd) if afs else epd
    nodes = slice(1, None) if distill.loss == "nodes" else slice(-1, None)
    optimizer = torch.optim.Adam(epd.parameters())
    best, lowest, curve = epd.table(), float("inf"), []
    bar = progress(range(1, distill.iterations + 1), "distill", "iteration")
    for iteration in bar:
        rows = rng(seed, "distill", iteration).permutation(len(train))[: distill.batch_size].tolist()
        loss = squared_errors(backend, guidance_scale, solver, sigmas, train[rows], rows)[nodes].mean()
        descend(optimizer, loss, distill.learning_rate * cosine(iteration - 1, distill.iterations))
        if iteration % distill.validate_every == 0 or iteration == distill.iterations:
            with torch.no_grad():
                errors = squared_errors(backend, guidance_scale, solver, sigmas, validation, range(len(validation)))
                error = errors[nodes].mean().sqrt().item()
                if error < lowest:
                    best, lowest = epd.table(), error
            curve.append({"iteration": iteration, "train_rmse": loss.sqrt().item(), "validation_rmse": error})
            bar.set_postfix(validation_rmse=f"{error:.4f}")
    provenance = {
        "stage": "distill",
        "parameters": distill.model_dump(),
        "seed": seed,
        "teacher_sha256": sha256(TEACHER),
        "metrics": {"validation_rmse": lowest, "n": len(validation)},
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
