"""Images per second of the six preference metrics, beside the published code, one image at a time.

Run, about a quarter of an hour on two cores:  python bench/metrics.py > bench/metrics.md
(--tiny: on tiny models, in a minute, to see that it runs; --batch: images at a time.) It needs Linux, and 12 GB of disk.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# or this file and bench/solvers.py would hide the packages
sys.path[:] = [str(ROOT), str(ROOT / "examples"), *(folder for folder in sys.path if Path(folder).resolve() != ROOT / "bench")]

import metrics as metrics  # before torchvision

# isort: split

import argparse
import datetime
import gc
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TypeVar
from unittest.mock import patch

import open_clip
import psutil
import tiny_hps
import tiny_image_reward
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_aesthetic import saved_aesthetic
from tiny_metrics import saved_metrics
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer
from transformers.initialization import no_init_weights

from bench.packages import Sizes, hpsv2_scoring, image_reward
from metrics import Metric
from metrics.aesthetic import Aesthetic
from metrics.clip import Clip, ClipScore, PickScore
from metrics.hps import ARCHITECTURE, FILE, HPS
from metrics.image_reward import CONFIG, ImageReward
from metrics.image_reward import FILE as REWARD_FILE
from metrics.mps import CONDITION, HEAD, MPS, CrossedCLIP
from metrics.mps import FILE as MPS_FILE
from unpickle import read_module

SIDE, PER_PROMPT = 512, 4
REPEATS = {"cpu": 2, "cuda": 9}
BATCH = {"cpu": 4, "cuda": 32}
DTYPES = {"cpu": [torch.float32], "cuda": [torch.float16, torch.float32]}
GIB = 2**30

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Sample:
    """Images (B, 3, SIDE, SIDE) of 8 bits in [0, 1] on the device, their prompts, and the same images as PIL has them."""

    images: Tensor
    prompts: list[str]
    files: list[Image.Image]


Scoring = Callable[[Sample], Tensor]
"""A Sample -> its scores (B,)."""


@dataclass(frozen=True)
class Cost:
    """Seconds per image in each repetition; bytes beyond what was held before, at most; the scores of the warm-up."""

    seconds: list[float]
    memory: int
    scores: Tensor


@dataclass(frozen=True)
class Setting:
    device: torch.device
    batch: int
    repeats: int
    tiny: bool

    def sample(self, number: int, count: int) -> Sample:
        """The number draws the images, and stands in the prompts: none of them has been seen before."""
        shape = (count, 3, SIDE, SIDE)
        levels = torch.randint(256, shape, generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        prompts = [f"{number}.{i // PER_PROMPT}: a lighthouse at dusk, oil on canvas" for i in range(count)]
        files = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in levels]
        return Sample(levels.to(self.device).float() / 255, prompts, files)

    def measured(self, contenders: Mapping[str, Scoring]) -> dict[str, Cost]:
        """They take turns, so that what else the machine does falls on all of them."""
        few = 1 if self.device.type == "cpu" else self.batch  # a GPU's memory is to be what it will be
        scores = {name: score(self.sample(0, few)).double().cpu() for name, score in contenders.items()}  # the warm-up
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        memory = dict.fromkeys(contenders, 0)
        for turn in range(self.repeats):
            for i, (name, score) in enumerate(contenders.items()):
                sample = self.sample(1 + turn * len(contenders) + i, self.batch)
                held = self.held()
                started = time.perf_counter()
                score(sample).cpu()
                seconds[name].append((time.perf_counter() - started) / self.batch)
                memory[name] = max(memory[name], self.most() - held)
        return {name: Cost(seconds[name], memory[name], scores[name]) for name in contenders}

    def held(self) -> int:
        """Bytes of memory now; from here on, `most` counts."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")

    def most(self) -> int:
        return torch.cuda.max_memory_allocated() if self.device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def ours(metric: Metric) -> Scoring:
    metric.load()
    return lambda sample: metric(sample.images, sample.prompts)


def one_by_one(score: Callable[[Image.Image, str], float | Tensor]) -> Scoring:
    """What scores one image for one prompt -> what scores a Sample, image after image, each result fetched."""
    return lambda sample: torch.tensor([float(score(*pair)) for pair in zip(sample.files, sample.prompts, strict=True)])


