"""The rows of each call, spread over processes. Run as a program, this file is those processes."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.multiprocessing import start_processes

with warnings.catch_warnings():  # of diffusers' and transformers' own imports
    warnings.simplefilter("ignore")
    from tiny import tiny_sd3

    from backends.sample import backend_of

from backends import Backend, Digits, Spec, counted_denoiser
from backends.digits import UNet
from solvers import (
    AMED,
    EPD,
    SOLVERS,
    Conditioned,
    Counter,
    Sharded,
    flowmatch,
    integrate,
    parallel_integrate,
    polynomial,
)

PROCESSES = 3
WORLDS = {"three": [0, 1, 2], "two": [0, 1], "pair": [0, 2]}
"""Groups by their names: all processes of a run of three, and of one of two; some of the three."""


def digits() -> Digits:
    """An untrained network in which every weight counts."""
    torch.manual_seed(0)
    network = UNet(channels=16, sigma_data=0.75)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    return Digits(network)


def sd3() -> Backend:
    return backend_of(tiny_sd3(), 16, 16)


MODELS: dict[str, Callable[[], Backend]] = {"digits": digits, "sd3": sd3}
PROMPTS = {"digits": ["1", "7", "4", "0", "9"], "sd3": ["a lighthouse at dusk", "a boat", "grey", "noise", "a goat"]}
GRIDS = {"digits": polynomial(4, 0.002, 80.0), "sd3": flowmatch(4, 0.01, 1.0, 3.0)}


Models = dict[str, Backend]
Results = dict[str, list[dict[str, Tensor]]]
"""By the group, what each of its processes found."""


class Counted:
    """A backend that counts the rows that its networks evaluate in this process."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.rows: list[int] = []

    @property
    def spec(self) -> Spec:
        return self.backend.spec

    def decode(self, x: Tensor) -> Tensor:
        return self.backend.decode(x)

    def denoiser(self, prompts: Sequence[str]) -> Conditioned:
        inner = self.backend.denoiser(prompts)

        def evaluate(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
            self.rows.append(len(x))
            return inner.evaluate(x, sigma, rows)

        return Conditioned(evaluate, inner.conditions)


@dataclass(frozen=True)
class Case:
    """What the processes do: B prompts, guided or not, and M B rows in one call, or a solver's calls."""

    model: str
    prompts: int
    windows: int
    guided: bool
    solver: str = "none"

    @property
    def name(self) -> str:
        return f"{self.model}-{self.prompts}x{self.windows}-{'guided' if self.guided else 'plain'}-{self.solver}"

    def run(self, backend: Backend, group: Any = None) -> tuple[Tensor, Counter]:
        """The result, and what it costs; in one process where there is no group."""
        prompts, sigmas = PROMPTS[self.model][: self.prompts], GRIDS[self.model]
        negative = prompts[::-1] if self.model == "sd3" else None
        denoise, counter = counted_denoiser(backend, prompts, 3.0 if self.guided else 1.0, negative, group)
        count, generator = self.prompts * self.windows, torch.Generator().manual_seed(1)
        x = torch.randn(count, *backend.spec.shape, generator=generator, dtype=torch.float64)
        start = sigmas[0] * x
        with torch.no_grad():
            match self.solver:
                case "epd":
                    found = integrate(denoise, EPD(4, 3, 0.05, 0.05).table(), start, sigmas)
                case "parallel":
                    found, _ = parallel_integrate(denoise, SOLVERS["euler"], start, sigmas, 3, 0.0)
                case _:
                    found = denoise(x, torch.linspace(1.0, 0.1, count).double())
        return found, counter


CASES = [
    *(
        Case(model, prompts, windows, guided)
        for model in MODELS
        for prompts, windows in ((1, 1), (2, 1), (5, 1), (2, 2), (5, 3))
        for guided in (False, True)
    ),
    *(Case(model, prompts, 1, True, solver) for model in MODELS for prompts in (1, 2) for solver in ("epd", "parallel")),
]


def file_of(folder: Path, world: str, rank: int) -> Path:
    return folder / f"{world}-{rank}.safetensors"


def run(rank: int, folder: Path) -> None:
    """Run the cases in the groups that this process is of, and write what it finds."""
    models = {name: make() for name, make in MODELS.items()}

    def write(world: str, group: Any) -> None:
        found: dict[str, Tensor] = {}
        for i, case in enumerate(CASES):
            backend = Counted(models[case.model])
            result, counter = case.run(backend, group)
            cost = torch.tensor([counter.depth, counter.rows])
            found |= {f"{i}": result, f"{i}.rows": torch.tensor(backend.rows), f"{i}.cost": cost}
        save_file(found, file_of(folder, world, rank))

    dist.init_process_group("gloo", init_method=f"file://{folder}/three", rank=rank, world_size=3)
    pair = dist.new_group(WORLDS["pair"])
    write("three", dist.group.WORLD)
    if rank in WORLDS["pair"]:
        write("pair", pair)
    dist.destroy_process_group()
    if rank in WORLDS["two"]:
        dist.init_process_group("gloo", init_method=f"file://{folder}/two", rank=rank, world_size=2)
        write("two", dist.group.WORLD)
        dist.destroy_process_group()


if __name__ == "__main__":
    start_processes(run, (Path(sys.argv[1]),), PROCESSES, start_method="fork")  # that libraries are imported once


@pytest.fixture(scope="module")
def models() -> Models:
    return {name: make() for name, make in MODELS.items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each process of each group found."""
    folder, root = tmp_path_factory.mktemp("processes"), Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "examples")])}
    subprocess.run([sys.executable, __file__, str(folder)], env=environment, timeout=120, check=True)
    return {world: [load_file(file_of(folder, world, rank)) for rank in ranks] for world, ranks in WORLDS.items()}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("i", range(len(CASES)), ids=[case.name for case in CASES])
def test_processes_find_what_one_finds(i: int, world: str, results: Results, models: Models) -> None:
    case, size = CASES[i], len(WORLDS[world])
    alone = Counted(models[case.model])
    expected, counter = case.run(alone)
    for found in results[world]:
        assert torch.equal(found[f"{i}"], results[world][0][f"{i}"])  # the same bits in all of them
        assert found[f"{i}.cost"].tolist() == [counter.depth, counter.rows]  # of all, not of the share
        if case.model == "digits":
            assert torch.equal(found[f"{i}"], expected)
        else:
            assert float((found[f"{i}"] - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    shares = [int(found[f"{i}.rows"].sum()) for found in results[world]]
    assert sum(shares) == sum(alone.rows)
    least, most = sum(rows // size for rows in alone.rows), sum(-(-rows // size) for rows in alone.rows)
    assert all(least <= share <= most for share in shares)


def test_cases_have_more_and_fewer_rows_than_processes_and_rows_that_do_not_divide(models: Models) -> None:
    rows = set()
    for case in CASES:
        backend = Counted(models[case.model])
        case.run(backend)
        rows |= set(backend.rows)
    assert {1, 2} <= rows
    assert {count % 3 for count in rows if count > 3} == {0, 1, 2}
    assert {count % 2 for count in rows if count > 2} == {0, 1}


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    """Of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_group_of_one_finds_what_no_group_finds(case: Case, group: Any, models: Models) -> None:
    backend, alone = Counted(models[case.model]), Counted(models[case.model])
    found, counter = case.run(backend, group)
    expected, cost = case.run(alone)
    assert torch.equal(found, expected)
    assert backend.rows == alone.rows
    assert (counter.depth, counter.rows) == (cost.depth, cost.rows)


def test_gradient_is_refused(group: Any, models: Models) -> None:
    denoise = models["digits"].denoiser(["1", "7"])
    x, sigma = torch.randn(2, 1, 8, 8, dtype=torch.float64, requires_grad=True), torch.ones(2).double()
    sharded = Sharded(denoise)  # among all processes
    with pytest.raises(ValueError, match=r"x, sigma: with gradient, which does not cross processes; valid: under"):
        sharded(x, sigma)
    with torch.no_grad():
        assert torch.equal(sharded(x, sigma), denoise(x, sigma))
    found = sharded(x.detach(), sigma)
    assert torch.equal(found, denoise(x.detach(), sigma))
    assert not found.requires_grad


def test_amed_which_needs_features_is_refused(group: Any, models: Models) -> None:
    denoise, _ = counted_denoiser(models["digits"], ["1"], 1.0, group=group)
    student = AMED(4, 16, 0.05, 0.05)
    with torch.no_grad(), pytest.raises(TypeError, match="denoise: Sharded gives no feature; valid: a FeatureDenoiser"):
        integrate(denoise, student, torch.ones(1, 1, 8, 8).double(), GRIDS["digits"])


def test_rows_keep_the_precision_of_the_state(group: Any, models: Models) -> None:
    for dtype in (torch.float32, torch.float64):
        found = Sharded(models["sd3"].denoiser(["a boat"]), group)(
            torch.ones(2, 16, 8, 8, dtype=dtype), torch.ones(2, dtype=dtype)
        )
        assert (found.dtype, found.shape) == (dtype, (2, 16, 8, 8))
