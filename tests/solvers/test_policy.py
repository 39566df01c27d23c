from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import integrate as quadrature
from scipy import special, stats
from torch import Tensor
from torch.distributions import Dirichlet

from backends import Gaussian
from solvers import AFS, EPD, SOLVERS, EPDTable, Multistep, MultistepTable, Policy, Spread, integrate, polynomial
from solvers.policy import Drawable

SIGMAS = polynomial(6, 0.02, 80.0)
SPREAD = Spread(50.0, direction_scale=0.02, time_scale=0.03, coefficient=0.02, node=0.05)
TENSORS = {
    EPDTable: ("position", "weight", "direction_scale", "time_scale"),
    MultistepTable: ("nodes", "stage", "update", "time_scale"),
}


def epd(max_order: int) -> EPDTable:
    first = torch.tensor([0.4, 0.9, 0.5, 0.3, 0.2], dtype=torch.float64)
    return EPDTable(
        position=torch.tensor([[0.3, 0.7], [0.6, 0.2], [0.1, 0.9], [0.5, 0.6], [0.2, 0.4]]).double(),
        weight=torch.stack([first, 1 - first], 1),
        direction_scale=torch.tensor([[1.0, 0.97], [1.02, 1.0], [1.0, 1.0], [0.99, 1.01], [1.0, 1.0]]).double(),
        time_scale=torch.tensor([[1.0, 1.01], [0.99, 1.0], [1.0, 1.0], [1.0, 1.02], [1.0, 1.0]]).double(),
        max_order=max_order,
    )


def multistep(points: int) -> MultistepTable:
    """A learned one would have other numbers at the same places."""
    student = Multistep(SOLVERS["ipndm_2"], SIGMAS, points, 2, 0.2).requires_grad_(False)
    table = student.table()
    generator = torch.Generator().manual_seed(3)
    noise = {name: 0.05 * torch.randn(getattr(table, name).shape, generator=generator).double() for name in ("stage", "update")}
    return replace(table, **{name: getattr(table, name) * (1 + value) for name, value in noise.items()})


FAMILIES = {
    "epd": lambda: epd(1),
    "epd_plugin": lambda: epd(3),
    "s4s": lambda: multistep(1),
    "parallel_multistep": lambda: multistep(3),
}


@pytest.fixture(params=FAMILIES)
def base(request: pytest.FixtureRequest) -> Drawable:
    return FAMILIES[request.param]()


def around(base: Drawable, spread: Spread = SPREAD, moved: float = 0.0) -> Policy:
    torch.manual_seed(0)
    policy = Policy(base, spread, hidden=16, blocks=2)
    torch.nn.init.normal_(policy.head.weight, std=moved) if moved else None
    return policy


def test_the_mean_starts_as_the_base_with_its_points_sorted(base: Drawable) -> None:
    policy = around(base)
    expected = base.sorted() if isinstance(base, EPDTable) else base
    for name in TENSORS[type(base)]:
        assert torch.allclose(getattr(policy.mean(), name), getattr(expected, name), rtol=0, atol=1e-9), name
    assert policy.kl().item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("concentration", [10.0, 20.0, 1e6])
def test_the_mean_of_a_published_policy_starts_as_the_base(concentration: float) -> None:
    policy = around(epd(1), Spread(concentration))
    assert list(policy.parts) == ["segments", "weight"]
    assert torch.allclose(policy.mean().position, epd(1).sorted().position, rtol=0, atol=1e-9)  # type: ignore[union-attr]


def test_log_probability_is_scipys(base: Drawable) -> None:
    policy = around(base, moved=0.1)
    draw = policy.draw(np.random.default_rng(0), 3)
    found, parts = policy.log_prob(draw), policy.distributions()
    for i in range(3):
        expected = 0.0
        for name, part in policy.parts.items():
            drawn, used = draw[name][i].numpy(), part.drawn().numpy().astype(bool)
            distribution = parts[name]
            if isinstance(distribution, Dirichlet):
                alpha = distribution.concentration.detach().numpy()
                expected += sum(stats.dirichlet(a).logpdf(x) for a, x in zip(alpha, drawn, strict=True) if len(x) > 1)
                continue
            loc, std = (getattr(getattr(distribution, "base_dist", distribution), n).detach().numpy() for n in ("loc", "scale"))
            each = stats.lognorm.logpdf(drawn, std, scale=np.exp(loc)) if name in LOGS else stats.norm.logpdf(drawn, loc, std)
            expected += each[used].sum()
        assert found[i].item() == pytest.approx(expected, rel=1e-9)


LOGS = ("direction_scale", "time_scale", "node")


