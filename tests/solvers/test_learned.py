"""What every learned family has to do."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from backends import Gaussian
from solvers import (
    AFS,
    AMED,
    EPD,
    SOLVERS,
    Checkpointed,
    Counter,
    Denoiser,
    Guided,
    Multistep,
    integrate,
    polynomial,
)  # fmt: skip

from .conftest import SIGMAS, WithFeature, disturbed, epd_table


def test_no_learned_table_evaluates_at_0(mixture: Gaussian, start: Tensor) -> None:
    sigmas = torch.cat([polynomial(4, 0.01, 20.0), torch.zeros(1).double()])
    for solver in (EPD(5, 2, 0.05, 0.05).table(), AMED(5, 3, 0.05, 0.05)):
        with pytest.raises(ValueError, match=r"sigmas: .* at 0.0 .* to 0.0; valid: positive noise levels"):
            integrate(WithFeature(mixture), solver, 20 * start, sigmas)


@pytest.mark.parametrize("family", ["epd", "multistep", "amed"])
def test_learned_families_keep_float32(family: str, mixture: Gaussian, start: Tensor) -> None:
    class Single(WithFeature):
        def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
            assert x.dtype == sigma.dtype == torch.float32
            return self.denoise(x.double(), sigma.double()).float()

    torch.manual_seed(0)
    solver = {
        "epd": epd_table(2, 7),
        "multistep": Multistep(SOLVERS["ipndm_2"], SIGMAS, 2, 2, 0.2),
        "amed": AMED(7, 3, 0.1, 0.1),
    }[family]
    with torch.no_grad():
        found = integrate(Single(mixture), solver, 80 * start.float(), SIGMAS)
        expected = integrate(WithFeature(mixture), solver, 80 * start, SIGMAS)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, rtol=1e-3, atol=1e-3)


def test_guidance_doubles_the_rows_of_every_family(mixture: Gaussian, start: Tensor) -> None:
    for solver, grid in ((epd_table(2, 7), SIGMAS), (Multistep(SOLVERS["ipndm_2"], SIGMAS, 3, 2, 0.0).table(), SIGMAS)):
        plain, counter = Counter(mixture.denoiser([])), Counter(mixture.denoiser([]))
        integrate(plain, AFS(solver), 80 * start, grid)
        integrate(Guided(counter, 2.0, len(start)), AFS(solver), 80 * start, grid)
        assert (counter.depth, counter.rows) == (plain.depth, 2 * plain.rows)


@pytest.mark.parametrize("family", ["multistep", "amed"])
def test_checkpointed_calls_give_the_same_gradient_from_less_memory(family: str, mixture: Gaussian, start: Tensor) -> None:
    torch.manual_seed(0)
    student = AMED(7, 3, 0.1, 0.1) if family == "amed" else Multistep(SOLVERS["ipndm_2"], SIGMAS, 2, 2, 0.2)
    grid: Callable[[], Tensor] = student.sigmas if isinstance(student, Multistep) else lambda: SIGMAS

    def gradient(denoise: Denoiser) -> tuple[tuple[Tensor | None, ...], int]:
        """Of all parameters, and the numbers kept for it."""
        stored: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            stored.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = integrate(denoise, student.table(), 80 * start, grid()).square().mean()
        return torch.autograd.grad(loss, list(student.parameters()), allow_unused=True), sum(stored)

    gradients, kept = zip(
        *(gradient(denoise) for denoise in (WithFeature(mixture), Checkpointed(WithFeature(mixture)))), strict=True
    )
    assert any(plain is not None for plain in gradients[0])
    assert all(
        a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in zip(*gradients, strict=True)
    )
    assert kept[1] < 0.9 * kept[0]


def test_a_student_that_does_nothing_to_the_time_shows_the_network_the_nodes() -> None:
    student = disturbed(Multistep(SOLVERS["ipndm_2"], SIGMAS, 2, 2, scale_time=0.0))
    assert bool((student.table().time_scale == 1).all())  # type: ignore[union-attr]
    assert math.isclose(EPD(3, 2, 0.0, 0.0).table().time_scale.mean().item(), 1)
