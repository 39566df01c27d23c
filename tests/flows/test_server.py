"""The flows on a Prefect server, with workers, all of them processes on this machine, and a repository of quick stages.

What happens is one story, told by the fixtures; the tests look at what is left of it:

    deployed   the server has the deployments, and a run that no worker takes
    killed     two workers share two runs; one loses its worker, the other its worker and its own process, both in mid stage
    ended      a new worker takes both again: one is cancelled, one completes. A clone with a cache of its own gets the same
               from the remote. Meanwhile, faults and bad input
"""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psutil
import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import FlowRun, State, TaskRun
from prefect.client.schemas.sorting import LogSort
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
from typer.testing import CliRunner

from flows.run import app
from flows.server import ALONE, GONE, WATCH

from .conftest import git, make_repository

DEPLOYMENT = "rdpo/rdpo-digits"
PATIENCE = 60.0
"""Seconds for what takes a few on an idle machine."""
SLOW, LONG = "rdpo.steps=60", "rdpo.steps=600"  # of 0.1 s
UNUSED = ("EVENT_PERSISTER", "TRIGGERS", "SCHEDULER", "LATE_RUNS")  # of the server; the first holds SQLite's lock much
STAGES = ["backbone", "refs", "rdpo", "sample@euler", "sample@rdpo", "report"]
LOCAL = """\
import json, sys, time
from flows.rdpo import rdpo
for given in json.loads(sys.argv[1]):
    begun = time.monotonic()
    state = rdpo(**given, return_state=True)
    found = {"name": state.name, "message": state.message, "run": str(state.state_details.flow_run_id)}
    print(json.dumps({**found, "seconds": time.monotonic() - begun}), flush=True)
"""


@dataclass
class Site:
    """A server, its client, and what was started for it."""

    folder: Path
    port: int
    client: SyncPrefectClient
    started: list[tuple[subprocess.Popen[bytes], Path]] = field(default_factory=list)

    @property
    def home(self) -> str:
        return str(self.folder / "prefect")

    @property
    def source(self) -> Path:
        return self.folder / "repository"

    @property
    def second(self) -> Path:
        """A clone of the source with a cache of its own, and no default remote."""
        return self.folder / "second"

    @property
    def plain(self) -> Path:
        """A clone of the source, for dvc alone."""
        return self.folder / "plain"

    def start(self, *command: str, folder: Path | None = None, **environment: str) -> "Started":
        log = self.folder / f"{len(self.started)}.log"
        whole = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
            "PREFECT_HOME": self.home,
            "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            **{f"PREFECT_SERVER_SERVICES_{name}_ENABLED": "false" for name in UNUSED},
            "PREFECT_SERVER_TASKS_TAG_CONCURRENCY_SLOT_WAIT_SECONDS": "0.5",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PYTHONPYCACHEPREFIX": str(self.folder / "bytecode"),
            "PYTHONUNBUFFERED": "1",
            **environment,
        }
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=folder or self.source,
                env=whole,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self.started.append((process, log))
        return Started(process, log)

    def worker(self, device: str, repository: Path, *options: str) -> "Started":
        command = ["-m", "prefect", "worker", "start", "--pool", "gpu", *options]
        return self.start(*command, CUDA_VISIBLE_DEVICES=device, REPOSITORY=str(repository))

    def local(self, device: str, folder: Path, *runs: Mapping[str, object]) -> "Started":
        """Runs of rdpo without a worker, one after the other."""
        return self.start("-c", LOCAL, json.dumps(runs), folder=folder, CUDA_VISIBLE_DEVICES=device)

    def submit(self, name: str = DEPLOYMENT, queue: str | None = None, **parameters: object) -> UUID:
        found = self.client.read_deployment_by_name(name)
        return self.client.create_flow_run_from_deployment(found.id, parameters=parameters, work_queue_name=queue).id

    def read(self, run: UUID) -> FlowRun:
        return self.client.read_flow_run(run)

    def end(self, run: UUID) -> FlowRun:
        """A run when it has ended."""
        wait(lambda: state(self.read(run)).is_final(), f"the end of {run}")
        return self.read(run)

    def tasks(self, run: UUID) -> dict[str, TaskRun]:
        found = self.client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run])))
        return {task.name: task for task in found}

    def children(self, run: UUID) -> list[FlowRun]:
        states = [state(task) for _, task in sorted(self.tasks(run).items())]
        return [self.read(each.state_details.child_flow_run_id) for each in states if each.state_details.child_flow_run_id]

    def log(self, run: UUID) -> list[str]:
        told = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run]))
        return [log.message for log in self.client.read_logs(told, limit=200, sort=LogSort.TIMESTAMP_ASC)]

    def artifacts(self, run: UUID) -> dict[str, Any]:
        found = self.client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run])))
        return {str(artifact.key): artifact.data for artifact in found}

    def results(self) -> dict[str, Any]:
        """What runs gave, by names of files; all of them are JSON."""
        return {file.name: json.loads(file.read_text()) for file in Path(self.home, "storage").iterdir()}

    def result(self, run: UUID) -> Any:
        return self.results()[Path(str(state(self.read(run)).data.storage_key)).name]

    def workspace(self, run: UUID) -> Path:
        """That the run is in."""
        return next(lock.with_suffix("") for lock in self.source.glob(".dvc/tmp/flows/*.lock") if lock.read_text() == str(run))

    def checkpoint(self, run: UUID) -> int:
        """Steps in the checkpoint of rdpo, while the run lasts."""
        with suppress(StopIteration, OSError):
            return steps(self.workspace(run))
        return 0

    def processes(self, **environment: str) -> list[psutil.Process]:
        """Those started for this, and what they started: all have the server's home in their environment."""
        wanted, found = {"PREFECT_HOME": self.home, **environment}.items(), []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if wanted <= process.environ().items() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def stop(self) -> list[str]:
        """End all; the command lines of what does not end with those who started it."""
        for signalled in (signal.SIGTERM, signal.SIGKILL):  # a run that waits before a stage is tried again ends after that
            for process, _ in reversed(self.started):
                process.send_signal(signalled)
            with suppress(pytest.fail.Exception):
                wait(lambda: [process.poll() for process, _ in self.started] and not self.processes(), "the end of all", 10)
        for process, _ in self.started:
            process.wait()
        left = list[str]()
        for process in self.processes():
            with suppress(psutil.Error):
                left.append(" ".join(process.cmdline()))
                process.kill()
        return left


