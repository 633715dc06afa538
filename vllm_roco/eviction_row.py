# SPDX-License-Identifier: Apache-2.0
"""What holds for one request, in eight integers that everybody reads.

The scheduler works a row out once, from the request's options and its prompt; nobody
else rounds, divides or needs to know the prompt's length.
"""

from __future__ import annotations

from typing import NamedTuple

from vllm_roco.eviction_schedule import EvictionSchedule

NUM_ROW_FIELDS = 8
"""Integers of a row, int32 in a tensor."""

ROW_KEY = "roco_row"
"""Key of `SamplingParams.extra_args` under which workers find a request's row."""

SCORE_MEAN, SCORE_SUM, SCORE_NONE, SCORE_RANDOM = range(4)
"""By what the second stage chooses: the smallest go first, of equal ones the oldest."""

SCORE_MASK = 7
SHIELD_BY_DEVIATION = 8
SHIELD_BY_CONTRIBUTION = 16
"""Bits of `EvictionRow.flags`."""


NEIGHBOUR_SHARE = 0.75
"""Of the contributions beside it in the text, what a block has at least."""


class EvictionRow(NamedTuple):
    """How one request evicts.

    Attributes:
        resident_blocks: Blocks that stay in front of the gap, at least 1.
        stride_blocks: Blocks evicted at a time, at least 1.
        until: Length from which on nothing more is evicted; 0 for a request that never
            evicts, and of which nothing is measured.
        sink: First tokens that are never evicted.
        recent: Newest tokens that are never evicted.
        shield_blocks: Blocks that the first stage shields.
        flags: A `SCORE_...` and perhaps one `SHIELD_BY_...`; the peak has none.
        seed: Of `SCORE_RANDOM`.
    """

    resident_blocks: int
    stride_blocks: int
    until: int
    sink: int
    recent: int
    shield_blocks: int
    flags: int
    seed: int

    def schedule(self, block_size: int) -> EvictionSchedule:
        """Return the eviction arithmetic of the request."""
        return EvictionSchedule(
            block_size=block_size,
            budget=self.resident_blocks * block_size,
            stride=self.stride_blocks * block_size,
            until=self.until,
        )

    @property
    def score(self) -> int:
        """By what the second stage chooses, a `SCORE_...`."""
        return self.flags & SCORE_MASK

    @property
    def shields_by_deviation(self) -> bool:
        """Whether the first stage shields by the deviation, not by the peak."""
        return bool(self.flags & SHIELD_BY_DEVIATION)

    @property
    def shields_by_contribution(self) -> bool:
        """Whether the first stage shields by the contribution, not by the peak."""
        return bool(self.flags & SHIELD_BY_CONTRIBUTION)

    def measures(self, num_computed_tokens: int) -> bool:
        """Return whether a step that begins at a length adds to the statistics."""
        return num_computed_tokens < self.until
