# SPDX-License-Identifier: Apache-2.0
"""Runs measurements within a time limit, an engine's after another's."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd

from benchmarks import rows
from benchmarks.rows import Row, Table
from benchmarks.serving.shared_engine import SharedEngine

MACHINE = ("gpu", "vllm", "commit", "flags")
"""Columns of every table: a row counts only beside rows of the same machine."""

Measurement = tuple[Row, Callable[[], Row]]
"""A row's columns that are known before, and what returns the others."""
Job = Iterable[Measurement]
"""What one engine measures; a later one may depend on the rows of those before."""


@dataclass(frozen=True)
class Session:
    """One call of the command.

    Attributes:
        out: Folder of the tables.
        facts: GPU, driver, versions, commit and flags, for the provenance.
        time_limit: Seconds after which nothing new is begun.
    """

    out: Path
    facts: Row
    time_limit: float

    @property
    def machine(self) -> Row:
        """The columns that every row begins with."""
        return {column: self.facts[column] for column in MACHINE}

    def run(self, table: Table, jobs: Iterable[Job]) -> int:
        """Measure what is not yet in a table; return how much failed."""
        end = time.monotonic() + self.time_limit
        table = self._whole(table)
        # other columns are refused before anything is measured
        table.read(self.out)
        rows.note(self.out, table.name, self.facts)
        failures = 0
        for job in jobs:
            with SharedEngine() as engine:
                for columns, measure in job:
                    if not self._add(table, columns, measure, end):
                        failures += 1
                        # requests may be left in it, or it may be dead
                        _end(engine)
        return failures

    def known(self, table: Table, columns: Row) -> pd.DataFrame:
        """Return a table's rows of this machine that have some columns."""
        whole = self._whole(table)
        key = {name: columns[name] for name in table.key if name in columns}
        return rows.matching(whole.read(self.out), **self.machine, **key)

    @staticmethod
    def _whole(table: Table) -> Table:
        return replace(table, key=[*MACHINE, *table.key])

    def _add(
        self, table: Table, columns: Row, measure: Callable[[], Row], end: float
    ) -> bool:
        """Measure a row unless it is there or time is up; return whether that works."""
        row = {**self.machine, **columns}
        label = " ".join(str(value) for value in columns.values() if value is not None)
        if table.has(self.out, row):
            print(f"there already: {label}", flush=True)
            return True
        start = time.monotonic()
        if start > end:
            print(f"no time left: {label}", flush=True)
            return True
        try:
            measured = measure()
        except Exception as error:
            # one that fails must not cost the others' figures
            print(f"failed: {label}: {error!r}", file=sys.stderr, flush=True)
            return False
        table.append(self.out, {**row, **measured})
        seconds = time.monotonic() - start
        print(f"{label}: {dict(measured)} in {seconds:.0f} s", flush=True)
        return True


def _end(engine: SharedEngine) -> None:
    try:
        engine.end()
    except Exception as error:
        # the rows of later engines can be measured all the same
        print(f"the engine does not end: {error!r}", file=sys.stderr, flush=True)