@dataclass
class Started:
    process: subprocess.Popen[bytes]
    log: Path

    def wait(self, seconds: float = PATIENCE) -> str:
        """What it has printed, when it has ended."""
        self.process.wait(seconds)
        return self.log.read_text()


@dataclass
class Deployed:
    """Of the first fixture.

    Attributes:
        waits: what the command line says of a run without a worker, and that run.
    """

    waits: str
    run: UUID
    workers: dict[str, Started]
    local: dict[str, Started]
    again: Started


def state(run: FlowRun | TaskRun) -> State[Any]:
    assert run.state is not None
    return run.state


def wait(until: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not until():
        if time.monotonic() > end:
            pytest.fail(f"{what}: not in {seconds:g} s")
        time.sleep(0.2)


def flow_run(*arguments: str) -> tuple[int, str]:
    """Of `python -m flows.run`: its exit status, and what it prints."""
    done = CliRunner().invoke(app, list(arguments))
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.exit_code, done.output


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("server")
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    with temporary_settings({PREFECT_API_URL: url, PREFECT_HOME: folder / "client"}), get_client(sync_client=True) as client:
        site = Site(folder, port, client)
        try:
            site.start("-m", "prefect", "server", "start", "--port", str(port), "--no-ui", folder=folder)
            make_repository(site.source, folder / "remote")
            for clone in (site.second, site.plain):
                git(folder, "clone", "-q", str(site.source), str(clone))
            site.start("-m", "dvc", "exp", "run", "-q", "-S", SLOW, folder=site.plain)
            config = site.second / ".dvc/config"
            config.write_text(config.read_text().replace("    remote = storage\n", ""))
            git(site.second, "commit", "-qam", "no default remote")
            wait(lambda: answers(f"{url}/health"), "the server")
            yield site
        finally:
            left = site.stop()
    assert left == []


def answers(url: str) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(url).is_success
    return False


@pytest.fixture(scope="module")
def deployed(site: Site) -> Deployed:
    sd3 = {"backbone": "sd3", "targets": ["rdpo"], "remote": "storage"}
    local = {
        "memory": site.local("7", site.second, {**sd3, "overrides": ["rdpo.fail=memory"]}),
        "network": site.local("8", site.second, {**sd3, "overrides": ["rdpo.fail=network"]}),
    }
    deploy = ["-m", "prefect", "--no-prompt", "deploy", "--all"]
    first = site.start(*deploy)
    assert first.wait()
    assert first.process.returncode == 0
    local["bad"] = site.local(
        "9", site.second, *BAD.values(), {**sd3, "overrides": ["rdpo.pause=30", "flows.hours.rdpo=0.0005"]}
    )
    status, waits = flow_run(DEPLOYMENT, "-S", SLOW, "--param", "push=true", "--patience", "1")
    assert status == 1
    workers = {device: site.worker(device, site.source, "--limit", "1") for device in ("0", "1")}
    return Deployed(waits, found_id(waits), workers, local, site.start(*deploy))


def found_id(printed: str) -> UUID:
    """Of the run whose page is named."""
    return UUID(re.findall(r"flow-run/(\S+)\n", printed)[0])


@dataclass
class Killed:
    """Two runs, in the middle of rdpo.

    Attributes:
        alone: whose worker was killed.
        gone: whose worker was killed, and its own process.
        devices: of the workers that took them.
        steps: in their checkpoints, after that.
        seconds: until the server knew that the first had crashed.
        left: processes of these runs, soon after.
    """

    alone: UUID
    gone: UUID
    devices: list[str]
    steps: list[int]
    seconds: float
    left: list[str]


@pytest.fixture(scope="module")
def killed(site: Site, deployed: Deployed) -> Killed:
    runs = alone, gone = deployed.run, site.submit(backbone="sd3", overrides=[LONG])
    folders, devices, begun = dict[UUID, Path](), dict[UUID, str](), dict[UUID, float]()
    while len(begun) < len(runs):
        wait(lambda: any(site.checkpoint(run) for run in runs if run not in begun), "a checkpoint")
        run = next(run for run in runs if run not in begun and site.checkpoint(run))
        folders[run], devices[run] = site.workspace(run), site.tasks(run)["rdpo"].tags[0].rpartition("-")[2]
        begun[run], _ = time.monotonic(), deployed.workers[devices[run]].process.kill()
        for process in site.processes(PREFECT__FLOW_RUN_ID=str(run)):
            with suppress(psutil.Error):  # it ends by itself
                if run == gone and "prefect" in " ".join(process.cmdline()):
                    process.kill()
    site.end(alone)
    seconds = time.monotonic() - begun[alone]
    with suppress(pytest.fail.Exception):
        wait(lambda: not any(site.processes(PREFECT__FLOW_RUN_ID=str(run)) for run in runs), "the end of all", 10)
    left = [str(each) for run in runs for each in site.processes(PREFECT__FLOW_RUN_ID=str(run))]
    return Killed(alone, gone, [*devices.values()], [steps(folders[run]) for run in runs], seconds, left)


def steps(folder: Path) -> int:
    """In the checkpoint of rdpo in a workspace."""
    return int((folder / "data/checkpoints/rdpo").read_text().split()[0])


@dataclass
class Ended:
    """Of the last fixture: runs that have ended, and what was printed.

    Attributes:
        again, cancelled: of what was killed.
        printed: of the command line that started the first of these.
        status: of it.
        checkpoint: steps in the second one's, after it was cancelled.
        wrong: a run that cannot succeed.
        restored, unchanged: the first once more, in the clone, and where it was.
        sweep: of two experiments.
        shared: the same, made by workers.
        local: of runs without a worker, what became of each.
    """

    again: FlowRun
    cancelled: FlowRun
    printed: str
    status: int
    checkpoint: int
    wrong: FlowRun
    restored: FlowRun
    unchanged: FlowRun
    sweep: FlowRun
    shared: FlowRun
    local: dict[str, list[dict[str, Any]]]


BAD = {
    "targets: found 'teacher'; valid: backbone, rdpo, refs, report, sample, sample@euler, sample@rdpo": {
        "targets": ["teacher"]
    },
    "overrides: Could not override 'rdpo.step'.*; valid: steps, pause, fail, batch_size; .* dvc exp run -S": {
        "overrides": ["rdpo.step=3"]
    },
    "overrides: rdpo.pause: found -1.*; valid: 0 or more": {"overrides": ["rdpo.pause=-1.0"]},
    "remote: found 'nowhere'; valid: storage": {"remote": "nowhere"},
    "push: found no default remote to push to; valid: one of storage": {"push": True},
}


@pytest.fixture(scope="module")
def ended(site: Site, deployed: Deployed, killed: Killed) -> Ended:
    site.worker("1", site.source, "--limit", "6", "--work-queue", "default")
    command = site.start("-m", "flows.run", DEPLOYMENT, "-S", SLOW, "--param", "push=true")
    cancelled = site.submit(backbone="sd3", overrides=[LONG])
    wait(lambda: site.checkpoint(cancelled) > killed.steps[1], "steps of the run to cancel")
    sweep = site.submit("sweep/sweep", grid=["rdpo.steps=2,3"])
    folder = site.workspace(cancelled)
    site.start("-m", "prefect", "flow-run", "cancel", str(cancelled))
    wrong = site.submit(overrides=["rdpo.fail=wrong"], targets=["rdpo"])
    site.worker("0", site.second, "--limit", "1", "--work-queue", "second")
    local = {**deployed.local, "dirty": site.local("9", site.plain, {})}
    again = found_id(command.log.read_text())
    site.end(again)
    restored = site.submit(queue="second", overrides=[SLOW], targets=["rdpo"], remote="storage")
    unchanged = site.submit(overrides=[SLOW])
    site.end(sweep)
    shared = site.submit("sweep/sweep", grid=["rdpo.steps=2,3"], deployment=DEPLOYMENT)
    return Ended(
        again=site.read(again),
        cancelled=site.end(cancelled),
        printed=command.wait(),
        status=command.process.returncode,
        checkpoint=steps(folder),
        wrong=site.end(wrong),
        restored=site.end(restored),
        unchanged=site.end(unchanged),
        sweep=site.end(sweep),
        shared=site.end(shared),
        local={name: [json.loads(line) for line in each.wait().splitlines() if line[0] == "{"] for name, each in local.items()},
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([DEPLOYMENT[:-1]], "deployment: found 'rdpo/rdpo-digit'; valid: rdpo/rdpo-digits, sweep/sweep"),
        (
            [DEPLOYMENT, "--param", "pull=true"],
            "parameters: found pull; valid: backbone, overrides, targets, remote, push, force",
        ),
        ([DEPLOYMENT, "--param", "backbone=sd4"], "parameters: .*'sd4' is not one of .*'digits'.*'sd3'"),
    ],
)
def test_refuses_at_once(site: Site, deployed: Deployed, arguments: list[str], says: str) -> None:
    runs = of_deployments(site)
    status, printed = flow_run(*arguments)
    assert status == 1
    assert re.fullmatch(f"run: {says}.*\n", printed), printed
    assert of_deployments(site) == runs


