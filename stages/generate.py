"""Images of prompts by a predictor, and what they cost and score: `python -m stages.generate FOLDER --prompts FILE --out DIR`.

It is no stage: it needs what `backbone` and `metrics` made, and nothing needs what it makes.
"""

import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, NoReturn

import torch
import typer
from PIL import Image
from torch import Tensor

from backends.digits import labels_of
from metrics import Scorer
from solvers import Backbone, Predictor, load_predictor
from solvers.predictor import FILES, TENSORS
from stages.command import INTERRUPTED, TERMINATED, Terminated, progress
from stages.files import BACKBONE, InputError, StageError, TemporaryError, atomic, reading, sha256, write_json
from stages.frozen import Frozen, Record, load_decoder, load_frozen, loading, pipeline_of
from stages.noise import batches
from stages.params import Compute, Evaluate, ParamsError, Sample, load_params
from stages.prompts import Prompts, read_prompts
from stages.ranks import SIZE
from stages.sampling import Run, cost
from stages.scorers import Scorers, Scores, finite, load_scorers
from stages.sheet import Sheet
from stages.statistics import mean_error

SPLIT = "test"
"""Whose noise the images begin with: nothing is learned from it or chosen by it."""

RECORD, SHEET = "images.json", "grid.png"

app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)


@app.command()
def main(
    folder: Annotated[Path, typer.Argument(help="of the predictor, as models/rdpo")],
    prompts: Annotated[Path, typer.Option(help="a .txt, .csv, .tsv or .json file of prompts, or a folder of such files")],
    out: Annotated[Path, typer.Option(help="folder; what this command wrote into it before is replaced")],
    images: Annotated[int, typer.Option(min=1, help="of each prompt")] = 1,
    seed: Annotated[int | None, typer.Option(min=0, help="of the noise; params.yaml's if not given")] = None,
) -> None:
    """Images of prompts by a predictor: a PNG of each, a page of all, images.json with what they cost and score.

    To be run where params.yaml lies, and what the stages `backbone` and `metrics` made.
    """
    with ending(out):
        params = load_params()
        generate(
            folder,
            prompts,
            out,
            images,
            seed=params.seed if seed is None else seed,
            guidance_scale=params.guidance_scale,
            compute=params.compute,
            sample=params.sample,
            evaluate=params.evaluate,
        )


@dataclass(frozen=True)
class Wanted:
    """An image: its file, its prompt, and the number of its noise."""

    file: str
    prompt: str
    sample: int


