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
_ENGINE = ["backend", "kv_cache_dtype", "policy", "shield", "ranks"]
_FIGURES = ["output_tok_s", "ttft_ms", "tpot_ms", "max_running", "preemptions"]
_PREFIX_FIGURES = [
    *("output_tok_s", "ttft_ms", "ttft_p99_ms", "hit_rate", "preemptions"),
]


def comparisons(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the newest comparison of every work, stock vLLM's row first in each.

    Rows are newer the later they stand; the newest of equal rows counts. Rows without a
    baseline of the same GPU, vLLM, commit, flags and round count for nothing.

    Args:
        rows: Of `serving.csv`.

    Returns:
        A row for each engine, by `work`, a number, with the `engine`'s name, the median
        of every figure over its `rounds`, their number, and that of the `ratio` of a
        round's throughput to the baseline's. `NAME_low` and `NAME_high` are the
        extremes of a figure.
    """
    engines = [_engine(*values) for values in rows[_ENGINE].itertuples(index=False)]
    named = rows.assign(
        engine=[name for name, _ in engines], rank=[rank for _, rank in engines]
    )
    return _beside_baselines(named, _WORK, _FIGURES)


def prefix_comparisons(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the same of rows of `prefixes.csv`."""
    uncached = rows["side"].map({"roco-uncached": ", no prefix caching"}).fillna("")
    chunk = ", chunk " + rows["chunk"].astype("string")
    # the default of these budgets
    chunk = chunk.where(rows["chunk"] != rows["budget"].clip(upper=1024), "")
    hits = ", " + rows["prefix_hits"] + " hits"
    hits = hits.where(rows["prefix_hits"] != "", "")
    answers = ", answers " + rows["answers"]
    answers = answers.where(rows["answers"] != "", "")
    budget = rows["budget"].astype("string") + rows["shield"].map(other_shield)
    roco = "roco, budget " + budget + chunk + hits + answers + uncached
    return _beside_baselines(
        rows.assign(
            engine=roco.fillna(rows["backend"]),
            rank=rows["side"].map({"stock": 0, "roco": 1, "roco-uncached": 2}),
        ),
        _SHARING,
        _PREFIX_FIGURES,
    )


def _beside_baselines(
    found: pd.DataFrame, work: list[str], figures: list[str]
) -> pd.DataFrame:
    """Return the newest comparison of every work.

    Args:
        found: Rows with the name and the rank of their engine.
        work: Columns that tell a work from others.
        figures: Columns that differ from round to round.
    """
    found["group"] = _numbered(found, [*_SETTING, *work])
    found = found.drop_duplicates(["group", "engine", "round"], keep="last")
    found["ratio"] = ratio(
        found, "output_tok_s", found["rank"] == 0, ["group", "round"]
    )
    found = found[found["ratio"].notna()]
    # a round in which the baseline was alone compares nothing
    engines = found.groupby(["group", "round"])["engine"]
    found = found[engines.transform("size") > 1]
    found["work"] = _numbered(found, work)
    newest = found.groupby("work")["group"].transform("max")
    found = found[found["group"] == newest].sort_values(["work", "rank"], kind="stable")
    return _over_rounds(found, ["work", "engine"], [*figures, "ratio"])


def _over_rounds(
    found: pd.DataFrame, same: list[str], figures: list[str]
) -> pd.DataFrame:
    """Return a row for each engine: medians of its rounds, and their extremes."""
    rounds = found.groupby(same, sort=False)
    over_rounds = [
        rounds[figures].median(),
        rounds[figures].min().add_suffix("_low"),
        rounds[figures].max().add_suffix("_high"),
        rounds.size().rename("rounds"),
    ]
    rest = found.drop_duplicates(same).drop(columns=[*figures, "round"])
    return rest.merge(pd.concat(over_rounds, axis=1).reset_index(), on=same)


def other_shield(shield: str) -> str:
    """Return what an engine's name says of its shield: nothing of today's default."""
    return "" if shield in ("", DEFAULT.shield) else f", shield: {shield}"


def _engine(
    backend: str, kv_cache_dtype: str, policy: str, shield: str, ranks: str
) -> tuple[str, int]:
    """Return what a reader calls an engine, and its place behind the baseline."""
    name, rank = backend, 0
    if policy == "recent":
        name, rank = "roco, policy: recent", 2
    elif policy:
        name, rank = f"roco{other_shield(shield)}", 4
    if ranks == "apart":
        name, rank = f"{name}, agree: false", rank + 2
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
