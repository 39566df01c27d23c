import numpy as np
import pytest
import torch
from scipy import stats

from solvers import EPDTable, Policy

STD = {"direction_scale": 0.02, "time_scale": 0.03}


@pytest.fixture
def base() -> EPDTable:
    return EPDTable(
        position=torch.tensor([[0.3, 0.7], [0.6, 0.2]]).double(),
        weight=torch.tensor([[0.4, 0.6], [0.9, 0.1]]).double(),
        direction_scale=torch.tensor([[1.0, 0.97], [1.02, 1.0]]).double(),
        time_scale=torch.tensor([[1.0, 1.01], [0.99, 1.0]]).double(),
    )


@pytest.fixture
def policy(base: EPDTable) -> Policy:
    torch.manual_seed(0)
    return Policy(base, concentration=50.0, scale_std=STD, hidden=16, blocks=2)


def test_the_mean_starts_as_the_base_with_its_points_sorted(policy: Policy, base: EPDTable) -> None:
    for name in ("position", "weight", "direction_scale", "time_scale"):
        assert torch.allclose(getattr(policy.mean(), name), getattr(base.sorted(), name), atol=1e-9), name
    assert policy.kl().item() == pytest.approx(0, abs=1e-9)


def test_log_probability_is_scipys(policy: Policy) -> None:
    torch.nn.init.normal_(policy.head.weight, std=0.1)
    draw = policy.draw(np.random.default_rng(0), 3)
    found = policy.log_prob(draw)
    parts = policy.distributions()
    for i in range(3):
        expected = 0.0
        for n in range(2):
            for name in ("segments", "weight"):
                alpha = parts[name].concentration[n].detach().numpy()  # type: ignore[attr-defined]
                expected += stats.dirichlet(alpha).logpdf(draw[name][i, n].numpy())
            for name, std in STD.items():
                loc = parts[name].base_dist.loc[n].detach().numpy()  # type: ignore[attr-defined]
                expected += stats.lognorm.logpdf(draw[name][i, n].numpy(), std, scale=np.exp(loc)).sum()
        assert found[i].item() == pytest.approx(expected, rel=1e-9)


def test_kl_is_the_mean_log_ratio(policy: Policy, base: EPDTable) -> None:
    start = Policy(base, 50.0, STD, 16, 2)
    torch.nn.init.normal_(policy.head.weight, std=0.02)
    draw = policy.draw(np.random.default_rng(1), 20000)
    ratio = (policy.log_prob(draw) - start.log_prob(draw)).detach()
    assert policy.kl().item() == pytest.approx(ratio.mean().item(), abs=4 * ratio.std().item() / 20000**0.5)


def test_draws_are_tables_with_the_policys_mean(policy: Policy) -> None:
    torch.nn.init.normal_(policy.head.weight, std=0.1)
    tables, mean = policy.table(policy.draw(np.random.default_rng(2), 20000)), policy.mean()
    assert isinstance(tables, EPDTable)
    assert tables.position.shape == (20000, 2, 2)
    assert bool((tables.position.diff(dim=-1) > 0).all())
    assert torch.allclose(tables.weight.sum(-1), torch.ones(20000, 2).double())
    for name in ("position", "weight", "direction_scale", "time_scale"):
        drawn = getattr(tables, name)
        assert torch.allclose(drawn.mean(0), getattr(mean, name), atol=float(5 * drawn.std() / 20000**0.5)), name


def test_scales_without_deviation_are_kept(base: EPDTable) -> None:
    policy = Policy(base, 50.0, {"direction_scale": 0.0, "time_scale": 0.0}, 16, 2)
    tables = policy.table(policy.draw(np.random.default_rng(3), 5))
    assert isinstance(tables, EPDTable)
    assert torch.equal(tables.direction_scale, base.sorted().direction_scale.expand(5, 2, 2))
    assert torch.equal(tables.time_scale, base.sorted().time_scale.expand(5, 2, 2))


def test_the_same_generator_draws_the_same_tables(policy: Policy) -> None:
    first, second = (policy.draw(np.random.default_rng(4), 2) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
