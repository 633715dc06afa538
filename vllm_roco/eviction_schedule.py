# SPDX-License-Identifier: Apache-2.0
"""How many blocks a sequence has given up, as a function of its length alone.

The scheduler and every worker work this out by themselves from the number of computed
tokens, so nothing is sent back from the device and there is no state to disagree about.
Which blocks go is data and is decided elsewhere (`vllm_roco.policy`).
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_roco.config import blocks_of

NEVER = 2**31 - 1
"""A length that no sequence reaches."""


@dataclass(frozen=True)
class EvictionSchedule:
    """The arithmetic of one sequence's block-table row.

    ::

        row index      0 ... B-1 | B ......... B+E-1 | B+E ....... last
                       resident  | freed (null)      | incoming blocks

    `B` is the budget in blocks, `E` the blocks evicted so far. The live table, over
    which the sequence attends, is the resident blocks followed by the incoming ones.

    Attributes:
        block_size: Tokens per block.
        budget: Tokens that the resident blocks hold, a multiple of `block_size`.
        stride: Tokens evicted at a time, a multiple of `block_size`.
        until: Length from which on nothing more is evicted; 0 for never at all.
    """

    block_size: int
    budget: int
    stride: int
    until: int = NEVER

    @property
    def budget_blocks(self) -> int:
        """`B`, the resident blocks."""
        return self.budget // self.block_size

    @property
    def stride_blocks(self) -> int:
        """`S`, the blocks evicted at a time."""
        return self.stride // self.block_size

    def evicted_blocks(self, num_computed_tokens: int) -> int:
        """Return `E(n)`, the blocks evicted once `n` tokens are computed."""
        stride = self.stride_blocks
        evicting = min(num_computed_tokens, self.until)
        over = evicting // self.block_size - self.budget_blocks
        return max(0, over // stride) * stride

    def live_tokens(self, num_tokens: int, num_computed_tokens: int) -> int:
        """Return the tokens attended at length `num_tokens` within one step.

        Args:
            num_tokens: Length of the sequence including the step's own tokens.
            num_computed_tokens: Tokens computed before the step.
        """
        return num_tokens - self.evicted_blocks(num_computed_tokens) * self.block_size

    def next_eviction(self, num_computed_tokens: int) -> int:
        """Return the smallest length above `n` at which `E` grows, or `NEVER`."""
        evicted = self.evicted_blocks(num_computed_tokens)
        length = (self.budget_blocks + evicted + self.stride_blocks) * self.block_size
        return length if length <= self.until else NEVER

    def max_live_tokens(self) -> int:
        """Return the most tokens attended over after a step that may still evict."""
        return self.budget + self.stride - 1

    def max_blocks(
        self, max_in_flight_tokens: int, num_tokens: int | None = None
    ) -> int:
        """Return the most blocks that the manager holds for one sequence.

        Blocks are freed once the step that evicted them has been processed, so the
        blocks of the tokens in flight come on top.

        Args:
            max_in_flight_tokens: Most tokens of one sequence that are scheduled but
                not yet processed, the step being scheduled included.
            num_tokens: Greatest length of the sequence; None for any length, which is
                a bound only where eviction never ends.
        """
        in_flight = blocks_of(max_in_flight_tokens, self.block_size)
        most = self.budget_blocks + self.stride_blocks + in_flight + 1
        if num_tokens is None:
            return most
        all_blocks = blocks_of(num_tokens, self.block_size)
        kept = all_blocks - self.evicted_blocks(num_tokens)
        return min(all_blocks, max(most, kept))

    def max_tokens_in(self, num_blocks: int, max_in_flight_tokens: int) -> int:
        """Return the greatest length that `num_blocks` suffice for.

        The inverse of `max_blocks`, for lengths from `until` on if that is one.

        Args:
            num_blocks: Blocks that a sequence can have.
            max_in_flight_tokens: As in `max_blocks`.
        """
        evicted = 0
        if self.max_blocks(max_in_flight_tokens) <= num_blocks:
            evicted = self.evicted_blocks(NEVER)
        return (num_blocks + evicted) * self.block_size
