# SPDX-License-Identifier: Apache-2.0
"""The servers of a comparison: a port for each, and none is left behind."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from benchmarks.serving import http_server, online_servers
from benchmarks.serving.http_server import started
from benchmarks.serving.online_servers import Servers
from benchmarks.serving.online_shapes import online_runs
from benchmarks.serving.signals import held_back, unwind_once

SERVER = """
import http.server, signal, subprocess, sys, time

class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

def end(*_):
    time.sleep(1)
    sys.exit()

(port,) = [text.removeprefix("--port=") for text in sys.argv if "--port=" in text]
engine = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
signal.signal(signal.SIGTERM, end)
http.server.HTTPServer(("127.0.0.1", int(port)), Answer).serve_forever()
"""
"""Takes a second to end, and leaves its engine to others."""


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start this instead of vLLM."""
    path = tmp_path / "server.py"
    path.write_text(SERVER)
    monkeypatch.setattr(http_server, "_SERVE", [sys.executable, str(path)])
    monkeypatch.setattr(online_servers, "warmed_up", lambda *_: None)


def test_a_port_is_a_servers_own_before_it_listens() -> None:
    """It was free again as soon as it was drawn, and the next one could draw it."""
    with started(["--model=m"]) as server:
        port = int(server.url.rpartition(":")[2])
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        # the server itself can listen there
        server.wait_until_ready()


def serve_until_told(ready: Connection) -> None:
    unwind_once()
    runs = online_runs(["chat:ample"], ["stock", "roco"])
    with Servers([], "tokenizer", [run.engine for run in runs]) as servers:
        for run in runs:
            servers.ready(run)
        ready.send(None)
        time.sleep(600)


@pytest.mark.parametrize(
    "signals",
    [
        [signal.SIGTERM],
        [signal.SIGHUP],
        [signal.SIGINT, signal.SIGINT],
        [signal.SIGTERM, signal.SIGINT, signal.SIGTERM],
    ],
    ids=lambda signals: "-".join(signal.Signals(each).name for each in signals),
)
def test_no_signal_leaves_a_server_behind(signals: Sequence[signal.Signals]) -> None:
    """SIGTERM ended the benchmark alone, and so did a second SIGINT."""
    # a fork: another Python would import vLLM first
    context = multiprocessing.get_context("fork")
    ready, told = context.Pipe(duplex=False)
    benchmark = context.Process(target=serve_until_told, args=(told,))
    benchmark.start()
    assert benchmark.pid is not None
    processes: list[psutil.Process] = []
    try:
        assert ready.poll(120)
        processes += psutil.Process(benchmark.pid).children(recursive=True)
        assert len(processes) == 4, "two servers, and an engine of each"
        for number in signals:
            os.kill(benchmark.pid, number)
            # the servers are being ended meanwhile
            time.sleep(0.3)
        benchmark.join(60)
        assert benchmark.exitcode
        _, alive = psutil.wait_procs(processes, timeout=5)
        assert alive == []
    finally:
        benchmark.kill()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.fixture
def interrupt() -> Iterator[None]:
    """SIGINT as Python has it: who starts the tests in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupt")
def test_signals_that_were_held_back_come_when_the_block_is_done() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), held_back():
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
        done.append("block")
    assert done == ["block"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