def of_deployments(site: Site) -> set[UUID]:
    return {run.id for run in site.client.read_flow_runs() if run.deployment_id is not None}


def test_a_server_that_is_down_is_told(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as found:
        url = f"http://127.0.0.1:{found.getsockname()[1]}/api"
    begun = time.monotonic()
    with temporary_settings({PREFECT_API_URL: url}):
        status, printed = flow_run(DEPLOYMENT)
    assert status == 1
    assert re.fullmatch(f"run: server: {url} does not answer .*; valid: PREFECT_API_URL of .*: prefect server start\n", printed)
    assert time.monotonic() - begun < 10


def test_a_pool_without_worker_is_told(deployed: Deployed) -> None:
    said = deployed.waits.splitlines()[-1]
    assert re.fullmatch("run: .*: no worker of the pool 'gpu' in 1 s; start one: prefect worker start --pool gpu; .*", said)


def test_workers_share_runs(killed: Killed) -> None:
    assert set(killed.devices) == {"0", "1"}  # one of them had been there before any worker


def test_a_killed_worker_is_told_within_seconds(site: Site, killed: Killed) -> None:
    crashed = state(site.read(killed.alone))
    assert (crashed.name, crashed.message) == ("Crashed", ALONE)
    assert killed.seconds < 15
    assert killed.left == []


def test_a_killed_run_is_told_by_the_next_one(site: Site, ended: Ended, killed: Killed) -> None:
    gone = state(site.read(killed.gone))
    assert (gone.name, gone.message) == ("Crashed", GONE)
    assert all(state(task).is_final() for task in site.tasks(killed.gone).values())


def test_goes_on_from_the_checkpoint(site: Site, ended: Ended, killed: Killed) -> None:
    for run, done in zip((ended.again, ended.cancelled), killed.steps, strict=True):
        assert f"rdpo: goes on from step {done}" in site.log(run.id)


def test_ends_as_if_undisturbed(site: Site, ended: Ended) -> None:
    result, plain = site.result(ended.again.id), read_yaml(site.plain / "dvc.lock")
    assert read_yaml(Path(result["workspace"], "dvc.lock")) == plain
    assert result["hashes"] == {
        name: {out["path"]: out["md5"] for out in stage["outs"]} for name, stage in plain["stages"].items()
    }
    assert result["experiment"] in exp_list(site)
    assert result["report"] == (site.plain / "results/report.md").read_text()


def test_a_run_shows_itself(site: Site, ended: Ended) -> None:
    run = ended.again
    assert run.name == "digits rdpo.steps=60"
    assert ended.status == 0
    assert f"{site.port}/runs/flow-run/{run.id}" in ended.printed
    shown = site.artifacts(run.id)
    assert shown["results"] in ended.printed
    assert shown["results"].startswith("# report")
    assert "dvc exp apply digits-rdpo-steps-60-" in shown["results"]
    assert [row["stage"] for row in json.loads(shown["stages"])] == STAGES
    assert shown["progress-rdpo"] == 100
    assert set(site.tasks(run.id)) == {*STAGES, *(f"push {name}" for name in STAGES)}
    assert {f"{name}: {how}" for name, how in how(shown).items()} <= {
        line.rpartition(" | ")[2] for line in ended.printed.splitlines()
    }


def test_an_experiment_that_cannot_be_pushed_is_told(site: Site, ended: Ended) -> None:
    (said,) = [line for line in site.log(ended.again.id) if "was not pushed" in line]
    assert "'origin' does not appear to be a git repository" in said


def test_what_the_command_prints_names_tasks(ended: Ended) -> None:
    named = {line.partition(" | ")[0] for line in ended.printed.splitlines() if " | " in line and line[0] not in "|#"}
    tasks = {*STAGES, *(f"push {name}" for name in STAGES)}
    assert tasks <= named | {name.rpartition("-")[0] for name in named}  # before it is named


def test_cancelled_saves_what_was_done(site: Site, ended: Ended, killed: Killed) -> None:
    assert ended.cancelled.state_name == "Cancelled"
    assert killed.steps[1] < ended.checkpoint < 600


def test_stages_with_the_gpu_never_overlap(site: Site, ended: Ended) -> None:
    runs = [ended.again, ended.cancelled, ended.wrong, *site.children(ended.sweep.id)]
    tasks = [task for run in runs for task in site.tasks(run.id).values() if task.tags and task.run_count]
    assert all(task.name.split("@")[0] in ("backbone", "rdpo", "sample") for task in tasks)
    assert len({tag for task in tasks for tag in task.tags}) == 1
    times = sorted((task.start_time, task.end_time) for task in tasks if task.start_time and task.end_time)
    assert len(times) == len(tasks)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(times))
    starts, ends = zip(*((run.start_time, run.end_time) for run in (ended.again, ended.cancelled)), strict=True)
    assert max(starts) < min(ends)  # both were there at once


