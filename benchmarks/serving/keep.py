# SPDX-License-Identifier: Apache-2.0
"""Adds what another machine has measured to the tables of this repository."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

from benchmarks.serving.table import rows_of

GROWING = ("serving", "prefill", "memory", "scheduler")
"""Tables that keep their rows; every other file replaces the one before."""


def keep(source: Path, results: Path) -> list[Path]:
    """Add a folder's tables to others; return the files that were written.

    Args:
        source: Folder that a benchmark has written.
        results: Folder of the tables that are kept.

    Raises:
        ValueError: A table has columns that the kept one lacks.
    """
    written = []
    for path in sorted([*source.glob("*.csv"), *source.glob("*.json")]):
        kept = results / path.name
        if path.stem not in GROWING or not kept.exists():
            shutil.copyfile(path, kept)
        elif path.suffix == ".csv":
            _append(path, kept)
        else:
            calls = json.loads(kept.read_text()) + json.loads(path.read_text())
            kept.write_text(json.dumps(calls, indent=1) + "\n")
        written.append(kept)
    return written


def _append(path: Path, kept: Path) -> None:
    with kept.open("r+", newline="") as file:
        columns = list(csv.DictReader(file).fieldnames or ())
        rows = rows_of(path)
        unknown = {column for row in rows for column in row} - set(columns)
        if unknown:
            raise ValueError(
                f"{path} has the columns {sorted(unknown)}, which {kept} lacks. "
                "Move the latter away to start a new table."
            )
        file.seek(0, 2)
        csv.DictWriter(file, columns).writerows(rows)
