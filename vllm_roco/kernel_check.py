# SPDX-License-Identifier: Apache-2.0
"""Runs each Triton kernel once on this machine and compares it with PyTorch.

A quick check of an installation, for `vllm_roco.verify`; the kernels' own tests look at
every shape and boundary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from vllm_roco import fp8_cache, policy, reference
from vllm_roco.config import RocoConfig
from vllm_roco.kv_cache import page
from vllm_roco.ops.decode.attention import decode_attention
from vllm_roco.ops.decode.plan import DecodePlan, DecodeScratch, DecodeScratchSize
from vllm_roco.ops.decode.splits import DecodeSplits
from vllm_roco.ops.device import H100, Device
from vllm_roco.ops.live_table import build_live_table
from vllm_roco.ops.move_blocks import first_pages, move_blocks
from vllm_roco.ops.prefill_attention import prefill_attention
from vllm_roco.ops.prefill_mass import measure_prefill
from vllm_roco.ops.prefill_plan import PrefillScratch, plan_prefill
from vllm_roco.ops.score_blocks import SCORES, first_statistics
from vllm_roco.ops.select_victims import select_victims
from vllm_roco.request_options.planner import RequestPlanner

BLOCK_SIZE = 16
NUM_KV_HEADS = 2
GROUP = 4
HEAD_SIZE = 64
WIDTH = 12
"""Blocks of a row."""
SCALE = HEAD_SIZE**-0.5

Scales = tuple[torch.Tensor, torch.Tensor]
"""Of the keys and of the values of an fp8 cache."""


def check_live_table(device: torch.device, dtype: torch.dtype) -> None:
    """Raise AssertionError unless the live table leaves out what was evicted."""
    config = RocoConfig(budget=4 * BLOCK_SIZE, stride=2 * BLOCK_SIZE)
    how = RequestPlanner(config, BLOCK_SIZE).plan(None, 1).row
    budget_blocks, evicted = how.resident_blocks, 4
    num_tokens = (budget_blocks + evicted + 1) * BLOCK_SIZE + 3
    row = _int32(torch.randperm(WIDTH), device)
    buffers = {
        name: _int32([0], device)
        for name in ("live_lens", "measured_lens", "evicted_before", "evicted_after")
    }
    live_table = torch.zeros_like(row)[None]
    build_live_table(
        block_table=row[None],
        seq_lens=_int32([num_tokens], device),
        query_start_loc=_int32([0, 1], device),
        rows=_int32([how], device),
        live_table=live_table,
        block_size=BLOCK_SIZE,
        **buffers,
    )
    length = num_tokens - evicted * BLOCK_SIZE
    expected = reference.live_row(
        row,
        evicted=evicted,
        live_len=length,
        budget_blocks=budget_blocks,
        block_size=BLOCK_SIZE,
    )
    assert buffers["live_lens"].item() == length
    assert buffers["measured_lens"].item() == length
    assert buffers["evicted_before"].item() == evicted
    assert torch.equal(live_table[0, : len(expected)], expected)


def check_decode(
    device: torch.device, dtype: torch.dtype, *, in_fp8: bool = False
) -> None:
    """Raise AssertionError unless decode attends and measures as PyTorch does."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9,)
    for splits in (1, 3):
        cache, table = _cache(device, dtype, WIDTH), _int32([range(WIDTH)], device)
        scales = None
        if in_fp8:
            cache, scales = _in_fp8(cache)
        k_scale, v_scale = scales or (None, None)
        query = _randn((1, GROUP * NUM_KV_HEADS, HEAD_SIZE), device, dtype)
        # the newest token begins a block
        length = (WIDTH - 1) * BLOCK_SIZE + 1
        statistics = page.statistics_view(cache)
        output = torch.empty_like(query)
        plan = DecodePlan(
            tile=32,
            splits=splits,
            num_warps=4,
            num_stages=2,
            dependent_launch=hopper,
            shares=3,
            least_tokens=32,
        )
        live_lens = _int32([length], device)
        dealt = DecodeSplits.allocate([(1, plan)], NUM_KV_HEADS, device)
        dealt.deal(live_lens, plan)
        decode_attention(
            query=query,
            kv_cache=cache,
            live_table=table,
            live_lens=live_lens,
            splits=dealt,
            measured_lens=live_lens,
            evicted_before=_int32([0], device),
            statistics=statistics,
            output=output,
            scratch=DecodeScratch.allocate(
                DecodeScratchSize.of(
                    plans=[(1, plan)],
                    num_q_heads=GROUP * NUM_KV_HEADS,
                    head_size=HEAD_SIZE,
                    block_size=BLOCK_SIZE,
                    max_live_tokens=WIDTH * BLOCK_SIZE,
                    measure=True,
                ),
                device,
            ),
            plan=plan,
            scale=SCALE,
            k_scale=k_scale,
            v_scale=v_scale,
        )
        _assert_step(query, cache, table[0], length, output, scales)


