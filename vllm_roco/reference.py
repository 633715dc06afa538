# SPDX-License-Identifier: Apache-2.0
"""What the kernels compute, in plain PyTorch: for tests, benchmarks and `verify`.

Rows are handled one by one and positions are spelt out, so that each function can be
read beside the definition of what it computes. No kernel imports this file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from vllm_roco import policy
from vllm_roco.kv_cache import page


def paged_cache(
    *,
    num_blocks: int,
    num_kv_heads: int,
    block_size: int,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device,
    token_major: bool = False,
) -> torch.Tensor:
    """Allocate a layer's cache, with room for the statistics in every page.

    Args:
        num_blocks: Pages.
        num_kv_heads: KV heads.
        block_size: Tokens per page.
        head_size: Numbers per head.
        dtype: Element type; uint8 for the bytes of an fp8 cache.
        device: Where it lives.
        token_major: Whether a page holds `[token, head]` (vLLM's LBNHC), not
            `[head, token]` (LBHNC).

    Returns:
        `[num_blocks, num_kv_heads, block_size, 2 * head_size]`, a view as vLLM binds
        it. Everything in it, the tails included, is NaN.
    """
    states = (num_kv_heads, block_size, 2 * head_size)
    tail = page.statistics_bytes(num_kv_heads) // dtype.itemsize
    count = num_blocks * (math.prod(states) + tail)
    if dtype == torch.uint8:
        # not a number as float8 and, four of them, as float32
        nan = torch.full((count,), 0xFF, dtype=dtype, device=device)
    else:
        nan = torch.full((count,), float("nan"), device=device).to(dtype)
    return paged_view(nan, num_blocks, states, tail, token_major=token_major)


def paged_view(
    memory: torch.Tensor,
    num_blocks: int,
    states: tuple[int, int, int],
    tail: int,
    *,
    token_major: bool,
) -> torch.Tensor:
    """Return a layer's cache over memory that is there.

    Args:
        memory: Flat, with room for all pages.
        num_blocks: Pages.
        states: `num_kv_heads`, `block_size` and `2 * head_size`, of one page.
        tail: Numbers behind K and V in every page.
        token_major: See `paged_cache`.
    """
    heads, tokens, content = states
    inner = (content, heads * content) if token_major else (tokens * content, content)
    return memory.as_strided(
        (num_blocks, *states),
        (math.prod(states) + tail, *inner, 1),
        memory.storage_offset(),
    )


def live_row(
    row: torch.Tensor,
    *,
    evicted: int,
    live_len: int,
    budget_blocks: int,
    block_size: int,
) -> torch.Tensor:
    """Return the blocks that a sequence attends over, in order.

    Args:
        row: `[width]`, the block-table row, indexed by logical block.
        evicted: `E` at the start of the step.
        live_len: Tokens to attend over.
        budget_blocks: `B`, the resident blocks.
        block_size: Tokens per block.
    """
    live = torch.cat([row[:budget_blocks], row[budget_blocks + evicted :]])
    return live[: -(-live_len // block_size)]


@dataclass(frozen=True)
class Attended:
    """One sequence's step.

    Attributes:
        output: `[query_len, num_q_heads, head_size]`.
        lse: `[num_q_heads, query_len]` float32, natural logarithm, sinks included.
        mass: `[query_len, num_kv_heads, blocks]` float32: mean over the query heads of
            a group of the softmax weight in each live block; 0 where nothing is seen.
    """

    output: torch.Tensor
    lse: torch.Tensor
    mass: torch.Tensor


def attend(
    *,
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    blocks: torch.Tensor,
    live_len: int,
    scale: float,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Attended:
    """Attend causally over a sequence's live blocks, the newest tokens its queries.

    Args:
        query: `[query_len, num_q_heads, head_size]`. Of float64, all is worked out in
            float64, else in float32.
        kv_cache: `[num_blocks, num_kv_heads, block_size, 2 * head_size]`.
        blocks: Live blocks in order.
        live_len: Tokens in them.
        scale: Softmax scale.
        soft_cap: Bound of the logits' soft cap, 0 for none.
        sinks: `[num_q_heads]`, a logit of each head in the denominator alone, or None.
        dtype: Element type to which weights and output are rounded; the cache's tells
            which error to expect of a kernel with tensor cores.
    """
    query_len, num_q_heads, head_size = query.shape
    _, num_kv_heads, block_size, _ = kv_cache.shape
    group = num_q_heads // num_kv_heads
    # [num_kv_heads, live_len, 2 * head_size]
    content = kv_cache[blocks.long()].transpose(0, 1).flatten(1, 2)[:, :live_len]
    wide = torch.promote_types(query.dtype, torch.float32)
    keys, values = content.to(wide).repeat_interleave(group, 0).split(head_size, -1)
    logits = query.to(wide).transpose(0, 1) @ keys.transpose(1, 2) * scale
    if soft_cap:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    position = torch.arange(live_len, device=query.device)
    seen = position <= position[live_len - query_len :, None]
    logits = logits.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        of_sinks = sinks.to(wide)[:, None, None].expand(-1, query_len, 1)
        logits = torch.cat((logits, of_sinks), -1)
    weights = logits.softmax(-1)[..., :live_len]
    output = (weights.to(dtype).to(wide) @ values).transpose(0, 1).to(dtype)

    padded = weights.new_zeros(num_q_heads, query_len, len(blocks) * block_size)
    padded[..., :live_len] = weights
    by_group = padded.unflatten(0, (num_kv_heads, group))
    return Attended(
        output=output,
        lse=logits.logsumexp(-1),
        mass=policy.block_mass(by_group, block_size).transpose(0, 1),
    )


def update_statistics(
    *,
    statistics: torch.Tensor,
    first_positions: torch.Tensor,
    blocks: torch.Tensor,
    mass: torch.Tensor,
    live_len: int,
    evicted: int,
    block_size: int,
) -> None:
    """Add a sequence's step to the statistics of its live blocks, in place.

    Args:
        statistics: `[num_blocks, num_kv_heads, NUM_FIELDS]` float32.
        first_positions: `[num_blocks]` float32, updated with the new blocks.
        blocks: Live blocks in order.
        mass: `[query_len, num_kv_heads, blocks]`, see `Attended`.
        live_len: Tokens in the blocks, the step's own included.
        evicted: `E` at the start of the step.
        block_size: Tokens per block.
    """
    query_len = mass.shape[0]
    first_token = torch.arange(len(blocks), device=blocks.device) * block_size
    is_new = first_token >= live_len - query_len
    positions = first_token[is_new] + evicted * block_size
    first_positions[blocks[is_new].long()] = positions.float()
    # [blocks, num_kv_heads, NUM_FIELDS]
    entries = statistics[blocks.long()]
    entries[is_new] = 0
    observers = policy.queries_that_see(first_token, live_len, query_len)
    policy.accumulate(entries, mass.transpose(0, 1), observers)
    statistics[blocks.long()] = entries
