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
from benchmarks.serving.jobs import Job
from benchmarks.serving.vllm_bench import (
    Options,
    call,
    engine_command,
    latency_command,
)
from benchmarks.serving.workloads import Requests
from vllm_roco.config import NAMESPACE, RocoConfig

MODEL = "llama-3.1-8b"
CHUNKS = (256, 512, 1024, 2048, 4096)
ITERATIONS = 12
SHORT, LONG = Requests(8, 2048, 1), Requests(1, 16384, 1)
OPTIONS = ("policy", "budget", "stride", "chunk")
TABLE = Table(
    "prefill",
    key=("model", "batch", "input_len", "backend", *OPTIONS, "round"),
    # median, and the 20 % and 80 % quantiles
    results=("iterations", "ttft_ms", "ttft_low_ms", "ttft_high_ms"),
)


@dataclass(frozen=True)
class Case:
    """One engine and the batch whose first tokens it gives.

    Attributes:
        requests: The batch, one token to write.
        policy: RoCo's policy, None for FLASH_ATTN.
        budget: Tokens kept per sequence.
        chunk: Prompt tokens per step of RoCo; None: its default.
    """

    requests: Requests
    policy: str | None = None
    budget: int = RocoConfig.budget
    chunk: int | None = None

    @property
    def backend(self) -> str:
        """vLLM's name of the attention backend."""
        return "FLASH_ATTN" if self.policy is None else "ROCO"

    @property
    def roco_options(self) -> dict[str, object]:
        """The options of `additional_config["roco"]`, empty without RoCo."""
        if self.policy is None:
            return {}
        options = {"policy": self.policy, "budget": self.budget, "chunk": self.chunk}
        config = RocoConfig.from_additional_config({NAMESPACE: options})
        return {key: getattr(config, key) for key in OPTIONS}

    def columns(self, number: int) -> dict[str, object]:
        """Return the columns of `prefill.csv` that tell this case from others."""
        options = self.roco_options
        return {
            "model": MODEL,
            "batch": self.requests.count,
            "input_len": self.requests.input_len,
            "backend": self.backend,
            **{key: options.get(key) for key in OPTIONS},
            "round": number,
        }


def cases(chunks: Sequence[int], policies: Sequence[str] = ("roco",)) -> list[Case]:
    """Return stock vLLM's, then prompts below the budget, then one far above it."""
    return [
        Case(SHORT),
        Case(LONG),
        *(Case(SHORT, policy=policy, budget=4096) for policy in policies),
        *(
            Case(LONG, policy=policy, chunk=chunk)
            for chunk in chunks
            for policy in policies
        ),
    ]


def measure(case: Case, options: Options) -> dict[str, object]:
    """Read the case's prompts some times."""
    engine = engine_command(
        model=MODEL,
        batches=[SHORT, LONG],
        backend=case.backend,
        kv_cache_dtype="auto",
        roco_options=case.roco_options,
        gpu_memory_utilization=0.9,
        kv_cache_bytes=None,
        options=options,
    )
    result = call(latency, [*engine, *latency_command(case.requests, ITERATIONS)])
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
    return [
        [(case.columns(number), partial(measure, case, options)) for case in group]
        for number in range(1, rounds + 1)
        for _, group in groupby(
            cases(chunks, policies), key=lambda case: case.roco_options
        )
    ]
