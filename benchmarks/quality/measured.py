# SPDX-License-Identifier: Apache-2.0
"""The rows of a finished table, as plots and reports ask for them."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality import table
from benchmarks.quality.cells import PERPLEXITY_GENERATION
from benchmarks.quality.grid import LEAST_FULL_ACCURACY, ORACLE_METHODS
from benchmarks.quality.table import Row

KVPRESS_TABLE = "kvpress.csv"
ABLATION_TABLE = "ablation_summary.csv"


@dataclass(frozen=True)
class Measured:
    """A table and the pace at which its budgets were compared.

    Attributes:
        rows: All of them.
        pace: Stride and chunk of the sweep of budgets, or the budget itself where that
            is less.
        default_method: What a user gets who only sets a budget.
        kvpress: Rows of `kvpress_table`, where its table lies beside.
        ablation: Rows of the ablation's summary, likewise.
    """

    rows: tuple[Row, ...]
    pace: tuple[int, int]
    default_method: str
    kvpress: tuple[Row, ...]
    ablation: tuple[Row, ...]

    @classmethod
    def read(cls, path: Path) -> Measured:
        """Read a table, and the configuration beside it."""
        configuration = json.loads(path.with_suffix(".json").read_text())
        base = configuration["base"]
        method = base["policy"]
        if method == "roco":
            method += f"/{base['shield']}"

        def beside(name: str) -> tuple[Row, ...]:
            other = path.with_name(name)
            return tuple(table.read(other)) if other.exists() else ()

        return cls(
            tuple(table.read(path)),
            (base["stride"], base["chunk"]),
            method,
            beside(KVPRESS_TABLE),
            beside(ABLATION_TABLE),
        )

    def select(self, **values: object) -> list[Row]:
        """Return the rows that have these values, in the table's order."""
        return [
            row
            for row in self.rows
            if all(row[name] == str(value) for name, value in values.items())
        ]

    def full(self, task: str, context: str, metric: str) -> Row | None:
        """Return the full cache's row."""
        found = self.select(task=task, context=context, metric=metric, method="full")
        return found[0] if found else None

    def is_solved(self, task: str, context: str) -> bool:
        """Return whether the full cache solves enough for a sweep to mean anything."""
        full = self.full(task, context, "accuracy")
        return full is None or float(full["score"]) >= LEAST_FULL_ACCURACY

    def at_budgets(self, task: str, context: str, metric: str) -> list[Row]:
        """Return the rows that differ in method and budget alone."""
        return [
            row
            for row in self.select(task=task, context=context, metric=metric)
            if row["method"] != "full" and self._has_usual_pace(row)
        ]

    def at_strides(self, method: str, *, same_chunk: bool) -> list[Row]:
        """Return a method's rows that differ in task, context and stride alone.

        Args:
            method: Of the table.
            same_chunk: Chunks as long as the longest stride for all, or else chunks as
                long as the stride.
        """
        rows = [
            row
            for row in self.select(method=method)
            if row["task"] != PERPLEXITY_GENERATION
        ]
        budgets = [row["budget"] for row in rows if row["stride"] == row["chunk"]]
        swept = max(set(budgets), key=budgets.count, default="")
        rows = [row for row in rows if row["budget"] == swept]
        longest = max((int(row["stride"]) for row in rows), default=0)
        rows = [
            row
            for row in rows
            if row["chunk"] == (str(longest) if same_chunk else row["stride"])
        ]
        # the sweep of budgets has one such row of every task
        times = Counter((row["task"], row["context"], row["metric"]) for row in rows)
        swept_rows = [
            row for row in rows if times[row["task"], row["context"], row["metric"]] > 1
        ]
        return sorted(swept_rows, key=lambda row: int(row["stride"]))

    def tasks(self) -> list[tuple[str, str]]:
        """Return every task and context, in the table's order."""
        return list(dict.fromkeys((row["task"], row["context"]) for row in self.rows))

    def methods(self) -> list[str]:
        """Return the default, the plugin's others and the oracle's, if measured."""
        found = dict.fromkeys([self.default_method, *(r["method"] for r in self.rows)])
        names = [name for name in found if self.select(method=name) and name != "full"]
        return sorted(names, key=lambda name: name in ORACLE_METHODS)

    def _has_usual_pace(self, row: Row) -> bool:
        stride, chunk = (min(size, int(row["budget"])) for size in self.pace)
        if row["task"] == PERPLEXITY_GENERATION:
            chunk = min(stride, chunk)
        return (row["stride"], row["chunk"]) == (str(stride), str(chunk))
