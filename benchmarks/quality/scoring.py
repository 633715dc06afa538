# SPDX-License-Identifier: Apache-2.0
"""From results to the rows that tables and pictures are made of: scores, intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pandas as pd

from benchmarks.quality import significance
from benchmarks.quality.cells import Cell
from benchmarks.quality.grid import FULL
from benchmarks.quality.policies import BASE
from benchmarks.quality.results import Result

COLUMNS = (
    *("task", "metric", "model", "context"),
    *("method", "engine", "policy", "shield", "shield_ratio", "block_size"),
    *("budget", "budget_ratio", "stride", "chunk"),
    *("n", "seed", "score", "ci_low", "ci_high"),
    *("of_full", "of_full_low", "of_full_high"),
    *("gpu", "commit"),
)
SEARCH_COLUMNS = (
    *("model", "n", "seed", "task", "context", "budget_ratio", "method"),
    *("score", "ci_low", "ci_high", "better", "worse", "p_value", "gpu", "commit"),
)
_DIGITS = 4


def rows(results: Mapping[Cell, Result]) -> pd.DataFrame:
    """Return a row for each cell and metric, in their order.

    `of_full` is the share of what the full cache makes of the same problems.
    """
    found = []
    for cell, result in results.items():
        full = results.get(full_of(cell))
        for metric, values in result.metrics.items():
            row = _row(cell, result, metric)
            if full is not None and metric.startswith(("accuracy", "perplexity")):
                share = significance.share_of_full(
                    metric, tuple(values), tuple(full.metrics[metric])
                )
                names = ("of_full", "of_full_low", "of_full_high")
                row |= _rounded(names, share or ())
            found.append(row)
    return pd.DataFrame(found, columns=list(COLUMNS), dtype=object)


def search_rows(results: Mapping[Cell, Result]) -> pd.DataFrame:
    """Return a row for each cell, each beside the base on the same problems."""
    references = {
        _problems(cell): result
        for cell, result in results.items()
        if cell.setup.method == BASE
    }
    found = []
    for cell, result in results.items():
        ((metric, values),) = result.metrics.items()
        row = _row(cell, result, metric)
        if reference := references.get(_problems(cell)):
            better, worse, p_value = significance.compare(
                metric, values, reference.metrics[metric]
            )
            row |= {
                "better": better,
                "worse": worse,
                "p_value": float(f"{p_value:.3g}"),
            }
        found.append(row)
    return pd.DataFrame(found, columns=list(SEARCH_COLUMNS), dtype=object)


def full_of(cell: Cell) -> Cell:
    """Return the cell that has the same problems and the full cache."""
    return replace(cell, setup=FULL)


def _problems(cell: Cell) -> tuple[Cell, float]:
    return full_of(cell), cell.budget_ratio


def _row(cell: Cell, result: Result, metric: str) -> dict[str, object]:
    names = ("score", "ci_low", "ci_high")
    score = significance.score(metric, tuple(result.metrics[metric]))
    return {
        **cell.to_json(),
        "metric": metric,
        "budget_ratio": round(cell.budget_ratio, _DIGITS),
        "gpu": result.gpu,
        "commit": result.commit,
        **_rounded(names, score),
    }


def _rounded(names: tuple[str, ...], values: tuple[float, ...]) -> dict[str, object]:
    return {
        name: round(value, _DIGITS) for name, value in zip(names, values, strict=False)
    }
