# SPDX-License-Identifier: Apache-2.0
"""Finds the layout of the prompt kernel, and what it costs beside FlashAttention 3.

    python -m benchmarks.kernels.sweep_prefill_mass --out DIR [--time-limit 240]

Needs one GPU with FlashAttention 3. Appends to `prefill_mass.csv`, over the same pages:
microseconds of attention, and of the masses by every plan; `served` is the one that an
engine would take. That the kernel is right on this machine is what
`tests/ops/test_prefill_mass.py` tells.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from functools import partial

import torch
from triton.runtime.errors import OutOfResources

from benchmarks import rows
from benchmarks.kernels.measuring import command, median_of, within
from benchmarks.kernels.workload import DTYPE, HEADS, Shape, Workload, allocate_pool
from benchmarks.machine import environment
from benchmarks.rows import Row, Table
from vllm_roco.ops.device import Device
from vllm_roco.ops.prefill_plan import PrefillPlan, plan_prefill

# sequences, queries of each, tokens attended over
WORK = [(1, 1024, 3328), (2, 1024, 3328), (8, 1024, 3328), (8, 2048, 2048)]
RANKS = [(14, 2, 128), (7, 1, 128), (8, 1, 128)]
"""Heads of one of two and four tensor ranks of Qwen2.5-7B, of eight of Llama-3.1-70B.
"""
SHAPES = [
    Shape(batch, context, *heads, query_len=query_len)
    for heads in [*HEADS, *RANKS]
    for batch, query_len, context in WORK
]
BLOCK_SIZE = 16
PLANS = [
    PrefillPlan(
        rows=rows, columns=columns, num_warps=warps, num_stages=3, splits=splits
    )
    for (rows, columns, warps), splits in itertools.product(
        [(64, 64, 4), (64, 128, 4), (64, 128, 8), (128, 64, 8)], (1, 2, 3, 4, 6)
    )
]


_LAYOUT = ("rows", "columns", "num_warps", "num_stages", "splits")
TABLE = Table(
    "prefill_mass",
    key=[
        *("gpu", "vllm", "commit", "batch", "query_len", "context", "q_heads"),
        *("kv_heads", "head_size", "kernel", *_LAYOUT),
    ],
    results=["us", "served"],
)
MILLISECONDS = 15
"""Length of a measurement."""


def main() -> None:
    """Run the command line."""
    arguments = command(__doc__, time_limit=240).parse_args()
    facts = environment()
    machine = {key: facts[key] for key in ("gpu", "vllm", "commit")}
    pool = allocate_pool(SHAPES)
    for shape in within(arguments.time_limit, SHAPES):
        work = dataclasses.asdict(shape)
        del work["fp8"]
        place = {**machine, **work}
        if TABLE.has(arguments.out, {**place, "kernel": "flash"}):
            continue
        for row in measure(Workload(shape, pool), _served(shape)):
            TABLE.append(arguments.out, {**place, **row})
            print(f"{shape}: {row}", flush=True)
    rows.note(arguments.out, TABLE.name, facts)


def measure(workload: Workload, served: PrefillPlan) -> Iterator[Row]:
    """Yield the rows of a shape, FlashAttention 3's last.

    Args:
        workload: What is attended over and measured.
        served: The plan of an engine.
    """
    shape = workload.shape
    plans = filter(partial(_has_room, shape), dict.fromkeys([*PLANS, _bare(served)]))
    for plan in plans:
        try:
            us = median_of(workload.prefill_mass(plan), MILLISECONDS)
        except OutOfResources as error:
            print(f"{shape}: {plan} {error}", flush=True)
            continue
        row = {name: getattr(plan, name) for name in _LAYOUT}
        is_served = "yes" if plan == _bare(served) else "no"
        yield {"kernel": "roco", **row, "us": us, "served": is_served}
    calls = workload.flash(block_size=BLOCK_SIZE, token_major=False, max_splits=0)
    yield {"kernel": "flash", "us": median_of(calls, MILLISECONDS)}


def _bare(plan: PrefillPlan) -> PrefillPlan:
    """Return a plan without what it was chosen by, as those of `PLANS` are."""
    return dataclasses.replace(plan, programs=1)


def _has_room(shape: Shape, plan: PrefillPlan) -> bool:
    """Whether the programs of a run have room for what they tell each other."""
    runs = plan.runs(shape.context, BLOCK_SIZE)
    most = plan.most_splits(shape.batch * shape.kv_heads * runs, BLOCK_SIZE)
    return plan.splits <= most


def _served(shape: Shape) -> PrefillPlan:
    """Return the plan of an engine for a step of such prompts."""
    plan = plan_prefill(
        head_size=shape.head_size,
        block_size=BLOCK_SIZE,
        dtype=DTYPE,
        device=Device.of(torch.device("cuda")),
    )
    return plan.for_step(
        num_rows=shape.batch,
        num_q_heads=shape.q_heads,
        num_kv_heads=shape.kv_heads,
        block_size=BLOCK_SIZE,
        max_query_len=shape.query_len,
        max_live_tokens=shape.context,
    )


if __name__ == "__main__":
    main()