def generate(
    folder: Path,
    prompts: Path,
    out: Path,
    images: int,
    *,
    seed: int,
    guidance_scale: float,
    compute: Compute,
    sample: Sample,
    evaluate: Evaluate,
) -> None:
    """Write the images, the page and the record of a predictor, whole or not at all.

    Raises:
        StageError: an input is missing or not what it has to be, in one line.
    """
    if SIZE > 1:
        raise StageError("runs as one process; valid: python -m, without torchrun")
    check_replaceable(out)
    texts = read_prompts(prompts)
    with reading(BACKBONE):
        record = Record.load()
    predictor = made_for(folder, record.identity, guidance_scale)
    check_prompts(record, prompts, texts)
    scorers, asked = load_scorers(compute), wanted(texts, images)
    run = Run(predictor, predictor.sigmas, guidance_scale, seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as work:  # of its own: runs to one folder never mix
        frozen = frozen_for(texts, guidance_scale, compute)
        negative = frozen.prompts.negative
        start = time.perf_counter()
        rows = sampled(run, frozen, [image.sample for image in asked], sample.batch_size)
        seconds = time.perf_counter() - start
        del frozen  # metrics may need its memory
        new = Path(work) / "new"
        new.mkdir()
        sheet = Sheet(len(texts), images)
        scores = drawn(rows["states"], asked, new, sheet, scorers, compute, evaluate.batch_size)
        sheet.page().save(new / SHEET)
        found = {
            "predictor": {"folder": str(folder), "sha256": sha256(folder / TENSORS)},
            "backbone": asdict(record.identity),
            "guidance_scale": guidance_scale,
            "negative": negative,
            "seed": seed,
            "n": len(asked),
            **cost(rows),
            "seconds": round(seconds, 3),  # of sampling alone
            "metrics": [{**known.plain(), **mean(scores[known.name])} for known in scorers.records],
            "images": [
                {**asdict(image), "scores": {name: values[row].item() for name, values in scores.items()}}
                for row, image in enumerate(asked)
            ],
        }
        write_json(new / RECORD, found)
        check_replaceable(out)  # others may have written to it in the meantime
        with atomic(out) as whole:
            new.rename(whole)
    each = f"{found['serial_evaluations']} serial and {found['total_evaluations']:g} total evaluations each"
    typer.echo(f"{out}: {len(asked)} images, {each}, in {seconds:.1f} seconds")


def wanted(texts: Sequence[str], images: int) -> list[Wanted]:
    """So many images of each of n prompts, one prompt after the other.

    Image j of prompt p has sample p + j n: what stage `sample` makes of that sample where it has the same prompts, and the same
    however many images of each there are.
    """
    pairs = [(text, start + image * len(texts)) for start, text in enumerate(texts) for image in range(images)]
    digits = max(4, len(str(len(pairs) - 1)))
    return [Wanted(f"{index:0{digits}d}.png", text, sample) for index, (text, sample) in enumerate(pairs)]


def made_for(folder: Path, backbone: Backbone, guidance_scale: float) -> Predictor:
    """A predictor that was made for this model and guidance; InputError says what is wrong with its folder."""
    identity = {"backbone": backbone.name, "revision": backbone.revision}
    try:
        return load_predictor(folder, **identity, guidance_scale=guidance_scale)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{error.filename}: missing; valid: a predictor's folder, with {', '.join(FILES)}") from error
    except (ValueError, TypeError, ArithmeticError) as error:
        told = " ".join(str(error).partition(", or allow=")[0].split())  # nothing else is allowed here
        raise InputError(told if told.startswith(str(folder)) else f"{folder}: {told}") from error


def check_prompts(record: Record, file: Path, texts: Sequence[str]) -> None:
    """InputError where the model cannot be asked for one; those that it will not see all of are told."""
    if record.name == "digits":
        try:
            for text in texts:
                labels_of([text])
        except ValueError as error:
            raise InputError(f"{file}: {error}") from error
        return
    from backends.load import truncated  # diffusers takes seconds, which digits need not wait for

    with loading():
        cut = truncated(record.name, pipeline_of(record)[0], texts)
    for tokenizer, (count, length) in cut.items():
        typer.echo(f"{count} of {len(texts)} prompts are cut to the {length} tokens that {tokenizer} has", err=True)


def frozen_for(texts: list[str], guidance_scale: float, compute: Compute) -> Frozen:
    """The frozen model, asked for these prompts: they are encoded first where encoders are then dropped."""
    found = load_frozen(guidance_scale, compute.model_copy(update={"drop_text_encoders": False}), {})
    asked = Prompts({SPLIT: texts}, found.prompts.negative)
    if compute.drop_text_encoders:
        from backends.pipeline import PipelineBackend

        if isinstance(found.backend, PipelineBackend):
            found.backend.keep_texts([*texts, asked.negative])
    return replace(found, prompts=asked)


def sampled(run: Run, frozen: Frozen, samples: Sequence[int], batch_size: int) -> dict[str, Tensor]:
    """Final states and costs of the samples, (n, ...) each, on the CPU."""
    parts = []
    for batch in progress(batches(len(samples), batch_size), "sample", "batch"):
        states = run.states(frozen, SPLIT, samples[batch.start : batch.stop])
        parts.append({key: tensor.cpu() for key, tensor in states.items()})
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


@torch.no_grad()
def drawn(
    states: Tensor, asked: Sequence[Wanted], folder: Path, sheet: Sheet, scorers: Scorers, compute: Compute, batch_size: int
) -> Scores:
    """Write the images of states (n, ...) to a folder, and add them to a sheet; their scores by every metric, (n,) each.

    As in stage `evaluate`, what is scored is not yet rounded to 8 bits.
    """
    decode = load_decoder(compute)
    with loading():
        for metric in scorers.metrics.values():
            metric.load()
    parts = list[Scores]()
    for batch in progress(batches(len(states), batch_size), "score", "batch"):
        some = asked[batch.start : batch.stop]
        images, texts = decode(states[batch.start : batch.stop]), [image.prompt for image in some]
        parts.append({name: scored(name, metric, images, texts) for name, metric in scorers.metrics.items()})
        pixels = (images.float() * 255).round().to(torch.uint8).cpu()
        for image, levels in zip(some, pixels, strict=True):
            picture = Image.fromarray(levels.permute(1, 2, 0).squeeze(2).numpy())
            picture.save(folder / image.file)
            sheet.add(picture)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def scored(name: str, metric: Scorer, images: Tensor, texts: Sequence[str]) -> Tensor:
    """What a metric gives; ScoreError where it cannot."""
    return finite(name, lambda: metric(images, texts))


def mean(values: Tensor) -> dict[str, float | None]:
    """Of scores (n,), with its standard error, which one image has not."""
    return {"mean": values.mean().item(), "se": mean_error(values) if len(values) > 1 else None}


def check_replaceable(out: Path) -> None:
    """Raise InputError unless nothing but what this command wrote would be lost with a folder."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        found = "what is no folder"
    else:
        others = sorted({file.name for file in out.iterdir()} - written(out)) if out.exists() else []
        found = f"a folder with {others[0]!r}" if others else ""
    if found:
        raise InputError(f"{out}: found {found}; valid: a new folder, an empty one, or what this command wrote, to replace it")


def written(out: Path) -> set[str]:
    """The files of a folder that its record says this command wrote; none where it has no such record."""
    try:
        found = json.loads((out / RECORD).read_text(encoding="utf-8"))
        return {RECORD, SHEET, *(image["file"] for image in found["images"])}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


@contextmanager
def ending(out: Path) -> Iterator[None]:
    """End in one line where a run to `out` fails as is known, or is ended, with the exit status of stages."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    except (ParamsError, StageError, FloatingPointError) as error:
        _fail(str(error), os.EX_TEMPFAIL if isinstance(error, TemporaryError) else 1)
    except Terminated:
        _fail("terminated; nothing is written", TERMINATED)
    except KeyboardInterrupt:
        _fail("interrupted; nothing is written", INTERRUPTED)
    except OSError as error:
        _fail(f"{error.filename or out}: {error.strerror or error}")
    except (torch.OutOfMemoryError, MemoryError) as error:
        _fail(_out_of_memory(error))
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # torch's words, on the CPU
            raise
        _fail(_out_of_memory(error))


def _out_of_memory(error: Exception) -> str:
    found = str(error).partition("\n")[0] or type(error).__name__
    valid = (
        "lower sample.batch_size or evaluate.batch_size, or set compute.drop_text_encoders, compute.slicing or compute.offload"
    )
    return f"out of memory ({found}); {valid}"


def _stop(signum: int, frame: object) -> None:
    signal.signal(signum, lambda *_: None)  # what it begins is not to be ended by a second one
    raise Terminated


def _fail(message: str, status: int = 1) -> NoReturn:
    typer.echo(f"generate: {message}", err=True)
    raise typer.Exit(status)


if __name__ == "__main__":
    app()