def check_prefill(
    device: torch.device, dtype: torch.dtype, *, in_fp8: bool = False
) -> None:
    """Raise AssertionError unless prompts are attended and measured as by PyTorch."""
    cache, table = _cache(device, dtype, WIDTH), _int32([range(WIDTH)], device)
    scales = None
    if in_fp8:
        cache, scales = _in_fp8(cache)
    k_scale, v_scale = scales or (None, None)
    plan = plan_prefill(
        head_size=HEAD_SIZE,
        block_size=BLOCK_SIZE,
        dtype=dtype,
        device=Device.of(device) if device.type == "cuda" else H100,
    )
    # tiles of queries for two programs, the last of them not full
    query_len, length = 2 * plan.rows + 5, WIDTH * BLOCK_SIZE - 5
    query = _randn((query_len, GROUP * NUM_KV_HEADS, HEAD_SIZE), device, dtype)
    output = torch.empty_like(query)
    lse = torch.empty(query.shape[1], query_len, device=device)
    prefill_attention(
        query=query,
        kv_cache=cache,
        query_start_loc=_int32([0, query_len], device),
        live_table=table,
        live_lens=_int32([length], device),
        output=output,
        lse=lse,
        max_query_len=query_len,
        scale=SCALE,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    scratch = PrefillScratch.allocate(device)
    statistics = page.statistics_view(cache)
    before = statistics.clone()
    for splits in (1, 2):
        statistics.copy_(before)
        measure_prefill(
            query=query,
            kv_cache=cache,
            lse=lse,
            query_start_loc=_int32([0, query_len], device),
            live_table=table,
            live_lens=_int32([length], device),
            evicted_before=_int32([0], device),
            statistics=statistics,
            max_live_tokens=length,
            plan=replace(plan, splits=splits),
            scratch=scratch,
            scale=SCALE,
            k_scale=k_scale,
        )
        _assert_step(query, cache, table[0], length, output, scales)


def check_eviction(device: torch.device, dtype: torch.dtype) -> None:
    """Raise AssertionError unless victims and moved pages are the policy's."""
    config = RocoConfig(budget=8 * BLOCK_SIZE, stride=4 * BLOCK_SIZE)
    how = RequestPlanner(config, BLOCK_SIZE).plan(None, 1).row
    budget_blocks, num_victims = how.resident_blocks, 4
    num_tokens = WIDTH * BLOCK_SIZE
    table = _int32([torch.randperm(WIDTH).tolist()], device)
    blocks = table[0].long()
    caches = [_cache(device, dtype, WIDTH) for _ in range(3)]
    views = [page.statistics_view(cache) for cache in caches]
    first = torch.arange(WIDTH, device=device, dtype=torch.float32) * BLOCK_SIZE
    for cache, view in zip(caches, views, strict=True):
        view.copy_(_randn(tuple(view.shape), device, torch.float32).abs())
        view[blocks, :, page.NUM_QUERIES] = (num_tokens - first)[:, None]
        page.first_positions_view(cache)[blocks] = first
    moves = policy.plan_moves(
        policy.select_victims(
            torch.stack([view[blocks] for view in views]).transpose(1, 2),
            first,
            num_tokens,
            num_victims,
            BLOCK_SIZE,
            how,
            torch.stack(
                [
                    policy.value_distances(
                        cache[blocks].transpose(0, 1).float().chunk(2, -1)[1]
                    )
                    for cache in caches
                ]
            ),
        ),
        budget_blocks,
    )
    expected = [page.page_view(cache).clone() for cache in caches]
    for source, destination in moves:
        for pages in expected:
            pages[blocks[destination]] = pages[blocks[source]]

    page_bytes = caches[0].stride(0) * caches[0].element_size()
    chosen = _int32([[[0, 0]] * budget_blocks], device)
    num_moves = _int32([0], device)
    select_victims(
        first_page_of_layer=first_pages(caches),
        first_statistics_of_layer=first_statistics(views),
        page_bytes=page_bytes,
        num_kv_heads=NUM_KV_HEADS,
        head_size=HEAD_SIZE,
        dtype=dtype,
        seq_lens=_int32([num_tokens], device),
        live_table=table,
        evicted_before=_int32([0], device),
        evicted_after=_int32([num_victims], device),
        rows=_int32([how], device),
        scores=torch.zeros(1, len(caches), SCORES, WIDTH, device=device),
        moves=chosen,
        num_moves=num_moves,
        moved=torch.zeros(1, dtype=torch.int64, device=device),
        block_size=BLOCK_SIZE,
    )
    move_blocks(
        first_page_of_layer=first_pages(caches),
        moves=chosen,
        num_moves=num_moves,
        page_bytes=page_bytes,
    )
    for cache, pages in zip(caches, expected, strict=True):
        found = page.page_view(cache)
        assert torch.equal(found.view(torch.uint8), pages.view(torch.uint8))


CHECKS: dict[str, Callable[[torch.device, torch.dtype], None]] = {
    "live table": check_live_table,
    "decode": check_decode,
    "prefill": check_prefill,
    "decode, fp8 cache": partial(check_decode, in_fp8=True),
    "prefill, fp8 cache": partial(check_prefill, in_fp8=True),
    "eviction": check_eviction,
}
"""Name to a function of device and element type that raises AssertionError."""


def _assert_step(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    blocks: torch.Tensor,
    length: int,
    output: torch.Tensor,
    scales: Scales | None,
) -> None:
    """Compare one sequence's first step with float32, by the error of the dtype."""
    states = kv_cache
    if scales is not None:
        states = fp8_cache.states_from_bytes(kv_cache, *scales)
    exact, low = (
        reference.attend(
            query=query,
            kv_cache=states,
            blocks=blocks,
            live_len=length,
            scale=SCALE,
            dtype=dtype,
        )
        for dtype in (torch.float32, query.dtype)
    )
    error = float((output.float() - exact.output).abs().max())
    allowed = 2 * float((low.output.float() - exact.output).abs().max()) + 1e-5
    assert error <= allowed, f"the output errs by {error:.1e}, allowed {allowed:.1e}"
    found = page.statistics_view(kv_cache), page.first_positions_view(kv_cache)
    statistics, first_positions = map(torch.zeros_like, found)
    reference.update_statistics(
        statistics=statistics,
        first_positions=first_positions,
        blocks=blocks,
        mass=exact.mass,
        live_len=length,
        evicted=0,
        block_size=BLOCK_SIZE,
    )
    torch.testing.assert_close(found[0], statistics, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], first_positions, rtol=0, atol=0)


