import re
import subprocess
from pathlib import Path

import pytest

from solvers import EPD, Backbone, Predictor, logsnr, save_predictor

ROOT = Path(__file__).parents[2]


def test_the_examples_print_what_they_say(upstream: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the small pipeline's files and a tiny model: the shapes and the costs are those of the real ones."""
    from tiny import saved, tiny_sd15

    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(examples) == 3
    model = str(saved(tiny_sd15(), upstream / "model"))
    predictor = Predictor(
        EPD(11, 2, 0.0, 0.0).requires_grad_(False).table(), logsnr(11, 0.03, 14.6), False, Backbone("", None, ""), 7.5, {}
    )
    (upstream / "sd15").mkdir()
    save_predictor(predictor, upstream / "sd15")
    for example in examples:
        source = example.replace("stable-diffusion-v1-5/stable-diffusion-v1-5", model).replace('"cuda"', '"cpu"')
        exec(compile(source, "README.md", "exec"), {})
        assert capsys.readouterr().out.strip() == example.strip().splitlines()[-1].split("# ")[-1]


def test_the_table_is_the_committed_report() -> None:
    """As HEAD has both, the table and the findings: the workspace's report is of the last run here."""
    report, readme = (
        subprocess.run(["git", "show", f"HEAD:{path}"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for path in ("results/report.md", "README.md")
    )
    assert report.split("\n\nWhere:")[0].strip() in readme
