# SPDX-License-Identifier: Apache-2.0
"""Kills the engine core of a server in the middle of its answers, and starts another.

    python -m tests.soak.killed_core --times 20

Or one of several workers, which dies beside a core that lives:

    python -m tests.soak.killed_core --times 5 --tensor-parallel-size 2 --rank 1
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

import tests.soak.environment  # noqa: F401 -- before vLLM
from tests.serving.server import Server, eventually, running_server
from tests.soak.engines import Host
from tests.soak.setups import MODEL_NAME, as_flags

NUM_CLIENTS = 16
PATIENCE = 60
"""Seconds in which each client must have heard that its answer will not come."""


@dataclass(frozen=True)
class Heard:
    """What the clients of a killed engine heard.

    Attributes:
        answers: How often it was what, complete answers before the kill among them.
        seconds: From the kill to the last of it.
    """

    answers: Counter[str]
    seconds: float


@dataclass(frozen=True)
class Last:
    """What becomes of the server that starts when all others were killed.

    Attributes:
        flags: More arguments of it.
        use: Does something with it, when nothing is left of the others.
    """

    flags: list[str]
    use: Callable[[Server], None]


def flags(host: Host, trace: Path) -> list[str]:
    """Return the arguments of a server that writes a trace."""
    arguments = host.arguments()
    for name in ("scheduler_cls", "worker_cls"):
        del arguments[name]
    roco: Any = arguments["additional_config"]
    arguments["additional_config"] = {"roco": roco["roco"] | {"trace": str(trace)}}
    return [*as_flags(arguments), "--served-model-name", MODEL_NAME]


def titled(server: Server, title: str) -> list[psutil.Process]:
    """Return the processes of a server that have a title, in their titles' order."""
    titles = {
        " ".join(process.cmdline()): process
        for process in psutil.Process(server.pid).children(recursive=True)
    }
    return [titles[found] for found in sorted(titles) if title in found]


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process may still do something."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def ask(client: httpx.AsyncClient, url: str, number: int) -> str:
    """Ask for a long answer; return `complete`, or how that failed."""
    body = {
        "model": MODEL_NAME,
        "prompt": [1000 + number] * 200,
        "max_tokens": 400,
        "ignore_eos": True,
        "stream": number % 2 == 0,
    }
    try:
        async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
            text = (await answer.aread()).decode()
    except httpx.TransportError as error:
        return type(error).__name__
    if answer.status_code != 200:
        return f"status {answer.status_code}"
    is_whole = "[DONE]" in text if body["stream"] else "choices" in text
    return "complete" if is_whole and '"error"' not in text else "error in the stream"


async def ask_on(client: httpx.AsyncClient, url: str, number: int) -> Counter[str]:
    """Ask again and again, until there is no answer; return what was heard."""
    heard: Counter[str] = Counter()
    while True:
        last = await ask(client, url, number)
        heard[last] += 1
        if last != "complete":
            return heard


async def kill_in_mid_answer(victim: psutil.Process, url: str, delay: float) -> Heard:
    """Kill an engine core or a worker that is busy.

    Args:
        victim: Of a running server.
        url: Where that listens.
        delay: Seconds that it is busy before.

    Raises:
        TimeoutError: A client hears nothing.
    """
    # as many at once as there are clients
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=None, limits=limits) as client:
        asking = [
            asyncio.create_task(ask_on(client, url, number))
            for number in range(NUM_CLIENTS)
        ]
        await asyncio.sleep(delay)
        victim.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        async with asyncio.timeout(PATIENCE):
            heard = sum(await asyncio.gather(*asking), Counter())
    return Heard(heard, time.monotonic() - killed)


def kill(server: Server, delay: float, rank: int | None) -> list[str]:
    """Kill one of a server's processes in mid-answer; return what was wrong.

    Args:
        server: A running one.
        delay: Seconds that it is busy before.
        rank: Of the worker to be killed, None for the engine core.
    """
    (core,) = titled(server, "EngineCore")
    victim = core if rank is None else titled(server, "Worker")[rank]
    when = f"{victim.cmdline()[0].strip()} killed after {delay:.2f} s"
    family = [core, *core.children(recursive=True)]
    try:
        heard = asyncio.run(kill_in_mid_answer(victim, server.url, delay))
    except TimeoutError:
        return [f"{when}: a client heard nothing"]
    print(
        f"{when}: {dict(heard.answers)}, the last {heard.seconds:.1f} s later",
        flush=True,
    )
    if eventually(lambda: not any(map(is_alive, family)), PATIENCE):
        return []
    return [f"{when}: processes are left of {family}"]


def run(
    host: Host,
    delays: list[float],
    folder: Path,
    rank: int | None = None,
    last: Last | None = None,
) -> list[str]:
    """Kill a process of each of several servers in turn; return what was wrong.

    Args:
        host: Where and with what.
        delays: Seconds after which each is killed.
        folder: For temporary files of the servers, an empty one.
        rank: See `kill`.
        last: Of the server behind them.
    """
    faults: list[str] = []
    trace, model = host.folder / "trace.jsonl", host.find_model()
    num_files: list[int] = []
    for number, delay in enumerate([*delays, None]):
        with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
            patch.setenv("TMPDIR", str(folder))
            log = host.folder / f"log-{number}.txt"
            told = flags(host, trace)
            if last is not None and delay is None:
                told += last.flags
            server = stack.enter_context(running_server(model, told, log))
            # as the server before has left its own
            num_files.append(len([*folder.glob(f"vllm_roco-{os.getuid()}/*")]))
            if not num_files[-1] or num_files[-1] != num_files[0]:
                faults.append(f"files of numbers at each start: {num_files}")
            freed = server.metrics()["vllm:roco_freed_blocks_total"]
            if freed:
                faults.append(f"server {number} begins with {freed} freed blocks")
            if trace.read_text():
                faults.append(f"server {number} begins with a trace")
            if delay is None:
                if last is not None:
                    last.use(server)
                continue
            faults += kill(server, delay, rank)
            for line in trace.read_text().splitlines():
                json.loads(line)
            print(f"{len(faults)} faults by then", flush=True)
    return faults


def main() -> int:
    """Kill as often as the command line says; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak.killed_core",
        description=__doc__.partition("\n")[0],
    )
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", help="of the model (%(default)s)")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-parallel-size", type=int, default=1)
    parser.add_argument("--rank", type=int, help="of the worker to be killed")
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    delays = [draw.uniform(0, 8) for _ in range(arguments.times)]
    with tempfile.TemporaryDirectory(prefix="k-") as folder:
        inner = Path(folder, "tmp")
        inner.mkdir()
        host = Host(
            folder=Path(folder),
            dtype=arguments.dtype,
            tensor=arguments.tensor_parallel_size,
            pipeline=arguments.pipeline_parallel_size,
        )
        faults = run(host, delays, inner, arguments.rank)
    for fault in faults:
        print(f"FAULT {fault}")
    what = "engine cores" if arguments.rank is None else "workers"
    print(f"{len(delays)} {what} killed, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
