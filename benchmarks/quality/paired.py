# SPDX-License-Identifier: Apache-2.0
"""Comparisons of two methods on the same problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import binomtest, wilcoxon


@dataclass(frozen=True)
class Comparison:
    """How one method does against another on the same problems.

    Attributes:
        better: Problems on which it does better.
        worse: Problems on which it does worse.
        p_value: Two-sided, of no difference.
    """

    better: int
    worse: int
    p_value: float


def compare_answers(found: Sequence[float], reference: Sequence[float]) -> Comparison:
    """Compare problems solved, by McNemar's exact test."""
    pairs = list(zip(found, reference, strict=True))
    better = sum(ours > theirs for ours, theirs in pairs)
    worse = sum(ours < theirs for ours, theirs in pairs)
    p_value = binomtest(better, better + worse).pvalue if better + worse else 1.0
    return Comparison(better, worse, float(p_value))


def compare_nats(nats: Sequence[float], reference: Sequence[float]) -> Comparison:
    """Compare losses of passages, by Wilcoxon's signed-rank test; less is better."""
    pairs = list(zip(nats, reference, strict=True))
    better = sum(ours < theirs for ours, theirs in pairs)
    worse = sum(ours > theirs for ours, theirs in pairs)
    p_value = wilcoxon(nats, reference).pvalue if better + worse else 1.0
    return Comparison(better, worse, float(p_value))
