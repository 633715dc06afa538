# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses

import pytest
import torch
import triton

from tests.ops.paged_case import (
    HEADS,
    Expected,
    Heads,
    PagedCase,
    boundary_lengths,
)
from vllm_roco.kv_cache import page
from vllm_roco.ops.device import H100
from vllm_roco.ops.prefill_mass import measure_prefill
from vllm_roco.ops.prefill_plan import (
    SUMS,
    PrefillPlan,
    PrefillScratch,
    plan_prefill,
)


def check(
    case: PagedCase,
    *,
    soft_cap: float = 0.0,
    plan: PrefillPlan | None = None,
    exact: Expected | None = None,
) -> None:
    exact = exact or case.expected(soft_cap=soft_cap)
    run(case, exact.lse, soft_cap=soft_cap, plan=plan)
    case.check_tails(exact)


def run(
    case: PagedCase,
    lse: torch.Tensor,
    *,
    soft_cap: float = 0.0,
    plan: PrefillPlan | None = None,
    scratch: PrefillScratch | None = None,
) -> None:
    """Run the kernel, which updates the case's statistics."""
    measure_prefill(
        query=case.query,
        kv_cache=case.kv_cache,
        lse=lse,
        query_start_loc=case.query_start_loc,
        live_table=case.live_table,
        live_lens=case.live_lens,
        evicted_before=case.evicted_before,
        statistics=case.statistics,
        max_live_tokens=case.max_live_tokens,
        plan=plan
        or plan_prefill(
            head_size=case.query.shape[2],
            block_size=case.block_size,
            dtype=case.query.dtype,
            device=H100,
        ),
        scratch=scratch or PrefillScratch.allocate(case.query.device),
        scale=case.scale,
        soft_cap=soft_cap,
        k_scale=case.k_scale,
    )


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_head_shapes(heads: Heads, device: torch.device) -> None:
    check(PagedCase.build([(40, 40), (5, 70), (1, 33), (0, 0)], heads, device))


@pytest.mark.parametrize("splits", [1, 3])
def test_queries_that_are_no_numbers_are_counted_alone(
    splits: int, device: torch.device
) -> None:
    """See `tests/policy/test_statistics.py`; other rows' blocks are as always."""
    case = PagedCase.build([(40, 70), (17, 33)], Heads(4, 2, 16), device)
    case.query[:40] = torch.nan
    plan = PrefillPlan(rows=16, columns=16, num_warps=4, num_stages=2, splits=splits)
    check(case, plan=plan)
    of_row = case.live_table[0, :5].long()
    assert case.statistics[of_row].isfinite().all()


@pytest.mark.parametrize("block_size", [16, 32, 48, 64, 128])
def test_lengths_around_every_boundary(block_size: int, device: torch.device) -> None:
    """A whole prompt, its last chunk, and a prompt of one token."""
    rows = [(0, 0)]
    for length in boundary_lengths(block_size):
        rows += [(length, length), (min(length, block_size + 1), length), (1, length)]
    # large tiles: the interpreter takes its time by the program, not by the number
    plan = PrefillPlan(rows=128, columns=128, num_warps=4, num_stages=2)
    case = PagedCase.build(rows, Heads(3, 1, 16), device, block_size=block_size)
    check(case, plan=plan)