# What is measured together. In: a folder of models, and the dtype of our weights. Those of others have their own.
Contenders = Callable[[Path, Setting, torch.dtype], AbstractContextManager[dict[str, Scoring]]]


@contextmanager
def hps(folder: Path, setting: Setting, dtype: torch.dtype) -> Iterator[dict[str, Scoring]]:
    checkpoint = folder / "hps" / FILE
    own = HPS(folder / "hps", setting.device, dtype)
    architecture = tiny_hps.ARCHITECTURE if setting.tiny else None
    with tempfile.TemporaryDirectory() as site, hpsv2_scoring(Path(site), setting.device, architecture) as scoring:
        model = scoring.model_dict["model"]

        def packaged(image: Image.Image, prompt: str) -> float:
            return scoring.score(image, prompt, cp=str(checkpoint))[0]

        def kept(sample: Sample) -> Tensor:
            """The same with the weights that it has loaded by now, and nothing to load."""
            nothing = patch.object(torch, "load", lambda *given, **named: {"state_dict": None})
            with nothing, patch.object(model, "load_state_dict", lambda state: None):
                return one_by_one(packaged)(sample)

        yield {"hps": ours(own), "hpsv2": one_by_one(packaged), "hpsv2, kept": kept}


@contextmanager
def pick_score(folder: Path, setting: Setting, dtype: torch.dtype) -> Iterator[dict[str, Scoring]]:
    clip = Clip(folder / "pick_score", setting.device, dtype)
    model, processor = _transformers(clip)

    def card(image: Image.Image, prompt: str) -> Tensor:
        """As on its card."""
        image_inputs = processor(images=image, return_tensors="pt").to(setting.device)
        text = {"padding": True, "truncation": True, "max_length": clip.length, "return_tensors": "pt"}
        text_inputs = clip.tokenizer(text=prompt, **text).to(setting.device)
        seen = normalize(model.get_image_features(**image_inputs).pooler_output)
        read = normalize(model.get_text_features(**text_inputs).pooler_output)
        return (model.logit_scale.exp() * (read @ seen.T))[0, 0]

    yield {"pick_score": ours(PickScore(clip)), "PickScore's card": one_by_one(card)}


@contextmanager
def clip_l14(folder: Path, setting: Setting, dtype: torch.dtype) -> Iterator[dict[str, Scoring]]:
    clip = Clip(folder / "clip_l14", setting.device, dtype)
    clip_score, aesthetic = ClipScore(clip), Aesthetic(clip, folder / "aesthetic")
    model, processor = _transformers(clip)
    head = aesthetic.head

    def card(image: Image.Image, prompt: str) -> Tensor:
        """As on CLIP's card; the logit without its scale."""
        text = clip.tokenizer(text=[prompt], padding=True, truncation=True, max_length=clip.length, return_tensors="pt")
        inputs = {**text, **processor(images=image, return_tensors="pt")}
        logits = model(**{name: value.to(setting.device) for name, value in inputs.items()}).logits_per_image
        return logits[0, 0] / model.logit_scale.exp()

    def script(image: Image.Image, prompt: str) -> Tensor:
        """As the predictor's script, which normalises in numpy."""
        pixels = processor(images=image, return_tensors="pt")["pixel_values"].to(setting.device)
        seen = model.get_image_features(pixels).pooler_output.cpu().numpy()
        seen /= (seen**2).sum(-1, keepdims=True) ** 0.5
        return head(torch.from_numpy(seen).to(setting.device))[0, 0]

    def both(sample: Sample) -> Tensor:
        clip_score(sample.images, sample.prompts)
        return aesthetic(sample.images, sample.prompts)

    yield {
        "clip_score": ours(clip_score),
        "CLIP's card": one_by_one(card),
        "aesthetic": ours(aesthetic),
        "predictor": one_by_one(script),
        "both": both,
    }


