# SPDX-License-Identifier: Apache-2.0
"""One style for every picture, and files that are the same whenever they are drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

GREY, PALE_GREY, PALE_BLUE, BLUE, DARK_BLUE = COLOURS = (
    *("#8a8f98", "#c5c9d0"),
    *("#7fb3e6", "#1f6fc4", "#0b3d78"),
)
ORANGE = "#c2571a"

STYLE: dict[Any, object] = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    # text stays text
    "svg.fonttype": "none",
    "svg.hashsalt": "roco",
}


def panels(
    count: int,
    *,
    columns: int = 2,
    size: tuple[float, float] = (3.9, 2.5),
    **options: Any,
) -> tuple[Figure, list[Axes]]:
    """Return a figure and so many panels of a size in inches, side by side."""
    columns = min(columns, count)
    rows = -(-count // columns)
    width, height = size
    figure = Figure(figsize=(width * columns + 0.2, height * rows + 0.9))
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    every = list(axes.flat)
    for unused in every[count:]:
        unused.remove()
    return figure, every[:count]


def legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """Show what the panels' lines are, each label once, above the panels."""
    handles: dict[str, Artist] = {}
    for panel in axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=3)


@dataclass(frozen=True)
class Picture:
    """A picture of the documentation.

    Attributes:
        draw: Makes it of a folder of results; None where rows are missing.
        tables: What it is drawn from.
    """

    draw: Callable[[Path], Figure | None]
    tables: tuple[str, ...]

    def source(self, results: Path) -> str:
        """Return the files' names, each with what tells whether it has changed."""
        files = [results / f"{table}.csv" for table in self.tables]
        return ", ".join(
            f"{file.name} {sha256(file.read_bytes()).hexdigest()[:12]}"
            for file in files
            if file.exists()
        )

    def write(self, results: Path, path: Path) -> bool:
        """Draw it into an SVG file that names its source; return whether it can be."""
        with matplotlib.rc_context(STYLE):
            figure = self.draw(results)
            if figure is not None:
                # an SVG's date would change with every drawing
                metadata = {"Date": None, "Source": self.source(results)}
                figure.savefig(path, metadata=metadata)
        return figure is not None
