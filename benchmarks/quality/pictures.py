# SPDX-License-Identifier: Apache-2.0
"""Pictures of quality: against the budget, against the stride, and perplexity."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import rows
from benchmarks.pictures import Picture, legend, panels
from benchmarks.quality.cells import PERPLEXITY, PERPLEXITY_GENERATION
from benchmarks.quality.grid import DEFAULT
from benchmarks.quality.pace import CHOSEN, FIXED
from benchmarks.quality.scores import (
    MEAN,
    Scores,
    kind_of_pace,
    label_of,
    named,
    with_mean,
)
from benchmarks.rows import matching

_COLOURS = {
    "roco/contribution": "tab:pink",
    "roco/peak": "tab:blue",
    "roco/deviation": "tab:cyan",
    "recent": "tab:gray",
    "token-roco": "tab:orange",
    "sink-recent": "tab:brown",
    "tova": "tab:green",
    "h2o": "tab:red",
    "random": "tab:purple",
}
_LOSSES = {
    PERPLEXITY: "perplexity, read as a prompt",
    PERPLEXITY_GENERATION: "perplexity, as if generated",
}


def against_budget(scores: Scores) -> Figure | None:
    """Accuracy of every method, a panel for each task that the full cache can do."""
    found = scores.at_budgets("accuracy")
    titles = found["task"] + found["context"].map(", {:,} tokens".format)
    return _against_budget(scores, found.assign(title=titles), "score", "accuracy")


def perplexity(scores: Scores) -> Figure | None:
    """Perplexity of every method over the full cache's."""
    found = scores.at_budgets("perplexity")
    found = found[found["task"].isin(_LOSSES)]
    titles = found["task"].map(_LOSSES) + found["context"].map(", {:,} tokens".format)
    label = "perplexity / full cache's"
    return _against_budget(scores, found.assign(title=titles), "of_full", label)


def against_stride(scores: Scores) -> Figure | None:
    """Accuracy against the stride, with chunks of its length and of one length."""
    markers: dict[object, str] = {}
    figure, axes = panels(2)
    for panel, same_chunk in zip(axes, (False, True), strict=True):
        swept = matching(scores.at_strides(same_chunk=same_chunk), metric="accuracy")
        for _, line in swept.groupby(["method", "problems"], sort=False):
            method, task, share = line[["method", "problems", "share"]].iloc[0]
            marker = markers.setdefault(task, "os^Dv<>"[len(markers) % 7])
            label = f"{method}: {task} at {share}"
            _line(panel, line, "stride", "score", label=label, marker=marker)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set(ylim=(-0.03, 1.05), ylabel="accuracy", xlabel="stride, tokens")
        panel.set_title(
            "chunks of the same length" if same_chunk else "chunks as long as a stride"
        )
    legend(figure, axes)
    return figure if markers else None


def _against_budget(
    scores: Scores, found: pd.DataFrame, score: str, label: str
) -> Figure | None:
    if found.empty:
        return None
    figure, axes = panels(found["tasks"].nunique())
    for panel, (title, swept) in zip(
        axes, found.groupby("title", sort=False), strict=True
    ):
        for _, line in swept.groupby("method", sort=False):
            method = line["method"].iloc[0]
            if method == "full":
                level = line[score].iloc[0]
                panel.axhline(level, color="black", ls="--", label="full cache")
            elif method == scores.default:
                name = f"{method}, default" if method == DEFAULT else method
                _line(panel, line, "budget_ratio", score, label=name, linewidth=2.2)
            else:
                name = label_of(method, line["engine"].iloc[0])
                _line(panel, line, "budget_ratio", score, label=name)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
        panel.set(title=title, ylabel=label, xlabel="budget, share of the text")
        if score == "score":
            panel.set_ylim(-0.03, 1.05)
    legend(figure, axes)
    return figure


def _line(panel: Axes, line: pd.DataFrame, x: str, score: str, **style: Any) -> None:
    """Draw a method's scores with their intervals."""
    prefix = "ci" if score == "score" else score
    places, middle, low, high = (
        line[name].to_numpy(float)
        for name in (x, score, f"{prefix}_low", f"{prefix}_high")
    )
    colour = _COLOURS.get(line["method"].iloc[0], "black")
    style = {"marker": "o", "markersize": 3, "linewidth": 1.2, **style}
    panel.plot(places, middle, color=colour, **style)
    panel.fill_between(places, low, high, color=colour, alpha=0.12, linewidth=0)


def _picture(draw: Callable[[Scores], Figure | None]) -> Picture:
    def drawn(results: Path) -> Figure | None:
        scores = Scores.read(results)
        return draw(scores) if scores else None

    return Picture(drawn, ("quality",))


