# SPDX-License-Identifier: Apache-2.0
"""A `vllm serve` of the test's own, as a user would start it."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

ASK: dict[str, Any] = dict(verify=False)
"""Reading the certificates that nobody needs here takes 25 ms of a core each time."""

START_TIMEOUT = 300
"""Seconds; on two busy cores the processes of a server take a while to import vLLM."""


class Server:
    """A running server.

    Attributes:
        url: Where it listens.
        log: The file that it writes to.
        pid: Its first process, which has started all others.
    """

    def __init__(self, url: str, log: Path, pid: int) -> None:
        self.url = url
        self.log = log
        self.pid = pid

    def is_healthy(self) -> bool:
        """Ask `/health`, which asks the engine."""
        return httpx.get(f"{self.url}/health", timeout=30, **ASK).status_code == 200

    def metrics(self) -> dict[str, float]:
        """Return every sample of `/metrics`, summed over its labels, by name."""
        response = httpx.get(f"{self.url}/metrics", timeout=30, **ASK)
        response.raise_for_status()
        values: dict[str, float] = {}
        for family in text_string_to_metric_families(response.text):
            for sample in family.samples:
                values[sample.name] = values.get(sample.name, 0) + sample.value
        return values


@contextlib.contextmanager
def running_server(model: Path, arguments: list[str], log: Path) -> Iterator[Server]:
    """Start a server on a free port, and stop it at the end.

    Args:
        model: A Hugging Face folder.
        arguments: Of `vllm serve`, after the model.
        log: A file for what it writes.

    Raises:
        RuntimeError: It ended, or did not answer in time; with the end of its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # as the script `vllm` does, which not every host has
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve"]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, model, "--port", str(port), *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    server = Server(f"http://127.0.0.1:{port}", log, process.pid)

    def answers() -> bool:
        if process.poll() is not None:
            raise RuntimeError(f"vllm serve ended:\n{log.read_text()[-12_000:]}")
        with contextlib.suppress(httpx.TransportError):
            return server.is_healthy()
        return False

    try:
        if not eventually(answers, START_TIMEOUT):
            raise RuntimeError(
                f"no answer from vllm serve:\n{log.read_text()[-12_000:]}"
            )
        yield server
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def eventually(holds: Callable[[], bool], timeout: float) -> bool:
    """Wait until something holds; return whether it did within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
