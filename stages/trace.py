"""What a long run tells while it runs: a file of JSON lines, and DVCLive's plots made of it."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dvclive import Live

from stages.files import atomic

TIMED = {"seconds", "images_per_second", "memory_mb"}
"""What differs from run to run: in the log alone, since the plots are an output of the pipeline."""


class Trace:
    """One line of JSON for each entry, whose "iteration" never falls; numbers that are not finite are null.

    Args:
        file: of the lines; those up to iteration `done` are kept, later ones were of work that is done again.
        plots: folder that DVCLive writes to, made anew.
        done: iterations that a checkpoint holds.
    """

    def __init__(self, file: Path, plots: Path, done: int) -> None:
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if done and file.exists() else []
        kept = [line for line in lines if 0 < iteration_of(line) <= done]
        with atomic(file) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")
        self.file = file.open("a", encoding="utf-8")
        self.live = Live(str(plots), report=None, save_dvc_exp=False, dvcyaml=None)
        for line in kept:
            self._plot(json.loads(line))

    def add(self, entry: Mapping[str, Any]) -> None:
        """Write an entry, and plot its numbers."""
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        self.file.write(json.dumps(plain, allow_nan=False) + "\n")
        self.file.flush()
        self._plot(plain)

    def close(self) -> None:
        """Finish the plots."""
        self.file.close()
        self.live.end()

    def _plot(self, entry: Mapping[str, Any]) -> None:
        self.live.step = entry["iteration"]
        for name, value in entry.items():
            if isinstance(value, int | float) and name not in TIMED | {"iteration"}:
                self.live.log_metric(name, value)


def iteration_of(line: str) -> int:
    """Of a line of the log; 0 where it was not written whole."""
    try:
        return json.loads(line)["iteration"] if line.endswith("\n") else 0
    except (json.JSONDecodeError, KeyError, TypeError):
        return 0