@contextmanager
def reward(folder: Path, setting: Setting, dtype: torch.dtype) -> Iterator[dict[str, Scoring]]:
    bert = folder / "bert-base-uncased"
    own = ImageReward(folder / "image_reward", bert, setting.device, dtype)
    tiny = tiny_image_reward
    sizes = Sizes(tiny.IMAGE, tiny.PATCH, tiny.WIDTH, tiny.HIDDEN, tiny.LAYERS) if setting.tiny else None
    package = image_reward(folder / "image_reward" / CONFIG, bert, setting.device, sizes)
    package.load_state_dict(torch.load(folder / "image_reward" / REWARD_FILE, weights_only=True))
    yield {"image_reward": ours(own), "image-reward": one_by_one(lambda image, prompt: package.score(prompt, image))}


@contextmanager
def mps(folder: Path, setting: Setting, dtype: torch.dtype) -> Iterator[dict[str, Scoring]]:
    own = MPS(folder / "mps", folder / "clip_h14", setting.device, dtype)
    theirs = torch.float16 if setting.device.type == "cuda" else torch.float32
    other = MPS(folder / "mps", folder / "clip_h14", setting.device, theirs)
    beside = (folder / "mps" / MPS_FILE).with_suffix(".safetensors")
    with patch("metrics.mps.read_module", lambda file: load_file(beside) if beside.exists() else read_module(file)):
        own.load()
        other.load()
    model, processor = other.model, _processor(own.size)
    text = {"padding": "max_length", "truncation": True, "max_length": own.length, "return_tensors": "pt"}

    def published(image: Image.Image, prompt: str) -> Tensor:
        """What the published script computes, in its order, by our modules: the condition is read each time."""
        pixels = processor(images=image, return_tensors="pt")["pixel_values"].to(setting.device, theirs)
        read, condition = (
            model.text_features(other.tokenizer(words, **text)["input_ids"].to(setting.device)) for words in (prompt, CONDITION)
        )
        tokens, end = read[:, :-1], read[:, -1]
        nearest = (tokens @ condition[:, :-1].mT).amax(-1)
        crossed = model.cross_model(model.image_features(pixels), tokens, nearest / nearest.max() > other.threshold)
        return (model.model.logit_scale.exp() * cosine_similarity(crossed[:, 0], end))[0]

    yield {"mps": ours(own), "MPS's script": one_by_one(published)}


def _transformers(clip: Clip) -> tuple[Any, Any]:
    """A CLIPModel of its own in float32, as its card says, and the images' processor."""
    return CLIPModel.from_pretrained(clip.folder).to(clip.device).eval(), _processor(clip.size)  # type: ignore[arg-type]


def _processor(size: int) -> Any:
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


# Models of the published sizes, with random weights, in the published layouts.


def drawn(make: Callable[[], M]) -> M:
    """A model's weights drawn at once: as transformers draws a billion of them, it takes half a minute."""
    with no_init_weights():
        model = make()
    for name, weight in model.named_parameters():
        if name.endswith("logit_scale"):
            weight.data.fill_(math.log(100))
        elif weight.ndim < 2:
            weight.data.fill_(float(name.endswith("weight")))  # of layer norms; biases are 0
        else:
            weight.data.normal_(std=0.02)
    return model.eval()


def clip_config(*, huge: bool) -> CLIPConfig:
    """OpenAI's ViT-L/14, or LAION's ViT-H/14."""
    text, vision, projection, act = (
        ((1024, 24, 16), (1280, 32, 16), 1024, "gelu") if huge else ((768, 12, 12), (1024, 24, 16), 768, "quick_gelu")
    )

    def tower(width: int, layers: int, heads: int) -> dict[str, Any]:
        sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
        return {**sizes, "num_attention_heads": heads, "projection_dim": projection, "hidden_act": act}

    tokens = {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    return CLIPConfig(
        text_config={**tower(*text), **tokens},
        vision_config={**tower(*vision), "image_size": 224, "patch_size": 14},
        projection_dim=projection,
    )


def save_tokenizer(folder: Path) -> None:
    """CLIP's own vocabulary, which open_clip holds."""
    folder.mkdir(parents=True, exist_ok=True)
    own = open_clip.tokenizer.SimpleTokenizer()
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    (folder / "vocab.json").write_text(json.dumps({renamed.get(entry, entry): i for entry, i in own.encoder.items()}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, own.bpe_ranks)]) + "\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77).save_pretrained(folder)


