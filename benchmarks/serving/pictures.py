# SPDX-License-Identifier: Apache-2.0
"""The pictures of docs/performance.md, from the rows of the CSV files."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import rows
from benchmarks.markdown import texts
from benchmarks.pictures import (
    BLUE,
    COLOURS,
    DARK_BLUE,
    GREY,
    ORANGE,
    PALE_BLUE,
    PALE_GREY,
    Picture,
    legend,
    panels,
)
from benchmarks.rows import matching
from benchmarks.serving import online_report
from benchmarks.serving.comparisons import (
    comparisons,
    newest_settings,
    of_first_gpu,
    other_shield,
    prefix_comparisons,
)


def throughput(axes: Axes, found: pd.DataFrame) -> None:
    """Bars of tokens a second for each memory size of one GPU, the ratio on top."""
    found = of_first_gpu(found)
    names, sizes = (found[key].unique() for key in ("engine", "gpu_memory_utilization"))
    speeds, ratios = (
        found.pivot(index="gpu_memory_utilization", columns="engine", values=value).loc[
            sizes, names
        ]
        for value in ("output_tok_s", "ratio")
    )
    colours: Any = list(map(_colour, names))
    speeds.astype(float).plot.bar(
        ax=axes, width=0.8, color=colours, rot=0, legend=False
    )
    for bars, name in zip(axes.containers, names, strict=True):
        labels = ["" if pd.isna(ratio) else f"{ratio:.2f}" for ratio in ratios[name]]
        axes.bar_label(bars, labels, fontsize=8, padding=2)  # type: ignore[arg-type]
    axes.margins(y=0.1)
    axes.grid(visible=False, axis="x")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    (title,) = texts(
        found.head(1),
        "{num_requests} x ({input_len} + {output_len}) tokens, {model}, {gpu}",
    )
    axes.set(
        xlabel="--gpu-memory-utilization",
        ylabel="output tokens per second",
        title=title,
    )


def crossover(axes: Axes, found: pd.DataFrame) -> None:
    """Throughput over stock vLLM's against the length of a sequence."""
    found = found.assign(length=found["input_len"] + found["output_len"])
    found = found.sort_values("length", kind="stable")
    lengths = found["length"].unique().tolist()
    for name, line in found[found["rank"] > 0].groupby("engine", sort=False):
        points: Any = line[["length", "ratio"]].to_numpy(float)
        axes.plot(*points.T, "o-", color=_colour(str(name)), label=name)
        place: Any = {"textcoords": "offset points", "xytext": (0, 7), "ha": "center"}
        for point in points:
            axes.annotate(f"{point[1]:.2f}", point, **place)
    axes.axhline(1, color=GREY, linewidth=1)
    _log2_ticks(axes, lengths, [f"{length // 1024}K" for length in lengths])
    axes.margins(y=0.15)
    (title,) = texts(found.head(1), "{model}, {gpu}, memory {gpu_memory_utilization}")
    axes.set(
        xlabel="tokens of a sequence at its end",
        ylabel="throughput over stock vLLM's",
        title=title,
    )


def shared_prefixes(axes: Axes, measured: pd.DataFrame) -> None:
    """Bars of throughput over stock vLLM's for each workload, the first one on top."""
    found = prefix_comparisons(measured)
    found = found[found["rank"] > 0]
    warm = found["warm"].map({"yes": ", read before", "no": ""})
    # beside the bars: engines' names with it are too long for a legend
    shields = found["shield"].map(other_shield)
    pairs = zip(found["engine"], shields, strict=True)
    found = found.assign(
        name=found["workload"] + warm + shields,
        engine=[engine.replace(shield, "") for engine, shield in pairs],
    )
    names, engines = (found[key].unique() for key in ("name", "engine"))
    ratios = found.pivot(index="name", columns="engine", values="ratio")
    ratios = ratios.loc[names[::-1], engines[::-1]].astype(float)
    blues = cycle([BLUE, DARK_BLUE, ORANGE])
    budgets = {engine: next(blues) for engine in engines if "caching" not in engine}
    colours: Any = [budgets.get(engine, PALE_BLUE) for engine in ratios]
    ratios.plot.barh(ax=axes, width=0.8, color=colours, legend=False)
    for bars, engine in zip(axes.containers, ratios, strict=True):
        labels = ["" if pd.isna(ratio) else f"{ratio:.2f}" for ratio in ratios[engine]]
        axes.bar_label(bars, labels, fontsize=7, padding=2)  # type: ignore[arg-type]
    axes.axvline(1, color=GREY, linewidth=1)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.1)
    axes.set_xlabel("throughput over stock vLLM's")
    axes.set_ylabel("")
    first = found.iloc[0]
    axes.set_title(f"{first['model']}, {first['gpu']}")


def resident_tokens(axes: Axes, steps: pd.DataFrame, memory: pd.DataFrame) -> None:
    """What one sequence holds against what it has computed, and its bounds."""
    steps = steps.dropna(subset="first_held_tokens").astype(int)
    computed = steps["first_computed_tokens"]
    roco = memory.tail(2).dropna(subset="budget").iloc[0]
    axes.plot(computed, computed, color=GREY, label="full cache")
    held = steps["first_held_tokens"]
    axes.step(computed, held, where="pre", color=BLUE, label="roco holds")
    for label, tokens, style in (
        ("the manager's bound", roco["bound_tokens"], "-"),
        ("budget + stride", roco["budget"] + roco["stride"], "--"),
        ("budget", roco["budget"], ":"),
    ):
        axes.axhline(tokens, color=DARK_BLUE, linewidth=1, linestyle=style, label=label)
    axes.set(xlabel="tokens computed", ylabel="KV tokens held by one sequence")
    axes.set_ylim(bottom=0)


