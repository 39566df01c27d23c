"""The command line of every stage: `python -m stages.NAME`."""

import errno
import fcntl
import inspect
import os
import re
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
from torch.distributed.elastic.multiprocessing import SignalException
from tqdm import tqdm

from stages.device import device_of
from stages.files import LOCKS, TIMES, StageError, TemporaryError, write_json
from stages.launch import RankError, report, run_ranks
from stages.params import RDPO, Batched, ParamsError, Section, load_params
from stages.ranks import RANK, SIZE

T = TypeVar("T")
BATCH_SIZE = "PARASOL_BATCH_SIZE"
PROCESSES = "PARASOL_PROCESSES"
INTERRUPTED = 130  # the shell's exit status for Ctrl-C,
TERMINATED = 143  # and for SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM, as schedulers send it some time before they kill."""


def command(stage: Callable[..., None], has_ranks: bool = False) -> None:
    """Run a stage: its keyword-only arguments are sections of params.yaml, the others come from the command line.

    A stage sees only the sections that it names, but the whole file is validated first. Known failures end in one line; what a
    stage writes, it writes whole or not at all. Its time, peak memory and batch size go to data/times.

    Two variables of the environment say how stages with ranks run, and change no more of what they make than last bits; other
    stages ignore them:
        PARASOL_BATCH_SIZE: the batch size is at most this, or the least that the stage can have.
        PARASOL_PROCESSES: at most so many processes of this machine share the work, where torchrun has not started others.

    Exit statuses:
        1: it failed, and the same command would again.
        71 (EX_OSERR): out of memory, with a batch size that can be lowered; the same command then goes on with what was done.
        75 (EX_TEMPFAIL): what may pass by itself: a hub or a bucket could not be reached or could not answer.
        130, 143: Ctrl-C, SIGTERM.
        137: of several processes one was killed.

    Args:
        stage: the function.
        has_ranks: whether several processes can share its work, each with parts of it that are kept.
    """
    arguments = inspect.signature(stage).parameters.values()
    sections = [a.name for a in arguments if a.kind is inspect.Parameter.KEYWORD_ONLY]
    others = [a for a in arguments if a.kind is not inspect.Parameter.KEYWORD_ONLY]

    def main(**given: str) -> None:
        name, chosen = "@".join([stage.__name__, *given.values()]), dict[str, Any]()
        try:
            params = load_params()
            most, asked = _number(BATCH_SIZE), _number(PROCESSES)
            chosen |= {section: getattr(params, section) for section in sections}
            if not set(given.values()) <= set(params.samplers):  # the one argument that a stage may have
                raise ParamsError(f"samplers: found no {name.split('@', 1)[1]!r}; valid: {', '.join(params.samplers)}")
            own = chosen.get(stage.__name__)
            if most and isinstance(own, Batched):
                chosen[stage.__name__] = own = own.capped(most)
            signal.signal(signal.SIGTERM, _stop)
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is to be ignored
                signal.signal(signal.SIGINT, _stop)
            if SIZE > 1 and not has_ranks:
                raise StageError("runs as one process; valid: python -m, without torchrun")
            if has_ranks and (size := _size(own, asked)) > 1:
                try:
                    run_ranks(f"stages.{stage.__name__}", sys.argv[1:], size)  # which take the device, and the lock
                except SignalException as error:
                    _stop(error.sigval, None)
                _record(name, own, resource.RUSAGE_CHILDREN)
                return
            device_of(params.compute)  # before hours of work for it
            with _alone(name) if RANK == 0 else nullcontext():
                stage(**given, **chosen)
                if RANK == 0:
                    _record(name, own)
        except RankError as error:
            _fail(name, str(error), error.status)
        except (ParamsError, StageError, FloatingPointError) as error:
            _fail(name, str(error), os.EX_TEMPFAIL if _may_pass(error) else 1)
        except Terminated:
            _fail(name, "terminated; nothing is half-written, the same command goes on", TERMINATED)
        except KeyboardInterrupt:
            _fail(name, "interrupted; nothing is half-written, the same command goes on", INTERRUPTED)
        except (torch.OutOfMemoryError, MemoryError) as error:
            _fail(name, *_out_of_memory(error, stage.__name__, chosen.get(stage.__name__), has_ranks))
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):  # torch's words, on the CPU
                raise
            _fail(name, *_out_of_memory(error, stage.__name__, chosen.get(stage.__name__), has_ranks))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            _fail(name, f"{error.filename}: no space left; free some, then the same command goes on")

    main.__doc__ = stage.__doc__
    hints = get_type_hints(stage, include_extras=True)
    main.__annotations__ = {a.name: hints[a.name] for a in others}
    main.__signature__ = inspect.Signature(others)  # type: ignore[attr-defined]
    typer.run(main)


