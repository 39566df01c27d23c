"""Stage distill: a few-step solver of any learned family, from the teacher's trajectories."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from backends import Backend
from metrics.classifier import Classifier
from solvers import (
    AFS,
    AMED,
    EPD,
    SOLVERS,
    Checkpointed,
    Metric,
    Multistep,
    Predictor,
    Solver,
    fit_d_ode,
    save_predictor,
    trajectory,
)
from solvers.families import Table
from stages import params
from stages.checkpoint import Checkpoint, adam_state, load_adam_state, under
from stages.command import command, progress
from stages.files import BACKBONE, DISTILLED, RESULTS, TEACHER, atomic, read_tensors, reading, require, write_csv
from stages.frozen import RECORD, Frozen, load_frozen
from stages.noise import batches
from stages.params import Compute, Distill, Learning
from stages.training import cosine, descend, rng, seeded

SEEN = 128
"""Training samples by which the curve follows the training error."""
WARMUP = 20
"""Iterations over which the learning rate rises."""

Student = EPD | AMED | Multistep
Error = Callable[[Tensor, Tensor], Tensor]
"""The student's and the teacher's states at all nodes, (B, num_steps, ...) -> error (B,). Where the student learns its grid,
only the first and the last nodes are the same noise levels."""


def distill(*, seed: int, num_steps: int, afs: bool, guidance_scale: float, compute: Compute, distill: Distill) -> None:
    """Bring the student's end points, or all its nodes, close to the teacher's; keep the best on validation noise."""
    with reading(TEACHER):
        stored, description = read_tensors(TEACHER)
        sigmas, train, validation = stored["sigmas"], stored["train"], stored["validation"]
        require(TEACHER, "num_steps", len(sigmas), num_steps)
        require(TEACHER, "guidance_scale", description["guidance_scale"], guidance_scale)
    splits = {"train": train, "validation": validation}
    frozen = load_frozen(guidance_scale, compute, {split: range(len(states)) for split, states in splits.items()})
    sampling = Sampling(frozen, guidance_scale, afs, sigmas)
    checkpoint = None
    if isinstance(distill, params.DODE):
        learned = closed_form(sampling, train, validation, distill.batch_size)
    else:
        sampling.checkpoint_calls = distill.checkpoint_calls
        student = seeded(seed, "student", lambda: new_student(distill, sigmas, frozen.backend.spec.features))
        checkpoint = Checkpoint("distill", {"seed": seed, "afs": afs, "distill": distill}, [RECORD, TEACHER])
        error = error_of(distill.loss, frozen.backend)
        learned = learn(student, sampling, train, validation, distill, error, seed, checkpoint)
    provenance = {
        "stage": "distill",
        "parameters": distill.model_dump(),
        "seed": seed,
        "teacher": description,
        "chosen": learned.chosen,
    }
    write_csv(RESULTS / "distill.csv", learned.curve)
    metrics = (measured(learned, sampling, validation, distill.batch_size),)
    predictor = Predictor(learned.table, learned.sigmas, afs, frozen.identity, guidance_scale, provenance, metrics)
    with atomic(DISTILLED) as folder:
        folder.mkdir()
        save_predictor(predictor, folder, DISTILLED.name)
    if checkpoint is not None:
        checkpoint.remove()


@dataclass
class Sampling:
    """How a student is run: the frozen model, its guidance, whether the first step is analytic, and the teacher's nodes.

    States come from the CPU and go back to it. With `checkpoint_calls` the gradient takes the memory of one network call, and
    the time of one forward pass more.
    """

    frozen: Frozen
    guidance_scale: float
    afs: bool
    sigmas: Tensor
    checkpoint_calls: bool = False

    def states(self, table: Solver, sigmas: Tensor, start: Tensor, samples: Sequence[int], split: str = "train") -> Tensor:
        """States (B, num_steps, ...) at each node of the given samples, from those at sigmas[0], (B, ...)."""
        denoise, _ = self.frozen.denoiser(split, samples, self.guidance_scale)
        if self.checkpoint_calls:
            denoise = Checkpointed(denoise)
        solver, x = AFS(table) if self.afs else table, self.frozen.backend.spec.state(start)
        return torch.stack([state.to(start) for state in trajectory(denoise, solver, x, sigmas)], 1)

    @torch.no_grad()
    def first_states(self, table: Solver, sigmas: Tensor, starts: Tensor, split: str, batch_size: int) -> Tensor:
        """The same of the first samples of a split, (n, num_steps, ...), so many at a time."""
        parts = batches(len(starts), batch_size)
        return torch.cat([self.states(table, sigmas, starts[part.start : part.stop], part, split) for part in parts])


@dataclass
class Learned:
    """What a family's training ends with: the table and grid of the lowest validation error, and how it came there."""

    table: Table
    sigmas: Tensor
    chosen: dict[str, float]
    curve: list[dict[str, float]]