def prefill(axes: Axes, measured: pd.DataFrame) -> None:
    """Time to first token of a long prompt against the chunk, for each set of flags."""
    lone = measured[measured["batch"] == 1]
    colours = cycle([(PALE_GREY, PALE_BLUE), (GREY, BLUE)])
    for setting, (grey, blue) in zip(newest_settings(lone), colours, strict=False):
        is_off = '"mode":0' in setting["flags"].iloc[0].replace(" ", "")
        flags = ", torch.compile off" if is_off else ""
        stock = setting[setting["backend"] != "ROCO"]
        if stock.empty:
            continue
        axes.axhspan(
            stock["ttft_low_ms"].min(),
            stock["ttft_high_ms"].max(),
            color=grey,
            label=f"{stock['backend'].iloc[0]}{flags}",
        )
        roco = setting[setting["policy"] == "roco"]
        shields = ", ".join(roco["shield"].map(other_shield).unique())
        middle, low, high = (
            roco[name].to_numpy(float)
            for name in ("ttft_ms", "ttft_low_ms", "ttft_high_ms")
        )
        axes.errorbar(
            roco["chunk"].astype(int),
            middle,
            [middle - low, high - middle],
            fmt="o",
            color=blue,
            label=f"roco{shields}{flags}",
        )
    chunks = sorted(lone["chunk"].dropna().astype(int).unique())
    _log2_ticks(axes, chunks, list(map(str, chunks)))
    title = f"a prompt of {lone['input_len'].iloc[0]} tokens"
    axes.set(xlabel="chunk, tokens", ylabel="time to first token, ms", title=title)
    axes.set_ylim(bottom=0)


def decode_ratio(axes: Axes, measured: pd.DataFrame) -> None:
    """FlashAttention 3's time over ours, a mark for each kind of heads."""
    work: list[Any] = list(measured.groupby(["batch", "context"], sort=False).groups)
    kinds = measured.groupby(["q_heads", "kv_heads", "head_size"], sort=False)
    for index, ((queries, pairs, size), mark) in enumerate(kinds):
        axes.plot(
            [
                work.index(key)
                for key in mark[["batch", "context"]].itertuples(False, None)
            ],
            mark["ratio"].to_numpy(float),
            "osD^v"[index % 5],
            color=COLOURS[index % 5],
            label=f"{queries}/{pairs} heads of {size}",
        )
    axes.axhline(1, color=GREY, linewidth=1)
    axes.set_xticks(range(len(work)), [f"{b} x {c // 1024}K" for b, c in work])
    axes.set(xlabel="sequences x tokens", ylabel="FlashAttention 3's time over ours")


def _colour(engine: str) -> str:
    """Return the colour of an engine: stock vLLM grey, RoCo blue."""
    is_fp8 = "fp8" in engine
    if engine.startswith("roco, policy: recent"):
        return PALE_BLUE
    if engine.startswith("roco"):
        return DARK_BLUE if is_fp8 else BLUE
    return PALE_GREY if is_fp8 else GREY


def _log2_ticks(axes: Axes, places: list[int], labels: list[str]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, labels)
    axes.minorticks_off()


def _picture(
    draw: Callable[..., None],
    *tables: str,
    workload: str | None = None,
    height: float = 2.7,
) -> Picture:
    """Return one panel, drawn from tables or from the comparisons of a workload."""

    def drawn(results: Path) -> Figure | None:
        frames = [rows.read(results / f"{table}.csv") for table in tables]
        if workload is not None and not frames[0].empty:
            frames = [matching(comparisons(frames[0]), workload=workload)]
        if any(frame.empty for frame in frames):
            return None
        figure, (axes,) = panels(1, size=(6.2, height))
        draw(axes, *frames)
        legend(figure, [axes])
        return figure

    return Picture(drawn, tables)


def _goodput(results: Path) -> Figure | None:
    """Return a panel of goodput for each shape and memory."""
    asked = rows.read(results / "serving_online.csv")
    found = asked if asked.empty else online_report.newest(asked[asked["rate"] < 1e9])
    if found.empty:
        return None
    every = [work for _, work in found.groupby("work", sort=False)]
    # one style means one budget, in all panels
    budgets = sorted(found["budget"].dropna().unique(), reverse=True)
    styles = dict(zip(budgets, cycle(_STYLES), strict=False))
    figure, axes = panels(len(every))
    for panel, work in zip(axes, every, strict=True):
        online_report.goodput(panel, work, _SIDES, styles)
    legend(figure, axes)
    return figure


_STYLES = ("-", "--", "-.", ":")
_SIDES = {
    **{"stock": GREY, "stock-fp8": PALE_GREY, "roco": BLUE},
    "roco-side-by-side": DARK_BLUE,
}

PICTURES = {
    "throughput": _picture(throughput, "serving", workload="r-kv-stress"),
    "crossover": _picture(crossover, "serving", workload="crossover"),
    "prefill": _picture(prefill, "prefill"),
    "shared_prefixes": _picture(shared_prefixes, "prefixes", height=5),
    "decode_ratio": _picture(decode_ratio, "decode_attention"),
    "goodput": Picture(_goodput, ("serving_online",)),
    "resident_tokens": _picture(resident_tokens, "memory_steps", "memory"),
}
