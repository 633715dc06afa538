# SPDX-License-Identifier: Apache-2.0
"""The rows of a finished `quality.csv`, as tables and pictures ask for them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks import rows
from benchmarks.quality.cells import PERPLEXITY_GENERATION
from benchmarks.quality.grid import DEFAULT, LEAST_FULL_ACCURACY, ORACLE_METHODS
from benchmarks.rows import matching
from vllm_roco.config import POLICIES

MEAN = "mean of the tasks"
_TASK = ["task", "context", "metric"]


def label_of(method: str, engine: str = "oracle") -> str:
    """Return what readers call a method: some are names of two things.

    `h2o` and `random` choose tokens in the oracle, which says so, and blocks where they
    are policies of the plugin.

    Args:
        method: As results have it.
        engine: What ran it.
    """
    if engine == "oracle":
        is_plain = method in ORACLE_METHODS and not method.startswith("token-")
        return f"{method}, tokens" if is_plain else method
    mode, _, policy = method.rpartition(", ")
    return f"{mode}, policy {policy}" if mode and policy in POLICIES else method


def named(frame: pd.DataFrame) -> pd.DataFrame:
    """Return rows with what readers call their `problems`, `share` kept and method."""
    pairs = zip(frame["task"], frame["context"], strict=True)
    # a search is the oracle's
    engines = frame.get("engine", ["oracle"] * len(frame))
    methods = zip(frame["method"], engines, strict=True)
    return frame.assign(
        label=list(itertools.starmap(label_of, methods)),
        problems=[f"{task} {context:,}" for task, context in pairs],
        share=[f"{100 * ratio:g} %" for ratio in frame["budget_ratio"]],
    )


def kind_of_pace(pace: str) -> str:
    """Return how a pace of `pace_study.csv` was chosen."""
    if pace.isdigit():
        return "fixed"
    name = pace.rstrip("+-")
    if name.startswith("random"):
        return "at random"
    return "told where the needles are" if name == "cheat" else "by a signal"


def with_mean(frame: pd.DataFrame) -> pd.DataFrame:
    """Return rows with those of the mean over all tasks behind them.

    A method that lacks a task has no mean. Intervals are left out: they are of one
    task's problems.

    Args:
        frame: Rows of one metric and one budget each, with what `named` adds.
    """
    tasks = frame["problems"].nunique()
    means = [
        group.head(1).assign(
            problems=MEAN, score=group["score"].mean(), ci_low=None, ci_high=None
        )
        for _, group in frame.groupby("method", sort=False)
        if len(group) == tasks
    ]
    return pd.concat([frame, *means])


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
        frame = named(frame)
        own = frame["method"].map(labels)
        frame = frame.assign(label=own.fillna(frame["label"]))
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