def _cache(device: torch.device, dtype: torch.dtype, num_blocks: int) -> torch.Tensor:
    cache = _pages(device, dtype, num_blocks)
    cache.copy_(_randn(tuple(cache.shape), device, dtype))
    return cache


def _pages(device: torch.device, dtype: torch.dtype, num_blocks: int) -> torch.Tensor:
    cache = reference.paged_cache(
        num_blocks=num_blocks,
        num_kv_heads=NUM_KV_HEADS,
        block_size=BLOCK_SIZE,
        head_size=HEAD_SIZE,
        dtype=dtype,
        device=device,
    )
    page.page_view(cache).zero_()
    return cache


def _in_fp8(cache: torch.Tensor) -> tuple[torch.Tensor, Scales]:
    """Return keys and values as bytes, with scales for each kv head, and the scales."""
    heads = 1.0 + torch.arange(NUM_KV_HEADS, device=cache.device)
    scales = 0.03 * heads, 0.7 / heads
    content = _pages(cache.device, torch.uint8, len(cache))
    parts = zip(cache.chunk(2, -1), scales, strict=True)
    content.copy_(
        torch.cat(
            [fp8_cache.to_bytes(part, scale.view(-1, 1, 1)) for part, scale in parts],
            -1,
        )
    )
    return content, scales


def _randn(
    shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    return torch.randn(shape, device=device).to(dtype)


def _int32(values: object, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.int32, device=device)
