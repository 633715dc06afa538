# SPDX-License-Identifier: Apache-2.0
"""Results as CSV files, one row a measurement, and what made them beside them.

Every benchmark writes its rows through this module, and every table and picture of the
documentation is made from what `read` returns. GPU, versions and commands stand in one
`provenance.json` a folder, by the name of the table.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

RESULTS = Path(__file__).parent / "results"
"""The rows that this repository keeps."""
PROVENANCE = "provenance.json"
Row = Mapping[str, object]

_TEXT = (
    *("gpu", "vllm", "commit", "flags", "backend", "kv_cache_dtype", "policy"),
    *("shield", "ranks", "prefix_hits", "answers", "short_of", "note", "teller"),
)
"""Columns that are text, also where they are empty or look like numbers."""


def read(path: Path) -> pd.DataFrame:
    """Return a table with a type for every column; empty if there is no file.

    Empty cells are missing numbers, or empty text.
    """
    if not path.exists():
        return pd.DataFrame()
    frame = pd.read_csv(
        path,
        dtype=dict.fromkeys(_TEXT, "string"),
        keep_default_na=False,
        na_values=["", "nan"],
        dtype_backend="numpy_nullable",
    )
    text: pd.DataFrame = frame.select_dtypes("string").fillna("")
    return frame.assign(**{str(name): text[name] for name in text})


def write(path: Path, rows: Iterable[Row] | pd.DataFrame) -> None:
    """Write a table; a reader sees the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    frame = rows if isinstance(rows, pd.DataFrame) else _frame(list(rows))
    frame.to_csv(unfinished, index=False, lineterminator="\n")
    os.replace(unfinished, path)


def matching(frame: pd.DataFrame, **values: object) -> pd.DataFrame:
    """Return the rows that have these values, in the table's order."""
    chosen = pd.Series(True, index=frame.index)
    for name, value in values.items():
        column = frame[name]
        is_empty = column.isna() | (column == "").fillna(False)
        chosen &= is_empty if value in (None, "") else (column == value).fillna(False)
    return frame[chosen]


@dataclass(frozen=True)
class Table:
    """A CSV file that grows by whole rows, so that a run cut short goes on later.

    Attributes:
        name: Of the file, without its suffix.
        key: Columns that tell one measurement from another.
        results: Columns that a measurement fills.
    """

    name: str
    key: Sequence[str]
    results: Sequence[str]

    def read(self, folder: Path) -> pd.DataFrame:
        """Return the rows of a folder's file.

        Raises:
            ValueError: The file has other columns.
        """
        path, columns = folder / f"{self.name}.csv", [*self.key, *self.results]
        frame = read(path) if path.exists() else pd.DataFrame(columns=columns)
        if list(frame.columns) != columns:
            raise ValueError(
                f"{path} has the columns {list(frame.columns)}, but must have "
                f"{columns}. Move it away, or write to another folder."
            )
        return frame

    def has(self, folder: Path, row: Row) -> bool:
        """Return whether there is a row with this one's key."""
        key = {name: row.get(name) for name in self.key}
        return not matching(self.read(folder), **key).empty

    def append(self, folder: Path, row: Row) -> None:
        """Write a row at once; columns that it lacks stay empty."""
        _append(folder / f"{self.name}.csv", _frame([row], self.read(folder).columns))


def note(folder: Path, table: str, facts: Row) -> None:
    """Add what a table's rows depend on to the folder's provenance."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PROVENANCE
    found = noted(folder)
    if facts not in (calls := found.setdefault(table, [])):
        calls.append(dict(facts))
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def noted(folder: Path) -> dict[str, list[dict[str, object]]]:
    """Return a folder's provenance: each table's calls, the newest last."""
    path = folder / PROVENANCE
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def keep(source: Path, results: Path, growing: Iterable[str]) -> list[Path]:
    """Add a folder's tables to others; return the files that were written.

    Args:
        source: Folder that benchmarks have written.
        results: Folder of the tables that are kept.
        growing: Tables that keep their rows; any other replaces the one before.

    Raises:
        ValueError: A table has columns that the kept one lacks.
    """
    provenance = noted(source)
    written = []
    for path in sorted([*source.glob("*.csv"), *source.glob("*.jsonl")]):
        kept = results / path.name
        if path.stem in growing and kept.exists():
            columns, rows = read(kept).columns, read(path)
            if unknown := sorted(set(rows.columns) - set(columns)):
                raise ValueError(
                    f"{path} has the columns {unknown}, which {kept} lacks. Move the "
                    "latter away to start a new table."
                )
            _append(kept, rows.reindex(columns=columns))
        else:
            results.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, kept)
        for facts in provenance.get(path.stem, []):
            note(results, path.stem, facts)
        written.append(kept)
    return written


def _frame(rows: Sequence[Row], columns: pd.Index[str] | None = None) -> pd.DataFrame:
    # whole numbers stay whole beside empty cells
    return pd.DataFrame(rows, columns=columns, dtype=object)


def _append(path: Path, frame: pd.DataFrame) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        frame.to_csv(file, header=file.tell() == 0, index=False, lineterminator="\n")
