# SPDX-License-Identifier: Apache-2.0
"""Calls vLLM's benchmarks, one after another, from one process.

The imports are paid once: vLLM forks an engine from this process, as long as CUDA is
not in use here.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from vllm.utils.argparse_utils import FlexibleArgumentParser

from benchmarks.serving.engines import Requests

LATENCY_WARMUPS = 2
"""How often a batch is served before anything is timed."""
ITERATIONS = 5
"""How often a batch is served whose latency is asked for, after the warm-up."""


def parsed(benchmark: ModuleType, command: Sequence[str]) -> Any:
    """Return the command as the benchmark's own parser reads it."""
    parser = FlexibleArgumentParser()
    benchmark.add_cli_args(parser)
    return parser.parse_args(list(command))


def throughput_command(requests: Requests) -> list[str]:
    """Return what `vllm bench throughput` is told about the requests."""
    return [
        "--dataset-name=random",
        f"--random-input-len={requests.input_len}",
        f"--random-output-len={requests.output_len}",
        f"--num-prompts={requests.count}",
    ]


def latency_command(
    requests: Requests, iterations: int = ITERATIONS, warmups: int = LATENCY_WARMUPS
) -> list[str]:
    """Return what `vllm bench latency` is told about the requests."""
    return [
        f"--batch-size={requests.count}",
        f"--input-len={requests.input_len}",
        f"--output-len={requests.output_len}",
        f"--num-iters-warmup={warmups}",
        f"--num-iters={iterations}",
    ]


def call(benchmark: ModuleType, command: Sequence[str]) -> dict[str, Any]:
    """Run a benchmark to its end and return what it writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        benchmark.main(parsed(benchmark, [*command, f"--output-json={path}"]))
        return dict(json.loads(path.read_text()))


def answered(
    benchmark: ModuleType, command: Sequence[str], count: int
) -> dict[str, float]:
    """Run `vllm bench serve` to its end and return what it finds.

    Raises:
        RuntimeError: Not all of `count` requests are answered.
    """
    result = dict(benchmark.main(parsed(benchmark, command)))
    if result["completed"] != count:
        raise RuntimeError(f"{result['completed']} of {count} requests were answered")
    return result
