# SPDX-License-Identifier: Apache-2.0
"""Lets vLLM copy whole pages where the caches of several kinds of layers overlap.

Layers of several KV cache groups lie in the same memory, each with a view of its own.
Of views that begin at one address vLLM copies only the first, in the order of layers;
but RoCo's pages are the longest, for they have statistics behind keys and values.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from vllm_roco.attention.request_rows import RUNNER_V1, RUNNER_V2

if TYPE_CHECKING:
    import torch
    from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy

    Copy = Callable[[Iterable[torch.Tensor], int, Sequence[KVCacheBlockCopy]], None]


def copy_whole_pages() -> None:
    """Let model runners copy the longest of several views from now on.

    To be called while a runner builds its layers: its module is there by then.
    """
    for name in (RUNNER_V2, RUNNER_V1):
        module = sys.modules.get(name)
        if module is None or hasattr(module.copy_kv_cache_blocks_inplace, "_of_roco"):
            continue
        copy = _longest_first(module.copy_kv_cache_blocks_inplace)
        module.copy_kv_cache_blocks_inplace = copy  # type: ignore[attr-defined]


def _longest_first(copy: Copy) -> Copy:
    @functools.wraps(copy)
    def wrapped(
        kv_caches: Iterable[torch.Tensor],
        num_blocks: int,
        kv_cache_block_copies: Sequence[KVCacheBlockCopy],
    ) -> None:
        # all have as many blocks
        caches = sorted(kv_caches, key=lambda cache: cache.nbytes, reverse=True)
        copy(caches, num_blocks, kv_cache_block_copies)

    wrapped._of_roco = True  # type: ignore[attr-defined]
    return wrapped
