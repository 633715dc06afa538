# SPDX-License-Identifier: Apache-2.0
"""Finds the tile, splits, warps and stages of the decode kernel for every shape.

    python -m benchmarks.kernels.sweep_decode --out DIR [--time-limit 480]
    python -m benchmarks.kernels.sweep_decode --out DIR --score

Needs one GPU with FlashAttention 3. Kernels are compiled by as many processes as there
are cores, every shape is checked before it is timed, and the time limit is kept by
leaving out the last shapes. Writes `decode_sweep.json`: per shape the best
FlashAttention, every plan's time, and what single changes to the best plan cost. How
near `plan_decode` comes to the best of a sweep, `--score` tells without a GPU.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from scipy.stats import gmean
from triton.runtime.errors import OutOfResources

from benchmarks.kernels.measuring import command, copy_bandwidth, median_of, within
from benchmarks.kernels.workload import HEADS, SHAPES, Shape, Workload, allocate_pool
from benchmarks.machine import environment
from vllm_roco.ops.decode.plan import DecodePlan
from vllm_roco.ops.device import H100

MILLISECONDS = 8
"""Length of a measurement."""
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
            shares=n * shape.batch,
            # two tiles or four, as the package has it
            least_tokens=(2 if n > 1 else 4) * tile * 128 // shape.head_size,
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
            plan
            for shape in shapes
            if shape.heads == heads
            for plan in plans(shape, multiprocessors)
        }
        kernels: dict[tuple[int, int, int], list[DecodePlan]] = {}
        for plan in wanted:
            kernel = (plan.tile, plan.num_warps, plan.num_stages)
            kernels.setdefault(kernel, []).append(plan)
        small = Shape(2, 128, *heads, fp8=shapes[0].fp8)
        jobs += [(small, todo) for todo in kernels.values()]
    workers = min(len(jobs), max(1, (os.cpu_count() or 2) - 2))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        list(pool.map(compile_plans, jobs))


def best_flash(workload: Workload) -> tuple[float, dict[str, Any]]:
    """Return the fastest FlashAttention 3, its microseconds and what it was told."""
    found = []
    for values in itertools.product(FLASH_BLOCKS, (True, False), (0, 32)):
        names = ("block_size", "token_major", "max_splits")
        told: dict[str, Any] = dict(zip(names, values, strict=True))
        found.append((median_of(workload.flash(**told), MILLISECONDS), told))
    return min(found, key=itemgetter(0))


def sweep(workload: Workload, multiprocessors: int) -> dict[str, Any]:
    """Time every plan of one shape, and changes to the best one."""
    shape = workload.shape
    # others' kernels have no fp8 cache here
    flash_us, flash = best_flash(workload.over(fp8=False))

    def timed(plan: DecodePlan, **options: Any) -> float:
        return median_of(workload.roco(plan, **options), MILLISECONDS)

    swept: list[tuple[float, DecodePlan]] = []
    failed: dict[str, str] = {}
    for plan in plans(shape, multiprocessors):
        try:
            swept.append((timed(plan), plan))
        except OutOfResources as error:
            failed[str(plan)] = str(error)[:200]
    swept.sort(key=itemgetter(0))
    best_us, best = swept[0]
    workload.check(best, block_size=16, token_major=False)
    changes = {
        "no statistics": timed(best, measure=False),
        "no dependent launch": timed(replace(best, dependent_launch=False)),
        "token-major": timed(best, token_major=True),
        "again": timed(best),
    }
    # other block sizes are kernels of their own, so one kind of heads must do
    if shape.heads == HEADS[0]:
        for size in (32, 64, 128):
            changes[f"blocks of {size}"] = timed(best, block_size=size)
    return {
        "shape": asdict(shape),
        "kv_bytes": shape.kv_bytes,
        "flash": {"us": flash_us, **flash},
        "best": asdict(best),
        "ratio": round(flash_us / best_us, 3),
        "changes": changes,
        "plans": [{"us": us, **asdict(plan)} for us, plan in swept],
        "failed": failed,
    }


def score(row: dict[str, Any]) -> float:
    """Return best time / time of `plan_decode`'s plan on an H100, of one shape.

    A plan that was not swept is judged by the one with the nearest number of splits.
    """
    plan = Shape(**row["shape"]).plan(H100)
    kernel = (plan.tile, plan.num_warps, plan.num_stages)
    alike = [
        swept
        for swept in row["plans"]
        if (swept["tile"], swept["num_warps"], swept["num_stages"]) == kernel
    ]
    if not alike:
        raise ValueError(f"{plan} is none of the swept plans of {row['shape']}.")
    nearest = min(alike, key=lambda swept: abs(math.log(swept["splits"] / plan.splits)))
    return float(row["plans"][0]["us"] / nearest["us"])


def show_scores(rows: list[dict[str, Any]]) -> None:
    """Print how near `plan_decode` comes to the best plan of every shape."""
    scores = [score(row) for row in rows]
    for row, value in sorted(zip(rows, scores, strict=True), key=itemgetter(1)):
        shape = Shape(**row["shape"])
        print(f"{value:.3f}  {shape.plan(H100)}  {shape}")
    print(f"geometric mean {gmean(scores):.4f}, worst {min(scores):.3f}")


def main() -> None:
    """Run the command line."""
    parser = command(__doc__, time_limit=480)
    parser.add_argument("--shapes", type=int, nargs="*", help="indices into SHAPES")
    parser.add_argument("--fp8", action="store_true", help="over an fp8 cache")
    parser.add_argument(
        "--score", action="store_true", help="score what DIR has, without a GPU"
    )
    arguments = parser.parse_args()
    path: Path = arguments.out / "decode_sweep.json"
    if arguments.score:
        show_scores(json.loads(path.read_text())["shapes"])
        return
    start = time.monotonic()
    shapes = [SHAPES[i] for i in arguments.shapes] if arguments.shapes else SHAPES
    shapes = [replace(shape, fp8=arguments.fp8) for shape in shapes]
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count

    compile_all(shapes, multiprocessors)
    compiled = time.monotonic() - start
    print(f"compiled after {compiled:.0f} s", flush=True)
    result = {"environment": environment(), "copy_bytes_per_second": copy_bandwidth()}
    swept: list[dict[str, Any]] = []
    pool = allocate_pool(shapes)
    path.parent.mkdir(parents=True, exist_ok=True)
    for shape in within(arguments.time_limit - compiled, shapes):
        row = sweep(Workload(shape, pool), multiprocessors)
        swept.append(row)
        told = {name: row[name] for name in ("ratio", "flash", "changes")}
        print(f"{shape}: {told} roco {row['plans'][0]}", flush=True)
        # written after each shape, so that a run cut short leaves what it has
        path.write_text(json.dumps(result | {"shapes": swept}, indent=1))


if __name__ == "__main__":
    main()
