# SPDX-License-Identifier: Apache-2.0
"""What a sequence holds in layers that RoCo leaves to other backends.

All groups of layers take their blocks from one pool. A group with a window holds the
window and the tokens in flight, of which vLLM assumes a full batch in each step. Under
RoCo's scheduler a sequence has as many at most until it evicts, and then a chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_roco.config import blocks_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

    from vllm_roco.request_plans import ResolvedPlan


class OtherCaches:
    """The block managers of a scheduler that are not RoCo's.

    Args:
        managers: They.
        max_steps_in_flight: Steps that may be scheduled but not yet processed.
        max_num_batched_tokens: Most tokens of a step.
        max_model_len: The greatest length of a sequence.
    """

    def __init__(
        self,
        managers: Iterable[SingleTypeKVCacheManager],
        max_steps_in_flight: int,
        max_num_batched_tokens: int,
        max_model_len: int,
    ) -> None:
        self._managers = list(managers)
        self._max_steps_in_flight = max_steps_in_flight
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_model_len = max_model_len
        self._in_flight_tokens = 0

    def __bool__(self) -> bool:
        return bool(self._managers)

    def max_blocks(self, in_flight_tokens: int) -> int:
        """Return the most blocks that one sequence holds in all of them.

        Args:
            in_flight_tokens: Most tokens of the sequence that are scheduled but not yet
                processed.
        """
        return sum(
            self._max_blocks_in(manager, in_flight_tokens) for manager in self._managers
        )

    def max_in_flight_tokens(self, plan: ResolvedPlan) -> int:
        """Return the most tokens in flight of a sequence that goes by a plan."""
        steps, chunk = self._max_steps_in_flight, plan.chunk
        # all that are read before the first eviction may be, and chunks behind them
        most = max(steps * chunk, plan.first_eviction - 1 + (steps - 1) * chunk)
        return min(steps * self._max_num_batched_tokens, most)

    def admit_by(self, plan: ResolvedPlan) -> None:
        """Let vLLM ask for no more than a request with such a plan can hold.

        The one whose admission is asked about next. Lower than what memory was planned
        with is the safe direction.
        """
        if not self._managers:
            return
        in_flight_tokens = self.max_in_flight_tokens(plan)
        if in_flight_tokens == self._in_flight_tokens:
            return
        self._in_flight_tokens = in_flight_tokens
        for manager in self._managers:
            if manager.max_admission_blocks_per_request is not None:
                manager.max_admission_blocks_per_request = self._max_blocks_in(
                    manager, in_flight_tokens
                )

    def _max_blocks_in(
        self, manager: SingleTypeKVCacheManager, in_flight_tokens: int
    ) -> int:
        spec = manager.kv_cache_spec
        bound = getattr(spec, "max_admission_blocks_per_request", None)
        if bound is None:
            return blocks_of(self._max_model_len, manager.block_size)
        return int(
            bound(
                max_in_flight_tokens=in_flight_tokens,
                max_model_len=self._max_model_len,
            )
        )
