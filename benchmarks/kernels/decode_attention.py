# SPDX-License-Identifier: Apache-2.0
"""Decode attention with statistics against FlashAttention 3 without.

    python -m benchmarks.kernels.decode_attention --out benchmarks/results

Needs one Hopper GPU, vLLM and, for its column, xformers. FlashAttention 3 is taken at
its best: vLLM's own call with scheduler metadata, the fastest page size of 16 to 256,
page layout and bound of splits for each shape. All sides run in CUDA graphs over a
permuted block table and a cold L2 cache, in turns. Every shape is checked against the
float32 reference before it is timed.

Writes `decode_attention.csv` (microseconds, medians; `_low` and `_high` are the 20 %
and 80 % quantiles; `ratio` is flash_us / roco_us) and `decode_attention.json`, the
versions.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import math
import time
from pathlib import Path

import torch

from benchmarks.kernels.measuring import copy_bandwidth, environment, interleaved
from benchmarks.kernels.sweep_decode import best_flash
from benchmarks.kernels.workload import (
    DTYPE,
    SHAPES,
    Call,
    Shape,
    Workload,
    allocate_pool,
)
from vllm_roco.ops.decode.plan import plan_decode
from vllm_roco.ops.device import Device

BLOCK_SIZE = 16


def measure(
    workload: Workload, gpu: str, bandwidth: float, *, token_major: bool
) -> dict[str, object]:
    """Check and time one shape; return its row of the table."""
    shape = workload.shape
    plan = plan_decode(
        num_rows=shape.batch,
        num_kv_heads=shape.kv_heads,
        head_size=shape.head_size,
        max_live_tokens=shape.context,
        dtype=DTYPE,
        device=Device.of(torch.device("cuda", 0)),
    )
    workload.check(plan, block_size=BLOCK_SIZE, token_major=token_major)
    flash = best_flash(workload)
    options = {"block_size": BLOCK_SIZE, "token_major": token_major}
    variants: dict[str, list[Call]] = {
        "flash": workload.flash(
            **{key: value for key, value in flash.items() if key != "us"}  # type: ignore[arg-type]
        ),
        "roco": workload.roco(plan, **options),  # type: ignore[arg-type]
        "roco_no_stats": workload.roco(plan, measure=False, **options),  # type: ignore[arg-type]
    }
    note = ""
    try:
        calls = workload.xformers()
        calls[0]()
        variants["xformers"] = calls
    except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
        note = f"xformers: {error}".splitlines()[0][:120]
    timings = interleaved(variants, rounds=5, milliseconds=40)
    roco = timings["roco"].median
    row: dict[str, object] = {"gpu": gpu, **dataclasses.asdict(shape)}
    row["block_size"] = BLOCK_SIZE
    for name in ("flash", "xformers", "roco", "roco_no_stats"):
        timing = timings.get(name)
        row[f"{name}_us"] = timing.median if timing else ""
        row[f"{name}_low"] = timing.low if timing else ""
        row[f"{name}_high"] = timing.high if timing else ""
    row["ratio"] = round(timings["flash"].median / roco, 3)
    row["copy_bandwidth_fraction"] = round(
        shape.kv_bytes / (roco * 1e-6) / bandwidth, 3
    )
    row["flash_block_size"] = flash["block_size"]
    row["flash_token_major"] = flash["token_major"]
    row["flash_max_splits"] = flash["max_splits"]
    row["roco_token_major"] = token_major
    row |= {f"plan_{key}": value for key, value in dataclasses.asdict(plan).items()}
    row["note"] = note
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--time-limit", type=float, default=540, help="seconds")
    parser.add_argument("--token-major", action="store_true")
    arguments = parser.parse_args()
    start = time.monotonic()
    versions = environment()
    bandwidth = copy_bandwidth()
    pool = allocate_pool(SHAPES)
    rows: list[dict[str, object]] = []
    left_out: list[Shape] = []
    for shape in SHAPES:
        if time.monotonic() - start > arguments.time_limit:
            left_out.append(shape)
            continue
        row = measure(
            Workload(shape, pool),
            versions["gpu"],
            bandwidth,
            token_major=arguments.token_major,
        )
        rows.append(row)
        print(f"{shape}: {row}", flush=True)

    ratios = [float(str(row["ratio"])) for row in rows]
    summary = {
        "environment": versions,
        "dtype": str(DTYPE),
        "copy_bytes_per_second": bandwidth,
        "ratio_geometric_mean": math.exp(sum(map(math.log, ratios)) / len(ratios)),
        "ratio_smallest": min(ratios),
        "left_out_for_want_of_time": [str(shape) for shape in left_out],
    }
    print(json.dumps(summary, indent=1))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "decode_attention.json").write_text(
        json.dumps(summary, indent=1) + "\n"
    )
    with (arguments.out / "decode_attention.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
