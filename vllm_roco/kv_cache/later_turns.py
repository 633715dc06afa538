# SPDX-License-Identifier: Apache-2.0
"""Which turns of a conversation are read so that later ones can begin behind them.

Such a turn begins with a snapshot, or nothing, though there are blocks to begin with,
whose statistics others have added to. So what it holds at its end is what a prompt
keeps that has all of it, and one that evicts can go on from there, see `earlier_turns`.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from vllm_roco.config import blocks_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm.v1.core.kv_cache_utils import BlockHash
    from vllm.v1.request import Request

    from vllm_roco.kv_cache.block_cache import BlockCache
    from vllm_roco.kv_cache.first_turns import FirstTurns
    from vllm_roco.kv_cache.shared_prefixes import SharedPrefixes
    from vllm_roco.kv_cache.snapshots import SnapshotStore
    from vllm_roco.request_plans import RequestPlans

SHARE_THAT_GOES_ON = 2 / 3
"""Share of conversations that are taken to go on once more."""
MOST_READ_AGAIN = 1 / 8
"""Of a first turn's tokens behind its snapshot, that it might begin with otherwise."""
MOST_ALONE = 1 / 4
"""Share of all blocks for first turns that could share their headers, at most."""
MAX_QUESTIONS = 1024
"""Beginnings of first questions that are remembered, at most."""


class LaterTurns:
    """Decides it for requests as they come, by what is likely to follow.

    Args:
        store: The snapshots.
        shared: Where prompts have parted.
        blocks: The blocks of sequences that have evicted nothing.
        num_blocks: All that vLLM's pool has.
        block_size: Tokens per block.
        plans: What holds for each request.
        first_turns: What has become of those before.
    """

    def __init__(
        self,
        store: SnapshotStore,
        shared: SharedPrefixes,
        blocks: BlockCache,
        num_blocks: int,
        block_size: int,
        plans: RequestPlans,
        first_turns: FirstTurns,
    ) -> None:
        self._store = store
        self._shared = shared
        self._blocks = blocks
        self._most_alone = int(MOST_ALONE * num_blocks)
        self._block_size = block_size
        self._plans = plans
        self._first_turns = first_turns
        # the latest last
        self._questions: OrderedDict[BlockHash, None] = OrderedDict()
        # of unfinished first turns that hold what they could share, the blocks of
        # prompt and answer
        self._alone: dict[str, int] = {}
        self._num_alone = 0

    def reads_first_turn(
        self, request: Request, places: Sequence[int], prefixes: Sequence[BlockHash]
    ) -> bool:
        """Return whether a first turn is read for later ones.

        Where it has the header of others before it, and nothing else of them. To be
        asked once, before the request's own prompt shows where prompts part: whoever is
        the second behind a header begins with its blocks, as in stock vLLM.

        Args:
            request: A new request.
            places: Where a snapshot of its prompt can be.
            prefixes: What stands for the prompt up to there.
        """
        plan = self._plans.of(request.request_id)
        if not plan.is_read_for_later_turns:
            return False
        start = self._start(places, prefixes)
        most = start + int(MOST_READ_AGAIN * (request.num_prompt_tokens - start))
        if not 0 < start <= plan.ends.answers.question_start <= most:
            return False
        alone = self._blocks_alone(request)
        if self._is_question_of_others(request, most) or (
            alone + self._num_alone > self._most_alone
        ):
            return False
        # asked last: whom it is asked about counts
        if not self._first_turns.take_next():
            return False
        if alone:
            self._alone[request.request_id] = alone
            self._num_alone += alone
        return True

    def end(self, request: Request) -> None:
        """Take note that a request is done."""
        self._num_alone -= self._alone.pop(request.request_id, 0)

    def reads_turn(
        self, request: Request, places: Sequence[int], prefixes: Sequence[BlockHash]
    ) -> bool:
        """Return whether another turn is read for the next one.

        If that one evicts, and is spared more than this one reads, as often as it
        comes.

        Args:
            request: A new request.
            places: Where a snapshot of its prompt can be.
            prefixes: What stands for the prompt up to there.
        """
        plan = self._plans.of(request.request_id)
        answer = plan.ends.answers.last_written
        if not plan.evicts_in_later_turn or answer is None:
            return False
        start = self._start(places, prefixes)
        begun, ended = answer
        # it would begin behind the last answer, and so would the next one otherwise,
        # behind another one as long
        more_now = ended - start
        less_then = request.num_prompt_tokens + (ended - begun) - start
        return more_now <= SHARE_THAT_GOES_ON * less_then

    def _start(self, places: Sequence[int], prefixes: Sequence[BlockHash]) -> int:
        """Return where a prompt begins to read that begins with a snapshot, or 0."""
        return max(
            (
                place
                for place, prefix in zip(places, prefixes, strict=True)
                # there is a snapshot, or the first one that comes leaves one
                if self._shared.part_at(prefix) or self._store.has(prefix)
            ),
            default=0,
        )

    def _is_question_of_others(self, request: Request, length: int) -> bool:
        """Return whether others have begun likewise up to a length, and note it.

        Those of them that are read for later turns leave no blocks that tell.
        """
        num_blocks = blocks_of(length, self._block_size)
        if num_blocks > len(request.block_hashes):
            # there is no block that it could share
            return False
        question = request.block_hashes[num_blocks - 1]
        is_known = question in self._questions
        self._questions[question] = None
        self._questions.move_to_end(question)
        if len(self._questions) > MAX_QUESTIONS:
            self._questions.popitem(last=False)
        return is_known or self._blocks.has(request, num_blocks * self._block_size)

    def _blocks_alone(self, request: Request) -> int:
        """Return how many blocks a request holds that may share some of them, else 0.

        One that may evict shares none in any case.
        """
        if self._blocks.may_evict(request):
            return 0
        return blocks_of(
            request.num_prompt_tokens + request.max_tokens, self._block_size
        )
