# SPDX-License-Identifier: Apache-2.0
"""Time to first token: what reading a prompt costs, and what the chunk does to it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby

from vllm.benchmarks import latency

from benchmarks.kernels.measuring import Timing
from benchmarks.rows import Table
from benchmarks.serving.engines import Engine, Requests
from benchmarks.serving.jobs import Job
from benchmarks.serving.vllm_bench import call, latency_command
from benchmarks.serving.workloads import Run
from vllm_roco.config import RocoConfig

MODEL = "llama-3.1-8b"
ITERATIONS = 12
SHORT, LONG = Requests(8, 2048, 1), Requests(1, 16384, 1)
TABLE = Table(
    "prefill",
    key=(
        *("model", "batch", "input_len", "backend"),
        *("policy", "shield", "budget", "stride", "chunk", "round"),
    ),
    # median, and the 20 % and 80 % quantiles
    results=("iterations", "ttft_ms", "ttft_low_ms", "ttft_high_ms"),
)


def runs(chunks: Sequence[int], number: int = 1) -> list[Run]:
    """Return stock vLLM's, then prompts below the budget, then one far above it.

    Args:
        chunks: Of the prompt far above the budget.
        number: Of the round.
    """

    def run(requests: Requests, roco: RocoConfig | None = None) -> Run:
        engine = Engine(model=MODEL, batches=(SHORT, LONG), roco=roco)
        return Run("prefill", requests, engine, number)

    return [
        run(SHORT),
        run(LONG),
        run(SHORT, RocoConfig(budget=4096)),
        *(run(LONG, RocoConfig(chunk=chunk)) for chunk in chunks),
    ]


def columns(run: Run) -> dict[str, object]:
    """Return the columns of `prefill.csv` that tell a run from others."""
    return {**run.columns, "batch": run.requests.count}


def measure(run: Run, common: Sequence[str]) -> dict[str, object]:
    """Read the run's prompts some times."""
    command = latency_command(run.requests, ITERATIONS)
    result = call(latency, [*run.engine.command(common), *command])
    timing = Timing.of([1e3 * seconds for seconds in result["latencies"]])
    return {
        "iterations": ITERATIONS,
        "ttft_ms": timing.median,
        "ttft_low_ms": timing.low,
        "ttft_high_ms": timing.high,
    }


def jobs(chunks: Sequence[int], rounds: int, common: Sequence[str]) -> list[Job]:
    """Return every run once a round: a drift of the clock meets all of them."""
    return [
        [(columns(run), partial(measure, run, common)) for run in group]
        for number in range(1, rounds + 1)
        for _, group in groupby(runs(chunks, number), key=lambda run: run.engine)
    ]
