# SPDX-License-Identifier: Apache-2.0
"""A CSV file that grows by whole rows, so that a run cut short goes on later."""

from __future__ import annotations

import csv
import json
import multiprocessing
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.kernels.measuring import environment


class Table:
    """Rows of results and which of them are there already.

    Args:
        path: The file; made with its header if it does not exist.
        key: Columns that tell one measurement from another.
        results: Columns that a measurement fills.

    Raises:
        ValueError: The file has other columns.
    """

    def __init__(
        self, path: Path, *, key: Sequence[str], results: Sequence[str]
    ) -> None:
        self.path = path
        self._key = key
        self._columns = [*key, *results]
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="") as file:
                csv.DictWriter(file, self._columns).writeheader()
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != self._columns:
                raise ValueError(
                    f"{path} has the columns {reader.fieldnames}, but must have "
                    f"{self._columns}. Move it away, or write to another folder."
                )
            self._done = {self._of(row) for row in reader}

    def has(self, row: Mapping[str, object]) -> bool:
        """Return whether there is a row with this one's key."""
        return self._of(row) in self._done

    def append(self, row: Mapping[str, object]) -> None:
        """Write a row at once; columns that it lacks stay empty."""
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)
        self._done.add(self._of(row))

    def _of(self, row: Mapping[str, object]) -> tuple[str, ...]:
        return tuple(str(row.get(column, "")) for column in self._key)


def rows_of(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file, none if it does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def machine(commit: str | None) -> dict[str, str]:
    """Return GPU, driver, versions and commit.

    Asked in a process of its own: engines are forked while CUDA is not in use here.

    Args:
        commit: Name of the code, where git cannot tell it.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        facts = pool.apply(environment)
    command = " ".join(["python -m benchmarks.serving", *sys.argv[1:]])
    return {**facts, "commit": commit or facts["commit"], "command": command}


def note_machine(path: Path, facts: Mapping[str, object]) -> None:
    """Add a call's versions and flags to the JSON file beside a table."""
    calls = json.loads(path.read_text()) if path.exists() else []
    calls.append(dict(facts))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(calls, indent=1) + "\n")
