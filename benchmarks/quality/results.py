# SPDX-License-Identifier: Apache-2.0
"""The result of every problem of every cell, in a file that only grows.

Workers append to it the moment a cell is known, whatever becomes of them afterwards.
The table is made from it, paired comparisons too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.cells import Cell

Metrics = Mapping[str, list[float]]
"""Metric to one number a problem; of a perplexity, its mean loss in nats."""

_DIGITS = 5


@dataclass(frozen=True)
class Result:
    """What came of a cell.

    Attributes:
        cell: What was measured.
        metrics: The numbers.
        gpu: Device that ran it.
        commit: Of the code.
        seconds: Taken beside what else ran, without the start of the engine; None in
            files from before they were told.
    """

    cell: Cell
    metrics: Metrics
    gpu: str
    commit: str
    seconds: float | None = None


def append(path: Path, result: Result) -> None:
    """Add a line, whole even when several processes add lines at once."""
    metrics = {
        name: [round(value, _DIGITS) for value in values]
        for name, values in result.metrics.items()
    }
    line = json.dumps(
        {
            "cell": result.cell.to_json(),
            "metrics": metrics,
            "gpu": result.gpu,
            "commit": result.commit,
            "seconds": result.seconds,
        }
    )
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, f"{line}\n".encode())
    finally:
        os.close(file)


def read(path: Path) -> dict[Cell, Result]:
    """Return what the file holds; none if there is no file."""
    if not path.exists():
        return {}
    results = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)
        cell = Cell.from_json(fields.pop("cell"))
        results[cell] = Result(cell, **fields)
    return results