def new_student(distill: Learning, sigmas: Tensor, features: int) -> Student:
    """A family's parameters, at their start; `features` is the size of the backbone's feature."""
    match distill:
        case params.EPD():
            return EPD(len(sigmas), distill.points, distill.scale_dir, distill.scale_time)
        case params.EPDPlugin():
            return EPD(len(sigmas), distill.points, distill.scale_dir, distill.scale_time, distill.max_order)
        case params.AMED():
            return AMED(len(sigmas), features, distill.scale_dir, distill.scale_time)
        case params.S4S() | params.S4SAlt():
            return Multistep(SOLVERS[distill.start], sigmas, 1, distill.history, distill.scale_time)
        case params.ParallelMultistep():
            return Multistep(SOLVERS[distill.start], sigmas, distill.points, distill.history, distill.scale_time)
        case _:
            raise TypeError(f"distill: {distill!r}; valid: a family that learns by gradient descent")


def learn(
    student: Student,
    sampling: Sampling,
    train: Tensor,
    validation: Tensor,
    settings: Learning,
    error: Error,
    seed: int,
    checkpoint: Checkpoint | None = None,
) -> Learned:
    """Gradient descent through the whole sampler; what is kept is the moving average (EMA) that is best on validation noise.

    Args:
        student: its parameters are changed.
        sampling: how it is run.
        train, validation: the teacher's states at its nodes, (n, num_steps, ...), from the split's first noise on.
        settings: of the family.
        error: what is minimised; any differentiable distance of states, LPIPS for one.
        seed: of the batches.
        checkpoint: where the work goes on from, and is saved at each validation.

    Raises:
        FloatingPointError: the network, the loss or its gradient is not finite, with the iteration and the step.
    """
    optimizer = torch.optim.Adam(parameter_groups(student, settings))
    relaxed = Relaxed(train[:, 0], settings.radius if isinstance(settings, params.S4S | params.S4SAlt) else 0.0)
    average, best = copy.deepcopy(student), copy.deepcopy(student)
    lowest, curve, chosen = float("inf"), list[dict[str, float]](), dict[str, float]()
    if checkpoint is not None and (saved := checkpoint.load()) is not None:
        tensors, values = saved
        for name, module in (("student", student), ("average", average), ("best", best)):
            module.load_state_dict(under(name, tensors))
        load_adam_state(optimizer, under("adam", tensors))
        relaxed.moved = tensors["relaxed.moved"]
        lowest, curve, chosen = values["lowest"], values["curve"], values["chosen"]
    done = int(curve[-1]["iteration"]) + 1 if curve else 0
    bar = progress(range(done, settings.iterations + 1), "distill", "iteration", done)
    for iteration in bar:
        with naming(iteration):
            if iteration > 0:
                rows = rng(seed, "distill", iteration).permutation(len(train))[: settings.batch_size].tolist()

                def errors(start: Tensor, rows: list[int] = rows) -> Tensor:
                    return error(sampling.states(student.table(), grid_of(student, sampling), start, rows), train[rows])

                start = relaxed.start(rows)
                share = cosine(iteration - 1, settings.iterations) * min(1.0, iteration / WARMUP)
                # of the logarithm: steps do not depend on the error's unit, and do not fade as it falls
                descend(optimizer, errors(start).mean().log(), share, frozen(student, settings, iteration - 1))
                relaxed.move(rows, start, errors)
                follow(average, student, min(settings.ema_decay, iteration / (iteration + 9)))  # short memory at first
            if iteration % settings.validate_every == 0 or iteration == settings.iterations:
                table, sigmas = kept(average, sampling)
                current, point = validated(table, sigmas, sampling, train, validation, error, settings.batch_size)
                curve.append({"iteration": iteration, **point})
                bar.set_postfix(validation_rmse=f"{point['validation_rmse']:.4f}")
                if current < lowest:
                    lowest, chosen = current, curve[-1]
                    best.load_state_dict(average.state_dict())
                if checkpoint is not None and iteration > 0:
                    modules = {"student": student, "average": average, "best": best}
                    parts = {name: module.state_dict() for name, module in modules.items()}
                    parts |= {"adam": adam_state(optimizer), "relaxed": {"moved": relaxed.moved}}
                    checkpoint.save(parts, {"lowest": lowest, "curve": curve, "chosen": chosen})
    return Learned(*kept(best, sampling), chosen, curve)


