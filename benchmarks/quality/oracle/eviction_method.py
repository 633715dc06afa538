# SPDX-License-Identifier: Apache-2.0
"""What a run keeps: the method and its numbers, as they stand in a table's row."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace

from benchmarks.quality.oracle.rule import Rule

_BLOCKS = Rule(unit=16, sink=16, recent=32, scope="all", candidates="home")
_TOKENS = Rule(sink=16, recent=32)
RULES = {
    "full": Rule(scope="all", second="age"),
    # the plugin's: one choice of blocks for all layers and heads
    "roco": replace(_BLOCKS, shield="contribution", shield_ratio=1.0, neighbours=0.75),
    "recent": replace(_BLOCKS, second="age"),
    # published, on tokens: arXiv 2402.06262
    "token-roco": Rule(
        sink=4, recent=10, shield="deviation", shield_ratio=0.3, exposed="budget"
    ),
    # arXiv 2306.14048; half of the budget is for the newest
    "h2o": Rule(second="sum"),
    # arXiv 2401.06104
    "tova": Rule(scope="layer", second="last", second_heads="mean", normalise="none"),
    # arXiv 2309.17453
    "sink-recent": replace(_TOKENS, scope="all", second="age"),
    "random": replace(_TOKENS, second="random"),
}
"""The methods by name; `full` keeps everything."""


@dataclass(frozen=True)
class EvictionMethod:
    """One way to keep at most `budget` tokens of a sequence.

    Attributes:
        rule: How the victims are chosen.
        budget: Tokens kept; a multiple of the rule's unit.
        stride: Tokens evicted at a time; the same.
        chunk: Prompt tokens read per step.

    Raises:
        ValueError: A value is out of range.
    """

    rule: Rule
    budget: int
    stride: int
    chunk: int

    def __post_init__(self) -> None:
        unit = self.rule.unit
        for name, divisor in (("budget", unit), ("stride", unit), ("chunk", 1)):
            value = getattr(self, name)
            if value <= 0 or value % divisor:
                raise ValueError(
                    f"{name} = {value} is not allowed. Use a multiple of {divisor}, "
                    "above 0."
                )
        ends = (self.rule.sink, self.rule.recent)
        spared = sum(-(-tokens // unit) * unit for tokens in ends)
        if spared > self.budget:
            raise ValueError(
                f"sink + recent = {spared} is not allowed. Use at most budget = "
                f"{self.budget}, in whole blocks."
            )

    @classmethod
    def named(
        cls,
        name: str,
        budget: int = sys.maxsize,
        stride: int = 128,
        chunk: int = 256,
        **changes: int | float | str,
    ) -> EvictionMethod:
        """Return one of `RULES` with its numbers.

        Args:
            name: Key of `RULES`.
            budget: See the class; the method `full` has none.
            stride: Likewise.
            chunk: Likewise.
            **changes: Fields of `Rule`, in the place of the method's.

        Raises:
            ValueError: There is no such method, or a value is not allowed.
        """
        if name not in RULES:
            raise ValueError(f"{name!r} is no method. Use {' or '.join(RULES)}.")
        if name == "full":
            budget, stride = sys.maxsize, 1
        if name == "h2o":
            changes = {"recent": budget // 2, **changes}
        rule = replace(RULES[name], **changes)  # type: ignore[arg-type]
        return cls(rule, budget, stride, chunk)

    def evicted_tokens(self, num_computed_tokens: int) -> int:
        """Return how many tokens a sequence has given up at this length.

        Every method gives up as many at the same time: whenever the sequence has grown
        by `stride` past the budget, `stride` go.
        """
        over = num_computed_tokens - self.budget
        return max(0, over // self.stride) * self.stride

    def most_live_tokens(self, num_tokens: int) -> int:
        """Return the most tokens attended in reading and writing `num_tokens`."""
        return min(num_tokens, self.budget + self.stride + self.chunk)
