# SPDX-License-Identifier: Apache-2.0
"""Launches every kernel over shapes that are drawn from a seed, and judges by float64.

    python -m tests.soak.kernels --seconds 3600 --seed 1
    python -m tests.soak.kernels --smallest   # each once, for compute-sanitizer

Natively on a GPU; without one, TRITON_INTERPRET=1 is needed.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import count, product
from typing import Any

import torch

from tests.ops import test_decode as decode
from tests.ops import test_live_table as live_table
from tests.ops import test_move_blocks as move_blocks
from tests.ops import test_prefill_attention as prefill_attention
from tests.ops import test_prefill_mass as prefill_mass
from tests.ops.paged_case import Heads, PagedCase, assert_as_good_as, paged_on
from tests.ops.test_select_victims import Group, Moves, options
from tests.soak.far_pages import far_case, far_group, pages_of
from vllm_roco import policy
from vllm_roco.eviction_row import EvictionRow
from vllm_roco.eviction_schedule import NEVER, EvictionSchedule
from vllm_roco.kv_cache import page
from vllm_roco.ops.decode.plan import DecodePlan, plan_decode
from vllm_roco.ops.device import H100, Device
from vllm_roco.ops.prefill_plan import plan_prefill

CUDA = torch.cuda.is_available()
CPU = torch.device("cpu")
"""Where cases are made and judged: small ones keep a GPU busy that others want."""
DEVICE = torch.device("cuda", 0) if CUDA else CPU
BATCHES = 12 if CUDA else 2
"""Batches of one shape: a new one is compiled on a GPU."""
ROUNDING = 1e-5
"""Relative difference of scores that float32 cannot be held to."""
MOST_FAR_LAYERS = 2 if CUDA else 5
"""Layers of up to 9 GB each that there is room for, beside those of other runs."""
TRIALS = 50
"""Roundings that are tried where victims differ."""


@dataclass(frozen=True)
class Shape:
    """What a kernel is compiled for.

    Attributes:
        heads: Of the layer.
        block_size: Tokens per block.
        dtype: Of queries, and of the cache unless that is fp8.
        token_major: Page layout.
        fp8: None, or whether each kv head has scales of its own.
        soft_cap: Of the logits, 0 for none.
        has_sinks: Whether each head has a sink.
    """

    heads: Heads
    block_size: int
    dtype: torch.dtype
    token_major: bool
    fp8: bool | None
    soft_cap: float
    has_sinks: bool


SMALLEST = (
    Shape(Heads(2, 1, 32), 16, torch.float16, False, None, 0.0, False),
    Shape(Heads(2, 2, 32), 16, torch.float16, False, True, 5.0, True),
    Shape(Heads(2, 1, 32), 16, torch.float32, True, None, 0.0, False),
)
"""By tensor cores, by bytes, and by neither."""


def draw_shape(draw: random.Random) -> Shape:
    """Return any shape that serving may have."""
    kv_heads = draw.choice([1, 1, 2, 3])
    group = draw.choice([1, 2, 3, 4, 5, 7, 8, 16, 20])
    dtypes = [torch.float32, torch.float16]
    if CUDA:
        # whose bits Triton's interpreter multiplies as integers
        dtypes.append(torch.bfloat16)
    return Shape(
        heads=Heads(
            group * kv_heads, kv_heads, draw.choice([16, 32, 64, 80, 96, 128, 256])
        ),
        block_size=draw.choice([16, 16, 32, 48, 64, 128]),
        dtype=draw.choice(dtypes),
        token_major=draw.random() < 0.3,
        fp8=draw.choice([None, None, False, True]),
        soft_cap=draw.choice([0.0, 0.0, 0.0, 5.0, 30.0]),
        has_sinks=draw.random() < 0.3,
    )


def draw_case(draw: random.Random, shape: Shape, *, decodes: bool) -> PagedCase:
    """Return a ragged batch, some rows of which may be padding."""
    size = shape.block_size
    rows = []
    for _ in range(draw.randint(2, 6)):
        length = draw.choice(
            [0, 1, size, size + 1, draw.randint(1, 4 * size), draw.randint(1, 300)]
        )
        query_len = 1 if decodes else draw.randint(min(1, length), length)
        rows.append((query_len, length))
    rows[draw.randrange(len(rows))] = (1, draw.randint(1, 200))
    case = PagedCase.build(
        rows,
        shape.heads,
        CPU,
        block_size=size,
        dtype=shape.dtype,
        token_major=shape.token_major,
    )
    if shape.soft_cap:
        case.scale *= draw.choice([1, 20])
    if shape.has_sinks:
        case.add_sinks()
    if shape.fp8 is not None:
        case = case.in_fp8(per_head=shape.fp8)
    return case.to(DEVICE)


def draw_plan(draw: random.Random, case: PagedCase) -> DecodePlan:
    """Return the plan that serving would have, or another that fits."""
    rows, _, head_size = case.query.shape
    device = Device.of(DEVICE) if CUDA else H100
    plan = plan_decode(
        num_rows=rows,
        num_kv_heads=case.kv_cache.shape[1],
        head_size=head_size,
        max_live_tokens=case.max_live_tokens,
        dtype=case.kv_cache.dtype,
        device=device,
    )
    if draw.random() < 0.5:
        plan = replace(plan, splits=draw.choice((1, 1, 2, 3, 6)))
    if draw.random() < 0.3:
        plan = replace(plan, tile=16)
    if draw.random() < 0.7:
        # rows are short here
        tokens = plan.tile * draw.randint(1, 2)
        plan = replace(plan, least_tokens=tokens, shares=draw.randint(1, 12))
    return plan if CUDA else replace(plan, dependent_launch=False)


def copied(case: PagedCase) -> PagedCase:
    """Return a case with pages of its own."""
    return replace(case, kv_cache=paged_on(DEVICE, case.kv_cache))


def run_decode(case: PagedCase, shape: Shape, plan: DecodePlan) -> torch.Tensor:
    """Attend and measure; return the output."""
    return decode.run(case, plan, soft_cap=shape.soft_cap)


def check_decode(draw: random.Random, shape: Shape, most_far: int) -> None:
    """Compare a batch of decodes with float64, and its neighbours with themselves."""
    case = draw_case(draw, shape, decodes=True)
    plan = draw_plan(draw, case)
    exact, low = expected(case, shape)
    before = copied(case)
    unmeasured = decode.run(copied(case), plan, measure=False, soft_cap=shape.soft_cap)
    assert_as_good_as(unmeasured.cpu(), exact.output, low.output)
    output = run_decode(case, shape, plan)
    assert output.isfinite().all()
    assert_as_good_as(output.cpu(), exact.output, low.output)
    case.to(CPU).check_tails(exact, low)
    check_neighbours(
        *(draw, before, case, output), lambda each: run_decode(each, shape, plan)
    )
    if most_far:
        far = far_case(before)
        assert same(run_decode(far.case, shape, plan), output)
        assert same(far.pages(), pages_of(case.kv_cache))


def run_prompt(
    case: PagedCase, shape: Shape, splits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend by the kernel for prompts, and measure; return output and log-sum-exp."""
    output, lse = prefill_attention.run(case, soft_cap=shape.soft_cap)
    plan = plan_prefill(
        head_size=case.query.shape[2],
        block_size=case.block_size,
        dtype=case.query.dtype,
        device=Device.of(DEVICE) if CUDA else H100,
    )
    plan = replace(plan, splits=splits)
    prefill_mass.run(case, lse, soft_cap=shape.soft_cap, plan=plan)
    return output, lse


