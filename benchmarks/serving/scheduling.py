# SPDX-License-Identifier: Apache-2.0
r"""What a budget costs the scheduler, whose Python runs between any two steps.

vLLM's own scheduler and block manager, without an engine: requests decode, two steps in
flight. In some cases prompts wait for room in a step or for memory. No GPU takes part.
Times are the processor's for this thread: what else the machine does counts for little.
On the Python files of a release that is not installed (`tools/releases.py`)::

    mkdir other && ln -s .venv/releases/0.33.0/vllm other/
    PYTHONPATH=other VLLM_CACHE_ROOT=other/cache \
        python -m benchmarks.serving scheduler --out DIR
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from benchmarks.kernels.measuring import Timing
from benchmarks.rows import Table
from benchmarks.serving.engines import MODELS
from benchmarks.serving.jobs import Job
from benchmarks.serving.workloads import WORKLOADS
from benchmarks.specs import BLOCK_SIZE, STEPS_IN_FLIGHT, layer_specs, shape_of
from vllm_roco.scheduler import RocoAsyncScheduler

WORKLOAD = WORKLOADS["r-kv-stress"]


@dataclass(frozen=True)
class Case:
    """Requests that a step has to do with.

    Attributes:
        running: Requests that decode.
        waiting: Prompts behind them, for which there is a place.
        short_of: What the first of these waits for, and all others behind it:
            `tokens`, a chunk's room in a step beside a prompt that is being read, or
            `blocks`, memory for itself beside what the running ones will yet take.
    """

    running: int
    waiting: int = 0
    short_of: str = ""

    @property
    def max_num_batched_tokens(self) -> int:
        """A step's tokens: beside all decodes one chunk and a half, or many."""
        chunk = WORKLOAD.config({}).chunk
        return self.running + 3 * chunk // 2 if self.waiting else 16384


CASES = (
    Case(running=256),
    Case(running=1000, waiting=5000, short_of="tokens"),
    Case(running=1000, waiting=5000, short_of="blocks"),
)
LONG_PROMPT = 1 << 19
"""Of the first two that wait: more than there is to read in all steps."""
DECODE_STEPS = 150
"""More than a stride."""
ROUNDS = 2
"""Schedulers of each side, whose steps take turns: a drift meets both alike."""
TABLE = Table(
    "scheduler",
    key=("cpu", "side", "running", "waiting", "short_of", "budget", "stride"),
    results=(
        *("schedule_us", "schedule_low", "schedule_high", "schedule_mean"),
        *("update_us", "update_low", "update_high", "update_mean"),
    ),
)


def jobs() -> list[Job]:
    """Return both sides of every case."""
    return [
        [(columns(case, roco=roco), partial(measure, case, roco=roco))]
        for case in CASES
        for roco in (False, True)
    ]


