# SPDX-License-Identifier: Apache-2.0
"""Prometheus scrapes metrics that grow, and answers for every panel."""

from __future__ import annotations

import re
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path

import pytest

from tools.dashboard import DashboardError, __main__
from tools.dashboard.__main__ import show
from tools.dashboard.panels import Target, panels
from tools.dashboard.prometheus import running_prometheus

METRICS = sorted(
    {
        name
        for panel in panels("20s")
        for target in panel.targets
        for name in re.findall(r"vllm:\w+", target.expression)
    }
)
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="needs Debian's package prometheus"
)


@pytest.fixture
def url() -> Iterator[str]:
    """A server whose every metric is larger with every scrape."""
    scrapes = count(1)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            value = next(scrapes)
            labels = 'model_name="m",engine="0"'
            lines = []
            for name in METRICS:
                if not name.endswith("_bucket"):
                    lines.append(f"{name}{{{labels}}} {value}")
                    continue
                for end, share in (("1", 2), ("+Inf", 1)):
                    lines.append(f'{name}{{{labels},le="{end}"}} {value / share}')
            self.send_response(200)
            self.end_headers()
            self.wfile.write("\n".join([*lines, ""]).encode())

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_line_is_called_by_its_labels() -> None:
    target = Target("up", "held, {{model_name}} {{engine}}")
    assert target.name({"model_name": "m", "engine": "0"}) == "held, m 0"


@needs_prometheus
def test_every_panel_is_answered_and_drawn(
    url: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(__main__, "SCRAPE_SECONDS", 1)
    picture = tmp_path / "pictures" / "dashboard.svg"
    works = [sys.executable, "-c", "import time; time.sleep(2)"]
    assert show(url, works, picture) == 0
    assert "no answer" not in capsys.readouterr().out
    drawn = picture.read_text()
    for panel in panels("20s"):
        assert panel.title in drawn
        for target in panel.targets:
            assert target.name({"model_name": "m", "engine": "0"}) in drawn


@needs_prometheus
def test_a_refused_expression_is_told(url: str, tmp_path: Path) -> None:
    with (
        running_prometheus(
            url, tmp_path, rules=tmp_path / "none.yml", scrape_seconds=1
        ) as prometheus,
        pytest.raises(DashboardError, match="parse error"),
    ):
        prometheus.series("sum(", 0, 1, 1)


def test_prometheus_that_is_not_there_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DashboardError, match="needs Prometheus"):
        show("http://localhost:1", ["true"], tmp_path / "picture.svg")
