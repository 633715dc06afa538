# SPDX-License-Identifier: Apache-2.0
"""Tables and picture of `serving_online.csv`: how fast requests may come."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from benchmarks.markdown import UNMEASURED, lines
from benchmarks.serving.captions import caption
from benchmarks.serving.comparisons import other_shield, ratio
from benchmarks.serving.online_shapes import AT_ONCE, SIDES
from benchmarks.serving.rate_search import SHARE, bracket

_SETTING = ["gpu", "vllm", "commit", "flags"]
_WORK = [
    *("shape", "memory", "model", "num_requests", "least_seconds"),
    *("input_len", "output_len"),
    *("spread", "prefix_len", "num_prefixes", "ttft_ms_limit", "tpot_ms_limit"),
]
_ENGINE = ["side", "kv_cache_bytes", "shield", "budget", "stride", "chunk"]


def newest(measured: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of each shape's newest setting that has the baseline's too.

    Args:
        measured: Of `serving_online.csv`.

    Returns:
        The rows, the baseline's first, with `work`, a number of shape and memory, the
        `engine`'s name and what a reader is told of the `requests` and the KV `room`.
    """
    rows = measured.drop_duplicates(
        [*_SETTING, *_WORK, *_ENGINE, "round", "rate"], keep="last"
    )
    group = rows.groupby([*_SETTING, *_WORK], sort=False, dropna=False).ngroup()
    is_base = rows["side"] == "stock"
    rows = rows.assign(group=group)[is_base.groupby(group).transform("any")]
    work = rows.groupby(["shape", "memory"], sort=False).ngroup()
    rows = rows.assign(work=work)
    rows = rows[rows["group"] == rows.groupby("work")["group"].transform("max")]
    rank = rows["side"].map(list(SIDES).index)
    budget = (", budget " + rows["budget"].astype("string")).fillna("")
    own = rows["input_len"].astype("string") + " + " + rows["output_len"].astype(str)
    prefix = rows["prefix_len"].astype("string") + " + "
    return rows.assign(
        rank=rank,
        engine=rows["side"].map({name: side.about for name, side in SIDES.items()})
        + budget
        + rows["shield"].map(other_shield),
        requests=prefix.where(rows["prefix_len"] > 0, "") + own,
        room=(rows["kv_cache_bytes"] / 2**30).map("{:g} GiB".format),
    ).sort_values(["work", "rank"], kind="stable")


def limits(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the largest rate that each engine keeps, and what it is like there.

    Args:
        rows: What `newest` returns.

    Returns:
        One row for each work and engine: the row of the median round at its limit, with
        `limit`, and `limit_low` and `limit_high` of the rounds. Where no rate is kept,
        the limit is 0 and the row that of the lowest rate. `missed` is the lowest rate
        above that was asked for in vain, NaN for none. Where the baseline's limit lies
        between its two rates is not known: `ratio` is over the lower one, and
        `least_ratio` over the other.
    """
    found = []
    for _, engine in rows.groupby(["work", "engine"], sort=False):
        rounds = [_limit(one) for _, one in engine.groupby("round", sort=False)]
        rounds.sort(key=lambda row: float(row["limit"]))
        figures = [float(row["limit"]) for row in rounds]
        # of an even number the lower one
        middle = rounds[(len(rounds) - 1) // 2].to_dict()
        spread = {"limit_low": figures[0], "limit_high": figures[-1]}
        found.append(middle | spread | {"rounds": len(rounds)})
    table = pd.DataFrame(found)
    is_base = table["side"] == "stock"
    missed = table["missed"].where(is_base).groupby(table["work"]).transform("first")
    return table.assign(
        ratio=ratio(table, "limit", is_base, ["work"]),
        least_ratio=table["limit"] / missed,
    )


def online(measured: pd.DataFrame) -> str:
    """Return the table of the largest rates at which requests keep their limits."""
    rows = newest(measured[measured["rate"] != AT_ONCE])
    if rows.empty:
        return UNMEASURED
    columns = {
        "requests": "{shape}, {requests}",
        "memory": "{room}",
        "limits, ms": "{ttft_ms_limit:,} / {tpot_ms_limit:g}",
        "engine": "{engine}",
        "requests/s": "{limit:g} ({limit_low:g} to {limit_high:g})",
        "not kept at": "{missed:g}",
        "ratio": "{ratio:.2f}",
        "TTFT P50, P99": "{ttft_p50_ms:,.0f}, {ttft_p99_ms:,.0f}",
        "TPOT P50, P99": "{tpot_p50_ms:.1f}, {tpot_p99_ms:.1f}",
        "asked": "{num_asked}",
    }
    return lines(limits(rows), columns, caption(rows, "model"))


def at_once(measured: pd.DataFrame) -> str:
    """Return the table of long prompts that all arrive together."""
    rows = newest(measured[measured["rate"] == AT_ONCE])
    if rows.empty:
        return UNMEASURED
    means = rows.groupby(["work", "engine"], sort=False)
    found = means.first()
    for name in ("ttft_ms", "ttft_max_ms", "output_tok_s"):
        each = means[name]
        found[name] = each.mean()
        found[f"{name}_low"], found[f"{name}_high"] = each.min(), each.max()
    found["rounds"] = means.size()
    found = found.reset_index()
    seconds = {
        title: f"{{{name}:,.0f}} ({{{name}_low:,.0f}} to {{{name}_high:,.0f}})"
        for title, name in (
            ("TTFT ms, mean", "ttft_ms"),
            ("longest", "ttft_max_ms"),
            ("tokens/s", "output_tok_s"),
        )
    }
    columns = {
        **{"requests": "{num_requests} x ({requests})", "memory": "{room}"},
        **{"engine": "{engine}", **seconds, "preempted": "{preemptions}"},
        "rounds": "{rounds}",
    }
    return lines(found, columns, caption(rows, "model"))


def goodput(
    axes: Axes,
    rows: pd.DataFrame,
    colours: Mapping[str, str],
    styles: Mapping[int, str],
) -> None:
    """Requests a second within their limits against those that arrive, of one work.

    Args:
        axes: Where to draw.
        rows: Of `newest`, of one work.
        colours: By side.
        styles: Of lines, by budget; a side without one has none broken.
    """
    rates = rows["rate"].to_numpy(float)
    axes.plot([0, rates.max()], [0, rates.max()], ":", color="black", linewidth=0.8)
    for engine, line in rows.groupby("engine", sort=False):
        # the share, not vLLM's figure: that counts the time until the last answer
        good = line.assign(good=line["good_share"] * line["rate"])
        means = good.groupby("rate")["good"].mean().astype(float)
        side, budget = line[["side", "budget"]].iloc[0]
        axes.plot(
            means.index,
            means,
            marker="o",
            linestyle=styles.get(budget, "-"),
            color=colours[side],
            label=engine,
            markersize=3,
        )
    first = rows.iloc[0]
    axes.set_title(f"{first['shape']}, {first['room']}, {first['requests']}")
    axes.set(xlabel="requests that arrive a second", ylabel="within their limits")
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)


def _limit(rows: pd.DataFrame) -> pd.Series[float]:
    """Return the row of one round at the largest rate that is kept."""
    kept = dict(
        zip(
            rows["rate"].astype(float),
            (rows["good_share"] >= SHARE).astype(bool),
            strict=True,
        )
    )
    highest, lowest = bracket(kept)
    at = highest or float(np.min(list(kept)))
    row: pd.Series[float] = rows[rows["rate"] == at].iloc[-1].copy()
    row["limit"] = highest or 0.0
    row["missed"] = lowest or np.nan
    return row