def save_hps(folder: Path) -> None:
    (folder / "hps").mkdir()
    config: Any = open_clip.get_model_config(ARCHITECTURE)
    torch.save({"state_dict": drawn(lambda: open_clip.CLIP(**config)).state_dict()}, folder / "hps" / FILE)


def save_pick_score(folder: Path) -> None:
    drawn(lambda: CLIPModel(clip_config(huge=True))).save_pretrained(folder / "pick_score")
    save_tokenizer(folder / "pick_score")


def save_clip_l14(folder: Path) -> None:
    drawn(lambda: CLIPModel(clip_config(huge=False))).save_pretrained(folder / "clip_l14")
    save_tokenizer(folder / "clip_l14")
    saved_aesthetic(folder / "aesthetic", 768, 0)


def save_reward(folder: Path) -> None:
    """BERT base beside BLIP's ViT-L/16; in the vocabulary, letters and what fills it up."""
    (folder / "image_reward").mkdir()
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    config = {**tiny_image_reward.CONFIG, **sizes, "vocab_size": 30524, "max_position_embeddings": 512}
    (folder / "image_reward" / CONFIG).write_text(json.dumps(config))
    bert = tiny_image_reward.saved_bert(folder / "bert-base-uncased")
    words = (bert / "vocab.txt").read_text().splitlines()
    (bert / "vocab.txt").write_text("\n".join([*words, *(f"[filler{i}]" for i in range(30522 - len(words)))]) + "\n")
    state = image_reward(folder / "image_reward" / CONFIG, bert).state_dict()
    torch.save(state, folder / "image_reward" / REWARD_FILE)


def save_mps(folder: Path) -> None:
    (folder / "mps").mkdir()
    config, layers, width = clip_config(huge=True), 4, 1024
    sizes = {f"cross_model.layers.{layer}.0.fn.to_q.weight": torch.empty(16 * HEAD, width) for layer in range(layers)}
    state = drawn(lambda: CrossedCLIP(config, sizes)).half().state_dict()
    (folder / "mps" / MPS_FILE).touch()  # whose weights are beside it
    save_file(state, (folder / "mps" / MPS_FILE).with_suffix(".safetensors"))
    config.save_pretrained(folder / "clip_h14")
    save_tokenizer(folder / "clip_h14")


@dataclass(frozen=True)
class Row:
    """What is compared: the sums of these costs."""

    name: str
    ours: Sequence[str]
    theirs: Sequence[str]


GROUPS: list[tuple[Contenders, Callable[[Path], None], float, list[Row]]] = [  # ..., GiB of memory that it takes on a CPU
    (
        hps,
        save_hps,
        14,
        [Row("HPSv2.1", ["hps"], ["hpsv2"]), Row("HPSv2.1, its package's checkpoint kept", ["hps"], ["hpsv2, kept"])],
    ),
    (pick_score, save_pick_score, 10, [Row("PickScore", ["pick_score"], ["PickScore's card"])]),
    (mps, save_mps, 12, [Row("MPS", ["mps"], ["MPS's script"])]),
    (
        clip_l14,
        save_clip_l14,
        5,
        [
            Row("CLIP score", ["clip_score"], ["CLIP's card"]),
            Row("aesthetic", ["aesthetic"], ["predictor"]),
            Row("CLIP score and aesthetic, one pass", ["both"], ["CLIP's card", "predictor"]),
        ],
    ),
    (reward, save_reward, 5, [Row("ImageReward", ["image_reward"], ["image-reward"])]),
]
SIX = ["hps", "pick_score", "mps", "both", "image_reward"]
OTHERS = ["PickScore's card", "MPS's script", "CLIP's card", "predictor", "image-reward"]
ALL = [
    Row("all six, CLIP score and aesthetic in one pass", SIX, ["hpsv2", *OTHERS]),
    Row("all six, hpsv2's checkpoint kept", SIX, ["hpsv2, kept", *OTHERS]),
]


