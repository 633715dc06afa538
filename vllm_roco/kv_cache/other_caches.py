# SPDX-License-Identifier: Apache-2.0
"""What a sequence holds in layers that RoCo leaves to other backends.

All groups of layers take their blocks from one pool. A group with a window holds the
window and the tokens in flight, of which vLLM assumes two batches full; under RoCo's
scheduler one sequence never has more than a chunk of them in a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_roco.config import blocks_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager


class OtherCaches:
    """The block managers of a scheduler that are not RoCo's.

    Args:
        managers: They.
        max_steps_in_flight: Steps that may be scheduled but not yet processed.
        max_model_len: The greatest length of a sequence.
    """

    def __init__(
        self,
        managers: Iterable[SingleTypeKVCacheManager],
        max_steps_in_flight: int,
        max_model_len: int,
    ) -> None:
        self._managers = list(managers)
        self._max_steps_in_flight = max_steps_in_flight
        self._max_model_len = max_model_len
        self._chunk = 0

    def __bool__(self) -> bool:
        return bool(self._managers)

    def max_blocks(self, tokens_per_step: int) -> int:
        """Return the most blocks that one sequence holds in all of them.

        Args:
            tokens_per_step: Most tokens of the sequence in one step.
        """
        return sum(
            self._max_blocks_in(manager, tokens_per_step) for manager in self._managers
        )

    def admit_by(self, chunk: int) -> None:
        """Let vLLM ask for no more than a request with such a chunk can hold.

        The one whose admission is asked about next. Lower than what memory was planned
        with is the safe direction.
        """
        if chunk == self._chunk:
            return
        self._chunk = chunk
        for manager in self._managers:
            if manager.max_admission_blocks_per_request is not None:
                manager.max_admission_blocks_per_request = self._max_blocks_in(
                    manager, chunk
                )

    def _max_blocks_in(
        self, manager: SingleTypeKVCacheManager, tokens_per_step: int
    ) -> int:
        spec = manager.kv_cache_spec
        bound = getattr(spec, "max_admission_blocks_per_request", None)
        if bound is None:
            return blocks_of(self._max_model_len, manager.block_size)
        return int(
            bound(
                max_in_flight_tokens=self._max_steps_in_flight * tokens_per_step,
                max_model_len=self._max_model_len,
            )
        )
