# SPDX-License-Identifier: Apache-2.0
"""The attention mass that a prompt's queries give to every live block.

Attention itself is FlashAttention's, which keeps no weights. From its log-sum-exp the
weights are recomputed here, summed over the tokens of each block, averaged over the
query heads of a group and only then squared. A program owns a run of blocks of one
(row, kv head) and goes through the row's queries in order, or through its share of
them; whoever is done last adds the shares up, in their order. So each block has one
writer, and a step has the same sums in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from vllm.utils.math_utils import next_power_of_2

from vllm_roco.ops.fp8 import load_scale, scale_stride, unpack
from vllm_roco.ops.launch import Launch, Launcher
from vllm_roco.ops.logits import LOG2_E, cap_logits, logit_scale
from vllm_roco.ops.prefill_plan import SUMS, PrefillPlan, PrefillScratch
from vllm_roco.ops.statistics import read_statistics, write_statistics

# of a tensor core's product a thread holds rows r and r + 8 of every 16, and four
# threads share a row's columns, two adjacent ones each
HALF = tl.constexpr(8)
LANES = tl.constexpr(4)
NUM_SUMS = tl.constexpr(SUMS)


@triton.jit
def _weights_of_tile(
    query_ptr,  # [num_queries, num_q_heads, head_size]
    lse_ptr,  # [num_q_heads, num_queries] float32, natural logarithm
    keys,  # [COLUMNS, HEAD_PADDED]
    token,  # [COLUMNS], places in the row; past its end for idle columns
    start,  # first query of the tile, counted in the row
    head,
    query_start,
    query_len,
    length,
    logit_scale,
    soft_cap,
    stride_query_token,
    stride_query_head,
    stride_lse_head,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Return `[ROWS, COLUMNS]`, what one query head's queries give to every token."""
    row = tl.arange(0, ROWS)
    dim = tl.arange(0, HEAD_PADDED)
    number = start + row
    valid = number < query_len
    first_token = (query_start + start).to(tl.int64)
    query_ptr += first_token * stride_query_token + head * stride_query_head
    # [ROWS, HEAD_PADDED]
    query = tl.load(
        query_ptr + (row * stride_query_token)[:, None] + dim[None, :],
        mask=valid[:, None] & (dim < HEAD_SIZE)[None, :],
        other=0.0,
    )
    # rows that are no query's weigh 2^-inf
    lse_ptr += head * stride_lse_head + first_token
    lse = tl.load(lse_ptr + row, mask=valid, other=float("inf"))
    logits = tl.dot(query, tl.trans(keys), input_precision="ieee") * logit_scale
    if SOFT_CAP:
        logits = cap_logits(logits, soft_cap)
    weights = tl.exp2(logits - (lse * LOG2_E)[:, None])
    if MASKED:
        position = length - query_len + number
        weights = tl.where(token[None, :] <= position[:, None], weights, 0.0)
    return weights


