"""The pipeline on tiny text-to-image models: what it computes does not depend on batches, ranks and interruptions."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pyarrow import parquet
from safetensors.torch import load_file

with warnings.catch_warnings():  # of diffusers' and transformers' own imports
    warnings.simplefilter("ignore")
    from tiny import TINY, saved
    from tiny_metrics import saved_metrics

from solvers import load_predictor
from stages import weights
from stages.files import CheckpointError, InputError, StageError
from stages.imagesets import image_set
from stages.params import load_params
from stages.prompts import Prompts

from .conftest import ROOT, hashes, run
from .test_params import composed

SEEDS = "0-8,20"
WATCHED = ["brightness", "saturation"]
METRICS = ["hps", "pick_score", "image_reward", "clip_score", "aesthetic", "mps"]


def params_of(family: str, models: Path) -> dict[str, Any]:
    """conf/backbone/tiny_FAMILY.yaml, its models in a folder, and fewer samples."""
    params = composed(f"backbone=tiny_{family}")
    params["backbone"]["source"] = str(models / family)
    for name, where in params["metrics"]["weights"].items():
        where["source"] = str(models / name)
    params["prompts"]["file"] = str(ROOT / params["prompts"]["file"])
    params["teacher"] |= {"train": 8, "validation": 4, "batch_size": 4}
    params["distill"] |= {"iterations": 2, "batch_size": 4, "validate_every": 1}
    params["refs"] |= {"images": 20, "batch_size": 16}
    params["rdpo"] |= {"iterations": 2, "validate_every": 1, "groups": 2, "tables": 2, "checkpoint_every": 1}
    params["samplers"]["reference"]["num_steps"] = 4
    params["sample"] |= {"seeds": SEEDS, "batch_size": 4}
    params["evaluate"]["batch_size"] = 4
    return params


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline of each family, and the six metrics' models."""
    folder = tmp_path_factory.mktemp("models")
    for name, make in TINY.items():
        saved(make(), folder / name)
    return saved_metrics(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """In place of what this machine keeps."""
    folder = tmp_path_factory.mktemp("home") / "parasol"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "STORE", folder)
        yield folder


