import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from solvers import SOLVERS, depth, polynomial
from stages.import_epd import BACKBONES
from stages.params import (
    EPD,
    EVALUATIONS,
    S4S,
    Classical,
    ParallelMultistep,
    Params,
    ParamsError,
    Pipeline,
    S4SAlt,
    Teacher,
    load_params,
    serial_evaluations,
)  # fmt: skip

ROOT = Path(__file__).parents[2]


def composed(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return OmegaConf.to_container(compose("config", list(overrides)), resolve=True)  # type: ignore[return-value]


def concatenated(read: Callable[[str], str]) -> str:
    """What `make params` writes."""
    common = re.sub(r"(?ms)^defaults:.*?^\n", "", read("conf/config.yaml"))
    names = ("family/epd", "backbone/digits", "metrics/digits", "rdpo/shared")
    groups = [re.sub(r"(?ms)^# @package.*?^\n", "", read(f"conf/{name}.yaml")) for name in names]
    return "\n".join([common, *groups])


def committed(path: str) -> str:
    """As HEAD has it: an experiment may have rewritten the workspace's."""
    return subprocess.run(["git", "show", f"HEAD:{path}"], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_params_yaml_is_the_composition_of_conf() -> None:
    assert yaml.safe_load(concatenated(lambda path: (ROOT / path).read_text())) == composed()
    assert committed("params.yaml") == concatenated(committed)


FAMILIES = sorted(file.stem for file in (ROOT / "conf/family").glob("*.yaml"))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_composes_to_five_serial_evaluations(family: str, tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(composed(f"family={family}")))
    params = load_params(file)
    assert params.distill.family == family
    assert serial_evaluations(params.num_steps, params.afs, params.distill) == 5


@pytest.mark.parametrize("num_steps", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("afs", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_number_of_steps_leaves_the_samplers_comparable(family: str, afs: bool, num_steps: int, tmp_path: Path) -> None:
    settings = composed(f"family={family}")["distill"]
    if num_steps == 2 and afs and ("history" in settings or family == "d_ode"):
        with pytest.raises(ParamsError, match="num_steps: found 2; valid: 3 or more with afs"):
            load(tmp_path, family, num_steps, afs)
    elif num_steps < 4 and "history" in settings:
        with pytest.raises(ParamsError, match=f"distill.history: found 3; valid: 1, for ipndm_2, to {num_steps - 1}"):
            load(tmp_path, family, num_steps, afs)
    else:
        assert load(tmp_path, family, num_steps, afs).num_steps == num_steps


def load(folder: Path, family: str, num_steps: int, afs: bool) -> Params:
    changed = composed(f"family={family}", f"num_steps={num_steps}", f"afs={afs}")
    (folder / "params.yaml").write_text(yaml.safe_dump(changed))
    return load_params(folder / "params.yaml")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_knob_is_explained_where_it_stands(family: str) -> None:
    """But those of a sampler, explained at the first one."""
    section, lines = "", concatenated(lambda path: (ROOT / path.replace("epd", family)).read_text()).splitlines()
    second_sampler, after = (lines.index(line) for line in ("  euler:", "sample:"))
    lines = [line for line in [*lines[:second_sampler], *lines[after:]] if line not in ("  name: time_uniform", "  rho: 2.0")]
    for line in lines:
        if line and not line.startswith("#"):
            key, _, rest_of_line = line.partition(":")
            section = key if not key.startswith(" ") else section
            header = not rest_of_line.split("#")[0].strip() and not key.startswith(" ")
            assert header or "  # " in line or key.strip() == "schedule", line


def test_the_solvers_that_may_be_named_are_those_there_are() -> None:
    assert set(get_args(Classical.model_fields["solver"].annotation)) == set(SOLVERS)
    assert set(get_args(Teacher.model_fields["solver"].annotation)) == set(SOLVERS) - {"ddpm"}
    sigmas = polynomial(9, 0.1, 10.0)
    single = set(SOLVERS) - {"euler", "ddpm"}
    multistep = {name for name in single if SOLVERS[name](3, sigmas).nodes.tolist() == sigmas[3:4].tolist()}
    for section in (S4S, S4SAlt, ParallelMultistep):
        assert set(get_args(section.model_fields["start"].annotation)) == multistep
    per_step = {name: depth(solver, sigmas) // 8 for name, solver in SOLVERS.items()}
    assert {name: count for name, count in per_step.items() if count > 1} == EVALUATIONS


def take_family(params: dict[str, Any], family: str, **changes: object) -> None:
    """Another family's sections, with other settings."""
    mine = composed(f"family={family}")
    params |= {name: mine[name] for name in ("num_steps", "schedule", "distill")}
    params["distill"] |= changes


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


def same_weights(params: dict[str, Any]) -> None:
    params["metrics"]["weights"]["pick_score"] = params["metrics"]["weights"]["hps"]


def of(backbone: str, *changes: Callable[[dict[str, Any]], None]) -> Callable[[dict[str, Any]], None]:
    def replace(params: dict[str, Any]) -> None:
        mine = composed(f"backbone={backbone}")
        for change in changes:
            change(mine)
        params.clear()
        params |= mine

    return replace


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("num_steps", 1), "params.yaml: num_steps: found 1; valid: greater than or equal to 2"),
        (put("num_steps", 3.5), "params.yaml: num_steps: found 3.5; valid: a valid integer"),
        (put("num_steps", "4"), "params.yaml: num_steps: found '4'; valid: a valid integer"),
        (put("num_steps", None), "params.yaml: num_steps: missing; valid: a value, as explained in conf/"),
        (put("num_step", 4), "params.yaml: unknown num_step; valid: seed, num_steps, afs"),
        (put("afs", 1), "params.yaml: afs: found 1; valid: a valid boolean"),
        (put("schedule.name", "cosine"), "params.yaml: schedule.name: found 'cosine'; valid: 'polynomial', 'logsnr'"),
        (put("schedule.name", None), "params.yaml: schedule.name: missing"),
        (put("schedule.rho", 0.001), "params.yaml: schedule.rho: found 0.001; valid: greater than or equal to 0.1"),
        (put("schedule.rho", -1.0), "params.yaml: schedule.rho: found -1.0; valid: greater than or equal to 0.1"),
        (put("schedule.name", "logsnr"), "params.yaml: schedule.rho: found 7.0; valid: None"),
        (put("distill.point", 2), "params.yaml: distill: unknown point; valid: learning_rate, iterations"),
        (put("distill.loss", "lpips"), "params.yaml: distill.loss: found 'lpips'; valid: 'end', 'nodes' or 'features'"),
        (put("distill.family", "rnn"), "params.yaml: distill.family: found 'rnn'; valid: 'epd', 'epd_plugin', 'amed', 's4s'"),
        (put("distill.family", "s4s"), "params.yaml: distill: unknown points, scale_dir; valid: "),
        (lambda p: take_family(p, "s4s_alt", rounds=300), "params.yaml: distill: rounds: found 300; valid: at most half the "),
        (
            lambda p: take_family(p, "s4s", history=9),
            "params.yaml: distill.history: found 9; valid: 1, for ipndm_2, to 6, the st",
        ),
        (lambda p: take_family(p, "s4s", start="ipndm_4", history=2), "distill.history: found 2; valid: 3, for ipndm_4, to 6"),
        (put("distill.ema_decay", 1.0), "params.yaml: distill.ema_decay: found 1.0; valid: less than 1"),
        (put("distill.learning_rate", float("nan")), "params.yaml: distill.learning_rate: found nan; valid: "),
        (put("rdpo", 3), "params.yaml: rdpo: found 3; valid: a valid dictionary"),
        (put("rdpo.tables", 1), "params.yaml: rdpo.tables: found 1; valid: greater than or equal to 2"),
        (put("rdpo.clip", 1.0), "params.yaml: rdpo.clip: found 1.0; valid: less than 1"),
        (put("rdpo.clip", 0.0), "params.yaml: rdpo.clip: found 0.0; valid: greater than 0"),
        (put("rdpo.groups", 0), "params.yaml: rdpo.groups: found 0; valid: greater than or equal to 1"),
        (put("rdpo.concentration", float("nan")), "params.yaml: rdpo.concentration: found nan; valid: "),
        (put("rdpo.direction_std", 1e-4), "params.yaml: rdpo: direction_std: found 0.0001; valid: 0, or 0.001 to 1"),
        (put("rdpo.group", "own"), "params.yaml: rdpo.group: found 'own'; valid: 'shared', 'prompt' or 'mixed'"),
        (put("rdpo.method", "ppo"), "params.yaml: rdpo.method: found 'ppo'; valid: 'rdpo', 'reward_gradient' or 'cma_es'"),
        (put("rdpo.batch_size", 7), "params.yaml: rdpo: batch_size: found 7; valid: 8 or more, the tables of a group"),
        (
            lambda params: (take_family(params, "d_ode"), params["rdpo"].update(coefficient_std=0.0)),
            "rdpo.coefficient_std, rdpo.time_std: found 0; valid: one above 0, or there is nothing to draw of d_ode",
        ),
        (
            lambda params: (take_family(params, "parallel_multistep"), params["rdpo"].update(coefficient_std=0.0)),
            "rdpo.time_std, rdpo.node_std: found 0; valid: one above 0, or there is nothing to draw of parallel_multistep",
        ),
        (put("rdpo.minibatch", 100), "rdpo: minibatch: found 100; valid: null, or what divides groups * tables, 128"),
        (
            lambda params: params["rdpo"].update(method="cma_es", tables=3),
            "rdpo: tables: found 3; valid: 4 or more, for cma_es, whose generation they are",
        ),
        (put("samplers.euler.solver", "eular"), "params.yaml: samplers.euler.solver: found 'eular'; valid: 'euler', 'heun'"),
        (put("samplers.A b", {}), "params.yaml: samplers.A b: found {}; valid: String should match pattern"),
        (
            put("samplers.rdpo.model", "models/distilled"),
            "samplers.rdpo: Learned(solver='predictor', model='models/distilled')",
        ),
        (put("rdpo.concentration", 1e-4), "params.yaml: rdpo.concentration: found 0.0001; valid: greater than or equal to 1"),
        (
            put("samplers.euler.num_steps", 0),
            "params.yaml: samplers.euler.num_steps: found 0; valid: greater than or equal to 2",
        ),
        (put("samplers.heun.afs", False), "samplers.heun: heun makes 2 evaluations per step, with afs False never the "),
        (
            put("samplers.heun.solver", "rk4"),
            "samplers.heun: rk4 makes 4 evaluations per step, with afs None never the ",
        ),
        (put("samplers.distilled", None), "samplers: no distilled; valid: with it"),
        (put("backbone.name", "sd4"), "params.yaml: backbone.name: found 'sd4'; valid: 'digits', 'sd15', 'sd3', 'flux'"),
        (
            of("tiny_sd3", lambda p: take_family(p, "amed")),
            "distill.family: found 'amed', which needs a network's features; val",
        ),
        (of("flux_dev", put("prompts.negative", "grey")), "prompts.negative: found 'grey'; valid: '', for flux"),
        (
            put("metrics.features", "log_probability"),
            "params.yaml: metrics.features: found 'log_probability'; valid: 'accuracy'",
        ),
        (
            of("sd15", put("metrics.reward", {"hps": 0.5, "clip_score": 0.5}), put("metrics.judges", ["mps"])),
            "metrics: features: found clip_l14, of which clip_l14 is what the reward's clip_score is made of",
        ),
        (
            of(
                "sd15",
                put("metrics.reward", {"aesthetic": 1.0}),
                put("metrics.judges", ["mps", "clip_score"]),
                put("metrics.features", "inception"),
            ),
            "metrics: judges: found clip_score, of which clip_l14 is what the reward's aesthetic is made",
        ),
        (of("sd15", same_weights), "metrics: weights: found the reward's, hps, for pick_score; valid: weights of its own"),
        (of("sd15", put("metrics.features", "inception")), "sample.seeds: found 1000 images; valid: 2048 or more, for metri"),
        (of("sd15", put("metrics.judges", ["mps", "mps"])), "metrics: judges: found mps twice; valid: each once"),
        (
            put("metrics.reward", {"log_probability": 0.0}),
            "metrics: reward: found {'log_probability': 0.0}; valid: a weig",
        ),
        (
            put("metrics.reward", {"log_probability": -1.0}),
            "metrics.reward.log_probability: found -1.0; valid: greater than or",
        ),
        (of("sd15", put("metrics.reward", {"hpsv3": 1.0})), "valid: 'log_probability' or 'accuracy'"),
        (put("report.base", "eular"), "report.base: found 'eular'; valid: distilled, dpm_solver_2,"),
        (put("evaluate.ranges", 3), "evaluate.ranges: found 3 for 4096 images; valid: what divides them"),
        (of("sd15", put("refs.source", "folder")), "refs: path: found None; valid: where the folder is"),
        (of("sd15", put("refs.path", "images")), "path: found 'images'; valid: null, for the model's own images"),
        (
            of("sd15", put("refs.source", "zip"), put("refs.path", "coco.zip"), put("refs.split", "test")),
            "split: found {'split': 'test'}; valid: null, for zip",
        ),
        (put("guidance_scale", -0.5), "params.yaml: guidance_scale: found -0.5; valid: greater than or equal to 0"),
        (put("sample.seeds", "0-3,2"), "params.yaml: sample.seeds: found 2 twice in '0-3,2'; valid: as 0-63,100"),
        (put("sample.seeds", "5"), "params.yaml: sample.seeds: found '5', one image; valid: two or more"),
        (put("compute.device", "tpu"), "params.yaml: compute.device: found 'tpu'; valid: 'auto', 'cpu' or 'cuda'"),
        (put("prompts.test", 3), "params.yaml: prompts: validation, test: found None, 3; valid: two numbers, or null twice"),
        (
            put("metrics.judges", ["log_probability"]),
            "metrics: judges: found ['log_probability']; valid: without log_probability",
        ),
        (put("metrics.judges", []), "params.yaml: metrics.judges: found []; valid: List should have at least 1 item"),
        (
            put("metrics.reward", {"clip_score": 1.0}),
            "metrics: weights: found those of nothing; valid: also of clip_l14, which is in use",
        ),
        (
            put("schedule", {"name": "discrete", "rho": 1.0}),
            "schedule.name: found 'discrete'; valid: another, for the backbone d",
        ),
        (
            of("sd15", put("schedule", {"name": "flowmatch", "rho": None})),
            "schedule.name: found 'flowmatch'; valid: another, for",
        ),
        (of("sd3_512", put("afs", True)), "afs: found True; valid: False, for a flow model, whose first state is noise alone"),
        (of("sd3_512", put("backbone.revision", "main")), "params.yaml: backbone.revision: found 'main'; valid: "),
        (
            of("tiny_sd3", put("backbone.source", "hub")),
            "backbone: revision: found None; valid: 40 hexadecimal digits, the com",
        ),
        (of("sd3_512", put("backbone.height", 0)), "params.yaml: backbone.height: found 0; valid: greater than or equal to 1"),
        (
            of("sd3_512", put("backbone.dtype", "int8")),
            "params.yaml: backbone.dtype: found 'int8'; valid: 'float32', 'float16' or",
        ),
        (
            of("sd3_512", put("distill.loss", "features")),
            "distill.loss: found 'features'; valid: 'end' or 'nodes', for the back",
        ),
        (
            of("sd3_512", put("refs", {"source": "data"})),
            "metrics: found refs.source data; valid: those of conf/backbone for sd3",
        ),
        (put("samplers.reference.num_steps", 0), "params.yaml: samplers.reference.num_steps: found 0; valid: greater than or"),
    ],
)
def test_a_wrong_value_is_named_with_what_would_be_valid(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    params = composed()
    change(params)
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(params))
    with pytest.raises(ParamsError) as error:
        load_params(file)
    assert message.replace("params.yaml", str(file)) in str(error.value)


def test_every_error_is_told_at_once(tmp_path: Path) -> None:
    params = composed()
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


def test_the_check_is_a_command(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("num_steps: 1\n")
    done = subprocess.run([sys.executable, "-m", "stages.params"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "num_steps: found 1; valid: greater than or equal to 2" in done.stderr
    assert "Traceback" not in done.stderr


PUBLISHED = {"sd15": "sd15", "sd3_512": "sd3-512", "sd3_1024": "sd3-1024", "flux_dev": "flux"}


@pytest.mark.parametrize("backbone", PUBLISHED)
def test_a_backbone_has_what_was_published_for_it(backbone: str, tmp_path: Path) -> None:
    """As the importer of published tables knows it, independently."""
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(composed(f"backbone={backbone}")))
    params, published = load_params(tmp_path / "params.yaml"), BACKBONES[PUBLISHED[backbone]]
    assert isinstance(params.backbone, Pipeline)
    assert (params.backbone.id, params.backbone.licence) == (published.backbone.name, published.backbone.licence)
    assert (params.backbone.height, params.backbone.width) == (published.resolution,) * 2
    assert params.guidance_scale == published.guidance_scale
    assert params.schedule.name == published.schedule
    assert isinstance(params.distill, EPD)
    assert (params.distill.points, params.afs, params.teacher.solver, params.teacher.extra_nodes) == (
        2,
        False,
        "dpm_solver_2",
        1,
    )
    assert serial_evaluations(params.num_steps, params.afs, params.distill) == (16 if backbone == "flux_dev" else 20)
    rollouts, concentration = {"sd15": (8, 20.0), "sd3_512": (16, 10.0)}.get(backbone, (8, 10.0))
    assert (params.rdpo.groups * params.rdpo.tables, params.rdpo.concentration) == (rollouts, concentration)
    assert (params.rdpo.group, params.rdpo.tables, params.rdpo.learning_rate) == ("mixed", 4, 7e-5)
    assert params.metrics.rewarded == {"hps": 1.0}, "as published"
    assert params.metrics.judges == ["pick_score", "image_reward", "clip_score", "aesthetic", "mps"]
    hub = [where for where in params.metrics.weights.values() if where.source == "hub"]
    assert all(where.revision for where in hub)
    assert all(where.sha256 for name, where in params.metrics.weights.items() if where not in hub and name != "mps")


def test_the_dead_id_is_nowhere() -> None:
    assert not [file for file in (ROOT / "conf").rglob("*.yaml") if "runwayml" in file.read_text()]


def test_the_tiny_backbones_are_those_of_the_families(tmp_path: Path) -> None:
    for name in ("sd15", "sd3", "flux"):
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(composed(f"backbone=tiny_{name}")))
        assert load_params(tmp_path / "params.yaml").backbone.name == name
