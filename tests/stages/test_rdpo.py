import json
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from scipy import stats
from torch import Tensor
from torch.distributions import Dirichlet, LogNormal

from backends import Gaussian
from metrics.mixture import Mixture, Part
from solvers import EPD, SOLVERS, Backbone, Multistep, Policy, Predictor, Spread, flowmatch, logsnr, polynomial
from solvers.policy import Drawable
from stages.draws import at_quantiles, drawn, numbers_of
from stages.files import RolloutError
from stages.methods import METHODS, advantages, surrogate
from stages.params import RDPO, Params
from stages.ranks import Ranks
from stages.rollouts import Grouping, Rollouts
from stages.training import rng

from .conftest import frozen_of, small

SIGMAS = polynomial(4, 0.1, 10.0)


def nearer_half(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """A reward that the tables of few steps can raise."""
    return -images.sub(0.5).square().mean((1, 2, 3))


def table_of(family: str) -> tuple[Drawable, Tensor]:
    match family:
        case "epd":
            return EPD(4, 2, 0.0, 0.0).requires_grad_(False).table(), SIGMAS
        case "epd_plugin":
            return EPD(4, 2, 0.0, 0.0, max_order=2).requires_grad_(False).table(), SIGMAS
        case "s4s":
            student = Multistep(SOLVERS["ipndm_2"], SIGMAS, 1, 2, 0.0).requires_grad_(False)
        case _:
            student = Multistep(SOLVERS["ipndm_2"], SIGMAS, 2, 2, 0.0).requires_grad_(False)
    return student.table(), student.sigmas()


def rollouts_of(
    backend: Gaussian, family: str = "epd", reward: Any = nearer_half, batch_size: int = 64, guidance_scale: float = 1.0
) -> Rollouts:
    table, sigmas = table_of(family)
    predictor = Predictor(table, sigmas, False, Backbone("mixture", None, "none"), guidance_scale, {})
    return Rollouts(frozen_of(backend), mixed(reward), predictor, 0, batch_size)


def mixed(reward: Any) -> Mixture:
    """A reward of one part."""
    return Mixture({"reward": Part(reward)})


def policy_of(rollouts: Rollouts, spread: Spread | None = None) -> Policy:
    torch.manual_seed(0)
    table: Any = rollouts.distilled.table
    return Policy(table, spread or Spread(200.0, direction_scale=0.05, time_scale=0.05, coefficient=0.05, node=0.05), 16, 1)


def settings(**kwargs: Any) -> RDPO:
    chosen = {"groups": 8, "tables": 8, "kl": 0.0, "warmup": 0, "learning_rate": 1e-2}
    return RDPO.model_validate({**small()["rdpo"], **chosen, **kwargs})


def test_advantages_are_each_reward_less_the_others_mean_in_its_group() -> None:
    rewards = torch.tensor([[1.0, 0.0], [2.0, 0.0], [6.0, 3.0]]).double()  # three tables, two groups
    naive = [[0.0, 0.0] for _ in range(3)]
    for j in range(3):
        for g in range(2):
            others = [rewards[i, g].item() for i in range(3) if i != j]
            naive[j][g] = rewards[j, g].item() - sum(others) / 2
    expected = torch.tensor(naive).double()
    for grouping in ("shared", "prompt"):
        assert torch.allclose(advantages(rewards, grouping), expected / expected.square().mean().sqrt())


def test_the_published_advantages_mix_prompts() -> None:
    """Rewards in the order of prompts, k images each, read as k rows: a column holds every G-th, whatever its prompt."""
    rewards = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)).double()  # four images of two prompts
    in_order = [rewards[image, prompt].item() for prompt in range(2) for image in range(4)]
    found = []
    for i, reward in enumerate(in_order):
        others = [in_order[j] for j in range(8) if j % 2 == i % 2 and j != i]
        found.append(reward - sum(others) / 3)
    array = np.array(found)
    expected = torch.tensor((array - array.mean()) / array.std()).view(2, 4).T
    assert torch.allclose(advantages(rewards, "mixed"), expected)