def write(params: dict[str, Any]) -> None:
    Path("params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


STAGES = [("backbone", []), ("metrics", []), ("refs", []), ("teacher", []), ("distill", []), ("rdpo", [])]
SAMPLERS = ["reference", "distilled", "rdpo"]


@pytest.fixture(scope="module")
def done(models: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage, run on the tiny SD3."""
    folder = tmp_path_factory.mktemp("done")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write(params_of("sd3", models))
        for stage, arguments in [*STAGES, *((stage, [name]) for stage in ("sample", "evaluate") for name in SAMPLERS)]:
            run(stage, arguments)
        run("report", [])
    return folder


@pytest.fixture
def here(done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to change."""
    shutil.copytree(done, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def change(here: Path, models: Path) -> Callable[..., None]:
    """Writes params.yaml with other values, given by their paths with __ for a dot."""

    def write_with(**values: Any) -> None:
        params = params_of("sd3", models)
        for path, value in values.items():
            *sections, key = path.split("__")
            place = params
            for section in sections:
                place = place[section]
            place[key] = value
        write(params)

    return write_with


def states(folder: Path, sampler: str) -> dict[str, torch.Tensor]:
    return load_file(folder / f"data/samples/{sampler}.safetensors")


def test_every_stage_runs_on_the_tiny_sd3(done: Path, store: Path) -> None:
    lines = (done / "results/report.md").read_text().splitlines()
    rows = {cells[0]: cells for cells in ([c.strip() for c in line.strip("|").split("|")] for line in lines[2:5])}
    names = ["FD-10", "FD to reference", "KID", "precision", "recall", "RMSE", "hps (reward)", *METRICS[1:], *WATCHED]
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == ["sampler", "serial", "total", *names]
    cost = {name: (int(row[1]), float(row[2])) for name, row in rows.items()}
    assert cost == {"reference": (6, 12), "distilled": (6, 18), "rdpo": (6, 18)}, "guidance doubles the rows"
    page = (done / "results/report.html").read_text()
    assert page.count("data:image/png;base64,") == 8 * len(SAMPLERS)
    record = json.loads((done / "models/backbone/backbone.json").read_text())
    chosen = json.loads((done / "models/metrics.json").read_text())
    models = {"hps", "pick_score", "image_reward", "bert", "clip_l14", "aesthetic", "mps", "clip_h14"}
    assert chosen["weights"].keys() == models
    assert all((store / where["sha256"]).is_dir() for where in [*record["weights"].values(), *chosen["weights"].values()])
    made_for = load_predictor(done / "models/rdpo").backbone
    assert (made_for.name, made_for.pipeline) == ("tiny/sd3", "StableDiffusion3Pipeline")
    assert made_for.revision == record["weights"]["pipeline"]["sha256"]
    assert load_predictor(done / "models/rdpo").guidance_scale == 4.5


def test_train_validation_and_test_prompts_are_disjoint(done: Path) -> None:
    asked = Prompts.load(done / "models/backbone/prompts.json")
    splits = {split: asked(split, range(count)) for split, count in asked.counts.items()}
    every = [prompt for prompts in splits.values() for prompt in prompts]
    assert len(set(every)) == len(every) == 160
    assert (len(splits["validation"]), len(splits["test"])) == (30, 50)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_image_i_does_not_depend_on_the_batch(batch_size: int, done: Path, change: Callable[..., None]) -> None:
    change(sample__batch_size=batch_size)
    run("sample", ["distilled"])
    found, expected = states(Path(), "distilled"), states(done, "distilled")
    assert found["samples"].tolist() == expected["samples"].tolist() == [*range(9), 20]
    assert torch.allclose(found["states"], expected["states"], atol=1e-5, rtol=0)


def test_the_seed_of_an_image_is_its_number(done: Path, change: Callable[..., None]) -> None:
    change(sample__seeds="20,3-4")
    run("sample", ["distilled"])
    found, expected = states(Path(), "distilled"), states(done, "distilled")
    assert found["samples"].tolist() == [20, 3, 4]
    assert torch.allclose(found["states"], expected["states"][[9, 3, 4]], atol=1e-5, rtol=0)
    with pytest.raises(InputError, match=r"reference.safetensors: samples \[0, 1, .* 20\]; valid: \[20, 3, 4\]"):
        run("evaluate", ["distilled"])


def torchrun(ranks: int, store: Path, *command: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(store.parent), "PYTHONWARNINGS": "ignore"}
    port = str(20000 + os.getpid() % 20000)
    arguments = ["--nproc-per-node", str(ranks), "--master-port", port, "-m", *command]
    found = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize("ranks", [2, 3])
def test_image_i_does_not_depend_on_the_ranks(ranks: int, here: Path, done: Path, store: Path) -> None:
    shutil.rmtree("data/samples")
    torchrun(ranks, store, "stages.sample", "distilled")
    assert hashes(here, "data/samples") == {k: v for k, v in hashes(done, "data/samples").items() if "distilled" in k}
    assert not any(Path("data/parts").iterdir())


class KilledError(Exception):
    pass


def test_what_was_sampled_outlives_a_kill_and_another_batch_size(
    done: Path, change: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.sampling import Run

    made: list[list[int]] = []
    states_of = Run.states

    def dies(self: Run, frozen: Any, split: str, samples: Any) -> Any:
        if len(made) == 2:
            raise KilledError
        made.append(list(samples))
        return states_of(self, frozen, split, samples)

    change(sample__batch_size=3)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "states", dies)
        with pytest.raises(KilledError):
            run("sample", ["distilled"])
    assert made == [[0, 1, 2], [3, 4, 5]]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "states", lambda self, f, s, samples: made.append(list(samples)) or states_of(self, f, s, samples))
        change(sample__batch_size=2, compute__drop_text_encoders=True)
        run("sample", ["distilled"])
    assert made[2:] == [[6, 7], [8, 20]], "what was done was not done again"
    assert torch.allclose(states(Path(), "distilled")["states"], states(done, "distilled")["states"], atol=1e-5, rtol=0)
    assert not any(Path("data/parts").iterdir())


def test_parts_of_other_work_are_refused(change: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.sampling import Run

    states_of, made = Run.states, list[Any]()

    def dies(self: Run, frozen: Any, split: str, samples: Any) -> Any:
        made.append(samples)
        if len(made) in (1, 3):
            raise KilledError
        return states_of(self, frozen, split, samples)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "states", dies)
        with pytest.raises(KilledError):
            run("sample", ["reference"])
        change(seed=1)  # nothing was made: nothing stands in the way
        with pytest.raises(KilledError):
            run("sample", ["reference"])
    change(seed=0)
    with pytest.raises(CheckpointError, match=r"data/parts/sample@reference: of an unfinished run .*: seed was 1, is 0; valid"):
        run("sample", ["reference"])


def test_parts_that_overlap_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an orphan of a killed run may leave them."""
    from stages.checkpoint import Work
    from stages.files import write_tensors
    from stages.parts import by_parts
    from stages.ranks import Ranks

    monkeypatch.chdir(tmp_path)
    for name in ("00000000-00000004", "00000002-00000004"):
        write_tensors(Path(f"data/parts/two/{name}.safetensors"), {"x": torch.zeros(4)})
    work = Work({}, [])
    Path("data/parts/two/work.json").write_text(json.dumps(work.identity))
    with pytest.raises(StageError, match=r"data/parts/two: parts overlap: \['00000000-00000004', '00000002-.*; valid: none"):
        by_parts("two", work, Ranks(), 4, 4, lambda batch: {"x": torch.zeros(len(batch))})


def test_reward_gradient_keeps_the_prompts_that_it_asks_for(here: Path, change: Callable[..., None]) -> None:
    change(compute__drop_text_encoders=True, rdpo__method="reward_gradient")
    run("rdpo", [])


def test_an_evaluation_goes_on_with_another_batch_size(
    done: Path, change: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from stages.scorers import Scorers

    scores, made = Scorers.scores, list[int]()

    def dies(self: Scorers, images: Any, prompts: Any) -> Any:
        made.append(len(images))
        if len(made) == 2:
            raise KilledError
        return scores(self, images, prompts)

    monkeypatch.setattr(Scorers, "scores", dies)
    with pytest.raises(KilledError):
        run("evaluate", ["distilled"])
    change(evaluate__batch_size=3, evaluate__pictures=2)
    run("evaluate", ["distilled"])
    assert made[2:] == [3, 3], "what was done was not done again"
    found, expected = (parquet.read_table(folder / "data/scores/distilled.parquet").to_pydict() for folder in (Path(), done))
    assert found["prompt"] == expected["prompt"]
    for name in METRICS:
        assert found[name] == pytest.approx(expected[name], abs=1e-4), name


def test_out_of_memory_says_what_to_lower_and_keeps_what_is_done(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from stages.command import command
    from stages.sample import sample
    from stages.sampling import Run

    states_of, made = Run.states, list[Any]()

    def full(self: Run, frozen: Any, split: str, samples: Any) -> Any:
        made.append(samples)
        if len(made) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        return states_of(self, frozen, split, samples)

    monkeypatch.setattr(Run, "states", full)
    monkeypatch.setattr(sys, "argv", ["sample", "distilled"])
    monkeypatch.setattr("signal.signal", lambda *_: None)  # those of this process stay
    with pytest.raises(SystemExit):
        command(sample, has_ranks=True)
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(
        "stage sample@distilled: out of memory (CUDA out of memory. Tried to allocate 2 GiB); sample.batch_size"
    )
    assert "sample.batch_size is 4: lower it" in told
    assert len(list(Path("data/parts/sample@distilled").glob("*.safetensors"))) == 1


def test_encoders_may_be_dropped_everywhere(here: Path, done: Path, change: Callable[..., None]) -> None:
    change(compute__drop_text_encoders=True, compute__slicing=True)
    for stage in ("teacher", "distill", "rdpo"):
        run(stage, [])
    for name in ("data/teacher.safetensors", "models/rdpo/predictor.safetensors"):
        found, expected = load_file(name), load_file(done / name)
        assert all(torch.allclose(found[key], expected[key], atol=1e-5, rtol=0) for key in expected), name


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_the_other_families_sample_and_learn(
    family: str, models: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(params_of(family, models))
    for stage, arguments in (*STAGES, ("sample", ["rdpo"])):
        run(stage, arguments)
    total = {"sd15": 18.0, "flux": 9.0}[family]  # FLUX' guidance is an input, not a second row
    file = safetensors_values(Path("data/samples/rdpo.safetensors"))
    assert (file["serial_evaluations"], file["total_evaluations"]) == (6, total)


def safetensors_values(file: Path) -> dict[str, Any]:
    from stages.files import read_tensors

    return read_tensors(file)[1]


@pytest.mark.parametrize("family", ["epd_plugin", "s4s", "parallel_multistep", "d_ode"])
def test_other_learned_families_compose_with_a_pipeline(family: str, here: Path, models: Path) -> None:
    params, other = params_of("sd3", models), composed("backbone=tiny_sd3", f"family={family}")["distill"]
    small = {"iterations": 2, "batch_size": 4, "validate_every": 1, "history": 2, "rounds": 1}
    params["distill"] = other | {key: value for key, value in small.items() if key in other}
    write(params)
    run("distill", [])
    assert load_predictor(Path("models/distilled")).backbone.name == "tiny/sd3"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real images in the places that they may be in: 30 of them, of 20 x 24 pixels."""
    from datasets import Dataset, Features
    from datasets import Image as Images
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    pixels = torch.rand(30, 20, 24, 3, generator=torch.Generator().manual_seed(0)).mul(255).byte().numpy()
    for i, image in enumerate(pixels):
        file = folder / f"folder/{i % 3}/{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    shutil.make_archive(str(folder / "pictures"), "zip", folder / "folder")
    files = sorted(str(file) for file in (folder / "folder").rglob("*.png"))
    found = Dataset.from_dict({"picture": files}, Features({"picture": Images()}))
    found.save_to_disk(folder / "dataset")
    return folder


PLACES = {"folder": "folder", "zip": "pictures.zip", "dataset": "dataset"}


@pytest.mark.parametrize("kind", PLACES)
def test_distances_are_to_real_images(kind: str, pictures: Path, here: Path, change: Callable[..., None]) -> None:
    from metrics.frechet import load_statistics, statistics
    from stages.scorers import load_scorers

    where = {"refs__source": kind, "refs__path": str(pictures / PLACES[kind]), "refs__size": 16, "refs__images": 25}
    change(**where)
    run("refs", [])
    run("evaluate", ["distilled"])
    reference = json.loads(Path("results/distilled.json").read_text())["protocol"][0]["reference"]
    assert (reference["source"], reference["images"]) == (kind, 25)
    assert reference["cut"] == "shorter side to 16 pixels by PIL's bicubic, centre"
    found = load_statistics(Path("data/refs.npz"))
    extractor = load_scorers(load_params().compute).extractor
    images = image_set(kind, where["refs__path"], 16)  # type: ignore[arg-type]
    expected = statistics(extractor(torch.stack([images[i] for i in range(25)])))
    assert all(np.allclose(found[name], expected[name], atol=1e-6) for name in ("mu", "sigma"))
    held_out = json.loads(Path("results/held_out.json").read_text())
    assert held_out.keys() - {"protocol", "metrics"} == {"n", "brightness", "brightness_se", "saturation", "saturation_se"}
    assert held_out["metrics"] == [], "they have no prompts"
    for sampler in ("reference", "rdpo"):
        run("evaluate", [sampler])
    run("report", [])
    assert "Frechet distance to the reference set" in Path("results/report.md").read_text()
    change(**where, refs__sha256=reference["sha256"])
    run("refs", [])
    change(**where, refs__sha256="0" * 64)
    with pytest.raises(InputError, match=rf"refs.sha256: found {reference['sha256']} for .*; valid: 0000"):
        run("refs", [])


def test_statistics_of_others(here: Path, change: Callable[..., None]) -> None:
    """As EDM's files have them: mu and sigma alone."""
    with np.load("data/refs.npz") as found:
        np.savez("edm.npz", mu=found["mu"], sigma=found["sigma"])
    before = json.loads(Path("results/distilled.json").read_text())
    change(refs__source="statistics", refs__path="edm.npz", refs__images=50000)
    run("refs", [])
    run("evaluate", ["distilled"])
    after = json.loads(Path("results/distilled.json").read_text())
    assert after["frechet_distance"] == pytest.approx(before["frechet_distance"], rel=1e-9)
    assert after["protocol"][0]["reference"]["images"] == 50000
    assert "kernel_distance" in before
    assert not {"kernel_distance", "precision", "recall"} & after.keys(), "which take features"
    np.savez("other.npz", mu=np.zeros(3), sigma=np.eye(3))
    change(refs__source="statistics", refs__path="other.npz", refs__images=50000)
    with pytest.raises(InputError, match=r"other.npz: found statistics of 3 features; valid: 8"):
        run("refs", [])


def test_too_few_images_for_a_distance(here: Path, change: Callable[..., None]) -> None:
    change(refs__images=7)
    with pytest.raises(InputError, match=r"refs: images: 7 for 8 features; valid: at least 8"):
        run("refs", [])
    change(evaluate__ranges=2)
    with pytest.raises(InputError, match=r"sample.seeds: images: 5 for 8 features; valid: at least 8"):
        run("evaluate", ["distilled"])


def test_a_mixed_reward(here: Path, change: Callable[..., None]) -> None:
    """Weighted as published, each metric's mean logged, and marked in the report."""
    weights_of = {"hps": 1.0, "pick_score": 0.5, "image_reward": 0.0}
    change(metrics__reward=weights_of, metrics__judges=["image_reward", "mps"], rdpo__method="cma_es", rdpo__tables=4)
    for stage, arguments in (
        ("metrics", []),
        ("refs", []),
        ("rdpo", []),
        *(("evaluate", [name]) for name in SAMPLERS),
        ("report", []),
    ):
        run(stage, arguments)
    (log,) = Path("data/logs").glob("rdpo*.jsonl")
    for line in map(json.loads, log.read_text().splitlines()):
        assert line["reward"] == pytest.approx((line["reward_hps"] + 0.5 * line["reward_pick_score"] / 26) / 1.5)
        validated = (line["validation_hps"] + 0.5 * line["validation_pick_score"] / 26) / 1.5
        assert line["validation_reward"] == pytest.approx(validated)
    assert Path("data/live/rdpo/plots/metrics/reward_pick_score.tsv").exists()
    found = parquet.read_table("data/scores/rdpo.parquet").to_pandas()
    assert found["reward"].tolist() == pytest.approx(((found["hps"] + 0.5 * found["pick_score"] / 26) / 1.5).tolist())
    head = Path("results/report.md").read_text().splitlines()[0]
    assert "| hps (reward)" in head
    assert "| pick_score (reward) | image_reward | mps" in " ".join(head.split())
    assert "| reward |" in " ".join(head.split())


def test_other_metrics_ask_for_no_other_samples(here: Path, change: Callable[..., None]) -> None:
    """But for statistics of the same features."""
    change(metrics__judges=["clip_score"])
    before = hashes(here, "models/backbone")
    for stage, arguments in (("metrics", []), ("refs", []), ("evaluate", ["distilled"])):
        run(stage, arguments)
    assert hashes(here, "models/backbone") == before
    assert {"hps", "clip_score"} < set(parquet.read_table("data/scores/distilled.parquet").column_names)
    assert "mps" not in parquet.read_table("data/scores/distilled.parquet").column_names


# --- what is wrong


def refused(params: dict[str, Any], stage: str = "backbone") -> str:
    write(params)
    with pytest.raises(StageError) as error:
        run(stage, [])
    assert not Path("models/backbone").exists() or stage != "backbone"
    return str(error.value)


@pytest.fixture
def sd3(models: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Parameters of a copy of the tiny SD3, to spoil, in an empty workspace."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models / "sd3", tmp_path / "sd3")
    params = params_of("sd3", models)
    params["backbone"]["source"] = "sd3"
    return params


def test_a_folder_that_is_not_there(sd3: dict[str, Any]) -> None:
    sd3["backbone"]["source"] = "nowhere"
    assert refused(sd3) == "nowhere: found nothing; valid: a folder with a model's files, hub, or s3://BUCKET/PREFIX"


def test_a_component_that_is_missing(sd3: dict[str, Any]) -> None:
    shutil.rmtree("sd3/text_encoder_3")
    assert refused(sd3).startswith("sd3: found no text_encoder_3 but scheduler, text_encoder, ")


def test_pickled_weights_alone(sd3: dict[str, Any]) -> None:
    file = Path("sd3/transformer/diffusion_pytorch_model.safetensors")
    file.rename(file.with_suffix(".bin"))
    assert "pickles are refused, since reading one can execute code" in refused(sd3)


def test_another_family_s_folder(sd3: dict[str, Any], models: Path) -> None:
    shutil.copytree(models / "sd3", "other")
    index = Path("other/model_index.json")
    index.write_text(index.read_text().replace("StableDiffusion3Pipeline", "StableDiffusionXLPipeline"))
    sd3["backbone"]["source"] = "other"
    expected = "other: model_index.json: _class_name 'StableDiffusionXLPipeline'; valid: StableDiffusion3Pipeline, for sd3"
    assert refused(sd3) == expected


def test_a_resolution_that_does_not_come_out_even(sd3: dict[str, Any]) -> None:
    sd3["backbone"]["height"] = 17
    assert refused(sd3) == "sd3: height, width: 17, 16; valid: multiples of 2"


def test_a_resolution_beyond_the_model_s_positions(sd3: dict[str, Any]) -> None:
    sd3["backbone"] |= {"height": 256, "width": 256}
    assert refused(sd3) == "sd3: height, width: 256, 256; valid: at most 192"


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "scheduler/scheduler_config.json",
            "{}",
            "scheduler/scheduler_config.json: {}; valid: with num_train_timesteps and shift",
        ),
        ("scheduler/scheduler_config.json", '{"num_train_timesteps": "x", "shift": 3}', "scheduler/scheduler_config.json: "),
        ("tokenizer_3/tokenizer.json", "{}", "tokenizer_3: cannot be loaded"),
        ("tokenizer/tokenizer.json", "x", "tokenizer: cannot be loaded"),
        ("vae/config.json", '{"block_out_channels": 5}', "vae/config.json: block_out_channels 5; valid: a list of channels"),
        ("transformer/config.json", '{"patch_size": 0}', "transformer/config.json: {'patch_size': 0, "),
    ],
)
def test_a_malformed_file(file: str, text: str, message: str, sd3: dict[str, Any]) -> None:
    Path("sd3", file).write_text(text)
    assert message in refused(sd3)


