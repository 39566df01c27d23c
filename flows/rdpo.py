"""The pipeline as a flow: DVC's stages are its tasks."""

import platform
from pathlib import Path
from typing import Any

from prefect import State, flow, get_run_logger

from flows.pipeline import read_graph, read_hashes, repro, select
from flows.runs import SOURCE, Backbone, Overrides, begun, experiment_name, run_name, watched
from flows.server import prepare_to_deploy
from flows.shown import PAGE, read_results, show_numbers, show_pictures, show_report
from flows.stage import make
from flows.workspace import remotes, save_experiment, use_remote

prepare_to_deploy()


@flow(
    name="rdpo",
    flow_run_name=run_name,
    persist_result=True,
    result_serializer="json",
)
def rdpo(
    backbone: Backbone = "digits",
    overrides: Overrides = [],  # noqa: B006
    targets: list[str] = [],  # noqa: B006
    remote: str | None = None,
    push: bool = False,
    force: bool = False,
) -> "dict[str, Any] | State[Any]":
    """Learn a few-step sampler for a backbone and compare it with others: DVC's pipeline, stage by stage.

    It runs on the commit that the worker's clone is at, in a workspace of its own, and ends as an experiment of DVC's.

    Args:
        backbone: a file of conf/backbone.
        overrides: of parameters, as for `dvc exp run -S`.
        targets: stages to make, with all that they need; `sample` stands for all of sample@...; none: all.
        remote: of DVC's, to restore from what was made elsewhere, and to push to; none: the default one, if there is one.
        push: what every stage makes, as soon as it is made, and the experiment.
        force: run stages whatever is cached.
    """
    return watched(lambda: _rdpo(backbone, overrides, targets, remote, push, force))


def _rdpo(
    backbone: str, overrides: list[str], targets: list[str], remote: str | None, push: bool, force: bool
) -> dict[str, Any]:
    with begun([], backbone, overrides) as begin:
        folder = begin.folder
        remote = known_remote(folder, remote, push)
        graph = select(read_graph(folder), targets)
        get_run_logger().info("%d stages of commit %s in %s", len(graph), begin.commit[:12], folder)
        rows = make(folder, graph, begin.params, remote, remote if push else None, force)
        hashes = {name: made for name, made in read_hashes(folder).items() if name in graph}
        results = read_results(folder, [file for made in hashes.values() for file in made])
        experiment = report = None
        if "report" in graph:
            experiment = experiment_name()
            if refused := save_experiment(SOURCE, folder, experiment, push):
                get_run_logger().warning("experiment %s was not pushed: %s", experiment, refused)
            show_numbers(results, experiment)
            report = show(folder, experiment)
        return {
            "backbone": backbone,
            "overrides": overrides,
            "commit": begin.commit,
            "workspace": str(folder),
            "experiment": experiment,
            "stages": rows,
            "hashes": hashes,
            "results": results,
            "report": report,
        }


def show(folder: Path, experiment: str) -> str:
    """Results as artifacts; the report's text."""
    if not (folder / PAGE).exists():  # which is no output of DVC's
        repro(folder, "report", get_run_logger().debug, force=True, pull=False, seconds=3600, environment={})
    show_pictures(folder)
    return show_report(
        folder,
        {
            "Pictures and curves": f"`{folder / PAGE}` on {platform.node()}",
            "Everything, in the repository there": f"`dvc exp apply {experiment}`; on another machine first "
            f"`dvc exp pull origin {experiment}`, if it was pushed",
        },
    )


def known_remote(folder: Path, remote: str | None, push: bool) -> str | None:
    """The remote, which DVC then uses there; None: there is none. ValueError where that is not what was asked for."""
    names, default = remotes(folder)
    if remote is not None and remote not in names:
        raise ValueError(f"remote: found {remote!r}; valid: {', '.join(names) or 'none, until dvc remote add'}")
    if push and remote is None and default is None:
        valid = f"one of {', '.join(names)}" if names else "dvc remote add --default NAME URL, and git commit it"
        raise ValueError(f"push: found no default remote to push to; valid: {valid}")
    return use_remote(folder, remote or default)
