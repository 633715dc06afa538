# SPDX-License-Identifier: Apache-2.0
"""Copies whole pages, K, V and statistics, in every layer of a KV-cache group.

One program a row and layer; a row without moves returns at once, so the launch may be
part of every step. Sources and destinations of a step are disjoint.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

# 32 KiB at a time
WORDS = 8192
# bytes that one thread loads at once
ALIGNMENT = 16


@triton.jit(do_not_specialize=["max_moves"])
def _move_blocks_kernel(
    first_pages_ptr,  # [num_layers] int64, address of each layer's page 0
    moves_ptr,  # [num_rows, max_moves, 2] int32
    num_moves_ptr,  # [num_rows] int32
    page_words,
    max_moves,
    ALIGNMENT: tl.constexpr,
    WORDS: tl.constexpr,
):
    layer = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    count = tl.load(num_moves_ptr + row)
    if count == 0:
        return

    address = tl.load(first_pages_ptr + layer)
    pages = tl.multiple_of(address.to(tl.pointer_type(tl.int32)), ALIGNMENT)
    word = tl.arange(0, WORDS)
    pairs_ptr = moves_ptr + row * max_moves * 2
    for move in tl.range(count):
        source = tl.load(pairs_ptr + 2 * move).to(tl.int64) * page_words
        target = tl.load(pairs_ptr + 2 * move + 1).to(tl.int64) * page_words
        for start in tl.range(0, page_words, WORDS):
            inside = start + word < page_words
            content = tl.load(pages + source + start + word, mask=inside)
            tl.store(pages + target + start + word, content, mask=inside)


def first_pages(kv_caches: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the address of page 0 in every layer; valid while the caches are bound.

    Args:
        kv_caches: The layers' caches as vLLM binds them, of one group.

    Returns:
        `[num_layers]` int64 on the caches' device.

    Raises:
        ValueError: A layer's pages differ in size from the first layer's, or a page is
            not aligned.
    """
    pages = {cache.stride(0) * cache.element_size() for cache in kv_caches}
    addresses = [cache.data_ptr() for cache in kv_caches]
    if len(pages) != 1 or any(n % ALIGNMENT for n in [*pages, *addresses]):
        raise ValueError(
            f"roco: the layers of a KV-cache group have pages of {sorted(pages)} bytes "
            f"at addresses {addresses}, but all must have pages of one size, and sizes "
            f"and addresses must be multiples of {ALIGNMENT} bytes. Use one of vLLM's "
            "KV-cache layouts whose outer dimensions are the layer and the block."
        )
    return torch.tensor(addresses, dtype=torch.int64, device=kv_caches[0].device)


def move_blocks(
    *,
    first_page_of_layer: torch.Tensor,
    moves: torch.Tensor,
    num_moves: torch.Tensor,
    page_bytes: int,
) -> None:
    """Copy pages over pages in all layers.

    Args:
        first_page_of_layer: `[num_layers]` int64, see `first_pages`.
        moves: `[num_rows, max_moves, 2]` int32, contiguous: source and destination
            block of each move.
        num_moves: `[num_rows]` int32, how many of a row's moves are due.
        page_bytes: Bytes of a page, tail included.
    """
    num_rows, max_moves, _ = moves.shape
    _move_blocks_kernel[(first_page_of_layer.shape[0], num_rows)](
        first_pages_ptr=first_page_of_layer,
        moves_ptr=moves,
        num_moves_ptr=num_moves,
        page_words=page_bytes // torch.int32.itemsize,
        max_moves=max_moves,
        ALIGNMENT=ALIGNMENT,
        WORDS=WORDS,
        num_warps=8,
    )
