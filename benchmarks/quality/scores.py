# SPDX-License-Identifier: Apache-2.0
"""The rows of a finished `quality.csv`, as tables and pictures ask for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks import rows
from benchmarks.quality.cells import PERPLEXITY_GENERATION
from benchmarks.quality.grid import DEFAULT, LEAST_FULL_ACCURACY, ORACLE_METHODS
from benchmarks.rows import matching

_TASK = ["task", "context", "metric"]


def named(frame: pd.DataFrame) -> pd.DataFrame:
    """Return rows with what readers call their `problems` and their `share` kept."""
    pairs = zip(frame["task"], frame["context"], strict=True)
    return frame.assign(
        problems=[f"{task} {context:,}" for task, context in pairs],
        share=[f"{100 * ratio:g} %" for ratio in frame["budget_ratio"]],
    )


@dataclass(frozen=True)
class Scores:
    """A table and the pace at which its budgets were compared.

    Attributes:
        frame: All rows, in the order of tasks as they are measured and of methods: the
            full cache, the default, the plugin's others, the oracle's. Beside the
            table's columns `problems`, `share` and the method's `label`.
        pace: Stride and chunk of the sweep of budgets, or the budget itself where that
            is less.
        default: The method that a user gets who only sets a budget; one that a user got
            when the table was measured where that lacks it.
    """

    frame: pd.DataFrame
    pace: tuple[int, int]
    default: str

    @classmethod
    def read(cls, results: Path) -> Scores | None:
        """Read a folder's table and its provenance; None if there is no table."""
        frame = rows.read(results / "quality.csv")
        if frame.empty:
            return None
        base: Any = rows.noted(results)["quality"][-1]["base"]
        default = DEFAULT
        labels = {"full": "full cache", default: f"**{default}** (default)"}
        if default not in set(frame["method"]):
            default = f"{base['policy']}/{base['shield']}"
        frame = named(frame.assign(label=frame["method"].replace(labels)))
        ranks = frame["method"].map({"full": -2, default: -1}).fillna(0)
        ranks = ranks.mask(frame["method"].isin(ORACLE_METHODS), 1)
        methods = frame["method"].iloc[ranks.argsort(kind="stable")].unique()
        places = pd.Series(range(len(methods)), methods)
        tasks = frame.groupby(["task", "context"], sort=False).ngroup()
        frame = frame.assign(tasks=tasks, place=frame["method"].map(places))
        frame = frame.sort_values(["tasks", "place"], kind="stable")
        return cls(frame, (base["stride"], base["chunk"]), default)

    @property
    def solved(self) -> pd.DataFrame:
        """Rows of what the full cache does well enough for a sweep to mean anything."""
        full = matching(self.frame, method="full", metric="accuracy")
        failed = full.loc[full["score"] < LEAST_FULL_ACCURACY, "tasks"]
        return self.frame[~self.frame["tasks"].isin(failed)]

    def at_budgets(self, metric: str) -> pd.DataFrame:
        """Return rows that differ in task, method and budget alone, larger ones first.

        Those of the full cache stand first in each task.
        """
        found = matching(self.solved, metric=metric)
        stride, chunk = (found["budget"].clip(upper=most) for most in self.pace)
        short = found["task"] == PERPLEXITY_GENERATION
        chunk = chunk.mask(short & (chunk > stride), stride)
        usual = (found["stride"] == stride) & (found["chunk"] == chunk)
        found = found[usual | (found["method"] == "full")]
        swept = found.loc[found["method"] != "full", "tasks"]
        return found[found["tasks"].isin(swept)].sort_values(
            ["tasks", "place", "budget_ratio"], ascending=[True, True, False]
        )

    def at_strides(self, *, same_chunk: bool) -> pd.DataFrame:
        """Return rows that differ in task, method and stride alone, by method.

        Args:
            same_chunk: Chunks as long as the longest stride for all, or else chunks as
                long as the stride.
        """
        found = self.frame[self.frame["task"] != PERPLEXITY_GENERATION]
        swept = found.loc[found["stride"] == found["chunk"], "budget"]
        found = matching(found, budget=swept[swept > 0].mode().min())
        chunk = found["stride"].max() if same_chunk else found["stride"]
        found = found[found["chunk"] == chunk]
        # the sweep of budgets has one such row of every task
        times = found.groupby(["method", *_TASK])["stride"].transform("size")
        return found[times > 1].sort_values(["place", "tasks", "stride"])
