"""Stage rdpo: the distilled table fine-tuned by reinforcement learning for the reward (RDPO)."""

from dataclasses import replace

import torch
from torch import Tensor

from backends import Digits, counted_denoiser
from metrics import Scorer
from metrics.frechet import JUDGE, Frechet, Statistics, distance, load_statistics, statistics
from metrics.log_probability import LogProbability
from solvers import AMED, Metric, Policy, Predictor, integrate, load_predictor, save_predictor
from solvers.families import Table
from stages.checkpoint import Checkpoint, adam_state, load_adam_state, under
from stages.command import command, progress
from stages.files import BACKBONE, DISTILLED, RDPO, REFS, RESULTS, InputError, atomic, reading, sha256, write_csv
from stages.noise import batches, noise, prompts
from stages.params import RDPO as RDPOParams  # noqa: N811
from stages.training import descend, rng, seeded

Curve = list[dict[str, float]]


class Rollouts:
    """Samples with any table in place of the distilled predictor's, and scores the images."""

    def __init__(self, backend: Digits, reward: Scorer, frechet: Frechet, refs: Statistics, distilled: Predictor) -> None:
        self.backend = backend
        self.reward = reward
        self.frechet = frechet
        self.refs = refs
        self.distilled = distilled

    @torch.no_grad()
    def images(self, table: Table, start: Tensor, wanted: list[str]) -> Tensor:
        """Unit noise (B, C, H, W) and B prompts -> images, by one table or by a batch of B tables."""
        predictor = replace(self.distilled, table=table)
        denoise, _ = counted_denoiser(self.backend, wanted, predictor.guidance_scale)
        return self.backend.decode(integrate(denoise, predictor, predictor.sigmas[0] * start, predictor.sigmas))

    def validate(self, table: Table, seed: int, samples: int) -> tuple[Tensor, float]:
        """Rewards on the validation noise, (samples,), and the Frechet distance."""
        wanted = prompts(range(samples))
        start = noise(seed, "validation", range(samples), self.backend.spec.shape)
        parts = (slice(batch.start, batch.stop) for batch in batches(samples, 512))
        images = torch.cat([self.images(table, start[part], wanted[part]) for part in parts])
        return self.reward(images, wanted), distance(statistics(self.frechet.features(images)), self.refs)


def rdpo(*, seed: int, rdpo: RDPOParams) -> None:
    """Maximise the reward over a policy of tables; deploy the best on validation noise that is no worse in distance."""
    with reading(BACKBONE):
        backend = Digits.load(BACKBONE / "unet.safetensors")
        reward = LogProbability(BACKBONE / "reward.safetensors")
        frechet = Frechet(JUDGE, BACKBONE / "judge.safetensors")
    with reading(REFS):
        refs = load_statistics(REFS)
    with reading(DISTILLED):
        distilled = load_predictor(DISTILLED)
        table = distilled.table
        if isinstance(table, AMED):
            raise InputError(f"{DISTILLED}: family amed; valid: epd or multistep, which have a table to draw around")
    rollouts = Rollouts(backend, reward, frechet, refs, distilled)
    scale_std = {"direction_scale": rdpo.direction_std, "time_scale": rdpo.time_std}
    policy = seeded(seed, "policy", lambda: Policy(table, rdpo.concentration, scale_std, rdpo.hidden, rdpo.blocks))
    # the KL term is what holds the policy back
    optimizer = torch.optim.AdamW(policy.parameters(), lr=rdpo.learning_rate, weight_decay=0.0)
    base_rewards, base_distance = rollouts.validate(policy.mean(), seed, rdpo.validation)
    curve: Curve = [point(0, base_rewards, base_rewards, base_distance, policy)]
    best, chosen = policy.mean(), curve[0]
    inputs = [*sorted(BACKBONE.iterdir()), REFS, *sorted(DISTILLED.iterdir())]
    checkpoint = Checkpoint("rdpo", {"seed": seed, "rdpo": rdpo}, inputs)
    if (saved := checkpoint.load()) is not None:
        tensors, values = saved
        policy.load_state_dict(under("policy", tensors))
        load_adam_state(optimizer, under("adam", tensors))
        best, curve, chosen = replace(policy.mean(), **under("best", tensors)), values["curve"], values["chosen"]
    done = int(curve[-1]["iteration"])
    bar = progress(range(done + 1, rdpo.iterations + 1), "rdpo", "iteration", done)
    for iteration in bar:
        mean = improve(policy, optimizer, rollouts, seed, iteration, rdpo)
        if iteration % rdpo.validate_every == 0 or iteration == rdpo.iterations:
            rewards, found = rollouts.validate(policy.mean(), seed, rdpo.validation)
            curve.append(point(iteration, rewards, base_rewards, found, policy))
            if found <= base_distance and curve[-1]["reward"] > chosen["reward"]:
                best, chosen = policy.mean(), curve[-1]
            bar.set_postfix(reward=f"{curve[-1]['reward']:.4f}", frechet=f"{found:.3f}", rollout=f"{mean:.3f}")
            parts = {
                "policy": policy.state_dict(),
                "adam": adam_state(optimizer),
                "best": {k: v for k, v in vars(best).items() if isinstance(v, Tensor)},
            }
            checkpoint.save(parts, {"curve": curve, "chosen": chosen})
    provenance = {
        "stage": "rdpo",
        "parameters": rdpo.model_dump(),
        "seed": seed,
        "parent_sha256": sha256(DISTILLED / "predictor.safetensors"),
        "chosen": {**chosen, "distilled_frechet_distance": base_distance},
    }
    metrics = (
        Metric("reward", chosen["reward"], chosen["reward_95"], rdpo.validation, "validation noise"),
        Metric("reward less the distilled", chosen["gain"], chosen["gain_95"], rdpo.validation, "the same, paired"),
    )
    write_csv(RESULTS / "rdpo.csv", [{**p, "deployed": int(p == chosen)} for p in curve])
    with atomic(RDPO) as folder:
        folder.mkdir()
        save_predictor(replace(distilled, table=best, provenance=provenance, metrics=metrics), folder, RDPO.name)
    checkpoint.remove()