def check_prompt(draw: random.Random, shape: Shape, most_far: int) -> None:
    """Compare a batch of prompts with float64, and its neighbours with themselves."""
    case = draw_case(draw, shape, decodes=False)
    exact, low = expected(case, shape)
    before = copied(case)
    splits = draw.choice((1, 2, 3))
    output, lse = run_prompt(case, shape, splits)
    assert_as_good_as(output.cpu(), exact.output, low.output)
    assert_as_good_as(lse.cpu(), exact.lse, low.lse)
    case.to(CPU).check_tails(exact, low)
    check_neighbours(
        *(draw, before, case, output), lambda each: run_prompt(each, shape, splits)[0]
    )
    if most_far:
        far = far_case(before)
        assert same(run_prompt(far.case, shape, splits)[0], output)
        assert same(far.pages(), pages_of(case.kv_cache))


def expected(case: PagedCase, shape: Shape) -> tuple[Any, Any]:
    """Return a step in float64, and with the roundings of the kernels' type."""
    case = case.to(CPU)
    return (
        case.expected(soft_cap=shape.soft_cap, dtype=torch.float64),
        case.expected(soft_cap=shape.soft_cap, dtype=shape.dtype),
    )


def check_neighbours(
    draw: random.Random,
    before: PagedCase,
    after: PagedCase,
    output: torch.Tensor,
    run: Callable[[PagedCase], torch.Tensor],
) -> None:
    """Assert that what is no number in one row changes not a bit of any other.

    Args:
        draw: Of the row and of what its keys and values become.
        before: The batch before its step.
        after: The same after it.
        output: What it answered.
        run: Runs the step.
    """
    sick = copied(before)
    row = draw.randrange(len(sick.live_lens))
    size = sick.block_size
    blocks = sick.live_table[row, : -(-int(sick.live_lens[row]) // size)].long()
    if sick.kv_cache.dtype == torch.uint8:
        sick.kv_cache[blocks] = 0x7F
    else:
        sick.kv_cache[blocks] = draw.choice([float("nan"), float("inf"), -float("inf")])
    got = run(sick)
    starts = sick.query_start_loc.tolist()
    others = torch.ones(len(output), dtype=torch.bool, device=output.device)
    others[starts[row] : starts[row + 1]] = False
    assert same(got[others], output[others]), "another row's output has changed"
    untouched = torch.ones(len(sick.kv_cache), dtype=torch.bool, device=output.device)
    untouched[blocks] = False
    assert same(
        pages_of(sick.kv_cache)[untouched], pages_of(after.kv_cache)[untouched]
    ), "another row's page has changed"


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors have the same bits."""
    return torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )


def draw_group(draw: random.Random, shape: Shape) -> tuple[Group, EvictionRow]:
    """Return rows that end a step, and how they evict."""
    size = shape.block_size
    budget, stride = draw.randint(4, 24), draw.randint(1, 8)
    schedule = EvictionSchedule(
        block_size=size, budget=budget * size, stride=stride * size
    )
    edge = schedule.budget + schedule.stride
    steps = [(edge - 1, edge)]
    for _ in range(draw.randint(1, 5)):
        after = draw.randint(1, edge + 4 * schedule.stride)
        steps.append((draw.randint(0, after), after))
    draw.shuffle(steps)
    group = Group.build(
        steps,
        schedule,
        CPU,
        layers=draw.randint(1, 5),
        kv_heads=shape.heads.kv_heads,
        distinct=draw.choice([None, None, None, 2]),
        dtype=shape.dtype if shape.fp8 is None else torch.uint8,
        head_size=shape.heads.head_size,
        seed=draw.getrandbits(30),
    )
    free = budget - 1
    sink = draw.randint(0, free)
    chosen: dict[str, object] = {
        "policy": draw.choice(["roco", "roco", "roco", "h2o", "random", "recent"])
    }
    if chosen["policy"] == "roco":
        chosen["shield"] = draw.choice(["contribution", "peak", "deviation"])
        chosen["shield_ratio"] = draw.choice([0.0, 0.3, 0.7, 1.0])
    how = options(
        schedule,
        **chosen,
        sink=sink * size,
        recent=draw.randint(0, free - sink) * size,
    )
    return group.to(DEVICE), how._replace(seed=draw.getrandbits(20))


def check_eviction(draw: random.Random, shape: Shape, most_far: int) -> None:
    """Compare victims with the policy in float64, and moved pages byte by byte."""
    group, how = draw_group(draw, shape)
    slices = draw.randint(1, 4)
    found = group.run(how, slices=slices)
    near = group.to(CPU)
    if found != (exact := near.expected(how, torch.float64)):
        check_tied(near, how, found, exact)
    if len(group.caches) <= most_far:
        far = far_group(group)
        assert [far.near(row) for row in far.group.run(how, slices=slices)] == found
    check_sick_row(draw, group, how, found)
    move_blocks.check(group.caches, found)


def check_tied(group: Group, how: EvictionRow, found: Moves, exact: Moves) -> None:
    """Assert that rounding alone may choose what was chosen, row by row."""
    generator = torch.Generator().manual_seed(0)

    def rounded(numbers: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(numbers.shape, generator=generator, dtype=torch.float64)
        return numbers * (1 + ROUNDING * noise.to(numbers.device))

    wrong = {row for row in range(len(found)) if found[row] != exact[row]}
    for _ in range(TRIALS):
        tried = group.expected(how, torch.float64, rounded)
        wrong = {row for row in wrong if found[row] != tried[row]}
        if not wrong:
            return
    assert not wrong, f"rows {wrong} of {group.steps}: {found}, not {exact}"


def check_sick_row(
    draw: random.Random, group: Group, how: EvictionRow, found: Moves
) -> None:
    """Assert that a row of which nothing is a number stays within its own blocks."""
    row = draw.randrange(len(group.steps))
    blocks = group.live_table[row].long()
    healthy = [pages_of(cache).clone() for cache in group.caches]
    for cache in group.caches:
        page.statistics_view(cache)[blocks, :, : page.NUM_QUERIES] = draw.choice(
            [float("nan"), -float("nan"), float("inf")]
        )
        cache[blocks] = 0x7F if cache.dtype == torch.uint8 else float("nan")
    moves = group.run(how)
    assert [*moves[:row], *moves[row + 1 :]] == [*found[:row], *found[row + 1 :]]
    own = group.live_table[row].tolist()
    budget = group.schedule.budget_blocks
    before, after = group.steps[row]
    num_victims = group.schedule.evicted_blocks(after) - group.schedule.evicted_blocks(
        before
    )
    sources, targets = {s for s, _ in moves[row]}, {t for _, t in moves[row]}
    assert len(sources) == len(targets) == len(moves[row]) <= num_victims
    assert sources <= {*own[budget : budget + num_victims]}
    assert targets <= {*own[:budget]}
    for cache, pages in zip(group.caches, healthy, strict=True):
        pages_of(cache).copy_(pages)


def check_oldest(draw: random.Random, shape: Shape, most_far: int) -> None:
    """Compare the moves of a server without statistics with the policy's."""
    group, how = draw_group(draw, shape)
    schedule, sink = group.schedule, -(-how.sink // shape.block_size)
    expected = []
    for row, (before, after) in enumerate(group.steps):
        first, last = map(schedule.evicted_blocks, (before, after))
        places: list[tuple[int, int]] = []
        if first < last:
            places = policy.plan_recent_moves(first, last, schedule.budget_blocks, sink)
        expected.append(group.blocks(row, places))
    assert group.run(how, measures=False) == expected


def check_live_table(draw: random.Random, shape: Shape, most_far: int) -> None:
    """Compare live tables with rows that are spelt out."""
    steps, rows = [(0, 0)], [EvictionRow(1, 1, NEVER, 0, 0, 0, 0, 0)]
    for _ in range(draw.randint(1, 40)):
        after = draw.randint(1, 600)
        steps.append((draw.randint(0, after - 1), after))
        until = draw.choice([0, after, draw.randint(0, 700), NEVER])
        blocks = draw.randint(1, 12), draw.randint(1, 12)
        rows.append(EvictionRow(*blocks, until, 0, 0, 0, 0, 0))
    live_table.check(steps, rows, shape.block_size, DEVICE)


CHECKS: dict[str, Callable[[random.Random, Shape, int], None]] = {
    "decode": check_decode,
    "prompt": check_prompt,
    "eviction": check_eviction,
    "oldest": check_oldest,
    "live table": check_live_table,
}


def run(
    seed: int,
    shapes: Iterable[Shape],
    batches: int,
    seconds: float = math.inf,
    most_far: int = MOST_FAR_LAYERS,
) -> tuple[Counter[str], list[str]]:
    """Run batches of every kind until shapes or time are at an end.

    Args:
        seed: Of everything but the shapes.
        shapes: One after the other.
        batches: Of each shape and kind.
        seconds: Bound, by the clock.
        most_far: Layers of a batch whose pages may lie far apart.

    Returns:
        Batches by kind, and what was wrong.
    """
    counts: Counter[str] = Counter()
    faults: list[str] = []
    deadline = time.monotonic() + seconds
    for number, shape in enumerate(shapes):
        for batch, (name, check) in product(range(batches), CHECKS.items()):
            if time.monotonic() > deadline:
                return counts, faults
            draw = random.Random(f"{seed} {number} {batch} {name}")
            counts[name] += 1
            try:
                check(draw, shape, most_far)
            except Exception as error:
                where = f"seed {seed}, shape {number}, batch {batch}"
                faults.append(f"{name}, {where}, {shape}: {error!r:.500}")
                # at once: what is wrong may end the process
                print(f"FAULT {faults[-1]}", flush=True)
        counts["shapes"] += 1
    return counts, faults


def main() -> int:
    """Run as the command line says; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak.kernels", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--far-layers",
        type=int,
        default=MOST_FAR_LAYERS,
        help="layers, of up to 9 GB each, that 32 bits do not reach (%(default)s)",
    )
    parser.add_argument("--smallest", action="store_true", help="each kernel once")
    arguments = parser.parse_args()
    if not CUDA and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("there is no GPU: set TRITON_INTERPRET=1")
    started, most_far = time.monotonic(), arguments.far_layers
    if arguments.smallest:
        counts, faults = run(0, SMALLEST, 1, most_far=most_far)
    else:
        draw = random.Random(arguments.seed)
        drawn = (draw_shape(draw) for _ in count())
        bounds = BATCHES, arguments.seconds, most_far
        counts, faults = run(arguments.seed, drawn, *bounds)
    seconds, busy = time.monotonic() - started, time.process_time()
    print(
        f"{dict(counts)} in {seconds:.0f} s ({busy:.0f} s of a core) on {DEVICE.type}, "
        f"{len(faults)} faults"
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
