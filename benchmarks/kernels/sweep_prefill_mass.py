# SPDX-License-Identifier: Apache-2.0
"""Finds the layout of the prompt kernel, and what it costs beside FlashAttention 3.

    python -m benchmarks.kernels.sweep_prefill_mass --out DIR [--time-limit 240]

Needs one GPU with FlashAttention 3. Writes `prefill_mass_sweep.json`: microseconds of
attention, and of the masses by every plan and by the one that would be served, over the
same pages. That the kernel is right on this machine is what
`tests/ops/test_prefill_mass.py` tells.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from functools import partial
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from benchmarks.kernels.measuring import command, median_of, within
from benchmarks.kernels.workload import DTYPE, HEADS, Shape, Workload, allocate_pool
from benchmarks.machine import environment
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


MILLISECONDS = 15
"""Length of a measurement."""


def main() -> None:
    """Run the command line."""
    arguments = command(__doc__, time_limit=240).parse_args()
    pool = allocate_pool(SHAPES)
    swept: list[dict[str, object]] = []
    for shape in within(arguments.time_limit, SHAPES):
        workload = Workload(shape, pool)
        calls = workload.flash(block_size=BLOCK_SIZE, token_major=False, max_splits=0)
        flash = median_of(calls, MILLISECONDS)
        plans: list[dict[str, Any]] = []
        for plan in filter(partial(_has_room, shape), PLANS):
            entry = dataclasses.asdict(plan)
            try:
                entry["us"] = median_of(workload.prefill_mass(plan), MILLISECONDS)
            except OutOfResources as error:
                entry["failed"] = str(error)
            plans.append(entry)
        plans.sort(key=lambda entry: entry.get("us", math.inf))
        served = _served(shape)
        served_us = median_of(workload.prefill_mass(served), MILLISECONDS)
        swept.append(
            {
                "shape": dataclasses.asdict(shape),
                "flash_us": flash,
                "served": {**dataclasses.asdict(served), "us": served_us},
                "plans": plans,
            }
        )
        served_of = f"{served_us} with {served.splits} splits"
        print(f"{shape}: flash {flash} masses {served_of}, {plans[:3]}", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "prefill_mass_sweep.json").write_text(
        json.dumps({"environment": environment(), "shapes": swept}, indent=1)
    )


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
