# SPDX-License-Identifier: Apache-2.0
"""Soaks an engine: thousands of requests of every kind, and a look after each step.

    python -m tests.soak                        # 10,000 over HTTP
    python -m tests.soak --requests 600
    python -m tests.soak --in-process           # without a server; on a GPU, too

Exits with 1 if anything was wrong, and prints what.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

import tests.soak.environment  # noqa: F401 -- before vLLM
from tests.soak.engines import Host, soak_in_process
from tests.soak.run import Plan, Report
from tests.soak.setups import SERVER


def main() -> int:
    """Run a soak as the command line says; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=__doc__.partition("\n")[0]
    )
    add = parser.add_argument
    add("--requests", type=int, default=10_000, help="of the crowd (%(default)s)")
    add("--canaries", type=int, help="whose answers are compared (50 at most)")
    add("--seed", type=int, default=0, help="of the crowd (%(default)s)")
    add("--in-process", action="store_true", help="without a server")
    add("--model", type=Path, help="a Hugging Face folder (a small and random model)")
    add("--tokenizer", type=Path, help="a folder with the random model's own")
    add("--windows", action="store_true", help="in every other layer of that model")
    add("--adapter", action="store_true", help="requests of a LoRA adapter, too")
    add("--sleep-mode", action="store_true", help="vLLM's; on a GPU, in process")
    add("--dtype", default="float32", help="of the model (%(default)s)")
    add("--tensor-parallel-size", type=int, default=1, help="ranks, on CPUs")
    add("--pipeline-parallel-size", type=int, default=1, help="stages, likewise")
    add("--no-agree", action="store_true", help="each tensor rank chooses by itself")
    add("--max-num-seqs", type=int, help="requests in a step (CPU: 16, GPU: 128)")
    add("--num-blocks", type=int, help="of the cache (4 for each of these)")
    add("--concurrency", type=int, help="requests at once (3 for each of these)")
    add("--time-limit", type=float, help="seconds after which no more are sent")
    add("--report", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    exact = arguments.dtype == "float32"
    number = arguments.canaries
    if number is None:
        number = max(1, min(50, arguments.requests // 60))
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        host = Host(
            folder=Path(folder),
            model=arguments.model,
            tokenizer=arguments.tokenizer,
            windows=arguments.windows,
            adapter=arguments.adapter,
            sleep_mode=arguments.sleep_mode,
            dtype=arguments.dtype,
            max_num_seqs=arguments.max_num_seqs,
            num_blocks=arguments.num_blocks,
            tensor=arguments.tensor_parallel_size,
            pipeline=arguments.pipeline_parallel_size,
            agree=not arguments.no_agree,
        )
        plan = Plan(
            num_requests=arguments.requests,
            num_canaries=number,
            seed=arguments.seed,
            concurrency=arguments.concurrency or 3 * host.seqs,
            time_limit=arguments.time_limit,
            exact=exact,
            server=SERVER,
        )
        soak = soak_in_process
        if not arguments.in_process:
            # what it needs may be missing where there is no server
            from tests.soak.server import soak_server as soak
        report = asyncio.run(soak(host, plan, lambda line: print(line, flush=True)))
    if arguments.report:
        report.save(arguments.report)
    return conclude(report)


def conclude(report: Report) -> int:
    """Print what was seen; return the exit status."""
    print(report.table())
    for fault in report.faults:
        print(f"FAULT {fault}")
    return 1 if report.num_faults else 0


if __name__ == "__main__":
    sys.exit(main())
