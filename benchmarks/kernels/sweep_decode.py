# SPDX-License-Identifier: Apache-2.0
"""Finds the tile, splits, warps and stages of the decode kernel for every shape.

    python -m benchmarks.kernels.sweep_decode --out DIR [--time-limit 480]

Needs one GPU with FlashAttention 3. Kernels are compiled by as many processes as there
are cores, every shape is checked before it is timed, and the time limit is kept by
leaving out the last shapes. Writes `decode_sweep.json`: per shape the best
FlashAttention, every plan's time, and what single changes to the best plan cost.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from benchmarks.kernels.measuring import (
    Timing,
    captured,
    command,
    copy_bandwidth,
    sample,
    within,
)
from benchmarks.kernels.workload import HEADS, SHAPES, Shape, Workload, allocate_pool
from benchmarks.machine import environment
from vllm_roco.ops.decode.plan import DecodePlan

FLASH_BLOCKS = (16, 32, 64, 128, 256)
# tokens of 128 numbers a head; heads half as large have tiles twice as long
TILES = [
    (32, 1, 4),
    (32, 2, 4),
    (32, 2, 6),
    (64, 2, 3),
    (64, 4, 2),
    (64, 4, 3),
    (64, 4, 4),
    (128, 4, 2),
    (128, 4, 3),
    (128, 8, 2),
    (128, 8, 3),
]
SPLITS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128]
PROGRAMS_PER_MULTIPROCESSOR = (0.8, 64)
FEWEST_TOKENS_A_SPLIT = 128


def plans(shape: Shape, multiprocessors: int) -> list[DecodePlan]:
    """Return the plans worth timing for a shape."""
    least, most = (n * multiprocessors for n in PROGRAMS_PER_MULTIPROCESSOR)
    splits = [
        n
        for n in SPLITS
        if n == 1
        or (
            least <= shape.batch * shape.kv_heads * n <= most
            and shape.context >= n * FEWEST_TOKENS_A_SPLIT
        )
    ]
    if len(splits) > 1 and shape.batch * shape.kv_heads < least:
        splits.remove(1)
    return [
        DecodePlan(
            tile=tile * 128 // shape.head_size,
            splits=n,
            num_warps=warps,
            num_stages=stages,
            dependent_launch=True,
        )
        for (tile, warps, stages), n in itertools.product(TILES, splits)
    ]


def compile_plans(job: tuple[Shape, list[DecodePlan]]) -> None:
    """Run plans once on a small batch, which leaves them in Triton's cache."""
    shape, todo = job
    workload = Workload(shape, allocate_pool([shape]))
    for plan, measure in itertools.product(todo, (True, False)):
        workload.roco(plan, measure=measure)[0]()
    torch.cuda.synchronize()


def compile_all(shapes: list[Shape], multiprocessors: int) -> None:
    """Compile every plan of every shape, each kernel once."""
    jobs = []
    for heads in HEADS:
        wanted = {
            (plan.tile, plan.num_warps, plan.num_stages, plan.splits)
            for shape in shapes
            if (shape.q_heads, shape.kv_heads, shape.head_size) == heads
            for plan in plans(shape, multiprocessors)
        }
        small = Shape(2, 128, *heads)
        by_kernel: dict[tuple[int, int, int], list[DecodePlan]] = {}
        for tile, warps, stages, splits in sorted(wanted):
            plan = DecodePlan(tile, splits, warps, stages, dependent_launch=True)
            by_kernel.setdefault((tile, warps, stages), []).append(plan)
        jobs += [(small, todo) for todo in by_kernel.values()]
    workers = min(len(jobs), max(1, (os.cpu_count() or 2) - 2))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        list(pool.map(compile_plans, jobs))


def best_flash(workload: Workload) -> dict[str, object]:
    """Return the fastest FlashAttention 3 over page size, layout and splits."""
    found: list[dict[str, object]] = []
    for block, token_major, splits in itertools.product(
        FLASH_BLOCKS, (True, False), (0, 32)
    ):
        calls = workload.flash(
            block_size=block, token_major=token_major, max_splits=splits
        )
        timing = Timing.of(sample(captured(calls), len(calls), 8))
        found.append(
            {
                "us": timing.median,
                "block_size": block,
                "token_major": token_major,
                "max_splits": splits,
            }
        )
    return min(found, key=lambda entry: float(str(entry["us"])))


def time_plan(workload: Workload, plan: DecodePlan, **options: bool | int) -> float:
    calls = workload.roco(plan, **options)  # type: ignore[arg-type]
    return Timing.of(sample(captured(calls), len(calls), 8)).median


def sweep(workload: Workload, multiprocessors: int) -> dict[str, Any]:
    """Time every plan of one shape, and changes to the best one."""
    shape = workload.shape
    flash = best_flash(workload)
    timed: list[tuple[float, DecodePlan]] = []
    failed: dict[str, str] = {}
    for plan in plans(shape, multiprocessors):
        try:
            timed.append((time_plan(workload, plan), plan))
        except OutOfResources as error:
            failed[str(plan)] = str(error)[:200]
    timed.sort(key=lambda entry: entry[0])
    best = timed[0][1]
    workload.check(best, block_size=16, token_major=False)
    independent = dataclasses.replace(best, dependent_launch=False)
    changes = {
        "no statistics": time_plan(workload, best, measure=False),
        "no dependent launch": time_plan(workload, independent),
        "token-major": time_plan(workload, best, token_major=True),
        "again": time_plan(workload, best),
    }
    # other block sizes are kernels of their own, so one kind of heads must do
    if (shape.q_heads, shape.kv_heads, shape.head_size) == HEADS[0]:
        for size in (32, 64, 128):
            changes[f"blocks of {size}"] = time_plan(workload, best, block_size=size)
    return {
        "shape": dataclasses.asdict(shape),
        "kv_bytes": shape.kv_bytes,
        "flash": flash,
        "best": dataclasses.asdict(best),
        "ratio": round(float(str(flash["us"])) / timed[0][0], 3),
        "changes": changes,
        "plans": [{"us": us, **dataclasses.asdict(plan)} for us, plan in timed],
        "failed": failed,
    }


def main() -> None:
    """Run the command line."""
    parser = command(__doc__, time_limit=480)
    parser.add_argument("--shapes", type=int, nargs="*", help="indices into SHAPES")
    arguments = parser.parse_args()
    start = time.monotonic()
    shapes = [SHAPES[i] for i in arguments.shapes] if arguments.shapes else SHAPES
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count

    compile_all(shapes, multiprocessors)
    compiled = time.monotonic() - start
    print(f"compiled after {compiled:.0f} s", flush=True)
    result = {"environment": environment(), "copy_bytes_per_second": copy_bandwidth()}
    swept: list[dict[str, Any]] = []
    pool = allocate_pool(shapes)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for shape in within(arguments.time_limit - compiled, shapes):
        row = sweep(Workload(shape, pool), multiprocessors)
        swept.append(row)
        told = {name: row[name] for name in ("ratio", "flash", "changes")}
        print(f"{shape}: {told} roco {row['plans'][0]}", flush=True)
        # written after each shape, so that a run cut short leaves what it has
        (arguments.out / "decode_sweep.json").write_text(
            json.dumps(result | {"shapes": swept}, indent=1)
        )


if __name__ == "__main__":
    main()
