"""Runs a deployment and waits: `python -m flows.run rdpo/rdpo-sd3 -S num_steps=4`.

What `prefect deployment run --watch` does, and: what the run's tasks say, its results, and a word where nothing can come of it.
"""

import json
import time
from typing import Annotated, Any
from uuid import UUID

import httpx
import typer
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import FlowRun, WorkerStatus
from prefect.client.schemas.sorting import LogSort
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL

from flows.server import find_deployment

EVERY = 2.0
"""Seconds between two looks."""
LATE = 100
"""Lines of a log among which another may still come: worker, run and tasks send theirs in batches."""
SHOWN = ("results", "comparison", "samples")
"""Artifacts that are printed."""

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


class RunError(Exception):
    """Nothing came of a run; the message says why."""


@app.command()
def main(
    deployment: Annotated[str, typer.Argument(help="as rdpo/rdpo-sd3")],
    overrides: Annotated[list[str] | None, typer.Option("--set-param", "-S", help="as of dvc exp run: num_steps=4")] = None,
    params: Annotated[list[str] | None, typer.Option("--param", help="of the flow, KEY=JSON: push=true")] = None,
    patience: Annotated[float, typer.Option(help="seconds to wait for a worker")] = 60.0,
) -> None:
    """Run a deployment, tell what it says, and print its results. Exits with 0 if it completed."""
    try:
        given = dict(map(_parameter, params or []))
        if overrides:
            given["overrides"] = overrides
        run(deployment, given, patience)
    except RunError as error:
        typer.echo(f"run: {error}", err=True)
        raise typer.Exit(1) from None


def run(deployment: str, parameters: dict[str, Any], patience: float) -> None:
    """Run a deployment to its end; RunError where it does not complete.

    Args:
        deployment: FLOW/NAME.
        parameters: of the flow.
        patience: seconds in which a worker has to take it.
    """
    url = PREFECT_API_URL.value()
    if url is None:
        raise RunError("server: found no PREFECT_API_URL; valid: that of a server, started by: prefect server start")
    with get_client(sync_client=True) as client:
        try:
            httpx.get(f"{url}/health", timeout=5).raise_for_status()
        except httpx.HTTPError as error:
            raise RunError(
                f"server: {url} does not answer ({error}); valid: PREFECT_API_URL of one that runs: prefect server start"
            ) from None
        started = _start(client, deployment, parameters)
        page = f"{PREFECT_UI_URL.value()}/runs/flow-run/{started.id}"
        typer.echo(f"{started.name}: {page}")
        try:
            ended = _follow(client, started, patience)
        except httpx.HTTPError as error:
            raise RunError(f"server: {url} does not answer any more ({error}); the run goes on without this: {page}") from None
        if ended.state is None or not ended.state.is_completed():
            raise RunError(f"{ended.name}: {ended.state_name}: {ended.state and ended.state.message}")
        artifacts = client.read_artifacts(
            artifact_filter=ArtifactFilter(
                flow_run_id=ArtifactFilterFlowRunId(any_=[ended.id]), key=ArtifactFilterKey(any_=list(SHOWN))
            )
        )
        for artifact in artifacts:
            typer.echo(artifact.data)


def _start(client: SyncPrefectClient, deployment: str, parameters: dict[str, Any]) -> FlowRun:
    """A new run of a deployment."""
    try:
        found = find_deployment(client, deployment)
    except ValueError as error:
        raise RunError(str(error)) from None
    known = (found.parameter_openapi_schema or {}).get("properties", {})
    if unknown := parameters.keys() - known.keys():
        valid = sorted(known, key=lambda name: known[name].get("position", 0))
        raise RunError(f"parameters: found {', '.join(sorted(unknown))}; valid: {', '.join(valid)}")
    try:
        return client.create_flow_run_from_deployment(found.id, parameters=parameters)
    except PrefectHTTPStatusError as error:
        detail = error.response.json().get("detail", str(error))
        raise RunError(f"parameters: {detail}") from None


def _follow(client: SyncPrefectClient, run: FlowRun, patience: float) -> FlowRun:
    """The run when it has ended; what it says is told as it comes."""
    told, begun, warned = set[UUID](), time.monotonic(), False
    while True:
        run = client.read_flow_run(run.id)
        last = client.read_logs(
            LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id])),
            offset=max(0, len(told) - LATE),
            sort=LogSort.TIMESTAMP_ASC,
        )
        logs = [log for log in last if log.id not in told]
        found = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))) if logs else []
        tasks: dict[UUID | None, str] = {task.id: f"{task.name} | " for task in found}
        for log in logs:
            typer.echo(f"{tasks.get(log.task_run_id, '')}{log.message}")
        told |= {log.id for log in logs}
        if run.state is not None and run.state.is_final() and not logs:
            return run
        if run.state is not None and run.state.is_scheduled() and time.monotonic() - begun > patience and not warned:
            warned = _waits(client, run, patience)
        time.sleep(EVERY)


def _waits(client: SyncPrefectClient, run: FlowRun, patience: float) -> bool:
    """Tell what a run waits for; RunError where there is no worker to take it."""
    pool = run.work_pool_name or ""
    if not any(worker.status == WorkerStatus.ONLINE for worker in client.read_workers_for_work_pool(pool)):
        raise RunError(
            f"{run.name}: no worker of the pool {pool!r} in {patience:g} s; start one: prefect worker start --pool {pool}; "
            f"it then takes this run, unless: prefect flow-run cancel {run.id}"
        )
    typer.echo(f"{run.name}: waits for a worker of the pool {pool!r}: they are busy, or the deployment's limit is reached")
    return True


def _parameter(text: str) -> tuple[str, Any]:
    key, found, value = text.partition("=")
    if not found:
        raise RunError(f"--param: found {text!r}; valid: KEY=JSON")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value  # a string needs no quotes


if __name__ == "__main__":
    app()