def test_a_scheduler_of_another_kind_of_network(sd3: dict[str, Any], models: Path) -> None:
    shutil.copy(models / "sd15/scheduler/scheduler_config.json", "sd3/scheduler/scheduler_config.json")
    assert "scheduler/scheduler_config.json: {" in refused(sd3)


def test_damaged_weights_are_fetched_again(sd3: dict[str, Any], store: Path) -> None:
    """By stage backbone, which reads them through."""
    write(sd3)
    run("backbone", [])
    found = json.loads(Path("models/backbone/backbone.json").read_text())["weights"]["pipeline"]["sha256"]
    sd3["backbone"]["sha256"] = found
    file = store / found / "vae/diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"x")
    write(sd3)
    run("backbone", [])
    assert file.read_bytes() == whole


def test_other_files_than_those_pinned(sd3: dict[str, Any]) -> None:
    sd3["backbone"]["sha256"] = "0" * 64
    assert f"valid: {'0' * 64}, as asked for" in refused(sd3)


def test_a_missing_weight(sd3: dict[str, Any]) -> None:
    from safetensors.torch import save_file

    file = Path("sd3/transformer/diffusion_pytorch_model.safetensors")
    tensors = load_file(file)
    name = sorted(tensors)[0]
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    write(sd3)
    run("backbone", [])
    assert f"1 weights missing or of another shape: ['{name}']" in refused(sd3, "teacher")