def _number(variable: str) -> int | None:
    """What a variable of the environment says, if it says something."""
    found = os.environ.get(variable)
    if not found:
        return None
    if not re.fullmatch("[1-9][0-9]{0,9}", found):
        raise ParamsError(f"{variable}: found {found!r}; valid: a whole number from 1")
    return int(found)


def _size(section: object, asked: int | None) -> int:
    """How many processes to start; none but this one where it was itself started as one of several."""
    if asked is None or "WORLD_SIZE" in os.environ:
        return 1
    return section.ranks(asked) if isinstance(section, RDPO) else asked


def _may_pass(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, is of the kind that passes by itself."""
    known = isinstance(error, TemporaryError | ConnectionError | TimeoutError)
    return known or (error is not None and _may_pass(error.__cause__))


def _out_of_memory(error: Exception, stage: str, section: object, resumes: bool) -> tuple[str, int]:
    """What to do about it, and the exit status. Where results do not depend on the batch size, a run goes on with another."""
    size, lower, status = _batch_size(section), "set", 1
    if isinstance(section, Batched) and section.batch_size == section.least_batch_size:
        lower = f"{stage}.batch_size is {size}, the least: set"
    elif isinstance(section, Batched) and resumes:
        lower, status = f"{stage}.batch_size is {size}: lower it, in params.yaml or by {BATCH_SIZE}, or set", os.EX_OSERR
    elif size:
        lower = f"{stage}.batch_size is {size}: lower it, or set"
    found = str(error).partition("\n")[0] or type(error).__name__
    then = "what is done is kept, the same command goes on" if resumes else f"another {stage}.batch_size begins anew"
    return f"out of memory ({found}); {lower} compute.drop_text_encoders, compute.slicing or compute.offload; {then}", status


def _batch_size(section: object) -> int | None:
    return section.model_dump().get("batch_size") if isinstance(section, Section) else None


def _stop(signum: int, frame: object) -> None:
    _go_on()
    raise Terminated if signum == signal.SIGTERM else KeyboardInterrupt


def _go_on() -> None:
    # launchers send several signals, of both kinds, and so do hands: they must not end what ends already. One may be here
    # before this: Python prints a traceback where that is then to be ignored (SIG_IGN)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: None)


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


def _record(name: str, section: object, who: int = resource.RUSAGE_SELF) -> None:
    """In data/times; of several processes the peak memory is the largest one's."""
    seconds = time.time() - psutil.Process().create_time()  # imports included: they are part of the wait
    memory = resource.getrusage(who).ru_maxrss / 1024  # kB on Linux
    size = _batch_size(section)
    found = {"seconds": round(seconds, 1), "peak_memory_mb": round(memory), **({"batch_size": size} if size else {})}
    write_json(TIMES / f"{name}.json", found)


def _fail(name: str, message: str, status: int = 1) -> None:
    _go_on()
    if not report(message):
        typer.echo(f"stage {name}: {message}", err=True)
    raise typer.Exit(status)
