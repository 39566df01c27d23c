"""A grid of experiments, compared."""

import logging
import re
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from prefect.states import Completed, Failed, Pending, Running, Scheduled, State

from flows import shown, sweep

from .conftest import ROOT


@pytest.mark.parametrize(
    ("grid", "each"),
    [
        (["num_steps=3,4", "distill.points=1,2"], [[f"num_steps={n}", f"distill.points={p}"] for n in (3, 4) for p in (1, 2)]),
        (["num_steps=choice(3,4)"], [["num_steps=3"], ["num_steps=4"]]),
        (["num_steps=range(3,6)"], [["num_steps=3"], ["num_steps=4"], ["num_steps=5"]]),
        (["rdpo=published,shared", "a=[1,2]"], [["rdpo=published", "a=[1,2]"], ["rdpo=shared", "a=[1,2]"]]),
        (["~samplers.heun", "+a=1"], [["~samplers.heun=null", "+a=1"]]),
    ],
)
def test_a_grid_is_every_combination(grid: list[str], each: list[list[str]]) -> None:
    assert sweep.expand(grid) == each


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        (["a=range(0,101)"], r"^grid: found 101 combinations; valid: 1 to 100$"),
        (["a=[1"], r"^grid: .*; valid: as num_steps=3,4$"),
        (["samplers=glob(*)"], r"^grid: .*; valid: as num_steps=3,4$"),
        (["a=interval(0,1)"], r"^grid: .*; valid: as num_steps=3,4$"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(grid: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=re.compile(said, re.DOTALL)):
        sweep.expand(grid)


def test_a_sweep_compares_what_stages_report() -> None:
    """Of the committed results."""
    results = shown.read_results(ROOT, [f"results/{name}.json" for name in sweep.LEARNED])
    rows = [
        sweep.row([f"num_steps={n}", "a=b"], {"sampler": name, **results[name], "experiment": f"e-{n}"})
        for n in (3, 4)
        for name in sweep.LEARNED
    ]
    assert rows[1] == {
        "overrides": "num_steps=3 a=b",
        "sampler": "rdpo",
        "n": results["rdpo"]["n"],
        "serial": results["rdpo"]["serial_evaluations"],
        "total": results["rdpo"]["total_evaluations"],
        "FD": f"{results['rdpo']['frechet_distance']:.4g} ± {1.96 * results['rdpo']['frechet_distance_se']:.2g}",
        "FD to reference": rows[1]["FD to reference"],
        "RMSE": rows[1]["RMSE"],
        "reward": rows[1]["reward"],
        "experiment": "e-3",
    }
    lines = sweep.table(rows).splitlines()
    assert lines[0] == "| overrides | sampler | n | serial | total | FD | FD to reference | RMSE | reward | experiment |"
    assert lines[1] == "| " + " | ".join(["---"] * 10) + " |"
    assert lines[3].startswith("| num_steps=3 a=b | rdpo | 4096 | 5 | 8.0 | ")
    assert len(lines[2:6]) == len([line for line in lines if line.startswith("| num_steps")]) == 4


def test_a_comparison_has_each_number_below_its_name() -> None:
    """Where experiments differ in what they measure."""
    rows = [{"overrides": "a", "FD": "1", "experiment": "x"}, {"overrides": "b", "reward": "2", "experiment": "y"}]
    header, _, *lines = sweep.table(rows).splitlines()[:4]
    names = [cell.strip() for cell in header.strip("|").split("|")]
    found = [dict(zip(names, (cell.strip() for cell in line.strip("|").split("|")), strict=True)) for line in lines]
    assert [{name: each[name] for name in row} for row, each in zip(rows, found, strict=True)] == rows


class Elsewhere:
    """Of a server, what a sweep asks of it: each run goes through the states that its parameters say; the last one remains."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self.set = list[list[State[Any]]](), list[tuple[int, str | None]]()
        monkeypatch.setattr(sweep, "get_client", lambda sync_client: nullcontext(self))
        monkeypatch.setattr(sweep, "run_deployment", self.run)
        monkeypatch.setattr(sweep, "find_deployment", lambda client, name: None)
        monkeypatch.setattr(sweep, "EVERY", 0.001)
        monkeypatch.setattr(sweep, "get_run_logger", lambda: logging.getLogger("sweep"))

    def run(self, deployment: str, parameters: dict[str, list[State[Any]]], timeout: float) -> Any:
        assert (deployment, timeout) == ("rdpo/rdpo-sd3", 0)
        self.left.append(list(parameters["states"]))
        return SimpleNamespace(id=len(self.left) - 1)

    def read_flow_run(self, run: int) -> Any:
        return SimpleNamespace(state=self.left[run].pop(0) if len(self.left[run]) > 1 else self.left[run][0])

    def set_flow_run_state(self, run: int, state: State[Any]) -> None:
        self.set.append((run, state.name))


def test_experiments_elsewhere_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    there = Elsewhere(monkeypatch)
    ends = [[Pending(), Running(), Completed()], [Running(), Failed()]]
    states = sweep.elsewhere("rdpo/rdpo-sd3", [{"states": each} for each in ends])
    assert [state.name for state in states] == ["Completed", "Failed"]
    assert there.set == []


@pytest.mark.parametrize(
    ("error", "ended"), [(KeyboardInterrupt, [(1, "Cancelling"), (2, "Cancelling")]), (ConnectionError, [])]
)
def test_experiments_elsewhere_end_with_their_sweep_if_it_is_cancelled(
    error: type[BaseException], ended: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Elsewhere(monkeypatch)

    def sleep(seconds: float) -> None:
        raise error

    monkeypatch.setattr(sweep.time, "sleep", sleep)
    with pytest.raises(error):
        sweep.elsewhere("rdpo/rdpo-sd3", [{"states": [each]} for each in (Completed(), Running(), Scheduled())])
    assert there.set == ended


@pytest.mark.parametrize(("patience", "told"), [(0.0, 2), (60.0, 0)])
def test_an_experiment_that_no_worker_takes_is_told_once(
    patience: float, told: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sweep, "PATIENCE", patience)
    Elsewhere(monkeypatch)
    sweep.elsewhere("rdpo/rdpo-sd3", [{"states": [*[Scheduled()] * 5, Completed()]}] * 2)
    assert [record.args for record in caplog.records if "no worker takes it" in record.message] == [(0,), (1,)][:told]
