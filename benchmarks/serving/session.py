# SPDX-License-Identifier: Apache-2.0
"""Works off a list of measurements within a time limit, each row written at once."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving.shared_engine import SharedEngine
from benchmarks.serving.table import Table, note_machine

MACHINE = ("gpu", "vllm", "commit", "flags")
"""Columns of every table: a row counts only beside rows of the same machine."""

Row = Mapping[str, object]
Measurement = tuple[Row, Callable[[], Row]]
"""A row's columns that are known before, and what returns the others."""


def _end(engine: SharedEngine) -> None:
    try:
        engine.end()
    except Exception as error:
        # the rows of later engines can be measured all the same
        print(f"the engine does not end: {error!r}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Plan:
    """What is to be measured for one table.

    Attributes:
        name: The table's, without its suffix.
        key: Columns that tell one measurement from another.
        results: Columns that a measurement fills.
        engines: The measurements of one engine after another.
    """

    name: str
    key: Sequence[str]
    results: Sequence[str]
    engines: Sequence[Sequence[Measurement]]


@dataclass(frozen=True)
class Session:
    """One call of the command.

    Attributes:
        out: Folder of the tables.
        facts: GPU, driver, versions, commit and flags, for the JSON file.
        time_limit: Seconds after which nothing new is begun.
        again: Whether rows are measured that are there already.
    """

    out: Path
    facts: Mapping[str, object]
    time_limit: float
    again: bool

    def work_off(self, plan: Plan) -> int:
        """Measure what is not yet in the table; return how much failed."""
        end = time.monotonic() + self.time_limit
        table = Table(
            self.out / f"{plan.name}.csv",
            key=[*MACHINE, *plan.key],
            results=plan.results,
        )
        note_machine(self.out / f"{plan.name}.json", self.facts)
        failures = 0
        for measurements in plan.engines:
            with SharedEngine() as engine:
                for columns, measure in measurements:
                    if not self._add(table, columns, measure, end):
                        failures += 1
                        # requests may be left in it, or it may be dead
                        _end(engine)
        return failures

    def _add(
        self, table: Table, columns: Row, measure: Callable[[], Row], end: float
    ) -> bool:
        """Measure a row unless it is there or time is up; return whether that works."""
        row = {**{column: self.facts[column] for column in MACHINE}, **columns}
        label = " ".join(str(value) for value in columns.values() if value != "")
        if table.has(row) and not self.again:
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
        table.append({**row, **measured})
        seconds = time.monotonic() - start
        print(f"{label}: {dict(measured)} in {seconds:.0f} s", flush=True)
        return True
