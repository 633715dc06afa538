# SPDX-License-Identifier: Apache-2.0
"""The options of a simulated run, and how many blocks go at which step.

Everything here is arithmetic on token counts; which blocks go is victims.py's.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Literal, get_args

Policy = Literal["roco", "h2o", "random", "recent"]
Shield = Literal["contribution", "peak", "deviation"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What one simulated run keeps, and how fast it reads.

    What a server has a default for has none here: a test states every value it depends
    on, so a changed default of the code under test cannot drift away unnoticed.

    Attributes:
        policy: "roco" (statistics), "h2o" (who received the least mass in sum goes),
            "random" (a number of each block's own decides) or "recent" (the oldest go).
        shield: The statistic of RoCo's first stage; unused by the others.
        shield_ratio: Share of the budget's blocks that is shielded, 0 to 1.
        budget: Tokens kept, a multiple of `block_size`.
        stride: Tokens evicted at a time, a multiple of `block_size`.
        chunk: Prompt tokens read per step, a multiple of `block_size`.
        sink: First tokens that are never evicted.
        recent: Newest tokens that are never evicted.
        block_size: Tokens per block.
        evicts_until: Length from which on nothing more goes; None for no such length.
        seed: Of "random".

    Raises:
        ValueError: A value is out of its range, or sink and recent leave no room.
    """

    policy: Policy
    shield: Shield
    shield_ratio: float
    budget: int
    stride: int
    chunk: int
    sink: int
    recent: int
    block_size: int
    evicts_until: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _require(
            self.policy in get_args(Policy), "policy", self.policy, get_args(Policy)
        )
        _require(
            self.shield in get_args(Shield), "shield", self.shield, get_args(Shield)
        )
        _require(
            0 <= self.shield_ratio <= 1, "shield_ratio", self.shield_ratio, "0 to 1"
        )
        _require(self.block_size > 0, "block_size", self.block_size, "above 0")
        for name in ("budget", "stride", "chunk"):
            value = getattr(self, name)
            allowed = f"a positive multiple of block_size={self.block_size}"
            _require(value > 0 and value % self.block_size == 0, name, value, allowed)
        for name in ("sink", "recent"):
            value = getattr(self, name)
            _require(value >= 0, name, value, "0 or more")
        protected = sum(
            math.ceil(x / self.block_size) for x in (self.sink, self.recent)
        )
        _require(
            protected <= self.budget_blocks,
            "sink + recent",
            f"{protected} blocks",
            f"at most the budget's {self.budget_blocks} blocks",
        )

    @property
    def budget_blocks(self) -> int:
        """Blocks that the budget holds (the design's B)."""
        return self.budget // self.block_size

    @property
    def stride_blocks(self) -> int:
        """Blocks evicted at a time (the design's S)."""
        return self.stride // self.block_size

    def evicted_blocks(self, num_computed_tokens: int) -> int:
        """Counts the blocks that are gone once so many tokens are computed (E(n))."""
        if self.evicts_until is not None:
            num_computed_tokens = min(num_computed_tokens, self.evicts_until)
        full_blocks = num_computed_tokens // self.block_size
        strides = max(0, (full_blocks - self.budget_blocks) // self.stride_blocks)
        return self.stride_blocks * strides

    def step_ends(
        self, num_prompt_tokens: int, max_new_tokens: int
    ) -> Iterator[tuple[int, int]]:
        """Yields the steps of a run as (computed before, computed after).

        Prompt chunks end at multiples of `chunk` or at the prompt's end; then one
        token a step. The last generated token is never computed.
        """
        before = 0
        while before < num_prompt_tokens:
            after = min((before // self.chunk + 1) * self.chunk, num_prompt_tokens)
            yield before, after
            before = after
        for before in range(num_prompt_tokens, num_prompt_tokens + max_new_tokens - 1):
            yield before, before + 1


def _require(valid: bool, name: str, value: object, allowed: object) -> None:
    if not valid:
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}")
