# SPDX-License-Identifier: Apache-2.0
"""The demo's one picture: KV tokens held over time, against full attention."""

from __future__ import annotations

import math
from collections.abc import Sequence as Items
from pathlib import Path

from tools.demo.measured import Sequence

_PANELS_PER_ROW = 4
_HELD = "#1f5fa8"
_FULL = "#8a8a8a"
_BUDGET = "#c2571a"


def draw_picture(
    path: Path, titles: Items[str], sequences: Items[Sequence], budget: int
) -> None:
    """Write a PNG with one panel per sequence.

    Args:
        path: The file; missing folders are made.
        titles: Of the panels.
        sequences: What to show, in the same order.
        budget: Tokens kept per sequence.
    """
    import matplotlib

    # also where there is no display
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(_PANELS_PER_ROW, len(sequences))
    rows = math.ceil(len(sequences) / columns)
    figure, grid = pyplot.subplots(
        rows,
        columns,
        figsize=(0.6 + 2.8 * columns, 0.9 + 2.4 * rows),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    panels = list(grid.flat)
    for panel, title, sequence in zip(panels, titles, sequences, strict=False):
        seconds = [time - sequence.times[0] for time in sequence.times]
        held, full = sequence.held_tokens, sequence.full_tokens
        panel.fill_between(
            seconds, held, full, step="post", color=_HELD, alpha=0.10, linewidth=0
        )
        panel.step(
            seconds,
            full,
            where="post",
            color=_FULL,
            linestyle="--",
            label="full attention",
        )
        panel.step(
            seconds,
            held,
            where="post",
            color=_HELD,
            linewidth=1.8,
            label="held with RoCo",
        )
        panel.axhline(budget, color=_BUDGET, linewidth=0.9, label=f"budget {budget:,}")
        panel.set_title(f"{title}: {max(held):,} instead of {max(full):,}", fontsize=10)
        panel.set_xlabel("seconds")
        panel.set_ylim(bottom=0)
        panel.set_xlim(left=0)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", alpha=0.25)
        panel.yaxis.set_major_formatter("{x:,.0f}")
    for panel in panels[len(sequences) :]:
        panel.set_visible(False)
    for row in grid:
        row[0].set_ylabel("KV tokens held")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=3,
        frameon=False,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
