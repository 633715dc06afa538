# SPDX-License-Identifier: Apache-2.0
"""Run jobs in processes of their own, several at once, until a moment is reached."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.cells import Job

MOST_ORACLES = 3
"""At once: each may take 12 GiB of a GPU's memory."""

_POLL_SECONDS = 1.0
_ROOT = Path(__file__).parents[2]
# several engines on one machine: none may bind cores, or ask a network for anything
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    # one process each: a second one takes as long to start as a cell to run
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}


@dataclass(frozen=True)
class Workplace:
    """What all jobs of a run have in common.

    Attributes:
        model: Hugging Face folder.
        commit: Of the code.
        results: File that workers append to.
        logs: Folder for jobs and what they print.
    """

    model: str
    commit: str
    results: Path
    logs: Path


def run(
    jobs: Sequence[Job], workplace: Workplace, *, parallel: int, until: float
) -> Iterator[list[str]]:
    """Run jobs, and yield about once a second: which have failed since, and where.

    A third of the processes is for oracles, which keep a GPU busy while engines of vLLM
    start, which is work for CPUs.

    Args:
        jobs: The first ones start first.
        workplace: What they have in common.
        parallel: Most jobs at once.
        until: `time.monotonic()` at which what still runs is ended.
    """
    workplace.logs.mkdir(parents=True, exist_ok=True)
    oracles = [job for job in jobs if job[0].setup.engine == "oracle"]
    engines = [job for job in jobs if job not in oracles]
    beside = min(MOST_ORACLES, len(oracles), parallel // 3 if engines else parallel)
    with (
        ThreadPoolExecutor(max(1, parallel - beside)) as pool,
        ThreadPoolExecutor(beside) if beside else contextlib.nullcontext(pool) as other,
    ):
        running = {
            chosen.submit(_run_one, job, workplace, until)
            for chosen, waiting in ((pool, engines), (other, oracles))
            for job in waiting
        }
        while running:
            done, running = wait(running, timeout=_POLL_SECONDS)
            yield [failure for each in done if (failure := each.result())]


def _run_one(job: Job, workplace: Workplace, until: float) -> str | None:
    """Return what failed, and where to read of it."""
    remaining = until - time.monotonic()
    if remaining <= 0:
        return None
    cell, setup = job[0], job[0].setup
    parts = (setup.method, setup.budget, setup.stride, setup.chunk)
    name = "-".join(map(str, (*parts, cell.task, cell.context))).replace("/", "-")
    description = workplace.logs / f"{name}.json"
    description.write_text(
        json.dumps(
            {
                "cells": [cell.to_json() for cell in job],
                "model": workplace.model,
                "commit": workplace.commit,
                "results": str(workplace.results),
            }
        )
    )
    log = workplace.logs / f"{name}.log"
    command = [sys.executable, "-m", "benchmarks.quality.worker", str(description)]
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=_ROOT,
            env=_ENVIRONMENT | dict(os.environ),
            stdout=output,
            stderr=subprocess.STDOUT,
            # so that what the engine started ends with it
            start_new_session=True,
        )
        try:
            status = process.wait(remaining)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None
    if status:
        return f"{' '.join(command[1:])} ended with status {status}: see {log}"
    return None
