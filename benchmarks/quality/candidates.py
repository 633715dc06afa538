# SPDX-License-Identifier: Apache-2.0
"""The ways of keeping that the ablation compares, each one change to the default."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.quality.oracle import Keep

DEFAULT = "default"
"""What the plugin ships: the reference of every comparison."""

_KEEP_FIELDS = {field.name for field in dataclasses.fields(Keep)}


@dataclass(frozen=True)
class Candidate:
    """A change to the default.

    Attributes:
        name: In tables and on the command line.
        changes: Fields of `Keep`, and of `oracle.rule.Rule` for what `Keep` lacks.
        recent_share: Newest tokens that are never evicted, as a share of the budget.
    """

    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    recent_share: float = 0.0

    def keep(self, budget: int) -> Keep:
        """Return the candidate at a budget."""
        fields: dict[str, Any] = {"method": "roco", "budget": budget}
        fields |= {k: v for k, v in self.changes.items() if k in _KEEP_FIELDS}
        options = tuple((k, v) for k, v in self.changes.items() if k not in fields)
        if self.recent_share:
            fields["recent"] = int(self.recent_share * budget)
        return Keep(**fields, options=options)


def _each(name: str, values: tuple[Any, ...], **others: Any) -> list[Candidate]:
    """Return one candidate for each value of a field."""
    label = ", ".join(f"{key}={value}" for key, value in others.items())
    label = f"{label}, " if label else ""
    return [
        Candidate(f"{label}{name}={value}", {**others, name: value}) for value in values
    ]


_BASELINES = [
    Candidate("full", {"method": "full"}),
    Candidate(DEFAULT),
    *(
        Candidate(method, {"method": method})
        for method in ("recent", "sink-recent", "token-roco", "h2o", "tova", "random")
    ),
    Candidate("token-roco, start=full", {"method": "token-roco", "start": "full"}),
]

_FIRST_STAGE = [
    *_each("shield_ratio", (0.0, 0.3, 0.5, 0.6, 0.8, 0.9, 1.0)),
    *_each("shield_ratio", (0.3, 0.5, 0.7, 1.0), shield="deviation"),
    *_each("shield_ratio", (0.5, 0.7, 1.0), shield="focus"),
    *_each("shield_ratio", (0.5, 0.7, 1.0), shield="rms"),
    *_each("fade", (0.9998, 0.9995, 0.999, 0.998, 0.995)),
    *_each("peak_queries", (2, 4, 8)),
    *_each("shield_heads", ("mean", "rms")),
    *_each("top_heads", (2, 4, 8), shield_heads="top"),
]

_SECOND_STAGE = [
    *_each("second", ("age", "rms", "focus", "deviation", "sum", "last", "random")),
    *_each("age_weight", (0.25, 0.5, 0.75)),
    *_each("second_heads", ("mean", "rms", "top")),
    *_each("forget", (0.9995, 0.999, 0.998, 0.995)),
]

_SHARING = [
    *_each("scope", ("layer", "head")),
    *_each("normalise", ("rank", "zscore", "none")),
    *_each("inside", ("max",)),
]

_MEASURING = [
    *_each("query_every", (2, 4, 16)),
    *_each("query_last", (16, 32, 64)),
    *_each("start", ("full",)),
]

_SIZES = [
    *_each("sink", (0, 64)),
    *_each("recent", (0, 64, 128)),
    *(
        Candidate(f"recent={share:.1%} of the budget", {}, recent_share=share)
        for share in (0.125, 0.25, 0.5)
    ),
    *_each("block_size", (8, 32, 64)),
    *_each("chunk", (16, 32, 64, 128, 512, 1024)),
    *_each("stride", (16, 32, 64, 256)),
]

_MIXED = [
    *_each("second_heads", ("mean", "rms"), shield_ratio=0.5),
    *_each("second_heads", ("mean",), shield_ratio=0.6),
    *_each("age_weight", (0.25, 0.5), shield_ratio=0.5),
    *_each("age_weight", (0.25, 0.5), second_heads="mean"),
    *_each("second_heads", ("mean",), shield="focus"),
    *_each("forget", (0.999,), second_heads="mean"),
    *_each("fade", (0.9995, 0.999), second_heads="mean"),
    *_each("normalise", ("rank",), second_heads="mean"),
    *_each("top_heads", (2, 4), shield_heads="top", second_heads="mean"),
    *_each("peak_queries", (2, 4), second_heads="mean"),
]

CANDIDATES = {
    candidate.name: candidate
    for candidate in (
        *_BASELINES,
        *_FIRST_STAGE,
        *_SECOND_STAGE,
        *_MIXED,
        *_SHARING,
        *_MEASURING,
        *_SIZES,
    )
}
"""Baselines first, then what is likeliest to change the default."""
