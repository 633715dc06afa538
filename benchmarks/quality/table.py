# SPDX-License-Identifier: Apache-2.0
"""The table that plots and reports are made of, one row a cell and metric."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path

from benchmarks.quality import intervals
from benchmarks.quality.cells import Cell
from benchmarks.quality.grid import FULL
from benchmarks.quality.outcomes import Outcome

COLUMNS = (
    *("task", "metric", "model", "context"),
    *("method", "engine", "policy", "shield", "shield_ratio", "block_size"),
    *("budget", "budget_ratio", "stride", "chunk"),
    *("n", "seed", "score", "ci_low", "ci_high"),
    *("of_full", "of_full_low", "of_full_high"),
    *("gpu", "commit"),
)

Row = dict[str, str]


def rows(outcomes: Mapping[Cell, Outcome]) -> list[dict[str, object]]:
    """Return the table of some outcomes, in their order."""
    table: list[dict[str, object]] = []
    for cell, outcome in outcomes.items():
        full = outcomes.get(full_of(cell))
        for metric, values in outcome.metrics.items():
            row = cell.to_json() | {
                "metric": metric,
                "budget_ratio": round(cell.budget_ratio, 4),
                "gpu": outcome.gpu,
                "commit": outcome.commit,
            }
            names = ("score", "ci_low", "ci_high")
            row |= _rounded(names, intervals.score(metric, tuple(values)))
            if full is not None and metric in ("accuracy", "perplexity"):
                share = intervals.share_of_full(
                    metric, tuple(values), tuple(full.metrics[metric])
                )
                names = ("of_full", "of_full_low", "of_full_high")
                row |= _rounded(names, share or ())
            table.append({name: row.get(name, "") for name in COLUMNS})
    return table


def full_of(cell: Cell) -> Cell:
    """Return the cell that has the same problems and the full cache."""
    return Cell.from_json(cell.to_json() | FULL.__dict__)


def write(path: Path, table: list[dict[str, object]]) -> None:
    """Write the table; a reader sees the old one or the new one, whole."""
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
    os.replace(unfinished, path)


def read(path: Path) -> list[Row]:
    """Return the rows of a table as they are written."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _rounded(names: tuple[str, ...], values: tuple[float, ...]) -> dict[str, object]:
    return {name: round(value, 4) for name, value in zip(names, values, strict=False)}
