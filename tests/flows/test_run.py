"""The command line that runs a deployment and waits."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from prefect._internal.uuid7 import uuid7
from prefect.client.schemas.sorting import LogSort
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, temporary_settings
from prefect.states import Completed, Running

from flows import run


def test_every_line_of_a_run_is_told_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Also one that reaches the server after later ones have, and more than one answer of the server's holds."""
    lines = [SimpleNamespace(id=uuid7(), message=str(number), task_run_id=None) for number in range(400)]
    looks = [lines[:10] + lines[11:30], lines[:30], lines[:199] + lines[200:220], lines]

    class Client:
        looked = 0

        def read_flow_run(self, run: int) -> Any:
            return SimpleNamespace(id=run, state=Running() if self.looked < len(looks) else Completed())

        def read_logs(self, wanted: object, offset: int, sort: LogSort) -> list[Any]:
            assert sort == LogSort.TIMESTAMP_ASC
            there = looks[min(self.looked, len(looks) - 1)]
            self.looked += 1
            return there[offset : offset + 200]

        def read_task_runs(self, flow_run_filter: object) -> list[Any]:
            return []

    client: Any = Client()
    monkeypatch.setattr(run, "EVERY", 0.0)
    of: Any = SimpleNamespace(id=uuid7())
    assert run._follow(client, of, patience=1).id == of.id
    told = [int(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(told) == list(range(400))


def test_a_server_that_goes_away_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def follow(*_: object) -> None:
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(run, "get_client", lambda sync_client: nullcontext())
    monkeypatch.setattr(httpx, "get", lambda url, timeout: httpx.Response(200, request=httpx.Request("GET", url)))
    monkeypatch.setattr(run, "_start", lambda *_: SimpleNamespace(id="1a2b", name="digits"))
    monkeypatch.setattr(run, "_follow", follow)
    url: Any = {PREFECT_API_URL: "http://127.0.0.1:1/api", PREFECT_UI_URL: "http://127.0.0.1:1"}
    said = r"^server: http://127.0.0.1:1/api does not answer any more \(refused\); .*: http://127.0.0.1:1/runs/flow-run/1a2b$"
    with temporary_settings(url), pytest.raises(run.RunError, match=said):
        run.run("rdpo/rdpo-digits", {}, patience=1)
