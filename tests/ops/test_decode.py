# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses

import pytest
import torch
import triton

from tests.ops.paged_case import (
    HEADS,
    Heads,
    PagedCase,
    assert_as_good_as,
    boundary_lengths,
)
from vllm_roco.kv_cache import page
from vllm_roco.ops.decode.attention import decode_attention
from vllm_roco.ops.decode.plan import (
    DecodePlan,
    DecodeScratch,
    DecodeScratchSize,
    plan_decode,
)
from vllm_roco.ops.decode.splits import DecodeSplits
from vllm_roco.ops.device import H100, Device

SMALL = Device(num_multiprocessors=58, capability=(8, 9), shared_memory=99 * 1024)
TINY = Device(num_multiprocessors=40, capability=(7, 5), shared_memory=64 * 1024)
PLAN = DecodePlan(
    tile=32,
    splits=3,
    num_warps=4,
    num_stages=2,
    dependent_launch=False,
    shares=12,
    least_tokens=32,
)


def build(
    lengths: list[int],
    heads: Heads,
    device: torch.device,
    *,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    token_major: bool = False,
) -> PagedCase:
    """Build a batch with one query a row; a row of length 0 is padding."""
    return PagedCase.build(
        [(1, length) for length in lengths],
        heads,
        device,
        block_size=block_size,
        dtype=dtype,
        token_major=token_major,
    )


def scratch_for(
    case: PagedCase,
    plan: DecodePlan,
    *,
    measure: bool = True,
    max_measured_tokens: int | None = None,
) -> DecodeScratch:
    """Allocate what a launch's programs leave for each other."""
    rows, q_heads, head_size = case.query.shape
    size = DecodeScratchSize.of(
        plans=[(rows, plan)],
        num_q_heads=q_heads,
        head_size=head_size,
        block_size=case.block_size,
        max_live_tokens=max_measured_tokens or case.max_live_tokens,
        measure=measure,
    )
    return DecodeScratch.allocate(size, case.query.device)


def run(
    case: PagedCase,
    plan: DecodePlan,
    *,
    measure: bool = True,
    soft_cap: float = 0.0,
    measured_lens: torch.Tensor | None = None,
    max_measured_tokens: int | None = None,
    splits: DecodeSplits | None = None,
    scratch: DecodeScratch | None = None,
) -> torch.Tensor:
    """Run the kernels, which update the case's statistics; return the output."""
    output = torch.empty_like(case.query)
    if splits is None:
        (rows,), (_, kv_heads, *_) = case.live_lens.shape, case.kv_cache.shape
        splits = DecodeSplits.allocate([(rows, plan)], kv_heads, output.device)
        splits.deal(case.live_lens, plan)
    if scratch is None:
        scratch = scratch_for(
            case, plan, measure=measure, max_measured_tokens=max_measured_tokens
        )
    decode_attention(
        query=case.query,
        kv_cache=case.kv_cache,
        live_table=case.live_table,
        live_lens=case.live_lens,
        splits=splits,
        measured_lens=case.live_lens if measured_lens is None else measured_lens,
        evicted_before=case.evicted_before,
        statistics=case.statistics if measure else None,
        output=output,
        scratch=scratch,
        plan=plan,
        scale=case.scale,
        soft_cap=soft_cap,
        sinks=case.sinks,
        k_scale=case.k_scale,
        v_scale=case.v_scale,
    )
    return output


def check(case: PagedCase, plan: DecodePlan, *, soft_cap: float = 0.0) -> None:
    exact = case.expected(soft_cap=soft_cap)
    low = case.expected(soft_cap=soft_cap, dtype=case.query.dtype)
    output = run(case, plan, soft_cap=soft_cap)
    assert output.isfinite().all()
    assert_as_good_as(output, exact.output, low.output)
    case.check_tails(exact)


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_head_shapes(heads: Heads, device: torch.device) -> None:
    check(build([1, 70, 33, 0], heads, device), PLAN)


@pytest.mark.parametrize("splits", [1, 3])
def test_a_query_that_is_no_number_is_counted_alone(
    splits: int, device: torch.device
) -> None:
    """See `tests/policy/test_statistics.py`; other rows' blocks are as always."""
    case = build([70, 33], Heads(4, 2, 16), device)
    case.query[0, 1] = torch.nan
    exact = case.expected()
    run(case, dataclasses.replace(PLAN, splits=splits))
    case.check_tails(exact)
    of_row = case.live_table[0, :5].long()
    assert case.statistics[of_row].isfinite().all()


@pytest.mark.parametrize(
    ("block_size", "splits"),
    [(16, 1), (16, 2), (16, 5), (32, 2), (48, 1), (48, 5), (64, 2), (128, 1), (128, 5)],
)
def test_lengths_around_every_boundary(
    block_size: int, splits: int, device: torch.device
) -> None:
    plan = dataclasses.replace(PLAN, splits=splits)
    lengths = [0, *boundary_lengths(block_size), 0]
    check(build(lengths, Heads(3, 1, 16), device, block_size=block_size), plan)


@pytest.mark.parametrize("tile", [16, 64, 128])
def test_tiles(tile: int, device: torch.device) -> None:
    """A block may span tiles, and a tile blocks."""
    plan = dataclasses.replace(PLAN, tile=tile, least_tokens=tile)
    check(build([150, 64, 1], Heads(4, 2, 32), device, block_size=32), plan)