def kept(student: Student, sampling: Sampling) -> tuple[Table, Tensor]:
    """A student's table and grid as plain numbers."""
    fixed = copy.deepcopy(student).requires_grad_(False)
    return fixed.table(), grid_of(fixed, sampling)


@contextmanager
def naming(iteration: int) -> Iterator[None]:
    """Say in which iteration a number was not finite."""
    try:
        yield
    except FloatingPointError as failure:
        raise FloatingPointError(f"iteration {iteration}: {failure}") from failure


@torch.no_grad()
def follow(average: nn.Module, student: nn.Module, decay: float) -> None:
    """Move the moving average towards the student."""
    for a, p in zip(average.parameters(), student.parameters(), strict=True):
        a.lerp_(p, 1 - decay)


@torch.no_grad()
def validated(
    table: Table, sigmas: Tensor, sampling: Sampling, train: Tensor, validation: Tensor, error: Error, batch_size: int
) -> tuple[float, dict[str, float]]:
    """The mean error on validation noise, and a point of the curve."""
    seen = sampling.first_states(table, sigmas, train[:SEEN, 0], "train", batch_size)
    found = sampling.first_states(table, sigmas, validation[:, 0], "validation", batch_size)
    point = {"train_rmse": rmse(seen, train[:SEEN]), "validation_rmse": rmse(found, validation)}
    current = error(found, validation).mean().item()
    if not math.isfinite(current):
        raise FloatingPointError(f"validation error: {current}; valid: a finite number")
    return current, point


@torch.no_grad()
def measured(learned: Learned, sampling: Sampling, validation: Tensor, batch_size: int) -> Metric:
    """The RMSE of the end points to the teacher's on validation noise; its interval by the delta method."""
    found = sampling.first_states(learned.table, learned.sigmas, validation[:, 0], "validation", batch_size)[:, -1]
    each = (found - validation[:, -1]).square().flatten(1).mean(1)
    error = each.mean().sqrt().item()
    interval = 1.96 * each.std().item() / len(each) ** 0.5 / (2 * error)
    return Metric("RMSE to the teacher", error, interval, len(each), "validation noise")


