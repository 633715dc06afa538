# SPDX-License-Identifier: Apache-2.0
"""Decode attention over rows of different lengths, against FlashAttention 3 without.

    python -m benchmarks.kernels.uneven_rows --out DIR [--time-limit 120]

Needs one Hopper GPU with FlashAttention 3, which is taken at its best, as in
`decode_attention`. Rows are those of requests that are at different points: between 200
and 3,200 tokens, or at a budget of 2,048 between two ends of a stride. Every shape is
checked against the float32 reference first. Appends to `uneven_rows.csv`, microseconds.
"""

from __future__ import annotations

import torch

from benchmarks import rows
from benchmarks.kernels.measuring import command, interleaved, within
from benchmarks.kernels.sweep_decode import best_flash
from benchmarks.kernels.workload import UNEVEN, Workload, allocate_pool
from benchmarks.machine import environment
from benchmarks.rows import Row, Table
from vllm_roco.ops.device import Device

TABLE = Table(
    "uneven_rows",
    key=[
        *("gpu", "vllm", "commit", "batch", "shortest", "longest"),
        *("q_heads", "kv_heads", "head_size"),
    ],
    results=["flash_us", "roco_us", "ratio"],
)
BLOCK_SIZE = 16


def main() -> None:
    """Run the command line."""
    arguments = command(__doc__, time_limit=120).parse_args()
    facts = environment()
    pool = allocate_pool(UNEVEN)
    for shape in within(arguments.time_limit, UNEVEN):
        heads = ("q_heads", "kv_heads", "head_size")
        place: Row = {
            **{key: facts[key] for key in ("gpu", "vllm", "commit")},
            **{"batch": shape.batch, "shortest": shape.shortest},
            **{"longest": shape.context, **{key: getattr(shape, key) for key in heads}},
        }
        if not TABLE.has(arguments.out, place):
            row = measure(Workload(shape, pool))
            TABLE.append(arguments.out, {**place, **row})
            print(f"{shape}: {row}", flush=True)
    rows.note(arguments.out, TABLE.name, facts)


def measure(workload: Workload) -> Row:
    """Check and time one shape; return the columns that tell how long it takes."""
    device = Device.of(torch.device("cuda", 0))
    plan = workload.shape.plan(device)
    workload.check(plan, block_size=BLOCK_SIZE, token_major=False)
    _, flash = best_flash(workload)
    calls = {"flash": workload.flash(**flash), "roco": workload.roco(plan)}
    timings = interleaved(calls, rounds=3, milliseconds=15)
    us = {name: timing.median for name, timing in timings.items()}
    return {
        "flash_us": us["flash"],
        "roco_us": us["roco"],
        "ratio": round(us["flash"] / us["roco"], 3),
    }


if __name__ == "__main__":
    main()