def improve(
    policy: Policy, optimizer: torch.optim.Optimizer, rollouts: Rollouts, seed: int, iteration: int, rdpo: RDPOParams
) -> float:
    """One rollout and the gradient steps it allows (PPO's clipped objective and a KL term); returns its mean reward."""
    samples = range(iteration * rdpo.groups, (iteration + 1) * rdpo.groups)
    wanted = [prompt for prompt in prompts(samples) for _ in range(rdpo.tables)]
    start = noise(seed, "train", samples, rollouts.backend.spec.shape).repeat_interleave(rdpo.tables, 0)
    draw = policy.draw(rng(seed, "rdpo", iteration), len(wanted))
    rewards = rollouts.reward(rollouts.images(policy.table(draw), start, wanted), wanted)
    advantage = leave_one_out(rewards.view(rdpo.groups, rdpo.tables)).flatten()
    old = policy.log_prob(draw).detach()
    warmup = min(1.0, iteration / rdpo.warmup) if rdpo.warmup else 1.0
    for _ in range(rdpo.epochs):
        ratio = (policy.log_prob(draw) - old).exp()
        clipped = ratio.clamp(1 - rdpo.clip, 1 + rdpo.clip)
        loss = torch.maximum(-advantage * ratio, -advantage * clipped).mean() + rdpo.kl * policy.kl()
        descend(optimizer, loss, warmup)
    return rewards.mean().item()


def leave_one_out(rewards: Tensor) -> Tensor:
    """Rewards (groups, tables) less the mean of the others in their group, over the standard deviation of them all."""
    advantage = (rewards - rewards.mean(1, keepdim=True)) * rewards.shape[1] / (rewards.shape[1] - 1)
    return advantage / advantage.std().clamp_min(1e-8)  # all rewards equal: no advantage, not a division by 0


def point(iteration: int, rewards: Tensor, base: Tensor, found: float, policy: Policy) -> dict[str, float]:
    """One point of the curve: reward and its paired gain over the distilled table with a 95 % interval, distance, KL."""
    gain = rewards - base
    return {
        "iteration": iteration,
        "reward": rewards.mean().item(),
        "reward_95": 1.96 * rewards.std().item() / len(rewards) ** 0.5,
        "gain": gain.mean().item(),
        "gain_95": 1.96 * gain.std().item() / len(gain) ** 0.5,
        "frechet_distance": found,
        "kl": policy.kl().item(),
    }


if __name__ == "__main__":
    command(rdpo)
