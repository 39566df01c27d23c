import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_examples_print_what_they_say(upstream: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the small pipeline's files: the shapes and the costs are those of the real one."""
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(compile(example, "README.md", "exec"), {})
        assert capsys.readouterr().out.strip() == example.strip().splitlines()[-1].split("# ")[-1]


def test_the_table_is_the_committed_report() -> None:
    """As HEAD has both: the workspace's report is of the last run here."""
    report, readme = (
        subprocess.run(["git", "show", f"HEAD:{path}"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for path in ("results/report.md", "README.md")
    )
    assert report.strip() in readme
