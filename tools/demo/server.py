# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` as a child: started, waited for, and gone afterwards in any case."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import httpx

from tools.demo import DemoError
from tools.demo.options import HOST, Options
from vllm_roco.config import NAMESPACE

START_SECONDS = 900
"""Time for a large model from a slow disk; a server that died is noticed at once."""

STOP_SECONDS = 20


@contextlib.contextmanager
def running_server(
    command: Sequence[str], environment: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `vllm serve`, and end it and every process that it started.

    Args:
        command: The command line.
        environment: Variables to set, on top of this process's own.
        log: File that receives what it prints.

    Raises:
        DemoError: The command cannot be run.
    """
    with log.open("wb") as output:
        try:
            process = subprocess.Popen(
                command,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # a group of its own: Ctrl-C reaches the demo alone, which then
                # ends the server and all that it started
                start_new_session=True,
            )
        except OSError as error:
            raise DemoError(f"cannot run {command[0]}: {error.strerror}.") from error
    try:
        yield process
    finally:
        # a second Ctrl-C must not leave half of them behind
        previous = {
            number: signal.signal(number, signal.SIG_IGN)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        _signal(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        # what did not end with the server, and the server if it did not end
        _signal(process, signal.SIGKILL)
        process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def wait_until_ready(process: subprocess.Popen[bytes], url: str) -> None:
    """Return once the server answers.

    Raises:
        DemoError: It ended, or did not answer within `START_SECONDS`.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if (status := process.poll()) is not None:
            raise DemoError(f"the server ended by itself, with status {status}.")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=5).is_success:
                return
        time.sleep(0.2)
    raise DemoError(f"the server did not answer within {START_SECONDS} s.")


def serve_command(
    model: str, options: Options, *, trace: Path, eager: bool
) -> list[str]:
    """Return the command line of `vllm serve`."""
    roco = {key: getattr(options.roco, key) for key in ("budget", "stride", "chunk")}
    additional = json.dumps({NAMESPACE: {**roco, "trace": str(trace)}})
    return [
        *("vllm", "serve", model, "--host", HOST, "--port", str(options.port)),
        *("--dtype", "bfloat16", "--block-size", str(options.block_size)),
        *(["--enforce-eager"] if eager else []),
        *("--attention-backend", "roco", "--additional-config", additional),
        *options.server_arguments,
    ]


def serve_environment(*, gpu: bool, local_model: bool) -> dict[str, str]:
    """Return the variables of a short-lived server; the user's own have precedence."""
    wanted = {"VLLM_NO_USAGE_STATS": "1"}
    if local_model:
        # nothing is to be asked of a hub
        wanted["HF_HUB_OFFLINE"] = "1"
    if not gpu:
        # bound threads that wait for a core in use by others slow a step manyfold
        wanted |= {
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }
    return {name: text for name, text in wanted.items() if name not in os.environ}