@triton.jit
def _by_lane(
    weights,  # [ROWS, BLOCKS * BLOCK_PADDED]
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_PADDED: tl.constexpr,
):
    """Return `[ROWS, BLOCKS, LANES]`, blocks summed up as far as a thread can alone.

    Tensor cores leave a row's columns to four threads, which take turns two at a time.
    """
    PAIR: tl.constexpr = 2
    turns = tl.reshape(
        weights, [ROWS, BLOCKS, BLOCK_PADDED // (LANES * PAIR), LANES, PAIR]
    )
    return tl.sum(tl.sum(turns, 4), 2)


@triton.jit
def _shared(
    sums_ptr,  # [num_runs, splits, NUM_SUMS, BLOCKS] float32
    arrivals_ptr,  # [num_runs] int32
    run,
    split,
    splits,
    mass,  # [BLOCKS] float32, over this program's queries
    squares,  # [BLOCKS] float32, likewise
    peak,  # [BLOCKS] float32, likewise
    BLOCKS: tl.constexpr,
):
    """Leave a share of a run's sums, and return those of all if it is the last one.

    Returns:
        Whether it is, and mass, squares and peak over the queries of all shares.
    """
    place = tl.arange(0, BLOCKS)
    sums_ptr += run * splits * NUM_SUMS * BLOCKS
    mine = sums_ptr + split * NUM_SUMS * BLOCKS + place
    tl.store(mine, mass)
    tl.store(mine + BLOCKS, squares)
    tl.store(mine + 2 * BLOCKS, peak)
    # all threads have stored before one of them tells the other programs
    tl.debug_barrier()
    arrived = tl.atomic_add(arrivals_ptr + run, 1, sem="acq_rel")
    is_last = arrived == splits - 1
    if is_last:
        tl.store(arrivals_ptr + run, 0)
        mass = tl.zeros([BLOCKS], tl.float32)
        squares = tl.zeros([BLOCKS], tl.float32)
        peak = tl.zeros([BLOCKS], tl.float32)
        for other in range(splits):
            share = sums_ptr + other * NUM_SUMS * BLOCKS + place
            mass += tl.load(share, cache_modifier=".cg")
            squares += tl.load(share + BLOCKS, cache_modifier=".cg")
            largest = tl.load(share + 2 * BLOCKS, cache_modifier=".cg")
            peak = tl.maximum(peak, largest)
    return is_last, mass, squares, peak


# the rows of prompts lie behind those of decodes, at addresses of all kinds
@triton.jit(
    do_not_specialize=["splits", "stride_table_row", "stride_lse_head"],
    do_not_specialize_on_alignment=[
        "query_start_loc_ptr",
        "live_table_ptr",
        "live_lens_ptr",
        "evicted_before_ptr",
    ],
)
def _prefill_mass_kernel(
    query_ptr,  # [num_queries, num_q_heads, head_size]
    kv_cache_ptr,  # [num_blocks, num_kv_heads, block_size, 2 * head_size]
    k_scale_ptr,  # [1] or [num_kv_heads] float32, with FP8
    lse_ptr,  # [num_q_heads, num_queries] float32, natural logarithm
    query_start_loc_ptr,  # [num_rows + 1] int32
    live_table_ptr,  # [num_rows, live_width] int32
    live_lens_ptr,  # [num_rows] int32
    evicted_before_ptr,  # [num_rows] int32
    statistics_ptr,  # [num_blocks, num_kv_heads + 1, NUM_FIELDS] float32
    # runs are those of the longest row
    sums_ptr,  # [num_rows, num_kv_heads, runs, splits, NUM_SUMS, BLOCKS] float32
    arrivals_ptr,  # [num_rows, num_kv_heads, runs] int32, 0 between launches
    splits,
    logit_scale,  # softmax scale * log2(e), without soft cap: else the softmax scale
    soft_cap,
    stride_query_token,
    stride_query_head,
    stride_cache_block,
    stride_cache_head,
    stride_cache_token,
    stride_k_scale,
    stride_lse_head,
    stride_table_row,
    stride_statistics_block,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_PADDED: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    FP8: tl.constexpr,
):
    kv_head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1) % splits
    run = tl.program_id(1) // splits
    first_index = run * BLOCKS
    row = tl.program_id(2).to(tl.int64)

    length = tl.load(live_lens_ptr + row)
    if first_index * BLOCK_SIZE >= length:
        return
    query_start = tl.load(query_start_loc_ptr + row)
    query_len = tl.load(query_start_loc_ptr + row + 1) - query_start
    table_ptr = live_table_ptr + row * stride_table_row

    # a block that is no power of two has idle columns behind its last token
    column = tl.arange(0, BLOCKS * BLOCK_PADDED)
    offset = column % BLOCK_PADDED
    token = (first_index + column // BLOCK_PADDED) * BLOCK_SIZE + offset
    token = tl.where(offset < BLOCK_SIZE, token, length)
    present = token < length
    block = tl.load(
        table_ptr + first_index + column // BLOCK_PADDED, mask=present, other=0
    ).to(tl.int64)
    dim = tl.arange(0, HEAD_PADDED)
    # [BLOCKS * BLOCK_PADDED, HEAD_PADDED]
    keys = tl.load(
        kv_cache_ptr
        + kv_head * stride_cache_head
        + (block * stride_cache_block + offset * stride_cache_token)[:, None]
        + dim[None, :],
        mask=present[:, None] & (dim < HEAD_SIZE)[None, :],
        other=0,
    )
    if FP8:
        keys = unpack(keys, query_ptr.dtype.element_ty)
        logit_scale *= load_scale(k_scale_ptr, stride_k_scale, kv_head, False)

    # one place for the two queries of a tile that a thread holds: the places are put
    # together once, at the end, so that no tile waits for a sum over several threads
    masses = tl.zeros([ROWS // (2 * HALF), HALF, BLOCKS], tl.float32)
    squares = tl.zeros([ROWS // (2 * HALF), HALF, BLOCKS], tl.float32)
    peaks = tl.zeros([ROWS // (2 * HALF), HALF, BLOCKS], tl.float32)
    # from the first query that sees the run's first token; those that see its last one
    # need no mask, unless it has idle columns
    before_step = length - query_len
    first_query = tl.maximum(first_index * BLOCK_SIZE - before_step, 0)
    all_seen = tl.maximum((first_index + BLOCKS) * BLOCK_SIZE - 1 - before_step, 0)
    if BLOCK_PADDED != BLOCK_SIZE:
        all_seen = query_len
    masked_tiles = tl.cdiv(tl.minimum(all_seen, query_len) - first_query, ROWS)
    unmasked_query = first_query + tl.maximum(masked_tiles, 0) * ROWS
    # of which this program has its share
    tiles = tl.cdiv(query_len - first_query, ROWS)
    my_first = first_query + tiles * split // splits * ROWS
    my_end = tl.minimum(first_query + tiles * (split + 1) // splits * ROWS, query_len)
    for part in tl.static_range(2):
        begin = my_first if part == 0 else tl.maximum(unmasked_query, my_first)
        end = tl.minimum(unmasked_query, my_end) if part == 0 else my_end
        # the heads of a group take turns at a tile; what the threads that share a block
        # have is put together once for all heads
        shares = tl.zeros([ROWS, BLOCKS, LANES], tl.float32)
        for turn in tl.range(0, tl.cdiv(end - begin, ROWS) * GROUP):
            member = turn % GROUP
            weights = _weights_of_tile(
                query_ptr,
                lse_ptr,
                keys,
                token,
                begin + turn // GROUP * ROWS,
                kv_head * GROUP + member,
                query_start,
                query_len,
                length,
                logit_scale,
                soft_cap,
                stride_query_token,
                stride_query_head,
                stride_lse_head,
                HEAD_SIZE,
                HEAD_PADDED,
                ROWS,
                SOFT_CAP,
                MASKED=part == 0,
            )
            shares += _by_lane(weights, ROWS, BLOCKS, BLOCK_PADDED)
            if member == GROUP - 1:
                mass = tl.sum(shares, 2) / GROUP
                pairs = tl.reshape(mass, [ROWS // (2 * HALF), 2, HALF, BLOCKS])
                masses += tl.sum(pairs, 1)
                squares += tl.sum(pairs * pairs, 1)
                peaks = tl.maximum(peaks, tl.max(pairs, 1))
                shares = tl.zeros([ROWS, BLOCKS, LANES], tl.float32)

    mass = tl.sum(tl.sum(masses, 0), 0)
    square = tl.sum(tl.sum(squares, 0), 0)
    peak = tl.max(tl.max(peaks, 0), 0)
    is_last = splits == 1
    if splits > 1:
        is_last, mass, square, peak = _shared(
            sums_ptr,
            arrivals_ptr,
            (row * tl.num_programs(0) + kv_head) * (tl.num_programs(1) // splits) + run,
            split,
            splits,
            mass,
            square,
            peak,
            BLOCKS,
        )
    if is_last:
        index = first_index + tl.arange(0, BLOCKS)
        live, before = read_statistics(
            statistics_ptr,
            stride_statistics_block,
            kv_head,
            table_ptr,
            index,
            length,
            BLOCK_SIZE,
        )
        write_statistics(
            statistics_ptr,
            stride_statistics_block,
            kv_head,
            tl.num_programs(0),
            live,
            before,
            index,
            length,
            query_len,
            tl.load(evicted_before_ptr + row),
            mass,
            square,
            peak,
            BLOCK_SIZE,
        )


_launch = Launcher(_prefill_mass_kernel)


@dataclass(frozen=True)
class PrefillMassLaunch:
    """What measures in a step's other layers as `measure_prefill` did in its first.

    Attributes:
        launch: The kernel's.
        places: Where it has a layer's tensors.
    """

    launch: Launch
    places: Sequence[int]

    def again(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        lse: torch.Tensor,
        statistics: torch.Tensor,
        k_scale: torch.Tensor | None,
    ) -> None:
        """Measure in another layer; arguments as of `measure_prefill`.

        They are as those of the first layer were: `ops.launch.alike` tells it.
        """
        given = [query, kv_cache, lse, statistics]
        if k_scale is not None:
            given[1] = kv_cache.view(torch.uint8)
            given.append(k_scale)
        self.launch.again(self.places, given)


def measure_prefill(
    *,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    lse: torch.Tensor,
    query_start_loc: torch.Tensor,
    live_table: torch.Tensor,
    live_lens: torch.Tensor,
    evicted_before: torch.Tensor,
    statistics: torch.Tensor,
    max_live_tokens: int,
    plan: PrefillPlan,
    scratch: PrefillScratch,
    scale: float,
    soft_cap: float = 0.0,
    k_scale: torch.Tensor | None = None,
) -> PrefillMassLaunch:
    """Add the attention mass of a step's prompt rows to the statistics.

    Args:
        query: `[num_queries, num_q_heads, head_size]`; last dimension contiguous.
        kv_cache: `[num_blocks, num_kv_heads, block_size, 2 * head_size]`, K then V;
            last dimension contiguous. Tokens beyond a row's length are not read. Of the
            query's dtype, or with a scale bytes that are float8 e4m3.
        lse: `[num_q_heads, num_queries]` float32, natural logarithm, as FlashAttention
            returns it, sinks included; last dimension contiguous.
        query_start_loc: `[num_rows + 1]` int32, first query of each row in `query`.
        live_table: `[num_rows, live_width]` int32, see `ops.live_table`.
        live_lens: `[num_rows]` int32, the step's tokens included.
        evicted_before: `[num_rows]` int32, `E` at the start of the step.
        statistics: `[num_blocks, num_kv_heads, NUM_FIELDS]` float32, the pages' as
            `kv_cache.page.statistics_view` shows them, updated in place; so are the
            first positions behind them.
        max_live_tokens: Bound of `live_lens`, known on the host.
        plan: The launch's layout, see `plan_prefill`.
        scratch: What its programs leave for each other.
        scale: Softmax scale.
        soft_cap: Bound of the logits' soft cap, 0 for none.
        k_scale: By what keys are multiplied, float32: one number, or one for each kv
            head. None for a cache that is not fp8.

    Returns:
        How to do so in another layer.
    """
    _, num_q_heads, head_size = query.shape
    _, num_kv_heads, block_size, _ = kv_cache.shape
    num_rows = live_lens.shape[0]
    group = num_q_heads // num_kv_heads
    runs = plan.runs(max_live_tokens, block_size)
    if plan.splits > 1:
        most = plan.most_splits(num_rows * num_kv_heads * runs, block_size)
        assert plan.splits <= most, f"{plan.splits} splits, and room for {most}"
    launch = _launch(
        (num_kv_heads, runs * plan.splits, num_rows),
        {"num_warps": plan.num_warps, "num_stages": plan.num_stages},
        query_ptr=query,
        kv_cache_ptr=kv_cache if k_scale is None else kv_cache.view(torch.uint8),
        k_scale_ptr=lse if k_scale is None else k_scale,
        lse_ptr=lse,
        query_start_loc_ptr=query_start_loc,
        live_table_ptr=live_table,
        live_lens_ptr=live_lens,
        evicted_before_ptr=evicted_before,
        statistics_ptr=statistics,
        sums_ptr=scratch.sums,
        arrivals_ptr=scratch.arrivals,
        splits=plan.splits,
        logit_scale=logit_scale(scale, soft_cap),
        soft_cap=soft_cap,
        stride_query_token=query.stride(0),
        stride_query_head=query.stride(1),
        stride_cache_block=kv_cache.stride(0),
        stride_cache_head=kv_cache.stride(1),
        stride_cache_token=kv_cache.stride(2),
        stride_k_scale=scale_stride(k_scale),
        stride_lse_head=lse.stride(0),
        stride_table_row=live_table.stride(0),
        stride_statistics_block=statistics.stride(0),
        GROUP=group,
        HEAD_SIZE=head_size,
        HEAD_PADDED=next_power_of_2(head_size),
        BLOCK_SIZE=block_size,
        BLOCK_PADDED=next_power_of_2(block_size),
        BLOCKS=plan.blocks(block_size),
        ROWS=plan.rows,
        SOFT_CAP=soft_cap != 0.0,
        FP8=k_scale is not None,
    )
    of_layer = ["query_ptr", "kv_cache_ptr", "lse_ptr", "statistics_ptr"]
    if k_scale is not None:
        of_layer.append("k_scale_ptr")
    return PrefillMassLaunch(launch, launch.places(*of_layer))