def test_nothing_is_done_twice(site: Site, ended: Ended) -> None:
    assert ended.unchanged.state_name == "Completed"
    assert how(site.artifacts(ended.unchanged.id)) == dict.fromkeys(STAGES, "unchanged")


def test_another_clone_restores_it(site: Site, ended: Ended) -> None:
    assert ended.restored.state_name == "Completed"
    assert how(site.artifacts(ended.restored.id)) == dict.fromkeys(STAGES[:3], "from the cache")
    result, hashes = site.result(ended.restored.id), site.result(ended.again.id)["hashes"]
    assert result["hashes"] == {name: hashes[name] for name in STAGES[:3]}
    assert Path(result["workspace"]).is_relative_to(site.second)


def test_sweep_compares(site: Site, ended: Ended) -> None:
    assert ended.sweep.state_name == "Completed"
    first, second = site.children(ended.sweep.id)
    for run in (first, second):  # what they have in common was made before
        assert how(site.artifacts(run.id)) == {**dict.fromkeys(STAGES, "ran"), **dict.fromkeys(STAGES[:2], "from the cache")}
    assert [first.name, second.name] == ["digits rdpo.steps=2", "digits rdpo.steps=3"]
    rows = site.artifacts(ended.sweep.id)["comparison"].splitlines()[2:6]
    assert [row.split(" | ")[:2] for row in rows] == [
        [f"| rdpo.steps={steps}", sampler] for steps in (2, 3) for sampler in ("distilled", "rdpo")
    ]
    assert {row.split()[-2] for row in rows} <= set(exp_list(site))


