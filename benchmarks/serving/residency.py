# SPDX-License-Identifier: Apache-2.0
"""KV tokens that sequences hold over time, from the block manager's own entries.

RoCo's trace tells what every scheduled request holds in every step. Memory is the same
for both sides: what three full sequences need.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
from vllm.benchmarks import throughput
from vllm.v1.kv_cache_interface import FullAttentionSpec

from benchmarks import rows
from benchmarks.rows import Table
from benchmarks.serving.counters import Counters
from benchmarks.serving.engines import Engine, Requests
from benchmarks.serving.jobs import Job
from benchmarks.serving.vllm_bench import call, throughput_command
from benchmarks.specs import BLOCK_SIZE, layer_specs, shape_of
from vllm_roco.config import RocoConfig
from vllm_roco.kv_cache.spec import RocoSpec

REQUESTS = Requests(count=8, input_len=512, output_len=512)
CONFIG = RocoConfig(budget=256, stride=64, chunk=128)
FULL_SEQUENCES = 3

TABLE = Table(
    "memory",
    key=(
        *("model", "kv_cache_bytes", "backend"),
        *("policy", "budget", "stride", "chunk"),
        *("num_requests", "input_len", "output_len"),
    ),
    results=(
        *("max_running", "preemptions"),
        *("peak_sequence_tokens", "bound_tokens"),
    ),
)
STEPS = "memory_steps.csv"


def jobs(model: str, baseline: str, common: Sequence[str], out: Path) -> list[Job]:
    """Return both sides; what RoCo held in every step goes to `memory_steps.csv`."""
    stock = Engine(
        model=model,
        batches=(REQUESTS,),
        stock=baseline,
        gpu_memory_utilization=0.5,
        kv_cache_bytes=kv_cache_bytes(model),
    )
    return [
        [
            (
                {**engine.columns, **REQUESTS.columns},
                partial(measure, engine, common, out / STEPS),
            )
        ]
        for engine in (stock, replace(stock, roco=CONFIG))
    ]


def specs(model: str) -> tuple[int, FullAttentionSpec, RocoSpec]:
    """Return a model's layers, and what each is planned with on both sides."""
    shape = shape_of(model)
    return (shape.num_hidden_layers, *layer_specs(shape, CONFIG))


def kv_cache_bytes(model: str) -> int:
    """Return the KV memory of three full sequences and of vLLM's null block."""
    layers, full, _ = specs(model)
    tokens = REQUESTS.input_len + REQUESTS.output_len
    blocks = FULL_SEQUENCES * tokens // BLOCK_SIZE + 1
    return int(blocks * layers * full.page_size_bytes)


def bound_tokens(model: str) -> int:
    """Return the most tokens that RoCo's options let a sequence hold."""
    _, _, roco = specs(model)
    return roco.max_blocks_per_sequence * BLOCK_SIZE


def statistics_share(model: str) -> float:
    """Return the part of a page that is not K and V."""
    _, full, roco = specs(model)
    return float(1 - full.page_size_bytes / roco.page_size_bytes)


def measure(engine: Engine, common: Sequence[str], steps: Path) -> dict[str, object]:
    """Serve the requests; return the columns that this fills.

    Args:
        engine: Either side.
        common: What both engines are told.
        steps: File for what RoCo held in every step; replaced.
    """
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.jsonl"
        if engine.roco is not None:
            engine = replace(engine, roco=replace(engine.roco, trace=str(trace)))
        command = [*engine.command(common), "--dtype=bfloat16", "--async-scheduling"]
        with Counters(num_warmups=0) as counters:
            call(throughput, [*command, *throughput_command(REQUESTS)])
        result: dict[str, object] = {
            "max_running": counters.max_running,
            "preemptions": counters.preemptions,
        }
        if engine.roco is not None:
            held = by_step(trace)
            rows.write(steps, held)
            result["peak_sequence_tokens"] = int(held["largest_tokens"].max())
            result["bound_tokens"] = bound_tokens(engine.model)
    return result


def by_step(trace: Path) -> pd.DataFrame:
    """Return what was held in each step of a trace, in tokens.

    Args:
        trace: The file that the option `trace` names.
    """
    lines = pd.read_json(trace, lines=True, dtype={"request": str})
    lines["held_tokens"] = BLOCK_SIZE * lines["held_blocks"]
    steps = lines.groupby("step")["held_tokens"]
    found = pd.DataFrame(
        {
            "running": steps.size(),
            "held_tokens": steps.sum(),
            "largest_tokens": steps.max(),
        }
    )
    first = lines[lines["request"] == lines["request"].iloc[0]].set_index("step")
    first = first[["computed_tokens", "held_tokens"]].add_prefix("first_")
    return found.join(first.astype("Int64")).reset_index()
