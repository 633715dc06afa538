# SPDX-License-Identifier: Apache-2.0
"""Finds the tile of the prompt kernel, and what it costs beside FlashAttention 3.

    python -m benchmarks.kernels.sweep_prefill_mass --out DIR [--time-limit 240]

Needs one GPU with FlashAttention 3. Writes `prefill_mass_sweep.json`: microseconds of
attention, and of the masses by every plan, over the same pages. That the kernel is
right on this machine is what `tests/ops/test_prefill_mass.py` tells.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from pathlib import Path

from triton.runtime.errors import OutOfResources

from benchmarks.kernels.measuring import Timing, captured, environment, sample
from benchmarks.kernels.workload import HEADS, Call, Shape, Workload, allocate_pool
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--time-limit", type=float, default=240, help="seconds")
    arguments = parser.parse_args()
    start = time.monotonic()
    pool = allocate_pool(SHAPES)
    rows: list[dict[str, object]] = []
    for shape in SHAPES:
        if time.monotonic() - start > arguments.time_limit:
            print(f"left out for want of time: {shape}", flush=True)
            continue
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
        rows.append(
            {"shape": dataclasses.asdict(shape), "flash_us": flash, "plans": plans}
        )
        print(f"{shape}: flash {flash} masses {plans[:3]}", flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "prefill_mass_sweep.json").write_text(
        json.dumps({"environment": environment(), "shapes": rows}, indent=1)
    )


if __name__ == "__main__":
    main()