def test_a_sweep_of_workers_compares_the_same(site: Site, ended: Ended) -> None:
    assert ended.shared.state_name == "Completed"
    tables = [site.artifacts(run.id)["comparison"].splitlines() for run in (ended.sweep, ended.shared)]
    here, elsewhere = ([line.rpartition(" | ")[0] for line in table] for table in tables)  # but for the experiments' names
    assert here == elsewhere
    children = site.children(ended.shared.id)
    assert {run.name for run in children} == {"digits rdpo.steps=2", "digits rdpo.steps=3"}
    assert all(run.deployment_id for run in children)


def test_what_cannot_pass_is_tried_once(site: Site, ended: Ended) -> None:
    wrong = state(ended.wrong)
    assert (wrong.name, wrong.message) == ("Failed", "rdpo: learning_rate: found -1; valid: above 0")
    assert {name: task.run_count for name, task in site.tasks(ended.wrong.id).items()} == {"backbone": 1, "refs": 1, "rdpo": 1}


@pytest.mark.parametrize("fault", ["network", "memory"])
def test_what_may_pass_is_tried_again(site: Site, ended: Ended, fault: str) -> None:
    (found,) = ended.local[fault]
    assert found["name"] == "Completed", found
    run = UUID(found["run"])
    stages = {row["stage"]: row for row in json.loads(site.artifacts(run)["stages"])}
    assert list(stages) == ["backbone", "refs", "rdpo"]
    assert stages["rdpo"]["attempts"] == 3  # the others are those of both runs, which may get in each other's way
    sizes = ["no", "4", "2"] if fault == "memory" else ["no"] * 3
    assert [line for line in site.log(run) if line.startswith("rdpo: ") and "cap" in line] == [
        f"rdpo: {size} cap, one process" for size in sizes
    ]


