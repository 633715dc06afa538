# SPDX-License-Identifier: Apache-2.0
"""Run jobs in processes of their own, several at once, until a moment is reached."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

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


class Failed(Exception):
    """A job ended with an error; says where to read of it."""


class _Queue:
    """Jobs that several threads take from; oracles only as many as fit.

    A third of the threads asks for an oracle first: it keeps a GPU busy while engines
    of vLLM start, which is work for CPUs.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._lock = threading.Lock()
        self._engines = deque(job for job in jobs if not _is_oracle(job))
        self._oracles = deque(job for job in jobs if _is_oracle(job))
        self._running_oracles = 0

    def take(self, *, oracle_first: bool) -> Job | None:
        """Return the next job; None when there is none left for this thread."""
        with self._lock:
            may_oracle = self._oracles and self._running_oracles < MOST_ORACLES
            if may_oracle and (oracle_first or not self._engines):
                self._running_oracles += 1
                return self._oracles.popleft()
            return self._engines.popleft() if self._engines else None

    def give_back(self, job: Job) -> None:
        """Say that a job has ended."""
        with self._lock:
            self._running_oracles -= _is_oracle(job)


def run(
    jobs: Sequence[Job], workplace: Workplace, *, parallel: int, until: float
) -> Iterator[list[Failed]]:
    """Run jobs, and yield about once a second: the failures since.

    Args:
        jobs: The first ones start first.
        workplace: What they have in common.
        parallel: Most jobs at once.
        until: `time.monotonic()` at which what still runs is ended.
    """
    workplace.logs.mkdir(parents=True, exist_ok=True)
    jobs_left = _Queue(jobs)
    failures: SimpleQueue[Failed] = SimpleQueue()

    def work(oracle_first: bool) -> None:
        while job := jobs_left.take(oracle_first=oracle_first):
            try:
                _run_one(job, workplace, until)
            except Failed as failure:
                failures.put(failure)
            finally:
                jobs_left.give_back(job)

    with ThreadPoolExecutor(parallel) as pool:
        running = {pool.submit(work, i < parallel // 3) for i in range(parallel)}
        while running:
            done, running = wait(running, timeout=_POLL_SECONDS)
            yield [failures.get() for _ in range(failures.qsize())]
            for future in done:
                future.result()


def _is_oracle(job: Job) -> bool:
    return job.cells[0].setup.engine == "oracle"


def _run_one(job: Job, workplace: Workplace, until: float) -> None:
    remaining = until - time.monotonic()
    if remaining <= 0:
        return
    cell = job.cells[0]
    setup = cell.setup
    name = "-".join(
        str(part).replace("/", "-")
        for part in (
            *(setup.method, setup.budget, setup.stride, setup.chunk),
            *(cell.task, cell.context),
        )
    )
    description = workplace.logs / f"{name}.json"
    description.write_text(
        json.dumps(
            {
                "cells": [cell.to_json() for cell in job.cells],
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
            return
    if status:
        raise Failed(f"{' '.join(command[1:])} ended with status {status}: see {log}")
