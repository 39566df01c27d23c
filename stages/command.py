"""The command line of every stage: `python -m stages.NAME`."""

import errno
import fcntl
import inspect
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar, get_type_hints

import psutil
import torch
import typer
from tqdm import tqdm

from stages.device import device_of
from stages.files import LOCKS, TIMES, StageError, write_json
from stages.params import ParamsError, Section, load_params
from stages.ranks import RANK, SIZE

T = TypeVar("T")
INTERRUPTED = 130  # the shell's exit status for Ctrl-C,
TERMINATED = 143  # and for SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers send it some time before they kill."""


def command(stage: Callable[..., None], has_ranks: bool = False) -> None:
    """Run a stage: its keyword-only arguments are sections of params.yaml, the others come from the command line.

    A stage sees only the sections that it names, but the whole file is validated first. Known failures end in one line and
    exit status 1, Ctrl-C in 130, SIGTERM in 143; what a stage writes, it writes whole or not at all. Its time and peak memory
    go to data/times.
    """
    arguments = inspect.signature(stage).parameters.values()
    sections = [a.name for a in arguments if a.kind is inspect.Parameter.KEYWORD_ONLY]
    others = [a for a in arguments if a.kind is not inspect.Parameter.KEYWORD_ONLY]

    def main(**given: str) -> None:
        name, chosen = "@".join([stage.__name__, *given.values()]), dict[str, Any]()
        try:
            params = load_params()
            device_of(params.compute)  # before hours of work for it
            chosen |= {section: getattr(params, section) for section in sections}
            if not set(given.values()) <= set(params.samplers):  # the one argument that a stage may have
                raise ParamsError(f"samplers: found no {name.split('@', 1)[1]!r}; valid: {', '.join(params.samplers)}")
            signal.signal(signal.SIGTERM, _stop)
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is to be ignored
                signal.signal(signal.SIGINT, _stop)
            if SIZE > 1 and not has_ranks:
                raise StageError("runs as one process; valid: python -m, without torchrun")
            with _alone(name) if RANK == 0 else nullcontext():
                stage(**given, **chosen)
                if RANK == 0:
                    _record(name)
        except (ParamsError, StageError, FloatingPointError) as error:
            _fail(name, str(error))
        except Terminated:
            _fail(name, "terminated; nothing is half-written, the same command goes on", TERMINATED)
        except KeyboardInterrupt:
            _fail(name, "interrupted; nothing is half-written, the same command goes on", INTERRUPTED)
        except (torch.OutOfMemoryError, MemoryError) as error:
            _fail(name, _out_of_memory(error, stage.__name__, chosen.get(stage.__name__), has_ranks))
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):  # torch's words, on the CPU
                raise
            _fail(name, _out_of_memory(error, stage.__name__, chosen.get(stage.__name__), has_ranks))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            _fail(name, f"{error.filename}: no space left; free some, then the same command goes on")

    main.__doc__ = stage.__doc__
    hints = get_type_hints(stage, include_extras=True)
    main.__annotations__ = {a.name: hints[a.name] for a in others}
    main.__signature__ = inspect.Signature(others)  # type: ignore[attr-defined]
    typer.run(main)


def _out_of_memory(error: Exception, stage: str, section: object, resumes: bool) -> str:
    """What to do about it. Where results do not depend on the batch size, a run goes on with another one."""
    size = section.model_dump().get("batch_size") if isinstance(section, Section) else None
    lower = f"{stage}.batch_size is {size}: lower it, or set" if size else "set"
    found = str(error).partition("\n")[0] or type(error).__name__
    then = "what is done is kept, the same command goes on" if resumes else f"another {stage}.batch_size begins anew"
    return f"out of memory ({found}); {lower} compute.drop_text_encoders, compute.slicing or compute.offload; {then}"


def _stop(signum: int, frame: object) -> None:
    # torchrun sends it twice, and so do hands: the second must not end what the first began
    signal.signal(signum, signal.SIG_IGN)
    raise Terminated if signum == signal.SIGTERM else KeyboardInterrupt


def progress(items: Sequence[T], description: str, unit: str, done: int = 0) -> "tqdm[T]":
    """The items, with the first rank's progress bar on standard error; `done` more were made in an earlier run."""
    every = 0.2 if sys.stderr.isatty() else 10.0
    total = done + len(items)
    return tqdm(
        items,
        desc=description,
        unit=unit,
        initial=done,
        total=total,
        mininterval=every,
        dynamic_ncols=True,
        disable=RANK > 0,
    )


@contextmanager
def _alone(name: str) -> Iterator[None]:
    """Wait until no other process runs the stage here: one may have outlived the pipeline that started it."""
    LOCKS.mkdir(parents=True, exist_ok=True)
    with (LOCKS / name).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            typer.echo(f"stage {name}: waiting for another process that runs it", err=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _record(name: str) -> None:
    seconds = time.time() - psutil.Process().create_time()  # imports included: they are part of the wait
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # kB on Linux
    write_json(TIMES / f"{name}.json", {"seconds": round(seconds, 1), "peak_memory_mb": round(memory)})


def _fail(name: str, message: str, status: int = 1) -> None:
    typer.echo(f"stage {name}: {message}", err=True)
    raise typer.Exit(status)
