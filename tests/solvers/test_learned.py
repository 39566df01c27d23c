"""The learned families, against their formulas written naively, one point at a time."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

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
    EPDTable,
    FeatureDenoiser,
    Guided,
    Multistep,
    MultistepTable,
    Policy,
    Solver,
    fit_d_ode,
    integrate,
    parallel_integrate,
    polynomial,
    time_uniform,
    trajectory,
)  # fmt: skip

SIGMAS = time_uniform(7, 0.002, 80.0, rho=2.0)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def disturbed(student: Multistep | AMED, seed: int = 0) -> Multistep | AMED:
    """With all its parameters somewhere else than at their start."""
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator(seed), dtype=torch.float64)
    return student


def one(mixture: Gaussian) -> Denoiser:
    """The denoiser of a single image, (C, H, W), at a level ()."""
    return lambda x, sigma: mixture.denoiser([])(x[None], sigma[None])[0]


@pytest.mark.parametrize(
    "start_name", ["ipndm_2", "ipndm_4", "adams_bashforth_3", "dpm_solver_pp_2m", "dpm_solver_pp_3m", "deis_3"]
)
@pytest.mark.parametrize("points", [1, 2, 3])
@pytest.mark.parametrize("afs", [False, True])
def test_a_multistep_student_starts_as_its_classical_solver(
    start_name: str, points: int, afs: bool, mixture: Gaussian, start: Tensor
) -> None:
    student = Multistep(SOLVERS[start_name], SIGMAS, points, history=3, scale_time=0.2)
    assert torch.allclose(student.sigmas(), SIGMAS, rtol=1e-12)
    solvers: list[Solver] = [AFS(s) if afs else s for s in (SOLVERS[start_name], student.table())]
    expected = integrate(mixture.denoiser([]), solvers[0], 80 * start, SIGMAS)
    counter = Counter(mixture.denoiser([]))
    found = integrate(counter, solvers[1], 80 * start, student.sigmas())
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-10)
    assert counter.depth == 6 - afs
    assert counter.rows == len(start) * (5 * points + (not afs))


def naive_multistep(denoise: Denoiser, table: MultistepTable, x: Tensor, sigmas: Tensor, afs: bool) -> Tensor:
    """As the docstring says it, for one image: every output ever made, and each row aligned with the newest."""
    outputs: list[Tensor] = []
    points = table.num_points
    for n, (sigma, sigma_next) in enumerate(pairwise(sigmas)):

        def state(row: Tensor, at: Tensor, past: list[Tensor], sigma: Tensor = sigma, x: Tensor = x) -> Tensor:
            terms = list(zip(reversed(row.tolist()), reversed(past), strict=False))
            total = sum((c * out for c, out in terms), start=torch.zeros_like(x))
            if table.form == "noise":
                return x + (at - sigma) * total
            return at / sigma * x + (1 - at / sigma) * total

        new = []
        for k in range(points if n else 1):
            y = state(table.stage[n, k, :-points], table.nodes[n, k], outputs) if k else x
            node = table.nodes[n, k]
            if n == 0 and afs:
                denoised = x - sigma * x / torch.sqrt(1 + sigma**2)
            else:
                denoised = denoise(y, table.time_scale[n, k] * node)
            new.append((y - denoised) / node if table.form == "noise" else denoised)
        row = table.update[n] if n else table.update[n, : table.update.shape[1] - points + 1]
        x = state(row, sigma_next, outputs + new)
        outputs += new
    return x


@pytest.mark.parametrize("form", ["ipndm_2", "dpm_solver_pp_2m"])
@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("sigma_max", [80.0, 1.0], ids=["ve", "flow"])
@pytest.mark.parametrize(("points", "history"), [(1, 1), (1, 3), (2, 2), (3, 1), (3, 3)])
def test_multistep_equals_the_naive_formula(
    points: int, history: int, sigma_max: float, afs: bool, form: str, mixture: Gaussian, start: Tensor
) -> None:
    student = Multistep(SOLVERS[form], polynomial(6, 0.003, sigma_max), points, history, scale_time=0.2)
    disturbed(student)
    table, sigmas = student.table(), student.sigmas().detach()
    x = sigma_max * start
    with torch.no_grad():
        found = integrate(mixture.denoiser([]), AFS(table) if afs else table, x, sigmas)
        expected = torch.stack([naive_multistep(one(mixture), table, image, sigmas, afs) for image in x])
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10)
        side_by_side, _ = parallel_integrate(mixture.denoiser([]), AFS(table) if afs else table, x, sigmas, 3, 0.0)
        assert torch.allclose(side_by_side, expected, rtol=1e-8, atol=1e-9)


def test_a_learned_grid_keeps_its_ends_and_falls() -> None:
    student = Multistep(SOLVERS["ipndm_2"], SIGMAS, 1, 1, 0.0)
    with torch.no_grad():
        student.grid.copy_(3 * torch.randn(6, generator=generator(1), dtype=torch.float64))
    sigmas = student.sigmas()
    assert torch.allclose(sigmas[[0, -1]], SIGMAS[[0, -1]], rtol=1e-12)
    assert bool((sigmas.diff() < 0).all())


def test_gradients_reach_every_number_that_a_multistep_student_uses(mixture: Gaussian, start: Tensor) -> None:
    student = Multistep(SOLVERS["ipndm_2"], SIGMAS, 2, 2, 0.2)
    disturbed(student)
    integrate(mixture.denoiser([]), AFS(student.table()), 80 * start, student.sigmas()).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    used = {name: (gradient != 0).double().mean().item() for name, gradient in gradients.items() if gradient is not None}
    assert used["grid"] == 1
    # all but what the first steps have not: the points of step 0, and history before it
    assert used["position"] == used["time_scale"] == 5 / 6
    assert used["update"] == (1 + 3 + 5 + 6 * 3) / (6 * 6)
    assert used["stage"] == (0 + 1 + 3 + 4 * 3) / (6 * 4)


@pytest.mark.parametrize("name", ["heun", "ipndm_4", "ddpm"])
def test_a_start_that_does_not_fit_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"start: .* in a step; valid: 1, looking back on at most history = 2"):
        Multistep(SOLVERS[name], SIGMAS, 2, 2, 0.2)


def test_a_multistep_table_refuses_another_grid(mixture: Gaussian, start: Tensor) -> None:
    table = Multistep(SOLVERS["ipndm_2"], SIGMAS, 1, 1, 0.0).table()
    with pytest.raises(ValueError, match="5 nodes; valid: 7"):
        integrate(mixture.denoiser([]), table, start, polynomial(5, 0.1, 1.0))


def test_a_multistep_table_refuses_other_noise_levels(mixture: Gaussian, start: Tensor) -> None:
    table = Multistep(SOLVERS["ipndm_2"], SIGMAS, 1, 1, 0.0).table()
    with pytest.raises(ValueError, match=r"sigmas: .* at node 1; valid: .*, the grid that the table was made for"):
        integrate(mixture.denoiser([]), table, start, polynomial(7, 0.002, 80.0))


@pytest.mark.parametrize(
    ("sigmas", "points", "history", "message"),
    [
        (torch.tensor([20.0, 5.0, 0.0]).double(), 2, 1, "sigmas: 0 at the end; valid: a positive noise level"),
        (torch.tensor([1.0, 5.0, 20.0]).double(), 2, 1, "sigmas: .*; valid: positive and strictly decreasing"),
        (SIGMAS, 0, 1, "num_points, history: 0, 1; valid: 1 or more; 1 to 6, the steps of the grid"),
        (SIGMAS, 2, 0, "num_points, history: 2, 0; valid: "),
        (SIGMAS, 2, 7, "num_points, history: 2, 7; valid: 1 or more; 1 to 6, the steps of the grid"),
    ],
)
def test_bad_settings_of_multistep_are_refused(sigmas: Tensor, points: int, history: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Multistep(SOLVERS["euler"], sigmas, points, history, 0.0)


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


def epd_table(points: int, num_steps: int, max_order: int = 1) -> EPDTable:
    shape = (4, num_steps - 1, points)
    position, weight, direction, time = (
        torch.rand(shape, generator=generator(points), dtype=torch.float64) * 0.8 + 0.1
    ).unbind()
    return EPDTable(position, weight / weight.sum(-1, keepdim=True), 0.9 + direction / 5, 0.9 + time / 5, max_order)


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("points", [1, 2, 3])
def test_epd_is_a_special_case_of_multistep(points: int, afs: bool, mixture: Gaussian, start: Tensor) -> None:
    """An interval is two steps, the first to the first point; the second's look-ahead points are the others."""
    sigmas, epd = polynomial(4, 0.002, 80.0), epd_table(points, 4).sorted()
    tau = sigmas[1:, None] ** epd.position * sigmas[:-1, None] ** (1 - epd.position)  # (N, K)
    grid = torch.cat([torch.stack([sigmas[:-1], tau[:, 0]], 1).flatten(), sigmas[-1:]])
    nodes = grid[:-1, None].repeat(1, points)
    nodes[1::2] = tau
    stage = torch.zeros(6, points, 2 * points, dtype=torch.float64)
    update = torch.zeros(6, 2 * points, dtype=torch.float64)
    time_scale = torch.ones(6, points, dtype=torch.float64)
    for n in range(3):
        d = 0 if n else points - 1  # the column of d: the very first step has one output only
        update[2 * n, points] = 1
        stage[2 * n + 1, 1:, d] = 1
        ahead, rest, whole = tau[n, 0] - sigmas[n], sigmas[n + 1] - tau[n, 0], sigmas[n + 1] - sigmas[n]
        update[2 * n + 1, d] = -ahead / rest
        update[2 * n + 1, points:] = whole / rest * epd.weight[n] * epd.direction_scale[n]
        time_scale[2 * n + 1] = epd.time_scale[n]
    joint = MultistepTable("noise", nodes, stage, update, time_scale)
    found = [
        integrate(mixture.denoiser([]), AFS(solver) if afs else solver, 80 * start, g)
        for solver, g in ((epd, sigmas), (joint, grid))
    ]
    assert torch.allclose(found[0], found[1], rtol=1e-9, atol=1e-10)