@pytest.mark.parametrize("token_major", [True, False], ids=["LBNHC", "LBHNC"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_layouts_and_dtypes(
    token_major: bool, dtype: torch.dtype, device: torch.device
) -> None:
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 as integers")
    case = PagedCase.build(
        [(90, 150), (17, 17)],
        Heads(6, 3, 64),
        device,
        dtype=dtype,
        token_major=token_major,
    )
    check(case)


def test_soft_cap(device: torch.device) -> None:
    case = PagedCase.build([(30, 90), (17, 17)], Heads(4, 2, 32), device)
    case.scale *= 20
    check(case, soft_cap=5.0)


@pytest.mark.parametrize("rows", [16, 128])
@pytest.mark.parametrize("columns", [16, 64])
def test_tiles(rows: int, columns: int, device: torch.device) -> None:
    plan = PrefillPlan(rows=rows, columns=columns, num_warps=4, num_stages=2)
    case = PagedCase.build([(70, 150), (17, 17)], Heads(6, 2, 32), device)
    check(case, plan=plan)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("block_size", [16, 48, 64, 128, 256, 512])
@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
@pytest.mark.parametrize("shared_memory", [99 * 1024, H100.shared_memory])
def test_plan_fits_the_device(
    head_size: int, block_size: int, dtype: torch.dtype, shared_memory: int
) -> None:
    """Blocks were no part of it.

    With 128 tokens and float32 heads of 256 the kernel wants 160 KiB where there are
    99, which the compiler refuses at the first prompt.
    """
    device = dataclasses.replace(H100, shared_memory=shared_memory)
    row_bytes = triton.next_power_of_2(head_size) * dtype.itemsize
    arguments = dict(
        head_size=head_size, block_size=block_size, dtype=dtype, device=device
    )
    block_padded = triton.next_power_of_2(block_size)
    if (block_padded + 16) * row_bytes > shared_memory:
        with pytest.raises(NotImplementedError, match=f"block_size = {block_size} is"):
            plan_prefill(**arguments)
        return
    plan = plan_prefill(**arguments)
    # tiles of queries, and the keys of a block or more
    columns = max(plan.columns, block_padded)
    used = (plan.rows * plan.num_stages + columns) * row_bytes
    assert used <= shared_memory
    assert plan.rows in (16, 32, 64)


def test_sinks_are_in_the_log_sum_exp(device: torch.device) -> None:
    case = PagedCase.build([(30, 90), (17, 17)], Heads(6, 2, 32), device)
    case.add_sinks()
    check(case)


@pytest.mark.parametrize("splits", [2, 3, 8])
def test_programs_share_the_queries_of_a_run(splits: int, device: torch.device) -> None:
    """Also of runs that fewer tiles of queries see than there are programs."""
    rows = [(70, 150), (17, 17), (1, 40), (0, 0), (130, 130)]
    plan = PrefillPlan(rows=16, columns=32, num_warps=4, num_stages=2, splits=splits)
    scratch = PrefillScratch.allocate(device)
    scratch.sums.fill_(torch.nan)
    # the second launch finds what the first one left
    for _ in range(2):
        case = PagedCase.build(rows, Heads(6, 2, 32), device)
        exact = case.expected()
        run(case, exact.lse, plan=plan, scratch=scratch)
        case.check_tails(exact)
        assert not scratch.arrivals.any()
    # every share of a run that is there has a place of its own
    live_runs = 2 * sum(-(-length // 32) for _, length in rows)
    numbers = live_runs * splits * SUMS * plan.blocks(case.block_size)
    assert int(scratch.sums.isfinite().sum()) == numbers


def test_whoever_comes_last_adds_up(device: torch.device) -> None:
    """And not the last share: that of the first queries may take longer."""
    if device.type != "cpu":
        pytest.skip("only Triton's interpreter runs programs in their order")
    case = PagedCase.build([(32, 48)], Heads(2, 1, 32), device)
    plan = PrefillPlan(rows=16, columns=16, num_warps=4, num_stages=2, splits=2)
    scratch = PrefillScratch.allocate(device)
    # as if the second share of each block had come, of queries that look at nothing
    scratch.sums.zero_()
    scratch.arrivals[:3] = 1
    blocks = case.live_table[0, :3].long()
    before = case.statistics[blocks, 0, page.MASS_SUM]
    run(case, case.expected().lse, plan=plan, scratch=scratch)
    after = case.statistics[blocks, 0, page.MASS_SUM]
    # the first share is of 16 queries, which see the last block's tokens not yet
    added = after[0] - before[0] + after[1]
    torch.testing.assert_close(float(added), 16.0, rtol=1e-5, atol=0)
    assert after[2] == 0


LONE = dict(
    num_rows=1,
    num_q_heads=32,
    num_kv_heads=8,
    block_size=16,
    max_query_len=1024,
    max_live_tokens=3328,
)
"""A chunk of a prompt that evicts, of Llama-3.1-8B."""


@pytest.mark.parametrize(
    ("step", "splits"),
    [
        (LONE, 1),
        # a quarter of the heads, as on four tensor ranks
        (LONE | dict(num_q_heads=8, num_kv_heads=2), 4),
        (LONE | dict(num_q_heads=28, num_kv_heads=4), 2),
        # enough programs, of which some have four times as much to do
        (LONE | dict(num_rows=2, max_query_len=4096, max_live_tokens=4096), 4),
        # of three that are wanted four, of five that there is room for as many
        (LONE | dict(max_query_len=3072), 4),
        (LONE | dict(num_kv_heads=4, num_rows=6, max_query_len=8192), 4),
        # a tile has one program
        (LONE | dict(num_kv_heads=1, max_query_len=64), 1),
        # no room to tell each other more
        (LONE | dict(num_rows=64, max_query_len=65536), 1),
    ],
)
def test_splits_of_a_step(step: dict[str, int], splits: int) -> None:
    plan = plan_prefill(
        head_size=128, block_size=16, dtype=torch.bfloat16, device=H100
    ).for_step(**step)
    assert plan.splits == splits


@pytest.mark.parametrize("block_size", [16, 48, 128])
@pytest.mark.parametrize("num_runs", [1, 208, 2048, 2049, 2600, 100_000])
def test_shares_have_room(num_runs: int, block_size: int) -> None:
    plan = plan_prefill(
        head_size=128, block_size=block_size, dtype=torch.bfloat16, device=H100
    )
    most = plan.most_splits(num_runs, block_size)
    scratch = PrefillScratch.allocate(torch.device("cpu"))
    if num_runs > scratch.arrivals.numel():
        assert most == 1
        return
    numbers = num_runs * SUMS * plan.blocks(block_size)
    assert most > 1
    assert most.bit_count() == 1
    assert numbers * most <= scratch.sums.numel() < numbers * 2 * most
