"""Pipelines from folders: what they are loaded as, and what is refused."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

with warnings.catch_warnings():  # of diffusers' and transformers' own imports
    warnings.simplefilter("ignore")
    from diffusers import DiffusionPipeline

    from backends import load as module
    from backends.load import check_folder, load_backend, load_decoder, truncated
    from backends.sample import backend_of

from backends import counted_denoiser

from .conftest import FAMILIES, PROMPTS, network_of

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 0.2}
"""Of numbers that guidance makes several times as large."""
CPU = torch.device("cpu")
SCALES = {"sd15": 7.5, "sd3": 4.5, "flux": 3.5}
WEIGHTS = [(name, component) for name, family in module.FAMILIES.items() for component in family.weights]
TOKENIZERS = [(name, component) for name, family in module.FAMILIES.items() for component in family.tokenizers]
SCHEDULERS = [(name, "scheduler") for name in module.FAMILIES]

Folders = dict[str, Path]
Copy = Callable[[str], Path]


@pytest.fixture
def copy(folders: Folders, tmp_path: Path) -> Copy:
    """A folder of a tiny pipeline of a family, to be changed."""
    return lambda name: shutil.copytree(folders[name], tmp_path / name)


def load(name: str, folder: Path, dtype: torch.dtype = torch.float32, variant: str | None = None, slicing: bool = False) -> Any:
    return load_backend(name, folder, 16, 16, dtype, variant, SCALES[name], CPU, slicing=slicing)


def check(name: str, folder: Path) -> None:
    check_folder(name, folder, 16, 16)


def change(file: Path, **changes: Any) -> None:
    """Change entries of a JSON file; None takes one away."""
    found = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def numbers(backend: Any, name: str) -> tuple[Tensor, Tensor]:
    """D of some states, and images of them."""
    shape = (4, *backend.spec.shape)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = torch.tensor([0.9, 0.6, 0.3, 0.1]).double() * backend.spec.sigma_max
    denoise, _ = counted_denoiser(backend, PROMPTS, SCALES[name])
    with torch.no_grad():
        return denoise(x, sigma), backend.decode(x)


def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> bool:
    return all(
        float((a.float() - b.float()).abs().max()) <= tolerance * float(b.float().abs().max())
        for a, b in zip(found, expected, strict=True)
    )


def unchecked(name: str, folder: Path, dtype: torch.dtype) -> Any:
    pipe: Any = DiffusionPipeline.from_pretrained(folder, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return backend_of(pipe, 16, 16, SCALES[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_loaded_backend_is_the_pipeline_s(name: str, dtype: torch.dtype, folders: Folders) -> None:
    found, expected = load(name, folders[name], dtype), unchecked(name, folders[name], dtype)
    assert found.spec == expected.spec
    assert same(numbers(found, name), numbers(expected, name), 0)
    assert network_of(found.pipe).dtype == found.pipe.vae.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_slices_change_no_more_than_rounding(name: str, dtype: torch.dtype, folders: Folders) -> None:
    whole, sliced = (load(name, folders[name], dtype, slicing=slicing) for slicing in (False, True))
    assert (whole.pipe.vae.use_slicing, sliced.pipe.vae.use_slicing) == (False, True)
    assert same(numbers(sliced, name), numbers(whole, name), ROUNDING[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_decoder_alone_is_the_pipeline_s(name: str, dtype: torch.dtype, folders: Folders) -> None:
    backend = load(name, folders[name], dtype)
    x = torch.randn(3, *backend.spec.shape, dtype=torch.float64)
    with torch.no_grad():
        expected = backend.decode(x)
        assert torch.equal(load_decoder(folders[name], dtype, None, CPU)(x), expected)
        sliced = load_decoder(folders[name], dtype, None, CPU, slicing=True)(x)
    assert same((sliced,), (expected,), ROUNDING[dtype])


@pytest.mark.parametrize("name", FAMILIES)
def test_everything_loaded_is_frozen(name: str, folders: Folders) -> None:
    backend = load(name, folders[name])
    for component in module.FAMILIES[name].weights:
        model = getattr(backend.pipe, component)
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters()), component
    x = torch.ones(1, *backend.spec.shape, dtype=torch.float64, requires_grad=True)
    found = backend.denoiser(["a boat"])(x, torch.ones(1).double())
    assert bool(torch.autograd.grad(found.sum(), x)[0].isfinite().all())  # the state's gradient goes through


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_of_a_variant_are_read(name: str, folders: Folders, tmp_path: Path) -> None:
    pipe: Any = DiffusionPipeline.from_pretrained(folders[name])
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    assert same(numbers(load(name, tmp_path / "half", variant="fp16"), name), numbers(load(name, folders[name]), name), 0)
    with pytest.raises((ValueError, OSError), match=r"half/text_encoder"):
        load(name, tmp_path / "half")


def test_no_safety_checker_is_loaded(copy: Copy) -> None:
    folder = copy("sd15")
    change(folder / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    backend = load("sd15", folder)
    assert backend.pipe.safety_checker is None
    assert backend.decode(torch.ones(1, *backend.spec.shape)).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_folder_is_valid(name: str, folders: Folders) -> None:
    check(name, folders[name])
    check_folder(name, folders[name], 32, 16)


@pytest.mark.parametrize("refuse", [check, load])
@pytest.mark.parametrize("name", FAMILIES)
def test_another_family_s_folder_is_refused(name: str, refuse: Any, folders: Folders) -> None:
    for other in set(FAMILIES) - {name}:
        with pytest.raises(ValueError, match=rf"model_index.json: _class_name '\w+'; valid: \w+Pipeline, for {name}$"):
            refuse(name, folders[other])


@pytest.mark.parametrize("refuse", [check, load])
@pytest.mark.parametrize("class_name", [None, "MyPipeline", ["pipeline", "StableDiffusionPipeline"], 5])
def test_an_unknown_pipeline_is_refused(class_name: Any, refuse: Any, copy: Copy) -> None:
    folder = copy("sd15")
    change(folder / "model_index.json", _class_name=class_name)
    with pytest.raises(ValueError, match=r"_class_name .*; valid: StableDiffusionPipeline, for sd15"):
        refuse("sd15", folder)


@pytest.mark.parametrize("refuse", [check, load])
@pytest.mark.parametrize(("name", "component"), [*WEIGHTS, *TOKENIZERS])
def test_a_component_of_another_class_or_library_is_refused(name: str, component: str, refuse: Any, copy: Copy) -> None:
    folder = copy(name)
    index = folder / "model_index.json"
    library, class_name = json.loads(index.read_text())[component]
    other = {"transformers": "diffusers", "diffusers": "transformers"}[library]
    for entry in ([other, class_name], [library, "Other"], ["my_module", class_name], [None, None], None):
        change(index, **{component: entry})
        with pytest.raises(ValueError, match=rf"model_index.json: {component} .*; valid: \['{library}', "):
            refuse(name, folder)


@pytest.mark.parametrize("entry", ["transformers", ["transformers"], ["transformers", "CLIPTokenizer", "more"], 5, {"a": 1}])
@pytest.mark.parametrize("component", ["tokenizer", "unet", "scheduler"])
def test_an_entry_that_is_no_pair_is_refused(component: str, entry: Any, copy: Copy) -> None:
    folder = copy("sd15")
    change(folder / "model_index.json", **{component: entry})
    with pytest.raises(ValueError, match=rf"model_index.json: {component} .*; valid: "):
        check("sd15", folder)


@pytest.mark.parametrize("refuse", [check, load])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_scheduler_of_another_library_is_refused(name: str, refuse: Any, copy: Copy) -> None:
    folder = copy(name)
    for entry in (["my_scheduler", "MyScheduler"], None):
        change(folder / "model_index.json", scheduler=entry)
        with pytest.raises(ValueError, match=r"model_index.json: scheduler .*; valid: one of diffusers"):
            refuse(name, folder)


MARK = """from pathlib import Path
Path({marker!r}).touch()
from diffusers import *
from transformers import *
class Mine: pass
"""


@pytest.mark.parametrize(
    ("component", "entry", "file"),
    [
        ("unet", ["mine", "UNet2DConditionModel"], "unet/mine.py"),
        ("unet", ["mine", "Mine"], "unet/mine.py"),
        ("text_encoder", ["mine", "CLIPTextModel"], "text_encoder/mine.py"),
        ("tokenizer", ["mine", "CLIPTokenizer"], "tokenizer/mine.py"),
        ("tokenizer", ["transformers", "CLIPTokenizer"], "tokenizer/transformers.py"),
        ("scheduler", ["mine", "Mine"], "scheduler/mine.py"),
        ("scheduler", ["diffusers", "DDIMScheduler"], "scheduler/diffusers.py"),
        ("unet", ["diffusers", "UNet2DConditionModel"], "unet/diffusers.py"),
        ("text_encoder", ["transformers", "CLIPTextModel"], "text_encoder/transformers.py"),
        ("safety_checker", ["mine", "Mine"], "safety_checker/mine.py"),
        ("another", ["mine", "Mine"], "another/mine.py"),
        ("_class_name", ["pipeline", "StableDiffusionPipeline"], "pipeline.py"),
        ("_class_name", "StableDiffusionPipeline", "pipeline.py"),
    ],
    ids=str,
)
def test_no_code_of_a_folder_runs(component: str, entry: Any, file: str, copy: Copy, tmp_path: Path) -> None:
    folder, marker = copy("sd15"), tmp_path / "it ran"
    change(folder / "model_index.json", **{component: entry})
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(MARK.format(marker=str(marker)))
    named = {"auto_map": {"AutoModel": "mine.Mine", "AutoTokenizer": ["mine.Mine", None], "AutoConfig": "mine.Mine"}}
    for part in ("text_encoder/config.json", "unet/config.json", "tokenizer/tokenizer_config.json"):
        change(folder / part, **named)
        (folder / part).with_name("mine.py").write_text(MARK.format(marker=str(marker)))
    try:
        backend = load("sd15", folder)
    except ValueError:
        pass
    else:
        assert type(backend.pipe.unet).__module__.startswith("diffusers.")
        assert type(backend.pipe.text_encoder).__module__.startswith("transformers.")
    assert not marker.exists()


@pytest.mark.parametrize(("name", "component"), [*WEIGHTS, *TOKENIZERS, *SCHEDULERS])
def test_a_folder_without_a_component_is_refused(name: str, component: str, copy: Copy) -> None:
    folder = copy(name)
    shutil.rmtree(folder / component)
    with pytest.raises(ValueError, match=component):
        load(name, folder)


@pytest.mark.parametrize(("name", "component"), TOKENIZERS)
def test_a_tokenizer_without_a_vocabulary_is_refused(name: str, component: str, copy: Copy) -> None:
    """The library makes an empty one, to which all words are one and the same."""
    folder = copy(name)
    for file in (folder / component).iterdir():
        if file.name != "tokenizer_config.json":
            file.unlink()
    with pytest.raises(ValueError, match=component):
        load(name, folder)


@pytest.mark.parametrize("refuse", [check, load])
@pytest.mark.parametrize(("name", "file"), [("sd15", "model_index.json"), *((n, f"{c}/config.json") for n, c in WEIGHTS)])
def test_a_missing_or_broken_file_is_named(name: str, file: str, refuse: Any, copy: Copy) -> None:
    folder = copy(name)
    for content in (b"{", b"", b"\xff\xfe{", b"[1]"):
        message = "list; valid: an object" if content == b"[1]" else "not JSON"
        (folder / file).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{file}: {message}"):
            refuse(name, folder)
    (folder / file).unlink()
    with pytest.raises(ValueError, match=rf"{file}: missing; valid: a pipeline's folder, as save_pretrained writes it"):
        refuse(name, folder)


@pytest.mark.parametrize(("component", "key"), [("vae", "block_out_channels"), ("transformer", "patch_size")])
def test_a_configuration_without_what_the_size_depends_on_is_refused(component: str, key: str, copy: Copy) -> None:
    folder = copy("sd3")
    change(folder / component / "config.json", **{key: None})
    with pytest.raises(ValueError, match=rf"{component}/config.json: .*{key}"):
        check("sd3", folder)


@pytest.mark.parametrize(("name", "multiple"), [("sd15", 2), ("sd3", 2), ("flux", 4)])
def test_a_size_that_does_not_come_out_even_is_refused(name: str, multiple: int, folders: Folders) -> None:
    for height, width in ((17, 16), (16, 16 + multiple // 2), (0, 16), (16, -16)):
        message = rf"height, width: {height}, {width}; valid: multiples of {multiple}$"
        with pytest.raises(ValueError, match=message):
            check_folder(name, folders[name], height, width)
        with pytest.raises(ValueError, match=message):
            load_backend(name, folders[name], height, width, torch.float32, None, SCALES[name], CPU)
    check_folder(name, folders[name], 16 + multiple, 16)


def weights_of(folder: Path) -> Path:
    (file,) = folder.glob("*.safetensors")
    return file


@pytest.mark.parametrize(("name", "component"), WEIGHTS)
def test_a_missing_weight_is_refused(name: str, component: str, copy: Copy) -> None:
    folder = copy(name)
    file = weights_of(folder / component)
    weights = load_file(file)
    for lost in (min(weights), max(weights)):
        save_file({key: value for key, value in weights.items() if key != lost}, file, {"format": "pt"})
        with pytest.raises(ValueError, match=rf"{name}/{component}: \d+ weights missing or of another shape: \[.*{lost}"):
            load(name, folder)
    if component == "vae":
        with pytest.raises(ValueError, match=r"vae: \d+ weights missing or of another shape"):
            load_decoder(folder, torch.float32, None, CPU)


@pytest.mark.parametrize(("name", "component"), WEIGHTS)
def test_a_weight_of_another_shape_is_refused(name: str, component: str, copy: Copy) -> None:
    folder = copy(name)
    file = weights_of(folder / component)
    weights = load_file(file)
    wrong = max(weights)
    save_file(weights | {wrong: torch.zeros([size + 1 for size in weights[wrong].shape])}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name}/{component}: .*{wrong}"):
        load(name, folder)


@pytest.mark.parametrize(("name", "component"), WEIGHTS)
def test_pickled_weights_are_refused(name: str, component: str, copy: Copy) -> None:
    folder = copy(name)
    file = weights_of(folder / component)
    weights = load_file(file)
    file.unlink()
    for pickled in ("pytorch_model.bin", "diffusion_pytorch_model.bin"):
        torch.save(weights, folder / component / pickled)
    with pytest.raises(ValueError, match=component):
        load(name, folder)


@pytest.mark.parametrize(("name", "component"), WEIGHTS)
def test_broken_weights_are_refused(name: str, component: str, copy: Copy) -> None:
    folder = copy(name)
    file = weights_of(folder / component)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises((ValueError, OSError, SafetensorError)):
        load(name, folder)


def test_long_prompts_are_counted_for_each_tokenizer(folders: Folders) -> None:
    """Tiny tokenizers make a token of each letter; CLIP's add a first and a last one."""
    assert truncated("sd15", folders["sd15"], PROMPTS) == {}
    at, over = "a" * 75, "a" * 76
    assert truncated("sd15", folders["sd15"], [at]) == {}
    assert truncated("sd15", folders["sd15"], [at, over, over]) == {"tokenizer": (2, 77)}
    both = {"tokenizer": (2, 77), "tokenizer_2": (2, 77)}
    assert truncated("sd3", folders["sd3"], [at, over, "a" * 200]) == both
    assert truncated("sd3", folders["sd3"], ["a" * 300, over]) == both | {"tokenizer_3": (1, 256)}
    prompts = ["a" * 300, "a" * 600, "b"]
    assert truncated("flux", folders["flux"], prompts) == {"tokenizer": (2, 77), "tokenizer_2": (1, 512)}


@pytest.mark.parametrize(("name", "component"), TOKENIZERS)
def test_what_counts_as_cut_is_what_an_encoder_does_not_see(name: str, component: str, folders: Folders) -> None:
    """It sees the same of two prompts that differ in their last letters."""
    backend, seen = load(name, folders[name]), list[Tensor]()
    encoder = getattr(backend.pipe, component.replace("tokenizer", "text_encoder"))
    encoder.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    _, length = module.FAMILIES[name].tokenizers[component]
    cut = []
    for count in range(length - 4, length + 3):
        texts = ["a" * count + last for last in "ab"]
        backend.denoiser(texts)
        cut.append(torch.equal(*seen[-2:]))
        assert (component in truncated(name, folders[name], texts)) == cut[-1]
    assert set(cut) == {False, True}
