# SPDX-License-Identifier: Apache-2.0
"""Where the steps end in which known tokens are read: the reading pace.

Eviction happens at the end of a step, so what a sequence keeps depends on where its
steps end from the first eviction on. These places depend on the sequence alone, never
on who else is scheduled. Before it, longer steps come to the same but for rounding.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_roco.answers import Answers, turn_lengths
from vllm_roco.eviction_schedule import EvictionSchedule

TURNS_PER_CHUNK = 4
"""Most chunks, of one turn each, in as many tokens as the server's chunk has."""


def least_chunk(server_chunk: int, block_size: int) -> int:
    """Return the fewest tokens of a chunk that a turn ends.

    Args:
        server_chunk: Most tokens of a chunk of requests without options.
        block_size: Tokens per block.
    """
    return max(block_size, server_chunk // TURNS_PER_CHUNK)


@dataclass(frozen=True, slots=True)
class ChunkEnds:
    """The lengths at which the chunks of one prompt end.

    Attributes:
        chunk: Most tokens of a chunk.
        lengths: All ends up to the last one that a turn makes, in order. Behind it, or
            from the beginning if there is none, there is one every `chunk` tokens.
        answers: Where earlier answers stand, in which steps end wherever something was
            evicted while they were written.
    """

    chunk: int
    lengths: Sequence[int] = ()
    answers: Answers = field(default_factory=Answers)

    @classmethod
    def of(
        cls,
        tokens: np.ndarray,
        turn_end_token_ids: Collection[int],
        chunk: int,
        least: int,
        block_size: int,
        answer_start_token_ids: Sequence[int] = (),
    ) -> ChunkEnds:
        """Return the ends of a prompt whose chunks also end where turns do.

        Whether a chunk ends at a length depends on the tokens up to that turn's end
        alone, so a prompt that continues another one has the same ends along it.

        Args:
            tokens: `[num_tokens]` int64, the prompt.
            turn_end_token_ids: Tokens that end a turn. A chunk ends with the last full
                block up to one.
            chunk: Most tokens of a chunk, whole blocks.
            least: What `least_chunk` returns. If `chunk` is no longer, no turn ends
                one.
            block_size: Tokens per block.
            answer_start_token_ids: Tokens behind which an answer begins; none if
                answers are read like everything else.
        """
        turns = turn_lengths(tokens, turn_end_token_ids)
        answers = Answers.of(tokens, answer_start_token_ids, turns)
        if chunk <= least:
            return cls(chunk, answers=answers)
        ends: list[int] = []
        last = 0
        for length in _whole_blocks(turns, block_size, answers):
            # in whole chunks, and behind the last of them
            num_chunks, rest = divmod(length - last, chunk)
            if rest < least:
                continue
            ends += range(last + chunk, last + num_chunks * chunk + 1, chunk)
            ends.append(length)
            last = length
        return cls(chunk, tuple(ends), answers)

    def following(self, length: int) -> int:
        """Return the first end behind a length, which may lie behind the prompt."""
        if self.lengths and length < self.lengths[-1]:
            return self.lengths[bisect_right(self.lengths, length)]
        return self._last_within(length) + self.chunk

    def within(self, length: int) -> int:
        """Return the last end within a length, 0 if there is none."""
        if self.lengths and length < self.lengths[-1]:
            index = bisect_right(self.lengths, length)
            return self.lengths[index - 1] if index else 0
        return self._last_within(length)

    def between(self, start: int, most: int) -> Sequence[int]:
        """Return all ends behind `start` up to `most`, in order."""
        first = self.following(start)
        lengths = self.lengths
        if not lengths or first > lengths[-1]:
            return range(first, most + 1, self.chunk)
        low, high = bisect_right(lengths, start), bisect_right(lengths, most)
        rest = range(lengths[-1] + self.chunk, most + 1, self.chunk)
        return [*lengths[low:high], *rest]

    def _last_within(self, length: int) -> int:
        """Return the last end within a length behind which no turn ends a chunk."""
        last = self.lengths[-1] if self.lengths else 0
        return last + (length - last) // self.chunk * self.chunk


def _whole_blocks(turns: np.ndarray, block_size: int, answers: Answers) -> list[int]:
    """Return the lengths of the whole blocks up to turns' ends, in order.

    Not where an answer begins between such a length and the token: the prompt before it
    was read on to its own end.
    """
    lengths = turns // block_size * block_size
    if answers.starts:
        starts = np.array([0, *answers.starts])
        lengths = lengths[lengths >= starts[np.searchsorted(starts, turns) - 1]]
    return [*map(int, np.unique(lengths))]


def next_step_ends(
    num_computed_tokens: int,
    num_prompt_tokens: int,
    num_tokens: int,
    ends: ChunkEnds,
    schedule: EvictionSchedule,
) -> tuple[int, int]:
    """Return the least and the greatest length at which the next step may end.

    A step of a prompt ends at the next chunk's end or at the prompt's. While nothing is
    evicted it may also end later, up to the last such place before the first eviction;
    never sooner, so that no request lives on what others leave and keeps them waiting.
    From there on both lengths are one. Earlier answers in a prompt, and tokens that
    were generated before a preemption, are read in chunks that also end where `E`
    grows: the first run took them one by one and evicted exactly there.

    Args:
        num_computed_tokens: Tokens computed so far, fewer than `num_tokens`.
        num_prompt_tokens: Tokens of the prompt.
        num_tokens: All known tokens: the prompt and what was generated already.
        ends: Where chunks end, once something is evicted.
        schedule: The eviction arithmetic.
    """
    end = min(num_tokens, ends.following(num_computed_tokens))
    if num_computed_tokens < num_prompt_tokens:
        stop = ends.answers.next_eviction(num_computed_tokens, schedule)
        end = min(end, num_prompt_tokens, stop)
    else:
        end = min(end, schedule.next_eviction(num_computed_tokens))
    free = schedule.next_eviction(0) - 1
    if num_prompt_tokens > free:
        # the chunk that evicts first is a whole one, if no answer ends a step before
        free = ends.within(free)
    free = min(free, num_tokens)
    if num_computed_tokens < free:
        return min(end, free), free
    return end, end
