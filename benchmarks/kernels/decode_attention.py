# SPDX-License-Identifier: Apache-2.0
"""Decode attention with statistics against FlashAttention 3 without, and with fp8.

    python -m benchmarks.kernels.decode_attention --out benchmarks/results

Needs one Hopper GPU, vLLM and, for its column, xformers. FlashAttention 3 is taken at
its best: vLLM's own call with scheduler metadata, the fastest page size of 16 to 256,
page layout and bound of splits for each shape. All sides run in CUDA graphs over a
permuted block table and a cold L2 cache, in turns. Every shape is checked against the
float32 reference before it is timed, and once more over an fp8 cache.

Writes `decode_attention.csv` and `decode_fp8.csv` (microseconds, medians; `_low` and
`_high` are the 20 % and 80 % quantiles; `ratio` is flash_us / roco_us, `fp8_ratio`
roco_us / fp8_us), and versions into `provenance.json`.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from benchmarks import rows
from benchmarks.kernels.measuring import command, copy_bandwidth, interleaved, within
from benchmarks.kernels.sweep_decode import best_flash
from benchmarks.kernels.workload import (
    DTYPE,
    SHAPES,
    Call,
    Workload,
    allocate_pool,
)
from benchmarks.machine import environment
from benchmarks.serving.tables import decode, decode_fp8
from vllm_roco.ops.device import Device

BLOCK_SIZE = 16
TABLES = {"decode_attention": decode, "decode_fp8": decode_fp8}


def measure(
    workload: Workload, gpu: str, bandwidth: float, *, token_major: bool
) -> tuple[dict[str, object], dict[str, object]]:
    """Check and time one shape; return its rows of both tables."""
    shape = workload.shape
    device = Device.of(torch.device("cuda", 0))
    plan = shape.plan(device)
    pages: dict[str, Any] = {"block_size": BLOCK_SIZE, "token_major": token_major}
    in_fp8 = workload.over(fp8=True)
    plan_fp8 = in_fp8.shape.plan(device)
    in_fp8.check(plan_fp8, **pages)
    workload.check(plan, **pages)
    _, flash = best_flash(workload)
    variants: dict[str, list[Call]] = {
        "flash": workload.flash(**flash),
        "roco": workload.roco(plan, **pages),
        "roco_no_stats": workload.roco(plan, measure=False, **pages),
        "fp8": in_fp8.roco(plan_fp8, **pages),
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
    work = asdict(shape)
    del work["fp8"]
    measured: dict[str, object] = {"gpu": gpu, **work, "block_size": BLOCK_SIZE}
    row, fp8_row = dict(measured), dict(measured)
    for name in ("flash", "xformers", "roco", "roco_no_stats"):
        absent = dict.fromkeys((f"{name}_us", f"{name}_low", f"{name}_high"))
        row |= timings[name].columns(name) if name in timings else absent
    for name in ("roco", "fp8"):
        fp8_row |= timings[name].columns(name)
    speed = shape.kv_bytes / (roco * 1e-6)
    row |= {
        "ratio": round(timings["flash"].median / roco, 3),
        "copy_bandwidth_fraction": round(speed / bandwidth, 3),
        **{f"flash_{name}": value for name, value in flash.items()},
        "roco_token_major": token_major,
        **{f"plan_{name}": value for name, value in asdict(plan).items()},
        "note": note,
    }
    fp8_row |= {
        "fp8_ratio": round(roco / timings["fp8"].median, 3),
        **{f"plan_{name}": value for name, value in asdict(plan_fp8).items()},
    }
    return row, fp8_row


def main() -> None:
    """Run the command line."""
    parser = command(__doc__, time_limit=540)
    parser.add_argument("--token-major", action="store_true")
    parser.add_argument("--shapes", type=int, nargs="*", help="indices into SHAPES")
    arguments = parser.parse_args()
    facts = environment()
    bandwidth = copy_bandwidth()
    shapes = [SHAPES[i] for i in arguments.shapes] if arguments.shapes else SHAPES
    pool = allocate_pool(shapes)
    measured: dict[str, list[dict[str, object]]] = {name: [] for name in TABLES}
    for shape in within(arguments.time_limit, shapes):
        workload = Workload(shape, pool)
        found = measure(
            workload, facts["gpu"], bandwidth, token_major=arguments.token_major
        )
        for name, row in zip(TABLES, found, strict=True):
            measured[name].append(row)
            print(f"{name}, {shape}: {row}", flush=True)
            rows.write(arguments.out / f"{name}.csv", measured[name])
    details = {"dtype": str(DTYPE), "copy_bytes_per_second": bandwidth}
    for name, table in TABLES.items():
        rows.note(arguments.out, name, facts | details)
        print(table(rows.read(arguments.out / f"{name}.csv")))


if __name__ == "__main__":
    main()
