"""RDPO's ways to compare tables, and its rivals, by the rollouts that they take, on the digits backbone.

Run after `make run`, about forty minutes on two cores; what is done is kept in data/bench, so that it goes on where it was
stopped:

    python bench/rdpo.py      # writes bench/rdpo.md and bench/rdpo.svg
"""

import sys
from pathlib import Path

# or bench/solvers.py would hide the package
sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

import datetime
import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from statistics import median
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from metrics import Scorer
from metrics.accuracy import Accuracy
from metrics.extractors import judge
from metrics.frechet import load_statistics, lowest
from metrics.log_probability import LogProbability
from metrics.mixture import Mixture, Part
from solvers import Draw, Drawable, Policy, load_predictor
from stages.draws import at_quantiles, drawn, numbers_of
from stages.files import BACKBONE, DISTILLED, REFS, sha256, write_json
from stages.frozen import Frozen, load_frozen
from stages.methods import METHODS, Method, advantages
from stages.noise import batches, noise
from stages.params import RDPO, load_params
from stages.ranks import Ranks
from stages.rdpo import new_policy
from stages.rollouts import Rollouts
from stages.statistics import half_interval
from stages.validation import Validation, Watch

SEED, SEEDS, PILOTS = 0, (1, 2, 3, 4, 5), (6, 7)
VALIDATION, TEST, ITERATIONS = 256, 4096, 200
FOLDER = Path("data/bench/rdpo")
RATES = (1e-4, 3e-4, 1e-3)
PUBLISHED = {"groups": 2, "tables": 4, "minibatch": 4, "warmup": 0, "kl": 0.0}
"""Published settings; spread and network are the pipeline's."""
FAR = 10
"""Size of a prompt's offset, in standard deviations of a drawn table's mean reward."""
SHARE = 0.9

LEARNED: dict[str, list[dict[str, Any]]] = {
    "shared": [{**PUBLISHED, "group": "shared", "learning_rate": rate} for rate in RATES],
    "prompt": [{**PUBLISHED, "group": "prompt", "learning_rate": rate} for rate in RATES],
    "mixed": [{**PUBLISHED, "group": "mixed", "learning_rate": rate} for rate in RATES],
    "reward_gradient": [{**PUBLISHED, "method": "reward_gradient", "learning_rate": rate} for rate in RATES],
    "cma_es": [{"method": "cma_es", "groups": groups, "tables": tables} for groups, tables in ((1, 8), (2, 16), (4, 16))],
}
OFFSET_MIXED = "mixed, with offset"
DEPLOYED: dict[str, dict[str, Any]] = {
    "shared": {},
    "prompt": {"group": "prompt"},
    "mixed": {"group": "mixed"},
    OFFSET_MIXED: {"group": "mixed"},
    "reward_gradient": {"method": "reward_gradient"},
    "cma_es": {"method": "cma_es"},
}


@cache
def parts() -> tuple[Frozen, LogProbability, Any]:
    """The frozen model, the reward, the distilled predictor."""
    torch.set_num_threads(1)
    return (
        load_frozen(1.0, load_params().compute, {}),
        LogProbability(BACKBONE / "reward.safetensors"),
        load_predictor(DISTILLED),
    )


class Offset:
    """The reward, and a number of its own for every prompt."""

    def __init__(self, reward: Scorer, size: float) -> None:
        self.reward = reward
        self.offsets = dict(zip("0123456789", size * np.random.default_rng(SEED).standard_normal(10), strict=True))

    def __call__(self, images: Tensor, wanted: Sequence[str]) -> Tensor:
        return self.reward(images, wanted) + torch.tensor([self.offsets[prompt] for prompt in wanted])


def mixed(reward: Scorer) -> Mixture:
    return Mixture({"log_probability": Part(reward)})


def settings(changes: dict[str, Any]) -> RDPO:
    return RDPO.model_validate({**load_params().rdpo.model_dump(), **changes})


def digest(changes: dict[str, Any]) -> str:
    """Of the settings and the models; after a change of code, data/bench/rdpo is to be deleted."""
    models = [sha256(file) for folder in (BACKBONE, DISTILLED) for file in sorted(folder.glob("*.safetensors"))]
    return hashlib.sha256(json.dumps([settings(changes).model_dump(), models]).encode()).hexdigest()[:12]


def method_of(changes: dict[str, Any], seed: int, offset: float) -> Method:
    frozen, reward, distilled = parts()
    chosen = settings(changes)
    rollouts = Rollouts(frozen, mixed(Offset(reward, offset) if offset else reward), distilled, seed, 512)
    return METHODS[chosen.method](new_policy(distilled.table, chosen, seed), rollouts, Ranks(), chosen, seed)


