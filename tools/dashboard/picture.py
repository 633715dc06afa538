# SPDX-License-Identifier: Apache-2.0
"""A picture of the dashboard: every panel where Grafana would put it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.pictures import STYLE
from tools.dashboard.panels import Panel
from tools.dashboard.prometheus import Series

COLUMNS = 24
CELL_WIDTH, CELL_HEIGHT = 0.4, 0.25
"""Inches of one cell of Grafana's grid."""

COLOURS = ("#56a64b", "#f2a900", "#3274d9", "#c2571a", "#8f3bb8", "#8a8f98")
_FORMATS = {"percentunit": "{x:.0%}", "s": "{x:,g} s", "ops": "{x:,g}/s"}
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.5, 0.12, 0.3, 0.58
"""Inches between a panel's edges and its axes, for title, labels and legend."""

_ONE_LINE = 50
"""Letters of a legend that fit side by side."""

Answers = Mapping[str, Series]
"""The lines of one panel, by the names that its legend gives them."""


@matplotlib.rc_context({**STYLE, "figure.constrained_layout.use": False})
def draw_dashboard(
    path: Path, shown: Sequence[tuple[Panel, Answers]], begin: float, end: float
) -> None:
    """Write the picture.

    Args:
        path: The file; missing folders are made.
        shown: The panels, each with what its queries answered.
        begin: The time at the left end of every panel, seconds since the epoch.
        end: That at the right end.
    """
    cells = max(panel.place["y"] + panel.place["h"] for panel, _ in shown)
    width, height = COLUMNS * CELL_WIDTH, cells * CELL_HEIGHT
    figure = Figure(figsize=(width, height))
    for panel, answers in shown:
        x, y = panel.place["x"] * CELL_WIDTH, panel.place["y"] * CELL_HEIGHT
        if not panel.targets:
            bottom = 1 - (y + 0.7 * CELL_HEIGHT) / height
            figure.text(0.1 / width, bottom, panel.title, size=11, weight="bold")
            continue
        w, h = panel.place["w"] * CELL_WIDTH, panel.place["h"] * CELL_HEIGHT
        axes = figure.add_axes(
            (
                (x + _LEFT) / width,
                1 - (y + h - _BOTTOM) / height,
                (w - _LEFT - _RIGHT) / width,
                (h - _TOP - _BOTTOM) / height,
            )
        )
        _draw(axes, panel, answers, begin, end)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def _draw(axes: Axes, panel: Panel, answers: Answers, begin: float, end: float) -> None:
    for (name, line), colour in zip(answers.items(), COLOURS, strict=False):
        seconds = [time - begin for time in line.times]
        axes.plot(seconds, line.values, label=name, color=colour, linewidth=1.2)
        if "bound" not in name and "budget" not in name:
            axes.fill_between(seconds, line.values, color=colour, alpha=0.08)
    axes.set_title(panel.title, loc="left")
    axes.set_xlim(0, end - begin)
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_formatter("{x:g} s")
    axes.yaxis.set_major_formatter(_FORMATS.get(panel.unit, "{x:,g}"))
    if answers:
        axes.legend(
            loc="upper center",
            bbox_to_anchor=(0.5, -0.18),
            ncols=len(answers) if len("".join(answers)) < _ONE_LINE else 2,
            borderpad=0,
            columnspacing=1,
            handlelength=1,
        )
