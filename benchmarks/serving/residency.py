# SPDX-License-Identifier: Apache-2.0
"""KV tokens that sequences hold over time, from the block manager's own entries.

RoCo's trace tells what every scheduled request holds in every step. Memory is the same
for both sides: what three full sequences need.
"""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from vllm.benchmarks import throughput

from benchmarks.serving.counters import Counters
from benchmarks.serving.session import Plan
from benchmarks.serving.vllm_bench import (
    Options,
    call,
    engine_command,
    throughput_command,
)
from benchmarks.serving.workloads import MODELS, Requests
from vllm_roco.config import RocoConfig
from vllm_roco.eviction_schedule import EvictionSchedule
from vllm_roco.kv_cache.page import statistics_bytes

REQUESTS = Requests(count=8, input_len=512, output_len=512)
CONFIG = RocoConfig(budget=256, stride=64, chunk=128)
BLOCK_SIZE = 16
FULL_SEQUENCES = 3
STEPS_IN_FLIGHT = 2
"""Of asynchronous scheduling."""
ITEM_BYTES = 2

KEY = (
    "model",
    "kv_cache_bytes",
    "backend",
    *("policy", "budget", "stride", "chunk"),
    *("num_requests", "input_len", "output_len"),
)
RESULTS = (
    "max_running",
    "preemptions",
    "peak_sequence_tokens",
    "bound_tokens",
    "statistics_share",
)
STEP_COLUMNS = (
    "step",
    "running",
    "held_tokens",
    "largest_tokens",
    "first_computed_tokens",
    "first_held_tokens",
)


@dataclass(frozen=True)
class Page:
    """Bytes of one block over all layers of a model of 16-bit numbers."""

    content: int
    statistics: int

    @classmethod
    def of(cls, model: str) -> Page:
        """Work it out from the model's configuration."""
        config = json.loads((MODELS / model / "config.json").read_text())
        heads = config["num_attention_heads"]
        head_size = config.get("head_dim") or config["hidden_size"] // heads
        kv_heads, layers = config["num_key_value_heads"], config["num_hidden_layers"]
        return cls(
            content=layers * kv_heads * BLOCK_SIZE * 2 * head_size * ITEM_BYTES,
            statistics=layers * statistics_bytes(kv_heads),
        )

    @property
    def statistics_share(self) -> float:
        """Part of a RoCo page that is not K and V."""
        return self.statistics / (self.content + self.statistics)


def plan(model: str, baseline: str, options: Options, out: Path) -> Plan:
    """Return both sides; what RoCo held in every step goes to `memory_steps.csv`."""
    steps = out / "memory_steps.csv"
    return Plan(
        name="memory",
        key=KEY,
        results=RESULTS,
        engines=[
            [
                (
                    columns(model, roco=roco),
                    partial(measure, model, baseline, options, steps, roco=roco),
                )
            ]
            for roco in (False, True)
        ],
    )


def columns(model: str, *, roco: bool) -> dict[str, object]:
    """Return the columns of `memory.csv` that tell a side from the other."""
    options = vars(CONFIG) if roco else {}
    return {
        "model": model,
        "kv_cache_bytes": kv_cache_bytes(model),
        "backend": "ROCO" if roco else "stock",
        **{key: options.get(key, "") for key in ("policy", "budget", "stride")},
        "chunk": options.get("chunk", ""),
        "num_requests": REQUESTS.count,
        "input_len": REQUESTS.input_len,
        "output_len": REQUESTS.output_len,
    }


def kv_cache_bytes(model: str) -> int:
    """Return the KV memory of three full sequences and of vLLM's null block."""
    tokens = REQUESTS.input_len + REQUESTS.output_len
    return (FULL_SEQUENCES * tokens // BLOCK_SIZE + 1) * Page.of(model).content


def measure(
    model: str, baseline: str, options: Options, steps: Path, *, roco: bool
) -> dict[str, object]:
    """Serve the requests; return the columns that this fills.

    Args:
        model: Folder of `benchmarks/models`.
        baseline: The attention backend of stock vLLM.
        options: What is the same for both engines.
        steps: File for what RoCo held in every step; replaced.
        roco: Which side to measure.
    """
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.jsonl"
        config = {key: getattr(CONFIG, key) for key in ("budget", "stride", "chunk")}
        engine = engine_command(
            model=model,
            batches=[REQUESTS],
            backend="ROCO" if roco else baseline,
            kv_cache_dtype="auto",
            roco_options={**config, "trace": str(trace)} if roco else {},
            gpu_memory_utilization=0.5,
            kv_cache_bytes=kv_cache_bytes(model),
            options=options,
        )
        engine += ["--dtype=bfloat16", "--async-scheduling"]
        with Counters(num_warmups=0) as counters:
            call(throughput, [*engine, *throughput_command(REQUESTS)])
        result: dict[str, object] = {
            "max_running": counters.max_running,
            "preemptions": counters.preemptions,
        }
        if roco:
            rows = by_step(trace)
            with steps.open("w", newline="") as file:
                writer = csv.DictWriter(file, STEP_COLUMNS)
                writer.writeheader()
                writer.writerows(rows)
            result["peak_sequence_tokens"] = max(row["largest_tokens"] for row in rows)
            schedule = EvictionSchedule(
                block_size=BLOCK_SIZE, budget=CONFIG.budget, stride=CONFIG.stride
            )
            in_flight = STEPS_IN_FLIGHT * CONFIG.chunk
            result["bound_tokens"] = schedule.max_blocks(in_flight) * BLOCK_SIZE
            result["statistics_share"] = round(Page.of(model).statistics_share, 5)
    return result


def by_step(trace: Path) -> list[dict[str, int]]:
    """Return what was held in each step of a trace, in tokens.

    Args:
        trace: The file that the option `trace` names.
    """
    steps: dict[int, list[Mapping[str, object]]] = defaultdict(list)
    for line in trace.read_text().splitlines():
        record = json.loads(line)
        steps[record["step"]].append(record)
    first = next(iter(steps.values()))[0]["request"]
    rows = []
    for step, records in steps.items():
        held = {
            str(record["request"]): BLOCK_SIZE * int(str(record["held_blocks"]))
            for record in records
        }
        computed = {str(r["request"]): int(str(r["computed_tokens"])) for r in records}
        row = {
            "step": step,
            "running": len(records),
            "held_tokens": sum(held.values()),
            "largest_tokens": max(held.values()),
        }
        if first in held:
            row["first_computed_tokens"] = computed[str(first)]
            row["first_held_tokens"] = held[str(first)]
        rows.append(row)
    return rows