@pytest.mark.parametrize("grouping", ["shared", "prompt", "mixed"])
def test_equal_rewards_give_no_advantage(grouping: Grouping) -> None:
    assert bool((advantages(torch.full((4, 2), 0.3).double(), grouping) == 0).all())
    nearly = torch.full((4, 2), 3.0).double() + 1e-15 * torch.randn(4, 2).double()
    assert advantages(nearly, grouping).abs().max() < 1e-5
    if grouping != "mixed":
        one = torch.tensor([[1.0, 5.0], [1.0, 6.0], [1.0, 9.0]]).double()
        assert bool((advantages(one, grouping)[:, 0] == 0).all())
        assert advantages(one, grouping).abs().max() < 3


def test_what_a_prompt_is_worth_does_not_touch_the_advantages_of_its_group() -> None:
    rewards = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
    offset = torch.tensor([10.0, -30.0, 7.0])
    assert torch.allclose(advantages(rewards + offset, "shared"), advantages(rewards, "shared"))
    assert not torch.allclose(advantages(rewards + offset, "mixed"), advantages(rewards, "mixed"), atol=0.1)


def test_the_surrogate_is_ppos_and_its_gradient_that_of_finite_differences() -> None:
    policy = Policy(table_of("epd")[0], Spread(50.0, 0.05), 8, 1)  # type: ignore[arg-type]
    draw = policy.draw(np.random.default_rng(0), 12)
    advantage = torch.randn(12, generator=torch.Generator().manual_seed(1)).double()
    with torch.no_grad():
        old = policy.log_prob(draw)
        policy.head.bias.add_(0.05 * torch.randn(policy.head.bias.shape, generator=torch.Generator().manual_seed(2)).double())

    def loss() -> Tensor:
        return surrogate(advantage, (policy.log_prob(draw) - old).exp(), 0.2)

    naive = []
    for a, ratio in zip(advantage.tolist(), (policy.log_prob(draw) - old).exp().tolist(), strict=True):
        naive.append(-min(a * ratio, a * min(max(ratio, 0.8), 1.2)))
    assert loss().item() == pytest.approx(np.mean(naive))
    (gradient,) = torch.autograd.grad(loss(), [policy.head.bias])
    for i in range(len(gradient)):
        with torch.no_grad():
            policy.head.bias[i] += 1e-6
            above = loss().item()
            policy.head.bias[i] -= 2e-6
            below = loss().item()
            policy.head.bias[i] += 1e-6
        assert gradient[i].item() == pytest.approx((above - below) / 2e-6, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
@pytest.mark.parametrize(("grouping", "saved"), [("shared", 1), ("prompt", 0), ("mixed", 0)])
def test_a_shared_start_is_evaluated_once(grouping: Grouping, saved: int, guidance_scale: float, mixture: Gaussian) -> None:
    """k tables of K points and N intervals cost k N (1 + K) - (k - 1) rows of the network."""
    rollouts = rollouts_of(mixture, guidance_scale=guidance_scale)
    policy = policy_of(rollouts)
    for groups, tables in ((1, 5), (3, 4)):
        draw = policy.draw(np.random.default_rng(0), groups * tables)
        batch = rollouts.batch(policy, draw, 0, groups, tables, grouping, slice(None))
        rows = tables * 3 * (1 + 2) - saved * (tables - 1)
        assert batch.rows == groups * rows * (1 if guidance_scale == 1 else 2)


@pytest.mark.parametrize("grouping", ["shared", "prompt"])
@pytest.mark.parametrize("family", ["epd", "epd_plugin", "s4s", "parallel_multistep"])
def test_a_batch_of_rollouts_is_each_of_them_alone(family: str, grouping: Grouping, mixture: Gaussian) -> None:
    seen: list[tuple[Tensor, list[str]]] = []

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        seen.append((images, list(prompts)))
        return nearer_half(images, prompts)

    rollouts = rollouts_of(mixture, family, reward)
    policy = policy_of(rollouts)
    draw = policy.draw(np.random.default_rng(0), 6)
    batch = rollouts.batch(policy, draw, 7, 3, 2, grouping, slice(None))
    ((images, prompts),) = seen
    assert prompts == ["1", "2", "3", "1", "2", "3"]
    for row in range(6):
        table, group = divmod(row, 3)
        own = policy.table({name: numbers[row : row + 1] for name, numbers in draw.items()})
        from stages.noise import noise

        sample = 21 + group if grouping == "shared" else (21 + group) * 2 + table
        alone, _ = rollouts.images(own, noise(0, "train", [sample], (1, 2, 2)), [prompts[row]])
        assert torch.allclose(alone[0], images[row], rtol=1e-9)
        assert batch.rewards[table, group].item() == pytest.approx(nearer_half(alone, []).item())


@pytest.mark.parametrize("batch_size", [1, 4, 12, 100])
def test_rewards_do_not_depend_on_the_batch_size_or_the_share(batch_size: int, mixture: Gaussian) -> None:
    rollouts = rollouts_of(mixture, batch_size=batch_size)
    policy = policy_of(rollouts)
    draw = policy.draw(np.random.default_rng(0), 24)
    whole = rollouts_of(mixture).batch(policy, draw, 0, 6, 4, "prompt", slice(None)).rewards
    found = [rollouts.batch(policy, draw, 0, 6, 4, "prompt", part).rewards for part in (slice(0, 2), slice(2, 6))]
    assert torch.allclose(torch.cat(found, 1), whole, rtol=1e-12)


def test_rewards_are_computed_while_the_next_part_is_sampled(mixture: Gaussian) -> None:
    """The first part's reward waits for the second part's sampling: it would wait in vain if one came after the other."""
    sampled = threading.Event()
    waited = []

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        if not waited:
            waited.append(sampled.wait(timeout=20))
        return nearer_half(images, prompts)

    class Watched(Rollouts):
        parts = 0

        def images(self, *args: Any, **kwargs: Any) -> Any:
            self.parts += 1
            if self.parts == 2:
                sampled.set()
            return super().images(*args, **kwargs)

    plain = rollouts_of(mixture)
    rollouts = Watched(frozen_of(mixture), mixed(reward), plain.distilled, 0, 4)
    policy = policy_of(rollouts)
    rollouts.batch(policy, policy.draw(np.random.default_rng(0), 8), 0, 2, 4, "shared", slice(None))
    assert waited == [True]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda r: r[:-1], r"reward: shape \(31,\); valid: \(32,\), a number for each image; see data/failed/rdpo-1"),
        (lambda r: r[:, None], r"reward: shape \(32, 1\)"),
        (lambda r: r.tolist(), r"reward: list; valid"),
        (
            lambda r: r.index_fill(0, torch.tensor([3]), float("nan")),
            r"not finite for 1 of 32 images, by row \{3: \(nan, '\d'\)\}",
        ),
        (lambda r: r / 0, r"not finite for 32 of 32 images"),
        (lambda r: (_ for _ in ()).throw(RuntimeError("out of memory")), r"out of memory; see data/failed/rdpo-1"),
    ],
)
@pytest.mark.parametrize("method", ["rdpo", "reward_gradient", "cma_es"])
def test_a_failing_reward_stops_with_the_batch_saved(
    method: str, spoil: Any, message: str, mixture: Gaussian, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rollouts = rollouts_of(mixture, reward=lambda images, prompts: spoil(nearer_half(images, prompts)))
    step = METHODS[method](policy_of(rollouts), rollouts, Ranks(), settings(groups=8, tables=4), 0).step
    with pytest.raises(RolloutError, match=message):
        step(1)
    if method != "reward_gradient":
        with safe_open(tmp_path / "data/failed/rdpo-1-images-rank0.safetensors", framework="pt") as saved:
            assert saved.get_tensor("images").shape == (32, 1, 2, 2)
    file = tmp_path / "data/failed/rdpo-1-rank0.safetensors"
    with safe_open(file, framework="pt") as saved:
        assert saved.get_tensor("start").numel() == 4 * (8 * 4 if method == "reward_gradient" else 4 * 8)
        assert "segments" in set(saved.keys())
        assert len(json.loads(saved.metadata()["values"])["prompts"]) == (32 if method == "reward_gradient" else 8)


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux"])
def test_text_to_image_models_encode_a_prompt_once_and_get_no_gradient(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():  # of diffusers' own imports
        warnings.simplefilter("ignore")
        from tiny import TINY

        from backends.flux import Flux
        from backends.stable_diffusion import StableDiffusion
        from backends.stable_diffusion_3 import StableDiffusion3
    pipe: Any = TINY[family]()
    backend: Any = {"sd15": StableDiffusion, "sd3": StableDiffusion3, "flux": Flux}[family](pipe, 16, 16)
    encode, encoded = pipe.encode_prompt, list[str]()

    def watched(prompts: list[str], *args: Any, **kwargs: Any) -> Any:
        encoded.extend(prompts)
        return encode(prompts, *args, **kwargs)

    monkeypatch.setattr(pipe, "encode_prompt", watched)
    guidance_scale = 1.0 if family == "flux" else 3.0
    sigmas = logsnr(4, 0.03, 14.6) if family == "sd15" else flowmatch(4, 0.01, 1.0, 3.0)
    table, model = EPD(4, 2, 0.0, 0.0).requires_grad_(False).table(), Backbone(family, None, "none")
    rollouts = Rollouts(
        frozen_of(backend), mixed(nearer_half), Predictor(table, sigmas, False, model, guidance_scale, {}), 0, 64
    )
    policy = Policy(table, Spread(50.0), 16, 1)
    batch = rollouts.batch(policy, policy.draw(np.random.default_rng(0), 8), 0, 2, 4, "shared", slice(None))
    assert batch.rewards.std() > 0
    assert batch.rows == 2 * (4 * 9 - 3) * (1 if family == "flux" else 2)
    assert sorted(encoded) == (["0", "1"] if family == "flux" else ["", "0", "1"])
    method = METHODS["reward_gradient"](policy, rollouts, Ranks(), settings(groups=2, tables=2, method="reward_gradient"), 0)
    assert method.step(1)["gradient_norm"] > 0
    network = pipe.unet if family == "sd15" else pipe.transformer
    assert all(parameter.grad is None for parameter in network.parameters())


def mean_reward(rollouts: Rollouts, table: Drawable) -> Tensor:
    start = torch.randn(256, 1, 2, 2, generator=torch.Generator().manual_seed(9)).double()
    return nearer_half(rollouts.images(table, start, ["0"] * 256)[0], [])


@pytest.mark.parametrize("family", ["epd", "epd_plugin", "s4s", "parallel_multistep"])
@pytest.mark.parametrize(
    "chosen",
    [
        {"group": "shared"},
        {"group": "prompt"},
        {"draws": "sobol"},
        {"group": "mixed"},
        {"epochs": 2, "minibatch": 16, "learning_rate": 1e-3},
        {"kl": 1e-3, "entropy": 1e-3},
        {"method": "reward_gradient"},
        {"method": "cma_es"},
    ],
    ids=str,
)
def test_every_method_raises_the_reward_of_every_family(chosen: dict[str, Any], family: str, mixture: Gaussian) -> None:
    rollouts = rollouts_of(mixture, family)
    params = settings(**{"learning_rate": 3e-3, **chosen})
    policy = policy_of(rollouts)
    method = METHODS[params.method](policy, rollouts, Ranks(), params, 0)
    before = mean_reward(rollouts, method.table())
    rows = [method.step(iteration)["rows"] for iteration in range(1, 26)]
    assert min(rows) > 0
    gain = mean_reward(rollouts, method.table()) - before
    assert gain.mean() > 3 * gain.std() / 16
    assert method.kl() > 0


def test_the_kl_term_holds_the_policy_back(mixture: Gaussian) -> None:
    moved = []
    for kl in (0.0, 1.0):
        rollouts = rollouts_of(mixture)
        method = METHODS["rdpo"](policy_of(rollouts), rollouts, Ranks(), settings(kl=kl), 0)
        for iteration in range(1, 11):
            method.step(iteration)
        moved.append(method.kl())
    assert moved[1] < moved[0] / 2


def test_the_gradient_of_the_reward_is_that_of_finite_differences(mixture: Gaussian) -> None:
    """By where AdamW's first step goes: down the gradient of every parameter, by the learning rate."""
    rollouts = rollouts_of(mixture)
    params = settings(method="reward_gradient", learning_rate=1e-4)
    policy = policy_of(rollouts)
    method = METHODS["reward_gradient"](policy, rollouts, Ranks(), params, 0)
    from stages.noise import noise

    samples = range(64, 128)

    @torch.no_grad()
    def loss() -> float:
        images, _ = rollouts.images(policy.mean(), noise(0, "train", samples, (1, 2, 2)), rollouts.prompts("train", samples))
        return -nearer_half(images, []).mean().item()

    slopes = []
    for i in range(len(policy.head.bias)):
        with torch.no_grad():
            policy.head.bias[i] += 1e-5
            above = loss()
            policy.head.bias[i] -= 2e-5
            slopes.append((above - loss()) / 2e-5)
            policy.head.bias[i] += 1e-5
    before = policy.head.bias.detach().clone()
    found = method.step(1)
    assert found["reward"] == pytest.approx(-loss(), abs=1e-3)
    gradient = policy.head.bias.grad
    assert gradient is not None
    scale = min(1.0, 1.0 / found["gradient_norm"])
    assert torch.allclose(gradient, scale * torch.tensor(slopes).double(), rtol=1e-3, atol=1e-7)
    assert bool(((policy.head.bias - before).sign() == -torch.tensor(slopes).sign()).all())


def test_a_gradient_that_is_not_finite_is_told(mixture: Gaussian, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finite reward, by a root whose slope at 0 is infinite."""
    monkeypatch.chdir(tmp_path)
    rollouts = rollouts_of(mixture, reward=lambda images, prompts: (images * 0).sum((1, 2, 3)).sqrt())
    method = METHODS["reward_gradient"](policy_of(rollouts), rollouts, Ranks(), settings(method="reward_gradient"), 0)
    with pytest.raises(RolloutError, match=r"gradient by the table is not finite; valid: finite numbers; see data/fai"):
        method.step(1)


def test_rows_of_the_gradient_count_both_times_that_the_network_is_evaluated(mixture: Gaussian) -> None:
    rollouts = rollouts_of(mixture)
    method = METHODS["reward_gradient"](policy_of(rollouts), rollouts, Ranks(), settings(method="reward_gradient"), 0)
    assert method.step(1)["rows"] == 2 * 64 * 3 * (1 + 2)


def test_a_failure_of_another_kind_says_its_kind(mixture: Gaussian, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rollouts = rollouts_of(mixture, reward=lambda images, prompts: {}["input_ids"])
    method = METHODS["rdpo"](policy_of(rollouts), rollouts, Ranks(), settings(), 0)
    with pytest.raises(RolloutError, match=r"KeyError: 'input_ids'; see data/failed/rdpo-1-images-rank0.safetensors"):
        method.step(1)
    with safe_open(tmp_path / "data/failed/rdpo-1-images-rank0.safetensors", framework="pt") as saved:
        assert "Traceback" in json.loads(saved.metadata()["values"])["error"]


def test_a_reward_without_gradient_is_told(mixture: Gaussian, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rollouts = rollouts_of(mixture, reward=lambda images, prompts: nearer_half(images, prompts).detach())
    method = METHODS["reward_gradient"](policy_of(rollouts), rollouts, Ranks(), settings(method="reward_gradient"), 0)
    with pytest.raises(RolloutError, match=r"has no gradient; valid: a differentiable reward, or rdpo.method rdpo or cma_es"):
        method.step(1)


@pytest.mark.parametrize(
    "chosen",
    [{}, {"draws": "sobol"}, {"epochs": 2, "minibatch": 16}, {"method": "reward_gradient"}, {"method": "cma_es"}],
    ids=str,
)
def test_a_restored_method_goes_on_to_the_same_bits(chosen: dict[str, Any], mixture: Gaussian) -> None:
    rollouts, params = rollouts_of(mixture), settings(**chosen)

    def new() -> Any:
        return METHODS[params.method](policy_of(rollouts), rollouts, Ranks(), params, 0)

    whole, first, second = new(), new(), new()
    for iteration in range(1, 7):
        whole.step(iteration)
        if iteration <= 3:
            first.step(iteration)
    saved = {f"{part}.{name}": value for part, named in first.state().items() for name, value in named.items()}
    first.step(4)  # what was saved is a copy
    torch.manual_seed(99)
    second.restore(saved)
    for iteration in range(4, 7):
        second.step(iteration)
    for name, value in vars(whole.table()).items():
        if isinstance(value, Tensor):
            assert torch.equal(value, getattr(second.table(), name)), name


def test_the_published_configurations_are_what_was_published() -> None:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    published = {"group": "mixed", "tables": 4, "minibatch": 4, "learning_rate": 7e-5, "clip": 0.2, "epochs": 1, "kl": 0.0}
    published |= {"entropy": 0.0, "hidden": 128, "blocks": 2, "warmup": 0}
    of_backbones = {"published": (10.0, 8), "published_sd15": (20.0, 8), "published_sd3_512": (10.0, 16)}
    for name, (concentration, batch) in of_backbones.items():
        with initialize_config_dir(str(Path(__file__).parents[2] / "conf"), version_base=None):
            found = OmegaConf.to_container(compose("config", overrides=[f"rdpo={name}"]), resolve=True)
        whole = Params.model_validate(found)
        params = whole.rdpo
        assert not whole.afs
        assert published.items() <= params.model_dump().items()
        assert (params.concentration, params.groups * params.tables) == (concentration, batch)


@pytest.mark.parametrize("family", ["epd", "parallel_multistep"])
def test_quantiles_are_scipys(family: str) -> None:
    table, _ = table_of(family)
    policy = Policy(table, Spread(50.0, 0.05, 0.03, 0.02, 0.04), 8, 1)
    uniform = torch.rand(5, numbers_of(policy), generator=torch.Generator().manual_seed(0)).double()
    found, first = at_quantiles(policy, uniform), 0
    for name, distribution in policy.distributions().items():
        used = policy.parts[name].drawn()
        u = uniform[:, first : first + used.numel()].reshape(5, *used.shape).numpy()
        first += used.numel()
        if isinstance(distribution, Dirichlet):
            gamma = stats.gamma.ppf(u, distribution.concentration.detach().numpy())
            expected = gamma / gamma.sum(-1, keepdims=True)
        else:
            inner: Any = distribution.base_dist if isinstance(distribution, LogNormal) else distribution
            expected = stats.norm.ppf(u, inner.loc.detach().numpy(), inner.scale.detach().numpy())
            expected = np.exp(expected) if isinstance(distribution, LogNormal) else expected
        assert np.allclose(found[name].numpy(), expected, rtol=1e-8), name


@pytest.mark.parametrize("tables", [5, 8])
def test_a_groups_tables_are_spread_evenly(tables: int) -> None:
    """Their means over a group scatter less than those of independent ones, around the same mean."""
    table, _ = table_of("epd")
    policy = Policy(table, Spread(50.0, 0.05), 8, 1)  # type: ignore[arg-type]
    scatter = {}
    for spacing in ("sobol", "independent"):
        draw = drawn(policy, spacing, np.random.default_rng(0), 400, tables)
        means = policy.table(draw).position.unflatten(0, (tables, 400)).mean(0)  # type: ignore[union-attr]
        expected = policy.mean().position.detach()  # type: ignore[union-attr]
        assert torch.allclose(means.mean(0), expected, atol=5 * float(means.std(0).max()) / 20)
        scatter[spacing] = means.std(0)
    assert bool((scatter["sobol"] < 0.8 * scatter["independent"]).all())


def test_every_draw_depends_on_seed_and_iteration_alone() -> None:
    draws = [rng(seed, "rdpo", iteration).random() for seed in (0, 1) for iteration in (1, 2)]
    assert len(set(draws)) == 4
    assert rng(0, "rdpo", 1).random() == draws[0]
