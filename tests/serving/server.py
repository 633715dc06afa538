# SPDX-License-Identifier: Apache-2.0
"""A `vllm serve` of the test's own, as a user would start it."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.fresh_python import FreshPython

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

    def metrics(self, engine: int | None = None) -> dict[str, float]:
        """Return every sample of `/metrics`, summed over its labels, by name.

        Args:
            engine: Only what has this label; None for all.
        """
        values: dict[str, float] = {}
        for sample in self.samples():
            if engine is None or sample.labels.get("engine") == str(engine):
                values[sample.name] = values.get(sample.name, 0) + sample.value
        return values

    def samples(self) -> list[Sample]:
        """Return every line of `/metrics`."""
        response = httpx.get(f"{self.url}/metrics", timeout=30, **ASK)
        response.raise_for_status()
        families = text_string_to_metric_families(response.text)
        return [sample for family in families for sample in family.samples]


def free_port(num_ports: int = 1) -> int:
    """Return the first of so many neighbours that nobody listens at."""
    while True:
        with contextlib.ExitStack() as probes, contextlib.suppress(OSError):
            first = 0
            for place in range(num_ports):
                probe = probes.enter_context(socket.socket())
                probe.bind(("127.0.0.1", first + place if first else 0))
                first = first or probe.getsockname()[1]
            return first


@contextlib.contextmanager
def running_server(
    model: Path, arguments: list[str], log: Path, port: int | None = None
) -> Iterator[Server]:
    """Start a server, and stop it at the end.

    Args:
        model: A Hugging Face folder.
        arguments: Of `vllm serve`, after the model.
        log: A file for what it writes.
        port: Where it listens; None for any that is free.

    Raises:
        RuntimeError: It ended, or did not answer in time; with the end of its log.
    """
    port = free_port() if port is None else port
    # as the script `vllm` does, which not every host has
    command = ["-m", "vllm.entrypoints.cli.main", "serve"]
    with log.open("wb") as file:
        process = FreshPython(
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
