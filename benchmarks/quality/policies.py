# SPDX-License-Identifier: Apache-2.0
"""The policies that a search compares in the oracle, each one change to its base.

The base was the plugin's default when the search began; what was found since is among
the changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from benchmarks.quality.cells import Setup

BASE = "base: peak, 0.7"
"""The reference of every comparison: a shield of peaks that lend nothing."""
RECENT_SHARE = "recent_share"
"""Newest tokens that are never evicted, as a share of the budget."""

_OF_A_SETUP = {field.name for field in fields(Setup)}
_BASE = {
    "policy": "roco",
    "shield": "peak",
    "shield_ratio": 0.7,
    "stride": 128,
    "chunk": 256,
}


def setup(name: str, budget: int) -> Setup:
    """Return one of `POLICIES` at a budget."""
    changes = dict(POLICIES[name])
    if share := changes.pop(RECENT_SHARE, None):
        changes["recent"] = int(share * budget)
    known = {key: changes.pop(key) for key in changes.keys() & _OF_A_SETUP}
    return Setup(
        method=name,
        engine="oracle",
        budget=budget,
        options=tuple(changes.items()),
        **{**_BASE, **known},
    )


def _each(field: str, *values: Any, **others: Any) -> Iterator[dict[str, Any]]:
    """Yield the changes for each value of a field."""
    for value in values:
        yield {**others, field: value}


def _name(changes: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in changes.items())


BASELINES: dict[str, dict[str, Any]] = {
    "full": {"policy": "full"},
    BASE: {},
    **{
        method: {"policy": method}
        for method in ("recent", "sink-recent", "token-roco", "h2o", "tova", "random")
    },
    "token-roco, start=full": {"policy": "token-roco", "start": "full"},
}
"""Methods that are no change to the base."""

_LENDING = {"neighbours": 0.75, "second_heads": "mean"}
_CHANGES = (
    # the first stage
    *_each("shield_ratio", 0.0, 0.3, 0.5, 0.6, 0.8, 0.9, 1.0),
    *_each("shield_ratio", 0.3, 0.5, 0.7, 1.0, shield="deviation"),
    *_each("shield_ratio", 0.5, 0.7, 1.0, shield="focus"),
    *_each("shield_ratio", 0.5, 0.7, 1.0, shield="rms"),
    *_each("neighbours", 0.75, 0.9, 1.0),
    *_each("neighbours", 0.75, 0.9, 1.0, shield_ratio=1.0),
    *_each("neighbours", 0.0, 0.75, 0.9, shield="contribution", shield_ratio=0.7),
    *_each("neighbours", 0.0, 0.75, 0.9, shield="contribution", shield_ratio=1.0),
    # what dropping an entry does to the output, exactly (arXiv 2504.14051)
    *_each("neighbours", 0.0, 0.75, shield="error", shield_ratio=1.0),
    *_each("neighbours", 0.0, 0.75, shield="output", shield_ratio=1.0),
    *_each("second", "contribution"),
    *(
        {**_LENDING, "shield": shield, "shield_ratio": ratio}
        for shield, ratios in (
            ("contribution", (0.7, 0.85)),
            ("error", (0.7, 0.85)),
            ("output", (0.7, 0.85, 0.9)),
        )
        for ratio in ratios
    ),
    *_each("fade", 0.9998, 0.9995, 0.999, 0.998, 0.995),
    *_each("peak_queries", 2, 4, 8),
    *_each("shield_heads", "mean", "rms"),
    *_each("top_heads", 2, 4, 8, shield_heads="top"),
    # the second stage
    *_each("second", "age", "rms", "focus", "deviation", "sum", "last", "random"),
    *_each("age_weight", 0.25, 0.5, 0.75),
    *_each("second_heads", "mean", "rms", "top"),
    *_each("forget", 0.9995, 0.999, 0.998, 0.995),
    # both
    *_each("second_heads", "mean", "rms", shield_ratio=0.5),
    *_each("second_heads", "mean", shield_ratio=0.6),
    *_each("age_weight", 0.25, 0.5, shield_ratio=0.5),
    *_each("age_weight", 0.25, 0.5, second_heads="mean"),
    *_each("second_heads", "mean", shield="focus"),
    *_each("forget", 0.999, second_heads="mean"),
    *_each("fade", 0.9995, 0.999, second_heads="mean"),
    *_each("normalise", "rank", second_heads="mean"),
    *_each("top_heads", 2, 4, shield_heads="top", second_heads="mean"),
    *_each("peak_queries", 2, 4, second_heads="mean"),
    # who shares a choice, and how
    *_each("scope", "layer", "head"),
    *_each("normalise", "rank", "zscore", "none"),
    *_each("inside", "max"),
    # what is measured
    *_each("query_every", 2, 4, 16),
    *_each("query_last", 16, 32, 64),
    *_each("start", "full"),
    # sizes
    *_each("sink", 0, 64),
    *_each("recent", 0, 64, 128),
    *_each("block_size", 8, 32, 64),
    *_each("chunk", 16, 32, 64, 128, 512, 1024),
    *_each("stride", 16, 32, 64, 256),
)

POLICIES = {
    **BASELINES,
    **{_name(changes): changes for changes in _CHANGES},
    **{
        f"recent={share:.1%} of the budget": {RECENT_SHARE: share}
        for share in (0.125, 0.25, 0.5)
    },
}
"""Changes by name: fields of `Setup`, `EvictionMethod` and `Rule`."""
