"""Pages as a browser has them."""

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--hide-scrollbars")
TIME = "--virtual-time-budget=10000"
SECONDS = 120
ASK = """
<pre id="answer"></pre>
<script>
  addEventListener("load", () => {{ document.getElementById("answer").textContent = JSON.stringify(({question})()); }});
</script>
"""


class Browser:
    """A browser without a window, that goes by no profile but its own new one, and to no network.

    Args:
        program: Chromium or Chrome.
        profile: an empty folder.
    """

    def __init__(self, program: str, profile: Path) -> None:
        self.program, self.profile = program, profile

    def ask(self, page: Path, question: str, width: int) -> Any:
        """What a JavaScript function without arguments returns once the page, a file, is there; as JSON has it."""
        asking = self.profile / "asking.html"
        asking.write_text(page.read_text(encoding="utf-8") + ASK.format(question=question), encoding="utf-8")
        found = re.search(r'<pre id="answer">(.*?)</pre>', self._run("--dump-dom", asking, width), re.DOTALL)
        assert found, "the browser gave no page"
        return json.loads(unescape(found[1]))

    def screenshot(self, page: Path, image: Path, width: int, height: int) -> None:
        """What a window of that size shows of a page, as a PNG file."""
        self._run(f"--screenshot={image}", page, width, height)

    def _run(self, action: str, page: Path, width: int, height: int = 900) -> str:
        where = (f"--user-data-dir={self.profile / 'profile'}", f"--window-size={width},{height}", page.resolve().as_uri())
        command = [self.program, *FLAGS, TIME, action, *where]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS).stdout


@pytest.fixture
def browser() -> Iterator[Browser]:
    """Chromium or Chrome, where there is one."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no {', '.join(NAMES)} on PATH")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield Browser(program, Path(folder))
