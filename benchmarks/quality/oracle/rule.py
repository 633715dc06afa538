# SPDX-License-Identifier: Apache-2.0
"""Every method as one rule: what is measured, and by what the victims are chosen.

All of them evict in at most two stages. Entries (tokens or blocks) with the largest
values of one statistic are shielded; of the others those with the smallest values of a
second statistic go. What sets the methods apart are the statistics, the size of an
entry, and who shares a choice.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from benchmarks.quality.oracle.eviction_method import BLOCK_METHODS, EvictionMethod

MEASURED = ("mean", "deviation", "peak", "rms", "focus", "sum", "last")
"""Statistics of the attention that an entry receives."""

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

    @property
    def measures(self) -> bool:
        """Whether the choice depends on attention."""
        return self.shield in MEASURED or self.second in MEASURED


def rule_of(method: EvictionMethod) -> Rule:
    """Return the rule of any method but `full`.

    Raises:
        ValueError: An option is unknown, or its value is not allowed.
    """
    ends: dict[str, Any] = {"sink": method.sink, "recent": method.recent}
    if method.name in BLOCK_METHODS:
        ends |= {"unit": method.block_size, "scope": "all", "candidates": "home"}
    rules = {
        "roco": lambda: Rule(
            **ends, shield=method.shield, shield_ratio=method.shield_ratio
        ),
        "recent": lambda: Rule(**ends, second="age"),
        "token-roco": lambda: Rule(
            sink=4, recent=10, shield="deviation", shield_ratio=0.3, exposed="budget"
        ),
        "h2o": lambda: Rule(recent=method.budget // 2, second="sum"),
        "tova": lambda: Rule(
            scope="layer", second="last", second_heads="mean", normalise="none"
        ),
        "sink-recent": lambda: Rule(**ends, scope="all", second="age"),
        "random": lambda: Rule(**ends, second="random"),
    }
    return _with_options(rules[method.name](), method.options)


def _with_options(rule: Rule, options: tuple[tuple[str, str | float], ...]) -> Rule:
    current = dataclasses.asdict(rule)
    changes: dict[str, Any] = {}
    for name, value in options:
        if name not in current:
            raise ValueError(
                f"option {name!r} = {value!r} is unknown. Use {', '.join(current)}."
            )
        # a table's numbers come back as floats
        changes[name] = type(current[name])(value)
    return dataclasses.replace(rule, **changes)
