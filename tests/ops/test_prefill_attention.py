# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch

from tests.ops.paged_case import (
    HEADS,
    Heads,
    PagedCase,
    assert_as_good_as,
    boundary_lengths,
)
from vllm_roco.ops.prefill_attention import prefill_attention


def run(case: PagedCase, *, soft_cap: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel; return the output and the log-sum-exp."""
    num_queries, q_heads, _ = case.query.shape
    output = torch.empty_like(case.query)
    lse = torch.empty(q_heads, num_queries, device=case.query.device)
    prefill_attention(
        query=case.query,
        kv_cache=case.kv_cache,
        query_start_loc=case.query_start_loc,
        live_table=case.live_table,
        live_lens=case.live_lens,
        output=output,
        lse=lse,
        max_query_len=int(case.query_start_loc.diff().max()),
        scale=case.scale,
        soft_cap=soft_cap,
        sinks=case.sinks,
        k_scale=case.k_scale,
        v_scale=case.v_scale,
    )
    return output, lse


def check(case: PagedCase, *, soft_cap: float = 0.0) -> None:
    exact = case.expected(soft_cap=soft_cap)
    low = case.expected(soft_cap=soft_cap, dtype=case.query.dtype)
    output, lse = run(case, soft_cap=soft_cap)
    assert_as_good_as(output, exact.output, low.output)
    assert_as_good_as(lse, exact.lse, low.lse)


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_head_shapes(heads: Heads, device: torch.device) -> None:
    check(PagedCase.build([(20, 20), (5, 40), (1, 33), (0, 0)], heads, device))


@pytest.mark.parametrize("block_size", [16, 48])
def test_lengths_around_every_boundary(block_size: int, device: torch.device) -> None:
    rows = [(0, 0)]
    for length in boundary_lengths(block_size):
        rows += [(min(length, block_size + 1), length), (1, length)]
    check(PagedCase.build(rows, Heads(3, 1, 16), device, block_size=block_size))


@pytest.mark.parametrize("token_major", [True, False], ids=["LBNHC", "LBHNC"])
def test_half_precision_and_layouts(token_major: bool, device: torch.device) -> None:
    case = PagedCase.build(
        [(50, 90), (17, 17)],
        Heads(6, 3, 64),
        device,
        dtype=torch.float16,
        token_major=token_major,
    )
    check(case)


def test_soft_cap(device: torch.device) -> None:
    case = PagedCase.build([(30, 90), (17, 17)], Heads(4, 2, 32), device)
    case.scale *= 20
    check(case, soft_cap=5.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_sinks(heads: Heads, dtype: torch.dtype, device: torch.device) -> None:
    rows = [(20, 20), (5, 40), (1, 33), (0, 0)]
    case = PagedCase.build(rows, heads, device, dtype=dtype)
    case.add_sinks()
    check(case)


@pytest.mark.parametrize("sink", [1e4, -1e4])
def test_sinks_far_from_every_logit(sink: float, device: torch.device) -> None:
    case = PagedCase.build([(30, 90), (17, 17)], Heads(4, 2, 32), device)
    case.sinks = torch.full((4,), sink, device=device)
    check(case)