def test_a_truncated_weight_file(sd3: dict[str, Any]) -> None:
    file = Path("sd3/vae/diffusion_pytorch_model.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    assert "vae/diffusion_pytorch_model.safetensors: found " in refused(sd3)


def test_weights_are_found_again_without_their_source(
    sd3: dict[str, Any], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the sha256 that models/backbone has; where they are gone from this machine, too, it is told."""
    write(sd3)
    run("backbone", [])
    shutil.rmtree("sd3")
    run("teacher", [])
    monkeypatch.setattr(weights, "STORE", store.parent / "empty")
    with pytest.raises(StageError, match=r"sd3: found nothing; valid: a folder with"):
        run("teacher", [])


def test_weights_that_changed_under_their_name(sd3: dict[str, Any], store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(sd3)
    run("backbone", [])
    index = Path("sd3/scheduler/scheduler_config.json")
    index.write_text(index.read_text() + "\n")
    monkeypatch.setattr(weights, "STORE", store.parent / "another")
    with pytest.raises(StageError, match=r"sd3: sha256 of the files' list .*; valid: .*, as asked for"):
        run("teacher", [])


def test_long_prompts_are_told(sd3: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tiny tokenizers have a token for each letter."""
    (tmp_path / "prompts.txt").write_text("\n".join(["a" * 100, "b" * 300, "c" * 100, *map(str, range(10))]))
    sd3["prompts"] |= {"file": "prompts.txt", "validation": 2, "test": 3}
    write(sd3)
    run("backbone", [])
    told = [line for line in capsys.readouterr().err.splitlines() if "are cut to" in line]
    cut = [line.split() for line in told if "tokens that tokenizer has" in line]
    assert sum(int(words[2]) for words in cut) == 3
    assert any("1 of " in line and "256 tokens that tokenizer_3 has" in line for line in told)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"prompts.csv: found no prompts"),
        (b"text\n\xff\xfe\n", r"prompts.csv: line 2: found byte 0xff; valid: UTF-8"),
        (b"name,words\na,b\n", r"prompts.csv: found columns \['name', 'words'\]; valid: one of text"),
        (b"text\na\nb\n", r"prompts: found 2; valid: 81 or more, 50 for test, 30 for validation"),
    ],
)
def test_prompts_that_are_none(content: bytes, message: str, sd3: dict[str, Any]) -> None:
    import re

    Path("prompts.csv").write_bytes(content)
    sd3["prompts"]["file"] = "prompts.csv"
    assert re.search(message, refused(sd3))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(sd3: dict[str, Any]) -> None:
    from stages.device import device_of

    sd3["compute"]["device"] = "cuda"
    write(sd3)
    with pytest.raises(InputError, match=r"compute.device: found cuda, and torch finds no such device"):
        device_of(load_params().compute)
    sd3["compute"] |= {"device": "auto", "offload": True}
    write(sd3)
    with pytest.raises(InputError, match=r"compute.offload: found true, without a CUDA device"):
        device_of(load_params().compute)
