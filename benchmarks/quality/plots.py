# SPDX-License-Identifier: Apache-2.0
"""Pictures of the table: against the budget, against the stride, and perplexity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.quality.cells import PERPLEXITY, PERPLEXITY_GENERATION
from benchmarks.quality.measured import Measured
from benchmarks.quality.table import Row

_COLORS = {
    "roco/peak": "tab:blue",
    "roco/deviation": "tab:cyan",
    "recent": "tab:gray",
    "token-roco": "tab:orange",
    "sink-recent": "tab:brown",
    "tova": "tab:green",
    "h2o": "tab:red",
    "random": "tab:purple",
}
_TITLES = {
    PERPLEXITY: "perplexity, read as a prompt",
    PERPLEXITY_GENERATION: "perplexity, as if generated",
}
_STYLE: dict[Any, object] = {
    "font.size": 8,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    # the same file from the same table
    "svg.hashsalt": "quality",
}


def draw(path: Path, folder: Path | None = None) -> list[Path]:
    """Draw every picture that the table has rows for, each as SVG and PNG.

    Args:
        path: The table; its configuration lies beside it.
        folder: Where to; the table's own by default.

    Returns:
        The files.
    """
    measured = Measured.read(path)
    folder = folder or path.parent
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    pictures: dict[str, Callable[[Measured], Figure | None]] = {
        "quality_budget": _accuracy_against_budget,
        "quality_stride": _accuracy_against_stride,
        "quality_perplexity": _perplexity_against_budget,
    }
    with matplotlib.rc_context(_STYLE):
        for name, picture in pictures.items():
            figure = picture(measured)
            if figure is None:
                continue
            for suffix in ("svg", "png"):
                file = folder / f"{name}.{suffix}"
                dateless = {"Date": None} if suffix == "svg" else {}
                figure.savefig(file, dpi=110, metadata=dateless)
                files.append(file)
    return files


def _accuracy_against_budget(measured: Measured) -> Figure | None:
    panels = [
        (task, context)
        for task, context in measured.tasks()
        if measured.is_solved(task, context)
        and measured.at_budgets(task, context, "accuracy")
    ]
    if not panels:
        return None
    figure, axes = _grid(len(panels))
    for ax, (task, context) in zip(axes, panels, strict=False):
        _lines(ax, measured, measured.at_budgets(task, context, "accuracy"), "score")
        full = measured.full(task, context, "accuracy")
        if full is not None:
            ax.axhline(
                float(full["score"]), color="black", linestyle="--", label="full cache"
            )
        ax.set_title(f"{task}, {int(context):,} tokens")
        ax.set_ylim(-0.03, 1.05)
        ax.set_ylabel("accuracy")
    _finish(figure, axes, "budget, share of the prompt")
    return figure


def _perplexity_against_budget(measured: Measured) -> Figure | None:
    panels = [
        (task, context)
        for task, context in measured.tasks()
        if task in _TITLES and measured.at_budgets(task, context, "perplexity")
    ]
    if not panels:
        return None
    figure, axes = _grid(len(panels))
    for ax, (task, context) in zip(axes, panels, strict=False):
        rows = measured.at_budgets(task, context, "perplexity")
        _lines(ax, measured, rows, "of_full")
        ax.axhline(1.0, color="black", linestyle="--", label="full cache")
        ax.set_title(f"{_TITLES[task]}, {int(context):,} tokens")
        ax.set_ylabel("perplexity / full cache's")
    _finish(figure, axes, "budget, share of the text")
    return figure


def _accuracy_against_stride(measured: Measured) -> Figure | None:
    methods = [
        method
        for method in measured.methods()
        if measured.at_strides(method, same_chunk=False)
    ]
    if not methods:
        return None
    figure, axes = _grid(2)
    markers = iter("os^Dv<>")
    marker: dict[tuple[str, str], str] = {}
    for ax, same_chunk in zip(axes, (False, True), strict=True):
        for method in methods:
            rows = measured.at_strides(method, same_chunk=same_chunk)
            accuracy = [row for row in rows if row["metric"] == "accuracy"]
            for task, context in dict.fromkeys(
                (row["task"], row["context"]) for row in accuracy
            ):
                line = [
                    row
                    for row in accuracy
                    if (row["task"], row["context"]) == (task, context)
                ]
                if (task, context) not in marker:
                    marker[task, context] = next(markers)
                share = float(line[0]["budget_ratio"])
                _line(
                    ax,
                    line,
                    x=lambda row: float(row["stride"]),
                    score="score",
                    color=_COLORS.get(method),
                    marker=marker[task, context],
                    label=f"{method}: {task} {int(context):,} at {100 * share:g} %",
                )
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.set_ylim(-0.03, 1.05)
        ax.set_ylabel("accuracy")
        ax.set_title(
            "chunks of the same length" if same_chunk else "chunks as long as a stride"
        )
    _finish(figure, axes, "stride, tokens")
    return figure


def _lines(ax: Axes, measured: Measured, rows: Sequence[Row], score: str) -> None:
    for method in measured.methods():
        line = [row for row in rows if row["method"] == method]
        if not line:
            continue
        _line(
            ax,
            sorted(line, key=lambda row: float(row["budget_ratio"])),
            x=lambda row: float(row["budget_ratio"]),
            score=score,
            color=_COLORS.get(method),
            marker="o",
            label=f"{method}, default" if method == measured.default_method else method,
            width=2.2 if method == measured.default_method else 1.2,
        )
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")


def _line(
    ax: Axes,
    rows: Sequence[Row],
    *,
    x: Callable[[Row], float],
    score: str,
    color: str | None,
    marker: str,
    label: str,
    width: float = 1.2,
) -> None:
    low, high = ("ci_low", "ci_high")
    if score == "of_full":
        low, high = ("of_full_low", "of_full_high")
    places = [x(row) for row in rows]
    (line,) = ax.plot(
        places,
        [float(row[score]) for row in rows],
        color=color,
        marker=marker,
        markersize=3,
        linewidth=width,
        label=label,
    )
    ax.fill_between(
        places,
        [float(row[low]) for row in rows],
        [float(row[high]) for row in rows],
        color=line.get_color(),
        alpha=0.12,
        linewidth=0,
    )


def _grid(panels: int) -> tuple[Figure, list[Axes]]:
    columns = min(2, panels)
    lines = -(-panels // columns)
    figure = Figure(
        figsize=(3.9 * columns + 0.2, 2.5 * lines + 0.9), layout="constrained"
    )
    axes = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
    for unused in axes[panels:]:
        unused.remove()
    return figure, axes[:panels]


def _finish(figure: Figure, axes: Sequence[Axes], label: str) -> None:
    handles: dict[str, Artist] = {}
    for ax in axes:
        ax.set_xlabel(label)
        for handle, name in zip(*ax.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=3
    )
