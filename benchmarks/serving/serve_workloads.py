# SPDX-License-Identifier: Apache-2.0
"""Serves a workload's batches, each variant's by one engine; fills `serving.csv`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby

from vllm.benchmarks import latency, throughput

from benchmarks.rows import Table
from benchmarks.serving.counters import Counters
from benchmarks.serving.engines import Requests
from benchmarks.serving.jobs import Job
from benchmarks.serving.vllm_bench import (
    LATENCY_WARMUPS,
    call,
    latency_command,
    throughput_command,
)
from benchmarks.serving.workloads import WORKLOADS, Run

TABLE = Table(
    "serving",
    key=(
        *("workload", "round", "model", "gpu_memory_utilization", "kv_cache_bytes"),
        *("backend", "kv_cache_dtype", "policy", "shield", "ranks"),
        *("budget", "stride", "chunk", "num_requests", "input_len", "output_len"),
    ),
    results=("output_tok_s", "ttft_ms", "tpot_ms", "max_running", "preemptions"),
)
WARM_UP_REQUESTS = 4
WARM_UP_OUTPUT = 32
"""Tokens of a warm-up's requests, whose prompts are those of the batch."""


def jobs(runs: Sequence[Run], common: Sequence[str]) -> list[Job]:
    """Return the runs as measurements, those next to each other sharing an engine."""
    return [
        [(run.columns, partial(measure, run, common)) for run in group]
        for _, group in groupby(runs, key=lambda run: (run.number, run.engine))
    ]


def warm_up(requests: Requests) -> Requests:
    """Return what compiles kernels and fills caches before a batch is timed."""
    return Requests(
        count=min(requests.count, WARM_UP_REQUESTS),
        input_len=requests.input_len,
        output_len=min(requests.output_len, WARM_UP_OUTPUT),
    )


def measure(run: Run, common: Sequence[str]) -> dict[str, object]:
    """Serve a run's batch; return the columns of `serving.csv` that it fills."""
    requests, engine = run.requests, run.engine.command(common)
    if WORKLOADS[run.name].one_at_a_time:
        with Counters(LATENCY_WARMUPS * requests.count) as counters:
            result = call(latency, [*engine, *latency_command(requests)])
        seconds = result["percentiles"]["50"]
    else:
        # vLLM's own warm-up would write as much as what is timed
        call(throughput, [*engine, *throughput_command(warm_up(requests))])
        with Counters(num_warmups=0) as counters:
            result = call(throughput, [*engine, *throughput_command(requests)])
        seconds = result["elapsed_time"]
    return {
        "output_tok_s": round(requests.count * requests.output_len / seconds, 1),
        "ttft_ms": round(counters.ttft_ms, 2),
        "tpot_ms": round(counters.tpot_ms, 3),
        "max_running": counters.max_running,
        "preemptions": counters.preemptions,
    }
