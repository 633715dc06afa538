# SPDX-License-Identifier: Apache-2.0
"""Finds the tile of the prompt kernel, and what it costs beside FlashAttention 3.

    python -m benchmarks.kernels.sweep_prefill_mass --out DIR [--time-limit 240]

Needs one GPU with FlashAttention 3. Writes `prefill_mass_sweep.json`: microseconds of
attention, and of the masses by every plan, over the same pages. That the kernel is
right on this machine is what `tests/ops/test_prefill_mass.py` tells.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from typing import Any

from triton.runtime.errors import OutOfResources

from benchmarks.kernels.measuring import command, median_of, within
from benchmarks.kernels.workload import HEADS, Shape, Workload, allocate_pool
from benchmarks.machine import environment
from vllm_roco.ops.prefill_mass import PrefillPlan

# sequences, queries of each, tokens attended over
WORK = [(8, 2048, 2048), (1, 1024, 3328), (8, 1024, 3328), (1, 2048, 4352)]
SHAPES = [
    Shape(batch, context, *heads, query_len=query_len)
    for heads in HEADS
    for batch, query_len, context in WORK
]
PLANS = [
    PrefillPlan(rows=rows, columns=columns, num_warps=warps, num_stages=stages)
    for rows, columns, warps, stages in itertools.product(
        (64, 128), (64, 128), (4, 8), (2, 3)
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
        calls = workload.flash(block_size=16, token_major=False, max_splits=0)
        flash = median_of(calls, MILLISECONDS)
        plans: list[dict[str, Any]] = []
        for plan in PLANS:
            entry = dataclasses.asdict(plan)
            try:
                entry["us"] = median_of(workload.prefill_mass(plan), MILLISECONDS)
            except OutOfResources as error:
                entry["failed"] = str(error)
            plans.append(entry)
        plans.sort(key=lambda entry: entry.get("us", math.inf))
        swept.append(
            {"shape": dataclasses.asdict(shape), "flash_us": flash, "plans": plans}
        )
        print(f"{shape}: flash {flash} masses {plans[:3]}", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "prefill_mass_sweep.json").write_text(
        json.dumps({"environment": environment(), "shapes": swept}, indent=1)
    )


if __name__ == "__main__":
    main()
