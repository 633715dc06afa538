# SPDX-License-Identifier: Apache-2.0
"""Where earlier answers stand in a prompt: they are read as they were written.

While an answer was written, a stride was evicted wherever `E` grew, token by token. A
prompt that has the answer in it and evicts at those same lengths keeps what was kept
then. So the next turn of a conversation may go on from there.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_roco.eviction_schedule import NEVER, EvictionSchedule

FIRST_TURNS_AHEAD = 2
"""How many turns ahead a conversation's first one looks; the others look one ahead.

The second one can begin behind the first at little cost, and the third behind that.
"""


def turn_lengths(tokens: np.ndarray, turn_end_token_ids: Collection[int]) -> np.ndarray:
    """Return the lengths at which turns end.

    Args:
        tokens: `[num_tokens]` int64, the prompt.
        turn_end_token_ids: Tokens that end a turn.

    Returns:
        `[num_turns]` int64, ascending, the end token included.
    """
    # without a step of Python for each token, or for each that ends a turn; compared
    # with the few ids that do, without a table of all
    return np.flatnonzero(np.isin(tokens, [*turn_end_token_ids], kind="sort")) + 1


@dataclass(frozen=True, slots=True)
class Answers:
    """The answers in one prompt.

    Attributes:
        starts: Of each the length at which it begins, in order: of the prompt of the
            turn that was answered.
        ends: Of each the length at which it ends, its end token included. `NEVER` for
            one that is yet to be written, or goes on.
        question_start: Length at which the turn before the last question ends, 0 if
            there is none. Too short where no token ends that question.
    """

    starts: Sequence[int] = ()
    ends: Sequence[int] = ()
    question_start: int = 0

    @classmethod
    def of(
        cls,
        tokens: np.ndarray,
        answer_start_token_ids: Sequence[int],
        turns: np.ndarray,
    ) -> Answers:
        """Return the answers in a prompt.

        Which there are up to a length depends on the tokens up to there alone.

        Args:
            tokens: `[num_tokens]` int64, the prompt.
            answer_start_token_ids: Tokens, in this order, behind which an answer
                begins; none if answers cannot be told.
            turns: What `turn_lengths` returns; an answer ends with the first behind it.
        """
        width = len(answer_start_token_ids)
        if not width or len(tokens) < width:
            return cls()
        # without a step of Python for each token
        found = np.ones(len(tokens) - width + 1, dtype=bool)
        for place, token in enumerate(answer_start_token_ids):
            found &= tokens[place : place + len(found)] == token
        starts = np.flatnonzero(found) + width
        if not starts.size:
            return cls()
        behind = np.searchsorted(turns, starts, side="right")
        # one that begins within another is part of it
        ends, first = np.unique(np.append(turns, NEVER)[behind], return_index=True)
        before = behind[first[-1]] - 2
        question_start = int(turns[before]) if before >= 0 else 0
        return cls(tuple(starts[first].tolist()), tuple(ends.tolist()), question_start)

    def next_eviction(self, length: int, schedule: EvictionSchedule) -> int:
        """Return the first length behind `length` at which something was evicted.

        While answers were written, or when the prompt of one had been read.

        Args:
            length: At which a step begins.
            schedule: The eviction arithmetic.

        Returns:
            `NEVER` if there is none.
        """
        if not self.starts:
            return NEVER
        grows = schedule.next_eviction(length)
        index = bisect_left(self.ends, grows)
        if index == len(self.starts):
            return NEVER
        return max(grows, self.starts[index])

    def later_prompt(self, num_prompt_tokens: int, max_tokens: int) -> int | None:
        """Return how long the prompt of a later turn is likely to be.

        Of the next one: as much longer as this one is than that of the turn before, by
        an answer and a question. Of a first turn, the one `FIRST_TURNS_AHEAD`, as if
        all answers were as long as the question.

        Args:
            num_prompt_tokens: Length of this one.
            max_tokens: Most tokens of its answer, which count in a first turn alone.

        Returns:
            None if nobody is asked for an answer.
        """
        if not self.is_open:
            return None
        if self.last_written is not None:
            return 2 * num_prompt_tokens - self.last_written[0]
        question = num_prompt_tokens - self.question_start
        growth = question + min(question, max_tokens)
        return num_prompt_tokens + FIRST_TURNS_AHEAD * growth

    @property
    def is_open(self) -> bool:
        """Whether what is written behind the prompt is an answer."""
        return bool(self.ends) and self.ends[-1] == NEVER

    @property
    def is_first_turn(self) -> bool:
        """Whether the prompt asks for an answer, and has none yet."""
        return len(self.ends) == 1 and self.is_open

    @property
    def written_ends(self) -> Sequence[int]:
        """Ends of the answers that are in the prompt with an end token."""
        return self.ends[:-1] if self.is_open else self.ends

    @property
    def last_written(self) -> tuple[int, int] | None:
        """Where the last one of these begins and ends, None if there is none."""
        ends = self.written_ends
        return (self.starts[len(ends) - 1], ends[-1]) if ends else None
