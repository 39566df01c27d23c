"""Every solver on the digits backbone at 3, 5, 7 and 9 serial evaluations: quality, cost, and what each costs in compute.

Schedules, the analytical first step and the iteration of a training are chosen on validation noise; the table is of test noise.
Run after `make run`, about an hour on two cores; what is done is kept in data/bench, so that it goes on where it was stopped:

    python bench/solvers.py      # writes bench/solvers.md and bench/solvers.svg
"""

import sys
from pathlib import Path

# or bench/solvers.py would hide the package
sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != Path(__file__).resolve().parent]

import datetime
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from pydantic import TypeAdapter
from torch import Tensor
from tqdm import tqdm

from metrics.accuracy import Accuracy
from metrics.extractors import judge
from metrics.frechet import load_statistics, lowest
from solvers import AFS, SOLVERS, Predictor, Solver, load_predictor, save_predictor
from stages import params
from stages.distill import Learned, Sampling, closed_form, end_error, learn, new_student
from stages.files import BACKBONE, REFS, read_tensors, write_json, write_tensors
from stages.frozen import Frozen, load_frozen
from stages.grid import grid
from stages.noise import batches
from stages.params import (
    Classical,
    Distill,
    LogSNR,
    Polynomial,
    Schedule,
    TimeUniform,
    classical_nodes,
    load_params,
    serial_evaluations,
)
from stages.sampling import Run
from stages.statistics import half_interval
from stages.teacher import run as teach
from stages.training import seeded

BUDGETS = (3, 5, 7, 9)
SCHEDULES: dict[str, Schedule] = {
    "polynomial 7": Polynomial(name="polynomial", rho=7.0),
    "logsnr": LogSNR(name="logsnr"),
    "time_uniform 1": TimeUniform(name="time_uniform", rho=1.0),
    "time_uniform 2": TimeUniform(name="time_uniform", rho=2.0),
    "time_uniform 3": TimeUniform(name="time_uniform", rho=3.0),
}
SEED, VALIDATION, TRAIN, TEST, PART, PILOT = 0, 512, 1024, 4096, 512, 50
FOLDER = Path("data/bench")
FIXED_GRIDS = ("polynomial 7", "time_uniform 2")
CONF = Path(__file__).parents[1] / "conf"


def family(name: str, *overrides: str) -> Distill:
    """The settings that conf/ has for a family."""
    with initialize_config_dir(str(CONF), version_base=None):
        composed = compose("config", [f"family={name}", *overrides])
    return TypeAdapter(Distill).validate_python(OmegaConf.to_container(composed.distill, resolve=True))


FAMILIES: dict[str, tuple[Distill, tuple[str, ...]]] = {
    "EPD, K 2": (family("epd"), FIXED_GRIDS),
    "EPD-Plugin, K 2": (family("epd_plugin"), FIXED_GRIDS),
    "AMED": (family("amed"), FIXED_GRIDS),
    "D-ODE": (family("d_ode"), tuple(SCHEDULES)),
    "S4S": (family("s4s"), FIXED_GRIDS),
    "S4S-Alt": (family("s4s_alt"), ("time_uniform 2",)),
    "parallel multistep, K 1": (family("parallel_multistep", "distill.points=1"), ("time_uniform 2",)),
    "parallel multistep, K 2": (family("parallel_multistep"), ("time_uniform 2",)),
    "parallel multistep, K 3": (family("parallel_multistep", "distill.points=3"), ("time_uniform 2",)),
}
BEST = 8
LEFT_OUT = {(9, "parallel multistep, K 1"), (9, "parallel multistep, K 3")}  # among the longest trainings
CLASSICAL = [name for name in SOLVERS if not name.endswith(("_1", "_1m"))] + ["unipc_1", "unipc_bh1_1", "unipc_noise_1"]
"""Without the first-order names that are Euler's method under another."""


