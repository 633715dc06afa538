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

from triton.runtime.errors import OutOfResources

from benchmarks.kernels.measuring import Timing, captured, command, sample, within
from benchmarks.kernels.workload import HEADS, Call, Shape, Workload, allocate_pool
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


def timed(calls: list[Call]) -> float:
    return Timing.of(sample(captured(calls), len(calls), 15)).median


def main() -> None:
    """Run the command line."""
    arguments = command(__doc__, time_limit=240).parse_args()
    pool = allocate_pool(SHAPES)
    swept: list[dict[str, object]] = []
    for shape in within(arguments.time_limit, SHAPES):
        workload = Workload(shape, pool)
        flash = timed(workload.flash(block_size=16, token_major=False, max_splits=0))
        plans: list[dict[str, object]] = []
        for plan in PLANS:
            try:
                us = timed(workload.prefill_mass(plan))
            except OutOfResources as error:
                plans.append({**dataclasses.asdict(plan), "failed": str(error)})
            else:
                plans.append({**dataclasses.asdict(plan), "us": us})
        plans.sort(key=lambda entry: float(str(entry.get("us", "inf"))))
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
