# SPDX-License-Identifier: Apache-2.0
"""A cell's score, its share of the full cache's, 95 % intervals, and comparisons.

Proportions have Wilson's interval, everything else the percentiles of a bootstrap over
problems; a share of the full cache's score is bootstrapped over pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from scipy.stats import binomtest, bootstrap, wilcoxon

LEVEL = 0.95
_RESAMPLES = 4000

Interval = tuple[float, float, float]
"""Value, and both ends of its interval."""


# a table is written anew for every cell that is added
@cache
def score(metric: str, values: tuple[float, ...]) -> Interval:
    """Return what the problems come to.

    Args:
        metric: `perplexity` for losses, of which the mean is exponentiated; the mean
            itself of everything else.
        values: One number a problem.
    """
    value = float(_statistic(metric)(np.asarray(values)))
    if metric.startswith("accuracy") and set(values) <= {0, 1}:
        test = binomtest(round(sum(values)), len(values))
        interval = test.proportion_ci(LEVEL, method="wilson")
        return value, float(interval.low), float(interval.high)
    return value, *_bootstrap((values,), _statistic(metric))


@cache
def share_of_full(
    metric: str, values: tuple[float, ...], full: tuple[float, ...]
) -> Interval | None:
    """Return the score over the full cache's, of the same problems.

    Returns:
        None where there is nothing to divide by.
    """
    statistic = _statistic(metric)

    def ratio(ours: np.ndarray, theirs: np.ndarray, axis: int = -1) -> np.ndarray:
        # a resample may have no problem that the full cache solves
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = statistic(ours, axis) / statistic(theirs, axis)
        result: np.ndarray = np.nan_to_num(shares, nan=1.0)
        return result

    value = float(statistic(np.asarray(full)))
    if not value:
        return None
    share = float(statistic(np.asarray(values))) / value
    return share, *_bootstrap((values, full), ratio)


def _statistic(metric: str) -> Callable[..., Any]:
    if metric == "perplexity":
        return lambda losses, axis=-1: np.exp(np.mean(losses, axis))
    return np.mean


def _bootstrap(
    samples: tuple[Sequence[float], ...], statistic: Callable[..., Any]
) -> tuple[float, float]:
    if len(samples[0]) < 2:
        return float("nan"), float("nan")
    result = bootstrap(
        samples,
        statistic,
        n_resamples=_RESAMPLES,
        paired=True,
        vectorized=True,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    interval = result.confidence_interval
    return float(interval.low), float(interval.high)


def compare(
    metric: str, values: Sequence[float], reference: Sequence[float]
) -> tuple[int, int, float]:
    """Compare two methods on the same problems.

    Answers that are right or wrong by McNemar's exact test, losses by Wilcoxon's
    signed-rank test; less of a loss is better.

    Args:
        metric: `perplexity` for losses, anything else for what more is better of.
        values: One number a problem.
        reference: The other method's.

    Returns:
        Problems on which the first does better, those on which it does worse, and the
        two-sided p-value of no difference.
    """
    pairs = np.asarray([values, reference], float)
    ours, theirs = -pairs if metric == "perplexity" else pairs
    better, worse = int((ours > theirs).sum()), int((ours < theirs).sum())
    p_value = 1.0
    if better + worse and metric == "perplexity":
        p_value = wilcoxon(ours, theirs).pvalue
    elif better + worse:
        p_value = binomtest(better, better + worse).pvalue
    return better, worse, float(p_value)