def test_a_stage_has_so_much_time(ended: Ended) -> None:
    found = ended.local["bad"][-1]
    assert found["name"] == "Failed"
    assert re.match(r"rdpo: took more than 0.0005 h, and was stopped; .*\(flows.hours.rdpo\)", found["message"])
    assert found["seconds"] < 25


@pytest.mark.parametrize("index", range(len(BAD)))
def test_refuses_before_any_stage(site: Site, ended: Ended, index: int) -> None:
    found = ended.local["bad"][index]
    assert found["name"] == "Failed"
    assert re.fullmatch(list(BAD)[index], found["message"]), found["message"]
    assert not site.tasks(UUID(found["run"]))


def test_refuses_changes_that_are_not_committed(site: Site, ended: Ended) -> None:
    (found,) = ended.local["dirty"]
    assert found["name"] == "Failed"
    assert re.fullmatch(f"{site.plain}: found changes that are not committed, to params.yaml; valid: .*", found["message"])
    assert not site.tasks(UUID(found["run"]))


def test_deploys_on_a_fresh_server_and_again(site: Site, deployed: Deployed) -> None:
    deployed.again.wait()
    assert deployed.again.process.returncode == 0
    assert {each.name for each in site.client.read_deployments()} == {"rdpo-digits", "sweep"}
    assert [(pool.name, pool.type) for pool in site.client.read_work_pools()] == [("gpu", "process")]
    (automation,) = site.client.read_automations_by_name(WATCH)
    assert automation.enabled


def how(artifacts: Mapping[str, Any]) -> dict[str, str]:
    """Each stage came about, as the table says."""
    return {row["stage"]: row["how"] for row in json.loads(artifacts["stages"])}


def exp_list(site: Site) -> list[str]:
    command = [sys.executable, "-m", "dvc", "exp", "list", "--all-commits", "--name-only"]
    return subprocess.run(command, cwd=site.source, capture_output=True, text=True, check=True).stdout.split()


def read_yaml(file: Path) -> Any:
    return yaml.safe_load(file.read_text())
