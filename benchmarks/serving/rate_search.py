# SPDX-License-Identifier: Apache-2.0
"""Finds the largest rate at which requests keep their limits."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

SHARE = 0.99
"""Of the requests, must keep their limits; of fewer than a hundred, all."""
GROWTH = 1.5
"""From a rate that is kept to the next one, until one is not."""
DESCENT = 2
"""From the next one to a rate that is not kept, until one is."""
LEAST = 1 / 8
"""Share of the first rate below which none is tried: so many requests take long."""
_DIGITS = 3


def next_rate(kept: Mapping[float, bool], first: float, precision: float) -> float:
    """Return the rate to measure next; 0 if the limit is known well enough.

    It depends on what is known alone, so that a search that was cut short goes on.

    Args:
        kept: By rate, whether the requests kept their limits.
        first: The rate to begin with.
        precision: Ratio of the lowest rate that is not kept to the highest one below
            that ends the search; more than 1.
    """
    if not kept:
        return first
    highest, lowest = bracket(kept)
    if lowest is None:
        return _rounded(GROWTH * (highest or first))
    if highest is None:
        lower = _rounded(lowest / DESCENT)
        return lower if lower >= LEAST * first else 0
    middle = _rounded(sqrt(highest * lowest))
    is_known = lowest / highest <= precision or middle in kept
    return 0 if is_known else middle


def bracket(kept: Mapping[float, bool]) -> tuple[float | None, float | None]:
    """Return the largest rate that is kept and the lowest that is not, or None.

    A rate that is kept above one that is not counts for nothing: by chance, its
    requests were easier.
    """
    lowest = min((rate for rate, good in kept.items() if not good), default=None)
    below = [
        rate for rate, good in kept.items() if good and (not lowest or rate < lowest)
    ]
    return max(below, default=None), lowest


def _rounded(rate: float) -> float:
    return float(f"{rate:.{_DIGITS}g}")
