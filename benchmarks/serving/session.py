# SPDX-License-Identifier: Apache-2.0
"""Works off a list of measurements within a time limit, each row written at once."""

from __future__ import annotations

import gc
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serving.table import Table, note_machine

MACHINE = ("gpu", "vllm", "commit", "flags")
"""Columns of every table: a row counts only beside rows of the same machine."""

END_SECONDS = 30


def await_engine_end() -> None:
    """Return when the engine's processes are gone: the next needs their memory."""
    if multiprocessing.active_children():
        # an engine ends when its handle is collected
        gc.collect()
    for process in multiprocessing.active_children():
        process.join(END_SECONDS)


Row = Mapping[str, object]


@dataclass(frozen=True)
class Plan:
    """What is to be measured for one table.

    Attributes:
        name: The table's, without its suffix.
        key: Columns that tell one measurement from another.
        results: Columns that a measurement fills.
        measurements: The former columns of each, and what returns the latter.
    """

    name: str
    key: Sequence[str]
    results: Sequence[str]
    measurements: Sequence[tuple[Row, Callable[[], Row]]]


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
        begin = time.monotonic()
        table = Table(
            self.out / f"{plan.name}.csv",
            key=[*MACHINE, *plan.key],
            results=plan.results,
        )
        note_machine(self.out / f"{plan.name}.json", self.facts)
        failures = 0
        for columns, measure in plan.measurements:
            row = {**{column: self.facts[column] for column in MACHINE}, **columns}
            label = " ".join(str(value) for value in columns.values() if value != "")
            if table.has(row) and not self.again:
                print(f"there already: {label}", flush=True)
                continue
            start = time.monotonic()
            if start - begin > self.time_limit:
                print(f"no time left: {label}", flush=True)
                continue
            try:
                measured = measure()
            except Exception as error:
                # one engine that does not start must not cost the others' figures
                failures += 1
                print(f"failed: {label}: {error!r}", file=sys.stderr, flush=True)
            else:
                table.append({**row, **measured})
                seconds = time.monotonic() - start
                print(f"{label}: {dict(measured)} in {seconds:.0f} s", flush=True)
            await_engine_end()
        return failures
