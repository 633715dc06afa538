# SPDX-License-Identifier: Apache-2.0
"""Copies whole pages, which is what a hit of a prefix costs, in few and wide words.

vLLM copies a cache's numbers one by one, or its bytes: two to eight times as many
elements, each of which has its address worked out. And of the views of several KV cache
groups that begin at one address it copies only the first, in the order of layers; but
RoCo's pages are the longest, for they have statistics behind keys and values.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_roco.attention.request_rows import RUNNER_V1, RUNNER_V2

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy

    Copy = Callable[[Iterable[torch.Tensor], int, Sequence[KVCacheBlockCopy]], None]

MAX_BYTES = 1 << 25
"""Bytes that are on their way at a time: no memory is planned for them.

Few enough for a GPU's cache, so that they are written to memory once.
"""
_WORD = torch.int64


def copy_whole_pages() -> None:
    """Let model runners copy whole pages from now on, the longest of several views.

    To be called while a runner builds its layers: its module is there by then.
    """
    for name in (RUNNER_V2, RUNNER_V1):
        module = sys.modules.get(name)
        if module is None or hasattr(module.copy_kv_cache_blocks_inplace, "_of_roco"):
            continue
        copy = _in_words(module.copy_kv_cache_blocks_inplace)
        module.copy_kv_cache_blocks_inplace = copy  # type: ignore[attr-defined]


def _in_words(copy: Copy) -> Copy:
    @functools.wraps(copy)
    def wrapped(
        kv_caches: Iterable[torch.Tensor],
        num_blocks: int,
        kv_cache_block_copies: Sequence[KVCacheBlockCopy],
    ) -> None:
        if not kv_cache_block_copies:
            return
        pairs: torch.Tensor | None = None
        copied: set[int] = set()
        others: list[torch.Tensor] = []
        # all have as many blocks
        for cache in sorted(kv_caches, key=lambda cache: cache.nbytes, reverse=True):
            if cache.data_ptr() in copied:
                continue
            pages = _words_of(cache, num_blocks)
            if pages is None:
                others.append(cache)
                continue
            copied.add(cache.data_ptr())
            if pairs is None:
                # a list of pairs becomes a tensor ten times as slowly
                table = np.array(kv_cache_block_copies, dtype=np.int64)
                pairs = async_tensor_h2d(table, device=cache.device)
            # no page is copied and written at once, so parts may follow each other
            for part in pairs.split(max(1, MAX_BYTES // pages[0].nbytes)):
                sources, targets = part.unbind(dim=1)
                pages[targets] = pages[sources]
        if others:
            copy(others, num_blocks, kv_cache_block_copies)

    wrapped._of_roco = True  # type: ignore[attr-defined]
    return wrapped


def _words_of(cache: torch.Tensor, num_blocks: int) -> torch.Tensor | None:
    """Return the pages of a layer as `[num_blocks, words]`, a view.

    Or None where a block is not one piece of memory of whole words.
    """
    size, word = cache.element_size(), _WORD.itemsize
    if (
        cache.shape[0] != num_blocks
        or not cache[0].is_contiguous()
        or cache.data_ptr() % word
        or cache.storage_offset() * size % word
        or cache.stride(0) * size % word
        or cache[0].nbytes % word
    ):
        return None
    return cache.flatten(start_dim=1).view(_WORD)