def hard(results: Path) -> Figure | None:
    """Accuracy of every method on hard tasks, a panel for each that was swept."""
    found = rows.read(results / "hard.csv")
    if found.empty:
        return None
    found = matching(named(found), metric="accuracy")
    swept = found[(found["method"] != "full") & ~found["task"].str.contains(", ")]
    sizes = swept.groupby("problems")["budget_ratio"].transform("nunique")
    swept = swept[sizes > 1].sort_values("budget_ratio")
    if swept.empty:
        return None
    groups = swept.sort_values(["context"], kind="stable").groupby(
        "problems", sort=False
    )
    figure, axes = panels(len(groups))
    for panel, (title, group) in zip(axes, groups, strict=True):
        full = matching(found, problems=title, method="full")
        panel.axhline(
            float(full["score"].iloc[0]), color="black", ls="--", label="full cache"
        )
        for name, line in group.groupby("label", sort=False):
            width = 2.2 if line["method"].iloc[0] == DEFAULT else 1.2
            _line(panel, line, "budget_ratio", "score", label=name, linewidth=width)
        panel.set_xscale("log", base=2)
        panel.set_xticks(sorted(group["budget_ratio"].unique()))
        panel.minorticks_off()
        panel.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
        panel.set(title=f"{title} tokens", ylabel="accuracy", ylim=(-0.03, 1.05))
        panel.set_xlabel("budget, share of the text")
    legend(figure, axes)
    return figure


def paces(results: Path) -> Figure | None:
    """Accuracy of every pace, a panel for each peak of memory."""
    found = rows.read(results / "pace.csv")
    if found.empty:
        return None
    found = named(found)
    full = matching(found, method="full")
    peaks = sorted(found.loc[found["budget"] > 0, "budget"].unique())
    figure, axes = panels(len(peaks), size=(4.4, 3.0))
    for panel, memory in zip(axes, peaks, strict=True):
        every = with_mean(pd.concat([full, matching(found, budget=memory)]))
        for number, (task, line) in enumerate(every.groupby("problems", sort=False)):
            scores = line.set_index("method")["score"].astype(float)
            is_mean = task == MEAN
            style: dict[str, Any] = {
                "color": "black" if is_mean else f"C{number}",
                "label": task,
            }
            fixed = scores[[name for name in map(str, FIXED) if name in scores]]
            chosen = scores[[name for name in CHOSEN if name in scores]]
            width = 2.2 if is_mean else 1.2
            panel.plot(fixed.index, fixed, marker="o", ms=3, lw=width, **style)
            places = [label.replace(" ", "\n") for label in chosen.index]
            panel.plot(places, chosen, marker="D", ms=4, ls="", color=style["color"])
            panel.axhline(float(scores["full"]), color=style["color"], lw=0.6, ls=":")
        panel.set(ylim=(-0.03, 1.05), ylabel="accuracy", xlabel="tokens a step")
        panel.set_title(f"at most {memory:,} tokens in a step; dotted: full cache")
    legend(figure, axes)
    return figure


def pace_study(results: Path) -> Figure | None:
    """What paces find at one peak of memory, against the steps that they take."""
    found = rows.read(results / "pace_study.csv")
    if found.empty:
        return None
    texts = {"mixed": "prose and filler", "prose": "prose"}
    figure, axes = panels(len(texts))
    for panel, (text, title) in zip(axes, texts.items(), strict=True):
        swept = matching(found, text=text)
        for kind, marker, colour in (
            ("fixed", "o", "black"),
            ("at random", "s", "tab:gray"),
            ("by a signal", "D", "tab:orange"),
            ("told where the needles are", "*", "tab:green"),
        ):
            line = swept[swept["pace"].map(kind_of_pace) == kind].sort_values("steps")
            score = line["score"].to_numpy(float)
            low, high = (line[name].to_numpy(float) for name in ("ci_low", "ci_high"))
            style: dict[str, Any] = {"color": colour, "marker": marker, "ms": 4}
            style |= {"ls": "-" if kind == "fixed" else "", "label": kind}
            steps = line["steps"].to_numpy(float)
            panel.plot(steps, score, **style)
            if kind == "fixed":
                panel.fill_between(steps, low, high, color=colour, alpha=0.1, lw=0)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set(title=title, ylabel="answers found", ylim=(0.45, 0.85))
        panel.set_xlabel("steps that a text of 2,048 tokens is read in")
    legend(figure, axes)
    return figure


PICTURES = {
    "quality_budget": _picture(against_budget),
    "quality_stride": _picture(against_stride),
    "quality_perplexity": _picture(perplexity),
    "quality_hard": Picture(hard, ("hard",)),
    "quality_pace_study": Picture(pace_study, ("pace_study",)),
    "quality_pace": Picture(paces, ("pace",)),
}
