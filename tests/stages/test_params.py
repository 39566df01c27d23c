import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from solvers import SOLVERS
from stages.params import Classical, Params, ParamsError, Section, Teacher, load_params

ROOT = Path(__file__).parents[2]


def test_params_yaml_is_the_composition_of_conf() -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        composed = OmegaConf.to_container(compose("config"), resolve=True)
    assert yaml.safe_load((ROOT / "params.yaml").read_text()) == composed


def test_every_knob_is_explained_where_it_stands() -> None:
    """But those of a sampler, explained at the first one."""
    explained, section = set(), ""
    for line in (ROOT / "params.yaml").read_text().splitlines():
        if line and not line.startswith(("#", " ")):
            section = line.split(":")[0]
        if "  # " in line:
            explained.add((section, line.split(":")[0].strip()))
    for name, field in Params.model_fields.items():
        if name != "samplers":
            section = field.annotation
            keys = list(section.model_fields) if isinstance(section, type) and issubclass(section, Section) else [name]
            missing = [key for key in keys if (name, key) not in explained and key not in ("batch_size", "iterations", "name")]
            assert not missing or (name, name) in explained, (name, missing)


def test_the_solvers_that_may_be_named_are_those_there_are() -> None:
    for section in (Classical, Teacher):
        assert set(get_args(section.model_fields["solver"].annotation)) == set(SOLVERS)


def put(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    *sections, key = path.split(".")

    def change(params: dict[str, Any]) -> None:
        for section in sections:
            params = params[section]
        if value is None:
            del params[key]
        else:
            params[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("num_steps", 1), "params.yaml: num_steps: found 1; valid: greater than or equal to 2"),
        (put("num_steps", 3.5), "params.yaml: num_steps: found 3.5; valid: a valid integer"),
        (put("num_steps", "4"), "params.yaml: num_steps: found '4'; valid: a valid integer"),
        (put("num_steps", None), "params.yaml: num_steps: missing; valid: a value, as explained in conf/"),
        (put("num_step", 4), "params.yaml: unknown num_step; valid: seed, num_steps, afs"),
        (put("afs", 1), "params.yaml: afs: found 1; valid: a valid boolean"),
        (put("schedule.name", "cosine"), "params.yaml: schedule: found {'name': 'cosine', 'rho': 7.0}; valid: 'name' one of"),
        (put("schedule.rho", -1.0), "params.yaml: schedule.rho: found -1.0; valid: greater than 0"),
        (put("schedule.name", "logsnr"), "params.yaml: schedule: unknown rho; valid: name"),
        (put("distill.point", 2), "params.yaml: distill: unknown point; valid: points, scale_dir"),
        (put("distill.loss", "lpips"), "params.yaml: distill.loss: found 'lpips'; valid: 'end' or 'nodes'"),
        (put("distill.learning_rate", float("nan")), "params.yaml: distill.learning_rate: found nan; valid: "),
        (put("rdpo", 3), "params.yaml: rdpo: found 3; valid: a valid dictionary"),
        (put("rdpo.tables", 1), "params.yaml: rdpo.tables: found 1; valid: greater than or equal to 2"),
        (put("samplers.euler.solver", "eular"), "params.yaml: samplers.euler: found {'afs': True"),
        (put("samplers.euler.solver", "eular"), "'solver' one of 'euler', 'heun'"),
        (
            put("samplers.euler.num_steps", 0),
            "params.yaml: samplers.euler.num_steps: found 0; valid: greater than or equal to 2",
        ),
        (put("afs", False), ".afs: found True; valid: False like afs"),
        (put("samplers.distilled", None), "samplers with distilled among them"),
        (put("backbone.name", "sd3"), "params.yaml: backbone.name: found 'sd3'; valid: 'digits'"),
    ],
)
def test_a_wrong_value_is_named_with_what_would_be_valid(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    change(params)
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(params))
    with pytest.raises(ParamsError) as error:
        load_params(file)
    assert message.replace("params.yaml", str(file)) in str(error.value)


def test_every_error_is_told_at_once(tmp_path: Path) -> None:
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    put("num_steps", 1)(params)
    put("rdpo.clip", 2.0)(params)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(ParamsError, match=r"(?s)num_steps: found 1.*rdpo.clip: found 2.0"):
        load_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("text", ["a: [", "a: 1\na: 2\n", "- 1\n", "", "\x00"])
def test_what_is_no_parameters_at_all_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ParamsError, match=r"params\.yaml: "):
        load_params(tmp_path / "params.yaml")


def test_the_check_is_quick(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("num_steps: 1\n")
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "stages.params"], cwd=tmp_path, capture_output=True, text=True)
    assert time.perf_counter() - start < 5  # a second on an idle machine
    assert done.returncode == 1
    assert "num_steps: found 1; valid: greater than or equal to 2" in done.stderr
    assert "Traceback" not in done.stderr
