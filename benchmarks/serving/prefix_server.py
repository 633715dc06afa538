# SPDX-License-Identifier: Apache-2.0
"""Lets vLLM's own client ask a server of its own for texts that share prefixes."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
from prometheus_client.parser import text_string_to_metric_families
from vllm.benchmarks import serve

from benchmarks.serving.counters import summed
from benchmarks.serving.engines import MODELS
from benchmarks.serving.prefix_workloads import PrefixWorkload
from benchmarks.serving.vllm_bench import parsed
from tools.demo import DemoError
from tools.demo.server import running_server, wait_until_ready

_HOST = "127.0.0.1"


@contextmanager
def running(told: Sequence[str]) -> Iterator[str]:
    """Serve with an engine; the block has the server's address.

    Args:
        told: What `Engine.command` returns.

    Raises:
        RuntimeError: The server does not start; with the end of what it wrote.
    """
    with socket.socket() as probe:
        probe.bind((_HOST, 0))
        port = probe.getsockname()[1]
    # a server is told its model by place, and has text to return
    (model,) = [text for text in told if text.startswith("--model=")]
    arguments = [text for text in told if text not in (model, "--disable-detokenize")]
    vllm = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
    at = (model.removeprefix("--model="), f"--host={_HOST}", f"--port={port}")
    url = f"http://{_HOST}:{port}"
    with TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        environment = {"VLLM_NO_USAGE_STATS": "1"}
        with running_server([*vllm, *at, *arguments], environment, log) as server:
            try:
                wait_until_ready(server, url)
            except DemoError as error:
                end = log.read_text(errors="replace")[-3000:]
                raise RuntimeError(f"{error}\n{end}") from error
            yield url


def ask(
    url: str, workload: PrefixWorkload, seed: int, tokenizer: str
) -> dict[str, float]:
    """Return what `vllm bench serve` finds.

    Args:
        url: The server's address.
        workload: What it is asked for, whose text the client makes up.
        seed: Another one makes other text.
        tokenizer: Of the client.

    Raises:
        RuntimeError: Not every request is answered.
    """
    count = workload.num_requests
    command = [
        *(f"--base-url={url}", f"--model={MODELS / workload.model}"),
        *(f"--tokenizer={tokenizer}", f"--seed={seed}", "--ignore-eos"),
        *("--dataset-name=prefix_repetition", f"--num-prompts={count}"),
        *("--disable-tqdm", "--percentile-metrics=ttft", "--metric-percentiles=99"),
    ]
    for name in ("num_prefixes", "prefix_len", "suffix_len", "output_len"):
        option = f"--prefix-repetition-{name.replace('_', '-')}"
        command.append(f"{option}={getattr(workload, name)}")
    result = dict(serve.main(parsed(serve, command)))
    if result["completed"] != count:
        raise RuntimeError(f"{result['completed']} of {count} requests were answered")
    return result


def metrics(url: str) -> Mapping[str, float]:
    """Return the sum of each of a server's metrics over its labels, by name."""
    page = httpx.get(f"{url}/metrics", timeout=30).raise_for_status().text
    return summed(text_string_to_metric_families(page))