def test_entropy_is_scipys(base: Drawable) -> None:
    policy = around(base, moved=0.1)
    expected = 0.0
    for name, distribution in policy.distributions().items():
        if isinstance(distribution, Dirichlet):
            alphas = distribution.concentration.detach().numpy()
            expected += sum(stats.dirichlet(alpha).entropy() for alpha in alphas if len(alpha) > 1)
            continue
        inner, used = getattr(distribution, "base_dist", distribution), policy.parts[name].drawn().numpy().astype(bool)
        loc, std = (getattr(inner, n).detach().numpy() for n in ("loc", "scale"))
        each = stats.lognorm(std, scale=np.exp(loc)).entropy() if name in LOGS else stats.norm(loc, std).entropy()
        expected += each[used].sum()
    assert policy.entropy().item() == pytest.approx(expected, rel=1e-9)


def test_draws_of_the_smallest_concentrations_are_tables() -> None:
    """Where all gamma variates may underflow."""
    table = EPD(3, 2, 0.0, 0.0).requires_grad_(False).table()
    policy = around(table, Spread(0.001))
    draw = policy.draw(np.random.default_rng(0), 2000)
    assert bool(policy.log_prob(draw).isfinite().all())
    assert bool((policy.table(draw).position.diff(dim=-1) > 0).all())  # type: ignore[union-attr]


def test_kl_is_the_textbooks() -> None:
    """Of Dirichlets by their formula, of log-normals by quadrature."""
    base = epd(1)
    start, policy = around(base).distributions(), around(base, moved=0.1)
    expected = 0.0
    for name, p in policy.distributions().items():
        q = start[name]
        if isinstance(p, Dirichlet) and isinstance(q, Dirichlet):
            for a, b in zip(p.concentration.detach().numpy(), q.concentration.detach().numpy(), strict=True):
                expected += special.gammaln(a.sum()) - special.gammaln(a).sum() - special.gammaln(b.sum())
                expected += special.gammaln(b).sum() + ((a - b) * (special.psi(a) - special.psi(a.sum()))).sum()
            continue
        numbers = [getattr(d.base_dist, n).detach().flatten().tolist() for d in (p, q) for n in ("loc", "scale")]  # type: ignore[attr-defined]
        for one, s, other, t in zip(*numbers, strict=True):
            f: Any = stats.lognorm(s, scale=np.exp(one))
            g: Any = stats.lognorm(t, scale=np.exp(other))
            ends = np.exp(one - 9 * s), np.exp(one + 9 * s)
            expected += quadrature.quad(lambda x, f=f, g=g: f.pdf(x) * (f.logpdf(x) - g.logpdf(x)), *ends, epsabs=1e-11)[0]
    assert policy.kl().item() == pytest.approx(expected, rel=1e-7)


def test_kl_is_the_mean_log_ratio(base: Drawable) -> None:
    start, policy = around(base), around(base, moved=0.02)
    draw = policy.draw(np.random.default_rng(1), 20000)
    ratio = (policy.log_prob(draw) - start.log_prob(draw)).detach()
    assert policy.kl().item() == pytest.approx(ratio.mean().item(), abs=4 * ratio.std().item() / 20000**0.5)


def test_draws_are_tables_with_the_policys_mean(base: Drawable) -> None:
    policy = around(base, moved=0.1)
    draw = policy.draw(np.random.default_rng(2), 20000)
    for name, distribution in policy.distributions().items():
        mean, drawn = distribution.mean.detach(), draw[name]
        assert torch.allclose(drawn.mean(0), mean, rtol=0, atol=float(5 * drawn.std(0).max() / 20000**0.5)), name
    tables = policy.table(draw)
    if isinstance(tables, EPDTable):
        assert tables.position.shape == (20000, 5, 2)
        assert bool((tables.position.diff(dim=-1) > 0).all())
        assert torch.allclose(tables.weight.sum(-1), torch.ones(20000, 5).double())
        assert torch.allclose(tables.position.mean(0), policy.mean().position.detach(), atol=1e-3)  # type: ignore[union-attr]


def test_standard_deviations_are_learned_within_their_range() -> None:
    policy = around(epd(1))
    width = policy.head.out_features
    with torch.no_grad():
        policy.head.bias[width - 2 :] = 100.0  # the logarithms of the last scale's deviations
    assert policy.distributions()["time_scale"].base_dist.scale.max().item() == pytest.approx(np.exp(2))  # type: ignore[attr-defined]


def test_what_has_no_spread_is_kept() -> None:
    tables = around(epd(1), Spread(50.0)).table(around(epd(1), Spread(50.0)).draw(np.random.default_rng(3), 5))
    assert isinstance(tables, EPDTable)
    assert torch.equal(tables.direction_scale, epd(1).sorted().direction_scale.expand(5, 5, 2))
    assert torch.equal(tables.time_scale, epd(1).sorted().time_scale.expand(5, 5, 2))
    policy = around(multistep(3), Spread(time_scale=0.02))
    tables = policy.table(policy.draw(np.random.default_rng(3), 5))
    assert isinstance(tables, MultistepTable)
    assert torch.equal(tables.update, multistep(3).update)
    assert torch.equal(tables.nodes, multistep(3).nodes)


