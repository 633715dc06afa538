# SPDX-License-Identifier: Apache-2.0
"""A vLLM scheduler whose requests begin behind prefixes that others have read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typing_extensions import override

from vllm_roco.kv_cache.cached_tokens import CountingManager
from vllm_roco.kv_cache.prefix_cache import PrefixCache
from vllm_roco.kv_cache.window_manager import WindowManager
from vllm_roco.planning_scheduler import PlanningScheduler
from vllm_roco.validation import check_prefix_hits_beside_windows

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
    from vllm.v1.request import Request

    from vllm_roco.kv_cache.prefix_finder import Hit

MAX_WAITS_PER_STEP = 64
"""Requests that a step leaves waiting for a prefix before it lets nobody else in.

vLLM takes each out of its queue and puts it back.
"""


class PrefixScheduler(PlanningScheduler):
    """Lets requests begin behind prefixes; arguments as in the base class.

    Attributes:
        prefix_cache: The prefixes, None where nothing can be hit: see
            `describe_prefix_caching`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prefix_cache: PrefixCache | None = None
        self._num_left_waiting = 0
        self._why_none = self._trouble_with_prefixes()
        if self._why_none is None:
            if self._other_managers:
                # what was not foreseen by the model's configuration
                check_prefix_hits_beside_windows(self.roco_config)
            (self._manager,) = self.roco_managers
            self.prefix_cache = PrefixCache(
                self._manager.block_pool,
                self._manager.kv_cache_group_id,
                self._manager.block_size,
                self.request_plans,
                self._manager.req_to_blocks,
                [*map(WindowManager.take_over, self._other_managers)],
                is_exact=self._is_exact,
                turn_end_token_ids=self.turn_end_token_ids,
            )
            self._manager.share_prefixes(self.prefix_cache)
            CountingManager.take_over(self.kv_cache_manager, self.prefix_cache)

    def describe_prefix_caching(self) -> str:
        """Return whether prefixes can be hit, or why not, in a few words."""
        if self._is_exact:
            on = "on, behind answers too" if self.answer_start_token_ids else "on"
            return self._why_none or on
        if self._why_none is None:
            return "on, longest hits"
        hits = self.roco_config.prefix_hits
        return f"{self._why_none}; prefix_hits = {hits!r} does nothing"

    @property
    def _is_exact(self) -> bool:
        return self.roco_config.prefix_hits == "exact"

    def _trouble_with_prefixes(self) -> str | None:
        """Return why no prefix can be hit."""
        if not self.kv_cache_manager.enable_caching:
            return "off (enable_prefix_caching = False)"
        managers = self.kv_cache_manager.coordinator.single_type_managers
        others = self._other_managers
        if len(self.roco_managers) > 1 or not all(map(WindowManager.can_be, others)):
            return "not for this model, whose layers have KV caches of several kinds"
        if len({manager.block_size for manager in managers}) > 1:
            return (
                "not for this model, whose layers have KV cache blocks of several sizes"
            )
        return None

    @property
    def _other_managers(self) -> list[SingleTypeKVCacheManager]:
        managers = self.kv_cache_manager.coordinator.single_type_managers
        return [manager for manager in managers if manager not in self.roco_managers]

    @override
    def add_request(self, request: Request) -> None:
        """Take a request, and note where its prompt parts from others'."""
        super().add_request(request)
        if (
            self.prefix_cache is not None
            and _can_share(request)
            and not request.is_finished()
        ):
            self.prefix_cache.enter(request)

    @override
    def _free_blocks(self, request: Request) -> None:
        """Free as vLLM does, and keep what a next turn may begin with."""
        if self.prefix_cache is not None and _can_share(request):
            row = self._manager.req_to_blocks.get(request.request_id, ())
            self.prefix_cache.end(request, row)
        super()._free_blocks(request)

    @override
    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedule as vLLM does, with a new count of who is left waiting."""
        self._num_left_waiting = 0
        output = super().schedule(*args, **kwargs)
        if self.prefix_cache is not None:
            # vLLM frees the ends of a step's copies as it makes its output
            self.prefix_cache.blocks.release()
        return output

    @override
    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        """Return whether a request may be let in: not while its prompt is being read.

        One request reads a prefix, and those that share it begin behind it. So many
        are skipped in a step, then one that vLLM finds no room for ends its loop.
        """
        if not super()._handle_blocked_waiting_request(request):
            return False
        cache = self._cache_of(request)
        if cache is None or not cache.must_wait(request):
            return True
        self._num_left_waiting += 1
        if self._num_left_waiting <= MAX_WAITS_PER_STEP:
            return False
        self._manager.refuse(request.request_id)
        return True

    def _ask_for_prefix(self, request: Request) -> None:
        """Ask who reads the prompt of a request that waits for its turn to leave it."""
        if (cache := self._cache_of(request)) is not None:
            cache.ask(request)

    def _cache_of(self, request: Request) -> PrefixCache | None:
        """Return what a waiting request may begin with, None if with nothing."""
        if request.num_computed_tokens or not _can_share(request):
            return None
        return self.prefix_cache

    @override
    def _get_local_prefix_cache_hit(
        self, request: Request, max_cache_hit_length: int | None = None
    ) -> tuple[KVCacheBlocks, int, int, bool]:
        """Return the blocks of the longest prefix that a request may begin with.

        Args:
            request: A request that is about to be let in.
            max_cache_hit_length: A bound of vLLM's own, which not all releases know.
        """
        # vLLM asks for each request that waits, hits or none, before it asks for room
        self.other_caches.admit_by(self.request_plans.of(request.request_id))
        cache = self.prefix_cache
        if cache is None or not _can_share(request):
            bound = () if max_cache_hit_length is None else (max_cache_hit_length,)
            return super()._get_local_prefix_cache_hit(request, *bound)
        hit = cache.offer(request, max_cache_hit_length)
        manager = self.kv_cache_manager
        if (
            hit is not None
            # nothing runs that would ever make room for hit and copy together
            and not self.running
            and not self._manager.has_room_for(request, hit)
        ):
            cache.withdraw(request)
            hit = None
        if hit is None:
            return manager.empty_kv_cache_blocks, 0, 0, False
        blocks = manager.create_kv_cache_blocks(self._rows_of(hit, cache))
        return blocks, hit.num_tokens, 0, False

    def _rows_of(self, hit: Hit, cache: PrefixCache) -> tuple[list[KVCacheBlock], ...]:
        """Return the rows of a hit in the order of vLLM's groups."""
        if not hit.windows:
            return (hit.row,)
        rows = {self._manager.kv_cache_group_id: hit.row}
        for manager, row in zip(cache.windows, hit.windows, strict=True):
            rows[manager.kv_cache_group_id] = row
        return tuple(rows[group_id] for group_id in sorted(rows))

    def _end_of_step(self, request: Request, start: int, end: int) -> int:
        """Return where a prompt step must end for a snapshot, at most `end`."""
        if self.prefix_cache is None or not _can_share(request):
            return end
        return self.prefix_cache.first_stop(request, start, end)

    def _note_end_of_step(self, request: Request, end: int) -> None:
        """Tell whoever would wait for a prefix where a prompt step ends."""
        if self.prefix_cache is not None and _can_share(request):
            self.prefix_cache.choose(request, end)


def _can_share(request: Request) -> bool:
    """Return whether what a request keeps depends on its tokens alone.

    An input item may end a chunk early.
    """
    return not request.has_encoder_inputs
