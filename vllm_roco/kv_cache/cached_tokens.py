# SPDX-License-Identifier: Apache-2.0
"""How much of its prompt a client is told to be in the cache for those that follow.

vLLM counts the tokens of a request's own blocks that are found by their hashes, and
answers with them (`created_cache_tokens`, `cache_creation_input_tokens`). Blocks that
are evicted from have none, but a snapshot may stand for the prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override
from vllm.v1.core.kv_cache_manager import KVCacheManager

if TYPE_CHECKING:
    from vllm.v1.request import Request

    from vllm_roco.kv_cache.prefix_cache import PrefixCache


class CountingManager(KVCacheManager):
    """vLLM's manager, which counts snapshots as well.

    Attributes:
        prefix_cache: Where they are.
    """

    prefix_cache: PrefixCache

    @classmethod
    def take_over(cls, manager: KVCacheManager, prefix_cache: PrefixCache) -> None:
        """Make vLLM's manager one of this class; it has built it, and keeps it."""
        assert type(manager) is KVCacheManager
        manager.__class__ = cls
        assert isinstance(manager, cls)
        manager.prefix_cache = prefix_cache

    @override
    def estimate_cached_tokens(self, request: Request) -> int:
        """Return how many first tokens of a request others could begin with."""
        in_blocks: int = super().estimate_cached_tokens(request)
        if request.has_encoder_inputs:
            # as with hits: what it keeps does not depend on its tokens alone
            return in_blocks
        return max(in_blocks, self.prefix_cache.longest_snapshot(request))
