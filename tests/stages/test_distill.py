"""Every family learns from the teacher's trajectories: on a mixture, whose denoiser is exact."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pydantic import TypeAdapter
from torch import Tensor, nn

from backends import Gaussian
from solvers import (
    AMED,
    SOLVERS,
    Denoiser,
    EPDTable,
    Multistep,
    MultistepTable,
    load_predictor,
    time_uniform,
    trajectory,
)
from stages import params
from stages.distill import Relaxed, Sampling, closed_form, end_error, error_of, feature_error, frozen, learn, new_student, norm
from stages.files import InputError

from .conftest import ROOT, Workspace, frozen_of, run, small

ALL = sorted(file.stem for file in (ROOT / "conf/family").glob("*.yaml"))
SMALL = {"iterations": 24, "batch_size": 16, "validate_every": 6}


def composed(family: str) -> dict[str, Any]:
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return OmegaConf.to_container(compose("config", [f"family={family}"]), resolve=True)  # type: ignore[return-value]


def settings(family: str, **changes: Any) -> Any:
    distill = composed(family)["distill"]
    distill |= {key: value for key, value in (SMALL | changes).items() if key in distill}
    return TypeAdapter(params.Distill).validate_python(distill)


class Featured(Gaussian):
    """A mixture that gives its state as a feature, as U-Nets give their bottleneck's."""

    def denoiser(self, prompts: Any) -> Any:
        return Denoise(super().denoiser(prompts))


