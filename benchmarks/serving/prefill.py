# SPDX-License-Identifier: Apache-2.0
"""Time to first token: what reading a prompt costs, and what the chunk does to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

from vllm.benchmarks import latency

from benchmarks.kernels.measuring import Timing
from benchmarks.rows import Table
from benchmarks.serving.engines import Engine, Options, Requests
from benchmarks.serving.jobs import Job
from benchmarks.serving.vllm_bench import call, latency_command
from vllm_roco.config import RocoConfig

MODEL = "llama-3.1-8b"
CHUNKS = (256, 512, 1024, 2048, 4096)
ITERATIONS = 12
SHORT, LONG = Requests(8, 2048, 1), Requests(1, 16384, 1)
TABLE = Table(
    "prefill",
    key=(
        *("model", "batch", "input_len", "backend"),
        *("policy", "budget", "stride", "chunk", "round"),
    ),
    # median, and the 20 % and 80 % quantiles
    results=("iterations", "ttft_ms", "ttft_low_ms", "ttft_high_ms"),
)


@dataclass(frozen=True)
class Case:
    """A batch whose first tokens an engine gives, one token to write each."""

    requests: Requests
    engine: Engine

    def columns(self, number: int) -> dict[str, object]:
        """Return the columns of `prefill.csv` that tell this case from others."""
        batch = {"batch": self.requests.count, "input_len": self.requests.input_len}
        return {**self.engine.columns, **batch, "round": number}


def cases(chunks: Sequence[int], policies: Sequence[str] = ("roco",)) -> list[Case]:
    """Return stock vLLM's, then prompts below the budget, then one far above it."""

    def case(requests: Requests, roco: RocoConfig | None = None) -> Case:
        return Case(requests, Engine(model=MODEL, batches=(SHORT, LONG), roco=roco))

    return [
        case(SHORT),
        case(LONG),
        *(case(SHORT, RocoConfig(policy=policy, budget=4096)) for policy in policies),
        *(
            case(LONG, RocoConfig(policy=policy, chunk=chunk))
            for chunk in chunks
            for policy in policies
        ),
    ]


def measure(case: Case, options: Options) -> dict[str, object]:
    """Read the case's prompts some times."""
    command = latency_command(case.requests, ITERATIONS)
    result = call(latency, [*case.engine.command(options), *command])
    timing = Timing.of([1e3 * seconds for seconds in result["latencies"]])
    return {
        "iterations": ITERATIONS,
        "ttft_ms": timing.median,
        "ttft_low_ms": timing.low,
        "ttft_high_ms": timing.high,
    }


def jobs(
    chunks: Sequence[int], policies: Sequence[str], rounds: int, options: Options
) -> list[Job]:
    """Return every case once a round: a drift of the clock meets all of them."""
    every = cases(chunks, policies)
    return [
        [(case.columns(number), partial(measure, case, options)) for case in group]
        for number in range(1, rounds + 1)
        for _, group in groupby(every, key=lambda case: case.engine)
    ]
