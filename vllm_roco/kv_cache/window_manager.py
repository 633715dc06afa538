# SPDX-License-Identifier: Apache-2.0
"""The blocks of sliding-window layers, in a model whose other layers evict.

What such a layer holds depends on the tokens and, behind a first eviction, on how the
request evicts and where its steps ended. vLLM's hashes stand for tokens alone, so none
of its blocks may be found by them: requests begin with those of a snapshot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from typing_extensions import override
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
    from vllm.v1.request import Request


class WindowManager(SlidingWindowManager):
    """vLLM's manager, with blocks that only a snapshot knows.

    A full block is written no more and is freed when its tokens have left the window,
    so a snapshot needs no copy of it: the block itself lies in vLLM's free queue, and
    who begins with it holds it as well.
    """

    @staticmethod
    def can_be(manager: SingleTypeKVCacheManager) -> bool:
        """Return whether `take_over` takes a manager."""
        return type(manager) is SlidingWindowManager

    @classmethod
    def take_over(cls, manager: SingleTypeKVCacheManager) -> WindowManager:
        """Make a manager of vLLM's one of this class, before it has any blocks.

        vLLM has built it, and has one class for all groups of a kind in a process.
        """
        assert cls.can_be(manager)
        manager.__class__ = cls
        assert isinstance(manager, cls)
        return manager

    def blocks_at(self, request_id: str, length: int) -> Sequence[KVCacheBlock]:
        """Return the blocks that a request needs to go on from a length.

        Args:
            request_id: One that begins its next step there.
            length: A multiple of the block size.
        """
        row = self.req_to_blocks[request_id]
        return row[self._num_skipped_blocks(length) : length // self.block_size]

    def row_at(self, blocks: Sequence[KVCacheBlock], length: int) -> list[KVCacheBlock]:
        """Return the row of a request that begins with what `blocks_at` returned."""
        return [self._null_block] * self._num_skipped_blocks(length) + [*blocks]

    def _num_skipped_blocks(self, length: int) -> int:
        return int(self.get_num_skipped_tokens(length)) // self.block_size

    @override
    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Return the blocks that a request takes out of free memory.

        On admission vLLM compares the most blocks held at a time with the number of all
        blocks in front, also of those that the window has left; behind a long prefix it
        would ask for none.
        """
        blocks = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            prefill_end=prefill_end,
        )
        cap = self.max_admission_blocks_per_request
        if apply_admission_cap and cap is not None:
            blocks = min(blocks, cap)
        return int(blocks)

    @override
    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int] = (),
    ) -> None:
        """Hash nothing."""