def printed(row: Row, dtype: torch.dtype, costs: Mapping[str, Cost]) -> None:
    def seconds(names: Sequence[str]) -> list[float]:
        return [sum(turn) for turn in zip(*(costs[name].seconds for name in names), strict=True)]

    def rate(seconds: Sequence[float]) -> str:
        return f"{1 / statistics.median(seconds):.3g} ({1 / max(seconds):.3g} to {1 / min(seconds):.3g})"

    def memory(names: Sequence[str]) -> str:
        return f"{max(costs[name].memory for name in names) / GIB:.2f}"

    own, other = seconds(row.ours), seconds(row.theirs)
    ratios = [b / a for a, b in zip(own, other, strict=True)]
    ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    apart = ""
    if len(row.ours) == len(row.theirs) == 1:
        apart = f"{(costs[row.ours[0]].scores - costs[row.theirs[0]].scores).abs().max():.1g}"
    kind = str(dtype).removeprefix("torch.")
    cells = [row.name, kind, rate(own), rate(other), ratio, memory(row.ours), memory(row.theirs), apart]
    print("| " + " | ".join(cells) + " |", flush=True)


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    model, cores = names[0] if names else platform.machine(), torch.get_num_threads()
    return f"{cores} cores of {model}, shared with other programs (load average before: {os.getloadavg()[0]:.1f}), no GPU"


def introduction(setting: Setting) -> str:
    models = "Tiny models" if setting.tiny else "Models of the published sizes"
    packages = ("torch", "transformers", "hpsv2", "image-reward", "open-clip-torch")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"""\
`python bench/metrics.py`, {datetime.date.today()}; {hardware(setting.device)};
{versions}.

{models} with random weights, read from files in the published layouts (MPS: its weights alone, no pickled
module). Images per second of {SIDE} x {SIDE} pixels, {PER_PROMPT} to a prompt, no prompt seen before.

ours: in batches of {setting.batch}, from tensors on the device to scores on the CPU. published: as many images one at a time,
from PIL images. They take turns, {setting.repeats} times after a warm-up: the median, the least and the greatest.
ratio: ours over published in the same turn; where its range includes 1, it does not say which is faster. memory: GiB by which
scoring grows what was held before, at most (on a CPU, what the process kept of earlier calls is not seen). apart: how far
scores of the same images lie apart.

published: hpsv2's `score`, which loads its checkpoint on every call, and the same without that; image-reward's `score`;
transformers' CLIPModel and CLIPImageProcessor as on PickScore's and CLIP's cards; the aesthetic predictor's script, with that
CLIPModel instead of OpenAI's package; MPS's script rewritten, by our modules. All six: sums of the times above, one model in
memory at a time.

| metric | our weights | ours | published | ratio | memory, ours | memory, published | apart |
|---|---|---|---|---|---|---|---|"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--batch", type=int)
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setting = Setting(device, given.batch or BATCH[device.type], REPEATS[device.type], given.tiny)
    torch.set_num_threads(os.cpu_count() or 1)
    transformers.utils.logging.disable_progress_bar()
    print(introduction(setting), flush=True)
    costs: dict[torch.dtype, dict[str, Cost]] = {dtype: {} for dtype in DTYPES[device.type]}
    for contenders, save, memory, rows in GROUPS:
        free = psutil.virtual_memory().available / GIB
        if not setting.tiny and free < memory:
            for row in rows:
                print(f"| {row.name} | not measured: {free:.0f} of {memory} GiB are free | | | | | | |", flush=True)
            continue
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            if setting.tiny:
                saved_metrics(folder)
                (folder / "bert").rename(folder / "bert-base-uncased")
            else:
                save(folder)
            for dtype, known in costs.items():
                with contenders(folder, setting, dtype) as scorings:
                    known.update(setting.measured(scorings))
                del scorings
                gc.collect()
                torch.cuda.empty_cache()
                for row in rows:
                    printed(row, dtype, known)
    for dtype, known in costs.items():
        for row in ALL:
            if {*row.ours, *row.theirs} <= known.keys():
                printed(row, dtype, known)
    if device.type == "cpu":
        print("\nNot measured: GPUs, half precision, larger batches.")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
