# SPDX-License-Identifier: Apache-2.0
"""At which lengths of a prompt there may be a snapshot: ends of its chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm_roco.chunking import ChunkEnds, least_chunk
from vllm_roco.eviction_schedule import NEVER

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vllm.v1.core.kv_cache_utils import BlockHash
    from vllm.v1.request import Request

    from vllm_roco.kv_cache.prefix_keys import PrefixKeys
    from vllm_roco.request_plans import RequestPlans


class PrefixPlaces:
    """The places of prompts, for those that leave snapshots and those that look there.

    Args:
        keys: What stands for a prefix; where there is no key, there is no place.
        block_size: Tokens per block.
        plans: What holds for each request.
    """

    def __init__(self, keys: PrefixKeys, block_size: int, plans: RequestPlans) -> None:
        self._keys = keys
        self._block_size = block_size
        self._plans = plans

    def ends(self, request: Request) -> ChunkEnds:
        """Return the ends of a prompt's chunks, not too many of them.

        Each look-up goes through them. However small its own chunk, a prompt has no
        more than one can have whose chunk is the server's.
        """
        plan = self._plans.of(request.request_id)
        least = least_chunk(self._plans.default.chunk, self._block_size)
        if plan.chunk >= least:
            return plan.ends
        # no turn ends such a small one
        return ChunkEnds(plan.chunk * -(-least // plan.chunk))

    def between(self, request: Request, start: int, most: int = NEVER) -> Sequence[int]:
        """Return the places of a prompt behind `start`, up to `most` tokens."""
        most = min(most, request.num_prompt_tokens, self._keys.most_tokens(request))
        return self.ends(request).between(start, most)

    def from_longest(
        self, request: Request, most: int
    ) -> Iterator[tuple[int, BlockHash]]:
        """Yield the places of a prompt up to `most`, and the keys of its prefixes."""
        places = self.ends(request).between(0, most)[::-1]
        return zip(places, self._keys.keys(request, places), strict=True)

    def most_of_a_hit(self, request: Request) -> int:
        """Return how many tokens a request can begin behind at most, place or not."""
        # generated tokens were read one by one, the first time
        return min(
            request.num_prompt_tokens,
            request.num_tokens - 1,
            self._keys.most_tokens(request),
        )