ADAMS_BASHFORTH = [[1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]


@pytest.mark.parametrize("sigma_max", [80.0, 1.0], ids=["ve", "flow"])
@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("points", [1, 2, 3])
@pytest.mark.parametrize("max_order", [2, 3, 4])
def test_epd_plugin_equals_the_naive_formula(
    max_order: int, points: int, afs: bool, sigma_max: float, mixture: Gaussian, start: Tensor
) -> None:
    sigmas, table, denoise = polynomial(6, 0.003, sigma_max), epd_table(points, 6, max_order), one(mixture)

    def naive(x: Tensor) -> Tensor:
        past: list[Tensor] = []
        for n, (t, t_next) in enumerate(pairwise(sigmas)):
            past.append(x / torch.sqrt(1 + t**2) if afs and n == 0 else (x - denoise(x, t)) / t)
            coefficients = ADAMS_BASHFORTH[min(max_order, n + 1) - 1]
            lead = sum(c * d for c, d in zip(coefficients, reversed(past), strict=False))
            total = torch.zeros_like(x)
            for k in range(points):
                tau = t_next ** table.position[n, k] * t ** (1 - table.position[n, k])
                x_k = x + (tau - t) * lead
                total += (
                    table.weight[n, k] * table.direction_scale[n, k] * (x_k - denoise(x_k, table.time_scale[n, k] * tau)) / tau
                )
            x = x + (t_next - t) * total
        return x

    counter = Counter(mixture.denoiser([]))
    found = integrate(counter, AFS(table) if afs else table, sigma_max * start, sigmas)
    assert torch.allclose(found, torch.stack([naive(x) for x in sigma_max * start]), rtol=1e-12, atol=1e-12)
    assert counter.depth == 2 * 5 - afs
    assert counter.rows / len(start) == (1 + points) * 5 - afs


def test_guidance_doubles_the_rows_of_every_family(mixture: Gaussian, start: Tensor) -> None:
    for solver, grid in ((epd_table(2, 7), SIGMAS), (Multistep(SOLVERS["ipndm_2"], SIGMAS, 3, 2, 0.0).table(), SIGMAS)):
        plain, counter = Counter(mixture.denoiser([])), Counter(mixture.denoiser([]))
        integrate(plain, AFS(solver), 80 * start, grid)
        integrate(Guided(counter, 2.0, len(start)), AFS(solver), 80 * start, grid)
        assert (counter.depth, counter.rows) == (plain.depth, 2 * plain.rows)


def test_d_ode_refuses_trajectories_of_another_grid_and_bears_what_never_changes(start: Tensor) -> None:
    sigmas = polynomial(6, 0.01, 20.0)
    states = torch.stack([sigma * start for sigma in sigmas], 1)
    for wrong in (states[:, :5], torch.cat([states, states], 1)):
        with pytest.raises(ValueError, match=r"states: shape .*; valid: \(B, 6, ...\), one for each node"):
            fit_d_ode(lambda x, sigma: 0 * x, wrong, sigmas, False)
    table = fit_d_ode(lambda x, sigma: 0 * x, states, sigmas, False)
    assert torch.allclose(table.update, torch.tensor([[0.0, 1.0]]).double().expand(5, 2))


@pytest.mark.parametrize("afs", [False, True])
def test_d_ode_is_the_least_squares_fit_step_by_step(afs: bool, mixture: Gaussian, start: Tensor) -> None:
    sigmas = polynomial(6, 0.01, 20.0)
    x = 20 * start
    fine = list(trajectory(mixture.denoiser([]), SOLVERS["heun"], x, polynomial(41, 0.01, 20.0)))
    teacher = torch.stack(fine[::8], 1)
    table = fit_d_ode(mixture.denoiser([]), teacher, sigmas, afs)
    before: Tensor | None = None
    for n, (t, t_next) in enumerate(pairwise(sigmas)):
        denoised = x - t * x / torch.sqrt(1 + t**2) if afs and n == 0 else mixture.denoiser([])(x, t.expand(len(x)))
        euler = denoised + t_next / t * (x - denoised)
        if before is not None:
            change = (1 - t_next / t) * (denoised - before)
            best = torch.linalg.lstsq(change.flatten()[:, None], (teacher[:, n + 1] - euler).flatten()[:, None]).solution.item()
            euler = euler + best * change
            assert table.update[n].tolist() == pytest.approx([-best, 1 + best], rel=1e-9)
        x, before = euler, denoised
    found = integrate(mixture.denoiser([]), AFS(table) if afs else table, 20 * start, sigmas)
    assert torch.allclose(found, x, rtol=1e-10)
    plain = integrate(mixture.denoiser([]), AFS(SOLVERS["euler"]) if afs else SOLVERS["euler"], 20 * start, sigmas)
    assert (found - teacher[:, -1]).norm() < (plain - teacher[:, -1]).norm()


class WithFeature:
    """A mixture's denoiser that gives the first three numbers of its state as a feature."""

    def __init__(self, mixture: Gaussian) -> None:
        self.denoise = mixture.denoiser([])

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.denoise(x, sigma)

    def with_feature(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        return self(x, sigma), x.flatten(1)[:, :3] / sigma[:, None]


@pytest.mark.parametrize("afs", [False, True])
def test_amed_equals_the_naive_formula(afs: bool, mixture: Gaussian, start: Tensor) -> None:
    torch.manual_seed(0)
    amed = disturbed(AMED(5, 3, scale_dir=0.1, scale_time=0.2))
    sigmas, denoise = polynomial(5, 0.01, 20.0), one(mixture)

    def naive(x: Tensor) -> Tensor:
        for n, (t, t_next) in enumerate(pairwise(sigmas)):
            analytic = afs and n == 0
            d = x / torch.sqrt(1 + t**2) if analytic else (x - denoise(x, t)) / t
            feature = torch.zeros(1, 3).double() if analytic else x.flatten()[None, :3] / t
            r, o, a = amed.predict(feature, t, t_next)[0]  # type: ignore[operator]
            o, a = 1 + 0.1 * (2 * torch.sigmoid(o / 2) - 1), 1 + 0.2 * (2 * torch.sigmoid(a / 2) - 1)
            tau = t_next**r * t ** (1 - r)
            x_m = x + (tau - t) * d
            x = x + (t_next - t) * o * (x_m - denoise(x_m, a * tau)) / tau
        return x

    counter = Counter(WithFeature(mixture))
    with torch.no_grad():
        found = integrate(counter, AFS(amed) if afs else amed, 20 * start, sigmas)
        assert torch.allclose(found, torch.stack([naive(x) for x in 20 * start]), rtol=1e-11)
    assert (counter.depth, counter.rows) == (8 - afs, (8 - afs) * len(start))
    assert len({tuple(amed.predict(x[None, :3].double(), sigmas[0], sigmas[1])[0].tolist()) for x in start.flatten(1)}) == 8  # type: ignore[operator]


def test_amed_needs_features_that_fit(mixture: Gaussian, start: Tensor) -> None:
    sigmas = polynomial(5, 0.01, 20.0)
    with pytest.raises(TypeError, match=r"denoise: .* gives no feature; valid: a FeatureDenoiser"):
        integrate(mixture.denoiser([]), AMED(5, 3, 0.0, 0.0), start, sigmas)
    with pytest.raises(ValueError, match=r"feature: \(8, 3\); valid: \(B, 4\)"):
        integrate(WithFeature(mixture), AMED(5, 4, 0.0, 0.0), start, sigmas)

    class TooFew(WithFeature):
        def with_feature(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
            return self(x, sigma), torch.ones(2, 3).double()

    with pytest.raises(ValueError, match=r"denoise: gave a feature of shape \(2, 3\); valid: finite numbers, \(8, F\)"):
        integrate(TooFew(mixture), AMED(5, 3, 0.0, 0.0), start, sigmas)
    with pytest.raises(ValueError, match="7 nodes; valid: 5"):
        integrate(WithFeature(mixture), AMED(5, 3, 0.0, 0.0), start, SIGMAS)
    with pytest.raises(ValueError, match="adapts to the backbone's features"):
        parallel_integrate(WithFeature(mixture), AMED(5, 3, 0.0, 0.0), start, sigmas, 2, 0.0)


def test_guidance_gives_the_feature_of_the_wanted_conditions(mixture: Gaussian, start: Tensor) -> None:
    class Conditional(WithFeature):
        def with_feature(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
            assert len(x) == 4 * len(start)  # two states, each with the wanted and the other conditions
            return self(x, sigma), torch.arange(len(x)).double()[:, None]

    guided: FeatureDenoiser = Guided(Counter(Conditional(mixture)), 2.0, len(start))
    _, feature = guided.with_feature(torch.cat([start, start]), torch.ones(16).double())
    assert feature[:, 0].tolist() == [*range(8), *range(16, 24)]


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


def test_a_policy_counts_only_what_a_table_has() -> None:
    """What a draw says of coefficients that are 0, or that the first step has not, changes no probability."""
    import numpy as np

    base = Multistep(SOLVERS["ipndm_2"], SIGMAS, 2, 2, 0.2).requires_grad_(False).table()
    policy = Policy(base, 100.0, {"direction_scale": 0.02, "time_scale": 0.01}, 16, 1)
    draw = policy.draw(np.random.default_rng(0), 4)
    before = policy.log_prob(draw)
    draw["direction_scale"] = torch.where(base.update == 0, 1.5, draw["direction_scale"])
    draw["time_scale"][:, 0, 1] = 1.5
    assert torch.equal(policy.log_prob(draw), before)
    draw["direction_scale"][:, 3, 4] *= 1.001
    assert bool((policy.log_prob(draw) != before).all())


def test_a_policy_over_a_multistep_table_draws_around_it(mixture: Gaussian, start: Tensor) -> None:
    import numpy as np

    base = Multistep(SOLVERS["ipndm_2"], SIGMAS, 2, 2, 0.2).table()
    base = replace(base, **{name: getattr(base, name).detach() for name in ("nodes", "stage", "update", "time_scale")})
    policy = Policy(base, 100.0, {"direction_scale": 0.02, "time_scale": 0.01}, 16, 1)
    mean = policy.mean()
    assert isinstance(mean, MultistepTable)
    assert torch.allclose(mean.update, base.update)
    assert torch.allclose(mean.time_scale, base.time_scale)
    draw = policy.draw(np.random.default_rng(0), len(start))
    tables = policy.table(draw)
    assert isinstance(tables, MultistepTable)
    assert tables.update.shape == (len(start), *base.update.shape)
    assert policy.log_prob(draw).shape == (len(start),)
    found = integrate(mixture.denoiser([]), AFS(tables), 80 * start, SIGMAS)
    for i in range(len(start)):
        own = replace(base, update=tables.update[i], time_scale=tables.time_scale[i])
        assert torch.allclose(integrate(mixture.denoiser([]), AFS(own), 80 * start[i : i + 1], SIGMAS)[0], found[i], rtol=1e-9)
    with pytest.raises(ValueError, match=r"scale_std: .*; valid: one above 0"):
        Policy(base, 100.0, {"direction_scale": 0.0}, 16, 1)


def test_a_student_that_does_nothing_to_the_time_shows_the_network_the_nodes() -> None:
    student = disturbed(Multistep(SOLVERS["ipndm_2"], SIGMAS, 2, 2, scale_time=0.0))
    assert bool((student.table().time_scale == 1).all())  # type: ignore[union-attr]
    assert math.isclose(EPD(3, 2, 0.0, 0.0).table().time_scale.mean().item(), 1)