class Denoise:
    def __init__(self, denoise: Denoiser) -> None:
        self.denoise = denoise

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.denoise(x, sigma)

    def with_feature(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return self(x, sigma), (x / (1 + sigma.view(-1, 1, 1, 1))).flatten(1)


@pytest.fixture
def backend(mixture: Gaussian) -> Gaussian:
    featured = Featured(mixture.means, mixture.stds, mixture.weights)
    featured.spec = replace(featured.spec, features=4)
    return featured


def trajectories(backend: Gaussian, num_steps: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    fine = time_uniform(8 * (num_steps - 1) + 1, 0.002, 80.0, rho=2.0)
    noise = torch.randn(count, 1, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    states = list(trajectory(backend.denoiser([""]), SOLVERS["heun"], 80 * noise, fine))
    return fine[::8].clone(), torch.stack(states[::8], 1)


def sampling_of(backend: Gaussian, sigmas: Tensor) -> Sampling:
    return Sampling(frozen_of(backend), 1.0, True, sigmas)


def trained(backend: Gaussian, family: str, **changes: Any) -> Any:
    chosen = settings(family, **changes)
    num_steps = composed(family)["num_steps"]
    sigmas, train = trajectories(backend, num_steps, 64, seed=0)
    _, validation = trajectories(backend, num_steps, 64, seed=1)
    sampling = sampling_of(backend, sigmas)
    if isinstance(chosen, params.DODE):
        return closed_form(sampling, train, validation, chosen.batch_size), sampling, validation
    sampling.checkpoint_calls = chosen.checkpoint_calls
    torch.manual_seed(0)
    student = new_student(chosen, sigmas, 4)
    error = (
        feature_error(backend, lambda images: images.flatten(1))
        if chosen.loss == "features"
        else error_of(chosen.loss, backend)
    )
    return learn(student, sampling, train, validation, chosen, error, seed=0), sampling, validation


@pytest.mark.parametrize("family", ALL)
def test_every_family_learns(family: str, backend: Gaussian) -> None:
    """What is kept is the best on validation noise, better than the start, and gives the error that the curve has."""
    learned, sampling, validation = trained(backend, family)
    errors = [point["validation_rmse"] for point in learned.curve]
    assert learned.chosen["validation_rmse"] == min(errors)
    with torch.no_grad():
        found = sampling.states(learned.table, learned.sigmas, validation[:, 0], range(len(validation)))
        assert (found[:, -1] - validation[:, -1]).square().mean().sqrt().item() == pytest.approx(min(errors), rel=1e-9)
        if family == "d_ode":
            euler = sampling.states(SOLVERS["euler"], sampling.sigmas, validation[:, 0], range(len(validation)))
            assert min(errors) < (euler[:, -1] - validation[:, -1]).square().mean().sqrt()
        else:
            assert min(errors) < 0.95 * errors[0]


@pytest.mark.parametrize("loss", ["nodes", "features"])
def test_every_loss_learns(loss: str, backend: Gaussian) -> None:
    learned, *_ = trained(backend, "epd", loss=loss)
    assert learned.chosen["validation_rmse"] < learned.curve[0]["validation_rmse"]


def test_any_callable_can_be_the_loss(backend: Gaussian) -> None:
    """A perceptual distance, say: here of blurred pictures."""
    chosen = settings("parallel_multistep")
    sigmas, train = trajectories(backend, 7, 32, seed=0)
    calls = []

    def blurred(states: Tensor, targets: Tensor) -> Tensor:
        calls.append(len(states))
        return (states - targets)[:, -1].mean((1, 2, 3)).square()

    learned = learn(new_student(chosen, sigmas, 4), sampling_of(backend, sigmas), train, train, chosen, blurred, 0)
    assert calls
    assert learned.chosen["iteration"] > 0


def test_checkpointing_learns_the_same(backend: Gaussian) -> None:
    plain, again = (trained(backend, "parallel_multistep", checkpoint_calls=kept)[0] for kept in (False, True))
    assert torch.equal(plain.table.update, again.table.update)
    assert torch.equal(plain.sigmas, again.sigmas)


def test_the_moving_average_is_what_is_kept(backend: Gaussian) -> None:
    """With decay 0 it is the student itself; with a long memory it stays nearer to the start."""
    start = new_student(settings("s4s"), trajectories(backend, 7, 2, 0)[0], 4)
    assert isinstance(start, Multistep)
    moved = []
    for decay in (0.0, 0.9):
        learned, *_ = trained(backend, "s4s", ema_decay=decay, iterations=24, validate_every=24)
        moved.append((learned.table.update - start.table().update).norm().item())
    assert 0 < moved[1] < moved[0]


def test_s4s_keeps_the_grid_and_s4s_alt_learns_it(backend: Gaussian) -> None:
    fixed, sampling, _ = trained(backend, "s4s")
    assert torch.allclose(fixed.sigmas, sampling.sigmas, rtol=1e-12)
    alternating, *_ = trained(backend, "s4s_alt")
    assert not torch.allclose(alternating.sigmas, sampling.sigmas, rtol=1e-3)
    assert torch.allclose(alternating.sigmas[[0, -1]], sampling.sigmas[[0, -1]], rtol=1e-12)


def test_s4s_alt_takes_turns(backend: Gaussian) -> None:
    chosen = settings("s4s_alt", iterations=12, rounds=3)
    student = new_student(chosen, time_uniform(7, 0.002, 80.0), 4)
    assert isinstance(student, Multistep)
    turns = [frozen(student, chosen, iteration)[0] is student.update for iteration in range(12)]
    assert turns == [True, True, False, False] * 3
    # one iteration of one round: the grid's turn alone
    one = chosen.model_copy(update={"iterations": 2, "rounds": 1, "learning_rate": 1.0, "ema_decay": 0.0})
    sigmas, train = trajectories(backend, 7, 16, seed=0)
    learning = new_student(one, sigmas, 4)
    assert isinstance(learning, Multistep)
    start = {name: value.clone() for name, value in learning.state_dict().items()}

    def broken_after_one(states: Tensor, targets: Tensor) -> Tensor:
        moved = not torch.equal(learning.grid, start["grid"])
        return end_error(states, targets) * (torch.nan if moved and states.requires_grad else 1.0)

    with pytest.raises(FloatingPointError, match="iteration 2: loss"):
        learn(learning, sampling_of(backend, sigmas), train, train, one, broken_after_one, 0)
    assert not torch.equal(learning.grid, start["grid"])
    assert torch.equal(learning.update, start["update"])


def test_a_relaxed_start_moves_within_its_ball_and_only_for_the_better() -> None:
    noise = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    relaxed = Relaxed(noise, radius=0.01)
    target = 3 * torch.ones_like(noise)

    def errors(x: Tensor, rows: list[int]) -> Tensor:
        return (x - target[rows]).square().flatten(1).mean(1)

    for _ in range(12):
        rows = [4, 1, 2]
        start = relaxed.start(rows)
        errors(start, rows).sum().backward()
        relaxed.move(rows, start, lambda x, rows=rows: errors(x, rows))
    moved = relaxed.moved - noise
    assert bool((moved[[0, 3, 5]] == 0).all())
    shares = (norm(moved) / norm(noise)).flatten()[[1, 2, 4]]
    assert torch.allclose(shares, torch.full((3,), 0.01).double(), rtol=1e-6)  # the target lies outside: they end on the sphere
    start = relaxed.start([1])
    errors(start, [1]).sum().backward()
    relaxed.move([1], start, lambda x: -errors(x, [1]))  # against the gradient is for the worse now
    assert torch.equal(relaxed.moved[1], start.detach()[0])
    assert not Relaxed(noise, radius=0.0).start([1]).requires_grad


def test_nan_stops_with_the_iteration_and_the_step(backend: Gaussian, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network breaks down late in training, at small noise levels."""
    chosen = settings("parallel_multistep")
    sigmas, train = trajectories(backend, 7, 32, seed=0)
    calls = 0
    denoise = backend.denoiser([""])

    def breaking(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return denoise(x, sigma) * (torch.nan if calls > 40 and sigma[0] < 1 else 1.0)

    monkeypatch.setattr(backend, "denoiser", lambda prompts: breaking)
    with pytest.raises(FloatingPointError, match=r"iteration \d+: step \d of 6: denoise: returned numbers that are not finite"):
        learn(new_student(chosen, sigmas, 4), sampling_of(backend, sigmas), train, train, chosen, end_error, 0)


def test_a_gradient_that_is_not_finite_stops_too(backend: Gaussian) -> None:
    def kinked(states: Tensor, targets: Tensor) -> Tensor:
        return 1 + (states[:, -1] * 0).flatten(1).sum(1).sqrt()  # the slope of a root at 0

    sigmas, train = trajectories(backend, 7, 8, seed=0)
    chosen = settings("parallel_multistep", batch_size=4)
    with pytest.raises(FloatingPointError, match="iteration 1: norm of the loss's gradient: nan; valid: a finite number"):
        learn(new_student(chosen, sigmas, 4), sampling_of(backend, sigmas), train, train, chosen, kinked, 0)


@pytest.mark.parametrize("family", [name for name in ALL if name != "epd"])
def test_the_stages_run_with_every_family(family: str, finished: Path, workspace: Workspace) -> None:
    """teacher, distill, rdpo and sample, from params.yaml; the classical samplers follow to the same evaluations."""
    changed, mine = small(), composed(family)
    changed |= {"num_steps": mine["num_steps"], "schedule": mine["schedule"], "distill": mine["distill"]}
    changed["distill"] |= {key: value for key, value in SMALL.items() if key in changed["distill"]}
    folder = workspace(changed)
    for name in ("models/backbone", "models/metrics.json", "data/refs.npz"):
        copy = shutil.copytree if (finished / name).is_dir() else shutil.copy
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        copy(finished / name, folder / name)
    run("teacher", [])
    run("distill", [])
    predictor = load_predictor(folder / "models/distilled")
    kind = {"epd_plugin": EPDTable, "amed": AMED}.get(family, MultistepTable)
    assert isinstance(predictor.table, kind)
    assert predictor.provenance["parameters"]["family"] == family
    if family == "amed":
        assert isinstance(predictor.table, nn.Module)
        with pytest.raises(InputError, match="family amed; valid: another distill"):
            run("rdpo", [])
    else:
        run("rdpo", [])
        tuned = load_predictor(folder / "models/rdpo")
        assert type(tuned.table) is type(predictor.table)
        assert torch.equal(tuned.sigmas, predictor.sigmas)
    for name in ("distilled", "heun", "euler"):
        run("sample", [name])
        from stages.files import read_tensors

        assert read_tensors(folder / f"data/samples/{name}.safetensors")[1]["serial_evaluations"] == 5
