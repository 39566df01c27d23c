"""The whole of it on this machine, in some minutes: a server, a work pool, a worker, a run on a shrunken configuration.

What is started here is stopped in the end. The server's database stays in .dvc/tmp/prefect, for its pages to be read later.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import typer

HOME = Path(".dvc/tmp/prefect")
SMALL = (  # of the pipeline on digits: the same stages, and too little of everything
    *(f"~samplers.{name}" for name in ("heun", "dpm_solver_2", "dpm_solver_pp_2m", "ipndm_2", "ipndm_3")),
    "backbone.iterations=150",
    "backbone.channels=16",
    "backbone.classifier_iterations=200",
    "teacher.train=256",
    "teacher.validation=128",
    "distill.iterations=60",
    "rdpo.iterations=8",
    "rdpo.validation=256",
    "sample.seeds=0-255",
)
PATIENCE = 90.0
"""Seconds in which the server has to answer."""
GRACE = 40.0
"""Seconds in which what was started has to end."""


def main() -> None:
    """Run the demonstration; exits with the run's status."""
    port = _free_port()
    address = f"http://127.0.0.1:{port}"
    environment = {
        **os.environ,
        "PREFECT_HOME": str(HOME.absolute()),
        "PREFECT_API_URL": f"{address}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_TASKS_TAG_CONCURRENCY_SLOT_WAIT_SECONDS": "1",
    }
    HOME.mkdir(parents=True, exist_ok=True)
    prefect = [sys.executable, "-m", "prefect"]
    with _started([*prefect, "server", "start", "--host", "127.0.0.1", "--port", str(port)], environment, "server"):
        _wait_for(f"{address}/api/health")
        typer.echo(f"Server: {address}")
        subprocess.run([*prefect, "--no-prompt", "deploy", "--all"], env=environment, check=True, capture_output=True)  # noqa: S603
        with _started([*prefect, "worker", "start", "--pool", "gpu", "--limit", "1"], environment, "worker"):
            changed = [part for override in SMALL for part in ("-S", override)]
            typer.echo(f"The same without Prefect: dvc exp run {shlex.join(changed)}")
            command = [sys.executable, "-m", "flows.run", "rdpo/rdpo-digits", *changed]
            status = subprocess.run(command, env=environment, check=False)  # noqa: S603
    again = f"PREFECT_HOME={HOME} PREFECT_API_URL={address}/api prefect server start --port {port}"
    typer.echo(f"Stopped. Its pages again: {again}")
    raise typer.Exit(status.returncode)


@contextmanager
def _started(command: list[str], environment: dict[str, str], name: str) -> Iterator[None]:
    """A command in the background, and its end."""
    with (HOME / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)  # noqa: S603
        try:
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait_for(url: str) -> None:
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        try:
            if httpx.get(url, timeout=5).is_success:
                return
        except httpx.HTTPError:
            time.sleep(0.5)
    raise SystemExit(f"{url}: no answer in {PATIENCE:g} s; {HOME / 'server.log'} says why")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


if __name__ == "__main__":
    typer.run(main)
