"""A grid of overrides: one experiment of DVC's for each combination, and one comparison of them all."""

import math
import time
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from dvc.exceptions import DvcException
from dvc.utils.hydra import get_hydra_sweeps
from hydra.errors import HydraException
from prefect import State, flow, get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.deployments import run_deployment
from prefect.states import Cancelling, Pending

from flows.pipeline import StageError
from flows.rdpo import rdpo
from flows.runs import SOURCE, Backbone, Overrides, run_name, watched
from flows.server import find_deployment
from flows.shown import read_numbers
from flows.workspace import clean_commit

MOST = 100
"""Experiments of a sweep."""
LEARNED = ("distilled", "rdpo")
COLUMNS = {"frechet_distance": "FD", "distance_to_reference": "FD to reference", "rmse": "RMSE", "reward": "reward"}
EVERY, PATIENCE = 5.0, 60.0
"""Seconds between looks at runs that are elsewhere, and after which it is told that no worker takes one."""


@flow(name="sweep", flow_run_name=run_name, persist_result=True, result_serializer="json")
def sweep(
    grid: Overrides,
    backbone: Backbone = "digits",
    remote: str | None = None,
    push: bool = False,
    deployment: str | None = None,
) -> "dict[str, Any] | State[Any]":
    """Run the pipeline once for each combination of overrides, and compare what the learned samplers are worth.

    Args:
        grid: overrides with lists of values: num_steps=3,4 and distill.points=1,2 make four experiments.
        backbone, remote, push: as of the flow rdpo.
        deployment: as rdpo/rdpo-sd3: its workers take the experiments, several at once where there are several; this run also
            takes one's place while it waits. None: one after the other, here.
    """
    return watched(lambda: _sweep(grid, backbone, remote, push, deployment))


def _sweep(grid: list[str], backbone: str, remote: str | None, push: bool, deployment: str | None) -> dict[str, Any]:
    clean_commit(SOURCE)
    each = expand(grid)
    parameters = [{"backbone": backbone, "overrides": overrides, "remote": remote, "push": push} for overrides in each]
    get_run_logger().info("%d experiments", len(each))
    states = elsewhere(deployment, parameters) if deployment else [_here(given) for given in parameters]
    same = set.intersection(*map(set, each)) if len(each) > 1 else set[str]()
    rows, failures = list[dict[str, Any]](), list[str]()
    for overrides, state in zip(each, states, strict=True):
        run = state.state_details.flow_run_id
        if run and state.is_completed():
            changed = [override for override in overrides if override not in same]
            rows += [row(changed, found) for found in read_numbers(run) if found["sampler"] in LEARNED]
        else:
            failures.append(f"{' '.join(overrides)}: {state.message}")
    if rows:
        create_markdown_artifact(table(rows), "comparison", "Experiments compared")
    if failures:
        raise StageError("\n".join(failures))
    return {"backbone": backbone, "grid": grid, "experiments": rows}


def expand(grid: Sequence[str]) -> list[list[str]]:
    """Every combination, as `dvc exp run --queue -S` makes them; ValueError where there are none, or too many."""
    try:
        found = [each["params.yaml"] for each in get_hydra_sweeps({"params.yaml": list(grid)})]
    except (HydraException, DvcException) as error:
        raise ValueError(f"grid: {error}; valid: as num_steps=3,4") from None
    if not 1 <= len(found) <= MOST:
        raise ValueError(f"grid: found {len(found)} combinations; valid: 1 to {MOST}")
    return found


def _here(parameters: dict[str, Any]) -> "State[Any]":
    call: Any = rdpo
    return call(**parameters, return_state=True)


def elsewhere(deployment: str, parameters: Sequence[dict[str, Any]]) -> "list[State[Any]]":
    """The final states of runs of a deployment, which its workers take. They end with this one, if it is cancelled."""
    with get_client(sync_client=True) as client:
        find_deployment(client, deployment)
        runs: list[Any] = [run_deployment(deployment, parameters=given, timeout=0) for given in parameters]
        try:
            return [_end(client, run.id, late=time.monotonic() + PATIENCE) for run in runs]
        except BaseException as error:
            if not isinstance(error, Exception):  # a server that is away for a while ends nothing
                for run in runs:
                    if not _state(client, run.id).is_final():
                        client.set_flow_run_state(run.id, Cancelling())
            raise


def _state(client: SyncPrefectClient, run: UUID) -> "State[Any]":
    return client.read_flow_run(run).state or Pending()


def _end(client: SyncPrefectClient, run: UUID, late: float) -> "State[Any]":
    while not (state := _state(client, run)).is_final():
        if state.is_scheduled() and time.monotonic() > late:
            get_run_logger().warning("%s: no worker takes it; this run has one's place, and the others may be busy", run)
            late = math.inf
        time.sleep(EVERY)
    return state


def row(overrides: Sequence[str], found: dict[str, Any]) -> dict[str, Any]:
    """One sampler's numbers in one experiment, each with 1.96 standard errors."""
    shown = {
        label: f"{found[key]:.4g} ± {1.96 * found[f'{key}_se']:.2g}" for key, label in COLUMNS.items() if f"{key}_se" in found
    }
    cost = {"n": found["n"], "serial": found["serial_evaluations"], "total": found["total_evaluations"]}
    return {"overrides": " ".join(overrides), "sampler": found["sampler"], **cost, **shown, "experiment": found["experiment"]}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """In Markdown."""
    names = list(dict.fromkeys(name for each in rows for name in each))
    lines = [names, ["---"] * len(names), *([str(each.get(name, "")) for name in names] for each in rows)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        f"{text}\n\n± is 1.96 standard errors of n test samples. Every experiment has the same prompts and noise, "
        "unless seed or sample.seeds are in the grid. `dvc exp apply EXPERIMENT` brings one into a clone.\n"
    )
