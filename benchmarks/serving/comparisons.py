# SPDX-License-Identifier: Apache-2.0
"""Puts rows beside their baselines: same GPU, code, flags, work."""

from __future__ import annotations

import pandas as pd

from benchmarks.rows import matching
from benchmarks.serving.engines import DEFAULT

_WORK = [
    *("workload", "model", "gpu_memory_utilization", "kv_cache_bytes"),
    *("num_requests", "input_len", "output_len"),
]
_SHARING = [
    *("workload", "warm", "model", "gpu_memory_utilization", "kv_cache_bytes"),
    *("num_requests", "num_prefixes", "num_turns"),
    *("prefix_len", "suffix_len", "output_len", "max_tokens"),
]
_SETTING = ["gpu", "vllm", "commit", "flags"]
_ENGINE = ["backend", "kv_cache_dtype", "policy", "shield"]


def comparisons(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the newest comparison of every work, stock vLLM's row first in each.

    Rows are newer the later they stand; the newest of equal rows counts. Rows without a
    baseline of the same GPU, vLLM, commit and flags count for nothing.

    Args:
        rows: Of `serving.csv`.

    Returns:
        The rows, by `work`, a number, with the name of each `engine` and the `ratio` of
        its throughput to the baseline's.
    """
    return _beside_baselines(_named(rows), _WORK)


def every_run(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the median run of every work, and the lowest and the highest.

    A run is a commit's; those of the newest one's GPU, vLLM and flags count.

    Args:
        rows: Of `serving.csv`.

    Returns:
        As `comparisons` does, with the medians of every figure, and `runs`, their
        number. `NAME_low` and `NAME_high` are the extremes of a figure.
    """
    figures = ["output_tok_s", "ttft_ms", "tpot_ms", "ratio"]
    newest = comparisons(rows)
    same = [*_SETTING[:2], "flags", *_WORK]
    runs = [
        _beside_baselines(_named(group), _WORK)
        for _, group in rows.groupby("commit", sort=False)
    ]
    every = pd.concat(runs)
    by_engine = every.groupby([*same, "engine"], sort=False, dropna=False)[figures]
    parts = {"": by_engine.median(), "_low": by_engine.min(), "_high": by_engine.max()}
    found = pd.concat(
        [
            part.rename(columns={name: f"{name}{end}" for name in figures})
            for end, part in parts.items()
        ],
        axis=1,
    )
    found["runs"] = by_engine.size()
    commits = every.groupby([*same, "engine"], sort=False, dropna=False)["commit"]
    found["commit"] = commits.agg(", ".join)
    rest = newest.drop(columns=[*figures, "commit"])
    return rest.merge(found.reset_index(), on=[*same, "engine"], how="left")


def _named(rows: pd.DataFrame) -> pd.DataFrame:
    """Return rows of `serving.csv` with their engines' names and places."""
    engines = [_engine(*values) for values in rows[_ENGINE].itertuples(index=False)]
    return rows.assign(
        engine=[name for name, _ in engines], rank=[rank for _, rank in engines]
    )


def prefix_comparisons(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the same of rows of `prefixes.csv`, with the means of their rounds."""
    roco_options = ["shield", "budget", "stride", "chunk", "prefix_hits"]
    setting = [*_SETTING, *_SHARING, "side", "backend", *roco_options]
    newest = rows.drop_duplicates([*setting, "round"], keep="last")
    means = newest.groupby(setting, sort=False, dropna=False)
    found = means.mean(numeric_only=True).drop(columns="round").reset_index()
    uncached = found["side"].map({"roco-uncached": ", no prefix caching"}).fillna("")
    chunk = found["chunk"].map(lambda chunk: f", chunk {chunk:g}", na_action="ignore")
    # the default of these budgets
    chunk = chunk.where(found["chunk"] != found["budget"].clip(upper=1024), "")
    hits = ", " + found["prefix_hits"] + " hits"
    hits = hits.where(found["prefix_hits"] != "", "")
    budget = found["budget"].astype("string") + found["shield"].map(other_shield)
    roco = "roco, budget " + budget + chunk + hits + uncached
    return _beside_baselines(
        found.assign(
            engine=roco.fillna(found["backend"]),
            rank=found["side"].map({"stock": 0, "roco": 1, "roco-uncached": 2}),
        ),
        _SHARING,
    )


def _beside_baselines(found: pd.DataFrame, work: list[str]) -> pd.DataFrame:
    """Return the newest comparison of every work: columns that tell it from others."""
    found["group"] = _numbered(found, [*_SETTING, *work])
    found = found.drop_duplicates(["group", "engine"], keep="last")
    ranks = found.groupby("group")["rank"]
    found = found[(ranks.transform("min") == 0) & (ranks.transform("size") > 1)]
    found = found.sort_values(["group", "rank"], kind="stable")
    found["work"] = _numbered(found, work)
    newest = found.groupby("work")["group"].transform("max")
    found = found[found["group"] == newest].sort_values(["work", "rank"], kind="stable")
    return found.assign(
        ratio=ratio(found, "output_tok_s", found["rank"] == 0, ["work"])
    )


def other_shield(shield: str) -> str:
    """Return what an engine's name says of its shield: nothing of today's default."""
    return "" if shield in ("", DEFAULT.shield) else f", shield: {shield}"


def _engine(
    backend: str, kv_cache_dtype: str, policy: str, shield: str
) -> tuple[str, int]:
    """Return what a reader calls an engine, and its place behind the baseline."""
    name, rank = backend, 0
    if policy == "recent":
        name, rank = "roco, policy: recent", 2
    elif policy:
        name, rank = f"roco{other_shield(shield)}", 4
    if kv_cache_dtype == "auto":
        return name, rank
    return f"{name}, {kv_cache_dtype} KV cache", rank + 1


def ratio(
    rows: pd.DataFrame, column: str, is_base: pd.Series[bool], same: list[str]
) -> pd.Series[float]:
    """Return a column over that of the first baseline that is the same in others.

    Args:
        rows: Of both.
        column: What is divided.
        is_base: Which rows are baselines.
        same: Columns in which a row and its baseline are equal.
    """
    work = rows.groupby(same, dropna=False).ngroup()
    base = rows[column].where(is_base).groupby(work).transform("first")
    return (rows[column] / base).astype(float)


def of_first_gpu(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the GPU that comes first: shares of memory are of one size."""
    return matching(rows, gpu=rows["gpu"].iloc[0])


def newest_settings(rows: pd.DataFrame) -> list[pd.DataFrame]:
    """Return for every GPU, vLLM and flags the rows of the newest whole commit.

    That is one with stock vLLM's rows too, if there is any.
    """
    settings = rows.groupby(["gpu", "vllm", "flags"], sort=False)
    return [_newest(group) for _, group in settings]


def _newest(rows: pd.DataFrame) -> pd.DataFrame:
    stock = rows.loc[rows["backend"] != "ROCO", "commit"]
    whole = rows if stock.empty else rows[rows["commit"].isin(stock)]
    newest: pd.DataFrame = rows[rows["commit"] == whole["commit"].iloc[-1]]
    return newest


def _numbered(rows: pd.DataFrame, columns: list[str]) -> pd.Series[int]:
    """Return a number for each group of equal rows, in the order of appearance."""
    return rows.groupby(columns, sort=False, dropna=False).ngroup()
