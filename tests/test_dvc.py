"""dvc.yaml against the stages' code, and what follows from what."""

import importlib
import inspect
import warnings
from functools import cache
from pathlib import Path

import networkx
import pytest
import yaml
from dvc.repo import Repo

from stages.files import MADE_BY

ROOT = Path(__file__).parents[1]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


@cache
def graph() -> networkx.DiGraph:
    """DVC's own graph of the stages, each edge from a stage to one that it depends on."""
    with Repo(str(ROOT)) as repo:
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of pygtrie, in dvc
            found = repo.index.graph
        addresses = {stage: stage.addressing for stage in found}
        names: networkx.DiGraph = networkx.relabel_nodes(found, addresses)
        for stage, address in addresses.items():
            names.nodes[address]["params"] = {p for dep in stage.deps for p in getattr(dep, "params", [])}
        return names


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_declares_the_sections_that_its_function_receives(name: str) -> None:
    definition = STAGES[name].get("do", STAGES[name])
    declared = {param.split(".")[0] for param in definition.get("params", [])}
    function = getattr(importlib.import_module(f"stages.{name}"), name)
    received = {p.name for p in inspect.signature(function).parameters.values() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert declared == received - {"compute"}, "which does not decide what is computed"
    assert definition["cmd"].startswith(f"python -m stages.{name}")
    assert f"stages/{name}.py" in definition["deps"]


def test_the_stage_that_an_error_names_is_the_one_that_makes_the_file() -> None:
    for path, stage in MADE_BY.items():  # the first that fits is taken
        definition = STAGES[stage].get("do", STAGES[stage])
        outputs = [
            out if isinstance(out, str) else next(iter(out))
            for key in ("outs", "plots", "metrics")
            for out in definition.get(key, [])
        ]
        assert any(out == str(path) or out.startswith(f"{path}/") for out in outputs), path


def rerun(param: str) -> set[str]:
    """What a change of one parameter, named with its section, runs again."""
    changed = [name for name, data in graph().nodes(data=True) if any(f"{param}.".startswith(f"{p}.") for p in data["params"])]
    return set(changed).union(*(networkx.ancestors(graph(), name) for name in changed))


def test_rdpo_parameters_rerun_rdpo_and_what_follows() -> None:
    assert rerun("rdpo.learning_rate") == {"rdpo", "sample@rdpo", "evaluate@rdpo", "report"}


def test_distillation_parameters_leave_the_classical_samplers_alone() -> None:
    assert rerun("distill.learning_rate") == {
        "distill", "rdpo", "sample@distilled", "sample@rdpo", "evaluate@distilled", "evaluate@rdpo", "report",
    }  # fmt: skip


def test_another_family_reruns_what_is_compared_with_it() -> None:
    assert rerun("distill.family") == set(graph()) - {"backbone", "metrics", "refs", "teacher"}


def test_num_steps_reruns_all_but_the_backbone_and_its_statistics() -> None:
    assert rerun("num_steps") == set(graph()) - {"backbone", "metrics", "refs"}


def test_other_judges_ask_for_no_other_samples() -> None:
    again = rerun("metrics.judges")
    assert {"metrics", "refs", "rdpo", "evaluate@euler", "report"} <= again
    assert not {"backbone", "teacher", "distill", "sample@euler", "sample@distilled"} & again