@torch.no_grad()
def scores(table: Drawable, split: str, samples: int, scorers: Mapping[str, Scorer]) -> dict[str, Tensor]:
    """Of the images of one table, by name of the scorer."""
    frozen, reward, distilled = parts()
    rollouts = Rollouts(frozen, mixed(reward), distilled, SEED, 512)
    found: dict[str, list[Tensor]] = {name: [] for name in scorers}
    for batch in batches(samples, 512):
        wanted = frozen.prompts(split, batch)
        images, _ = rollouts.images(table, noise(SEED, split, batch, frozen.backend.spec.shape), wanted)
        for name, scorer in scorers.items():
            found[name].append(scorer(images, wanted))
    return {name: torch.cat(values) for name, values in found.items()}


def table_effect() -> float:
    """Standard deviation between drawn tables of the mean reward on the same 256 samples."""
    method = method_of({}, SEED, 0.0)
    draw = method.policy.draw(np.random.default_rng(SEED), 64)
    tables = [method.policy.table({name: value[i] for name, value in draw.items()}) for i in range(64)]
    reward = {"reward": parts()[1]}
    return torch.stack([scores(table, "validation", VALIDATION, reward)["reward"].mean() for table in tables]).std().item()


def learn(name: str, changes: dict[str, Any], seed: int, offset: float) -> list[list[float]]:
    """(rollouts, network rows, gain, half its interval) from time to time; the gain is without offset."""
    file = FOLDER / f"{name}-{digest(changes)}-{seed}-{offset:.3f}.json"
    if file.exists():
        return json.loads(file.read_text())
    method = method_of(changes, seed, offset)
    chosen, reward = method.settings, {"reward": parts()[1]}
    start = scores(method.table(), "validation", VALIDATION, reward)["reward"]
    curve, rollouts, rows, each = [[0.0, 0.0, 0.0, 0.0]], 0, 0.0, chosen.groups * chosen.tables
    while rollouts < ITERATIONS * 8:
        rows += method.step(rollouts // each + 1)["rows"]
        rollouts += each
        if rollouts <= 80 or (rollouts % 16 == 0 and rollouts <= 320) or rollouts % 64 == 0:
            gain = scores(method.table(), "validation", VALIDATION, reward)["reward"] - start
            curve.append([float(rollouts), rows, gain.mean().item(), half_interval(gain)])
    write_json(file, curve)
    return curve


def deploy(name: str, changes: dict[str, Any], seed: int, offset: float) -> dict[str, float]:
    """What the pipeline's settings and its rule deploy, on test noise, against the distilled table."""
    file = FOLDER / f"deployed-{name.replace(', ', '-').replace(' ', '-')}-{digest(changes)}-{seed}.json"
    if file.exists():
        return json.loads(file.read_text())
    torch.set_num_threads(1)
    reward = parts()[1]
    file = BACKBONE / "judge.safetensors"
    accuracy, extractor = Accuracy(file), judge(file)
    watch = Watch({"accuracy": accuracy}, {}, extractor, load_statistics(REFS))
    method = method_of(changes, seed, offset)
    start = best = method.table()
    validation = Validation(method.rollouts, watch, Ranks(), SEED, 2048)
    validation.begin(start)
    gain, iteration, rows = 0.0, 0, 0.0
    for i in range(1, method.settings.iterations + 1):
        rows += method.step(i)["rows"]
        if i % method.settings.validate_every == 0:
            point = validation.point(i, method.table(), method.kl())
            if point["gain"] > gain and not validation.worse(point):
                best, gain, iteration = method.table(), point["gain"], i
    scorers = {"reward": reward, "accuracy": accuracy, "features": lambda images, wanted: extractor(images)}
    before, after = scores(start, "test", TEST, scorers), scores(best, "test", TEST, scorers)
    distances = [lowest(found["features"], watch.refs) for found in (before, after)]
    found = {"iteration": iteration, "rows": rows}
    for key in ("reward", "accuracy"):
        change = after[key] - before[key]
        found |= {key: change.mean().item(), f"{key}_95": half_interval(change)}
    found["fd"] = distances[1].value - distances[0].value
    found["fd_95"] = half_interval(distances[1].influence - distances[0].influence)
    write_json(file, found)
    return found


def draw_of(policy: Policy, how: str, groups: int, tables: int, rng: np.random.Generator) -> Draw:
    """Of k tables for each of G groups, by j G + g."""
    if how == "sobol":
        return drawn(policy, "sobol", rng, groups, tables)
    found = rng.random((tables, groups, numbers_of(policy)))
    if how == "antithetic":
        half = rng.random((tables // 2, groups, numbers_of(policy)))
        found = np.concatenate([half, 1 - half])
    return at_quantiles(policy, torch.from_numpy(found).flatten(0, 1))


def gradient(how: str, groups: int, tables: int, i: int) -> Tensor:
    """Of the surrogate, at the policy's start, by the weights of its last layer."""
    method = method_of({"groups": groups, "tables": tables, "group": "shared"}, SEED, 0.0)
    policy = method.policy
    draw = draw_of(policy, how, groups, tables, np.random.default_rng([SEED, i]))
    advantage = advantages(method.rewards(draw, i, "shared")[0], "shared").flatten()
    (found,) = torch.autograd.grad(-(advantage * policy.log_prob(draw)).mean(), [policy.head.weight])
    return found.flatten()


def alignment(how: str, groups: int, tables: int) -> list[float]:
    """Cosines of gradients with the mean of many independent ones."""
    file = FOLDER / f"gradient-{how}-{digest({})}-{groups}-{tables}.json"
    if not file.exists():
        torch.set_num_threads(1)
        mean = torch.stack([gradient("independent", 64, 8, 1000 + i) for i in range(24)]).mean(0)
        found = [gradient(how, groups, tables, i) for i in range(120)]
        write_json(file, [torch.cosine_similarity(each, mean, 0).item() for each in found])
    return json.loads(file.read_text())


def cost(curve: list[list[float]], goal: float) -> dict[str, float]:
    """Rollouts until a gain first comes, until it stays, and network rows until then; infinite where that never is."""
    first = next((p for p in curve if p[2] >= goal), None)
    below = max((i for i, p in enumerate(curve) if p[2] < goal), default=-1)
    stays = curve[below + 1] if below + 1 < len(curve) else None
    never = float("inf")
    return {
        "first": first[0] if first else never,
        "stays": stays[0] if stays else never,
        "rows": stays[1] if stays else never,
        "rows per gain": stays[1] / stays[2] if stays else never,
    }


def pick(name: str, offset: float, pool: ProcessPoolExecutor) -> list[Any]:
    """The pilots' runs of every setting."""
    return [[pool.submit(learn, name, changes, seed, offset) for seed in PILOTS] for changes in LEARNED[name]]


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    effect = table_effect()
    offsets = (0.0, FAR * effect)
    with ProcessPoolExecutor(2) as pool:
        pilots = {(name, offset): pick(name, offset, pool) for offset in offsets for name in LEARNED}
        deployed = {
            name: [pool.submit(deploy, name, c, seed, offsets[name == OFFSET_MIXED]) for seed in SEEDS[:3]]
            for name, c in DEPLOYED.items()
        }
        aligned = {
            (how, *size): pool.submit(alignment, how, *size)
            for size in ((2, 4), (16, 8))
            for how in ("independent", "antithetic", "sobol")
        }
        bar = tqdm(pilots.items(), desc="pilots")
        goal = SHARE * max(run.result()[-1][2] for _, runs in bar for setting in runs for run in setting)
        best = {}
        for (name, offset), runs in pilots.items():
            # but for mixed an offset changes nothing, so that runs with one are as good a pilot
            seen = [runs] if name == "mixed" else [pilots[name, each] for each in offsets]
            costs = [
                sum(min(cost(run.result(), goal)["stays"], 1e9) for each in seen for run in each[i]) for i in range(len(runs))
            ]
            best[name, offset] = LEARNED[name][int(np.argmin(costs))]
        learned = {key: [pool.submit(learn, key[0], changes, seed, key[1]) for seed in SEEDS] for key, changes in best.items()}
        curves = {key: [run.result() for run in runs] for key, runs in tqdm(learned.items(), desc="seeds")}
        goal = SHARE * max(median(curve[-1][2] for curve in each) for each in curves.values())
        lines = [*heading(effect, goal), *learning(curves, best, goal, offsets), *deployment(deployed), *draws(aligned)]
    Path("bench/rdpo.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    picture(curves, offsets, goal)
    print("\n".join(lines))


def heading(effect: float, goal: float) -> list[str]:
    where = f"one thread of {platform.machine()} each, torch {torch.__version__}, no GPU, {datetime.date.today()}"
    return [
        f"`python bench/rdpo.py`; {where}.",
        "",
        "## Rollouts until the gain",
        "",
        f"Rollouts (images scored) until the mean table's paired gain over the distilled one, on {VALIDATION} samples of",
        f"validation noise, first reaches {goal:.4f}, and until it stays there to the end of {ITERATIONS * 8} rollouts: that",
        f"is {SHARE:.0%} of the best method's median gain at the end. Median and range of {len(SEEDS)} seeds. The reward is",
        "log-probability, or that with an offset for each of the ten prompts, of standard deviation",
        f"{FAR * effect:.2f}: {FAR} times that of a drawn table's mean reward, {effect:.3f}. Two prompts of four tables an",
        "iteration, minibatches of 4, clip 0.2, as published; spread and network are the pipeline's. Each method is at the",
        f"learning rate of {', '.join(f'{rate:g}' for rate in RATES)} (cma_es: size of a generation) at which it was first to",
        "stay there on two other seeds, with and without offset together but for mixed, the only one that sees it. rows:",
        "evaluations of the network until then (reward_gradient makes each twice; its backward pass is not counted), and per",
        "unit of gain. What the reward alone drives to may not be deployed: see below.",
        "",
    ]


def learning(curves: Any, best: Any, goal: float, offsets: tuple[float, float]) -> list[str]:
    lines = [
        "| offset | method | setting | first | of mixed's | stays | of mixed's | rows | rows per gain | gain at the end |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for offset in offsets:
        costs = {name: [cost(curve, goal) for curve in curves[name, offset]] for name in LEARNED}
        each = {name: {key: [c[key] for c in costs[name]] for key in costs[name][0]} for name in LEARNED}
        for name, found in each.items():
            changes, last = best[name, offset], [curve[-1][2] for curve in curves[name, offset]]
            setting = f"{changes['groups']} x {changes['tables']}" if name == "cma_es" else f"{changes['learning_rate']:g}"
            cells = [f"{offset:.2f}", name, setting]
            for key in ("first", "stays"):
                cells += [spread(found[key]), f"{median(found[key]) / median(each['mixed'][key]):.2f}"]
            cells += [spread(found["rows"]), spread(found["rows per gain"])]
            lines.append(f"| {' | '.join(cells)} | {median(last):.3f} [{min(last):.3f}, {max(last):.3f}] |")
    return [*lines, "", "![Gain against rollouts](rdpo.svg)", ""]


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    shown = [f"{v:.0f}" if v < float("inf") else "never" for v in (median(values), min(values), max(values))]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


def deployment(runs: dict[str, Any]) -> list[str]:
    lines = [
        "## What may be deployed",
        "",
        f"The pipeline's settings (16 prompts of 8 tables, {load_params().rdpo.iterations} iterations, all of them) and choice",
        "(the best validation reward among tables whose Frechet distance and accuracy are no worse). Offsets change nothing",
        f"but for mixed. Paired differences to the distilled table on {TEST} test samples, ± half a 95 % interval.",
        "One line a seed.",
        "",
        "| method | iteration | reward | accuracy by the judge | FD | rows |",
        "|---|---|---|---|---|---|",
    ]
    for name, results in runs.items():
        for run in results:
            r = run.result()
            numbers = [f"{r[key]:+.4f} ± {r[f'{key}_95']:.4f}" for key in ("reward", "accuracy", "fd")]
            lines.append(f"| {name} | {r['iteration']:.0f} | {' | '.join(numbers)} | {r['rows']:.0f} |")
    return [*lines, ""]


def draws(runs: dict[tuple[str, int, int], Any]) -> list[str]:
    lines = [
        "## Antithetic and quasi-random tables",
        "",
        "Cosine of one iteration's gradient with the mean gradient of 12,288 rollouts, at the policy's start, on shared",
        "noise: mean of 120 iterations ± half a 95 % interval. antithetic: pairs in a group; Sobol: a scrambled sequence in",
        "each group.",
        "",
        "| prompts x tables | independent | antithetic | Sobol |",
        "|---|---|---|---|",
    ]
    for groups, tables in ((2, 4), (16, 8)):
        cells = []
        for how in ("independent", "antithetic", "sobol"):
            values = torch.tensor(runs[how, groups, tables].result())
            cells.append(f"{values.mean():.3f} ± {half_interval(values):.3f}")
        lines.append(f"| {groups} x {tables} | {' | '.join(cells)} |")
    return lines


def picture(curves: Any, offsets: tuple[float, float], goal: float) -> None:
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, offset in zip(axes, offsets, strict=True):
        for name in LEARNED:
            each = curves[name, offset]
            rollouts, gains = [p[0] for p in each[0][1:]], np.array([[p[2] for p in curve[1:]] for curve in each])
            (line,) = ax.plot(rollouts, np.median(gains, 0), marker=".", markersize=3, label=name)
            ax.fill_between(rollouts, gains.min(0), gains.max(0), color=line.get_color(), alpha=0.15)
        ax.axhline(goal, color="grey", linestyle=":")
        ax.set_xscale("log")
        ax.set_ylim(-0.15, 0.14)
        ax.set_title("no offset" if not offset else f"offset of each prompt: standard deviation {offset:.2f}")
        ax.set_xlabel("rollouts")
    axes[0].set_ylabel("paired gain on validation noise")
    axes[0].legend(loc="lower right")
    figure.savefig("bench/rdpo.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