def processor() -> str:
    """Return the name of this machine's processor, as Linux tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown"


def columns(case: Case, *, roco: bool) -> dict[str, object]:
    """Return the columns of `scheduler.csv` that tell a side from the other."""
    return {
        "cpu": processor(),
        "side": "roco" if roco else "stock",
        "running": case.running,
        **{"waiting": case.waiting, "short_of": case.short_of},
        "budget": WORKLOAD.budget if roco else None,
        "stride": WORKLOAD.stride if roco else None,
    }


def scheduler(
    case: Case = CASES[0], *, roco: bool, kind: type[AsyncScheduler] | None = None
) -> AsyncScheduler:
    """Return a scheduler with blocks for every request that runs, in full.

    Args:
        case: How many requests there are.
        roco: Whether for RoCo's blocks, not vLLM's own.
        kind: Instead of the class that serves them.
    """
    requests = WORKLOAD.batches[0]
    config = WORKLOAD.config({})
    sizes = {key: getattr(config, key) for key in ("budget", "stride", "chunk")}
    backend: dict[str, Any] = {}
    if roco:
        backend = {"attention_backend": "roco", "additional_config": {"roco": sizes}}
    longest = LONG_PROMPT if case.waiting else requests.max_model_len
    vllm_config = EngineArgs(
        model=str(MODELS / WORKLOAD.model),
        hf_overrides={"max_position_embeddings": LONG_PROMPT},
        skip_tokenizer_init=True,
        max_model_len=longest,
        max_num_seqs=case.running + 2 * bool(case.waiting),
        max_num_batched_tokens=case.max_num_batched_tokens,
        enable_prefix_caching=False,
        async_scheduling=True,
        **backend,
    ).create_engine_config()
    blocks = 1 + case.running * (requests.max_model_len // BLOCK_SIZE)
    blocks += bool(case.waiting) * 2 * (LONG_PROMPT // BLOCK_SIZE)
    vllm_config.cache_config.block_size = BLOCK_SIZE
    vllm_config.cache_config.num_gpu_blocks = blocks
    spec = layer_specs(shape_of(WORKLOAD.model), config)[roco]
    # no worker allocates anything
    plan = KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layers.0.attn"], spec)])
    kind = kind or (RocoAsyncScheduler if roco else AsyncScheduler)
    return kind(
        vllm_config, plan, StructuredOutputManager(vllm_config), block_size=BLOCK_SIZE
    )


def answer(scheduler: AsyncScheduler, output: SchedulerOutput) -> ModelRunnerOutput:
    """Return what a worker answers: a token for every prompt read to its end."""
    ids = list(output.num_scheduled_tokens)
    requests = [scheduler.requests[request_id] for request_id in ids]
    return ModelRunnerOutput(
        req_ids=ids,
        req_id_to_index={request_id: index for index, request_id in enumerate(ids)},
        sampled_token_ids=[
            [1] if request.num_computed_tokens >= request.num_prompt_tokens else []
            for request in requests
        ],
    )


def samples(case: Case, *, roco: bool) -> Iterator[tuple[float, float]]:
    """Yield the microseconds of both calls in steps that decode every request."""
    core = scheduler(case, roco=roco)
    requests = WORKLOAD.batches[0]
    in_flight: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = deque()

    def step() -> tuple[float, float]:
        """Schedule a step, process the oldest, and return what both took."""
        start = time.thread_time()
        output = core.schedule()
        scheduled = time.thread_time() - start
        in_flight.append((output, answer(core, output)))
        updated = 0.0
        if len(in_flight) == STEPS_IN_FLIGHT:
            oldest, result = in_flight.popleft()
            start = time.thread_time()
            core.update_from_output(oldest, result)
            updated = time.thread_time() - start
        return 1e6 * scheduled, 1e6 * updated

    for index in range(case.running):
        core.add_request(_request(index, requests.input_len, requests.output_len))
    while not all(request.num_output_tokens for request in core.requests.values()):
        step()
    if case.short_of == "blocks":
        pool = core.kv_cache_manager.block_pool
        # what they take in all steps, or less than is foreseen for a stride
        spare = case.running * (DECODE_STEPS // BLOCK_SIZE + 2)
        if isinstance(core, RocoAsyncScheduler):
            spare = core.roco_managers[0].foreseen_blocks() * 2 // 3
        pool.get_new_blocks(pool.get_num_free_blocks() - spare)
    for index in range(case.waiting):
        # of the others nobody looks at more than the first
        input_len = LONG_PROMPT - 1 if index < 2 else requests.input_len
        core.add_request(_request(case.running + index, input_len, 1))
    # where it is steps that lack room, the first is being read from here on
    for _ in range(2):
        step()
    for _ in range(DECODE_STEPS):
        yield step()
    if len(core.waiting) != case.waiting - (case.short_of == "tokens"):
        raise RuntimeError(f"{case}: some did not wait. Count blocks and tokens anew.")
    core.shutdown()


def _request(index: int, input_len: int, output_len: int) -> Request:
    return Request(
        request_id=str(index),
        prompt_token_ids=[1] * input_len,
        sampling_params=SamplingParams(max_tokens=output_len),
        pooling_params=None,
    )


@cache
def both_sides(case: Case) -> tuple[dict[str, object], ...]:
    """Return the columns that are measured, without RoCo and with it, step by step."""
    steps = [
        both
        for _ in range(ROUNDS)
        for both in zip(
            samples(case, roco=False), samples(case, roco=True), strict=True
        )
    ]
    return tuple(map(_row, zip(*steps, strict=True)))


def measure(case: Case, *, roco: bool) -> dict[str, object]:
    """Return a side's columns of `scheduler.csv`; the first call measures both."""
    return both_sides(case)[roco]


def _row(steps: Sequence[tuple[float, float]]) -> dict[str, object]:
    row: dict[str, object] = {}
    for name, times in zip(
        ("schedule", "update"), zip(*steps, strict=True), strict=True
    ):
        row |= Timing.of(times).columns(name)
        row[f"{name}_mean"] = round(fmean(times), 1)
    return row
