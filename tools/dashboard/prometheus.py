# SPDX-License-Identifier: Apache-2.0
"""A Prometheus of our own that scrapes one server, and what it answers."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tools.dashboard import DashboardError

START_SECONDS = 60


@dataclass(frozen=True)
class Series:
    """What one query answered for one set of labels.

    Attributes:
        labels: The labels, without the metric's name.
        times: Seconds since the epoch.
        values: One for each time, all of them finite.
    """

    labels: Mapping[str, str]
    times: list[float]
    values: list[float]


class Prometheus:
    """A running Prometheus.

    Attributes:
        url: Where it listens.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def series(
        self, expression: str, begin: float, end: float, step: float
    ) -> list[Series]:
        """Ask for the values of an expression between two times, every `step` seconds.

        Raises:
            DashboardError: Prometheus refuses the expression.
        """
        times = {"start": begin, "end": end, "step": step}
        found = []
        for line in self._ask("query_range", query=expression, **times)["result"]:
            samples = [(float(at), float(value)) for at, value in line["values"]]
            # quantiles of nothing are no number
            samples = [sample for sample in samples if math.isfinite(sample[1])]
            if samples:
                of_time, values = zip(*samples, strict=True)
                labels = {k: v for k, v in line["metric"].items() if k != "__name__"}
                found.append(Series(labels, list(of_time), list(values)))
        return found

    def firing(self) -> list[str]:
        """Return the names of the alerts that fire now."""
        return sorted(
            alert["labels"]["alertname"]
            for alert in self._ask("alerts")["alerts"]
            if alert["state"] == "firing"
        )

    def scrapes(self) -> bool:
        """Whether the server has answered."""
        targets = self._ask("targets")["activeTargets"]
        return any(target["health"] == "up" for target in targets)

    def _ask(self, what: str, **parameters: Any) -> Any:
        answer = httpx.get(f"{self.url}/api/v1/{what}", params=parameters, timeout=30)
        told = answer.json()
        if told["status"] != "success":
            raise DashboardError(f"Prometheus: {told['error']}")
        return told["data"]


@contextlib.contextmanager
def running_prometheus(
    server: str, folder: Path, *, rules: Path, scrape_seconds: int
) -> Iterator[Prometheus]:
    """Have Prometheus scrape a server; return once it does, and end it afterwards.

    Args:
        server: The server's address, such as `http://localhost:8000`.
        folder: For its configuration, data and log.
        rules: The alerts to evaluate.
        scrape_seconds: Seconds from scrape to scrape.

    Raises:
        DashboardError: Prometheus is not installed, or it ends, or the server does not
            answer within `START_SECONDS`.
    """
    if shutil.which("prometheus") is None:
        raise DashboardError("needs Prometheus (Debian and Ubuntu: prometheus)")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    config, log = folder / "prometheus.yml", folder / "prometheus.log"
    every = f"{scrape_seconds}s"
    # JSON is YAML
    config.write_text(
        json.dumps(
            {
                "global": {"scrape_interval": every, "evaluation_interval": every},
                "rule_files": [str(rules)],
                "scrape_configs": [
                    {
                        "job_name": "vllm",
                        "scrape_timeout": every,
                        "static_configs": [
                            {"targets": [httpx.URL(server).netloc.decode()]}
                        ],
                    }
                ],
            }
        )
    )
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={config}",
                f"--storage.tsdb.path={folder / 'data'}",
                f"--web.listen-address={address}",
                "--log.level=warn",
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    prometheus = Prometheus(f"http://{address}")
    try:
        _wait(process, prometheus, server, log)
        yield prometheus
    finally:
        process.terminate()
        process.wait()


def _wait(
    process: subprocess.Popen[bytes], prometheus: Prometheus, server: str, log: Path
) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DashboardError(f"Prometheus ended: {log.read_text()[-1000:]}")
        # it answers with a page that is no JSON while it starts
        with contextlib.suppress(httpx.TransportError, json.JSONDecodeError):
            if prometheus.scrapes():
                return
        time.sleep(0.2)
    raise DashboardError(f"no metrics from {server} within {START_SECONDS} s")
