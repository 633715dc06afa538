# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` with an engine of the benchmarks: started, waited for, read, ended."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from tempfile import TemporaryDirectory

import httpx
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.serving.counters import summed
from tools.demo import DemoError
from tools.demo.server import running_server, wait_until_ready

_HOST = "127.0.0.1"
_SERVE = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]


@dataclass(frozen=True)
class Server:
    """A server that has been started and perhaps does not answer yet.

    Attributes:
        url: Its address.
        process: The API server, whose engine is a child of it.
        log: What it has written.
    """

    url: str
    process: Popen[bytes]
    log: Path

    def wait_until_ready(self) -> None:
        """Return once it answers.

        Raises:
            RuntimeError: It does not start; with the end of what it wrote.
        """
        try:
            wait_until_ready(self.process, self.url)
        except DemoError as error:
            end = self.log.read_text(errors="replace")[-3000:]
            raise RuntimeError(f"{error}\n{end}") from error

    def metrics(self) -> Mapping[str, float]:
        """Return the sum of each of its metrics over the labels, by name."""
        page = httpx.get(f"{self.url}/metrics", timeout=30).raise_for_status().text
        return summed(text_string_to_metric_families(page))


@contextmanager
def started(told: Sequence[str]) -> Iterator[Server]:
    """Start a server that ends with the block, and do not wait for it.

    Args:
        told: What `Engine.command` returns.
    """
    # a server is told its model by place, and has text to return
    (model,) = [text for text in told if text.startswith("--model=")]
    arguments = [text for text in told if text not in (model, "--disable-detokenize")]
    with _own_port() as port, TemporaryDirectory() as folder:
        at = (model.removeprefix("--model="), f"--host={_HOST}", f"--port={port}")
        log = Path(folder) / "server.log"
        environment = {"VLLM_NO_USAGE_STATS": "1"}
        with running_server([*_SERVE, *at, *arguments], environment, log) as process:
            yield Server(f"http://{_HOST}:{port}", process, log)


@contextmanager
def _own_port() -> Iterator[int]:
    """Yield a port that nobody else is given within the block.

    It is minutes until a server listens. What is only bound refuses connections, and
    lets the server bind as well, which asks to share its address as this does.
    """
    with socket.socket() as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((_HOST, 0))
        yield bound.getsockname()[1]


@contextmanager
def running(told: Sequence[str]) -> Iterator[Server]:
    """Serve with an engine; the block has the server, which answers.

    Args:
        told: What `Engine.command` returns.

    Raises:
        RuntimeError: The server does not start; with the end of what it wrote.
    """
    with started(told) as server:
        server.wait_until_ready()
        yield server
