# SPDX-License-Identifier: Apache-2.0
"""Whether decode attention is faster if it loads by Hopper's tensor memory accelerator.

    python -m benchmarks.kernels.tensor_descriptors --out DIR

Needs one GPU of compute capability 9.0 (Hopper) with FlashAttention 3, and vLLM. In
large batches, where the package's kernel loses most to FlashAttention 3, it runs beside
`attend_by_tma`, which loads a page at a time through a tensor descriptor, with every
number of stages and warps of `SETTINGS`. Blocks of 64 and of 128 tokens have a turn
each, in which FlashAttention 3 at its best and the package's kernel with blocks of 16
run too. All run in CUDA graphs over a permuted block table and a cold L2 cache, in
turns, and every kernel is checked against the float32 reference before it is timed.

Appends to `tensor_descriptors.csv` (microseconds, medians; `low` and `high` are the
20 % and 80 % quantiles; `ratio` is FlashAttention 3's time in the same turn over the
row's), and versions to `provenance.json`.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks import rows
from benchmarks.kernels.attend_by_tma import attend_by_tma
from benchmarks.kernels.measuring import command, interleaved, within
from benchmarks.kernels.sweep_decode import best_flash
from benchmarks.kernels.workload import Call, Shape, Workload, allocate_pool
from benchmarks.machine import environment
from benchmarks.rows import Row, Table
from benchmarks.serving.tables import tensor_descriptors
from vllm_roco.ops.decode.plan import DecodePlan
from vllm_roco.ops.device import Device

SHAPES = [
    Shape(256, 2048, 32, 8, 128),
    Shape(256, 2048, 28, 4, 128),
    Shape(256, 2048, 32, 32, 128),
    Shape(64, 2048, 32, 32, 128),
]
DEFAULT_BLOCK_SIZE = 16
TILE_SIZES = (64, 128)
"""Tokens of a block that is one tile: of fewer a tile would need several loads."""
SETTINGS = list(itertools.product((2, 3, 4), (4, 8)))
"""Stages and warps."""
MIN_CAPABILITY = (9, 0)
TABLE = Table(
    "tensor_descriptors",
    key=[
        *("gpu", "vllm", "commit", "batch", "context", "q_heads", "kv_heads"),
        *("head_size", "tile", "kernel", "block_size", "statistics"),
        *("num_stages", "num_warps"),
    ],
    results=["us", "low", "high", "ratio"],
)


@dataclass(frozen=True)
class Variant:
    """What has its place in a turn.

    Attributes:
        kernel: `flash`, `roco` or `tma`.
        block_size: Tokens per page.
        statistics: `yes` or `no`.
        num_stages: Tiles in flight, for `tma`.
        num_warps: Likewise.
    """

    kernel: str
    block_size: int
    statistics: str
    num_stages: int | None = None
    num_warps: int | None = None


def lacking(capability: tuple[int, int] | None) -> str:
    """Return what a device lacks to run this, empty if nothing.

    Args:
        capability: Its compute capability, None where there is no GPU.
    """
    if capability is not None and capability >= MIN_CAPABILITY:
        return ""
    found = "no GPU" if capability is None else "one of {}.{}".format(*capability)
    return (
        "a tensor memory accelerator is needed, which GPUs of compute capability "
        "{}.{} and above have (H100, H200); here is {}.".format(*MIN_CAPABILITY, found)
    )


def descriptor_plan(block_size: int, num_stages: int, num_warps: int) -> DecodePlan:
    """Return the layout of a launch of `attend_by_tma`."""
    return DecodePlan(
        tile=block_size,
        splits=1,
        num_warps=num_warps,
        num_stages=num_stages,
        dependent_launch=False,
        shares=1,
        least_tokens=block_size,
    )


def checked_calls(
    workload: Workload, plan: DecodePlan, tile: int
) -> dict[Variant, list[Call]]:
    """Check our kernels and return their calls.

    Args:
        workload: What to attend over.
        plan: The package's.
        tile: Tokens per page of the descriptors.
    """
    found = {}
    for statistics, block_size in itertools.product(
        ("yes", "no"), (DEFAULT_BLOCK_SIZE, tile)
    ):
        how: dict[str, Any] = {
            "block_size": block_size,
            "token_major": False,
            "measure": statistics == "yes",
        }
        workload.check(plan, **how)
        roco = Variant("roco", block_size, statistics)
        found[roco] = workload.roco(plan, **how)
        if block_size != tile:
            continue
        for setting in SETTINGS:
            own = descriptor_plan(tile, *setting)
            workload.check(own, kernel=attend_by_tma, **how)
            tma = Variant("tma", tile, statistics, *setting)
            found[tma] = workload.calls(attend_by_tma, own, **how)
    return found


def measure(
    workload: Workload, flash: dict[str, Any], plan: DecodePlan, tile: int
) -> list[Row]:
    """Check and time one turn of one shape; return its rows."""
    baseline = Variant("flash", flash["block_size"], "no")
    calls = {baseline: workload.flash(**flash)}
    calls |= checked_calls(workload, plan, tile)
    by_name = {str(variant): each for variant, each in calls.items()}
    timings = interleaved(by_name, rounds=3, milliseconds=15)
    flash_us = timings[str(baseline)].median
    measured: list[Row] = []
    for variant in calls:
        timing = timings[str(variant)]
        row = {**asdict(variant), "us": timing.median}
        row |= {"low": timing.low, "high": timing.high}
        measured.append({**row, "ratio": round(flash_us / timing.median, 3)})
    return measured


def main() -> None:
    """Run the command line."""
    parser = command(__doc__, time_limit=540)
    parser.add_argument("--shapes", type=int, nargs="*", help="indices into SHAPES")
    arguments = parser.parse_args()
    has_gpu = torch.cuda.is_available()
    if trouble := lacking(torch.cuda.get_device_capability() if has_gpu else None):
        parser.error(trouble)
    facts = environment()
    machine = {key: facts[key] for key in ("gpu", "vllm", "commit")}
    device = Device.of(torch.device("cuda", 0))
    shapes = [SHAPES[i] for i in arguments.shapes] if arguments.shapes else SHAPES
    pool = allocate_pool(shapes)
    for shape in within(arguments.time_limit, shapes):
        work = asdict(shape)
        del work["fp8"], work["query_len"]
        workload = Workload(shape, pool)
        _, flash = best_flash(workload)
        for tile in TILE_SIZES:
            place = {**machine, **work, "tile": tile}
            known = asdict(Variant("roco", tile, "yes"))
            if TABLE.has(arguments.out, {**place, **known}):
                continue
            for row in measure(workload, flash, shape.plan(device), tile):
                TABLE.append(arguments.out, {**place, **row})
                print(f"{shape}, blocks of {tile}: {row}", flush=True)
    rows.note(arguments.out, TABLE.name, facts)
    print(tensor_descriptors(TABLE.read(arguments.out)))


if __name__ == "__main__":
    main()