@dataclass
class Bench:
    """The units of work. What one has made is kept in the folder under its name: to do it again, remove it."""

    folder: Path
    frozen: Frozen
    guidance_scale: float = 1.0

    def run(self, solver: Solver, sigmas: Tensor, split: str, samples: range) -> dict[str, Tensor]:
        """End points of given samples, and their cost."""
        return Run(solver, sigmas, self.guidance_scale, SEED).states(self.frozen, split, samples)

    def reference(self, split: str, samples: range) -> Tensor:
        """End points of 256 steps of Heun's method."""
        sigmas = grid(SCHEDULES["time_uniform 2"], 257, self.frozen.backend.spec)

        def make() -> Tensor:
            return self.run(SOLVERS["heun"], sigmas, split, samples)["states"]

        return self._tensor(f"reference-{split}-{samples.start}-{samples.stop}", make)

    def _tensor(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        file = self.folder / f"{name}.safetensors"
        if not file.exists():
            write_tensors(file, {"states": make()}, {})
        return read_tensors(file)[0]["states"]

    def teacher(self, split: str, samples: int, schedule: str, num_steps: int) -> tuple[Tensor, Tensor]:
        """The nodes of a student's grid, and Heun's states there on a grid of 48 intervals or somewhat more."""
        every = -(-48 // (num_steps - 1))
        fine = grid(SCHEDULES[schedule], every * (num_steps - 1) + 1, self.frozen.backend.spec)

        def make() -> Tensor:
            parts = [
                teach(self.frozen, self.guidance_scale, SOLVERS["heun"], fine, SEED, split, part)[:, ::every]
                for part in batches(samples, 256)
            ]
            return torch.cat(parts)

        return fine[::every].clone(), self._tensor(f"teacher-{split}-{schedule}-{num_steps}", make)

    def chosen_classical(self, budget: int, solver: str) -> dict[str, Any] | None:
        """The schedule and AFS of the least validation error, with that; None where no grid makes so many evaluations."""
        grids = [
            (name, afs, grid(schedule, nodes[0], self.frozen.backend.spec))
            for name, schedule in SCHEDULES.items()
            for afs in (False, True)
            if (nodes := classical_nodes(classical(solver, schedule, afs), budget)) is not None
        ]
        wanted = self.reference("validation", range(VALIDATION))
        found = [
            {"schedule": name, "afs": afs, "num_steps": len(sigmas), "rmse": self._rmse(made(solver, afs), sigmas, wanted)}
            for name, afs, sigmas in grids
        ]
        return min(found, key=lambda choice: choice["rmse"], default=None)

    def _rmse(self, solver: Solver, sigmas: Tensor, wanted: Tensor) -> float:
        states = self.run(solver, sigmas, "validation", range(len(wanted)))["states"]
        return (states - wanted).square().mean().sqrt().item()

    def learned(self, budget: int, family: str) -> dict[str, Any]:
        """Train on the schedule that a short training does best on, by validation error; returns where the predictor is."""
        settings, schedules = FAMILIES[family]
        num_steps = next(n for n in range(2, budget + 3) if serial_evaluations(n, True, settings) == budget)
        short = settings if isinstance(settings, params.DODE) else settings.model_copy(update={"iterations": PILOT})
        pilots = {
            name: self._train(short, name, num_steps).chosen["validation_rmse"] for name in schedules[len(schedules) == 1 :]
        }
        schedule = min(pilots, key=lambda name: pilots[name], default=schedules[0])
        learned = self._train(settings, schedule, num_steps)
        folder = self.folder / f"predictor-{budget}-{family}"
        folder.mkdir(exist_ok=True)
        save_predictor(Predictor(learned.table, learned.sigmas, True, self.frozen.identity, self.guidance_scale, {}), folder)
        where = {"predictor": str(folder), "settings": settings.model_dump()}
        return {"schedule": schedule, "afs": True, "num_steps": num_steps, **where}

    def _train(self, settings: Distill, schedule: str, num_steps: int) -> Learned:
        sigmas, train = self.teacher("train", TRAIN, schedule, num_steps)
        _, validation = self.teacher("validation", VALIDATION, schedule, num_steps)
        sampling = Sampling(self.frozen, self.guidance_scale, True, sigmas)
        if isinstance(settings, params.DODE):
            return closed_form(sampling, train, validation, settings.batch_size)
        with torch.enable_grad():
            student = seeded(SEED, "student", lambda: new_student(settings, sigmas, self.frozen.backend.spec.features))
            return learn(student, sampling, train, validation, settings, end_error, SEED)

    def tested(self, name: str, choice: dict[str, Any]) -> dict[str, Any]:
        """What a chosen sampler makes of the test noise; by how much each image moves its RMSE and its distances is kept."""
        solver, sigmas = self.sampler(name, choice)
        parts = [self.run(solver, sigmas, "test", part) for part in batches(TEST, PART)]
        states = torch.cat([part["states"] for part in parts])
        wanted = torch.cat([self.reference("test", part) for part in batches(TEST, PART)])
        squared = (states - wanted).square().flatten(1).mean(1)
        extractor = judge(BACKBONE / "judge.safetensors")
        features, reference = (extractor(self.frozen.backend.decode(x)) for x in (states, wanted))
        rmse = squared.mean().sqrt()
        frechet, to_digits = lowest(features, reference), lowest(features, load_statistics(REFS))
        accuracy = Accuracy(BACKBONE / "judge.safetensors")(
            self.frozen.backend.decode(states), self.frozen.prompts("test", range(TEST))
        )
        return {
            "serial": int(parts[0]["serial"][0].item()),
            "total": torch.cat([part["total"] for part in parts]).mean().item(),
            "rmse": rmse.item(),
            "rmse_influence": ((squared - squared.mean()) / (2 * rmse)).tolist(),
            "frechet": frechet.value,
            "frechet_influence": frechet.influence.tolist(),
            "frechet_digits": to_digits.value,
            "frechet_digits_influence": to_digits.influence.tolist(),
            "accuracy": accuracy.mean().item(),
            "accuracy_se": accuracy.std().item() / TEST**0.5,
        }

    def sampler(self, name: str, choice: dict[str, Any]) -> tuple[Solver, Tensor]:
        """A chosen sampler and its grid."""
        if "predictor" in choice:
            predictor = load_predictor(choice["predictor"])
            return predictor, predictor.sigmas
        return made(name, choice["afs"]), grid(SCHEDULES[choice["schedule"]], choice["num_steps"], self.frozen.backend.spec)

    def seconds_per_image(self, name: str, choice: dict[str, Any]) -> float:
        """Of a batch of 64, the least of five."""
        solver, sigmas = self.sampler(name, choice)
        times = []
        for _ in range(5):
            started = time.perf_counter()
            self.run(solver, sigmas, "validation", range(64))
            times.append(time.perf_counter() - started)
        return min(times) / 64


def classical(solver: str, schedule: Schedule, afs: bool) -> Classical:
    """As params.yaml would have it, of as many nodes as make the evaluations."""
    fields = {"solver": solver, "model": "models/backbone", "schedule": schedule, "afs": afs, "num_steps": None}
    return Classical.model_validate(fields)


def made(solver: str, afs: bool) -> Solver:
    return AFS(SOLVERS[solver]) if afs else SOLVERS[solver]


def unit(task: tuple[str, tuple[Any, ...]]) -> Any:
    """One unit of work in a process of its own, read from its file where it is done."""
    method, arguments = task
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    bench = Bench(FOLDER, load_frozen(1.0, load_params().compute, {}))
    if method == "reference":
        bench.reference(*arguments)
        return None
    settings = FAMILIES[arguments[1]][0].model_dump() if method == "learned" else None
    key = hashlib.sha256(json.dumps([method, arguments, settings], sort_keys=True).encode()).hexdigest()[:16]
    file = FOLDER / f"{method}-{key}.json"
    if not file.exists():
        write_json(file, {"result": getattr(bench, method)(*arguments)})
    return json.loads(file.read_text())["result"]


def all_of(title: str, tasks: list[tuple[str, tuple[Any, ...]]]) -> list[Any]:
    with ProcessPoolExecutor(mp_context=torch.multiprocessing.get_context("spawn")) as pool:
        return list(tqdm(pool.map(unit, tasks), desc=title, total=len(tasks)))


def main() -> None:
    """Choose, train, test, time; then write the table and the picture."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    parts = [("validation", range(VALIDATION)), *(("test", part) for part in batches(TEST, PART))]
    all_of("references", [("reference", part) for part in parts])
    pairs = [(budget, name) for budget in BUDGETS for name in CLASSICAL]
    choices = dict(zip(pairs, all_of("classical", [("chosen_classical", pair) for pair in pairs]), strict=True))
    trained = [(budget, family) for budget in BUDGETS for family in FAMILIES if (budget, family) not in LEFT_OUT]
    choices |= dict(zip(trained, all_of("learned", [("learned", pair) for pair in trained]), strict=True))
    choices = {pair: choice for pair, choice in choices.items() if choice is not None and is_tested(pair, choices)}
    tests = all_of("test", [("tested", (name, choice)) for (_, name), choice in choices.items()])
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    bench = Bench(FOLDER, load_frozen(1.0, load_params().compute, {}))
    rows = [
        Row(budget, name, choice, test, bench.seconds_per_image(name, choice))
        for ((budget, name), choice), test in zip(tqdm(choices.items(), "seconds"), tests, strict=True)
    ]
    here = Path(__file__)
    here.with_suffix(".md").write_text(page(rows), encoding="utf-8")
    picture(rows).savefig(here.with_suffix(".svg"))


def is_tested(pair: tuple[int, str], choices: dict[tuple[int, str], dict[str, Any] | None]) -> bool:
    """All solvers at 5 evaluations; elsewhere the learned ones, those of the picture, and the best by validation noise."""
    budget, name = pair
    if budget == 5 or name in SHOWN:
        return True
    errors = sorted(
        choice["rmse"] for (b, n), choice in choices.items() if b == budget and n in CLASSICAL and choice is not None
    )
    choice = choices[pair]
    return choice is not None and choice["rmse"] <= errors[BEST - 1]


@dataclass
class Row:
    budget: int
    name: str
    choice: dict[str, Any]
    test: dict[str, Any]
    seconds: float

    @property
    def learned(self) -> bool:
        return self.name in FAMILIES

    def cells(self) -> list[str]:
        def with_error(key: str, digits: int) -> str:
            return f"{self.test[key]:.{digits}f} ± {half_interval(torch.tensor(self.test[f'{key}_influence'])):.{digits}f}"

        return [
            f"**{self.name}**" if self.learned else self.name,
            self.choice["schedule"],
            "yes" if self.choice["afs"] else "no",
            str(self.test["serial"]),
            f"{self.test['total']:g}",
            with_error("rmse", 4),
            with_error("frechet", 4),
            with_error("frechet_digits", 2),
            f"{self.test['accuracy']:.4f} ± {1.96 * self.test['accuracy_se']:.4f}",
            f"{1000 * self.seconds:.2f}",
        ]


COLUMNS = [
    "solver", "schedule", "AFS", "serial", "total", "RMSE", "FD to reference", "FD to digits", "accuracy", "ms / image",
]  # fmt: skip


def page(rows: list[Row]) -> str:
    hardware = f"one thread of {platform.machine()}, torch {torch.__version__}, no GPU"
    head = f"""\
# Solvers on the digits backbone

`python bench/solvers.py`, after `make run`; {hardware}, {datetime.date.today()}.

Test samples: n = {TEST}, the same noise and prompts for every solver; ± is half a 95 % interval.
Schedule and AFS of each classical solver, the schedule of each learned one and the iteration of its
training are chosen by the RMSE on {VALIDATION} samples of validation noise. Schedules: {", ".join(SCHEDULES)};
for what is learned by gradient descent {" and ".join(FIXED_GRIDS)}, by {PILOT} iterations on each, or, with a grid of its own,
time_uniform 2 to start from. At 5 evaluations all solvers were run on the test noise, elsewhere those of the picture
and the {BEST} classical ones that are best on validation noise. Learned from {TRAIN} trajectories with one seed
and the settings of conf/family.

RMSE: root mean squared difference to 256 steps of Heun's method on the same noise, of states in [-1, 1]. FD: Frechet distance
in the judge's features, to that reference's images and to the training digits. accuracy: by the judge. serial, total:
evaluations of the network one after the other, and rows per image. ms / image: of a batch of 64, one thread.
"""
    parts = [head, "## What it shows\n", *findings(rows)]
    for budget in BUDGETS:
        parts.append(f"\n## {budget} serial evaluations\n")
        parts.append("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
        found = sorted((row for row in rows if row.budget == budget), key=lambda row: row.test["rmse"])
        parts += ["| " + " | ".join(row.cells()) + " |" for row in found]
    parts.append("\n![Frechet distance against serial and against total evaluations](solvers.svg)\n")
    return "\n".join(parts)


def findings(rows: list[Row]) -> Iterable[str]:
    """Ratios of RMSE and FD, paired: by how much each image moves their logarithms."""
    for budget in BUDGETS:
        here = {row.name: row for row in rows if row.budget == budget}
        classical = [row for row in here.values() if not row.learned]
        best = min(classical, key=lambda row: row.test["rmse"])
        yield f"- {budget} serial evaluations, ratios to the best classical solver there, {best.name} (by RMSE):"
        for name in (name for name in FAMILIES if name in here):
            yield f"  - {name}: RMSE {ratio(here[name], best, 'rmse')}, FD to reference {ratio(here[name], best, 'frechet')}"
    yield "- At equal or fewer *total* evaluations than the best classical solver of each row, the best learned one:"
    for budget in BUDGETS:
        best = min((row for row in rows if row.budget == budget and not row.learned), key=lambda row: row.test["rmse"])
        ours = min(
            (row for row in rows if row.learned and row.test["total"] <= best.test["total"]), key=lambda row: row.test["rmse"]
        )
        yield (
            f"  - {best.name}, {best.test['total']:g} total: {ours.name} with {ours.test['total']:g} has RMSE "
            f"{ratio(ours, best, 'rmse')}, FD to reference {ratio(ours, best, 'frechet')}"
        )


def ratio(one: Row, other: Row, key: str) -> str:
    found = one.test[key] / other.test[key]
    moved = [torch.tensor(row.test[f"{key}_influence"]) / row.test[key] for row in (one, other)]
    return f"x {found:.2f} ± {found * half_interval(moved[0] - moved[1]):.2f}"


SHOWN = ("euler", "heun", "dpm_solver_pp_2m", "unipc_2", "ipndm_2", "ipndm_3", *FAMILIES)


def picture(rows: list[Row]) -> Figure:
    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2, sharey=True), ("serial", "total"), strict=True):
        for index, name in enumerate(SHOWN):
            line = [row.test for row in rows if row.name == name]
            style = {"marker": "os^vD*"[index // 7 % 6], "linestyle": "-" if name in FAMILIES else ":", "markersize": 5}
            axes.plot([t[key] for t in line], [t["frechet"] for t in line], label=name, color=f"C{index % 10}", **style)
        axes.set(xlabel=f"{key} evaluations", yscale="log", xscale="log")
        axes.set_xticks(ticks := [3, 5, 7, 9] if key == "serial" else [3, 5, 7, 9, 14, 24], map(str, ticks))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel(f"Frechet distance to the reference's images (n = {TEST})")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    return figure


if __name__ == "__main__":
    main()