def closed_form(sampling: Sampling, train: Tensor, validation: Tensor, batch_size: int) -> Learned:
    """D-ODE's numbers, by least squares over the training trajectories."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:  # of all of them, so many at a time
        spec, parts = sampling.frozen.backend.spec, list[Tensor]()
        for batch in batches(len(x), batch_size):
            one, _ = sampling.frozen.denoiser("train", batch, sampling.guidance_scale)
            rows = slice(batch.start, batch.stop)
            parts.append(one(spec.state(x[rows]), spec.state(sigma[rows])).to(x))
        return torch.cat(parts)

    table = fit_d_ode(denoise, train, sampling.sigmas, sampling.afs)
    _, found = validated(table, sampling.sigmas, sampling, train, validation, end_error, batch_size)
    point = {"iteration": 0, **found}
    return Learned(table, sampling.sigmas, point, [point])


class Relaxed:
    """Starts x' in a ball around the teacher's x: the student must come to the end point from one of them (S4S' objective).

    A start moves against its gradient by a quarter of the radius, back onto the ball where it has left it, if that brings its
    end nearer (Frankel et al. 2025; the rule for each sample is LD3's). What is chosen and reported starts from x itself.

    Args:
        noise: x at sigmas[0], (n, ...).
        radius: of the ball, as a share of the norm of x; 0: x' = x.
    """

    def __init__(self, noise: Tensor, radius: float) -> None:
        self.noise = noise
        self.moved = noise.clone()
        self.radius = radius

    def start(self, rows: list[int]) -> Tensor:
        """The starts of given rows, (B, ...), with gradient where they may move."""
        return self.moved[rows].requires_grad_(self.radius > 0)

    @torch.no_grad()
    def move(self, rows: list[int], start: Tensor, errors: Callable[[Tensor], Tensor]) -> None:
        """Move those starts, (B, ...) with their gradient, whose error (B,) falls by it."""
        if start.grad is None:
            return
        noise = self.noise[rows]
        radius = self.radius * norm(noise)
        there = start - radius / 4 * start.grad / norm(start.grad).clamp_min(1e-30)
        offset = there - noise
        there = noise + offset * (radius / norm(offset).clamp_min(1e-30)).clamp_max(1)
        better = errors(there) < errors(start)
        self.moved[rows] = torch.where(better.view(-1, *[1] * (noise.ndim - 1)), there, start.detach())


def parameter_groups(student: Student, settings: Learning) -> list[dict[str, Any]]:
    """What is learned, each at its rate: the grid, where the family has one of its own, and all else."""
    named = dict(student.named_parameters())
    grid = [named.pop("grid")] if "grid" in named else []
    groups = [{"params": list(named.values()), "lr": settings.learning_rate}]
    if isinstance(settings, params.S4SAlt | params.ParallelMultistep):
        groups.append({"params": grid, "lr": settings.grid_learning_rate})
    return groups


def frozen(student: Student, settings: Learning, iteration: int) -> list[nn.Parameter]:
    """What S4S-Alt leaves alone in an iteration: in turn the coefficients, and the grid with the network's times."""
    if not (isinstance(settings, params.S4SAlt) and isinstance(student, Multistep)):
        return []
    grid_turn = iteration * 2 * settings.rounds // settings.iterations % 2 == 0
    return [student.update] if grid_turn else [student.grid, student.time_scale]


def grid_of(student: Student, sampling: Sampling) -> Tensor:
    """The student's own grid, or the teacher's nodes."""
    return student.sigmas() if isinstance(student, Multistep) else sampling.sigmas


def error_of(loss: str, backend: Backend) -> Error:
    """The loss of that name; of features (which digits alone have) in those of the reward's classifier."""
    if loss == "features":
        with reading(BACKBONE):
            # not the judge's: that one is never learned from
            extractor = Classifier.load(BACKBONE / "reward.safetensors").features
        return feature_error(backend, extractor)
    return {"end": end_error, "nodes": nodes_error}[loss]


def feature_error(backend: Backend, extractor: Callable[[Tensor], Tensor]) -> Error:
    """Mean squared difference of the last images' features; `extractor` maps images (B, C, H, W) in [0, 1] to (B, F)."""

    def features(states: Tensor, targets: Tensor) -> Tensor:
        found, wanted = (extractor(backend.decode(x[:, -1]).float()) for x in (states, targets))
        return (found - wanted).square().mean(1)

    return features


def end_error(states: Tensor, targets: Tensor) -> Tensor:
    """Mean squared difference at the last node, (B,)."""
    return (states[:, -1] - targets[:, -1]).square().flatten(1).mean(1)


def nodes_error(states: Tensor, targets: Tensor) -> Tensor:
    """Mean squared difference at all nodes but the first, (B,)."""
    return (states - targets)[:, 1:].square().flatten(1).mean(1)


def rmse(states: Tensor, targets: Tensor) -> float:
    """Root mean squared difference at the end."""
    return (states[:, -1] - targets[:, -1]).square().mean().sqrt().item()


def norm(x: Tensor) -> Tensor:
    """The norm of each image of (B, ...), to be multiplied with it."""
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))


if __name__ == "__main__":
    command(distill)
