# SPDX-License-Identifier: Apache-2.0
"""From a preset to its table: what is left to measure, and in which order."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from benchmarks import machine, rows
from benchmarks.quality import jobs, results, scoring
from benchmarks.quality.cells import Cell
from benchmarks.quality.grid import BASE, FULL, LEAST_FULL_ACCURACY, Preset, cells
from benchmarks.quality.grid import jobs as jobs_of
from benchmarks.quality.presets import PRESETS
from benchmarks.quality.results import Result
from benchmarks.quality.training.trained import ADAPTERS, find_any
from tools.packaged_models import PACKAGED_MODELS

_SHARE_DIGITS = 3
GRID, ASKED = ORDERS = ("grid", "asked")
"""The most telling cells of a preset first, or what its user names first."""
Results = Mapping[Cell, Result]
ROWS: dict[str, Callable[[Results], pd.DataFrame]] = {
    "quality": scoring.rows,
    "search": scoring.search_rows,
    "kvpress": scoring.rows,
    "modes": scoring.rows,
    "fp8": scoring.rows,
    "windows": scoring.rows,
    "hard": scoring.rows,
    "written": scoring.rows,
    "pace": scoring.rows,
}
"""What makes each table of the results beside it."""


def run(arguments: argparse.Namespace) -> None:
    """Measure what the full cache can do, or all of a preset without one."""
    preset = PRESETS[arguments.preset]
    model = arguments.model or preset.model
    is_named = model in (*PACKAGED_MODELS, *ADAPTERS)
    name = model if is_named else Path(model).resolve().name
    seed = preset.seed if arguments.seed is None else arguments.seed
    grid = cells(preset, model=name, seed=seed, n=arguments.n)
    wanted = [cell for cell in grid if _is_wanted(cell, preset, arguments)]
    if arguments.order == ASKED:
        wanted.sort(key=lambda cell: _place(cell, arguments))
    folder: Path = arguments.out
    path = folder / f"{preset.table}_results.jsonl"
    done = results.read(path)
    known = [] if arguments.dry_run else arguments.known
    if _take_over(known, set(wanted) - done.keys(), path):
        done = results.read(path)
        _write_table(folder, preset, grid, done)
    todo = [cell for cell in wanted if cell not in done]
    print(f"{len(todo)} cells in {len(jobs_of(todo))} processes", flush=True)
    if arguments.dry_run:
        return

    model = find_any(model)
    facts = machine.environment_elsewhere()
    commit = arguments.commit or facts["commit"]
    workplace = jobs.Workplace(model, commit, path, folder / "quality_logs")
    until = time.monotonic() + arguments.time_limit
    rows.note(
        folder,
        preset.table,
        {**facts, "commit": commit, "model": name, "seed": seed, "base": asdict(BASE)},
    )
    with tqdm(total=len(wanted), initial=len(wanted) - len(todo), unit="cell") as bar:
        # what the full cache cannot do is not worth sweeping
        firsts = [cell for cell in todo if cell.setup == FULL]
        others = [cell for cell in todo if cell.setup != FULL]
        for phase in [firsts + others] if arguments.at_once else [firsts, others]:
            done = results.read(path)
            chosen = [
                cell
                for cell in phase
                if arguments.at_once or can_be_swept(cell, preset, done)
            ]
            bar.total -= len(phase) - len(chosen)
            for failures in jobs.run(
                jobs_of(chosen), workplace, parallel=arguments.parallel, until=until
            ):
                for failure in failures:
                    bar.write(failure)
                now = results.read(path)
                if len(now) > len(done):
                    done = now
                    _write_table(folder, preset, grid, done)
                bar.n = sum(cell in done for cell in wanted)
                bar.refresh()
    missing = [c for c in todo if c not in done and can_be_swept(c, preset, done)]
    if missing:
        print(f"{len(missing)} cells are missing. The same command goes on with them.")


def _write_table(
    folder: Path, preset: Preset, grid: Sequence[Cell], done: Results
) -> None:
    """Write rows in the order of the grid, those of another run last."""
    ordered = {cell: done[cell] for cell in grid if cell in done}
    ordered |= done
    rows.write(folder / f"{preset.table}.csv", ROWS[preset.table](ordered))


def _take_over(known: list[Path], wanted: set[Cell], path: Path) -> int:
    """Add what other files know of the cells that are wanted; return how many."""
    found = {
        cell: result
        for file in known
        for cell, result in results.read(file).items()
        if cell in wanted
    }
    for result in found.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        results.append(path, result)
    return len(found)


def can_be_swept(cell: Cell, preset: Preset, done: Results) -> bool:
    """Return whether the full cache solves enough of a cell's problems.

    Presets that are compared with another method go without that.
    """
    if cell.setup == FULL or preset.reference != FULL.method:
        return True
    full = done.get(scoring.full_of(cell))
    if full is None:
        return False
    scores = full.metrics.get("accuracy")
    return scores is None or sum(scores) / len(scores) >= LEAST_FULL_ACCURACY


def _is_wanted(cell: Cell, preset: Preset, arguments: argparse.Namespace) -> bool:
    methods = {preset.reference, *(arguments.methods or [cell.setup.method])}
    return (
        cell.setup.method in methods
        and cell.task in (arguments.tasks or [cell.task])
        and cell.context in (arguments.contexts or [cell.context])
        and _share(cell) in {1.0, *(arguments.shares or [_share(cell)])}
    )


def _share(cell: Cell) -> float:
    """Return the budget over the context, as it is named."""
    return round(cell.budget_ratio, _SHARE_DIGITS)


def _place(cell: Cell, arguments: argparse.Namespace) -> tuple[int, ...]:
    """Return where a cell stands if what was named first is measured first."""
    named = (
        (cell.context, arguments.contexts),
        (cell.task, arguments.tasks),
        (_share(cell), arguments.shares),
        (cell.setup.method, arguments.methods),
    )
    return tuple(
        order.index(value) if order and value in order else -1 for value, order in named
    )
