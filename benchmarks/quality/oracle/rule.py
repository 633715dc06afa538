# SPDX-License-Identifier: Apache-2.0
"""Every method as one rule: what is measured, and by what the victims are chosen.

All of them evict in at most two stages. Entries (tokens or blocks) with the largest
values of one statistic are shielded; of the others those with the smallest values of a
second statistic go. What sets the methods apart are the statistics, the size of an
entry, and who shares a choice.
"""

from __future__ import annotations

from dataclasses import dataclass

MEASURED = (
    *("mean", "deviation", "peak", "rms", "focus", "sum", "last"),
    *("contribution", "output", "error"),
)
"""Statistics of the attention that an entry receives.

The contribution is the peak times the distance of the entry's mean value from the mean
of all, which is about what `OutputPeaks` works out: the output and the error.
"""
PEAKS_OF_OUTPUT = ("output", "error")
"""Those for which queries' outputs are looked at."""

UNMEASURED = ("age", "random")

_ALLOWED: dict[str, tuple[str, ...]] = {
    "scope": ("all", "layer", "head"),
    "candidates": ("home", "all"),
    "exposed": ("candidates", "budget"),
    "shield": ("none", *MEASURED),
    "second": (*MEASURED, *UNMEASURED),
    "shield_heads": ("max", "mean", "rms", "top"),
    "second_heads": ("max", "mean", "rms", "top"),
    "normalise": ("share", "rank", "zscore", "none"),
    "inside": ("sum", "max"),
    "start": ("first", "full"),
}


@dataclass(frozen=True)
class Rule:
    """How one method measures and chooses.

    Attributes:
        unit: Tokens of an entry.
        sink: First tokens that never go.
        recent: Newest tokens that never go.
        scope: Who shares one choice: `all` layers and heads, the heads of a `layer`, or
            nobody (`head`).
        candidates: `home`: the first `budget + m` tokens' entries, `m` of which go;
            `all`: every entry.
        shield: Statistic of the first stage, or `none`.
        shield_ratio: Share of the budget's entries that it shields.
        exposed: What is left to the second stage: the `candidates` that are not
            shielded, or as many entries as are not shielded of the `budget`, however
            many more there are (the paper's form).
        second: Statistic of the second stage; `age` lets the oldest go.
        age_weight: Share of age in the second stage, 0 to 1; both count by rank.
        shield_heads: What stands for the heads that share a choice: the `max`, `mean`
            or `rms` of their values, or the mean of the `top` ones.
        second_heads: The same for the second stage.
        top_heads: How many heads `top` takes.
        normalise: What a head's values are turned into before: `share` of their sum,
            `rank`, `zscore` or nothing (`none`).
        neighbours: Share of a shield's value that an entry has at least of those beside
            it in the text.
        inside: What stands for a block's tokens: the `sum` or `max` of their attention.
        peak_queries: The peak is the mean of so many largest values.
        fade: Factor on the peak, for every query that follows.
        forget: Factor on sums, squares and counts, for every query that follows.
        query_every: Only one of so many queries is measured.
        query_last: Only so many last queries of a step are measured; 0 for all.
        start: Measure from the `first` step, or once the budget is `full`.
    """

    unit: int = 1
    sink: int = 0
    recent: int = 0
    scope: str = "head"
    candidates: str = "all"
    shield: str = "none"
    shield_ratio: float = 0.0
    exposed: str = "candidates"
    second: str = "mean"
    age_weight: float = 0.0
    shield_heads: str = "max"
    second_heads: str = "max"
    top_heads: int = 4
    normalise: str = "share"
    neighbours: float = 0.0
    inside: str = "sum"
    peak_queries: int = 1
    fade: float = 1.0
    forget: float = 1.0
    query_every: int = 1
    query_last: int = 0
    start: str = "first"

    def __post_init__(self) -> None:
        for name, allowed in _ALLOWED.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(
                    f"{name} = {value!r} is not allowed. Use {' or '.join(allowed)}."
                )
        if not 0 <= self.shield_ratio <= 1:
            raise ValueError(
                f"shield_ratio = {self.shield_ratio} is not allowed. Use 0 to 1."
            )

    @property
    def measures(self) -> bool:
        """Whether the choice depends on attention."""
        return self.shield in MEASURED or self.second in MEASURED
