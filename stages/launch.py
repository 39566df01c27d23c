"""A stage as several processes of this machine, started by torchrun's own launcher."""

import atexit
import logging
import os
import signal
import sys
from collections.abc import Collection, Sequence
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure, get_error_handler
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

MARK = "PARASOL_RANK"
"""Variable of the environment by which a rank knows that it was started here, and is not to tell its failure itself."""
HOST = "127.0.0.1"
ENDED = (-signal.SIGTERM, 128 + signal.SIGTERM)
"""Statuses of ranks that were told to end."""
FOLLOWS = "another rank has stopped"
"""What ranks say that fail because another one has."""


class RankError(Exception):
    """A rank failed: why, and the exit status that it had."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def report(message: str) -> bool:
    """Leave a rank's last words to the process that started it; False where `run_ranks` has not."""
    if MARK not in os.environ:
        return False
    get_error_handler().record_exception(RankError(message, 1))
    return True


def run_ranks(module: str, arguments: Sequence[str], size: int) -> None:
    """Run a module as so many ranks to its end. When one fails, and when this process gets a signal, all are told to end.

    Raises:
        RankError: of the first that failed.
        SignalException: this process got one, of SIGTERM and SIGINT.
    """
    logger = logging.getLogger("torch.distributed.elastic")  # what it says is said here; its modules have levels of their own
    logger.propagate = False
    logger.addHandler(logging.NullHandler())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // size)))
    os.environ[MARK] = "true"
    with TemporaryDirectory() as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=size,
            run_id=str(os.getpid()),
            rdzv_backend="c10d",
            rdzv_endpoint=f"{HOST}:0",
            local_addr=HOST,
            max_restarts=0,  # a scheduler's affair
            monitor_interval=0.1,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            elastic_launch(config, sys.executable)("-m", module, *arguments)
        except SignalException as error:
            # a thread of torch's rendezvous is left, which now and then aborts a process that ends in the ordinary way
            atexit.register(os._exit, 128 + error.sigval)
            raise
        except ChildFailedError as error:
            raise _first(error.failures.values()) from None
        finally:
            del os.environ[MARK]


def _first(failures: Collection[ProcessFailure]) -> RankError:
    """The earliest with a reason of its own; else of one that was killed, and can say nothing; else of one that crashed.

    The launcher itself kills ranks that wait too deep in torch to be told to end.
    """
    told = {each.local_rank: _told(each) for each in failures}

    def has_reason(each: ProcessFailure) -> bool:
        return bool(told[each.local_rank]) and FOLLOWS not in told[each.local_rank] and each.exitcode not in ENDED

    first = min(
        failures,
        key=lambda each: (
            not has_reason(each),
            each.exitcode != -signal.SIGKILL,
            each.exitcode in ENDED,
            FOLLOWS in told[each.local_rank],
            each.timestamp,
        ),
    )
    if first.exitcode < 0:
        return RankError(f"a rank was ended by signal {-first.exitcode}; the same command goes on", 128 - first.exitcode)
    return RankError(told[first.local_rank] or "a rank failed, and says why above", first.exitcode)


def _told(failure: ProcessFailure) -> str:
    """What `report` left."""
    left: Any = failure.error_file_data["message"]
    return left["message"].removeprefix(f"{RankError.__name__}: ") if isinstance(left, dict) else ""