@pytest.mark.parametrize("token_major", [True, False], ids=["LBNHC", "LBHNC"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_layouts_and_dtypes(
    token_major: bool, dtype: torch.dtype, device: torch.device
) -> None:
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 as integers")
    case = build(
        [90, 17, 1, 0], Heads(6, 3, 64), device, dtype=dtype, token_major=token_major
    )
    check(case, PLAN)


def test_soft_cap(device: torch.device) -> None:
    case = build([90, 17], Heads(4, 2, 32), device)
    case.scale *= 20
    check(case, PLAN, soft_cap=5.0)


def test_soft_cap_far_beyond_its_bound(device: torch.device) -> None:
    case = build([40], Heads(2, 1, 32), device)
    case.scale *= 1e4
    check(case, PLAN, soft_cap=0.5)


@pytest.mark.parametrize("splits", [1, 5])
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_sinks(heads: Heads, splits: int, device: torch.device) -> None:
    """Once a head, whatever the number of splits, and of a row's splits with a tile."""
    case = build([1, 150, 33, 0], heads, device)
    case.add_sinks()
    check(case, dataclasses.replace(PLAN, splits=splits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sinks_of_half_precision_and_a_soft_cap(
    dtype: torch.dtype, device: torch.device
) -> None:
    """The soft cap is not for sinks."""
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 as integers")
    case = build([90, 17, 1, 0], Heads(6, 3, 64), device, dtype=dtype)
    case.scale *= 20
    case.add_sinks()
    check(case, PLAN, soft_cap=5.0)


@pytest.mark.parametrize("splits", [1, 3])
def test_sinks_without_statistics(splits: int, device: torch.device) -> None:
    case = build([90, 17, 0], Heads(4, 2, 32), device)
    without = run(case, PLAN, measure=False)
    case.add_sinks()
    output = run(case, dataclasses.replace(PLAN, splits=splits), measure=False)
    exact = case.expected().output
    torch.testing.assert_close(output, exact)
    # a kernel that knows nothing of them is far off
    assert (without - exact).abs().max() > 0.1


def test_sinks_far_from_every_logit(device: torch.device) -> None:
    """2^(sink - logit) overflows, and so does 2^(logit - sink)."""
    for sink in (1e4, -1e4):
        case = build([90, 17, 0], Heads(4, 2, 32), device)
        case.sinks = torch.full((4,), sink, device=device)
        check(case, PLAN)


def test_without_statistics(device: torch.device) -> None:
    case = build([90, 17, 0], Heads(4, 2, 32), device)
    exact = case.expected()
    before = page.page_view(case.kv_cache).clone()
    output = run(case, PLAN, measure=False)
    torch.testing.assert_close(output, exact.output)
    after = page.page_view(case.kv_cache)
    torch.testing.assert_close(after, before, equal_nan=True, rtol=0, atol=0)


def test_masses_of_a_step_add_up_to_one(device: torch.device) -> None:
    case = build([130], Heads(8, 2, 32), device)
    blocks = case.live_table[0, :9].long()
    case.statistics[blocks] = 0
    run(case, PLAN)
    total = case.statistics[blocks, :, page.MASS_SUM].sum(0)
    torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("rows", [1, 8, 300])
@pytest.mark.parametrize("head_size", [64, 80, 256])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("device", [H100, SMALL, TINY], ids=["H100", "99", "64 KiB"])
def test_plan_fits_the_device(
    rows: int, head_size: int, dtype: torch.dtype, device: Device
) -> None:
    tokens = 2304
    plan = plan_decode(
        num_rows=rows,
        num_kv_heads=8,
        head_size=head_size,
        max_live_tokens=tokens,
        dtype=dtype,
        device=device,
    )
    tile_bytes = plan.tile * 2 * triton.next_power_of_2(head_size) * dtype.itemsize
    assert tile_bytes * plan.num_stages <= device.shared_memory
    assert plan.tile in (16, 32, 64, 128)
    # no program without a tile of its own
    assert plan.splits * plan.tile <= tokens
    programs = 8 * plan.shares
    assert programs <= (4 if plan.merged_apart else 3) * device.num_multiprocessors
    assert plan.dependent_launch == (device is H100)


@pytest.mark.parametrize("rows", [8, 64, 256])
def test_an_fp8_cache_is_read_three_tiles_at_a_time(rows: int) -> None:
    """A tile of bytes is half as long to wait for, so more of them are under way."""
    plan = plan_decode(
        num_rows=rows,
        num_kv_heads=8,
        head_size=128,
        max_live_tokens=2048,
        dtype=torch.uint8,
        device=H100,
    )
    assert (plan.tile, plan.num_stages) == (128, 3)


def test_the_keys_of_a_long_row_are_split_alike_at_every_element_type() -> None:
    """Of a byte each they take as long to work on: one program for two was slower."""
    splits = {
        dtype: plan_decode(
            num_rows=16,
            num_kv_heads=3,
            head_size=64,
            max_live_tokens=16384,
            dtype=dtype,
            device=H100,
        ).splits
        for dtype in (torch.uint8, torch.bfloat16)
    }
    assert splits[torch.uint8] == splits[torch.bfloat16] > 2


@pytest.mark.parametrize("splits", [1, 4])
def test_rows_that_are_not_measured_may_be_longer_than_the_scratch(
    splits: int, device: torch.device
) -> None:
    """Their sums would lie in those of the next rows."""
    lengths = [40, 700, 33, 900, 48]
    case = build(lengths, Heads(4, 2, 32), device)
    exact = case.expected()
    before = case.statistics.clone()
    is_measured = torch.tensor([length < 100 for length in lengths], device=device)
    output = run(
        case,
        dataclasses.replace(PLAN, tile=16, splits=splits),
        measured_lens=case.live_lens * is_measured.int(),
        max_measured_tokens=48,
    )
    assert_as_good_as(output, exact.output, exact.output)
    for row, length in enumerate(lengths):
        blocks = case.live_table[row, : -(-length // case.block_size)].long()
        expected = (exact.statistics if is_measured[row] else before)[blocks]
        found = case.statistics[blocks]
        torch.testing.assert_close(found, expected, equal_nan=True)