def test_the_same_generator_draws_the_same_tables(base: Drawable) -> None:
    policy = around(base)
    first, second = (policy.draw(np.random.default_rng(4), 2) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_batch_of_tables_is_each_of_them_alone(base: Drawable, mixture: Gaussian, start: Tensor) -> None:
    policy = around(base)
    tables = policy.table(policy.draw(np.random.default_rng(0), len(start)))
    found = integrate(mixture.denoiser([]), AFS(tables), 80 * start, SIGMAS)
    shared = {name: getattr(policy.base, name) for name in TENSORS[type(base)]}
    for i in range(len(start)):
        numbers = {name: getattr(tables, name) for name in shared}
        own = replace(policy.base, **{n: v[i] if v.ndim > shared[n].ndim else v for n, v in numbers.items()})
        alone = integrate(mixture.denoiser([]), AFS(own), 80 * start[i : i + 1], SIGMAS)
        assert torch.allclose(alone[0], found[i], rtol=1e-9)


def test_a_policy_counts_only_what_a_table_has() -> None:
    """What a draw says of coefficients that are 0, or that the first step has not, changes no probability and no table."""
    base = multistep(2)
    policy = around(base)
    draw = policy.draw(np.random.default_rng(0), 4)
    before, tables = policy.log_prob(draw), policy.table(draw)
    for name, value in draw.items():
        draw[name] = torch.where(policy.parts[name].drawn() == 0, 1.5, value)
    assert torch.equal(policy.log_prob(draw), before)
    again = policy.table(draw)
    assert torch.equal(again.update, tables.update)  # type: ignore[union-attr]
    assert torch.equal(again.stage, tables.stage)  # type: ignore[union-attr]
    draw["update"][:, 3, 4] *= 1.001
    assert bool((policy.log_prob(draw) != before).all())


def test_a_shift_of_a_spread_moves_the_mean_by_as_much(base: Drawable) -> None:
    """What CMA-ES searches: 0 is the base, and an offset of one standard deviation moves a scale or coefficient by one."""
    policy = around(base)
    spread = policy.deviations()
    assert bool((spread > 0).all())
    unmoved = policy.mean(policy.shifted(torch.zeros_like(spread)))
    moved = policy.mean(policy.shifted(spread))
    for name in TENSORS[type(base)]:
        assert torch.allclose(getattr(unmoved, name), getattr(policy.base, name), atol=1e-9), name
    if isinstance(moved, EPDTable):
        assert torch.allclose(moved.direction_scale, policy.base.direction_scale * np.exp(0.02))  # type: ignore[union-attr]
    else:
        used = policy.base.update != 0  # type: ignore[union-attr]
        assert torch.allclose(moved.update, policy.base.update + 0.02 * used)  # type: ignore[union-attr]
    assert policy.kl(policy.shifted(spread)) > 0


def test_nodes_stay_where_the_base_has_points() -> None:
    policy = around(multistep(3), Spread(node=1.0, time_scale=0.5))
    tables = policy.table(policy.draw(np.random.default_rng(0), 50))
    assert isinstance(tables, MultistepTable)
    assert tables.nodes.min() >= multistep(3).nodes.min()
    assert tables.nodes.max() <= 80.0
    shown = tables.nodes * tables.time_scale
    assert shown.min() >= multistep(3).nodes.min() * (1 - 1e-12)
    assert shown.max() <= 80.0 * (1 + 1e-12)
    assert torch.equal(tables.nodes[..., 0], multistep(3).nodes[:, 0].expand(50, 5))


@pytest.mark.parametrize(
    ("spread", "message"),
    [
        ({"concentration": 0.0}, r"concentration: 0.0; valid: a positive number"),
        ({"concentration": float("inf")}, r"concentration: inf"),
        ({"concentration": float("nan")}, r"concentration: nan"),
        ({"direction_scale": -0.1}, r"direction_scale: standard deviation -0.1; valid: 0, or 0.0009 to 7.3891"),
        ({"node": float("nan")}, r"node: standard deviation nan; valid"),
    ],
)
def test_a_spread_out_of_range_is_refused(spread: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Spread(**spread)


@pytest.mark.parametrize("position", [[0.4, 0.4], [0.0, 0.5], [0.5, 1.0]])
def test_a_base_with_coinciding_points_is_refused(position: list[float]) -> None:
    table = EPD(3, 2, 0.0, 0.0).requires_grad_(False).table()
    with pytest.raises(ValueError, match=r"base: points \[\[0.3.*coincide; valid: points inside \(0, 1\), apart from one"):
        around(replace(table, position=torch.tensor([[0.3, 0.6], position]).double()))
    with pytest.raises(ValueError, match=r"base: weights .*; valid: positive weights"):
        around(replace(table, weight=torch.tensor([[0.3, 0.7], [1.0, 0.0]]).double()))


def test_a_multistep_policy_needs_something_to_draw() -> None:
    with pytest.raises(ValueError, match=r"something to draw of a multistep table \(coefficient, time_scale, node\)"):
        around(multistep(1), Spread())
