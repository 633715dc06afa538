# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from vllm_roco import reference
from vllm_roco.eviction_row import EvictionRow
from vllm_roco.eviction_schedule import NEVER, EvictionSchedule
from vllm_roco.ops.live_table import COLUMNS, build_live_table

UNTOUCHED = -7


def row_like(schedule: EvictionSchedule) -> EvictionRow:
    blocks = schedule.budget_blocks, schedule.stride_blocks
    return EvictionRow(*blocks, schedule.until, 0, 0, 0, 0, 0)


def run(
    steps: list[tuple[int, int]],
    schedule: EvictionSchedule,
    live_width: int,
    device: torch.device,
    rows: list[EvictionRow] | None = None,
) -> dict[str, torch.Tensor]:
    """Build the live table of rows given as (computed before, computed after)."""
    lengths = torch.tensor([after - before for before, after in steps])
    starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    width = max(after for _, after in steps) // schedule.block_size + 1
    generator = torch.Generator().manual_seed(0)
    table = torch.randperm(len(steps) * width, generator=generator).int()
    table = table.view(-1, width)
    buffers = {
        name: torch.full(shape, UNTOUCHED, dtype=torch.int32, device=device)
        for name, shape in {
            "live_table": (len(steps), live_width),
            "live_lens": (len(steps),),
            "measured_lens": (len(steps),),
            "evicted_before": (len(steps),),
            "evicted_after": (len(steps),),
        }.items()
    }
    build_live_table(
        block_table=table.to(device),
        seq_lens=torch.tensor([n for _, n in steps], dtype=torch.int32, device=device),
        query_start_loc=starts.to(device, torch.int32),
        rows=torch.tensor(
            rows or [row_like(schedule)] * len(steps), dtype=torch.int32, device=device
        ),
        block_size=schedule.block_size,
        **buffers,
    )
    return {"block_table": table} | {k: v.cpu() for k, v in buffers.items()}


def decode_and_prompt_steps(schedule: EvictionSchedule) -> list[tuple[int, int]]:
    """Return steps that end around every boundary, of one token and of many."""
    size, resident = schedule.block_size, schedule.budget
    edges = {1, size - 1, size, size + 1, resident, resident + schedule.stride}
    edges |= {resident + 2 * schedule.stride, resident + 7 * schedule.stride + 5}
    ends = sorted({n + d for n in edges for d in (-1, 0, 1) if n + d > 0})
    return (
        [(0, 0)]
        + [(n - 1, n) for n in ends]
        + [(max(0, n - 3 * size), n) for n in ends]
    )


@pytest.mark.parametrize(
    "schedule",
    [
        EvictionSchedule(block_size=16, budget=64, stride=32),
        EvictionSchedule(block_size=16, budget=16, stride=16),
        EvictionSchedule(block_size=48, budget=144, stride=96),
    ],
    ids=["4+2 blocks of 16", "1+1 blocks of 16", "3+2 blocks of 48"],
)
def test_agrees_with_the_schedule(
    schedule: EvictionSchedule, device: torch.device
) -> None:
    steps = decode_and_prompt_steps(schedule)
    got = run(steps, schedule, live_width=32, device=device)
    for i, (before, after) in enumerate(steps):
        evicted = schedule.evicted_blocks(before)
        live_len = schedule.live_tokens(after, before)
        expected = reference.live_row(
            got["block_table"][i],
            evicted=evicted,
            live_len=live_len,
            budget_blocks=schedule.budget_blocks,
            block_size=schedule.block_size,
        )
        assert got["live_lens"][i] == live_len
        assert got["measured_lens"][i] == live_len
        assert got["evicted_before"][i] == evicted
        assert got["evicted_after"][i] == schedule.evicted_blocks(after)
        torch.testing.assert_close(got["live_table"][i, : len(expected)], expected)
        assert (got["live_table"][i, len(expected) :] == UNTOUCHED).all()


def test_rows_longer_than_one_program(device: torch.device) -> None:
    schedule = EvictionSchedule(block_size=16, budget=16 * (COLUMNS - 3), stride=16)
    before = schedule.budget + 5 * 16 + 3
    after = before + 40 * 16
    got = run([(before, after)], schedule, live_width=COLUMNS + 64, device=device)
    expected = reference.live_row(
        got["block_table"][0],
        evicted=5,
        live_len=after - 5 * 16,
        budget_blocks=schedule.budget_blocks,
        block_size=16,
    )
    assert len(expected) > COLUMNS
    torch.testing.assert_close(got["live_table"][0, : len(expected)], expected)


def test_every_row_goes_by_its_own(device: torch.device) -> None:
    """Also those that evict no more, of which nothing is measured, and padding."""
    size, generator = 16, torch.Generator().manual_seed(3)
    steps, rows = [(0, 0)], [EvictionRow(1, 1, NEVER, 0, 0, 0, 0, 0)]
    for _ in range(200):
        resident, stride, after = torch.randint(1, 12, (3,), generator=generator)
        length = int(torch.randint(1, 600, (1,), generator=generator))
        until = [0, length, int(after) * 24, NEVER][len(rows) % 4]
        before = max(0, length - int(torch.randint(1, 70, (1,), generator=generator)))
        steps.append((before, length))
        rows.append(EvictionRow(int(resident), int(stride), until, 0, 0, 0, 0, 0))
    check(steps, rows, size, device)


def check(
    steps: list[tuple[int, int]],
    rows: list[EvictionRow],
    size: int,
    device: torch.device,
) -> None:
    width = max(after for _, after in steps) // size + 2
    schedule = EvictionSchedule(block_size=size, budget=size, stride=size)
    got = run(steps, schedule, width, device, rows)
    for i, ((before, after), row) in enumerate(zip(steps, rows, strict=True)):
        schedule = row.schedule(size)
        evicted = schedule.evicted_blocks(before)
        live_len = after - evicted * size
        expected = reference.live_row(
            got["block_table"][i],
            evicted=evicted,
            live_len=live_len,
            budget_blocks=row.resident_blocks,
            block_size=size,
        )
        assert got["live_lens"][i] == live_len
        assert got["measured_lens"][i] == (live_len if row.measures(before) else 0)
        assert got["evicted_before"][i] == evicted
        assert got["evicted_after"][i] == schedule.evicted_blocks(after)
        torch.testing.assert_close(got["live_table"][i, : len(expected)], expected)
        assert (got["live_table"][i, len(expected) :] == UNTOUCHED).all()
