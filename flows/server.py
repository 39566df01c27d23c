"""What has to be on a Prefect server for flows to run there."""

import sys
from datetime import timedelta
from uuid import UUID

from prefect.automations import AutomationCore, EventTrigger, Posture
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.events.actions import ChangeFlowRunState
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed

POOL = "gpu"
"""The work pool of prefect.yaml's deployments; its workers start processes of their own machine."""
SILENCE = timedelta(seconds=90)
"""After which a run whose process sends no heartbeats, one in 30 seconds by pyproject.toml, has crashed."""
WATCH = "Runs whose heartbeats stop have crashed"
GONE = "Its process is gone, killed or with its machine. Run the same again: it goes on from what was saved."
ALONE = "Its worker is gone, so it has saved what was done, and ended. Run the same again: it goes on from there."


def prepare() -> None:
    """Make the work pool, and the automation that tells crashed runs, where they are not there."""
    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(POOL)
        except ObjectNotFound:
            client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
        if not client.read_automations_by_name(WATCH):
            client.create_automation(_watch())


def prepare_to_deploy() -> None:
    """`prepare`, if this is `prefect deploy`.

    It refuses deployments whose work pool does not exist, and has no step before that in which to make one: importing the
    flow is all that it does before.
    """
    if "deploy" in sys.argv[1:]:
        prepare()


def find_deployment(client: SyncPrefectClient, name: str) -> DeploymentResponse:
    """A deployment by FLOW/NAME; ValueError with those that there are."""
    try:
        return client.read_deployment_by_name(name)
    except (ObjectNotFound, ValueError):
        flows = {flow.id: flow.name for flow in client.read_flows()}
        there = sorted(f"{flows[each.flow_id]}/{each.name}" for each in client.read_deployments())
        valid = ", ".join(there) or "none, until: prefect deploy --all"
        raise ValueError(f"deployment: found {name!r}; valid: {valid}") from None


def bury(run: str, why: str = GONE) -> None:
    """Tell the server that a run has crashed, and free what its tasks hold. Its process is gone, or about to go."""
    with get_client(sync_client=True) as client:
        try:
            found = client.read_flow_run(UUID(run))
        except (ObjectNotFound, ValueError):  # of another server
            return
        if found.state is None or found.state.is_final():
            return
        unfinished = TaskRunFilter(
            state=TaskRunFilterState(type=TaskRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING]))
        )
        for task in client.read_task_runs(
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[found.id])), task_run_filter=unfinished
        ):
            client.set_task_run_state(task.id, Crashed(message=why), force=True)
            client.decrement_v1_concurrency_slots(list(task.tags), task.id, 0)
        client.set_flow_run_state(found.id, Crashed(message=why), force=True)


def _watch() -> AutomationCore:
    heartbeat, ended = "prefect.flow-run.heartbeat", ("Completed", "Failed", "Cancelled", "Crashed")
    return AutomationCore(
        name=WATCH,
        description=GONE,
        trigger=EventTrigger(
            after={heartbeat},
            expect={heartbeat, *(f"prefect.flow-run.{state}" for state in ended)},
            match={"prefect.resource.id": ["prefect.flow-run.*"]},
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=SILENCE,
        ),
        actions=[ChangeFlowRunState(name=None, state=StateType.CRASHED, message=GONE, force=False)],
    )
